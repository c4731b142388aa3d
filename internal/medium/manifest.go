package medium

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// checkpoint is what is added to a manifest beside what the head collected; nil
// adds nothing.
type checkpoint struct {
	mark  Mark // zero: the checkpoint that stands stays
	root  []byte
	count bool // store the live counts as they are; a mark does that too
	roots []NewVersion
	edit  func(*State) error
	moved *compaction
}

// rooted reports whether ck has a new root of the kind.
func (ck *checkpoint) rooted() bool { return ck != nil && ck.mark.Seq != 0 }

// counts reports whether ck stores the live counts.
func (ck *checkpoint) counts() bool { return ck != nil && (ck.count || ck.rooted()) }

// made returns how many versions of users ck adds.
func (ck *checkpoint) made() (n int) {
	if ck != nil {
		for i := range ck.roots {
			if ck.roots[i].Flags&FlagInternal == 0 {
				n++
			}
		}
	}
	return n
}

// draft is a manifest on its way.
type draft struct {
	man     manifest
	head    catalog.Head // whose seals and drops it takes over
	dropped []atoll.Ordinal
	chunks  []draftChunk
	ck      *checkpoint
	leave   map[atoll.Ordinal]bool   // own records must leave these segments
	left    int                      // how many more records may be moved for that
	roots   map[uint64][]byte        // roots of versions to write; nil to copy
	relist  bool                     // pages of versions may have changed
	copy    bool                     // the kind's root must leave its segment
	remaps  map[atoll.Ordinal]*remap // to be written
	placed  map[atoll.Ordinal]Ref    // where they were
}

type draftChunk struct {
	index   int
	first   atoll.Ordinal
	counts  []int32 // live counts that become the saved ones
	entries []entry
	write   bool
	gone    bool // every segment of it is gone
	ref     Ref
}

// maxLeave bounds how many own records a manifest writes anew only to free the
// segments that they keep; those of a victim of compaction come on top.
const maxLeave = 64

// Checkpoint stores the kind's root, at most MaxRoot bytes, and moves the start
// of replay to mark. The root must hold the effect of every record before mark
// and may hold that of later ones, which are replayed again. The live counts
// stored are those given before the call (M4). Durable on return. After an
// error the checkpoint may or may not have been made. Concurrent calls wait for
// each other; appends and reads go on.
func (m *Medium) Checkpoint(ctx context.Context, mark Mark, root []byte) error {
	if err := m.check(); err != nil {
		return err
	}
	if mark.Seq == 0 {
		return fmt.Errorf("checkpoint medium %v: no mark: %w", m.id, atoll.ErrUnavailable)
	}
	if len(root) > MaxRoot {
		return fmt.Errorf("checkpoint medium %v: root of %d bytes: %w", m.id, len(root), atoll.ErrTooLarge)
	}
	return m.writeManifest(ctx, &checkpoint{mark: mark, root: slices.Clone(root)})
}

// writeManifest writes what changed since the last manifest, and the root that
// leads to all of it, and moves the head there.
func (m *Medium) writeManifest(ctx context.Context, ck *checkpoint) error {
	if err := acquire(ctx, m.manifests); err != nil {
		return fmt.Errorf("write manifest of medium %v: %w", m.id, err)
	}
	defer func() { <-m.manifests }()
	start, before := time.Now(), m.written.Load()
	d, err := m.draft(ck)
	if err == nil {
		lane := m.ownLane(d.blocks())
		err = m.store(ctx, lane, d)
		if errors.Is(err, atoll.ErrNoSpace) && lane == catalog.Hot { // the bulk lane has a reserve
			m.redirty()
			if d, err = m.draft(ck); err == nil {
				err = m.store(ctx, catalog.Bulk, d)
			}
		}
	}
	m.cost.Store(m.written.Load() - before)
	if err != nil {
		m.redirty()
		return fmt.Errorf("write manifest of medium %v: %w", m.id, m.note(err))
	}
	m.metrics.manifest(time.Since(start))
	m.metrics.made(ck.made())
	m.observe()
	m.kick(m.sweeps)
	return nil
}

// draft decides what the next manifest says. Pure memory work.
func (m *Medium) draft(ck *checkpoint) (*draft, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := &draft{
		man: *m.mu.man, head: m.own.head(), ck: ck, left: maxLeave, leave: map[atoll.Ordinal]bool{},
		roots: map[uint64][]byte{}, remaps: map[atoll.Ordinal]*remap{}, placed: map[atoll.Ordinal]Ref{},
	}
	m.mergeHead(d.head)
	if ck.rooted() {
		old := d.man.Mark
		if ck.mark.Ordinal < old.Ordinal || ck.mark.Seq < old.Seq || ck.mark.Ordinal == old.Ordinal && ck.mark.Block < old.Block {
			return nil, fmt.Errorf("mark %+v lies before %+v: %w", ck.mark, old, atoll.ErrInvalid)
		}
		d.man.Mark = ck.mark
		d.man.Root, d.man.RootRef, d.man.RootLen = ck.root, Ref{}, len(ck.root)
	}
	d.man.Medium, d.man.Epoch, d.man.Next = m.id, d.head.Epoch, d.head.Next
	d.man.Serial++
	d.man.LastNumber = max(d.man.LastNumber, m.mu.lastNumber)
	if ck != nil && ck.moved != nil {
		for _, o := range ck.moved.from {
			d.leave[o] = true
		}
	}
	if err := m.draftVersions(d); err != nil {
		return nil, err
	}
	d.copy = m.movable(d, d.man.RootRef)
	for i, c := range *m.table.chunks.Load() {
		if c != nil {
			m.draftChunk(d, i, c)
		}
	}
	return d, nil
}

// draftVersions changes the list of versions and decides which of its records
// must leave their segments.
func (m *Medium) draftVersions(d *draft) error {
	if d.ck != nil && d.ck.edit != nil {
		s := d.man.state()
		s = s.clone()
		s.Ancestors = m.Info().Ancestors
		if err := d.ck.edit(&s); err != nil {
			return err
		}
		if err := s.check(); err != nil {
			return err
		}
		d.man.Versions, d.man.CurParent, d.man.Release = s.Versions, s.CurParent, s.Release
		d.man.LastNumber = max(d.man.LastNumber, s.LastNumber)
		d.relist = true
	} else {
		d.man.Versions = slices.Clone(d.man.Versions)
	}
	if d.ck != nil {
		for _, v := range d.ck.roots {
			d.roots[v.Number] = v.RootBytes
		}
	}
	for i := range d.man.Versions {
		if v := &d.man.Versions[i]; m.movable(d, v.Root) {
			d.roots[v.Number] = nil
		}
	}
	d.relist = d.relist || len(d.man.Pages) == 0 && len(d.man.Versions) > 0
	for _, g := range d.man.Pages {
		if m.movable(d, g.Ref) {
			d.relist = true
		}
	}
	return nil
}

// version returns a version of the draft, nil if there is none.
func (d *draft) version(number uint64) *Version {
	s := d.man.state()
	return s.Find(number)
}

// draftChunk decides which segments of a chunk are dropped and whether it is to
// be written.
func (m *Medium) draftChunk(d *draft, i int, c *chunk) {
	dc := draftChunk{index: i, first: c.firstOrd, ref: c.ref, write: c.dirty}
	base := m.base()
	if d.ck.counts() && c.recount.Swap(false) {
		dc.counts = c.freeze()
		dc.write = dc.write || !slices.Equal(dc.counts, c.counts())
	} else {
		dc.counts = c.counts()
	}
	dc.entries = make([]entry, c.used)
	for j := range dc.entries {
		e, o := &dc.entries[j], c.firstOrd+atoll.Ordinal(j)
		*e = m.table.entryAt(c, j, dc.counts[j])
		switch {
		case m.unused(d, o, &c.slots[j], dc.counts[j]):
			e.State, dc.write = stateDropped, true
			if e.Removed {
				e.State = stateGone
			}
			e.Remap, e.Removed = Ref{}, false
			d.dropped = append(d.dropped, o)
		case m.draftRemap(d, o, e, &c.slots[j]):
			dc.write = true
		}
	}
	if !dc.write && m.movable(d, c.ref) {
		dc.write = true
	}
	switch {
	case c.used == chunkEntries && c.allGone(base):
		dc.gone, dc.ref, dc.write = true, Ref{}, false
	case c.used == 0:
		dc.write = false
	}
	c.dirty = false
	d.chunks = append(d.chunks, dc)
}

// draftRemap notes the remap of a segment that is to be written, because it is
// new or must leave the segment it is in.
func (m *Medium) draftRemap(d *draft, o atoll.Ordinal, e *entry, s *slot) bool {
	if d.ck != nil && d.ck.moved != nil {
		if r := d.ck.moved.remaps[o]; r != nil && (e.State == stateLive || e.State == stateVirtual) {
			e.State, e.Remap = stateVirtual, Ref{}
			d.remaps[o] = r
			return true
		}
	}
	if m.movable(d, e.Remap) {
		d.remaps[o] = s.remap.Load()
		return true
	}
	return false
}

// unused reports whether a segment can be dropped (M5).
func (m *Medium) unused(d *draft, o atoll.Ordinal, s *slot, count int32) bool {
	st, lane, _ := s.get()
	return (st == stateLive || st == stateVirtual) && m.before(&d.man.Mark, lane, o) && count == 0 &&
		s.live.Load() == 0 && s.hold.Load() == 0 && s.own == 0 && len(m.table.moved[o]) == 0
}

// before reports whether a segment of a lane was sealed before a mark, and no
// compaction that is running writes there.
func (m *Medium) before(mark *Mark, lane catalog.Lane, o atoll.Ordinal) bool {
	if lane == catalog.Bulk {
		return o < mark.Bulk && !slices.ContainsFunc(m.mu.moving, func(from atoll.Ordinal) bool { return o >= from })
	}
	return o < mark.Ordinal
}

// movable reports whether a segment is kept only by the manifest's own records,
// one of them at r, so that writing them anew lets the segment go.
func (m *Medium) movable(d *draft, r Ref) bool {
	if r.IsZero() {
		return false
	}
	if is, known := d.leave[r.Ordinal]; known {
		if d.ck == nil || d.ck.moved == nil || !slices.Contains(d.ck.moved.from, r.Ordinal) {
			d.left--
		}
		return is
	}
	s := m.table.at(r.Ordinal)
	if s == nil || d.left <= 0 {
		return false
	}
	st, lane, _ := s.get()
	is := st == stateLive && m.before(&d.man.Mark, lane, r.Ordinal) && s.live.Load() == 0 && s.saved == 0 &&
		s.hold.Load() == 0 && len(m.table.moved[r.Ordinal]) == 0
	d.leave[r.Ordinal] = is
	if is {
		d.left--
	}
	return is
}

// leaves reports whether a record of the manifest must leave its segment.
func (d *draft) leaves(r Ref) bool { return d.leave[r.Ordinal] }

// store writes the records of a draft to a lane, moves the head and adopts the draft.
func (m *Medium) store(ctx context.Context, lane catalog.Lane, d *draft) error {
	if err := m.storeRemaps(ctx, lane, d); err != nil {
		return err
	}
	if err := m.storeChunks(ctx, lane, d); err != nil {
		return err
	}
	if err := m.storeVersions(ctx, lane, d); err != nil {
		return err
	}
	if err := m.storeRoot(ctx, lane, d); err != nil {
		return err
	}
	d.refs()
	record := d.man.encode()
	if len(record) > atoll.MaxBatchBlocks*atoll.BlockSize {
		return fmt.Errorf("root of %d bytes: %w", len(record), atoll.ErrTooLarge)
	}
	ref, err := m.appendOwn(ctx, lane, kindManifest, d.man.Serial, record)
	if err != nil {
		return err
	}
	m.metrics.wrote("root", len(record))
	err = m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) {
		return headMoved(h, *ref.blockRef(m.id), d.head.Sealed, d.head.Dropped), nil
	})
	if err != nil {
		return err
	}
	m.adopt(d, ref, time.Now().Add(m.grace()))
	return nil
}

// blocks estimates how much a draft writes.
func (d *draft) blocks() int {
	total := len(d.man.Root)/atoll.BlockSize + len(d.remaps) + 2*len(d.roots)
	for i := range d.chunks {
		if d.chunks[i].write {
			total += len(d.chunks[i].entries)*entrySize/atoll.BlockSize + 1
		}
	}
	return total
}

// storeRemaps writes new remaps and those that must leave their segments.
func (m *Medium) storeRemaps(ctx context.Context, lane catalog.Lane, d *draft) error {
	var list []ownRecord
	for _, o := range slices.Sorted(maps.Keys(d.remaps)) {
		p := d.remaps[o].encode()
		m.metrics.wrote("remap", len(p))
		list = append(list, ownRecord{kindRemap, uint64(o), p})
	}
	refs, err := m.appendOwnAll(ctx, lane, list)
	if err != nil {
		return err
	}
	for i, r := range list {
		d.placed[atoll.Ordinal(r.key)] = refs[i]
	}
	return nil
}

// storeChunks writes the chunks of the table that changed, with the new places of
// remaps.
func (m *Medium) storeChunks(ctx context.Context, lane catalog.Lane, d *draft) error {
	var list []ownRecord
	for i := range d.chunks {
		dc := &d.chunks[i]
		if !dc.write {
			continue
		}
		for j := range dc.entries {
			if ref, ok := d.placed[dc.first+atoll.Ordinal(j)]; ok {
				dc.entries[j].Remap = ref
			}
		}
		p := encodeChunk(m.id, dc.first, dc.entries)
		m.metrics.wrote("chunk", len(p))
		list = append(list, ownRecord{kindChunk, uint64(dc.index), p})
	}
	refs, err := m.appendOwnAll(ctx, lane, list)
	if err != nil {
		return err
	}
	for i, k := 0, 0; i < len(d.chunks); i++ {
		if d.chunks[i].write {
			d.chunks[i].ref = refs[k]
			k++
		}
	}
	return nil
}

// storeRoot writes the kind's root if it is not inline.
func (m *Medium) storeRoot(ctx context.Context, lane catalog.Lane, d *draft) (err error) {
	root := d.man.Root
	switch {
	case d.man.RootRef.IsZero() && len(root) <= inlineRoot:
		return nil
	case d.man.RootRef.IsZero():
		root = padded(root)
	case d.copy:
		if root, err = m.readOwn(ctx, d.man.RootRef); err != nil {
			return fmt.Errorf("copy root: %w", err)
		}
	default:
		return nil
	}
	d.man.Root = nil
	d.man.RootRef, err = m.appendOwn(ctx, lane, kindRoot, d.man.Serial, root)
	return err
}

// refs lists the chunks in the root, without the leading ones that are gone.
func (d *draft) refs() {
	d.man.Chunks, d.man.First = nil, 0
	last := -1
	for _, dc := range d.chunks {
		last = max(last, dc.index)
	}
	byIndex := make([]Ref, last+1)
	for _, dc := range d.chunks {
		byIndex[dc.index] = dc.ref
	}
	for len(byIndex) > 0 && byIndex[0].IsZero() {
		byIndex = byIndex[1:]
		d.man.First++
	}
	d.man.Chunks = byIndex
}

// adopt makes the draft, now durable, the manifest in force. Nodes remove at due
// what it dropped.
func (m *Medium) adopt(d *draft, ref Ref, due time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, t := m.mu.man, m.table
	t.own(m.mu.ref, -1)
	t.own(ref, +1)
	t.own(old.RootRef, -1)
	t.own(d.man.RootRef, +1)
	t.ownVersions(old, -1)
	t.ownVersions(&d.man, +1)
	m.adoptRemaps(d, due)
	for _, dc := range d.chunks {
		c := (*t.chunks.Load())[dc.index]
		t.own(c.ref, -1)
		t.own(dc.ref, +1)
		c.ref = dc.ref
		for j, n := range dc.counts {
			c.slots[j].saved = n
		}
		if dc.gone {
			t.install(dc.index, nil)
		}
	}
	for _, o := range d.dropped {
		m.adoptDrop(o, due)
	}
	for _, seg := range d.head.Dropped {
		m.mu.doomed = append(m.mu.doomed, doomed{ordinal: seg.Ordinal, due: due})
	}
	m.mu.man, m.mu.ref = &d.man, ref
	if len(d.dropped) > 0 {
		m.log.Info("segments dropped", "medium", m.id, "count", len(d.dropped), "first", d.dropped[0])
	}
}

// adoptRemaps puts new remaps, and new places of old ones, into the table. A
// segment's remap is there before its state says that only that counts.
func (m *Medium) adoptRemaps(d *draft, due time.Time) {
	for o, r := range d.remaps {
		s := m.table.at(o)
		m.table.setRemap(o, d.placed[o], r)
		if st, _, _ := s.get(); st == stateLive {
			s.setState(stateVirtual)
			m.mu.doomed = append(m.mu.doomed, doomed{ordinal: o, due: due})
		}
	}
}

// adoptDrop marks a segment as dropped.
func (m *Medium) adoptDrop(o atoll.Ordinal, due time.Time) {
	s := m.table.at(o)
	removed := m.table.rare[o] != nil && m.table.rare[o].removed
	if removed {
		s.setState(stateGone)
	} else {
		s.setState(stateDropped)
		m.mu.doomed = append(m.mu.doomed, doomed{ordinal: o, due: due})
	}
	m.table.setRemap(o, Ref{}, nil)
}

// redirty undoes what draft took note of, after a failure.
func (m *Medium) redirty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := *m.table.chunks.Load()
	for i := range list {
		if list[i] != nil {
			list[i].dirty = true
			list[i].recount.Store(true)
		}
	}
}

// ownLane chooses where a manifest of so many blocks goes: to the bulk lane if
// that is open anyway or it is long.
func (m *Medium) ownLane(blocks int) catalog.Lane {
	if m.lanes[catalog.Bulk].w.Load() != nil || blocks > 64 {
		return catalog.Bulk
	}
	return catalog.Hot
}

// ownRecord is a record of this package, in whole blocks.
type ownRecord struct {
	kind  segment.Kind
	key   uint64
	bytes []byte
}

// appendOwn writes one record of this package and returns where it is.
func (m *Medium) appendOwn(ctx context.Context, lane catalog.Lane, kind segment.Kind, key uint64, p []byte) (Ref, error) {
	refs, err := m.appendOwnAll(ctx, lane, []ownRecord{{kind, key, p}})
	if err != nil {
		return Ref{}, err
	}
	return refs[0], nil
}

// appendOwnAll writes records of this package, as many in one batch as fit, and
// returns where they are.
func (m *Medium) appendOwnAll(ctx context.Context, lane catalog.Lane, list []ownRecord) (refs []Ref, err error) {
	for len(list) > 0 {
		n, blocks := 0, 0
		for n < len(list) && (n == 0 || segment.Fits(n+1, blocks+len(list[n].bytes)/atoll.BlockSize)) {
			blocks += len(list[n].bytes) / atoll.BlockSize
			n++
		}
		buf := host.Alloc(blocks * atoll.BlockSize)
		p := buf.Bytes()
		var e stream.Entry
		for _, r := range list[:n] {
			copy(p, r.bytes)
			e.Add(segment.Record{Kind: r.kind, Blocks: uint16(len(r.bytes) / atoll.BlockSize), Key: r.key}, buf, p[:len(r.bytes)])
			p = p[len(r.bytes):]
		}
		err := m.appendEntry(ctx, lane, &e)
		buf.Release()
		if err != nil {
			return nil, err
		}
		for i, r := range list[:n] {
			seg := e.Seg()
			refs = append(refs, Ref{seg.Ordinal, seg.Copyset, e.Block(i), atoll.BlockNo(len(r.bytes) / atoll.BlockSize), segment.CRC(r.bytes)})
		}
		m.written.Add(int64(blocks) + 1)
		list = list[n:]
	}
	return refs, nil
}

// readOwn reads a record of this package and checks it against its reference.
func (m *Medium) readOwn(ctx context.Context, r Ref) ([]byte, error) {
	return readRecord(ctx, m.opts.Nodes, m.id, r)
}

// manifest returns the manifest in force. It is never changed.
func (m *Medium) manifest() *manifest {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.man
}
