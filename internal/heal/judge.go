package heal

import (
	"cmp"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

// held is what one node holds of a copyset. A node that did not say is not in a
// map of these: what is missing there is evidence of nothing (H3).
type held map[atoll.SegmentID]wire.SegmentInfo

// job is a copy to be made on the new member, and read back.
type job struct {
	seg    atoll.SegmentID
	length atoll.BlockNo
	epoch  atoll.Epoch
	from   []atoll.NodeID
}

// verdict is what is to be done for one copyset.
type verdict struct {
	jobs    []job             // ascending
	waiting []atoll.SegmentID // whose owner has to settle them first (H2)
	silent  []atoll.NodeID    // members that had to answer and did not
	whole   int               // segments that the new member holds, read back
}

// done reports whether the new member holds everything.
func (v *verdict) done() bool { return len(v.jobs)+len(v.waiting)+len(v.silent) == 0 }

// judge decides, from what the members of a set hold, what its new member id is
// to copy. verified are its copies that were read back. lives tells of a member
// that is on its way out whether it has to answer.
func judge(set catalog.Copyset, id atoll.NodeID, held map[atoll.NodeID]held, verified map[atoll.SegmentID]atoll.BlockNo, lives func(atoll.NodeID) bool) verdict {
	var v verdict
	witnesses := slices.DeleteFunc(slices.Clone(set.Nodes), set.Leaving)
	if len(witnesses) == 0 {
		witnesses = set.Nodes
	}
	all := map[atoll.SegmentID]bool{}
	for _, n := range set.Nodes {
		list, answered := held[n]
		if !answered && (slices.Contains(witnesses, n) || lives(n)) {
			v.silent = append(v.silent, n)
		}
		for seg := range list {
			if seg.Copyset == set.ID { // the nodes were asked for several sets
				all[seg] = true
			}
		}
	}
	if _, answered := held[id]; !answered {
		v.silent = append(v.silent, id)
	}
	for seg := range all {
		v.segment(set, id, held, witnesses, seg, verified)
	}
	slices.SortFunc(v.jobs, func(a, b job) int { return compare(a.seg, b.seg) })
	slices.SortFunc(v.waiting, compare)
	return v
}

// segment judges one segment. It is copied when the sealed copies agree on its
// length (H1), and is settled when every witness has such a copy.
func (v *verdict) segment(set catalog.Copyset, id atoll.NodeID, held map[atoll.NodeID]held, witnesses []atoll.NodeID, seg atoll.SegmentID, verified map[atoll.SegmentID]atoll.BlockNo) {
	j := job{seg: seg}
	var damaged []atoll.NodeID
	agree := true
	for _, n := range set.Nodes {
		c, has := held[n][seg]
		if !has || !c.Sealed {
			continue
		}
		agree = agree && (j.length == 0 || j.length == c.Length)
		j.length = c.Length
		if j.epoch == 0 || c.Epoch < j.epoch {
			j.epoch = c.Epoch
		}
		if c.Damaged {
			damaged = append(damaged, n)
		} else {
			j.from = append(j.from, n)
		}
	}
	settled := agree && j.length > 0
	for _, n := range witnesses {
		c, has := held[n][seg]
		if _, answered := held[n]; answered && (!has || !c.Sealed || c.Length != j.length) {
			settled = false
		}
	}
	if !settled {
		v.waiting = append(v.waiting, seg)
	}
	if !agree || j.length == 0 {
		return
	}
	j.from = append(j.from, damaged...) // block by block they are verified anyway
	if own := held[id][seg]; own.Sealed && own.Length == j.length && !own.Damaged && verified[seg] == j.length {
		v.whole++
		return
	}
	v.jobs = append(v.jobs, j)
}

func compare(a, b atoll.SegmentID) int {
	return cmp.Or(cmp.Compare(a.Medium, b.Medium), cmp.Compare(a.Ordinal, b.Ordinal), cmp.Compare(a.Copyset, b.Copyset))
}

// evictable reports whether a copy on a node that is no member may go: every
// member holds the segment, sealed at one length and not known to be damaged
// (H5). answers has what each member holds.
func evictable(set catalog.Copyset, seg atoll.SegmentID, answers map[atoll.NodeID]held) bool {
	length := atoll.BlockNo(0)
	for _, n := range set.Nodes {
		c, has := answers[n][seg]
		if !has || !c.Sealed || c.Damaged || c.Length == 0 || length != 0 && c.Length != length {
			return false
		}
		length = c.Length
	}
	return len(set.Nodes) > 0
}
