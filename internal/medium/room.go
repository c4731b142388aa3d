package medium

import (
	"cmp"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Room is what space there is for the next segments of a medium, in bytes of one
// copy, on the fullest node that they need if they get those with the most room.
type Room struct {
	Total   int64 // of that node; 0 when no node has reported
	Free    int64 // for new segments, up to the high-water mark; below 0 beyond it
	Open    int64 // what open segments of the hot lane have left
	Coming  int64 // what compacted and dropped segments give back when their grace times end
	Segment int64 // a segment
}

// Room returns what space there is. It follows what the medium itself writes and
// frees at once, and what others do within a second or so.
func (m *Medium) Room() Room {
	r, _ := m.room()
	return r
}

// Pressure returns how full the cluster is for this medium, 0 to 1: used over
// total bytes of the node that Room tells of. At 0.95 (atoll.HighWaterPercent)
// there is no room for another segment. 0 when no node has reported.
func (m *Medium) Pressure() float64 {
	_, p := m.room()
	return p
}

func (m *Medium) room() (Room, float64) {
	const mark = atoll.HighWaterPercent / 100.
	policy := m.policy()
	size := int64(policy.Segment) * atoll.BlockSize
	type node struct{ total, free int64 }
	var list []node
	seen := int64(0) // changes with every report
	for id, n := range m.opts.Catalog.State().Nodes {
		r := n.Report
		if n.State != catalog.NodeActive || !n.Up || r.Total <= 0 {
			continue
		}
		seen += r.At.UnixNano() + r.Free*int64(id)
		free := r.Free - r.Total/100*(100-atoll.HighWaterPercent)
		if r.Full {
			free = min(free, 0)
		}
		list = append(list, node{r.Total, free})
	}
	if len(list) == 0 {
		return Room{Segment: size}, 0
	}
	slices.SortFunc(list, func(a, b node) int { return cmp.Compare(b.free, a.free) })
	copies := min(len(list), max(policy.Replicas, 1))
	n := list[copies-1]
	n.free -= m.grown(seen) * int64(copies) / int64(len(list))
	r := Room{Total: n.total, Free: n.free, Open: m.unfilled(), Coming: m.coming(), Segment: size}
	used := mark*float64(n.total) - float64(n.free)
	last := mark*float64(n.total) - float64(min(size, n.total/4))
	return r, min(max(mark*used/last, 0), 1)
}

// unfilled returns what the open segments of the hot lane have left.
func (m *Medium) unfilled() (left int64) {
	w := m.lanes[catalog.Hot].w.Load()
	if w == nil {
		return 0
	}
	tail, _ := w.Tail()
	for _, u := range m.own.head().Unsealed {
		if u.Lane == catalog.Hot && u.Seg.Ordinal >= tail.Ordinal {
			left += u.Size.Bytes()
			if u.Seg.Ordinal == tail.Ordinal {
				left -= min(tail.Block, u.Size).Bytes()
			}
		}
	}
	return left
}

// coming returns what segments take that nodes are about to remove. What a node
// did not remove when it was told to does not count.
func (m *Medium) coming() (sum int64) {
	usual := m.usual()
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for _, d := range m.mu.doomed {
		s := m.table.at(d.ordinal)
		if s == nil || d.failed || now.Sub(d.due) >= m.opts.Grace {
			continue
		}
		if st, _, _ := s.get(); st == stateDropped || st == stateVirtual && !m.table.removed(d.ordinal) {
			sum += s.taken(usual).Bytes()
		}
	}
	return sum
}

// grown returns by how much more the medium's segments take, one copy, than when
// the reports of nodes were first seen that are in force: they come once a
// second, and much can be written in one.
func (m *Medium) grown(seen int64) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.taken.Load()
	if m.mu.reports != seen {
		m.mu.reports, m.mu.reported = seen, now
	}
	return now - m.mu.reported
}
