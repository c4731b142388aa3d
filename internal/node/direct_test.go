package node

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// directNodes opens three nodes with a segment each that share a Committer, and
// a file system that counts what is not flushed.
func directNodes(t *testing.T) (fs *flushFS, nodes []wire.Node, writers []*writer) {
	dir, err := host.OpenDir(t.TempDir())
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	if !dir.Direct() {
		t.Skip("no direct I/O here, so flushes are not shared")
	}
	fs = &flushFS{}
	var c Committer
	for i := range 3 {
		name := fmt.Sprint(i)
		must(t, dir.Mkdir(name))
		sub, err := host.OpenDir(dir.Path() + "/" + name)
		must(t, err)
		t.Cleanup(func() { sub.Close() })
		must(t, Format(sub, Identity{Cluster: testCluster, Node: 1}))
		n := openNode(t, countedFS{sub, fs}, func(o *Options) { o.SharedFlush, o.Committer = true, &c })
		must(t, n.Create(bg(), testSeg(1), 1, atoll.SegmentBlocks))
		n.mu.Lock()
		n.mu.segs[testSeg(1)].filled = atoll.SegmentBlocks // as if it were prewritten
		n.mu.Unlock()
		nodes, writers = append(nodes, n), append(writers, newWriter(testSeg(1), 1))
	}
	return fs, nodes, writers
}

// countedFS is one of several directories that count into one flushFS.
type countedFS struct {
	host.FS
	all *flushFS
}

func (f countedFS) Open(name string) (host.File, error) {
	file, err := f.FS.Open(name)
	return &flushFile{file, f.all}, err
}

func (f countedFS) Create(name string) (host.File, error) {
	file, err := f.FS.Create(name)
	return &flushFile{file, f.all}, err
}

// sendDirect carries out a batch of a block on each node and reports whether it
// was taken.
func sendDirect(nodes []wire.Node, writers []*writer) (list []wire.Append, taken bool) {
	for i := range nodes {
		w := *writers[i]
		list = append(list, *w.batch(1))
		defer list[i].Vec.Release()
	}
	round := nodes[0].(wire.Direct).Direct(nodes, list)
	if round == nil {
		return nil, false
	}
	round.Run()
	for i := range nodes {
		if list[i].Err == nil {
			writers[i].batch(1).Vec.Release() // moves on
		}
	}
	return list, true
}

// A sender carries out its appends itself: they are flushed when Run returns
// (S1) and there after a crash, errors stay with the node they are of, and what
// was queued before or meanwhile is not lost.
func TestDirect(t *testing.T) {
	fs, nodes, writers := directNodes(t)
	for range 20 {
		list, taken := sendDirect(nodes, writers)
		if !taken {
			t.Fatal("idle nodes did not take it")
		}
		for i := range list {
			must(t, list[i].Err)
		}
		if p := fs.pending.Load(); p != 0 {
			t.Fatalf("done while %d writes were not flushed", p)
		}
	}
	if fs.loose.Load() < 60 {
		t.Errorf("the flush was not shared: %d writes without their own", fs.loose.Load())
	}
	writers[1].at += 2 // as if it had lost one
	list, _ := sendDirect(nodes, writers)
	if list[0].Err != nil || !errors.Is(list[1].Err, atoll.ErrGap) || list[2].Err != nil {
		t.Fatalf("a gap on one: %v, %v, %v", list[0].Err, list[1].Err, list[2].Err)
	}
	list[0].Seg.Ordinal = 9
	if round := nodes[0].(wire.Direct).Direct(nodes[:1], list[:1]); round == nil {
		t.Fatal("idle node did not take it")
	} else if round.Run(); !errors.Is(list[0].Err, atoll.ErrNotExist) {
		t.Fatalf("append to no segment: %v", list[0].Err)
	}
	must(t, writers[0].append(nodes[0].(*Node), 1)) // the usual way
	for i, w := range writers {
		n := nodes[i].(*Node)
		n.Abort()
		n = openNode(t, n.fs, func(o *Options) { o.SharedFlush = true })
		checkBlocks(t, n, testSeg(1), min(w.at, 40))
	}
}

// Nodes do not take appends while they are paused, stopped, busy, or another
// committer's, and leave them as they are.
func TestDirectRefused(t *testing.T) {
	_, nodes, writers := directNodes(t)
	c := nodes[0].(*Node).opts.Committer
	refused := func(why string, nodes []wire.Node) {
		t.Helper()
		if _, taken := sendDirect(nodes, writers); taken {
			t.Errorf("taken although %s", why)
		}
	}
	alien := openNode(t, dirFS(t))
	refused("another committer's node is there", []wire.Node{nodes[0], alien, nodes[2]})
	refused("a node is there twice", []wire.Node{nodes[0], nodes[1], nodes[0]})
	nodes[2].(*Node).Pause()
	refused("a node is paused", nodes)
	nodes[2].(*Node).Resume()
	c.mu.turn <- struct{}{}
	refused("a round is at work", nodes)
	a := writers[1].batch(1)
	nodes[1].Append(a)
	for c.crowd.Load() == 0 { // the goroutine found that it must wait
	}
	<-c.mu.turn
	must(t, (<-writers[1].done).Err)
	a.Vec.Release()
	for c.crowd.Load() > 0 {
		refused("senders were in each other's way", nodes)
	}
	if _, taken := sendDirect(nodes, writers); !taken {
		t.Error("not taken by idle nodes")
	}
	for _, w := range slices.Backward(nodes) {
		w.(*Node).Abort()
		refused("a node is stopped", nodes)
	}
}

// ReadSums tells the checksums of what it read, from an open segment, a sealed
// one of which nothing is in memory, and one whose index is; and no block that is
// damaged.
func TestReadSums(t *testing.T) {
	fs := dirFS(t)
	n := openNode(t, fs)
	id := testSeg(1)
	must(t, n.Create(bg(), id, 1, atoll.SegmentBlocks))
	w := newWriter(id, 1)
	for range 600 { // more than one block of the footer tells of
		must(t, w.append(n, 1))
	}
	check := func() {
		t.Helper()
		buf := host.Alloc(300 * atoll.BlockSize)
		defer buf.Release()
		sums := make([]uint32, 300)
		must(t, n.ReadSums(bg(), id, 900, buf.Bytes(), sums))
		for i, sum := range sums {
			if sum != segment.CRC(buf.Bytes()[i*atoll.BlockSize:][:atoll.BlockSize]) {
				t.Fatalf("checksum %d is another", i)
			}
		}
	}
	check()
	must(t, n.Seal(bg(), id, 1, w.at))
	n.indexes.forget(id)
	check()
	if _, err := n.Index(bg(), id, 0, 1); err != nil { // loads all of it
		t.Fatal(err)
	}
	check()
	f, err := fs.Open(segmentPath(id))
	must(t, err)
	_, err = f.WriteAt(make([]byte, atoll.BlockSize), 1001*atoll.BlockSize)
	must(t, errors.Join(err, f.Close()))
	buf := host.Alloc(300 * atoll.BlockSize)
	defer buf.Release()
	if err := n.ReadSums(bg(), id, 900, buf.Bytes(), make([]uint32, 300)); !errors.Is(err, atoll.ErrCorrupt) {
		t.Errorf("read of a damaged block: %v", err)
	}
}
