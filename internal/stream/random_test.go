package stream

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
)

var (
	seeds = flag.Int("seeds", 25, "random histories to run")
	first = flag.Uint64("seed", 1, "the first of them")
)

// acked is an acknowledged entry.
type acked struct {
	key    uint64
	seq    uint64
	seg    atoll.SegmentID
	block  atoll.BlockNo
	blocks int
}

// TestRandom runs writers against nodes that delay, fail, stop and come back,
// ends them cleanly or by a crash, recovers, and checks that every acknowledged
// entry is on every verified copy, below the sealed length, and that the log
// has the records in order.
func TestRandom(t *testing.T) {
	if atoll.Invariants {
		*seeds = min(*seeds, 8)
	}
	for seed := *first; seed < *first+uint64(*seeds); seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomHistory(t, seed) })
		})
	}
}

func randomHistory(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	c := newFakeCluster(t, 5)
	c.view.log = slog.New(slog.DiscardHandler)
	for id, n := range c.nodes {
		r := rand.New(rand.NewPCG(seed, uint64(id)+10))
		n.delay = func(string) time.Duration {
			if r.IntN(200) == 0 {
				return time.Duration(r.IntN(400)) * time.Millisecond
			}
			return time.Duration(r.IntN(2000)) * time.Microsecond
		}
	}
	lag := rand.New(rand.NewPCG(seed, 2))
	c.lag = func() time.Duration { return time.Duration(lag.IntN(3000)) * time.Microsecond }
	w := c.writer(func(o *WriterOptions) { o.Timeout = 3 * time.Second })

	ctx, cancel := context.WithCancel(context.Background())
	var harm sync.WaitGroup
	harm.Go(func() { c.harm(ctx, rand.New(rand.NewPCG(seed, 3))) })
	var mu sync.Mutex
	var done []acked
	var wg sync.WaitGroup
	callers, each := 6, 60
	if seed%2 == 0 { // mostly one at a time, which then carry out their appends
		c.direct()
		callers, each = 1+int(seed/2%2), 100
	}
	for k := range callers {
		r := rand.New(rand.NewPCG(seed, uint64(k)+100))
		wg.Go(func() {
			var e Entry
			for i := range each {
				key := uint64(k)<<32 | uint64(i) | 1<<48
				payload(&e, key, 1+r.IntN(8))
				if err := w.Append(context.Background(), &e); err != nil {
					if errors.Is(err, atoll.ErrFenced) || errors.Is(err, atoll.ErrTimeout) {
						t.Errorf("append: %v", err)
					}
					continue
				}
				mu.Lock()
				done = append(done, acked{key, e.Seq(), e.Seg(), e.Block(0), e.Blocks()})
				mu.Unlock()
				if r.IntN(4) == 0 {
					time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond)
				}
			}
		})
	}
	crash := rng.IntN(2) == 0
	if crash {
		time.Sleep(time.Duration(rng.IntN(800)) * time.Millisecond)
		dead, kill := context.WithCancel(context.Background())
		kill()
		_ = w.Close(dead) // the error is the point
	}
	wg.Wait()
	cancel()
	harm.Wait()
	if !crash {
		if err := w.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
		if open := c.open(); len(open) > 0 {
			t.Fatalf("open after close: %v", open)
		}
	}
	sealed, err := Recover(context.Background(), c.view, c.open(), 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sealed {
		if s.Length > 0 {
			c.sealed = append(c.sealed, s)
		}
	}
	if len(done) == 0 && !crash {
		t.Fatal("nothing was acknowledged")
	}
	c.check(t, done)
	c.checkOrder(t)
	c.completeAll(t, done)
}

// harm makes at most two nodes at a time fail, stop or fill up.
func (c *fakeCluster) harm(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		var hurt []*fakeNode
		for range 1 + r.IntN(2) {
			n := c.nodes[atoll.NodeID(1+r.IntN(len(c.nodes)))]
			hurt = append(hurt, n)
			switch r.IntN(4) {
			case 0:
				n.pause()
			case 1:
				n.fail(atoll.ErrUnreachable)
			case 2:
				n.fail(atoll.ErrNoSpace)
			case 3:
				n.fail(atoll.ErrIO)
			}
		}
		sleep(ctx, time.Duration(r.IntN(600))*time.Millisecond)
		for _, n := range hurt {
			n.fail(nil)
			n.resume()
		}
		sleep(ctx, time.Duration(r.IntN(400))*time.Millisecond)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// check looks for every acknowledged entry on every verified copy.
func (c *fakeCluster) check(t *testing.T, done []acked) {
	t.Helper()
	segs := make(map[atoll.SegmentID]catalog.Sealed)
	for _, s := range c.log() {
		segs[s.Seg] = s
	}
	for _, a := range done {
		s, ok := segs[a.seg]
		if !ok || a.block+atoll.BlockNo(a.blocks) > s.Length {
			t.Fatalf("acknowledged entry %x is lost: segment %v, block %d, sealed at %d (%v)", a.key, a.seg, a.block, s.Length, ok)
		}
		want := make([]byte, a.blocks*atoll.BlockSize)
		fill(want, a.key)
		members, _ := c.view.Members(a.seg)
		for _, id := range members {
			if slices.Contains(s.Unverified, id) {
				continue
			}
			p := c.nodes[id].data(a.seg)
			if int64(len(p)) < s.Length.Bytes() {
				t.Fatalf("copy of %v on node %d is listed as whole with %d of %d blocks", a.seg, id, len(p)/atoll.BlockSize, s.Length)
			}
			if !bytes.Equal(p[a.block.Bytes():][:len(want)], want) {
				t.Fatalf("acknowledged entry %x is damaged on node %d", a.key, id)
			}
		}
	}
}

// checkOrder reads the log and checks the sequence numbers: they rise, but for
// records that a crash left twice, which are equal (W4).
func (c *fakeCluster) checkOrder(t *testing.T) {
	t.Helper()
	keys := make(map[uint64]uint64)
	for _, s := range c.log() {
		last := uint64(0)
		err := c.view.Headers(context.Background(), s.Seg, 0, s.Length, func(h segment.Header) error {
			for i := range h.Records() {
				seq, key := h.Seq()+uint64(i), h.Record(i).Key
				if old, ok := keys[seq]; ok && old != key {
					return fmt.Errorf("number %d was given to %x and %x", seq, old, key)
				}
				if seq <= last {
					return fmt.Errorf("number %d after %d", seq, last)
				}
				keys[seq], last = key, seq
			}
			return nil
		})
		if err != nil {
			t.Fatalf("segment %v: %v", s.Seg, err)
		}
	}
}

// completeAll completes the unverified copies and checks again.
func (c *fakeCluster) completeAll(t *testing.T, done []acked) {
	t.Helper()
	for i, s := range c.sealed {
		still, err := c.view.Complete(context.Background(), s, 2)
		if err != nil || len(still) > 0 {
			t.Fatalf("complete %v: %v left: %v", s, still, err)
		}
		c.sealed[i].Unverified = nil
	}
	c.check(t, done)
}
