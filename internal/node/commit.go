package node

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// item is one entry of the commit queue: a verified batch, or a barrier.
type item struct {
	a       *wire.Append
	vec     *host.Vec // a reference
	seg     *seg
	h       segment.Header // within vec
	crc     uint32         // of the header block
	at      time.Time
	verdict verdict
	err     error
	barrier chan struct{} // closed when all before it is done
}

// queue holds what a node has for the committer, bounded.
type queue struct {
	max  int
	wake chan struct{} // the committer's
	mu   struct {
		sync.Mutex
		items  []item
		closed error // why nothing more is taken
	}
}

func (q *queue) push(it item) error {
	q.mu.Lock()
	switch {
	case q.mu.closed != nil:
		q.mu.Unlock()
		return q.mu.closed
	case len(q.mu.items) >= q.max && it.barrier == nil:
		q.mu.Unlock()
		return fmt.Errorf("append to segment %v: queue of %d is full: %w", it.seg.id, q.max, atoll.ErrBusy)
	}
	q.mu.items = append(q.mu.items, it)
	q.mu.Unlock()
	q.poke()
	return nil
}

// poke wakes the committer.
func (q *queue) poke() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// empty reports whether nothing is queued.
func (q *queue) empty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.mu.items) == 0
}

// swap takes all items and leaves the empty slice spare in their place.
func (q *queue) swap(spare []item) []item {
	q.mu.Lock()
	defer q.mu.Unlock()
	items := q.mu.items
	q.mu.items = spare[:0]
	return items
}

func (q *queue) close(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.closed == nil {
		q.mu.closed = why
	}
}

// Append implements wire.Node. The batch is verified here, in the caller's
// goroutine.
func (n *Node) Append(a *wire.Append) {
	n.requests.Add(1)
	n.append(a)
}

func (n *Node) append(a *wire.Append) {
	a.Queued, a.Commit = 0, 0
	it, err := n.verify(a)
	if err == nil {
		it.vec = a.Vec.Retain()
		if err = n.queue.push(it); err != nil {
			it.vec.Release()
		}
	}
	if err != nil {
		n.answer(a, err)
	}
}

// answer sends a back, unless the sender carries it out itself.
func (n *Node) answer(a *wire.Append, err error) {
	a.Err = err
	if a.Done == nil {
		return
	}
	select {
	case a.Done <- a:
	default:
		atoll.Assert(false, "no room for the answer to an append to segment %v", a.Seg)
	}
}

// verify checks everything about a batch that does not depend on the tail.
func (n *Node) verify(a *wire.Append) (item, error) {
	if err := n.refuseWrites(); err != nil {
		return item{}, fmt.Errorf("append to segment %v: %w", a.Seg, err)
	}
	s, err := n.lookup(a.Seg)
	if err != nil {
		return item{}, err
	}
	v := a.Vec.Slices()
	if len(v) == 0 || len(v[0]) < atoll.BlockSize {
		return item{}, fmt.Errorf("append to segment %v: %d bytes: %w", a.Seg, a.Vec.Size(), atoll.ErrInvalid)
	}
	h, err := segment.ParseHeader(v[0])
	if err != nil {
		return item{}, fmt.Errorf("append to segment %v: %w", a.Seg, err)
	}
	if h.Segment() != a.Seg || h.Offset() != a.Offset || a.Vec.Size() != (1+h.Blocks())*atoll.BlockSize {
		return item{}, fmt.Errorf("append to segment %v at block %d: header is of segment %v at %d, %d bytes: %w",
			a.Seg, a.Offset, h.Segment(), h.Offset(), a.Vec.Size(), atoll.ErrInvalid)
	}
	if !a.Vec.Sound() { // or the node of another copy in this process has looked
		if i, ok := checkPayload(v, h); !ok {
			return item{}, fmt.Errorf("append to segment %v at block %d: payload block %d: %w", a.Seg, a.Offset, i, atoll.ErrCorrupt)
		}
		a.Vec.SetSound()
	}
	return item{a: a, seg: s, h: h, crc: segment.CRC(v[0][:atoll.BlockSize]), at: time.Now()}, nil
}

// checkPayload compares the blocks after the first with the header's checksums.
func checkPayload(v [][]byte, h segment.Header) (bad int, ok bool) {
	i := -1 // the header block
	for _, p := range v {
		for ; len(p) >= atoll.BlockSize; p = p[atoll.BlockSize:] {
			if i >= 0 && segment.CRC(p[:atoll.BlockSize]) != h.BlockCRC(i) {
				return i, false
			}
			i++
		}
		if len(p) > 0 {
			return i, false
		}
	}
	return i, i == h.Blocks()
}

// barrier returns when every append queued so far has been committed or
// refused.
func (n *Node) barrier() error {
	done := make(chan struct{})
	if err := n.queue.push(item{barrier: done}); err != nil {
		return err
	}
	<-done
	return nil
}

// admit judges one batch and adds it to its segment's write.
func (n *Node) admit(it *item) (verdict, error) {
	s := it.seg
	s.mu.Lock()
	defer s.mu.Unlock()
	m, r := &s.mu, &s.round
	if m.gone || m.missing {
		return refused, fmt.Errorf("append to segment %v: %w", s.id, atoll.ErrNotExist)
	}
	if m.err != nil {
		return refused, m.err
	}
	if !r.active {
		r.active, r.tail, r.base = true, m.tail, m.tail.next
		r.prewritten = m.st.flags&(prewritten|punched) == prewritten
		r.size = m.st.size
		if m.st.flags&punched != 0 {
			s.filled = 0
		}
		r.vec, r.crcs, r.starts = r.vec[:0], r.crcs[:0], r.starts[:0]
		n.dirty = append(n.dirty, s)
	}
	l := limits{fence: m.st.epoch, size: m.st.size, sealed: m.sealing || m.st.flags&sealed != 0}
	v, err := r.tail.judge(l, s.id, it.a.Epoch, it.h)
	switch v {
	case accepted:
		r.tail.advance(it.h)
		r.vec = append(r.vec, it.vec.Slices()...)
		r.starts = append(r.starts, it.h.Offset())
		r.crcs = append(r.crcs, it.crc)
		for i := range it.h.Blocks() {
			r.crcs = append(r.crcs, it.h.BlockCRC(i))
		}
	case repeated:
		if !s.has(it.h.Offset(), it.crc) {
			return refused, fmt.Errorf("append to segment %v at block %d: another batch is there: %w", s.id, it.h.Offset(), atoll.ErrConflict)
		}
	}
	return v, err
}

// has reports whether the batch at block b, durable or of this round, has the
// header checksum crc. The caller holds s.mu and has the committer's turn.
func (s *seg) has(b atoll.BlockNo, crc uint32) bool {
	idx, r := &s.mu.idx, &s.round
	if b >= r.base {
		_, ok := slices.BinarySearch(r.starts, b)
		return ok && r.crcs[b-r.base] == crc
	}
	_, ok := slices.BinarySearch(idx.batches, b)
	return ok && idx.crcs[b] == crc
}

// prepare opens the files of the round's segments. It returns the bytes to be
// written, how many segments there are, and how many of them a shared flush
// would serve.
func (n *Node) prepare() (bytes, writes, shared int) {
	for _, s := range n.dirty {
		r := &s.round
		r.shared, r.ahead = false, 0
		if len(r.vec) == 0 {
			continue
		}
		bytes += len(r.crcs) * atoll.BlockSize
		writes++
		if r.handle == nil {
			if r.handle, r.err = n.handles.acquire(s.id); r.err != nil {
				r.handle = nil
				continue
			}
		}
		if !n.sharedFlush || !r.handle.file.Direct() {
			continue
		}
		if r.shared = s.flushShared(); r.shared {
			shared++
		} else if len(r.crcs) <= aheadBelow {
			r.ahead = min(aheadBlocks, r.size-s.end())
		}
	}
	return bytes, writes, shared
}

// A file that grows with every small batch costs a journal entry for each. So
// small batches have zeros written behind them, which the same flush makes part
// of the file; the next batches then go into blocks that the file has.
const (
	aheadBlocks = 256 // how much is written ahead
	aheadBelow  = 16  // blocks of the largest batch that has it done
)

// end returns the block behind the round's last.
func (s *seg) end() atoll.BlockNo { return s.round.base + atoll.BlockNo(len(s.round.crcs)) }

// write writes the round's runs, durably but for those that a flush will make
// so together.
func (n *Node) write(together bool) {
	for _, s := range n.dirty {
		r := &s.round
		if len(r.vec) == 0 || r.err != nil {
			continue
		}
		if r.ahead > 0 && !s.writeAhead() {
			r.ahead = 0
		}
		r.err = r.handle.file.WriteVec(r.vec, r.base.Bytes(), !(together && r.shared))
		if r.err == nil && r.ahead > 0 {
			s.filled = s.end() + r.ahead
		}
	}
}

// writeAhead writes zeros behind the round's end. Failing does no harm.
func (s *seg) writeAhead() bool {
	r := &s.round
	buf := host.Alloc(int(r.ahead.Bytes()))
	defer buf.Release()
	clear(buf.Bytes())
	_, err := r.handle.file.WriteAt(buf.Bytes(), s.end().Bytes())
	return err == nil
}

// flushShared reports whether a flush of the disk, by a sync of any file, makes
// this segment's writes durable: they bypass the page cache and change nothing
// but the contents of blocks that the file has.
func (s *seg) flushShared() bool {
	return s.round.handle.file.Direct() && (s.round.prewritten || s.end() <= s.filled)
}

// publish makes a round's outcome the segment's state.
func (n *Node) publish(s *seg) {
	r := &s.round
	if len(r.vec) == 0 {
		return
	}
	size := int64(len(r.crcs)) * atoll.BlockSize
	err := r.err
	if err != nil {
		n.log.Error("segment write failed", "seg", s.id, "err", err)
		err = n.writeFailed(s, err)
	}
	r.err = err
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(r.vec)
	if err != nil {
		return
	}
	s.mu.tail = r.tail
	s.mu.idx.crcs = append(s.mu.idx.crcs, r.crcs...)
	s.mu.idx.batches = append(s.mu.idx.batches, r.starts...)
	n.roundBytes += size
	n.appended.Add(size)
}

// writeFailed classifies an error of a write or sync of s. All but lack of room
// end the segment's life as far as writes go (S6).
func (n *Node) writeFailed(s *seg, err error) error {
	if errors.Is(err, atoll.ErrNoSpace) {
		n.full.Store(true)
		return fmt.Errorf("append to segment %v: %w", s.id, err)
	}
	err = fmt.Errorf("append to segment %v: %w (%w)", s.id, atoll.ErrIO, err)
	s.mu.Lock()
	s.mu.err = err
	s.mu.Unlock()
	n.diskError()
	return err
}

// finish answers the appends of a round, in one pass.
func (n *Node) finish(items []item, start, now time.Time, why error) {
	took := now.Sub(start)
	if why == nil {
		n.metrics.committed(took, n.roundBytes)
		n.roundBytes = 0
	}
	for i := range items {
		it := &items[i]
		if it.barrier != nil {
			close(it.barrier)
			continue
		}
		err := it.err
		switch {
		case why != nil:
			err = fmt.Errorf("append to segment %v: %w", it.a.Seg, why)
		case err == nil && it.seg.round.err != nil && (it.verdict == accepted || it.h.Offset() >= it.seg.round.base):
			err = it.seg.round.err
		}
		it.vec.Release()
		it.a.Queued, it.a.Commit = start.Sub(it.at), took
		if err == nil {
			n.recent.add(it.a.Queued + took)
			n.metrics.appended(it.a.Queued, took)
		}
		n.answer(it.a, err)
	}
}
