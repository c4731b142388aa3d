package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
)

// office is what controllers are elected to.
const office = "controller"

// defaultCopies is the size of copysets that are made before any medium asks.
const defaultCopies = 3

const (
	settle      = 100 * time.Millisecond // changes come in groups: nodes at start
	deleteEvery = 2 * time.Second
	passTimeout = time.Minute
)

// Nodes is what the controller needs of the storage nodes; stream.Nodes is one.
type Nodes interface {
	// List returns the copies of a medium's segments on all nodes of the
	// cluster; an error unless every one of them answered.
	List(ctx context.Context, medium atoll.MediumID) ([]stream.Copy, error)
	// Delete removes a segment from its nodes and fences its name at epoch. It
	// returns the nodes that did not answer, with an error.
	Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (left []atoll.NodeID, err error)
	// DeleteCopy removes one copy, be its node a member of the copyset or not.
	DeleteCopy(ctx context.Context, id atoll.NodeID, seg atoll.SegmentID, epoch atoll.Epoch) error
}

// Options of Open.
type Options struct {
	Catalog *catalog.Catalog
	Session *catalog.Session
	Nodes   Nodes
	Media   Media // nil: media without an owner wait for the next one
	// RepairAfter is how long a node may be down before others take its place;
	// 0 means DefaultRepairAfter.
	RepairAfter time.Duration
	Copies      int // of media that ask for nothing; 0 means defaultCopies or as many as there are nodes
	Log         *slog.Logger
	Metrics     *Metrics
}

// DefaultCopies is how many copies a medium gets that asks for nothing: what is
// configured, else defaultCopies, or as many as there are active nodes.
func DefaultCopies(st *catalog.State, configured int) int {
	if configured > 0 {
		return configured
	}
	n := 0
	for _, node := range st.Nodes {
		if node.State == catalog.NodeActive {
			n++
		}
	}
	return max(1, min(defaultCopies, n))
}

// Controller stands for election and acts while it is elected. It ends with its
// session; open another one with the next.
type Controller struct {
	cat     *catalog.Catalog
	session *catalog.Session
	nodes   Nodes
	log     *slog.Logger
	metrics *Metrics
	copies  int
	media   Media

	repairAfter time.Duration

	leading atomic.Bool
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// Open starts a controller.
func Open(opts Options) *Controller {
	c := &Controller{cat: opts.Catalog, session: opts.Session, nodes: opts.Nodes, log: opts.Log, metrics: opts.Metrics, copies: opts.Copies,
		media: opts.Media, repairAfter: opts.RepairAfter}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.wg.Go(func() { c.run(ctx) })
	return c
}

// Leading reports whether this controller is the elected one.
func (c *Controller) Leading() bool { return c.leading.Load() && c.session.Valid() }

// Close stops the controller, which resigns if it was elected.
func (c *Controller) Close() error {
	c.cancel()
	c.wg.Wait()
	return nil
}

func (c *Controller) run(ctx context.Context) {
	l, err := c.cat.Campaign(ctx, c.session, office)
	if err != nil {
		if ctx.Err() == nil {
			c.log.WarnContext(ctx, "controller stopped", "err", err)
		}
		return
	}
	c.log.InfoContext(ctx, "controller elected", "process", c.session.ID())
	c.leading.Store(true)
	leading, stop := context.WithCancel(ctx)
	var passes sync.WaitGroup
	passes.Go(func() { c.placing(leading) })
	passes.Go(func() { c.deleting(leading) })
	passes.Go(func() { c.repairing(leading) })
	select {
	case <-ctx.Done():
	case <-l.Lost():
	}
	stop()
	passes.Wait()
	c.leading.Store(false)
	c.metrics.forget()
	c.log.InfoContext(ctx, "controller stopped", "process", c.session.ID())
	if c.session.Valid() {
		away, done := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer done()
		_ = l.Resign(away) // or the lease ends
	}
}

// placing keeps the copysets as placement wants them.
func (c *Controller) placing(ctx context.Context) {
	for {
		changed := c.cat.Changed()
		st := c.cat.State()
		c.metrics.observe(st, DefaultCopies(st, c.copies))
		more, err := c.place(ctx, st)
		if err != nil && ctx.Err() == nil {
			c.log.WarnContext(ctx, "copysets not placed", "err", err)
		}
		if !more && err == nil {
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
		if !pause(ctx, settle+time.Duration(len(st.Nodes))*time.Millisecond) { // large plans cost more
			return
		}
	}
}

// place does one plan; more says that there is another at once.
func (c *Controller) place(ctx context.Context, st *catalog.State) (more bool, err error) {
	copies := append(slices.Collect(maps.Keys(st.Copies)), defaultCopies)
	p := placement(slices.Collect(maps.Values(st.Nodes)), slices.Collect(maps.Values(st.Copysets)), copies, slices.Collect(maps.Keys(st.Codes))...)
	for _, id := range p.Retire {
		if _, err := c.cat.RetireCopyset(ctx, id, true); err != nil {
			return false, err
		}
		c.log.InfoContext(ctx, "copyset retired", "copyset", id)
	}
	for _, nodes := range p.Make {
		if _, err := c.cat.EnsureCopyset(ctx, nodes); err != nil {
			return false, err
		}
	}
	if len(p.Make) > 0 {
		c.log.InfoContext(ctx, "copysets made", "count", len(p.Make))
	}
	return p.More, nil
}

// deleting finishes the deletion of media.
func (c *Controller) deleting(ctx context.Context) {
	waiting := make(map[atoll.MediumID]bool) // what was complained of
	for {
		pass, done := context.WithTimeout(ctx, passTimeout)
		removed, err := c.deleteAll(pass, waiting)
		done()
		if err != nil && ctx.Err() == nil {
			c.log.WarnContext(ctx, "media to delete not listed", "err", err)
		}
		if removed > 0 && err == nil && ctx.Err() == nil {
			continue // what a clone pinned may be free now
		}
		if !pause(ctx, deleteEvery) {
			return
		}
	}
}

// deleteAll goes through all media that are to be deleted once, and returns how
// many it removed.
func (c *Controller) deleteAll(ctx context.Context, waiting map[atoll.MediumID]bool) (removed int, err error) {
	after := atoll.MediumID(0)
	for {
		media, err := c.cat.Deleting(ctx, after, 100)
		if err != nil {
			return removed, err
		}
		for _, m := range media {
			after = m.ID
			switch err := c.advance(ctx, m); {
			case errors.Is(err, errPinned):
			case err == nil:
				delete(waiting, m.ID)
				removed++
			case ctx.Err() != nil:
				return removed, nil
			case !waiting[m.ID]:
				waiting[m.ID] = true
				c.log.WarnContext(ctx, "medium not deleted yet", "medium", m.ID, "name", m.Name, "err", err)
			}
		}
		if len(media) < 100 {
			return removed, nil
		}
	}
}

// errPinned: a medium that is detached has to wait for its clones and readers.
var errPinned = errors.New("versions of it are in use")

// advance takes a medium that is to be deleted as far as it goes (D3).
func (c *Controller) advance(ctx context.Context, m catalog.Medium) error {
	if m.State == catalog.MediumDetached {
		m.State = catalog.MediumDeleting
		var err error
		if m, err = c.cat.UpdateMedium(ctx, m); err != nil {
			if errors.Is(err, atoll.ErrBusy) {
				return errPinned
			}
			return err
		}
		c.log.InfoContext(ctx, "medium not in use any more", "medium", m.ID, "name", m.Name)
	}
	return c.deleteMedium(ctx, m)
}

// deleteMedium finishes one deletion by the rules D1 and D2.
func (c *Controller) deleteMedium(ctx context.Context, m catalog.Medium) error {
	atoll.Assert(m.State == catalog.MediumDeleting, "delete medium %v in state %q", m.ID, m.State)
	copies, err := c.nodes.List(ctx, m.ID)
	if err != nil {
		return fmt.Errorf("wait for every node to say what it holds: %w", err)
	}
	head, err := c.cat.AcquireDeleting(ctx, m.ID, c.session)
	if err != nil {
		return err
	}
	segs, err := segments(m.ID, head, copies)
	if err != nil {
		return err
	}
	for _, seg := range segs {
		if !c.session.Valid() {
			return fmt.Errorf("delete segment %v: %w", seg, atoll.ErrFenced)
		}
		if err := c.deleteSegment(ctx, seg, head.Epoch); err != nil {
			return fmt.Errorf("delete segment %v: %w", seg, err)
		}
		for _, cp := range copies { // also those of former members
			if cp.Seg == seg && !slices.Contains(c.cat.State().Copysets[seg.Copyset].Nodes, cp.Node) {
				if err := c.nodes.DeleteCopy(ctx, cp.Node, seg, head.Epoch); err != nil {
					return fmt.Errorf("delete segment %v on node %v: %w", seg, cp.Node, err)
				}
			}
		}
		c.metrics.deleted()
		c.log.InfoContext(ctx, "segment deleted", "seg", seg, "epoch", head.Epoch, "name", m.Name)
	}
	if copies, err = c.nodes.List(ctx, m.ID); err != nil {
		return fmt.Errorf("wait for every node to say that it holds nothing: %w", err)
	}
	if len(copies) > 0 {
		return fmt.Errorf("node %v still holds segment %v: %w", copies[0].Node, copies[0].Seg, atoll.ErrBusy)
	}
	if err := c.cat.RemoveMedium(ctx, m.ID); err != nil {
		return err
	}
	c.log.InfoContext(ctx, "medium deleted", "medium", m.ID, "name", m.Name, "epoch", head.Epoch, "segments", len(segs))
	return nil
}

// deleteSegment removes a segment from every node that is part of the cluster.
func (c *Controller) deleteSegment(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error {
	left, err := c.nodes.Delete(ctx, seg, epoch)
	if len(left) == 0 {
		return err
	}
	st := c.cat.State()
	left = slices.DeleteFunc(left, func(id atoll.NodeID) bool { return st.Nodes[id].State == catalog.NodeRemoved })
	if len(left) == 0 {
		return nil
	}
	return fmt.Errorf("nodes %v: %w", left, errors.Join(err, atoll.ErrUnavailable))
}

// segments lists what is to go: what nodes hold and what the head knows, which
// may be about to be created. Nothing of another medium can be among them.
func segments(id atoll.MediumID, head catalog.Head, copies []stream.Copy) ([]atoll.SegmentID, error) {
	var out []atoll.SegmentID
	for _, cp := range copies {
		if cp.Seg.Medium != id {
			return nil, fmt.Errorf("node %v lists segment %v for medium %v: %w", cp.Node, cp.Seg, id, atoll.ErrCorrupt)
		}
		out = append(out, cp.Seg)
	}
	for _, u := range head.Unsealed {
		out = append(out, u.Seg)
	}
	for _, s := range head.Sealed {
		out = append(out, s.Seg)
	}
	out = append(out, head.Dropped...)
	slices.SortFunc(out, func(a, b atoll.SegmentID) int {
		return slices.Compare([]uint32{uint32(a.Ordinal), uint32(a.Copyset)}, []uint32{uint32(b.Ordinal), uint32(b.Copyset)})
	})
	return slices.Compact(out), nil
}

// pause waits for d; false if ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
