package sim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
	"github.com/atollstore/atoll/internal/stream"
	"github.com/atollstore/atoll/internal/wire"
)

// gateway is a process that owns the volume whenever it wants to and can, and
// serves it to its clients.
type gateway struct {
	w    *world
	name string
	mu   struct {
		sync.Mutex
		want    bool
		down    bool     // no new process is to start
		proc    *process // nil while down
		session *catalog.Session
		end     chan struct{} // closed to make the present process stop or die
		serving *serving      // nil while it does not own the volume
		changed chan struct{} // closed at the next change of the fields above
	}
}

// serving is a volume that a gateway has open: an era of its history.
type serving struct {
	g      *gateway
	era    *era
	vol    *volume.Volume
	med    *medium.Medium
	broken chan struct{} // closed when it must be opened again
	once   sync.Once
	calls  sync.WaitGroup
}

func (s *serving) fail() { s.once.Do(func() { close(s.broken) }) }

func (w *world) addGateway(i int) *gateway {
	g := &gateway{w: w, name: fmt.Sprintf("gw%d", i+1)}
	g.mu.changed = make(chan struct{})
	w.gateways = append(w.gateways, g)
	w.wg.Go(g.run)
	return g
}

// set changes the gateway's state and wakes all that wait for a change.
func (g *gateway) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
	close(g.mu.changed)
	g.mu.changed = make(chan struct{})
}

func (g *gateway) process() *process {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.mu.proc
}

// wants tells the gateway whether to own the volume.
func (g *gateway) wants(yes bool) { g.set(func() { g.mu.want = yes }) }

// kill ends the gateway's process as SIGKILL does.
func (g *gateway) kill() {
	g.mu.Lock()
	p, end := g.mu.proc, g.mu.end
	g.mu.Unlock()
	if p == nil || p.dead() {
		return
	}
	g.w.note("kill", g.name)
	p.kill()
	if g.w.net != nil {
		g.w.net.Kill(g.name)
	}
	close(end)
}

// serves returns the open volume, or nil and a channel that closes when that
// may have changed.
func (g *gateway) serves() (*serving, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.serving != nil {
		g.mu.serving.calls.Add(1)
	}
	return g.mu.serving, g.mu.changed
}

// run starts processes one after another until the run stops.
func (g *gateway) run() {
	for g.w.ctx.Err() == nil {
		g.mu.Lock()
		down, changed := g.mu.down, g.mu.changed
		g.mu.Unlock()
		if down {
			select {
			case <-changed:
			case <-g.w.ctx.Done():
			}
			continue
		}
		if err := g.live(); err != nil {
			g.w.note("process", g.name, kindOf(err))
		}
		g.w.sleep(g.w.ctx, g.name, 200*time.Millisecond)
	}
}

// live is the life of one process.
func (g *gateway) live() error {
	ctx, cancel := context.WithCancel(g.w.ctx)
	defer cancel()
	p, err := g.w.newProcess(ctx, g.name)
	if p.catalog == nil {
		return err
	}
	defer p.catalog.Close()
	s, err := p.catalog.OpenSession(ctx, catalog.Process{Host: g.name, PID: 1})
	if err != nil {
		return err
	}
	defer s.Close(context.WithoutCancel(ctx))
	nodes, stop := g.nodes(p)
	defer stop()
	defer nodes.Close()
	end := make(chan struct{})
	g.set(func() { g.mu.proc, g.mu.end, g.mu.session = p, end, s })
	defer g.set(func() { g.mu.proc, g.mu.session = nil, nil })
	g.w.wg.Go(func() {
		select {
		case <-end:
		case <-s.Lost():
		case <-ctx.Done():
		}
		g.w.sleep(ctx, g.name+" end", time.Millisecond)
		cancel()
	})
	opts := medium.Options{
		Catalog: p.catalog, Nodes: nodes, Session: s, Log: g.w.logger(g.name),
		Idle: g.w.cfg.idle, Grace: 1_737_311 * time.Microsecond, Sweep: 4_119_173 * time.Microsecond,
	}
	for ctx.Err() == nil {
		if !g.wanted(ctx) {
			continue
		}
		if err := g.own(ctx, p, opts); err != nil {
			g.w.note("open", g.name, kindOf(err))
			g.w.logger(g.name).Warn("volume not opened", "err", err)
			g.w.sleep(ctx, g.name, 150*time.Millisecond)
		}
	}
	return ctx.Err()
}

// nodes returns the process's view of the storage nodes.
func (g *gateway) nodes(p *process) (*stream.Nodes, func()) {
	o := stream.NodesOptions{Catalog: p.catalog, Seed: g.w.hash("nodes", g.name, g.w.now()) | 1, Log: g.w.logger(g.name)}
	if g.w.net == nil {
		o.Dial = func(n catalog.Node) wire.Node { return &link{p: p, m: g.w.machine(n.ID)} }
		return stream.NewNodes(o), func() {}
	}
	peers := wire.NewPeers(wire.PeersOptions{Net: g.w.net.Node(g.name), Cluster: clusterID, Log: g.w.logger(g.name)})
	o.Dial = func(n catalog.Node) wire.Node { return peers.Client(n.Addr, n.ID, n.Incarnation) }
	return stream.NewNodes(o), func() { peers.Close() }
}

func (w *world) machine(id atoll.NodeID) *machine { return w.machines[id-1] }

// wanted waits until the gateway wants to own the volume; false when it must
// look again.
func (g *gateway) wanted(ctx context.Context) bool {
	g.mu.Lock()
	want, changed := g.mu.want, g.mu.changed
	g.mu.Unlock()
	if want {
		return true
	}
	select {
	case <-changed:
	case <-ctx.Done():
	}
	return false
}

// own opens the volume, serves it and closes it, cleanly if it can.
func (g *gateway) own(ctx context.Context, p *process, opts medium.Options) error {
	octx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	m, err := medium.Open(octx, opts, g.w.volume)
	if err != nil {
		return err
	}
	v, err := volume.Open(octx, volume.OnMedium(m), volume.Options{
		Mode: g.w.cfg.mode, CacheBytes: 64 << 10, DirtyBytes: 1 << 20, FlushDelay: g.w.cfg.flushDelay,
		CheckpointBytes: g.w.cfg.checkpoint, Log: g.w.logger(g.name),
	})
	if err != nil {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = m.Close(closing)
		return err
	}
	if !g.w.cfg.rot {
		cctx, cancel := context.WithTimeout(octx, 500*time.Millisecond)
		if err := m.Check(cctx); errors.Is(err, atoll.ErrCorrupt) {
			g.w.broken("I8: %s, after recovery: %w", g.name, err)
		}
		cancel()
	}
	s := &serving{g: g, vol: v, med: m, broken: make(chan struct{})}
	if p.dead() {
		s.abort(ctx)
		return fmt.Errorf("open volume: process died: %w", atoll.ErrClosed)
	}
	s.era = g.w.history.open(g.name, m.Epoch())
	g.set(func() { g.mu.serving = s })
	clean := g.serve(ctx, s)
	g.set(func() { g.mu.serving = nil })
	s.rest()
	if !clean || p.dead() || ctx.Err() != nil {
		s.abort(ctx)
		s.calls.Wait()
		return nil
	}
	s.calls.Wait()
	return s.close(ctx)
}

// serve returns when the volume is to be closed; true if cleanly.
func (g *gateway) serve(ctx context.Context, s *serving) bool {
	for {
		g.mu.Lock()
		want, changed := g.mu.want, g.mu.changed
		g.mu.Unlock()
		if !want {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-s.med.Lost():
			return false
		case <-s.broken:
			return false
		case <-changed:
		}
	}
}

// abort ends the era as a crash does.
func (s *serving) abort(ctx context.Context) {
	// Each step at an instant of its own: whatever made the gateway stop has
	// others act at this moment too.
	s.rest()
	s.vol.Abort()
	s.rest()
	// Not a context that has ended: select would choose at random between it
	// and the writers.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = s.med.Close(ctx)
	s.g.w.note("abort", s.g.name)
}

// rest waits a little.
func (s *serving) rest() { s.g.w.sleep(context.Background(), s.g.name, 10*time.Microsecond) }

// close ends the era cleanly.
func (s *serving) close(ctx context.Context) error {
	s.rest()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	began := s.g.w.now()
	err := s.vol.Close(ctx)
	if err == nil {
		s.g.w.history.flushed(s.era, began)
	}
	s.rest()
	err = errors.Join(err, s.med.Close(ctx))
	s.g.w.note("close", s.g.name, kindOf(err))
	return err
}
