package volume

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

const (
	magicEvent = 0x45565441 // "ATVE"
	eventFixed = 68
)

// event is a snapshot (target 0) or a restore.
type event struct {
	Medium atoll.MediumID
	Number uint64
	Parent uint64
	Target uint64
	Time   time.Time
	Size   int64
	Flags  medium.Flags
	Name   string
	Memo   string
	Props  map[string]string
}

// kind returns the kind of the event's record.
func (e *event) kind() segment.Kind {
	if e.Target != 0 {
		return kindRestore
	}
	return kindSnapshot
}

// encode writes the event into p, one block. ErrTooLarge when name, memo or
// properties do not fit.
func (e *event) encode(p []byte) error {
	clear(p)
	if len(e.Name)+len(e.Memo) > atoll.BlockSize-eventFixed {
		return fmt.Errorf("name and memo of a version take more than %d bytes: %w", atoll.BlockSize-eventFixed, atoll.ErrTooLarge)
	}
	le.PutUint32(p, magicEvent)
	p[4] = formatVersion
	le.PutUint16(p[6:], uint16(e.Flags))
	le.PutUint64(p[8:], uint64(e.Medium))
	le.PutUint64(p[16:], e.Number)
	le.PutUint64(p[24:], e.Parent)
	le.PutUint64(p[32:], uint64(e.Time.UnixNano()))
	le.PutUint64(p[40:], e.Target)
	le.PutUint64(p[48:], uint64(e.Size))
	le.PutUint16(p[60:], uint16(len(e.Name)))
	le.PutUint16(p[62:], uint16(len(e.Memo)))
	le.PutUint16(p[64:], uint16(len(e.Props)))
	q := p[eventFixed:]
	q = q[copy(q, e.Name):]
	q = q[copy(q, e.Memo):]
	for _, k := range slices.Sorted(maps.Keys(e.Props)) {
		val := e.Props[k]
		if len(q) < 4+len(k)+len(val) {
			return fmt.Errorf("properties of a version take more than %d bytes: %w", atoll.BlockSize-eventFixed, atoll.ErrTooLarge)
		}
		le.PutUint16(q, uint16(len(k)))
		le.PutUint16(q[2:], uint16(len(val)))
		q = q[4:]
		q = q[copy(q, k):]
		q = q[copy(q, val):]
	}
	sumEvent(p)
	return nil
}

// sumEvent writes the checksum of an event.
func sumEvent(p []byte) {
	le.PutUint32(p[56:], 0)
	le.PutUint32(p[56:], segment.CRC(p))
}

// parseEvent is the inverse of encode. ErrCorrupt, ErrVersion.
func parseEvent(p []byte) (*event, error) {
	bad := func(what string) (*event, error) {
		return nil, fmt.Errorf("parse version record: %s: %w", what, atoll.ErrCorrupt)
	}
	if len(p) != atoll.BlockSize || le.Uint32(p) != magicEvent {
		return bad("no magic")
	}
	c := slices.Clone(p)
	le.PutUint32(c[56:], 0)
	if segment.CRC(c) != le.Uint32(p[56:]) {
		return bad("checksum")
	}
	if p[4] != formatVersion {
		return nil, fmt.Errorf("parse version record: version %d, this program knows %d: %w", p[4], formatVersion, atoll.ErrVersion)
	}
	e := &event{
		Medium: atoll.MediumID(le.Uint64(p[8:])), Number: le.Uint64(p[16:]), Parent: le.Uint64(p[24:]),
		Time: time.Unix(0, int64(le.Uint64(p[32:]))).UTC(), Target: le.Uint64(p[40:]), Size: int64(le.Uint64(p[48:])),
		Flags: medium.Flags(le.Uint16(p[6:])),
	}
	r := byteReader{p: p[eventFixed:]}
	e.Name, e.Memo = r.take(int(le.Uint16(p[60:]))), r.take(int(le.Uint16(p[62:])))
	n := int(le.Uint16(p[64:]))
	for i := 0; i < n && !r.short; i++ {
		k, val := r.length(), r.length()
		if e.Props == nil {
			e.Props = make(map[string]string)
		}
		key := r.take(k)
		e.Props[key] = r.take(val)
	}
	switch {
	case r.short || len(e.Props) != n:
		return bad("its lengths make no sense")
	case e.Number == 0 || e.Parent >= e.Number || e.Target >= e.Number || CheckSize(e.Size) != nil:
		return bad("its numbers make no sense")
	}
	return e, nil
}

// byteReader takes strings off a slice; short is set when there was too little.
type byteReader struct {
	p     []byte
	short bool
}

func (r *byteReader) take(n int) string {
	if n > len(r.p) {
		r.short = true
		return ""
	}
	s := string(r.p[:n])
	r.p = r.p[n:]
	return s
}

func (r *byteReader) length() int {
	if len(r.p) < 2 {
		r.short = true
		return 0
	}
	n := int(le.Uint16(r.p))
	r.p = r.p[2:]
	return n
}
