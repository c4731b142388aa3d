package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/reedsolomon"
	"golang.org/x/sync/errgroup"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// Encoding is a coded segment to be written.
type Encoding struct {
	Seg   atoll.SegmentID
	Epoch atoll.Epoch
	Shape segment.Shape
	// Read fills dst with the segment's blocks from b on. It is called by
	// several goroutines at once.
	Read func(ctx context.Context, b atoll.BlockNo, dst []byte) error
}

// encodeAhead is how many batches are on their way to the nodes at once.
const encodeAhead = 2

// Encode writes a coded segment: every shard to its node. When it returns nil
// all shards are sealed, on stable storage, and were read back. After an error
// the name is used up: whatever is on nodes is to be deleted.
func (n *Nodes) Encode(ctx context.Context, e Encoding) error {
	if err := e.Shape.Check(); err != nil {
		return fmt.Errorf("encode segment %v: %w", e.Seg, err)
	}
	w, err := n.encoding(e)
	if err == nil {
		err = w.run(ctx)
	}
	if err != nil {
		return fmt.Errorf("encode segment %v: %w", e.Seg, err)
	}
	return nil
}

// encoding is an Encoding on its way.
type encoding struct {
	Encoding
	n     *Nodes
	code  reedsolomon.Encoder
	ids   []atoll.NodeID // by shard
	nodes []wire.Node
	sums  []uint32 // of the last header of each shard
}

func (n *Nodes) encoding(e Encoding) (*encoding, error) {
	s := e.Shape
	w := &encoding{Encoding: e, n: n, sums: make([]uint32, s.Shards())}
	var err error
	if w.ids, err = n.shards(e.Seg, s); err != nil {
		return nil, err
	}
	for _, id := range w.ids {
		w.nodes = append(w.nodes, n.conn(id))
	}
	w.code, err = n.coder(s.Data, s.Parity)
	return w, err
}

// shards returns the node of each shard of a coded segment.
func (n *Nodes) shards(seg atoll.SegmentID, s segment.Shape) ([]atoll.NodeID, error) {
	members, err := n.Members(seg)
	if err != nil {
		return nil, err
	}
	if len(members) != s.Shards() {
		return nil, fmt.Errorf("find shards of segment %v: its copyset has %d members, not %d: %w", seg, len(members), s.Shards(), atoll.ErrCorrupt)
	}
	ids := make([]atoll.NodeID, len(members))
	for i := range ids {
		ids[i] = members[s.MemberOf(seg.Ordinal, i)]
	}
	return ids, nil
}

// coder returns the code of so many shards. Making one takes a while.
func (n *Nodes) coder(data, parity int) (reedsolomon.Encoder, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	key := [2]int{data, parity}
	if c := n.mu.coders[key]; c != nil {
		return c, nil
	}
	c, err := reedsolomon.New(data, parity)
	if err != nil {
		return nil, fmt.Errorf("code of %d+%d shards: %w: %w", data, parity, atoll.ErrInvalid, err)
	}
	n.mu.coders[key] = c
	return c, nil
}

func (w *encoding) run(ctx context.Context) error {
	s := w.Shape
	size := s.Length() + segment.FooterBlocks(s.Batches(), int(s.Length()))
	err := w.all(ctx, func(ctx context.Context, i int) error {
		return w.nodes[i].Create(ctx, w.Seg, w.Epoch, max(size, 4)|wire.Reserve)
	})
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := w.write(ctx); err != nil {
		return err
	}
	err = w.all(ctx, func(ctx context.Context, i int) error { return w.nodes[i].Seal(ctx, w.Seg, w.Epoch, s.Length()) })
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	err = w.all(ctx, func(ctx context.Context, i int) error { return readBack(ctx, w.nodes[i], w.Seg, s.Length()) })
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}
	if w.n.metrics != nil {
		w.n.metrics.encoded.Add(float64(s.Blocks().Bytes()))
	}
	return nil
}

// all calls fn for every shard, side by side.
func (w *encoding) all(ctx context.Context, fn func(ctx context.Context, i int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for i := range w.nodes {
		group.Go(func() error {
			if err := fn(ctx, i); err != nil {
				if ctx.Err() == nil && !isFenced(err) {
					w.n.Suspect(w.ids[i], err)
				}
				return fmt.Errorf("node %v: %w", w.ids[i], err)
			}
			return nil
		})
	}
	return group.Wait()
}

// codedBatch is one batch of all shards.
type codedBatch struct {
	bufs    []*host.Buffer // payload of each shard
	vecs    []*host.Vec
	appends []wire.Append
	done    chan *wire.Append
}

// write sends all batches, a few ahead of the answers. Nothing of it is under way
// when it returns, but what nodes were sent and have not answered.
func (w *encoding) write(ctx context.Context) (err error) {
	var fly []*codedBatch
	land := func() {
		if e := w.wait(ctx, fly[0]); err == nil {
			err = e
		}
		fly = fly[1:]
	}
	for i := 0; i < w.Shape.Batches() && err == nil; i++ {
		var b *codedBatch
		if b, err = w.batch(ctx, i); err != nil {
			break
		}
		w.send(b, i)
		if fly = append(fly, b); len(fly) >= encodeAhead {
			land()
		}
	}
	for len(fly) > 0 {
		land()
	}
	return err
}

// batch reads batch i of the data shards and reckons that of the parity shards.
func (w *encoding) batch(ctx context.Context, i int) (*codedBatch, error) {
	s := w.Shape
	_, blocks := s.Batch(i)
	b := &codedBatch{done: make(chan *wire.Append, s.Shards())}
	parts := make([][]byte, s.Shards())
	for range parts {
		buf := host.Alloc(int(blocks.Bytes()))
		b.bufs = append(b.bufs, buf)
		parts[len(b.bufs)-1] = buf.Bytes()
	}
	group, ctx := errgroup.WithContext(ctx)
	for k := range s.Data {
		group.Go(func() error {
			return w.Read(ctx, atoll.BlockNo(k)*s.Payload+atoll.BlockNo(i)*segment.ShardBatch, parts[k])
		})
	}
	err := group.Wait()
	if err == nil {
		err = w.code.Encode(parts)
	}
	if err != nil {
		b.release()
		return nil, err
	}
	return b, nil
}

// send puts headers before the payload and starts the batch on all nodes.
func (w *encoding) send(b *codedBatch, i int) {
	at, blocks := w.Shape.Batch(i)
	b.appends = make([]wire.Append, len(b.bufs))
	headers := make([]*host.Buffer, len(b.bufs))
	var all sync.WaitGroup
	for k, buf := range b.bufs {
		all.Go(func() {
			headers[k] = host.Alloc(atoll.BlockSize)
			w.sums[k] = w.Shape.EncodeShardHeader(headers[k].Bytes(), w.Seg, w.Epoch, k, i, w.sums[k], blockCRCs(buf.Bytes(), int(blocks)))
		})
	}
	all.Wait()
	for k, buf := range b.bufs {
		vec := host.NewVec()
		vec.Add(headers[k], headers[k].Bytes())
		vec.Add(buf, buf.Bytes())
		headers[k].Release()
		b.vecs = append(b.vecs, vec)
		a := &b.appends[k]
		*a = wire.Append{Seg: w.Seg, Epoch: w.Epoch, Offset: at, Vec: vec, Done: b.done, Node: w.ids[k]}
		w.nodes[k].Append(a)
	}
}

func blockCRCs(p []byte, blocks int) []uint32 {
	crcs := make([]uint32, blocks)
	for i := range crcs {
		crcs[i] = segment.CRC(p[i*atoll.BlockSize:][:atoll.BlockSize])
	}
	return crcs
}

// wait waits until every node has answered, or ctx ends.
func (w *encoding) wait(ctx context.Context, b *codedBatch) error {
	defer b.release()
	ctx, cancel := context.WithTimeout(ctx, 2*atoll.RequestTimeout)
	defer cancel()
	var errs []error
	for range b.appends {
		select {
		case a := <-b.done:
			if a.Err != nil {
				if !isFenced(a.Err) {
					w.n.Suspect(a.Node, a.Err)
				}
				errs = append(errs, fmt.Errorf("append to node %v: %w", a.Node, a.Err))
			}
		case <-ctx.Done():
			return errors.Join(append(errs, fmt.Errorf("append: %w: %w", atoll.ErrTimeout, ctx.Err()))...)
		}
	}
	return errors.Join(errs...)
}

// release gives the memory back that nobody else holds.
func (b *codedBatch) release() {
	for _, v := range b.vecs {
		v.Release()
	}
	for _, buf := range b.bufs {
		buf.Release()
	}
	b.vecs, b.bufs = nil, nil
}
