package node

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/wire"
)

// Committer makes the appends of nodes durable, in rounds: it takes all that is
// queued on any of them, writes it, flushes the disk once, and hands the
// outcomes back in one pass. Nodes on one file system share a Committer, so that
// three copies on one disk cost one wake-up and one flush, not three; nodes on
// different disks must not, since the slowest would hold up the others. The zero
// value is ready. It runs one goroutine while it has nodes.
type Committer struct {
	mu struct {
		sync.Mutex
		nodes []*Node // replaced, never changed
		turn  chan struct{}
		wake  chan struct{}
		stop  chan struct{} // of the goroutine
		done  chan struct{} // closed at its end
	}

	crowd atomic.Int32 // rounds that nobody may run but the goroutine

	// Of whoever has the turn.
	busy []*Node // with items in this round
	ops  []host.WriteOp
	many host.Together
}

// crowdRuns is for how many rounds senders must queue after one had to wait for
// another that carried out its own: together they fill a round better.
const crowdRuns = 64

// parallelBytes is from where the nodes of a round write beside one another.
const parallelBytes = 128 << 10

// join adds a node and starts the goroutine for the first one.
func (c *Committer) join(n *Node) (wake, turn chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.turn == nil {
		c.mu.turn, c.mu.wake = make(chan struct{}, 1), make(chan struct{}, 1)
	}
	c.mu.nodes = append(slices.Clone(c.mu.nodes), n)
	if len(c.mu.nodes) == 1 {
		c.mu.stop, c.mu.done = make(chan struct{}), make(chan struct{})
		go c.loop(c.mu.turn, c.mu.wake, c.mu.stop, c.mu.done)
	}
	return c.mu.wake, c.mu.turn
}

// leave finishes what is queued on a node that takes nothing more, and takes it
// out. The goroutine ends with the last node.
func (c *Committer) leave(n *Node) {
	c.mu.Lock()
	turn := c.mu.turn
	c.mu.Unlock()
	turn <- struct{}{}
	for c.round(n) {
	}
	c.mu.Lock()
	c.mu.nodes = slices.DeleteFunc(slices.Clone(c.mu.nodes), func(m *Node) bool { return m == n })
	var done chan struct{}
	if len(c.mu.nodes) == 0 {
		close(c.mu.stop)
		done = c.mu.done
	}
	c.mu.Unlock()
	<-turn
	if done == nil {
		return
	}
	<-done
	turn <- struct{}{}
	c.many.Close()
	<-turn
}

// loop commits rounds.
func (c *Committer) loop(turn, wake, stop, done chan struct{}) {
	defer close(done)
	for {
		select {
		case <-wake:
		case <-stop:
			return
		}
		// Those who were answered last round are ready to send the next
		// batches: let them, or rounds become small and slow.
		runtime.Gosched()
		select {
		case turn <- struct{}{}:
		default:
			c.crowd.Store(crowdRuns)
			turn <- struct{}{}
		}
		c.mu.Lock()
		nodes := c.mu.nodes
		c.mu.Unlock()
		c.round(nodes...)
		<-turn
	}
}

// round commits what is queued on the nodes and reports whether there was
// anything. The caller has the turn.
func (c *Committer) round(nodes ...*Node) bool {
	start := time.Now()
	c.busy = c.busy[:0]
	for _, n := range nodes {
		if n.take(start) {
			c.busy = append(c.busy, n)
		}
	}
	c.commit(start)
	return len(c.busy) > 0
}

// commit writes what the busy nodes took and makes the outcome known.
func (c *Committer) commit(start time.Time) {
	c.write()
	now := time.Now()
	for _, n := range c.busy {
		n.settle(start, now)
	}
	clear(c.busy)
}

var _ wire.Direct = (*Node)(nil)

// Direct implements wire.Direct, for nodes that share a Committer.
func (n *Node) Direct(nodes []wire.Node, list []wire.Append) wire.Round {
	c := n.opts.Committer
	if c.crowd.Load() > 0 {
		c.crowd.Add(-1)
		return nil
	}
	select {
	case n.turn <- struct{}{}:
	default:
		return nil
	}
	c.busy = c.busy[:0]
	for _, w := range nodes {
		m, ok := w.(*Node)
		if !ok || m.opts.Committer != c || slices.Contains(c.busy, m) || !m.unused() {
			clear(c.busy)
			<-n.turn
			return nil
		}
		c.busy = append(c.busy, m)
	}
	for i, m := range c.busy {
		m.takeOne(&list[i])
	}
	return (*direct)(c)
}

// direct is a Committer whose turn a sender has.
type direct Committer

// Run implements wire.Round.
func (d *direct) Run() {
	c := (*Committer)(d)
	turn := c.busy[0].turn
	c.commit(time.Now())
	<-turn
}

// unused reports whether the node serves and has nothing queued. The caller has
// the turn.
func (n *Node) unused() bool {
	return n.stopped() == nil && n.pausedUntil() == nil && n.queue.empty()
}

// takeOne is take for one append that was not queued.
func (n *Node) takeOne(a *wire.Append) {
	n.requests.Add(1)
	a.Done, a.Queued, a.Commit = nil, 0, 0
	n.items, n.dirty = n.items[:0], n.dirty[:0]
	it, err := n.verify(a)
	if err != nil {
		a.Err = err
		return
	}
	it.vec = a.Vec.Retain()
	it.verdict, it.err = n.admit(&it)
	n.items = append(n.items, it)
}

// write writes the round's runs and makes them durable. Errors go to the
// segments they concern.
func (c *Committer) write() {
	bytes, writes, shared := 0, 0, 0
	for _, n := range c.busy {
		b, w, s := n.prepare()
		bytes, writes, shared = bytes+b, writes+w, shared+s
	}
	together := shared > 1
	// Whatever takes longer than to start a goroutine is done side by side.
	if len(c.busy) > 1 && (bytes >= parallelBytes || shared < writes) {
		c.writeBeside(together)
	} else if shared < writes {
		for _, n := range c.busy {
			n.write(together)
		}
	} else {
		c.writeSmall(together)
	}
	if together {
		c.flush()
	}
}

// writeSmall writes from this goroutine.
func (c *Committer) writeSmall(together bool) {
	c.ops = c.ops[:0]
	for _, n := range c.busy {
		for _, s := range n.dirty {
			if r := &s.round; len(r.vec) > 0 && r.err == nil {
				c.ops = append(c.ops, host.WriteOp{File: r.handle.file, Vec: r.vec, Off: r.base.Bytes(), Durable: !(together && r.shared)})
			}
		}
	}
	c.many.Write(c.ops)
	i := 0
	for _, n := range c.busy {
		for _, s := range n.dirty {
			if r := &s.round; len(r.vec) > 0 && r.err == nil {
				r.err = c.ops[i].Err
				i++
			}
		}
	}
	clear(c.ops)
}

// writeBeside lets the nodes write at the same time.
func (c *Committer) writeBeside(together bool) {
	var wg sync.WaitGroup
	for _, n := range c.busy[1:] {
		wg.Go(func() { n.write(together) })
	}
	c.busy[0].write(together)
	wg.Wait()
}

// flush makes durable what the nodes wrote without a flush of their own.
func (c *Committer) flush() {
	var last *seg
	each := func(fn func(*seg)) {
		for _, n := range c.busy {
			for _, s := range n.dirty {
				if r := &s.round; r.shared && len(r.vec) > 0 && r.err == nil {
					fn(s)
				}
			}
		}
	}
	each(func(s *seg) { last = s })
	if last == nil {
		return
	}
	if err := last.round.handle.file.Sync(); err != nil {
		each(func(s *seg) { s.round.err = err })
	}
}

// take takes what is queued and judges it. It reports whether there is
// something to commit. A paused node keeps its queue, a stopped one refuses it.
func (n *Node) take(start time.Time) bool {
	why := n.stopped()
	if why == nil && n.pausedUntil() != nil {
		return false
	}
	n.items = n.queue.swap(n.items)
	if len(n.items) == 0 {
		return false
	}
	if errors.Is(why, atoll.ErrUnreachable) { // Abort
		n.finish(n.items, start, start, why)
		clear(n.items)
		return false
	}
	n.dirty = n.dirty[:0]
	for i := range n.items {
		if it := &n.items[i]; it.barrier == nil {
			it.verdict, it.err = n.admit(it)
		}
	}
	return true
}

// settle makes the round's outcome known.
func (n *Node) settle(start, now time.Time) {
	for _, s := range n.dirty {
		n.publish(s)
	}
	n.lastAppend.Store(now.UnixNano())
	n.finish(n.items, start, now, nil)
	clear(n.items)
	for i, s := range n.dirty {
		s.round.active, s.round.err = false, nil
		n.dirty[i] = nil
	}
}
