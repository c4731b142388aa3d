package node

import (
	"errors"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

const slotBytes = atoll.SegmentBlocks * atoll.BlockSize

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
	if got := int(n.slots.keep() / slotBytes); got != keepFactor {
		t.Errorf("%d slots are kept without demand", got)
	}
	for range 100 {
		n.slots.take(atoll.SegmentBlocks)
	}
	if got := int(n.slots.keep() / slotBytes); got < keepFactor+99 || got > keepFactor+100 {
		t.Errorf("%d slots are kept after 100 were wanted", got)
	}
	n.slots.mu.Lock()
	n.slots.mu.as = time.Now().Add(-keepHalf)
	n.slots.mu.Unlock()
	if got := int(n.slots.keep() / slotBytes); got < keepFactor+49 || got > keepFactor+50 {
		t.Errorf("%d slots are kept a half-life later", got)
	}
	total, free, err := d.Space()
	must(t, err)
	d.SetSize(total - free + 10*slotBytes)
	if got := int(n.slots.keep() / slotBytes); got > 10/keepShare {
		t.Errorf("%d slots are kept with room for 10", got)
	}
	d.SetSize(total - free)
	if got := int(n.slots.keep() / slotBytes); got != 1 {
		t.Errorf("%d slots are kept on a full disk", got)
	}
}

// TestSlotSizes: the files of deleted segments of any usual size become slots of
// that size, and are slots again after a restart; they count as room.
func TestSlotSizes(t *testing.T) {
	d := memDisk(t, 1)
	open := func() *Node {
		return openNode(t, d, func(o *Options) { o.NoPrewrite, o.Spare, o.Limit = false, 1, 1700<<20 })
	}
	n := open()
	size := atoll.SegmentSize(atoll.SegmentSizes - 1)
	if n.slots.usual <= size || n.slots.usual >= 3*size {
		t.Fatalf("segments of %d blocks on a disk of 1700 MiB", n.slots.usual)
	}
	id := testSeg(1)
	must(t, n.Create(bg(), id, 1, size))
	w := newWriter(id, 1)
	must(t, w.append(n, atoll.MaxBatchBlocks))
	must(t, w.append(n, 480))
	must(t, n.Seal(bg(), id, 1, w.at))
	must(t, n.Delete(bg(), id, 1))
	if n.slots.count() == n.slots.ready() {
		t.Fatal("the segment's file is no slot")
	}
	must(t, n.Close())
	n = open()
	if n.slots.count() == n.slots.ready() {
		t.Fatal("the slot was lost")
	}
	must(t, n.Create(bg(), testSeg(2), 1, size))
	s, err := n.lookup(testSeg(2))
	must(t, err)
	if s.mu.st.flags&prewritten == 0 {
		t.Error("the new segment did not take the slot")
	}
	must(t, n.Close())
}

// TestFillBelow: no slots are made in advance on a disk that is nearly full.
func TestFillBelow(t *testing.T) {
	n := openNode(t, memDisk(t, 1), func(o *Options) { o.NoPrewrite, o.Spare, o.Limit = false, 1, 100<<20 })
	must(t, n.Create(bg(), testSeg(1), 1, 74<<20/atoll.BlockSize))
	for n.slots.drop() {
	}
	if err := n.slots.fill(); !errors.Is(err, atoll.ErrNoSpace) {
		t.Errorf("a slot was made: %v", err)
	}
	must(t, n.Close())
}
