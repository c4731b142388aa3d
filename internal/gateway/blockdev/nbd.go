package blockdev

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// The control calls of the kernel's NBD driver (linux/nbd.h).
const (
	nbdSetSock       = 0xab00
	nbdSetBlockSize  = 0xab01
	nbdDoIt          = 0xab03
	nbdClearSock     = 0xab04
	nbdSetSizeBlocks = 0xab07
	nbdDisconnect    = 0xab08
	nbdSetTimeout    = 0xab09
	nbdSetFlags      = 0xab0a
)

// nbdReadOnly is the flag of a read-only export (NBD_FLAG_READ_ONLY).
const nbdReadOnly = 1 << 1

// startTimeout bounds the wait for a device to show its size.
const startTimeout = 10 * time.Second

// KernelOptions say what the kernel's NBD driver shall serve.
type KernelOptions struct {
	// Conns are TCP or Unix connections to one export, each behind the
	// negotiation and with simple replies only. More than one needs an export
	// whose Flags allow it.
	Conns []net.Conn
	// Size of the export in bytes, and its transmission flags.
	Size  int64
	Flags uint16
	// ReadOnly makes a read-only device of a writable export.
	ReadOnly bool
	// SectorBytes is the logical sector size: 512 to 4096, a divisor of Size.
	SectorBytes int
}

// Kernel is a block device of the kernel's NBD driver. The kernel talks to the
// server by itself; this process must only live, for the device ends with it.
//
// A lost connection is not made again: a server that was killed has forgotten
// the writes that it acknowledged from memory and that no flush followed.
// Against its successor the next flush would succeed and cover that up. So the
// device fails for good, and a file system on it replays its journal when it is
// mounted again.
type Kernel struct {
	Path string // of the block device
	file *os.File
	wg   sync.WaitGroup
	done chan struct{}
	stop atomic.Bool // the end is wanted
	err  error       // why it ended otherwise; set before done is closed
}

// AttachKernel gives connections to a free device of the kernel's NBD driver. It
// loads the driver if it can; ErrUnsupported means that there is none. On
// success the connections belong to the kernel and are closed here; on failure
// they stay the caller's.
func AttachKernel(o KernelOptions) (*Kernel, error) {
	for _, c := range o.Conns {
		if _, ok := c.(syscall.Conn); !ok {
			return nil, fmt.Errorf("give a connection with encryption to the kernel: %w", atoll.ErrUnsupported)
		}
	}
	if len(o.Conns) == 0 || o.SectorBytes < 512 || o.Size%int64(o.SectorBytes) != 0 {
		return nil, fmt.Errorf("attach %d bytes in sectors of %d on %d connections: %w", o.Size, o.SectorBytes, len(o.Conns), atoll.ErrInvalid)
	}
	devices, err := nbdDevices()
	if err != nil {
		return nil, err
	}
	for _, name := range devices {
		if _, err := os.Stat("/sys/block/" + name + "/pid"); err == nil {
			continue // in use
		}
		k, err := startKernel("/dev/"+name, o)
		if errors.Is(err, unix.EBUSY) {
			continue // another process was quicker
		}
		if err != nil {
			return nil, err
		}
		for _, c := range o.Conns {
			c.Close() // the kernel has its own reference
		}
		return k, nil
	}
	return nil, fmt.Errorf("find a free NBD device: all %d are in use: %w", len(devices), atoll.ErrBusy)
}

// nbdDevices lists the names of the driver's devices in order.
func nbdDevices() ([]string, error) {
	found, err := filepath.Glob("/sys/block/nbd*")
	if err == nil && len(found) == 0 {
		if out, merr := exec.Command("modprobe", "nbd").CombinedOutput(); merr != nil {
			why := strings.TrimSpace(string(out))
			if why == "" {
				why = merr.Error()
			}
			return nil, fmt.Errorf("load the kernel's NBD driver: %s: %w", why, atoll.ErrUnsupported)
		}
		found, err = filepath.Glob("/sys/block/nbd*")
	}
	if err != nil || len(found) == 0 {
		return nil, fmt.Errorf("find the kernel's NBD driver: %w", atoll.ErrUnsupported)
	}
	names := make([]string, len(found))
	for n := range names {
		names[n] = "nbd" + strconv.Itoa(n) // the driver numbers them from 0
	}
	return names, nil
}

// startKernel sets up one device and returns when it is usable.
func startKernel(path string, o KernelOptions) (*Kernel, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %v: %w", path, err, atoll.ErrUnsupported)
	}
	k := &Kernel{Path: path, file: file, done: make(chan struct{})}
	bound := make(chan error, 1)
	k.wg.Go(func() { k.serve(o, bound) })
	if err := <-bound; err != nil {
		k.wg.Wait()
		return nil, errors.Join(err, file.Close())
	}
	if err := k.waitSize(o.Size); err != nil {
		return nil, errors.Join(err, k.disconnect())
	}
	return k, nil
}

// serve lends a thread to the kernel until the device ends. The driver takes all
// set-up calls from one thread, and a signal to the thread would end the device,
// so it takes none.
func (k *Kernel) serve(o KernelOptions, bound chan<- error) {
	runtime.LockOSThread() // for good: the thread ends with this goroutine
	defer close(k.done)
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	err := unix.PthreadSigmask(unix.SIG_BLOCK, &all, nil)
	if err == nil {
		err = k.bind(o)
	}
	bound <- err
	if err != nil {
		return
	}
	// The driver returns no error when the server is gone.
	err = unix.IoctlSetInt(int(k.file.Fd()), nbdDoIt, 0)
	switch {
	case err != nil:
		k.err = fmt.Errorf("serve %s: %v: %w", k.Path, err, atoll.ErrUnreachable)
	case !k.stop.Load():
		k.err = fmt.Errorf("serve %s: the server closed the connection: %w", k.Path, atoll.ErrUnreachable)
	}
	// What is left in the driver's queue fails, and the device is free again.
	k.err = errors.Join(k.err, unix.IoctlSetInt(int(k.file.Fd()), nbdClearSock, 0))
}

// bind makes the set-up calls. The first of them takes the device or fails with
// EBUSY.
func (k *Kernel) bind(o KernelOptions) error {
	fd := int(k.file.Fd())
	for i, c := range o.Conns {
		raw, err := c.(syscall.Conn).SyscallConn()
		if err == nil {
			cerr := raw.Control(func(sock uintptr) { err = unix.IoctlSetInt(fd, nbdSetSock, int(sock)) })
			err = errors.Join(err, cerr)
		}
		if err != nil {
			if i > 0 {
				err = errors.Join(err, unix.IoctlSetInt(fd, nbdClearSock, 0))
			}
			return fmt.Errorf("give a connection to %s: %w", k.Path, err)
		}
	}
	flags := int(o.Flags)
	if o.ReadOnly {
		flags |= nbdReadOnly
	}
	for _, call := range []struct{ request, value int }{
		{nbdSetBlockSize, o.SectorBytes},
		{nbdSetSizeBlocks, int(o.Size / int64(o.SectorBytes))},
		{nbdSetFlags, flags},
		{nbdSetTimeout, int(requestTimeout / time.Second)},
	} {
		if err := unix.IoctlSetInt(fd, uint(call.request), call.value); err != nil {
			err = fmt.Errorf("set up %s (call %#x): %v: %w", k.Path, call.request, err, atoll.ErrUnsupported)
			return errors.Join(err, unix.IoctlSetInt(fd, nbdClearSock, 0))
		}
	}
	return nil
}

// waitSize waits until the device runs and has its size.
func (k *Kernel) waitSize(size int64) error {
	dir := "/sys/block/" + filepath.Base(k.Path)
	timeout := time.After(startTimeout)
	for {
		_, err := os.Stat(dir + "/pid")
		text, _ := os.ReadFile(dir + "/size")
		if n, perr := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && perr == nil && n == size/512 {
			return nil
		}
		select {
		case <-k.done:
			return fmt.Errorf("start %s: it ended at once: %w", k.Path, errors.Join(k.err, atoll.ErrUnavailable))
		case <-timeout:
			return fmt.Errorf("start %s: no size after %v: %w", k.Path, startTimeout, atoll.ErrTimeout)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Done is closed when the device has ended, also on its own: then the
// connection is lost and Detach tells why.
func (k *Kernel) Done() <-chan struct{} { return k.done }

// Detach flushes the device and ends it. It fails with ErrBusy while the device
// is mounted or otherwise claimed.
func (k *Kernel) Detach() error {
	select {
	case <-k.done:
		return errors.Join(k.err, k.disconnect())
	default:
	}
	claim, err := os.OpenFile(k.Path, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("detach %s: it is mounted or in use: %w", k.Path, atoll.ErrBusy)
		}
		return fmt.Errorf("claim %s: %w", k.Path, err)
	}
	defer claim.Close()
	if err := k.file.Sync(); err != nil {
		return fmt.Errorf("flush %s: %v: %w", k.Path, err, atoll.ErrIO)
	}
	if err := k.disconnect(); err != nil {
		return err
	}
	return k.err
}

// disconnect ends the device whatever its state.
func (k *Kernel) disconnect() error {
	k.stop.Store(true)
	var err error
	select {
	case <-k.done:
	default:
		err = unix.IoctlSetInt(int(k.file.Fd()), nbdDisconnect, 0)
		select {
		case <-k.done:
		case <-time.After(startTimeout): // the server does not hang up; do without
			err = errors.Join(err, unix.IoctlSetInt(int(k.file.Fd()), nbdClearSock, 0))
		}
	}
	k.wg.Wait()
	cerr := k.file.Close()
	if errors.Is(cerr, os.ErrClosed) {
		cerr = nil
	}
	return errors.Join(err, cerr)
}

// SectorBytes chooses the logical sector size of a device of size bytes by what
// its first bytes say: a partition table or file system made with 512 byte
// sectors is of no use on larger ones. An empty device gets 4096, which spares
// the server from changing parts of blocks. head should hold 8 KiB if the device
// is that large.
func SectorBytes(head []byte, size int64) int {
	at := func(off int, text string) bool {
		return len(head) >= off+len(text) && string(head[off:off+len(text)]) == text
	}
	switch {
	case size%4096 != 0:
		return 512
	case at(4096, "EFI PART"):
		return 4096
	case at(512, "EFI PART"), at(510, "\x55\xaa"):
		return 512
	case at(0, "XFSB") && len(head) >= 104:
		if n := int(head[102])<<8 | int(head[103]); n == 512 || n == 1024 || n == 2048 {
			return n
		}
	}
	return 4096
}
