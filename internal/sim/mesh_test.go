package sim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/wire"
)

// silence is how long a connection may be cut before it is given up.
const silence = 2 * time.Second

// mesh carries requests between processes and machines. A message takes a time
// of its own; only appends to one segment keep their order. A cut holds messages
// back until it is healed, also when the sender has long given up: late messages
// are what fences are for.
type mesh struct {
	w  *world
	mu struct {
		sync.Mutex
		cuts map[[2]string]time.Duration // since when
		held map[[2]string][]*message
		last map[[3]string]time.Duration
	}
}

type message struct {
	from, to string
	what     string
	order    string // messages with the same one arrive in the order of sending
	deliver  func()
}

func newMesh(w *world) *mesh {
	m := &mesh{w: w}
	m.mu.cuts = make(map[[2]string]time.Duration)
	m.mu.held = make(map[[2]string][]*message)
	m.mu.last = make(map[[3]string]time.Duration)
	return m
}

// send puts a message on its way.
func (m *mesh) send(msg *message) {
	d := m.w.latency("mesh", msg.from, msg.to, msg.what)
	m.mu.Lock() // always: arrive takes it too, which orders the two
	if msg.order != "" {
		key := [3]string{msg.from, msg.to, msg.order}
		if at := m.w.now() + d; at <= m.mu.last[key] {
			d = m.w.after(m.mu.last[key] - m.w.now() + 1)
		}
		m.mu.last[key] = m.w.now() + d
	}
	m.mu.Unlock()
	time.AfterFunc(d, func() { m.arrive(msg) })
}

func (m *mesh) arrive(msg *message) {
	pair := [2]string{msg.from, msg.to}
	m.mu.Lock()
	if _, cut := m.mu.cuts[pair]; cut || len(m.mu.held[pair]) > 0 {
		m.mu.held[pair] = append(m.mu.held[pair], msg)
		m.mu.Unlock()
		return
	}
	m.mu.Unlock()
	m.w.note("msg", msg.from, msg.to, msg.what)
	msg.deliver()
}

// cut stops messages from one to another.
func (m *mesh) cut(from, to string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, is := m.mu.cuts[[2]string{from, to}]; !is {
		m.mu.cuts[[2]string{from, to}] = m.w.now()
	}
}

// heal lets messages pass again and sends on what was held.
func (m *mesh) heal(from, to string) {
	pair := [2]string{from, to}
	m.mu.Lock()
	delete(m.mu.cuts, pair)
	held := m.mu.held[pair]
	delete(m.mu.held, pair)
	m.mu.Unlock()
	for _, msg := range held {
		m.send(msg)
	}
}

func (m *mesh) healAll() {
	for _, g := range m.w.gateways {
		for _, n := range m.w.machines {
			m.heal(g.name, n.name)
			m.heal(n.name, g.name)
		}
	}
}

// silent returns for how long the pair has been cut, in either direction.
func (m *mesh) silent(a, b string) (time.Duration, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t1, cut1 := m.mu.cuts[[2]string{a, b}]
	t2, cut2 := m.mu.cuts[[2]string{b, a}]
	switch {
	case cut1 && cut2:
		return m.w.now() - min(t1, t2), true
	case cut1:
		return m.w.now() - t1, true
	case cut2:
		return m.w.now() - t2, true
	}
	return 0, false
}

// link is a machine's node as one process reaches it.
type link struct {
	p *process
	m *machine
}

var _ wire.Node = (*link)(nil)

// request is a message to a node that waits for its answer.
type request struct {
	link *link
	what string
	once sync.Once
	done func(error) // called once: nil means that the answer has arrived
}

func (r *request) end(err error) { r.once.Do(func() { r.link.p.forget(r); r.done(err) }) }

// ask sends a request. run is called at the node, if it is up, and returns at
// once what to do when the answer has come back; answered calls that.
func (l *link) ask(what, order string, done func(error), run func(n *node.Node, answered func())) {
	w := l.p.w
	r := &request{link: l, what: what, done: done}
	if l.p.dead() {
		r.done(fmt.Errorf("node %v: process is dead: %w", l.m.id, atoll.ErrUnreachable))
		return
	}
	if d, cut := w.mesh.silent(l.p.name, l.m.name); cut && d > silence {
		time.AfterFunc(w.after(50*time.Millisecond, l.p.name, l.m.name, what), func() { r.end(l.lost("no route")) })
		return
	}
	l.p.remember(r)
	w.mesh.send(&message{from: l.p.name, to: l.m.name, what: what, order: order, deliver: func() {
		n, gen := l.m.running()
		if n == nil {
			w.mesh.send(&message{from: l.m.name, to: l.p.name, what: "reset", deliver: func() { r.end(l.lost("refused")) }})
			return
		}
		run(n, func() {
			if _, now := l.m.running(); now != gen {
				return // the process that had the answer is gone
			}
			w.mesh.send(&message{from: l.m.name, to: l.p.name, what: "re:" + what, deliver: func() { r.end(nil) }})
		})
	}})
}

func (l *link) lost(why string) error {
	return fmt.Errorf("node %v: connection lost (%s): %w", l.m.id, why, atoll.ErrUnreachable)
}

// answer is what a call returned at the node.
type answer[T any] struct {
	v   T
	err error
}

// call runs one request at the node and waits for the answer.
func call[T any](ctx context.Context, l *link, what string, seg atoll.SegmentID, epoch atoll.Epoch, do func(context.Context, *node.Node) (T, error)) (T, error) {
	var zero T
	got := make(chan answer[T], 1)
	what = fmt.Sprint(what, " ", seg.Ordinal, " e", epoch)
	var a answer[T]
	l.ask(what, "", func(err error) {
		if err != nil {
			got <- answer[T]{err: err}
			return
		}
		got <- a
	}, func(n *node.Node, answered func()) {
		ctx, cancel := context.WithTimeout(context.Background(), atoll.RequestTimeout)
		defer cancel()
		a.v, a.err = do(ctx, n)
		l.m.watch(what, seg, epoch, a.err)
		answered()
	})
	limit := time.NewTimer(atoll.RequestTimeout)
	defer limit.Stop()
	select {
	case r := <-got:
		return r.v, r.err
	case <-ctx.Done():
		return zero, fmt.Errorf("%s on node %v: %w: %w", what, l.m.id, atoll.ErrTimeout, ctx.Err())
	case <-limit.C:
		return zero, fmt.Errorf("%s on node %v: %w", what, l.m.id, atoll.ErrTimeout)
	}
}

type none struct{}

// Append implements wire.Node. A copy of a is sent, so that a late answer can do
// no harm. Sometimes it is sent twice, as after a retry below.
func (l *link) Append(a *wire.Append) {
	what := fmt.Sprint("append ", a.Seg.Ordinal, " @", a.Offset, " e", a.Epoch)
	vec := a.Vec.Retain()
	seg, epoch, at := a.Seg, a.Epoch, a.Offset
	var got *wire.Append
	deliver := func(n *node.Node) *wire.Append {
		back := make(chan *wire.Append, 1)
		b := &wire.Append{Seg: seg, Epoch: epoch, Offset: at, Vec: vec.Retain(), Done: back}
		n.Append(b)
		b = <-back
		l.m.watchAppend(b)
		b.Vec.Release()
		return b
	}
	twice := l.p.w.hash("twice", l.p.name, l.m.name, what, l.p.w.now())%64 == 0
	copies := 1
	if twice {
		copies = 2
	}
	left := copies
	var mu sync.Mutex
	release := func() {
		mu.Lock()
		left--
		last := left == 0
		mu.Unlock()
		if last {
			vec.Release()
		}
	}
	l.ask(what, seg.String(), func(err error) {
		a.Err = err
		if err == nil {
			a.Err, a.Queued, a.Commit = got.Err, got.Queued, got.Commit
		}
		a.Done <- a
	}, func(n *node.Node, answered func()) {
		got = deliver(n)
		answered()
		release()
	})
	if twice {
		l.ask(what+" again", seg.String(), func(error) {}, func(n *node.Node, _ func()) { deliver(n); release() })
	}
}

func (l *link) Create(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error {
	_, err := call(ctx, l, "create", seg, epoch, func(ctx context.Context, n *node.Node) (none, error) {
		return none{}, n.Create(ctx, seg, epoch, blocks)
	})
	return err
}

func (l *link) Fence(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (wire.Tail, error) {
	return call(ctx, l, "fence", seg, epoch, func(ctx context.Context, n *node.Node) (wire.Tail, error) {
		return n.Fence(ctx, seg, epoch)
	})
}

func (l *link) Extend(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error {
	raw = append([]byte(nil), raw...)
	_, err := call(ctx, l, fmt.Sprint("extend @", at), seg, epoch, func(ctx context.Context, n *node.Node) (none, error) {
		return none{}, n.Extend(ctx, seg, epoch, at, raw)
	})
	return err
}

func (l *link) Seal(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error {
	_, err := call(ctx, l, fmt.Sprint("seal @", length), seg, epoch, func(ctx context.Context, n *node.Node) (none, error) {
		return none{}, n.Seal(ctx, seg, epoch, length)
	})
	return err
}

func (l *link) Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	got, err := call(ctx, l, fmt.Sprint("read @", block, "+", len(dst)), seg, 0, func(ctx context.Context, n *node.Node) ([]byte, error) {
		p := host.Alloc(len(dst))
		defer p.Release()
		err := n.Read(ctx, seg, block, p.Bytes())
		return append([]byte(nil), p.Bytes()...), err
	})
	if err == nil {
		copy(dst, got)
	}
	return err
}

func (l *link) Fetch(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	return call(ctx, l, fmt.Sprint("fetch @", at), seg, 0, func(ctx context.Context, n *node.Node) (*host.Buffer, error) {
		return n.Fetch(ctx, seg, at, max)
	})
}

func (l *link) Index(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	return call(ctx, l, fmt.Sprint("index @", at), seg, 0, func(ctx context.Context, n *node.Node) (*host.Buffer, error) {
		return n.Index(ctx, seg, at, max)
	})
}

func (l *link) Repair(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, p []byte) error {
	p = append([]byte(nil), p...)
	_, err := call(ctx, l, fmt.Sprint("repair @", block), seg, 0, func(ctx context.Context, n *node.Node) (none, error) {
		return none{}, n.Repair(ctx, seg, block, p)
	})
	return err
}

func (l *link) Discard(ctx context.Context, seg atoll.SegmentID, runs []wire.Run) error {
	_, err := call(ctx, l, "discard", seg, 0, func(ctx context.Context, n *node.Node) (none, error) {
		return none{}, n.Discard(ctx, seg, runs)
	})
	return err
}

func (l *link) Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error {
	_, err := call(ctx, l, "delete", seg, epoch, func(ctx context.Context, n *node.Node) (none, error) {
		return none{}, n.Delete(ctx, seg, epoch)
	})
	return err
}

func (l *link) List(ctx context.Context, after atoll.SegmentID, max int) ([]wire.SegmentInfo, error) {
	return call(ctx, l, "list", after, 0, func(ctx context.Context, n *node.Node) ([]wire.SegmentInfo, error) {
		return n.List(ctx, after, max)
	})
}

func (l *link) Stat(ctx context.Context) (wire.Stat, error) {
	return call(ctx, l, "stat", atoll.SegmentID{}, 0, func(ctx context.Context, n *node.Node) (wire.Stat, error) {
		return n.Stat(ctx)
	})
}

func (l *link) Verify(ctx context.Context, seg atoll.SegmentID) (wire.VerifyResult, error) {
	return call(ctx, l, "verify", seg, 0, func(ctx context.Context, n *node.Node) (wire.VerifyResult, error) {
		return n.Verify(ctx, seg)
	})
}
