package wire

import (
	"net"
	"runtime"
	"slices"
	"sync"

	"github.com/atollstore/atoll/internal/host"
)

// sender is the outgoing half of a connection: a queue that anyone may add to
// and one goroutine that empties it. Headers and bodies are encoded at once into
// one run of memory; payloads stay where they are.
type sender struct {
	conn     net.Conn
	vectored bool // conn takes many slices in one system call
	metrics  *Metrics
	wake     chan struct{} // has room for one; a token means "look"

	mu struct {
		sync.Mutex // guards the fields below
		ctl        []byte
		items      []item
		closed     bool
	}

	// Of the writing goroutine.
	ctl    []byte
	items  []item
	slices net.Buffers // backing store
	rest   net.Buffers // what a write has still to do
	gather []byte
}

// item is one queued frame.
type item struct {
	ctl  int // bytes of header and body
	vec  *host.Vec
	buf  *host.Buffer
	cost int // told by flush once it is written
}

// gatherSize is how much is copied together for a connection that cannot write
// many slices at once.
const gatherSize = 64 << 10

// start sets the connection to write to. It is called once, by the writing
// goroutine or before it.
func (s *sender) start(conn net.Conn) {
	s.conn = conn
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		s.vectored = true
	}
}

// begin takes the lock and returns room for a frame's header and body of n
// bytes; the caller writes the body behind headerSize and calls commit at once.
// After close it returns nil, and there is no lock to give back.
func (s *sender) begin(n int) []byte {
	s.mu.Lock()
	if s.mu.closed {
		s.mu.Unlock()
		return nil
	}
	at := len(s.mu.ctl)
	s.mu.ctl = slices.Grow(s.mu.ctl, headerSize+n)[:at+headerSize+n]
	return s.mu.ctl[at:]
}

// commit queues the frame that begin made room for, and gives the lock back. It
// takes over one reference on vec or buf, whose lengths h.payload tells.
func (s *sender) commit(p []byte, h *header, vec *host.Vec, buf *host.Buffer, cost int) {
	h.body = len(p) - headerSize
	if h.body > 0 {
		h.bodyCRC = checksum(p[headerSize:])
	}
	encodeHeader(p, h)
	s.mu.items = append(s.mu.items, item{len(p), vec, buf, cost})
	s.mu.Unlock()
}

// signal makes the writing goroutine look at the queue.
func (s *sender) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// close refuses further frames and drops those that are queued.
func (s *sender) close() {
	s.mu.Lock()
	items := s.mu.items
	s.mu.closed, s.mu.items, s.mu.ctl = true, nil, nil
	s.mu.Unlock()
	release(items)
}

// flush writes all that is queued and returns the sum of the costs. Only the
// writing goroutine calls it, after yielding once (see pause).
func (s *sender) flush() (cost int, err error) {
	s.mu.Lock()
	s.ctl, s.mu.ctl = s.mu.ctl, s.ctl[:0]
	s.items, s.mu.items = s.mu.items, s.items[:0]
	s.mu.Unlock()
	if len(s.items) == 0 {
		return 0, nil
	}
	n := s.arrange()
	if s.vectored {
		s.rest = s.slices
		_, err = s.rest.WriteTo(s.conn)
	} else {
		err = s.writeGathered()
	}
	s.metrics.wrote(n)
	clear(s.slices)
	for i := range s.items {
		cost += s.items[i].cost
	}
	release(s.items)
	s.shrink()
	return cost, err
}

// arrange lists the slices to write, joining adjacent headers and bodies.
func (s *sender) arrange() (bytes int) {
	s.slices = s.slices[:0]
	from, to := 0, 0
	for i := range s.items {
		it := &s.items[i]
		to += it.ctl
		if it.vec == nil && it.buf == nil {
			continue
		}
		s.slices = append(s.slices, s.ctl[from:to])
		from = to
		if it.vec != nil {
			s.slices = append(s.slices, it.vec.Slices()...)
			bytes += it.vec.Size()
		} else {
			s.slices = append(s.slices, it.buf.Bytes())
			bytes += len(it.buf.Bytes())
		}
	}
	if from < to {
		s.slices = append(s.slices, s.ctl[from:to])
	}
	return bytes + to
}

// writeGathered copies small slices together and writes large ones as they are.
func (s *sender) writeGathered() error {
	if s.gather == nil {
		s.gather = make([]byte, 0, gatherSize)
	}
	g := s.gather[:0]
	for _, p := range s.slices {
		if len(g)+len(p) > gatherSize && len(g) > 0 {
			if _, err := s.conn.Write(g); err != nil {
				return err
			}
			g = g[:0]
		}
		if len(p) > gatherSize/2 && len(g) == 0 {
			if _, err := s.conn.Write(p); err != nil {
				return err
			}
			continue
		}
		g = append(g, p...)
	}
	if len(g) == 0 {
		return nil
	}
	_, err := s.conn.Write(g)
	return err
}

// shrink gives back memory that an unusual burst left behind.
func (s *sender) shrink() {
	if cap(s.ctl) > 1<<20 {
		s.ctl = nil
	}
	if cap(s.items) > 1<<14 {
		s.items = nil
	}
	if cap(s.slices) > 1<<15 {
		s.slices = nil
	}
}

// pause lets those that are about to queue more do so, before a writing
// goroutine that was just woken takes what is there. Without it, on few cores,
// every frame is written alone.
func pause() { runtime.Gosched() }

// release drops the references of items.
func release(items []item) {
	for i := range items {
		items[i].vec.Release()
		items[i].buf.Release()
		items[i] = item{}
	}
}
