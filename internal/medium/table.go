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
	// moved tells, for a segment that blocks were moved into, which compacted
	// segments they are of, and how many.
	moved map[atoll.Ordinal]map[atoll.Ordinal]int32
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
	size   atoll.BlockNo // as made; 0 not known
	saved  int32         // live count of the last manifest
	own    int32         // records of the manifest in force that lie here
	remap  atomic.Pointer[remap]
}

// rare is what few segments have.
type rare struct {
	remap      Ref
	unverified []atoll.NodeID
	removed    bool // compacted, and no node holds it any more
}

// plain reports whether nothing rare is known.
func (r *rare) plain() bool {
	return r.remap.IsZero() && len(r.unverified) == 0 && !r.removed
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
	t := &table{rare: map[atoll.Ordinal]*rare{}, moved: map[atoll.Ordinal]map[atoll.Ordinal]int32{}}
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
	if e.Size != 0 {
		s.size = e.Size
	}
	r := &rare{e.Remap, slices.Clone(e.Unverified), e.Removed}
	if r.plain() {
		delete(t.rare, o)
	} else {
		t.rare[o] = r
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
	e := entry{State: st, Lane: lane, Copyset: copyset, Length: s.length, Size: s.size, Live: live}
	if r := t.rare[c.firstOrd+atoll.Ordinal(i)]; r != nil {
		e.Remap, e.Unverified, e.Removed = r.remap, r.unverified, r.removed
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

// allGone reports whether every segment of a full chunk is gone, those below
// base never were.
func (c *chunk) allGone(base atoll.Ordinal) bool {
	for i := range c.slots {
		if c.firstOrd+atoll.Ordinal(i) < base {
			continue
		}
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

// ownVersions counts the records of a manifest's versions.
func (t *table) ownVersions(man *manifest, delta int32) {
	for _, g := range man.Pages {
		t.own(g.Ref, delta)
	}
	for i := range man.Versions {
		t.own(man.Versions[i].Root, delta)
	}
}

// removed reports whether no node holds a compacted segment any more.
func (t *table) removed(o atoll.Ordinal) bool { return t.rare[o] != nil && t.rare[o].removed }

// setRemap gives a segment its remap, which lies at ref; nil takes it away.
func (t *table) setRemap(o atoll.Ordinal, ref Ref, r *remap) {
	s, x := t.at(o), t.rare[o]
	if x == nil {
		x = &rare{}
	}
	if old := s.remap.Load(); old != nil {
		for p := range old.into() {
			delete(t.moved[p], o)
			if len(t.moved[p]) == 0 {
				delete(t.moved, p)
			}
		}
		t.own(x.remap, -1)
	}
	if r != nil {
		for p, n := range r.into() {
			if t.moved[p] == nil {
				t.moved[p] = map[atoll.Ordinal]int32{}
			}
			t.moved[p][o] = n
		}
		t.own(ref, +1)
	}
	s.remap.Store(r)
	x.remap = ref
	if r == nil {
		x.removed = false
	}
	if x.plain() {
		delete(t.rare, o)
	} else {
		t.rare[o] = x
	}
}

// taken returns about what a segment takes on disks. usual is the size of those
// of which it is not known.
func (s *slot) taken(usual atoll.BlockNo) atoll.BlockNo {
	if s.size != 0 {
		usual = s.size
	}
	return room(s.length, usual)
}

// room returns what a segment takes on disks that was made with a size and
// sealed at length; 0 while it is open. Nodes take back the rest of one that was
// sealed short.
func room(length, size atoll.BlockNo) atoll.BlockNo {
	if length == 0 || length >= size-size/4 {
		return max(length, size)
	}
	return length
}

// spread returns how many blocks of each compacted segment were moved, wherever
// they are.
func (t *table) spread() map[atoll.Ordinal]int32 {
	total := map[atoll.Ordinal]int32{}
	for _, from := range t.moved {
		for q, n := range from {
			total[q] += n
		}
	}
	return total
}

// likely returns how many blocks of a segment's bytes are in use, if of those
// that were moved as large a part died here as elsewhere.
func (t *table) likely(o atoll.Ordinal, s *slot, total map[atoll.Ordinal]int32) (n atoll.BlockNo) {
	if st, _, _ := s.get(); st != stateVirtual {
		n = atoll.BlockNo(max(s.live.Load(), s.saved))
	}
	for from, moved := range t.moved[o] {
		live := int64(max(t.at(from).live.Load(), t.at(from).saved))
		n += atoll.BlockNo(min(int64(moved), (live*int64(moved)+int64(total[from])-1)/int64(max(total[from], 1))))
	}
	return n
}
