package medium

import (
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Stats is what a medium says of itself.
type Stats struct {
	Epoch       atoll.Epoch
	Segments    int   // with data: sealed and open
	Dropped     int   // dropped and not yet removed from all nodes
	Virtual     int   // compacted: only names for blocks that are elsewhere
	Versions    int   // with hidden ones
	Live        int64 // bytes that the kind references
	Taken       int64 // bytes that its segments take on disks, one copy
	Waiting     int64 // of Taken, by sealed segments that only a newer mark lets compact or drop
	Stored      int64 // bytes in sealed segments, one copy, with those to be removed
	Dead        int64 // of Stored, bytes that nothing references, with headers of batches
	Reclaimable int64 // of Dead, bytes in segments that Victims could return, or that are to be removed
	Moved       int64 // bytes that compaction copied since Open
	Written     int64 // bytes of segments sealed since Open, one copy: everything that was written, with headers
	Log         int64 // bytes appended to the hot lane since the mark
	Unverified  int   // copies not known to be whole
	Listed      int   // segments in the head, waiting for a manifest
}

// Stats counts. Its cost is proportional to the number of segments.
func (m *Medium) Stats() Stats {
	h := m.own.head()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Stats{
		Epoch: m.epoch, Log: (m.appended.Load() - m.mu.man.Mark.count) * atoll.BlockSize, Listed: len(h.Sealed) + len(h.Dropped),
		Versions: len(m.mu.man.Versions), Moved: m.copied.Load(), Written: m.filled.Load(),
	}
	usual := m.usual()
	total := m.table.spread()
	m.table.each(func(o atoll.Ordinal, sl *slot) { m.addStats(&s, o, sl, usual, total) })
	return s
}

func (m *Medium) addStats(s *Stats, o atoll.Ordinal, sl *slot, usual atoll.BlockNo, total map[atoll.Ordinal]int32) {
	st, lane, _ := sl.get()
	if r := m.table.rare[o]; st != stateGone && (st != stateVirtual || r == nil || !r.removed) {
		s.Taken += sl.taken(usual).Bytes()
	}
	switch st {
	case stateOpen:
		s.Segments++
		s.Live += int64(sl.live.Load()) * atoll.BlockSize
	case stateLive:
		s.Segments++
		s.Live += int64(sl.live.Load()) * atoll.BlockSize
		s.Stored += sl.length.Bytes()
		dead := (sl.length - min(sl.length, m.table.likely(o, sl, total))).Bytes()
		s.Dead += dead
		if m.before(&m.mu.man.Mark, lane, o) {
			s.Reclaimable += dead
		} else {
			s.Waiting += max(sl.taken(usual), usual/waitingShare).Bytes()
		}
	case stateVirtual:
		s.Virtual++
		s.Live += int64(sl.live.Load()) * atoll.BlockSize
		if r := m.table.rare[o]; r == nil || !r.removed {
			s.Stored, s.Dead, s.Reclaimable = s.Stored+sl.length.Bytes(), s.Dead+sl.length.Bytes(), s.Reclaimable+sl.taken(usual).Bytes()
		}
	case stateDropped:
		s.Dropped++
		s.Stored, s.Dead, s.Reclaimable = s.Stored+sl.length.Bytes(), s.Dead+sl.length.Bytes(), s.Reclaimable+sl.taken(usual).Bytes()
	}
	if r := m.table.rare[o]; r != nil && (st == stateLive || st == stateOpen) {
		s.Unverified += len(r.unverified)
	}
}

// observe brings the shared gauges up to date; whoever writes manifests calls
// it, and Close at last.
func (m *Medium) observe() {
	if m.metrics == nil {
		return
	}
	var now shown
	if !m.closed.Load() {
		s := m.Stats()
		now = shown{s.Live, s.Dead, int64(s.Versions)}
	}
	m.mu.Lock()
	old := m.mu.shown
	m.mu.shown = now
	m.mu.Unlock()
	m.metrics.show(old, now)
}

// reclaimEvery is how old the answers of Reclaimable and Waiting may be.
const reclaimEvery = 100 * time.Millisecond

// Reclaimable returns how many bytes, one copy, compaction and the end of grace
// times may still give back. It is cheap: what it says may be a little old.
func (m *Medium) Reclaimable() int64 {
	m.weigh()
	return m.reclaimable.Load()
}

// waitingShare is the part of the usual size that a segment counts at least in
// Waiting.
const waitingShare = 16

// Waiting returns how many bytes, one copy, sealed segments take on disks that
// can be compacted or dropped only when a checkpoint has moved the mark. A
// medium that is written little at a time, with pauses, makes a segment each
// time; a short one counts as 1/16 of a full one, so that they do not pile up.
// It is cheap: what it says may be a little old.
func (m *Medium) Waiting() int64 {
	m.weigh()
	return m.waiting.Load()
}

// weigh counts again if the last time is long ago.
func (m *Medium) weigh() {
	now := int64(time.Since(m.born))
	if at := m.weighed.Load(); at == 0 || now-at > int64(reclaimEvery) {
		s := m.Stats()
		m.reclaimable.Store(s.Reclaimable)
		m.waiting.Store(s.Waiting)
		m.weighed.Store(max(now, 1))
	}
}
