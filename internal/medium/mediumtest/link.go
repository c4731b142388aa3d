package mediumtest

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/wire"
)

// link is a node as one process reaches it. Answers to a process that is cut
// off, or from a node that was killed meanwhile, get lost.
type link struct {
	o *Owner
	m *member
}

var _ wire.Node = (*link)(nil)

func (o *Owner) dial(id atoll.NodeID) wire.Node {
	return &link{o: o, m: o.c.member(id)}
}

// up returns the node, or why it cannot be reached.
func (l *link) up() (*node.Node, error) {
	n := l.m.node.Load()
	if n == nil || l.o.dead.Load() {
		return nil, fmt.Errorf("node %v: %w", l.m.id, atoll.ErrUnreachable)
	}
	return n, nil
}

// heard returns err, unless the answer got lost.
func (l *link) heard(n *node.Node, err error) error {
	if l.o.dead.Load() || l.m.node.Load() != n {
		return fmt.Errorf("node %v: connection lost: %w", l.m.id, atoll.ErrUnreachable)
	}
	return err
}

// Append sends a copy of a, so that its answer can be held back.
func (l *link) Append(a *wire.Append) {
	n, err := l.up()
	if err != nil {
		a.Err = err
		a.Done <- a
		return
	}
	back := make(chan *wire.Append, 1)
	b := &wire.Append{Seg: a.Seg, Epoch: a.Epoch, Offset: a.Offset, Vec: a.Vec.Retain(), Done: back}
	n.Append(b)
	l.o.c.wg.Go(func() {
		<-back
		b.Vec.Release()
		a.Err, a.Queued, a.Commit = l.heard(n, b.Err), b.Queued, b.Commit
		a.Done <- a
	})
}

// call runs one request.
func (l *link) call(do func(*node.Node) error) error {
	n, err := l.up()
	if err != nil {
		return err
	}
	return l.heard(n, do(n))
}

func (l *link) Create(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error {
	return l.call(func(n *node.Node) error { return n.Create(ctx, seg, epoch, blocks) })
}

func (l *link) Fence(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (t wire.Tail, err error) {
	err = l.call(func(n *node.Node) (err error) { t, err = n.Fence(ctx, seg, epoch); return err })
	return t, err
}

func (l *link) Extend(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error {
	return l.call(func(n *node.Node) error { return n.Extend(ctx, seg, epoch, at, raw) })
}

func (l *link) Seal(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error {
	return l.call(func(n *node.Node) error { return n.Seal(ctx, seg, epoch, length) })
}

func (l *link) Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	return l.call(func(n *node.Node) error { return n.Read(ctx, seg, block, dst) })
}

func (l *link) Fetch(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (b *host.Buffer, err error) {
	err = l.call(func(n *node.Node) (err error) { b, err = n.Fetch(ctx, seg, at, max); return err })
	return b, err
}

func (l *link) Index(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (b *host.Buffer, err error) {
	err = l.call(func(n *node.Node) (err error) { b, err = n.Index(ctx, seg, at, max); return err })
	return b, err
}

func (l *link) Repair(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, p []byte) error {
	return l.call(func(n *node.Node) error { return n.Repair(ctx, seg, block, p) })
}

func (l *link) Discard(ctx context.Context, seg atoll.SegmentID, runs []wire.Run) error {
	return l.call(func(n *node.Node) error { return n.Discard(ctx, seg, runs) })
}

func (l *link) Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error {
	return l.call(func(n *node.Node) error { return n.Delete(ctx, seg, epoch) })
}

func (l *link) List(ctx context.Context, after atoll.SegmentID, max int) (list []wire.SegmentInfo, err error) {
	err = l.call(func(n *node.Node) (err error) { list, err = n.List(ctx, after, max); return err })
	return list, err
}

func (l *link) Stat(ctx context.Context) (s wire.Stat, err error) {
	err = l.call(func(n *node.Node) (err error) { s, err = n.Stat(ctx); return err })
	return s, err
}

func (l *link) Verify(ctx context.Context, seg atoll.SegmentID) (r wire.VerifyResult, err error) {
	err = l.call(func(n *node.Node) (err error) { r, err = n.Verify(ctx, seg); return err })
	return r, err
}
