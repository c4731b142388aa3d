package controller

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Grade is how well the cluster is, in one word.
type Grade string

// Grades.
const (
	Healthy  Grade = "healthy"
	Degraded Grade = "degraded" // everything works, with less in reserve
	Critical Grade = "critical" // some data cannot be read, or nothing can be written
)

// Summary is the health of the cluster and why it is not better. Reasons are
// sentences without a full stop, the worst first.
type Summary struct {
	Grade   Grade    `json:"grade"`
	Reasons []string `json:"reasons,omitempty"`
}

// Health judges the cluster by its state: what nodes say of themselves and who
// is missing. It is a pure function. It cannot see damage that no node has
// reported.
func Health(st *catalog.State) Summary {
	h := &judge{st: st}
	h.nodes()
	h.copysets()
	h.moves()
	if st.Leaders[office].IsZero() {
		h.degraded = append(h.degraded, "no controller is elected")
	}
	switch {
	case len(h.critical) > 0:
		return Summary{Critical, append(h.critical, h.degraded...)}
	case len(h.degraded) > 0:
		return Summary{Degraded, h.degraded}
	}
	return Summary{Grade: Healthy}
}

type judge struct {
	st                 *catalog.State
	critical, degraded []string
}

func (h *judge) nodes() {
	var down, silent, readOnly, full, draining []atoll.NodeID
	active, writable := 0, 0
	for _, id := range sortedNodes(h.st) {
		n := h.st.Nodes[id]
		switch {
		case n.State == catalog.NodeRemoved:
			continue
		case n.State == catalog.NodeDraining:
			draining = append(draining, id)
		default:
			active++
		}
		switch {
		case !n.Up:
			down = append(down, id)
		case n.Report.Silent:
			silent = append(silent, id)
		case n.Report.ReadOnly:
			readOnly = append(readOnly, id)
		case n.Report.Full:
			full = append(full, id)
		case n.State == catalog.NodeActive:
			writable++
		}
	}
	if active == 0 {
		h.critical = append(h.critical, "no storage nodes are active")
	} else if writable == 0 {
		h.critical = append(h.critical, "no storage node takes writes")
	}
	h.group(down, "is down", "are down")
	h.group(silent, "does not answer", "do not answer")
	h.group(readOnly, "is read-only after an I/O error", "are read-only after I/O errors")
	h.group(full, "is full", "are full")
	h.group(draining, "is draining", "are draining")
	want := 0
	for n := range h.st.Copies {
		want = max(want, n)
	}
	for _, c := range slices.SortedFunc(maps.Keys(h.st.Codes), func(a, b catalog.Code) int { return cmp.Compare(a.Data+a.Parity, b.Data+b.Parity) }) {
		if n := c.Data + c.Parity; writable > 0 && writable < n {
			h.degraded = append(h.degraded, fmt.Sprintf("%d %s, some media want shards on %d: what they write is not encoded until then",
				writable, plural(writable, "node takes writes", "nodes take writes"), n))
			break
		}
	}
	if writable > 0 && writable < want {
		h.degraded = append(h.degraded, fmt.Sprintf("%d %s, some media want %d copies",
			writable, plural(writable, "node takes writes", "nodes take writes"), want))
	}
}

// group adds a reason that names the nodes.
func (h *judge) group(ids []atoll.NodeID, one, many string) {
	switch len(ids) {
	case 0:
	case 1:
		h.degraded = append(h.degraded, fmt.Sprintf("node %v (%s) %s", ids[0], h.st.Nodes[ids[0]].Host, one))
	default:
		h.degraded = append(h.degraded, fmt.Sprintf("nodes %v %s", ids, many))
	}
}

// moves tells of members that are lost and have no successor yet.
func (h *judge) moves() {
	lost := 0
	for _, set := range h.st.Copysets {
		for _, m := range set.Moves {
			if m.Why == catalog.MoveLost || m.Why == catalog.MoveErrors {
				lost++
				break
			}
		}
	}
	if lost > 0 {
		h.degraded = append(h.degraded, fmt.Sprintf("%d %s a copy less than wanted, which is being made anew", lost, plural(lost, "copyset has", "copysets have")))
	}
}

// copysets finds those of which no member can be read, or of shards too few.
func (h *judge) copysets() {
	dark, torn := 0, 0
	for _, set := range h.st.Copysets {
		readable := func(id atoll.NodeID) bool { return h.st.Nodes[id].Up && !h.st.Nodes[id].Report.Silent }
		n := 0
		for _, id := range set.Nodes {
			if readable(id) {
				n++
			}
		}
		if n == 0 {
			dark++
		} else if n < h.needs(len(set.Nodes)) {
			torn++
		}
	}
	if torn > 0 {
		h.critical = append(h.critical, fmt.Sprintf("%d %s of shards too few nodes that are up: what only they hold cannot be read",
			torn, plural(torn, "copyset has", "copysets have")))
	}
	if dark > 0 {
		h.critical = append(h.critical, fmt.Sprintf("%d %s no node that is up: what only they hold cannot be read",
			dark, plural(dark, "copyset has", "copysets have")))
	}
}

// needs returns how many members a set of so many needs at least for what it
// holds to be read: those of copies one.
func (h *judge) needs(size int) int {
	least := 0
	for c := range h.st.Codes {
		if c.Data+c.Parity == size && (least == 0 || c.Data < least) {
			least = c.Data
		}
	}
	if h.st.Copies[size] || size == defaultCopies || least == 0 {
		return 1
	}
	return least
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

func sortedNodes(st *catalog.State) []atoll.NodeID {
	ids := make([]atoll.NodeID, 0, len(st.Nodes))
	for id := range st.Nodes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}
