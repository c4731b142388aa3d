package wire

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// session is the server's end of a connection. One goroutine receives and
// starts requests, one writes answers, and a bounded number of workers run the
// requests that are not appends.
type session struct {
	srv    *Server
	raw    net.Conn
	br     *bufio.Reader
	out    sender
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	hdr    [headerSize]byte
	body   []byte

	jobs  []*job        // by index, as many as there may be; nil until needed
	made  int           // jobs made; of the receiver
	free  chan *job     // jobs not in use
	done  chan *Append  // from nodes; has room for every job
	work  chan *job     // to workers; has room for every job
	stop  chan struct{} // closed when no more jobs come
	idle  atomic.Int32  // workers that wait
	count int           // workers
	wg    sync.WaitGroup

	appends  atomic.Int64  // with nodes
	used     atomic.Int64  // bytes outstanding
	room     chan struct{} // a token after used shrank
	draining atomic.Bool

	heard    atomic.Int64 // bytes received
	lastSeen int64        // of the watcher
	lastTime time.Time    // of the watcher
	writing  atomic.Int64 // since when a write is under way, Unix nanoseconds; 0 = none
}

// job is a request on the server. It is reused.
type job struct {
	app    Append
	method method
	id     uint64
	start  time.Time
	req    request
	res    response
	node   Node
	buf    *host.Buffer // payload of the request
	cost   int
}

func newSession(s *Server, raw net.Conn) *session {
	c := &session{
		srv: s, raw: raw, lastTime: time.Now(),
		jobs: make([]*job, s.o.Requests),
		free: make(chan *job, s.o.Requests),
		done: make(chan *Append, s.o.Requests),
		work: make(chan *job, s.o.Requests),
		stop: make(chan struct{}),
		room: make(chan struct{}, 1),
	}
	c.out.wake = make(chan struct{}, 1)
	c.out.metrics = s.o.Metrics
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// run serves the connection until it ends.
func (c *session) run() {
	defer c.cancel()
	defer c.raw.Close()
	log := c.srv.o.Log.With("peer", c.raw.RemoteAddr().String())
	if err := c.hello(); err != nil {
		c.srv.o.Metrics.denied()
		log.Warn("connection refused", "err", err)
		return
	}
	closed := c.srv.o.Metrics.opened(true)
	var writer sync.WaitGroup
	writer.Go(c.write)
	err := c.receive()
	if !c.draining.Load() {
		c.kill()
	}
	close(c.work)
	c.wg.Wait()
	close(c.stop)
	writer.Wait()
	c.out.close()
	closed(!c.draining.Load())
	if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !c.draining.Load() {
		log.Info("connection lost", "err", err)
	}
}

// kill closes the connection. Requests under way are told by their context.
func (c *session) kill() {
	c.cancel()
	c.raw.Close()
}

// drain makes the session take no more requests.
func (c *session) drain() {
	c.draining.Store(true)
	c.raw.SetReadDeadline(time.Unix(1, 0))
}

// check closes the connection if nothing was received for long, or if the peer
// takes nothing of what is being sent. Only the server's watcher calls it.
func (c *session) check(now time.Time) {
	if heard := c.heard.Load(); heard != c.lastSeen || c.used.Load() > 0 {
		c.lastSeen, c.lastTime = heard, now
	}
	since := c.writing.Load()
	stalled := since != 0 && now.Sub(time.Unix(0, since)) > c.srv.o.Stall
	if stalled || now.Sub(c.lastTime) > c.srv.o.Idle {
		c.kill()
	}
}

// counted reads for the session and counts the bytes.
type counted struct {
	c    *session
	conn net.Conn
}

func (r counted) Read(p []byte) (int, error) {
	n, err := r.conn.Read(p)
	r.c.heard.Add(int64(n))
	r.c.srv.o.Metrics.got(n)
	return n, err
}

// hello does the handshake (L1).
func (c *session) hello() error {
	o := &c.srv.o
	c.raw.SetDeadline(time.Now().Add(o.Hello))
	stream := c.raw
	if o.TLS != nil {
		t := tls.Server(c.raw, o.TLS)
		if err := t.HandshakeContext(c.ctx); err != nil {
			return err
		}
		stream = t
	}
	c.out.start(stream)
	c.br = bufio.NewReaderSize(counted{c, stream}, readBuffer)
	h, body, err := c.frame()
	if err != nil {
		return err
	}
	var m hello
	if h.method != mHello || h.reply {
		return fmt.Errorf("first frame is %v: %w", h.method, atoll.ErrCorrupt)
	}
	if err := m.decode(body); err != nil {
		return err
	}
	w := welcome{version: version, window: o.Window, requests: o.Requests, cluster: o.Cluster, process: o.Process}
	switch {
	case m.cluster != o.Cluster:
		w.err = fmt.Errorf("this is cluster %v, not %v: %w", o.Cluster, m.cluster, atoll.ErrIdentity)
	case m.min > version || m.max < version:
		w.err = fmt.Errorf("protocol %d is spoken here, not %d to %d: %w", version, m.min, m.max, atoll.ErrVersion)
	}
	frame := make([]byte, headerSize+w.size())
	w.encode(frame[headerSize:])
	encodeHeader(frame, &header{method: mHello, reply: true, body: len(frame) - headerSize, bodyCRC: checksum(frame[headerSize:])})
	if _, err := stream.Write(frame); err != nil {
		return err
	}
	if w.err == nil {
		c.raw.SetDeadline(time.Time{})
		if c.draining.Load() { // drain may have set its deadline just before
			c.raw.SetReadDeadline(time.Unix(1, 0))
		}
	}
	return w.err
}

// frame reads a header and a body, which is valid until the next frame.
func (c *session) frame() (header, []byte, error) {
	if _, err := io.ReadFull(c.br, c.hdr[:]); err != nil {
		return header{}, nil, err
	}
	h, err := decodeHeader(c.hdr[:])
	if err != nil {
		return h, nil, err
	}
	c.body, err = readBody(c.br, &h, c.body)
	return h, c.body[min(h.ext, len(c.body)):], err
}

// receive starts requests until the connection ends, which is always an error.
func (c *session) receive() error {
	for {
		h, body, err := c.frame()
		if err != nil {
			return err
		}
		if h.reply || h.method == mHello {
			return fmt.Errorf("%v out of place: %w", h.method, atoll.ErrCorrupt)
		}
		if h.method == mPing {
			c.pong(h.id)
			continue
		}
		if err := c.request(&h, body); err != nil {
			return err
		}
	}
}

func (c *session) pong(id uint64) {
	if p := c.out.begin(0); p != nil {
		c.out.commit(p, &header{method: mPing, reply: true, id: id}, nil, nil, 0)
		c.out.signal()
	}
}

// request reads the rest of a request and starts it.
func (c *session) request(h *header, body []byte) error {
	j, err := c.job()
	if err != nil {
		return err
	}
	if err := j.req.decode(h.method, body); err != nil {
		return err
	}
	j.method, j.id, j.start = h.method, h.id, time.Now()
	refused := c.prepare(j, h)
	j.cost = minCost + h.payload + answerRoom(j)
	if err := c.reserve(j.cost); err != nil {
		return err
	}
	if refused == nil && h.method == mAppend {
		return c.append(j, h)
	}
	if h.payload > 0 {
		if err := c.payload(j, h); err != nil {
			return err
		}
	}
	if refused != nil {
		j.res = response{err: refused}
		c.answer(j, nil)
		c.out.signal()
		return nil
	}
	c.start(j)
	return nil
}

// job returns a job that is not in use, waiting for one if all are.
func (c *session) job() (*job, error) {
	select {
	case j := <-c.free:
		return j, nil
	default:
	}
	if c.made < len(c.jobs) {
		j := &job{}
		j.app.User = uint64(c.made)
		c.jobs[c.made] = j
		c.made++
		return j, nil
	}
	select {
	case j := <-c.free:
		return j, nil
	case <-c.ctx.Done():
		return nil, net.ErrClosed
	}
}

// reserve waits until the connection's window has room (L6).
func (c *session) reserve(cost int) error {
	for {
		used := c.used.Load()
		if used == 0 || used+int64(cost) <= int64(c.srv.o.Window) {
			c.used.Add(int64(cost))
			return nil
		}
		select {
		case <-c.room:
		case <-c.ctx.Done():
			return net.ErrClosed
		}
	}
}

// unreserve gives back what written answers held.
func (c *session) unreserve(cost int) {
	if cost == 0 {
		return
	}
	c.used.Add(-int64(cost))
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// answerRoom is how large the payload of the answer may be.
func answerRoom(j *job) int {
	switch j.method {
	case mRead, mIndex:
		return j.req.count * atoll.BlockSize
	case mFetch:
		return maxPayload
	case mList:
		return j.req.count * infoSize
	}
	return 0
}

// prepare finds the node (L1) and checks what may be asked. It bounds counts.
func (c *session) prepare(j *job, h *header) error {
	r := &j.req
	switch j.method {
	case mRead:
		if r.count < 1 || r.count > maxPayload/atoll.BlockSize {
			r.count = 0
			return fmt.Errorf("read of %d blocks: %w", r.count, atoll.ErrTooLarge)
		}
	case mIndex:
		r.count = min(r.count, maxPayload/atoll.BlockSize)
	case mFetch:
		r.count = min(r.count, maxPayload)
	case mList:
		r.count = min(r.count, maxEntries)
	case mAppend, mExtend, mRepair:
		if h.payload == 0 {
			return fmt.Errorf("%v without bytes: %w", j.method, atoll.ErrInvalid)
		}
	}
	node, incarnation, ok := c.srv.o.Lookup(r.node)
	if !ok {
		return fmt.Errorf("node %v is not here: %w", r.node, atoll.ErrIdentity)
	}
	if incarnation != r.incarnation {
		return fmt.Errorf("node %v has disk incarnation %v, not %v: %w", r.node, incarnation, r.incarnation, atoll.ErrIdentity)
	}
	j.node = node
	return nil
}

// append reads a batch into aligned memory and gives it to the node.
func (c *session) append(j *job, h *header) error {
	vec := host.NewVec()
	for left := h.payload; left > 0; {
		n := atoll.BlockSize // the header block, apart
		if left < h.payload {
			n = left
		}
		buf := host.Alloc(n)
		_, err := io.ReadFull(c.br, buf.Bytes())
		vec.Add(buf, buf.Bytes())
		buf.Release()
		if err != nil {
			vec.Release()
			return err
		}
		left -= n
	}
	a := &j.app
	a.Seg, a.Epoch, a.Offset = j.req.seg, j.req.epoch, j.req.block
	a.Vec, a.Done, a.Node = vec, c.done, j.req.node
	a.Err, a.Queued, a.Commit = nil, 0, 0
	c.appends.Add(1)
	j.node.Append(a)
	return nil
}

// payload reads and checks the payload of a request.
func (c *session) payload(j *job, h *header) error {
	j.buf = host.Alloc(h.payload)
	if _, err := io.ReadFull(c.br, j.buf.Bytes()); err != nil {
		c.drop(j)
		return err
	}
	if sum := checksum(j.buf.Bytes()); h.sum && sum != h.dataCRC {
		c.drop(j)
		return fmt.Errorf("payload of %v has checksum %08x, sent %08x: %w", h.method, sum, h.dataCRC, atoll.ErrCorrupt)
	}
	return nil
}

// drop forgets what a job holds.
func (c *session) drop(j *job) {
	j.buf.Release()
	j.buf, j.node, j.req.runs, j.res = nil, nil, nil, response{}
}

// answer queues the answer of a job and frees it. buf is a payload, of which it
// takes over a reference.
func (c *session) answer(j *job, buf *host.Buffer) {
	r := &j.res
	h := header{method: j.method, reply: true, id: j.id}
	if buf != nil && len(buf.Bytes()) == 0 {
		buf.Release()
		buf = nil
	}
	if buf != nil {
		h.payload, h.sum, h.dataCRC = len(buf.Bytes()), true, checksum(buf.Bytes())
	}
	if p := c.out.begin(r.size(j.method)); p != nil {
		r.encode(j.method, p[headerSize:])
		c.out.commit(p, &h, nil, buf, j.cost)
	} else {
		buf.Release()
		c.unreserve(j.cost)
	}
	c.srv.o.Metrics.served(j.method, r.err, j.start)
	c.drop(j)
	c.free <- j
}

// write is the writing goroutine. It also collects the appends that nodes have
// finished, and ends when there are no more jobs and no appends with nodes.
func (c *session) write() {
	stop, ending := c.stop, false
	for !ending || c.appends.Load() > 0 {
		select {
		case a := <-c.done:
			c.appended(a)
		case <-c.out.wake:
		case <-stop:
			stop, ending = nil, true
		}
		pause()
		c.collect()
		c.flush()
	}
}

// collect takes finished appends without waiting.
func (c *session) collect() {
	for {
		select {
		case a := <-c.done:
			c.appended(a)
		default:
			return
		}
	}
}

// appended answers an append.
func (c *session) appended(a *Append) {
	c.appends.Add(-1)
	a.Vec.Release()
	a.Vec = nil
	j := c.jobs[a.User]
	j.res = response{err: a.Err, queued: a.Queued, commit: a.Commit}
	c.answer(j, nil)
}

func (c *session) flush() {
	c.writing.Store(time.Now().UnixNano())
	cost, err := c.out.flush()
	c.writing.Store(0)
	c.unreserve(cost)
	if err != nil {
		c.out.close()
		c.kill()
	}
}

// start gives a job to a worker, and makes one if none is idle and there may be
// more. It does not wait: work has room for every job.
func (c *session) start(j *job) {
	if c.idle.Load() <= int32(len(c.work)) && c.count < c.srv.o.Workers {
		c.count++
		c.wg.Go(c.worker)
	}
	c.work <- j
}

func (c *session) worker() {
	for {
		c.idle.Add(1)
		j, ok := <-c.work
		c.idle.Add(-1)
		if !ok {
			return
		}
		j.res = response{}
		buf := c.execute(j, &j.res)
		c.answer(j, buf)
		c.out.signal()
	}
}

// execute runs a request on its node. Nothing of a dead connection is started.
func (c *session) execute(j *job, r *response) *host.Buffer {
	left := j.req.timeout - time.Since(j.start)
	if j.req.timeout == 0 {
		left = atoll.RequestTimeout
	}
	if c.ctx.Err() != nil || left <= 0 {
		r.err = fmt.Errorf("%v waited for %v: %w", j.method, time.Since(j.start), atoll.ErrTimeout)
		return nil
	}
	if j.method == mRead {
		return c.read(j, r)
	}
	ctx, cancel := context.WithTimeout(c.ctx, left)
	defer cancel()
	return c.perform(ctx, j, r)
}

// read is apart because it allocates nothing: a local disk read cannot be broken
// off, so the connection's context does.
func (c *session) read(j *job, r *response) *host.Buffer {
	buf := host.Alloc(j.req.count * atoll.BlockSize)
	r.err = j.node.Read(c.ctx, j.req.seg, j.req.block, buf.Bytes())
	if r.err != nil {
		buf.Release()
		return nil
	}
	return buf
}

func (c *session) perform(ctx context.Context, j *job, r *response) (buf *host.Buffer) {
	n, q := j.node, &j.req
	switch j.method {
	case mCreate:
		blocks := q.block &^ Reserve
		if q.count&createReserve != 0 {
			blocks |= Reserve
		}
		r.err = n.Create(ctx, q.seg, q.epoch, blocks)
	case mFence:
		r.tail, r.err = n.Fence(ctx, q.seg, q.epoch)
	case mExtend:
		r.err = n.Extend(ctx, q.seg, q.epoch, q.block, j.buf.Bytes())
	case mSeal:
		r.err = n.Seal(ctx, q.seg, q.epoch, q.block)
	case mFetch:
		buf, r.err = n.Fetch(ctx, q.seg, q.block, q.count)
	case mIndex:
		buf, r.err = n.Index(ctx, q.seg, q.block, q.count)
	case mRepair:
		r.err = n.Repair(ctx, q.seg, q.block, j.buf.Bytes())
	case mDiscard:
		r.err = n.Discard(ctx, q.seg, q.runs)
	case mDelete:
		r.err = n.Delete(ctx, q.seg, q.epoch)
	case mList:
		r.list, r.err = n.List(ctx, q.seg, q.count)
	case mStat:
		r.stat, r.err = n.Stat(ctx)
	case mVerify:
		r.verify, r.err = n.Verify(ctx, q.seg)
	default:
		r.err = fmt.Errorf("%v: %w", j.method, atoll.ErrUnsupported)
	}
	return bounded(j.method, r, buf)
}

// bounded turns an answer that no frame can hold into an error.
func bounded(m method, r *response, buf *host.Buffer) *host.Buffer {
	if r.err != nil {
		buf.Release()
		return nil
	}
	if buf != nil && len(buf.Bytes()) > maxPayload || len(r.list) > maxEntries {
		r.err = fmt.Errorf("answer of %v: %w", m, atoll.ErrTooLarge)
		buf.Release()
		return nil
	}
	r.verify.Damaged = r.verify.Damaged[:min(len(r.verify.Damaged), maxRuns)]
	return buf
}
