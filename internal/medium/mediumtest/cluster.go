// Package mediumtest is a small cluster in one process, for tests of media and
// of what sits on them: a catalog in memory, storage nodes on disks in memory,
// and any number of processes that own media, each with a session and a view of
// the nodes of its own. Nodes can be killed and lose power, processes can die.
// It works inside a testing/synctest bubble, where waits for leases cost
// nothing.
package mediumtest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/stream"
	"github.com/atollstore/atoll/internal/wire"
)

// Cluster is a catalog and storage nodes. Its methods may be called
// concurrently; tests fail at once when one of them cannot do its work.
type Cluster struct {
	Memory *catalog.Memory

	t       testing.TB
	id      atoll.UUID
	log     *slog.Logger
	admin   *catalog.Catalog
	session *catalog.Session // on which the nodes hang
	nodes   []*member
	owners  []*Owner
	limit   int64         // bytes that each node may use; 0 all
	stop    chan struct{} // ends the reports
	slow    atomic.Int64  // delay of the catalog, one way
	wg      sync.WaitGroup
}

// member is a storage node with its disk.
type member struct {
	id   atoll.NodeID
	disk atomic.Pointer[hosttest.Disk]
	node atomic.Pointer[node.Node] // nil while it is down
}

// NewCluster starts a cluster of n nodes, numbered from 1, each on a host of
// its own. It stops when the test ends; in a bubble call Close at its end.
func NewCluster(t testing.TB, n int) *Cluster {
	t.Helper()
	c := &Cluster{stop: make(chan struct{}), t: t, id: atoll.UUID{1}, log: slog.New(slog.DiscardHandler)}
	c.Memory = catalog.NewMemory(catalog.MemoryOptions{Delay: func(string) time.Duration { return time.Duration(c.slow.Load()) }})
	if testing.Verbose() {
		c.log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	ctx := context.Background()
	var err error
	c.admin, err = catalog.Open(ctx, c.Memory.Client("nodes"), c.log)
	c.must("open catalog", err)
	_, err = c.admin.Init(ctx, catalog.Cluster{ID: c.id})
	c.must("init cluster", err)
	c.session, err = c.admin.OpenSession(ctx, catalog.Process{Host: "nodes"})
	c.must("open session", err)
	for i := range n {
		c.add(i)
	}
	t.Cleanup(c.Close)
	return c
}

func (c *Cluster) must(what string, err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

func (c *Cluster) add(i int) {
	m := &member{}
	disk := hosttest.NewDisk(uint64(i + 1))
	m.disk.Store(disk)
	id := node.Identity{Cluster: c.id, Disk: atoll.UUID{2, byte(i)}, Incarnation: atoll.UUID{3, byte(i)}}
	c.must("format disk", node.Format(disk, id))
	rec, err := c.admin.RegisterNode(context.Background(), c.session, catalog.Node{
		Disk: id.Disk, Incarnation: id.Incarnation, Addr: fmt.Sprintf("node%d:1", i+1), Host: fmt.Sprintf("host%d", i+1),
	})
	c.must("register node", err)
	m.id = rec.ID
	c.nodes = append(c.nodes, m)
	c.start(m)
	c.report(m)
}

func (c *Cluster) report(m *member) {
	err := c.admin.ReportNode(context.Background(), c.session, m.id, catalog.NodeReport{Total: 1 << 40, Free: 1 << 40})
	c.must("report node", err)
}

func (c *Cluster) start(m *member) {
	n, err := node.Open(node.Options{FS: m.disk.Load(), Cluster: c.id, Node: m.id, NoPrewrite: true, Limit: c.limit, Log: c.log})
	c.must("open node", err)
	m.node.Store(n)
}

// Limit restarts all nodes as if their disks had so many bytes, and has them
// report to the catalog how full they are, ten times a second.
func (c *Cluster) Limit(bytes int64) {
	c.limit = bytes
	for _, m := range c.nodes {
		c.Kill(m.id)
		c.start(m)
	}
	c.wg.Go(func() {
		t := time.NewTicker(100 * time.Millisecond)
		defer t.Stop()
		for {
			c.reportAll()
			select {
			case <-t.C:
			case <-c.stop:
				return
			}
		}
	})
}

func (c *Cluster) reportAll() {
	for _, m := range c.nodes {
		n := m.node.Load()
		if n == nil {
			continue
		}
		if st, err := n.Stat(context.Background()); err == nil {
			_ = c.admin.ReportNode(context.Background(), c.session, m.id, catalog.NodeReport{Total: st.Total, Free: st.Free, Full: st.Full})
		}
	}
}

// SlowCatalog makes every message to and from the catalog take so long.
func (c *Cluster) SlowCatalog(d time.Duration) { c.slow.Store(int64(d)) }

// Used returns how much of the fullest node's space is in use, 0 to 1.
func (c *Cluster) Used() (most float64) {
	for _, m := range c.nodes {
		if st, err := m.node.Load().Stat(context.Background()); err == nil {
			most = max(most, 1-float64(st.Free)/float64(st.Total))
		}
	}
	return most
}

func (c *Cluster) member(id atoll.NodeID) *member {
	for _, m := range c.nodes {
		if m.id == id {
			return m
		}
	}
	c.t.Fatalf("no node %v", id)
	return nil
}

// IDs returns the nodes' numbers in order.
func (c *Cluster) IDs() []atoll.NodeID {
	var ids []atoll.NodeID
	for _, m := range c.nodes {
		ids = append(ids, m.id)
	}
	return ids
}

// Disk returns a node's disk as it is now.
func (c *Cluster) Disk(id atoll.NodeID) *hosttest.Disk { return c.member(id).disk.Load() }

// Node returns a running node, nil while it is down.
func (c *Cluster) Node(id atoll.NodeID) *node.Node { return c.member(id).node.Load() }

// Kill ends a node as SIGKILL does: its disk keeps what was written. The
// catalog does not hear of it.
func (c *Cluster) Kill(id atoll.NodeID) {
	if n := c.member(id).node.Swap(nil); n != nil {
		n.Abort()
	}
}

// Restart starts a node that was killed or lost power.
func (c *Cluster) Restart(id atoll.NodeID) { c.start(c.member(id)) }

// PowerCut ends a node and takes from its disk what was not durable.
func (c *Cluster) PowerCut(id atoll.NodeID, rng *rand.Rand, mode hosttest.CrashMode) {
	m := c.member(id)
	after := m.disk.Load().Crash(rng, mode)
	c.Kill(id)
	m.disk.Store(after)
}

// Blackout is a power cut of every node and every owner at this moment: nothing
// that happens afterwards counts. It may be called from a disk's OnSync hook.
// StartAll then starts the nodes again, with new owners.
func (c *Cluster) Blackout(rng *rand.Rand, mode hosttest.CrashMode) []*hosttest.Disk {
	for _, o := range c.owners {
		o.cut()
	}
	var disks []*hosttest.Disk
	for _, m := range c.nodes {
		disks = append(disks, m.disk.Load().Crash(rng, mode))
	}
	return disks
}

// StartAll replaces the disks of all nodes by those that Blackout left, and
// starts the nodes. Owners of before stay dead.
func (c *Cluster) StartAll(disks []*hosttest.Disk) {
	for i, m := range c.nodes {
		m.disk.Load().OnSync(nil)
		c.Kill(m.id)
		m.disk.Store(disks[i])
		c.start(m)
	}
}

// NewSession gives the nodes a new lease after theirs was ended.
func (c *Cluster) NewSession() {
	c.t.Helper()
	_ = c.session.Close(context.Background())
	var err error
	c.session, err = c.admin.OpenSession(context.Background(), catalog.Process{Host: "nodes"})
	c.must("open session", err)
	for _, m := range c.nodes {
		rec := c.admin.State().Nodes[m.id]
		_, err := c.admin.RegisterNode(context.Background(), c.session, rec)
		c.must("register node", err)
		c.report(m)
	}
}

// Close ends owners and nodes.
func (c *Cluster) Close() {
	if c.session != nil {
		close(c.stop)
	}
	for _, o := range c.owners {
		o.Close()
	}
	for _, m := range c.nodes {
		if n := m.node.Swap(nil); n != nil {
			if err := n.Close(); err != nil && !errors.Is(err, atoll.ErrIO) {
				c.t.Errorf("close node %v: %v", m.id, err)
			}
		}
	}
	if c.session != nil {
		_ = c.session.Close(context.Background())
		_ = c.admin.Close()
		_ = c.Memory.Close()
		c.session = nil
	}
	c.wg.Wait()
}

// Owner is a process that owns media.
type Owner struct {
	Name    string
	Catalog *catalog.Catalog
	Session *catalog.Session
	Nodes   *stream.Nodes

	c      *Cluster
	dead   atomic.Bool // cut off: nothing it does has an effect or an answer
	closed bool
	ends   []func()
}

// Owner starts another process.
func (c *Cluster) Owner(name string) *Owner {
	c.t.Helper()
	o := &Owner{Name: name, c: c}
	ctx := context.Background()
	var err error
	o.Catalog, err = catalog.Open(ctx, c.Memory.Client(name), c.log.With("process", name))
	c.must("open catalog", err)
	o.Session, err = o.Catalog.OpenSession(ctx, catalog.Process{Host: name})
	c.must("open session", err)
	o.Nodes = stream.NewNodes(stream.NodesOptions{Catalog: o.Catalog, Seed: 1, Log: c.log.With("process", name), Dial: func(n catalog.Node) wire.Node {
		return o.dial(n.ID)
	}})
	c.owners = append(c.owners, o)
	return o
}

// Options returns what a medium of this process is opened with: short times, so
// that tests see reclaim and sweeps.
func (o *Owner) Options() medium.Options {
	return medium.Options{
		Catalog: o.Catalog, Nodes: o.Nodes, Session: o.Session, Log: o.c.log.With("process", o.Name),
		Grace: 100 * time.Millisecond, Sweep: time.Second,
	}
}

// Create makes a medium of kind db with small segments of the given number of
// blocks and three copies.
func (o *Owner) Create(name string, blocks int) catalog.Medium {
	o.c.t.Helper()
	rec, err := medium.Create(context.Background(), o.Options(), catalog.Medium{
		Name: name, Kind: catalog.KindDB, Owner: "root", Policy: catalog.Policy{Replicas: min(3, len(o.c.nodes)), Segment: blocks},
	})
	o.c.must("create medium", err)
	return rec
}

// Open opens a medium.
func (o *Owner) Open(id atoll.MediumID) *medium.Medium {
	o.c.t.Helper()
	m, err := o.TryOpen(id)
	o.c.must("open medium", err)
	return m
}

// TryOpen opens a medium, or returns why not. Close closes it if the test did
// not, so that a failing test leaves nothing running.
func (o *Owner) TryOpen(id atoll.MediumID) (*medium.Medium, error) {
	m, err := medium.Open(context.Background(), o.Options(), id)
	if err == nil {
		o.Defer(func() { _ = m.Close(context.Background()) })
	}
	return m, err
}

// Defer has Close call f before it ends the process, the last first.
func (o *Owner) Defer(f func()) { o.ends = append(o.ends, f) }

// Die ends the process as SIGKILL does: it hears and does nothing any more. Its
// lease ends by itself. What is left of it must still be closed.
func (o *Owner) Die() { o.cut() }

// cut may be called with a disk's lock at hand; it takes none of the cluster's.
func (o *Owner) cut() {
	o.dead.Store(true)
	o.c.Memory.Cut(o.Name, true)
}

// Close ends the process, after what Defer was given.
func (o *Owner) Close() {
	if o.closed {
		return
	}
	o.closed = true
	for i := len(o.ends) - 1; i >= 0; i-- {
		o.ends[i]()
	}
	if o.dead.Load() {
		o.c.Memory.Cut(o.Name, false)
	}
	_ = o.Session.Close(context.Background())
	_ = o.Nodes.Close()
	_ = o.Catalog.Close()
}
