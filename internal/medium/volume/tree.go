package volume

import (
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
)

// The page table has three levels of fixed shape: the top has one entry per GiB
// of the volume, a node has 512 entries of 2 MiB each, and a leaf has 512
// locations. Only the shell (pageMap) does I/O; the tree is plain memory.
const (
	fan        = 512
	leafBits   = 9            // pages of a leaf
	nodeBits   = 2 * leafBits // pages of a node
	nodeBlocks = 2            // blocks of a node in the log
)

// pageNo numbers the 4 KiB pages of a volume.
type pageNo uint64

func (p pageNo) slot() int       { return int(p & (fan - 1)) }
func (p pageNo) leafIdx() uint32 { return uint32(p >> leafBits) }

// node maps 1 GiB. Once loaded it stays in memory: 10 KiB per GiB in use.
type node struct {
	birth  uint32 // tree epoch of its last change
	dirty  bool   // differs from what the log holds
	kids   [fan]*leaf
	locs   [fan]atoll.Location // of the leaves in the log, 0 = none there
	births [fan]uint32         // of the leaves in the log
}

// topEntry is the top level's entry for one node.
type topEntry struct {
	loc   atoll.Location // of the node in the log, 0 = none there
	birth uint32
	node  *node // nil when not loaded, or when there is none
}

// tree is the map of a volume: pure memory, guarded by its owner.
//
// Every node and leaf carries the epoch of its last change. While frozen versions
// wait to be written, what has an epoch up to shared belongs to the last of them
// also and is copied before it is changed; versions share all the rest.
type tree struct {
	top    []topEntry
	epoch  uint32
	shared uint32     // nodes and leaves up to this epoch are shared; 0 = nothing is
	led    *ledger    // changes of liveness since the last frozen version
	frozen []*version // not written yet, oldest first
	mapped int64      // pages mapped as of the last root
	flat   bool       // no block of an ancestor is named

	ring   []uint32 // leaves in memory, for eviction
	hand   int
	mem    int64 // bytes of the leaves in ring
	dirtyN int   // dirty leaves of the current epoch
}

func newTree(pages uint64) *tree {
	t := &tree{epoch: 1, led: newLedger()}
	t.resize(pages)
	return t
}

// adopt makes a new tree that of a root.
func (t *tree) adopt(r rootInfo, top []topEntry) {
	t.top, t.epoch, t.mapped, t.flat = top, r.Epoch+1, r.Mapped, r.Flat
	t.resize(uint64(r.Size / atoll.BlockSize))
}

// resize makes the top long enough for so many pages. It never drops entries
// that hold something: the pages beyond a new end must have been cleared.
func (t *tree) resize(pages uint64) {
	n := int((pages + 1<<nodeBits - 1) >> nodeBits)
	for len(t.top) > n {
		last := t.top[len(t.top)-1]
		if last.node != nil || last.loc != 0 {
			return
		}
		t.top = t.top[:len(t.top)-1]
	}
	if n > len(t.top) {
		t.top = append(slices.Clip(t.top), make([]topEntry, n-len(t.top))...)
	}
}

// want names what must be loaded from the log before a lookup can go on. The
// zero want means nothing.
type want struct {
	node bool
	leaf bool
	idx  uint32 // of the node or leaf
	loc  atoll.Location
}

func (w want) none() bool { return !w.node && !w.leaf }

// lookup fills out with the locations of the pages from p on and returns how
// many it could tell; when that is not all, w says what is missing.
func (t *tree) lookup(p pageNo, out []atoll.Location) (n int, w want) {
	for n < len(out) {
		q := p + pageNo(n)
		count := min(len(out)-n, fan-q.slot())
		l, w := t.find(q.leafIdx())
		if !w.none() {
			return n, w
		}
		for i := range count {
			loc, ok := l.get(q.slot() + i)
			if !ok {
				li := q.leafIdx()
				at := t.top[li>>leafBits].node.locs[li&(fan-1)]
				return n + i, want{leaf: true, idx: li, loc: at}
			}
			out[n+i] = loc
		}
		n += count
	}
	return n, want{}
}

// find returns leaf li, nil if it is all holes, or says what to load for it.
func (t *tree) find(li uint32) (*leaf, want) {
	ni := li >> leafBits
	if int(ni) >= len(t.top) {
		return nil, want{}
	}
	e := &t.top[ni]
	if e.node == nil {
		if e.loc == 0 {
			return nil, want{}
		}
		return nil, want{node: true, idx: ni, loc: e.loc}
	}
	l := e.node.kids[li&(fan-1)]
	if l == nil && e.node.locs[li&(fan-1)] != 0 {
		return nil, want{leaf: true, idx: li, loc: e.node.locs[li&(fan-1)]}
	}
	if l != nil {
		l.used = true
	}
	return l, want{}
}

// needNodes says which node must be loaded before pages [p, p+n) can be put.
func (t *tree) needNodes(p pageNo, n uint64) want {
	if n == 0 {
		return want{}
	}
	first, last := uint32(p>>nodeBits), uint32((p+pageNo(n)-1)>>nodeBits)
	for ni := first; ni <= last && int(ni) < len(t.top); ni++ {
		if e := &t.top[ni]; e.node == nil && e.loc != 0 {
			return want{node: true, idx: ni, loc: e.loc}
		}
	}
	return want{}
}

// put records the locations of consecutive pages from p on, without needing to
// know the old ones. The nodes must be loaded.
func (t *tree) put(p pageNo, locs []atoll.Location) {
	for len(locs) > 0 {
		count := min(len(locs), fan-p.slot())
		l := t.writable(p.leafIdx())
		t.mem -= l.mem()
		led := t.led
		for i, loc := range locs[:count] {
			old, known := l.own(p.slot() + i)
			if known && old == loc {
				continue
			}
			led.kill(old)
			led.add(loc)
			l.place(p.slot()+i, loc)
		}
		t.mem += l.mem()
		p += pageNo(count)
		locs = locs[count:]
	}
}

// clear makes n pages from p on holes, without needing to know the old
// locations. The nodes must be loaded.
func (t *tree) clear(p pageNo, n uint64) {
	for n > 0 {
		li := p.leafIdx()
		ni := li >> leafBits
		if int(ni) >= len(t.top) {
			return
		}
		if e := &t.top[ni]; e.node == nil && e.loc == 0 {
			skip := min(n, 1<<nodeBits-uint64(p)&(1<<nodeBits-1))
			p, n = p+pageNo(skip), n-skip
			continue
		}
		count := int(min(n, uint64(fan-p.slot())))
		t.clearLeaf(li, p.slot(), count)
		p, n = p+pageNo(count), n-uint64(count)
	}
}

// clearLeaf makes slots [slot, slot+count) of leaf li holes.
func (t *tree) clearLeaf(li uint32, slot, count int) {
	nd := t.top[li>>leafBits].node
	if nd.kids[li&(fan-1)] == nil && nd.locs[li&(fan-1)] == 0 {
		return
	}
	l := t.writable(li)
	t.mem -= l.mem()
	if count == fan {
		l.eachOwn(func(_ int, old atoll.Location) { t.led.kill(old) })
		l.wipe()
	} else {
		for s := slot; s < slot+count; s++ {
			old, known := l.own(s)
			t.led.kill(old)
			if !known || old != 0 {
				l.place(s, 0)
			}
		}
	}
	t.mem += l.mem()
}

// writable returns leaf li ready to be changed: made if absent, copied or
// overlaid if a frozen version shares it, and marked dirty.
func (t *tree) writable(li uint32) *leaf {
	nd := t.writableNode(li >> leafBits)
	k := li & (fan - 1)
	l := nd.kids[k]
	switch {
	case l == nil:
		l = &leaf{birth: t.epoch, whole: nd.locs[k] == 0, owed: nd.locs[k] != 0}
		nd.kids[k] = l
		t.ring = append(t.ring, li)
		t.mem += l.mem()
	case l.birth <= t.shared:
		t.mem -= l.mem()
		l = l.fork(t.epoch)
		nd.kids[k] = l
		t.mem += l.mem()
	}
	if !l.dirty {
		l.dirty = true
		t.dirtyN++
	}
	l.birth, l.used = t.epoch, true
	return l
}

func (t *tree) writableNode(ni uint32) *node {
	e := &t.top[ni]
	switch {
	case e.node == nil:
		atoll.Assert(e.loc == 0, "change of map node %d that is not loaded", ni)
		e.node = &node{}
	case e.node.birth <= t.shared:
		c := *e.node
		e.node = &c
	}
	e.node.birth, e.node.dirty = t.epoch, true
	return e.node
}

// installNode puts a loaded node in place. It reports false when the map went
// on meanwhile and loc is no longer what is wanted.
func (t *tree) installNode(ni uint32, loc atoll.Location, nd *node) bool {
	if int(ni) >= len(t.top) || t.top[ni].node != nil || t.top[ni].loc != loc {
		return false
	}
	nd.birth = t.top[ni].birth
	t.top[ni].node = nd
	return true
}

// installLeaf puts a loaded leaf in place, under whatever was written over it
// since. It reports false when loc is no longer what is wanted.
func (t *tree) installLeaf(li uint32, loc atoll.Location, base *leaf) bool {
	nd := t.nodeAt(int(li >> leafBits))
	k := li & (fan - 1)
	if nd == nil || nd.locs[k] != loc {
		return false
	}
	l := nd.kids[k]
	switch {
	case l == nil:
		base.birth, base.used = nd.births[k], true
		nd.kids[k] = base
		t.ring = append(t.ring, li)
		t.mem += base.mem()
		return true
	case l.below != nil || l.owed:
		t.mem -= l.mem()
		t.pull(l, base)
		t.mem += l.mem()
		return true
	}
	return false
}

// pull merges what the log holds, and all that lies below, under a leaf.
func (t *tree) pull(l, base *leaf) {
	switch {
	case l.below != nil:
		t.pull(l.below, base)
		t.merge(l, l.below)
	case l.owed:
		t.merge(l, base)
	}
}

// ledgerOf returns where changes of what l references are counted.
func (t *tree) ledgerOf(l *leaf) *ledger {
	for _, v := range t.frozen {
		if l.birth <= v.epoch {
			return v.led
		}
	}
	return t.led
}

// total returns how many pages are mapped.
func (t *tree) total() int64 {
	n := t.mapped + t.led.mapped
	for _, v := range t.frozen {
		n += v.led.mapped
	}
	return n
}

// merge slides b under u: what u does not know comes from b, and what of b is
// overridden by u is no longer live.
func (t *tree) merge(u, b *leaf) {
	atoll.Assert(b.below == nil, "a leaf is merged that is not whole below")
	led := t.ledgerOf(u)
	if u.whole {
		b.eachOwn(func(_ int, loc atoll.Location) { led.kill(loc) })
	} else {
		u.densify()
		b.eachOwn(func(s int, loc atoll.Location) {
			if u.set[s>>6]&(1<<(s&63)) != 0 {
				led.kill(loc)
				return
			}
			u.ents[s] = loc
			u.set[s>>6] |= 1 << (s & 63)
		})
		if b.whole {
			u.whole, u.set = true, nil
		}
	}
	u.owed, u.below = b.owed, nil
}

// evict drops clean leaves that were not used lately while more than limit
// bytes are held, looking at a bounded number of them.
func (t *tree) evict(limit int64) {
	for tries := 128; t.mem > limit && tries > 0 && len(t.ring) > 0; tries-- {
		if t.hand >= len(t.ring) {
			t.hand = 0
		}
		li := t.ring[t.hand]
		nd := t.top[li>>leafBits].node
		l := nd.kids[li&(fan-1)]
		switch {
		case l.dirty || l.owed || !l.whole || l.below != nil:
			t.hand++
		case l.used:
			l.used = false
			t.hand++
		default:
			t.mem -= l.mem()
			nd.kids[li&(fan-1)] = nil
			t.ring[t.hand] = t.ring[len(t.ring)-1]
			t.ring = t.ring[:len(t.ring)-1]
		}
	}
}

// dirtyBytes is what a checkpoint would have to write of leaves.
func (t *tree) dirtyBytes() int64 { return int64(t.dirtyN) * atoll.BlockSize }

// crowded reports whether dirty leaves may hold more than half of limit.
func (t *tree) crowded(limit int64) bool {
	return t.mem > limit && len(t.ring) > 0 && t.mem/int64(len(t.ring))*int64(t.dirtyN) > limit/2
}

// holes reports whether pages [p, p+n) are known to be holes as the tree stands
// in memory.
func (t *tree) holes(p pageNo, n uint64) bool {
	for n > 0 {
		li := p.leafIdx()
		if int(li>>leafBits) >= len(t.top) {
			return true
		}
		e := &t.top[li>>leafBits]
		size := uint64(fan - p.slot())
		switch {
		case e.node == nil && e.loc != 0:
			return false
		case e.node == nil:
			size = 1<<nodeBits - uint64(p)&(1<<nodeBits-1)
		default:
			l := e.node.kids[li&(fan-1)]
			if l == nil && e.node.locs[li&(fan-1)] != 0 || l != nil && (!l.whole || !l.empty()) {
				return false
			}
		}
		size = min(size, n)
		p, n = p+pageNo(size), n-size
	}
	return true
}
