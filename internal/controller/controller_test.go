package controller

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
	"github.com/atollstore/atoll/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeNodes holds segments by node.
type fakeNodes struct {
	mu    sync.Mutex
	held  map[atoll.NodeID][]atoll.SegmentID
	down  map[atoll.NodeID]bool
	log   []string
	lists int
}

func (f *fakeNodes) List(_ context.Context, medium atoll.MediumID) (out []stream.Copy, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lists++
	for id := atoll.NodeID(1); id < 9; id++ {
		if f.down[id] {
			err = fmt.Errorf("node %v: %w", id, atoll.ErrUnreachable)
			continue
		}
		for _, s := range f.held[id] {
			if s.Medium == medium {
				out = append(out, stream.Copy{Node: id, SegmentInfo: wire.SegmentInfo{Seg: s}})
			}
		}
	}
	return out, err
}

func (f *fakeNodes) Delete(_ context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (left []atoll.NodeID, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, fmt.Sprintf("%d under %d", seg.Ordinal, epoch))
	for id := range f.held {
		if f.down[id] {
			left, err = append(left, id), atoll.ErrUnreachable
			continue
		}
		f.held[id] = slices.DeleteFunc(f.held[id], func(s atoll.SegmentID) bool { return s == seg })
	}
	return left, err
}

func (f *fakeNodes) DeleteCopy(_ context.Context, id atoll.NodeID, seg atoll.SegmentID, epoch atoll.Epoch) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, fmt.Sprintf("%d under %d on %d", seg.Ordinal, epoch, id))
	if f.down[id] {
		return atoll.ErrUnreachable
	}
	f.held[id] = slices.DeleteFunc(f.held[id], func(s atoll.SegmentID) bool { return s == seg })
	return nil
}

func (f *fakeNodes) set(id atoll.NodeID, down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down[id] = down
}

// rig is a cluster of three nodes and two processes that may be controllers.
type rig struct {
	t     *testing.T
	ctx   context.Context
	mem   *catalog.Memory
	cat   [2]*catalog.Catalog
	ses   [2]*catalog.Session
	ctl   [2]*Controller
	nodes *fakeNodes
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, ctx: t.Context(), mem: catalog.NewMemory(catalog.MemoryOptions{}),
		nodes: &fakeNodes{held: map[atoll.NodeID][]atoll.SegmentID{}, down: map[atoll.NodeID]bool{}}}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	for i, name := range []string{"a", "b"} {
		var err error
		if r.cat[i], err = catalog.Open(r.ctx, r.mem.Client(name), log); err != nil {
			t.Fatal(err)
		}
		if r.ses[i], err = r.cat[i].OpenSession(r.ctx, catalog.Process{Host: name}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range byte(3) {
		_, err := r.cat[0].RegisterNode(r.ctx, r.ses[0], catalog.Node{
			Disk: atoll.UUID{n + 1}, Incarnation: atoll.UUID{1}, Host: "a", Report: catalog.NodeReport{Total: 10, Free: 5, At: time.Now()}})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range r.ctl {
		r.ctl[i] = Open(Options{Catalog: r.cat[i], Session: r.ses[i], Nodes: r.nodes, Log: log,
			Metrics: NewMetrics(prometheus.NewRegistry())})
		synctest.Wait()
	}
	return r
}

func (r *rig) close() {
	for i := range r.ctl {
		r.ctl[i].Close()
		if err := r.ses[i].Close(r.ctx); err != nil {
			r.t.Error(err)
		}
		r.cat[i].Close()
	}
	r.mem.Close()
}

// deleting makes a medium with three segments of which one was never created,
// and marks it deleted.
func (r *rig) deleting(name string) catalog.Medium {
	r.t.Helper()
	m, err := r.cat[1].CreateMedium(r.ctx, catalog.Medium{Name: name, Kind: catalog.KindVolume, Size: 4096})
	if err != nil {
		r.t.Fatal(err)
	}
	h, err := r.cat[1].Acquire(r.ctx, m.ID, r.ses[1])
	if err != nil {
		r.t.Fatal(err)
	}
	seg := func(o atoll.Ordinal) atoll.SegmentID { return atoll.SegmentID{Medium: m.ID, Ordinal: o, Copyset: 1} }
	for id := range atoll.NodeID(3) {
		r.nodes.held[id+1] = append(r.nodes.held[id+1], seg(1), seg(2), atoll.SegmentID{Medium: m.ID + 1, Ordinal: 1, Copyset: 1})
	}
	h.Process, h.Unsealed = atoll.UUID{}, []catalog.Unsealed{{Seg: seg(3), Size: 9}}
	if _, err = r.cat[1].SwapHead(r.ctx, h); err != nil {
		r.t.Fatal(err)
	}
	return r.detach(m)
}

// detach deletes a medium as its user does.
func (r *rig) detach(m catalog.Medium) catalog.Medium {
	r.t.Helper()
	m.State = catalog.MediumDetached
	m, err := r.cat[1].UpdateMedium(r.ctx, m)
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

func (r *rig) gone(m catalog.Medium) bool {
	_, err := r.cat[0].Medium(r.ctx, m.ID)
	return err != nil
}

func TestPlacesAndDeletes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		time.Sleep(time.Second)
		if sets := r.cat[0].State().Copysets; len(sets) != 1 || len(sets[1].Nodes) != 3 {
			t.Fatalf("copysets %v", sets)
		}
		m := r.deleting("v")
		time.Sleep(3 * time.Second)
		if !r.gone(m) || strings.Join(r.nodes.log, ", ") != "1 under 2, 2 under 2, 3 under 2" {
			t.Errorf("gone %v, deleted %q", r.gone(m), r.nodes.log)
		}
		for id, held := range r.nodes.held {
			if len(held) != 1 || held[0].Medium == m.ID {
				t.Errorf("node %v holds %v", id, held)
			}
		}
	})
}

// TestDeleteWaits: a node that is down may hold copies; the record stays until
// it has answered.
func TestDeleteWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		r.nodes.set(2, true)
		m := r.deleting("v")
		time.Sleep(time.Minute)
		synctest.Wait()
		if r.gone(m) || len(r.nodes.log) > 0 || r.nodes.lists < 10 {
			t.Fatalf("gone %v, deleted %q, after %d lists", r.gone(m), r.nodes.log, r.nodes.lists)
		}
		r.nodes.set(2, false)
		time.Sleep(5 * time.Second)
		if !r.gone(m) {
			t.Error("the medium stays")
		}
	})
}

// TestDeletePinned: a chain of clones goes from its young end, and a medium that
// is read waits for the reader.
func TestDeletePinned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		create := func(name string, parent *catalog.Medium) catalog.Medium {
			rec := catalog.Medium{Name: name, Kind: catalog.KindVolume, Size: 4096}
			var err error
			if parent == nil {
				rec, err = r.cat[1].CreateMedium(r.ctx, rec)
			} else {
				rec, err = r.cat[1].CreateClone(r.ctx, rec, parent.ID, 1, 1)
			}
			if err != nil {
				t.Fatal(err)
			}
			h, err := r.cat[1].Acquire(r.ctx, rec.ID, r.ses[1])
			if err != nil {
				t.Fatal(err)
			}
			h.Process = atoll.UUID{}
			if _, err := r.cat[1].SwapHead(r.ctx, h); err != nil {
				t.Fatal(err)
			}
			return rec
		}
		a := create("a", nil)
		b := create("b", &a)
		c := create("c", &b)
		pin, err := r.cat[1].PinVersion(r.ctx, r.ses[1], c.ID, 1)
		if err != nil {
			t.Fatal(err)
		}
		r.detach(a)
		r.detach(b)
		time.Sleep(10 * time.Second)
		if r.gone(a) || r.gone(b) {
			t.Fatal("a medium with clones was deleted")
		}
		r.detach(c)
		time.Sleep(10 * time.Second)
		if r.gone(a) || r.gone(b) || r.gone(c) {
			t.Fatal("a medium that is read was deleted")
		}
		if err := r.cat[1].Unpin(r.ctx, pin); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		if !r.gone(a) || !r.gone(b) || !r.gone(c) {
			t.Errorf("still there: %v %v %v", !r.gone(a), !r.gone(b), !r.gone(c))
		}
	})
}

// TestDeleteOnlyDeleting: a live medium's segments are never touched, whoever
// owns it or does not.
func TestDeleteOnlyDeleting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		m, err := r.cat[1].CreateMedium(r.ctx, catalog.Medium{Name: "v", Kind: catalog.KindVolume, Size: 4096})
		if err != nil {
			t.Fatal(err)
		}
		r.nodes.held[1] = []atoll.SegmentID{{Medium: m.ID, Ordinal: 1, Copyset: 1}, {Medium: 77, Ordinal: 1, Copyset: 1}}
		time.Sleep(time.Minute)
		if len(r.nodes.log) > 0 || len(r.nodes.held[1]) != 2 {
			t.Errorf("deleted %q", r.nodes.log)
		}
	})
}

func TestFailover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		time.Sleep(time.Second)
		if !r.ctl[0].Leading() || r.ctl[1].Leading() {
			t.Fatalf("leading: %v, %v", r.ctl[0].Leading(), r.ctl[1].Leading())
		}
		start := time.Now()
		r.mem.Cut("a", true)
		for !r.ctl[1].Leading() {
			time.Sleep(10 * time.Millisecond)
			if r.ctl[0].Leading() && r.ctl[1].Leading() {
				t.Fatal("two controllers lead")
			}
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("elected after %v", took)
		}
		m := r.deleting("v")
		time.Sleep(5 * time.Second)
		if !r.gone2(m) {
			t.Error("the second controller does nothing")
		}
		r.mem.Cut("a", false)
		time.Sleep(5 * time.Second)
		if r.ctl[0].Leading() || !r.ctl[1].Leading() {
			t.Errorf("leading: %v, %v", r.ctl[0].Leading(), r.ctl[1].Leading())
		}
	})
}

func (r *rig) gone2(m catalog.Medium) bool {
	_, err := r.cat[1].Medium(r.ctx, m.ID)
	return err != nil
}

func TestHealth(t *testing.T) {
	up := func(id atoll.NodeID) catalog.Node {
		return catalog.Node{ID: id, Host: "h", State: catalog.NodeActive, Up: true}
	}
	base := func() *catalog.State {
		return &catalog.State{
			Nodes:    map[atoll.NodeID]catalog.Node{1: up(1), 2: up(2), 3: up(3)},
			Copysets: map[atoll.CopysetID]catalog.Copyset{1: {ID: 1, Nodes: []atoll.NodeID{1, 2, 3}}},
			Leaders:  map[string]atoll.UUID{office: {1}}, Copies: map[int]bool{3: true},
		}
	}
	change := func(s *catalog.State, id atoll.NodeID, f func(*catalog.Node)) {
		n := s.Nodes[id]
		f(&n)
		s.Nodes[id] = n
	}
	for _, c := range []struct {
		edit    func(*catalog.State)
		grade   Grade
		reasons string
	}{
		{func(*catalog.State) {}, Healthy, ""},
		{func(s *catalog.State) { change(s, 2, func(n *catalog.Node) { n.Up = false }) }, Degraded,
			"node 2 (h) is down; 2 nodes take writes, some media want 3 copies"},
		{func(s *catalog.State) { change(s, 2, func(n *catalog.Node) { n.Report.ReadOnly = true }) }, Degraded,
			"node 2 (h) is read-only after an I/O error; 2 nodes take writes, some media want 3 copies"},
		{func(s *catalog.State) { change(s, 2, func(n *catalog.Node) { n.State = catalog.NodeRemoved }) }, Degraded,
			"2 nodes take writes, some media want 3 copies"},
		{func(s *catalog.State) { clear(s.Leaders) }, Degraded, "no controller is elected"},
		{func(s *catalog.State) {
			for id := range s.Nodes {
				change(s, id, func(n *catalog.Node) { n.Report.Full = true })
			}
		}, Critical, "no storage node takes writes; nodes [1 2 3] are full"},
		{func(s *catalog.State) {
			for id := range s.Nodes {
				change(s, id, func(n *catalog.Node) { n.Up = false })
			}
		}, Critical, "no storage node takes writes; 1 copyset has no node that is up: what only they hold cannot be read; nodes [1 2 3] are down"},
		{func(s *catalog.State) { clear(s.Nodes); clear(s.Copysets) }, Critical, "no storage nodes are active"},
	} {
		st := base()
		c.edit(st)
		got := Health(st)
		if got.Grade != c.grade || strings.Join(got.Reasons, "; ") != c.reasons {
			t.Errorf("got %s %q, want %s %q", got.Grade, got.Reasons, c.grade, c.reasons)
		}
	}
}
