package segment

import (
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// A coded segment is kept as shards, each an ordinary segment of its own content
// under the segment's name on a node of its own: Data of them hold the payload,
// one part after the other, Parity of them the Reed-Solomon parity of the blocks
// at the same place in the others. All shards have the same batches at the same
// places, of one record each, so that a shard can be made anew from any Data
// others, headers included:
//
//	kind     KindShard
//	blocks   those of the batch: ShardBatch, in the last one what is left
//	key      number of the shard, the data ones first
//	aux      Data (1), Parity (1), 0 (2), payload blocks of a shard (4)
//
// Its batches are numbered by their sequence numbers from 1 on, have the clock
// 1970 and nothing acknowledged, and all the same epoch. The blocks of a coded
// segment are numbered without headers: block b is payload block b%Payload of
// shard b/Payload.
const (
	// KindShard is the kind of the only record in a batch of a shard.
	KindShard Kind = 15
	// ShardBatch is the number of payload blocks of a shard's batches.
	ShardBatch atoll.BlockNo = atoll.MaxBatchBlocks
)

// Shape tells how a coded segment is spread. The zero Shape is that of a segment
// of which each node has the same copy.
type Shape struct {
	Data, Parity int
	Payload      atoll.BlockNo // payload blocks of one shard
}

// ShapeFor returns the shape of a segment of that many blocks, rounded up.
func ShapeFor(data, parity int, blocks atoll.BlockNo) Shape {
	return Shape{data, parity, (blocks + atoll.BlockNo(data) - 1) / atoll.BlockNo(data)}
}

// IsCoded reports whether the segment is kept as shards.
func (s Shape) IsCoded() bool { return s.Data != 0 }

// Check returns ErrInvalid for a shape that cannot be.
func (s Shape) Check() error {
	if s.Data < 1 || s.Parity < 1 || s.Data+s.Parity > atoll.MaxShards || s.Parity > atoll.MaxCopies ||
		s.Payload == 0 || s.Blocks() > atoll.MaxSegmentBlocks || s.Length()+FooterBlocks(s.Batches(), int(s.Length())) > atoll.MaxSegmentBlocks {
		return fmt.Errorf("%d+%d shards of %d blocks: %w", s.Data, s.Parity, s.Payload, atoll.ErrInvalid)
	}
	return nil
}

// Shards returns the number of shards.
func (s Shape) Shards() int { return s.Data + s.Parity }

// Blocks returns the number of blocks of the coded segment.
func (s Shape) Blocks() atoll.BlockNo { return atoll.BlockNo(s.Data) * s.Payload }

// Batches returns the number of batches of a shard.
func (s Shape) Batches() int { return int((s.Payload + ShardBatch - 1) / ShardBatch) }

// Length returns the sealed length of a shard.
func (s Shape) Length() atoll.BlockNo { return s.Payload + atoll.BlockNo(s.Batches()) }

// Batch returns where batch i of a shard begins and how many payload blocks it
// has.
func (s Shape) Batch(i int) (at, blocks atoll.BlockNo) {
	first := atoll.BlockNo(i) * ShardBatch
	return first + atoll.BlockNo(i), min(ShardBatch, s.Payload-first)
}

// Find returns where block b of the coded segment is: its shard, the block in
// that, and how many blocks from there on lie together.
func (s Shape) Find(b atoll.BlockNo) (shard int, at, run atoll.BlockNo) {
	p := b % s.Payload
	return int(b / s.Payload), s.place(p), min(ShardBatch-p%ShardBatch, s.Payload-p)
}

// place returns where a payload block of a shard is.
func (s Shape) place(p atoll.BlockNo) atoll.BlockNo { return p + p/ShardBatch + 1 }

// IsHeader reports whether a block of a shard is the header of a batch.
func (s Shape) IsHeader(at atoll.BlockNo) bool { return at%(ShardBatch+1) == 0 }

// ShardOf returns which shard of a segment a member of its copyset has. It is
// another one for the next segment, so that all members are read alike.
func (s Shape) ShardOf(o atoll.Ordinal, member int) int {
	return (member + int(uint32(o)%uint32(s.Shards()))) % s.Shards()
}

// MemberOf is the inverse of ShardOf.
func (s Shape) MemberOf(o atoll.Ordinal, shard int) int {
	return (shard + s.Shards() - int(uint32(o)%uint32(s.Shards()))) % s.Shards()
}

// EncodeShardHeader writes the header of batch i of a shard into p and returns
// its checksum. prev is that of the batch before.
func (s Shape) EncodeShardHeader(p []byte, seg atoll.SegmentID, epoch atoll.Epoch, shard, i int, prev uint32, crcs []uint32) uint32 {
	at, blocks := s.Batch(i)
	h := Head{Segment: seg, Offset: at, Prev: prev, Epoch: epoch, Seq: uint64(i) + 1, Clock: time.Unix(0, 0)}
	aux := uint64(s.Data) | uint64(s.Parity)<<8 | uint64(s.Payload)<<32
	return EncodeHeader(p, &h, []Record{{Kind: KindShard, Blocks: uint16(blocks), Key: uint64(shard), Aux: aux}}, crcs)
}

// ParseShard returns of which shard of what shape a batch is; false for one that
// is of no shard.
func ParseShard(h Header) (s Shape, shard int, ok bool, err error) {
	if h.Records() != 1 || h.Record(0).Kind != KindShard {
		return Shape{}, 0, false, nil
	}
	r := h.Record(0)
	s = Shape{Data: int(r.Aux & 0xff), Parity: int(r.Aux >> 8 & 0xff), Payload: atoll.BlockNo(r.Aux >> 32)}
	if err := s.Check(); err != nil || r.Key >= uint64(s.Shards()) {
		return Shape{}, 0, true, fmt.Errorf("batch of shard %d of %+v: %w", r.Key, s, atoll.ErrCorrupt)
	}
	return s, int(r.Key), true, nil
}
