package controller

import (
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Repair is how far the replacement of members of copysets is.
type Repair struct {
	Moves int   // members being replaced, or added
	Lost  int   // of these, for members that are lost or fail
	Stuck int   // copysets with a member to be replaced that no node can take the place of
	Bytes int64 // still to be copied, as far as the new members have listed it
	Rate  int64 // bytes a second
}

// Repairs sums up what is being repaired. after is as in Options.RepairAfter.
func Repairs(st *catalog.State, now time.Time, after time.Duration) (out Repair) {
	for _, set := range st.Copysets {
		for _, m := range set.Moves {
			out.Moves++
			if m.Why == catalog.MoveLost || m.Why == catalog.MoveErrors {
				out.Lost++
			}
		}
	}
	for _, n := range st.Nodes {
		if h := n.Report.Healing; h != nil {
			out.Bytes += h.Bytes
			out.Rate += h.Rate
		}
	}
	out.Stuck = len(planRepair(st, now, after).Stuck)
	return out
}

// MayDrain returns why the copies of a node cannot be taken over by others, or
// nil. It judges by the state at hand; nothing is lost if it is wrong.
func MayDrain(st *catalog.State, id, heir atoll.NodeID) error {
	n, is := st.Nodes[id]
	if !is {
		return fmt.Errorf("drain node %v: %w", id, atoll.ErrNotExist)
	}
	if h, is := st.Nodes[heir]; heir != 0 && (!is || !takes(h) || heir == id) {
		return fmt.Errorf("drain node %v: node %v cannot take its place: %w", id, heir, atoll.ErrInvalid)
	}
	var room int64
	others := 0
	for _, o := range st.Nodes {
		if o.ID != id && takes(o) {
			others++
			room += o.Report.Free
		}
	}
	for _, set := range st.Copysets {
		if slices.Contains(set.Nodes, id) && len(set.Nodes) > others {
			return fmt.Errorf("drain node %v: there are copysets of %d nodes, and only %d others that take copies; add a node first: %w",
				id, len(set.Nodes), others, atoll.ErrUnavailable)
		}
	}
	if used := n.Report.Total - n.Report.Free - n.Report.Stray; n.Up && used > room/10*9 {
		return fmt.Errorf("drain node %v: it holds %s, the others have room for %s; add a node first: %w",
			id, atoll.FormatSize(used), atoll.FormatSize(room), atoll.ErrNoSpace)
	}
	return nil
}

// MayRemove returns why a node cannot be removed without losing data, or nil.
func MayRemove(st *catalog.State, id atoll.NodeID) error {
	n, is := st.Nodes[id]
	if !is {
		return fmt.Errorf("remove node %v: %w", id, atoll.ErrNotExist)
	}
	in, alone := 0, 0
	for _, set := range st.Copysets {
		if !slices.Contains(set.Nodes, id) {
			continue
		}
		in++
		other := func(m atoll.NodeID) bool { return m != id && readable(st.Nodes[m]) }
		if !slices.ContainsFunc(set.Nodes, other) {
			alone++
		}
	}
	switch {
	case in == 0:
		return nil
	case !gone(n):
		return fmt.Errorf("remove node %v: it is a member of %d copysets; drain it first: %w", id, in, atoll.ErrBusy)
	case alone > 0:
		return fmt.Errorf("remove node %v: of %d copysets no other node can be read now, their data would be lost with it: %w", id, alone, atoll.ErrUnavailable)
	}
	return nil
}
