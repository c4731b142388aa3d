package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/wire"
)

// Mended is what Mend found in the copies of segments, and what it did.
type Mended struct {
	Checked  int64 // blocks read and held against their checksums, over all copies
	Damaged  int64 // of these, blocks that were bad
	Repaired int64 // blocks put right with the bytes of another copy
}

// Add sums up two results.
func (m *Mended) Add(o Mended) {
	m.Checked += o.Checked
	m.Damaged += o.Damaged
	m.Repaired += o.Repaired
}

// errGone marks a copy that is not there any more.
var errGone = errors.New("left to the next owner")

// NotMended is an error of Mend: a copy that is not known to be whole.
type NotMended struct {
	Node atoll.NodeID
	Seg  atoll.SegmentID
	Gone bool // the copy, or its end, is not there and could not be made anew yet
	Err  error
}

// Error names the copy.
func (e *NotMended) Error() string {
	return fmt.Sprintf("segment %v, copy on node %v: %v", e.Seg, e.Node, e.Err)
}

// Unwrap makes errors.Is see the kind.
func (e *NotMended) Unwrap() error { return e.Err }

// mendPiece is how many bytes are repaired at once.
const mendPiece = 1 << 20

// Mend reads every block of every copy of a segment where it lies, and puts
// damaged blocks right with the bytes of another copy, durably. A copy of a
// sealed segment that is missing is made anew under the caller's epoch. Copies
// listed as unverified are left to Complete; s.Length is zero for an open
// segment, of which each node reads what it has.
//
// The errors name what is not whole afterwards: ErrCorrupt for blocks that no
// copy could give, other kinds for nodes that could not be asked; they are of
// type *NotMended where they are about one copy. The result counts what was done
// in any case.
func (n *Nodes) Mend(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch) (Mended, []error) {
	members, err := n.Members(s.Seg)
	if err != nil {
		return Mended{}, []error{err}
	}
	return mendEach(s.Seg, members, s.Unverified, func(_ int, id atoll.NodeID) (Mended, error) {
		return n.mendCopy(ctx, s, epoch, members, id)
	})
}

// mendEach calls mend, which knows its place in ids, for all nodes at once but the
// unverified ones, and puts together what comes of it.
func mendEach(seg atoll.SegmentID, ids, unverified []atoll.NodeID, mend func(i int, id atoll.NodeID) (Mended, error)) (sum Mended, bad []error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	for i, id := range ids {
		if slices.Contains(unverified, id) {
			continue
		}
		all.Go(func() {
			got, err := mend(i, id)
			mu.Lock()
			defer mu.Unlock()
			sum.Add(got)
			if err != nil {
				bad = append(bad, &NotMended{id, seg, errors.Is(err, errGone), err})
			}
		})
	}
	all.Wait()
	slices.SortFunc(bad, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return sum, bad
}

// mendCopy verifies one copy and repairs it; after a repair it is verified
// again, so that its node knows that it is whole.
func (n *Nodes) mendCopy(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch, members []atoll.NodeID, id atoll.NodeID) (Mended, error) {
	var sum Mended
	node, err := n.Node(id)
	if err != nil {
		return sum, err
	}
	v, err := node.Verify(ctx, s.Seg)
	if s.Length > 0 && (errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrCorrupt)) {
		return n.remake(ctx, s, epoch, id, err)
	}
	if errors.Is(err, atoll.ErrNotExist) {
		return sum, nil // an open segment that this node is not part of any more
	}
	if err != nil {
		return sum, err
	}
	sum.Checked = int64(v.Blocks)
	if len(v.Damaged) == 0 {
		return n.mendLength(ctx, s, epoch, id, v, sum)
	}
	for _, r := range v.Damaged {
		sum.Damaged += int64(r.Blocks)
		n.mendRun(ctx, s.Seg, members, id, r)
	}
	if sum, err = n.mended(ctx, s.Seg, node, id, sum); err != nil {
		return sum, err
	}
	return n.mendLength(ctx, s, epoch, id, v, sum)
}

// mended verifies a copy again after a repair.
func (n *Nodes) mended(ctx context.Context, seg atoll.SegmentID, node wire.Node, id atoll.NodeID, sum Mended) (Mended, error) {
	after, err := node.Verify(ctx, seg)
	if err != nil {
		return sum, err
	}
	left := int64(0)
	for _, r := range after.Damaged {
		left += int64(r.Blocks)
	}
	sum.Repaired = max(0, sum.Damaged-left)
	n.countMended(sum.Repaired, left)
	if left > 0 {
		r := after.Damaged[0]
		return sum, fmt.Errorf("%d blocks are damaged, the first at %d, and no other copy has them: %w", left, r.Block, atoll.ErrCorrupt)
	}
	n.log.Info("copy repaired", "seg", seg, "node", id, "len", sum.Repaired)
	return sum, nil
}

func (n *Nodes) countMended(repaired, left int64) {
	if n.metrics == nil {
		return
	}
	n.metrics.repairs.Inc()
	n.metrics.repairBytes.Add(float64(repaired * atoll.BlockSize))
	if left > 0 {
		n.metrics.repairFailures.Inc()
	}
}

// mendLength holds a copy against the sealed length, and completes it.
func (n *Nodes) mendLength(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch, id atoll.NodeID, v wire.VerifyResult, sum Mended) (Mended, error) {
	if s.Length == 0 || v.Blocks >= s.Length {
		return sum, nil
	}
	rest, err := n.remake(ctx, s, epoch, id, fmt.Errorf("it has %d of %d blocks", v.Blocks, s.Length))
	sum.Add(rest)
	return sum, err
}

// remake copies a segment to a node that has lost it, or its end.
func (n *Nodes) remake(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch, id atoll.NodeID, cause error) (Mended, error) {
	lost := Mended{Checked: int64(s.Length), Damaged: int64(s.Length)}
	s.Unverified = append(slices.Clone(s.Unverified), id)
	still, err := n.Complete(ctx, s, epoch)
	if slices.Contains(still, id) {
		return lost, fmt.Errorf("%w; not made anew now (%v), %w: %w", cause, err, errGone, atoll.ErrCorrupt)
	}
	lost.Repaired = lost.Damaged
	n.log.Info("copy made anew", "seg", s.Seg, "node", id, "len", s.Length)
	return lost, nil
}

// mendRun repairs a run of damaged blocks as far as other copies have them:
// whole batches where headers or checksums were lost, blocks elsewhere.
func (n *Nodes) mendRun(ctx context.Context, seg atoll.SegmentID, members []atoll.NodeID, id atoll.NodeID, r wire.Run) {
	target, err := n.Node(id)
	if err != nil {
		return
	}
	for _, other := range members {
		if other == id || ctx.Err() != nil {
			continue
		}
		source, err := n.Node(other)
		if err != nil {
			continue
		}
		if mendBlocks(ctx, seg, source, target, r) == nil || mendBatches(ctx, seg, source, target, r) == nil {
			return
		}
	}
}

// mendBlocks copies a run block by block where it cannot be copied in pieces.
// It goes on after an error and returns the first.
func mendBlocks(ctx context.Context, seg atoll.SegmentID, source, target wire.Node, r wire.Run) error {
	buf := host.Alloc(int(min(r.Blocks.Bytes(), mendPiece)))
	defer buf.Release()
	move := func(at atoll.BlockNo, p []byte) error {
		if err := source.Read(ctx, seg, at, p); err != nil {
			return err
		}
		return target.Repair(ctx, seg, at, p)
	}
	var first error
	for at, end := r.Block, r.Block+r.Blocks; at < end && ctx.Err() == nil; {
		p := buf.Bytes()[:min((end-at).Bytes(), int64(len(buf.Bytes())))]
		next := at + atoll.BlockNo(len(p)/atoll.BlockSize)
		if err := move(at, p); err != nil {
			for ; at < next && len(p) > atoll.BlockSize; at++ {
				if one := move(at, p[:atoll.BlockSize]); one == nil {
					continue
				}
				if first == nil {
					first = err
				}
			}
			if first == nil && len(p) == atoll.BlockSize {
				first = err
			}
		}
		at = next
	}
	return first
}

// mendBatches copies whole batches over a run that begins and ends with one.
func mendBatches(ctx context.Context, seg atoll.SegmentID, source, target wire.Node, r wire.Run) error {
	for at, end := r.Block, r.Block+r.Blocks; at < end; {
		buf, err := source.Fetch(ctx, seg, at, mendPiece)
		if err != nil {
			return err
		}
		raw := buf.Bytes()
		raw = raw[:min(int64(len(raw)), (end-at).Bytes())]
		if len(raw) == 0 {
			buf.Release()
			return fmt.Errorf("copy segment %v: source ends at block %d: %w", seg, at, atoll.ErrGap)
		}
		err = target.Repair(ctx, seg, at, raw)
		at += atoll.BlockNo(len(raw) / atoll.BlockSize)
		buf.Release()
		if err != nil {
			return err
		}
	}
	return nil
}
