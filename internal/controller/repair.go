package controller

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// DefaultRepairAfter is how long a node may be down before its copies are made
// anew elsewhere.
const DefaultRepairAfter = 5 * time.Minute

const (
	// movesPerNode bounds the copysets that one node is to join at once.
	movesPerNode = 32
	// movesPerPlan bounds what one plan starts; the rest is for the next.
	movesPerPlan = 256
	// urgent is the grace when only one copy is left.
	urgent = 10 * time.Second
	// giveUp is how long the new member of a move may be down before another
	// one is chosen, if that is less than the time for old ones.
	giveUp = 30 * time.Second
)

// startMove and cancelMove are changes that the planner wants.
type startMove struct {
	set  catalog.Copyset
	move catalog.Move
}

type cancelMove struct {
	set catalog.Copyset
	id  atoll.NodeID // the new member
	why string
}

// repairPlan is what is to be done about members that are lost, failing or to
// be drained.
type repairPlan struct {
	Start  []startMove // the most endangered first
	Cancel []cancelMove
	Down   []catalog.Node // down, or up again, and not noted so
	Stuck  []atoll.CopysetID
}

// planRepair decides which members of copysets are to be replaced by which
// nodes. It is a pure function of the state and the time.
func planRepair(st *catalog.State, now time.Time, after time.Duration) repairPlan {
	r := newRepairer(st, now, after)
	for _, n := range r.nodes {
		if n.State != catalog.NodeRemoved && gone(n) == n.Down.IsZero() {
			r.out.Down = append(r.out.Down, n)
		}
	}
	var wants []want
	for _, set := range r.sets {
		if len(set.Moves) > 0 {
			r.review(set)
		}
		wants = append(wants, r.wants(set)...)
	}
	slices.SortStableFunc(wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.left, b.left), cmp.Compare(rank(a.why), rank(b.why)), cmp.Compare(a.set.ID, b.set.ID))
	})
	started := make(map[atoll.CopysetID]bool)
	for _, w := range wants {
		// One change of a set at a time; the next plan goes on with it.
		if len(r.out.Start) < movesPerPlan && !started[w.set.ID] && !r.changed[w.set.ID] {
			started[w.set.ID] = r.start(w)
		}
	}
	if len(wants) == 0 && len(r.out.Cancel) == 0 {
		r.balance()
	}
	return r.out
}

// want is a member to be replaced, or 0 for one to be added.
type want struct {
	set  catalog.Copyset
	old  atoll.NodeID
	why  catalog.MoveReason
	left int // members that can be read and are not on their way out
}

func rank(why catalog.MoveReason) int {
	return slices.Index([]catalog.MoveReason{catalog.MoveLost, catalog.MoveErrors, catalog.MoveDrain, catalog.MoveShort}, why)
}

// repairer holds one run of planRepair.
type repairer struct {
	st       *catalog.State
	now      time.Time
	after    time.Duration
	began    time.Time         // the start of the server that has run for longest
	nodes    []catalog.Node    // ascending
	sets     []catalog.Copyset // ascending
	copies   []int             // sizes of sets of copies that media want
	sizes    []int             // the same, and of shards
	incoming map[atoll.NodeID]int
	member   map[atoll.NodeID]int
	with     map[[2]atoll.NodeID]int // sets that two nodes share
	changed  map[atoll.CopysetID]bool
	out      repairPlan
}

func newRepairer(st *catalog.State, now time.Time, after time.Duration) *repairer {
	if after <= 0 {
		after = DefaultRepairAfter
	}
	r := &repairer{st: st, now: now, after: after, incoming: map[atoll.NodeID]int{}, member: map[atoll.NodeID]int{},
		with: map[[2]atoll.NodeID]int{}, changed: map[atoll.CopysetID]bool{}}
	for _, p := range st.Processes {
		if r.began.IsZero() || p.Started.Before(r.began) {
			r.began = p.Started
		}
	}
	active := 0
	for _, id := range sortedNodes(st) {
		r.nodes = append(r.nodes, st.Nodes[id])
		if st.Nodes[id].State == catalog.NodeActive {
			active++
		}
	}
	copies := []int{defaultCopies}
	for n := range st.Copies {
		copies = append(copies, n)
	}
	r.copies, r.sizes = sizes(active, copies, nil), sizes(active, copies, slices.Collect(maps.Keys(st.Codes)))
	for _, set := range st.Copysets {
		r.sets = append(r.sets, set)
		for _, m := range set.Moves {
			r.incoming[m.New]++
		}
		for i, a := range set.Nodes {
			r.member[a]++
			for _, b := range set.Nodes[:i] {
				r.with[[2]atoll.NodeID{min(a, b), max(a, b)}]++
			}
		}
	}
	slices.SortFunc(r.sets, func(a, b catalog.Copyset) int { return cmp.Compare(a.ID, b.ID) })
	return r
}

// gone reports whether a node does not answer, as far as is known.
func gone(n catalog.Node) bool { return !n.Up || n.Report.Silent }

// readable reports whether copies can be read from a node.
func readable(n catalog.Node) bool {
	return !gone(n) && n.State != catalog.NodeRemoved
}

// takes reports whether a node can take copies.
func takes(n catalog.Node) bool {
	return readable(n) && n.State == catalog.NodeActive && !n.Report.ReadOnly && !n.Report.Full && n.Report.Total > 0
}

// downFor reports whether a node has been known as down for so long. Time in
// which no server ran does not count: after a restart of the whole cluster some
// are up before others.
func (r *repairer) downFor(n catalog.Node, d time.Duration) bool {
	since := n.Down
	if r.began.After(since) {
		since = r.began
	}
	return gone(n) && !n.Down.IsZero() && r.now.Sub(since) >= d
}

// fate tells why a node should leave its copysets, "" if it should not. alone
// says that there is only one other copy of what it holds, or none.
func (r *repairer) fate(id atoll.NodeID, alone bool) catalog.MoveReason {
	n, is := r.st.Nodes[id]
	switch {
	case !is || n.State == catalog.NodeRemoved || r.downFor(n, r.after):
		return catalog.MoveLost
	case alone && r.downFor(n, min(r.after, urgent)):
		return catalog.MoveLost
	case n.State == catalog.NodeDraining:
		return catalog.MoveDrain
	case n.Up && n.Report.ReadOnly:
		return catalog.MoveErrors
	}
	return ""
}

// left counts the members of a set that can be read and stay.
func (r *repairer) left(set catalog.Copyset) (n int) {
	for _, id := range set.Nodes {
		if !set.Leaving(id) && readable(r.st.Nodes[id]) {
			n++
		}
	}
	return n
}

// wants lists the members of a set that are to be replaced.
func (r *repairer) wants(set catalog.Copyset) (out []want) {
	left, reads := r.left(set), 0
	for _, id := range set.Nodes {
		if readable(r.st.Nodes[id]) {
			reads++
		}
	}
	stay := len(set.Nodes)
	for _, m := range set.Moves {
		if m.Old != 0 {
			stay--
		}
	}
	for _, id := range set.Nodes {
		why := r.fate(id, reads <= 1 && len(set.Nodes) > 1)
		if why == "" || set.Leaving(id) {
			continue
		}
		// One member stays to vouch for what the set holds, and goes last.
		if reads == 0 || len(set.Nodes) > 1 && (stay <= 1 || left == 0) || len(set.Nodes) == 1 && !readable(r.st.Nodes[id]) {
			continue
		}
		if len(set.Nodes) > 1 && left == 1 && readable(r.st.Nodes[id]) {
			continue
		}
		out = append(out, want{set, id, why, left})
	}
	grow := slices.IndexFunc(r.copies, func(n int) bool { return n > len(set.Nodes) })
	if len(out) == 0 && len(set.Moves) == 0 && grow >= 0 && !slices.Contains(r.sizes, len(set.Nodes)) && left == len(set.Nodes) {
		out = append(out, want{set, 0, catalog.MoveShort, left})
	}
	return out
}

// review cancels moves that have no sense any more.
func (r *repairer) review(set catalog.Copyset) {
	for _, m := range set.Moves {
		to, old := r.st.Nodes[m.New], r.st.Nodes[m.Old]
		back := m.Old != 0 && readable(old) && old.State == catalog.NodeActive && !old.Report.ReadOnly
		why := ""
		switch {
		case to.State != catalog.NodeActive || r.downFor(to, min(r.after, giveUp)):
			why = "the new member cannot take it"
		case to.Up && (to.Report.ReadOnly || to.Report.Full):
			why = "the new member takes no writes"
		case back && m.Why == catalog.MoveDrain:
			why = "the old member is not to be drained any more"
		case back && (m.Why == catalog.MoveLost || m.Why == catalog.MoveErrors):
			why = "the old member is back"
		default:
			continue
		}
		r.out.Cancel = append(r.out.Cancel, cancelMove{set, m.New, why})
		r.changed[set.ID] = true
		return // one change of a set at a time
	}
}

// start chooses the new member; false if none can be had now.
func (r *repairer) start(w want) bool {
	stay := make([]atoll.NodeID, 0, atoll.MaxCopies)
	for _, id := range w.set.Nodes {
		if id != w.old && !w.set.Leaving(id) {
			stay = append(stay, id)
		}
	}
	for _, m := range w.set.Moves {
		stay = append(stay, m.New)
	}
	best, can := catalog.Node{}, false
	near := [2]int{atoll.MaxCopies, atoll.MaxCopies}
	for _, n := range r.nodes {
		if !takes(n) || slices.Contains(w.set.Nodes, n.ID) || slices.Contains(stay, n.ID) {
			continue
		}
		can = true
		switch d := r.nearness(stay, n); {
		case d[0] < near[0] || d[0] == near[0] && d[1] < near[1]:
			near, best = d, n
		case d == near && r.better(w, stay, n, best):
			best = n
		}
	}
	if !can {
		r.out.Stuck = append(r.out.Stuck, w.set.ID)
		return false
	}
	if r.incoming[best.ID] >= movesPerNode {
		return false // it has enough to do; the next plan comes when some of it is done
	}
	r.incoming[best.ID]++
	r.out.Start = append(r.out.Start, startMove{w.set, catalog.Move{Old: w.old, New: best.ID, Why: w.why, Since: r.now.UTC()}})
	return true
}

// nearness counts the nodes of a list in the rack of n, and on its host.
func (r *repairer) nearness(list []atoll.NodeID, n catalog.Node) (near [2]int) {
	for _, id := range list {
		if m := r.st.Nodes[id]; m.Rack == n.Rack {
			if n.Rack != "" {
				near[0]++
			}
			if m.Host == n.Host {
				near[1]++
			}
		}
	}
	return near
}

// better chooses between two nodes that are equally far from the others: the
// heir, then the one with less to do, more room, and less in common with them.
func (r *repairer) better(w want, stay []atoll.NodeID, a, b catalog.Node) bool {
	heir := r.st.Nodes[w.old].Heir
	if heir != 0 && (a.ID == heir) != (b.ID == heir) {
		return a.ID == heir
	}
	shared := func(id atoll.NodeID) (n int) {
		for _, m := range stay {
			n += r.with[[2]atoll.NodeID{min(m, id), max(m, id)}]
		}
		return n
	}
	return cmp.Or(
		cmp.Compare(r.incoming[a.ID], r.incoming[b.ID]),
		cmp.Compare(int(20*use(a)), int(20*use(b))),
		cmp.Compare(shared(a.ID), shared(b.ID)),
		cmp.Compare(mix(int(w.set.ID), a.ID), mix(int(w.set.ID), b.ID)),
	) < 0
}

// use is how much of a node is in use, without what is to go from it.
func use(n catalog.Node) float64 {
	if n.Report.Total <= 0 {
		return 1
	}
	return float64(n.Report.Total-n.Report.Free-n.Report.Stray) / float64(n.Report.Total)
}
