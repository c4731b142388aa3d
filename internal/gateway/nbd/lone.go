package nbd

import (
	"net"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A client that sends its next request only after the reply to the last one
// waits for each switch of threads. So, when it has done so for a while, the
// reader keeps the token, carries its requests out itself, and waits for the
// next one in a system call of its own thread for a moment before it leaves
// that to the runtime. The watchdog (inline.go) takes the token from it when a
// request takes long.
const (
	// loneRuns is how many requests must come one by one.
	loneRuns = 32
	// loneWait is how long a thread waits for the next request.
	loneWait = 200e3 // nanoseconds
)

// loner foretells whether a client has one request in flight at a time.
type loner struct {
	raw    syscall.RawConn // nil where there is no socket to ask
	credit atomic.Int32    // requests that came alone
	others *atomic.Int32   // connections of the server whose thread waits

	look, wait func(fd uintptr) // made once, as they would be allocated
	there      atomic.Bool      // what look found
	one        [1]byte
	list       [1]unix.PollFd
}

func (l *loner) init(nc net.Conn, others *atomic.Int32) {
	l.others = others
	l.look, l.wait = l.lookAt, l.waitFor
	switch s := nc.(type) {
	case *net.UnixConn:
		l.raw, _ = s.SyscallConn()
	case *net.TCPConn:
		l.raw, _ = s.SyscallConn()
	}
}

// sure reports whether the next request will come alone, too.
func (l *loner) sure() bool { return l.credit.Load() >= loneRuns }

// note takes in whether a request came alone.
func (l *loner) note(alone bool) {
	if !alone || l.raw == nil {
		l.credit.Store(0)
	} else if n := l.credit.Load(); n < loneRuns {
		l.credit.Store(n + 1)
	}
}

// more reports whether another request is waiting in the socket.
func (l *loner) more() bool {
	return l.raw.Control(l.look) != nil || l.there.Load()
}

func (l *loner) lookAt(fd uintptr) {
	_, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&l.one[0])), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
	l.there.Store(errno != unix.EAGAIN)
}

// await lets the thread wait a moment for the next request. One connection at a
// time may, since meanwhile the runtime has one thread less.
func (l *loner) await() {
	if !l.sure() {
		return
	}
	if l.others.Add(1) == 1 {
		_ = l.raw.Control(l.wait)
	}
	l.others.Add(-1)
}

func (l *loner) waitFor(fd uintptr) {
	l.list[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	limit := unix.Timespec{Nsec: loneWait}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&l.list[0])), 1, uintptr(unsafe.Pointer(&limit)), 0, 0, 0)
}
