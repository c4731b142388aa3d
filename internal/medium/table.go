package medium

import (
	"slices"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// table is the segment table in memory: dense by ordinal, in chunks as on disk.
// Looking up and counting take no lock; everything else is guarded by the
// medium's mutex.
type table struct {
	chunks atomic.Pointer[[]*chunk] // index by (ordinal-1)/chunkEntries; nil = all gone
	rare   map[atoll.Ordinal]*rare
}

// chunk is a run of chunkEntries slots.
type chunk struct {
	slots    [chunkEntries]slot
	recount  atomic.Bool // Live was called since the counts were last frozen
	dirty    bool        // differs from what ref points at
	ref      Ref         // where the last manifest has it
	used     int         // slots in use
	firstOrd atoll.Ordinal
}

// slot is one segment.
type slot struct {
	info   atomic.Uint64 // copyset, lane and state
	live   atomic.Int32  // blocks the kind references, now
	hold   atomic.Int32  // reasons of the kind to keep it although not referenced
	length atoll.BlockNo
	saved  int32 // live count of the last manifest
	own    int32 // records of the manifest in force that lie here
	remap  atomic.Pointer[remap]
}

// rare is what few segments have.
type rare struct {
	remap      Ref
	unverified []atoll.NodeID
	generation uint64
}

func packInfo(s state, l catalog.Lane, c atoll.CopysetID) uint64 {
	return uint64(c)<<32 | uint64(l)<<8 | uint64(s)
}

func (s *slot) get() (st state, lane catalog.Lane, copyset atoll.CopysetID) {
	v := s.info.Load()
	return state(v), catalog.Lane(v >> 8), atoll.CopysetID(v >> 32)
}

func (s *slot) setState(st state) {
	_, lane, copyset := s.get()
	s.info.Store(packInfo(st, lane, copyset))
}

func newTable() *table {
	t := &table{rare: map[atoll.Ordinal]*rare{}}
	t.chunks.Store(&[]*chunk{})
	return t
}

// at returns the slot of an ordinal, or nil. It takes no lock.
func (t *table) at(o atoll.Ordinal) *slot {
	c := t.chunkOf(o)
	if c == nil {
		return nil
	}
	return &c.slots[(o-1)%chunkEntries]
}

func (t *table) chunkOf(o atoll.Ordinal) *chunk {
	list := *t.chunks.Load()
	i := int((o - 1) / chunkEntries)
	if o == 0 || i >= len(list) {
		return nil
	}
	return list[i]
}

// gone reports whether a chunk was left out because every segment of it is.
func (t *table) gone(o atoll.Ordinal) bool {
	list := *t.chunks.Load()
	i := int((o - 1) / chunkEntries)
	return o != 0 && i < len(list) && list[i] == nil
}

// install puts a chunk at its place, or nil for one whose segments are gone.
func (t *table) install(i int, c *chunk) {
	list := slices.Clone(*t.chunks.Load())
	for len(list) <= i {
		list = append(list, &chunk{firstOrd: atoll.Ordinal(len(list)*chunkEntries + 1)})
	}
	list[i] = c
	t.chunks.Store(&list)
}

// set puts a segment into the table.
func (t *table) set(o atoll.Ordinal, e entry) {
	i := int((o - 1) / chunkEntries)
	if i >= len(*t.chunks.Load()) {
		t.install(i, &chunk{firstOrd: atoll.Ordinal(i*chunkEntries + 1)})
	}
	c := t.chunkOf(o)
	if c == nil {
		return
	}
	s := &c.slots[(o-1)%chunkEntries]
	s.length = e.Length
	if len(e.Unverified) > 0 || !e.Remap.IsZero() || e.Generation != 0 {
		t.rare[o] = &rare{e.Remap, slices.Clone(e.Unverified), e.Generation}
	} else {
		delete(t.rare, o)
	}
	s.info.Store(packInfo(e.State, e.Lane, e.Copyset))
	c.used = max(c.used, int((o-1)%chunkEntries)+1)
	c.dirty = true
}

// count adds to a segment's live blocks. It takes no lock.
func (t *table) count(o atoll.Ordinal, delta int) {
	c := t.chunkOf(o)
	atoll.Assert(c != nil, "live count of unknown segment %d", o)
	n := c.slots[(o-1)%chunkEntries].live.Add(int32(delta))
	atoll.Assert(n >= 0, "live count of segment %d is %d", o, n)
	c.recount.Store(true)
}

// entryAt returns what a manifest is to say of slot i with count live.
func (t *table) entryAt(c *chunk, i int, live int32) entry {
	s := &c.slots[i]
	st, lane, copyset := s.get()
	e := entry{State: st, Lane: lane, Copyset: copyset, Length: s.length, Live: live}
	if r := t.rare[c.firstOrd+atoll.Ordinal(i)]; r != nil {
		e.Remap, e.Generation, e.Unverified = r.remap, r.generation, r.unverified
	}
	return e
}

// freeze returns the live counts of a chunk now.
func (c *chunk) freeze() []int32 {
	counts := make([]int32, c.used)
	for i := range counts {
		counts[i] = c.slots[i].live.Load()
	}
	return counts
}

// counts returns the live counts that the last manifest has of a chunk.
func (c *chunk) counts() []int32 {
	counts := make([]int32, c.used)
	for i := range counts {
		counts[i] = c.slots[i].saved
	}
	return counts
}

// load fills the table with a decoded chunk.
func (t *table) load(i int, ref Ref, entries []entry) {
	c := &chunk{firstOrd: atoll.Ordinal(i*chunkEntries + 1), ref: ref}
	t.install(i, c)
	for j, e := range entries {
		if e.State == stateNone {
			continue
		}
		t.set(c.firstOrd+atoll.Ordinal(j), e)
		c.slots[j].live.Store(e.Live)
		c.slots[j].saved = e.Live
	}
	c.dirty = false
}

// allGone reports whether every segment of a full chunk is gone.
func (c *chunk) allGone() bool {
	for i := range c.slots {
		if st, _, _ := c.slots[i].get(); st != stateGone || c.slots[i].own != 0 {
			return false
		}
	}
	return true
}

// each calls fn for every known segment in order.
func (t *table) each(fn func(o atoll.Ordinal, s *slot)) {
	for _, c := range *t.chunks.Load() {
		if c == nil {
			continue
		}
		for i := range c.used {
			if st, _, _ := c.slots[i].get(); st != stateNone {
				fn(c.firstOrd+atoll.Ordinal(i), &c.slots[i])
			}
		}
	}
}

// own counts the manifest's own records in a segment.
func (t *table) own(r Ref, delta int32) {
	if s := t.at(r.Ordinal); s != nil && !r.IsZero() {
		s.own += delta
	}
}
