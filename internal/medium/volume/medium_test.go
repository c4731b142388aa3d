package volume

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
)

// createMedium makes a volume's medium with small segments.
func createMedium(t *testing.T, o *mediumtest.Owner, size int64) catalog.Medium {
	t.Helper()
	rec, err := medium.Create(t.Context(), o.Options(), catalog.Medium{
		Name: "disk", Kind: catalog.KindVolume, Owner: "root", Size: size,
		Policy: catalog.Policy{Replicas: 3, Segment: 600},
	})
	no(t, err)
	return rec
}

// The model over a real medium: owners die, others take over, nodes are killed
// and come back.
func TestVolumeOnMedium(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		seeds(t, 3, func(t *testing.T, seed uint64) {
			synctest.Test(t, func(t *testing.T) { runOnMedium(t, mode, seed) })
		})
	}
}

func runOnMedium(t *testing.T, mode Mode, seed uint64) {
	c := mediumtest.NewCluster(t, 4)
	defer c.Close()
	const size = 4 << 20
	owner := c.Owner("owner-0")
	rec := createMedium(t, owner, size)
	med := owner.Open(rec.ID)
	m := &volModel{t: t, rng: rand.New(rand.NewPCG(seed, 4)), data: make([]byte, size), may: map[int][][]byte{}, opts: Options{
		Mode: mode, CacheBytes: int64(seed%2) << 20, MapBytes: 1, DirtyBytes: 512 << 10, FlushDelay: time.Millisecond, CheckpointBytes: 2 << 20,
	}}
	owners := 0
	m.next = func(crash bool) Store {
		if !crash {
			no(t, med.Close(context.Background()))
			med = owner.Open(rec.ID)
			return OnMedium(med)
		}
		owner.Die()
		owners++
		old, v := owner, m.v
		old.Defer(v.Abort)
		owner = c.Owner(fmt.Sprintf("owner-%d", owners))
		var err error
		for range 20 {
			if med, err = owner.TryOpen(rec.ID); err == nil {
				return OnMedium(med)
			}
			time.Sleep(time.Second)
		}
		t.Fatalf("take over: %v", err)
		return nil
	}
	m.v = mustOpen(t, OnMedium(med), m.opts)
	defer func() { m.v.Abort() }()
	down := atoll.NodeID(0)
	for i := range 150 {
		m.step()
		if i%40 == 39 {
			if down == 0 {
				down = c.IDs()[m.rng.IntN(4)]
				c.Kill(down)
			} else {
				c.Restart(down)
				down = 0
				time.Sleep(2 * time.Second)
			}
		}
	}
	m.compare(0, int64(len(m.data)))
	no(t, m.v.Verify(t.Context()))
	checkLive(t, m.v, med)
	m.crash()
	no(t, m.v.Verify(t.Context()))
	checkLive(t, m.v, med)
	no(t, m.v.Close(t.Context()))
	if down != 0 {
		c.Restart(down)
		time.Sleep(2 * time.Second)
	}
	no(t, med.Check(t.Context()))
	no(t, med.Close(t.Context()))
}

// checkLive compares what the map references with what the medium counts. A
// checkpoint was just written and nothing changed since.
func checkLive(t *testing.T, v *Volume, med *medium.Medium) {
	t.Helper()
	c := checker{v: v, seen: make(map[atoll.Ordinal]*segmentUse)}
	no(t, c.walk(t.Context()))
	sum := int64(0)
	for _, use := range c.seen {
		sum += int64(use.blocks) * atoll.BlockSize
	}
	if live := med.Stats().Live; live != sum {
		t.Errorf("the map references %d bytes, the medium counts %d", sum, live)
	}
}
