package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

// Catalog is what Nodes needs of the catalog.
type Catalog interface {
	State() *catalog.State
	Changed() <-chan struct{}
	EnsureCopyset(ctx context.Context, nodes []atoll.NodeID) (catalog.Copyset, error)
}

// NodesOptions are the settings of NewNodes. Catalog is required.
type NodesOptions struct {
	Catalog Catalog
	// Dial returns the node behind a catalog record. It does not wait for a
	// connection. What it returns is closed, when it is an io.Closer, once the
	// record names another address or incarnation. Nil: only local nodes.
	Dial func(catalog.Node) wire.Node
	// Seed makes the choices of Pick repeatable; 0 means a random one.
	Seed    uint64
	Log     *slog.Logger
	Metrics *Metrics
}

// Nodes is the storage nodes and copysets as this process sees them. It is what
// writers and readers share: connections, suspicions, and where to read and
// write next. All methods may be called concurrently.
type Nodes struct {
	catalog Catalog
	dial    func(catalog.Node) wire.Node
	log     *slog.Logger
	metrics *Metrics
	epoch   time.Time // zero of the clock that loads use
	repairs chan repairJob
	ctx     context.Context // ends with Close; for its own goroutines only
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	closed  atomic.Bool

	mu struct {
		sync.RWMutex // guards the fields below; held for memory work only
		peers        map[atoll.NodeID]*peer
		suspects     map[atoll.NodeID]*suspicion
		rng          *rand.Rand
		repairing    map[repairJob]bool
	}
}

// peer is a node that this process talks to.
type peer struct {
	id    atoll.NodeID
	local bool
	addr  string // of the catalog's record, when it was dialled
	inc   atoll.UUID
	node  wire.Node
	sums  wire.Summer // node, if it is one
	load  load
}

// suspicion is held against a node that failed.
type suspicion struct {
	until time.Time
	pause time.Duration
	full  bool // it had no space; nothing else is held against it
	deep  bool // not even in its reserve
}

// NewNodes returns the view of a process. Close ends it.
func NewNodes(o NodesOptions) *Nodes {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Seed == 0 {
		o.Seed = rand.Uint64()
	}
	n := &Nodes{
		catalog: o.Catalog, dial: o.Dial, log: o.Log, metrics: o.Metrics,
		epoch: time.Now(), repairs: make(chan repairJob, 64),
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.mu.peers = make(map[atoll.NodeID]*peer)
	n.mu.suspects = make(map[atoll.NodeID]*suspicion)
	n.mu.repairing = make(map[repairJob]bool)
	n.mu.rng = rand.New(rand.NewPCG(o.Seed, o.Seed^0x9e3779b97f4a7c15))
	n.wg.Go(n.runRepairs)
	return n
}

// Close ends repairs and late reads and closes the connections it dialled. No
// writer or reader may be using it any more.
func (n *Nodes) Close() error {
	n.closed.Store(true)
	n.cancel()
	n.wg.Wait()
	n.mu.Lock()
	peers := n.mu.peers
	n.mu.peers = make(map[atoll.NodeID]*peer)
	n.mu.Unlock()
	var errs []error
	for _, p := range peers {
		if !p.local {
			errs = append(errs, closeNode(p.node))
		}
	}
	return errors.Join(errs...)
}

func closeNode(w wire.Node) error {
	if c, ok := w.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// AddLocal makes a node of this process known. Its calls need no network.
func (n *Nodes) AddLocal(id atoll.NodeID, w wire.Node) {
	n.mu.Lock()
	old := n.mu.peers[id]
	sums, _ := w.(wire.Summer)
	n.mu.peers[id] = &peer{id: id, local: true, node: w, sums: sums}
	delete(n.mu.suspects, id)
	n.mu.Unlock()
	if old != nil && !old.local {
		_ = closeNode(old.node) // only dialled, nothing was written through it alone
	}
}

// RemoveLocal forgets a node of this process, before it is closed.
func (n *Nodes) RemoveLocal(id atoll.NodeID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.mu.peers[id]; p != nil && p.local {
		delete(n.mu.peers, id)
	}
}

// State returns the catalog's state as this process sees it.
func (n *Nodes) State() *catalog.State { return n.catalog.State() }

// Node returns the node with the given id, in this process or behind its
// address; ErrUnreachable when the catalog does not know it.
func (n *Nodes) Node(id atoll.NodeID) (wire.Node, error) {
	p, err := n.peer(id)
	if err != nil {
		return nil, err
	}
	return p.node, nil
}

// peer returns the connection to a node, dialling it when there is none to its
// present address and incarnation.
func (n *Nodes) peer(id atoll.NodeID) (*peer, error) {
	n.mu.RLock()
	p := n.mu.peers[id]
	n.mu.RUnlock()
	if p != nil && p.local {
		return p, nil
	}
	rec, ok := n.catalog.State().Nodes[id]
	if !ok || n.dial == nil || rec.State == catalog.NodeRemoved {
		return nil, fmt.Errorf("reach node %v: not known here: %w", id, atoll.ErrUnreachable)
	}
	if p != nil && p.addr == rec.Addr && p.inc == rec.Incarnation {
		return p, nil
	}
	return n.redial(rec)
}

// redial replaces the connection to a node. Dial does not wait, so it may be
// called under the lock.
func (n *Nodes) redial(rec catalog.Node) (*peer, error) {
	n.mu.Lock()
	old := n.mu.peers[rec.ID]
	if n.closed.Load() || old != nil && (old.local || old.addr == rec.Addr && old.inc == rec.Incarnation) {
		n.mu.Unlock()
		if old == nil {
			return nil, fmt.Errorf("reach node %v: %w", rec.ID, atoll.ErrClosed)
		}
		return old, nil
	}
	p := &peer{id: rec.ID, addr: rec.Addr, inc: rec.Incarnation, node: n.dial(rec)}
	n.mu.peers[rec.ID] = p
	n.mu.Unlock()
	if old != nil {
		_ = closeNode(old.node) // whatever was on its way ends with ErrUnreachable
	}
	return p, nil
}

// conn returns a node that a writer can call; one that is not known answers
// every call with an error.
func (n *Nodes) conn(id atoll.NodeID) wire.Node {
	w, err := n.Node(id)
	if err != nil {
		return noNode{err: err}
	}
	return w
}

// noNode is a node that cannot be reached, as far as a writer calls it.
type noNode struct {
	wire.Node
	err error
}

func (n noNode) Append(a *wire.Append) { a.Err = n.err; a.Done <- a }

func (n noNode) Create(context.Context, atoll.SegmentID, atoll.Epoch, atoll.BlockNo) error {
	return n.err
}

func (n noNode) Seal(context.Context, atoll.SegmentID, atoll.Epoch, atoll.BlockNo) error {
	return n.err
}

// Members returns the nodes that hold the copies of a segment.
func (n *Nodes) Members(seg atoll.SegmentID) ([]atoll.NodeID, error) {
	set, ok := n.catalog.State().Copysets[seg.Copyset]
	if !ok {
		return nil, fmt.Errorf("find copies of segment %v: copyset %v is not known here: %w", seg, seg.Copyset, atoll.ErrUnavailable)
	}
	return set.Nodes, nil
}

// Times for which a node that failed gets no new segments.
const (
	firstSuspicion = 500 * time.Millisecond
	maxSuspicion   = time.Minute
	fullPause      = 2 * time.Second
)

// Suspect notes that a node failed or was too slow. It gets no new segments for
// a while, twice as long each time it happens again soon, and is read last.
func (n *Nodes) Suspect(id atoll.NodeID, err error) {
	now := time.Now()
	n.mu.Lock()
	s := n.mu.suspects[id]
	if s == nil {
		s = &suspicion{}
		n.mu.suspects[id] = s
	}
	s.full, s.deep = isNoSpace(err), errors.Is(err, errReserve)
	switch {
	case s.full:
		s.until = now.Add(fullPause)
	case now.Before(s.until): // several writers saw the same
	case now.Before(s.until.Add(2*s.pause + time.Second)):
		s.pause = min(2*s.pause, maxSuspicion)
		s.until = now.Add(s.pause)
	default:
		s.pause = firstSuspicion
		s.until = now.Add(s.pause)
	}
	pause, full := s.until.Sub(now), s.full
	n.mu.Unlock()
	if full {
		n.log.Info("node full", "node", id, "dur", pause, "err", err)
		return
	}
	n.log.Warn("node suspected", "node", id, "dur", pause, "err", err)
	if n.metrics != nil {
		n.metrics.suspects.Inc()
	}
}

// doubt tells whether a node is under suspicion, and whether for want of space,
// or, if deep, for want of its reserve.
func (n *Nodes) doubt(id atoll.NodeID, now time.Time, deep bool) (suspect, full bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	s := n.mu.suspects[id]
	if s == nil || !now.Before(s.until) {
		return false, false
	}
	return !s.full, s.full && (s.deep || !deep)
}
