package node

import (
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// TestPatch: the file of a segment that grew becomes a slot when it is nearly
// full, and then every block of it was written.
func TestPatch(t *testing.T) {
	n := openNode(t, memDisk(t, 1))
	seal := func(id atoll.SegmentID, batches int) state {
		must(t, n.Create(bg(), id, 1, atoll.SegmentBlocks))
		w := newWriter(id, 1)
		for range batches {
			must(t, w.append(n, atoll.MaxBatchBlocks))
		}
		must(t, n.Seal(bg(), id, 1, w.at))
		s, err := n.lookup(id)
		must(t, err)
		return s.mu.st
	}
	if st := seal(testSeg(1), 20); n.slots.patch(st.id, st) {
		t.Error("a segment of 40 MiB became a slot")
	}
	st := seal(testSeg(2), 29)
	holes := st
	holes.flags |= punched
	if n.slots.patch(st.id, holes) {
		t.Error("a segment with holes became a slot")
	}
	if !n.slots.patch(st.id, st) {
		t.Fatal("a full segment did not become a slot")
	}
	f, err := n.fs.Open(segmentPath(st.id))
	must(t, err)
	defer f.Close()
	if size, err := f.Size(); err != nil || size != slotBytes {
		t.Fatalf("slot of %d bytes, %v", size, err)
	}
	buf := host.Alloc(int(slotBytes - st.length.Bytes()))
	defer buf.Release()
	_, err = f.ReadAt(buf.Bytes(), st.length.Bytes())
	must(t, err)
	for i, b := range buf.Bytes() {
		if b != 0 {
			t.Fatalf("byte %d behind the end is %#x", i, b)
		}
	}
}

// TestKeep: as many slots are kept as were asked for lately, while there is
// room.
func TestKeep(t *testing.T) {
	d := memDisk(t, 1)
	n := openNode(t, d, func(o *Options) { o.NoPrewrite, o.Spare = false, 1 })
	if got := n.slots.keep(); got != keepFactor {
		t.Errorf("%d slots are kept without demand", got)
	}
	for range 100 {
		n.slots.take()
	}
	if got := n.slots.keep(); got < keepFactor+99 || got > keepFactor+100 {
		t.Errorf("%d slots are kept after 100 were wanted", got)
	}
	n.slots.mu.Lock()
	n.slots.mu.as = time.Now().Add(-keepHalf)
	n.slots.mu.Unlock()
	if got := n.slots.keep(); got < keepFactor+49 || got > keepFactor+50 {
		t.Errorf("%d slots are kept a half-life later", got)
	}
	total, free, err := d.Space()
	must(t, err)
	d.SetSize(total - free + 10*slotBytes)
	if got := n.slots.keep(); got > 10/keepShare {
		t.Errorf("%d slots are kept with room for 10", got)
	}
	d.SetSize(total - free)
	if got := n.slots.keep(); got != 1 {
		t.Errorf("%d slots are kept on a full disk", got)
	}
}
