package stream

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

// C14: a damaged copy is not served, and is repaired from another.
func TestReadRepairsDamage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		w := c.writer(nil)
		e := mustAppend(t, w, 5, 3)
		for _, n := range c.nodes {
			good := n.data(e.Seg())
			n.segs[e.Seg()].data[e.Block(0).Bytes()+100] ^= 1
			for range 3 { // whichever copy is asked first
				got := make([]byte, 3*atoll.BlockSize)
				if err := c.view.Read(context.Background(), e.Seg(), e.Block(0), got); err != nil {
					t.Fatal(err)
				}
				if want := good[e.Block(0).Bytes():][:len(got)]; !bytes.Equal(got, want) {
					t.Fatal("damaged bytes were served")
				}
			}
			c.view.repairSoon(repairJob{n.id, e.Seg(), e.Block(0), 3})
			synctest.Wait()
			if !bytes.Equal(n.data(e.Seg()), good) {
				t.Errorf("node %v was not repaired", n.id)
			}
		}
		// All copies damaged: an error, never garbage.
		for _, n := range c.nodes {
			n.segs[e.Seg()].data[e.Block(0).Bytes()+100] ^= 1
		}
		if err := c.view.Read(context.Background(), e.Seg(), e.Block(0), make([]byte, atoll.BlockSize)); !errors.Is(err, atoll.ErrCorrupt) {
			t.Errorf("read of three damaged copies: %v", err)
		}
		if err := w.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// TestReadStuck: a node that does not answer delays reads for a moment only.
func TestReadStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		w := c.writer(nil)
		e := mustAppend(t, w, 5, 1)
		for id, n := range c.nodes { // as if behind the network
			c.view.RemoveLocal(id)
			c.view.dial = func(rec catalog.Node) wire.Node { return c.nodes[rec.ID] }
			_ = n
		}
		c.nodes[1].pause()
		c.nodes[2].fail(atoll.ErrUnreachable)
		for range 5 {
			began := time.Now()
			if err := c.view.Read(context.Background(), e.Seg(), e.Block(0), make([]byte, atoll.BlockSize)); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(began); d > 100*time.Millisecond {
				t.Errorf("read took %v", d)
			}
		}
		c.nodes[3].fail(atoll.ErrUnreachable)
		if err := c.view.Read(context.Background(), e.Seg(), e.Block(0), make([]byte, atoll.BlockSize)); err == nil {
			t.Error("read without a copy succeeded")
		}
		c.nodes[1].resume()
		c.nodes[3].fail(nil)
		c.nodes[2].fail(nil)
		if err := w.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

func TestPick(t *testing.T) {
	c := newFakeCluster(t, 5)
	ctx := context.Background()
	p := catalog.Policy{Replicas: 3}
	set, err := c.view.Pick(ctx, p, nil)
	if err != nil || len(set.Nodes) != 3 {
		t.Fatal(set, err)
	}
	for _, id := range set.Nodes[:2] {
		c.view.Suspect(id, atoll.ErrUnreachable)
	}
	other, err := c.view.Pick(ctx, p, nil)
	if err != nil || slices.Contains(other.Nodes, set.Nodes[0]) || slices.Contains(other.Nodes, set.Nodes[1]) {
		t.Fatal(other, err)
	}
	down := func(ids ...atoll.NodeID) {
		c.change(func(st *catalog.State) {
			for _, id := range ids {
				rec := st.Nodes[id]
				rec.Up = false
				st.Nodes[id] = rec
			}
		})
	}
	down(other.Nodes[0])
	if set, err = c.view.Pick(ctx, p, nil); err != nil || len(set.Nodes) != 2 {
		t.Fatal("with two healthy nodes:", set, err)
	}
	down(other.Nodes[1])
	if _, err = c.view.Pick(ctx, catalog.Policy{Replicas: 5}, nil); !errors.Is(err, atoll.ErrUnavailable) {
		t.Fatal("with one healthy node:", err)
	}
}

func TestPickFull(t *testing.T) {
	c := newFakeCluster(t, 3)
	for id := range c.nodes {
		c.view.Suspect(id, atoll.ErrNoSpace)
	}
	p := catalog.Policy{Replicas: 3}
	if _, err := c.view.Pick(context.Background(), p, nil); !errors.Is(err, atoll.ErrNoSpace) {
		t.Fatal(err)
	}
	if _, err := c.view.pick(context.Background(), p, nil, true); err != nil {
		t.Fatal("in the reserve:", err)
	}
	for id := range c.nodes {
		c.view.Suspect(id, errReserve)
	}
	if _, err := c.view.pick(context.Background(), p, nil, true); !errors.Is(err, atoll.ErrNoSpace) {
		t.Fatal("in a reserve that is used up:", err)
	}
}

// C20: full nodes give a clean error, and writing goes on when there is room.
func TestNoSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		w := c.writer(nil)
		e := mustAppend(t, w, 1, 1)
		for _, n := range c.nodes {
			n.fail(atoll.ErrNoSpace)
		}
		var x Entry
		payload(&x, 2, 1)
		began := time.Now()
		if err := w.Append(context.Background(), &x); !errors.Is(err, atoll.ErrNoSpace) {
			t.Errorf("append to full nodes: %v", err)
		}
		if d := time.Since(began); d > time.Second {
			t.Errorf("it took %v to tell", d)
		}
		for _, n := range c.nodes {
			n.fail(nil)
		}
		mustRead(t, c, e, 1)
		time.Sleep(3 * time.Second)
		mustRead(t, c, mustAppend(t, w, 3, 1), 3)
		if err := w.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// TestUnavailable: without enough nodes an append ends at its deadline.
func TestUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		w := c.writer(nil)
		mustAppend(t, w, 1, 1)
		for id := atoll.NodeID(1); id <= 2; id++ {
			c.nodes[id].fail(atoll.ErrUnreachable)
		}
		var x Entry
		payload(&x, 2, 1)
		began := time.Now()
		if err := w.Append(context.Background(), &x); !errors.Is(err, atoll.ErrUnavailable) {
			t.Errorf("append with one node of three: %v", err)
		}
		if d := time.Since(began); d < atoll.RequestTimeout || d > atoll.RequestTimeout+100*time.Millisecond {
			t.Errorf("it took %v", d)
		}
		for _, n := range c.nodes {
			n.fail(nil)
		}
		mustAppend(t, w, 3, 1)
		if err := w.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// C8: an owner that was stopped past its lease is refused, whatever it believes.
func TestFencedWriter(t *testing.T) {
	c := newFakeCluster(t, 3)
	ctx := context.Background()
	w := c.writer(nil)
	e := mustAppend(t, w, 1, 2)
	sealed, err := Recover(ctx, c.view, c.open(), 2)
	if err != nil || len(sealed) == 0 || sealed[0].Length != 3 || len(sealed[0].Unverified) > 0 {
		t.Fatal(sealed, err)
	}
	var x Entry
	payload(&x, 2, 1)
	if err := w.Append(ctx, &x); !errors.Is(err, atoll.ErrFenced) {
		t.Fatalf("append of a fenced owner: %v", err)
	}
	if err := w.Append(ctx, &x); !errors.Is(err, atoll.ErrFenced) {
		t.Fatalf("second append of a fenced owner: %v", err)
	}
	mustRead(t, c, e, 1)
	if err := w.Close(ctx); !errors.Is(err, atoll.ErrFenced) {
		t.Fatalf("close of a fenced owner: %v", err)
	}
	if _, err := Recover(ctx, c.view, c.open(), 1); !errors.Is(err, atoll.ErrFenced) {
		t.Fatalf("recovery under an old epoch: %v", err)
	}
}

// TestRecoverDown: a silent copy whose server lost its lease is not waited for,
// if the others suffice.
func TestRecoverDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		ctx := context.Background()
		w := c.writer(nil)
		mustAppend(t, w, 1, 2)
		dead, kill := context.WithCancel(ctx)
		kill()
		_ = w.Close(dead)
		for down, limit := range []time.Duration{1: atoll.FenceWait / 4, 2: atoll.FenceWait} {
			if down == 0 {
				continue
			}
			id := atoll.NodeID(down)
			c.nodes[id].pause()
			c.change(func(st *catalog.State) {
				rec := st.Nodes[id]
				rec.Up = false
				st.Nodes[id] = rec
			})
			began := time.Now()
			sealed, err := Recover(ctx, c.view, c.open(), atoll.Epoch(1+down))
			if err != nil || len(sealed) != 1 || len(sealed[0].Unverified) != down || sealed[0].Length == 0 {
				t.Fatal(sealed, err)
			}
			if d := time.Since(began); d > limit {
				t.Errorf("with %d copies down it took %v", down, d)
			}
		}
	})
}

// TestRecoverSilent: a silent copy is waited for, then listed, then completed.
func TestRecoverSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		ctx := context.Background()
		w := c.writer(nil)
		e := mustAppend(t, w, 1, 2)
		dead, kill := context.WithCancel(ctx)
		kill()
		_ = w.Close(dead)
		c.nodes[2].pause()
		began := time.Now()
		sealed, err := Recover(ctx, c.view, c.open(), 2)
		if err != nil || len(sealed) != 1 || !slices.Equal(sealed[0].Unverified, []atoll.NodeID{2}) {
			t.Fatal(sealed, err)
		}
		if d := time.Since(began); d != atoll.FenceWait {
			t.Errorf("took %v", d)
		}
		c.nodes[2].resume()
		c.nodes[2].segs[e.Seg()] = nil // an empty disk
		delete(c.nodes[2].segs, e.Seg())
		if still, err := c.view.Complete(ctx, sealed[0], 2); err != nil || len(still) > 0 {
			t.Fatal(still, err)
		}
		mustRead(t, c, e, 1)
	})
}
