package medium_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

const kindPut = medium.FirstKind

// inBubble runs a test where time costs nothing.
func inBubble(t *testing.T, nodes int, fn func(t *testing.T, c *mediumtest.Cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, nodes)
		defer c.Close()
		fn(t, c)
	})
}

// block returns a block whose contents follow from key and value.
func block(key, value uint64) []byte {
	p := make([]byte, atoll.BlockSize)
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], key)
		binary.LittleEndian.PutUint64(p[i+8:], value+uint64(i))
	}
	return p
}

// put appends one block and returns where it is.
func put(ctx context.Context, m *medium.Medium, key, value uint64) (atoll.Location, error) {
	var e stream.Entry
	b := host.Alloc(atoll.BlockSize)
	defer b.Release()
	copy(b.Bytes(), block(key, value))
	e.Add(segment.Record{Kind: kindPut, Blocks: 1, Key: key, Aux: value}, b, b.Bytes())
	if err := m.Append(ctx, catalog.Hot, &e); err != nil {
		return 0, err
	}
	return atoll.MakeLocation(e.Seg().Ordinal, e.Block(0), 0), nil
}

// toy is the simplest kind: a map from keys to places. Its root lists them.
type toy struct {
	m  *medium.Medium
	at map[uint64]atoll.Location
	vs map[uint64]uint64
}

func openToy(t *testing.T, o *mediumtest.Owner, id atoll.MediumID) *toy {
	t.Helper()
	k, err := tryToy(o, id)
	if err != nil {
		t.Fatalf("open toy: %v", err)
	}
	return k
}

func tryToy(o *mediumtest.Owner, id atoll.MediumID) (*toy, error) {
	ctx := context.Background()
	m, err := o.TryOpen(id)
	if err != nil {
		return nil, err
	}
	k := &toy{m: m, at: map[uint64]atoll.Location{}, vs: map[uint64]uint64{}}
	for p := m.Root(); len(p) > 0; p = p[24:] {
		key := binary.LittleEndian.Uint64(p)
		k.at[key], k.vs[key] = atoll.Location(binary.LittleEndian.Uint64(p[8:])), binary.LittleEndian.Uint64(p[16:])
	}
	err = m.Replay(ctx, func(r medium.Record) error {
		want := segment.CRC(block(r.Key, r.Aux))
		if r.Kind != kindPut || len(r.CRCs) != 1 || r.CRCs[0] != want {
			return fmt.Errorf("replay of %+v: %w", r, atoll.ErrCorrupt)
		}
		k.apply(r.Key, r.Aux, atoll.MakeLocation(r.Seg, r.Block, 0))
		return nil
	})
	if err != nil {
		_ = m.Close(ctx)
		return nil, err
	}
	return k, nil
}

func (k *toy) apply(key, value uint64, at atoll.Location) {
	if old, ok := k.at[key]; ok {
		k.m.Live(old.Ordinal(), -1)
	}
	k.m.Live(at.Ordinal(), +1)
	k.at[key], k.vs[key] = at, value
}

func (k *toy) put(key, value uint64) error {
	at, err := put(context.Background(), k.m, key, value)
	if err == nil {
		k.apply(key, value, at)
	}
	return err
}

func (k *toy) checkpoint() error {
	mark := k.m.Mark()
	var root []byte
	for key, at := range k.at {
		root = binary.LittleEndian.AppendUint64(root, key)
		root = binary.LittleEndian.AppendUint64(root, uint64(at))
		root = binary.LittleEndian.AppendUint64(root, k.vs[key])
	}
	return k.m.Checkpoint(context.Background(), mark, root)
}

// check compares everything with a model, also the live counts.
func (k *toy) check(t *testing.T, want map[uint64]uint64) {
	t.Helper()
	ctx := context.Background()
	p := make([]byte, atoll.BlockSize)
	for key, value := range want {
		at, ok := k.at[key]
		if !ok {
			t.Fatalf("key %d is lost", key)
		}
		if err := k.m.Read(ctx, at.Ordinal(), at.Block(), p); err != nil {
			t.Fatalf("read key %d at %v: %v", key, at, err)
		}
		if !slices.Equal(p, block(key, value)) {
			t.Fatalf("key %d at %v: wrong bytes", key, at)
		}
	}
	if len(k.at) != len(want) {
		t.Fatalf("%d keys, want %d", len(k.at), len(want))
	}
	if s := k.m.Stats(); s.Live != int64(len(want))*atoll.BlockSize {
		t.Fatalf("%d live bytes for %d keys: %+v", s.Live, len(want), s)
	}
	if err := k.m.Check(ctx); err != nil {
		t.Fatalf("check: %v", err)
	}
}

func (k *toy) close(t *testing.T) {
	t.Helper()
	if err := k.m.Close(context.Background()); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func TestReopen(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("toy", 32)
		want := map[uint64]uint64{}
		rng := rand.New(rand.NewPCG(1, 2))
		for round := range 6 {
			k := openToy(t, o, rec.ID)
			k.check(t, want)
			for i := range 40 {
				key, value := rng.Uint64N(20), uint64(round*100+i)
				if err := k.put(key, value); err != nil {
					t.Fatal(err)
				}
				want[key] = value
				if rng.IntN(30) == 0 {
					if err := k.checkpoint(); err != nil {
						t.Fatal(err)
					}
				}
			}
			k.check(t, want)
			if round == 3 {
				if err := k.checkpoint(); err != nil {
					t.Fatal(err)
				}
			}
			k.close(t)
			if err := k.put(1, 1); !errors.Is(err, atoll.ErrClosed) {
				t.Fatalf("append after close: %v", err)
			}
		}
		k := openToy(t, o, rec.ID)
		defer k.close(t)
		k.check(t, want)
	})
}

// TestReclaim overwrites the same few keys for long: dead segments must leave
// the nodes, and the space stay bounded.
func TestReclaim(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("toy", 16)
		k := openToy(t, o, rec.ID)
		want := map[uint64]uint64{}
		for i := range uint64(1500) {
			if err := k.put(i%10, i); err != nil {
				t.Fatal(err)
			}
			want[i%10] = i
			if i%100 == 99 {
				if err := k.checkpoint(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(200 * time.Millisecond)
			}
		}
		time.Sleep(time.Second)
		k.check(t, want)
		if s := k.m.Stats(); s.Segments > 60 || s.Dropped > 60 {
			t.Errorf("segments pile up: %+v", s)
		}
		held := copiesOn(t, c, rec.ID)
		if held > 150 {
			t.Errorf("nodes hold %d copies", held)
		}
		t.Logf("%+v, nodes hold %d copies", k.m.Stats(), held)
		k.close(t)
		k = openToy(t, o, rec.ID)
		k.check(t, want)
		k.close(t)
	})
}

func copiesOn(t *testing.T, c *mediumtest.Cluster, id atoll.MediumID) (n int) {
	t.Helper()
	for _, node := range c.IDs() {
		if nd := c.Node(node); nd != nil {
			list, err := nd.List(context.Background(), atoll.SegmentID{Medium: id}, 10000)
			if err != nil {
				t.Fatal(err)
			}
			n += len(list)
		}
	}
	return n
}

// TestTakeover lets a second process take a medium while the first goes on
// writing, after its lease ended unnoticed. Every acknowledged append is there,
// and after the takeover the first gets ErrFenced only.
func TestTakeover(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		a, b := c.Owner("a"), c.Owner("b")
		rec := a.Create("toy", 64)
		ka := openToy(t, a, rec.ID)
		want := map[uint64]uint64{}
		var wg sync.WaitGroup
		stop := make(chan struct{})
		var late []error
		wg.Go(func() {
			for i := uint64(0); ; i++ {
				err := ka.put(i%50, i)
				if err != nil {
					late = append(late, err)
				} else if len(late) > 0 {
					t.Errorf("append %d acknowledged after %v", i, late[0])
				} else {
					want[i%50] = i
				}
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
		time.Sleep(time.Second)
		if _, err := medium.Open(t.Context(), func() medium.Options {
			o := b.Options()
			o.Wait = time.Millisecond
			return o
		}(), rec.ID); !errors.Is(err, atoll.ErrBusy) {
			t.Errorf("open of a medium that is owned: %v", err)
		}
		c.Memory.Cut("a", true) // a does not notice at once
		kb := openToy(t, b, rec.ID)
		time.Sleep(time.Second)
		close(stop)
		wg.Wait()
		if len(late) == 0 {
			t.Fatal("the first owner noticed nothing")
		}
		for _, err := range late {
			if !errors.Is(err, atoll.ErrFenced) {
				t.Errorf("the first owner got %v", err)
			}
		}
		kb.check(t, want)
		if err := ka.m.Read(context.Background(), 1, 1, make([]byte, atoll.BlockSize)); !errors.Is(err, atoll.ErrFenced) {
			t.Errorf("read by the first owner: %v", err)
		}
		c.Memory.Cut("a", false)
		_ = ka.m.Close(context.Background())
		kb.close(t)
	})
}

// TestNodeDown writes on through the death of a node; its copies are completed
// when it is back.
func TestNodeDown(t *testing.T) {
	inBubble(t, 4, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("toy", 32)
		k := openToy(t, o, rec.ID)
		want := map[uint64]uint64{}
		for i := range uint64(200) {
			switch i {
			case 50:
				c.Kill(c.IDs()[0])
			case 150:
				c.Restart(c.IDs()[0])
			}
			if err := k.put(i%30, i); err != nil {
				t.Fatal(err)
			}
			want[i%30] = i
			time.Sleep(time.Millisecond)
		}
		time.Sleep(10 * time.Second)
		if s := k.m.Stats(); s.Unverified != 0 {
			t.Errorf("copies are not completed: %+v", s)
		}
		k.check(t, want)
		k.close(t)
	})
}

// TestPowerCut cuts the power of everything at one sync after the other, and
// opens what is left: every acknowledged put is there, and nothing unwritten.
func TestPowerCut(t *testing.T) {
	points := 60
	if testing.Short() {
		points = 10
	}
	for n := range points {
		seed := uint64(n)
		at := 1 + n*n/6 + n
		t.Run(fmt.Sprintf("sync%d", at), func(t *testing.T) {
			inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) { powerCut(t, c, at, seed) })
		})
	}
}

func powerCut(t *testing.T, c *mediumtest.Cluster, at int, seed uint64) {
	a := c.Owner("a")
	rec := a.Create("toy", 24)
	rng := rand.New(rand.NewPCG(seed, 7))
	mode := []hosttest.CrashMode{hosttest.LoseUnsynced, hosttest.KeepAll, hosttest.Random}[seed%3]
	var once sync.Once
	var disks []*hosttest.Disk
	off := make(chan struct{})
	var count int
	var mu sync.Mutex
	for _, id := range c.IDs() {
		c.Disk(id).OnSync(func(p hosttest.SyncPoint) {
			mu.Lock()
			count++
			now := count >= at
			mu.Unlock()
			if now {
				once.Do(func() {
					disks = c.Blackout(rng, mode)
					close(off)
				})
			}
		})
	}
	acked := map[uint64]uint64{}
	tried := map[uint64]uint64{}
	k, err := tryToy(a, rec.ID)
	for i := uint64(1); err == nil && i < 400; i++ {
		key := i % 17
		tried[key] = i
		if err = k.put(key, i); err == nil {
			acked[key] = i
		}
		if err == nil && i%60 == 0 {
			err = k.checkpoint()
		}
	}
	if disks == nil {
		t.Fatalf("sync %d never came (%d)", at, count)
	}
	<-off
	if k != nil {
		_ = k.m.Close(context.Background())
	}
	c.StartAll(disks)
	b := c.Owner("b")
	kb := openToy(t, b, rec.ID)
	for key, v := range acked {
		got := kb.vs[key]
		if got != v && got != tried[key] {
			t.Fatalf("seed %d: key %d is %d, acknowledged %d, tried %d", seed, key, got, v, tried[key])
		}
	}
	kb.check(t, kb.vs)
	for i := uint64(1000); i < 1060; i++ {
		if err := kb.put(i%17, i); err != nil {
			t.Fatal(err)
		}
	}
	kb.check(t, kb.vs)
	kb.close(t)
	kc := openToy(t, b, rec.ID)
	kc.check(t, kb.vs)
	kc.close(t)
}

// TestDelete deletes a medium; nobody can open it afterwards, and an owner must
// have let go before.
func TestDelete(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		ctx := context.Background()
		a, b := c.Owner("a"), c.Owner("b")
		rec := a.Create("toy", 32)
		k := openToy(t, a, rec.ID)
		if err := k.put(1, 1); err != nil {
			t.Fatal(err)
		}
		if err := medium.Delete(ctx, b.Options(), rec.ID); !errors.Is(err, atoll.ErrBusy) {
			t.Fatalf("delete of an owned medium: %v", err)
		}
		a.Die()
		for range 2 {
			if err := medium.Delete(ctx, b.Options(), rec.ID); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.TryOpen(rec.ID); !errors.Is(err, atoll.ErrNotExist) {
			t.Fatalf("open of a deleted medium: %v", err)
		}
		h, err := b.Catalog.Head(ctx, rec.ID)
		if err != nil || len(h.Unsealed) != 0 || !h.Process.IsZero() {
			t.Errorf("head after delete: %+v, %v", h, err)
		}
	})
}

// TestLeftovers: segments on a node that missed their deletion go when it is
// back; segments that no record knows are kept.
func TestLeftovers(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		ctx := context.Background()
		o := c.Owner("one")
		rec := o.Create("toy", 16)
		k := openToy(t, o, rec.ID)
		stranger := atoll.SegmentID{Medium: rec.ID, Ordinal: 1 << 20, Copyset: 1}
		first := c.IDs()[0]
		if err := c.Node(first).Create(ctx, stranger, 1, 16); err != nil {
			t.Fatal(err)
		}
		want := map[uint64]uint64{}
		for i := range uint64(300) {
			if i == 100 {
				c.Kill(first)
			}
			if err := k.put(i%5, i); err != nil {
				t.Fatal(err)
			}
			want[i%5] = i
			if i%50 == 49 {
				if err := k.checkpoint(); err != nil {
					t.Fatal(err)
				}
			}
		}
		time.Sleep(5 * time.Second)
		c.Restart(first)
		time.Sleep(30 * time.Second)
		if err := k.checkpoint(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		list, err := c.Node(first).List(ctx, atoll.SegmentID{Medium: rec.ID}, 1000)
		if err != nil {
			t.Fatal(err)
		}
		kept := false
		for _, s := range list {
			kept = kept || s.Seg == stranger
		}
		if !kept || len(list) > 40 {
			t.Errorf("node holds %d segments, the unknown one kept: %v", len(list), kept)
		}
		if s := k.m.Stats(); s.Dropped != 0 || s.Unverified != 0 {
			t.Errorf("segments not removed: %+v", s)
		}
		k.check(t, want)
		k.close(t)
	})
}

// TestCatalogFaults loses requests to and answers from the catalog: rolls and
// checkpoints must come through, and nothing may be registered for ever.
func TestCatalogFaults(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("toy", 16)
		k := openToy(t, o, rec.ID)
		want := map[uint64]uint64{}
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				c.Memory.Cut("one", i%2 == 0)
				select {
				case <-done:
					c.Memory.Cut("one", false)
					return
				case <-time.After(time.Duration(50+i*7%400) * time.Millisecond):
				}
			}
		})
		for i := range uint64(400) {
			if err := k.put(i%10, i); err != nil {
				t.Fatal(err)
			}
			want[i%10] = i
			if i%40 == 39 {
				if err := k.checkpoint(); err != nil {
					t.Fatal(err)
				}
			}
		}
		close(done)
		wg.Wait()
		k.check(t, want)
		k.close(t)
		h, err := o.Catalog.Head(context.Background(), rec.ID)
		if err != nil || len(h.Unsealed) != 0 {
			t.Errorf("after close the head has %+v, %v", h.Unsealed, err)
		}
		k = openToy(t, o, rec.ID)
		k.check(t, want)
		k.close(t)
	})
}

// TestIdle: an idle medium holds no open segment.
func TestIdle(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("toy", 64)
		k := openToy(t, o, rec.ID)
		for i := range uint64(40) {
			if err := k.put(i, i); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Minute)
		h, err := o.Catalog.Head(context.Background(), rec.ID)
		if err != nil || len(h.Unsealed) != 0 {
			t.Fatalf("idle head: %+v, %v", h, err)
		}
		next := h.Next
		time.Sleep(5 * time.Minute)
		if h, _ = o.Catalog.Head(context.Background(), rec.ID); h.Next != next {
			t.Errorf("idle medium went from segment %d to %d", next, h.Next)
		}
		if err := k.put(1, 2); err != nil {
			t.Fatal(err)
		}
		k.close(t)
	})
}

// TestReadAllocs: a read through the medium allocates nothing beside what the
// stream under it does.
func TestReadAllocs(t *testing.T) {
	c := mediumtest.NewCluster(t, 1)
	o := c.Owner("one")
	rec := o.Create("toy", 64)
	k := openToy(t, o, rec.ID)
	if err := k.put(1, 1); err != nil {
		t.Fatal(err)
	}
	at, p := k.at[1], make([]byte, atoll.BlockSize)
	direct := testing.AllocsPerRun(200, func() {
		_ = o.Nodes.Read(t.Context(), atoll.SegmentID{Medium: rec.ID, Ordinal: at.Ordinal(), Copyset: 1}, at.Block(), p)
	})
	through := hosttest.Allocs(200, func() { _ = k.m.Read(t.Context(), at.Ordinal(), at.Block(), p) })
	if through > direct+0.5 {
		t.Errorf("%.1f allocations through the medium, %.1f without", through, direct)
	}
	k.close(t)
}
