package medium

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// lane is one of a medium's two streams of appends. Its writer is opened at the
// first append and stays until Close; the writer itself seals a segment that is
// idle, so that an idle medium holds no open segment.
type lane struct {
	id      catalog.Lane
	w       atomic.Pointer[stream.Writer]
	sem     chan struct{} // room for one: whoever opens, closes or scans
	seq     uint64        // next sequence number while there is no writer
	scanned bool          // seq is known (hot lane)
	rolled  atomic.Int64  // count of blocks when a segment was sealed; -1 when noted
	given   atoll.Ordinal // last segment registered; belongs to the writer
}

func (l *lane) init(id catalog.Lane, epoch atoll.Epoch) {
	l.id, l.sem = id, make(chan struct{}, 1)
	l.rolled.Store(-1)
	if id == catalog.Bulk {
		// Nobody replays the bulk lane; its numbers only have to be new.
		l.seq, l.scanned = uint64(epoch)<<32|1, true
	}
}

// openLane returns the lane's writer and opens it if need be.
func (m *Medium) openLane(ctx context.Context, id catalog.Lane) (*stream.Writer, error) {
	l := &m.lanes[id]
	if err := acquire(ctx, l.sem); err != nil {
		return nil, fmt.Errorf("open %v lane of medium %v: %w", id, m.id, err)
	}
	defer func() { <-l.sem }()
	if w := l.w.Load(); w != nil {
		return w, nil
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	if !l.scanned {
		if err := m.scan(ctx, nil); err != nil {
			return nil, err
		}
	}
	reserve := func() bool { return id == catalog.Bulk || m.reserve.Load() > 0 }
	w, err := stream.OpenWriter(stream.WriterOptions{
		Reserve: reserve,
		Nodes:   m.opts.Nodes, Registry: registry{m}, Medium: m.id, Epoch: m.epoch, Lane: id, Seq: l.seq,
		Policy: m.policy(), Valid: m.Valid, Idle: m.opts.Idle, Log: m.log, Metrics: m.opts.Streams,
	})
	if err != nil {
		return nil, err
	}
	l.w.Store(w)
	return w, nil
}

// smallVolume is how much larger a disk is than the smallest volume that uses
// segments of the size that suits the disk: those of a volume are a quarter of
// it at most.
const smallVolume = 48

// policy returns the medium's policy with the size of its segments: what the
// record says, or else what suits the smallest disk (atoll.SegmentFor), and less
// for a small volume. Each lane takes a segment on every node as soon as one
// block is written.
func (m *Medium) policy() catalog.Policy {
	info := m.Info()
	p := info.Policy
	if p.Segment > 0 {
		return p
	}
	least := int64(math.MaxInt64)
	if info.Kind == catalog.KindVolume {
		least = info.Size * smallVolume
	}
	for _, n := range m.opts.Catalog.State().Nodes {
		if n.State == catalog.NodeActive && n.Up && n.Report.Total > 0 {
			least = min(least, n.Report.Total)
		}
	}
	p.Segment = int(atoll.SegmentFor(least))
	return p
}

// closeLane seals what is open.
func (m *Medium) closeLane(ctx context.Context, l *lane) error {
	if err := acquire(ctx, l.sem); err != nil {
		return err
	}
	defer func() { <-l.sem }()
	if w := l.w.Load(); w != nil {
		return w.Close(ctx)
	}
	return nil
}

// Roll seals the lane's open segment; the next append opens another.
func (m *Medium) Roll(ctx context.Context, id catalog.Lane) error {
	if err := m.check(); err != nil {
		return err
	}
	if w := m.lanes[id].w.Load(); w != nil {
		return m.note(w.Roll(ctx))
	}
	return nil
}

// Mark returns a position of the hot lane: everything acknowledged before the
// call lies before it, on stable storage. It appends a record of its own to find
// out, so it takes as long as an append; when that fails the mark is zero and
// Checkpoint refuses it. Without appends since the last checkpoint it is the
// mark of that.
//
// The kind then waits until every record below Seq has its effect on the state,
// and takes the root for Checkpoint from that state; it is simplest to let no
// append begin from before Mark until then. None of its bulk appends may be
// between Submit and Live or Hold meanwhile (M4).
func (m *Medium) Mark() Mark {
	mark, err := m.mark()
	if err != nil {
		m.log.Warn("mark not taken", "medium", m.id, "err", err)
		return Mark{}
	}
	return mark
}

func (m *Medium) mark() (Mark, error) {
	if err := m.check(); err != nil {
		return Mark{}, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), atoll.RequestTimeout)
	defer cancel()
	m.mu.Lock()
	mark := m.mu.man.Mark
	m.mu.Unlock()
	open, err := m.restingMark(ctx, &mark)
	count := m.appended.Load()
	if err != nil || !open || count == mark.count {
		mark.Bulk = max(mark.Bulk, lowest(m.own.head(), catalog.Bulk))
		return mark, err
	}
	var e stream.Entry
	e.Add(segment.Record{Kind: kindMark, Key: uint64(m.epoch)}, nil, nil)
	if err := m.appendEntry(ctx, catalog.Hot, &e); errors.Is(err, atoll.ErrNoSpace) {
		return m.tailMark(mark, count), nil
	} else if err != nil {
		return Mark{}, err
	}
	mark.count = count
	// The record has no payload, so its block is that of the batch's header.
	mark.Ordinal, mark.Block, mark.Seq = e.Seg().Ordinal, e.Block(0), e.Seq()
	mark.Bulk = max(mark.Bulk, lowest(m.own.head(), catalog.Bulk))
	return mark, nil
}

// tailMark is the mark when there is no room for a record of its own, since what
// frees space begins with a mark: behind everything that was acknowledged. What
// was submitted and has no outcome lies after it.
func (m *Medium) tailMark(mark Mark, count int64) Mark {
	if t, ok := m.lanes[catalog.Hot].w.Load().Tail(); ok {
		mark.Ordinal, mark.Block, mark.Seq, mark.count = t.Ordinal, t.Block, t.Seq, count
	}
	mark.Bulk = max(mark.Bulk, lowest(m.own.head(), catalog.Bulk))
	return mark
}

// restingMark reports whether the hot lane has a writer. If it has none, all of
// it is sealed, and if it was replayed the mark moves to its end.
func (m *Medium) restingMark(ctx context.Context, mark *Mark) (open bool, err error) {
	hot := &m.lanes[catalog.Hot]
	if err := acquire(ctx, hot.sem); err != nil {
		return false, err
	}
	defer func() { <-hot.sem }()
	if hot.w.Load() != nil {
		return true, nil
	}
	if hot.scanned {
		mark.Ordinal, mark.Block, mark.Seq = lowest(m.own.head(), catalog.Hot), 0, hot.seq
		mark.count = m.appended.Load()
	}
	return false, nil
}

// lowest returns the ordinal below which every segment of a lane is sealed.
func lowest(h catalog.Head, l catalog.Lane) atoll.Ordinal {
	o := h.Next
	for _, u := range h.Unsealed {
		if u.Lane == l {
			o = min(o, u.Seg.Ordinal)
		}
	}
	return o
}

// registry makes a lane's segments known in the head and the table. It
// implements stream.Registry.
type registry struct{ m *Medium }

var _ stream.Registry = registry{}

// Register gives the next segment of a lane its id (M1).
func (r registry) Register(ctx context.Context, l catalog.Lane, copyset atoll.CopysetID, size atoll.BlockNo) (atoll.SegmentID, error) {
	var seg atoll.SegmentID
	lane := &r.m.lanes[l]
	err := r.m.own.change(ctx, func(h catalog.Head) (_ catalog.Head, err error) {
		// A segment whose registration was written but never answered for.
		for _, u := range h.Unsealed {
			if u.Lane == l && u.Seg.Ordinal > lane.given {
				if h, err = headAbandon(h, u.Seg); err != nil {
					return h, err
				}
			}
		}
		h, seg, err = headRegister(h, l, copyset, size)
		return h, err
	})
	if err != nil {
		return atoll.SegmentID{}, r.m.note(err)
	}
	lane.given = seg.Ordinal
	r.m.taken.Add(size.Bytes())
	r.m.settle(seg, entry{State: stateOpen, Lane: l, Copyset: copyset, Size: size})
	return seg, nil
}

// Seal records a segment's length.
func (r registry) Seal(ctx context.Context, s catalog.Sealed) error {
	err := r.m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headSeal(h, s) })
	if err != nil && !r.m.settled(s.Seg, stateLive, s.Length) {
		return r.m.note(err)
	}
	r.m.shrunk(s)
	if s.Length == 0 {
		r.m.settle(s.Seg, entry{State: stateDropped, Lane: s.Lane, Copyset: s.Seg.Copyset})
	} else {
		r.m.settle(s.Seg, entry{State: stateLive, Lane: s.Lane, Copyset: s.Seg.Copyset, Length: s.Length, Unverified: s.Unverified})
	}
	if s.Lane == catalog.Hot {
		r.m.lanes[catalog.Hot].rolled.Store(r.m.appended.Load())
	}
	r.m.kick(r.m.keeps)
	return nil
}

// shrunk notes how long a segment became, and what it gives back if it was sealed
// short.
func (m *Medium) shrunk(s catalog.Sealed) {
	m.mu.Lock()
	defer m.mu.Unlock()
	slot := m.table.at(s.Seg.Ordinal)
	if slot == nil || s.Length == 0 {
		return
	}
	if st, _, _ := slot.get(); st != stateOpen {
		return
	}
	m.filled.Add(s.Length.Bytes())
	m.metrics.filled(s.Length.Bytes())
	if slot.size > s.Length {
		m.taken.Add(-(slot.size - room(s.Length, slot.size)).Bytes())
	}
}

// Abandon records that a segment was never used.
func (r registry) Abandon(ctx context.Context, seg atoll.SegmentID) error {
	err := r.m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headAbandon(h, seg) })
	if err != nil && !r.m.settled(seg, stateDropped, 0) {
		return r.m.note(err)
	}
	r.m.settle(seg, entry{State: stateDropped, Copyset: seg.Copyset})
	r.m.kick(r.m.keeps)
	return nil
}

// settled reports whether the table has a segment in this state already: a
// change whose answer was lost, and that a manifest has taken over since.
func (m *Medium) settled(seg atoll.SegmentID, want state, length atoll.BlockNo) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.table.at(seg.Ordinal)
	if s == nil {
		return false
	}
	st, _, _ := s.get()
	return st == want && s.length == length
}

// settle brings the table in line with a change of the head. A manifest may
// have done so already (draft).
func (m *Medium) settle(seg atoll.SegmentID, e entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.settleLocked(seg, e)
}

func (m *Medium) settleLocked(seg atoll.SegmentID, e entry) {
	if s := m.table.at(seg.Ordinal); s != nil {
		if st, _, _ := s.get(); st != stateNone && st != stateOpen {
			return
		}
	}
	m.table.set(seg.Ordinal, e)
}
