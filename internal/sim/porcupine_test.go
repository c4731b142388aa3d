package sim

import (
	"fmt"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/atollstore/atoll/internal/medium/volume"
)

// registerModel is a page as porcupine sees it: a register. Inputs are
// operations, outputs are what a read returned.
var registerModel = porcupine.Model{
	Init: func() any { return uint32(0) },
	Step: func(state, input, output any) (bool, any) {
		if o := input.(*op); o.kind != opRead {
			return true, o.val
		}
		return output.(uint32) == state.(uint32), state
	},
	DescribeOperation: func(input, _ any) string { return fmt.Sprint(input) },
}

// pageHistory returns what concerns a page, for porcupine. An operation whose
// outcome is unknown may take effect until its era ends; one that nobody has
// seen is left out.
func pageHistory(h *history, page int) []porcupine.Operation {
	clients := make(map[string]int)
	seen := lastSeen(h, page)
	var list []porcupine.Operation
	for _, o := range h.ops {
		if o.kind == opFlush || page < o.page || page >= o.page+o.pages {
			continue
		}
		if _, ok := seen[o.val]; o.ret == never && (o.kind == opRead || !ok) {
			continue
		}
		if _, ok := clients[o.client]; !ok {
			clients[o.client] = len(clients)
		}
		p := porcupine.Operation{ClientId: clients[o.client], Input: o, Call: int64(o.call), Return: int64(o.ret)}
		if o.ret == never && o.era.n+1 < len(h.eras) {
			p.Return = max(p.Call, int64(h.eras[o.era.n+1].opened))
		}
		if o.kind == opRead {
			p.Output = o.got[page-o.page]
		}
		list = append(list, p)
	}
	return list
}

// TestPorcupine has porcupine judge pages of writethrough runs, in which nothing
// that was seen may be lost, whatever happens. An undecided history is a
// failure.
func TestPorcupine(t *testing.T) {
	checked, ops := 0, 0
	for seed := range uint64(12) {
		cfg := newConfig(seed, takeovers)
		cfg.mode, cfg.pages = volume.Writethrough, 16
		r := run(t, cfg)
		if r.err != nil {
			t.Fatalf("seed %d: %v", seed, r.err)
		}
		for page := range cfg.pages {
			list := pageHistory(r.hist, page)
			if len(list) > 300 {
				continue
			}
			if got := porcupine.CheckOperationsTimeout(registerModel, list, 5*time.Second); got != porcupine.Ok {
				t.Fatalf("seed %d, page %d: %v\n%s", seed, page, got, story(r.hist, page))
			}
			checked, ops = checked+1, ops+len(list)
		}
	}
	t.Logf("%d pages, %d operations", checked, ops)
}

// TestPorcupineSees changes one read of a good history: both checkers must see it.
func TestPorcupineSees(t *testing.T) {
	cfg := newConfig(1, mixed)
	cfg.mode, cfg.pages = volume.Writethrough, 8
	r := run(t, cfg)
	if r.err != nil {
		t.Fatal(r.err)
	}
	found := 0
	for _, o := range r.hist.ops {
		if o.kind != opRead || o.ret == never || o.got[0] == 0 {
			continue
		}
		was := o.got[0]
		o.got[0] = older(r.hist, o)
		if o.got[0] != was {
			found++
			if checkPage(r.hist, o.page, true) == nil {
				t.Fatalf("%v instead of %d was not seen", o, was)
			}
			if porcupine.CheckOperationsTimeout(registerModel, pageHistory(r.hist, o.page), 5*time.Second) == porcupine.Ok {
				t.Fatalf("%v instead of %d was not seen by porcupine", o, was)
			}
		}
		o.got[0] = was
		if found == 10 {
			return
		}
	}
	t.Fatalf("only %d reads to change", found)
}
