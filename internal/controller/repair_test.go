package controller

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

// cluster is a state for plans: nodes that are well, each on a host of its own.
func cluster(nodes int) *catalog.State {
	st := &catalog.State{Nodes: map[atoll.NodeID]catalog.Node{}, Copysets: map[atoll.CopysetID]catalog.Copyset{}, Copies: map[int]bool{}}
	for i := 1; i <= nodes; i++ {
		id := atoll.NodeID(i)
		st.Nodes[id] = catalog.Node{ID: id, Host: fmt.Sprint("h", i), State: catalog.NodeActive, Up: true,
			Report: catalog.NodeReport{Total: 1000, Free: 500}}
	}
	return st
}

func set(st *catalog.State, id atoll.CopysetID, nodes ...atoll.NodeID) {
	st.Copysets[id] = catalog.Copyset{ID: id, Nodes: nodes, Version: 1, Rev: 1}
}

func change(st *catalog.State, id atoll.NodeID, fn func(*catalog.Node)) {
	n := st.Nodes[id]
	fn(&n)
	st.Nodes[id] = n
}

func down(st *catalog.State, id atoll.NodeID, ago time.Duration) {
	change(st, id, func(n *catalog.Node) { n.Up, n.Report, n.Down = false, catalog.NodeReport{}, noon.Add(-ago) })
}

// show writes a plan as text: "set old>new why", "cancel set new", "stuck set".
func show(p repairPlan) string {
	var out []string
	for _, s := range p.Start {
		out = append(out, fmt.Sprintf("%d %d>%d %s", s.set.ID, s.move.Old, s.move.New, s.move.Why))
	}
	for _, c := range p.Cancel {
		out = append(out, fmt.Sprintf("cancel %d %d", c.set.ID, c.id))
	}
	for _, id := range p.Stuck {
		out = append(out, fmt.Sprintf("stuck %d", id))
	}
	return strings.Join(out, ", ")
}

func TestPlanRepair(t *testing.T) {
	moving := func(st *catalog.State, id atoll.CopysetID, m catalog.Move) {
		s := st.Copysets[id]
		s.Moves, s.Retired = append(s.Moves, m), true
		st.Copysets[id] = s
	}
	for _, c := range []struct {
		name string
		make func(st *catalog.State)
		want string
	}{
		{"all is well", func(st *catalog.State) {}, ""},
		{"a node is down for less than the grace", func(st *catalog.State) { down(st, 3, 4*time.Minute) }, ""},
		{"and for more", func(st *catalog.State) { down(st, 3, 5*time.Minute) }, "1 3>5 lost"},
		{"it was removed", func(st *catalog.State) {
			down(st, 3, time.Second)
			change(st, 3, func(n *catalog.Node) { n.State = catalog.NodeRemoved })
		}, "1 3>5 lost"},
		{"only one copy is left: soon", func(st *catalog.State) { down(st, 3, 10*time.Second); down(st, 2, 10*time.Second) }, "1 2>5 lost"},
		{"as long as no server ran nothing counts", func(st *catalog.State) {
			down(st, 3, time.Hour)
			st.Processes = map[atoll.UUID]catalog.Process{{1}: {Started: noon.Add(-4 * time.Minute)}, {2}: {Started: noon}}
		}, ""},
		{"and then it does", func(st *catalog.State) {
			down(st, 3, time.Hour)
			st.Processes = map[atoll.UUID]catalog.Process{{1}: {Started: noon.Add(-5 * time.Minute)}, {2}: {Started: noon}}
		}, "1 3>5 lost"},
		{"nothing is left", func(st *catalog.State) {
			down(st, 1, time.Hour)
			down(st, 2, time.Hour)
			down(st, 3, time.Hour)
		}, ""},
		{"its disk reports errors: at once", func(st *catalog.State) {
			change(st, 3, func(n *catalog.Node) { n.Report.ReadOnly = true })
		}, "1 3>5 errors"},
		{"it is drained", func(st *catalog.State) { change(st, 3, func(n *catalog.Node) { n.State = catalog.NodeDraining }) }, "1 3>5 drain"},
		{"all but one are drained and one after the other replaced", func(st *catalog.State) {
			for i := range atoll.NodeID(3) {
				change(st, i+1, func(n *catalog.Node) { n.State = catalog.NodeDraining })
			}
			moving(st, 1, catalog.Move{Old: 1, New: 4})
			moving(st, 1, catalog.Move{Old: 2, New: 5})
		}, ""},
		{"the lost one before the drained one", func(st *catalog.State) {
			change(st, 2, func(n *catalog.Node) { n.State = catalog.NodeDraining })
			down(st, 3, time.Hour)
		}, "1 3>5 lost"},
		{"a node that is silent counts as down", func(st *catalog.State) {
			change(st, 3, func(n *catalog.Node) { n.Report.Silent, n.Down = true, noon.Add(-time.Hour) })
		}, "1 3>5 lost"},
		{"nobody can take it", func(st *catalog.State) {
			down(st, 3, time.Hour)
			change(st, 4, func(n *catalog.Node) { n.Report.Full = true })
			change(st, 5, func(n *catalog.Node) { n.Report.ReadOnly = true })
		}, "stuck 1"},
		{"not on the host of another member", func(st *catalog.State) {
			down(st, 3, time.Hour)
			change(st, 4, func(n *catalog.Node) { n.Host = "h1" })
		}, "1 3>5 lost"},
		{"if need be on the host of another member", func(st *catalog.State) {
			down(st, 3, time.Hour)
			change(st, 4, func(n *catalog.Node) { n.Host = "h1" })
			change(st, 5, func(n *catalog.Node) { n.Report.Full = true })
		}, "1 3>4 lost"},
		{"another rack before another host", func(st *catalog.State) {
			for id, rack := range map[atoll.NodeID]string{1: "a", 2: "b", 3: "c", 4: "a", 5: "c"} {
				change(st, id, func(n *catalog.Node) { n.Rack = rack })
			}
			down(st, 3, time.Hour)
		}, "1 3>5 lost"},
		{"the one with more room", func(st *catalog.State) {
			down(st, 3, time.Hour)
			change(st, 5, func(n *catalog.Node) { n.Report.Free = 900 })
		}, "1 3>5 lost"},
		{"the heir", func(st *catalog.State) {
			change(st, 3, func(n *catalog.Node) { n.State, n.Heir = catalog.NodeDraining, 5 })
			change(st, 4, func(n *catalog.Node) { n.Report.Free = 900 })
		}, "1 3>5 drain"},
		{"it is back", func(st *catalog.State) {
			moving(st, 1, catalog.Move{Old: 3, New: 4, Why: catalog.MoveLost})
		}, "cancel 1 4"},
		{"undrained, whatever was copied", func(st *catalog.State) {
			moving(st, 1, catalog.Move{Old: 3, New: 4, Why: catalog.MoveDrain})
		}, "cancel 1 4"},
		{"the new member is lost, too", func(st *catalog.State) {
			down(st, 3, time.Hour)
			down(st, 4, time.Minute)
			moving(st, 1, catalog.Move{Old: 3, New: 4, Why: catalog.MoveLost})
		}, "cancel 1 4"},
		{"two members have too few", func(st *catalog.State) { set(st, 2, 1, 2) }, "2 0>4 short"},
		{"two members, as some media want", func(st *catalog.State) { set(st, 2, 1, 2); st.Copies[2] = true }, ""},
		{"the most endangered first", func(st *catalog.State) {
			set(st, 1, 1, 2, 3)
			set(st, 2, 1, 3, 5)
			down(st, 3, time.Hour)
			down(st, 5, time.Minute)
		}, "2 3>4 lost, 1 3>4 lost"},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := cluster(5)
			set(st, 1, 1, 2, 3)
			c.make(st)
			got := show(planRepair(st, noon, 0))
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// Whatever is lost or drained, plans end with every copyset on nodes that are
// well, and never leave one without a member to copy from.
func TestPlansConverge(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 7))
		st := cluster(6 + rng.IntN(20))
		for _, nodes := range placement(slices.Collect(maps.Values(st.Nodes)), nil, []int{2, 3}).Make {
			set(st, atoll.CopysetID(len(st.Copysets)+1), nodes...)
		}
		for range rng.IntN(3) {
			down(st, atoll.NodeID(1+rng.IntN(len(st.Nodes))), time.Hour)
		}
		for range rng.IntN(3) {
			change(st, atoll.NodeID(1+rng.IntN(len(st.Nodes))), func(n *catalog.Node) { n.State = catalog.NodeDraining })
		}
		st.Copies[2] = true
		for round := 0; ; round++ {
			p := planRepair(st, noon, 0)
			if len(p.Stuck) > 0 {
				t.Fatalf("seed %d: stuck %v", seed, p.Stuck)
			}
			for _, s := range p.Start {
				next := st.Copysets[s.set.ID]
				next.Moves = append(slices.Clone(next.Moves), s.move)
				st.Copysets[next.ID] = next
			}
			if !finishSome(t, st, rng) && len(p.Start) == 0 {
				break
			}
			if round > 1000 {
				t.Fatalf("seed %d: no end", seed)
			}
		}
		for _, s := range st.Copysets {
			for _, id := range s.Nodes {
				if n := st.Nodes[id]; (!n.Up || n.State != catalog.NodeActive) && slices.ContainsFunc(s.Nodes, func(id atoll.NodeID) bool { return st.Nodes[id].Up }) {
					t.Fatalf("seed %d: copyset %d has members %v", seed, s.ID, s.Nodes)
				}
			}
		}
	}
}

// finishSome ends some moves, if there is a member to copy from.
func finishSome(t *testing.T, st *catalog.State, rng *rand.Rand) (any bool) {
	for _, id := range slices.Sorted(maps.Keys(st.Copysets)) {
		s := st.Copysets[id]
		for _, m := range slices.Clone(s.Moves) {
			any = true
			if rng.IntN(2) == 0 {
				continue
			}
			if !slices.ContainsFunc(s.Nodes, func(id atoll.NodeID) bool { return st.Nodes[id].Up }) {
				t.Fatalf("a move of copyset %d with nobody to copy from", id)
			}
			s.Moves = slices.DeleteFunc(slices.Clone(s.Moves), func(o catalog.Move) bool { return o.New == m.New })
			s.Nodes = append(slices.DeleteFunc(slices.Clone(s.Nodes), func(o atoll.NodeID) bool { return o == m.Old }), m.New)
		}
		st.Copysets[id] = s
	}
	return any
}

// Balance moves what the fullest node has most of, until the nodes are even, and
// stops then.
func TestBalance(t *testing.T) {
	st := cluster(6)
	bytes := map[atoll.CopysetID]int64{}
	id := atoll.CopysetID(0)
	for a := atoll.NodeID(1); a <= 5; a++ { // node 6 is new and empty
		for b := a + 1; b <= 5; b++ {
			for c := b + 1; c <= 5; c++ {
				id++
				set(st, id, a, b, c)
				bytes[id] = 100 + int64(id)
			}
		}
	}
	report := func() (low, high float64) {
		low, high = 1, 0
		for n := range st.Nodes {
			var sum int64
			var list []catalog.SetBytes
			for _, s := range st.Copysets {
				if slices.Contains(s.Nodes, n) {
					sum += bytes[s.ID]
					list = append(list, catalog.SetBytes{ID: s.ID, Bytes: bytes[s.ID]})
				}
			}
			slices.SortFunc(list, func(a, b catalog.SetBytes) int { return int(b.Bytes - a.Bytes) })
			change(st, n, func(n *catalog.Node) {
				n.Report = catalog.NodeReport{Total: 4000, Free: 4000 - sum, Sets: list}
				low, high = min(low, use(*n)), max(high, use(*n))
			})
		}
		return low, high
	}
	moves := 0
	for {
		low, high := report()
		p := planRepair(st, noon, 0)
		if len(p.Start) == 0 {
			t.Logf("%d moves, use %.2f to %.2f", moves, low, high)
			if high-low > 0.06 {
				t.Errorf("use %.2f to %.2f", low, high)
			}
			break
		}
		for _, s := range p.Start {
			next := st.Copysets[s.set.ID]
			next.Nodes = append(slices.DeleteFunc(slices.Clone(next.Nodes), func(o atoll.NodeID) bool { return o == s.move.Old }), s.move.New)
			st.Copysets[next.ID] = next
		}
		if moves++; moves > 10 {
			t.Fatal("more moves than needed")
		}
	}
	// Nothing is balanced while anything is to be repaired.
	st = cluster(4)
	set(st, 1, 1, 2, 3)
	change(st, 1, func(n *catalog.Node) {
		n.Report = catalog.NodeReport{Total: 1000, Free: 100, Sets: []catalog.SetBytes{{ID: 1, Bytes: 150}}}
	})
	if got := show(planRepair(st, noon, 0)); got != "1 1>4 balance" {
		t.Errorf("got %q", got)
	}
	down(st, 2, time.Minute)
	if got := show(planRepair(st, noon, 0)); got != "" {
		t.Errorf("with a node down: %q", got)
	}
}

func TestMayDrainAndRemove(t *testing.T) {
	st := cluster(4)
	set(st, 1, 1, 2, 3)
	for _, c := range []struct {
		what string
		err  error
		want error
	}{
		{"drain", MayDrain(st, 3, 0), nil},
		{"drain to an heir", MayDrain(st, 3, 4), nil},
		{"drain to itself", MayDrain(st, 3, 3), atoll.ErrInvalid},
		{"drain nobody", MayDrain(st, 9, 0), atoll.ErrNotExist},
		{"remove one in use", MayRemove(st, 3), atoll.ErrBusy},
		{"remove a spare", MayRemove(st, 4), nil},
	} {
		if !errors.Is(c.err, c.want) || (c.err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.what, c.err, c.want)
		}
	}
	down(st, 3, time.Second)
	if err := MayRemove(st, 3); err != nil {
		t.Errorf("remove one that is down: %v", err)
	}
	down(st, 2, time.Second)
	down(st, 1, time.Second)
	if err := MayRemove(st, 3); !errors.Is(err, atoll.ErrUnavailable) {
		t.Errorf("remove the last: %v", err)
	}
	if err := MayDrain(st, 3, 0); !errors.Is(err, atoll.ErrUnavailable) {
		t.Errorf("drain with nobody left: %v", err)
	}
	st = cluster(4)
	set(st, 1, 1, 2, 3)
	for i := range atoll.NodeID(4) {
		change(st, i+1, func(n *catalog.Node) { n.Report.Free = 100 })
	}
	if err := MayDrain(st, 3, 0); !errors.Is(err, atoll.ErrNoSpace) {
		t.Errorf("drain without room: %v", err)
	}
}
