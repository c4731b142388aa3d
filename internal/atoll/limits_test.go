package atoll_test

import (
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// TestSegmentSizes: segments have room for whole batches of the largest size, and
// disks for enough segments.
func TestSegmentSizes(t *testing.T) {
	for i := range atoll.SegmentSizes {
		size := atoll.SegmentSize(i)
		whole := int(size) / (atoll.MaxBatchBlocks + 1)
		end := whole * (atoll.MaxBatchBlocks + 1)
		for atoll.BlockNo(end)+segment.FooterBlocks(whole, end) > size {
			whole, end = whole-1, end-atoll.MaxBatchBlocks-1
		}
		if float64(end) < 0.96*float64(size) {
			t.Errorf("%d batches take %d blocks of a segment of %d", whole, end, size)
		}
	}
	for _, c := range []struct {
		total int64
		size  atoll.BlockNo
	}{
		{1 << 20, atoll.SegmentSize(4)}, {800 << 20, atoll.SegmentSize(4)}, {1700 << 20, atoll.SegmentSize(3)},
		{7 << 30, atoll.SegmentSize(1)}, {12 << 30, atoll.SegmentBlocks}, {8 << 40, atoll.SegmentBlocks},
	} {
		if got := atoll.SegmentFor(c.total); got != c.size {
			t.Errorf("segments of %d blocks on a disk of %d MiB, want %d", got, c.total>>20, c.size)
		}
	}
}
