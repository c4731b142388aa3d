package node

import (
	"bytes"
	"errors"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// TestSharedCommitter lets three nodes of one disk share a Committer, with files
// that grow by zeros written ahead: what was acknowledged is there after a stop
// as by a crash, a paused or stopped node holds up no other.
func TestSharedCommitter(t *testing.T) {
	var c Committer
	var dirs []host.FS
	var list []*stripe
	open := func(i int) *Node {
		return openNode(t, dirs[i], func(o *Options) { o.NoPrewrite, o.SharedFlush, o.Committer = true, true, &c })
	}
	for i := range 3 {
		fs, err := host.OpenDir(t.TempDir())
		must(t, err)
		t.Cleanup(func() { fs.Close() })
		must(t, Format(fs, Identity{Cluster: testCluster, Node: 1}))
		dirs = append(dirs, fs)
		n := open(i)
		must(t, n.Create(bg(), testSeg(1), 1, atoll.SegmentBlocks))
		list = append(list, &stripe{n: n, w: newWriter(testSeg(1), 1)})
	}
	buf := host.Alloc(2 * atoll.BlockSize)
	defer buf.Release()
	head, data := buf.Bytes()[:atoll.BlockSize], buf.Bytes()[atoll.BlockSize:]
	copy(data, block(testSeg(1), 1))
	crc := segment.CRC(data)
	done := make(chan *wire.Append, 1)
	write := func(s *stripe) error {
		vec := host.NewVec()
		defer vec.Release()
		vec.Add(buf, buf.Bytes())
		s.send(&wire.Append{Vec: vec, Done: done}, head, data, crc)
		return (<-done).Err
	}
	for range 200 {
		for _, s := range list {
			must(t, write(s))
		}
	}
	list[1].n.Pause()
	must(t, write(list[0]))
	list[1].n.Abort()
	must(t, write(list[2]))
	if err := write(list[1]); !errors.Is(err, atoll.ErrUnreachable) {
		t.Fatalf("append to a stopped node: %v", err)
	}
	for i, s := range list {
		if i != 1 {
			s.n.Abort()
		}
		n := open(i)
		got := make([]byte, atoll.BlockSize)
		for b := atoll.BlockNo(1); b < 400; b += 2 {
			must(t, n.Read(bg(), testSeg(1), b, got))
			if !bytes.Equal(got, data) {
				t.Fatalf("node %d block %d differs", i, b)
			}
		}
		must(t, n.Close())
	}
}
