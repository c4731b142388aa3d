package medium

import (
	"fmt"
	"sort"

	"github.com/atollstore/atoll/internal/atoll"
)

// A remap record tells where the blocks of a compacted segment went, so that
// no index that names the old places has to change:
//
//	 0  4  magic "ATMP"   4  1  version (1)   5  3  0
//	 8  4  checksum      12  4  length
//	16  8  medium        24  4  ordinal of the compacted segment
//	28  4  number of runs
//	32     runs in ascending order of the old block, 16 bytes each:
//	       old block, blocks, new ordinal, new block

// move is one run of a remap.
type move struct {
	Old     atoll.BlockNo
	Blocks  atoll.BlockNo
	Ordinal atoll.Ordinal
	New     atoll.BlockNo
}

// remap is the decoded record.
type remap struct {
	Medium  atoll.MediumID
	Ordinal atoll.Ordinal
	Moves   []move
}

func (r *remap) encode() []byte {
	p := frame(magicRemap, remapFixed+remapRun*len(r.Moves))
	le.PutUint64(p[16:], uint64(r.Medium))
	le.PutUint32(p[24:], uint32(r.Ordinal))
	le.PutUint32(p[28:], uint32(len(r.Moves)))
	for i, v := range r.Moves {
		q := p[remapFixed+remapRun*i:]
		le.PutUint32(q[0:], uint32(v.Old))
		le.PutUint32(q[4:], uint32(v.Blocks))
		le.PutUint32(q[8:], uint32(v.Ordinal))
		le.PutUint32(q[12:], uint32(v.New))
	}
	return finish(p)
}

func parseRemap(p []byte) (*remap, error) {
	p, err := unframe("remap", p, magicRemap, remapFixed)
	if err != nil {
		return nil, err
	}
	r := &remap{Medium: atoll.MediumID(le.Uint64(p[16:])), Ordinal: atoll.Ordinal(le.Uint32(p[24:]))}
	n := int(le.Uint32(p[28:]))
	if n > atoll.MaxSegmentBlocks || len(p) != remapFixed+n*remapRun {
		return nil, fmt.Errorf("parse remap: %d runs in %d bytes: %w", n, len(p), atoll.ErrCorrupt)
	}
	end := uint64(0)
	for i := range n {
		q := p[remapFixed+remapRun*i:]
		v := move{
			Old: atoll.BlockNo(le.Uint32(q[0:])), Blocks: atoll.BlockNo(le.Uint32(q[4:])),
			Ordinal: atoll.Ordinal(le.Uint32(q[8:])), New: atoll.BlockNo(le.Uint32(q[12:])),
		}
		if v.Blocks == 0 || v.Ordinal == 0 || uint64(v.Old) < end || uint64(v.Old)+uint64(v.Blocks) > atoll.MaxSegmentBlocks {
			return nil, fmt.Errorf("parse remap of segment %d: run %d makes no sense: %w", r.Ordinal, i, atoll.ErrCorrupt)
		}
		end = uint64(v.Old) + uint64(v.Blocks)
		r.Moves = append(r.Moves, v)
	}
	return r, nil
}

// find returns where block went and how many blocks from there on lie together.
// When block did not move, ok is false and n counts the blocks up to the next
// one that did (at least 1).
func (r *remap) find(block atoll.BlockNo) (o atoll.Ordinal, at, n atoll.BlockNo, ok bool) {
	i := sort.Search(len(r.Moves), func(i int) bool { return r.Moves[i].Old+r.Moves[i].Blocks > block })
	if i == len(r.Moves) {
		return 0, 0, atoll.MaxSegmentBlocks, false
	}
	v := r.Moves[i]
	if block < v.Old {
		return 0, 0, v.Old - block, false
	}
	return v.Ordinal, v.New + (block - v.Old), v.Blocks - (block - v.Old), true
}
