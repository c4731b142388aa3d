package node

import (
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// space is what the node may use of its disk.
type space struct {
	total, free int64 // bytes; free counts what open segments may still take as used
}

// fits reports whether taking n more bytes stays below the high-water mark.
func (s space) fits(n int64) bool {
	return s.total-s.free+n <= s.total/100*atoll.HighWaterPercent
}

// space returns the capacity and what is left of it: of the limit given in the
// options, or of the disk, whichever has less left.
func (n *Node) space() (space, error) {
	total, free, err := n.fs.Space()
	if err != nil {
		return space{}, err
	}
	n.mu.Lock()
	used := n.mu.used
	n.mu.Unlock()
	if l := n.opts.Limit; l > 0 {
		// The part of the limit that the disk cannot give counts as used.
		return space{total: l, free: min(l-used, free)}, nil
	}
	return space{total: total, free: free}, nil
}

// reserve takes room for a segment of that many blocks: a slot, whose path it
// returns, or bytes. ErrNoSpace above the high-water mark.
func (n *Node) reserve(blocks atoll.BlockNo) (slot string, err error) {
	if blocks == atoll.SegmentBlocks {
		if slot = n.slots.take(); slot != "" {
			return slot, nil
		}
	}
	return n.reserveBytes(blocks.Bytes())
}

func (n *Node) reserveBytes(size int64) (string, error) {
	sp, err := n.space()
	if err != nil {
		return "", err
	}
	if !sp.fits(size) {
		return "", fmt.Errorf("disk of node %v: %d MiB more than the %d of %d in use would pass the high-water mark of %d %%: %w",
			n.id.Node, size>>20, (sp.total-sp.free)>>20, sp.total>>20, atoll.HighWaterPercent, atoll.ErrNoSpace)
	}
	n.mu.Lock()
	n.mu.used += size
	n.mu.Unlock()
	return "", nil
}

func (n *Node) unreserve(blocks atoll.BlockNo) { n.unreserveBytes(blocks.Bytes()) }

func (n *Node) unreserveBytes(size int64) {
	n.mu.Lock()
	n.mu.used -= size
	n.mu.Unlock()
}
