package guest_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/blockdev"
)

// powerDisk is a file system of its own for a server's data, on a volatileDisk
// that package blockdev makes a block device.
type powerDisk struct {
	t       *testing.T
	disk    *volatileDisk
	rng     *rand.Rand
	at, dir string // the mount points of the file system and of FUSE
	device  *blockdev.Attached
	mounted bool
}

// powerDiskBytes is its size; the file behind it is sparse.
const powerDiskBytes = 8 << 30

// noPowerDisk tells why there can be none here.
func noPowerDisk() string {
	if os.Getuid() != 0 {
		return "mounting needs root"
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(dev); err != nil {
			return err.Error()
		}
	}
	return ""
}

// newPowerDisk makes one for the data directory of a server.
func newPowerDisk(t *testing.T, s *server) *powerDisk {
	t.Helper()
	d := &powerDisk{t: t, at: s.data(), dir: filepath.Join(s.dir, "fuse"), rng: rand.New(rand.NewPCG(rand.Uint64(), 3))}
	d.disk = newVolatileDisk(t, s.dir, powerDiskBytes)
	for _, dir := range []string{d.at, d.dir} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		s.kill()
		d.unmount()
	})
	d.attach()
	d.run("mkfs.ext4", "-q", d.device.Path)
	d.disk.arm()
	return d
}

func (d *powerDisk) attach() {
	d.t.Helper()
	var err error
	if d.device, err = blockdev.Attach(blockDevice{d.disk}, d.dir, pageBytes, false); err != nil {
		d.t.Fatal(err)
	}
}

func (d *powerDisk) run(name string, args ...string) {
	d.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.t.Errorf("%s: %v\n%s", name, err, out)
	}
}

// mount brings the disk back after a cut. Nobody may use it.
func (d *powerDisk) mount() {
	d.t.Helper()
	d.unmount()
	d.disk.set(powerOn)
	d.attach()
	d.run("mount", d.device.Path, d.at)
	d.mounted = true
	// The server wants directories that only their owner may enter.
	if err := os.Chmod(d.at, 0o700); err != nil || d.t.Failed() {
		d.t.Fatal(err)
	}
}

// unmount takes the disk from the kernel; what it still writes is lost.
func (d *powerDisk) unmount() {
	if d.device == nil {
		return
	}
	if d.mounted {
		d.disk.set(powerIdle)
		d.run("umount", d.at)
		d.mounted = false
	}
	// The kernel remembers the errors of a cut until its last flush.
	err := d.device.Detach()
	for begin := time.Now(); errors.Is(err, atoll.ErrBusy) && time.Since(begin) < bootTimeout; err = d.device.Detach() {
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil && !errors.Is(err, atoll.ErrIO) {
		d.t.Error(err)
	}
	d.device = nil
}

// cut is the power cut.
func (d *powerDisk) cut() { d.disk.cut(d.t, d.rng) }

// blockDevice makes a volatileDisk a device of package blockdev.
type blockDevice struct{ *volatileDisk }

func (d blockDevice) Size() int64 { return d.size }

func (d blockDevice) ReadAt(_ context.Context, p []byte, off int64) error { return d.read(p, off) }

func (d blockDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	return d.write(p, off, false)
}

func (d blockDevice) Flush(context.Context) error { return d.flush() }

func (d blockDevice) Trim(_ context.Context, off, n int64) error { return d.zero(off, n, false) }

func (d blockDevice) Zero(_ context.Context, off, n int64) error { return d.zero(off, n, false) }
