package wire

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// conn is one connection of a link, from before it is dialed until its last
// request has ended.
type conn struct {
	link *link
	out  sender
	br   *bufio.Reader
	hdr  [headerSize]byte
	body []byte
	// done collects finished appends, to be handed back in one pass.
	done []*Append
	// receiving is the call whose payload is being read; only for the receiver.
	receiving *call
	progress  atomic.Uint64 // counts reads that gave bytes

	mu struct {
		sync.Mutex // guards the fields below and the state of every call
		raw        net.Conn
		cause      error // why it was killed
		dead       bool  // takes no more requests
		up         bool  // hello was answered
		calls      []*call
		free       []uint32
		used       int // bytes outstanding
		count      int // requests outstanding
		window     int
		requests   int
		room       chan struct{} // closed when something ended, if someone waits
		total      uint64        // requests ever
	}
}

// state of a call.
type state uint8

const (
	idle      state = iota
	waiting         // for the answer
	receiving       // the answer is being read
	finished        // a result that the caller has not taken yet
)

// call is a slot for a request. It is reused; its generation tells late answers.
type call struct {
	index   uint32
	gen     uint32
	method  method
	state   state
	dropped bool // the caller wants the result no more
	cost    int
	start   time.Time
	app     *Append // of an append
	dst     []byte  // of a read
	buf     *host.Buffer
	res     response
	err     error
	ready   chan struct{} // has room for one
}

func (c *call) id() uint64 { return uint64(c.gen)<<32 | uint64(c.index) }

// errDropped ends the reading of a payload that nobody wants.
var errDropped = errors.New("payload not wanted")

func newConn(l *link) *conn {
	c := &conn{link: l}
	c.out.wake = make(chan struct{}, 1)
	c.out.metrics = l.o.metrics
	c.mu.window, c.mu.requests = firstWindow, firstRequests
	return c
}

// run makes the connection, receives until it ends, and then ends what is
// outstanding.
func (c *conn) run() {
	made, err := c.serve()
	c.mu.Lock()
	c.mu.dead = true
	if c.mu.cause != nil {
		err = c.mu.cause
	}
	c.mu.Unlock()
	c.link.gone(c, made, err)
	c.out.close()
	c.failAll(err)
}

func (c *conn) serve() (made bool, err error) {
	l := c.link
	l.o.metrics.dialed()
	stream, err := c.dial()
	if err != nil {
		if !errors.Is(err, atoll.ErrIdentity) && !errors.Is(err, atoll.ErrVersion) {
			err = c.unreachable(err)
		}
		l.o.log.Debug("connection not made", "err", err)
		return false, err
	}
	closed := l.o.metrics.opened(false)
	c.out.start(stream)
	ctx, cancel := context.WithCancel(l.ctx)
	var wg sync.WaitGroup
	wg.Go(func() { c.write(ctx) })
	wg.Go(func() { c.watch(ctx) })
	err = c.receive()
	c.kill(nil)
	cancel()
	wg.Wait()
	closed(l.ctx.Err() == nil)
	l.o.log.Debug("connection lost", "err", err)
	return true, c.unreachable(err)
}

// unreachable makes ErrUnreachable of whatever went wrong on the connection. The
// kind of err is dropped on purpose: a damaged frame says nothing about what the
// node stores.
func (c *conn) unreachable(err error) error {
	return fmt.Errorf("connection to %s: %w: %v", c.link.o.addr, atoll.ErrUnreachable, err)
}

// dial connects and says hello.
func (c *conn) dial() (net.Conn, error) {
	o := &c.link.o
	ctx, cancel := context.WithTimeout(c.link.ctx, dialTimeout)
	defer cancel()
	raw, err := o.net.Dial(ctx, o.addr)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.mu.raw = raw
	killed := c.mu.cause != nil
	c.mu.Unlock()
	if killed {
		raw.Close()
		return nil, net.ErrClosed
	}
	raw.SetDeadline(time.Now().Add(helloTimeout))
	stream := raw
	if o.tls != nil {
		stream = tls.Client(raw, o.tls)
	}
	c.br = bufio.NewReaderSize(&patient{c: c, conn: stream}, readBuffer)
	if err := c.hello(stream); err != nil {
		raw.Close()
		return nil, err
	}
	raw.SetDeadline(time.Time{})
	return stream, nil
}

// hello compares identities (L1) and learns what the server takes.
func (c *conn) hello(stream net.Conn) error {
	o := &c.link.o
	frame := make([]byte, headerSize+helloSize)
	m := hello{min: version, max: version, cluster: o.cluster, process: o.process}
	m.encode(frame[headerSize:])
	encodeHeader(frame, &header{method: mHello, body: helloSize, bodyCRC: checksum(frame[headerSize:])})
	if _, err := stream.Write(frame); err != nil {
		return err
	}
	h, body, err := c.frame()
	if err != nil {
		return err
	}
	var w welcome
	if h.method != mHello || !h.reply {
		return fmt.Errorf("answer to hello is %v: %w", h.method, atoll.ErrCorrupt)
	}
	if err := w.decode(body); err != nil {
		return err
	}
	if w.err != nil {
		return fmt.Errorf("reach %s: %w", o.addr, w.err)
	}
	if w.cluster != o.cluster {
		return fmt.Errorf("reach %s: it is of cluster %v, not %v: %w", o.addr, w.cluster, o.cluster, atoll.ErrIdentity)
	}
	c.mu.Lock()
	c.mu.up = true
	c.mu.window = max(w.window, 2*maxPayload)
	c.mu.requests = max(w.requests, 1)
	c.roomLocked()
	c.mu.Unlock()
	return nil
}

// kill closes the connection, whatever it is doing. The first cause that is not
// nil is what outstanding requests end with.
func (c *conn) kill(cause error) {
	c.mu.Lock()
	c.mu.dead = true
	if c.mu.cause == nil {
		c.mu.cause = cause
	}
	raw := c.mu.raw
	c.mu.Unlock()
	if raw != nil {
		raw.Close()
	}
}

// write is the writing goroutine.
func (c *conn) write(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.out.wake:
		}
		pause()
		if _, err := c.out.flush(); err != nil {
			c.kill(c.unreachable(err))
			return
		}
	}
}

// watch pings when nothing arrives, gives up a silent peer (L7), and ends
// requests that are overdue.
func (c *conn) watch(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	var seen, total uint64
	silent, unused := 0, 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if now := c.progress.Load(); now != seen {
			seen, silent = now, 0
		} else {
			silent++
			c.ping()
		}
		if silent > silentTicks {
			c.kill(fmt.Errorf("reach %s: nothing heard for %v: %w", c.link.o.addr, silentTicks*tick, atoll.ErrUnreachable))
			return
		}
		var busy bool
		busy, total, unused = c.usage(total, unused)
		if !busy && unused > idleTicks {
			c.kill(fmt.Errorf("reach %s: idle: %w", c.link.o.addr, atoll.ErrUnreachable))
			return
		}
		c.expire(time.Now().Add(-atoll.RequestTimeout))
	}
}

// ping sends a frame that the peer answers at once; id 0 belongs to no call.
func (c *conn) ping() {
	if p := c.out.begin(0); p != nil {
		c.out.commit(p, &header{method: mPing}, nil, nil, 0)
		c.out.signal()
	}
}

// usage tells whether requests are outstanding, and for how many ticks there
// were no new ones.
func (c *conn) usage(before uint64, unused int) (busy bool, total uint64, ticks int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.count == 0 && c.mu.total == before {
		return false, before, unused + 1
	}
	return c.mu.count > 0, c.mu.total, 0
}

// expire ends calls that started before t.
func (c *conn) expire(t time.Time) {
	c.endAll(fmt.Errorf("wait for %s: %w", c.link.o.addr, atoll.ErrTimeout), t)
}

// failAll ends every call. The receiver no longer runs.
func (c *conn) failAll(err error) { c.endAll(err, time.Time{}) }

// endAll ends the waiting calls that started before t, or all if t is zero.
func (c *conn) endAll(err error, t time.Time) {
	var apps []*Append
	c.mu.Lock()
	for _, k := range c.mu.calls {
		if k.state != waiting || !t.IsZero() && !k.start.Before(t) {
			continue
		}
		if k.app != nil {
			k.app.Err = err
			apps = append(apps, k.app)
			c.link.o.metrics.called(k.method, err, k.start)
			c.freeLocked(k)
		} else {
			k.err = err
			c.finishLocked(k)
		}
	}
	c.mu.Unlock()
	for _, a := range apps {
		a.Done <- a
	}
}

// register takes a slot for a request, or reports why not: ErrUnreachable after
// the end, ErrBusy when as much is outstanding as may be; then the channel is
// closed when there may be room.
func (c *conn) register(m method, cost int, app *Append, dst []byte) (*call, uint64, <-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.dead {
		return nil, 0, nil, fmt.Errorf("reach %s: %w", c.link.o.addr, atoll.ErrUnreachable)
	}
	if c.mu.count >= c.mu.requests || c.mu.count > 0 && c.mu.used+cost > c.mu.window {
		if c.mu.room == nil {
			c.mu.room = make(chan struct{})
		}
		return nil, 0, c.mu.room, fmt.Errorf("reach %s: %d requests and %d bytes outstanding: %w", c.link.o.addr, c.mu.count, c.mu.used, atoll.ErrBusy)
	}
	k := c.slotLocked()
	k.method, k.state, k.cost, k.app, k.dst = m, waiting, cost, app, dst
	k.start = time.Now()
	c.mu.used += cost
	c.mu.count++
	c.mu.total++
	return k, k.id(), nil, nil
}

func (c *conn) slotLocked() *call {
	if n := len(c.mu.free); n > 0 {
		k := c.mu.calls[c.mu.free[n-1]]
		c.mu.free = c.mu.free[:n-1]
		return k
	}
	k := &call{index: uint32(len(c.mu.calls)), gen: 1, ready: make(chan struct{}, 1)}
	c.mu.calls = append(c.mu.calls, k)
	return k
}

// freeLocked gives a slot back; its id is never used again.
func (c *conn) freeLocked(k *call) {
	c.returnLocked(k)
	k.gen++
	if k.gen == 0 {
		k.gen = 1
	}
	k.state, k.dropped, k.app, k.dst, k.buf, k.err = idle, false, nil, nil, nil, nil
	k.res = response{}
	c.mu.free = append(c.mu.free, k.index)
}

// returnLocked stops counting k as outstanding.
func (c *conn) returnLocked(k *call) {
	if k.state != waiting && k.state != receiving {
		return
	}
	c.mu.used -= k.cost
	c.mu.count--
	c.roomLocked()
}

// roomLocked wakes those who wait for room.
func (c *conn) roomLocked() {
	if c.mu.room != nil {
		close(c.mu.room)
		c.mu.room = nil
	}
}

// finishLocked makes the result of a call that someone waits for ready.
func (c *conn) finishLocked(k *call) {
	c.returnLocked(k)
	k.state = finished
	k.ready <- struct{}{}
}

// await waits for the result of a call and returns it. After the end of ctx it
// gives the call up; the bytes it was to fill are not touched any more (L4).
func (c *conn) await(ctx context.Context, k *call) (response, *host.Buffer, error) {
	var stopped error
	select {
	case <-k.ready:
	case <-ctx.Done():
		stopped = fmt.Errorf("wait for %s: %w: %w", c.link.o.addr, atoll.ErrTimeout, ctx.Err())
		c.drop(k)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	res, buf, err := k.res, k.buf, k.err
	if stopped != nil {
		buf.Release()
		buf, err = nil, stopped
	}
	if err != nil && stopped == nil {
		buf.Release()
		buf = nil
	}
	c.link.o.metrics.called(k.method, err, k.start)
	c.freeLocked(k)
	return res, buf, err
}

// drop gives up a call. If its answer is being read just now, it wakes the
// receiver and waits until that has let go of it.
func (c *conn) drop(k *call) {
	c.mu.Lock()
	busy := k.state != waiting
	k.dropped = true
	if !busy {
		c.returnLocked(k)
		k.state = finished // nobody claims it any more
	}
	raw := c.mu.raw
	c.mu.Unlock()
	if !busy {
		return
	}
	if raw != nil {
		raw.SetReadDeadline(time.Unix(1, 0))
	}
	<-k.ready
}
