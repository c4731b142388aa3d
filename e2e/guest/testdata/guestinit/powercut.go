package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	window    = 150 // files that are kept
	slotCount = 64  // records that are overwritten in place
	slotBytes = 4096
	slack     = 3 // changes after the last report that may have been under way
	mountAt   = "/mnt"
)

// powercut makes a file system or checks the one that is there, and then writes
// files and syncs each until the power goes. The host tells the last file that
// was reported.
func (g *guest) powercut() error {
	fs, last := g.args["fs"], number(g.args["last"])
	if err := waitFile("/dev/vda"); err != nil {
		return err
	}
	if g.args["mkfs"] != "" {
		if err := g.step("mkfs", func() error { return mkfs(fs, "/dev/vda") }); err != nil {
			return err
		}
	} else if err := g.check(fs, "/dev/vda", last); err != nil {
		return err
	}
	if g.args["write"] == "" {
		return nil
	}
	if err := mount(fs, "/dev/vda"); err != nil {
		return err
	}
	w := &writer{seed: uint64(number(g.args["seed"]))}
	if err := w.open(); err != nil {
		return err
	}
	unix.Sync()
	g.say("synced %d", last)
	for n := last + 1; ; n++ {
		if err := w.write(n); err != nil {
			return fmt.Errorf("write file %d: %w", n, err)
		}
		g.say("synced %d", n)
	}
}

// check mounts the file system, so that its journal is replayed, looks at it
// with its checking program and compares its files.
func (g *guest) check(fs, dev string, last int) error {
	if err := g.step("replay", func() error {
		if err := mount(fs, dev); err != nil {
			return err
		}
		return unix.Unmount(mountAt, 0)
	}); err != nil {
		return err
	}
	if err := g.step("fsck", func() error { return fsck(fs, dev) }); err != nil {
		return err
	}
	if err := mount(fs, dev); err != nil {
		return err
	}
	err := g.step("compare", func() error { return verify(uint64(number(g.args["seed"])), last) })
	if err := unix.Unmount(mountAt, 0); err != nil {
		return err
	}
	if err == nil {
		g.say("checked %d", last)
	}
	return err
}

// writer makes the changes, numbered from 1.
type writer struct {
	seed  uint64
	slots *os.File
}

func (w *writer) open() (err error) {
	w.slots, err = os.OpenFile(mountAt+"/slots", os.O_RDWR|os.O_CREATE, 0o600)
	return err
}

// write makes one change durable: a new file, its name, a record overwritten in
// place, and an old file gone.
func (w *writer) write(n int) error {
	f, err := os.Create(name(n))
	if err != nil {
		return err
	}
	_, err = f.Write(content(w.seed, n))
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return err
	}
	if _, err := w.slots.WriteAt(slot(w.seed, n), int64(n%slotCount)*slotBytes); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(w.slots.Fd())); err != nil {
		return err
	}
	if n > window {
		if err := os.Remove(name(n - window)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	dir, err := os.Open(mountAt)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// verify looks for every change up to last. Changes that were under way when
// the power went may be there or not.
func verify(seed uint64, last int) error {
	lost, wrong := 0, 0
	for n := max(1, last-window+slack); n <= last; n++ {
		got, err := os.ReadFile(name(n))
		switch {
		case os.IsNotExist(err):
			lost++
		case err != nil:
			return err
		case !bytes.Equal(got, content(seed, n)):
			wrong++
		}
	}
	slots, err := os.ReadFile(mountAt + "/slots")
	if err != nil {
		return err
	}
	stale := 0
	for n := max(1, last-slotCount+1+slack); n <= last; n++ {
		at := n % slotCount * slotBytes
		if len(slots) < at+slotBytes || !bytes.Equal(slots[at:at+slotBytes], slot(seed, n)) {
			stale++
		}
	}
	if lost+wrong+stale > 0 {
		return fmt.Errorf("of files up to %d, %d are lost and %d wrong; %d records are old", last, lost, wrong, stale)
	}
	return nil
}

func name(n int) string { return fmt.Sprintf("%s/f%06d", mountAt, n) }

// content is what file n holds: its number and bytes that repeat nowhere.
func content(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, uint64(n)))
	b := make([]byte, 8+r.IntN(48<<10))
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	binary.LittleEndian.PutUint64(b, uint64(n))
	return b
}

// slot is the record of change n.
func slot(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(^seed, uint64(n)))
	b := make([]byte, slotBytes)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

func number(s string) int {
	n, _ := strconv.Atoi(s) // absent is 0
	return n
}

func mkfs(fs, dev string) error {
	if fs == "xfs" {
		return command("mkfs.xfs", "-q", "-f", dev)
	}
	return command("mkfs."+fs, "-q", "-F", dev)
}

// fsck runs the checking program of a file system, which must find nothing.
func fsck(fs, dev string) error {
	if fs == "xfs" {
		return command("xfs_repair", "-n", dev)
	}
	return command("fsck."+fs, "-f", "-n", dev)
}

// mount mounts with discard, so that removed files are trimmed.
func mount(fs, dev string) error {
	if err := unix.Mount(dev, mountAt, fs, 0, "discard"); err != nil {
		return fmt.Errorf("mount %s as %s: %w", dev, fs, err)
	}
	return nil
}
