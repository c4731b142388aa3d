package stream

import (
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// isFenced reports whether err means that another owner has taken over.
func isFenced(err error) bool {
	return errors.Is(err, atoll.ErrFenced) || errors.Is(err, atoll.ErrSealed)
}

// errReserve: a node has no room even in its reserve.
var errReserve = fmt.Errorf("the reserve is used up: %w", atoll.ErrNoSpace)

func isNoSpace(err error) bool { return errors.Is(err, atoll.ErrNoSpace) }

func isExist(err error) bool { return errors.Is(err, atoll.ErrExist) }

func fitsBatch(recs, blocks int) bool { return segment.Fits(recs, blocks) }

// fitsSegment reports whether a batch of that many payload blocks can be added
// to s and leaves room for the footer.
func fitsSegment(s *coreSeg, blocks int) bool {
	end := s.end + 1 + atoll.BlockNo(blocks)
	return end+segment.FooterBlocks(s.batches+1, int(end)) <= s.size
}
