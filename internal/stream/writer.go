package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// Registry is where a writer has its segments entered: the medium's record in
// the catalog. One goroutine per writer calls it. A failed call is repeated
// until it succeeds, the writer ends, or it returns ErrFenced, ErrNotExist,
// ErrInvalid or ErrClosed; so each must bear repetition.
type Registry interface {
	// Register enters a new unsealed segment and returns its name, which is
	// never given out twice. It is called before any node hears of the segment.
	Register(ctx context.Context, lane catalog.Lane, copyset atoll.CopysetID, size atoll.BlockNo) (atoll.SegmentID, error)
	// Seal records a segment's final length. Segments may be sealed in another
	// order than they were registered.
	Seal(ctx context.Context, s catalog.Sealed) error
	// Abandon takes out a segment in which nothing was acknowledged; its copies,
	// if any, are to be deleted.
	Abandon(ctx context.Context, seg atoll.SegmentID) error
}

// WriterOptions are the settings of OpenWriter. Nodes, Registry and Epoch are
// required; zero values of the rest mean the defaults.
type WriterOptions struct {
	Nodes    *Nodes
	Registry Registry
	Medium   atoll.MediumID // for logs
	Epoch    atoll.Epoch
	Lane     catalog.Lane
	Seq      uint64 // of the first record
	Policy   catalog.Policy
	// Valid reports whether the owner's lease holds. It is asked before every
	// acknowledgement, must be fast, and may be called at any time. Nil: always.
	Valid func() bool
	// Reserve reports whether a segment may be made in the room that nodes keep
	// for what frees space. It may be called at any time. Nil: never.
	Reserve func() bool
	// Timeout is how long an entry may take before it fails with
	// ErrUnavailable; 0 means atoll.RequestTimeout.
	Timeout time.Duration
	// Idle is how long an unused segment stays open; 0 means 30 s, negative
	// for ever.
	Idle time.Duration
	// MaxBytes bounds the payload of entries that are not done; 0 means 64 MiB.
	MaxBytes int64
	Log      *slog.Logger
	Metrics  *Metrics
}

// Writer appends to one lane of a medium's log. All methods may be called
// concurrently. Entries take effect in the order in which Submit took them.
type Writer struct {
	opts    WriterOptions
	log     *slog.Logger
	start   time.Time
	bytes   *semaphore.Weighted
	submit  chan *Entry
	answers chan *wire.Append
	results chan event
	catalog chan catalogJob
	asks    chan ask
	dead    chan struct{} // closed when the writer does nothing more
	err     error         // why; set before dead is closed
	closing atomic.Bool
	ctx     context.Context // ends with the writer; for its own goroutines only
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	done struct {
		sync.Mutex // held for memory work only
		tail       Tail
	}

	alone atomic.Int32 // batches in a row that were one entry, with none behind it

	// The rest belongs to whoever has the turn: the goroutine of run, or one that
	// appends (direct.go).
	turn    sync.Mutex // held for memory work only
	staged  staged
	core    *writerCore
	ring    [maxEntries]*Entry // by position modulo size
	seq     uint64
	segs    []*writerSeg
	flights []*flight // by slot; all that were ever made
	idle    []*flight
	burst   []*wire.Append
	waiters []chan error // for a Roll
	closers []chan error
	timer   *time.Timer
	armed   time.Duration // when the timer fires; 0 if it does not
	looked  time.Duration // when it last looked for more nodes
	asked   time.Duration // when it last looked whether its copyset is being changed
	recs    []segment.Record
	crcs    []uint32
	header  segment.Head
}

// ask is a request to the writer's goroutine.
type ask struct {
	kind eventKind // evRoll or evClose
	done chan error
}

// writerSeg is a segment as the shell knows it.
type writerSeg struct {
	no    segNo
	id    atoll.SegmentID
	ids   []atoll.NodeID
	size  atoll.BlockNo
	nodes []wire.Node
	sum   uint32 // of the last batch header
}

// DefaultMin returns the least number of healthy nodes with which a policy lets
// writing go on: MinReplicas, or one less than Replicas but at least one. So
// with three copies writing goes on with two healthy nodes; segments made then
// have two copies, and repair completes them later.
func DefaultMin(p catalog.Policy) int {
	if p.MinReplicas > 0 {
		return min(p.MinReplicas, max(p.Replicas, 1))
	}
	return max(1, p.Replicas-1)
}

// OpenWriter starts a writer. It touches no node and no catalog record before
// the first entry comes. The caller must have recovered the segments of earlier
// epochs, and must Close the writer.
func OpenWriter(o WriterOptions) (*Writer, error) {
	if o.Nodes == nil || o.Registry == nil || o.Policy.Replicas < 1 || o.Policy.Replicas > atoll.MaxCopies || o.Policy.Segment > atoll.MaxSegmentBlocks {
		return nil, fmt.Errorf("open writer of medium %v: bad options: %w", o.Medium, atoll.ErrInvalid)
	}
	if o.Policy.Segment == 0 {
		o.Policy.Segment = atoll.SegmentBlocks
	}
	if o.Timeout == 0 {
		o.Timeout = atoll.RequestTimeout
	}
	if o.Idle == 0 {
		o.Idle = 30 * time.Second
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 64 << 20
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	w := &Writer{
		opts: o, log: o.Log.With("medium", o.Medium, "epoch", o.Epoch, "lane", o.Lane),
		start: time.Now(), bytes: semaphore.NewWeighted(o.MaxBytes), seq: o.Seq,
		submit: make(chan *Entry, 512), answers: make(chan *wire.Append, 4096),
		results: make(chan event, 64), catalog: make(chan catalogJob, 64),
		asks: make(chan ask), dead: make(chan struct{}), timer: time.NewTimer(time.Hour),
	}
	w.timer.Stop()
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.core = newWriterCore(coreConfig{
		timeout: o.Timeout, idle: max(o.Idle, 0),
		soft: 50 * time.Millisecond, hard: 250 * time.Millisecond, silent: time.Second,
		copies: o.Policy.Replicas, retry: 10 * time.Millisecond, retryMax: time.Second, pipe: 16, bugs: activeBugs(),
	})
	w.wg.Go(w.runCatalog)
	w.wg.Go(w.run)
	return w, nil
}

// Append submits an entry and waits for it. When nothing else is to be done, the
// caller's goroutine does the work, disks included, and may then be held beyond
// the end of ctx for as long as those take.
func (w *Writer) Append(ctx context.Context, e *Entry) error {
	if err := w.admit(ctx, e); err != nil {
		return err
	}
	if !w.carry(e) {
		if err := w.queue(ctx, e); err != nil {
			return err
		}
	}
	return e.Wait(ctx)
}

// Submit hands an entry to the writer. It waits only while the queue is full.
// When it returns nil, the entry belongs to the writer until Wait; after an
// error it is the caller's and nothing of it was written.
func (w *Writer) Submit(ctx context.Context, e *Entry) error {
	if err := w.admit(ctx, e); err != nil {
		return err
	}
	return w.queue(ctx, e)
}

// admit checks an entry and waits for room for it; it is the writer's then.
func (w *Writer) admit(ctx context.Context, e *Entry) error {
	if len(e.recs) == 0 || e.busy {
		return fmt.Errorf("append an empty or busy entry: %w", atoll.ErrInvalid)
	}
	if !fitsBatch(len(e.recs), e.blocks) {
		return fmt.Errorf("append %d records with %d blocks in one entry: %w", len(e.recs), e.blocks, atoll.ErrTooLarge)
	}
	if w.closing.Load() {
		return w.closedErr()
	}
	if err := w.bytes.Acquire(ctx, w.weight(e)); err != nil {
		return fmt.Errorf("append: queue is full: %w: %w", atoll.ErrTimeout, err)
	}
	e.begin()
	return nil
}

// queue gives an admitted entry to the writer's goroutine.
func (w *Writer) queue(ctx context.Context, e *Entry) error {
	select {
	case w.submit <- e:
	default:
		select {
		case w.submit <- e:
		case <-ctx.Done():
			return w.takeBack(e, fmt.Errorf("append: queue is full: %w: %w", atoll.ErrTimeout, ctx.Err()))
		case <-w.dead:
			return w.takeBack(e, w.closedErr())
		}
	}
	select {
	case <-w.dead:
		w.failQueued()
	default:
	}
	return nil
}

func (w *Writer) weight(e *Entry) int64 {
	return min(int64(e.blocks+1)*atoll.BlockSize, w.opts.MaxBytes)
}

func (w *Writer) takeBack(e *Entry, err error) error {
	w.bytes.Release(w.weight(e))
	e.busy = false
	return err
}

func (w *Writer) closedErr() error {
	select {
	case <-w.dead:
		return w.err
	default:
		return fmt.Errorf("append to a closed writer: %w", atoll.ErrClosed)
	}
}

// failQueued fails what is queued after the writer's end. Both the ending
// writer and a submitter that came too late call it, so no entry is left behind.
func (w *Writer) failQueued() {
	for {
		select {
		case e := <-w.submit:
			w.finish(e, w.err)
		default:
			return
		}
	}
}

func (w *Writer) finish(e *Entry, err error) {
	n := w.weight(e)
	e.finish(err)
	w.bytes.Release(n)
}

// Roll seals the open segment once everything in it is acknowledged, and
// returns when the catalog has it. Entries submitted meanwhile go to the next
// segment. Without an open segment it waits for earlier seals only.
func (w *Writer) Roll(ctx context.Context) error { return w.ask(ctx, evRoll) }

// ask waits for the writer to do something to what is open; without a deadline
// of the caller's for atoll.RequestTimeout.
func (w *Writer) ask(ctx context.Context, kind eventKind) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, atoll.RequestTimeout)
		defer cancel()
	}
	a := ask{kind, make(chan error, 1)}
	select {
	case w.asks <- a:
	case <-w.dead:
		return w.err
	case <-ctx.Done():
		return fmt.Errorf("seal the open segment: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
	select {
	case err := <-a.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("seal the open segment: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
}

// Stopped is closed when the writer has ended, by Close or because another
// owner took over; Err then tells why.
func (w *Writer) Stopped() <-chan struct{} { return w.dead }

// Err returns why the writer ended, nil while it runs.
func (w *Writer) Err() error {
	select {
	case <-w.dead:
		return w.err
	default:
		return nil
	}
}

// Close waits for the queued entries, seals what is open and ends the writer.
// When ctx ends first, or the lease is lost, whatever is not acknowledged fails
// and the segments stay unsealed for recovery. Nothing runs after it returned.
func (w *Writer) Close(ctx context.Context) error {
	w.closing.Store(true)
	err := w.ask(ctx, evClose)
	w.cancel()
	w.wg.Wait()
	if errors.Is(w.err, atoll.ErrClosed) && (err == nil || errors.Is(err, atoll.ErrClosed)) {
		return nil
	}
	if err == nil {
		err = w.err
	}
	return fmt.Errorf("close writer of medium %v: %w", w.opts.Medium, err)
}

func (w *Writer) now() time.Duration { return time.Since(w.start) }

// run is the writer's goroutine: it collects what has happened, lets the core
// decide, and carries it out.
func (w *Writer) run() {
	for full := false; ; {
		submit := w.submit
		if full {
			submit = nil
		}
		var in input
		select {
		case in.entry = <-submit:
		case in.answer = <-w.answers:
		case in.result = <-w.results:
		case in.ask = <-w.asks:
		case <-w.timer.C:
			in.tick = true
		case <-w.ctx.Done():
			in.stop = true
		}
		// Let those run that were woken together with this goroutine, so that
		// what they bring goes into the same batch.
		runtime.Gosched()
		w.turn.Lock()
		more := w.take(in)
		full = w.core.room() == 0
		w.turn.Unlock()
		if !more {
			return
		}
	}
}

// input is what woke the writer's goroutine; one of the fields is set.
type input struct {
	entry      *Entry
	answer     *wire.Append
	result     event
	ask        ask
	tick, stop bool
}

// take does what an input calls for and reports whether the writer goes on.
func (w *Writer) take(in input) bool {
	ev := event{kind: evTick}
	switch {
	case in.answer != nil:
		w.burst = append(w.burst, in.answer)
	case in.result.kind != 0:
		ev = in.result
	case in.ask.kind == evRoll:
		ev.kind = evRoll
		w.waiters = append(w.waiters, in.ask.done)
	case in.ask.kind != 0:
		ev.kind = in.ask.kind
		w.closers = append(w.closers, in.ask.done)
	case in.tick:
		w.armed = 0
	case in.stop:
		w.core.stop(fmt.Errorf("writer closed early: %w", atoll.ErrClosed))
	}
	w.collect()
	w.apply(ev, in.entry)
	if w.core.stopped != nil {
		w.end()
		return false
	}
	w.arm()
	return true
}

// collect takes the answers that are there, without waiting.
func (w *Writer) collect() {
	for {
		select {
		case a := <-w.answers:
			w.burst = append(w.burst, a)
		default:
			return
		}
	}
}

// apply tells the core what happened and carries out what it decides. The lease
// is checked after the answers came in (W1).
func (w *Writer) apply(ev event, e *Entry) {
	ev.now, ev.valid = w.now(), w.opts.Valid == nil || w.opts.Valid()
	for i, a := range w.burst {
		w.answer(a, ev)
		w.burst[i] = nil
	}
	w.burst = w.burst[:0]
	if e != nil {
		w.enqueue(e, ev)
	}
	for w.core.room() > 0 {
		select {
		case e := <-w.submit:
			w.enqueue(e, ev)
			continue
		default:
		}
		break
	}
	w.register(&ev)
	if ev.kind == evTick && w.core.short() && ev.now-w.looked > time.Second {
		w.looked = ev.now
		ev.whole = w.opts.Nodes.Whole(w.opts.Policy)
	}
	w.moveOn(ev)
	w.core.apply(ev)
	w.core.settle()
	for _, fx := range w.core.take() {
		w.do(fx)
	}
	if ev.kind == evRecorded {
		w.segs = slices.DeleteFunc(w.segs, func(s *writerSeg) bool { return s.no == ev.seg })
	}
}

// lookEvery is how often a writer with an open segment looks whether to move on.
const lookEvery = 2 * time.Second

// moveOn rolls when a member of the open segment's copyset is being replaced,
// which waits until no segment of it is unsealed.
func (w *Writer) moveOn(ev event) {
	if ev.now-w.asked < lookEvery/2 || w.core.cur == nil || w.core.rolling == w.core.cur {
		return
	}
	w.asked = ev.now
	set := w.opts.Nodes.State().Copysets[w.core.cur.id.Copyset]
	if len(set.Moves) > 0 {
		w.core.apply(event{kind: evRoll, now: ev.now, valid: ev.valid})
	}
}

func (w *Writer) enqueue(e *Entry, ev event) {
	e.queued = ev.now
	e.seq = w.seq
	w.seq += uint64(len(e.recs))
	w.ring[w.core.tail%maxEntries] = e
	w.core.apply(event{kind: evEntry, now: ev.now, valid: ev.valid, recs: len(e.recs), block: e.blocks})
}

// register notes a newly registered segment before the core hears of it.
func (w *Writer) register(ev *event) {
	if ev.kind != evRegistered || ev.err != nil {
		return
	}
	s := &writerSeg{no: ev.seg, id: ev.id, ids: ev.nodes, size: ev.size, nodes: make([]wire.Node, len(ev.nodes))}
	for i, id := range ev.nodes {
		s.nodes[i] = w.opts.Nodes.conn(id)
	}
	w.segs = append(w.segs, s)
}

func (w *Writer) seg(no segNo) *writerSeg {
	for _, s := range w.segs {
		if s.no == no {
			return s
		}
	}
	atoll.Assert(false, "writer of medium %v: no segment number %d", w.opts.Medium, no)
	return nil
}

// arm sets the timer for the core's next tick. A timer that is set for earlier
// is left alone.
func (w *Writer) arm() {
	at, ok := w.core.wake()
	if w.core.stopped == nil && w.core.cur != nil { // to look whether to move on
		if soon := w.core.now + lookEvery; !ok || at > soon {
			at, ok = soon, true
		}
	}
	if !ok || w.armed != 0 && w.armed <= at {
		return
	}
	w.armed = at
	w.timer.Reset(max(at-w.now(), 0))
}

// end fails what is left and lets everybody know.
func (w *Writer) end() {
	for _, fx := range w.core.take() {
		w.do(fx)
	}
	w.err = w.core.stopped
	w.closing.Store(true)
	w.cancel()
	w.timer.Stop()
	close(w.dead)
	w.failQueued()
	for _, f := range w.flights {
		if f.pending > 0 {
			f.vec.Release() // the copies hold their own references
		}
	}
	for _, c := range append(w.waiters, w.closers...) {
		c <- w.err
	}
}

// do carries out one effect.
func (w *Writer) do(fx effect) {
	switch fx.kind {
	case fxSend:
		w.send(fx)
	case fxAck:
		w.ack(fx)
	case fxFail:
		for p := fx.first; p < fx.first+uint64(fx.n); p++ {
			w.finish(w.entryAt(p), fx.err)
		}
	case fxSuspect:
		w.opts.Nodes.Suspect(fx.node, fx.err)
	case fxCreate:
		w.create(fx)
	case fxSealNodes:
		w.sealNodes(fx)
	case fxRegister, fxRecord, fxAbandon:
		w.report(fx)
	case fxRolled:
		for _, c := range w.waiters {
			c <- nil
		}
		w.waiters = w.waiters[:0]
	case fxStopped:
		if isFenced(fx.err) {
			w.log.Warn("writer stopped", "err", fx.err)
		}
	}
}

func (w *Writer) entryAt(pos uint64) *Entry {
	e := w.ring[pos%maxEntries]
	w.ring[pos%maxEntries] = nil
	return e
}
