package node

import (
	"errors"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

func TestLife(t *testing.T) {
	fs := dirFS(t)
	n := openNode(t, fs)
	seg := testSeg(1)
	must(t, n.Create(bg(), seg, 5, 1024))
	w := newWriter(seg, 5)
	for range 10 {
		must(t, w.append(n, 1))
	}
	checkBlocks(t, n, seg, w.at)
	tail, err := n.Fence(bg(), seg, 6)
	must(t, err)
	if tail.Grade != wire.Clean || tail.Length != w.at || tail.Sum != w.prev || tail.Seq != w.seq || tail.Epoch != 6 {
		t.Fatalf("tail %+v", tail)
	}
	if err := w.append(n, 1); !errors.Is(err, atoll.ErrFenced) {
		t.Fatalf("append after fence: %v", err)
	}
	must(t, n.Seal(bg(), seg, 6, tail.Length))
	must(t, n.Seal(bg(), seg, 6, tail.Length))
	if err := n.Seal(bg(), seg, 6, 2); !errors.Is(err, atoll.ErrSealed) {
		t.Fatalf("seal at another length: %v", err)
	}
	checkBlocks(t, n, seg, tail.Length)
	must(t, n.Close())

	n = openNode(t, fs)
	checkBlocks(t, n, seg, tail.Length)
	again, err := n.Fence(bg(), seg, 7)
	must(t, err)
	if !again.Sealed || again.Length != tail.Length || again.Grade != wire.Clean || again.Sum != tail.Sum || again.Seq != tail.Seq {
		t.Fatalf("tail after restart %+v", again)
	}
	idx, err := n.Index(bg(), seg, 0, 100)
	must(t, err)
	if len(idx.Bytes()) != 10*atoll.BlockSize {
		t.Fatalf("index of %d bytes", len(idx.Bytes()))
	}
	for i := range 10 {
		h, err := segment.ParseHeader(idx.Bytes()[i*atoll.BlockSize:])
		must(t, err)
		if h.Offset() != atoll.BlockNo(2*i) {
			t.Fatalf("header %d is at %d", i, h.Offset())
		}
	}
	idx.Release()
	res, err := n.Verify(bg(), seg)
	must(t, err)
	if res.Blocks != 20 || len(res.Damaged) > 0 {
		t.Fatalf("verify: %+v", res)
	}
	list, err := n.List(bg(), atoll.SegmentID{}, 10)
	must(t, err)
	if len(list) != 1 || list[0].Seg != seg || !list[0].Sealed || list[0].Length != 20 {
		t.Fatalf("list %+v", list)
	}
	must(t, n.Delete(bg(), seg, 7))
	must(t, n.Delete(bg(), seg, 7))
	if err := n.Create(bg(), seg, 7, 1024); !errors.Is(err, atoll.ErrFenced) {
		t.Fatalf("create after delete: %v", err)
	}
	st, err := n.Stat(bg())
	must(t, err)
	if st.Segments != 0 || st.Node != 1 || st.Cluster != testCluster {
		t.Fatalf("stat %+v", st)
	}
	must(t, n.Close())
}
