package pebblefs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

// Kinds of records.
const (
	// kindData is blocks of a file in the hot lane. Key is the file's number,
	// Aux is the first block's index in the file << 16 | bytes in the last block.
	kindData = medium.FirstKind + iota
	// kindOps is a list of operations.
	kindOps
	// kindBulk is blocks of a file in the bulk lane, with key and aux as
	// kindData; an operation in the hot lane makes them count.
	kindBulk
	// kindPart is a part of a table that is too long for the medium's root.
	kindPart
)

// Lists of operations, tables and the root have one frame; numbers in it are
// little-endian, and what follows are unsigned varints and strings (length as
// varint, bytes):
//
//	 0  4  magic: "ATPO" operations, "ATPT" table, "ATPR" root of parts
//	 4  1  version (1)   5  3  0
//	 8  4  CRC32C of the whole, this field taken as zero
//	12  4  length in bytes
//	16     contents
//
// Operations: code, then
//
//	1 create  number, name          5 mkdir   name
//	2 link    old name, new name    6 extent  number, first block, blocks,
//	3 rename  old name, new name              ordinal, block
//	4 remove  name                  7 size    number, bytes
//
// Table: next number; count of directories, their names; count of files, of
// each: number, size, count of extents (first block, blocks, ordinal, block
// each), count of names, names.
//
// Root of parts: length of the table; count of parts, of each: ordinal, block,
// blocks.
const (
	magicOps   = 0x4f505441 // "ATPO"
	magicTable = 0x54505441 // "ATPT"
	magicParts = 0x52505441 // "ATPR"
	version    = 1
	frameSize  = 16

	inlineTable = 512 << 10
	partBlocks  = 256
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

type opCode uint8

const (
	opCreate opCode = iota + 1
	opLink
	opRename
	opRemove
	opMkdir
	opExtent
	opSize
)

// op is a change of the table.
type op struct {
	code opCode
	id   uint64
	name string // or old name
	to   string // new name
	ext  extent
	size int64
}

// extent is a run of blocks of a file that lie together in the log.
type extent struct {
	first   uint64 // index in the file
	blocks  uint32
	ordinal atoll.Ordinal
	block   atoll.BlockNo
}

func newFrame(magic uint32) []byte {
	p := make([]byte, frameSize, 512)
	le.PutUint32(p, magic)
	p[4] = version
	return p
}

func finishFrame(p []byte) []byte {
	le.PutUint32(p[12:], uint32(len(p)))
	le.PutUint32(p[8:], frameCRC(p))
	return p
}

func frameCRC(p []byte) uint32 {
	var zero [4]byte
	c := crc32.Update(0, castagnoli, p[:8])
	c = crc32.Update(c, castagnoli, zero[:])
	return crc32.Update(c, castagnoli, p[12:])
}

// openFrame checks a frame and returns a reader of its contents.
func openFrame(p []byte, magic uint32) (*reader, error) {
	if len(p) < frameSize || le.Uint32(p) != magic {
		return nil, fmt.Errorf("parse file table: no magic: %w", atoll.ErrCorrupt)
	}
	n := le.Uint32(p[12:])
	if n < frameSize || uint64(n) > uint64(len(p)) {
		return nil, fmt.Errorf("parse file table: length %d of %d: %w", n, len(p), atoll.ErrCorrupt)
	}
	p = p[:n]
	if frameCRC(p) != le.Uint32(p[8:]) {
		return nil, fmt.Errorf("parse file table: wrong checksum: %w", atoll.ErrCorrupt)
	}
	if p[4] != version {
		return nil, fmt.Errorf("parse file table: version %d, this program knows %d: %w", p[4], version, atoll.ErrVersion)
	}
	return &reader{p: p[frameSize:]}, nil
}

// reader takes numbers and strings; after bad bytes it gives zeros.
type reader struct {
	p   []byte
	bad bool
}

func (r *reader) num() uint64 {
	v, n := binary.Uvarint(r.p)
	if n <= 0 {
		r.bad, r.p = true, nil
		return 0
	}
	r.p = r.p[n:]
	return v
}

func (r *reader) str() string {
	n := r.num()
	if n > uint64(len(r.p)) {
		r.bad, r.p = true, nil
		return ""
	}
	s := string(r.p[:n])
	r.p = r.p[n:]
	return s
}

// count takes the length of a list whose elements have at least one byte.
func (r *reader) count() int {
	n := r.num()
	if n > uint64(len(r.p)) {
		r.bad, r.p = true, nil
		return 0
	}
	return int(n)
}

func (r *reader) extent() extent {
	e := extent{first: r.num(), blocks: uint32(r.num()), ordinal: atoll.Ordinal(r.num()), block: atoll.BlockNo(r.num())}
	if e.blocks == 0 || e.blocks > atoll.MaxSegmentBlocks || e.ordinal == 0 || e.first > 1<<40 {
		r.bad = true
	}
	return e
}

// end returns an error if bytes were bad or are left over.
func (r *reader) end() error {
	if r.bad || len(r.p) > 0 {
		return fmt.Errorf("parse file table: contents make no sense: %w", atoll.ErrCorrupt)
	}
	return nil
}

func appendNum(p []byte, vs ...uint64) []byte {
	for _, v := range vs {
		p = binary.AppendUvarint(p, v)
	}
	return p
}

func appendStr(p []byte, ss ...string) []byte {
	for _, s := range ss {
		p = append(binary.AppendUvarint(p, uint64(len(s))), s...)
	}
	return p
}

func appendExtent(p []byte, e extent) []byte {
	return appendNum(p, e.first, uint64(e.blocks), uint64(e.ordinal), uint64(e.block))
}

func appendOp(p []byte, o *op) []byte {
	p = append(p, byte(o.code))
	switch o.code {
	case opCreate:
		p = appendStr(appendNum(p, o.id), o.name)
	case opLink, opRename:
		p = appendStr(p, o.name, o.to)
	case opRemove, opMkdir:
		p = appendStr(p, o.name)
	case opExtent:
		p = appendExtent(appendNum(p, o.id), o.ext)
	case opSize:
		p = appendNum(p, o.id, uint64(o.size))
	}
	return p
}

// parseOps decodes a list of operations.
func parseOps(p []byte) ([]op, error) {
	r, err := openFrame(p, magicOps)
	if err != nil {
		return nil, err
	}
	var ops []op
	for len(r.p) > 0 && !r.bad {
		o := op{code: opCode(r.p[0])}
		r.p = r.p[1:]
		switch o.code {
		case opCreate:
			o.id, o.name = r.num(), r.str()
		case opLink, opRename:
			o.name, o.to = r.str(), r.str()
		case opRemove, opMkdir:
			o.name = r.str()
		case opExtent:
			o.id, o.ext = r.num(), r.extent()
		case opSize:
			o.id, o.size = r.num(), int64(r.num())
		default:
			r.bad = true
		}
		ops = append(ops, o)
	}
	return ops, r.end()
}

// encodeTable returns the table in its frame.
func (t *tree) encode() []byte {
	p := appendNum(newFrame(magicTable), t.next)
	dirs := t.dirs()
	p = appendStr(appendNum(p, uint64(len(dirs))), dirs...)
	files := t.files()
	p = appendNum(p, uint64(len(files)))
	for _, f := range files {
		p = appendNum(p, f.ino.id, uint64(f.ino.logged), uint64(len(f.ino.extents)))
		for _, e := range f.ino.extents {
			p = appendExtent(p, e)
		}
		p = appendStr(appendNum(p, uint64(len(f.names))), f.names...)
	}
	return finishFrame(p)
}

// parseTable decodes a table.
func parseTable(p []byte) (*tree, error) {
	r, err := openFrame(p, magicTable)
	if err != nil {
		return nil, err
	}
	t := newTree()
	t.next = r.num()
	for range r.count() {
		t.names[r.str()] = &inode{dir: true}
	}
	for range r.count() {
		ino := newInode(r.num())
		ino.logged = int64(r.num())
		ino.size = ino.logged
		for range r.count() {
			ino.extents = append(ino.extents, r.extent())
		}
		for range r.count() {
			t.names[r.str()] = ino
			ino.links++
		}
		t.byID[ino.id] = ino
		if r.bad {
			break
		}
	}
	return t, r.end()
}

// dataAux packs where the blocks of a record belong in their file.
func dataAux(first uint64, last int) uint64 { return first<<16 | uint64(last) }

// dataPlace is the inverse, and gives the file's size as far as the record tells.
func dataPlace(rec segment.Record, ordinal atoll.Ordinal, block atoll.BlockNo) (e extent, size int64, err error) {
	e = extent{first: rec.Aux >> 16, blocks: uint32(rec.Blocks), ordinal: ordinal, block: block}
	last := int64(rec.Aux & 0xffff)
	if e.blocks == 0 || last == 0 || last > atoll.BlockSize {
		return e, 0, fmt.Errorf("data record of file %d: %d blocks, %d bytes in the last: %w", rec.Key, e.blocks, last, atoll.ErrCorrupt)
	}
	return e, (int64(e.first)+int64(e.blocks)-1)*atoll.BlockSize + last, nil
}
