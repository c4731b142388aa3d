package stream

import (
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Limits of the writer core.
const (
	maxEntries  = 4096            // entries that the core holds at once
	maxInflight = 4               // batches on their way at once
	maxSegments = 6               // segments of one writer not yet done with
	shortRoll   = 5 * time.Second // least life of a segment with too few copies
)

// coreConfig is what the core is told once. Times are on the shell's clock.
type coreConfig struct {
	timeout  time.Duration // an entry fails when it is older
	soft     time.Duration // least time after which a copy is overdue
	hard     time.Duration // a copy that is overdue by this has failed, when others answered
	silent   time.Duration // the same when no copy answered
	idle     time.Duration // an unused segment is sealed after this; 0 = never
	retry    time.Duration // first pause between tries to get a segment
	retryMax time.Duration
	copies   int // that the policy asks for
	pipe     int // payload blocks worth a batch of their own while others are on their way
	bugs     Bugs
}

// writerCore decides what a writer does on each event. It is a value without
// clock, I/O or goroutine: apply takes an event, settle does what follows from
// the state, and both add to the list of effects that take returns.
//
// Entries have positions, counted from 0. Those before head are done; those
// from head to sent are in batches on their way; those from sent to tail wait.
type writerCore struct {
	cfg   coreConfig
	now   time.Duration // of the last event
	awake time.Duration // like now, but without the time this process slept
	valid bool          // the lease held at the last event

	entries          [maxEntries]coreEntry // by position modulo size
	head, sent, tail uint64
	waitBlocks       int // payload blocks from sent to tail
	waitRecs         int

	cur     *coreSeg   // takes batches; nil when there is none
	next    *coreSeg   // being registered or created, or ready
	sealing []*coreSeg // not yet recorded
	holds   int        // of these, how many hold back acknowledgements (W2)
	segs    segNo      // number of the last segment

	batches  [maxInflight]coreBatch // ring, oldest first
	firstNo  uint64                 // number of the oldest batch on its way
	inflight int
	latency  latencies
	strikes  [atoll.MaxCopies]int // overdue batches of the current segment's copies
	forgiven time.Duration        // when strikes were halved last
	failed   []failure            // latest failures of nodes
	failures int                  // ever
	tries    int                  // to get a segment, without success
	retryAt  time.Duration
	lastErr  error // why there is no segment
	lastUse  time.Duration
	rolling  *coreSeg // segment to be sealed by request
	rolled   bool     // a request to roll is open
	closing  bool
	stopped  error // set once, for good

	fx []effect
}

type coreEntry struct {
	recs, blocks int
	deadline     time.Duration
}

// segNo numbers the segments of one writer; 0 means none.
type segNo uint32

type segState uint8

const (
	segRegistering segState = iota + 1
	segCreating
	segReady
	segSealing   // waiting for the nodes' seals
	segRecording // waiting for the catalog
)

type coreSeg struct {
	no       segNo
	state    segState
	id       atoll.SegmentID
	size     atoll.BlockNo
	nodes    []atoll.NodeID
	created  uint8         // copies that exist
	unsure   uint8         // copies that failed
	failures int           // of the core, when it was asked for
	since    time.Duration // awake, when its creation began
	opened   time.Duration // when it was taken into use
	end      atoll.BlockNo // of what was sent
	acked    atoll.BlockNo // of what all copies have
	batches  int
	holds    bool // holds back acknowledgements until recorded
}

func (s *coreSeg) all() uint8 { return 1<<len(s.nodes) - 1 }

type coreBatch struct {
	first      uint64 // position of the first entry
	n          int
	end        atoll.BlockNo
	sent       time.Duration // awake
	durable    uint8         // copies that have it
	overdue    uint8         // copies counted as late
	firstAfter time.Duration
}

type failure struct {
	node atoll.NodeID
	at   int // value of failures
}

type eventKind uint8

const (
	evTick        eventKind = iota + 1
	evEntry                 // recs, blocks: an entry was queued
	evAnswer                // batch, copy, err: a copy answered
	evRegistered            // seg, id, nodes, size, err
	evCreated               // seg, copy, err
	evNodesSealed           // seg, mask of copies that failed
	evRecorded              // seg, err: its seal or abandon is in the catalog
	evRoll                  // seal what is open
	evClose                 // the same, and take no more
	evLost                  // the lease is gone
)

type event struct {
	kind  eventKind
	now   time.Duration
	valid bool
	whole bool // evTick: there are nodes enough for all copies of the policy
	seg   segNo
	batch uint64
	copy  int
	mask  uint8
	recs  int
	block int
	id    atoll.SegmentID
	nodes []atoll.NodeID
	size  atoll.BlockNo
	err   error
}

type effectKind uint8

const (
	fxRegister  effectKind = iota + 1 // seg: pick a copyset, register a segment
	fxCreate                          // seg, copy
	fxSend                            // seg, batch, first, n, at, acked: to all copies
	fxAck                             // first, n: entries done
	fxFail                            // first, n, err
	fxSuspect                         // node, err
	fxSealNodes                       // seg, at: seal all sound copies; answer if state asks
	fxRecord                          // seg, id, at, mask
	fxAbandon                         // seg, id
	fxRolled                          // the request to roll is done
	fxStopped                         // err: nothing more will happen
)

type effect struct {
	kind  effectKind
	seg   segNo
	id    atoll.SegmentID
	batch uint64
	copy  int
	node  atoll.NodeID
	first uint64
	n     int
	at    atoll.BlockNo
	acked atoll.BlockNo
	mask  uint8
	wait  bool // fxSealNodes: an evNodesSealed is expected
	err   error
}

func newWriterCore(cfg coreConfig) *writerCore {
	return &writerCore{cfg: cfg, valid: true}
}

// step applies one event and settles. The effects are valid until the next call.
func (c *writerCore) step(ev event) []effect {
	c.apply(ev)
	c.settle()
	return c.take()
}

// take returns the effects so far and forgets them.
func (c *writerCore) take() []effect {
	fx := c.fx
	c.fx = c.fx[:0]
	return fx
}

// apply takes note of an event.
func (c *writerCore) apply(ev event) {
	// A process that was stopped for a while finds every answer overdue, its
	// own fault. So the time in which it saw no tick counts only in part.
	if ev.now > c.now {
		c.awake += min(ev.now-c.now, 50*time.Millisecond)
		c.now = ev.now
	}
	c.valid = ev.valid
	if c.stopped != nil {
		if ev.kind == evEntry {
			c.addEntry(ev)
			c.failAll(c.stopped)
		}
		return
	}
	switch ev.kind {
	case evTick:
		c.tick(ev)
	case evEntry:
		c.addEntry(ev)
	case evAnswer:
		c.answered(ev)
	case evRegistered:
		c.registered(ev)
	case evCreated:
		c.created(ev)
	case evNodesSealed:
		c.nodesSealed(ev)
	case evRecorded:
		c.recorded(ev)
	case evRoll:
		c.rolled, c.rolling = true, c.cur
	case evClose:
		c.closing = true
	case evLost:
		c.stop(fmt.Errorf("lease lost: %w", atoll.ErrFenced))
	}
}

// room returns how many more entries the core can take.
func (c *writerCore) room() int { return maxEntries - int(c.tail-c.head) }

// idle reports whether there is no entry that is not done.
func (c *writerCore) idle() bool {
	return c.head == c.tail && c.inflight == 0 && c.stopped == nil && !c.closing
}

func (c *writerCore) entry(pos uint64) *coreEntry { return &c.entries[pos%maxEntries] }

func (c *writerCore) addEntry(ev event) {
	atoll.Assert(c.room() > 0, "writer core is full")
	*c.entry(c.tail) = coreEntry{ev.recs, ev.block, ev.now + c.cfg.timeout}
	c.tail++
	c.waitBlocks += ev.block
	c.waitRecs += ev.recs
	c.lastUse = ev.now
}

func (c *writerCore) emit(e effect) { c.fx = append(c.fx, e) }

// batch returns the batch with the given number if it still counts.
func (c *writerCore) batch(no uint64) *coreBatch {
	if no < c.firstNo || no >= c.firstNo+uint64(c.inflight) {
		return nil
	}
	return &c.batches[no%maxInflight]
}

// answered notes that a copy has a batch, or that it failed.
func (c *writerCore) answered(ev event) {
	b := c.batch(ev.batch)
	if b == nil {
		return // of a segment already given up
	}
	if ev.err != nil {
		c.copyFailed(ev.copy, ev.err)
		return
	}
	if b.durable == 0 {
		b.firstAfter = c.awake - b.sent
		c.latency.add(b.firstAfter)
	}
	b.durable |= 1 << ev.copy
	c.commit()
}

// commit acknowledges, in order, what all copies have (W1).
func (c *writerCore) commit() {
	for c.inflight > 0 && c.cur != nil && (c.holds == 0 || c.cfg.bugs.AckBeforeSeal) {
		b := &c.batches[c.firstNo%maxInflight]
		if b.durable != c.cur.all() && !(c.cfg.bugs.AckBeforeDurable && b.durable != 0) {
			return
		}
		if !c.valid {
			c.stop(fmt.Errorf("lease ran out: %w", atoll.ErrFenced))
			return
		}
		c.cur.acked = b.end
		end := b.first + uint64(b.n)
		if first := max(b.first, c.head); first < end {
			c.emit(effect{kind: fxAck, batch: c.firstNo, first: first, n: int(end - first)})
			c.head = end
		}
		c.firstNo++
		c.inflight--
		c.lastUse = c.now
	}
}

// settle does what the state calls for.
func (c *writerCore) settle() {
	for c.stopped == nil {
		c.expire()
		c.wantSegment()
		if c.cur != nil {
			c.sendBatches()
			c.wantSegment() // the batch may have filled a quarter
		}
		if !c.turnOver() {
			break
		}
	}
	c.finishRequests()
}

// expire fails entries past their deadline.
func (c *writerCore) expire() {
	n := 0
	for p := c.head; p < c.tail && c.entry(p).deadline <= c.now; p++ {
		n++
	}
	if n == 0 {
		return
	}
	err := fmt.Errorf("append unanswered for %v: %w", c.cfg.timeout, atoll.ErrUnavailable)
	if c.lastErr != nil {
		err = fmt.Errorf("append unanswered for %v: %w: %v", c.cfg.timeout, atoll.ErrUnavailable, c.lastErr)
	}
	c.failFirst(n, err)
}

// failFirst fails the n oldest entries. Batches on their way stay as they are.
func (c *writerCore) failFirst(n int, err error) {
	if n == 0 {
		return
	}
	c.emit(effect{kind: fxFail, first: c.head, n: n, err: err})
	c.head += uint64(n)
	if c.sent < c.head {
		c.sent = c.head
	}
	c.recount()
}

func (c *writerCore) failAll(err error) { c.failFirst(int(c.tail-c.head), err) }

// sendBatches sends what waits, as long as it is worth a batch. With nothing on
// its way anything is; beside other batches only a larger lot, because small
// ones cost as much as large ones and soon the answers bring more.
func (c *writerCore) sendBatches() {
	for c.sent < c.tail && c.inflight < maxInflight && c.rolling != c.cur {
		if c.inflight > 0 && c.waitBlocks+c.waitRecs < c.cfg.pipe {
			return
		}
		if !c.sendBatch() {
			return
		}
	}
}

// sendBatch sends as many waiting entries as fit in one batch and the segment.
func (c *writerCore) sendBatch() bool {
	s := c.cur
	recs, blocks, n := 0, 0, 0
	for p := c.sent; p < c.tail; p++ {
		e := c.entry(p)
		r, b := recs+e.recs, blocks+e.blocks
		if !fitsBatch(r, b) || !fitsSegment(s, b) {
			break
		}
		recs, blocks, n = r, b, n+1
	}
	if n == 0 {
		if s.end == 0 {
			atoll.Assert(c.inflight == 0, "batch on its way in an empty segment")
			c.failFirst(1, fmt.Errorf("append of %d blocks to segments of %d: %w", c.entry(c.sent).blocks, s.size, atoll.ErrTooLarge))
			return true
		}
		c.rolling = s // full
		return false
	}
	no := c.firstNo + uint64(c.inflight)
	at := s.end
	s.end += 1 + atoll.BlockNo(blocks)
	s.batches++
	c.batches[no%maxInflight] = coreBatch{first: c.sent, n: n, end: s.end, sent: c.awake}
	c.inflight++
	c.emit(effect{kind: fxSend, seg: s.no, batch: no, first: c.sent, n: n, at: at, acked: s.acked})
	c.sent += uint64(n)
	c.waitBlocks -= blocks
	c.waitRecs -= recs
	return true
}

// stop ends everything: whatever is not acknowledged never will be.
func (c *writerCore) stop(err error) {
	if c.stopped != nil {
		return
	}
	c.stopped = err
	c.failAll(err)
	c.firstNo += uint64(c.inflight)
	c.inflight = 0
	c.emit(effect{kind: fxStopped, err: err})
}

// wake returns when the next tick is needed, on the shell's clock; false for
// never, unless something happens.
func (c *writerCore) wake() (time.Duration, bool) {
	if c.stopped != nil {
		return 0, false
	}
	const step = 10 * time.Millisecond
	if c.inflight > 0 || c.next != nil && c.next.state == segCreating {
		return c.now + step, true
	}
	if c.head < c.tail {
		at := c.entry(c.head).deadline
		if c.next == nil && c.retryAt > c.now {
			at = min(at, c.retryAt)
		}
		return max(at, c.now+time.Millisecond), true
	}
	if c.short() {
		return c.now + time.Second, true
	}
	// A segment that is being registered can only be let go once it has a name.
	if c.cfg.idle > 0 && (c.cur != nil || c.next != nil && c.next.state != segRegistering) {
		return max(c.lastUse+c.cfg.idle, c.now+time.Millisecond), true
	}
	return 0, false
}
