package medium_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
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
)

// codedBook makes a book in small segments that is kept as shards.
func codedBook(t *testing.T, o *mediumtest.Owner, name string, data, parity int) *book {
	t.Helper()
	rec, err := medium.Create(context.Background(), o.Options(), catalog.Medium{
		Name: name, Kind: catalog.KindDB, Owner: "root", Policy: catalog.Policy{Replicas: 3, Segment: 64, Data: data, Parity: parity},
	})
	must(t, err)
	b, err := openBook(o, rec.ID)
	must(t, err)
	return b
}

// encode encodes what the medium thinks is best encoded next.
func (b *book) encode() (int, error) {
	list, _ := b.m.Uncoded()
	var cargo []medium.Cargo
	for _, v := range list {
		_, runs, err := b.pick(v.Ordinal)
		if err != nil {
			return 0, err
		}
		cargo = append(cargo, medium.Cargo{Ordinal: v.Ordinal, Live: runs})
	}
	if len(cargo) == 0 {
		return 0, nil
	}
	return b.m.Encode(context.Background(), cargo)
}

// compactCoded empties the best victim into a coded segment.
func (b *book) compactCoded() (atoll.Ordinal, error) {
	vs := b.m.Victims(3)
	var cargo []medium.Cargo
	for _, v := range vs {
		_, runs, err := b.pick(v.Ordinal)
		if err != nil {
			return 0, err
		}
		cargo = append(cargo, medium.Cargo{Ordinal: v.Ordinal, Live: runs})
	}
	if len(cargo) == 0 {
		return 0, nil
	}
	_, err := b.m.Encode(context.Background(), cargo)
	return vs[0].Ordinal, err
}

// encodeAll writes a checkpoint and encodes until there is nothing to.
func (b *book) encodeAll(t *testing.T) (n int) {
	t.Helper()
	must(t, b.m.Roll(context.Background(), catalog.Hot))
	must(t, b.m.Roll(context.Background(), catalog.Bulk))
	must(t, b.checkpoint())
	for {
		k, err := b.encode()
		must(t, err)
		if n += k; k == 0 {
			return n
		}
	}
}

// TestEncode: sealed segments become shards, whatever nodes as many as there are
// parity shards are lost everything reads right, and a lost node's shards are
// made anew.
func TestEncode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, 6)
		defer c.Close()
		o := c.Owner("a")
		b := codedBook(t, o, "coded", 4, 2)
		for i := range uint64(900) {
			must(t, b.put(i%700, i+1))
		}
		if n := b.encodeAll(t); n < 8 {
			t.Fatalf("%d segments encoded", n)
		}
		time.Sleep(time.Second)
		must(t, b.check())
		for i, first := range c.IDs() {
			for _, second := range c.IDs()[i+1:] {
				c.Kill(first)
				c.Kill(second)
				if err := readAll(b.m, b.cur); err != nil {
					t.Fatalf("without nodes %v and %v: %v", first, second, err)
				}
				c.Restart(first)
				c.Restart(second)
			}
		}
		must(t, b.m.Close(context.Background()))
		b, err := openBook(c.Owner("b"), b.m.Info().ID)
		must(t, err)
		must(t, b.check())
	})
}

// TestEncodeTooFew: without nodes enough for all shards nothing is encoded, and
// nothing lost.
func TestEncodeTooFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, 4)
		defer c.Close()
		b := codedBook(t, c.Owner("a"), "coded", 4, 2)
		for i := range uint64(300) {
			must(t, b.put(i, i+1))
		}
		must(t, b.m.Roll(context.Background(), catalog.Hot))
		must(t, b.checkpoint())
		if n, err := b.encode(); !errors.Is(err, atoll.ErrUnavailable) {
			t.Fatalf("%d encoded: %v", n, err)
		}
		must(t, b.check())
	})
}

// TestEncodePowerCut cuts the power of everything at each sync while segments are
// encoded, and coded ones compacted, in turn: whatever the manifest says then,
// everything is there.
func TestEncodePowerCut(t *testing.T) {
	done, step := false, 3
	if testing.Short() {
		step = 17
	}
	for at := 1; !done && at < 400; at += step {
		inBubble(t, 4, func(t *testing.T, c *mediumtest.Cluster) {
			b := codedBook(t, c.Owner("one"), "book", 2, 1)
			putMany(t, b, 100, 0, 300)
			_, err := b.backup()
			must(t, err)
			if at%2 == 0 { // what is coded already is encoded again
				b.encodeAll(t)
			}
			putMany(t, b, 90, 1000, 1090)
			must(t, b.m.Roll(context.Background(), catalog.Hot))
			must(t, b.checkpoint())
			var mu sync.Mutex
			var disks []*hosttest.Disk
			count := 0
			mode := []hosttest.CrashMode{hosttest.LoseUnsynced, hosttest.KeepAll, hosttest.Random}[at/3%3]
			for _, id := range c.IDs() {
				c.Disk(id).OnSync(func(hosttest.SyncPoint) {
					mu.Lock()
					defer mu.Unlock()
					if count++; count == at {
						disks = c.Blackout(rand.New(rand.NewPCG(uint64(at), 1)), mode)
					}
				})
			}
			if _, err = b.encode(); err == nil {
				_, err = b.compactCoded()
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
			id, cur, version := b.m.Info().ID, b.cur.values(), b.versions[1].values()
			c.StartAll(disks)
			b = mustBook(t, c.Owner("two"), id)
			if !maps.Equal(b.cur.values(), cur) || !maps.Equal(b.versions[1].values(), version) {
				t.Fatalf("sync %d: %v, version %v", at, b.cur.values(), b.versions)
			}
			must(t, b.check())
			b.encodeAll(t)
			time.Sleep(3 * time.Second)
			must(t, b.check())
			if list := b.strays(t); len(list) > 0 {
				t.Fatalf("sync %d: left on nodes: %v", at, list)
			}
			must(t, b.m.Close(context.Background()))
		})
	}
	if !done {
		t.Error("the encoding never ended")
	}
}

// strays lists what nodes hold beyond what the medium counts.
func (b *book) strays(t *testing.T) (list []string) {
	t.Helper()
	must(t, b.checkpoint()) // takes over what was dropped
	time.Sleep(3 * time.Second)
	copies, err := b.o.Nodes.List(context.Background(), b.m.Info().ID)
	must(t, err)
	raw := int64(0)
	for _, c := range copies {
		if c.Sealed {
			raw += c.Length.Bytes()
		}
	}
	if s := b.m.Stats(); raw != s.Raw {
		list = append(list, fmt.Sprintf("%d bytes, %+v, %v", raw, s, copies))
	}
	return list
}

// TestEncodeFailure: an encoding that a node spoils leaves everything as it was,
// and the next one, on other nodes, succeeds.
func TestEncodeFailure(t *testing.T) {
	inBubble(t, 5, func(t *testing.T, c *mediumtest.Cluster) {
		b := codedBook(t, c.Owner("one"), "book", 2, 1)
		failed := 0
		for round := range uint64(6) {
			putMany(t, b, 100, 1000*round, 1000*round+120)
			must(t, b.m.Roll(context.Background(), catalog.Hot))
			must(t, b.checkpoint())
			id := c.IDs()[round%5]
			c.Disk(id).Inject(host.Rule{Ops: host.OpWrite | host.OpSync, Path: "segments/*", Err: atoll.ErrIO, Nth: 1 + int(round)})
			_, err := b.encode()
			c.Disk(id).Heal()
			if err != nil {
				failed++
			}
			c.Kill(id) // an error of the disk is for good until it starts again
			c.Restart(id)
			time.Sleep(2 * time.Minute) // no more suspicion
			must(t, b.check())
			b.encodeAll(t)
			must(t, b.check())
		}
		if t.Logf("%d failed", failed); failed == 0 {
			t.Error("nothing failed")
		}
		must(t, b.m.Close(context.Background()))
	})
}

// TestMendCoded: damaged blocks of shards, of payload and of headers, are repaired
// in place from the others, and lost shards made anew.
func TestMendCoded(t *testing.T) {
	inBubble(t, 6, func(t *testing.T, c *mediumtest.Cluster) {
		ctx := context.Background()
		b := codedBook(t, c.Owner("one"), "book", 4, 2)
		putMany(t, b, 700, 0, 900)
		b.encodeAll(t)
		time.Sleep(time.Second)
		for round, blocks := range [][]int64{{3, 8}, {0, 9}, {0}} {
			damage(t, c, c.IDs()[round], blocks...)
			damage(t, c, c.IDs()[(round+3)%6], 5)
			if round == 1 {
				must(t, readAll(b.m, b.cur)) // finds some of it, and has it repaired
				time.Sleep(time.Second)
			}
			sum, bad := b.m.Mend(ctx)
			if len(bad) > 0 || sum.Damaged == 0 || sum.Repaired != sum.Damaged {
				t.Fatalf("round %d: %+v %v", round, sum, bad)
			}
			if again, bad := b.m.Mend(ctx); len(bad) > 0 || again.Damaged != 0 {
				t.Fatalf("round %d, again: %+v %v", round, again, bad)
			}
			must(t, b.check())
		}
		before := b.m.Stats().Coded
		for _, id := range c.IDs()[1:3] { // two shards of each segment are gone
			list, err := c.Node(id).List(ctx, atoll.SegmentID{}, 1000)
			must(t, err)
			c.Kill(id)
			for _, s := range list {
				if _, coded, err := b.o.Nodes.ShapeOf(ctx, s.Seg); err == nil && coded {
					must(t, c.Disk(id).Remove("segments/"+s.Seg.String()+".seg"))
				}
			}
			c.Restart(id)
		}
		must(t, readAll(b.m, b.cur))
		for range 3 {
			if _, bad := b.m.Mend(ctx); len(bad) == 0 {
				break
			}
			time.Sleep(5 * time.Second)
		}
		if sum, bad := b.m.Mend(ctx); len(bad) > 0 || sum.Damaged > 0 || b.m.Stats().Coded != before {
			t.Fatalf("after a loss: %+v %v", sum, bad)
		}
		must(t, b.check())
		must(t, b.m.Close(ctx))
	})
}

// TestCodedReaders: views and clones read through to coded segments of another
// owner, also while that encodes again what they read, and two nodes are away.
func TestCodedReaders(t *testing.T) {
	inBubble(t, 6, func(t *testing.T, c *mediumtest.Cluster) {
		ctx := context.Background()
		o, other := c.Owner("one"), c.Owner("two")
		b := codedBook(t, o, "book", 4, 2)
		putMany(t, b, 200, 0, 400)
		n, err := b.backup()
		must(t, err)
		shelf := maps.Clone(b.versions[n])
		rec, err := medium.Clone(ctx, o.Options(), b.m, n, catalog.Medium{Name: "clone", Owner: "root"})
		must(t, err)
		if rec.Policy.Code() != b.m.Info().Policy.Code() {
			t.Errorf("the clone's policy is %+v", rec.Policy)
		}
		v, err := medium.OpenView(ctx, other.Options(), b.m.Info().ID, medium.VersionSpec{Number: n})
		must(t, err)
		k := mustBook(t, other, rec.ID)
		for round := range uint64(3) {
			putMany(t, b, 150, 1000*(round+1), 1000*(round+1)+100)
			b.encodeAll(t)
			_, err := b.compactCoded()
			must(t, err)
			time.Sleep(time.Second)
			c.Kill(c.IDs()[round])
			c.Kill(c.IDs()[round+2])
			must(t, readAll(v, shelf))
			must(t, readAll(k.m, k.cur))
			c.Restart(c.IDs()[round])
			c.Restart(c.IDs()[round+2])
			time.Sleep(2 * time.Minute)
		}
		putMany(t, k, 50, 0, 100)
		k.encodeAll(t)
		must(t, k.check())
		must(t, b.check())
		must(t, v.Close(ctx))
		must(t, errors.Join(k.m.Close(ctx), b.m.Close(ctx)))
	})
}
