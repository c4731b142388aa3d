package medium

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// checkpoint is what the kind adds to a manifest; nil keeps the last one.
type checkpoint struct {
	mark Mark
	root []byte
}

// draft is a manifest on its way.
type draft struct {
	man     manifest
	head    catalog.Head // whose seals and drops it takes over
	dropped []atoll.Ordinal
	chunks  []draftChunk
	ck      *checkpoint
}

type draftChunk struct {
	index  int
	counts []int32 // live counts that become the saved ones
	record []byte  // nil when the chunk need not be written
	gone   bool    // every segment of it is gone
	ref    Ref
}

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
	return m.writeManifest(ctx, &checkpoint{mark, slices.Clone(root)})
}

// writeManifest writes what changed since the last manifest, and the root that
// leads to all of it, and moves the head there.
func (m *Medium) writeManifest(ctx context.Context, ck *checkpoint) error {
	if err := acquire(ctx, m.manifests); err != nil {
		return fmt.Errorf("write manifest of medium %v: %w", m.id, err)
	}
	defer func() { <-m.manifests }()
	start := time.Now()
	d, err := m.draft(ck)
	if err == nil {
		err = m.store(ctx, d)
	}
	if err != nil {
		m.redirty()
		return fmt.Errorf("write manifest of medium %v: %w", m.id, m.note(err))
	}
	m.metrics.manifest(time.Since(start))
	m.kick(m.sweeps)
	return nil
}

// draft decides what the next manifest says. Pure memory work.
func (m *Medium) draft(ck *checkpoint) (*draft, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := &draft{man: *m.mu.man, head: m.own.head(), ck: ck}
	m.mergeHead(d.head)
	if ck != nil {
		old := d.man.Mark
		if ck.mark.Ordinal < old.Ordinal || ck.mark.Seq < old.Seq || ck.mark.Ordinal == old.Ordinal && ck.mark.Block < old.Block {
			return nil, fmt.Errorf("mark %+v lies before %+v: %w", ck.mark, old, atoll.ErrInvalid)
		}
		d.man.Mark = ck.mark
		d.man.Root, d.man.RootRef, d.man.RootLen = ck.root, Ref{}, len(ck.root)
	}
	d.man.Medium, d.man.Epoch, d.man.Next = m.id, d.head.Epoch, d.head.Next
	d.man.Serial++
	for i, c := range *m.table.chunks.Load() {
		if c != nil {
			m.draftChunk(d, i, c)
		}
	}
	return d, nil
}

// draftChunk decides which segments of a chunk are dropped and whether it is to
// be written.
func (m *Medium) draftChunk(d *draft, i int, c *chunk) {
	dc := draftChunk{index: i, ref: c.ref}
	write := c.dirty
	if d.ck != nil && c.recount.Swap(false) {
		dc.counts = c.freeze()
		write = write || !slices.Equal(dc.counts, c.counts())
	} else {
		dc.counts = c.counts()
	}
	entries := make([]entry, c.used)
	for j := range entries {
		entries[j] = m.table.entryAt(c, j, dc.counts[j])
		o := c.firstOrd + atoll.Ordinal(j)
		if m.unused(&d.man.Mark, o, &c.slots[j], dc.counts[j]) {
			entries[j].State, write = stateDropped, true
			d.dropped = append(d.dropped, o)
		}
	}
	if !write && m.movable(d, c.ref) {
		write = true
	}
	switch {
	case c.used == chunkEntries && c.allGone():
		dc.gone, dc.ref = true, Ref{}
	case write && c.used > 0:
		dc.record = encodeChunk(m.id, c.firstOrd, entries)
	}
	c.dirty = false
	d.chunks = append(d.chunks, dc)
}

// unused reports whether a segment can be dropped (M5).
func (m *Medium) unused(mark *Mark, o atoll.Ordinal, s *slot, count int32) bool {
	st, lane, _ := s.get()
	limit := mark.Ordinal
	if lane == catalog.Bulk {
		limit = mark.Bulk
	}
	return (st == stateLive || st == stateVirtual) && o < limit && count == 0 &&
		s.live.Load() == 0 && s.hold.Load() == 0 && s.own == 0
}

// movable reports whether a segment is kept only by the manifest's own record
// at r, so that writing that record anew lets the segment go.
func (m *Medium) movable(d *draft, r Ref) bool {
	s := m.table.at(r.Ordinal)
	if s == nil || r.IsZero() {
		return false
	}
	st, lane, _ := s.get()
	limit := d.man.Mark.Ordinal
	if lane == catalog.Bulk {
		limit = d.man.Mark.Bulk
	}
	return st == stateLive && r.Ordinal < limit && s.live.Load() == 0 && s.saved == 0
}

// store writes the records of a draft, moves the head and adopts the draft.
func (m *Medium) store(ctx context.Context, d *draft) error {
	var err error
	total := len(d.man.Root) / atoll.BlockSize
	for i := range d.chunks {
		total += len(d.chunks[i].record) / atoll.BlockSize
	}
	lane := m.ownLane(total)
	for i := range d.chunks {
		if dc := &d.chunks[i]; dc.record != nil {
			if dc.ref, err = m.appendOwn(ctx, lane, kindChunk, uint64(dc.index), dc.record); err != nil {
				return err
			}
		}
	}
	if len(d.man.Root) > inlineRoot {
		padded := append(slices.Clone(d.man.Root), make([]byte, -len(d.man.Root)&(atoll.BlockSize-1))...)
		if d.man.RootRef, err = m.appendOwn(ctx, lane, kindRoot, d.man.Serial, padded); err != nil {
			return err
		}
		d.man.Root = nil
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
	err = m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) {
		return headMoved(h, *ref.blockRef(m.id), d.head.Sealed, d.head.Dropped), nil
	})
	if err != nil {
		return err
	}
	m.adopt(d, ref)
	return nil
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

// adopt makes the draft, now durable, the manifest in force.
func (m *Medium) adopt(d *draft, ref Ref) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, t := m.mu.man, m.table
	t.own(m.mu.ref, -1)
	t.own(ref, +1)
	t.own(old.RootRef, -1)
	t.own(d.man.RootRef, +1)
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
	now := time.Now()
	for _, o := range d.dropped {
		t.at(o).setState(stateDropped)
		m.mu.doomed = append(m.mu.doomed, doomed{o, now})
	}
	for _, seg := range d.head.Dropped {
		m.mu.doomed = append(m.mu.doomed, doomed{seg.Ordinal, now})
	}
	m.mu.man, m.mu.ref = &d.man, ref
	if len(d.dropped) > 0 {
		m.log.Info("segments dropped", "medium", m.id, "count", len(d.dropped), "first", d.dropped[0])
	}
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

// appendOwn writes one record of this package, whole blocks, and returns where
// it is. The bytes must not change until it returns.
func (m *Medium) appendOwn(ctx context.Context, lane catalog.Lane, kind segment.Kind, key uint64, p []byte) (Ref, error) {
	buf := host.Alloc(len(p))
	defer buf.Release()
	copy(buf.Bytes(), p)
	var e stream.Entry
	blocks := len(p) / atoll.BlockSize
	e.Add(segment.Record{Kind: kind, Blocks: uint16(blocks), Key: key}, buf, buf.Bytes())
	if err := m.appendEntry(ctx, lane, &e); err != nil {
		return Ref{}, err
	}
	seg := e.Seg()
	return Ref{seg.Ordinal, seg.Copyset, e.Block(0), atoll.BlockNo(blocks), segment.CRC(p)}, nil
}

// readOwn reads a record of this package and checks it against its reference.
func (m *Medium) readOwn(ctx context.Context, r Ref) ([]byte, error) {
	if r.Blocks == 0 || r.Blocks > atoll.MaxBatchBlocks {
		return nil, fmt.Errorf("read %d blocks at %d:%d: %w", r.Blocks, r.Ordinal, r.Block, atoll.ErrCorrupt)
	}
	p := make([]byte, r.Blocks.Bytes())
	if err := m.opts.Nodes.Read(ctx, r.segment(m.id), r.Block, p); err != nil {
		return nil, err
	}
	if c := segment.CRC(p); c != r.CRC {
		return nil, fmt.Errorf("read %d:%d: checksum %08x, want %08x: %w", r.Ordinal, r.Block, c, r.CRC, atoll.ErrCorrupt)
	}
	return p, nil
}

// loadManifest fills the table from the manifest and the head.
func (m *Medium) loadManifest(ctx context.Context) error {
	h := m.own.head()
	man := &manifest{Medium: m.id, Mark: Mark{Ordinal: 1, Seq: 1, Bulk: 1}}
	if h.Manifest != nil {
		m.mu.ref = fromBlockRef(h.Manifest)
		p, err := m.readOwn(ctx, m.mu.ref)
		if err != nil {
			return fmt.Errorf("load manifest: %w", err)
		}
		if man, err = parseManifest(p); err != nil {
			return fmt.Errorf("load manifest: %w", err)
		}
		if man.Medium != m.id {
			return fmt.Errorf("load manifest: it is of medium %v: %w", man.Medium, atoll.ErrCorrupt)
		}
	}
	m.mu.man = man
	for i := range man.First {
		m.table.install(i, nil)
	}
	for i, r := range man.Chunks {
		if err := m.loadChunk(ctx, man.First+i, r); err != nil {
			return err
		}
	}
	m.mergeHead(h)
	m.countOwn()
	return m.loadRoot(ctx)
}

func (m *Medium) loadChunk(ctx context.Context, i int, r Ref) error {
	if r.IsZero() {
		m.table.install(i, nil)
		return nil
	}
	p, err := m.readOwn(ctx, r)
	if err != nil {
		return fmt.Errorf("load chunk %d of the segment table: %w", i, err)
	}
	id, first, entries, err := parseChunk(p)
	if err != nil {
		return fmt.Errorf("load chunk %d: %w", i, err)
	}
	if id != m.id || first != atoll.Ordinal(i*chunkEntries+1) {
		return fmt.Errorf("load chunk %d: it is of medium %v from %d on: %w", i, id, first, atoll.ErrCorrupt)
	}
	m.table.load(i, r, entries)
	for j, e := range entries {
		if e.State == stateDropped {
			m.mu.doomed = append(m.mu.doomed, doomed{first + atoll.Ordinal(j), time.Now()})
		}
		if !e.Remap.IsZero() {
			if err := m.loadRemap(ctx, first+atoll.Ordinal(j), e.Remap); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Medium) loadRemap(ctx context.Context, o atoll.Ordinal, r Ref) error {
	p, err := m.readOwn(ctx, r)
	if err != nil {
		return fmt.Errorf("load remap of segment %d: %w", o, err)
	}
	rm, err := parseRemap(p)
	if err != nil {
		return err
	}
	if rm.Medium != m.id || rm.Ordinal != o {
		return fmt.Errorf("load remap of segment %d: it is of %v-%d: %w", o, rm.Medium, rm.Ordinal, atoll.ErrCorrupt)
	}
	m.table.at(o).remap.Store(rm)
	return nil
}

// mergeHead adds to the table what the head says.
func (m *Medium) mergeHead(h catalog.Head) {
	for _, s := range h.Sealed {
		m.settleLocked(s.Seg, entry{State: stateLive, Lane: s.Lane, Copyset: s.Seg.Copyset, Length: s.Length, Unverified: s.Unverified})
	}
	for _, d := range h.Dropped {
		m.settleLocked(d, entry{State: stateDropped, Copyset: d.Copyset})
	}
	for _, u := range h.Unsealed {
		m.settleLocked(u.Seg, entry{State: stateOpen, Lane: u.Lane, Copyset: u.Seg.Copyset})
	}
}

// countOwn counts the records of the manifest that was loaded.
func (m *Medium) countOwn() {
	m.table.own(m.mu.ref, +1)
	m.table.own(m.mu.man.RootRef, +1)
	for _, c := range m.mu.man.Chunks {
		m.table.own(c, +1)
	}
	for _, r := range m.table.rare {
		m.table.own(r.remap, +1)
	}
}

// loadRoot reads the kind's root if it is not inline.
func (m *Medium) loadRoot(ctx context.Context) error {
	man := m.mu.man
	m.root = man.Root
	if man.RootRef.IsZero() {
		return nil
	}
	p, err := m.readOwn(ctx, man.RootRef)
	if err != nil {
		return fmt.Errorf("load root: %w", err)
	}
	if man.RootLen > len(p) {
		return fmt.Errorf("load root: %d bytes of %d: %w", len(p), man.RootLen, atoll.ErrCorrupt)
	}
	m.root = p[:man.RootLen]
	return nil
}
