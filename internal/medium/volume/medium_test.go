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
	c := newChecker(v)
	no(t, c.run(t.Context()))
	sum := int64(0)
	for _, use := range c.seen {
		sum += int64(use.blocks) * atoll.BlockSize
	}
	if live := med.Stats().Live; live != sum {
		t.Errorf("the map references %d bytes, the medium counts %d", sum, live)
	}
}

// medBacking is a medium of a cluster.
type medBacking struct {
	t     *testing.T
	c     *mediumtest.Cluster
	owner *mediumtest.Owner
	med   *medium.Medium
	count *int // owners so far
}

func newMedBacking(t *testing.T, c *mediumtest.Cluster, size int64) *medBacking {
	b := &medBacking{t: t, c: c, count: new(int)}
	b.next()
	rec, err := medium.Create(t.Context(), b.owner.Options(), catalog.Medium{
		Name: "disk", Kind: catalog.KindVolume, Owner: "root", Size: size, Policy: catalog.Policy{Replicas: 3, Segment: 100},
	})
	no(t, err)
	b.med = b.owner.Open(rec.ID)
	return b
}

func (b *medBacking) next() {
	*b.count++
	b.owner = b.c.Owner(fmt.Sprintf("owner-%d", *b.count))
}

func (b *medBacking) store() Store { return OnMedium(b.med) }

func (b *medBacking) reopen(crash bool, end func()) backing {
	n, id := *b, b.med.Info().ID
	if !crash {
		no(b.t, b.med.Close(context.Background()))
		n.med = b.owner.Open(id)
		return &n
	}
	b.owner.Die()
	b.owner.Defer(end)
	n.next()
	var err error
	for range 20 {
		if n.med, err = n.owner.TryOpen(id); err == nil {
			return &n
		}
		time.Sleep(time.Second)
	}
	b.t.Fatalf("take over: %v", err)
	return nil
}

func (b *medBacking) clone(number uint64, n int) backing {
	c := *b
	rec, err := medium.Clone(b.t.Context(), b.owner.Options(), b.med, number, catalog.Medium{Name: fmt.Sprintf("clone%d", n), Owner: "root"})
	no(b.t, err)
	c.next()
	c.med = c.owner.Open(rec.ID)
	return &c
}

func (b *medBacking) view(number uint64) (ViewStore, func()) {
	view, err := medium.OpenView(b.t.Context(), b.owner.Options(), b.med.Info().ID, medium.VersionSpec{Number: number})
	no(b.t, err)
	return view, func() { no(b.t, view.Close(context.Background())) }
}

func (b *medBacking) victims() (list []atoll.Ordinal) {
	for _, v := range b.med.Victims(3) {
		list = append(list, v.Ordinal)
	}
	return list
}

func (b *medBacking) inject(*rand.Rand) {}
func (b *medBacking) heal()             {}

func (b *medBacking) unpin() bool {
	pins, err := b.med.Pins(b.t.Context())
	no(b.t, err)
	return len(pins) == 0
}

// The model of versions over real media.
func TestHistoriesOnMedium(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		t.Run(mode.String(), func(t *testing.T) {
			seeds(t, 3, func(t *testing.T, seed uint64) {
				synctest.Test(t, func(t *testing.T) {
					c := mediumtest.NewCluster(t, 3)
					defer c.Close()
					m := newHistModel(t, seed, mode, false, newMedBacking(t, c, histSize))
					for range 400 {
						m.step()
					}
					m.end()
					for _, d := range m.disks {
						b := d.b.(*medBacking)
						no(t, b.med.Check(t.Context()))
						t.Logf("%d bytes moved", b.med.Stats().Moved)
					}
				})
			})
		})
	}
}

// Endless overwrites of a volume that fills more than half of small disks, with
// versions coming and going: nothing fails, and what is copied stays in bounds.
func TestSteadyState(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { steadyState(t, mode) })
		})
	}
}

func steadyState(t *testing.T, mode Mode) {
	const limit, size = 160 << 20, 52 << 20 // a node is full when a large segment has no room: at 88 MiB
	c := mediumtest.NewCluster(t, 3)
	defer c.Close()
	c.Limit(limit)
	o := c.Owner("owner")
	rec, err := medium.Create(t.Context(), o.Options(), catalog.Medium{
		Name: "disk", Kind: catalog.KindVolume, Owner: "root", Size: size, Policy: catalog.Policy{Replicas: 3, Segment: 600},
	})
	no(t, err)
	med := o.Open(rec.ID)
	v := mustOpen(t, OnMedium(med), Options{Mode: mode, CheckpointBytes: 8 << 20, DirtyBytes: 1 << 20})
	defer v.Abort()
	want := make([]uint64, size/atoll.BlockSize)
	rng := rand.New(rand.NewPCG(1, 1))
	fill := make([]byte, 1<<20)
	for p := 0; p < len(want); p += 256 {
		for i := range 256 {
			want[p+i] = uint64(p + i)
			stamp(fill[i*atoll.BlockSize:][:atoll.BlockSize], uint64(p+i))
		}
		no(t, v.Write(t.Context(), nil, fill, int64(p)*atoll.BlockSize, false))
	}
	no(t, v.Flush(t.Context()))
	begun, first := time.Now(), med.Stats().Moved
	n := rounds(16_000)
	for i := range n {
		p := rng.IntN(len(want))
		want[p] = uint64(i) << 20
		put(t, v, pageNo(p), want[p])
		time.Sleep(50 * time.Microsecond) // of the cluster's time, which nothing else takes
		if t.Failed() {
			t.Fatalf("at write %d: pressure %.2f, %+v", i, med.Pressure(), med.Stats())
		}
		if i%3000 == 1500 {
			got, err := v.Backup(t.Context(), BackupOptions{})
			no(t, err)
			no(t, v.DeleteVersion(t.Context(), got.Number))
		}
	}
	moved := med.Stats().Moved - first
	t.Logf("%.0f writes/s of the cluster's time, amplification %.2f, pressure %.2f, reclaimable %d MiB",
		float64(n)/time.Since(begun).Seconds(), 1+float64(moved)/float64(n*atoll.BlockSize), med.Pressure(), med.Stats().Reclaimable>>20)
	// A page written alone takes two blocks of the log, and on a disk of two
	// usual segments little is left to choose from.
	if moved > int64(n)*atoll.BlockSize*3 {
		t.Errorf("%d MiB were copied for %d MiB written", moved>>20, n*atoll.BlockSize>>20)
	}
	for p := range want {
		if got := pageOf(t, v, pageNo(p)); got != want[p] {
			t.Fatalf("page %d has %d, want %d", p, got, want[p])
		}
	}
	no(t, v.Check(t.Context()))
	no(t, v.Close(t.Context()))
	no(t, med.Check(t.Context()))
	no(t, med.Close(t.Context()))
}
