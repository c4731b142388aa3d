package nbd

import (
	"bufio"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/host"
)

// maxPiece is the size of the largest buffer; larger payloads are split.
const maxPiece = 8 << 20

// request is one request and its reply. It is pooled; the goroutine that
// carries it out owns it until finish, then the writer.
type request struct {
	header
	code   uint32 // what it is refused with, 0 if it is in order
	why    string
	failed bool
	cost   int64
	start  time.Time
	bufs   []*host.Buffer // the payload, in or out
	heads  []byte         // memory of the reply's headers
	out    [][]byte       // the reply
	next   *request

	runs     []run // extents, found by addRun
	runsLeft int64 // how much of the range is to come
	runsMax  int
	addHole  func(n int64, hole bool) bool
	addState func(n int64, status uint32) bool
}

// run is a part of a range that has one state.
type run struct {
	n      int64
	status uint32
}

// requests holds free requests. Like the pools of buffers it is one for the
// process and carries no state that a caller can see.
var requests = sync.Pool{New: func() any {
	r := &request{heads: make([]byte, 0, 64)}
	r.addState = r.addRun
	r.addHole = func(n int64, hole bool) bool {
		if hole {
			return r.addRun(n, stateHole|stateZero)
		}
		return r.addRun(n, 0)
	}
	return r
}}

// newRequest returns a request from the pool.
func newRequest(h header) *request {
	r := requests.Get().(*request)
	r.header = h
	return r
}

// free releases the buffers and returns r to the pool.
func (r *request) free() {
	for i, b := range r.bufs {
		b.Release()
		r.bufs[i] = nil
	}
	clear(r.out)
	r.bufs, r.out, r.heads, r.runs = r.bufs[:0], r.out[:0], r.heads[:0], r.runs[:0]
	r.code, r.why, r.failed, r.next = 0, "", false, nil
	if cap(r.heads) > 64<<10 || cap(r.runs) > 4096 {
		return // grown by a long answer; not worth keeping
	}
	requests.Put(r)
}

// alloc adds a buffer of at most n bytes and returns its memory.
func (r *request) alloc(n int) []byte {
	b := host.Alloc(min(n, maxPiece))
	r.bufs = append(r.bufs, b)
	return b.Bytes()
}

// reserve makes room for n bytes of headers, so that those already in the reply
// do not move.
func (r *request) reserve(n int) {
	if cap(r.heads)-len(r.heads) < n {
		r.heads = append(make([]byte, 0, 2*cap(r.heads)+n), r.heads...)
	}
}

// head adds what was appended to heads since from to the reply.
func (r *request) head(from int) {
	r.out = append(r.out, r.heads[from:len(r.heads):len(r.heads)])
}

// startRuns prepares for extents of a range of n bytes, at most limit of them.
func (r *request) startRuns(n int64, limit int) {
	r.runs, r.runsLeft, r.runsMax = r.runs[:0], n, limit
}

// addRun takes one part, merging equal neighbours, and reports whether more are
// wanted.
func (r *request) addRun(n int64, status uint32) bool {
	n = min(n, r.runsLeft)
	if n <= 0 {
		return r.runsLeft > 0
	}
	if last := len(r.runs) - 1; last >= 0 && r.runs[last].status == status {
		r.runs[last].n += n
	} else if len(r.runs) == r.runsMax {
		return false
	} else {
		r.runs = append(r.runs, run{n, status})
	}
	r.runsLeft -= n
	return r.runsLeft > 0
}

// replies gathers finished requests; whoever adds one and finds nobody writing
// writes all there are.
type replies struct {
	mu struct {
		sync.Mutex  // held for memory work only
		first, last *request
		writing     bool
		queued      int // added since the last take
	}

	flying *atomic.Int64 // requests whose reply is not out

	// Owned by whoever writes.
	sock   *socket // one of the kernel's, or else nil
	slices [][]byte
	buf    *bufio.Writer // for connections that cannot gather
	broken bool
}

func (o *replies) init(nc net.Conn, flying *atomic.Int64) {
	o.flying = flying
	if s, ok := nc.(*socket); ok && s.kernel() {
		o.sock = s
	} else {
		o.buf = bufio.NewWriterSize(nc, 64<<10)
	}
}

// enough returns how many replies are worth a write. When every request in
// flight has its reply queued, that is always enough. mu is held.
func (o *replies) enough() int { return min(int(o.flying.Load()/4), gatherReplies) }

// add queues r and reports whether the caller must write, which is when enough
// replies wait, or with later set, inlineReplies.
func (o *replies) add(r *request, later bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.last == nil {
		o.mu.first = r
	} else {
		o.mu.last.next = r
	}
	o.mu.last = r
	o.mu.queued++
	if o.mu.writing || o.mu.queued < o.enough() || later && o.mu.queued < inlineReplies {
		return false
	}
	o.mu.writing = true
	return true
}

// due reports whether replies wait and nobody is at it, so that the caller must
// write.
func (o *replies) due() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.writing || o.mu.first == nil {
		return false
	}
	o.mu.writing = true
	return true
}

// take returns all that is queued, or nil and ends the caller's duty when that
// is nothing or, unless all is set, not enough.
func (o *replies) take(all bool) *request {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !all && o.mu.queued < o.enough() {
		o.mu.writing = false
		return nil
	}
	r := o.mu.first
	o.mu.first, o.mu.last, o.mu.queued = nil, nil, 0
	o.mu.writing = r != nil
	return r
}

// finish sends the reply of r, together with those that are ready by then. Of a
// client that keeps many requests in flight, a few replies are gathered first:
// the last request to end, or else the watchdog, sends what is left.
func (c *conn) finish(r *request) {
	if !c.out.add(r, false) {
		if !c.s.watching.Load() {
			c.wakeWatch()
		}
		return
	}
	if c.inFlight.Load() > 1 {
		runtime.Gosched() // let those that were woken with r add theirs
	}
	c.writeReplies()
}

// finishLater queues the reply of r, which may wait until the input runs dry.
// Only the reader may call it.
func (c *conn) finishLater(r *request) {
	if c.out.add(r, true) {
		c.writeReplies()
	}
}

// flushReplies sends what finishLater left.
func (c *conn) flushReplies() {
	if c.out.due() {
		c.writeReplies()
	}
}

// writeReplies sends all that is queued, until too little is left.
func (c *conn) writeReplies() {
	for all := true; ; all = false {
		list := c.out.take(all)
		if list == nil {
			return
		}
		c.out.write(list)
		if c.out.broken {
			c.raw.Close()
		}
		for list != nil {
			r := list
			list = r.next
			c.sent(r)
		}
	}
}

// sent accounts for a reply that is out and frees its request.
func (c *conn) sent(r *request) {
	c.s.o.Metrics.done(r)
	if !r.failed {
		switch r.typ {
		case cmdRead:
			c.readBytes.Add(uint64(r.n))
		case cmdWrite:
			c.wroteBytes.Add(uint64(r.n))
		}
	}
	cost := r.cost
	r.free()
	c.inFlight.Add(-1)
	c.budget.release(cost)
}

// write sends a list of replies. After an error it sends nothing more.
func (o *replies) write(list *request) {
	if o.broken {
		return
	}
	if o.buf != nil {
		o.broken = o.writeBuffered(list) != nil
		return
	}
	o.slices = o.slices[:0]
	for r := list; r != nil; r = r.next {
		o.slices = append(o.slices, r.out...)
	}
	o.broken = o.sock.send(o.slices) != nil
	clear(o.slices)
}

// writeBuffered sends a list over a connection that cannot gather.
func (o *replies) writeBuffered(list *request) error {
	for r := list; r != nil; r = r.next {
		for _, p := range r.out {
			if _, err := o.buf.Write(p); err != nil {
				return err
			}
		}
	}
	return o.buf.Flush()
}
