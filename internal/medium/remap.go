package medium

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
	"sort"

	"github.com/atollstore/atoll/internal/atoll"
)

// A remap record tells where the blocks of a compacted segment went, so that
// no index that names the old places has to change. The blocks that moved, in
// ascending order, fill the runs one after the other:
//
//	 0  4  magic "ATMP"   4  1  version (2)   5  3  0
//	 8  4  checksum      12  4  length
//	16  8  medium        24  4  ordinal of the compacted segment
//	28  4  number of 64-bit words of the bitmap
//	32  4  number of runs                    36  4  0
//	40     the bitmap: bit i%64 of word i/64 is set when block i moved
//	       runs, 12 bytes each: ordinal, block, blocks
//
// Version 1 has at 28 the number of its moves and, from 32 on, for each of them
// old block, blocks, new ordinal and new block, 4 bytes each.
const (
	remapFixed   = 40
	remapRunSize = 12
	remapFixed1  = 32
	remapMove1   = 16
	maxWords     = atoll.MaxSegmentBlocks / 64
)

// move tells where some neighbouring blocks of a segment went.
type move struct {
	Old     atoll.BlockNo
	Blocks  atoll.BlockNo
	Ordinal atoll.Ordinal
	New     atoll.BlockNo
}

// run is a piece of a segment that holds blocks that moved there.
type run struct {
	Ordinal atoll.Ordinal
	Block   atoll.BlockNo
	Blocks  atoll.BlockNo
}

// remap is the decoded record. It never changes. A segment of 64 MiB takes 3 KiB
// however scattered the blocks are that moved.
type remap struct {
	Medium  atoll.MediumID
	Ordinal atoll.Ordinal
	bits    []uint64 // blocks that moved
	rank    []uint32 // how many moved before each word
	runs    []run
	starts  []uint32 // how many moved before each run
}

// newRemap makes a remap of moves, which it sorts. They must not overlap.
func newRemap(m atoll.MediumID, o atoll.Ordinal, moves []move) *remap {
	r := &remap{Medium: m, Ordinal: o}
	slices.SortFunc(moves, func(a, b move) int { return cmp.Compare(a.Old, b.Old) })
	if n := len(moves); n > 0 {
		last := moves[n-1]
		r.bits = make([]uint64, (last.Old+last.Blocks+63)/64)
	}
	for _, v := range moves {
		for b := v.Old; b < v.Old+v.Blocks; b++ {
			atoll.Assert(r.bits[b/64]>>(b%64)&1 == 0, "block %d of segment %d moved twice", b, o)
			r.bits[b/64] |= 1 << (b % 64)
		}
		if n := len(r.runs); n > 0 && r.runs[n-1].Ordinal == v.Ordinal && r.runs[n-1].Block+r.runs[n-1].Blocks == v.New {
			r.runs[n-1].Blocks += v.Blocks
		} else {
			r.runs = append(r.runs, run{v.Ordinal, v.New, v.Blocks})
		}
	}
	r.index()
	return r
}

// index counts what find needs, and returns how many blocks moved and how many
// the runs have room for.
func (r *remap) index() (moved, room uint64) {
	r.rank, r.starts = make([]uint32, len(r.bits)), make([]uint32, len(r.runs))
	for i, w := range r.bits {
		r.rank[i] = uint32(moved)
		moved += uint64(bits.OnesCount64(w))
	}
	for i := range r.runs {
		r.starts[i] = uint32(room)
		room += uint64(r.runs[i].Blocks)
	}
	return moved, room
}

// moves is the inverse of newRemap: the pieces that stayed together, ascending.
func (r *remap) moves() (list []move) {
	for b := atoll.BlockNo(0); int(b) < 64*len(r.bits); {
		o, at, n, ok := r.find(b)
		if ok {
			list = append(list, move{b, n, o, at})
		}
		b += n
	}
	return list
}

// into adds up how many blocks went to each segment.
func (r *remap) into() map[atoll.Ordinal]int32 {
	sum := map[atoll.Ordinal]int32{}
	for _, v := range r.runs {
		sum[v.Ordinal] += int32(v.Blocks)
	}
	return sum
}

func (r *remap) encode() []byte {
	p := frame(magicRemap, remapVersion, remapFixed+8*len(r.bits)+remapRunSize*len(r.runs))
	le.PutUint64(p[16:], uint64(r.Medium))
	le.PutUint32(p[24:], uint32(r.Ordinal))
	le.PutUint32(p[28:], uint32(len(r.bits)))
	le.PutUint32(p[32:], uint32(len(r.runs)))
	q := p[remapFixed:]
	for _, w := range r.bits {
		le.PutUint64(q, w)
		q = q[8:]
	}
	for _, v := range r.runs {
		le.PutUint32(q[0:], uint32(v.Ordinal))
		le.PutUint32(q[4:], uint32(v.Block))
		le.PutUint32(q[8:], uint32(v.Blocks))
		q = q[remapRunSize:]
	}
	return finish(p)
}

func parseRemap(p []byte) (*remap, error) {
	p, err := unframe("remap", p, magicRemap, remapVersion, remapFixed1)
	if err != nil {
		return nil, err
	}
	r := &remap{Medium: atoll.MediumID(le.Uint64(p[16:])), Ordinal: atoll.Ordinal(le.Uint32(p[24:]))}
	if p[4] == 1 {
		return parseRemap1(r, p)
	}
	bad := func(what string) (*remap, error) {
		return nil, fmt.Errorf("parse remap of segment %d: %s: %w", r.Ordinal, what, atoll.ErrCorrupt)
	}
	if len(p) < remapFixed {
		return bad("too short")
	}
	words, runs := int(le.Uint32(p[28:])), int(le.Uint32(p[32:]))
	if words > maxWords || runs > atoll.MaxSegmentBlocks || len(p) != remapFixed+8*words+remapRunSize*runs {
		return bad("counts do not agree with length")
	}
	q := p[remapFixed:]
	for range words {
		r.bits = append(r.bits, le.Uint64(q))
		q = q[8:]
	}
	for range runs {
		v := run{atoll.Ordinal(le.Uint32(q)), atoll.BlockNo(le.Uint32(q[4:])), atoll.BlockNo(le.Uint32(q[8:]))}
		if v.Ordinal == 0 || v.Blocks == 0 || uint64(v.Block)+uint64(v.Blocks) > atoll.MaxSegmentBlocks {
			return bad("a run makes no sense")
		}
		r.runs = append(r.runs, v)
		q = q[remapRunSize:]
	}
	if moved, room := r.index(); moved != room {
		return bad("its runs do not hold what moved")
	}
	return r, nil
}

func parseRemap1(r *remap, p []byte) (*remap, error) {
	n := int(le.Uint32(p[28:]))
	if n > atoll.MaxSegmentBlocks || len(p) != remapFixed1+n*remapMove1 {
		return nil, fmt.Errorf("parse remap: %d runs in %d bytes: %w", n, len(p), atoll.ErrCorrupt)
	}
	var moves []move
	end := uint64(0)
	for i := range n {
		q := p[remapFixed1+remapMove1*i:]
		v := move{
			Old: atoll.BlockNo(le.Uint32(q[0:])), Blocks: atoll.BlockNo(le.Uint32(q[4:])),
			Ordinal: atoll.Ordinal(le.Uint32(q[8:])), New: atoll.BlockNo(le.Uint32(q[12:])),
		}
		if v.Blocks == 0 || v.Ordinal == 0 || uint64(v.Old) < end || uint64(v.Old)+uint64(v.Blocks) > atoll.MaxSegmentBlocks ||
			uint64(v.New)+uint64(v.Blocks) > atoll.MaxSegmentBlocks {
			return nil, fmt.Errorf("parse remap of segment %d: run %d makes no sense: %w", r.Ordinal, i, atoll.ErrCorrupt)
		}
		end = uint64(v.Old) + uint64(v.Blocks)
		moves = append(moves, v)
	}
	return newRemap(r.Medium, r.Ordinal, moves), nil
}

// find returns where block went and how many blocks from there on lie together.
// When block did not move, ok is false and n counts the blocks up to the next
// one that did (at least 1).
func (r *remap) find(block atoll.BlockNo) (o atoll.Ordinal, at, n atoll.BlockNo, ok bool) {
	w := int(block / 64)
	if w >= len(r.bits) {
		return 0, 0, atoll.MaxSegmentBlocks, false
	}
	word, bit := r.bits[w], uint(block%64)
	if word>>bit&1 == 0 {
		return 0, 0, r.span(block, 0), false
	}
	i := r.rank[w] + uint32(bits.OnesCount64(word&(1<<bit-1)))
	k := sort.Search(len(r.starts), func(k int) bool { return r.starts[k] > i }) - 1
	v, off := r.runs[k], atoll.BlockNo(i-r.starts[k])
	return v.Ordinal, v.Block + off, min(v.Blocks-off, r.span(block, 1)), true
}

// span returns how many bits from block on are equal to bit; beyond the bitmap
// all are 0.
func (r *remap) span(block atoll.BlockNo, bit uint64) (n atoll.BlockNo) {
	for b := block; ; {
		w := int(b / 64)
		if w >= len(r.bits) {
			if bit == 0 {
				return atoll.MaxSegmentBlocks
			}
			return n
		}
		word := r.bits[w] >> (b % 64)
		if bit == 1 {
			word = ^word
		}
		room := 64 - uint(b%64)
		if same := uint(bits.TrailingZeros64(word)); same < room {
			return n + atoll.BlockNo(same)
		}
		n += atoll.BlockNo(room)
		b += atoll.BlockNo(room)
	}
}
