package medium_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
)

func mustBook(t *testing.T, o *mediumtest.Owner, id atoll.MediumID) *book {
	t.Helper()
	b, err := openBook(o, id)
	must(t, err)
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func putMany(t *testing.T, b *book, keys, from, to uint64) {
	t.Helper()
	for i := from; i < to; i++ {
		must(t, b.put(i%keys, i))
	}
}

// TestVersions makes, restores and removes versions, across reopens.
func TestVersions(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("book", 24)
		b := mustBook(t, o, rec.ID)
		want := map[uint64]map[uint64]uint64{}
		for i := range uint64(6) {
			putMany(t, b, 20, 100*i, 100*i+30)
			n, err := b.backup()
			must(t, err)
			want[n] = b.cur.values()
			if n != i+1 {
				t.Fatalf("version %d is number %d", i, n)
			}
		}
		reopen := func() {
			t.Helper()
			must(t, b.check())
			must(t, b.m.Close(context.Background()))
			b = mustBook(t, o, rec.ID)
			must(t, b.check())
			if len(b.versions) != len(want) {
				t.Fatalf("%d versions, want %d", len(b.versions), len(want))
			}
			for n, w := range want {
				if !maps.Equal(b.versions[n].values(), w) {
					t.Fatalf("version %d: %v, want %v", n, b.versions[n].values(), w)
				}
			}
		}
		reopen()
		s := b.m.State()
		if v := s.Named("v-3"); v == nil || v.Number != 3 || v.Parent != 2 || v.Props["n"] != "3" || s.CurParent != 6 {
			t.Fatalf("state: %+v", s)
		}
		must(t, b.restore(3))
		putMany(t, b, 20, 1000, 1010)
		n, err := b.backup()
		must(t, err)
		want[n] = b.cur.values()
		if s := b.m.State(); s.Find(n).Parent != 3 {
			t.Fatalf("version after restore: %+v", s.Find(n))
		}
		for _, n := range []uint64{3, 5, 1, 6} {
			gone, err := b.remove(n)
			must(t, err)
			if !gone {
				t.Fatalf("version %d is not gone", n)
			}
			delete(want, n)
			reopen()
		}
		if s := b.m.State(); s.Find(8).Parent != 2 || s.Find(2).Parent != 0 || s.Find(4).Parent != 2 {
			t.Errorf("parents: %+v", s)
		}
		if n := b.m.NewVersionNumber(); n != 9 {
			t.Errorf("next version is %d", n)
		}
		must(t, b.m.Edit(context.Background(), func(s *medium.State) error { s.Release = 4; return nil }))
		reopen()
		for spec, n := range map[string]uint64{"release": 4, "last": 8, "2": 2, "v-8": 8} {
			sp, err := medium.ParseSpec(spec)
			must(t, err)
			s := b.m.State()
			if v, err := s.Resolve(sp); err != nil || v.Number != n {
				t.Errorf("%s is %d, %v", spec, v.Number, err)
			}
		}
		if err := b.m.Edit(context.Background(), func(s *medium.State) error { s.Find(2).Name = "v-8"; return nil }); !errors.Is(err, atoll.ErrExist) {
			t.Errorf("name given twice: %v", err)
		}
		must(t, b.m.Close(context.Background()))
	})
}

// TestManyVersions: several pages of versions, and roots that are not inline.
func TestManyVersions(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("book", 256)
		b := mustBook(t, o, rec.ID)
		count := uint64(300)
		if testing.Short() {
			count = 140
		}
		for i := range count {
			must(t, b.put(i, i))
			_, err := b.backup()
			must(t, err)
		}
		must(t, b.m.Close(context.Background()))
		b = mustBook(t, o, rec.ID)
		must(t, b.check())
		if len(b.versions) != int(count) || len(b.versions[count]) != int(count) || len(b.versions[128]) != 128 {
			t.Fatalf("%d versions", len(b.versions))
		}
		for n := uint64(1); n < count; n++ {
			_, err := b.remove(n)
			must(t, err)
		}
		must(t, b.check())
		time.Sleep(5 * time.Second)
		t.Logf("%+v", b.m.Stats())
		must(t, b.m.Close(context.Background()))
		b = mustBook(t, o, rec.ID)
		must(t, b.check())
		must(t, b.m.Close(context.Background()))
	})
}

// TestCompact keeps little of much alive: compaction must free the segments, again
// and again, also those it filled itself, and everything stay readable.
func TestCompact(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("book", 32)
		b := mustBook(t, o, rec.ID)
		put := uint64(0)
		for round := range uint64(30) {
			for i := range uint64(60) { // one of six stays for long
				put++
				key := i % 5
				if i%6 == 0 {
					key = 100 + round*10 + i/6
				}
				must(t, b.put(key, put))
			}
			if round%5 == 4 {
				_, err := b.backup()
				must(t, err)
			}
			if round > 10 && round%5 == 1 {
				_, err := b.remove(round/5 - 1)
				must(t, err)
			}
			must(t, b.checkpoint())
			for range 4 {
				if o, err := b.compact(); err != nil || o == 0 {
					must(t, err)
					break
				}
			}
			time.Sleep(300 * time.Millisecond)
			must(t, b.check())
			if round%7 == 6 {
				must(t, b.m.Close(context.Background()))
				b = mustBook(t, o, rec.ID)
				must(t, b.check())
			}
		}
		n := 0
		for ; n < 300; n++ {
			if n%10 == 0 {
				must(t, b.checkpoint())
			}
			o, err := b.compact()
			must(t, err)
			if o == 0 {
				break
			}
		}
		must(t, b.check())
		time.Sleep(5 * time.Second)
		s := b.m.Stats()
		t.Logf("%d more compactions", n)
		held := copiesOn(t, c, rec.ID)
		t.Logf("%+v, nodes hold %d copies", s, held)
		if s.Virtual == 0 || s.Stored > 3*s.Live+64*atoll.BlockSize*8 || held > 3*(s.Segments+2) {
			t.Errorf("space does not come back: %+v, nodes hold %d copies", s, held)
		}
		must(t, b.m.Close(context.Background()))
	})
}

// TestPins: a reader of another process keeps a version and follows compaction;
// it refuses what is being deleted.
func TestPins(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		ctx := context.Background()
		a, r := c.Owner("a"), c.Owner("r")
		rec := a.Create("book", 24)
		b := mustBook(t, a, rec.ID)
		putMany(t, b, 20, 0, 50)
		n, err := b.backup()
		must(t, err)
		putMany(t, b, 20, 100, 150)
		_, err = b.backup()
		must(t, err)
		v, err := medium.OpenView(ctx, r.Options(), rec.ID, medium.VersionSpec{Name: "v-1"})
		must(t, err)
		if v.Version().Number != n {
			t.Fatalf("opened %+v", v.Version())
		}
		s := decodeShelf(v.Root())
		must(t, readAll(v, s))
		if gone, err := b.remove(n); err != nil || gone {
			t.Fatalf("removed a version that is read: %v, %v", gone, err)
		}
		if _, err := medium.OpenView(ctx, r.Options(), rec.ID, medium.VersionSpec{Number: n}); !errors.Is(err, atoll.ErrNotExist) {
			t.Fatalf("opened a version that is being deleted: %v", err)
		}
		for i := range uint64(10) {
			putMany(t, b, 20, 200+i*30, 230+i*30)
			must(t, b.checkpoint())
			_, err := b.compact()
			must(t, err)
			time.Sleep(time.Second)
			must(t, readAll(v, s))
			must(t, b.check())
		}
		must(t, v.Close(ctx))
		if gone, err := b.remove(n); err != nil || !gone {
			t.Fatalf("not removed although nobody reads it: %v, %v", gone, err)
		}
		last, err := medium.OpenView(ctx, r.Options(), rec.ID, medium.VersionSpec{Last: true})
		must(t, err)
		r.Die()
		time.Sleep(5 * time.Second) // the pin ends with the lease
		if pins, err := b.m.Pins(ctx); err != nil || len(pins) != 0 {
			t.Errorf("pins of the dead: %v, %v", pins, err)
		}
		if err := readAll(last, decodeShelf(last.Root())); !errors.Is(err, atoll.ErrFenced) {
			t.Errorf("a view without a pin still reads: %v", err)
		}
		if last.Valid() {
			t.Error("a view without a pin is valid")
		}
		must(t, b.m.Close(ctx))
	})
}

// TestClones: a chain of clones reads its ancestors after they were deleted, and
// while they are compacted.
func TestClones(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		ctx := context.Background()
		o := c.Owner("one")
		rec := o.Create("book", 24)
		books := []*book{mustBook(t, o, rec.ID)}
		var recs []catalog.Medium
		recs = append(recs, rec)
		for i := range 3 {
			b := books[i]
			putMany(t, b, uint64(20+10*i), uint64(1000*i), uint64(1000*i+60))
			n, err := b.backup()
			must(t, err)
			putMany(t, b, 7, uint64(1000*i+500), uint64(1000*i+560))
			rec, err := medium.Clone(ctx, o.Options(), b.m, n, catalog.Medium{Name: fmt.Sprintf("clone%d", i), Owner: "root"})
			must(t, err)
			if len(rec.Ancestors) != i+1 || rec.Base() <= b.m.Base() {
				t.Fatalf("clone %d: %+v", i, rec)
			}
			k := mustBook(t, o, rec.ID)
			if !maps.Equal(k.cur.values(), b.versions[n].values()) {
				t.Fatalf("clone %d begins as %v", i, k.cur.values())
			}
			if _, err := b.remove(n); err != nil || len(b.versions) != 1 {
				t.Fatalf("version of a clone removed: %v", err)
			}
			must(t, k.check())
			books, recs = append(books, k), append(recs, rec)
		}
		for i, b := range books {
			must(t, b.check())
			for range 5 {
				_, err := b.compact()
				must(t, err)
			}
			if _, own := b.m.Ancestor(1); own != true {
				t.Errorf("book %d has nobody's segment 1", i)
			}
		}
		time.Sleep(time.Second)
		for _, b := range books {
			must(t, b.check())
		}
		for i := range 3 {
			must(t, books[i].m.Close(ctx))
			must(t, medium.Delete(ctx, o.Options(), recs[i].ID))
			if rec, err := o.Catalog.Medium(ctx, recs[i].ID); err != nil || rec.State != catalog.MediumDetached {
				t.Fatalf("deleted with clones: %+v, %v", rec, err)
			}
		}
		last := books[3]
		must(t, last.check())
		must(t, last.m.Close(ctx))
		last = mustBook(t, o, recs[3].ID)
		must(t, last.check())
		// A detached medium can be opened, to remove what only it needed.
		b := mustBook(t, o, recs[1].ID)
		must(t, b.check())
		must(t, b.m.Close(ctx))
		must(t, last.check())
		must(t, last.m.Close(ctx))
	})
}

// TestFull fills a cluster with a book of which most is dead. Puts fail for want
// of space, but what frees it finds room in the reserve, and then puts go on.
func TestFull(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		const segment = 64
		c.Limit(24 << 20) // full for a segment of the usual size when 18 MiB are in use
		o := c.Owner("one")
		rec := o.Create("book", segment)
		b := mustBook(t, o, rec.ID)
		key := uint64(0)
		fill := func() (n int) {
			for ; ; n++ {
				k := uint64(n % 5)
				if n%8 == 0 {
					key++
					k = 100 + key%60
				}
				if err := b.put(k, uint64(n)); err != nil {
					if !errors.Is(err, atoll.ErrNoSpace) {
						t.Fatal(err)
					}
					return n
				}
				if n%300 == 299 { // the kind is slow to reclaim
					time.Sleep(10 * time.Millisecond)
				}
			}
		}
		rounds := 4
		if testing.Short() {
			rounds = 2
		}
		for round := range rounds {
			n := fill()
			full := c.Used()
			if n < 200 || full < 0.6 {
				t.Fatalf("round %d: no space after %d puts, with %.2f in use", round, n, full)
			}
			// A manifest without a mark, when the hot lane has no room for it.
			must(t, b.m.Edit(context.Background(), func(*medium.State) error { return nil }))
			must(t, b.checkpoint())
			for i := 0; i < 200 && c.Used() > 0.3; i++ {
				if _, err := b.compact(); err != nil {
					t.Fatalf("round %d: compact: %v", round, err)
				}
				if i%10 == 9 {
					must(t, b.checkpoint())
				}
				time.Sleep(150 * time.Millisecond)
				must(t, b.check())
			}
			t.Logf("round %d: %d puts, from %.2f to %.2f in use, pressure %.2f, %+v", round, n, full, c.Used(), b.m.Pressure(), b.m.Stats())
			if c.Used() > 0.35 {
				t.Fatal("space does not come back")
			}
			time.Sleep(3 * time.Second)
		}
		must(t, b.m.Close(context.Background()))
	})
}

// TestMovePowerCut cuts the power of everything at each sync of a compaction in
// turn: whatever the manifest says then, everything is there.
func TestMovePowerCut(t *testing.T) {
	done, step := false, 1
	if testing.Short() {
		step = 7
	}
	for at := 1; !done && at < 200; at += step {
		inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
			o := c.Owner("one")
			rec := o.Create("book", 40)
			b := mustBook(t, o, rec.ID)
			putMany(t, b, 12, 0, 60)
			_, err := b.backup()
			must(t, err)
			putMany(t, b, 12, 100, 160)
			must(t, b.checkpoint())
			for i := 0; i < at%3; i++ { // what moved once moves again
				_, err := b.compact()
				must(t, err)
				must(t, b.checkpoint())
			}
			var once sync.Once
			var mu sync.Mutex
			var disks []*hosttest.Disk
			count := 0
			mode := []hosttest.CrashMode{hosttest.LoseUnsynced, hosttest.KeepAll, hosttest.Random}[at/3%3]
			for _, id := range c.IDs() {
				c.Disk(id).OnSync(func(hosttest.SyncPoint) {
					mu.Lock()
					defer mu.Unlock()
					if count++; count == at {
						once.Do(func() { disks = c.Blackout(rand.New(rand.NewPCG(uint64(at), 1)), mode) })
					}
				})
			}
			for range 3 {
				if _, err = b.compact(); err != nil {
					break
				}
			}
			time.Sleep(200 * time.Millisecond) // and while the nodes remove the old bytes
			mu.Lock()
			dark := disks != nil
			count = at // no more cuts
			mu.Unlock()
			if !dark {
				done = true
				must(t, err)
				must(t, b.m.Close(context.Background()))
				return
			}
			_ = b.m.Close(context.Background())
			cur, version := b.cur.values(), b.versions[1].values()
			c.StartAll(disks)
			b = mustBook(t, c.Owner("two"), rec.ID)
			if !maps.Equal(b.cur.values(), cur) || !maps.Equal(b.versions[1].values(), version) {
				t.Fatalf("sync %d: %v, version %v", at, b.cur.values(), b.versions)
			}
			must(t, b.check())
			_, err = b.compact()
			must(t, err)
			time.Sleep(time.Second)
			must(t, b.check())
			must(t, b.m.Close(context.Background()))
		})
	}
	if !done {
		t.Error("the compaction never ended")
	}
}

// TestMoveBesides: checkpoints and new versions go on while compaction copies,
// and do not take its copies for garbage.
func TestMoveBesides(t *testing.T) {
	seeds := uint64(8)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
			o := c.Owner("one")
			rec := o.Create("book", 24)
			b := mustBook(t, o, rec.ID)
			rng := rand.New(rand.NewPCG(seed, 3))
			for round := range uint64(12) {
				putMany(t, b, 80, 1000*round, 1000*round+100)
				must(t, b.checkpoint())
				var wg sync.WaitGroup
				moved := make([]error, 2)
				for i, v := range b.m.Victims(len(moved)) {
					o, runs, err := b.pick(v.Ordinal)
					must(t, err)
					wg.Go(func() { moved[i] = b.m.Move(context.Background(), o, runs) })
				}
				for range 1 + rng.IntN(6) {
					must(t, b.m.Roll(context.Background(), catalog.Bulk))
					putMany(t, b, 3, 1000*round+500, 1000*round+500+rng.Uint64N(4))
					must(t, b.checkpoint())
				}
				wg.Wait()
				must(t, errors.Join(moved...))
				time.Sleep(150 * time.Millisecond)
				must(t, b.check())
			}
			must(t, b.m.Close(context.Background()))
		})
	}
}

// TestShort: segments that were sealed with little in them are brought together,
// and that comes to an end.
func TestShort(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		o := c.Owner("one")
		rec := o.Create("book", 256)
		b := mustBook(t, o, rec.ID)
		total := 0
		for i := range uint64(160) {
			must(t, b.put(i, i))
			must(t, b.put(i+1, i))
			must(t, b.m.Roll(context.Background(), catalog.Hot))
			if i%8 == 7 {
				if s := b.m.Stats(); s.Waiting < 8*256/16*atoll.BlockSize {
					t.Fatalf("%+v", s)
				}
				must(t, b.checkpoint())
				for n := 0; ; n++ {
					o, err := b.compact()
					must(t, err)
					if o == 0 {
						break
					}
					if total++; n > 20 {
						t.Fatal("compaction does not end")
					}
				}
				time.Sleep(time.Second)
				must(t, b.check())
				if s := b.m.Stats(); s.Segments > 60 {
					t.Fatalf("%+v", s)
				}
			}
		}
		t.Logf("%d compactions, %+v", total, b.m.Stats())
		must(t, b.m.Close(context.Background()))
	})
}

// TestViewRace opens versions while their owner removes them: what could be
// opened can be read for as long as it is open.
func TestViewRace(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		a, r := c.Owner("a"), c.Owner("r")
		rec := a.Create("book", 24)
		b := mustBook(t, a, rec.ID)
		const versions = 60
		for i := range uint64(versions) {
			putMany(t, b, 6, 10*i, 10*i+8)
			_, err := b.backup()
			must(t, err)
		}
		b.walk = 100 * time.Millisecond
		c.SlowCatalog(20 * time.Millisecond)
		defer c.SlowCatalog(0)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var next atomic.Uint64 // is being removed
		opened := 0
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, 1))
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(rng.IntN(30000)) * time.Microsecond):
				}
				v, err := medium.OpenView(context.Background(), r.Options(), rec.ID, medium.VersionSpec{Number: next.Load() + rng.Uint64N(3)})
				if errors.Is(err, atoll.ErrNotExist) {
					continue
				}
				if err != nil {
					t.Errorf("open: %v", err)
					return
				}
				opened++
				time.Sleep(time.Duration(rng.IntN(600)) * time.Millisecond)
				if err := readAll(v, decodeShelf(v.Root())); err != nil {
					t.Errorf("read version %d: %v", v.Version().Number, err)
				}
				_ = v.Close(context.Background())
			}
		})
		left := versions
		for n := uint64(1); left > 0; n = n%versions + 1 {
			if b.versions[n] == nil {
				continue
			}
			time.Sleep(time.Duration(n*7%40) * time.Millisecond)
			next.Store(n)
			gone, err := b.remove(n)
			must(t, err)
			if gone {
				left--
				_, err := b.compact()
				must(t, err)
			}
		}
		close(stop)
		wg.Wait()
		must(t, b.check())
		t.Logf("%d views", opened)
		must(t, b.m.Close(context.Background()))
	})
}
