package node

import (
	"context"
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testCluster = atoll.UUID{1}

func testSeg(ordinal int) atoll.SegmentID {
	return atoll.SegmentID{Medium: 7, Ordinal: atoll.Ordinal(ordinal), Copyset: 3}
}

// dirFS returns a directory of this machine as a formatted disk.
func dirFS(t testing.TB) host.FS {
	t.Helper()
	fs, err := host.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fs.Close() })
	if err := Format(fs, Identity{Cluster: testCluster, Node: 1}); err != nil {
		t.Fatal(err)
	}
	return fs
}

func openNode(t testing.TB, fs host.FS, change ...func(*Options)) *Node {
	t.Helper()
	o := Options{FS: fs, Cluster: testCluster, NoPrewrite: true}
	for _, f := range change {
		f(&o)
	}
	n, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Abort)
	return n
}

// writer builds batches for one segment, as the owner of a medium does.
type writer struct {
	seg   atoll.SegmentID
	epoch atoll.Epoch
	at    atoll.BlockNo
	prev  uint32
	seq   uint64
	acked atoll.BlockNo
	done  chan *wire.Append
}

func newWriter(seg atoll.SegmentID, epoch atoll.Epoch) *writer {
	return &writer{seg: seg, epoch: epoch, done: make(chan *wire.Append, 256)}
}

// block returns the contents of the test's block number i of a segment.
func block(seg atoll.SegmentID, i int) []byte {
	p := make([]byte, atoll.BlockSize)
	s := fmt.Sprintf("segment %v block %d. ", seg, i)
	for j := range p {
		p[j] = s[j%len(s)]
	}
	return p
}

// batch builds the next batch of n blocks and moves on.
func (w *writer) batch(n int) *wire.Append {
	buf := host.Alloc((n + 1) * atoll.BlockSize)
	crcs := make([]uint32, n)
	for i := range n {
		p := buf.Bytes()[(i+1)*atoll.BlockSize:][:atoll.BlockSize]
		copy(p, block(w.seg, int(w.at)+1+i))
		crcs[i] = segment.CRC(p)
	}
	recs := []segment.Record{{Kind: 16, Blocks: uint16(n), Key: w.seq}}
	head := segment.Head{
		Segment: w.seg, Offset: w.at, Prev: w.prev, Epoch: w.epoch, Seq: w.seq, Acked: w.acked, Clock: time.Unix(1, 0),
	}
	sum := segment.EncodeHeader(buf.Bytes()[:atoll.BlockSize], &head, recs, crcs)
	vec := host.NewVec()
	vec.Add(buf, buf.Bytes()[:atoll.BlockSize])
	if n > 0 {
		vec.Add(buf, buf.Bytes()[atoll.BlockSize:])
	}
	buf.Release()
	a := &wire.Append{Seg: w.seg, Epoch: w.epoch, Offset: w.at, Vec: vec, Done: w.done}
	w.at, w.prev, w.seq = w.at+atoll.BlockNo(n)+1, sum, w.seq+1
	return a
}

// append sends a batch of n blocks and waits.
func (w *writer) append(n *Node, blocks int) error {
	a := w.batch(blocks)
	n.Append(a)
	a = <-w.done
	a.Vec.Release()
	if a.Err == nil {
		w.acked = w.at
	}
	return a.Err
}

func bg() context.Context { return context.Background() }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// checkBlocks reads and compares the payload blocks of batches of one block
// each below end.
func checkBlocks(t testing.TB, n *Node, seg atoll.SegmentID, end atoll.BlockNo) {
	t.Helper()
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	for b := atoll.BlockNo(1); b < end; b += 2 {
		if err := n.Read(bg(), seg, b, buf.Bytes()); err != nil {
			t.Fatalf("block %d: %v", b, err)
		}
		if string(buf.Bytes()) != string(block(seg, int(b))) {
			t.Fatalf("block %d of segment %v has other bytes", b, seg)
		}
	}
}
