package nbd

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A client that sends its next request only after the reply to the last one
// waits for each switch of threads. So, when it has done so for a while, the
// reader keeps the token, carries its requests out itself, and waits for the
// next one in a system call of its own thread, for which it takes the socket off
// the runtime's poller. When none comes for a moment, or the client changes its
// ways, that ends. The watchdog (inline.go) takes the token from the reader when
// a request takes long.
const (
	// loneRuns is how many requests must come one by one.
	loneRuns = 32
	// loneAgain is how many do after a pause of the client's or a slow request,
	// which tell nothing of what the client does.
	loneAgain = 8
	// loneWait is how long a thread waits for the next request.
	loneWait = 1e6 // nanoseconds
	// loneRest is how many requests at most must come before the socket is taken
	// off the poller again; twice as many after each pause, since that costs some
	// twenty system calls.
	loneRest = 4096
)

// loner foretells whether a client has one request in flight at a time.
type loner struct {
	sock   *socket       // nil where the kernel has none
	credit atomic.Int32  // requests that came alone
	others *atomic.Int32 // connections of the server that are off the poller

	// Of the reader.
	runs int // requests that came since the socket was taken off or put back
	rest int // how many must come before it is taken off
}

func (l *loner) init(nc any, others *atomic.Int32) {
	l.others = others
	if s, ok := nc.(*socket); ok && s.kernel() {
		l.sock = s
	}
}

// sure reports whether the next request will come alone, too.
func (l *loner) sure() bool { return l.credit.Load() >= loneRuns }

// note takes in whether a request came alone.
func (l *loner) note(alone bool) {
	if !alone || l.sock == nil {
		l.credit.Store(0)
	} else if n := l.credit.Load(); n < loneRuns {
		l.credit.Store(n + 1)
	}
}

// doubt notes a pause or a slow request.
func (l *loner) doubt() {
	l.credit.Store(min(l.credit.Load(), loneRuns-loneAgain))
}

// more reports whether another request is waiting in the socket.
func (l *loner) more() bool { return l.sock.more() }

// await lets the thread wait a moment for the next request, if no other is in
// flight. One connection at a time may. The caller has the token.
func (l *loner) await(idle bool) {
	if l.sock == nil {
		return
	}
	off := l.sock.off()
	if !l.sure() {
		if off {
			l.end()
		}
		return
	}
	if !idle {
		return
	}
	if l.runs++; !off {
		if l.runs < l.rest || !l.begin() {
			return
		}
		l.runs = 0
	}
	if l.sock.await(unix.Timespec{Nsec: loneWait}) {
		if l.runs > loneRest {
			l.runs, l.rest = 0, l.rest/2
		}
		return
	}
	l.runs, l.rest = 0, min(max(2*l.rest, loneRuns), loneRest)
	l.doubt()
	l.end()
}

// begin takes the socket off the poller, unless another connection's is.
func (l *loner) begin() bool {
	if !l.others.CompareAndSwap(0, 1) {
		return false
	}
	if !l.sock.takeOff() {
		l.others.Store(0)
		return false
	}
	return true
}

// end puts the socket back, if it can be now.
func (l *loner) end() {
	if l.sock.putBack() {
		l.others.Store(0)
	}
}

// close ends it all. Nothing of the connection runs any more.
func (l *loner) close() {
	if l.sock != nil && l.sock.off() {
		l.sock.free()
		l.others.Store(0)
	}
}
