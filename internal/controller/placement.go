package controller

import (
	"cmp"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

const (
	// smallCluster is the number of nodes up to which all legal sets are made.
	smallCluster = 6
	// scatter is with how many others a node shares segments, about: a larger
	// one repairs a lost disk from more sources, a smaller one makes it less
	// likely that several lost disks were all the copies of something.
	scatter = 20
	// maxPlan is how many sets one plan makes; the rest is for the next.
	maxPlan = 256
)

// plan is what placement wants changed.
type plan struct {
	Make   [][]atoll.NodeID // in the order of making; members ascending
	Retire []atoll.CopysetID
	More   bool // the plan was cut off
}

// placement decides which copysets to make and which to retire, so that every
// active node that is up is in enough sets of each size. It is a pure function of its
// arguments, independent of their order. Sets that are good stay as they are
// whatever nodes come and go. copies lists the sizes that media want; a cluster
// with fewer nodes gets sets of all its nodes instead. codes lists the codes that
// media want, for which there are sets only when there are nodes enough.
func placement(nodes []catalog.Node, sets []catalog.Copyset, copies []int, codes ...catalog.Code) plan {
	p := newPlacer(nodes, sets)
	for _, set := range p.sets {
		if !set.Retired && p.retires(set, copies, codes) {
			p.out.Retire = append(p.out.Retire, set.ID)
		}
	}
	for _, size := range sizes(len(p.nodes), copies, codes) {
		p.fill(size)
	}
	return p.out
}

// sizes returns the sizes of sets to make, ascending.
func sizes(nodes int, copies []int, codes []catalog.Code) []int {
	var out []int
	for _, n := range copies {
		if n = min(n, nodes, atoll.MaxCopies); n > 0 {
			out = append(out, n)
		}
	}
	for _, c := range codes {
		if n := c.Data + c.Parity; n <= nodes {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// placer holds one run of placement.
type placer struct {
	nodes  []catalog.Node // active ones, ascending
	byID   map[atoll.NodeID]int
	sets   []catalog.Copyset // ascending
	allUp  bool
	limits map[int]limit
	out    plan
}

// limit is how many members of a set may be on one host and in one rack.
type limit struct{ host, rack int }

func newPlacer(nodes []catalog.Node, sets []catalog.Copyset) *placer {
	p := &placer{byID: make(map[atoll.NodeID]int), allUp: true, limits: make(map[int]limit)}
	for _, n := range nodes {
		if n.State == catalog.NodeActive {
			p.nodes = append(p.nodes, n)
			p.allUp = p.allUp && n.Up
		}
	}
	slices.SortFunc(p.nodes, func(a, b catalog.Node) int { return cmp.Compare(a.ID, b.ID) })
	for i, n := range p.nodes {
		p.byID[n.ID] = i
	}
	p.sets = slices.SortedFunc(slices.Values(sets), func(a, b catalog.Copyset) int { return cmp.Compare(a.ID, b.ID) })
	return p
}

// limit returns the strictest limits under which a set of this size exists:
// different racks if there are enough, else different hosts, else as even as
// can be.
func (p *placer) limit(size int) limit {
	if l, is := p.limits[size]; is {
		return l
	}
	hosts := make(map[[2]string]int)
	for _, n := range p.nodes {
		hosts[[2]string{n.Rack, n.Host}]++
	}
	l := limit{1, 1}
	for ; l.host < size; l.host++ {
		sum := 0
		for _, n := range hosts {
			sum += min(n, l.host)
		}
		if sum >= size {
			break
		}
	}
	racks := make(map[string]int)
	for key, n := range hosts {
		racks[key[0]] += min(n, l.host)
	}
	for ; l.rack < size; l.rack++ {
		sum := 0
		for _, n := range racks {
			sum += min(n, l.rack)
		}
		if sum >= size {
			break
		}
	}
	p.limits[size] = l
	return l
}

// fits reports whether node i may join the members.
func (p *placer) fits(members []int, i int, l limit) bool {
	host, rack := 0, 0
	for _, m := range members {
		if m == i {
			return false
		}
		if p.nodes[m].Rack == p.nodes[i].Rack {
			rack++
			if p.nodes[m].Host == p.nodes[i].Host {
				host++
			}
		}
	}
	return host < l.host && rack < l.rack
}

// members translates a set to indexes; false if one is not active.
func (p *placer) members(set catalog.Copyset) ([]int, bool) {
	out := make([]int, 0, len(set.Nodes))
	for _, id := range set.Nodes {
		i, is := p.byID[id]
		if !is {
			return nil, false
		}
		out = append(out, i)
	}
	return out, true
}

// legal reports whether the set keeps its members as far apart as they can be.
func (p *placer) legal(members []int) bool {
	l := p.limit(len(members))
	for k, i := range members {
		if !p.fits(members[:k], i, l) {
			return false
		}
	}
	return true
}

// retires reports whether a set is to take no new segments: a member is not
// active, or its members are closer together than they need be. The latter is
// let be while a node is down, for a writer may have had no other choice.
func (p *placer) retires(set catalog.Copyset, copies []int, codes []catalog.Code) bool {
	members, active := p.members(set)
	if !active {
		return true
	}
	return p.allUp && slices.Contains(sizes(len(p.nodes), copies, codes), len(members)) && !p.legal(members)
}

// fill adds sets of one size until every node is in enough.
func (p *placer) fill(size int) {
	f := &filler{p: p, size: size, in: make([]int, len(p.nodes)), with: make(map[[2]int]int), have: make(map[[atoll.MaxShards]int]bool)}
	var retired [][]int
	for _, set := range p.sets {
		members, active := p.members(set)
		if !active || len(members) != size || len(set.Moves) > 0 || !p.legal(members) {
			continue
		}
		slices.Sort(members)
		if set.Retired {
			retired = append(retired, members)
		} else {
			f.count(members)
		}
	}
	if len(p.nodes) <= smallCluster {
		f.all(nil, 0)
		return
	}
	for _, members := range retired { // of nodes that were away for a while, or of a set beside another one
		down := func(i int) bool { return !f.p.nodes[i].Up }
		if slices.ContainsFunc(members, f.wants) && !slices.ContainsFunc(members, down) {
			f.add(members)
		}
	}
	f.grow()
}

// filler makes the sets of one size.
type filler struct {
	p    *placer
	size int
	in   []int          // sets that each node is in
	with map[[2]int]int // sets that two nodes share
	have map[[atoll.MaxShards]int]bool
}

// target is how many sets a node should be in.
func (f *filler) target() int {
	if f.size == 1 {
		return 1
	}
	return (min(scatter, len(f.p.nodes)-1) + f.size - 2) / (f.size - 1)
}

func (f *filler) wants(i int) bool { return f.in[i] < f.target() }

// count enters a set that exists.
func (f *filler) count(members []int) {
	f.have[setKey(members)] = true
	for k, i := range members {
		f.in[i]++
		for _, j := range members[:k] {
			f.with[[2]int{min(i, j), max(i, j)}]++
		}
	}
}

func setKey(members []int) (key [atoll.MaxShards]int) {
	for k, i := range members {
		key[k] = i + 1
	}
	return key
}

// add wants a set made, unless it exists or the plan is long enough.
func (f *filler) add(members []int) bool {
	if f.have[setKey(members)] {
		return false
	}
	if len(f.p.out.Make) >= maxPlan {
		f.p.out.More = true
		return false
	}
	f.count(members)
	ids := make([]atoll.NodeID, len(members))
	for k, i := range members {
		ids[k] = f.p.nodes[i].ID
	}
	f.p.out.Make = append(f.p.out.Make, ids)
	return true
}

// all adds every legal set, in lexical order.
func (f *filler) all(members []int, from int) {
	if len(members) == f.size {
		f.add(members)
		return
	}
	for i := from; i < len(f.p.nodes); i++ {
		if f.p.nodes[i].Up && f.p.fits(members, i, f.p.limit(f.size)) {
			f.all(append(slices.Clip(members), i), i+1)
		}
	}
}

// grow makes sets around the node that is in the fewest, with others that are in
// few: like cutting a permutation of the nodes into groups, again and again,
// except that it can go on from any state.
func (f *filler) grow() {
	stuck := make([]bool, len(f.p.nodes))
	for {
		first := -1
		for i := range f.p.nodes {
			if f.p.nodes[i].Up && f.wants(i) && !stuck[i] && (first < 0 || f.in[i] < f.in[first]) {
				first = i
			}
		}
		if first < 0 || f.p.out.More {
			return
		}
		if members := f.around(first); members == nil || !f.add(members) {
			stuck[first] = true
		}
	}
}

// around chooses the other members of a set; nil if there are too few.
func (f *filler) around(first int) []int {
	members := []int{first}
	l := f.p.limit(f.size)
	for len(members) < f.size {
		best := -1
		for i := range f.p.nodes {
			if f.p.nodes[i].Up && f.p.fits(members, i, l) && (best < 0 || f.better(members, i, best)) {
				best = i
			}
		}
		if best < 0 {
			return nil
		}
		members = append(members, best)
	}
	slices.Sort(members)
	return members
}

// better prefers the node in fewer sets, then the one less acquainted with the
// members, then by a hash, lest neighbours always meet.
func (f *filler) better(members []int, i, best int) bool {
	shared := func(i int) (n int) {
		for _, m := range members {
			n += f.with[[2]int{min(i, m), max(i, m)}]
		}
		return n
	}
	round := f.in[members[0]]
	return cmp.Or(
		cmp.Compare(f.in[i], f.in[best]),
		cmp.Compare(shared(i), shared(best)),
		cmp.Compare(mix(round, f.p.nodes[i].ID), mix(round, f.p.nodes[best].ID)),
	) < 0
}

// mix is a hash (splitmix64) of a round and a node.
func mix(round int, id atoll.NodeID) uint64 {
	x := uint64(round)<<32 + uint64(id) + 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
