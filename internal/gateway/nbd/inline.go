package nbd

import (
	"sync/atomic"
	"time"
)

// A reader that passes the token on for every request pays for a switch of
// goroutines that is dear beside a request at the speed of memory. So, while the device
// has lately been quick, the reader keeps the token and carries requests out
// itself, and replies are sent together when the input runs dry.
//
// A guess can be wrong. A watchdog looks every watchTick; a reader that is
// still at the same request loses the token to another goroutine, and requests
// of that kind go the usual way for a while. So a request that hangs delays the
// others of its connection by two ticks at most.
const (
	// quickTime is how long a quick request takes at most.
	quickTime = 20 * time.Microsecond
	// quickRuns is how many quick requests in a row make the next one a guess.
	quickRuns = 8
	// slowRuns is how many requests go the usual way after a slow one.
	slowRuns = 256
	// inlineBytes is the longest request that a reader carries out itself.
	inlineBytes = 32 << 10
	// inlineReplies is how many replies may wait for the input to run dry.
	inlineReplies = 32
	// gatherReplies is how many replies are sent together at least, if four
	// times as many requests are in flight.
	gatherReplies = 8
	// watchTick is how often the watchdog looks, while there is something to see.
	watchTick = time.Millisecond
	// watchIdle is after how many quiet ticks the watchdog goes to sleep.
	watchIdle = 100
)

// pace foretells whether the next request of a kind will be quick. Concurrent
// updates may lose one another; it is a guess anyway.
type pace struct{ credit atomic.Int32 }

// note takes in whether a request was quick.
func (p *pace) note(quick bool) {
	if !quick {
		p.credit.Store(-slowRuns)
	} else if n := p.credit.Load(); n < quickRuns {
		p.credit.Store(n + 1)
	}
}

// quick reports whether the next one will be quick.
func (p *pace) quick() bool { return p.credit.Load() >= quickRuns }

// keeps reports whether the reader carries r out itself.
func (c *conn) keeps(r *request) bool {
	if r.code != 0 || r.n > inlineBytes {
		return false
	}
	return r.typ <= cmdWrite && c.paces[r.typ].quick() || r.typ <= cmdFlush && c.lone.sure()
}

// hold begins something that may take longer than thought while its caller has
// the token. Until letGo the watchdog may take that.
func (c *conn) hold() (held uint64) {
	held = c.held.Add(1) // odd
	if !c.s.watching.Load() {
		c.wakeWatch()
	}
	return held
}

// wakeWatch wakes the watchdog.
func (c *conn) wakeWatch() {
	select {
	case c.s.wakeWatch <- struct{}{}:
	default:
	}
}

// letGo ends what hold began and reports whether the caller still has the token.
func (c *conn) letGo(held uint64) bool { return c.held.CompareAndSwap(held, held+1) }

// flushWatched sends the replies that wait, as the input has run dry, and
// reports whether the caller still has the token. A client that does not read
// its replies now may yet be read from.
func (c *conn) flushWatched() bool {
	if !c.out.due() {
		return true
	}
	held := c.hold()
	c.writeReplies()
	return c.letGo(held)
}

// watch takes the token from readers that hang in a request (see above).
func (s *Server) watch() {
	for {
		select {
		case <-s.wakeWatch:
		case <-s.ctx.Done():
			return
		}
		s.watching.Store(true)
		s.watchBusy()
	}
}

// watchBusy watches until nothing has happened for a while. A reader sets held
// before it looks at watching, and here it is the other way round, so that none
// goes unwatched.
func (s *Server) watchBusy() {
	tick := time.NewTicker(watchTick)
	defer tick.Stop()
	for quiet := 0; ; quiet++ {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			s.watching.Store(false)
			return
		}
		if s.look() {
			quiet = 0
		}
		if quiet < watchIdle {
			continue
		}
		s.watching.Store(false)
		if !s.look() {
			return
		}
		s.watching.Store(true)
		quiet = 0
	}
}

// look takes the token of readers that hang and has replies sent that wait for
// others, and reports whether any reader carried out requests itself since the
// last time or does so now, or replies waited.
func (s *Server) look() (busy bool) {
	for _, c := range s.list() {
		held := c.held.Load()
		busy = busy || held != c.seen || held%2 == 1
		if held%2 == 1 && held == c.seen && c.held.CompareAndSwap(held, held+1) {
			c.pass()
		}
		c.seen = held
		if held%2 == 0 && c.out.due() {
			busy = true
			s.wg.Go(c.writeReplies)
		}
	}
	return busy
}
