package blockdev

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hanwen/go-fuse/v2/fuse.(*Server).loop"))
}

// memory is a Device in memory that counts what reaches it.
type memory struct {
	mu               sync.Mutex
	data             []byte
	flushes, trimmed atomic.Int64
	fail             atomic.Bool
}

func (m *memory) Size() int64 { return int64(len(m.data)) }

func (m *memory) ReadAt(_ context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(p, m.data[off:])
	return nil
}

func (m *memory) WriteAt(_ context.Context, p []byte, off int64) error {
	if m.fail.Load() {
		return atoll.ErrNoSpace
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.data[off:], p)
	return nil
}

func (m *memory) Flush(context.Context) error {
	m.flushes.Add(1)
	return nil
}

func (m *memory) Trim(ctx context.Context, off, n int64) error { return m.Zero(ctx, off, n) }

func (m *memory) Zero(_ context.Context, off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trimmed.Add(n)
	clear(m.data[off : off+n])
	return nil
}

// attach attaches a device, or skips where that cannot be.
func attach(t *testing.T, dev Device, sector int, readOnly bool) *Attached {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			t.Skip(err)
		}
	}
	a, err := Attach(dev, t.TempDir(), sector, readOnly)
	if errors.Is(err, atoll.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Detach() })
	return a
}

// Bytes written to the block device reach the volume with its flush, a discard
// makes holes, and after Detach nothing is left.
func TestAttach(t *testing.T) {
	dev := &memory{data: make([]byte, 8<<20)}
	a := attach(t, dev, 4096, false)
	f, err := os.OpenFile(a.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil || size != dev.Size() {
		t.Errorf("the device has %d bytes, %v", size, err)
	}
	if n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err != nil || n != 4096 {
		t.Errorf("its sectors have %d bytes, %v", n, err)
	}
	want := bytes.Repeat([]byte("atoll!\n\x00"), 512<<10/8)
	if _, err := f.WriteAt(want, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if dev.flushes.Load() == 0 {
		t.Error("fsync of the device was no flush")
	}
	dev.mu.Lock()
	if !bytes.Equal(dev.data[1<<20:][:len(want)], want) {
		t.Error("the volume has other bytes after the flush")
	}
	dev.mu.Unlock()
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want) {
		t.Errorf("it reads other bytes (%v)", err)
	}
	if err := discard(f, 1<<20, 256<<10); err != nil {
		t.Errorf("discard: %v", err)
	} else if dev.trimmed.Load() != 256<<10 {
		t.Errorf("%d bytes were trimmed", dev.trimmed.Load())
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Detach(); err != nil {
		t.Fatal(err)
	}
	if err := a.Detach(); err != nil {
		t.Errorf("second detach: %v", err)
	}
	if mounted(a.Path) {
		t.Error("still mounted")
	}
}

// A write that the volume refuses is an error at the device's fsync.
func TestAttachError(t *testing.T) {
	dev := &memory{data: make([]byte, 1<<20)}
	a := attach(t, dev, 512, false)
	f, err := os.OpenFile(a.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dev.fail.Store(true)
	_, err = f.WriteAt(make([]byte, 4096), 0)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		t.Error("a refused write went unnoticed")
	}
	dev.fail.Store(false)
}

// A read-only device takes no writes.
func TestAttachReadOnly(t *testing.T) {
	dev := &memory{data: bytes.Repeat([]byte{7}, 1<<20)}
	a := attach(t, dev, 4096, true)
	p := make([]byte, 4096)
	f, err := os.Open(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(p, 0); err != nil || p[0] != 7 {
		t.Errorf("read: %v", err)
	}
	w, err := os.OpenFile(a.Path, os.O_RDWR, 0)
	if err == nil {
		_, err = w.WriteAt(p, 0)
		_ = w.Close()
	}
	if err == nil {
		t.Error("it took a write")
	}
}

// discard is BLKDISCARD.
func discard(f *os.File, off, n uint64) error {
	span := [2]uint64{off, n}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
	if errno != 0 {
		return errno
	}
	return nil
}
