package volume

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
)

// A volume that fills 60 % of a disk of about as many segments as disks have at
// least is overwritten at random places: everything that is written for a byte,
// with headers, map pages and manifests, stays in bounds, and nothing fails. It is
// counts that are compared; time is the bubble's, in which disks take none.
func TestAmplification(t *testing.T) {
	const (
		segment = atoll.MaxBatchBlocks + 8
		limit   = 192 * segment * atoll.BlockSize
		size    = limit * 6 / 10 / (1 << 20) << 20
		pages   = size / atoll.BlockSize
	)
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, 1)
		defer c.Close()
		c.Limit(limit)
		o := c.Owner("owner")
		rec, err := medium.Create(t.Context(), o.Options(), catalog.Medium{
			Name: "disk", Kind: catalog.KindVolume, Owner: "root", Size: size, Policy: catalog.Policy{Replicas: 1, Segment: segment},
		})
		no(t, err)
		med := o.Open(rec.ID)
		v := mustOpen(t, OnMedium(med), Options{Mode: Writeback, DirtyBytes: 2 << 20})
		defer v.Abort()
		fill := make([]byte, 1<<20)
		for at := int64(0); at < size; at += int64(len(fill)) {
			no(t, v.Write(t.Context(), nil, fill, at, false))
		}
		b := page(1)
		defer b.Release()
		rng := rand.New(rand.NewPCG(1, 1))
		var worst time.Duration
		overwrite := func(n int) {
			for i := range n {
				begun := time.Now()
				no(t, v.Write(t.Context(), b, b.Bytes(), rng.Int64N(pages)*atoll.BlockSize, false))
				worst = max(worst, time.Since(begun))
				if i%32 == 0 {
					time.Sleep(time.Millisecond) // of the cluster's time, which nothing else takes
				}
			}
		}
		overwrite(pages * 3 / 4) // until the disk is full of what may be dead
		before, moved := med.Stats().Written, med.Stats().Moved
		worst = 0
		overwrite(pages)
		no(t, v.Flush(t.Context()))
		user := float64(pages * atoll.BlockSize)
		got := float64(med.Stats().Written-before) / user
		t.Logf("%d segments; %.2f written for one, %.2f of it moved; %.2f in use; slowest write %v; %+v",
			int64(limit)/segment/atoll.BlockSize, got, float64(med.Stats().Moved-moved)/user, c.Used(), worst, med.Room())
		if got > 2.5 {
			t.Errorf("%.2f bytes were written for one", got)
		}
		if c.Used() < 0.8 {
			t.Errorf("only %.2f of the disk is in use: reclaim does not wait until it has to", c.Used())
		}
		no(t, v.Check(t.Context()))
		no(t, v.Close(t.Context()))
		no(t, med.Check(t.Context()))
		no(t, med.Close(t.Context()))
	})
}
