//go:build atollbugs

package sim

import (
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium/volume"
	"github.com/atollstore/atoll/internal/stream"
)

// knownBug is a mistake that the suite must find within so many seeds. The
// scheduler has a say in what a seed does, so there are several times as many
// as are usually needed.
type knownBug struct {
	name   string
	bugs   stream.Bugs
	lies   []host.Rule
	family family
	within int
}

// The two mistakes of a node are made below it: a disk that does not do the
// syncs or writes of some files is, seen from outside, a node that answers
// before them. The event loop in package stream looks for these and more in the
// cores alone.
var knownBugs = []knownBug{
	{name: "acknowledge before fsync", lies: []host.Rule{{Ops: host.OpSync, Path: "*.seg", Drop: true}}, family: blackouts, within: 100},
	{name: "fence not durable", lies: []host.Rule{{Ops: host.OpWrite, Path: "states", Drop: true}}, family: zombies, within: 300},
	{name: "recovery does not fence", bugs: stream.Bugs{NoFence: true}, family: zombies, within: 150},
	{name: "no write-back after recovery", bugs: stream.Bugs{NoWriteBack: true}, family: takeovers, within: 300},
	{name: "shortest prefix", bugs: stream.Bugs{Shortest: true}, family: rotting, within: 500},
	{name: "silent copies not listed", bugs: stream.Bugs{DropSilent: true}, family: takeovers, within: 300},
}

// TestKnownBugs switches on one known mistake after another and fails if the
// seeds do not show it.
func TestKnownBugs(t *testing.T) {
	factor := 1
	if s := os.Getenv("ATOLL_SIM_SEEDS"); s != "" {
		factor, _ = strconv.Atoi(s)
	}
	for _, b := range knownBugs {
		t.Run(b.name, func(t *testing.T) {
			stream.SetBugs(b.bugs)
			defer stream.SetBugs(stream.Bugs{})
			began := time.Now()
			for seed := range uint64(b.within * factor) {
				r := run(t, b.config(seed))
				if r.err != nil {
					t.Logf("found by seed %d after %v: %.500v", seed, time.Since(began).Round(time.Millisecond), r.err)
					b.without(t, seed)
					return
				}
			}
			t.Errorf("not found by %d seeds in %v", b.within*factor, time.Since(began))
		})
	}
}

func (b knownBug) config(seed uint64) config {
	c := newConfig(seed, b.family)
	c.lies, c.mode = b.lies, volume.Writethrough
	c.pauseMs, c.clients = 3, 3
	return c
}

// without runs a seed without the mistake: it must find nothing.
func (b knownBug) without(t *testing.T, seed uint64) {
	stream.SetBugs(stream.Bugs{})
	cfg := b.config(seed)
	cfg.lies = nil
	if r := run(t, cfg); r.err != nil {
		t.Errorf("seed %d fails without the mistake too: %v", seed, r.err)
	}
}
