package server

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// healing starts a server with five nodes that are replaced as soon as they are
// down for a second.
func healing(t *testing.T, args ...string) *Server {
	t.Helper()
	dir := testDir(t)
	args = append([]string{"--repair-after", "1s", "--evict-after", "1s", "--log-level", "debug"}, args...)
	for i := range 5 {
		args = append(args, "--disk", filepath.Join(dir, "disks", fmt.Sprint(i+1)))
	}
	return start(t, testConfig(t, dir, args...), Options{Demo: true})
}

// memberOf lists the copysets that a node is a member of, or is to become one.
func memberOf(s *Server, id atoll.NodeID) (n, moves int) {
	for _, set := range s.cat.State().Copysets {
		if slices.Contains(set.Nodes, id) {
			n++
		}
		moves += len(set.Moves)
	}
	return n, moves
}

// wholeCopies waits until every segment of every medium has the copies that its
// copyset says, sealed and of one length, each of them on another node. Segments
// may be on their way out meanwhile.
func wholeCopies(t *testing.T, s *Server, copies int) {
	t.Helper()
	last := ""
	defer func() {
		if t.Failed() {
			t.Log(last)
		}
	}()
	eventually(t, "whole", func() bool {
		last = unequal(t, s, copies)
		return last == ""
	})
}

// unequal tells what is not as wholeCopies wants it.
func unequal(t *testing.T, s *Server, copies int) (what string) {
	st := s.cat.State()
	lists := map[atoll.SegmentID][]string{}
	for id, n := range st.Nodes {
		if !n.Up {
			continue
		}
		list, err := s.nodes.ListNode(t.Context(), id, nil)
		if err != nil {
			return err.Error()
		}
		for _, c := range list {
			if slices.Contains(st.Copysets[c.Seg.Copyset].Nodes, id) {
				lists[c.Seg] = append(lists[c.Seg], fmt.Sprintf("sealed=%v len=%d damaged=%v", c.Sealed, c.Length, c.Damaged))
			}
		}
	}
	for seg, l := range lists {
		if len(l) != copies || len(slices.Compact(l)) != 1 || strings.Contains(l[0], "damaged=true") {
			what += fmt.Sprintf("segment %v has copies %v; ", seg, l)
		}
	}
	if len(lists) == 0 {
		return "there is no segment at all"
	}
	return what
}

// write fills a volume again and again until stop is closed; it returns how
// often.
func write(t *testing.T, s *Server, name string, stop <-chan struct{}) (rounds int, err error) {
	dev := open(t, s, name)
	defer s.volumes.Release(dev)
	for {
		select {
		case <-stop:
			return rounds, nil
		default:
		}
		for i := range 64 {
			b := host.Alloc(64 << 10)
			for j := range b.Bytes() {
				b.Bytes()[j] = byte(i + 1)
			}
			err := dev.Write(t.Context(), b, b.Bytes(), int64(i)<<16, i%8 == 7)
			b.Release()
			if err != nil {
				return rounds, err
			}
		}
		rounds++
	}
}

// loaded writes to one volume until the returned function is called, and has
// another one with contents that nobody touches.
func loaded(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	create(t, s, "busy", "writethrough")
	create(t, s, "still", "writethrough")
	dev := open(t, s, "still")
	fill(t, dev, 512, false)
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.volumes.Release(dev)
	ending, done := make(chan struct{}), make(chan error, 1)
	go func() {
		rounds, err := write(t, s, "busy", ending)
		t.Logf("%d rounds written", rounds)
		done <- err
	}()
	return func() {
		close(ending)
		if err := <-done; err != nil {
			t.Errorf("write: %v", err)
		}
	}
}

func verifyAll(t *testing.T, s *Server) {
	t.Helper()
	for name, n := range map[string]int{"busy": 32, "still": 512} {
		dev := open(t, s, name)
		verify(t, dev, n)
		s.volumes.Release(dev)
	}
}

// A node that is gone for good is replaced in every copyset, under load; then
// every segment has three copies again, and the contents are right.
func TestLostNodeIsReplaced(t *testing.T) {
	t.Parallel()
	s := healing(t)
	defer mustStop(t, s)
	b := &backend{s: s}
	stop := loaded(t, s)
	began := time.Now()
	before, _ := memberOf(s, 3)
	if before == 0 || s.cat.State().Nodes[3].Report.Segments == 0 {
		eventually(t, "in use", func() bool { return s.cat.State().Nodes[3].Report.Segments > 0 })
	}
	if _, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: 3, State: "removed"}); !errors.Is(err, atoll.ErrBusy) {
		t.Errorf("removal of a node in use: %v", err)
	}
	if _, err := b.Inject(t.Context(), 3, "kill", 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "replaced", func() bool {
		n, moves := memberOf(s, 3)
		if time.Since(began) > patience-10*time.Second { // it is about to fail: say why
			began = time.Now()
			for _, set := range s.cat.State().Copysets {
				if len(set.Moves) > 0 {
					t.Logf("%+v", set)
				}
			}
			for id := range s.cat.State().Nodes {
				if h := s.cat.State().Nodes[id].Report.Healing; h != nil {
					t.Logf("node %v: %+v", id, *h)
				}
			}
			for _, id := range []atoll.NodeID{1, 2, 4, 5} {
				list, _ := s.nodes.ListNode(t.Context(), id, nil)
				for _, c := range list {
					if len(s.cat.State().Copysets[c.Seg.Copyset].Moves) > 0 {
						t.Logf("node %v: %+v", id, c)
					}
				}
			}
		}
		return n == 0 && moves == 0
	})
	stop()
	if n, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: 3, State: "removed"}); err != nil || n.State != "removed" {
		t.Errorf("removal of a node that was replaced: %v, %v", n, err)
	}
	verifyAll(t, s)
	checkAll(t, s, "busy", "still")
	wholeCopies(t, s, 3)
}

// Draining a node moves its copies under load without an error, then it lets go
// of them; undrained, it takes segments again.
func TestDrain(t *testing.T) {
	t.Parallel()
	s := healing(t)
	defer mustStop(t, s)
	b := &backend{s: s}
	stop := loaded(t, s)
	if _, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: 2, State: "draining"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "drained", func() bool {
		n, moves := memberOf(s, 2)
		return n == 0 && moves == 0
	})
	stop()
	eventually(t, "empty", func() bool {
		list, err := s.nodes.ListNode(t.Context(), 2, nil)
		return err == nil && len(list) == 0
	})
	verifyAll(t, s)
	checkAll(t, s, "busy", "still")
	wholeCopies(t, s, 3)
	if _, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: 2, State: "active"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "in use again", func() bool {
		n, _ := memberOf(s, 2)
		return n > 0
	})
	// Two nodes are too few for copysets of three.
	for _, id := range []uint32{1, 2} {
		if _, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: id, State: "draining"}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "told", func() bool {
		_, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: 3, State: "draining"})
		return errors.Is(err, atoll.ErrUnavailable)
	})
}

// A node that is added is filled from the others until all are about even.
func TestBalance(t *testing.T) {
	t.Parallel()
	s := healing(t, "--disk-limit", "256M")
	defer mustStop(t, s)
	b := &backend{s: s}
	create(t, s, "still", "writethrough")
	dev := open(t, s, "still")
	fill(t, dev, 900, false)
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.volumes.Release(dev)
	if _, _, err := b.AddNode(t.Context()); err != nil {
		t.Fatal(err)
	}
	spread := func() (low, high float64) {
		low = 1
		for _, n := range s.cat.State().Nodes {
			use := float64(n.Report.Total-n.Report.Free-n.Report.Stray) / float64(max(1, n.Report.Total))
			low, high = min(low, use), max(high, use)
		}
		return low, high
	}
	eventually(t, "uneven", func() bool { low, high := spread(); return high-low > 0.07 })
	eventually(t, "even", func() bool {
		low, high := spread()
		_, moves := memberOf(s, 6)
		return high-low <= 0.06 && low > 0 && moves == 0
	})
	dev = open(t, s, "still")
	verify(t, dev, 900)
	s.volumes.Release(dev)
	checkAll(t, s, "still")
	wholeCopies(t, s, 3)
}

// checkAll runs what "atoll check --read-all" runs over every volume.
func checkAll(t *testing.T, s *Server, names ...string) {
	t.Helper()
	for _, name := range names {
		out, err := (&backend{s: s}).CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: name, ReadAll: true})
		if err != nil {
			t.Fatal(err)
		}
		if len(out.Problems) > 0 || out.DamagedBytes > 0 || len(out.Unchecked) > 0 {
			t.Errorf("check of %s: %d bytes damaged, problems %q, not checked %q", name, out.DamagedBytes, out.Problems, out.Unchecked)
		}
	}
}
