package node

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

// TestShrink: a segment sealed short gives its room back, whenever the power
// fails meanwhile, and its file never becomes a slot.
func TestShrink(t *testing.T) {
	d := memDisk(t, 1)
	id := testSeg(1)
	open := func(d *hosttest.Disk) *Node {
		return openNode(t, d, func(o *Options) { o.NoPrewrite, o.Spare = false, 1 })
	}
	n := open(d)
	for n.slots.ready() == 0 { // the filler is quick in memory
		time.Sleep(time.Millisecond)
	}
	must(t, n.Create(bg(), id, 1, atoll.SegmentBlocks))
	w := newWriter(id, 1)
	for range 5 {
		must(t, w.append(n, 1))
	}
	must(t, n.Seal(bg(), id, 1, w.at))
	var cuts []*hosttest.Disk
	cut := rand.New(rand.NewPCG(1, 1))
	d.OnSync(func(hosttest.SyncPoint) { cuts = append(cuts, d.Crash(cut, hosttest.Random)) })
	n.shrinkAll()
	d.OnSync(nil)
	cuts = append(cuts, d.Crash(cut, hosttest.LoseUnsynced), d.Crash(cut, hosttest.KeepAll))
	checkShrunk(t, n, id, w.at)
	n.Abort()
	if len(cuts) < 4 {
		t.Errorf("only %d power cuts", len(cuts))
	}
	for _, d := range cuts {
		n := open(d)
		n.shrinkAll()
		checkShrunk(t, n, id, w.at)
		must(t, n.Delete(bg(), id, 2))
		for n.slots.ready() > 0 {
			path := n.slots.take(atoll.SegmentBlocks)
			f, err := d.Open(path)
			must(t, err)
			if size, err := f.Size(); err != nil || size != slotBytes {
				t.Errorf("slot %s has %d bytes, %v", path, size, err)
			}
			must(t, f.Close())
		}
		n.Abort()
	}
}

// checkShrunk looks at a segment of batches of one block that was cut.
func checkShrunk(t *testing.T, n *Node, id atoll.SegmentID, length atoll.BlockNo) {
	t.Helper()
	f, err := n.fs.Open(segmentPath(id))
	must(t, err)
	defer f.Close()
	size, err := f.Size()
	must(t, err)
	s, err := n.lookup(id)
	must(t, err)
	s.mu.Lock()
	st := s.mu.st
	s.mu.Unlock()
	if size > st.size.Bytes() || st.size > length+3 || st.flags&prewritten != 0 {
		t.Errorf("file of %d bytes, size %d blocks, flags %b for %d blocks", size, st.size, st.flags, length)
	}
	checkBlocks(t, n, id, length)
	if res, err := n.Verify(bg(), id); err != nil || len(res.Damaged) > 0 {
		t.Errorf("verify: %+v, %v", res, err)
	}
	n.mu.Lock()
	used := n.mu.used
	n.mu.Unlock()
	if room := st.size.Bytes() + int64(n.slots.ready()+1)*slotBytes; used > room {
		t.Errorf("%d bytes count as used, want at most %d", used, room)
	}
}
