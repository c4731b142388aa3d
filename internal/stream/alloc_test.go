package stream

import (
	"context"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// instantNode has everything on stable storage at once.
type instantNode struct{ *fakeNode }

func (n instantNode) Append(a *wire.Append) { a.Done <- a }

func (n instantNode) Create(context.Context, atoll.SegmentID, atoll.Epoch, atoll.BlockNo) error {
	return nil
}

func (n instantNode) Seal(context.Context, atoll.SegmentID, atoll.Epoch, atoll.BlockNo) error {
	return nil
}

func (n instantNode) Read(context.Context, atoll.SegmentID, atoll.BlockNo, []byte) error { return nil }

// readyNode is one whose appends the sender carries out.
type readyNode struct{ instantNode }

func (readyNode) Direct([]wire.Node, []wire.Append) wire.Round { return readyRound{} }

type readyRound struct{}

func (readyRound) Run() {}

func instantWriter(t testing.TB) (*fakeCluster, *Writer) {
	c := newFakeCluster(t, 3)
	for id, n := range c.nodes {
		c.view.AddLocal(id, instantNode{n})
	}
	return c, c.writer(func(o *WriterOptions) {
		o.Policy = catalog.Policy{Replicas: 3}
		o.Metrics = NewMetrics(prometheus.NewRegistry())
	})
}

// TestNoAllocs: appends and local reads allocate nothing in steady state.
func TestNoAllocs(t *testing.T) {
	if atoll.Invariants {
		t.Skip("race builds allocate")
	}
	c, w := instantWriter(t)
	ctx := context.Background()
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	fill(buf.Bytes(), 1)
	var e Entry
	run := func() {
		e.Reset()
		e.Add(segment.Record{Kind: 20, Blocks: 1}, buf, buf.Bytes())
		if err := w.Append(ctx, &e); err != nil {
			t.Fatal(err)
		}
	}
	run()
	if n := hosttest.Allocs(3000, run); n >= 1 {
		t.Errorf("an append allocates %v times", n)
	}
	for id, n := range c.nodes {
		c.view.AddLocal(id, readyNode{instantNode{n}})
	}
	if err := w.Roll(ctx); err != nil { // the next segment has the new nodes
		t.Fatal(err)
	}
	run()
	if n := hosttest.Allocs(3000, run); n >= 1 {
		t.Errorf("an append that its sender carries out allocates %v times", n)
	}
	read := func() {
		if err := c.view.Read(ctx, e.Seg(), 1, buf.Bytes()); err != nil {
			t.Fatal(err)
		}
	}
	if n := hosttest.Allocs(1000, read); n >= 1 {
		t.Errorf("a local read allocates %v times", n)
	}
	if err := w.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkAppend measures the writer alone: 1 and 32 callers, nodes that cost
// nothing.
func BenchmarkAppend(b *testing.B) {
	for name, callers := range map[string]int{"callers=1": 1, "callers=32": 32} {
		b.Run(name, func(b *testing.B) {
			_, w := instantWriter(b)
			b.ReportAllocs()
			b.SetBytes(atoll.BlockSize)
			var wg sync.WaitGroup
			for k := range callers {
				n := b.N / callers
				if k == 0 {
					n += b.N % callers
				}
				wg.Go(func() {
					buf := host.Alloc(atoll.BlockSize)
					defer buf.Release()
					var e Entry
					for range n {
						e.Reset()
						e.Add(segment.Record{Kind: 20, Blocks: 1}, buf, buf.Bytes())
						if err := w.Append(context.Background(), &e); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := w.Close(context.Background()); err != nil {
				b.Error(err)
			}
		})
	}
}
