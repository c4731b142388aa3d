package medium

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// guard ends the writers as soon as ownership is lost, so that nobody waits for
// appends that cannot be acknowledged any more (M7).
func (m *Medium) guard(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-m.lost:
	case <-m.opts.Session.Lost():
		m.lose(atoll.ErrFenced)
	}
	now, cancel := context.WithCancel(ctx)
	cancel()
	for i := range m.lanes {
		_ = m.closeLane(now, &m.lanes[i]) // it fails: the tail is for recovery
	}
}

// keep writes a manifest when the head has collected enough, and a note after
// each roll.
func (m *Medium) keep(ctx context.Context) {
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for pause := time.Second; ; {
		select {
		case <-ctx.Done():
			return
		case <-m.lost:
			return
		case <-m.keeps:
		case <-again.C:
		}
		err := m.keepOnce(ctx)
		switch {
		case err != nil && ctx.Err() == nil:
			m.log.Warn("manifest not written; will be tried again", "medium", m.id, "err", err)
			again.Reset(pause)
			pause = min(2*pause, 30*time.Second)
		case m.lanes[catalog.Hot].rolled.Load() >= 0:
			again.Reset(time.Second)
		default:
			pause = time.Second
		}
	}
}

func (m *Medium) keepOnce(ctx context.Context) error {
	if err := m.writeNote(ctx); err != nil {
		return err
	}
	if h := m.own.head(); len(h.Sealed)+len(h.Dropped) < manifestAfter {
		return nil
	}
	return m.writeManifest(ctx, nil)
}

// writeNote repeats the head in the log after a roll of the hot lane, once the
// kind has gone on in the next segment: an idle medium opens no segment for it.
func (m *Medium) writeNote(ctx context.Context) error {
	rolled := &m.lanes[catalog.Hot].rolled
	if n := rolled.Load(); n < 0 || n == m.appended.Load() || !rolled.CompareAndSwap(n, -1) {
		return nil
	}
	h := m.own.head()
	_, err := m.appendOwn(ctx, catalog.Hot, kindNote, uint64(h.Epoch), encodeNote(&h))
	return m.note(err)
}

// sweep removes dropped segments from nodes when their grace time has passed,
// completes unverified copies and looks for leftovers.
func (m *Medium) sweep(ctx context.Context) {
	full := time.NewTimer(min(m.opts.Sweep, 2*time.Second))
	defer full.Stop()
	doom := time.NewTimer(m.opts.Grace)
	defer doom.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.lost:
			return
		case <-m.sweeps:
			doom.Reset(m.untilDoom())
		case <-doom.C:
			m.removeDoomed(ctx)
			doom.Reset(m.untilDoom())
		case <-full.C:
			m.completeCopies(ctx)
			m.removeLeftovers(ctx)
			full.Reset(m.opts.Sweep)
		}
	}
}

// grace returns how long what was dropped or compacted now stays on nodes: less
// while space is short, since what compaction frees is what it goes on with.
func (m *Medium) grace() time.Duration {
	if m.Pressure() >= tight {
		return m.opts.Grace / 40
	}
	return m.opts.Grace
}

// tight is the pressure from which on room is worth more than readers' time.
const tight = 0.85

// untilDoom returns the time until the next segment is to be removed.
func (m *Medium) untilDoom() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	wait := time.Hour
	for _, d := range m.mu.doomed {
		wait = min(wait, time.Until(d.due))
	}
	return max(wait, 0) + time.Millisecond
}

const (
	doomRetry    = 10 * time.Second // after a node did not answer
	doomsAtATime = 4
)

// removeDoomed deletes segments whose grace time has passed from their nodes,
// some at once: a node that does not answer holds each of them up.
func (m *Medium) removeDoomed(ctx context.Context) {
	m.mu.Lock()
	list, now := slices.Clone(m.mu.doomed), time.Now() // only this goroutine takes any out
	m.mu.Unlock()
	looked := len(list)
	var wg sync.WaitGroup
	places := make(chan struct{}, doomsAtATime)
	for i := range list {
		if now.Before(list[i].due) || ctx.Err() != nil || !m.Valid() {
			continue
		}
		places <- struct{}{}
		wg.Go(func() {
			if m.remove(ctx, list[i].ordinal) {
				list[i].ordinal = 0
			} else {
				list[i].due, list[i].failed = time.Now().Add(doomRetry), true
			}
			<-places
		})
	}
	wg.Wait()
	list = slices.DeleteFunc(list, func(d doomed) bool { return d.ordinal == 0 })
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.doomed = append(list, m.mu.doomed[looked:]...)
}

// remove deletes one dropped segment; true when every node has answered.
func (m *Medium) remove(ctx context.Context, o atoll.Ordinal) bool {
	s := m.table.at(o)
	if s == nil {
		return true
	}
	st, _, copyset := s.get()
	if st == stateGone {
		return true
	}
	atoll.Assert(st == stateDropped || st == stateVirtual, "removal of segment %d of medium %v in state %d", o, m.id, st)
	left, err := m.opts.Nodes.Delete(ctx, atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}, m.epoch)
	if err != nil || len(left) > 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.metrics.removed(s.length.Bytes())
	m.taken.Add(-s.taken(m.usual()).Bytes())
	m.table.chunkOf(o).dirty = true
	if st, _, _ := s.get(); st == stateDropped {
		s.setState(stateGone)
	} else if r := m.table.rare[o]; r != nil {
		r.removed = true // the remap stays
	}
	return true
}

// completeCopies brings unverified copies to the sealed length.
func (m *Medium) completeCopies(ctx context.Context) {
	for _, s := range m.unverified() {
		if ctx.Err() != nil || !m.Valid() {
			return
		}
		still, err := m.opts.Nodes.Complete(ctx, s, m.epoch)
		if slices.Equal(still, s.Unverified) {
			m.log.Debug("copies not completed", "medium", m.id, "seg", s.Seg, "err", err)
			continue
		}
		err = m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headVerified(h, s.Seg, still), nil })
		if m.note(err) != nil {
			return
		}
		m.setUnverified(s.Seg.Ordinal, still)
		m.log.Info("copies completed", "medium", m.id, "seg", s.Seg, "left", len(still))
	}
}

// unverified lists the segments that have copies not known to be whole.
func (m *Medium) unverified() []catalog.Sealed {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []catalog.Sealed
	for o, r := range m.table.rare {
		s := m.table.at(o)
		if s == nil || len(r.unverified) == 0 {
			continue
		}
		if st, lane, copyset := s.get(); st == stateLive {
			list = append(list, catalog.Sealed{
				Seg: atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}, Lane: lane,
				Length: s.length, Unverified: slices.Clone(r.unverified),
			})
		}
	}
	slices.SortFunc(list, func(a, b catalog.Sealed) int { return int(int64(a.Seg.Ordinal) - int64(b.Seg.Ordinal)) })
	return list
}

func (m *Medium) setUnverified(o atoll.Ordinal, still []atoll.NodeID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, r := m.table.chunkOf(o), m.table.rare[o]
	if c == nil || r == nil {
		return
	}
	r.unverified, c.dirty = still, true
	if r.plain() {
		delete(m.table.rare, o)
	}
}

// removeLeftovers compares what nodes hold with the table and deletes what a
// durable manifest says was dropped. An error while listing ends it, and what
// is not known is kept (M6).
func (m *Medium) removeLeftovers(ctx context.Context) {
	copies, err := m.opts.Nodes.List(ctx, m.id)
	if err != nil {
		if ctx.Err() == nil {
			m.log.Debug("leftovers not looked for", "medium", m.id, "err", err)
		}
		return
	}
	next := m.own.head().Next
	unknown := 0
	for _, c := range copies {
		if ctx.Err() != nil || !m.Valid() {
			return
		}
		switch m.fate(c.Seg, next) {
		case fateDropped:
			node, err := m.opts.Nodes.Node(c.Node)
			if err == nil {
				err = node.Delete(ctx, c.Seg, m.epoch)
			}
			m.log.Info("leftover removed", "medium", m.id, "seg", c.Seg, "node", c.Node, "err", err)
		case fateUnknown:
			unknown++
		}
	}
	if unknown > 0 {
		m.log.Warn("nodes hold segments that no record knows; they are kept", "medium", m.id, "count", unknown)
	}
}

type fate uint8

const (
	fateUsed fate = iota
	fateDropped
	fateUnknown
)

// fate tells what the durable records say of a segment found on a node.
func (m *Medium) fate(seg atoll.SegmentID, next atoll.Ordinal) fate {
	m.mu.Lock()
	defer m.mu.Unlock()
	if seg.Ordinal >= next {
		// Registered after the head was read, or of a later life.
		return fateUnknown
	}
	s := m.table.at(seg.Ordinal)
	if s == nil {
		if m.table.gone(seg.Ordinal) {
			return fateDropped
		}
		return fateUnknown
	}
	st, _, copyset := s.get()
	r := m.table.rare[seg.Ordinal]
	switch {
	case st == stateNone, copyset != seg.Copyset:
		return fateUnknown
	case st == stateGone, st == stateVirtual && r != nil && r.removed:
		return fateDropped
	case st == stateDropped:
		return fateUsed // removeDoomed sees to it when it is time
	}
	return fateUsed
}
