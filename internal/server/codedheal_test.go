package server

import (
	"testing"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// A node with shards is lost for good: another takes its place and its shards,
// after which any other one may be lost, too.
func TestLostShardsAreRebuilt(t *testing.T) {
	t.Parallel()
	s := healing(t)
	defer mustStop(t, s)
	b := &backend{s: s}
	eventually(t, "nodes up", func() bool { return b.activeNodes() == 5 })
	const size = 24
	if _, err := b.CreateVolume(t.Context(), &atollv1.CreateVolumeRequest{Name: "cold", SizeBytes: size << 20, Redundancy: "ec=2+1"}); err != nil {
		t.Fatal(err)
	}
	dev := open(t, s, "cold")
	defer s.volumes.Release(dev)
	noise(t, dev, size, 1)
	recode(t, s, "cold")
	lost := atoll.NodeID(0)
	for _, id := range shardNodes(t, s) {
		lost = max(lost, id)
	}
	if lost == 0 {
		t.Fatal("no node has a shard")
	}
	if _, err := b.Inject(t.Context(), lost, "kill", 0); err != nil {
		t.Fatal(err)
	}
	same(t, dev, size, 1)
	eventually(t, "replaced", func() bool {
		n, moves := memberOf(s, lost)
		return n == 0 && moves == 0
	})
	if _, err := b.SetNode(t.Context(), &atollv1.SetNodeRequest{Id: uint32(lost), State: "removed"}); err != nil {
		t.Fatal(err)
	}
	if r, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "cold", ReadAll: true}); err != nil || len(r.Problems)+len(r.Unchecked) > 0 {
		t.Errorf("check: %v, %v", r, err)
	}
	for _, id := range shardNodes(t, s) {
		if _, err := b.Inject(t.Context(), id, "pause", 0); err != nil {
			t.Fatal(err)
		}
		same(t, dev, size, 1)
		if _, err := b.Inject(t.Context(), id, "revive", 0); err != nil {
			t.Fatal(err)
		}
		eventually(t, "node back", func() bool {
			st, err := b.Status(t.Context())
			return err == nil && st.NodesUp == 4
		})
	}
}

// shardNodes lists the members of copysets that hold coded segments of cold.
func shardNodes(t *testing.T, s *Server) (ids []atoll.NodeID) {
	t.Helper()
	rec, err := s.volumes.find(t.Context(), "cold")
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.nodes.List(t.Context(), rec.ID)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[atoll.NodeID]bool{}
	for _, c := range list {
		if _, coded, err := s.nodes.ShapeOf(t.Context(), c.Seg); err == nil && coded {
			seen[c.Node] = true
		}
	}
	for id := range seen {
		ids = append(ids, id)
	}
	return ids
}
