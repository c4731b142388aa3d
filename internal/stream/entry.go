package stream

import (
	"context"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

// Entry is what goes into the log in one piece: some records with their
// payload. All of it is in one batch, so after a crash it is there as a whole or
// not at all. The zero Entry is ready for Add. An Entry may be reused after Wait
// returned something other than the context's error; it allocates nothing once
// it has grown to its usual size. It belongs to one goroutine at a time.
type Entry struct {
	recs   []segment.Record
	crcs   []uint32
	parts  []part
	blocks int

	// Set by the writer while the entry is its own, then the results.
	done   chan struct{}
	busy   bool // submitted, and its result not yet taken by Wait
	err    error
	queued time.Duration // on the writer's clock
	seq    uint64
	seg    atoll.SegmentID
	header atoll.BlockNo // where its batch begins
	first  atoll.BlockNo // its first payload block
}

type part struct {
	buf  *host.Buffer
	data []byte
}

// Room reports whether records more records with blocks more payload blocks can
// be added; beyond that an entry would not fit in a batch and must be split.
func (e *Entry) Room(records, blocks int) bool {
	return segment.Fits(len(e.recs)+records, e.blocks+blocks)
}

// Add appends a record with its payload, whose length is rec.Blocks whole
// blocks. data lies in buf, on which the entry holds a reference until it is
// done (the copies hold their own); the bytes must not change while the caller
// or anyone else holds the buffer. buf may be nil only for memory that never
// changes. The checksums are computed here, in the caller's goroutine.
func (e *Entry) Add(rec segment.Record, buf *host.Buffer, data []byte) {
	atoll.Assert(!e.busy, "add to an entry that is being written")
	atoll.Assert(len(data) == int(rec.Blocks)*atoll.BlockSize, "record's payload is not its number of blocks")
	e.recs = append(e.recs, rec)
	for p := data; len(p) > 0; p = p[atoll.BlockSize:] {
		e.crcs = append(e.crcs, segment.CRC(p[:atoll.BlockSize]))
	}
	if len(data) > 0 {
		if buf != nil {
			buf.Retain()
		}
		e.parts = append(e.parts, part{buf, data})
	}
	e.blocks += int(rec.Blocks)
}

// Reset empties the entry and drops its references.
func (e *Entry) Reset() {
	atoll.Assert(!e.busy, "reset of an entry that is being written")
	e.release()
	e.recs, e.crcs, e.blocks = e.recs[:0], e.crcs[:0], 0
	e.err, e.seq, e.seg, e.header, e.first = nil, 0, atoll.SegmentID{}, 0, 0
}

// Records returns the number of records.
func (e *Entry) Records() int { return len(e.recs) }

// Blocks returns the number of payload blocks.
func (e *Entry) Blocks() int { return e.blocks }

// Record returns record i.
func (e *Entry) Record(i int) segment.Record { return e.recs[i] }

// CRC returns the CRC32C of payload block i, counted over all records.
func (e *Entry) CRC(i int) uint32 { return e.crcs[i] }

// Seq returns the sequence number of the first record; the others follow
// without a gap. Valid after success.
func (e *Entry) Seq() uint64 { return e.seq }

// Seg returns the segment that holds the entry. Valid after success.
func (e *Entry) Seg() atoll.SegmentID { return e.seg }

// Block returns where record i is in the segment: its first payload block, or
// the batch's header block if it has none. Valid after success.
func (e *Entry) Block(i int) atoll.BlockNo {
	if e.recs[i].Blocks == 0 {
		return e.header
	}
	b := e.first
	for _, r := range e.recs[:i] {
		b += atoll.BlockNo(r.Blocks)
	}
	return b
}

// Wait waits for the outcome of Submit. Nil means that the entry is on stable
// storage on all copies of its segment. When ctx ends first, Wait returns its
// error; the entry then still belongs to the writer and must not be touched
// until a later Wait returned the outcome (or for ever). Wait may be called
// once per Submit, but for such repeats.
func (e *Entry) Wait(ctx context.Context) error {
	if !e.busy {
		return fmt.Errorf("wait for an entry that was not submitted: %w", atoll.ErrInvalid)
	}
	select {
	case <-e.done:
		e.busy = false
		return e.err
	default:
	}
	select {
	case <-e.done:
		e.busy = false
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("append: outcome unknown: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
}

// begin makes the entry ready to be handed to the writer.
func (e *Entry) begin() {
	if e.done == nil {
		e.done = make(chan struct{}, 1)
	}
	e.busy, e.err = true, nil
}

// finish hands the outcome back. The entry is the caller's from here on.
func (e *Entry) finish(err error) {
	e.release()
	e.err = err
	e.done <- struct{}{}
}

// release drops the references on the payload.
func (e *Entry) release() {
	for i := range e.parts {
		e.parts[i].buf.Release()
		e.parts[i] = part{}
	}
	e.parts = e.parts[:0]
}

// Header returns where the batch begins that holds the entry. Valid after
// success.
func (e *Entry) Header() atoll.BlockNo { return e.header }
