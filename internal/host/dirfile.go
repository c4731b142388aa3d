package host

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

const (
	maxIovecs  = 1024    // IOV_MAX
	bounceSize = 1 << 20 // largest piece that goes through a bounce buffer
)

// dirFile is a file of a Dir.
type dirFile struct {
	name   string
	fd     int
	dsync  bool
	ro     bool // it could be opened for reading only
	reads  *Reads
	direct atomic.Bool
	closed atomic.Bool
}

var _ File = (*dirFile)(nil)

// tryDsync reports whether pwritev2 takes RWF_DSYNC here, or that the disk is
// too full to tell.
func (f *dirFile) tryDsync(block []byte) (ok, full bool) {
	list := []unix.Iovec{{Base: &block[0]}}
	list[0].SetLen(len(block))
	_, err := pwritev2(f.fd, list, 0, unix.RWF_DSYNC)
	return err == nil, err == unix.ENOSPC || err == unix.EDQUOT
}

// tryDirect turns O_DIRECT on and reports whether a block can be written and
// read with it.
func (f *dirFile) tryDirect(block []byte) bool {
	if err := f.setDirect(true); err != nil {
		return false
	}
	if n, err := unix.Pwrite(f.fd, block, 0); err != nil || n != len(block) {
		return false
	}
	n, err := unix.Pread(f.fd, block, 0)
	return err == nil && n == len(block)
}

// setDirect switches O_DIRECT of the descriptor.
func (f *dirFile) setDirect(on bool) error {
	flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if on {
		flags |= unix.O_DIRECT
	} else {
		flags &^= unix.O_DIRECT
	}
	if _, err := unix.FcntlInt(uintptr(f.fd), unix.F_SETFL, flags); err != nil {
		return err
	}
	f.direct.Store(on)
	return nil
}

// Direct reports whether aligned transfers bypass the page cache.
func (f *dirFile) Direct() bool { return f.direct.Load() }

// aligned reports whether p lies on whole blocks of memory.
func aligned(p []byte) bool {
	addr := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	return (addr|uintptr(len(p)))&(atoll.BlockSize-1) == 0
}

// alignedRange reports whether n bytes at off are whole blocks.
func alignedRange(off int64, n int) bool { return (off|int64(n))&(atoll.BlockSize-1) == 0 }

// check refuses a closed file and an offset below zero.
func (f *dirFile) check(verb string, off int64) error {
	if f.closed.Load() {
		return fmt.Errorf("%s %s: %w", verb, f.name, atoll.ErrClosed)
	}
	if off < 0 {
		return fmt.Errorf("%s %s at %d: %w", verb, f.name, off, atoll.ErrInvalid)
	}
	return nil
}

// checkWrite is check for what changes the file.
func (f *dirFile) checkWrite(verb string, off int64) error {
	if f.ro && !f.closed.Load() {
		return fmt.Errorf("%s %s: %w", verb, f.name, atoll.ErrReadOnly)
	}
	return f.check(verb, off)
}

// ReadAt fills p from offset off.
func (f *dirFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.check("read", off); err != nil {
		return 0, err
	}
	direct := f.direct.Load()
	if direct && !(off&(atoll.BlockSize-1) == 0 && aligned(p)) {
		return f.readBounced(p, off)
	}
	if r := f.reads; direct && r != nil && len(p) <= readsBytes {
		defer r.leave()
		if r.enter() && r.read(f.fd, p, off) {
			return len(p), nil
		}
	}
	return f.readPlain(p, off, direct)
}

// readPlain reads in the caller's thread.
func (f *dirFile) readPlain(p []byte, off int64, direct bool) (int, error) {
	done := 0
	for done < len(p) {
		n, err := f.pread(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
		if n == 0 {
			return done, io.EOF
		}
		if direct && done < len(p) { // the end is near, and maybe not aligned
			n, err := f.readBounced(p[done:], off+int64(done))
			return done + n, err
		}
	}
	return done, nil
}

// pread reads once.
func (f *dirFile) pread(p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(f.fd, p, off)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return 0, wrap("read", f.name, err)
		}
	}
}

// readBounced reads whole blocks into aligned memory and copies what is wanted.
func (f *dirFile) readBounced(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := f.readPiece(p[done:], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// readPiece reads the blocks around the beginning of p and returns how much of
// p is filled, which is at least one byte without an error.
func (f *dirFile) readPiece(p []byte, off int64) (int, error) {
	const mask = atoll.BlockSize - 1
	skip := int(off & mask)
	b := Alloc(min((skip+len(p)+mask)&^mask, bounceSize))
	defer b.Release()
	n, err := f.pread(b.Bytes(), off-int64(skip))
	if err != nil {
		return 0, err
	}
	if n <= skip {
		return 0, io.EOF
	}
	return copy(p, b.Bytes()[skip:n]), nil
}

// WriteAt writes p at offset off.
func (f *dirFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.checkWrite("write", off); err != nil {
		return 0, err
	}
	if f.direct.Load() {
		if !alignedRange(off, len(p)) {
			if err := f.setDirect(false); err != nil {
				return 0, wrap("write", f.name, err)
			}
		} else if !aligned(p) {
			return f.writeBounced(p, off)
		}
	}
	return f.pwrite(p, off)
}

// pwrite writes all of p. Where the kernel refuses direct transfer after all,
// it goes on through the page cache.
func (f *dirFile) pwrite(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Pwrite(f.fd, p[done:], off+int64(done))
		if err != nil {
			if f.again(err) {
				continue
			}
			return done, wrap("write", f.name, err)
		}
		if n == 0 {
			return done, fmt.Errorf("write %s: nothing was written: %w", f.name, atoll.ErrIO)
		}
		done += n
	}
	return done, nil
}

// again reports whether a transfer that ended with err should be repeated, and
// turns direct transfer off if that was the reason.
func (f *dirFile) again(err error) bool {
	if err == unix.EINTR {
		return true
	}
	return err == unix.EINVAL && f.direct.Load() && f.setDirect(false) == nil
}

// writeBounced copies aligned ranges of unaligned memory into aligned memory.
func (f *dirFile) writeBounced(p []byte, off int64) (int, error) {
	b := Alloc(min(len(p), bounceSize))
	defer b.Release()
	done := 0
	for done < len(p) {
		n, err := f.pwrite(b.Bytes()[:copy(b.Bytes(), p[done:])], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// iovecs is the kernel's form of a list of slices.
type iovecs struct{ list [maxIovecs]unix.Iovec }

// iovecPool keeps iovecs between writes, so that a write allocates nothing.
var iovecPool = sync.Pool{New: func() any { return new(iovecs) }}

// WriteVec writes the slices in order at offset off. Durable writes carry
// RWF_DSYNC where the kernel knows it.
func (f *dirFile) WriteVec(v [][]byte, off int64, durable bool) error {
	if err := f.checkWrite("write", off); err != nil {
		return err
	}
	if f.direct.Load() {
		vecOK, n := vecAligned(v)
		if !alignedRange(off, n) {
			if err := f.setDirect(false); err != nil {
				return wrap("write", f.name, err)
			}
		} else if !vecOK {
			return f.writeVecBounced(v, off, n, durable)
		}
	}
	return f.writeVec(v, off, durable)
}

// vecAligned reports whether every slice is aligned, and the total length.
func vecAligned(v [][]byte) (ok bool, n int) {
	ok = true
	for _, p := range v {
		ok = ok && aligned(p)
		n += len(p)
	}
	return ok, n
}

// writeVecBounced writes the n bytes of v through aligned memory. All pieces
// are written before one Sync makes them durable.
func (f *dirFile) writeVecBounced(v [][]byte, off int64, n int, durable bool) error {
	b := Alloc(min(n, bounceSize))
	defer b.Release()
	fill := 0
	for _, p := range v {
		for len(p) > 0 {
			m := copy(b.Bytes()[fill:], p)
			p, fill = p[m:], fill+m
			if fill < b.n {
				continue
			}
			if _, err := f.pwrite(b.Bytes()[:fill], off); err != nil {
				return err
			}
			off, fill = off+int64(fill), 0
		}
	}
	if _, err := f.pwrite(b.Bytes()[:fill], off); err != nil {
		return err
	}
	if durable {
		return f.Sync()
	}
	return nil
}

// writeVec writes the slices in pieces of at most maxIovecs.
func (f *dirFile) writeVec(v [][]byte, off int64, durable bool) error {
	flags := 0
	if durable && f.dsync {
		flags = unix.RWF_DSYNC
	}
	io := iovecPool.Get().(*iovecs)
	var err error
	for len(v) > 0 && err == nil {
		var n int
		var size int64
		v, n, size = io.fill(v)
		err = f.writeIovecs(io.list[:n], off, flags)
		if err == unix.EOPNOTSUPP && flags != 0 {
			flags = 0
			err = f.writeIovecs(io.list[:n], off, flags)
		}
		off += size
		clear(io.list[:n])
	}
	iovecPool.Put(io)
	if err != nil {
		return wrap("write", f.name, err)
	}
	if durable && flags == 0 {
		return f.Sync()
	}
	return nil
}

// fill takes slices from v and returns what is left, how many iovecs they made
// and their size in bytes.
func (io *iovecs) fill(v [][]byte) (rest [][]byte, n int, size int64) {
	for n < len(io.list) && len(v) > 0 {
		if p := v[0]; len(p) > 0 {
			io.list[n].Base = unsafe.SliceData(p)
			io.list[n].SetLen(len(p))
			n++
			size += int64(len(p))
		}
		v = v[1:]
	}
	return v, n, size
}

// writeIovecs writes all of list, going on after a short write.
func (f *dirFile) writeIovecs(list []unix.Iovec, off int64, flags int) error {
	for len(list) > 0 {
		n, err := pwritev2(f.fd, list, off, flags)
		if err != nil {
			if f.again(err) {
				continue
			}
			return err
		}
		if n == 0 {
			return unix.EIO
		}
		off += int64(n)
		list = Advance(list, n)
	}
	return nil
}

// Advance drops the first n bytes of list, which it changes, and returns the
// rest. It is for what is left after a transfer that was cut short.
func Advance(list []unix.Iovec, n int) []unix.Iovec {
	for n > 0 {
		size := int(list[0].Len)
		if n < size {
			list[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(list[0].Base), n))
			list[0].SetLen(size - n)
			return list
		}
		n -= size
		list = list[1:]
	}
	return list
}

// pwritev2 is the system call; the one of x/sys allocates the list each time.
func pwritev2(fd int, list []unix.Iovec, off int64, flags int) (int, error) {
	const longBits = 8 * unsafe.Sizeof(uintptr(0))
	lo, hi := uintptr(off), uintptr(uint64(off)>>(longBits-1)>>1)
	num, f := uintptr(unix.SYS_PWRITEV2), uintptr(flags)
	if flags == 0 {
		num = unix.SYS_PWRITEV
	}
	n, _, errno := unix.Syscall6(num, uintptr(fd), uintptr(unsafe.Pointer(&list[0])), uintptr(len(list)), lo, hi, f)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Sync makes data and size durable.
func (f *dirFile) Sync() error {
	if err := f.check("sync", 0); err != nil {
		return err
	}
	for {
		err := unix.Fdatasync(f.fd)
		if err != unix.EINTR {
			return wrap("sync", f.name, err)
		}
	}
}

// Truncate sets the size.
func (f *dirFile) Truncate(size int64) error {
	if err := f.checkWrite("truncate", size); err != nil {
		return err
	}
	return wrap("truncate", f.name, unix.Ftruncate(f.fd, size))
}

// Punch frees a range.
func (f *dirFile) Punch(off, n int64) error {
	if err := f.checkWrite("punch", min(off, n)); err != nil || n == 0 {
		return err
	}
	for {
		err := unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if !errors.Is(err, unix.EINTR) {
			return wrap("punch", f.name, err)
		}
	}
}

// Size returns the size in bytes.
func (f *dirFile) Size() (int64, error) {
	if err := f.check("ask size of", 0); err != nil {
		return 0, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return 0, wrap("ask size of", f.name, err)
	}
	return st.Size, nil
}

// Close releases the descriptor.
func (f *dirFile) Close() error {
	if f.closed.Swap(true) {
		return fmt.Errorf("close %s: %w", f.name, atoll.ErrClosed)
	}
	return wrap("close", f.name, unix.Close(f.fd))
}
