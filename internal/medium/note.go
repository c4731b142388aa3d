package medium

import (
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// A note repeats in the log what the head says in the catalog. One is written
// after every roll of the hot lane, so that media can be found again from the
// nodes alone when the catalog is lost:
//
//	 0  4  magic "ATMN"   4  1  version (1)   5  3  0
//	 8  4  checksum      12  4  length
//	16  8  medium        24  8  epoch
//	32 20  manifest      52  4  next ordinal
//	56  4  number of segments                60  4  0
//	64     segments, 36 bytes each:
//
//	 0  1  0 sealed, 1 unsealed, 2 dropped   1  1  lane
//	 2  1  number of unverified copies       3  1  0
//	 4  4  ordinal        8  4  copyset     12  4  length, or size if unsealed
//	16 20  nodes with unverified copies

const (
	noteSealed = iota
	noteUnsealed
	noteDropped
)

// encodeNote returns the note of a head in whole blocks.
func encodeNote(h *catalog.Head) []byte {
	p := frame(magicNote, noteVersion, noteFixed)
	le.PutUint64(p[16:], uint64(h.Medium))
	le.PutUint64(p[24:], uint64(h.Epoch))
	putRef(p[32:], fromBlockRef(h.Manifest))
	le.PutUint32(p[52:], uint32(h.Next))
	le.PutUint32(p[56:], uint32(len(h.Sealed)+len(h.Unsealed)+len(h.Dropped)))
	add := func(what byte, lane catalog.Lane, seg atoll.SegmentID, length atoll.BlockNo, unverified []atoll.NodeID) {
		var q [noteEntry]byte
		q[0], q[1], q[2] = what, byte(lane), byte(len(unverified))
		le.PutUint32(q[4:], uint32(seg.Ordinal))
		le.PutUint32(q[8:], uint32(seg.Copyset))
		le.PutUint32(q[12:], uint32(length))
		for i, n := range unverified {
			le.PutUint32(q[16+4*i:], uint32(n))
		}
		p = append(p, q[:]...)
	}
	for _, s := range h.Sealed {
		add(noteSealed, s.Lane, s.Seg, s.Length, s.Unverified)
	}
	for _, u := range h.Unsealed {
		add(noteUnsealed, u.Lane, u.Seg, u.Size, nil)
	}
	for _, d := range h.Dropped {
		add(noteDropped, 0, d, 0, nil)
	}
	return finish(p)
}

// parseNote decodes a note into the head it repeats, without its owner.
func parseNote(p []byte) (*catalog.Head, error) {
	p, err := unframe("note", p, magicNote, noteVersion, noteFixed)
	if err != nil {
		return nil, err
	}
	h := &catalog.Head{
		Medium: atoll.MediumID(le.Uint64(p[16:])), Epoch: atoll.Epoch(le.Uint64(p[24:])),
		Next: atoll.Ordinal(le.Uint32(p[52:])),
	}
	if r := getRef(p[32:]); !r.IsZero() {
		h.Manifest = r.blockRef(h.Medium)
	}
	n := int(le.Uint32(p[56:]))
	if n > len(p) || len(p) != noteFixed+n*noteEntry {
		return nil, fmt.Errorf("parse note: %d segments in %d bytes: %w", n, len(p), atoll.ErrCorrupt)
	}
	for q := p[noteFixed:]; len(q) > 0; q = q[noteEntry:] {
		if q[2] > atoll.MaxCopies || q[0] > noteDropped {
			return nil, fmt.Errorf("parse note: a segment makes no sense: %w", atoll.ErrCorrupt)
		}
		addNoted(h, q)
	}
	return h, nil
}

func addNoted(h *catalog.Head, q []byte) {
	seg := atoll.SegmentID{Medium: h.Medium, Ordinal: atoll.Ordinal(le.Uint32(q[4:])), Copyset: atoll.CopysetID(le.Uint32(q[8:]))}
	length, lane := atoll.BlockNo(le.Uint32(q[12:])), catalog.Lane(q[1])
	var nodes []atoll.NodeID
	for i := range int(q[2]) {
		nodes = append(nodes, atoll.NodeID(le.Uint32(q[16+4*i:])))
	}
	switch q[0] {
	case noteSealed:
		h.Sealed = append(h.Sealed, catalog.Sealed{Seg: seg, Lane: lane, Length: length, Unverified: nodes})
	case noteUnsealed:
		h.Unsealed = append(h.Unsealed, catalog.Unsealed{Seg: seg, Lane: lane, Size: length})
	default:
		h.Dropped = append(h.Dropped, seg)
	}
}

func fromBlockRef(b *catalog.BlockRef) Ref {
	if b == nil {
		return Ref{}
	}
	return Ref{Ordinal: b.Seg.Ordinal, Copyset: b.Seg.Copyset, Block: b.Block, Blocks: b.Blocks, CRC: b.CRC}
}

func (r Ref) blockRef(m atoll.MediumID) *catalog.BlockRef {
	return &catalog.BlockRef{Seg: r.segment(m), Block: r.Block, Blocks: r.Blocks, CRC: r.CRC}
}

// segment returns the id of the segment that r points into.
func (r Ref) segment(m atoll.MediumID) atoll.SegmentID {
	return atoll.SegmentID{Medium: m, Ordinal: r.Ordinal, Copyset: r.Copyset}
}
