package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// repairJob is a damaged range of one copy.
type repairJob struct {
	node   atoll.NodeID
	seg    atoll.SegmentID
	block  atoll.BlockNo
	blocks atoll.BlockNo
	shape  segment.Shape // of a coded segment
}

// repairSoon queues a repair. When the queue is full it is left to the next
// reader or to the scrub.
func (n *Nodes) repairSoon(j repairJob) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.repairing[j] {
		return
	}
	select {
	case n.repairs <- j:
		n.mu.repairing[j] = true
	default:
	}
}

// runRepairs repairs one range after another.
func (n *Nodes) runRepairs() {
	for {
		select {
		case <-n.ctx.Done():
			return
		case j := <-n.repairs:
			err := n.repair(j)
			n.mu.Lock()
			delete(n.mu.repairing, j)
			n.mu.Unlock()
			if n.ctx.Err() != nil {
				return
			}
			n.noteRepair(j, err)
		}
	}
}

func (n *Nodes) noteRepair(j repairJob, err error) {
	if err != nil {
		n.log.Warn("damaged blocks not repaired", "seg", j.seg, "node", j.node, "off", j.block, "len", j.blocks, "err", err)
		if n.metrics != nil {
			n.metrics.repairFailures.Inc()
		}
		return
	}
	n.log.Info("damaged blocks repaired", "seg", j.seg, "node", j.node, "off", j.block, "len", j.blocks)
	if n.metrics != nil {
		n.metrics.repairs.Inc()
		n.metrics.repairBytes.Add(float64(j.blocks.Bytes()))
	}
}

// repair overwrites a damaged range with the bytes of another copy and reads it
// back.
func (n *Nodes) repair(j repairJob) error {
	ctx, cancel := context.WithTimeout(n.ctx, atoll.RequestTimeout)
	defer cancel()
	if j.shape.IsCoded() {
		return n.repairShard(ctx, j)
	}
	target, err := n.Node(j.node)
	if err != nil {
		return err
	}
	members, err := n.Members(j.seg)
	if err != nil {
		return err
	}
	buf := host.Alloc(int(j.blocks.Bytes()))
	defer buf.Release()
	err = fmt.Errorf("no other copy: %w", atoll.ErrUnavailable)
	for _, id := range members {
		if id == j.node {
			continue
		}
		var source wire.Node
		if source, err = n.Node(id); err != nil {
			continue
		}
		if err = source.Read(ctx, j.seg, j.block, buf.Bytes()); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	if err := target.Repair(ctx, j.seg, j.block, buf.Bytes()); err != nil {
		return err
	}
	return target.Read(ctx, j.seg, j.block, buf.Bytes())
}

// repairShard is repair for a shard.
func (n *Nodes) repairShard(ctx context.Context, j repairJob) error {
	ids, err := n.shards(j.seg, j.shape)
	if err != nil {
		return err
	}
	shard := slices.Index(ids, j.node)
	if shard < 0 {
		return fmt.Errorf("node %v has no shard of segment %v any more: %w", j.node, j.seg, atoll.ErrNotExist)
	}
	m, err := n.mender(ctx, j.seg, j.shape, shard, j.node)
	if err != nil {
		return err
	}
	return m.mend(ctx, wire.Run{Block: j.block, Blocks: j.blocks})
}

// sizeFor returns the size that a copy of a sealed segment is created with: that
// of the nodes' prewritten files, unless it is much shorter.
func sizeFor(length atoll.BlockNo) atoll.BlockNo {
	size := length + segment.FooterBlocks(int(length), int(length))
	if size <= atoll.SegmentBlocks/2 {
		return max(size, 8)
	}
	return max(size, atoll.SegmentBlocks)
}

// copyBatches copies whole batches from one copy to another, from block at up to
// the length.
func (n *Nodes) copyBatches(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, from, to wire.Node, at, length atoll.BlockNo) error {
	for at < length {
		if err := pace(ctx, 1<<20); err != nil {
			return fmt.Errorf("copy segment %v from block %d: %w", seg, at, err)
		}
		buf, err := from.Fetch(ctx, seg, at, 1<<20)
		if err != nil {
			return fmt.Errorf("copy segment %v from block %d: %w", seg, at, err)
		}
		raw := buf.Bytes()
		if left := (length - at).Bytes(); int64(len(raw)) > left {
			raw = raw[:left]
		}
		if len(raw) == 0 {
			buf.Release()
			return fmt.Errorf("copy segment %v: source ends at block %d before %d: %w", seg, at, length, atoll.ErrGap)
		}
		err = to.Extend(ctx, seg, epoch, at, raw)
		at += atoll.BlockNo(len(raw) / atoll.BlockSize)
		if n.metrics != nil {
			n.metrics.repairBytes.Add(float64(len(raw)))
		}
		buf.Release()
		if err != nil {
			return fmt.Errorf("copy segment %v up to block %d: %w", seg, at, err)
		}
	}
	return nil
}

// Pacer holds copying down to a rate.
type Pacer interface {
	// Wait returns when so many bytes may be copied, or with an error when ctx
	// ends first.
	Wait(ctx context.Context, bytes int) error
}

type pacerKey struct{}

// WithPacer returns a context under which Replicate copies no faster than p
// allows.
func WithPacer(ctx context.Context, p Pacer) context.Context {
	return context.WithValue(ctx, pacerKey{}, p)
}

func pace(ctx context.Context, bytes int) error {
	if p, ok := ctx.Value(pacerKey{}).(Pacer); ok {
		return p.Wait(ctx, bytes)
	}
	return nil
}

// Replicate makes a copy of a sealed segment of length s.Length on a node that
// need not be a member of its copyset, or completes the one that is there, and
// reads it back: when it returns nil the copy is whole and durable. from are the
// nodes that hold it sealed at that length. epoch is the one under which these
// have it, so that the segment's owner can go on to change or delete the copy;
// ErrFenced when the owner has deleted it there; ErrExist when the node has a shard
// of it that belongs to another place in the copyset, and has to go first.
func (n *Nodes) Replicate(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch, from []atoll.NodeID, to atoll.NodeID) error {
	shape, coded, err := n.ShapeOf(ctx, s.Seg)
	if err == nil && coded {
		return n.replicateShard(ctx, s.Seg, shape, epoch, to)
	}
	s.Unverified = nil
	if err == nil {
		err = n.completeOne(ctx, s, epoch, from, to)
	}
	if err != nil {
		return fmt.Errorf("copy segment %v to node %v: %w", s.Seg, to, err)
	}
	return nil
}

// replicateShard is Replicate for a coded segment: what a node holds of it depends
// on its place in the copyset, and a new member takes that of the old one.
func (n *Nodes) replicateShard(ctx context.Context, seg atoll.SegmentID, shape segment.Shape, epoch atoll.Epoch, to atoll.NodeID) error {
	set := n.catalog.State().Copysets[seg.Copyset]
	place := to
	if m, joins := set.Incoming(to); joins {
		place = m.Old
	}
	at := slices.Index(set.Nodes, place)
	if at < 0 {
		return fmt.Errorf("rebuild a shard of segment %v: node %v has no place in copyset %v: %w", seg, to, set.ID, atoll.ErrInvalid)
	}
	return n.Rebuild(ctx, seg, shape, epoch, shape.ShardOf(seg.Ordinal, at), to)
}

// ListNode returns the copies that a node holds of segments of the given
// copysets; any error means that the list is not whole.
func (n *Nodes) ListNode(ctx context.Context, id atoll.NodeID, sets map[atoll.CopysetID]bool) ([]wire.SegmentInfo, error) {
	node, err := n.Node(id)
	if err != nil {
		return nil, fmt.Errorf("list segments of node %v: %w", id, err)
	}
	var list []wire.SegmentInfo
	for after := (atoll.SegmentID{}); ; {
		page, err := node.List(ctx, after, 1000)
		if err != nil {
			return list, fmt.Errorf("list segments of node %v: %w", id, err)
		}
		for _, s := range page {
			if sets == nil || sets[s.Seg.Copyset] {
				list = append(list, s)
			}
			after = s.Seg
		}
		if len(page) == 0 {
			return list, nil
		}
	}
}

// Complete brings the unverified copies of a sealed segment to its length,
// seals them and reads them back. It returns those that are still not known to
// be whole, with the first error; the caller records the list. epoch is the
// caller's. A copy that was sealed at another length, by a recovery that did
// not prevail, is thrown away and made anew.
func (n *Nodes) Complete(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch) (still []atoll.NodeID, err error) {
	members, err := n.Members(s.Seg)
	if err != nil {
		return s.Unverified, err
	}
	for _, id := range s.Unverified {
		if !slices.Contains(members, id) {
			continue // no longer a member: nothing to complete
		}
		if cerr := n.completeOne(ctx, s, epoch, members, id); cerr != nil {
			still = append(still, id)
			if err == nil {
				err = fmt.Errorf("complete segment %v on node %v: %w", s.Seg, id, cerr)
			}
		}
	}
	return still, err
}

func (n *Nodes) completeOne(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch, members []atoll.NodeID, id atoll.NodeID) error {
	ctx, cancel := context.WithTimeout(ctx, 6*atoll.RequestTimeout)
	defer cancel()
	node, err := n.Node(id)
	if err != nil {
		return err
	}
	sources := n.sources(ctx, s, members, id)
	at, err := openCopy(ctx, node, s, epoch, sizeFor(s.Length), len(sources) > 0)
	if err != nil {
		return err
	}
	if at < s.Length {
		if err := n.copyFromAny(ctx, s, epoch, sources, node, at); err != nil {
			return err
		}
	}
	if err := node.Seal(ctx, s.Seg, epoch, s.Length); err != nil {
		return err
	}
	return readBack(ctx, node, s.Seg, s.Length)
}

// openCopy makes a copy, of size blocks, ready to be completed and returns how
// much of it is there. A copy that is of no use is made anew. A node does not take a segment
// back under the epoch that deleted it, so one that had to be deleted under the
// caller's own epoch stays unverified until the next owner comes. Nothing is
// thrown away unless another copy can give it back.
func openCopy(ctx context.Context, node wire.Node, s catalog.Sealed, epoch atoll.Epoch, size atoll.BlockNo, replaceable bool) (atoll.BlockNo, error) {
	before := s.Seg
	before.Copyset--
	list, err := node.List(ctx, before, 1)
	if err != nil {
		return 0, err
	}
	if len(list) == 0 || list[0].Seg != s.Seg {
		if err := node.Create(ctx, s.Seg, epoch, size); err == nil {
			return 0, nil
		} else if !isExist(err) {
			return 0, err
		}
	}
	tail, err := node.Fence(ctx, s.Seg, epoch)
	if err != nil {
		return 0, err
	}
	if tail.Grade > wire.Absent && (!tail.Sealed || tail.Length == s.Length) {
		return tail.Length, nil
	}
	if err := node.Create(ctx, s.Seg, epoch, size); !isExist(err) {
		return 0, err // made, where only the file was lost; or not to be made
	}
	if !replaceable {
		return 0, fmt.Errorf("the copy is of no use (%v, %d blocks) and no other can replace it: %w", tail.Grade, tail.Length, atoll.ErrUnavailable)
	}
	if err := node.Delete(ctx, s.Seg, epoch); err != nil {
		return 0, err
	}
	return 0, node.Create(ctx, s.Seg, epoch, size)
}

// sources returns the members other than id that hold the whole sealed length,
// those known to be whole first. An unverified copy may be one too: when its
// node was lost between its last answer and the seal. A segment has one writer,
// so whatever is long enough and undamaged holds the right batches.
func (n *Nodes) sources(ctx context.Context, s catalog.Sealed, members []atoll.NodeID, id atoll.NodeID) []wire.Node {
	var whole, rest []wire.Node
	before := s.Seg
	before.Copyset--
	for _, m := range members {
		node, err := n.Node(m)
		if err != nil || m == id {
			continue
		}
		if !slices.Contains(s.Unverified, m) {
			whole = append(whole, node)
			continue
		}
		list, err := node.List(ctx, before, 1)
		if err == nil && len(list) == 1 && list[0].Seg == s.Seg && list[0].Length >= s.Length && !list[0].Damaged {
			rest = append(rest, node)
		}
	}
	return append(whole, rest...)
}

// copyFromAny copies what a node lacks from the first source that can give it.
func (n *Nodes) copyFromAny(ctx context.Context, s catalog.Sealed, epoch atoll.Epoch, sources []wire.Node, to wire.Node, at atoll.BlockNo) error {
	err := fmt.Errorf("no whole copy: %w", atoll.ErrUnavailable)
	for _, from := range sources {
		if err = n.copyBatches(ctx, s.Seg, epoch, from, to, at, s.Length); err == nil {
			return nil
		}
	}
	return err
}

// readBack verifies every block of a copy: only what was read counts as whole.
func readBack(ctx context.Context, node wire.Node, seg atoll.SegmentID, length atoll.BlockNo) error {
	v, err := node.Verify(ctx, seg)
	if err != nil {
		return err
	}
	if len(v.Damaged) > 0 || v.Blocks < length {
		return fmt.Errorf("read back %d of %d blocks, %d damaged runs: %w", v.Blocks, length, len(v.Damaged), atoll.ErrCorrupt)
	}
	return nil
}

// Delete removes the copies of a segment, and fences its name at epoch. It
// returns the nodes that did not answer, whose copies are left, with the first
// error. The caller must have a record that the segment is to go.
func (n *Nodes) Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (left []atoll.NodeID, err error) {
	members, err := n.Members(seg)
	if err != nil {
		return nil, err
	}
	// Nodes that are on their way in may be copying it just now: the fence
	// keeps them from bringing it back.
	members = slices.Clone(members)
	for _, m := range n.catalog.State().Copysets[seg.Copyset].Moves {
		members = append(members, m.New)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	errs := make([]error, len(members))
	var all sync.WaitGroup
	for i, id := range members {
		all.Go(func() {
			node, err := n.Node(id)
			if err == nil {
				err = node.Delete(ctx, seg, epoch)
			}
			errs[i] = err
		})
	}
	all.Wait()
	for i, id := range members {
		if errs[i] != nil {
			left = append(left, id)
		}
	}
	if len(left) > 0 {
		return left, fmt.Errorf("delete segment %v: %w", seg, errors.Join(errs...))
	}
	return nil, nil
}

// DeleteCopy removes the copy that one node holds, whether it is a member of the
// copyset or not, and fences its name there.
func (n *Nodes) DeleteCopy(ctx context.Context, id atoll.NodeID, seg atoll.SegmentID, epoch atoll.Epoch) error {
	node, err := n.Node(id)
	if err != nil {
		return err
	}
	return node.Delete(ctx, seg, epoch)
}

// Copy is one copy of a segment as a node lists it.
type Copy struct {
	Node atoll.NodeID
	wire.SegmentInfo
}

// List returns the copies of a medium's segments on all nodes that are up, by
// node and segment. Any error means that the list is not whole: nothing may be
// concluded from what is missing in it (C24).
func (n *Nodes) List(ctx context.Context, medium atoll.MediumID) ([]Copy, error) {
	var ids []atoll.NodeID
	for id, rec := range n.catalog.State().Nodes {
		if rec.State != catalog.NodeRemoved {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	var list []Copy
	var errs []error
	for _, id := range ids {
		copies, err := n.listNode(ctx, id, medium)
		list = append(list, copies...)
		if err != nil {
			errs = append(errs, fmt.Errorf("list segments of node %v: %w", id, err))
		}
	}
	return list, errors.Join(errs...)
}

func (n *Nodes) listNode(ctx context.Context, id atoll.NodeID, medium atoll.MediumID) ([]Copy, error) {
	node, err := n.Node(id)
	if err != nil {
		return nil, err
	}
	var list []Copy
	after := atoll.SegmentID{Medium: medium}
	for {
		page, err := node.List(ctx, after, 1000)
		if err != nil {
			return list, err
		}
		for _, s := range page {
			if s.Seg.Medium != medium {
				return list, nil
			}
			list = append(list, Copy{id, s})
			after = s.Seg
		}
		if len(page) == 0 {
			return list, nil
		}
	}
}
