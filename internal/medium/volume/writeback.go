package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

const (
	// flushEntries is how many entries the flusher has in the log at once.
	flushEntries = 4
	// flushRetry is how long the flusher rests after an error that may pass.
	flushRetry = time.Second
	// drainTime is how long it may take to write what is held, but heldMin may
	// be held in any case. rateTime is how often the rate is taken.
	drainTime = 15 * time.Millisecond
	heldMin   = 8 << 20
	rateTime  = 20 * time.Millisecond
)

// writeback holds pages that were acknowledged from memory. A page that is
// written again before it is on its way is replaced in its place in the queue;
// so the queue's order is by first write, and flushing up to the end of the
// queue covers everything acknowledged so far. A nil writeback holds nothing.
type writeback struct {
	v     *Volume
	limit int64
	kick  chan struct{}

	mu       sync.Mutex
	index    map[pageNo]*dirtyPage // the newest of each page
	queue    []*dirtyPage          // not on their way yet, oldest first
	head     int
	free     *dirtyPage
	added    uint64 // pages that ever entered the queue
	done     uint64 // of those, pages that are in the log
	want     uint64 // pages that a flush waits for
	failures uint64 // of the kind that may pass
	lastErr  error
	fatal    error // sticky
	progress chan struct{}
	waiters  int
	line     []chan struct{} // writers for whom there is no room, first come first served; closed when it is their turn
	halted   bool            // a restore goes on
	fence    fence

	rate        float64 // bytes per second that the log takes
	since       time.Time
	landedBytes int64 // since then
	hope        hope  // while there is no space
}

// fence stands in the queue while a backup goes on: what is before it is sent,
// and not replaced any more; what is behind it waits.
type fence struct {
	up     bool
	before int    // pages in the queue before it
	target uint64 // added when it was raised
	err    error  // why it fell
}

// dirtyPage is one page in memory. Once it is on its way it does not change.
type dirtyPage struct {
	page pageNo
	buf  *host.Buffer
	data []byte
	sent bool       // on its way; it stays so until it is put back
	next *dirtyPage // in the free list
}

func newWriteback(v *Volume) *writeback {
	return &writeback{
		v: v, limit: v.opts.DirtyBytes, kick: make(chan struct{}, 1),
		index: make(map[pageNo]*dirtyPage), progress: make(chan struct{}),
	}
}

// held returns the bytes in memory, those on their way included. mu is held.
func (w *writeback) held() int64 { return int64(w.added-w.done) * atoll.BlockSize }

// holds reports whether any page of [p, p+n) waits to be flushed.
func (w *writeback) holds(p pageNo, n uint64) bool {
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if n > uint64(len(w.index)) {
		for q := range w.index {
			if q >= p && q-p < pageNo(n) {
				return true
			}
		}
		return false
	}
	for q := p; q < p+pageNo(n); q++ {
		if w.index[q] != nil {
			return true
		}
	}
	return false
}

// list returns the pages of a range that wait to be flushed, ascending.
func (w *writeback) list(r pageRange) (list []pageNo) {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	for p := range w.index {
		if p >= r.from && p < r.to {
			list = append(list, p)
		}
	}
	w.mu.Unlock()
	slices.Sort(list)
	return list
}

// copyTo copies the pages it holds of dst, which begins at page p, marks them
// in done and returns how many they were.
func (w *writeback) copyTo(p pageNo, dst []byte, done *pageSet) int {
	if w == nil {
		return 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for i := 0; i < len(dst)/atoll.BlockSize && len(w.index) > 0; i++ {
		if d := w.index[p+pageNo(i)]; d != nil {
			copy(dst[i*atoll.BlockSize:], d.data)
			done.add(i)
			n++
		}
	}
	return n
}

// add takes pages in, waiting while there is no room. The range is locked.
func (w *writeback) add(ctx context.Context, p pageNo, buf *host.Buffer, data []byte, era uint64) error {
	gen, err := w.v.enter(ctx, &w.v.door, p, uint64(len(data)/atoll.BlockSize), era)
	if err != nil {
		return err
	}
	defer w.v.door.exit(gen)
	w.mu.Lock()
	failures := w.failures
	var turn chan struct{}
	if len(w.line) > 0 {
		turn, err = w.lineUp(ctx)
	}
	first := w.head == len(w.queue)
	for len(data) > 0 && err == nil {
		if turn == nil && w.held() >= w.allowed() { // the line is empty
			turn, err = w.lineUp(ctx)
		}
		if err = cmp.Or(err, w.room(ctx, failures)); err == nil {
			w.addPage(p, buf, data[:atoll.BlockSize])
			p, data = p+1, data[atoll.BlockSize:]
		}
	}
	w.leave(turn)
	wake := first || w.held() > w.allowed()/4
	w.mu.Unlock()
	if err != nil {
		return err
	}
	if wake {
		w.wake()
	}
	return nil
}

// lineUp joins the line of those who want room and waits until it is their turn.
// mu is held, but for the wait.
func (w *writeback) lineUp(ctx context.Context) (turn chan struct{}, err error) {
	turn = make(chan struct{})
	w.line = append(w.line, turn)
	if len(w.line) == 1 {
		return turn, nil
	}
	w.mu.Unlock()
	select {
	case <-turn:
	case <-ctx.Done():
		err = fmt.Errorf("wait for the write cache: %w: %w", atoll.ErrTimeout, ctx.Err())
	case <-w.v.ctx.Done():
		err = atoll.ErrClosed
	}
	w.mu.Lock()
	return turn, err
}

// leave takes a writer out of the line; it may be the next one's turn then. mu
// is held.
func (w *writeback) leave(turn chan struct{}) {
	i := slices.Index(w.line, turn)
	if turn == nil || i < 0 {
		return
	}
	w.line = slices.Delete(w.line, i, i+1)
	if i == 0 && len(w.line) > 0 {
		close(w.line[0])
	}
}

func (w *writeback) addPage(p pageNo, buf *host.Buffer, data []byte) {
	if d := w.index[p]; d != nil && !d.sent {
		d.buf.Release()
		d.buf, d.data = buf.Retain(), data
		return
	}
	d := w.free
	if d == nil {
		d = new(dirtyPage)
	} else {
		w.free = d.next
	}
	*d = dirtyPage{page: p, buf: buf.Retain(), data: data}
	w.index[p] = d
	if w.head > 1024 && w.head > len(w.queue)/2 {
		n := copy(w.queue, w.queue[w.head:])
		clear(w.queue[n:])
		w.queue, w.head = w.queue[:n], 0
	}
	w.queue = append(w.queue, d)
	w.added++
}

// room waits until less than the limit is held, or writing failed more often than
// it had. mu is held, but for the wait.
func (w *writeback) room(ctx context.Context, failures uint64) error {
	for w.fatal == nil && w.held() >= w.allowed() {
		if w.failures != failures {
			return w.lastErr
		}
		if err := w.wait(ctx); err != nil {
			return err
		}
	}
	return w.fatal
}

// allowed is how much may be held now: what the log takes in drainTime, so that
// a flush or a backup takes not much longer, within bounds. mu is held.
func (w *writeback) allowed() int64 {
	if w.halted {
		return 1 << 62 // who is inside is to get out
	}
	return min(max(int64(w.rate*drainTime.Seconds()), heldMin), w.limit)
}

// halt sends nothing more, and lets in without limit who is at it, until resume.
func (w *writeback) halt() {
	w.mu.Lock()
	w.halted = true
	w.moved()
	w.mu.Unlock()
}

// resume ends it, and with drop forgets all pages. None is on its way then, and
// nobody adds any.
func (w *writeback) resume(drop bool) {
	w.mu.Lock()
	w.halted = false
	if drop {
		for _, d := range w.queue[w.head:] {
			w.drain(d)
		}
		clear(w.queue)
		w.queue, w.head, w.hope = w.queue[:0], 0, hope{}
		clear(w.index)
	}
	w.moved()
	w.mu.Unlock()
	w.wake()
}

// measure keeps the rate at which the log takes pages, while some wait for it.
// mu is held.
func (w *writeback) measure(n int) {
	w.landedBytes += int64(n) * atoll.BlockSize
	now := time.Now()
	switch d := now.Sub(w.since); {
	case w.since.IsZero() || d > time.Second: // it was idle
		w.since, w.landedBytes = now, 0
	case d >= rateTime:
		w.rate += 0.3 * (float64(w.landedBytes)/d.Seconds() - w.rate)
		w.since, w.landedBytes = now, 0
	}
}

// raise puts up the fence: what was added so far is one state of the volume. mu
// is held.
func (w *writeback) raise() {
	for _, d := range w.queue[w.head:] {
		d.sent = true // as good as; a newer one gets a place of its own
	}
	w.fence = fence{up: true, before: len(w.queue) - w.head, target: w.added, err: w.fatal}
	w.want = max(w.want, w.added)
}

// clear waits until all before the fence is in the map, and nothing on its way.
func (w *writeback) clear(ctx context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.fence.err == nil && w.done < w.fence.target {
		if err := w.wait(ctx); err != nil {
			return err
		}
	}
	return w.fence.err
}

// lower takes the fence away.
func (w *writeback) lower() {
	w.mu.Lock()
	w.fence = fence{}
	w.moved()
	w.mu.Unlock()
	w.wake()
}

// wait gives up mu until something moved.
func (w *writeback) wait(ctx context.Context) error {
	moved := w.progress
	w.waiters++
	w.mu.Unlock()
	w.wake()
	var err error
	select {
	case <-moved:
	case <-ctx.Done():
		err = fmt.Errorf("wait for the write cache: %w: %w", atoll.ErrTimeout, ctx.Err())
	case <-w.v.ctx.Done():
		err = atoll.ErrClosed
	}
	w.mu.Lock()
	w.waiters--
	return err
}

// moved wakes everyone in wait. mu is held.
func (w *writeback) moved() {
	if w.waiters > 0 {
		close(w.progress)
		w.progress = make(chan struct{})
	}
}

func (w *writeback) wake() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// flush waits until everything that was added before is in the log.
func (w *writeback) flush(ctx context.Context) error {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	target, failures := w.added, w.failures
	w.want = max(w.want, target)
	for w.fatal == nil && w.done < target {
		if w.failures != failures {
			return w.lastErr
		}
		if err := w.wait(ctx); err != nil {
			return err
		}
	}
	return w.fatal
}

// run is the flusher: it starts when a flush asks, when a quarter of the limit
// is held, or when a page has waited for FlushDelay.
func (w *writeback) run() {
	timer := time.NewTimer(w.v.opts.FlushDelay)
	defer timer.Stop()
	var due <-chan time.Time
	for {
		force := false
		select {
		case <-w.kick:
		case <-due:
			due, force = nil, true
		case <-w.v.ctx.Done():
			return
		}
		w.mu.Lock()
		some := w.head < len(w.queue)
		now := some && w.fatal == nil && (force || w.want > w.done || w.held() > w.allowed()/4)
		w.mu.Unlock()
		switch {
		case now && w.send():
			due = nil
		case now: // try again later what may pass
			if w.hungry() {
				w.v.awaitSpace(w.v.ctx)
			} else {
				timer.Reset(flushRetry)
				w.rest(timer)
			}
			due = nil
			w.wake()
		case some && due == nil:
			timer.Reset(w.v.opts.FlushDelay)
			due = timer.C
		}
	}
}

// hungry reports whether space is what it waits for.
func (w *writeback) hungry() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.hope.since.IsZero()
}

// rest waits for the timer, or for the end.
func (w *writeback) rest(timer *time.Timer) {
	select {
	case <-timer.C:
	case <-w.v.ctx.Done():
	}
}

// flushOp is an entry of the flusher with the pages in it.
type flushOp struct {
	*logOp
	pages []*dirtyPage
	gen   int
}

// send writes until the queue is empty or an entry fails; it reports whether
// all went well. Pages enter the map in the order of the log (V1).
func (w *writeback) send() bool {
	var flight []*flushOp
	var failed []*flushOp
	var cause error
	for {
		for len(flight) < flushEntries && cause == nil {
			op := w.take()
			if op == nil {
				break
			}
			if err := w.v.store.Submit(w.v.ctx, catalog.Hot, op.entry); err != nil {
				cause = err
				failed = append(failed, op)
				break
			}
			flight = append(flight, op)
		}
		if len(flight) == 0 {
			break
		}
		op := flight[0]
		flight = flight[1:]
		if err := op.entry.Wait(w.v.ctx); err != nil {
			cause = cmp.Or(cause, err)
			failed = append(failed, op)
			continue
		}
		w.landed(op)
	}
	if cause != nil {
		w.putBack(failed, cause)
	}
	return cause == nil
}

// take builds the next entry from the head of the queue.
func (w *writeback) take() *flushOp {
	op := &flushOp{logOp: w.v.ops.Get().(*logOp)}
	w.mu.Lock()
	for recs := 0; w.head < len(w.queue) && !w.halted && (!w.fence.up || w.fence.before > 0); w.head++ {
		d := w.queue[w.head]
		if n := len(op.pages); n == 0 || !joins(op.pages[n-1], d) {
			recs++
		}
		if !segment.Fits(recs, len(op.pages)+1) {
			break
		}
		w.queue[w.head] = nil
		w.fence.before--
		d.sent = true
		op.pages = append(op.pages, d)
	}
	if w.head == len(w.queue) {
		w.queue, w.head = w.queue[:0], 0
	}
	if len(op.pages) > 0 {
		op.gen = w.v.gate.pass() // before a halt can come
	}
	w.mu.Unlock()
	if len(op.pages) == 0 {
		w.v.ops.Put(op.logOp)
		return nil
	}
	for i := 0; i < len(op.pages); {
		j := i + 1
		for j < len(op.pages) && joins(op.pages[j-1], op.pages[j]) {
			j++
		}
		d := op.pages[i]
		data := d.data[: (j-i)*atoll.BlockSize : (j-i)*atoll.BlockSize]
		op.entry.Add(segment.Record{Kind: kindData, Blocks: uint16(j - i), Key: uint64(d.page)}, d.buf, data)
		i = j
	}
	return op
}

// joins reports whether b continues a, in the volume and in memory.
func joins(a, b *dirtyPage) bool {
	if a.page+1 != b.page || a.buf != b.buf || cap(a.data) < 2*atoll.BlockSize {
		return false
	}
	return &a.data[:2*atoll.BlockSize][atoll.BlockSize] == &b.data[0]
}

// landed puts the pages of a durable entry into the map, then lets them go.
func (w *writeback) landed(op *flushOp) {
	o, block := op.entry.Seg().Ordinal, 0
	for r := range op.entry.Records() {
		at := op.entry.Block(r)
		first := block
		for {
			d := op.pages[block]
			op.locs[block] = w.v.pages.location(o, at+atoll.BlockNo(block-first), op.entry.CRC(block), uint64(d.page))
			block++
			if block == len(op.pages) || !joins(op.pages[block-1], op.pages[block]) {
				break
			}
		}
		w.v.pages.put(op.pages[first].page, op.locs[first:block])
	}
	w.v.logged(len(op.pages))
	w.v.gate.exit(op.gen)
	op.entry.Reset()
	w.v.ops.Put(op.logOp)
	w.mu.Lock()
	for _, d := range op.pages {
		if w.index[d.page] == d {
			delete(w.index, d.page)
		}
		w.drain(d)
	}
	w.hope = hope{}
	w.measure(len(op.pages))
	w.moved()
	w.mu.Unlock()
}

// drain forgets a page that is in the log or superseded. mu is held.
func (w *writeback) drain(d *dirtyPage) {
	w.done++
	d.buf.Release()
	*d = dirtyPage{next: w.free}
	w.free = d
}

// putBack returns pages of failed entries to the head of the queue, but for
// those that were written again since: sent later than the newer, they would
// bring back the older. What cannot pass is sticky.
func (w *writeback) putBack(failed []*flushOp, cause error) {
	w.mu.Lock()
	h := w.hope
	w.mu.Unlock()
	hopeful := h.more(w.v, cause)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fence.up { // what was written again since is not kept
		w.fence.up, w.fence.err = false, fmt.Errorf("write in the background: %w", cause)
	}
	var again []*dirtyPage
	for _, op := range failed {
		w.v.gate.exit(op.gen)
		for _, d := range op.pages {
			if w.index[d.page] != d {
				w.drain(d)
				continue
			}
			d.sent = false
			again = append(again, d)
		}
	}
	w.queue = append(again, w.queue[w.head:]...)
	w.head = 0
	w.hope = h
	if hopeful {
		w.moved()
		return // no flush hears of it yet
	}
	w.hope = hope{}
	w.failures++
	w.lastErr = fmt.Errorf("write in the background: %w", cause)
	if !errors.Is(cause, atoll.ErrNoSpace) && !errors.Is(cause, atoll.ErrBusy) {
		w.fatal = w.lastErr
	}
	w.moved()
}

// drop releases everything; nothing runs any more.
func (w *writeback) drop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.queue[w.head:] {
		d.buf.Release()
	}
	if w.fatal == nil {
		w.fatal = atoll.ErrClosed
	}
	w.queue, w.head = nil, 0
	clear(w.index)
	w.moved()
}
