package nbd

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/host"
)

// socket is an accepted connection that its reader can take off the runtime's
// poller for a while. As long as it is on it, each request also wakes whatever
// thread waits for the poller, which finds nothing to do, and again when the
// client takes the reply; a thread that waits for the socket itself has no use
// for that.
type socket struct {
	net.Conn // as accepted; it may be closed while the socket lives on

	way     atomic.Pointer[way]
	taken   atomic.Uint32 // how often it was taken off
	writing sync.Mutex    // held by whoever sends, and while the way changes
	mu      struct {
		sync.Mutex // held for short calls only
		closed     bool
	}

	// Of whoever holds writing.
	vec   net.Buffers
	list  []unix.Iovec
	look  func(fd uintptr) // lookAt, made once, as it would be allocated
	there bool
	one   [1]byte
}

// way is how to reach the peer: by the runtime, or else by a descriptor of our
// own.
type way struct {
	nc  net.Conn
	raw syscall.RawConn // of nc; nil if it is no socket of the kernel's
	fd  int             // where nc is nil
}

func newSocket(nc net.Conn) *socket {
	s := &socket{Conn: nc}
	s.look = s.lookAt
	s.way.Store(wayOf(nc))
	return s
}

func wayOf(nc net.Conn) *way {
	w := &way{nc: nc}
	switch c := nc.(type) {
	case *net.UnixConn:
		w.raw, _ = c.SyscallConn()
	case *net.TCPConn:
		w.raw, _ = c.SyscallConn()
	}
	return w
}

// kernel reports whether it is a socket of the kernel's, which can gather and be
// taken off the poller.
func (s *socket) kernel() bool {
	w := s.way.Load()
	return w.nc == nil || w.raw != nil
}

// off reports whether it is off the poller.
func (s *socket) off() bool { return s.way.Load().nc == nil }

// takeOff takes it off the poller and reports whether it could. The caller is
// the only one to read; nobody sends.
func (s *socket) takeOff() bool {
	if !s.writing.TryLock() {
		return false
	}
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.way.Load()
	if s.mu.closed || w.raw == nil {
		return false
	}
	fd, err := -1, error(nil)
	if e := w.raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) }); e != nil || err != nil {
		return false
	}
	s.way.Store(&way{fd: fd})
	s.taken.Add(1)
	_ = w.nc.Close() // the connection stays, by the copy
	return true
}

// putBack gives it to the poller again and reports whether it could; it cannot
// while somebody sends. The caller is the only one to read.
func (s *socket) putBack() bool {
	if !s.writing.TryLock() {
		return false
	}
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.way.Load().fd
	fd, err := unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), "nbd")
	nc, err := net.FileConn(f) // a copy
	_ = f.Close()
	if err != nil {
		return false
	}
	s.way.Store(wayOf(nc))
	_ = unix.Close(old)
	if s.mu.closed {
		_ = nc.Close()
	}
	return true
}

// Close ends the connection. Who waits for it wakes up.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return nil
	}
	s.mu.closed = true
	if w := s.way.Load(); w.nc != nil {
		return w.nc.Close()
	} else if err := unix.Shutdown(w.fd, unix.SHUT_RDWR); err != nil {
		return os.NewSyscallError("shutdown", err)
	}
	return nil
}

// free closes it for good. Nobody reads any more; who sends still gets an error.
func (s *socket) free() {
	_ = s.Close()
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.way.Load(); w.nc == nil {
		_ = unix.Close(w.fd)
		s.way.Store(&way{nc: s.Conn}) // which is closed
	}
}

// Read is for one goroutine at a time.
func (s *socket) Read(p []byte) (int, error) {
	w := s.way.Load()
	if w.nc != nil {
		return w.nc.Read(p)
	}
	for {
		n, err := unix.Read(w.fd, p)
		switch {
		case err == nil && n == 0 && len(p) > 0:
			return 0, io.EOF
		case err == nil:
			return n, nil
		case err == unix.EAGAIN:
			pollFor(w.fd, unix.POLLIN, nil)
		case err != unix.EINTR:
			return 0, os.NewSyscallError("read", err)
		}
	}
}

// send writes all slices, by one system call if the peer has room.
func (s *socket) send(v [][]byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	w := s.way.Load()
	if w.nc != nil {
		s.vec = v
		_, err := s.vec.WriteTo(w.nc)
		return err
	}
	s.list = s.list[:0]
	for _, p := range v {
		if len(p) > 0 {
			s.list = append(s.list, unix.Iovec{Base: unsafe.SliceData(p)})
			s.list[len(s.list)-1].SetLen(len(p))
		}
	}
	err := sendVec(w.fd, s.list)
	clear(s.list)
	return err
}

// maxIovecs is what the kernel takes at once.
const maxIovecs = 1024

// sendVec writes all of list.
func sendVec(fd int, list []unix.Iovec) error {
	for len(list) > 0 {
		n, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&list[0])), uintptr(min(len(list), maxIovecs)))
		switch errno {
		case 0:
			list = host.Advance(list, int(n))
		case unix.EAGAIN:
			pollFor(fd, unix.POLLOUT, nil)
		case unix.EINTR:
		default:
			return os.NewSyscallError("writev", errno)
		}
	}
	return nil
}

// pollFor waits until something happens to fd, nil for as long as it takes, and
// reports whether it did.
func pollFor(fd int, events int16, limit *unix.Timespec) bool {
	list := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Ppoll(list[:], limit, nil)
		if err != unix.EINTR {
			return n != 0 || err != nil
		}
	}
}

// await waits a moment for something to read, off the poller, and reports
// whether it came.
func (s *socket) await(limit unix.Timespec) bool {
	return pollFor(s.way.Load().fd, unix.POLLIN, &limit)
}

// more reports whether there is something to read, perhaps. The caller need not
// be the reader any more.
func (s *socket) more() bool {
	if !s.writing.TryLock() { // which keeps the way from changing
		return true
	}
	defer s.writing.Unlock()
	if w := s.way.Load(); w.nc == nil {
		s.lookAt(uintptr(w.fd))
	} else if w.raw.Control(s.look) != nil {
		return true
	}
	return s.there
}

// lookAt sets there.
func (s *socket) lookAt(fd uintptr) {
	_, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&s.one[0])), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	s.there = errno != unix.EAGAIN
}
