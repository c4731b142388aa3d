package node

import (
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// space is what the node may use of its disk.
type space struct {
	total, free int64 // bytes; free counts what open segments may still take as used
}

// fits reports whether taking n more bytes stays below a mark in percent.
func (s space) fits(n, percent int64) bool {
	return s.total-s.free+n <= s.total/100*percent
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
// returns, or bytes. ErrNoSpace above the high-water mark, or above that of the
// reserve if deep. Free slots do not count as used for that, and do not make
// room beyond it: what is freed above the high-water mark stays free.
func (n *Node) reserve(blocks atoll.BlockNo, deep bool) (slot string, err error) {
	percent := int64(atoll.HighWaterPercent)
	if deep {
		percent = atoll.ReservePercent
	}
	if err := n.roomFor(blocks.Bytes()-n.slots.bytes(), percent); err != nil {
		return "", err
	}
	if slotSize(blocks) {
		if slot = n.slots.take(blocks); slot != "" {
			return slot, nil
		}
	}
	for {
		err := n.reserveBytes(blocks.Bytes(), percent)
		if !errors.Is(err, atoll.ErrNoSpace) || !n.slots.drop() {
			return "", err
		}
	}
}

// roomFor is ErrNoSpace when the disk is too full for size more bytes.
func (n *Node) roomFor(size, percent int64) error {
	sp, err := n.space()
	if err != nil {
		return err
	}
	if !sp.fits(size, percent) {
		what := "high-water mark"
		if percent != atoll.HighWaterPercent {
			what = "mark of the reserve"
		}
		return fmt.Errorf("disk of node %v: %d MiB more than the %d of %d in use would pass the %s of %d %%: %w",
			n.id.Node, size>>20, (sp.total-sp.free)>>20, sp.total>>20, what, percent, atoll.ErrNoSpace)
	}
	return nil
}

func (n *Node) reserveBytes(size, percent int64) error {
	if err := n.roomFor(size, percent); err != nil {
		return err
	}
	n.mu.Lock()
	n.mu.used += size
	n.mu.Unlock()
	return nil
}

func (n *Node) unreserve(blocks atoll.BlockNo) { n.unreserveBytes(blocks.Bytes()) }

func (n *Node) unreserveBytes(size int64) {
	n.mu.Lock()
	n.mu.used -= size
	n.mu.Unlock()
}

// lookForRoom lets a node that met a full disk try again once the disk says that
// it has room: others may have freed it.
func (n *Node) lookForRoom() {
	if n.full.Load() && n.roomFor(n.slots.usual.Bytes(), atoll.HighWaterPercent) == nil {
		n.full.Store(false)
	}
}
