package medium

import (
	"context"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
)

// Record is a record of the hot lane as Replay finds it.
type Record struct {
	segment.Record
	Seq   uint64        // sequence number
	Seg   atoll.Ordinal // segment it is in
	Block atoll.BlockNo // first payload block; the batch's header if it has none
	Batch atoll.BlockNo // header of the batch it is in
	CRCs  []uint32      // CRC32C of each payload block; valid during the call only
}

// MarkAt returns the mark at a record that Replay gave, as AppendMark returned it
// when the record was written: a replay from there gives that record first. None
// of the kind's bulk appends may be between Submit and Live or Hold meanwhile.
func (m *Medium) MarkAt(r Record) Mark {
	m.mu.Lock()
	bulk := m.mu.man.Mark.Bulk
	m.mu.Unlock()
	return Mark{Ordinal: r.Seg, Block: r.Batch, Seq: r.Seq, Bulk: max(bulk, lowest(m.own.head(), catalog.Bulk))}
}

// Replay calls fn for every record of the hot lane with a kind of FirstKind or
// above that was written since the mark of the last checkpoint, in the order of
// the log. It reads batch headers only. An error of fn ends it and is returned.
// A part of the log that is missing or damaged on all copies is ErrCorrupt.
// Call it after Open and before the first append.
func (m *Medium) Replay(ctx context.Context, fn func(Record) error) error {
	if err := m.check(); err != nil {
		return err
	}
	if err := acquire(ctx, m.lanes[catalog.Hot].sem); err != nil {
		return fmt.Errorf("replay medium %v: %w", m.id, err)
	}
	defer func() { <-m.lanes[catalog.Hot].sem }()
	return m.scan(ctx, fn)
}

// scan is Replay, and learns the next sequence number of the hot lane. The hot
// lane's semaphore is held.
func (m *Medium) scan(ctx context.Context, fn func(Record) error) error {
	mark, segs, err := m.hotSince()
	if err != nil {
		return err
	}
	r := replayer{m: m, fn: fn, last: mark.Seq - 1}
	blocks := int64(0)
	for _, s := range segs {
		from := atoll.BlockNo(0)
		if s.Seg.Ordinal == mark.Ordinal {
			from = mark.Block
		}
		if err := r.segment(ctx, s, from); err != nil {
			return err
		}
		blocks += int64(s.Length - min(from, s.Length))
	}
	hot := &m.lanes[catalog.Hot]
	if !hot.scanned {
		m.appended.Add(blocks)
		hot.seq, hot.scanned = max(hot.seq, r.last+1), true
	}
	return nil
}

// hotSince lists the sealed hot segments from the mark on and checks that the
// fate of every ordinal since is known.
func (m *Medium) hotSince() (Mark, []catalog.Sealed, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	mark := m.mu.man.Mark
	h := m.own.head()
	var segs []catalog.Sealed
	for o := max(mark.Ordinal, 1); o < h.Next; o++ {
		s := m.table.at(o)
		if s == nil && m.table.gone(o) {
			continue
		}
		st := stateNone
		if s != nil {
			st, _, _ = s.get()
		}
		known := st != stateNone && (st != stateOpen || slices.ContainsFunc(h.Unsealed, func(u catalog.Unsealed) bool { return u.Seg.Ordinal == o }))
		switch {
		case !known:
			return mark, nil, fmt.Errorf("replay medium %v: nothing tells what became of segment %d: %w", m.id, o, atoll.ErrCorrupt)
		case st == stateLive:
			if _, lane, cs := s.get(); lane == catalog.Hot {
				segs = append(segs, catalog.Sealed{Seg: atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: cs}, Length: s.length})
			}
		}
	}
	return mark, segs, nil
}

// replayer walks batches; last is the highest sequence number seen.
type replayer struct {
	m    *Medium
	fn   func(Record) error
	last uint64
	crcs []uint32
}

// segment replays the batches of one sealed segment from a block on.
func (r *replayer) segment(ctx context.Context, s catalog.Sealed, from atoll.BlockNo) error {
	at := from
	if at >= s.Length {
		return nil
	}
	err := r.m.opts.Nodes.Headers(ctx, s.Seg, from, s.Length, func(h segment.Header) error {
		if h.Segment() != s.Seg || h.Offset() != at || h.Next() > s.Length {
			return fmt.Errorf("batch of segment %v at %d where %v at %d was expected: %w", h.Segment(), h.Offset(), s.Seg, at, atoll.ErrCorrupt)
		}
		at = h.Next()
		return r.batch(h)
	})
	if err == nil && at != s.Length {
		err = fmt.Errorf("batches end at block %d of %d: %w", at, s.Length, atoll.ErrCorrupt)
	}
	if err != nil {
		return fmt.Errorf("replay segment %v: %w", s.Seg, err)
	}
	return nil
}

// batch gives the records of one batch to the kind.
func (r *replayer) batch(h segment.Header) error {
	block, n := h.Offset()+1, 0
	for i := range h.Records() {
		rec := Record{Record: h.Record(i), Seq: h.Seq() + uint64(i), Seg: h.Segment().Ordinal, Block: block, Batch: h.Offset()}
		first := n
		block, n = block+atoll.BlockNo(rec.Blocks), n+int(rec.Blocks)
		if rec.Seq <= r.last { // sent again after a failure: the first counts
			continue
		}
		r.last = rec.Seq
		if rec.Kind < FirstKind || r.fn == nil {
			continue
		}
		if rec.Blocks == 0 {
			rec.Block = h.Offset()
		}
		r.crcs = r.crcs[:0]
		for j := first; j < n; j++ {
			r.crcs = append(r.crcs, h.BlockCRC(j))
		}
		rec.CRCs = r.crcs
		if err := r.fn(rec); err != nil {
			return err
		}
	}
	return nil
}
