package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What was acknowledged as durable is there after kill -9 of the server, on a
// volume of either cache mode, again and again.
func TestKillServer(t *testing.T) {
	t.Parallel()
	s := startServer(t, "--log-level", "warn")
	back, through := newHistory(t, 64<<20), newHistory(t, 64<<20)
	through.through = true
	s.create("back", "64M")
	s.create("through", "64M", "--cache", "writethrough")
	rng := rand.New(rand.NewPCG(back.seed, 2))
	for round := range rounds(5, 20) {
		uri := s.uri("back")
		loads := []*load{startLoad(back, false, dialer(uri)), startLoad(through, false, dialer(s.uri("through")))}
		time.Sleep(time.Duration(100+rng.IntN(1400)) * time.Millisecond)
		s.kill()
		ops := int64(0)
		for _, l := range loads {
			l.wait(t)
			ops += l.ops.Load()
		}
		s.start()
		begin := time.Now()
		c, d := dial(t, s.uri("back")), dial(t, s.uri("through"))
		opened := time.Since(begin)
		n := back.verify(t, c) + through.verify(t, d)
		t.Logf("round %d: %d operations; ready %v after the restart, opened in %v; %d durable blocks are right",
			round, ops, s.took.Round(time.Millisecond), opened.Round(time.Millisecond), n)
		c.Close()
		d.Close()
	}
	s.atoll("volume", "check", "back", "--read")
	s.atoll("volume", "check", "through", "--read")
}

// mounted is a file system on an attached volume.
type mounted struct {
	s      *server
	volume string
	kind   string
	dir    string
	at     attachmentJSON
}

// attachmentJSON is what "volume attach -o json" prints.
type attachmentJSON struct {
	Device, Way, Mount string
	PID                int
}

func (m *mounted) attach(flags ...string) {
	m.s.t.Helper()
	m.at = attachmentJSON{}
	text := m.s.atoll(append([]string{"volume", "attach", m.volume, "-o", "json"}, flags...)...)
	if err := json.Unmarshal([]byte(text), &m.at); err != nil || m.at.Device == "" {
		m.s.t.Fatalf("attach: %v: %s", err, text)
	}
}

// crash ends the helper too and removes what it leaves behind in the kernel.
func (m *mounted) crash() {
	m.s.t.Helper()
	if m.at.PID == 0 {
		return
	}
	_ = syscall.Kill(m.at.PID, syscall.SIGKILL)
	m.at.PID = 0
	for _, ext := range []string{".json", ".log"} {
		_ = os.Remove(filepath.Join("/run/atoll/attach", m.volume+ext))
	}
	backing := loopBacking(m.at.Device)
	_ = exec.Command("umount", "-l", m.dir).Run()
	_ = exec.Command("losetup", "-d", m.at.Device).Run()
	if dir := filepath.Dir(backing); backing != "" && strings.Contains(dir, "attach/mnt-") {
		_ = exec.Command("umount", "-l", dir).Run()
		_ = os.Remove(dir)
	}
	eventually(m.s.t, "the stale loop device is free", func() bool { return loopBacking(m.at.Device) == "" })
}

// loopBacking is the file behind a loop device, empty if there is none.
func loopBacking(dev string) string {
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "loop/backing_file"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// fill writes files and syncs each, until an error; it returns how many were
// synced. Beside it unsynced files come and go.
func (m *mounted) fill(ctx context.Context, from int, seed uint64) int {
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			path := filepath.Join(m.dir, fmt.Sprintf("noise%d", i%20))
			if os.WriteFile(path, content(seed, -i), 0o600) != nil {
				return
			}
			if i%3 == 0 && os.Remove(path) != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	synced := from
	for ctx.Err() == nil && m.sync(synced, seed) == nil {
		synced++
	}
	wg.Wait()
	return synced
}

// sync writes a file so that it must survive.
func (m *mounted) sync(i int, seed uint64) error {
	f, err := os.Create(filepath.Join(m.dir, fmt.Sprintf("file%d", i)))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content(seed, i)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	d, err := os.Open(m.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// content is what is in file i.
func content(seed uint64, i int) []byte {
	rng := rand.New(rand.NewPCG(seed, uint64(int64(i))))
	p := make([]byte, 1+rng.IntN(200_000))
	for k := 0; k+8 <= len(p); k += 8 {
		v := rng.Uint64()
		for b := range 8 {
			p[k+b] = byte(v >> (8 * b))
		}
	}
	return p
}

// A file system on an attached volume survives kill -9 of server and helper at
// random moments: it is clean after its journal was replayed, and every file
// that was synced is there.
func TestFilesystemCrash(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			needRoot(t)
			need(t, "mkfs."+kind, "losetup", "mount", "umount")
			filesystemCrash(t, kind)
		})
	}
}

func filesystemCrash(t *testing.T, kind string) {
	s := startServer(t, "--nbd", "none", "--log-level", "warn")
	m := &mounted{s: s, kind: kind, volume: fmt.Sprintf("e2e-%s-%x", kind, rand.Uint64()), dir: filepath.Join(s.dir, "mnt")}
	t.Cleanup(m.crash)
	s.create(m.volume, "1G")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	m.attach("--driver", "fuse", "--mkfs", kind, "--mount", m.dir)
	if m.at.Mount != m.dir {
		t.Fatalf("attached as %+v", m.at)
	}
	var lost atomic.Int64
	total := 0
	for round := range rounds(10, 30) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan int, 1)
		go func() { done <- m.fill(ctx, 0, seed+uint64(round)) }()
		time.Sleep(time.Duration(300+rng.IntN(1500)) * time.Millisecond)
		s.kill()
		cancel()
		m.crash()
		synced := <-done
		total += synced
		s.start()
		m.attach("--driver", "fuse", "--mount", m.dir) // replays the journal
		for i := range synced {
			got, err := os.ReadFile(filepath.Join(m.dir, fmt.Sprintf("file%d", i)))
			if err != nil || !bytes.Equal(got, content(seed+uint64(round), i)) {
				lost.Add(1)
				t.Errorf("round %d: synced file %d of %d is wrong: %d bytes, %v", round, i, synced, len(got), err)
			}
		}
		run(t, "umount", m.dir)
		fsck(t, kind, m.at.Device)
		run(t, "mount", m.at.Device, m.dir)
		for _, f := range glob(t, m.dir, "file*") {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
		run(t, "sync", "-f", m.dir)
		t.Logf("round %d: %d synced files are right, fsck is clean", round, synced)
	}
	if total == 0 {
		t.Error("no file was synced in any round: the test shows nothing")
	}
	if out := run(t, "fstrim", "-v", m.dir); !strings.Contains(out, "trimmed") {
		t.Errorf("fstrim says %q", out)
	}
	s.atoll("volume", "detach", m.volume)
	m.at.PID = 0
	if loopBacking(m.at.Device) != "" {
		t.Errorf("%s is still there after detach", m.at.Device)
	}
	s.atoll("volume", "check", m.volume, "--read")
}

func glob(t *testing.T, dir, pattern string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func fsck(t *testing.T, kind, dev string) {
	t.Helper()
	if kind == "xfs" {
		run(t, "xfs_repair", "-n", dev)
		return
	}
	run(t, "e2fsck", "-fn", dev)
}

// The rules of attach: once only, not while mounted elsewhere, read-only on
// request, and nothing is left after detach.
func TestAttach(t *testing.T) {
	t.Parallel()
	needRoot(t)
	need(t, "mkfs.ext4", "losetup", "mount", "umount")
	s := startServer(t, "--nbd", "none")
	m := &mounted{s: s, kind: "ext4", volume: fmt.Sprintf("e2e-attach-%x", rand.Uint64()), dir: filepath.Join(s.dir, "mnt")}
	t.Cleanup(m.crash)
	s.create(m.volume, "128M")
	m.attach("--mkfs", "ext4", "--mount", m.dir)
	if r := s.try("volume", "attach", m.volume); r.code != 4 || !strings.Contains(r.err, m.at.Device) {
		t.Errorf("attached twice: %+v", r)
	}
	if r := s.try("volume", "rm", m.volume, "--now", "--yes"); r.code != 6 {
		t.Errorf("an attached volume is removed: %+v", r)
	}
	if err := os.WriteFile(filepath.Join(m.dir, "hello"), []byte("world"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A busy mount is not torn away.
	f, err := os.Open(filepath.Join(m.dir, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	if r := s.try("volume", "detach", m.volume); r.code != 6 {
		t.Errorf("detached though a file is open: %+v", r)
	}
	if got, err := os.ReadFile(filepath.Join(m.dir, "hello")); err != nil || string(got) != "world" {
		t.Errorf("after the refused detach: %q, %v", got, err)
	}
	f.Close()
	s.atoll("volume", "detach", m.volume)
	m.at.PID = 0
	if r := s.try("volume", "detach", m.volume); r.code != 3 {
		t.Errorf("detached twice: %+v", r)
	}
	m.attach("--read-only", "--mount", m.dir)
	if got, err := os.ReadFile(filepath.Join(m.dir, "hello")); err != nil || string(got) != "world" {
		t.Errorf("read-only: %q, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(m.dir, "no"), nil, 0o600); err == nil {
		t.Error("a read-only attachment takes writes")
	}
	// --mkfs leaves an existing file system alone.
	s.atoll("volume", "detach", m.volume)
	m.attach("--mkfs", "ext4", "--mount", m.dir)
	if _, err := os.Stat(filepath.Join(m.dir, "hello")); err != nil {
		t.Errorf("--mkfs made a file system over one: %v", err)
	}
	s.atoll("volume", "detach", m.volume)
	m.at.PID = 0
}
