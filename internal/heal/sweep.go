package heal

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

// maxSets is how many copysets a node's report lists.
const maxSets = 16

// sweep looks now and then what the nodes of this process hold, and evicts what
// they need not hold any more.
func (h *Healer) sweep(ctx context.Context) {
	since := map[atoll.NodeID]map[atoll.SegmentID]time.Time{} // of strays
	for {
		for id, node := range h.opts.Local() {
			if ctx.Err() != nil {
				return
			}
			since[id] = h.sweepNode(ctx, id, node, since[id])
		}
		if !pause(ctx, h.opts.Sweep) {
			return
		}
	}
}

// sweepNode takes stock of one node and evicts strays whose grace has passed. It
// returns since when the others are known.
func (h *Healer) sweepNode(ctx context.Context, id atoll.NodeID, node Node, since map[atoll.SegmentID]time.Time) map[atoll.SegmentID]time.Time {
	listing, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	list, err := h.opts.Nodes.ListNode(listing, id, nil)
	if err != nil {
		return since
	}
	st := h.opts.Catalog.State()
	var s stock
	next := map[atoll.SegmentID]time.Time{}
	sums := map[atoll.CopysetID]int64{}
	ripe := map[atoll.CopysetID][]wire.SegmentInfo{}
	for _, c := range list {
		if !isStray(st, id, c.Seg.Copyset) {
			sums[c.Seg.Copyset] += c.Size.Bytes()
			continue
		}
		s.stray += c.Size.Bytes()
		next[c.Seg] = since[c.Seg]
		if next[c.Seg].IsZero() {
			next[c.Seg] = time.Now()
		}
		if time.Since(next[c.Seg]) >= h.opts.Grace && len(st.Copysets[c.Seg.Copyset].Moves) == 0 {
			ripe[c.Seg.Copyset] = append(ripe[c.Seg.Copyset], c)
		}
	}
	s.sets = largest(sums)
	h.mu.Lock()
	h.mu.stock[id] = s
	h.mu.Unlock()
	if len(ripe) > 0 {
		h.evict(ctx, id, node, st, ripe)
	}
	return next
}

// isStray reports whether the catalog knows a copyset, and a node neither as a
// member nor as one on its way in.
func isStray(st *catalog.State, id atoll.NodeID, set atoll.CopysetID) bool {
	s, known := st.Copysets[set]
	_, in := s.Incoming(id)
	return known && !in && !slices.Contains(s.Nodes, id)
}

func largest(sums map[atoll.CopysetID]int64) (out []catalog.SetBytes) {
	for id, n := range sums {
		out = append(out, catalog.SetBytes{ID: id, Bytes: n})
	}
	slices.SortFunc(out, func(a, b catalog.SetBytes) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.ID, b.ID))
	})
	return slices.Clip(out[:min(len(out), maxSets)])
}

// evict removes copies that every member of their copysets was just seen to hold
// (H5).
func (h *Healer) evict(ctx context.Context, id atoll.NodeID, node Node, st *catalog.State, ripe map[atoll.CopysetID][]wire.SegmentInfo) {
	sets, ask := map[atoll.CopysetID]bool{}, []atoll.NodeID{}
	for set := range ripe {
		sets[set] = true
		for _, n := range st.Copysets[set].Nodes {
			if !slices.Contains(ask, n) {
				ask = append(ask, n)
			}
		}
	}
	answers := h.list(ctx, ask, sets)
	gone, kept := 0, 0
	var bytes int64
	for set, copies := range ripe {
		for _, c := range copies {
			now := h.opts.Catalog.State()
			if ctx.Err() != nil {
				return
			}
			if now.Copysets[set].Version != st.Copysets[set].Version || !isStray(now, id, set) || !evictable(st.Copysets[set], c.Seg, answers) {
				kept++
				continue
			}
			if err := node.Evict(ctx, c.Seg); err != nil {
				h.log.WarnContext(ctx, "copy not evicted", "seg", c.Seg, "node", id, "err", err)
				continue
			}
			gone++
			bytes += c.Size.Bytes()
			h.log.DebugContext(ctx, "copy evicted", "seg", c.Seg, "node", id, "ver", st.Copysets[set].Version)
		}
	}
	h.opts.Metrics.evicted(gone)
	if gone > 0 {
		h.log.InfoContext(ctx, "copies evicted; their copysets have other members", "node", id, "count", gone, "bytes", bytes)
	}
	if kept > 0 {
		h.log.DebugContext(ctx, "copies kept that not every member holds", "node", id, "count", kept)
	}
}
