package segment

import (
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// A footer lies at the sealed length of its segment. It is a head block and a
// body, all numbers little-endian:
//
//	off  size
//	  0     4  magic "ATSF"
//	  4     1  version (1)
//	  5     3  0
//	  8     4  CRC32C of the head block, this field taken as zero
//	 12     4  CRC32C of the body, including its padding
//	 16    16  segment: medium (8), ordinal (4), copyset (4)
//	 32     4  sealed length in blocks = block number of this head
//	 36     4  number of batches
//	 40     4  checksum field of the last batch header, 0 if none
//	 44     4  0
//	 48     8  highest epoch of a batch
//	 56     8  sequence number after the last record
//	 64  4032  0
//	4096       body: CRC32C of each block below the length (4 bytes each), then
//	           the block number of each batch header (4 bytes each), then 0 up
//	           to a whole block
//
// With the block checksums any block can be read and verified alone; with the
// list of batches the headers, and so the records, can be read without the
// payload between them.
const (
	footerMagic   = 0x46535441 // "ATSF"
	footerVersion = 1
)

// FooterBlocks returns the size of the footer of a segment with that many
// batches and blocks (batch headers included). A writer keeps its segment's
// length plus this within the segment's size.
func FooterBlocks(batches, blocks int) atoll.BlockNo {
	return 1 + atoll.BlockNo((4*(batches+blocks)+atoll.BlockSize-1)/atoll.BlockSize)
}

// Footer is what a sealed segment knows of itself.
type Footer struct {
	Segment atoll.SegmentID
	Length  atoll.BlockNo // sealed
	Sum     uint32        // checksum of the last batch header, 0 if none
	Epoch   atoll.Epoch   // highest of a batch
	Seq     uint64        // after the last record
	Batches []atoll.BlockNo
	CRCs    []uint32 // of each block below Length

	bodyCRC uint32
	batches int
}

// Blocks returns the size of the encoded footer.
func (f *Footer) Blocks() atoll.BlockNo {
	return FooterBlocks(max(len(f.Batches), f.batches), int(f.Length))
}

// Encode writes the footer into p, which has f.Blocks() blocks.
func (f *Footer) Encode(p []byte) {
	atoll.Assert(len(f.CRCs) == int(f.Length) && len(p) == int(f.Blocks().Bytes()), "footer of %d blocks with %d checksums", f.Length, len(f.CRCs))
	clear(p)
	body := p[atoll.BlockSize:]
	q := body
	for _, c := range f.CRCs {
		le.PutUint32(q, c)
		q = q[4:]
	}
	for _, b := range f.Batches {
		le.PutUint32(q, uint32(b))
		q = q[4:]
	}
	le.PutUint32(p[0:], footerMagic)
	p[4] = footerVersion
	le.PutUint32(p[12:], CRC(body))
	putSegment(p[16:], f.Segment)
	le.PutUint32(p[32:], uint32(f.Length))
	le.PutUint32(p[36:], uint32(len(f.Batches)))
	le.PutUint32(p[40:], f.Sum)
	le.PutUint64(p[48:], uint64(f.Epoch))
	le.PutUint64(p[56:], f.Seq)
	le.PutUint32(p[8:], CRC(p[:atoll.BlockSize]))
}

// ParseFooterHead checks a footer's head block and returns what it says,
// without Batches and CRCs. It returns ErrCorrupt, or ErrVersion for a newer
// format with a right checksum. The caller checks Segment and Length against
// where the block lies.
func ParseFooterHead(p []byte) (Footer, error) {
	if len(p) < atoll.BlockSize || le.Uint32(p) != footerMagic {
		return Footer{}, fmt.Errorf("parse footer: no magic: %w", atoll.ErrCorrupt)
	}
	p = p[:atoll.BlockSize]
	if crc := crcWithout(p, 8); crc != le.Uint32(p[8:]) {
		return Footer{}, fmt.Errorf("parse footer: checksum %08x, stored %08x: %w", crc, le.Uint32(p[8:]), atoll.ErrCorrupt)
	}
	if p[4] != footerVersion {
		return Footer{}, fmt.Errorf("parse footer: version %d, this program knows %d: %w", p[4], footerVersion, atoll.ErrVersion)
	}
	f := Footer{
		Segment: getSegment(p[16:]), Length: atoll.BlockNo(le.Uint32(p[32:])),
		batches: int(le.Uint32(p[36:])), Sum: le.Uint32(p[40:]),
		Epoch: atoll.Epoch(le.Uint64(p[48:])), Seq: le.Uint64(p[56:]), bodyCRC: le.Uint32(p[12:]),
	}
	if f.Length >= atoll.MaxSegmentBlocks || f.batches > int(f.Length) {
		return Footer{}, fmt.Errorf("parse footer: %d batches in %d blocks: %w", f.batches, f.Length, atoll.ErrCorrupt)
	}
	return f, nil
}

// ParseBody checks the body p, of f.Blocks()-1 blocks, and fills Batches and
// CRCs.
func (f *Footer) ParseBody(p []byte) error {
	if len(p) != int(f.Blocks()-1)*atoll.BlockSize {
		return fmt.Errorf("parse footer of segment %v: body of %d bytes: %w", f.Segment, len(p), atoll.ErrCorrupt)
	}
	if crc := CRC(p); crc != f.bodyCRC {
		return fmt.Errorf("parse footer of segment %v: body checksum %08x, stored %08x: %w", f.Segment, crc, f.bodyCRC, atoll.ErrCorrupt)
	}
	crcs := make([]uint32, f.Length)
	for i := range crcs {
		crcs[i] = le.Uint32(p[4*i:])
	}
	p = p[4*len(crcs):]
	batches := make([]atoll.BlockNo, f.batches)
	for i := range batches {
		batches[i] = atoll.BlockNo(le.Uint32(p[4*i:]))
		if batches[i] >= f.Length || i == 0 && batches[i] != 0 || i > 0 && batches[i] <= batches[i-1] {
			return fmt.Errorf("parse footer of segment %v: batch %d at block %d: %w", f.Segment, i, batches[i], atoll.ErrCorrupt)
		}
	}
	f.CRCs, f.Batches = crcs, batches
	return nil
}

func putSegment(p []byte, id atoll.SegmentID) {
	le.PutUint64(p, uint64(id.Medium))
	le.PutUint32(p[8:], uint32(id.Ordinal))
	le.PutUint32(p[12:], uint32(id.Copyset))
}

func getSegment(p []byte) atoll.SegmentID {
	return atoll.SegmentID{
		Medium:  atoll.MediumID(le.Uint64(p)),
		Ordinal: atoll.Ordinal(le.Uint32(p[8:])),
		Copyset: atoll.CopysetID(le.Uint32(p[12:])),
	}
}
