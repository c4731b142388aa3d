package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/wire"
)

// machine is a storage node with its disk. The disk outlives the process.
type machine struct {
	w    *world
	name string
	id   atoll.NodeID
	inc  atoll.UUID
	uuid atoll.UUID
	lost atomic.Bool // for good
	mu   struct {
		sync.Mutex
		disk   *hosttest.Disk
		node   *node.Node // nil while it is down
		gen    int        // of the process
		proc   *process
		stop   context.CancelFunc
		ended  chan struct{} // closed when the process has registered for the last time
		busy   bool          // starting or stopping
		server *wire.Server
		slow   time.Duration
		full   bool
		fenced map[atoll.SegmentID]atoll.Epoch // highest fence that it answered
		rotten map[string]bool                 // files that were damaged
	}
}

// addMachine makes a machine with a formatted disk and starts it.
func (w *world) addMachine(i int) *machine {
	m := &machine{w: w, name: fmt.Sprintf("node%d", i+1), id: atoll.NodeID(i + 1), inc: atoll.UUID{3, byte(i)}, uuid: atoll.UUID{2, byte(i)}}
	m.mu.fenced = make(map[atoll.SegmentID]atoll.Epoch)
	m.mu.rotten = make(map[string]bool)
	m.mu.disk = hosttest.NewDisk(w.hash("disk", i))
	if err := node.Format(m.mu.disk, node.Identity{Cluster: clusterID, Node: atoll.NodeID(i + 1), Disk: m.uuid, Incarnation: m.inc}); err != nil {
		w.broken("format disk of %s: %w", m.name, err)
	}
	w.machines = append(w.machines, m)
	m.start()
	return m
}

// running returns the node, nil while it is down, and which process it is.
func (m *machine) running() (*node.Node, int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.node, m.mu.gen
}

func (m *machine) disk() *hosttest.Disk {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.disk
}

// rules puts the faults that last beyond a restart in force.
func (m *machine) rules() {
	m.mu.Lock()
	disk, slow, full := m.mu.disk, m.mu.slow, m.mu.full
	m.mu.Unlock()
	disk.Heal()
	for _, lie := range m.w.cfg.lies {
		disk.Inject(lie)
	}
	if slow > 0 {
		disk.Inject(host.Rule{Ops: host.OpWrite | host.OpSync, Delay: slow})
	}
	disk.SetSize(1 << 40)
	if full {
		total, free, _ := disk.Space()
		disk.SetSize(total - free)
	}
}

// start opens the node on its disk and begins to register and report.
func (m *machine) start() {
	m.rules()
	n, err := node.Open(node.Options{FS: m.disk(), Cluster: clusterID, Node: m.id, NoPrewrite: true, SharedFlush: true, Log: m.w.logger(m.name)})
	if errors.Is(err, atoll.ErrNoSpace) {
		m.w.note("start", m.name, kindOf(err)) // heal starts it again
		return
	}
	if err != nil {
		m.w.broken("open %s: %w", m.name, err)
		return
	}
	ctx, stop := context.WithCancel(m.w.ctx)
	m.mu.Lock()
	m.mu.node, m.mu.stop, m.mu.ended = n, stop, make(chan struct{})
	m.mu.gen++
	gen, ended := m.mu.gen, m.mu.ended
	m.mu.Unlock()
	m.w.note("start", m.name)
	m.serve(n)
	m.w.wg.Go(func() {
		defer close(ended)
		for ctx.Err() == nil {
			if err := m.report(ctx, n, gen); err != nil && ctx.Err() == nil {
				m.w.note("report", m.name, kindOf(err))
			}
			m.w.sleep(ctx, m.name, 300*time.Millisecond)
		}
	})
}

// serve answers over the wire protocol where that is the transport.
func (m *machine) serve(n *node.Node) {
	if m.w.net == nil {
		return
	}
	l, err := m.w.net.Node(m.name).Listen(m.name + ":1")
	if err != nil {
		m.w.broken("listen on %s: %w", m.name, err)
		return
	}
	s := wire.Serve(wire.ServerOptions{
		Listener: l, Cluster: clusterID, Process: m.uuid, Log: m.w.logger(m.name),
		Lookup: func(id atoll.NodeID) (wire.Node, atoll.UUID, bool) { return n, m.inc, id == m.id },
	})
	m.mu.Lock()
	m.mu.server = s
	m.mu.Unlock()
}

// report registers the node and reports on it until the session is lost.
func (m *machine) report(ctx context.Context, n *node.Node, gen int) error {
	p, err := m.w.newProcess(ctx, m.name)
	if p.catalog == nil {
		return err
	}
	defer p.catalog.Close()
	m.mu.Lock()
	if m.mu.gen != gen || m.mu.node == nil {
		p.killed.Store(true)
	}
	m.mu.proc = p
	m.mu.Unlock()
	s, err := p.catalog.OpenSession(ctx, catalog.Process{Host: m.name, PID: 1})
	if err != nil {
		return err
	}
	defer s.Close(context.WithoutCancel(ctx))
	for {
		rec, err := p.catalog.RegisterNode(ctx, s, catalog.Node{Disk: m.uuid, Incarnation: m.inc, Addr: m.name + ":1", Host: m.name})
		if err == nil {
			if rec.ID != m.id {
				m.w.broken("%s was registered as node %v", m.name, rec.ID)
			}
			break
		}
		if !errors.Is(err, atoll.ErrBusy) || !m.w.sleep(ctx, m.name, 300*time.Millisecond) {
			return err
		}
	}
	m.w.note("registered", m.name)
	for {
		st, err := n.Stat(ctx)
		if err == nil {
			err = p.catalog.ReportNode(ctx, s, m.id, catalog.NodeReport{
				Total: st.Total, Free: st.Free, Full: st.Full, ReadOnly: st.ReadOnly, Errors: st.Errors, At: time.Now(),
			})
		}
		if err != nil {
			return err
		}
		select {
		case <-s.Lost():
			return fmt.Errorf("session of %s lost: %w", m.name, atoll.ErrFenced)
		default:
		}
		if !m.w.sleep(ctx, m.name, time.Second) {
			return ctx.Err()
		}
	}
}

// crashHow is what becomes of the disk.
type crashHow int

const (
	killed   crashHow = iota // the process dies, the machine does not
	powerCut                 // what was not synced is there, lost or torn
	powerAll                 // what was not synced is lost
)

// crash ends the machine's process. It returns when nothing of it runs.
func (m *machine) crash(rng *rand.Rand, how crashHow) {
	m.mu.Lock()
	if m.mu.node == nil || m.mu.busy {
		m.mu.Unlock()
		return
	}
	m.mu.busy = true
	n, stop, ended, p, server := m.mu.node, m.mu.stop, m.mu.ended, m.mu.proc, m.mu.server
	m.mu.node, m.mu.server = nil, nil
	m.mu.gen++
	var after *hosttest.Disk
	switch how {
	case killed:
		after = m.mu.disk.Clone()
	case powerCut:
		after = m.mu.disk.Crash(rng, hosttest.Random)
	case powerAll:
		after = m.mu.disk.Crash(rng, hosttest.LoseUnsynced)
	}
	old := m.mu.disk
	m.mu.Unlock()
	m.w.note("crash", m.name, int(how))
	if p != nil {
		p.killed.Store(true)
	}
	stop()
	if m.w.net != nil {
		m.w.net.Kill(m.name)
	}
	time.AfterFunc(m.w.after(100*time.Microsecond, "reset", m.name), func() {
		for _, g := range m.w.gateways {
			if p := g.process(); p != nil {
				if _, cut := m.w.mesh.silent(m.name, g.name); !cut {
					p.fail(m, "reset")
				}
			}
		}
		if d := m.w.warden; d != nil {
			d.mu.Lock()
			p := d.p
			d.mu.Unlock()
			if p != nil {
				p.fail(m, "reset")
			}
		}
	})
	old.Heal()
	n.Abort()
	if server != nil {
		server.Close()
	}
	<-ended
	m.mu.Lock()
	m.mu.disk, m.mu.busy = after, false
	m.mu.Unlock()
}

// restart starts the machine if it is down.
func (m *machine) restart() {
	m.mu.Lock()
	if m.mu.node != nil || m.mu.busy || m.lost.Load() {
		m.mu.Unlock()
		return
	}
	m.mu.busy = true
	m.mu.Unlock()
	m.start()
	m.mu.Lock()
	m.mu.busy = false
	m.mu.Unlock()
}

// close stops the machine for good.
func (m *machine) close() {
	m.mu.Lock()
	n, stop, ended, server := m.mu.node, m.mu.stop, m.mu.ended, m.mu.server
	m.mu.node = nil
	m.mu.Unlock()
	if n == nil {
		return
	}
	stop()
	<-ended
	if server != nil {
		server.Close()
	}
	if err := n.Close(); err != nil && !errors.Is(err, atoll.ErrIO) {
		m.w.broken("close %s: %w", m.name, err)
	}
}

// watch checks a control request against the fences that the node has answered
// (I3), and notes new ones. err is what the node answered.
func (m *machine) watch(what string, seg atoll.SegmentID, epoch atoll.Epoch, err error) {
	m.w.note("did", m.name, what, kindOf(err))
	if err != nil || epoch == 0 {
		return
	}
	m.mu.Lock()
	fence := m.mu.fenced[seg]
	if epoch > fence && (strings.HasPrefix(what, "fence") || strings.HasPrefix(what, "delete")) {
		m.mu.fenced[seg] = epoch
	}
	m.mu.Unlock()
	// Sealing again at the same length changes nothing and is allowed to anyone.
	if epoch < fence && !strings.HasPrefix(what, "seal") {
		m.w.broken("%s: %s did %s of segment %v, after it had answered a fence at epoch %v", "I3", m.name, what, seg, fence)
	}
}

// watchAppend is watch for an append.
func (m *machine) watchAppend(a *wire.Append) {
	m.w.note("did", m.name, "append", a.Seg.Ordinal, a.Offset, a.Epoch, kindOf(a.Err))
	if a.Err != nil {
		return
	}
	m.mu.Lock()
	fence := m.mu.fenced[a.Seg]
	m.mu.Unlock()
	if a.Epoch < fence {
		m.w.broken("I3: %s took an append at block %d of segment %v under epoch %v, after it had answered a fence at epoch %v",
			m.name, a.Offset, a.Seg, a.Epoch, fence)
	}
}

// rot damages some bytes of a stored segment. It returns the file's name.
func (m *machine) rot(rng *rand.Rand) string {
	disk := m.disk()
	list, err := disk.List("segments")
	if err != nil || len(list) == 0 {
		return ""
	}
	f := list[rng.IntN(len(list))]
	if f.Size == 0 {
		return ""
	}
	name := "segments/" + f.Name
	off := rng.Int64N(f.Size)
	if disk.Corrupt(name, off, min(1+rng.Int64N(64), f.Size-off)) != nil {
		return ""
	}
	m.mu.Lock()
	m.mu.rotten[name] = true
	m.mu.Unlock()
	return name
}

// rotTail damages the end of the youngest segment that is open.
func (m *machine) rotTail(rng *rand.Rand) string {
	n, _ := m.running()
	if n == nil {
		return ""
	}
	list, err := n.List(context.Background(), atoll.SegmentID{}, 1000)
	if err != nil {
		return ""
	}
	best := wire.SegmentInfo{}
	for _, s := range list {
		if !s.Sealed && s.Length > 0 && s.Seg.Ordinal > best.Seg.Ordinal {
			best = s
		}
	}
	if best.Length == 0 {
		return ""
	}
	name := "segments/" + best.Seg.String() + ".seg"
	off := (best.Length - 1 - atoll.BlockNo(rng.IntN(min(6, int(best.Length))))).Bytes()
	if m.disk().Corrupt(name, off+rng.Int64N(atoll.BlockSize-64), 16) != nil {
		return ""
	}
	m.mu.Lock()
	m.mu.rotten[name] = true
	m.mu.Unlock()
	return name
}

// kindOf names an error in the trace by its kinds.
func kindOf(err error) string {
	if err == nil {
		return "ok"
	}
	for _, k := range atoll.Kinds() {
		if errors.Is(err, k) {
			return strings.ReplaceAll(k.Error(), " ", "-")
		}
	}
	return "error"
}
