package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

// Times of the work around segments.
const (
	catalogTimeout = 3 * time.Second // one try of a catalog transaction
	sealTimeout    = 2 * time.Second // sealing or creating on a node
)

// catalogJob is something to enter into the medium's record.
type catalogJob struct {
	fx     effect
	sealed catalog.Sealed
}

// report queues a catalog transaction.
func (w *Writer) report(fx effect) {
	j := catalogJob{fx: fx}
	if m := w.opts.Metrics; m != nil && fx.mask != 0 {
		m.breaks.Inc()
	}
	if fx.kind == fxRecord {
		s := w.seg(fx.seg)
		j.sealed = catalog.Sealed{Seg: s.id, Lane: w.opts.Lane, Length: fx.at}
		for i, id := range s.ids {
			if fx.mask&(1<<i) != 0 {
				j.sealed.Unverified = append(j.sealed.Unverified, id)
			}
		}
		w.log.Info("segment sealed", "seg", s.id, "len", fx.at, "unverified", j.sealed.Unverified)
	}
	w.catalog <- j // has room: the core bounds its open segments
}

// runCatalog carries out the catalog transactions, one after another.
func (w *Writer) runCatalog() {
	for {
		select {
		case <-w.ctx.Done():
			return
		case j := <-w.catalog:
			if j.fx.kind == fxRegister {
				w.tell(w.registerSegment(j.fx.seg))
				continue
			}
			w.tell(event{kind: evRecorded, seg: j.fx.seg, err: w.persist(j)})
		}
	}
}

// tell hands a result to the writer's goroutine.
func (w *Writer) tell(ev event) {
	select {
	case w.results <- ev:
	case <-w.ctx.Done():
	}
}

// registerSegment picks a copyset and registers a segment on it.
func (w *Writer) registerSegment(no segNo) event {
	ctx, cancel := context.WithTimeout(w.ctx, catalogTimeout)
	defer cancel()
	ev := event{kind: evRegistered, seg: no, size: atoll.BlockNo(w.opts.Policy.Segment)}
	set, err := w.opts.Nodes.Pick(ctx, w.opts.Policy, nil)
	if isNoSpace(err) && w.deep() {
		ev.size = min(ev.size, reserveBlocks)
		if w.opts.Lane == catalog.Hot {
			ev.size = min(ev.size, reserveHot)
		}
		set, err = w.opts.Nodes.pick(ctx, w.opts.Policy, nil, true)
	}
	if err != nil {
		ev.err = err
		return ev
	}
	ev.nodes = set.Nodes
	ev.id, ev.err = w.opts.Registry.Register(ctx, w.opts.Lane, set.ID, ev.size)
	if ev.err == nil && len(set.Nodes) < w.opts.Policy.Replicas {
		w.log.Warn("segment has too few copies", "seg", ev.id, "copies", len(set.Nodes), "want", w.opts.Policy.Replicas)
		if m := w.opts.Metrics; m != nil {
			m.short.Inc()
		}
	}
	return ev
}

// Sizes of segments made in the nodes' reserve. In the hot lane there is hardly
// room for more than what may use it, since whatever waits gets the rest.
const (
	reserveBlocks = 2048
	reserveHot    = 600
)

// deep reports whether a segment made now may use the nodes' reserve.
func (w *Writer) deep() bool { return w.opts.Reserve != nil && w.opts.Reserve() }

// persist records a seal or an abandon, however often it takes.
func (w *Writer) persist(j catalogJob) error {
	pause := 10 * time.Millisecond
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		err := w.tryPersist(j)
		if err == nil || w.ctx.Err() != nil || isFinal(err) {
			return err
		}
		w.log.Warn("segment record not written", "seg", j.fx.id, "err", err)
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-w.ctx.Done():
			return err
		}
		pause = min(2*pause, time.Second)
	}
}

func (w *Writer) tryPersist(j catalogJob) error {
	ctx, cancel := context.WithTimeout(w.ctx, catalogTimeout)
	defer cancel()
	if j.fx.kind == fxAbandon {
		return w.opts.Registry.Abandon(ctx, j.fx.id)
	}
	return w.opts.Registry.Seal(ctx, j.sealed)
}

// isFinal reports whether repeating a catalog transaction is of no use.
func isFinal(err error) bool {
	for _, kind := range []error{atoll.ErrFenced, atoll.ErrNotExist, atoll.ErrInvalid, atoll.ErrClosed} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// create makes one copy of a segment.
func (w *Writer) create(fx effect) {
	s := w.seg(fx.seg)
	if fx.copy == 0 && w.opts.Metrics != nil {
		w.opts.Metrics.rolls.Inc()
	}
	w.wg.Go(func() {
		ctx, cancel := context.WithTimeout(w.ctx, sealTimeout)
		defer cancel()
		size := s.size
		if size <= reserveBlocks && w.deep() { // a larger one would find it used up too soon
			size |= wire.Reserve
		}
		err := s.nodes[fx.copy].Create(ctx, s.id, w.opts.Epoch, size)
		if isNoSpace(err) && size&wire.Reserve != 0 {
			err = fmt.Errorf("%w: %w", errReserve, err)
		}
		w.tell(event{kind: evCreated, seg: s.no, copy: fx.copy, err: err})
	})
}

// sealNodes seals the sound copies of a segment, side by side, and forgets it.
func (w *Writer) sealNodes(fx effect) {
	s := w.seg(fx.seg)
	w.wg.Go(func() {
		ctx, cancel := context.WithTimeout(w.ctx, sealTimeout)
		defer cancel()
		errs := make([]error, len(s.nodes))
		var all sync.WaitGroup
		for i, node := range s.nodes {
			if fx.mask&(1<<i) != 0 {
				continue
			}
			all.Go(func() { errs[i] = node.Seal(ctx, s.id, w.opts.Epoch, fx.at) })
		}
		all.Wait()
		ev := event{kind: evNodesSealed, seg: s.no}
		for i, err := range errs {
			if err != nil {
				ev.mask |= 1 << i
				w.log.Warn("copy not sealed", "seg", s.id, "node", s.ids[i], "err", err)
			}
		}
		if fx.wait {
			w.tell(ev)
		}
	})
}
