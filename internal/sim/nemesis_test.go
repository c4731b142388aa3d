package sim

import (
	"math/rand/v2"
	"time"
)

// fault is something that the nemesis does.
type fault int

const (
	faultKillNode fault = iota
	faultPowerNode
	faultBlackout    // all nodes lose power at one moment
	faultSlowNode    // its disk takes its time
	faultCutOne      // gateway to node or back
	faultCutBoth     // gateway and node, both ways
	faultCutCatalog  // a gateway from the catalog
	faultCutNode     // a node from the catalog
	faultIsolate     // a gateway from everything
	faultKillOwner   // the process that serves
	faultHandOver    // the owner closes, the other opens
	faultContend     // both gateways want to own
	faultBreakLease  // the owner's lease ends at once, and it does not hear of it
	faultRot         // bytes of a stored segment change
	faultRotRestart  // the same, and the node restarts
	faultFull        // a disk is full for a while
	faultAmnesia     // takeover from a live owner, then all nodes lose power
	faultPause       // a node stands still
	faultTakeoverCut // the owner dies while a node is cut off from it
	faultLoneCopy    // the owner reaches only some nodes and dies, and some nodes with it
	faults
)

var faultNames = [faults]string{
	"kill-node", "power-node", "blackout", "slow-node", "cut-one", "cut-both", "cut-catalog", "cut-node", "isolate",
	"kill-owner", "hand-over", "contend", "break-lease", "rot", "rot-restart", "full", "amnesia", "pause", "takeover-cut",
	"lone-copy",
}

// nemesis does harm until the time is up.
type nemesis struct {
	w   *world
	rng *rand.Rand
}

func (n *nemesis) run(until time.Duration) {
	total := 0
	for _, c := range n.w.cfg.weights {
		total += c
	}
	for n.w.now() < until && n.w.ctx.Err() == nil {
		n.w.sleep(n.w.ctx, "nemesis", time.Duration(20+n.rng.IntN(2*n.w.cfg.gapMs))*time.Millisecond)
		x := n.rng.IntN(total)
		for f, c := range n.w.cfg.weights {
			if x -= c; x < 0 {
				n.do(fault(f), rand.New(rand.NewPCG(n.rng.Uint64(), 1)))
				break
			}
		}
	}
}

// later does something after about d, unless the run stops first.
func (n *nemesis) later(what string, d time.Duration, do func()) {
	n.w.wg.Go(func() {
		if n.w.sleep(n.w.ctx, what, d) && !n.w.history.calm() {
			do()
		}
	})
}

// while draws how long a fault lasts.
func while(rng *rand.Rand) time.Duration {
	switch rng.IntN(3) {
	case 0:
		return time.Duration(1+rng.IntN(100)) * time.Millisecond
	case 1:
		return time.Duration(100+rng.IntN(1500)) * time.Millisecond
	}
	return time.Duration(1+rng.IntN(6)) * time.Second
}

// pastLease draws how long a fault lasts that should still be there when the
// next owner recovers.
func pastLease(rng *rand.Rand) time.Duration {
	if rng.IntN(4) == 0 {
		return while(rng)
	}
	return time.Duration(4500+rng.IntN(4000)) * time.Millisecond
}

func (n *nemesis) do(f fault, rng *rand.Rand) {
	w := n.w
	m := w.machines[rng.IntN(len(w.machines))]
	g := n.owner(rng)
	n.w.note("fault", faultNames[f], m.name, g.name)
	switch f {
	case faultKillNode, faultPowerNode:
		how := powerCut
		if f == faultKillNode {
			how = killed
		}
		n.crash(m, rng, how, while(rng))
	case faultBlackout:
		n.blackout(rng, rng.IntN(2) == 0)
	case faultSlowNode:
		m.slowed(time.Duration(1+rng.IntN(400)) * time.Millisecond)
		n.later("fast "+m.name, while(rng), func() { m.slowed(0) })
	case faultCutOne, faultCutBoth:
		from, to := g.name, m.name
		if rng.IntN(2) == 0 {
			from, to = to, from
		}
		n.cut(from, to, f == faultCutBoth, while(rng))
	case faultCutCatalog:
		n.cutCatalog(g.name, while(rng))
	case faultCutNode:
		n.cutCatalog(m.name, while(rng))
	case faultIsolate:
		d := while(rng)
		n.cutCatalog(g.name, d)
		for _, m := range w.machines {
			n.cut(g.name, m.name, true, d)
		}
		w.other(g).wants(true)
	case faultKillOwner:
		g.kill()
		w.other(g).wants(rng.IntN(2) == 0)
	case faultHandOver:
		w.other(g).wants(true)
		g.wants(false)
	case faultContend:
		w.gateways[0].wants(true)
		w.gateways[1].wants(true)
		n.later("content", while(rng), func() { w.gateways[rng.IntN(2)].wants(false) })
	case faultBreakLease:
		n.breakLease(g, rng)
	case faultRot:
		w.note("rot", w.machines[0].rot(rng))
	case faultRotRestart:
		n.rotRestart(g, rng)
	case faultFull:
		m.filled(true)
		n.later("room "+m.name, while(rng), func() { m.filled(false) })
	case faultAmnesia:
		n.breakLease(g, rng)
		n.later("amnesia", time.Duration(rng.IntN(150))*time.Millisecond, func() { n.blackout(rng, false) })
	case faultPause:
		n.pause(m, while(rng))
	case faultLoneCopy:
		n.loneCopy(g, m, rng)
	case faultTakeoverCut:
		n.cut(g.name, m.name, false, pastLease(rng))
		n.later("takeover", time.Duration(rng.IntN(20))*time.Millisecond, func() {
			g.kill()
			w.other(g).wants(true)
		})
	}
}

// pause makes a node stand still.
func (n *nemesis) pause(m *machine, d time.Duration) {
	node, _ := m.running()
	if node == nil {
		return
	}
	node.Pause()
	n.w.wg.Go(func() {
		n.w.sleep(n.w.ctx, "resume "+m.name, d)
		node.Resume()
	})
}

// owner returns the gateway that serves, or any.
func (n *nemesis) owner(rng *rand.Rand) *gateway {
	any := n.w.gateways[rng.IntN(len(n.w.gateways))]
	for _, g := range n.w.gateways {
		g.mu.Lock()
		serves := g.mu.serving != nil
		g.mu.Unlock()
		if serves {
			return g
		}
	}
	return any
}

func (w *world) other(g *gateway) *gateway {
	if w.gateways[0] == g {
		return w.gateways[1]
	}
	return w.gateways[0]
}

func (n *nemesis) crash(m *machine, rng *rand.Rand, how crashHow, down time.Duration) {
	n.w.wg.Go(func() {
		m.crash(rng, how)
		n.w.sleep(n.w.ctx, "restart "+m.name, down)
		if n.w.ctx.Err() == nil {
			m.restart()
		}
	})
}

// blackout takes the power of all nodes, and perhaps of the gateways.
func (n *nemesis) blackout(rng *rand.Rand, all bool) {
	if all {
		for _, g := range n.w.gateways {
			g.kill()
		}
	}
	for _, m := range n.w.machines {
		how := powerCut
		if rng.IntN(2) == 0 {
			how = powerAll
		}
		n.crash(m, rand.New(rand.NewPCG(rng.Uint64(), 2)), how, time.Duration(5+rng.IntN(300))*time.Millisecond)
	}
}

func (n *nemesis) cut(from, to string, both bool, d time.Duration) {
	w := n.w
	w.cut(from, to)
	if both {
		w.cut(to, from)
	}
	n.later("heal "+from+to, d, func() {
		w.heal(from, to)
		w.heal(to, from)
	})
}

func (n *nemesis) cutCatalog(name string, d time.Duration) {
	n.w.memory.Cut(name, true)
	n.later("join "+name, d, func() { n.w.memory.Cut(name, false) })
}

// breakLease ends the lease of an owner that goes on working: as when its clock
// runs slow. Only the fences keep it from doing harm.
func (n *nemesis) breakLease(g *gateway, rng *rand.Rand) {
	g.mu.Lock()
	s := g.mu.session
	g.mu.Unlock()
	if s == nil {
		return
	}
	n.cutCatalog(g.name, time.Duration(100+rng.IntN(2000))*time.Millisecond)
	n.w.memory.Expire("/atoll/1/state/process/" + s.ID().String())
	n.w.other(g).wants(true)
}

// loneCopy cuts an owner off from one node, or from all but one, kills it, and
// takes the power of the node that stands alone while the next owner recovers.
func (n *nemesis) loneCopy(g *gateway, m *machine, rng *rand.Rand) {
	one := rng.IntN(2) == 0
	d := pastLease(rng)
	for _, other := range n.w.machines {
		if one == (other == m) {
			n.cut(g.name, other.name, false, d)
		}
	}
	n.later("lone", time.Duration(rng.IntN(30))*time.Millisecond, func() {
		g.kill()
		n.w.other(g).wants(true)
		n.crash(m, rng, powerAll, time.Duration(4+rng.IntN(4))*time.Second)
	})
}

// rotRestart damages what a node wrote last, restarts it, and has the owner die
// at about that time.
func (n *nemesis) rotRestart(g *gateway, rng *rand.Rand) {
	m, delay := n.w.machines[0], time.Duration(rng.IntN(10))*time.Millisecond
	n.w.wg.Go(func() {
		n.w.note("rot", m.rotTail(rng))
		m.crash(rng, killed)
		n.w.sleep(n.w.ctx, "rotted "+m.name, time.Duration(rng.IntN(20))*time.Millisecond)
		if n.w.ctx.Err() == nil {
			m.restart()
		}
	})
	n.later("rot kill", delay, func() {
		g.kill()
		n.w.other(g).wants(true)
	})
}

func (w *world) cut(from, to string) {
	w.mesh.cut(from, to)
	if w.net != nil {
		w.net.Cut(from, to)
	}
	if w.net == nil {
		time.AfterFunc(w.after(silence, "silence", from, to), func() {
			if d, cut := w.mesh.silent(from, to); cut && d >= silence {
				w.giveUp(from, to)
			}
		})
	}
}

// giveUp fails what is on its way between two that hear nothing of each other.
func (w *world) giveUp(a, b string) {
	for _, g := range w.gateways {
		for _, m := range w.machines {
			if p := g.process(); p != nil && (g.name == a && m.name == b || g.name == b && m.name == a) {
				p.fail(m, "silent")
			}
		}
	}
}

func (w *world) heal(from, to string) {
	w.mesh.heal(from, to)
	if w.net != nil {
		w.net.Heal(from, to)
	}
}

func (m *machine) slowed(d time.Duration) {
	m.mu.Lock()
	m.mu.slow = d
	m.mu.Unlock()
	m.rules()
}

func (m *machine) filled(full bool) {
	m.mu.Lock()
	m.mu.full = full
	m.mu.Unlock()
	m.rules()
}
