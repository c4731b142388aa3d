package medium

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// Kinds of records that belong to this package.
const (
	kindManifest segment.Kind = 1 // root of a manifest
	kindChunk    segment.Kind = 2 // part of the segment table
	kindRoot     segment.Kind = 3 // root of the kind, when it is not inline
	kindRemap    segment.Kind = 4 // where blocks of a compacted segment went
	kindNote     segment.Kind = 5 // what the head says, after each roll
	kindMark     segment.Kind = 6 // where a mark was taken; no payload
	kindVersions segment.Kind = 7 // page of the list of versions
	kindVerRoot  segment.Kind = 8 // root of the kind of a version

	// FirstKind is the lowest record kind that a kind of medium may use.
	FirstKind segment.Kind = 16
)

// All numbers are little-endian. Every record is padded with zeros to whole
// blocks; "length" counts the bytes before padding, and the checksum (CRC32C)
// covers them with its own field taken as zero.
//
// A reference to bytes in the log, 20 bytes, all zero for none:
//
//	 0  4  ordinal      4  4  copyset     8  4  block    12  4  blocks
//	16  4  CRC32C of the blocks
//
// The root of a manifest:
//
//	  0   4  magic "ATMR"
//	  4   1  version (2)
//	  5   3  0
//	  8   4  checksum
//	 12   4  length
//	 16   8  medium
//	 24   8  epoch of the owner that wrote it
//	 32   8  serial number of the manifest
//	 40   4  mark: ordinal          44  4  mark: block
//	 48   8  mark: sequence number of the first record to replay
//	 56   4  mark: bulk segments below this ordinal were sealed
//	 60   4  next ordinal when written
//	 64   8  version that the present state grew from, 0 for none
//	 72   8  version named release, 0 for none
//	 80  20  reference to the kind's root, zero when it is inline
//	100   8  highest number given to a version
//	108  12  0
//	120   4  length of the kind's root
//	124   4  number of chunk references
//	128   4  number of references to pages of versions
//	132   4  number of the first chunk; every segment of those before is gone
//	136      the kind's root if inline
//	         chunk references, 20 bytes each; chunk i covers the ordinals from
//	         i*512+1 on; none means that every segment of it is gone
//	         references to pages of versions, each the page's number (4) and
//	         the reference (20)
//
// In version 1 there is nothing from 64 to 79 and from 100 to 119. At 128 it has
// the number of versions, which follow the chunk references:
//
//	 0   8  number            8   8  time, nanoseconds since 1970
//	16   8  sequence number  24  20  root of the kind   44  20  0
//	64   2  length of name   66   2  length of memo     68  name, memo
//
// Page i of the versions has those with the numbers from 128*i on:
//
//	 0   4  magic "ATMV"   4  1  version (1)   5  3  0
//	 8   4  checksum      12  4  length
//	16   8  medium        24  4  number of the page  28  4  number of versions
//	32      versions in the order of their numbers:
//
//	 0   8  number                 8  8  time, nanoseconds since 1970
//	16   8  parent version        24  8  place in the hot lane (check bits 0)
//	32   8  sequence number       40  8  size in bytes
//	48   8  bytes mapped          56  8  bytes only it has, -1 if not known
//	64   4  epoch of the kind     68  4  flags: 1 deleting, 2 internal, 4 protected
//	72  20  root of the kind      92  4  length of the root
//	96   2  length of name        98  2  length of memo
//	100  2  number of properties 102  2  0
//	104     name, memo, properties in the order of their names: length of the
//	        name (2), name, length of the value (2), value
//
// A chunk of the segment table:
//
//	 0   4  magic "ATMC"   4  1  version (2, or 3 with a coded segment)   5  3  0
//	 8   4  checksum      12  4  length
//	16   8  medium        24  4  first ordinal  28  4  number of entries
//	32      entries, 64 bytes each:
//
//	 0   1  state          1   1  lane     2  1  number of unverified copies
//	 3   1  flags: 1 = a compacted segment was removed from all nodes (new in 2)
//	 4   4  copyset        8   4  length in blocks
//	12   4  live blocks   16   4  size as made, in blocks, 0 not known (new in 2)
//	20   1  data shards of a coded segment   21   1  parity shards (new in 3)
//	22   2  0
//	24  20  remap         44  20  nodes with unverified copies
const (
	magicManifest = 0x524d5441 // "ATMR"
	magicChunk    = 0x434d5441 // "ATMC"
	magicRemap    = 0x504d5441 // "ATMP"
	magicNote     = 0x4e4d5441 // "ATMN"
	magicVersions = 0x564d5441 // "ATMV"

	// Newest versions of the records.
	manifestVersion = 2
	chunkVersion    = 3
	remapVersion    = 2
	noteVersion     = 1
	pageVersion     = 1

	refSize     = 20
	rootFixed   = 136
	pageRefSize = 24

	versionFixed1 = 68
	chunkFixed    = 32
	entrySize     = 64
	noteFixed     = 64
	noteEntry     = 36

	// chunkEntries is the number of ordinals that a chunk covers.
	chunkEntries = 512
	// inlineRoot is the longest root of a kind that lies in the manifest's root.
	inlineRoot = 2048
	// MaxRoot is the longest root of a kind in bytes.
	MaxRoot = 1 << 20
	// maxChunks bounds the table: 33 million segments.
	maxChunks = 1 << 16
	// pageVersions is the number of version numbers that a page covers.
	pageVersions = 128
	// maxPages bounds the list of pages that a manifest's root can hold.
	maxPages = 1 << 15
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Ref points at a record in the log of a medium. The zero Ref points nowhere.
type Ref struct {
	Ordinal atoll.Ordinal
	Copyset atoll.CopysetID
	Block   atoll.BlockNo
	Blocks  atoll.BlockNo
	CRC     uint32 // CRC32C of the blocks
}

// IsZero reports whether r points nowhere.
func (r Ref) IsZero() bool { return r == Ref{} }

// Mark is a position in the hot lane: replay starts there.
type Mark struct {
	Ordinal atoll.Ordinal // segment; records of earlier ones are not replayed
	Block   atoll.BlockNo // in that segment
	Seq     uint64        // sequence number of the first record to replay
	Bulk    atoll.Ordinal // bulk segments below were sealed when it was taken

	count int64 // blocks the kind had appended to the hot lane since Open
}

// state of a segment in the table.
type state uint8

const (
	stateNone    state = iota // not known here
	stateOpen                 // the head knows more: unsealed when the chunk was written
	stateLive                 // sealed, in use
	stateDropped              // nothing in it is used; nodes are to remove it
	stateGone                 // dropped, and every node has answered that it is removed
	stateVirtual              // compacted away; every live block is in the remap
)

// entry is what the table says of one segment.
type entry struct {
	State      state
	Lane       catalog.Lane
	Code       catalog.Code // of a coded segment, of which Length counts the data
	Copyset    atoll.CopysetID
	Length     atoll.BlockNo
	Live       int32
	Size       atoll.BlockNo // as made: what it takes on disks; 0 not known
	Remap      Ref
	Removed    bool // virtual, and no node holds it any more
	Unverified []atoll.NodeID
}

// codeFits reports whether the code of an entry can be that of its state.
func (e *entry) codeFits() bool {
	if e.Code == (catalog.Code{}) {
		return e.Lane != catalog.Shards || e.State != stateLive && e.State != stateVirtual
	}
	return e.Lane == catalog.Shards && e.Length > 0 && e.shape().Check() == nil && e.shape().Blocks() == e.Length
}

// shape returns how a segment is spread.
func (e *entry) shape() segment.Shape {
	if e.Code.Data == 0 {
		return segment.Shape{}
	}
	return segment.ShapeFor(e.Code.Data, e.Code.Parity, e.Length)
}

// body is the bytes of a segment, as nodes have them.
type body struct {
	seg   atoll.SegmentID
	shape segment.Shape // of a coded one
}

// body returns where the bytes of a segment are.
func (e *entry) body(m atoll.MediumID, o atoll.Ordinal) body {
	return body{atoll.SegmentID{Medium: m, Ordinal: o, Copyset: e.Copyset}, e.shape()}
}

// read fills dst from a block on.
func (b body) read(ctx context.Context, nodes *stream.Nodes, block atoll.BlockNo, dst []byte) error {
	return b.readSums(ctx, nodes, block, dst, nil)
}

// readSums is read, and sets sums, unless nil, to the checksums of the blocks.
func (b body) readSums(ctx context.Context, nodes *stream.Nodes, block atoll.BlockNo, dst []byte, sums []uint32) error {
	if b.shape.IsCoded() {
		return nodes.ReadCoded(ctx, b.seg, b.shape, block, dst, sums)
	}
	return nodes.ReadSums(ctx, b.seg, block, dst, sums)
}

// manifest is the decoded root of a manifest, with its versions.
type manifest struct {
	Medium     atoll.MediumID
	Epoch      atoll.Epoch
	Serial     uint64
	Mark       Mark
	Next       atoll.Ordinal
	CurParent  uint64
	Release    uint64
	LastNumber uint64
	Root       []byte // inline root of the kind
	RootRef    Ref    // or where it is
	RootLen    int
	First      int // number of the first chunk in Chunks
	Chunks     []Ref
	Pages      []pageRef
	Versions   []Version // what the pages say, in the order of numbers
}

// pageRef tells where a page of versions is.
type pageRef struct {
	Page uint32
	Ref  Ref
}

func putRef(p []byte, r Ref) {
	le.PutUint32(p[0:], uint32(r.Ordinal))
	le.PutUint32(p[4:], uint32(r.Copyset))
	le.PutUint32(p[8:], uint32(r.Block))
	le.PutUint32(p[12:], uint32(r.Blocks))
	le.PutUint32(p[16:], r.CRC)
}

func getRef(p []byte) Ref {
	return Ref{
		Ordinal: atoll.Ordinal(le.Uint32(p[0:])), Copyset: atoll.CopysetID(le.Uint32(p[4:])),
		Block: atoll.BlockNo(le.Uint32(p[8:])), Blocks: atoll.BlockNo(le.Uint32(p[12:])),
		CRC: le.Uint32(p[16:]),
	}
}

// frame starts a record: magic, version and room for checksum and length.
func frame(magic uint32, version byte, fixed int) []byte {
	p := make([]byte, fixed, max(fixed, atoll.BlockSize))
	le.PutUint32(p[0:], magic)
	p[4] = version
	return p
}

// finish stores length and checksum and pads to whole blocks.
func finish(p []byte) []byte {
	n := len(p)
	le.PutUint32(p[12:], uint32(n))
	le.PutUint32(p[8:], frameCRC(p))
	return append(p, make([]byte, -n&(atoll.BlockSize-1))...)
}

func frameCRC(p []byte) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, p[:8])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, p[12:])
}

// unframe checks magic, checksum and version, which p[4] tells, and returns the
// bytes of the record without padding.
func unframe(what string, p []byte, magic uint32, newest byte, fixed int) ([]byte, error) {
	if len(p) < fixed || le.Uint32(p) != magic {
		return nil, fmt.Errorf("parse %s: no magic: %w", what, atoll.ErrCorrupt)
	}
	n := int(le.Uint32(p[12:]))
	if n < fixed || n > len(p) {
		return nil, fmt.Errorf("parse %s: length %d of %d: %w", what, n, len(p), atoll.ErrCorrupt)
	}
	p = p[:n]
	if c := frameCRC(p); c != le.Uint32(p[8:]) {
		return nil, fmt.Errorf("parse %s: checksum %08x, stored %08x: %w", what, c, le.Uint32(p[8:]), atoll.ErrCorrupt)
	}
	if p[4] > newest {
		return nil, fmt.Errorf("parse %s: version %d, this program knows %d: %w", what, p[4], newest, atoll.ErrVersion)
	}
	if p[4] == 0 {
		return nil, fmt.Errorf("parse %s: no version: %w", what, atoll.ErrCorrupt)
	}
	return p, nil
}

// encode returns the root record in whole blocks.
func (m *manifest) encode() []byte {
	p := frame(magicManifest, manifestVersion, rootFixed)
	le.PutUint64(p[16:], uint64(m.Medium))
	le.PutUint64(p[24:], uint64(m.Epoch))
	le.PutUint64(p[32:], m.Serial)
	le.PutUint32(p[40:], uint32(m.Mark.Ordinal))
	le.PutUint32(p[44:], uint32(m.Mark.Block))
	le.PutUint64(p[48:], m.Mark.Seq)
	le.PutUint32(p[56:], uint32(m.Mark.Bulk))
	le.PutUint32(p[60:], uint32(m.Next))
	le.PutUint64(p[64:], m.CurParent)
	le.PutUint64(p[72:], m.Release)
	putRef(p[80:], m.RootRef)
	le.PutUint64(p[100:], m.LastNumber)
	le.PutUint32(p[120:], uint32(m.RootLen))
	le.PutUint32(p[124:], uint32(len(m.Chunks)))
	le.PutUint32(p[128:], uint32(len(m.Pages)))
	le.PutUint32(p[132:], uint32(m.First))
	p = append(p, m.Root...)
	for _, c := range m.Chunks {
		p = append(p, make([]byte, refSize)...)
		putRef(p[len(p)-refSize:], c)
	}
	for _, g := range m.Pages {
		p = le.AppendUint32(p, g.Page)
		p = append(p, make([]byte, refSize)...)
		putRef(p[len(p)-refSize:], g.Ref)
	}
	return finish(p)
}

// parseManifest decodes a root record, without what its version pages say. The
// result does not share memory with p.
func parseManifest(p []byte) (*manifest, error) {
	p, err := unframe("manifest", p, magicManifest, manifestVersion, rootFixed)
	if err != nil {
		return nil, err
	}
	m := &manifest{
		Medium: atoll.MediumID(le.Uint64(p[16:])), Epoch: atoll.Epoch(le.Uint64(p[24:])), Serial: le.Uint64(p[32:]),
		Mark: Mark{
			Ordinal: atoll.Ordinal(le.Uint32(p[40:])), Block: atoll.BlockNo(le.Uint32(p[44:])),
			Seq: le.Uint64(p[48:]), Bulk: atoll.Ordinal(le.Uint32(p[56:])),
		},
		Next: atoll.Ordinal(le.Uint32(p[60:])), RootRef: getRef(p[80:]),
		RootLen: int(le.Uint32(p[120:])), First: int(le.Uint32(p[132:])),
	}
	chunks, pages := int(le.Uint32(p[124:])), int(le.Uint32(p[128:]))
	if p[4] >= 2 {
		m.CurParent, m.Release, m.LastNumber = le.Uint64(p[64:]), le.Uint64(p[72:]), le.Uint64(p[100:])
	}
	q := p[rootFixed:]
	bad := fmt.Errorf("parse manifest of medium %v: counts do not agree with length: %w", m.Medium, atoll.ErrCorrupt)
	if m.RootLen > MaxRoot || chunks > maxChunks || m.First > 1<<23 || pages > maxPages {
		return nil, bad
	}
	inline := 0
	if m.RootRef.IsZero() {
		inline = m.RootLen
	}
	if need := inline + chunks*refSize + pages*pageRefSize; p[4] >= 2 && len(q) != need || len(q) < inline+chunks*refSize {
		return nil, bad
	}
	if inline > 0 {
		m.Root = append([]byte(nil), q[:inline]...)
	}
	q = q[inline:]
	for range chunks {
		m.Chunks = append(m.Chunks, getRef(q))
		q = q[refSize:]
	}
	if p[4] == 1 {
		return m, m.versions1(q, pages)
	}
	for i := range pages {
		m.Pages = append(m.Pages, pageRef{le.Uint32(q), getRef(q[4:])})
		if i > 0 && m.Pages[i].Page <= m.Pages[i-1].Page {
			return nil, fmt.Errorf("parse manifest of medium %v: pages out of order: %w", m.Medium, atoll.ErrCorrupt)
		}
		q = q[pageRefSize:]
	}
	return m, nil
}

// versions1 decodes the versions of format 1.
func (m *manifest) versions1(q []byte, n int) error {
	bad := fmt.Errorf("parse manifest of medium %v: versions do not agree with length: %w", m.Medium, atoll.ErrCorrupt)
	for range n {
		if len(q) < versionFixed1 {
			return bad
		}
		v := Version{
			Number: le.Uint64(q[0:]), Time: time.Unix(0, int64(le.Uint64(q[8:]))), Seq: le.Uint64(q[16:]),
			Root: getRef(q[24:]), Unique: -1,
		}
		name, memo := int(le.Uint16(q[64:])), int(le.Uint16(q[66:]))
		if q = q[versionFixed1:]; len(q) < name+memo || v.Root.Blocks > MaxRoot/atoll.BlockSize || v.Number <= m.LastNumber {
			return bad
		}
		v.RootLen = int(v.Root.Blocks.Bytes())
		v.Name, v.Memo, q = string(q[:name]), string(q[name:name+memo]), q[name+memo:]
		m.Versions, m.LastNumber = append(m.Versions, v), v.Number
	}
	if len(q) != 0 {
		return bad
	}
	return nil
}

// encodeChunk returns a chunk record in whole blocks.
func encodeChunk(medium atoll.MediumID, first atoll.Ordinal, entries []entry) []byte {
	version := byte(2)
	if slices.ContainsFunc(entries, func(e entry) bool { return e.Code.Data != 0 }) {
		version = chunkVersion
	}
	p := frame(magicChunk, version, chunkFixed+entrySize*len(entries))
	le.PutUint64(p[16:], uint64(medium))
	le.PutUint32(p[24:], uint32(first))
	le.PutUint32(p[28:], uint32(len(entries)))
	for i := range entries {
		putEntry(p[chunkFixed+entrySize*i:], &entries[i])
	}
	return finish(p)
}

func putEntry(q []byte, e *entry) {
	q[0], q[1], q[2] = byte(e.State), byte(e.Lane), byte(len(e.Unverified))
	if e.Removed {
		q[3] = 1
	}
	le.PutUint32(q[4:], uint32(e.Copyset))
	le.PutUint32(q[8:], uint32(e.Length))
	le.PutUint32(q[12:], uint32(e.Live))
	le.PutUint32(q[16:], uint32(e.Size))
	q[20], q[21] = byte(e.Code.Data), byte(e.Code.Parity)
	putRef(q[24:], e.Remap)
	for i, n := range e.Unverified {
		le.PutUint32(q[44+4*i:], uint32(n))
	}
}

// parseChunk decodes a chunk record.
func parseChunk(p []byte) (medium atoll.MediumID, first atoll.Ordinal, entries []entry, err error) {
	p, err = unframe("chunk of a segment table", p, magicChunk, chunkVersion, chunkFixed)
	if err != nil {
		return 0, 0, nil, err
	}
	medium, first = atoll.MediumID(le.Uint64(p[16:])), atoll.Ordinal(le.Uint32(p[24:]))
	n := int(le.Uint32(p[28:]))
	if n > chunkEntries || len(p) != chunkFixed+n*entrySize {
		return 0, 0, nil, fmt.Errorf("parse chunk of a segment table: %d entries in %d bytes: %w", n, len(p), atoll.ErrCorrupt)
	}
	entries = make([]entry, n)
	for i := range entries {
		q := p[chunkFixed+entrySize*i:]
		e := &entries[i]
		*e = entry{
			State: state(q[0]), Lane: catalog.Lane(q[1]), Copyset: atoll.CopysetID(le.Uint32(q[4:])),
			Length: atoll.BlockNo(le.Uint32(q[8:])), Live: int32(le.Uint32(q[12:])),
			Remap: getRef(q[24:]),
		}
		if p[4] >= 2 {
			e.Size, e.Removed = atoll.BlockNo(le.Uint32(q[16:])), q[3]&1 != 0
		}
		if p[4] >= 3 {
			e.Code = catalog.Code{Data: int(q[20]), Parity: int(q[21])}
		}
		if e.State > stateVirtual || q[2] > atoll.MaxCopies || e.Lane > catalog.Shards || !e.codeFits() {
			return 0, 0, nil, fmt.Errorf("parse chunk of a segment table: entry %d makes no sense: %w", i, atoll.ErrCorrupt)
		}
		for j := range int(q[2]) {
			e.Unverified = append(e.Unverified, atoll.NodeID(le.Uint32(q[44+4*j:])))
		}
	}
	return medium, first, entries, nil
}
