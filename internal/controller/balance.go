package controller

import (
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

const (
	// uneven is how far the use of two nodes may be apart.
	uneven = 0.05
	// balancesAtOnce bounds the moves for balance that are under way.
	balancesAtOnce = 4
)

// balance proposes to move a member of one copyset from the fullest node to the
// emptiest. It is the last thing planned: only when nothing is to be repaired.
func (r *repairer) balance() {
	moving := 0
	used := make(map[atoll.NodeID]float64) // as if all moves were done
	var nodes []catalog.Node
	for _, n := range r.nodes {
		if n.State == catalog.NodeActive && !takes(n) && !n.Report.Full {
			return // first everything is to be well
		}
		if n.State == catalog.NodeActive && n.Report.Total > 0 {
			nodes = append(nodes, n)
			used[n.ID] = use(n)
		}
	}
	for _, set := range r.sets {
		for _, m := range set.Moves {
			if m.Why != catalog.MoveBalance {
				return
			}
			moving++
			bytes := float64(bytesOf(r.st.Nodes[m.Old], set.ID))
			used[m.Old] -= bytes / float64(max(1, r.st.Nodes[m.Old].Report.Total))
			used[m.New] += bytes / float64(max(1, r.st.Nodes[m.New].Report.Total))
		}
	}
	if len(nodes) < 2 || moving >= balancesAtOnce {
		return
	}
	slices.SortStableFunc(nodes, func(a, b catalog.Node) int {
		switch {
		case used[a.ID] < used[b.ID]:
			return -1
		case used[a.ID] > used[b.ID]:
			return 1
		}
		return 0
	})
	for i := len(nodes) - 1; i > 0; i-- {
		for _, to := range nodes[:i] {
			if from := nodes[i]; used[from.ID]-used[to.ID] > uneven && takes(to) && r.shift(from, to, used) {
				return
			}
		}
	}
}

// bytesOf returns how much a node holds of a copyset, as far as it has reported.
func bytesOf(n catalog.Node, id atoll.CopysetID) int64 {
	for _, s := range n.Report.Sets {
		if s.ID == id {
			return s.Bytes
		}
	}
	return 0
}

// shift moves the largest copyset that does not only turn the scales over and
// brings its members no nearer to one another.
func (r *repairer) shift(from, to catalog.Node, used map[atoll.NodeID]float64) bool {
	var best catalog.Copyset
	most := int64(0)
	for _, s := range from.Report.Sets {
		set, is := r.st.Copysets[s.ID]
		gain := float64(s.Bytes)/float64(from.Report.Total) + float64(s.Bytes)/float64(to.Report.Total)
		if !is || s.Bytes <= most || gain > used[from.ID]-used[to.ID] || len(set.Moves) > 0 ||
			!slices.Contains(set.Nodes, from.ID) || slices.Contains(set.Nodes, to.ID) || r.left(set) < len(set.Nodes) {
			continue
		}
		stay := slices.DeleteFunc(slices.Clone(set.Nodes), func(id atoll.NodeID) bool { return id == from.ID })
		a, b := r.nearness(stay, to), r.nearness(stay, from)
		if a[0] > b[0] || a[0] == b[0] && a[1] > b[1] {
			continue
		}
		best, most = set, s.Bytes
	}
	if most == 0 {
		return false
	}
	r.out.Start = append(r.out.Start, startMove{best, catalog.Move{Old: from.ID, New: to.ID, Why: catalog.MoveBalance, Since: r.now.UTC()}})
	return true
}
