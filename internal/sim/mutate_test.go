package sim

import (
	"testing"

	"github.com/atollstore/atoll/internal/medium/volume"
)

// TestCheckerSees changes one read of a good history: the checker must see it.
func TestCheckerSees(t *testing.T) {
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
		}
		o.got[0] = was
		if found == 10 {
			return
		}
	}
	t.Fatalf("only %d reads to change", found)
}

// older returns the value of a write to the read's page that was overwritten by
// another before the read began; the value that was read if there is none.
func older(h *history, r *op) uint32 {
	for _, a := range h.ops {
		if a.kind != opWrite || a.ret == never || r.page < a.page || r.page >= a.page+a.pages {
			continue
		}
		for _, b := range h.ops {
			if b.kind == opWrite && b.ret < r.call && b.call > a.ret && r.page >= b.page && r.page < b.page+b.pages {
				return a.val
			}
		}
	}
	return r.got[0]
}
