package node

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// BenchmarkAppend measures durable appends of one 4 KiB block by 32 writers,
// each with a segment of its own or all sharing one per node, on one, three and
// five nodes of one disk. It reports the 99th percentile beside the rate: with
// GOMAXPROCS at the number of cores and no yield in the commit loop, p99 grows
// to many milliseconds (the trap of design §2).
func BenchmarkAppend(b *testing.B) {
	for _, procs := range []int{2, 4} {
		for _, nodes := range []int{1, 3, 5} {
			b.Run(fmt.Sprintf("procs=%d/nodes=%d", procs, nodes), func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
				benchAppend(b, nodes, 32)
			})
		}
	}
}

// benchDir is a place on a real disk: /tmp is memory on many machines.
func benchDir(b *testing.B) host.FS {
	dir, err := os.MkdirTemp(os.Getenv("ATOLL_BENCH_DIR"), "node-bench-")
	if err != nil {
		b.Fatal(err)
	}
	fs, err := host.OpenDir(dir)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { fs.Close(); os.RemoveAll(dir) })
	if err := Format(fs, Identity{Cluster: testCluster, Node: 1}); err != nil {
		b.Fatal(err)
	}
	return fs
}

// benchNode opens a node and waits for its slots.
func benchNode(b *testing.B) *Node {
	n := openNode(b, benchDir(b), func(o *Options) { o.NoPrewrite, o.Spare, o.SharedFlush = false, 2, true })
	for n.slots.ready() < 2 {
		time.Sleep(5 * time.Millisecond)
	}
	return n
}

// stripe is one open segment on one node, appended to by several clients that
// take turns in building its batches.
type stripe struct {
	n  *Node
	mu sync.Mutex
	w  *writer
}

// send builds and sends the next batch of one block.
func (s *stripe) send(a *wire.Append, head, data []byte, crc uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.w
	recs := [1]segment.Record{{Kind: 16, Blocks: 1}}
	crcs := [1]uint32{crc}
	hd := segment.Head{Segment: w.seg, Offset: w.at, Prev: w.prev, Epoch: 1, Seq: w.seq, Clock: time.Unix(0, 0)}
	a.Seg, a.Epoch, a.Offset = w.seg, 1, w.at
	w.prev = segment.EncodeHeader(head, &hd, recs[:], crcs[:])
	w.at, w.seq = w.at+2, w.seq+1
	s.n.Append(a)
}

func benchAppend(b *testing.B, nodes, clients int) {
	var list []*stripe
	var ord int
	open := func(n *Node) *stripe {
		ord++
		must(b, n.Create(bg(), testSeg(ord), 1, atoll.SegmentBlocks))
		return &stripe{n: n, w: newWriter(testSeg(ord), 1)}
	}
	for range nodes {
		list = append(list, open(benchNode(b)))
	}
	// As many appends as one prewritten segment takes.
	per := min(b.N/clients+1, (atoll.SegmentBlocks-64)/2/((clients+nodes-1)/nodes))
	all := make([][]time.Duration, clients)
	var wg sync.WaitGroup
	b.ReportAllocs()
	b.ResetTimer()
	start := time.Now()
	for c := range clients {
		wg.Go(func() { all[c] = benchClient(b, list[c%nodes], per) })
	}
	wg.Wait()
	took := time.Since(start)
	lat := slices.Concat(all...)
	slices.Sort(lat)
	b.ReportMetric(float64(len(lat))/took.Seconds(), "appends/s")
	b.ReportMetric(float64(lat[len(lat)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(lat[len(lat)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(0, "ns/op")
}

// benchClient sends per appends, one after another.
func benchClient(b *testing.B, s *stripe, per int) []time.Duration {
	buf := host.Alloc(2 * atoll.BlockSize)
	defer buf.Release()
	head, data := buf.Bytes()[:atoll.BlockSize], buf.Bytes()[atoll.BlockSize:]
	copy(data, block(s.w.seg, 1))
	crc := segment.CRC(data)
	vec := host.NewVec()
	vec.Add(buf, buf.Bytes())
	defer vec.Release()
	done := make(chan *wire.Append, 1)
	a := &wire.Append{Vec: vec, Done: done}
	lat := make([]time.Duration, 0, per)
	for range per {
		t := time.Now()
		s.send(a, head, data, crc)
		if a = <-done; a.Err != nil {
			b.Error(a.Err)
			return lat
		}
		lat = append(lat, time.Since(t))
	}
	return lat
}
