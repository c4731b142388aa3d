package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/qos"
)

const (
	// requestCost is what a request counts against the byte budget besides its
	// payload, so that a flood of small ones is bounded too.
	requestCost = 4096
	// maxSkip is the longest refused payload that is read away; a client that
	// announces more is cut off.
	maxSkip = 64 << 20
	// hurryGrace is the grace of a lost connection's requests once another
	// client wants the export.
	hurryGrace = 250 * time.Millisecond
	// socketBytes is the size asked for the buffers of Unix sockets.
	socketBytes = 4 << 20
)

// conn is one connection: first its negotiation, then its requests.
type conn struct {
	s       *Server
	id      uint64
	peer    string
	since   time.Time
	raw     *socket // never changed
	tlsMode TLSMode
	ctx     context.Context
	cancel  context.CancelFunc

	// Used by the negotiation, fixed after it.
	nc       net.Conn // raw, or TLS over it
	tls      bool
	noZeroes bool
	neg      negotiation
	export   string
	opened   Device        // what Exports gave
	dev      Device        // opened, or what is in it behind limit
	limit    *qos.Throttle // nil if opened has none
	readOnly bool
	contexts []string // the index is the id

	// Requests. The holder of the token owns in, workers and err.
	in       input
	workers  int
	err      error
	token    chan struct{} // closed when the stream has ended
	idle     atomic.Int32  // workers that wait for the token
	wg       sync.WaitGroup
	inFlight atomic.Int64
	budget   budget
	out      replies
	paces    [2]pace       // of reads and writes
	lone     loner         // as in
	held     atomic.Uint64 // odd while the reader carries out a request (inline.go)
	seen     uint64        // of held, by the watchdog

	requests, readBytes, wroteBytes atomic.Uint64

	mu struct {
		sync.Mutex // guards what other goroutines see of the negotiation's results
		export     string
		dev        Device
		tls, gone  bool
	}
	stopped chan struct{} // closed when the stream has ended
	hurried chan struct{} // takes one wish to end soon
	ended   chan struct{} // closed when no request runs any more
}

// newConn makes the state of a connection.
func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{
		s: s, id: s.nextID.Add(1), since: time.Now(), raw: newSocket(nc), tlsMode: s.o.TLSMode,
		token: make(chan struct{}, 1), stopped: make(chan struct{}),
		hurried: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	c.nc = c.raw
	if a := nc.RemoteAddr(); a != nil {
		c.peer = a.Network() + ":" + a.String()
	}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	c.budget.init(s.o.MaxBytes)
	if u, ok := nc.(*net.UnixConn); ok {
		if s.o.PlainUnix {
			c.tlsMode = TLSNone
		}
		u.SetReadBuffer(socketBytes)
		u.SetWriteBuffer(socketBytes)
	}
	return c
}

// upgrade continues the negotiation over TLS, from scratch (N5).
func (c *conn) upgrade(tc net.Conn) {
	c.nc, c.tls, c.neg = tc, true, negotiation{}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.tls = true
}

// attach gives the connection its device.
func (c *conn) attach(asked string, dev Device, info Info) {
	c.export, c.opened, c.dev, c.readOnly = info.Name, dev, dev, info.ReadOnly
	if l, ok := dev.(*limited); ok { // one wait for a request, not for each of its parts
		c.dev, c.limit = l.Device, l.q
	}
	if c.neg.structured && c.neg.metaName == asked {
		c.contexts = c.neg.contexts
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.export, c.mu.dev = info.Name, dev
}

// detach gives the device back.
func (c *conn) detach() {
	if c.opened != nil {
		c.s.o.Exports.Release(c.opened)
	}
}

// info describes the connection for a console.
func (c *conn) info() ConnInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	return ConnInfo{
		ID: c.id, Peer: c.peer, Export: c.mu.export, TLS: c.mu.tls, Since: c.since,
		InFlight: int(c.inFlight.Load()), Requests: c.requests.Load(),
		ReadBytes: c.readBytes.Load(), WrittenBytes: c.wroteBytes.Load(),
	}
}

// isGone reports whether the client has left while the device was in use.
func (c *conn) isGone(dev Device) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.gone && c.mu.dev == dev
}

// hurry asks for the end of a connection that is gone and reports whether it
// came before the context's end.
func (c *conn) hurry(ctx context.Context) bool {
	select {
	case c.hurried <- struct{}{}:
	default:
	}
	select {
	case <-c.ended:
		return true
	case <-ctx.Done():
		return false
	}
}

// transmit serves requests until the client leaves, and returns when none runs
// any more. The error is nil after a DISC.
func (c *conn) transmit() error {
	c.in.init(c.nc)
	c.lone.init(c.nc, &c.s.waiting)
	c.out.init(c.nc, &c.inFlight)
	c.workers = 1
	c.wg.Go(func() { c.work(true) })
	<-c.stopped
	c.mu.Lock()
	c.mu.gone = true
	c.mu.Unlock()
	c.s.wg.Go(func() {
		c.wg.Wait()
		close(c.ended)
	})
	c.awaitEnd()
	c.lone.close()
	return c.err
}

// awaitEnd lets the requests of a connection that has left end by themselves
// for a while, then cancels them.
func (c *conn) awaitEnd() {
	timer := time.NewTimer(c.s.o.Grace)
	defer timer.Stop()
	for {
		select {
		case <-c.ended:
			return
		case <-c.hurried:
			timer.Reset(min(hurryGrace, c.s.o.Grace))
		case <-timer.C:
			c.cancel()
			c.raw.Close()
			<-c.ended
			return
		}
	}
}

// work takes turns at reading requests and carries out what it read.
func (c *conn) work(leading bool) {
	for {
		if !leading {
			c.idle.Add(1)
			_, ok := <-c.token
			c.idle.Add(-1)
			if !ok {
				return
			}
		}
		leading = false
		if c.in.dry() {
			if !c.flushWatched() {
				continue
			}
			c.lone.await(c.inFlight.Load() == 0)
		}
		r, err := c.next()
		if err != nil {
			c.stopReading(err)
			return
		}
		if c.keeps(r) {
			held := c.hold()
			c.run(r)
			if c.lone.sure() && c.lone.more() {
				c.lone.note(false)
			}
			c.finishLater(r)
			if leading = c.letGo(held); !leading {
				c.lone.doubt()
				c.flushReplies() // the new reader may be waiting for the client already
			}
			continue
		}
		c.pass()
		c.run(r)
		c.finish(r)
	}
}

// stopReading ends the stream; the other workers end when they are idle.
func (c *conn) stopReading(err error) {
	if !errors.Is(err, errEnd) && !errors.Is(err, io.EOF) {
		c.err = err
		c.raw.Close()
	}
	close(c.stopped)
	close(c.token)
	c.flushReplies()
}

// pass hands the token to a worker that waits, or to a new one.
func (c *conn) pass() {
	if c.idle.Load() > 0 || c.workers >= c.s.o.MaxRequests {
		c.token <- struct{}{}
		return
	}
	c.workers++
	c.wg.Go(func() { c.work(true) })
}

// next reads one request with its payload. The errors end the stream: errEnd
// after DISC, io.EOF when the client closed between requests.
func (c *conn) next() (*request, error) {
	p, err := c.in.take(requestBytes)
	if err != nil {
		return nil, err
	}
	h, ok := parseHeader(p)
	if !ok {
		return nil, fmt.Errorf("read request: bad magic: %w", atoll.ErrInvalid)
	}
	if h.typ == cmdDisconnect {
		return nil, errEnd
	}
	r := newRequest(h)
	r.code, r.why = c.check(h)
	r.cost = requestCost
	if r.code == 0 && (h.typ == cmdRead || h.typ == cmdWrite) {
		r.cost += int64(h.n)
	}
	if !c.budget.try(r.cost) {
		c.flushReplies() // they hold budget
		if err := c.budget.acquire(c.ctx, r.cost); err != nil {
			r.free()
			return nil, err
		}
	}
	if h.typ == cmdWrite {
		if err := c.readPayload(r); err != nil {
			c.budget.release(r.cost)
			r.free()
			return nil, err
		}
	}
	c.lone.note(c.inFlight.Add(1) == 1 && c.in.a == c.in.b && (h.typ == cmdFlush || h.n <= inlineBytes))
	c.requests.Add(1)
	r.start = time.Now()
	return r, nil
}

// readPayload reads a write's payload into buffers, or away if the request is
// refused (N1).
func (c *conn) readPayload(r *request) error {
	if r.code == 0 {
		for rest := int(r.n); rest > 0; {
			p := r.alloc(rest)
			rest -= len(p)
			if err := c.in.read(p); err != nil {
				return noEOF(err)
			}
		}
		return nil
	}
	if r.n > maxSkip {
		return fmt.Errorf("read request: write of %d bytes: %w", r.n, atoll.ErrTooLarge)
	}
	return noEOF(c.in.skip(int(r.n)))
}

// noEOF turns an end of the stream within a request into an error.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// budget bounds the bytes in flight (N2). One goroutine at a time acquires.
type budget struct {
	limit   int64
	used    atomic.Int64
	waiting atomic.Bool
	room    chan struct{}
}

func (b *budget) init(limit int64) {
	b.limit, b.room = limit, make(chan struct{}, 1)
}

// try takes n bytes if there is room for them; alone, any n has room.
func (b *budget) try(n int64) bool {
	used := b.used.Load()
	if used != 0 && used+n > b.limit {
		return false
	}
	b.used.Add(n)
	return true
}

// acquire waits for room for n bytes.
func (b *budget) acquire(ctx context.Context, n int64) error {
	for {
		if b.try(n) {
			return nil
		}
		b.waiting.Store(true)
		if b.try(n) {
			b.waiting.Store(false)
			return nil
		}
		select {
		case <-b.room:
		case <-ctx.Done():
			return fmt.Errorf("read request: %w", context.Cause(ctx))
		}
	}
}

// release gives n bytes back.
func (b *budget) release(n int64) {
	b.used.Add(-n)
	if b.waiting.Load() && b.waiting.Swap(false) {
		select {
		case b.room <- struct{}{}:
		default:
		}
	}
}

const (
	// inputBytes is how much is read ahead while requests are small.
	inputBytes = 64 << 10
	// directBytes is from where a payload's rest is read without a copy.
	directBytes = 16 << 10
)

// input reads requests: small ones many at a time, large payloads straight to
// where they belong. After a large payload it reads ahead little, so that the
// next one is not copied either.
type input struct {
	r     io.Reader
	buf   []byte
	a, b  int // what is buffered
	ahead int // how much to read ahead
}

func (in *input) init(r io.Reader) {
	in.r, in.buf, in.ahead = r, make([]byte, inputBytes), inputBytes
}

// take returns the next n bytes, which stay valid until the next call. n is at
// most a few hundred. io.EOF means that there was not one byte more.
func (in *input) take(n int) ([]byte, error) {
	if err := in.fill(n); err != nil {
		return nil, err
	}
	in.a += n
	return in.buf[in.a-n : in.a], nil
}

// dry reports whether the next request is not all there, so that taking it may
// wait for the client.
func (in *input) dry() bool {
	there := in.b - in.a - requestBytes
	if there < 0 {
		return true
	}
	h, _ := parseHeader(in.buf[in.a:in.b])
	return h.typ == cmdWrite && uint64(h.n) > uint64(there)
}

// fill buffers at least n bytes.
func (in *input) fill(n int) error {
	if in.b-in.a >= n {
		return nil
	}
	in.b = copy(in.buf, in.buf[in.a:in.b])
	in.a = 0
	for in.b < n {
		m, err := in.r.Read(in.buf[in.b:max(in.ahead, n)])
		in.b += m
		if err != nil && in.b < n {
			if in.b > 0 {
				return noEOF(err)
			}
			return err
		}
	}
	return nil
}

// read fills p.
func (in *input) read(p []byte) error {
	in.ahead = inputBytes
	if len(p) > inputBytes {
		in.ahead = requestBytes
	}
	for {
		n := copy(p, in.buf[in.a:in.b])
		in.a += n
		p = p[n:]
		if len(p) == 0 {
			return nil
		}
		if len(p) >= directBytes {
			_, err := io.ReadFull(in.r, p)
			return err
		}
		if err := in.fill(1); err != nil {
			return err
		}
	}
}

// skip reads n bytes away.
func (in *input) skip(n int) error {
	for n > 0 {
		if err := in.fill(1); err != nil {
			return err
		}
		m := min(n, in.b-in.a)
		in.a += m
		n -= m
	}
	return nil
}
