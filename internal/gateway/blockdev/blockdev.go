// Package blockdev makes a local block device out of a volume. It needs root.
//
// With AttachKernel the kernel's NBD driver talks to the server and no byte
// passes through this process. Where the kernel has no such driver, Attach makes
// the volume one file in a private FUSE mount and a loop device on that file
// (/dev/fuse and /dev/loop-control are needed).
//
// Durability is passed through either way: a flush of the block device becomes a
// Flush of the volume (with FUSE, by an fsync of the file). A discard frees room
// (with FUSE, as a hole punch, which also promises zeros).
package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// Device is the volume behind the block device. Its methods are called
// concurrently.
type Device interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	Flush(ctx context.Context) error
	Trim(ctx context.Context, off, n int64) error
	Zero(ctx context.Context, off, n int64) error
}

// requestTimeout bounds a request of the kernel.
const requestTimeout = 2 * time.Minute

// Attached is a block device being served. Detach it before the process ends.
type Attached struct {
	Path   string // of the block device
	dir    string
	loop   *os.File
	server *fuse.Server
	once   sync.Once
	err    error
	let    atomic.Bool // the block device is no longer ours
	gone   atomic.Bool // nor is the mount there
}

// Attach serves dev as a block device with the given logical sector size. dir is
// an empty directory for the private mount.
func Attach(dev Device, dir string, sectorBytes int, readOnly bool) (*Attached, error) {
	root := &rootNode{disk: &diskNode{dev: dev, readOnly: readOnly}}
	second := time.Hour // the one file never changes
	server, err := fs.Mount(dir, root, &fs.Options{
		EntryTimeout: &second, AttrTimeout: &second,
		MountOptions: fuse.MountOptions{
			FsName: "atoll", Name: "atoll", MaxWrite: 1 << 20, MaxBackground: 64,
			DirectMountStrict: os.Getuid() == 0, DisableXAttrs: true, SyncRead: false,
			DisableSplice: true, // the bytes are in memory, and a pipe holds less than MaxWrite
		},
	})
	if err != nil {
		return nil, fmt.Errorf("mount fuse on %s: %v: %w", dir, err, atoll.ErrUnsupported)
	}
	a := &Attached{dir: dir, server: server}
	if err := a.setLoop(filepath.Join(dir, "disk"), sectorBytes, readOnly); err != nil {
		return nil, errors.Join(err, a.unmount())
	}
	return a, nil
}

// setLoop binds a free loop device to path.
func (a *Attached) setLoop(path string, sectorBytes int, readOnly bool) error {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open loop control: %v: %w", err, atoll.ErrUnsupported)
	}
	defer ctl.Close()
	mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_DIRECT_IO)
	if readOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer file.Close()
	for range 20 { // another process may take the number first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("find a free loop device: %v: %w", err, atoll.ErrUnavailable)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		loop, err := os.OpenFile(name, mode, 0)
		if err != nil {
			return fmt.Errorf("open %s: %v: %w", name, err, atoll.ErrUnsupported)
		}
		conf := unix.LoopConfig{Fd: uint32(file.Fd()), Size: uint32(sectorBytes)}
		conf.Info.Flags = flags
		copy(conf.Info.File_name[:], "atoll")
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &conf)
		if err == nil {
			a.Path, a.loop = name, loop
			return nil
		}
		err = errors.Join(err, loop.Close())
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("set up %s: %v: %w", name, err, atoll.ErrUnsupported)
		}
	}
	return fmt.Errorf("set up a loop device: all were taken: %w", atoll.ErrBusy)
}

// Detach flushes and removes the block device and its mount. It fails with
// ErrBusy while a file system on it is mounted. The device goes even if the
// flush fails, for a volume that was lost does not come back to it; the error
// then tells. Later calls return the first call's result unless that was
// ErrBusy.
func (a *Attached) Detach() error {
	if !a.let.Load() && mounted(a.Path) {
		return fmt.Errorf("detach %s: a file system on it is mounted: %w", a.Path, atoll.ErrBusy)
	}
	a.once.Do(func() {
		if err := a.loop.Sync(); err != nil {
			a.err = fmt.Errorf("flush %s: %v: %w", a.Path, err, atoll.ErrIO)
		}
		// With autoclear the loop device ends when its last user closes it.
		err := unix.IoctlSetInt(int(a.loop.Fd()), unix.LOOP_CLR_FD, 0)
		a.err = errors.Join(a.err, err, a.loop.Close())
		a.let.Store(true)
	})
	if err := a.unmount(); err != nil {
		return errors.Join(a.err, err)
	}
	return a.err
}

// Wait returns when the mount has ended.
func (a *Attached) Wait() { a.server.Wait() }

// unmount ends the private mount if it is there still; the kernel may need some
// time to let go, for what looks at every new device, for example, or while what
// the device held back goes to a disk that is slow. Nothing calls it twice at one
// time but by mistake, and then the mount ends once.
func (a *Attached) unmount() error {
	if a.gone.Load() {
		return nil
	}
	var err error
	for range 600 {
		if err = a.server.Unmount(); err == nil {
			a.gone.Store(true)
			return nil
		}
		<-time.After(50 * time.Millisecond)
	}
	return fmt.Errorf("unmount %s: %v: %w", a.dir, err, atoll.ErrBusy)
}

// mounted reports whether the block device at path is mounted somewhere.
func mounted(path string) bool {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return false
	}
	for line := range splitLines(string(text)) {
		if len(line) > len(path) && line[:len(path)+1] == path+" " {
			return true
		}
	}
	return false
}

func splitLines(s string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for len(s) > 0 {
			i := 0
			for i < len(s) && s[i] != '\n' {
				i++
			}
			if !yield(s[:i]) {
				return
			}
			s = s[min(i+1, len(s)):]
		}
	}
}

// rootNode is the directory with the one file.
type rootNode struct {
	fs.Inode
	disk *diskNode
}

// OnAdd makes the file.
func (r *rootNode) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, r.disk, fs.StableAttr{Mode: syscall.S_IFREG, Ino: 2}), true)
}

// diskNode is the file.
type diskNode struct {
	fs.Inode
	dev      Device
	readOnly bool
}

var (
	_ fs.NodeOpener    = (*diskNode)(nil)
	_ fs.NodeGetattrer = (*diskNode)(nil)
	_ fs.NodeReader    = (*diskNode)(nil)
	_ fs.NodeWriter    = (*diskNode)(nil)
	_ fs.NodeFsyncer   = (*diskNode)(nil)
	_ fs.NodeFlusher   = (*diskNode)(nil)
	_ fs.NodeAllocater = (*diskNode)(nil)
	_ fs.NodeSetattrer = (*diskNode)(nil)
)

func (d *diskNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = syscall.S_IFREG | 0o600
	if d.readOnly {
		out.Mode = syscall.S_IFREG | 0o400
	}
	out.Size = uint64(d.dev.Size())
	out.Blocks = out.Size / 512
	out.Blksize = atoll.BlockSize
	return 0
}

func (d *diskNode) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(d.dev.Size()) {
		return syscall.EPERM
	}
	return d.Getattr(ctx, f, out)
}

func (d *diskNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if d.readOnly && flags&(syscall.O_WRONLY|syscall.O_RDWR) != 0 {
		return nil, 0, syscall.EROFS
	}
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (d *diskNode) Read(ctx context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := min(int64(len(dest)), d.dev.Size()-off)
	if n <= 0 {
		return fuse.ReadResultData(nil), 0
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := d.dev.ReadAt(ctx, dest[:n], off); err != nil {
		return nil, errno(err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (d *diskNode) Write(ctx context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if off+int64(len(data)) > d.dev.Size() {
		return 0, syscall.ENOSPC
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := d.dev.WriteAt(ctx, data, off); err != nil {
		return 0, errno(err)
	}
	return uint32(len(data)), 0
}

func (d *diskNode) Fsync(ctx context.Context, _ fs.FileHandle, _ uint32) syscall.Errno {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return errno(d.dev.Flush(ctx))
}

func (d *diskNode) Flush(context.Context, fs.FileHandle) syscall.Errno { return 0 }

func (d *diskNode) Allocate(ctx context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE:
		// A hole must read as zeros, which a trim does not promise.
		return errno(d.dev.Zero(ctx, int64(off), int64(size)))
	case unix.FALLOC_FL_ZERO_RANGE:
		return errno(d.dev.Zero(ctx, int64(off), int64(size)))
	}
	return syscall.EOPNOTSUPP
}

// errno maps our kinds of error to the kernel's.
func errno(err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, atoll.ErrNoSpace):
		return syscall.ENOSPC
	case errors.Is(err, atoll.ErrReadOnly):
		return syscall.EROFS
	case errors.Is(err, atoll.ErrInvalid):
		return syscall.EINVAL
	case errors.Is(err, atoll.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	}
	return syscall.EIO
}
