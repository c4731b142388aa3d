package atoll

import "time"

// Sizes of the format.
const (
	// BlockSize is the size of a block in bytes.
	BlockSize = 4096
	// SegmentBlocks is the usual size of a segment in blocks (64 MiB),
	// including the room for its footer.
	SegmentBlocks = 64 << 20 / BlockSize
	// MaxSegmentBlocks is the largest size that the format can address.
	MaxSegmentBlocks = 1 << 16
	// MaxBatchBlocks is the largest number of payload blocks in a batch.
	MaxBatchBlocks = 512
	// MaxCopies is the largest number of copies of a segment.
	MaxCopies = 5
	// MaxUnsealed is the largest number of unsealed segments of a medium: one
	// in use and one registered for each of the hot and the bulk lane, and two
	// that are being sealed.
	MaxUnsealed = 6
)

// Sizes of volumes in bytes.
const (
	// MinVolumeSize is the smallest volume.
	MinVolumeSize = BlockSize
	// MaxVolumeSize is the largest volume (64 TiB).
	MaxVolumeSize = 64 << 40
)

// Times of the protocol.
const (
	// LeaseTTL is how long an owner's lease lives without renewal.
	LeaseTTL = 3 * time.Second
	// LeaseUse is how long after its last renewal, by its own clock, an owner
	// may still serve: 0.7 of the TTL.
	LeaseUse = LeaseTTL * 7 / 10
	// FenceWait is how long a recovering owner waits for every copy to answer.
	FenceWait = 2 * time.Second
	// RequestTimeout is the longest that a request to a node may take.
	RequestTimeout = 10 * time.Second
)

// Bounds of queues.
const (
	// MaxFrame is the largest body of a wire frame in bytes.
	MaxFrame = (MaxBatchBlocks + 1) * BlockSize
	// HighWaterPercent is how full a disk may be before its node refuses new
	// segments.
	HighWaterPercent = 95
	// ReservePercent is how full a disk may be before its node refuses also the
	// segments for what frees space: manifests, map pages, compaction.
	ReservePercent = 98
)

// SegmentSizes is the number of sizes that segments usually have.
const SegmentSizes = 5

// SegmentSize returns one of the sizes that segments usually have, in blocks:
// number 0 is SegmentBlocks, each further one about half of the one before. The
// small ones have room for a whole number of the largest batches and a footer.
func SegmentSize(i int) BlockNo {
	switch n := BlockNo(SegmentBlocks) >> i; i {
	case 0:
		return n
	case 1:
		return n + 32
	default:
		return n + 16
	}
}

// diskSegments is how many segments there should be room for on a disk, so that
// those that are open or being freed are a small part of it.
const diskSegments = 192

// SegmentFor returns the size of a segment in blocks that suits a disk with that
// many bytes: the largest of the usual ones of which it has room for enough.
func SegmentFor(total int64) BlockNo {
	i := 0
	for i < SegmentSizes-1 && SegmentSize(i).Bytes()*diskSegments > total {
		i++
	}
	return SegmentSize(i)
}
