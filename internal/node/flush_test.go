package node

import (
	"sync/atomic"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// flushFS notes writes to segments that are not durable yet.
type flushFS struct {
	host.FS
	loose, pending atomic.Int64 // such writes ever, and since the last sync
}

func (f *flushFS) Open(name string) (host.File, error) {
	file, err := f.FS.Open(name)
	return &flushFile{file, f}, err
}

func (f *flushFS) Create(name string) (host.File, error) {
	file, err := f.FS.Create(name)
	return &flushFile{file, f}, err
}

type flushFile struct {
	host.File
	fs *flushFS
}

func (f *flushFile) WriteVec(v [][]byte, off int64, durable bool) error {
	if !durable {
		f.fs.loose.Add(1)
		f.fs.pending.Add(1)
	}
	return f.File.WriteVec(v, off, durable)
}

func (f *flushFile) Sync() error {
	n := f.fs.pending.Load()
	err := f.File.Sync()
	f.fs.pending.Add(-n)
	return err
}

// Appends to several segments in one round share a flush, and none is answered
// before it (S1).
func TestSharedFlushBeforeAnswer(t *testing.T) {
	dir, err := host.OpenDir(t.TempDir())
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	if !dir.Direct() {
		t.Skip("no direct I/O here, so flushes are not shared")
	}
	fs := &flushFS{FS: dir}
	must(t, Format(fs, Identity{Cluster: testCluster, Node: 1}))
	var c Committer
	n := openNode(t, fs, func(o *Options) { o.NoPrewrite, o.SharedFlush, o.Committer = true, true, &c })
	var writers []*stripe
	for i := range 2 {
		id := testSeg(i + 1)
		must(t, n.Create(bg(), id, 1, atoll.SegmentBlocks))
		n.mu.Lock()
		n.mu.segs[id].filled = atoll.SegmentBlocks // as if it were prewritten
		n.mu.Unlock()
		writers = append(writers, &stripe{n: n, w: newWriter(id, 1)})
	}
	done := make(chan *wire.Append, 2)
	c.mu.turn <- struct{}{} // both in one round
	for _, s := range writers {
		buf := host.Alloc(2 * atoll.BlockSize)
		head, data := buf.Bytes()[:atoll.BlockSize], buf.Bytes()[atoll.BlockSize:]
		copy(data, block(testSeg(1), 1))
		vec := host.NewVec()
		vec.Add(buf, buf.Bytes())
		s.send(&wire.Append{Vec: vec, Done: done}, head, data, segment.CRC(data))
		vec.Release()
		buf.Release()
	}
	<-c.mu.turn
	for range 2 {
		must(t, (<-done).Err)
		if p := fs.pending.Load(); p != 0 {
			t.Errorf("answered while %d writes were not flushed", p)
		}
	}
	if fs.loose.Load() < 2 {
		t.Errorf("the flush was not shared: %d writes without their own", fs.loose.Load())
	}
}
