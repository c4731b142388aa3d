package curve

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// What a UUID of this gateway names.
const (
	kindSnapshot = 0
	kindTask     = 1
)

// numberBits is how much of a UUID is the number of a version or task.
const numberBits = 56

// packUUID makes the UUID of a snapshot or task of a medium. It holds all that
// is needed to find it again, so that nothing need be stored for it:
//
//	48 bits medium (high) | 8 (version) | 12 bits medium | 10 | 4 bits medium (low) | 0 | kind | 56 bits number
func packUUID(medium string, kind byte, num uint64) string {
	id, err := atoll.ParseMediumID(medium)
	if err != nil {
		return ""
	}
	m, b := uint64(id), [16]byte{}
	binary.BigEndian.PutUint64(b[0:], m>>16<<16|0x8000|m>>4&0xfff)
	binary.BigEndian.PutUint64(b[8:], num&(1<<numberBits-1))
	b[8] = 0x80 | byte(m&0xf)<<2 | kind&1
	return dashed(hex.EncodeToString(b[:]))
}

// unpackUUID is the inverse of packUUID; ok is false for other UUIDs.
func unpackUUID(uuid string, kind byte) (medium string, num uint64, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(uuid, "-", ""))
	if err != nil || len(b) != 16 || len(uuid) != 36 || b[6]>>4 != 8 || b[8]&0xc3 != 0x80|kind {
		return "", 0, false
	}
	high := binary.BigEndian.Uint64(b)
	m := high>>16<<16 | high&0xfff<<4 | uint64(b[8]>>2&0xf)
	num = binary.BigEndian.Uint64(b[8:]) & (1<<numberBits - 1)
	return atoll.MediumID(m).String(), num, m != 0
}

// newUUID makes a random one.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return dashed(hex.EncodeToString(b[:]))
}

// newNumber makes the random number of a task.
func newNumber() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.BigEndian.Uint64(b[:]) & (1<<numberBits - 1)
}
