package stream

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// health sorts the nodes of the catalog by what they are good for.
type health struct {
	good    []catalog.Node // in ascending order of id
	suspect []catalog.Node // up, but failed a short while ago
	full    int            // up, but without room
	down    []atoll.NodeID
}

// Pick returns a copyset for a new segment: all members up, active, with room
// and not suspected, none of them in avoid. Among the ready copysets it chooses
// at random, weighted by free space; when none will do it makes one of healthy
// nodes on different hosts where possible, with fewer copies than the policy
// asks for if need be, but at least DefaultMin. ErrNoSpace when only space is
// missing, ErrUnavailable when there are too few healthy nodes.
func (n *Nodes) Pick(ctx context.Context, p catalog.Policy, avoid []atoll.NodeID) (catalog.Copyset, error) {
	return n.pick(ctx, p, avoid, false)
}

// pick is Pick, and if deep also takes nodes that have room in their reserve
// only.
func (n *Nodes) pick(ctx context.Context, p catalog.Policy, avoid []atoll.NodeID, deep bool) (catalog.Copyset, error) {
	want, least := max(p.Replicas, 1), DefaultMin(p)
	st := n.catalog.State()
	h := n.health(st, avoid, deep)
	if set, ok := n.ready(st, h.good, want); ok {
		return set, nil
	}
	nodes := h.good
	if len(nodes) < least {
		if len(nodes)+h.full >= least && len(nodes)+len(h.suspect) < least {
			return catalog.Copyset{}, fmt.Errorf("place %d copies: %d nodes are full, %d have room: %w", want, h.full, len(nodes), atoll.ErrNoSpace)
		}
		nodes = append(nodes, h.suspect...) // better a slow node than none
	}
	if len(nodes) < least {
		return catalog.Copyset{}, fmt.Errorf("place %d copies: %d healthy nodes, at least %d needed, down or suspected: %v: %w",
			want, len(h.good), least, h.down, atoll.ErrUnavailable)
	}
	return n.catalog.EnsureCopyset(ctx, n.spread(nodes, want))
}

// Whole reports whether Pick would find as many healthy nodes as the policy asks
// for.
func (n *Nodes) Whole(p catalog.Policy) bool {
	return len(n.health(n.catalog.State(), nil, false).good) >= p.Replicas
}

func (n *Nodes) health(st *catalog.State, avoid []atoll.NodeID, deep bool) health {
	var h health
	now := time.Now()
	for id, rec := range st.Nodes {
		if rec.State != catalog.NodeActive || slices.Contains(avoid, id) {
			continue
		}
		suspect, full := n.doubt(id, now, deep)
		switch {
		case !rec.Up || rec.Report.ReadOnly:
			h.down = append(h.down, id)
		case rec.Report.Full && !deep || full:
			h.full++
		case suspect:
			h.suspect = append(h.suspect, rec)
			h.down = append(h.down, id)
		default:
			h.good = append(h.good, rec)
		}
	}
	byID := func(a, b catalog.Node) int { return cmp.Compare(a.ID, b.ID) }
	slices.SortFunc(h.good, byID)
	slices.SortFunc(h.suspect, byID)
	slices.Sort(h.down)
	return h
}

// ready chooses among the copysets of the right size whose members are all good.
func (n *Nodes) ready(st *catalog.State, good []catalog.Node, want int) (catalog.Copyset, bool) {
	free := make(map[atoll.NodeID]int64, len(good))
	for _, rec := range good {
		free[rec.ID] = max(rec.Report.Free, 1)
	}
	type candidate struct {
		set    catalog.Copyset
		weight int64
	}
	var all []candidate
	total := int64(0)
next:
	for _, set := range st.Copysets {
		if set.Retired || len(set.Moves) > 0 || len(set.Nodes) != want {
			continue
		}
		weight := int64(1) << 50
		for _, id := range set.Nodes {
			f, ok := free[id]
			if !ok {
				continue next
			}
			weight = min(weight, f>>20+1) // in MiB, so that the sum cannot overflow
		}
		all = append(all, candidate{set, weight})
		total += weight
	}
	if len(all) == 0 {
		return catalog.Copyset{}, false
	}
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Compare(a.set.ID, b.set.ID) })
	at := n.random(total)
	for _, c := range all {
		if at -= c.weight; at < 0 {
			return c.set, true
		}
	}
	return all[0].set, true
}

// spread chooses want of the nodes: at random by free space, other hosts first.
func (n *Nodes) spread(nodes []catalog.Node, want int) []atoll.NodeID {
	left := slices.Clone(nodes)
	var ids []atoll.NodeID
	hosts := make(map[string]bool)
	for len(ids) < want && len(left) > 0 {
		pool := slices.DeleteFunc(slices.Clone(left), func(c catalog.Node) bool { return hosts[c.Host] })
		if len(pool) == 0 {
			pool = left
		}
		total := int64(0)
		for _, c := range pool {
			total += max(c.Report.Free, 0)>>20 + 1
		}
		at := n.random(total)
		i := 0
		for i = range pool {
			if at -= max(pool[i].Report.Free, 0)>>20 + 1; at < 0 {
				break
			}
		}
		chosen := pool[i]
		ids = append(ids, chosen.ID)
		hosts[chosen.Host] = true
		left = slices.DeleteFunc(left, func(c catalog.Node) bool { return c.ID == chosen.ID })
	}
	slices.Sort(ids)
	return ids
}

func (n *Nodes) random(below int64) int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mu.rng.Int64N(below)
}
