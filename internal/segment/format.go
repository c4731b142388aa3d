package segment

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// A batch on disk, all numbers little-endian:
//
//	off  size
//	  0     4  magic "ATBH"
//	  4     1  version (1)
//	  5     1  flags (0)
//	  6     2  number of records
//	  8     2  number of payload blocks
//	 10     2  0
//	 12     4  CRC32C of the header block, this field taken as zero
//	 16    16  segment: medium (8), ordinal (4), copyset (4)
//	 32     4  offset of this header in the segment, in blocks
//	 36     4  CRC field of the batch before it in the segment, 0 for the first
//	 40     8  epoch of the writer
//	 48     8  sequence number of the first record in the medium's log
//	 56     4  blocks of the segment acknowledged by all copies when built
//	 60     4  0
//	 64     8  wall clock of the writer, nanoseconds since 1970
//	 72    56  0
//	128  56*n  records
//	  …   4*m  CRC32C of each payload block
//	  …        0 up to 4096
//	4096       payload: m blocks of 4096 bytes, in the order of the records
//
// A record:
//
//	 0     1  kind
//	 1     1  flags, by kind
//	 2     1  compression codec (0 = none)
//	 3     1  0
//	 4     2  payload blocks of this record
//	 6     2  payload blocks before compression (= the former without one)
//	 8     8  key, by kind
//	16     8  auxiliary value, by kind
//	24     4  encryption key id (0 = not encrypted)
//	28    12  nonce
//	40    16  authentication tag
//
// The header's CRC covers the payload's CRCs and, through the chain, all that
// comes before it in the segment.
const (
	batchMagic   = 0x48425441 // "ATBH"
	batchVersion = 1
	batchFixed   = 128
	recordSize   = 56
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeros      [4]byte // never written; a local would go to the heap
)

// CRC returns the CRC32C (Castagnoli) of p.
func CRC(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// Kind says what a record means. Kinds below 15 belong to package medium, 15 is
// KindShard, and from 16 on they belong to the kinds of media. A node does not
// look at them.
type Kind uint8

// Record describes a record: what a medium writes in one piece.
type Record struct {
	Kind   Kind
	Flags  uint8
	Blocks uint16 // payload blocks that follow
	Key    uint64
	Aux    uint64
}

// Fits reports whether a batch can hold n records with m payload blocks.
func Fits(n, m int) bool {
	return m <= atoll.MaxBatchBlocks && batchFixed+recordSize*n+4*m <= atoll.BlockSize
}

// Head is what all fields of a batch header but records and checksums say.
type Head struct {
	Segment atoll.SegmentID
	Offset  atoll.BlockNo // of the header block
	Prev    uint32        // checksum of the batch before, 0 for the first
	Epoch   atoll.Epoch
	Seq     uint64        // of the first record
	Acked   atoll.BlockNo // acknowledged by all copies when the batch was built
	Clock   time.Time
}

// EncodeHeader writes a batch header into p, which has BlockSize bytes, and
// returns its checksum, which is the next batch's Prev. crcs has one CRC32C for
// each payload block. It panics when Fits is false.
func EncodeHeader(p []byte, h *Head, recs []Record, crcs []uint32) uint32 {
	atoll.Assert(len(p) == atoll.BlockSize && Fits(len(recs), len(crcs)), "batch of %d records, %d blocks", len(recs), len(crcs))
	clear(p)
	le.PutUint32(p[0:], batchMagic)
	p[4] = batchVersion
	le.PutUint16(p[6:], uint16(len(recs)))
	le.PutUint16(p[8:], uint16(len(crcs)))
	le.PutUint64(p[16:], uint64(h.Segment.Medium))
	le.PutUint32(p[24:], uint32(h.Segment.Ordinal))
	le.PutUint32(p[28:], uint32(h.Segment.Copyset))
	le.PutUint32(p[32:], uint32(h.Offset))
	le.PutUint32(p[36:], h.Prev)
	le.PutUint64(p[40:], uint64(h.Epoch))
	le.PutUint64(p[48:], h.Seq)
	le.PutUint32(p[56:], uint32(h.Acked))
	le.PutUint64(p[64:], uint64(h.Clock.UnixNano()))
	q := p[batchFixed:]
	for i := range recs {
		r := &recs[i]
		q[0], q[1] = byte(r.Kind), r.Flags
		le.PutUint16(q[4:], r.Blocks)
		le.PutUint16(q[6:], r.Blocks)
		le.PutUint64(q[8:], r.Key)
		le.PutUint64(q[16:], r.Aux)
		q = q[recordSize:]
	}
	for _, c := range crcs {
		le.PutUint32(q, c)
		q = q[4:]
	}
	crc := CRC(p)
	le.PutUint32(p[12:], crc)
	return crc
}

// Header is a checked view of an encoded batch header. It does not own the
// bytes.
type Header struct{ p []byte }

// ParseHeader checks the block p as a batch header: magic, version, checksum and
// that its counts make sense. It returns ErrCorrupt, or ErrVersion for a newer
// format with a right checksum.
func ParseHeader(p []byte) (Header, error) {
	if len(p) < atoll.BlockSize || le.Uint32(p) != batchMagic {
		return Header{}, fmt.Errorf("parse batch header: no magic: %w", atoll.ErrCorrupt)
	}
	p = p[:atoll.BlockSize]
	crc := crcWithout(p, 12)
	if crc != le.Uint32(p[12:]) {
		return Header{}, fmt.Errorf("parse batch header: checksum %08x, stored %08x: %w", crc, le.Uint32(p[12:]), atoll.ErrCorrupt)
	}
	if p[4] != batchVersion {
		return Header{}, fmt.Errorf("parse batch header: version %d, this program knows %d: %w", p[4], batchVersion, atoll.ErrVersion)
	}
	h := Header{p}
	blocks := 0
	if Fits(h.Records(), h.Blocks()) {
		for i := range h.Records() {
			blocks += int(h.Record(i).Blocks)
		}
	}
	if !Fits(h.Records(), h.Blocks()) || blocks != h.Blocks() {
		return Header{}, fmt.Errorf("parse batch header: %d records and %d blocks do not agree: %w", h.Records(), h.Blocks(), atoll.ErrCorrupt)
	}
	return h, nil
}

// Head returns the fixed fields.
func (h Header) Head() Head {
	return Head{
		Segment: h.Segment(), Offset: h.Offset(), Prev: h.Prev(), Epoch: h.Epoch(),
		Seq: h.Seq(), Acked: h.Acked(), Clock: time.Unix(0, int64(le.Uint64(h.p[64:]))),
	}
}

// Segment returns the segment that the batch belongs to.
func (h Header) Segment() atoll.SegmentID {
	return atoll.SegmentID{
		Medium:  atoll.MediumID(le.Uint64(h.p[16:])),
		Ordinal: atoll.Ordinal(le.Uint32(h.p[24:])),
		Copyset: atoll.CopysetID(le.Uint32(h.p[28:])),
	}
}

// Offset returns where the header lies in the segment.
func (h Header) Offset() atoll.BlockNo { return atoll.BlockNo(le.Uint32(h.p[32:])) }

// Prev returns the checksum of the batch before.
func (h Header) Prev() uint32 { return le.Uint32(h.p[36:]) }

// Epoch returns the writer's epoch.
func (h Header) Epoch() atoll.Epoch { return atoll.Epoch(le.Uint64(h.p[40:])) }

// Seq returns the sequence number of the first record.
func (h Header) Seq() uint64 { return le.Uint64(h.p[48:]) }

// Acked returns the length acknowledged by all copies when the batch was built.
func (h Header) Acked() atoll.BlockNo { return atoll.BlockNo(le.Uint32(h.p[56:])) }

// Sum returns the header's own checksum.
func (h Header) Sum() uint32 { return le.Uint32(h.p[12:]) }

// Records returns the number of records.
func (h Header) Records() int { return int(le.Uint16(h.p[6:])) }

// Blocks returns the number of payload blocks.
func (h Header) Blocks() int { return int(le.Uint16(h.p[8:])) }

// Next returns the offset just past the batch.
func (h Header) Next() atoll.BlockNo { return h.Offset() + 1 + atoll.BlockNo(h.Blocks()) }

// Record returns record i.
func (h Header) Record(i int) Record {
	q := h.p[batchFixed+i*recordSize:]
	return Record{
		Kind: Kind(q[0]), Flags: q[1], Blocks: le.Uint16(q[4:]),
		Key: le.Uint64(q[8:]), Aux: le.Uint64(q[16:]),
	}
}

// BlockCRC returns the CRC32C of payload block i.
func (h Header) BlockCRC(i int) uint32 {
	return le.Uint32(h.p[batchFixed+h.Records()*recordSize+4*i:])
}

// Descriptor is a record with its place in the log: what recovery replays and
// what a sealed segment's footer lists.
type Descriptor struct {
	Record
	Seq   uint64        // of this record
	Block atoll.BlockNo // of its first payload block; of the batch header if it has none
}
