package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

// Recover fences the copies of all the given segments under epoch, which must be
// the caller's and newer than the one that wrote them, finds their lengths,
// completes the copies that answered, and seals them. The results come in the
// order of the segments; one of length 0 holds nothing and may be dropped. The
// caller records them in the catalog, in one transaction, before it reads or
// writes anything; until then nothing is decided and Recover may be repeated, by
// anyone. ErrUnavailable names the copies that are missing, ErrFenced means that
// a newer owner is at work. It takes atoll.FenceWait at most when copies are
// silent, less if their servers are known to be down, and the time to copy what
// they lack.
func Recover(ctx context.Context, n *Nodes, segs []catalog.Unsealed, epoch atoll.Epoch) ([]catalog.Sealed, error) {
	done := make([]catalog.Sealed, len(segs))
	group, ctx := errgroup.WithContext(ctx)
	for i, u := range segs {
		group.Go(func() error {
			var err error
			done[i], err = n.recoverSegment(ctx, u, epoch)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return done, nil
}

// recovery is the shell around a recoverCore.
type recovery struct {
	*Nodes
	core  recoverCore
	epoch atoll.Epoch
	peers []wire.Node // nil where unknown
}

func (n *Nodes) recoverSegment(ctx context.Context, u catalog.Unsealed, epoch atoll.Epoch) (catalog.Sealed, error) {
	sealed := catalog.Sealed{Seg: u.Seg, Lane: u.Lane}
	members, err := n.Members(u.Seg)
	if err != nil {
		return sealed, err
	}
	r := &recovery{Nodes: n, epoch: epoch, peers: make([]wire.Node, len(members))}
	r.core = recoverCore{seg: u.Seg, nodes: members, bugs: activeBugs()}
	if err := r.fence(ctx); err != nil {
		return sealed, err
	}
	if r.core.length > 0 {
		if err := r.complete(ctx); err != nil {
			return sealed, err
		}
		sealed.Length = r.core.length
		if sealed.Unverified, err = r.core.conclude(); err != nil {
			return sealed, err
		}
	}
	n.log.InfoContext(ctx, "segment recovered", "seg", u.Seg, "epoch", epoch, "len", sealed.Length, "unverified", sealed.Unverified)
	if n.metrics != nil {
		n.metrics.recoveries.Inc()
	}
	return sealed, nil
}

// fenceAnswer is what one copy said to the fence.
type fenceAnswer struct {
	copy int
	tail wire.Tail
	err  error
}

// fence asks all copies, again and again where they cannot be reached, until the
// core has decided.
func (r *recovery) fence(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	answers := make(chan fenceAnswer)
	for i := range r.core.nodes {
		all.Go(func() { r.fenceCopy(ctx, i, answers) })
	}
	wait := time.NewTimer(atoll.FenceWait)
	defer wait.Stop()
	look := time.NewTicker(atoll.FenceWait / 8)
	defer look.Stop()
	for {
		select {
		case a := <-answers:
			switch {
			case a.err == nil:
				r.core.answered(a.copy, a.tail)
			case errors.Is(a.err, atoll.ErrFenced):
				return fmt.Errorf("recover segment %v under epoch %v: %w", r.core.seg, r.epoch, a.err)
			default:
				r.core.failed(a.copy, a.err)
			}
		case <-look.C:
			r.giveUpDown()
		case <-wait.C:
			r.core.waited = true
		case <-ctx.Done():
			return fmt.Errorf("recover segment %v: %w: %w", r.core.seg, atoll.ErrTimeout, ctx.Err())
		}
		if ok, err := r.core.decide(); ok || err != nil {
			return err
		}
	}
}

// giveUpDown counts silent copies as failed whose server has lost its lease: it
// is dead, stopped or cut off, as is likely when its media are being taken over.
func (r *recovery) giveUpDown() {
	st := r.State()
	for i, id := range r.core.nodes {
		if rec, ok := st.Nodes[id]; ok && !rec.Up && r.core.copies[i].state == copySilent {
			r.core.failed(i, fmt.Errorf("node %v is down: %w", id, atoll.ErrUnreachable))
		}
	}
}

// fenceCopy asks one copy until it answers.
func (r *recovery) fenceCopy(ctx context.Context, i int, answers chan<- fenceAnswer) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		a := fenceAnswer{copy: i}
		node, err := r.Node(r.core.nodes[i])
		if a.err = err; err == nil {
			r.peers[i] = node
			if r.core.bugs.NoFence {
				a.tail, a.err = r.peek(ctx, node)
			} else {
				a.tail, a.err = node.Fence(ctx, r.core.seg, r.epoch)
			}
		}
		if ctx.Err() != nil {
			return
		}
		select {
		case answers <- a:
		case <-ctx.Done():
			return
		}
		if a.err == nil {
			return
		}
		timer.Reset(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
	}
}

// peek learns a length without fencing: a mistake, for tests of the tests.
func (r *recovery) peek(ctx context.Context, node wire.Node) (wire.Tail, error) {
	before := r.core.seg
	before.Copyset--
	list, err := node.List(ctx, before, 2)
	if err != nil {
		return wire.Tail{}, err
	}
	for _, s := range list {
		if s.Seg == r.core.seg {
			return wire.Tail{Grade: wire.Clean, Length: s.Length, Sealed: s.Sealed, Epoch: s.Epoch}, nil
		}
	}
	return wire.Tail{Grade: wire.Absent}, nil
}

// complete brings the copies with evidence to the length and seals them, side by
// side. Which of them succeeded, the core keeps.
func (r *recovery) complete(ctx context.Context) error {
	targets := r.core.targets()
	errs := make([]error, len(targets))
	var all sync.WaitGroup
	for k, i := range targets {
		all.Go(func() { errs[k] = r.completeCopy(ctx, i) })
	}
	all.Wait()
	for k, i := range targets {
		switch {
		case errs[k] == nil:
			r.core.copies[i].state = copySealed
		case errors.Is(errs[k], atoll.ErrFenced):
			return fmt.Errorf("recover segment %v: %w", r.core.seg, errs[k])
		default:
			r.log.WarnContext(ctx, "copy not completed", "seg", r.core.seg, "node", r.core.nodes[i], "err", errs[k])
		}
	}
	for k, i := range targets {
		if errs[k] != nil {
			r.core.failed(i, errs[k])
		}
	}
	return ctx.Err()
}

func (r *recovery) completeCopy(ctx context.Context, i int) error {
	node, c := r.peers[i], &r.core
	if c.copies[i].tail.Sealed {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*atoll.RequestTimeout)
	defer cancel()
	if c.short(i) {
		if c.copies[i].tail.Grade == wire.Absent {
			if err := node.Create(ctx, c.seg, r.epoch, sizeFor(c.length)|wire.Reserve); err != nil {
				return err
			}
		}
		if err := r.copyBatches(ctx, c.seg, r.epoch, r.peers[c.source], node, c.lengthOf(i), c.length); err != nil {
			return err
		}
	}
	length := c.length
	if c.bugs.NoWriteBack {
		length = min(length, c.lengthOf(i))
	}
	return node.Seal(ctx, c.seg, r.epoch, length)
}
