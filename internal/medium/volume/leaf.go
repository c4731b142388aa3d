package volume

import (
	"unsafe"

	"github.com/atollstore/atoll/internal/atoll"
)

// sparseMax is how many entries a leaf holds as a list before it becomes an
// array of all 512.
const sparseMax = 24

// leaf maps 2 MiB. It is a list or an array of what was put into it, over what
// lies below: nothing when it is whole, else another leaf in memory that is
// being written out, else the leaf in the log.
type leaf struct {
	birth uint32
	dirty bool // differs from what the log holds
	// whole: every slot is known; one that was never put is a hole.
	whole bool
	// owed: what the entries replace in the log's leaf is still counted live.
	owed bool
	used bool // looked at since eviction last came by
	ents *[fan]atoll.Location
	set  *[fan / 64]uint64 // which of ents were put; nil when whole
	list []sparse          // when ents is nil
	// below is a frozen leaf that is not whole yet; nil in most leaves.
	below *leaf
}

// sparse is one entry of a short leaf.
type sparse struct {
	loc  atoll.Location
	slot uint16
}

// mem estimates the bytes the leaf holds.
func (l *leaf) mem() int64 {
	n := int64(unsafe.Sizeof(*l)) + int64(cap(l.list))*int64(unsafe.Sizeof(sparse{})) + 4
	if l.ents != nil {
		n += int64(unsafe.Sizeof(*l.ents))
	}
	if l.set != nil {
		n += int64(unsafe.Sizeof(*l.set))
	}
	return n
}

// get returns the location in a slot, looking below where needed. It reports
// false when only the log knows. A nil leaf is all holes.
func (l *leaf) get(slot int) (atoll.Location, bool) {
	if l == nil {
		return 0, true
	}
	for ; l != nil; l = l.below {
		if loc, known := l.own(slot); known {
			return loc, true
		}
	}
	return 0, false
}

// own returns the location in a slot as this leaf alone knows it.
func (l *leaf) own(slot int) (loc atoll.Location, known bool) {
	if l.ents != nil {
		if l.set == nil || l.set[slot>>6]&(1<<(slot&63)) != 0 {
			return l.ents[slot], true
		}
		return 0, false
	}
	for i := range l.list {
		if l.list[i].slot == uint16(slot) {
			return l.list[i].loc, true
		}
	}
	return 0, l.whole
}

// place sets a slot.
func (l *leaf) place(slot int, loc atoll.Location) {
	if l.ents == nil {
		for i := range l.list {
			if l.list[i].slot == uint16(slot) {
				l.list[i].loc = loc
				return
			}
		}
		if len(l.list) < sparseMax {
			l.list = append(l.list, sparse{loc, uint16(slot)})
			return
		}
		l.densify()
	}
	l.ents[slot] = loc
	if l.set != nil {
		l.set[slot>>6] |= 1 << (slot & 63)
	}
}

// densify turns the list into an array.
func (l *leaf) densify() {
	if l.ents != nil {
		return
	}
	l.ents = new([fan]atoll.Location)
	if !l.whole {
		l.set = new([fan / 64]uint64)
	}
	for _, e := range l.list {
		l.ents[e.slot] = e.loc
		if l.set != nil {
			l.set[e.slot>>6] |= 1 << (e.slot & 63)
		}
	}
	l.list = nil
}

// wipe makes every slot a hole. Whether it is owed does not change.
func (l *leaf) wipe() {
	l.whole, l.ents, l.set, l.list = true, nil, nil, nil
}

// eachOwn calls fn for every slot that was put here, in no special order.
func (l *leaf) eachOwn(fn func(slot int, loc atoll.Location)) {
	for _, e := range l.list {
		fn(int(e.slot), e.loc)
	}
	if l.ents == nil {
		return
	}
	for s := range fan {
		if l.set == nil || l.set[s>>6]&(1<<(s&63)) != 0 {
			fn(s, l.ents[s])
		}
	}
}

// fork returns a leaf of a new epoch that may be changed without changing l:
// a copy when l is whole, else an empty overlay.
func (l *leaf) fork(epoch uint32) *leaf {
	if !l.whole {
		return &leaf{birth: epoch, owed: true, below: l}
	}
	c := &leaf{birth: epoch, whole: true}
	if l.ents != nil {
		e := *l.ents
		c.ents = &e
	}
	if len(l.list) > 0 {
		c.list = append(c.list, l.list...)
	}
	return c
}

// empty reports whether a whole leaf has only holes.
func (l *leaf) empty() bool {
	for _, e := range l.list {
		if e.loc != 0 {
			return false
		}
	}
	return l.ents == nil || *l.ents == [fan]atoll.Location{}
}

// encode writes a whole leaf as 512 locations into p.
func (l *leaf) encode(p []byte) {
	clear(p)
	if l.ents != nil {
		for s, loc := range l.ents {
			le.PutUint64(p[8*s:], uint64(loc))
		}
	}
	for _, e := range l.list {
		le.PutUint64(p[8*int(e.slot):], uint64(e.loc))
	}
}

// decodeLeaf is the inverse of encode.
func decodeLeaf(p []byte) *leaf {
	l := &leaf{whole: true, ents: new([fan]atoll.Location)}
	for s := range l.ents {
		l.ents[s] = atoll.Location(le.Uint64(p[8*s:]))
	}
	return l
}
