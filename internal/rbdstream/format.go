package rbdstream

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
)

// All integers are little-endian, str is a 32-bit length and the bytes.
//
// V1 is the banner "rbd diff v1\n" and records of a tag byte and a payload:
//
//	'f' str                   name of the version that the diff begins at; none: an empty image
//	't' str                   name of the version that it leads to; none: the head
//	's' size64                size of the image at the end
//	'w' off64 len64 bytes     data
//	'z' off64 len64           zeros
//	'e'                       end
//
// V2 is the banner "rbd diff v2\n" and the same records, with a 64-bit length of
// the payload behind each tag but 'e', and
//
//	'p' byte                  1: the version 't' is protected against removal
//	'X' "c32c" crc32          ours: CRC32C of all bytes from the banner to before this tag
//
// An example of V1, a diff of 43 bytes from a to b with 1 byte at 4096:
//
//	"rbd diff v1\n"  66 01000000 61  74 01000000 62  73 0010000000000000
//	77 0010000000000000 0100000000000000 ff  65
//
// An image stream is
//
//	"rbd image v2\n"
//	'O' 8 order64   'T' 8 features64   'U' 8 stripeunit64   'C' 8 stripecount64
//	'M' len64 str str         one per key and value
//	'X' 8 "c32c" crc32        ours: CRC32C of all bytes before this tag, and of count64
//	'E'
//	"rbd image diffs v2\n" count64, and count diffs of V2
const (
	bannerV1    = "rbd diff v1\n"
	bannerV2    = "rbd diff v2\n"
	bannerImage = "rbd image v2\n"
	bannerDiffs = "rbd image diffs v2\n"

	tagFrom      = 'f'
	tagTo        = 't'
	tagProtected = 'p'
	tagSize      = 's'
	tagWrite     = 'w'
	tagZero      = 'z'
	tagEnd       = 'e'

	tagOrder       = 'O'
	tagFeatures    = 'T'
	tagStripeUnit  = 'U'
	tagStripeCount = 'C'
	tagMeta        = 'M'
	tagHeaderEnd   = 'E'

	tagSum   = 'X'
	sumMagic = "c32c"
)

// Limits of the streams.
const (
	// PageSize is the unit in which zeros are told from data.
	PageSize = atoll.BlockSize
	// MaxData is the largest record of data that a Writer makes; each ends at a
	// multiple of it. A Reader takes any.
	MaxData = 4 << 20
	// MaxName is the longest name of a version in bytes.
	MaxName = 4096
	// MaxMeta is the longest key, and the longest value, of metadata in bytes.
	MaxMeta = 64 << 10
	// MaxMetaTotal bounds all keys and values of an image together.
	MaxMetaTotal = 1 << 20
)

// Format is the format of a diff.
type Format uint8

// The formats of diffs.
const (
	V1 Format = 1
	V2 Format = 2
)

// String names the format.
func (f Format) String() string { return fmt.Sprintf("diff v%d", uint8(f)) }

func (f Format) banner() string {
	if f == V2 {
		return bannerV2
	}
	return bannerV1
}

// short returns the error for a stream of this format that ends too soon.
func (f Format) short(what string, at int64) error {
	if f == V2 {
		return fail(syscall.EDOM, atoll.ErrCorrupt, "read %s: the stream ends after %d bytes, too soon", what, at)
	}
	return fail(syscall.EBADMSG, atoll.ErrCorrupt, "read %s: the stream ends after %d bytes, too soon", what, at)
}

// castagnoli is the table of CRC32C; it never changes.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var le = binary.LittleEndian
