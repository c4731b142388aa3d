package volume

import (
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
)

// version is a frozen state of a tree that shares its nodes and leaves. While
// it is being written out, finished parts get their new places both here and
// in the tree.
type version struct {
	t      *tree
	top    []topEntry
	epoch  uint32
	size   int64
	led    *ledger
	mapped int64 // pages mapped, but for what led tells
	flat   bool
}

// freeze fixes the present state as a version and opens a new epoch. There is
// one frozen version at a time. Its cost is 24 bytes per GiB of the volume.
func (t *tree) freeze(size int64) *version {
	atoll.Assert(t.frozen == nil, "a map version is frozen already")
	v := &version{t: t, top: slices.Clone(t.top), epoch: t.epoch, size: size, led: t.led, mapped: t.mapped, flat: t.flat}
	t.shared, t.frozen = t.epoch, t.led
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
	cur := t.top[li>>leafBits].node.kids[li&(fan-1)] == l
	if cur {
		t.mem -= l.mem()
	}
	t.merge(l, base)
	if cur {
		t.mem += l.mem()
	}
}

// leafWritten tells that leaf li of v now lies at loc (0 when it is all holes).
func (t *tree) leafWritten(v *version, li uint32, loc atoll.Location) {
	k := li & (fan - 1)
	fn, cur := v.top[li>>leafBits].node, t.top[li>>leafBits].node
	l := fn.kids[k]
	atoll.Assert(l.whole && !l.owed && l.below == nil, "leaf %d was written before it was whole", li)
	v.led.killNode(fn.locs[k], fn.births[k], 1)
	v.led.addNode(loc, 1)
	fn.locs[k], fn.births[k] = loc, l.birth
	l.dirty = false
	if cur == fn {
		return
	}
	cur.locs[k], cur.births[k] = loc, l.birth
	if u := cur.kids[k]; u != nil && u.below == l {
		t.mem -= u.mem()
		t.merge(u, l)
		t.mem += u.mem()
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

// nodeWritten tells that node ni of v now lies at loc (0 when it has no leaf).
func (t *tree) nodeWritten(v *version, ni uint32, loc atoll.Location) {
	e := &v.top[ni]
	v.led.killNode(e.loc, e.birth, nodeBlocks)
	v.led.addNode(loc, nodeBlocks)
	e.loc, e.birth, e.node.dirty = loc, e.node.birth, false
	t.top[ni].loc, t.top[ni].birth = e.loc, e.birth
}

// finish ends the sharing after v was written as a whole and is the root, or
// part of it. When it did not become so, its changes of liveness count as the
// tree's; its leaves and nodes have their new places all the same.
func (t *tree) finish(v *version, root bool) {
	atoll.Assert(t.frozen == v.led, "another map version is frozen")
	t.shared, t.frozen = 0, nil
	if root {
		t.mapped = v.mapped + v.led.mapped
	} else {
		t.led.fold(v.led)
	}
}

// abandon ends the sharing when v could not be written as a whole: what was not
// written of it is dirty in the tree again, and its changes of liveness count
// as the tree's.
func (t *tree) abandon(v *version) {
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
	t.led.fold(v.led)
	t.shared, t.frozen = 0, nil
}

func (t *tree) nodeAt(ni int) *node {
	if ni >= len(t.top) {
		return nil
	}
	return t.top[ni].node
}
