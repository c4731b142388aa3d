package volume

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// source is a map to be walked: that of a version, or the present one. Equal
// places of nodes or leaves mean equal contents below. One goroutine uses it.
type source interface {
	// top returns the place and epoch of a node, 0 if there is none.
	top(ni uint32) (atoll.Location, uint32)
	// node returns a node, of which only places and epochs count; nil if there
	// is none. It is valid until the next call.
	node(ctx context.Context, ni uint32) (*node, error)
	// leaf fills out with what a leaf of the node says.
	leaf(ctx context.Context, nd *node, li uint32, out *[fan]atoll.Location) error
	// ahead reads leaves of the node that will be asked for, side by side. What
	// cannot be read is found out by leaf.
	ahead(ctx context.Context, nd *node, list []uint32)
	// nodes returns how many nodes the map may have.
	nodes() uint32
}

// elsewhere stands for the place of what has changed since it was written; it
// differs from every place in the log.
const elsewhere = ^atoll.Location(0)

// rooted is a map as a root names it, read from the log.
type rooted struct {
	m    *pageMap
	info rootInfo
	tops []topEntry
	held uint32 // node in nd, plus one
	nd   *node
	// ready are nodes that were loaded ahead; it is theirs to be changed.
	ready map[uint32]*node

	read   []uint32 // leaves that were read ahead, ascending
	leaves [][fan]atoll.Location
}

// parseRooted returns the map that a root names.
func parseRooted(m *pageMap, root []byte) (*rooted, error) {
	info, top, err := decodeRoot(root)
	if err != nil {
		return nil, err
	}
	return &rooted{m: m, info: info, tops: top}, nil
}

// rootedOf returns the map of a frozen version that was written as a whole.
func rootedOf(m *pageMap, ver *version) *rooted {
	return &rooted{m: m, info: rootInfo{Size: ver.size, Epoch: ver.epoch}, tops: ver.top}
}

// none is the map of an empty volume.
func none() *rooted { return &rooted{} }

func (r *rooted) top(ni uint32) (atoll.Location, uint32) {
	if int(ni) >= len(r.tops) {
		return 0, 0
	}
	return r.tops[ni].loc, r.tops[ni].birth
}

func (r *rooted) nodes() uint32 { return uint32(len(r.tops)) }

func (r *rooted) node(ctx context.Context, ni uint32) (*node, error) {
	loc, _ := r.top(ni)
	if loc == 0 {
		return nil, nil
	}
	if r.held == ni+1 {
		return r.nd, nil
	}
	buf, err := r.m.fetch(ctx, want{node: true, idx: ni, loc: loc})
	if err != nil {
		return nil, err
	}
	defer buf.Release()
	if r.nd, err = decodeNode(buf.Bytes(), r.m.owner(loc), ni); err != nil {
		r.held = 0
		return nil, err
	}
	r.held = ni + 1
	return r.nd, nil
}

// loadAhead loads the nodes that the present map has in memory, so that changes
// need not wait for them when this one takes its place. What cannot be loaded in
// a moment is left out.
func (r *rooted) loadAhead(ctx context.Context) {
	var list []want
	r.m.mu.Lock()
	for ni := range r.m.t.top {
		if loc, _ := r.top(uint32(ni)); loc != 0 && r.m.t.top[ni].node != nil && len(list) < aheadNodes {
			list = append(list, want{node: true, idx: uint32(ni), loc: loc})
		}
	}
	r.m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, aheadTime)
	defer cancel()
	nodes := make([]*node, len(list))
	// What is missing is loaded when it is wanted.
	_ = r.m.fetchAll(ctx, list, func(i int, p []byte) {
		nodes[i], _ = decodeNode(p, r.m.owner(list[i].loc), list[i].idx)
	})
	r.ready = make(map[uint32]*node, len(list))
	for i, nd := range nodes {
		if nd != nil {
			r.ready[list[i].idx] = nd
		}
	}
}

// aheadNodes is how many nodes are loaded ahead at most, and aheadTime how long
// that may take.
const (
	aheadNodes = 1024
	aheadTime  = 8 * time.Millisecond
)

func (r *rooted) leaf(ctx context.Context, nd *node, li uint32, out *[fan]atoll.Location) error {
	if nd == nil || nd.locs[li&(fan-1)] == 0 {
		clear(out[:])
		return nil
	}
	if i, ok := slices.BinarySearch(r.read, li); ok {
		*out = r.leaves[i]
		return nil
	}
	buf, err := r.m.fetch(ctx, want{leaf: true, idx: li, loc: nd.locs[li&(fan-1)]})
	if err != nil {
		return err
	}
	defer buf.Release()
	leafLocations(buf.Bytes(), out)
	return nil
}

// leafLocations decodes a leaf.
func leafLocations(p []byte, out *[fan]atoll.Location) {
	for s := range out {
		out[s] = atoll.Location(le.Uint64(p[8*s:]))
	}
}

func (r *rooted) ahead(ctx context.Context, nd *node, list []uint32) {
	r.read = r.read[:0]
	if nd == nil {
		return
	}
	var wants []want
	for _, li := range list {
		if loc := nd.locs[li&(fan-1)]; loc != 0 {
			r.read, wants = append(r.read, li), append(wants, want{leaf: true, idx: li, loc: loc})
		}
	}
	r.leaves = slices.Grow(r.leaves[:0], len(wants))[:len(wants)]
	err := r.m.fetchAll(ctx, wants, func(i int, p []byte) { leafLocations(p, &r.leaves[i]) })
	if err != nil {
		r.read = r.read[:0]
	}
}

// find returns where page p lies.
func (r *rooted) find(ctx context.Context, p pageNo, leaf *leafCache) (atoll.Location, error) {
	li := p.leafIdx()
	if leaf.idx != li+1 {
		nd, err := r.node(ctx, li>>leafBits)
		if err != nil {
			return 0, err
		}
		if err := r.leaf(ctx, nd, li, &leaf.locs); err != nil {
			return 0, err
		}
		leaf.idx = li + 1
	}
	return leaf.locs[p.slot()], nil
}

// leafCache keeps the leaf that was looked at last.
type leafCache struct {
	idx  uint32 // of the leaf, plus one
	locs [fan]atoll.Location
}

// live is the present map. What changes meanwhile may be seen either way; after
// a restore it is errEra.
type live struct {
	m  *pageMap
	t  *tree
	nd node
}

func liveOf(m *pageMap) *live {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &live{m: m, t: m.t}
}

func (l *live) nodes() uint32 {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return uint32(len(l.t.top))
}

func (l *live) top(ni uint32) (atoll.Location, uint32) {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if int(ni) >= len(l.t.top) {
		return 0, 0
	}
	e := &l.t.top[ni]
	if e.node != nil && e.node.dirty {
		return elsewhere, e.node.birth
	}
	return e.loc, e.birth
}

func (l *live) node(ctx context.Context, ni uint32) (*node, error) {
	if err := l.m.prepare(ctx, pageNo(ni)<<nodeBits, 1); err != nil {
		return nil, err
	}
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.m.t != l.t {
		return nil, errEra
	}
	nd := l.t.nodeAt(int(ni))
	if nd == nil {
		return nil, nil
	}
	l.nd.birth, l.nd.locs, l.nd.births = nd.birth, nd.locs, nd.births
	for k, kid := range nd.kids {
		if kid != nil && kid.dirty {
			l.nd.locs[k], l.nd.births[k] = elsewhere, kid.birth
		}
	}
	return &l.nd, nil
}

func (l *live) leaf(ctx context.Context, nd *node, li uint32, out *[fan]atoll.Location) error {
	if nd == nil || nd.locs[li&(fan-1)] == 0 {
		clear(out[:])
		return nil
	}
	if err := l.m.lookup(ctx, pageNo(li)<<leafBits, out[:]); err != nil {
		return err
	}
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.m.t != l.t {
		return errEra
	}
	return nil
}

// ahead does nothing: most of the present map is in memory.
func (l *live) ahead(context.Context, *node, []uint32) {}

// walk finds what map a has that none of the others has at the same place, and
// what it lacks of the first. It reads only what differs from all of them.
type walk struct {
	a      source
	others []source
	from   uint32 // leaves [from, to)
	to     uint32
	// node and leaf tell of a node or leaf that differs; false leaves out what
	// is below. Either may be nil.
	node func(ni uint32, loc atoll.Location, birth uint32) bool
	leaf func(li uint32, loc atoll.Location, birth uint32) bool
	// pages is called with the leaves of a and of each other map.
	pages func(li uint32, a *[fan]atoll.Location, others [][fan]atoll.Location) error
	// stop, if not nil, is asked often whether to go on.
	stop func() error

	mine [fan]atoll.Location
	them [][fan]atoll.Location
	nds  []*node
	list []uint32
}

// walkAhead is how many leaves of each map are read at once.
const walkAhead = 64

// run walks. Errors of pages and stop end it and are returned.
func (w *walk) run(ctx context.Context) error {
	w.them, w.nds = make([][fan]atoll.Location, len(w.others)), make([]*node, len(w.others))
	end := w.a.nodes()
	for _, o := range w.others {
		end = max(end, o.nodes())
	}
	for ni := w.from >> leafBits; ni < end && ni<<leafBits < w.to; ni++ {
		loc, birth := w.a.top(ni)
		if w.sameTop(ni, loc) || w.node != nil && !w.node(ni, loc, birth) {
			continue
		}
		if err := w.nodeAt(ctx, ni); err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) sameTop(ni uint32, loc atoll.Location) bool {
	for _, o := range w.others {
		if l, _ := o.top(ni); l == loc {
			return true
		}
	}
	return len(w.others) == 0 && loc == 0
}

func (w *walk) nodeAt(ctx context.Context, ni uint32) error {
	nd, err := w.a.node(ctx, ni)
	for i := 0; err == nil && i < len(w.others); i++ {
		w.nds[i], err = w.others[i].node(ctx, ni)
	}
	if err != nil {
		return err
	}
	w.list = w.list[:0]
	for k := range uint32(fan) {
		li := ni<<leafBits | k
		if li < w.from || li >= w.to {
			continue
		}
		var loc atoll.Location
		var birth uint32
		if nd != nil {
			loc, birth = nd.locs[k], nd.births[k]
		}
		if !w.sameLeaf(k, loc) && (w.leaf == nil || w.leaf(li, loc, birth)) {
			w.list = append(w.list, li)
		}
	}
	return w.leaves(ctx, nd, w.list)
}

// leaves looks at leaves of a node that differ.
func (w *walk) leaves(ctx context.Context, nd *node, list []uint32) error {
	for len(list) > 0 {
		next := list[:min(len(list), walkAhead)]
		list = list[len(next):]
		if len(next) > 1 {
			w.a.ahead(ctx, nd, next)
			for i, o := range w.others {
				o.ahead(ctx, w.nds[i], next)
			}
		}
		for _, li := range next {
			if err := w.leafAt(ctx, nd, li); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *walk) sameLeaf(k uint32, loc atoll.Location) bool {
	for _, nd := range w.nds {
		if nd == nil && loc == 0 || nd != nil && nd.locs[k] == loc {
			return true
		}
	}
	return len(w.nds) == 0 && loc == 0
}

func (w *walk) leafAt(ctx context.Context, nd *node, li uint32) error {
	if w.stop != nil {
		if err := w.stop(); err != nil {
			return err
		}
	}
	err := w.a.leaf(ctx, nd, li, &w.mine)
	for i := 0; err == nil && i < len(w.others); i++ {
		err = w.others[i].leaf(ctx, w.nds[i], li, &w.them[i])
	}
	if err != nil {
		return err
	}
	return w.pages(li, &w.mine, w.them)
}

// only counts what map a has, was made after the horizon and is in none of the
// others: what goes when the version with that map goes.
func only(ctx context.Context, a source, others []source, after horizon, own atoll.Ordinal, stop func() error) (*ledger, error) {
	sum := &ledger{own: own}
	w := walk{
		a: a, others: others, to: ^uint32(0), stop: stop,
		node: func(_ uint32, loc atoll.Location, birth uint32) bool {
			if loc == 0 || after.page(birth) {
				return false
			}
			if loc != elsewhere {
				sum.addNode(loc, nodeBlocks)
			}
			return true
		},
		leaf: func(_ uint32, loc atoll.Location, birth uint32) bool {
			if loc == 0 || after.page(birth) {
				return false
			}
			if loc != elsewhere {
				sum.addNode(loc, 1)
			}
			return true
		},
		pages: func(_ uint32, mine *[fan]atoll.Location, them [][fan]atoll.Location) error {
			for s, loc := range mine {
				if loc == 0 || after.data(loc) || among(loc, s, them) {
					continue
				}
				sum.add(loc)
			}
			return nil
		},
	}
	if err := w.run(ctx); err != nil {
		return nil, err
	}
	return sum, nil
}

func among(loc atoll.Location, s int, them [][fan]atoll.Location) bool {
	for i := range them {
		if them[i][s] == loc {
			return true
		}
	}
	return false
}

// source returns the map of a version in the manifest.
func (v *Volume) source(ctx context.Context, number uint64) (*rooted, error) {
	root, err := v.store.ReadRoot(ctx, number)
	if err != nil {
		return nil, err
	}
	r, err := parseRooted(v.pages, root)
	if err != nil {
		return nil, fmt.Errorf("version %d: %w", number, err)
	}
	if r.info.Medium != v.id {
		return nil, fmt.Errorf("version %d: the root is that of medium %v: %w", number, r.info.Medium, atoll.ErrCorrupt)
	}
	return r, nil
}
