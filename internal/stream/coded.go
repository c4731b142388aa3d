package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

// ReadCoded fills dst, whole blocks, from a coded segment at the given block,
// verified by the nodes. It comes from the data shard; when that is late, fails
// or is suspected, it is reckoned from as many others. A damaged shard is
// repaired in the background. sums, unless nil, is set to the CRC32C of each block.
// Errors are those of Read.
func (n *Nodes) ReadCoded(ctx context.Context, seg atoll.SegmentID, s segment.Shape, block atoll.BlockNo, dst []byte, sums []uint32) error {
	if int64(block)+int64(len(dst)/atoll.BlockSize) > int64(s.Blocks()) {
		return fmt.Errorf("read segment %v: blocks from %d on, it has %d: %w", seg, block, s.Blocks(), atoll.ErrNotExist)
	}
	ids, err := n.shards(seg, s)
	if err != nil {
		return err
	}
	r := codedReader{n: n, seg: seg, shape: s, ids: ids}
	for len(dst) > 0 {
		shard, at, run := s.Find(block)
		size := int(min(int64(len(dst)), run.Bytes()))
		var some []uint32
		if sums != nil {
			some, sums = sums[:size/atoll.BlockSize], sums[size/atoll.BlockSize:]
		}
		if err := r.read(ctx, shard, at, dst[:size], some); err != nil {
			return err
		}
		dst, block = dst[size:], block+atoll.BlockNo(size/atoll.BlockSize)
	}
	return nil
}

// codedReader reads one coded segment.
type codedReader struct {
	n     *Nodes
	seg   atoll.SegmentID
	shape segment.Shape
	ids   []atoll.NodeID // by shard
}

// read fills dst with payload of a shard that lies in one batch.
func (r *codedReader) read(ctx context.Context, shard int, at atoll.BlockNo, dst []byte, sums []uint32) error {
	n := r.n
	p, err := n.peer(r.ids[shard])
	if err == nil && p.local && !p.load.slow(n.epoch) && !n.suspected(p.id) {
		if err = n.readShard(ctx, p, r, shard, at, dst, sums); err != nil {
			err = r.rebuild(ctx, shard, at, dst, readTally{}.with(err), nil, false)
			addSums(dst, sums)
		}
		return err
	}
	if err = r.readAny(ctx, p, err, shard, at, dst); err == nil {
		addSums(dst, sums)
	}
	return err
}

// readAny is read where the node may be slow or cannot be reached.
func (r *codedReader) readAny(ctx context.Context, p *peer, err error, shard int, at atoll.BlockNo, dst []byte) error {
	n := r.n
	if err != nil || n.suspected(p.id) {
		return r.rebuild(ctx, shard, at, dst, readTally{}, nil, err == nil)
	}
	own := make(chan shardAnswer, 1)
	n.wg.Go(func() { own <- r.readOwn(ctx, p, shard, at, len(dst)) })
	timer := time.NewTimer(p.load.hedge(len(dst)))
	defer timer.Stop()
	select {
	case a := <-own:
		if a.err == nil {
			copy(dst, a.buf.Bytes())
			a.buf.Release()
			return nil
		}
		return r.rebuild(ctx, shard, at, dst, readTally{}.with(a.err), nil, false)
	case <-timer.C:
		if n.metrics != nil {
			n.metrics.hedges.Inc()
		}
		return r.rebuild(ctx, shard, at, dst, readTally{}, own, false)
	case <-ctx.Done():
		n.drop(own)
		return fmt.Errorf("read segment %v block %d: %w: %w", r.seg, at, atoll.ErrTimeout, ctx.Err())
	}
}

// drop gives back what a read brings that nobody waits for.
func (n *Nodes) drop(c <-chan shardAnswer) {
	n.wg.Go(func() {
		if a := <-c; a.buf != nil {
			a.buf.Release()
		}
	})
}

// shardAnswer is what the node of a shard said.
type shardAnswer struct {
	shard int
	answer
}

func (t readTally) with(err error) readTally {
	if err != nil {
		t.note(err)
	}
	return t
}

func (n *Nodes) suspected(id atoll.NodeID) bool {
	if !n.anySuspects() {
		return false
	}
	suspect, _ := n.doubt(id, time.Now(), false)
	return suspect
}

// readShard reads from one shard, and has it repaired when it is damaged.
func (n *Nodes) readShard(ctx context.Context, p *peer, r *codedReader, shard int, at atoll.BlockNo, dst []byte, sums []uint32) error {
	began := p.load.begin(n.epoch)
	var err error
	if sums != nil && p.sums != nil {
		err = p.sums.ReadSums(ctx, r.seg, at, dst, sums)
	} else if err = p.node.Read(ctx, r.seg, at, dst); err == nil {
		addSums(dst, sums)
	}
	p.load.end(n.epoch, began, len(dst))
	if err != nil {
		if errors.Is(err, atoll.ErrCorrupt) {
			n.repairSoon(repairJob{p.id, r.seg, at, atoll.BlockNo(len(dst) / atoll.BlockSize), r.shape})
		}
		return fmt.Errorf("node %v, shard %d: %w", p.id, shard, err)
	}
	return nil
}

func (r *codedReader) readOwn(ctx context.Context, p *peer, shard int, at atoll.BlockNo, size int) shardAnswer {
	buf := host.Alloc(size)
	if err := r.n.readShard(ctx, p, r, shard, at, buf.Bytes(), nil); err != nil {
		buf.Release()
		return shardAnswer{shard, answer{err: err}}
	}
	return shardAnswer{shard, answer{buf: buf}}
}

// rebuild reckons payload of a shard from others, as many as it has data shards,
// and asks further ones when some fail or are late. own, if it is not nil, will
// bring what the shard's own node says: that ends it too. With too the own node is
// asked when the others do not suffice.
func (r *codedReader) rebuild(ctx context.Context, shard int, at atoll.BlockNo, dst []byte, tally readTally, own chan shardAnswer, too bool) error {
	n := r.n
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	peers, order := r.others(shard, &tally)
	if p, err := n.peer(r.ids[shard]); too && err == nil {
		peers[shard], order = p, append(order, shard)
	}
	answers := make(chan shardAnswer, len(order)+1)
	timer := time.NewTimer(maxHedge)
	defer timer.Stop()
	asked, waiting, have := 0, 0, 0
	parts := make([]*host.Buffer, r.shape.Shards())
	defer func() {
		for _, b := range parts {
			if b != nil {
				b.Release()
			}
		}
		r.leave(answers, waiting, own)
	}()
	ask := func() {
		k := order[asked]
		asked, waiting = asked+1, waiting+1
		p := peers[k]
		n.wg.Go(func() { answers <- r.readOwn(ctx, p, k, at, len(dst)) })
	}
	for {
		for have+waiting < r.shape.Data && asked < len(order) {
			ask()
		}
		if have == r.shape.Data {
			return r.reckon(shard, parts, dst)
		}
		if have+waiting < r.shape.Data && own == nil {
			return tally.err(r.seg, at)
		}
		select {
		case a := <-answers:
			waiting--
			if a.err != nil {
				tally.note(a.err)
				continue
			}
			if a.shard == shard {
				copy(dst, a.buf.Bytes())
				a.buf.Release()
				return nil
			}
			parts[a.shard] = a.buf
			have++
		case a := <-own:
			own = nil
			if a.err != nil {
				tally.note(a.err)
				continue
			}
			copy(dst, a.buf.Bytes())
			a.buf.Release()
			return nil
		case <-timer.C:
			if asked < len(order) {
				ask()
				timer.Reset(maxHedge)
			}
		case <-ctx.Done():
			return fmt.Errorf("rebuild segment %v shard %d block %d: %w: %w", r.seg, shard, at, atoll.ErrTimeout, ctx.Err())
		}
	}
}

// leave lets answers go that come too late.
func (r *codedReader) leave(answers <-chan shardAnswer, waiting int, own <-chan shardAnswer) {
	if own != nil {
		r.n.drop(own)
	}
	for range waiting {
		r.n.drop(answers)
	}
}

// others returns the nodes of the other shards, and in which order to ask them:
// sound ones first, then data before parity, which are as good but need more
// reckoning, then by load.
func (r *codedReader) others(shard int, tally *readTally) (peers []*peer, order []int) {
	peers = make([]*peer, len(r.ids))
	keys := make([]int64, len(r.ids))
	for k, id := range r.ids {
		if k == shard {
			continue
		}
		p, err := r.n.peer(id)
		if err != nil {
			tally.note(err)
			continue
		}
		peers[k], keys[k] = p, p.load.cost()
		if r.n.suspected(id) {
			keys[k] += int64(time.Hour)
		}
		order = append(order, k)
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(keys[a], keys[b]) })
	return peers, order
}

// reckon fills dst with the blocks of a shard from those of others.
func (r *codedReader) reckon(shard int, bufs []*host.Buffer, dst []byte) error {
	code, err := r.n.coder(r.shape.Data, r.shape.Parity)
	if err != nil {
		return err
	}
	parts := make([][]byte, len(bufs))
	want := make([]bool, len(bufs))
	for k, b := range bufs {
		if b != nil {
			parts[k] = b.Bytes()
		}
	}
	parts[shard], want[shard] = dst[:0:len(dst)], true
	if err := code.ReconstructSome(parts, want); err != nil {
		return fmt.Errorf("rebuild segment %v shard %d: %w: %w", r.seg, shard, atoll.ErrCorrupt, err)
	}
	if len(parts[shard]) != len(dst) {
		return fmt.Errorf("rebuild segment %v shard %d: %d bytes of %d: %w", r.seg, shard, len(parts[shard]), len(dst), atoll.ErrCorrupt)
	}
	if len(dst) > 0 && &parts[shard][0] != &dst[0] {
		copy(dst, parts[shard])
	}
	if r.n.metrics != nil {
		r.n.metrics.rebuilds.Inc()
	}
	return nil
}

// PickCoded returns a copyset for a coded segment of so many data and parity
// shards: all of its members up, active, with room and not suspected. ErrNoSpace
// when only space is missing, ErrUnavailable when there are too few healthy
// nodes.
func (n *Nodes) PickCoded(ctx context.Context, data, parity int) (catalog.Copyset, error) {
	p := catalog.Policy{Replicas: data + parity, MinReplicas: data + parity}
	set, err := n.pickAll(ctx, p, false)
	if isNoSpace(err) {
		return n.pickAll(ctx, p, true)
	}
	return set, err
}

// pickAll is pick without suspected nodes.
func (n *Nodes) pickAll(ctx context.Context, p catalog.Policy, deep bool) (catalog.Copyset, error) {
	if h := n.health(n.catalog.State(), nil, deep); len(h.good) < p.Replicas && len(h.good)+h.full < p.Replicas {
		return catalog.Copyset{}, fmt.Errorf("place %d shards: %d healthy nodes, down or suspected: %v: %w", p.Replicas, len(h.good), h.down, atoll.ErrUnavailable)
	}
	return n.pick(ctx, p, nil, deep)
}
