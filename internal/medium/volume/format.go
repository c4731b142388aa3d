package volume

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// Records of a volume. All but the map's go to the hot lane and are replayed.
//
//	kind          key              aux            payload
//	16 data       first page       0              the pages
//	17 discard    first page       pages          none
//	18 resize     new size, bytes  0              none
//	19 map leaf   number of leaf   birth epoch    1 block
//	20 map node   number of node   birth epoch    2 blocks
//	21 snapshot   number           0              1 block: event
//	22 restore    number           target         1 block: event
const (
	kindData segment.Kind = 16 + iota
	kindDiscard
	kindResize
	kindLeaf
	kindNode
	kindSnapshot
	kindRestore
)

// A map leaf is one block: 512 locations of 8 bytes, little-endian, 0 for a
// hole. The record's key, its checksum and the check bits in the node that
// points at it identify it.
//
// A map node is two blocks, little-endian:
//
//	   0     4  magic "ATVN"
//	   4     1  version (1)
//	   5     3  0
//	   8     8  medium
//	  16     8  number of the node (GiB of the volume)
//	  24     4  epoch of its last change
//	  28     4  CRC32C of the second block
//	  32    32  0
//	  64    64  a bit per leaf: the location is a run of 512 blocks, not a leaf
//	            (reserved, 0)
//	 128  4096  locations of the 512 leaves, 0 for none
//	4224  2048  epochs of the leaves' last changes
//	6272        0
//
// The root, which the medium keeps in its manifest:
//
//	 0  4  magic "ATVR"
//	 4  1  version (1)
//	 5  1  1 when the map names no block of an ancestor, though there are some
//	 6  2  0
//	 8  8  medium
//	16  8  size of the volume in bytes
//	24  4  epoch of the map
//	28  4  number of top entries
//	32  8  mapped pages
//	40  4  number of top entries that are not 0
//	44  4  CRC32C of the root, this field taken as zero
//	48  8  number of the last version whose record the map has the effect of
//	56  8  0
//	64     a bit per top entry, set when it is not 0, padded to whole bytes
//	 …     for each set bit: location of the node (8), epoch of its change (4)
//
// The payload of a snapshot or restore record is one block, little-endian:
//
//	 0  4  magic "ATVE"
//	 4  1  version (1)
//	 5  1  0
//	 6  2  flags of the version
//	 8  8  medium
//	16  8  number of the version that keeps the state at the record
//	24  8  number of the version that this state grew from, 0 for none
//	32  8  time, nanoseconds since 1970
//	40  8  restore: number of the version that is the state after the record
//	48  8  size of the volume at the record, in bytes
//	56  4  CRC32C of the block, this field taken as zero
//	60  2  length of the name
//	62  2  length of the memo
//	64  2  number of properties
//	66  2  0
//	68     name, memo, then for each property in order of its key: length of
//	       the key (2), length of the value (2), key, value
const (
	magicNode     = 0x4e565441 // "ATVN"
	magicRoot     = 0x52565441 // "ATVR"
	formatVersion = 1
	nodeLocs      = 128
	nodeBirths    = nodeLocs + 8*fan
	rootFixed     = 64
	rootEntry     = 12
	maxTop        = atoll.MaxVolumeSize >> (nodeBits + 12)
)

// Keys for the check bits of map blocks, so that no page passes for one.
const (
	leafKey = 1 << 61
	nodeKey = 1 << 62
)

var le = binary.LittleEndian

// checkBits folds a block's CRC32C with the medium and the key of the block.
func checkBits(crc uint32, m atoll.MediumID, key uint64) uint16 {
	h := (uint64(m) ^ bits.RotateLeft64(key*0x9e3779b97f4a7c15, 31)) * 0xff51afd7ed558ccd
	x := crc ^ uint32(h>>32)
	return uint16(x ^ x>>16)
}

// encodeNode writes a node into p, which has nodeBlocks blocks.
func encodeNode(p []byte, m atoll.MediumID, ni uint32, nd *node) {
	clear(p)
	le.PutUint32(p, magicNode)
	p[4] = formatVersion
	le.PutUint64(p[8:], uint64(m))
	le.PutUint64(p[16:], uint64(ni))
	le.PutUint32(p[24:], nd.birth)
	for k := range nd.locs {
		le.PutUint64(p[nodeLocs+8*k:], uint64(nd.locs[k]))
		le.PutUint32(p[nodeBirths+4*k:], nd.births[k])
	}
	le.PutUint32(p[28:], segment.CRC(p[atoll.BlockSize:]))
}

// decodeNode is the inverse of encodeNode. ErrCorrupt, ErrVersion.
func decodeNode(p []byte, m atoll.MediumID, ni uint32) (*node, error) {
	if len(p) != nodeBlocks*atoll.BlockSize || le.Uint32(p) != magicNode {
		return nil, fmt.Errorf("parse map node %d: no magic: %w", ni, atoll.ErrCorrupt)
	}
	if p[4] != formatVersion {
		return nil, fmt.Errorf("parse map node %d: version %d, this program knows %d: %w", ni, p[4], formatVersion, atoll.ErrVersion)
	}
	if le.Uint64(p[8:]) != uint64(m) || le.Uint64(p[16:]) != uint64(ni) {
		return nil, fmt.Errorf("parse map node %d: it says node %d of medium %016x: %w", ni, le.Uint64(p[16:]), le.Uint64(p[8:]), atoll.ErrCorrupt)
	}
	if segment.CRC(p[atoll.BlockSize:]) != le.Uint32(p[28:]) {
		return nil, fmt.Errorf("parse map node %d: checksum of the second block: %w", ni, atoll.ErrCorrupt)
	}
	nd := &node{birth: le.Uint32(p[24:])}
	for k := range nd.locs {
		nd.locs[k] = atoll.Location(le.Uint64(p[nodeLocs+8*k:]))
		nd.births[k] = le.Uint32(p[nodeBirths+4*k:])
	}
	return nd, nil
}

// rootInfo is what a root says beside the top entries.
type rootInfo struct {
	Medium atoll.MediumID
	Size   int64
	Epoch  uint32
	Mapped int64
	Event  uint64 // last version whose record the map has the effect of
	Flat   bool   // no block of an ancestor is named
}

// encodeRoot returns the root of a version.
func encodeRoot(r rootInfo, top []topEntry) []byte {
	set := 0
	for i := range top {
		if top[i].loc != 0 {
			set++
		}
	}
	marks := (len(top) + 7) / 8
	p := make([]byte, rootFixed+marks+set*rootEntry)
	le.PutUint32(p, magicRoot)
	p[4] = formatVersion
	if r.Flat {
		p[5] = 1
	}
	le.PutUint64(p[8:], uint64(r.Medium))
	le.PutUint64(p[16:], uint64(r.Size))
	le.PutUint32(p[24:], r.Epoch)
	le.PutUint32(p[28:], uint32(len(top)))
	le.PutUint64(p[32:], uint64(r.Mapped))
	le.PutUint32(p[40:], uint32(set))
	le.PutUint64(p[48:], r.Event)
	q := p[rootFixed+marks:]
	for i := range top {
		if top[i].loc != 0 {
			p[rootFixed+i/8] |= 1 << (i % 8)
			le.PutUint64(q, uint64(top[i].loc))
			le.PutUint32(q[8:], top[i].birth)
			q = q[rootEntry:]
		}
	}
	le.PutUint32(p[44:], segment.CRC(p))
	return p
}

// decodeRoot is the inverse of encodeRoot. ErrCorrupt, ErrVersion.
func decodeRoot(p []byte) (rootInfo, []topEntry, error) {
	bad := func(what string) (rootInfo, []topEntry, error) {
		return rootInfo{}, nil, fmt.Errorf("parse volume root: %s: %w", what, atoll.ErrCorrupt)
	}
	if len(p) < rootFixed || le.Uint32(p) != magicRoot {
		return bad("no magic")
	}
	c := append([]byte(nil), p...)
	le.PutUint32(c[44:], 0)
	if segment.CRC(c) != le.Uint32(p[44:]) {
		return bad("checksum")
	}
	if p[4] != formatVersion {
		return rootInfo{}, nil, fmt.Errorf("parse volume root: version %d, this program knows %d: %w", p[4], formatVersion, atoll.ErrVersion)
	}
	r := rootInfo{
		Medium: atoll.MediumID(le.Uint64(p[8:])), Size: int64(le.Uint64(p[16:])), Epoch: le.Uint32(p[24:]),
		Mapped: int64(le.Uint64(p[32:])), Event: le.Uint64(p[48:]), Flat: p[5] == 1,
	}
	n, set := int(le.Uint32(p[28:])), int(le.Uint32(p[40:]))
	marks := (n + 7) / 8
	if n > maxTop || set > n || len(p) != rootFixed+marks+set*rootEntry || CheckSize(r.Size) != nil {
		return bad("its counts make no sense")
	}
	top := make([]topEntry, n)
	q := p[rootFixed+marks:]
	for i := range top {
		if p[rootFixed+i/8]&(1<<(i%8)) == 0 {
			continue
		}
		if len(q) == 0 {
			return bad("its counts make no sense")
		}
		top[i].loc, top[i].birth = atoll.Location(le.Uint64(q)), le.Uint32(q[8:])
		q = q[rootEntry:]
	}
	if len(q) != 0 {
		return bad("its counts make no sense")
	}
	return r, top, nil
}

// CheckSize says whether a volume may have so many bytes; the error tells what
// would be right.
func CheckSize(size int64) error {
	switch {
	case size < atoll.MinVolumeSize:
		return fmt.Errorf("volume size %d: the smallest volume has %d bytes: %w", size, atoll.MinVolumeSize, atoll.ErrInvalid)
	case size > atoll.MaxVolumeSize:
		return fmt.Errorf("volume size %d: the largest volume has %d bytes (64 TiB): %w", size, int64(atoll.MaxVolumeSize), atoll.ErrInvalid)
	case size%atoll.BlockSize != 0:
		return fmt.Errorf("volume size %d: want a multiple of %d, for example %d: %w",
			size, atoll.BlockSize, min(size+atoll.BlockSize-size%atoll.BlockSize, atoll.MaxVolumeSize), atoll.ErrInvalid)
	}
	return nil
}
