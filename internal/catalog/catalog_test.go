package catalog

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

func openCatalog(t testing.TB, kv KV) *Catalog {
	t.Helper()
	c, err := Open(testContext(t), kv, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func openSession(t testing.TB, c *Catalog, host string) *Session {
	t.Helper()
	s, err := c.OpenSession(testContext(t), Process{Host: host, PID: 7})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// pair is two processes of one cluster.
type pair struct {
	a, b *Catalog
	ctx  context.Context
}

// TestCatalog runs the same cases over memory and over etcd.
func TestCatalog(t *testing.T) {
	cases := map[string]func(*testing.T, pair){
		"init": catInit, "nodes": catNodes, "copysets": catCopysets, "media": catMedia,
		"ownership": catOwnership, "election": catElection, "release": catRelease, "pins": catPins,
		"users": catUsers, "tree": catTree, "tree races": catTreeRaces, "implied": catImplied, "trash": catTrash,
	}
	for name, run := range cases {
		t.Run("memory/"+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := NewMemory(MemoryOptions{})
				defer m.Close()
				a, b := openCatalog(t, m.Client("a")), openCatalog(t, m.Client("b"))
				defer a.Close()
				defer b.Close()
				run(t, pair{a, b, testContext(t)})
			})
		})
	}
	t.Run("etcd", func(t *testing.T) {
		for name, run := range cases {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				s := startEtcd(t, EtcdOptions{Dir: filepath.Join(privateDir(t), "etcd"), Name: "one", Log: testLog(t)})
				defer s.Close()
				a, b := openCatalog(t, s.KV()), openCatalog(t, s.KV())
				defer a.Close()
				defer b.Close()
				run(t, pair{a, b, testContext(t)})
			})
		}
	})
}

func catInit(t *testing.T, p pair) {
	first := must(p.a.Init(p.ctx, Cluster{Name: "one"}))(t)
	if first.ID.IsZero() || p.a.State().Cluster != first {
		t.Fatalf("made %+v, state %+v", first, p.a.State().Cluster)
	}
	if again := must(p.b.Init(p.ctx, Cluster{Name: "two"}))(t); again != first {
		t.Errorf("second start made %+v", again)
	}
	_, err := p.b.Init(p.ctx, Cluster{ID: atoll.UUID{1}})
	wantErr(t, err, atoll.ErrIdentity)
}

// waitState waits until the state satisfies ok.
func waitState(t testing.TB, c *Catalog, ok func(*State) bool) {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		changed := c.Changed()
		if ok(c.State()) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatalf("state stays %+v", c.State())
		}
	}
}

func disk(n byte) Node {
	return Node{Disk: atoll.UUID{n}, Incarnation: atoll.UUID{n, 1}, Addr: fmt.Sprintf("h%d:1", n), Host: "h"}
}

func catNodes(t *testing.T, p pair) {
	sa, sb := openSession(t, p.a, "a"), openSession(t, p.b, "b")
	n := disk(1)
	n.Report = NodeReport{Total: 100, Free: 50, At: now()}
	one := must(p.a.RegisterNode(p.ctx, sa, n))(t)
	two := must(p.b.RegisterNode(p.ctx, sb, disk(2)))(t)
	if one.ID != 1 || two.ID != 2 || !p.a.State().Nodes[1].Up || p.a.State().Nodes[1].Report.Free != 50 {
		t.Fatalf("registered %+v and %+v, state %+v", one, two, p.a.State().Nodes)
	}
	if again := must(p.a.RegisterNode(p.ctx, sa, disk(1)))(t); again.ID != 1 {
		t.Errorf("registered again as %v", again.ID)
	}
	_, err := p.b.RegisterNode(p.ctx, sb, disk(1))
	wantErr(t, err, atoll.ErrIdentity)
	wantErr(t, err, atoll.ErrBusy)
	empty := disk(2)
	empty.Incarnation = atoll.UUID{9}
	_, err = p.b.RegisterNode(p.ctx, sb, empty)
	wantErr(t, err, atoll.ErrIdentity)
	if errors.Is(err, atoll.ErrBusy) {
		t.Errorf("an emptied disk may not be tried again: %v", err)
	}
	if err := p.b.ReportNode(p.ctx, sb, 2, NodeReport{Total: 100, Free: 9}); err != nil {
		t.Fatal(err)
	}
	waitState(t, p.a, func(s *State) bool { return s.Nodes[2].Up && s.Nodes[2].Report.Free == 9 })
	wantErr(t, p.b.ReportNode(p.ctx, sb, 1, NodeReport{}), atoll.ErrFenced)
	if err := sb.Close(p.ctx); err != nil {
		t.Fatal(err)
	}
	waitState(t, p.a, func(s *State) bool {
		return !s.Nodes[2].Up && reflect.DeepEqual(s.Nodes[2].Report, NodeReport{}) && len(s.Processes) == 1
	})
	wantErr(t, p.b.ReportNode(p.ctx, sb, 2, NodeReport{Full: true}), atoll.ErrFenced)
	moved := must(p.a.RegisterNode(p.ctx, sa, disk(2)))(t)
	if moved.ID != 2 || moved.Process != sa.ID() {
		t.Errorf("the disk moved as %+v", moved)
	}
	for _, st := range []NodeState{NodeDraining, NodeActive, NodeRemoved} {
		if err := p.a.SetNodeState(p.ctx, 2, st); err != nil {
			t.Fatal(err)
		}
		waitState(t, p.b, func(s *State) bool { return s.Nodes[2].State == st })
	}
	wantErr(t, p.a.SetNodeState(p.ctx, 2, NodeActive), atoll.ErrInvalid)
	wantErr(t, p.a.SetNodeState(p.ctx, 2, "odd"), atoll.ErrInvalid)
	wantErr(t, p.a.SetNodeState(p.ctx, 9, NodeActive), atoll.ErrNotExist)
	_, err = p.a.RegisterNode(p.ctx, sa, disk(2))
	wantErr(t, err, atoll.ErrIdentity)
	if err := sa.Close(p.ctx); err != nil {
		t.Fatal(err)
	}
}

func catCopysets(t *testing.T, p pair) {
	s := openSession(t, p.a, "a")
	defer s.Close(p.ctx)
	for n := range byte(4) {
		must(p.a.RegisterNode(p.ctx, s, disk(n+1)))(t)
	}
	var wg sync.WaitGroup
	ids := make([]atoll.CopysetID, 8)
	for i := range ids {
		wg.Go(func() {
			c := p.a
			if i%2 == 1 {
				c = p.b
			}
			nodes := []atoll.NodeID{1, 2, 3}
			if i >= 4 {
				nodes = []atoll.NodeID{4, 3, 1}
			}
			set, err := c.EnsureCopyset(p.ctx, nodes)
			if err != nil {
				t.Error(err)
			}
			ids[i] = set.ID
		})
	}
	wg.Wait()
	for i := range ids {
		if ids[i] != ids[i/4*4] || ids[i] == 0 || ids[0] == ids[4] {
			t.Fatalf("the same members gave copysets %v", ids)
		}
	}
	set := must(p.a.RetireCopyset(p.ctx, ids[0], true))(t)
	if !set.Retired || !p.a.State().Copysets[ids[0]].Retired {
		t.Errorf("retired %+v", set)
	}
	if set = must(p.b.EnsureCopyset(p.ctx, []atoll.NodeID{3, 2, 1}))(t); set.Retired || set.ID != ids[0] {
		t.Errorf("wanted again: %+v", set)
	}
	for _, bad := range [][]atoll.NodeID{nil, {1, 1}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}} {
		_, err := p.a.EnsureCopyset(p.ctx, bad)
		wantErr(t, err, atoll.ErrInvalid)
	}
	_, err := p.a.EnsureCopyset(p.ctx, []atoll.NodeID{1, 99})
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.a.RetireCopyset(p.ctx, 99, true)
	wantErr(t, err, atoll.ErrNotExist)
}

func volume(name string) Medium {
	return Medium{Name: name, Kind: KindVolume, Size: 1 << 20, Policy: Policy{Replicas: 3}}
}

func catMedia(t *testing.T, p pair) {
	var ids []atoll.MediumID
	for _, name := range []string{"b", "a", "a-b", "c", "d"} {
		ids = append(ids, must(p.a.CreateMedium(p.ctx, volume(name)))(t).ID)
	}
	_, err := p.b.CreateMedium(p.ctx, volume("a"))
	wantErr(t, err, atoll.ErrExist)
	for _, bad := range []Medium{{Name: "x"}, volume("x@1"), {Name: "x", Kind: KindVolume, Size: 4095},
		{Name: "x", Kind: KindFS, Policy: Policy{Replicas: 6}}, {Name: "x", Kind: KindVolume, Size: 128 << 40}} {
		_, err := p.a.CreateMedium(p.ctx, bad)
		wantErr(t, err, atoll.ErrInvalid)
	}
	if got := names(must(p.b.Media(p.ctx, "", 0))(t)); got != "a a-b b c d" {
		t.Errorf("list: %s", got)
	}
	if got := names(must(p.b.Media(p.ctx, "a", 2))(t)); got != "a-b b" {
		t.Errorf("list after a: %s", got)
	}
	waitState(t, p.b, func(s *State) bool { return s.Copies[3] })
	m := must(p.b.MediumByName(p.ctx, "a-b"))(t)
	m.Name, m.Size = "e", 2<<20
	m2 := must(p.b.UpdateMedium(p.ctx, m))(t)
	_, err = p.a.UpdateMedium(p.ctx, m)
	wantErr(t, err, atoll.ErrConflict)
	_, err = p.a.MediumByName(p.ctx, "a-b")
	wantErr(t, err, atoll.ErrNotExist)
	if got := must(p.a.MediumByName(p.ctx, "e"))(t); got.ID != ids[2] || got.Size != 2<<20 || got.Rev != m2.Rev {
		t.Errorf("renamed: %+v", got)
	}
	taken := m2
	taken.Name = "c"
	_, err = p.a.UpdateMedium(p.ctx, taken)
	wantErr(t, err, atoll.ErrExist)
	kind := m2
	kind.Kind, kind.Size = KindFS, 0
	_, err = p.a.UpdateMedium(p.ctx, kind)
	wantErr(t, err, atoll.ErrInvalid)

	wantErr(t, p.a.RemoveMedium(p.ctx, m2.ID), atoll.ErrInvalid)
	m2.State = MediumDeleting
	_, err = p.a.UpdateMedium(p.ctx, m2)
	wantErr(t, err, atoll.ErrInvalid) // first nobody may pin it any more
	m2.State = MediumDetached
	m2 = must(p.a.UpdateMedium(p.ctx, m2))(t)
	wantErr(t, p.a.RemoveMedium(p.ctx, m2.ID), atoll.ErrInvalid)
	m2.State = MediumDeleting
	m3 := must(p.a.UpdateMedium(p.ctx, m2))(t)
	if got := must(p.b.Deleting(p.ctx, 0, 0))(t); len(got) != 1 || got[0].ID != m3.ID {
		t.Errorf("deleting: %+v", got)
	}
	m3.State = MediumLive
	_, err = p.a.UpdateMedium(p.ctx, m3)
	wantErr(t, err, atoll.ErrInvalid)
	_, err = p.a.MediumByName(p.ctx, "e")
	wantErr(t, err, atoll.ErrNotExist)
	reborn := must(p.b.CreateMedium(p.ctx, volume("e")))(t) // the name is free at once
	for range 2 {
		if err := p.a.RemoveMedium(p.ctx, m2.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err = p.a.Medium(p.ctx, m2.ID)
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.a.Head(p.ctx, m2.ID)
	wantErr(t, err, atoll.ErrNotExist)
	if got := must(p.b.Deleting(p.ctx, 0, 0))(t); len(got) != 0 {
		t.Errorf("deleting: %+v", got)
	}
	if got := must(p.b.MediumByName(p.ctx, "e"))(t); got.ID != reborn.ID {
		t.Errorf("removing the old one harmed the new one: %+v", got)
	}
}

func names(media []Medium) string {
	var out []string
	for _, m := range media {
		out = append(out, m.Name)
	}
	return strings.Join(out, " ")
}

func catOwnership(t *testing.T, p pair) {
	sa, sb := openSession(t, p.a, "alpha"), openSession(t, p.b, "beta")
	defer sb.Close(p.ctx)
	m := must(p.a.CreateMedium(p.ctx, volume("v")))(t)
	h := must(p.a.Acquire(p.ctx, m.ID, sa))(t)
	if h.Epoch != 1 || h.Process != sa.ID() || h.Next != 1 {
		t.Fatalf("acquired %+v", h)
	}
	_, err := p.b.Acquire(p.ctx, m.ID, sb)
	wantErr(t, err, atoll.ErrBusy)
	if !strings.Contains(err.Error(), "alpha") {
		t.Errorf("the owner is not named: %v", err)
	}
	h.Next = 2
	h.Unsealed = []Unsealed{{Seg: atoll.SegmentID{Medium: m.ID, Ordinal: 1, Copyset: 1}, Size: 9}}
	h2 := must(p.a.SwapHead(p.ctx, h))(t)
	_, err = p.a.SwapHead(p.ctx, h)
	wantErr(t, err, atoll.ErrConflict)
	again := must(p.a.Acquire(p.ctx, m.ID, sa))(t)
	if again.Epoch != 2 || again.Next != 2 || len(again.Unsealed) != 1 {
		t.Errorf("acquired again: %+v", again)
	}
	_, err = p.a.SwapHead(p.ctx, h2)
	wantErr(t, err, atoll.ErrFenced)

	if err := sa.Close(p.ctx); err != nil {
		t.Fatal(err)
	}
	if sa.Valid() {
		t.Error("a closed session is valid")
	}
	_, err = p.a.SwapHead(p.ctx, again)
	wantErr(t, err, atoll.ErrFenced)
	_, err = p.a.Acquire(p.ctx, m.ID, sa)
	wantErr(t, err, atoll.ErrFenced)
	hb := must(p.b.Acquire(p.ctx, m.ID, sb))(t)
	if hb.Epoch != 3 || hb.Process != sb.ID() || len(hb.Unsealed) != 1 {
		t.Errorf("taken over: %+v", hb)
	}
	_, err = p.a.SwapHead(p.ctx, again)
	wantErr(t, err, atoll.ErrFenced)
	if got := must(p.a.Head(p.ctx, m.ID))(t); got.Epoch != 3 || got.Rev != hb.Rev {
		t.Errorf("head: %+v", got)
	}
}

// catRelease gives a medium up and deletes it.
func catRelease(t *testing.T, p pair) {
	sa, sb := openSession(t, p.a, "alpha"), openSession(t, p.b, "beta")
	defer sa.Close(p.ctx)
	defer sb.Close(p.ctx)
	m := must(p.a.CreateMedium(p.ctx, volume("v")))(t)
	h := must(p.a.Acquire(p.ctx, m.ID, sa))(t)
	h.Process = atoll.UUID{}
	must(p.a.SwapHead(p.ctx, h))(t)
	must(p.b.Acquire(p.ctx, m.ID, sb))(t)
	_, err := p.b.AcquireDeleting(p.ctx, m.ID, sb)
	wantErr(t, err, atoll.ErrNotExist)
	m.State = MediumDetached
	m = must(p.b.UpdateMedium(p.ctx, m))(t)
	must(p.b.Acquire(p.ctx, m.ID, sb))(t)
	m.State = MediumDeleting
	must(p.b.UpdateMedium(p.ctx, m))(t)
	_, err = p.b.Acquire(p.ctx, m.ID, sb)
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.a.AcquireDeleting(p.ctx, m.ID, sa)
	wantErr(t, err, atoll.ErrBusy)
	if h := must(p.b.AcquireDeleting(p.ctx, m.ID, sb))(t); h.Epoch != 4 {
		t.Errorf("acquired for deletion: %+v", h)
	}
}

func catElection(t *testing.T, p pair) {
	sa, sb := openSession(t, p.a, "a"), openSession(t, p.b, "b")
	defer sb.Close(p.ctx)
	la := must(p.a.Campaign(p.ctx, sa, "controller"))(t)
	must(p.a.Campaign(p.ctx, sa, "controller"))(t)
	won := make(chan *Leadership, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		l, err := p.b.Campaign(p.ctx, sb, "controller")
		if err != nil {
			t.Error(err)
		}
		won <- l
	})
	select {
	case <-won:
		t.Fatal("two leaders")
	case <-time.After(300 * time.Millisecond):
	}
	if !la.Valid() {
		t.Error("the leader is not valid")
	}
	start := time.Now()
	if err := la.Resign(p.ctx); err != nil {
		t.Fatal(err)
	}
	<-won
	wg.Wait()
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("the next election took %v", took)
	}
	waitState(t, p.a, func(s *State) bool { return s.Leaders["controller"] == sb.ID() })
	if err := sa.Close(p.ctx); err != nil {
		t.Fatal(err)
	}
	_, err := p.a.Campaign(p.ctx, sa, "other")
	wantErr(t, err, atoll.ErrFenced)
	_, err = p.b.Campaign(p.ctx, sb, "a/b")
	wantErr(t, err, atoll.ErrInvalid)
}

func TestValidateName(t *testing.T) {
	for _, ok := range []string{"a", "a/b", "vm-1.img", "Größe/ä", strings.Repeat("x", 255), "cur/a", "last1", "..."} {
		if err := ValidateName(ok); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "/", "/a", "a/", "a//b", "a@1", "a\x00", "a\n", "a\x7f", "a\u0085", ".", "..", "a/../b",
		"cur", "last", "release", "a/cur", strings.Repeat("x", 256), strings.Repeat("x/", 600) + "x", "a\xff", "\u2028"} {
		if err := ValidateName(bad); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("name %q: %v", bad, err)
		}
	}
}

// TestSessionLost cuts a process off: it must stop before its lease ends, and
// another takes over after.
func TestSessionLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMemory(MemoryOptions{})
		defer m.Close()
		a, b := openCatalog(t, m.Client("a")), openCatalog(t, m.Client("b"))
		defer a.Close()
		defer b.Close()
		sa, sb := openSession(t, a, "a"), openSession(t, b, "b")
		ctx := testContext(t)
		v := must(a.CreateMedium(ctx, volume("v")))(t)
		h := must(a.Acquire(ctx, v.ID, sa))(t)
		time.Sleep(20 * time.Second)
		if !sa.Valid() || !sb.Valid() {
			t.Fatal("sessions do not last")
		}
		start := time.Now()
		m.Cut("a", true)
		<-sa.Lost()
		if took := time.Since(start); sa.Valid() || took > atoll.LeaseUse || took < atoll.LeaseUse-renewEvery {
			t.Errorf("lost after %v, valid %v", took, sa.Valid())
		}
		for {
			_, err := b.Acquire(ctx, v.ID, sb)
			if err == nil {
				break
			}
			wantErr(t, err, atoll.ErrBusy)
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(start); took < atoll.LeaseUse || took > 4*time.Second {
			t.Errorf("taken over after %v", took)
		}
		m.Cut("a", false)
		time.Sleep(5 * time.Second)
		if sa.Valid() {
			t.Error("a lost session came back")
		}
		_, err := a.SwapHead(ctx, h)
		wantErr(t, err, atoll.ErrFenced)
		if err := errors.Join(sa.Close(ctx), sb.Close(ctx)); err != nil {
			t.Error(err)
		}
	})
}

// TestUnknownOutcomes loses requests and replies at random; every change must
// happen exactly once all the same, and the catalog must say so.
func TestUnknownOutcomes(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) { unknownOutcomes(t, seed) })
	}
}

func unknownOutcomes(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	var mu sync.Mutex
	m := NewMemory(MemoryOptions{
		Fault: func(_, op string) Fault {
			mu.Lock()
			defer mu.Unlock()
			return Fault(max(0, rng.IntN(6)-3)) // LoseAsk or LoseReply one time in three
		},
		WatchLag: func(string) time.Duration { return 50 * time.Millisecond },
	})
	defer m.Close()
	a := openCatalog(t, m.Client("a"))
	defer a.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	s := openSession(t, a, "a")
	defer s.Close(ctx)
	for i := range byte(3) {
		if n := must(a.RegisterNode(ctx, s, disk(i+1)))(t); n.ID != atoll.NodeID(i+1) {
			t.Fatalf("seed %d: node %d got number %v", seed, i+1, n.ID)
		}
	}
	if set := must(a.EnsureCopyset(ctx, []atoll.NodeID{1, 2, 3}))(t); set.ID != 1 {
		t.Fatalf("seed %d: copyset %v", seed, set.ID)
	}
	v := must(a.CreateMedium(ctx, volume("v")))(t)
	for i := range 5 {
		v.Name = fmt.Sprintf("v%d", i)
		v = must(a.UpdateMedium(ctx, v))(t)
	}
	for i := range 5 {
		h := must(a.Acquire(ctx, v.ID, s))(t)
		if h.Epoch != atoll.Epoch(i+1) {
			t.Fatalf("seed %d: epoch %v after %d acquisitions", seed, h.Epoch, i+1)
		}
		for range 5 {
			next := h.Next + 1
			h.Next = next
			h = must(a.SwapHead(ctx, h))(t)
		}
		if got := must(a.Head(ctx, v.ID))(t); got.Next != h.Next || got.Rev != h.Rev {
			t.Fatalf("seed %d: head %+v, want %+v", seed, got, h)
		}
	}
	v.State = MediumDetached
	v = must(a.UpdateMedium(ctx, v))(t)
	v.State = MediumDeleting
	must(a.UpdateMedium(ctx, v))(t)
	if err := a.RemoveMedium(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
}

// TestReload checks that a catalog whose watch was overtaken by compaction
// loads the state anew.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMemory(MemoryOptions{})
		defer m.Close()
		a, b := openCatalog(t, m.Client("a")), openCatalog(t, m.Client("b"))
		defer a.Close()
		defer b.Close()
		s := openSession(t, a, "a")
		synctest.Wait()
		m.Cut("b", true)
		must(a.RegisterNode(testContext(t), s, disk(1)))(t) // b's watch stalls with this
		synctest.Wait()
		must(a.RegisterNode(testContext(t), s, disk(2)))(t)
		m.Compact()
		m.Cut("b", false)
		waitState(t, b, func(st *State) bool { return len(st.Nodes) == 2 && st.Nodes[2].Up })
		must(a.RegisterNode(testContext(t), s, disk(3)))(t)
		waitState(t, b, func(st *State) bool { return st.Nodes[3].Up && st.Rev == m.Rev() })
		if err := s.Close(testContext(t)); err != nil {
			t.Fatal(err)
		}
		waitState(t, b, func(st *State) bool { return !st.Nodes[1].Up && !st.Nodes[3].Up })
	})
}

// TestNewer refuses values of a newer format.
func TestNewer(t *testing.T) {
	m := NewMemory(MemoryOptions{})
	defer m.Close()
	kv := m.Client("a")
	mustTxn(t, kv, Txn{Then: []Op{{Key: keyCluster, Value: []byte(`{"v":3,"d":{}}`)}}})
	_, err := Open(testContext(t), kv, nil)
	wantErr(t, err, atoll.ErrVersion)
}
