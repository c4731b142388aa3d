package segment

import (
	"fmt"
	"hash/crc32"

	"github.com/atollstore/atoll/internal/atoll"
)

// The superblock names a disk. The file has two equal blocks, so that one bad
// sector does not take the identity away; either valid one will do. All numbers
// are little-endian:
//
//	off  size
//	  0     8  magic "ATOLDISK"
//	  8     4  format version (1)
//	 12     4  CRC32C of the block, this field taken as zero
//	 16    16  cluster
//	 32    16  disk
//	 48    16  incarnation: new at every format of the disk
//	 64     4  node id, 0 while none was given
//	 68     4  0
//	 72     8  time of format, nanoseconds since 1970
//	 80  4016  0
const (
	superMagic = "ATOLDISK"

	// FormatVersion is the disk format that this program writes.
	FormatVersion = 1
	// SuperSize is the size of the superblock file.
	SuperSize = 2 * atoll.BlockSize
)

// Super is a disk's identity.
type Super struct {
	Cluster     atoll.UUID
	Disk        atoll.UUID
	Incarnation atoll.UUID
	Node        atoll.NodeID
	Created     int64 // nanoseconds since 1970
}

// EncodeSuper returns the superblock file's contents.
func EncodeSuper(s Super) []byte {
	p := make([]byte, SuperSize)
	copy(p, superMagic)
	le.PutUint32(p[8:], FormatVersion)
	copy(p[16:], s.Cluster[:])
	copy(p[32:], s.Disk[:])
	copy(p[48:], s.Incarnation[:])
	le.PutUint32(p[64:], uint32(s.Node))
	le.PutUint64(p[72:], uint64(s.Created))
	le.PutUint32(p[12:], CRC(p[:atoll.BlockSize]))
	copy(p[atoll.BlockSize:], p[:atoll.BlockSize])
	return p
}

// ParseSuper reads a superblock file: the first of its two blocks that is
// valid. ErrCorrupt if none is, ErrVersion if the disk's format is newer.
func ParseSuper(p []byte) (s Super, err error) {
	err = fmt.Errorf("parse superblock: %d bytes: %w", len(p), atoll.ErrCorrupt)
	for ; len(p) >= atoll.BlockSize; p = p[atoll.BlockSize:] {
		s, err = parseSuperBlock(p[:atoll.BlockSize])
		if err == nil {
			return s, nil
		}
	}
	return Super{}, err
}

func parseSuperBlock(p []byte) (s Super, err error) {
	if string(p[:8]) != superMagic {
		return s, fmt.Errorf("parse superblock: no magic: %w", atoll.ErrCorrupt)
	}
	if crc := crcWithout(p, 12); crc != le.Uint32(p[12:]) {
		return s, fmt.Errorf("parse superblock: checksum %08x, stored %08x: %w", crc, le.Uint32(p[12:]), atoll.ErrCorrupt)
	}
	if v := le.Uint32(p[8:]); v != FormatVersion {
		return s, fmt.Errorf("parse superblock: disk format %d, this program knows %d: %w", v, FormatVersion, atoll.ErrVersion)
	}
	copy(s.Cluster[:], p[16:])
	copy(s.Disk[:], p[32:])
	copy(s.Incarnation[:], p[48:])
	s.Node = atoll.NodeID(le.Uint32(p[64:]))
	s.Created = int64(le.Uint64(p[72:]))
	return s, nil
}

// crcWithout returns the CRC32C of p with the four bytes at off taken as zero.
func crcWithout(p []byte, off int) uint32 {
	crc := crc32.Update(0, castagnoli, p[:off])
	crc = crc32.Update(crc, castagnoli, zeros[:])
	return crc32.Update(crc, castagnoli, p[off+4:])
}
