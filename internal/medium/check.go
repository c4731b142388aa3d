package medium

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
)

// Check compares manifest, table and head with one another and with what nodes
// say they hold, reads the roots of all versions, looks whether what compaction
// moved is where it should be and what clones need is there, and returns all
// that does not fit, as ErrCorrupt. It reads no data blocks. A node that does not
// answer is an error, but no contradiction.
func (m *Medium) Check(ctx context.Context) error {
	if err := m.check(); err != nil {
		return err
	}
	known := m.mendable() // before the nodes are asked: what is sealed later they may have answered without
	copies, err := m.opts.Nodes.List(ctx, m.id)
	var bad []error
	if err != nil {
		bad = append(bad, fmt.Errorf("list copies: %w", err))
	}
	m.mu.Lock()
	ref, man := m.mu.ref, m.mu.man
	m.mu.Unlock()
	if !ref.IsZero() {
		if _, err := m.readOwn(ctx, ref); err != nil {
			bad = append(bad, fmt.Errorf("read manifest: %w", err))
		}
	}
	if man.Mark.Ordinal > m.own.head().Next {
		bad = append(bad, fmt.Errorf("mark at segment %d, next is %d: %w", man.Mark.Ordinal, m.own.head().Next, atoll.ErrCorrupt))
	}
	if err == nil {
		bad = append(bad, m.checkCopies(known, copies)...)
	}
	bad = append(bad, m.checkVersions(ctx)...)
	bad = append(bad, m.checkMoved()...)
	if err := errors.Join(bad...); err != nil {
		return fmt.Errorf("check medium %v: %w", m.id, err)
	}
	return nil
}

// Mend reads every copy of every segment where it lies, repairs what is damaged
// from a good copy, and makes missing copies anew. The errors name what is not
// whole afterwards, as ErrCorrupt, and the nodes that could not be asked, as
// other kinds. Writes go on meanwhile.
func (m *Medium) Mend(ctx context.Context) (stream.Mended, []error) {
	var sum stream.Mended
	var bad []error
	silent := map[atoll.NodeID][]*stream.NotMended{}
	for _, s := range m.mendable() {
		if err := m.check(); err != nil {
			return sum, append(bad, err)
		}
		if err := ctx.Err(); err != nil {
			return sum, append(bad, fmt.Errorf("mend medium %v: %w", m.id, timeout(err)))
		}
		got, errs := m.mend(ctx, s)
		sum.Add(got)
		if st, _, _ := m.table.at(s.Seg.Ordinal).get(); st == stateDropped || st == stateGone || st == stateVirtual {
			continue // reclaimed meanwhile
		}
		for _, err := range errs {
			if one := (*stream.NotMended)(nil); errors.As(err, &one) && !errors.Is(err, atoll.ErrCorrupt) {
				silent[one.Node] = append(silent[one.Node], one)
				continue
			} else if one != nil && one.Gone {
				m.doubt(s, one.Node)
			}
			bad = append(bad, err)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(silent)) {
		bad = append(bad, fmt.Errorf("node %v: %d copies not read, the first: %w", id, len(silent[id]), silent[id][0].Err))
	}
	return sum, bad
}

// mend reads every copy, or shard, of a segment and repairs it.
func (m *Medium) mend(ctx context.Context, s catalog.Sealed) (stream.Mended, []error) {
	if shape := m.table.at(s.Seg.Ordinal).shape(); shape.IsCoded() {
		return m.opts.Nodes.MendCoded(ctx, stream.Coded{Seg: s.Seg, Shape: shape, Unverified: s.Unverified}, m.epoch)
	}
	return m.opts.Nodes.Mend(ctx, s, m.epoch)
}

// doubt notes that a node's copy of a sealed segment is not known to be whole,
// so that it is completed, by the next owner if this one cannot.
func (m *Medium) doubt(s catalog.Sealed, id atoll.NodeID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.table.chunkOf(s.Seg.Ordinal)
	if c == nil || s.Length == 0 {
		return
	}
	r := m.table.rare[s.Seg.Ordinal]
	if r == nil {
		r = &rare{}
		m.table.rare[s.Seg.Ordinal] = r
	}
	if !slices.Contains(r.unverified, id) && len(r.unverified) < atoll.MaxCopies { // more do not help
		r.unverified, c.dirty = append(slices.Clone(r.unverified), id), true
	}
}

// mendable lists the segments that hold data.
func (m *Medium) mendable() (list []catalog.Sealed) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.table.each(func(o atoll.Ordinal, s *slot) {
		st, lane, copyset := s.get()
		if st != stateLive && (st != stateOpen || lane == catalog.Shards) {
			return
		}
		e := catalog.Sealed{Seg: atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}, Lane: lane}
		if st == stateLive {
			e.Length = s.length
		}
		if r := m.table.rare[o]; r != nil {
			e.Unverified = slices.Clone(r.unverified)
		}
		list = append(list, e)
	})
	return list
}

// checkCopies looks for every copy of those sealed segments that were known
// before the copies were listed.
func (m *Medium) checkCopies(known []catalog.Sealed, copies []stream.Copy) (bad []error) {
	before := map[atoll.Ordinal]catalog.Sealed{}
	for _, s := range known {
		if s.Length > 0 {
			before[s.Seg.Ordinal] = s
		}
	}
	held := map[atoll.SegmentID][]stream.Copy{}
	for _, c := range copies {
		held[c.Seg] = append(held[c.Seg], c)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.table.each(func(o atoll.Ordinal, s *slot) {
		st, _, copyset := s.get()
		live := s.live.Load()
		if st == stateLive && (live < 0 || atoll.BlockNo(live) >= s.length) || st == stateDropped && live != 0 {
			bad = append(bad, fmt.Errorf("segment %d of length %d has %d live blocks: %w", o, s.length, live, atoll.ErrCorrupt))
		}
		seg := atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}
		if was, ok := before[o]; ok && st == stateLive && was.Seg == seg {
			bad = append(bad, m.checkSegment(was, held[seg])...)
		}
	})
	return bad
}

func (m *Medium) checkSegment(s catalog.Sealed, held []stream.Copy) (bad []error) {
	seg, length := s.Seg, s.Length
	if shape := m.table.at(seg.Ordinal).shape(); shape.IsCoded() {
		length = shape.Length()
	}
	members, err := m.opts.Nodes.Members(seg)
	if err != nil {
		return []error{fmt.Errorf("segment %v: %w", seg, err)}
	}
	for _, id := range members {
		if slices.Contains(s.Unverified, id) {
			continue
		}
		i := slices.IndexFunc(held, func(c stream.Copy) bool { return c.Node == id })
		switch {
		case i < 0:
			bad = append(bad, fmt.Errorf("segment %v: node %v has no copy: %w", seg, id, atoll.ErrCorrupt))
		case held[i].Damaged:
			bad = append(bad, fmt.Errorf("segment %v: copy on node %v is damaged: %w", seg, id, atoll.ErrCorrupt))
		case held[i].Length < length || held[i].Sealed && held[i].Length != length:
			bad = append(bad, fmt.Errorf("segment %v: copy on node %v has %d of %d blocks: %w", seg, id, held[i].Length, length, atoll.ErrCorrupt))
		}
	}
	return bad
}

// checkVersions reads the roots of all versions, and looks whether every version
// that a clone began as is there.
func (m *Medium) checkVersions(ctx context.Context) (bad []error) {
	s := m.State()
	if err := s.check(); err != nil {
		bad = append(bad, err)
	}
	for i := range s.Versions {
		_, err := m.ReadRoot(ctx, s.Versions[i].Number)
		if now := m.State(); err != nil && now.Find(s.Versions[i].Number) != nil {
			bad = append(bad, err)
		}
	}
	for _, p := range m.unmet(ctx, &bad) {
		bad = append(bad, fmt.Errorf("clone %v began as version %d, which is not there: %w", p.Clone, p.Version, atoll.ErrCorrupt))
	}
	return bad
}

// unmet returns the pins of clones for which there is no version. Since clones
// come and go meanwhile it looks twice.
func (m *Medium) unmet(ctx context.Context, bad *[]error) (left []catalog.Pin) {
	for try := range 2 {
		pins, err := m.opts.Catalog.Pins(ctx, m.id)
		if err != nil {
			*bad = append(*bad, err)
			return nil
		}
		s := m.State()
		pins = slices.DeleteFunc(pins, func(p catalog.Pin) bool {
			return p.Clone == 0 || s.Find(p.Version) != nil || try > 0 && !slices.Contains(left, p)
		})
		if left = pins; len(left) == 0 {
			return nil
		}
	}
	return left
}

// checkMoved looks at the remaps, and counts what keeps segments.
func (m *Medium) checkMoved() (bad []error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	own := map[atoll.Ordinal]int32{}
	note := func(r Ref) {
		if !r.IsZero() {
			own[r.Ordinal]++
		}
	}
	note(m.mu.ref)
	note(m.mu.man.RootRef)
	for _, g := range m.mu.man.Pages {
		note(g.Ref)
	}
	for i := range m.mu.man.Versions {
		note(m.mu.man.Versions[i].Root)
	}
	for _, c := range *m.table.chunks.Load() {
		if c != nil {
			note(c.ref)
		}
	}
	moved := map[atoll.Ordinal]int{}
	m.table.each(func(o atoll.Ordinal, s *slot) {
		st, _, _ := s.get()
		r, x := s.remap.Load(), m.table.rare[o]
		if r == nil != (st != stateVirtual) {
			bad = append(bad, fmt.Errorf("segment %d in state %d, with a remap: %t: %w", o, st, r != nil, atoll.ErrCorrupt))
		}
		if r != nil {
			note(x.remap)
			bad = append(bad, m.checkRemap(o, r, moved)...)
		}
	})
	m.table.each(func(o atoll.Ordinal, s *slot) {
		if s.own != own[o] || len(m.table.moved[o]) != moved[o] {
			bad = append(bad, fmt.Errorf("segment %d: %d records of the manifest counted, %d there; blocks of %d segments counted, of %d there: %w",
				o, s.own, own[o], len(m.table.moved[o]), moved[o], atoll.ErrCorrupt))
		}
	})
	return bad
}

// checkRemap looks whether the places that a remap names can be.
func (m *Medium) checkRemap(o atoll.Ordinal, r *remap, moved map[atoll.Ordinal]int) (bad []error) {
	for to, n := range r.into() {
		moved[to]++
		if m.table.moved[to][o] != n {
			bad = append(bad, fmt.Errorf("%d blocks of segment %d are in segment %d, %d counted: %w", n, o, to, m.table.moved[to][o], atoll.ErrCorrupt))
		}
	}
	for _, v := range r.runs {
		s := m.table.at(v.Ordinal)
		if s == nil {
			bad = append(bad, fmt.Errorf("segment %d moved to segment %d, which is not there: %w", o, v.Ordinal, atoll.ErrCorrupt))
			continue
		}
		if st, _, _ := s.get(); st != stateOpen && (st != stateLive || v.Block+v.Blocks > s.length) {
			bad = append(bad, fmt.Errorf("segment %d moved to %d blocks at %d:%d, which is in state %d and has %d: %w",
				o, v.Blocks, v.Ordinal, v.Block, st, s.length, atoll.ErrCorrupt))
		}
	}
	return bad
}
