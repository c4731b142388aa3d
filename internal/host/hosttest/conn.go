package hosttest

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// window is how many bytes of one direction may be written and not yet read.
const window = 4 << 20

// piece is what one Write sent. One without data is the end of the stream.
type piece struct {
	data []byte
	at   time.Time
}

// half is one direction of a connection.
type half struct {
	net      *Net
	from, to string
	rng      *rand.Rand // guarded by net.mu
	last     time.Time  // when the latest piece arrives; guarded by net.mu

	mu struct {
		sync.Mutex // guards the fields below
		coming     []piece
		bytes      int // written and not yet read
		arrived    [][]byte
		end        bool // the writer's end was closed, and that has arrived
		reset      bool
		changed    chan struct{} // closed at the next change
	}
}

func newHalf(n *Net, from, to string, rng *rand.Rand) *half {
	h := &half{net: n, from: from, to: to, rng: rng}
	h.mu.changed = make(chan struct{})
	return h
}

// wake tells all who wait. The half is locked.
func (h *half) wake() {
	close(h.mu.changed)
	h.mu.changed = make(chan struct{})
}

// send puts a piece on its way.
func (h *half) send(data []byte) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	at := h.schedule()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.reset {
		return
	}
	h.mu.coming = append(h.mu.coming, piece{data, at})
	h.mu.bytes += len(data)
}

// schedule draws the moment at which the next piece arrives. The net is locked.
func (h *half) schedule() time.Time {
	now := time.Now()
	at := now.Add(h.net.delay(h.rng))
	if !at.After(h.last) {
		at = h.last.Add(1)
	}
	at = h.net.claim(at)
	h.last = at
	time.AfterFunc(at.Sub(now), func() { h.deliver(at) })
	return at
}

// deliver hands over all pieces that are due, unless a cut holds them back.
func (h *half) deliver(at time.Time) {
	h.net.mu.Lock()
	delete(h.net.mu.arrivals, at.UnixNano())
	cut := h.net.isCut(h.from, h.to)
	h.net.mu.Unlock()
	if cut {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.mu.coming) > 0 && !h.mu.coming[0].at.After(at) {
		p := h.mu.coming[0]
		h.mu.coming[0] = piece{}
		h.mu.coming = h.mu.coming[1:]
		if p.data == nil {
			h.mu.end = true
		} else {
			h.mu.arrived = append(h.mu.arrived, p.data)
		}
	}
	h.wake()
}

// resend schedules all pieces anew. The net is locked.
func (h *half) resend() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.mu.coming {
		h.mu.coming[i].at = h.schedule()
	}
}

// abort loses what is on its way and fails both ends.
func (h *half) abort() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mu.reset = true
	h.mu.coming, h.mu.arrived = nil, nil
	h.wake()
}

// conn is one end of a connection.
type conn struct {
	peer          *conn
	out, in       *half
	local, remote memAddr
	readBy        deadline
	writeBy       deadline
	writing       chan struct{} // held by the Write at work
	once          sync.Once
	closed        chan struct{}
}

var _ net.Conn = (*conn)(nil)

func newConn(out, in *half, local, remote memAddr) *conn {
	c := &conn{
		out: out, in: in, local: local, remote: remote,
		writing: make(chan struct{}, 1), closed: make(chan struct{}),
	}
	c.readBy.mu.gone, c.writeBy.mu.gone = make(chan struct{}), make(chan struct{})
	return c
}

// fail makes an error as package net does.
func (c *conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: c.local.network, Source: c.local, Addr: c.remote, Err: err}
}

// isDone reports whether a channel is closed.
func isDone(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Read reads what has arrived.
func (c *conn) Read(p []byte) (int, error) {
	for {
		switch {
		case isDone(c.closed):
			return 0, c.fail("read", net.ErrClosed)
		case isDone(c.readBy.passed()):
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		}
		n, changed, err := c.in.take(p)
		if err == io.EOF {
			return 0, err
		}
		if err != nil {
			return 0, c.fail("read", err)
		}
		if n > 0 || len(p) == 0 {
			return n, nil
		}
		select {
		case <-changed:
		case <-c.closed:
		case <-c.readBy.passed():
		}
	}
}

// take moves what has arrived to p. With nothing there it returns the channel
// that tells of a change.
func (h *half) take(p []byte) (n int, changed <-chan struct{}, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.reset {
		return 0, nil, syscall.ECONNRESET
	}
	for n < len(p) && len(h.mu.arrived) > 0 {
		first := h.mu.arrived[0]
		m := copy(p[n:], first)
		n += m
		if m < len(first) {
			h.mu.arrived[0] = first[m:]
			break
		}
		h.mu.arrived[0] = nil
		h.mu.arrived = h.mu.arrived[1:]
	}
	if n > 0 {
		h.mu.bytes -= n
		h.wake()
		return n, nil, nil
	}
	if h.mu.end && len(p) > 0 {
		return 0, nil, io.EOF
	}
	return 0, h.mu.changed, nil
}

// Write sends p. It waits only while the window is full.
func (c *conn) Write(p []byte) (int, error) {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-c.closed:
		return 0, c.fail("write", net.ErrClosed)
	case <-c.writeBy.passed():
		return 0, c.fail("write", os.ErrDeadlineExceeded)
	}
	done := 0
	for {
		room, err := c.room()
		if err != nil {
			return done, c.fail("write", err)
		}
		n := min(room, len(p)-done)
		if n > 0 {
			c.out.send(bytes.Clone(p[done : done+n]))
		}
		if done += n; done == len(p) {
			return done, nil
		}
	}
}

// room waits for room in the window and returns how much there is.
func (c *conn) room() (int, error) {
	for {
		switch {
		case isDone(c.closed):
			return 0, net.ErrClosed
		case isDone(c.writeBy.passed()):
			return 0, os.ErrDeadlineExceeded
		}
		c.in.mu.Lock()
		end, peerGone := c.in.mu.end, c.in.mu.changed
		c.in.mu.Unlock()
		c.out.mu.Lock()
		reset, room, changed := c.out.mu.reset, window-c.out.mu.bytes, c.out.mu.changed
		c.out.mu.Unlock()
		switch {
		case reset:
			return 0, syscall.ECONNRESET
		case end:
			return 0, syscall.EPIPE
		case room > 0:
			return room, nil
		}
		select {
		case <-changed:
		case <-peerGone:
		case <-c.closed:
		case <-c.writeBy.passed():
		}
	}
}

// Close ends the connection. The other end reads what was sent before.
func (c *conn) Close() error {
	err := c.fail("close", net.ErrClosed)
	c.once.Do(func() {
		err = nil
		close(c.closed)
		c.readBy.stop()
		c.writeBy.stop()
		c.out.send(nil)
		if isDone(c.peer.closed) {
			c.out.net.drop(c)
		}
	})
	return err
}

// LocalAddr returns this end's address.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the other end's address.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline ends reads at t; never for the zero time.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.readBy, t) }

// SetWriteDeadline ends writes at t; never for the zero time.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.writeBy, t) }

func (c *conn) setDeadline(d *deadline, t time.Time) error {
	if isDone(c.closed) {
		return c.fail("set", net.ErrClosed)
	}
	d.set(t)
	return nil
}

// deadline closes a channel at a time that can be moved.
type deadline struct {
	mu struct {
		sync.Mutex // guards the fields below
		timer      *time.Timer
		gone       chan struct{}
		moved      int // how often it was set
	}
}

// passed returns a channel that is closed once the deadline has passed.
func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.gone
}

// stop ends the timer.
func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.timer != nil {
		d.mu.timer.Stop()
	}
}

// set moves the deadline, also for those who wait already.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.timer != nil {
		d.mu.timer.Stop()
		d.mu.timer = nil
	}
	d.mu.moved++
	if isDone(d.mu.gone) {
		d.mu.gone = make(chan struct{})
	}
	if t.IsZero() {
		return
	}
	moved := d.mu.moved
	left := time.Until(t)
	if left <= 0 {
		close(d.mu.gone)
		return
	}
	d.mu.timer = time.AfterFunc(left, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.mu.moved == moved {
			close(d.mu.gone)
		}
	})
}
