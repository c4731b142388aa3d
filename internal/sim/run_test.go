package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/wire"
)

// config is what a run is like. All of it follows from the seed, but a test may
// change it.
type config struct {
	seed        uint64
	trace       bool
	wire        bool // the wire protocol instead of the mesh
	nodes       int
	clients     int // of each gateway
	pages       int
	segment     int // blocks
	mode        volume.Mode
	length      time.Duration // of the part with faults
	pauseMs     int           // between a client's operations, on average
	gapMs       int           // between faults, on average
	idle        time.Duration
	flushDelay  time.Duration
	checkpoint  int64
	catalogLoss int // of 1000 requests, and as many answers
	brokenLease bool
	losses      bool // machines are lost for good, and replaced
	min         int  // copies without which nothing is written; 0: one less than wanted
	rot         bool
	weights     [faults]int
	lies        []host.Rule // mistakes of every node, to be found
}

// family is a kind of bad day.
type family int

const (
	mixed family = iota
	blackouts
	takeovers
	zombies
	rotting
	networks
	families
)

var familyNames = [families]string{"mixed", "blackouts", "takeovers", "zombies", "rotting", "networks"}

// newConfig draws what a run of a family is like.
func newConfig(seed uint64, f family) config {
	rng := rand.New(rand.NewPCG(seed, 0x636f6e66))
	c := config{
		seed: seed, nodes: 3 + rng.IntN(3), clients: 1 + rng.IntN(3), pages: 8 + rng.IntN(300), segment: 16 << rng.IntN(4),
		mode: volume.Mode(rng.IntN(2)), length: time.Duration(3+rng.IntN(9)) * time.Second, pauseMs: 5 + rng.IntN(40),
		gapMs: 100 + rng.IntN(700), idle: time.Duration(1+rng.IntN(10)) * time.Second,
		flushDelay: time.Duration(20+rng.IntN(300)) * time.Millisecond, checkpoint: 256 << 10 << rng.IntN(5),
	}
	if rng.IntN(3) == 0 {
		c.catalogLoss = 5 + rng.IntN(20)
	}
	w := &c.weights
	w[faultKillNode], w[faultPowerNode], w[faultKillOwner], w[faultHandOver] = 2, 2, 2, 1
	switch f {
	case mixed:
		for i := range w {
			w[i] = 1 + rng.IntN(3)
		}
		w[faultRot], w[faultRotRestart], w[faultBreakLease], w[faultAmnesia] = 0, 0, 0, 0
	case blackouts:
		w[faultBlackout], w[faultSlowNode] = 6, 2
	case takeovers:
		w[faultKillOwner], w[faultTakeoverCut], w[faultContend], w[faultIsolate], w[faultCutOne], w[faultLoneCopy] = 4, 6, 2, 2, 2, 4
	case zombies:
		w[faultBreakLease], w[faultAmnesia], w[faultCutBoth], w[faultContend] = 8, 6, 2, 1
		c.brokenLease = true
	case rotting:
		// Only one node's copies are ever in doubt: with two, a segment of two
		// copies has none that can vouch for its length.
		w[faultKillNode], w[faultPowerNode] = 0, 0
		w[faultRot], w[faultRotRestart], w[faultSlowNode] = 4, 6, 1
		c.rot = true
	case networks:
		w[faultCutOne], w[faultCutBoth], w[faultCutCatalog], w[faultCutNode], w[faultIsolate], w[faultPause] = 4, 4, 3, 2, 2, 2
	}
	return c
}

// result is what a run showed.
type result struct {
	err    error
	sum    uint64
	events int
	counts map[string]int
	log    []string
	hist   *history
	took   time.Duration
}

// run does one run in a bubble of its own.
func run(t *testing.T, cfg config) (r result) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, cfg)
		w.live()
		r = result{err: w.err(), sum: w.mu.sum, events: w.mu.events, counts: w.mu.last, log: w.mu.log, hist: w.history, took: w.now()}
	})
	if r.err == nil {
		r.err = r.hist.check(cfg.mode == volume.Writethrough)
	}
	return r
}

// Bounds of the part without faults.
const (
	settle    = 20 * time.Second // until the volume is served again
	drain     = 40 * time.Second // until every request from before has ended
	completes = 60 * time.Second // until every copy is whole
)

// live is the whole run.
func (w *world) live() {
	if w.cfg.wire {
		w.net = hosttest.NewNet(w.seed)
	}
	defer w.shutdown()
	if !w.build() {
		return
	}
	clients, stop := context.WithCancel(w.ctx)
	defer stop()
	var done []chan struct{}
	for _, g := range w.gateways {
		for i := range w.cfg.clients {
			c, ended := w.addClient(g, i), make(chan struct{})
			done = append(done, ended)
			w.wg.Go(func() { defer close(ended); c.run(clients) })
		}
	}
	n := &nemesis{w: w, rng: rand.New(rand.NewPCG(w.seed, 0x6e656d))}
	until := w.now() + w.cfg.length
	if w.cfg.losses {
		w.addWarden()
		w.wg.Go(func() { n.loses(until) })
	}
	n.run(until)
	w.heal1()
	last := w.gateways[w.rng.IntN(2)]
	w.other(last).wants(false)
	last.wants(true)
	s := w.awaitServing(last)
	if s == nil {
		return
	}
	s.calls.Done()
	w.sleep(w.ctx, "run", 2*time.Second)
	stop()
	limit := time.NewTimer(drain)
	defer limit.Stop()
	for _, d := range done {
		select {
		case <-d:
		case <-limit.C:
			w.broken("I9: a request did not end within %v after the faults had", drain)
			return
		}
	}
	if w.cfg.losses {
		w.undrain()
		w.awaitReplaced()
	}
	w.finalChecks(last)
}

// build makes machines, gateways and the volume.
func (w *world) build() bool {
	ctx, cancel := context.WithTimeout(w.ctx, 30*time.Second)
	defer cancel()
	p, err := w.newProcess(ctx, "admin")
	if err != nil {
		w.broken("open catalog: %w", err)
		return false
	}
	defer p.catalog.Close()
	if _, err := p.catalog.Init(ctx, catalog.Cluster{ID: clusterID}); err != nil {
		w.broken("init: %w", err)
		return false
	}
	for i := range w.cfg.nodes {
		w.addMachine(i)
		for p.catalog.State().Nodes[atoll.NodeID(i+1)].ID == 0 || !p.catalog.State().Nodes[atoll.NodeID(i+1)].Up {
			if !w.sleep(ctx, "build", 2*time.Millisecond) {
				w.broken("node %d does not register", i+1)
				return false
			}
		}
	}
	w.addGateway(0)
	w.addGateway(1)
	rec, err := medium.Create(ctx, medium.Options{Catalog: p.catalog}, catalog.Medium{
		Name: "disk", Kind: catalog.KindVolume, Owner: "root", Size: int64(w.cfg.pages) * atoll.BlockSize,
		Policy: catalog.Policy{Replicas: 3, MinReplicas: w.cfg.min, Segment: w.cfg.segment},
	})
	if err != nil {
		w.broken("create volume: %w", err)
		return false
	}
	w.volume = rec.ID
	w.gateways[0].wants(true)
	return true
}

// heal1 ends all faults.
func (w *world) heal1() {
	w.history.healed.Store(true)
	w.note("heal")
	w.mesh.healAll()
	if w.net != nil {
		w.net.HealAll()
	}
	for _, name := range append(w.names(), "admin") {
		w.memory.Cut(name, false)
	}
	for _, m := range w.machines {
		m.mu.Lock()
		m.mu.slow, m.mu.full = 0, false
		m.mu.Unlock()
		m.rules()
		if n, _ := m.running(); n != nil {
			n.Resume()
		} else if w.ctx.Err() == nil {
			m.restart()
		}
	}
}

func (w *world) names() (list []string) {
	for _, g := range w.gateways {
		list = append(list, g.name)
	}
	for _, m := range w.machines {
		list = append(list, m.name)
	}
	return list
}

// awaitServing returns the volume once a gateway serves it; its calls are to be
// ended.
func (w *world) awaitServing(g *gateway) *serving {
	limit := time.NewTimer(settle)
	defer limit.Stop()
	for {
		s, changed := g.serves()
		if s != nil {
			return s
		}
		select {
		case <-changed:
		case <-limit.C:
			w.broken("I9: %s does not serve the volume %v after the faults have ended", g.name, settle)
			return nil
		}
	}
}

// finalChecks reads everything, looks at every copy, hands the volume over and
// reads everything again.
func (w *world) finalChecks(g *gateway) {
	s := w.awaitServing(g)
	if s == nil {
		return
	}
	w.readAll(s)
	if !w.cfg.rot {
		w.awaitWhole(s) // a copy thrown away under this epoch waits for the next
	}
	ctx, cancel := context.WithTimeout(w.ctx, opTimeout)
	if err := s.vol.Verify(ctx); err != nil {
		w.broken("I1: verify volume: %w", err)
	}
	cancel()
	s.calls.Done()
	w.sleep(w.ctx, "run", w.cfg.idle+3*time.Second)
	w.other(g).wants(true)
	g.wants(false)
	s = w.awaitServing(w.other(g))
	if s == nil {
		return
	}
	w.readAll(s)
	w.awaitWhole(s)
	ctx, cancel = context.WithTimeout(w.ctx, opTimeout)
	defer cancel()
	if err := s.med.Check(ctx); err != nil && !w.cfg.rot {
		w.broken("I8: check medium: %w", err)
	}
	s.calls.Done()
	w.compareCopies()
}

// readAll reads every page, as a client that goes into the history.
func (w *world) readAll(s *serving) {
	c := &client{w: w, g: s.g, name: "final." + s.g.name, rng: rand.New(rand.NewPCG(w.seed, 3))}
	flush := &op{client: c.name, era: s.era, kind: opFlush}
	c.do(s, flush)
	if flush.err != nil {
		w.broken("I9: %v", flush)
	}
	for p := range w.cfg.pages {
		o := &op{client: c.name, era: s.era, kind: opRead, page: p, pages: 1}
		c.do(s, o)
		if o.err != nil {
			w.broken("I9: %v", o)
		}
	}
}

// awaitWhole waits until no copy of a sealed segment is unverified (I8).
func (w *world) awaitWhole(s *serving) {
	for began := w.now(); s.med.Stats().Unverified > 0; {
		if w.now()-began > completes {
			w.broken("I8: %d copies are not whole %v after the faults have ended", s.med.Stats().Unverified, completes)
			return
		}
		w.sleep(w.ctx, "run", 500*time.Millisecond)
	}
}

// compareCopies compares all copies of each sealed segment, byte by byte.
func (w *world) compareCopies() {
	type copyOf struct {
		m    *machine
		n    *node.Node
		info wire.SegmentInfo
	}
	held := make(map[atoll.SegmentID][]copyOf)
	var order []atoll.SegmentID
	ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
	defer cancel()
	for _, m := range w.machines {
		n, _ := m.running()
		if n == nil {
			if !m.lost.Load() {
				w.broken("I9: %s is down at the end", m.name)
			}
			continue
		}
		list, err := n.List(ctx, atoll.SegmentID{}, 1<<20)
		if err != nil {
			w.broken("list segments of %s: %w", m.name, err)
		}
		for _, s := range list {
			if s.Sealed {
				if held[s.Seg] == nil {
					order = append(order, s.Seg)
				}
				held[s.Seg] = append(held[s.Seg], copyOf{m, n, s})
			}
		}
	}
	slices.SortFunc(order, func(a, b atoll.SegmentID) int { return int(a.Ordinal) - int(b.Ordinal) })
	for _, seg := range order {
		var first []byte
		var where string
		for _, c := range held[seg] {
			p, err := contents(ctx, c.n, seg)
			c.m.mu.Lock()
			rotten := c.m.mu.rotten["segments/"+seg.String()+".seg"]
			c.m.mu.Unlock()
			switch {
			case err != nil && (rotten && errors.Is(err, atoll.ErrCorrupt) || errors.Is(err, atoll.ErrNotExist)):
			case err != nil:
				w.broken("I8: copy of segment %v on %s: %w", seg, c.m.name, err)
			case first == nil:
				first, where = p, c.m.name
			case string(first) != string(p):
				w.broken("I8: copies of segment %v on %s (%d bytes) and %s (%d bytes) differ", seg, where, len(first), c.m.name, len(p))
			}
		}
	}
	w.note("compared", len(order))
}

// contents returns all batches of one copy.
func contents(ctx context.Context, n *node.Node, seg atoll.SegmentID) ([]byte, error) {
	var all []byte
	for {
		b, err := n.Fetch(ctx, seg, atoll.BlockNo(len(all)/atoll.BlockSize), 1<<20)
		if err != nil {
			return nil, err
		}
		p := b.Bytes()
		if len(p) == 0 {
			b.Release()
			return all, nil
		}
		all = append(all, p...)
		b.Release()
	}
}

// shutdown ends everything that runs.
func (w *world) shutdown() {
	w.history.healed.Store(true)
	w.cancel()
	w.heal1()
	for _, g := range w.gateways {
		g.set(func() { g.mu.down = true })
	}
	w.wg.Wait()
	for _, m := range w.machines {
		m.close()
	}
	w.memory.Close()
}

// repeat tells how to run a seed again.
func repeat(f family, seed uint64) string {
	return fmt.Sprintf("ATOLL_SIM_SEED=%d ATOLL_SIM_FAMILY=%s go test ./internal/sim -run 'TestSeeds$' -v", seed, familyNames[f])
}
