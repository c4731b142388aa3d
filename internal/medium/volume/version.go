package volume

import (
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
)

// version is a frozen state of a tree that shares its nodes and leaves. While
// it is being written out, finished parts get their new places here, in the
// versions frozen later and in the tree.
type version struct {
	t      *tree
	top    []topEntry
	epoch  uint32
	size   int64
	led    *ledger
	mapped int64 // pages mapped, but for what led tells
	flat   bool
}

// freeze fixes the present state as a version and opens a new epoch. Frozen
// versions are written and finished in order. The cost of one is 24 bytes per GiB
// of the volume.
func (t *tree) freeze(size int64) *version {
	v := &version{t: t, top: slices.Clone(t.top), epoch: t.epoch, size: size, led: t.led, mapped: t.mapped, flat: t.flat}
	t.shared, t.frozen = t.epoch, append(t.frozen, v)
	t.epoch++
	t.led = t.led.heir()
	t.dirtyN = 0
	return v
}

// nextDirty returns the first dirty leaf of v from li on.
func (v *version) nextDirty(li uint32) (uint32, bool) {
	for ni := li >> leafBits; int(ni) < len(v.top); ni++ {
		nd := v.top[ni].node
		if nd == nil || !nd.dirty {
			continue
		}
		k := uint32(0)
		if ni == li>>leafBits {
			k = li & (fan - 1)
		}
		for ; k < fan; k++ {
			if l := nd.kids[k]; l != nil && l.dirty && l.birth <= v.epoch {
				return ni<<leafBits | k, true
			}
		}
	}
	return 0, false
}

// leaf returns leaf li of v and its place in the log.
func (v *version) leaf(li uint32) (*leaf, atoll.Location) {
	nd := v.top[li>>leafBits].node
	return nd.kids[li&(fan-1)], nd.locs[li&(fan-1)]
}

// mergeFrozen merges what the log holds for leaf li under the frozen leaf.
func (t *tree) mergeFrozen(v *version, li uint32, base *leaf) {
	l, _ := v.leaf(li)
	if !l.owed {
		return
	}
	t.mergeIn(li, l, base)
}

// mergeIn merges b under leaf li of some state, perhaps of the present one too.
func (t *tree) mergeIn(li uint32, u, b *leaf) {
	cur := t.top[li>>leafBits].node.kids[li&(fan-1)] == u
	if cur {
		t.mem -= u.mem()
	}
	t.merge(u, b)
	if cur {
		t.mem += u.mem()
	}
}

// leafWritten tells that leaf li of v, the oldest frozen version, now lies at loc
// (0 when it is all holes).
func (t *tree) leafWritten(v *version, li uint32, loc atoll.Location) {
	k := li & (fan - 1)
	fn := v.top[li>>leafBits].node
	l := fn.kids[k]
	atoll.Assert(l.whole && !l.owed && l.below == nil, "leaf %d was written before it was whole", li)
	v.led.killNode(fn.locs[k], fn.births[k], 1)
	v.led.addNode(loc, 1)
	fn.locs[k], fn.births[k] = loc, l.birth
	l.dirty = false
	for _, w := range t.frozen[1:] {
		t.leafMoved(w.top[li>>leafBits].node, fn, li, l)
	}
	t.leafMoved(t.top[li>>leafBits].node, fn, li, l)
}

// leafMoved brings a node of a later state in line with node fn, of which leaf li
// was written.
func (t *tree) leafMoved(nd, fn *node, li uint32, l *leaf) {
	k := li & (fan - 1)
	if nd == fn {
		return
	}
	nd.locs[k], nd.births[k] = fn.locs[k], fn.births[k]
	if u := nd.kids[k]; u != nil && u.below == l {
		t.mergeIn(li, u, l)
	}
}

// nextDirtyNode returns the first dirty node of v from ni on.
func (v *version) nextDirtyNode(ni uint32) (uint32, bool) {
	for ; int(ni) < len(v.top); ni++ {
		if nd := v.top[ni].node; nd != nil && nd.dirty && nd.birth <= v.epoch {
			return ni, true
		}
	}
	return 0, false
}

// nodeWritten tells that node ni of v, the oldest frozen version, now lies at loc
// (0 when it has no leaf).
func (t *tree) nodeWritten(v *version, ni uint32, loc atoll.Location) {
	e := &v.top[ni]
	v.led.killNode(e.loc, e.birth, nodeBlocks)
	v.led.addNode(loc, nodeBlocks)
	e.loc, e.birth, e.node.dirty = loc, e.node.birth, false
	for _, w := range t.frozen[1:] {
		w.top[ni].loc, w.top[ni].birth = e.loc, e.birth
	}
	t.top[ni].loc, t.top[ni].birth = e.loc, e.birth
}

// finish ends the sharing with v, the oldest frozen version, after it was written
// as a whole and is the root, or part of it. When it did not become so, its
// changes of liveness count as those of what comes next; its leaves and nodes
// have their new places all the same.
func (t *tree) finish(v *version, root bool) {
	next := t.thaw(v)
	if root {
		t.mapped = v.mapped + v.led.mapped
		if len(t.frozen) > 0 {
			t.frozen[0].mapped = t.mapped
		}
	} else {
		next.fold(v.led)
	}
}

// thaw takes away the oldest frozen version and returns the ledger that follows.
func (t *tree) thaw(v *version) *ledger {
	atoll.Assert(len(t.frozen) > 0 && t.frozen[0] == v, "another map version is frozen")
	t.frozen[0] = nil
	if t.frozen = t.frozen[1:]; len(t.frozen) > 0 {
		return t.frozen[0].led
	}
	t.shared, t.frozen = 0, nil
	return t.led
}

// abandon ends the sharing when v, the only frozen version, could not be written as a whole: what was not
// written of it is dirty in the tree again, and its changes of liveness count
// as the tree's.
func (t *tree) abandon(v *version) {
	atoll.Assert(len(t.frozen) == 1, "one of several frozen map versions is given up")
	for ni := range v.top {
		fn, cur := v.top[ni].node, t.nodeAt(ni)
		if fn == nil || !fn.dirty {
			continue
		}
		cur.dirty = true
		for k, l := range fn.kids {
			if l == nil || !l.dirty || l.birth > v.epoch {
				continue
			}
			u := cur.kids[k]
			switch {
			case u == l:
				t.dirtyN++
			case u.below == l:
				t.mem -= u.mem()
				t.merge(u, l)
				t.mem += u.mem()
			default:
				u.owed = u.owed || l.owed
			}
		}
	}
	t.thaw(v).fold(v.led)
}

func (t *tree) nodeAt(ni int) *node {
	if ni >= len(t.top) {
		return nil
	}
	return t.top[ni].node
}
