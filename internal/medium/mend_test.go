package medium_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
)

// segmentFiles lists the segment files of a node that hold at least n blocks.
func segmentFiles(t *testing.T, c *mediumtest.Cluster, id atoll.NodeID, n int64) (names []string) {
	t.Helper()
	list, err := c.Disk(id).List("segments")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if !e.Dir && e.Size >= n*atoll.BlockSize {
			names = append(names, "segments/"+e.Name)
		}
	}
	if len(names) < 2 {
		t.Fatalf("node %v has %d segments", id, len(names))
	}
	return names
}

// damage flips bits of one block of each segment of a node, or of both a data
// block, a batch header and the footer.
func damage(t *testing.T, c *mediumtest.Cluster, id atoll.NodeID, blocks ...int64) {
	t.Helper()
	for _, name := range segmentFiles(t, c, id, 20) {
		for _, b := range blocks {
			if err := c.Disk(id).Corrupt(name, b*atoll.BlockSize+100, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// filled is a medium with many segments.
func filled(t *testing.T, c *mediumtest.Cluster) (*toy, map[uint64]uint64) {
	t.Helper()
	o := c.Owner("one")
	k := openToy(t, o, o.Create("toy", 32).ID)
	want := map[uint64]uint64{}
	for i := range uint64(200) {
		if err := k.put(i, i*7); err != nil {
			t.Fatal(err)
		}
		want[i] = i * 7
	}
	return k, want
}

// Damage to one copy, of data and of headers, sealed and open, is found where it
// lies and repaired; afterwards nothing is found, also by Check.
func TestMendDamage(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		k, want := filled(t, c)
		damage(t, c, c.IDs()[0], 3, 8)
		damage(t, c, c.IDs()[1], 4, 9)
		sum, bad := k.m.Mend(context.Background())
		if len(bad) > 0 || sum.Damaged == 0 || sum.Repaired != sum.Damaged {
			t.Fatalf("first: %+v %v", sum, bad)
		}
		again, bad := k.m.Mend(context.Background())
		if len(bad) > 0 || again.Damaged != 0 || again.Checked < sum.Checked {
			t.Fatalf("second: %+v %v", again, bad)
		}
		if err := k.m.Check(context.Background()); err != nil {
			t.Error(err)
		}
		k.check(t, want)
		k.close(t)
	})
}

// Lost headers together with the footer that has their checksums: whole batches
// are copied.
func TestMendFooter(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		k, want := filled(t, c)
		id := c.IDs()[2]
		c.Kill(id) // a node that starts again has written down what is sealed
		c.Restart(id)
		list, err := c.Node(id).List(context.Background(), atoll.SegmentID{}, 1000)
		if err != nil {
			t.Fatal(err)
		}
		c.Kill(id)
		for _, s := range list {
			if !s.Sealed {
				continue
			}
			name := ""
			for _, f := range segmentFiles(t, c, id, 1) {
				if strings.Contains(f, fmt.Sprintf("-%08x-", uint32(s.Seg.Ordinal))) {
					name = f
				}
			}
			if name == "" {
				t.Fatalf("no file of segment %v in %v", s.Seg, segmentFiles(t, c, id, 1))
			}
			for _, b := range []atoll.BlockNo{2, 5, s.Length, s.Length + 1} {
				if err := c.Disk(id).Corrupt(name, b.Bytes()+100, 1); err != nil {
					t.Fatal(err)
				}
			}
		}
		c.Restart(id)
		time.Sleep(3 * time.Second)
		sum, bad := k.m.Mend(context.Background())
		if len(bad) > 0 || sum.Repaired == 0 {
			t.Fatalf("first: %+v %v", sum, bad)
		}
		if again, bad := k.m.Mend(context.Background()); len(bad) > 0 || again.Damaged != 0 {
			t.Fatalf("second: %+v %v", again, bad)
		}
		k.check(t, want)
		k.close(t)
	})
}

// A file that is gone is made anew; damage of all copies at one place is told,
// and the rest is repaired; a node that is down is told apart from damage.
func TestMendLimits(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		k, want := filled(t, c)
		id := c.IDs()[0]
		c.Kill(id)
		gone := segmentFiles(t, c, id, 20)[0]
		if err := c.Disk(id).Remove(gone); err != nil {
			t.Fatal(err)
		}
		_, bad := k.m.Mend(context.Background())
		if err := errors.Join(bad...); !errors.Is(err, atoll.ErrUnreachable) || errors.Is(err, atoll.ErrCorrupt) {
			t.Errorf("with a node down: %v", err)
		}
		c.Restart(id)
		time.Sleep(3 * time.Second)
		sum, bad := k.m.Mend(context.Background())
		if len(bad) > 0 || sum.Repaired == 0 {
			t.Fatalf("with a lost file: %+v %v", sum, bad)
		}
		k.check(t, want)
		for _, id := range c.IDs() {
			damage(t, c, id, 7)
		}
		damage(t, c, id, 11)
		sum, bad = k.m.Mend(context.Background())
		if err := errors.Join(bad...); !errors.Is(err, atoll.ErrCorrupt) || sum.Repaired == 0 || sum.Repaired >= sum.Damaged {
			t.Errorf("with all copies damaged: %+v %v", sum, err)
		}
	})
}

// A copy that lost its end together with the knowledge that it was sealed
// cannot be made anew under the same epoch; the next owner does it.
func TestMendNextOwner(t *testing.T) {
	inBubble(t, 3, func(t *testing.T, c *mediumtest.Cluster) {
		k, want := filled(t, c)
		id := c.IDs()[2]
		list, err := c.Node(id).List(context.Background(), atoll.SegmentID{}, 1000)
		if err != nil {
			t.Fatal(err)
		}
		seg := list[2]
		if err := c.Node(id).Delete(context.Background(), seg.Seg, k.m.Epoch()); err != nil {
			t.Fatal(err)
		}
		if _, bad := k.m.Mend(context.Background()); !errors.Is(errors.Join(bad...), atoll.ErrCorrupt) {
			t.Fatalf("the lost copy went unnoticed: %v", bad)
		}
		if n := k.m.Stats().Unverified; n != 1 {
			t.Errorf("%d copies are short", n)
		}
		if err := k.checkpoint(); err != nil {
			t.Fatal(err)
		}
		k.close(t)
		k = openToy(t, c.Owner("two"), k.m.Info().ID)
		time.Sleep(5 * time.Second)
		if n := k.m.Stats().Unverified; n != 0 {
			t.Errorf("%d copies are still short", n)
		}
		if sum, bad := k.m.Mend(context.Background()); len(bad) > 0 || sum.Damaged != 0 {
			t.Errorf("afterwards: %+v %v", sum, bad)
		}
		if err := k.m.Check(context.Background()); err != nil {
			t.Error(err)
		}
		k.check(t, want)
		k.close(t)
	})
}
