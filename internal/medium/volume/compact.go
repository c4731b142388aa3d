package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

// placed is a piece of what lies in a segment: a page of data, a leaf or a node
// of the map.
type placed struct {
	loc    atoll.Location // logical, check bits 0
	key    uint64         // page, leaf or node
	aux    uint64         // of a leaf or node its epoch
	kind   segment.Kind
	blocks atoll.BlockNo
	rec    int // which record of the segment, or piece of one, it is in
	live   bool
}

// birth returns the epoch of a leaf or node.
func (p *placed) birth() uint32 { return uint32(p.aux) }

// at reports whether a place of the map is that of the piece.
func (p *placed) at(loc atoll.Location) bool { return loc>>16 == p.loc>>16 }

// contents is what lies in a segment, by kind.
type contents struct {
	data, leaves, nodes []placed
}

// compact moves what is live in a segment elsewhere, and returns how many blocks
// that were.
func (v *Volume) compact(ctx context.Context, o atoll.Ordinal) (moved atoll.BlockNo, err error) {
	for range compactTries {
		if err := v.Settled(ctx); err != nil {
			return 0, err
		}
		if v.hist.doubt.Load() { // the log may bring back what is dead now
			if err := v.checkpoint(ctx); err != nil {
				return 0, err
			}
		}
		v.hist.mu.Lock()
		count, quiet := v.hist.count, len(v.hist.queue) == 0 && !v.hist.doubt.Load()
		v.hist.mu.Unlock()
		if !quiet {
			continue
		}
		runs, err := v.liveRuns(ctx, o)
		if err == errEra {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("compact segment %d of volume %v: %w", o, v.id, err)
		}
		v.hist.mu.Lock()
		same := v.hist.count == count
		v.hist.mu.Unlock()
		if !same {
			continue
		}
		// What is dead now is so for ever. What died since may be unknown to
		// the medium already.
		if err := v.store.Move(ctx, o, runs); !errors.Is(err, atoll.ErrInvalid) {
			for _, r := range runs {
				moved += r.Blocks
			}
			return moved, err
		}
	}
	return 0, fmt.Errorf("compact segment %d of volume %v: versions came and went meanwhile: %w", o, v.id, atoll.ErrBusy)
}

// liveRuns finds what is live in a segment. A piece that was born at x can be in
// those versions only that are younger than x and grew from one that is older,
// and in the present state if that did.
func (v *Volume) liveRuns(ctx context.Context, o atoll.Ordinal) ([]medium.Run, error) {
	c, err := v.contents(ctx, o)
	if err != nil {
		return nil, err
	}
	st := v.store.State()
	for i := range st.Versions {
		p := &st.Versions[i]
		if err := v.markVersion(ctx, c, v.horizon(&st, p.Parent), p); err != nil {
			return nil, err
		}
	}
	if err := v.markPresent(ctx, c, v.horizon(&st, st.CurParent)); err != nil {
		return nil, err
	}
	return c.runs(), nil
}

// contents reads what lies in a segment.
func (v *Volume) contents(ctx context.Context, o atoll.Ordinal) (*contents, error) {
	c := &contents{}
	rec := 0
	err := v.store.Placed(ctx, o, func(p medium.Placed) error {
		rec++
		at := atoll.MakeLocation(p.Ordinal, p.Block, 0)
		one := placed{loc: at, key: p.Key, aux: p.Aux, kind: p.Kind, blocks: 1, rec: rec}
		switch p.Kind {
		case kindData:
			for i := range uint64(p.Count) {
				one.loc, one.key = at+atoll.Location(i)<<16, p.Key+uint64(p.Skip)+i
				c.data = append(c.data, one)
			}
		case kindLeaf:
			c.leaves = append(c.leaves, one)
		case kindNode:
			if p.Skip != 0 || p.Count != nodeBlocks {
				return fmt.Errorf("half a map node at %v: %w", at, atoll.ErrCorrupt)
			}
			one.blocks = nodeBlocks
			c.nodes = append(c.nodes, one)
		}
		return nil
	})
	byKey := func(a, b placed) int { return cmp.Compare(a.key, b.key) }
	slices.SortFunc(c.data, byKey)
	slices.SortFunc(c.leaves, byKey)
	slices.SortFunc(c.nodes, byKey)
	return c, err
}

// some calls fn for the pieces that are not known to be live and may be in a
// version: not from before it began, as after tells, and from before its end.
func some(list []placed, may func(p *placed) bool, fn func(p *placed) error) error {
	for i := range list {
		if p := &list[i]; !p.live && may(p) {
			if err := fn(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// markVersion marks what version p has.
func (v *Volume) markVersion(ctx context.Context, c *contents, after horizon, p *medium.Version) error {
	until := horizon{p.At, p.Epoch}
	data := func(x *placed) bool { return !after.data(x.loc) && until.data(x.loc) }
	page := func(x *placed) bool { return !after.page(x.birth()) && until.page(x.birth()) }
	if !slices.ContainsFunc(c.data, func(x placed) bool { return data(&x) }) &&
		!slices.ContainsFunc(c.leaves, func(x placed) bool { return page(&x) }) &&
		!slices.ContainsFunc(c.nodes, func(x placed) bool { return page(&x) }) {
		return nil
	}
	r, err := v.source(ctx, p.Number)
	if errors.Is(err, atoll.ErrNotExist) && v.gone(p.Number) {
		return errEra // what grew from it may have the pieces then
	}
	if err != nil {
		return err
	}
	if err := markData(ctx, c.data, r, data); err != nil {
		return err
	}
	return markPages(ctx, c, r, page)
}

// aheadLeaves is how many leaves of a version are read at once.
const aheadLeaves = 128

// markData marks the data that r has; list is in the order of pages.
func markData(ctx context.Context, list []placed, r *rooted, may func(*placed) bool) error {
	leaf := new(leafCache)
	var leaves []uint32
	for len(list) > 0 {
		leaves = leaves[:0]
		n := 0
		for ; n < len(list); n++ {
			if x := &list[n]; x.live || !may(x) {
				continue
			}
			li, k := pageNo(list[n].key).leafIdx(), len(leaves)
			if k > 0 && leaves[k-1] == li {
				continue
			}
			if k == aheadLeaves || k > 0 && leaves[0]>>leafBits != li>>leafBits {
				break
			}
			leaves = append(leaves, li)
		}
		if len(leaves) > 1 {
			nd, err := r.node(ctx, leaves[0]>>leafBits)
			if err != nil {
				return err
			}
			r.ahead(ctx, nd, leaves)
		}
		err := some(list[:n], may, func(x *placed) error {
			loc, err := r.find(ctx, pageNo(x.key), leaf)
			x.live = x.at(loc)
			return err
		})
		if err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

func (v *Volume) gone(number uint64) bool {
	st := v.store.State()
	return st.Find(number) == nil
}

// markPages marks the pages of the map that r has.
func markPages(ctx context.Context, c *contents, r *rooted, may func(*placed) bool) error {
	err := some(c.leaves, may, func(x *placed) error {
		nd, err := r.node(ctx, uint32(x.key>>leafBits))
		x.live = nd != nil && x.at(nd.locs[x.key&(fan-1)])
		return err
	})
	if err != nil {
		return err
	}
	return some(c.nodes, may, func(x *placed) error {
		loc, _ := r.top(uint32(x.key))
		x.live = x.at(loc)
		return nil
	})
}

// markPresent marks what the present state has: of data what the map says now,
// for what was overwritten since the last root is not read again, only counted;
// of the map itself what the last root needs.
func (v *Volume) markPresent(ctx context.Context, c *contents, after horizon) error {
	// The segment lies before the mark of a manifest; the root is of that one or
	// of a later one. A later one may name more, but nothing in this segment.
	if err := v.lockCommit(ctx); err != nil {
		return err
	}
	root := v.durable.Load()
	v.unlockCommit()
	if root == nil {
		root = none()
	}
	r := &rooted{m: v.pages, info: root.info, tops: root.tops}
	if err := markPages(ctx, c, r, func(x *placed) bool { return !after.page(x.birth()) }); err != nil {
		return err
	}
	l := liveOf(v.pages)
	leaf := new(leafCache)
	return some(c.data, func(x *placed) bool { return !after.data(x.loc) }, func(x *placed) error {
		p := pageNo(x.key)
		if li := p.leafIdx(); leaf.idx != li+1 {
			if err := v.pages.lookup(ctx, p&^(fan-1), leaf.locs[:]); err != nil {
				return err
			}
			if l.swapped() {
				return errEra
			}
			leaf.idx = li + 1
		}
		x.live = x.at(leaf.locs[p.slot()])
		return nil
	})
}

// swapped reports whether a restore replaced the map.
func (l *live) swapped() bool {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return l.m.t != l.t
}

// runs joins the live pieces to runs, none of which spans two records.
func (c *contents) runs() []medium.Run {
	var live []placed
	for _, list := range [][]placed{c.data, c.leaves, c.nodes} {
		for i := range list {
			if list[i].live {
				live = append(live, list[i])
			}
		}
	}
	slices.SortFunc(live, func(a, b placed) int { return cmp.Or(cmp.Compare(a.rec, b.rec), cmp.Compare(a.loc, b.loc)) })
	var runs []medium.Run
	last := -1
	for _, x := range live {
		n := len(runs)
		if n > 0 && last == x.rec && runs[n-1].Ordinal == x.loc.Ordinal() && runs[n-1].Block+runs[n-1].Blocks == x.loc.Block() {
			runs[n-1].Blocks += x.blocks
		} else {
			runs = append(runs, medium.Run{Kind: x.kind, Key: x.key, Aux: x.aux, Ordinal: x.loc.Ordinal(), Block: x.loc.Block(), Blocks: x.blocks})
		}
		last = x.rec
	}
	return runs
}

// compactTries bounds how often the look for what is live begins anew.
const compactTries = 10
