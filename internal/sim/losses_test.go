package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/controller"
	"github.com/atollstore/atoll/internal/heal"
	"github.com/atollstore/atoll/internal/medium"
)

// warden is the processes that repair: an elected controller, and what copies
// for the machines' nodes. It dies and starts again.
type warden struct {
	w  *world
	g  *gateway // for its name and its view of the nodes
	mu sync.Mutex
	p  *process
	st func() *catalog.State

	set func(ctx context.Context, id atoll.NodeID, state catalog.NodeState) error
	end context.CancelFunc
}

// repairAfter is how long a machine of a simulation may be down.
const repairAfter = 4 * time.Second

func (w *world) addWarden() {
	w.warden = &warden{w: w, g: &gateway{w: w, name: "warden"}}
	w.wg.Go(func() {
		for w.ctx.Err() == nil {
			if err := w.warden.live(); err != nil {
				w.note("warden", kindOf(err))
			}
			w.sleep(w.ctx, "warden", 100*time.Millisecond)
		}
	})
}

// live is the life of one process.
func (d *warden) live() error {
	ctx, cancel := context.WithCancel(d.w.ctx)
	defer cancel()
	p, err := d.w.newProcess(ctx, "warden")
	if p.catalog == nil {
		return err
	}
	defer p.catalog.Close()
	s, err := p.catalog.OpenSession(ctx, catalog.Process{Host: "warden", PID: 1})
	if err != nil {
		return err
	}
	defer s.Close(context.WithoutCancel(ctx))
	nodes, stop := d.g.nodes(p)
	defer stop()
	defer nodes.Close()
	log := d.w.logger("warden")
	media := settling{medium.Options{Catalog: p.catalog, Nodes: nodes, Session: s, Log: log}}
	c := controller.Open(controller.Options{Catalog: p.catalog, Session: s, Nodes: nodes, Media: media, RepairAfter: repairAfter, Log: log})
	defer c.Close()
	h := heal.Open(heal.Options{Catalog: p.catalog, Nodes: nodes, Media: media, Local: d.local, Grace: 2 * time.Second, Sweep: 3 * time.Second, Log: log})
	defer h.Close()
	d.mu.Lock()
	d.p, d.end, d.st, d.set = p, cancel, p.catalog.State, p.catalog.SetNodeState
	d.mu.Unlock()
	select {
	case <-ctx.Done():
	case <-s.Lost():
	}
	return nil
}

// settling settles media for the warden.
type settling struct{ opts medium.Options }

func (m settling) Settle(ctx context.Context, id atoll.MediumID) error {
	_, err := medium.Settle(ctx, m.opts, id)
	return err
}

func (d *warden) local() map[atoll.NodeID]heal.Node {
	out := map[atoll.NodeID]heal.Node{}
	for _, m := range d.w.machines {
		if n, _ := m.running(); n != nil {
			out[m.id] = n
		}
	}
	return out
}

// kill ends the warden's process.
func (d *warden) kill() {
	d.mu.Lock()
	p, end := d.p, d.end
	d.p = nil
	d.mu.Unlock()
	if p != nil {
		d.w.note("kill", "warden")
		p.kill()
		end()
	}
}

func (d *warden) state() *catalog.State {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.st == nil {
		return &catalog.State{}
	}
	return d.st()
}

// order sets what is wanted of a node.
func (d *warden) order(id atoll.NodeID, state catalog.NodeState) error {
	d.mu.Lock()
	set := d.set
	d.mu.Unlock()
	if set == nil {
		return atoll.ErrUnavailable
	}
	ctx, cancel := context.WithTimeout(d.w.ctx, 10*time.Second)
	defer cancel()
	err := set(ctx, id, state)
	d.w.note("order", id, state, kindOf(err))
	return err
}

// settled reports whether no node that is lost or drained is a member of any
// copyset, and none is being replaced.
func (d *warden) settled() bool {
	st := d.state()
	for _, set := range st.Copysets {
		if len(set.Moves) > 0 {
			return false
		}
		for _, id := range set.Nodes {
			if d.w.machine(id).lost.Load() || st.Nodes[id].State != catalog.NodeActive {
				return false
			}
		}
	}
	return true
}

// loses takes machines away for good, drains others and kills the warden, while
// the nemesis does its work.
func (n *nemesis) loses(until time.Duration) {
	w, rng := n.w, rand.New(rand.NewPCG(n.w.seed, 0x6c6f7365))
	most := w.cfg.nodes - 4 // lost or drained: four are left, of which one or two may be down for a while
	lost := 0
	for w.now() < until && w.ctx.Err() == nil {
		w.sleep(w.ctx, "loses", time.Duration(300+rng.IntN(2500))*time.Millisecond)
		m := w.machines[rng.IntN(len(w.machines))]
		switch x := rng.IntN(6); {
		case x < 2 && w.drained() < most && !m.lost.Load() && (lost == 0 || w.warden.settled()):
			// A second one only when the first is replaced: a segment whose last
			// copy was restarted uncleanly has none that vouches for its length.
			lost++
			w.note("fault", "lose", m.name)
			w.note("lost", m.name)
			m.lost.Store(true)
			m.crash(rng, killed)
		case x < 4 && w.drained() < most && !m.lost.Load():
			if w.warden.order(m.id, catalog.NodeDraining) == nil {
				n.later("undrain "+m.name, time.Duration(rng.IntN(12))*time.Second, func() { _ = w.warden.order(m.id, catalog.NodeActive) })
			}
		case x == 4:
			w.warden.kill()
		}
	}
}

// undrain makes nodes active again that are drained when the faults end: half of
// them, the others are to be emptied.
func (w *world) undrain() {
	for _, m := range w.machines {
		if st := w.warden.state(); st.Nodes[m.id].State == catalog.NodeDraining && w.drained() > 1 {
			_ = w.warden.order(m.id, catalog.NodeActive)
		}
	}
}

// drained counts the nodes that cannot take anything for good.
func (w *world) drained() (n int) {
	for _, m := range w.machines {
		if w.warden.state().Nodes[m.id].State != catalog.NodeActive || m.lost.Load() {
			n++
		}
	}
	return n
}

// awaitReplaced waits until the lost machines are replaced everywhere (I8), and
// removes them.
func (w *world) awaitReplaced() {
	for began := w.now(); !w.warden.settled(); {
		if w.now()-began > 3*completes {
			for _, set := range w.warden.state().Copysets {
				if len(set.Moves) > 0 {
					w.note("unfinished", fmt.Sprintf("%+v", set))
				}
			}
			w.broken("I8: lost machines are members of copysets %v after the faults have ended", w.now()-began)
			return
		}
		w.sleep(w.ctx, "run", 500*time.Millisecond)
	}
	for _, m := range w.machines {
		if m.lost.Load() {
			if err := w.warden.order(m.id, catalog.NodeRemoved); err != nil {
				w.broken("remove %s: %w", m.name, err)
			}
		}
	}
}

// lossConfig draws what a run is like in which machines are lost for good.
func lossConfig(seed uint64) config {
	c := newConfig(seed, mixed)
	rng := rand.New(rand.NewPCG(seed, 0x6c6f7373))
	c.losses, c.nodes, c.min = true, 5+rng.IntN(2), 3
	c.length = time.Duration(8+rng.IntN(20)) * time.Second
	c.pages = 8 + rng.IntN(150)
	w := &c.weights
	clear(w[:])
	w[faultKillNode], w[faultPowerNode], w[faultKillOwner], w[faultHandOver] = 2, 2, 3, 1
	w[faultCutOne], w[faultCutCatalog], w[faultPause], w[faultContend] = 1, 1, 1, 1
	c.gapMs = 400 + rng.IntN(1500)
	c.idle = time.Duration(1+rng.IntN(3)) * time.Second
	return c
}

// TestLosses runs seeds in which machines are lost for good or drained: others
// take their places, whatever else goes wrong and whoever repairs dies. At last
// every acknowledged write is there, and every member of every copyset holds
// every segment. ATOLL_SIM_LOSSES sets how many seeds, ATOLL_SIM_LOSS runs one.
func TestLosses(t *testing.T) {
	count, first := 40, uint64(0)
	for name, v := range map[string]*int{"ATOLL_SIM_LOSSES": &count} {
		if s := os.Getenv(name); s != "" {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			*v = n
		}
	}
	one := os.Getenv("ATOLL_SIM_LOSS")
	if one != "" {
		var err error
		if first, err = strconv.ParseUint(one, 0, 64); err != nil {
			t.Fatal(err)
		}
		count = 1
	}
	var next, lost, ops atomic.Int64
	var all sync.WaitGroup
	for range max(2, runtime.NumCPU()) {
		all.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(count) || t.Failed() {
					return
				}
				seed := first + uint64(i)
				t.Run(fmt.Sprint(seed), func(t *testing.T) {
					cfg := lossConfig(seed)
					cfg.trace = one != ""
					r := run(t, cfg)
					if cfg.trace && testing.Verbose() {
						for _, l := range r.log {
							fmt.Println(l)
						}
					}
					if r.err != nil {
						t.Fatalf("%v\nrepeat: ATOLL_SIM_LOSS=%d go test ./internal/sim -run 'TestLosses$' -v", r.err, seed)
					}
					lost.Add(int64(r.counts["lost"]))
					ops.Add(int64(len(r.hist.ops)))
				})
			}
		})
	}
	all.Wait()
	t.Logf("%d seeds, %d machines lost, %d operations", count, lost.Load(), ops.Load())
}
