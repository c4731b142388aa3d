package controller

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

var rewrite = flag.Bool("rewrite", false, "rewrite testdata with what was seen")

// world is the cluster of a script.
type world struct {
	nodes map[atoll.NodeID]catalog.Node
	sets  map[atoll.CopysetID]catalog.Copyset
}

func newWorld() *world {
	return &world{map[atoll.NodeID]catalog.Node{}, map[atoll.CopysetID]catalog.Copyset{}}
}

// TestPlacementScript runs testdata/placement.txt: commands, a line of dashes,
// and what the last "place" decided.
func TestPlacementScript(t *testing.T) {
	const path = "testdata/placement.txt"
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld()
	var seen []string
	for _, part := range strings.Split(strings.TrimSpace(string(raw)), "\n\n") {
		script, want, _ := strings.Cut(part+"\n", "----\n")
		var got strings.Builder
		for line := range strings.Lines(script) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				got.WriteString(w.run(t, strings.Fields(line)))
			}
		}
		if strings.TrimSpace(got.String()) != strings.TrimSpace(want) {
			if !*rewrite {
				t.Errorf("%s\ngot:\n%swant:\n%s", script, got.String(), want)
			}
		}
		seen = append(seen, strings.TrimSpace(script+"----\n"+got.String()))
	}
	if *rewrite {
		if err := os.WriteFile(path, []byte(strings.Join(seen, "\n\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func (w *world) run(t *testing.T, f []string) string {
	t.Helper()
	switch f[0] {
	case "reset":
		*w = *newWorld()
	case "nodes":
		n := catalog.Node{Host: "h", State: catalog.NodeActive, Up: true}
		for _, opt := range f[2:] {
			key, value, _ := strings.Cut(opt, "=")
			if key == "host" {
				n.Host = value
			} else {
				n.Rack = value
			}
		}
		from, to, many := strings.Cut(f[1], "-")
		if !many {
			to = from
		}
		for n.ID = node(t, from); n.ID <= node(t, to); n.ID++ {
			w.nodes[n.ID] = n
		}
	case "set":
		w.add(ids(t, f[1:]))
	case "down", "up", "drain", "active", "remove":
		n := w.nodes[node(t, f[1])]
		switch f[0] {
		case "down", "up":
			n.Up = f[0] == "up"
		default:
			n.State = map[string]catalog.NodeState{"drain": catalog.NodeDraining,
				"active": catalog.NodeActive, "remove": catalog.NodeRemoved}[f[0]]
		}
		w.nodes[n.ID] = n
	case "place":
		var copies []int
		for _, s := range f[1:] {
			copies = append(copies, int(node(t, s)))
		}
		return w.place(copies)
	default:
		t.Fatalf("unknown command %q", f)
	}
	return ""
}

func node(t *testing.T, s string) atoll.NodeID {
	t.Helper()
	v, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return atoll.NodeID(v)
}

func ids(t *testing.T, f []string) (out []atoll.NodeID) {
	for _, s := range f {
		out = append(out, node(t, s))
	}
	return out
}

// add makes a set, or revives it.
func (w *world) add(nodes []atoll.NodeID) {
	for id, s := range w.sets {
		if slices.Equal(s.Nodes, nodes) {
			s.Retired = false
			w.sets[id] = s
			return
		}
	}
	id := atoll.CopysetID(len(w.sets) + 1)
	w.sets[id] = catalog.Copyset{ID: id, Nodes: nodes, Version: 1}
}

func (w *world) plan(copies []int) plan {
	return placement(slices.Collect(maps.Values(w.nodes)), slices.Collect(maps.Values(w.sets)), copies)
}

func (w *world) place(copies []int) string {
	var out strings.Builder
	p := w.plan(copies)
	for _, id := range p.Retire {
		s := w.sets[id]
		s.Retired = true
		w.sets[id] = s
		fmt.Fprintln(&out, "retire", strings.Trim(fmt.Sprint(s.Nodes), "[]"))
	}
	for _, nodes := range p.Make {
		w.add(nodes)
		fmt.Fprintln(&out, "make", strings.Trim(fmt.Sprint(nodes), "[]"))
	}
	return out.String()
}

// settle plans until nothing is left to do.
func (w *world) settle(t *testing.T, copies []int) (made, retired int) {
	t.Helper()
	for range 1000 {
		p := w.plan(copies)
		if len(p.Make)+len(p.Retire) == 0 {
			if p.More {
				t.Fatal("a plan with nothing to do that goes on")
			}
			return made, retired
		}
		w.place(copies)
		made, retired = made+len(p.Make), retired+len(p.Retire)
	}
	t.Fatal("placement does not settle")
	return 0, 0
}

// check holds the sets that take segments to what placement promises.
func (w *world) check(t *testing.T, size int) (least, most int) {
	t.Helper()
	in := map[atoll.NodeID]int{}
	hosts := map[string]bool{}
	for _, n := range w.nodes {
		if n.State == catalog.NodeActive {
			in[n.ID] = 0
			hosts[n.Host] = true
		}
	}
	for _, s := range w.sets {
		if s.Retired || len(s.Nodes) != size {
			continue
		}
		apart := map[string]bool{}
		for _, id := range s.Nodes {
			if _, is := in[id]; !is {
				t.Fatalf("set %v has node %v, which is not active", s, id)
			}
			in[id]++
			apart[w.nodes[id].Host] = true
		}
		if len(hosts) >= size && len(apart) != size {
			t.Fatalf("set %v has two copies on a host", s)
		}
	}
	counts := slices.Sorted(maps.Values(in))
	return counts[0], counts[len(counts)-1]
}

// TestPlacementLarge grows, shrinks and drains a cluster of many nodes.
func TestPlacementLarge(t *testing.T) {
	w := newWorld()
	for i := atoll.NodeID(1); i <= 200; i++ {
		w.nodes[i] = catalog.Node{ID: i, Host: fmt.Sprint("h", i%40), Rack: fmt.Sprint("r", i%40/10), State: catalog.NodeActive, Up: true}
	}
	made, _ := w.settle(t, []int{3})
	least, most := w.check(t, 3)
	t.Logf("200 nodes: %d sets, a node is in %d to %d", made, least, most)
	if least < 10 || most > 12 || made > 700 {
		t.Errorf("200 nodes: %d sets, a node is in %d to %d", made, least, most)
	}
	partners := map[atoll.NodeID]map[atoll.NodeID]bool{}
	for _, s := range w.sets {
		racks := map[string]bool{}
		for _, id := range s.Nodes {
			racks[w.nodes[id].Rack] = true
			if partners[id] == nil {
				partners[id] = map[atoll.NodeID]bool{}
			}
			for _, other := range s.Nodes {
				partners[id][other] = true
			}
		}
		if len(racks) != 3 {
			t.Fatalf("set %v is not on three racks", s)
		}
	}
	for id, p := range partners {
		if len(p) < 14 || len(p) > 26 {
			t.Errorf("node %v shares segments with %d others", id, len(p)-1)
		}
	}
	w.nodes[201] = catalog.Node{ID: 201, Host: "new", Rack: "r0", State: catalog.NodeActive, Up: true}
	made, retired := w.settle(t, []int{3})
	if made > 12 || retired != 0 {
		t.Errorf("one new node: %d sets made, %d retired", made, retired)
	}
	n := w.nodes[7]
	n.State = catalog.NodeRemoved
	w.nodes[7] = n
	made, retired = w.settle(t, []int{3})
	if made > 12 || retired < 10 || retired > 14 {
		t.Errorf("one node removed: %d sets made, %d retired", made, retired)
	}
	w.check(t, 3)
}

// TestPlacementRandom changes clusters at random: plans settle, keep copies
// apart, and do not depend on the order of their input.
func TestPlacementRandom(t *testing.T) {
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 7))
		w := newWorld()
		for range 12 {
			id := atoll.NodeID(rng.IntN(14) + 1)
			w.nodes[id] = catalog.Node{ID: id, Host: fmt.Sprint("h", rng.IntN(6)), Up: rng.IntN(5) > 0,
				State: []catalog.NodeState{catalog.NodeActive, catalog.NodeActive, catalog.NodeActive, catalog.NodeDraining}[rng.IntN(4)]}
			a, b := w.plan([]int{2, 3}), w.plan([]int{3, 2, 3})
			if fmt.Sprint(a) != fmt.Sprint(b) {
				t.Fatalf("seed %d: %v and %v", seed, a, b)
			}
			w.settle(t, []int{2, 3})
			if len(w.nodes) > 3 && rng.IntN(3) == 0 {
				for _, n := range w.nodes {
					n.Up = true
					w.nodes[n.ID] = n
				}
				w.settle(t, []int{2, 3})
				active := 0
				for _, n := range w.nodes {
					if n.State == catalog.NodeActive {
						active++
					}
				}
				if active >= 3 {
					if least, _ := w.check(t, 3); least == 0 {
						t.Fatalf("seed %d: a node is in no set: %+v", seed, w)
					}
				}
			}
		}
	}
}

func BenchmarkPlacement(b *testing.B) {
	w := newWorld()
	for i := atoll.NodeID(1); i <= 1000; i++ {
		w.nodes[i] = catalog.Node{ID: i, Host: fmt.Sprint("h", i%100), State: catalog.NodeActive, Up: true}
	}
	for w.place([]int{3}) != "" {
	}
	for b.Loop() {
		w.plan([]int{3})
	}
}
