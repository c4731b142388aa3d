package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// Coded is a sealed coded segment.
type Coded struct {
	Seg        atoll.SegmentID
	Shape      segment.Shape
	Unverified []atoll.NodeID // whose shards are not known to be whole
}

// ShapeOf asks the members of a segment's copyset whether it is coded, and how.
// The first that has a batch of it answers.
func (n *Nodes) ShapeOf(ctx context.Context, seg atoll.SegmentID) (s segment.Shape, coded bool, err error) {
	members, err := n.Members(seg)
	if err != nil {
		return s, false, err
	}
	err = fmt.Errorf("look at segment %v: %w", seg, atoll.ErrUnavailable)
	for _, id := range members {
		node, bad := n.Node(id)
		if bad != nil {
			continue
		}
		buf, bad := node.Index(ctx, seg, 0, 1)
		if bad != nil {
			continue
		}
		h, bad := segment.ParseHeader(buf.Bytes())
		if bad == nil {
			s, _, coded, bad = segment.ParseShard(h)
		}
		buf.Release()
		if bad == nil {
			return s, coded, nil
		}
		err = fmt.Errorf("look at segment %v on node %v: %w", seg, id, bad)
	}
	return s, false, err
}

// CompleteCoded makes the unverified shards of a coded segment anew, or completes
// them, as Complete does with copies.
func (n *Nodes) CompleteCoded(ctx context.Context, c Coded, epoch atoll.Epoch) (still []atoll.NodeID, err error) {
	ids, err := n.shards(c.Seg, c.Shape)
	if err != nil {
		return c.Unverified, err
	}
	for _, id := range c.Unverified {
		shard := slices.Index(ids, id)
		if shard < 0 {
			continue // no longer a member: nothing to complete
		}
		if bad := n.Rebuild(ctx, c.Seg, c.Shape, epoch, shard, id); bad != nil {
			still = append(still, id)
			if err == nil {
				err = bad
			}
		}
	}
	return still, err
}

// Rebuild makes a shard of a sealed coded segment on a node, which need not be a
// member of its copyset yet, or completes the one that is there, from any others,
// as many as there are data shards. It is sealed, and read back: when Rebuild
// returns nil the shard is whole and durable. epoch is the caller's.
func (n *Nodes) Rebuild(ctx context.Context, seg atoll.SegmentID, s segment.Shape, epoch atoll.Epoch, shard int, to atoll.NodeID) error {
	m, err := n.mender(ctx, seg, s, shard, to)
	if err == nil {
		err = m.complete(ctx, epoch)
	}
	if err != nil {
		return fmt.Errorf("rebuild shard %d of segment %v on node %v: %w", shard, seg, to, err)
	}
	return nil
}

// mender makes blocks of one shard anew.
type mender struct {
	codedReader
	shard int
	node  wire.Node
	epoch atoll.Epoch // under which the segment was written
}

func (n *Nodes) mender(ctx context.Context, seg atoll.SegmentID, s segment.Shape, shard int, to atoll.NodeID) (*mender, error) {
	ids, err := n.shards(seg, s)
	if err != nil {
		return nil, err
	}
	m := &mender{codedReader: codedReader{n: n, seg: seg, shape: s, ids: ids}, shard: shard}
	if m.node, err = n.Node(to); err != nil {
		return nil, err
	}
	err = fmt.Errorf("no other shard has a header: %w", atoll.ErrUnavailable)
	for k, id := range ids {
		if k == shard {
			continue
		}
		node, bad := n.Node(id)
		if bad != nil {
			continue
		}
		h, bad := headerAt(ctx, node, seg, 0)
		if bad != nil {
			continue
		}
		if got, i, ok, bad := segment.ParseShard(h); bad != nil || !ok || got != s || i != k {
			err = fmt.Errorf("node %v has shard %d of %+v, not %d of %+v: %w", id, i, got, k, s, atoll.ErrCorrupt)
			continue
		}
		m.epoch = h.Epoch()
		return m, nil
	}
	return nil, err
}

// headerAt returns the batch header at a block of a node's segment.
func headerAt(ctx context.Context, node wire.Node, seg atoll.SegmentID, at atoll.BlockNo) (segment.Header, error) {
	buf, err := node.Index(ctx, seg, at, 1)
	if err != nil {
		return segment.Header{}, err
	}
	defer buf.Release()
	h, err := segment.ParseHeader(slices.Clone(buf.Bytes()))
	if err == nil && (h.Segment() != seg || h.Offset() != at) {
		err = fmt.Errorf("header of segment %v at %d: %w", h.Segment(), h.Offset(), atoll.ErrCorrupt)
	}
	return h, err
}

// own refuses what the node holds if that is another shard of the segment, from a
// time when it had or was to have another place in the copyset. Damage is found
// when all is read back.
func (m *mender) own(ctx context.Context) error {
	h, err := headerAt(ctx, m.node, m.seg, 0)
	if err != nil {
		return nil
	}
	if _, k, coded, err := segment.ParseShard(h); err == nil && (!coded || k != m.shard) {
		return fmt.Errorf("the node has shard %d of it: %w", k, atoll.ErrExist)
	}
	return nil
}

func (m *mender) complete(ctx context.Context, epoch atoll.Epoch) error {
	ctx, cancel := context.WithTimeout(ctx, 6*atoll.RequestTimeout)
	defer cancel()
	s := catalog.Sealed{Seg: m.seg, Length: m.shape.Length()}
	at, err := openCopy(ctx, m.node, s, epoch, m.shape.Length()+segment.FooterBlocks(m.shape.Batches(), int(m.shape.Length())), true)
	if err != nil {
		return err
	}
	if at > 0 {
		if err := m.own(ctx); err != nil {
			return err
		}
	}
	prev := uint32(0)
	if at > 0 && at < s.Length {
		tail, err := m.node.Fence(ctx, m.seg, epoch)
		if err != nil {
			return err
		}
		prev = tail.Sum
	}
	for i := range m.shape.Batches() {
		first, blocks := m.shape.Batch(i)
		if first < at {
			continue
		}
		if err := pace(ctx, int(blocks.Bytes())); err != nil {
			return err
		}
		buf, sum, err := m.batch(ctx, i, prev)
		if err != nil {
			return err
		}
		err = m.node.Extend(ctx, m.seg, epoch, first, buf.Bytes())
		buf.Release()
		if err != nil {
			return err
		}
		prev = sum
	}
	if err := m.node.Seal(ctx, m.seg, epoch, s.Length); err != nil {
		return err
	}
	return readBack(ctx, m.node, m.seg, s.Length)
}

// batch makes a whole batch of the shard.
func (m *mender) batch(ctx context.Context, i int, prev uint32) (*host.Buffer, uint32, error) {
	at, blocks := m.shape.Batch(i)
	buf := host.Alloc(int((blocks + 1).Bytes()))
	p := buf.Bytes()[atoll.BlockSize:]
	if err := m.rebuild(ctx, m.shard, at+1, p, readTally{}, nil, false); err != nil {
		buf.Release()
		return nil, 0, err
	}
	sum := m.shape.EncodeShardHeader(buf.Bytes()[:atoll.BlockSize], m.seg, m.epoch, m.shard, i, prev, blockCRCs(p, int(blocks)))
	if m.n.metrics != nil {
		m.n.metrics.repairBytes.Add(float64(len(buf.Bytes())))
	}
	return buf, sum, nil
}

// mend repairs a run of damaged blocks of the shard in place: payload block by
// block, a header with its batch.
func (m *mender) mend(ctx context.Context, r wire.Run) error {
	var first error
	for at, end := r.Block, r.Block+r.Blocks; at < end && ctx.Err() == nil; {
		i := int(at / (segment.ShardBatch + 1))
		start, blocks := m.shape.Batch(i)
		next := min(end, start+1+blocks)
		err := fmt.Errorf("it is a header: %w", atoll.ErrCorrupt)
		if at > start {
			err = m.mendPayload(ctx, at, next-at)
		}
		if err != nil { // checksums were lost with the header
			err = m.mendBatch(ctx, i)
		}
		if err != nil && first == nil {
			first = err
		}
		at = next
	}
	return first
}

func (m *mender) mendPayload(ctx context.Context, at, blocks atoll.BlockNo) error {
	buf := host.Alloc(int(blocks.Bytes()))
	defer buf.Release()
	if err := m.rebuild(ctx, m.shard, at, buf.Bytes(), readTally{}, nil, false); err != nil {
		return err
	}
	return m.node.Repair(ctx, m.seg, at, buf.Bytes())
}

// mendBatch writes a whole batch anew. Its header repeats the checksum of the one
// before, which may have to be reckoned too.
func (m *mender) mendBatch(ctx context.Context, i int) error {
	prev, from := uint32(0), i
	for ; from > 0; from-- {
		at, _ := m.shape.Batch(from - 1)
		if h, err := headerAt(ctx, m.node, m.seg, at); err == nil {
			prev = h.Sum()
			break
		}
	}
	for ; from < i; from++ {
		buf, sum, err := m.batch(ctx, from, prev)
		if err != nil {
			return err
		}
		buf.Release()
		prev = sum
	}
	at, _ := m.shape.Batch(i)
	buf, _, err := m.batch(ctx, i, prev)
	if err != nil {
		return err
	}
	defer buf.Release()
	return m.node.Repair(ctx, m.seg, at, buf.Bytes())
}

// MendCoded is Mend for a coded segment: every block of every shard is read where
// it lies, and what is damaged or missing is reckoned from other shards.
func (n *Nodes) MendCoded(ctx context.Context, c Coded, epoch atoll.Epoch) (Mended, []error) {
	ids, err := n.shards(c.Seg, c.Shape)
	if err != nil {
		return Mended{}, []error{err}
	}
	return mendEach(c.Seg, ids, c.Unverified, func(shard int, id atoll.NodeID) (Mended, error) {
		return n.mendShard(ctx, c, epoch, shard, id)
	})
}

func (n *Nodes) mendShard(ctx context.Context, c Coded, epoch atoll.Epoch, shard int, id atoll.NodeID) (sum Mended, err error) {
	node, err := n.Node(id)
	if err != nil {
		return sum, err
	}
	v, err := node.Verify(ctx, c.Seg)
	switch {
	case errors.Is(err, atoll.ErrNotExist), errors.Is(err, atoll.ErrCorrupt), err == nil && v.Blocks < c.Shape.Length():
		return n.remakeShard(ctx, c, epoch, shard, id, err)
	case err != nil:
		return sum, err
	}
	sum.Checked = int64(v.Blocks)
	if h, bad := headerAt(ctx, node, c.Seg, 0); bad == nil {
		if s, i, ok, bad := segment.ParseShard(h); !ok || bad != nil || s != c.Shape || i != shard {
			return sum, fmt.Errorf("it has shard %d of %+v instead of %d of %+v: %w", i, s, shard, c.Shape, atoll.ErrCorrupt)
		}
	}
	if len(v.Damaged) == 0 {
		return sum, nil
	}
	m, err := n.mender(ctx, c.Seg, c.Shape, shard, id)
	if err != nil {
		return sum, err
	}
	for _, r := range v.Damaged {
		sum.Damaged += int64(r.Blocks)
		_ = m.mend(ctx, r) // the next look tells what is left
	}
	return n.mended(ctx, c.Seg, node, id, sum)
}

// remakeShard makes a shard anew that a node has lost, or the end of which.
func (n *Nodes) remakeShard(ctx context.Context, c Coded, epoch atoll.Epoch, shard int, id atoll.NodeID, cause error) (Mended, error) {
	length := int64(c.Shape.Length())
	lost := Mended{Checked: length, Damaged: length}
	if cause == nil {
		cause = fmt.Errorf("it has not all of %d blocks", length)
	}
	if err := n.Rebuild(ctx, c.Seg, c.Shape, epoch, shard, id); err != nil {
		return lost, fmt.Errorf("%w; not made anew now (%v), %w: %w", cause, err, errGone, atoll.ErrCorrupt)
	}
	lost.Repaired = lost.Damaged
	n.log.Info("shard made anew", "seg", c.Seg, "node", id, "len", length)
	return lost, nil
}
