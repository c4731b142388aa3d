package medium_test

import (
	"context"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// BenchmarkMove compacts segments of 64 MiB of which every other block lives, the
// worst case for scattered copies, on disks in memory. Bytes are those copied.
func BenchmarkMove(b *testing.B) {
	ctx := context.Background()
	c := mediumtest.NewCluster(b, 3)
	o := c.Owner("one")
	rec := o.Create("bench", atoll.SegmentBlocks)
	m := o.Open(rec.ID)
	buf := host.Alloc(60 * atoll.BlockSize)
	defer buf.Release()
	for range b.N {
		b.StopTimer()
		live := fillSegment(b, m, buf)
		mark := m.Mark()
		for _, r := range live {
			m.Live(r.Ordinal, 1)
		}
		if err := m.Checkpoint(ctx, mark, []byte("root")); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := m.Move(ctx, live[0].Ordinal, live); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(live)) * atoll.BlockSize)
		b.StopTimer()
		for _, r := range live { // so that memory stays bounded
			m.Live(r.Ordinal, -1)
		}
		b.StartTimer()
	}
}

// fillSegment fills a segment of the hot lane with records of one block and
// returns every other one.
func fillSegment(b *testing.B, m *medium.Medium, buf *host.Buffer) (live []medium.Run) {
	ctx := context.Background()
	if err := m.Roll(ctx, catalog.Hot); err != nil {
		b.Fatal(err)
	}
	var e stream.Entry
	for first := atoll.Ordinal(0); ; {
		e.Reset()
		for i := range 60 {
			e.Add(segment.Record{Kind: kindPut, Blocks: 1, Key: uint64(i)}, buf, buf.Bytes()[i*atoll.BlockSize:][:atoll.BlockSize])
		}
		if err := m.Append(ctx, catalog.Hot, &e); err != nil {
			b.Fatal(err)
		}
		if first == 0 {
			first = e.Seg().Ordinal
		}
		if e.Seg().Ordinal != first {
			return live
		}
		for i := 0; i < 60; i += 2 {
			live = append(live, medium.Run{Kind: kindPut, Key: uint64(i), Ordinal: first, Block: e.Block(i), Blocks: 1})
		}
	}
}
