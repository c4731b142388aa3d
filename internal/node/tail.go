package node

import (
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// tail is where a segment ends and what decides on its next batch.
type tail struct {
	next    atoll.BlockNo // where the next batch begins
	sum     uint32        // checksum of the last batch header
	epoch   atoll.Epoch   // of the last batch
	seq     uint64        // after the last record
	acked   atoll.BlockNo // highest Acked of a batch
	batches int
}

// limits are what the node holds against a segment's appends.
type limits struct {
	fence  atoll.Epoch   // lower epochs are refused
	size   atoll.BlockNo // room for batches and footer
	sealed bool
}

// verdict is the outcome of judging a batch.
type verdict uint8

const (
	refused verdict = iota
	accepted
	repeated // lies below the tail; right if it has the bytes that are there
)

// judge decides on a batch whose checksums were verified. request is the epoch
// under which it was sent; it is the batch's own, or for Extend the recovering
// owner's.
func (t *tail) judge(l limits, id atoll.SegmentID, request atoll.Epoch, h segment.Header) (verdict, error) {
	switch {
	case request < l.fence:
		return refused, fmt.Errorf("append to segment %v: epoch %v, fenced at %v: %w", id, request, l.fence, atoll.ErrFenced)
	case h.Offset() < t.next:
		return repeated, nil
	case l.sealed:
		return refused, fmt.Errorf("append to segment %v: %w", id, atoll.ErrSealed)
	case h.Offset() > t.next:
		return refused, fmt.Errorf("append to segment %v at block %d: it ends at %d: %w", id, h.Offset(), t.next, atoll.ErrGap)
	case h.Prev() != t.sum:
		return refused, fmt.Errorf("append to segment %v at block %d: follows batch %08x, the last is %08x: %w", id, h.Offset(), h.Prev(), t.sum, atoll.ErrGap)
	case h.Epoch() < t.epoch || h.Epoch() > request:
		return refused, fmt.Errorf("append to segment %v at block %d: batch of epoch %v after %v under %v: %w", id, h.Offset(), h.Epoch(), t.epoch, request, atoll.ErrInvalid)
	case h.Next()+segment.FooterBlocks(t.batches+1, int(h.Next())) > l.size:
		return refused, fmt.Errorf("append to segment %v: %d blocks do not leave room for the footer within %d: %w", id, h.Next(), l.size, atoll.ErrTooLarge)
	}
	return accepted, nil
}

// advance makes h the last batch.
func (t *tail) advance(h segment.Header) {
	t.next, t.sum, t.epoch = h.Next(), h.Sum(), h.Epoch()
	t.seq = h.Seq() + uint64(h.Records())
	t.acked = max(t.acked, h.Acked())
	t.batches++
}
