package heal

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
	"github.com/atollstore/atoll/internal/wire"
)

// Node is a storage node of this process; node.Node is one.
type Node interface {
	wire.Node
	// Evict removes a copy that the node need not hold any more.
	Evict(ctx context.Context, seg atoll.SegmentID) error
	// Requests counts what users asked of the node.
	Requests() uint64
}

// Media is what healing needs of the media.
type Media interface {
	// Settle seals and completes what the last owner of a medium left, if it has
	// no owner now; ErrBusy if it has.
	Settle(ctx context.Context, id atoll.MediumID) error
}

// Options of Open. Catalog, Nodes and Local are required.
type Options struct {
	Catalog *catalog.Catalog
	Nodes   *stream.Nodes
	Local   func() map[atoll.NodeID]Node // the nodes of this process, now
	Media   Media                        // nil: media without an owner wait for the next one
	Rate    int64                        // bytes a second that one node copies at most; 0: what it can
	Delay   time.Duration                // H6; 0 means atoll.LeaseTTL
	Grace   time.Duration                // H5; 0 means 10 minutes
	Sweep   time.Duration                // between looks for copies to evict; 0 means a minute
	Log     *slog.Logger
	Metrics *Metrics
}

// Healer serves the nodes of one process. Its methods may be called concurrently.
type Healer struct {
	opts   Options
	log    *slog.Logger
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu struct {
		sync.Mutex // memory work only
		workers    map[atoll.NodeID]*worker
		stock      map[atoll.NodeID]stock
	}
}

// stock is what the last look at a node's copies found.
type stock struct {
	sets  []catalog.SetBytes
	stray int64
}

// Open starts a healer. Close ends it.
func Open(o Options) *Healer {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.Delay, atoll.LeaseTTL)
	set(&o.Grace, 10*time.Minute)
	set(&o.Sweep, time.Minute)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	h := &Healer{opts: o, log: o.Log}
	h.mu.workers = map[atoll.NodeID]*worker{}
	h.mu.stock = map[atoll.NodeID]stock{}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.wg.Go(func() { h.run(ctx) })
	h.wg.Go(func() { h.sweep(ctx) })
	return h
}

// Close ends all work; what is half copied is gone on with after the next start.
func (h *Healer) Close() error {
	h.cancel()
	h.wg.Wait()
	return nil
}

// Report adds to a node's report what the healer knows of it.
func (h *Healer) Report(id atoll.NodeID, r *catalog.NodeReport) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.mu.stock[id]
	r.Sets, r.Stray = s.sets, s.stray
	if w := h.mu.workers[id]; w != nil {
		r.Healing = w.progress()
	}
}

// run keeps a worker for each node of this process that is to join a copyset.
func (h *Healer) run(ctx context.Context) {
	for {
		changed := h.opts.Catalog.Changed()
		st := h.opts.Catalog.State()
		wanted := map[atoll.NodeID]bool{}
		for _, set := range st.Copysets {
			for _, m := range set.Moves {
				wanted[m.New] = true
			}
		}
		if len(wanted) > 0 {
			h.start(ctx, wanted)
		}
		t := time.NewTimer(time.Second) // nodes of this process come and go, too
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-changed:
			t.Stop()
			if !pause(ctx, 50*time.Millisecond) {
				return
			}
		case <-t.C:
		}
	}
}

// start starts the workers that are missing.
func (h *Healer) start(ctx context.Context, wanted map[atoll.NodeID]bool) {
	for id, node := range h.opts.Local() {
		h.mu.Lock()
		missing := wanted[id] && h.mu.workers[id] == nil
		if missing {
			w := newWorker(h, id, node)
			h.mu.workers[id] = w
			h.wg.Go(func() {
				w.run(ctx)
				h.mu.Lock()
				delete(h.mu.workers, id)
				h.mu.Unlock()
			})
		}
		h.mu.Unlock()
	}
}

// incoming lists the copysets that a node is to join, the most endangered first.
func incoming(st *catalog.State, id atoll.NodeID) []catalog.Copyset {
	var out []catalog.Copyset
	for _, set := range st.Copysets {
		if _, is := set.Incoming(id); is {
			out = append(out, set)
		}
	}
	left := func(set catalog.Copyset) (n int) {
		for _, m := range set.Nodes {
			if lives(st, m) && !set.Leaving(m) {
				n++
			}
		}
		return n
	}
	slices.SortFunc(out, func(a, b catalog.Copyset) int {
		return cmp.Or(cmp.Compare(left(a), left(b)), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// lives reports whether a node can be asked, as far as the catalog knows.
func lives(st *catalog.State, id atoll.NodeID) bool {
	n, is := st.Nodes[id]
	return is && n.Up && !n.Report.Silent && n.State != catalog.NodeRemoved
}

// list asks nodes what they hold of some copysets, side by side. Who does not
// answer is not in the result.
func (h *Healer) list(ctx context.Context, ids []atoll.NodeID, sets map[atoll.CopysetID]bool) map[atoll.NodeID]held {
	out := make(map[atoll.NodeID]held, len(ids))
	var mu sync.Mutex
	var all sync.WaitGroup
	places := make(chan struct{}, listsAtOnce)
	for _, id := range ids {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			ctx, cancel := context.WithTimeout(ctx, listTime)
			defer cancel()
			list, err := h.opts.Nodes.ListNode(ctx, id, sets)
			if err != nil {
				if ctx.Err() == nil {
					h.log.DebugContext(ctx, "node does not say what it holds", "node", id, "err", err)
				}
				return
			}
			m := make(held, len(list))
			for _, s := range list {
				m[s.Seg] = s
			}
			mu.Lock()
			out[id] = m
			mu.Unlock()
		})
	}
	all.Wait()
	return out
}

const (
	listsAtOnce = 16
	listTime    = 30 * time.Second
)

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
