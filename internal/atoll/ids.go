package atoll

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// UUID is a random 128-bit identity: of a cluster, of a disk or of a disk's
// incarnation. The zero value means "none".
type UUID [16]byte

// String returns 32 lower-case hexadecimal digits.
func (u UUID) String() string { return hex.EncodeToString(u[:]) }

// IsZero reports whether u names nothing.
func (u UUID) IsZero() bool { return u == UUID{} }

// MarshalText implements encoding.TextMarshaler.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (u *UUID) UnmarshalText(text []byte) error {
	if len(text) != 2*len(u) {
		return fmt.Errorf("parse id %q: want %d hexadecimal digits: %w", text, 2*len(u), ErrInvalid)
	}
	if _, err := hex.Decode(u[:], text); err != nil {
		return fmt.Errorf("parse id %q: %w", text, ErrInvalid)
	}
	return nil
}

// NodeID numbers a storage node (one disk) within a cluster. The catalog gives
// it out once; 0 means "none".
type NodeID uint32

// String returns the decimal number.
func (n NodeID) String() string { return strconv.FormatUint(uint64(n), 10) }

// CopysetID numbers a copyset within a cluster; 0 means "none".
type CopysetID uint32

// String returns the decimal number.
func (c CopysetID) String() string { return strconv.FormatUint(uint64(c), 10) }

// MediumID identifies a medium within a cluster. It is random, so that an id is
// never given out twice even after the catalog was restored from a backup;
// 0 means "none".
type MediumID uint64

// String returns 16 hexadecimal digits.
func (m MediumID) String() string { return fmt.Sprintf("%016x", uint64(m)) }

// ParseMediumID is the inverse of MediumID.String.
func ParseMediumID(s string) (MediumID, error) {
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 || v == 0 {
		return 0, fmt.Errorf("parse medium id %q: want 16 hexadecimal digits, not all zero: %w", s, ErrInvalid)
	}
	return MediumID(v), nil
}

// MarshalText implements encoding.TextMarshaler.
func (m MediumID) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MediumID) UnmarshalText(text []byte) (err error) {
	*m, err = ParseMediumID(string(text))
	return err
}

// Epoch numbers the successive owners of a medium. A node refuses work under an
// epoch older than the one it was fenced with.
type Epoch uint64

// String returns the decimal number.
func (e Epoch) String() string { return strconv.FormatUint(uint64(e), 10) }

// BlockNo is the index of a 4 KiB block within a segment. A segment's length is
// also a BlockNo: the index just past its last block.
type BlockNo uint32

// Bytes returns the byte offset of block b.
func (b BlockNo) Bytes() int64 { return int64(b) * BlockSize }

// Ordinal numbers the segments of one medium in the order of their creation,
// from 1; 0 means "none".
type Ordinal uint32

// SegmentID names a segment in the cluster. The copyset is part of the name, so
// that whoever knows a segment's id knows which nodes hold it.
type SegmentID struct {
	Medium  MediumID
	Ordinal Ordinal
	Copyset CopysetID
}

// String returns the form "<medium>-<ordinal>-<copyset>" in hexadecimal digits
// (16, 8 and 8 of them), which is also the segment's file name without suffix.
func (s SegmentID) String() string {
	return fmt.Sprintf("%016x-%08x-%08x", uint64(s.Medium), uint32(s.Ordinal), uint32(s.Copyset))
}

// IsZero reports whether s names nothing.
func (s SegmentID) IsZero() bool { return s == SegmentID{} }

// ParseSegmentID is the inverse of SegmentID.String.
func ParseSegmentID(text string) (SegmentID, error) {
	parts := strings.Split(text, "-")
	if len(parts) == 3 && len(parts[0]) == 16 && len(parts[1]) == 8 && len(parts[2]) == 8 {
		m, err1 := strconv.ParseUint(parts[0], 16, 64)
		o, err2 := strconv.ParseUint(parts[1], 16, 32)
		c, err3 := strconv.ParseUint(parts[2], 16, 32)
		if err1 == nil && err2 == nil && err3 == nil {
			return SegmentID{MediumID(m), Ordinal(o), CopysetID(c)}, nil
		}
	}
	return SegmentID{}, fmt.Errorf("parse segment id %q: want medium-ordinal-copyset in hexadecimal: %w", text, ErrInvalid)
}

// Location is where a block of a medium lives in its log, with some bits that
// tell a right block from a valid but wrong one:
//
//	bits 63..32  ordinal of the segment
//	bits 31..16  block within the segment
//	bits 15..0   check: folded CRC32C of the block, mixed with medium and key
//
// The zero Location means "nothing here" (a hole). Locations of one log compare
// by age with Location.Before.
type Location uint64

// MakeLocation builds a Location. block must be below MaxSegmentBlocks.
func MakeLocation(o Ordinal, block BlockNo, check uint16) Location {
	return Location(uint64(o)<<32 | uint64(uint16(block))<<16 | uint64(check))
}

// Ordinal returns the segment's ordinal.
func (l Location) Ordinal() Ordinal { return Ordinal(l >> 32) }

// Block returns the block within the segment.
func (l Location) Block() BlockNo { return BlockNo(uint16(l >> 16)) }

// Check returns the check bits.
func (l Location) Check() uint16 { return uint16(l) }

// Before reports whether l lies earlier in the log than m.
func (l Location) Before(m Location) bool { return l>>16 < m>>16 }

// String returns "ordinal:block" for people.
func (l Location) String() string { return fmt.Sprintf("%d:%d", l.Ordinal(), l.Block()) }
