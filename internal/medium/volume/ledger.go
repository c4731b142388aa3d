package volume

import "github.com/atollstore/atoll/internal/atoll"

// ledger sums up by how much the live blocks of each segment changed between
// two versions of the map, and by how much the number of mapped pages did. A
// block that the map no longer names stays live when the version that the map
// grew from holds it, and blocks of ancestors' segments are not counted at all.
type ledger struct {
	chunks []*[ledgerChunk]int32 // by ordinal
	mapped int64
	own    atoll.Ordinal // segments below it are ancestors'
	held   horizon       // what the version holds that the map grew from
	// doom, while that version is being removed, counts what the map let go
	// of since and only that version holds. It is part of the truth only when
	// the removal succeeds.
	doom *ledger
}

// horizon tells which blocks of a map came from a version: data at earlier
// places of the log and pages of the map of epochs up to its own.
type horizon struct {
	at    atoll.Location
	epoch uint32
}

// data reports whether the version has a block of data that its heir has.
func (h horizon) data(loc atoll.Location) bool { return loc.Before(h.at) }

// page reports the same of a page of the map.
func (h horizon) page(birth uint32) bool { return birth <= h.epoch }

const ledgerChunk = 512

func newLedger() *ledger { return &ledger{} }

// heir returns an empty ledger with the same rules.
func (g *ledger) heir() *ledger { return &ledger{own: g.own, held: g.held} }

// add counts a page's location in. Holes do not count.
func (g *ledger) add(loc atoll.Location) {
	if loc != 0 {
		g.mapped++
		g.blocks(loc.Ordinal(), 1)
	}
}

// kill counts a page's location out.
func (g *ledger) kill(loc atoll.Location) {
	if loc == 0 {
		return
	}
	g.mapped--
	switch {
	case !g.held.data(loc):
		g.blocks(loc.Ordinal(), -1)
	case g.doom != nil && !g.doom.held.data(loc):
		g.doom.blocks(loc.Ordinal(), -1)
	}
}

// addNode counts blocks of map nodes and leaves in, which are no pages.
func (g *ledger) addNode(loc atoll.Location, blocks int) {
	if loc != 0 {
		g.blocks(loc.Ordinal(), blocks)
	}
}

// killNode counts blocks of a map node or leaf of epoch birth out.
func (g *ledger) killNode(loc atoll.Location, birth uint32, blocks int) {
	switch {
	case loc == 0:
	case !g.held.page(birth):
		g.blocks(loc.Ordinal(), -blocks)
	case g.doom != nil && !g.doom.held.page(birth):
		g.doom.blocks(loc.Ordinal(), -blocks)
	}
}

// blocks counts d blocks of a segment.
func (g *ledger) blocks(o atoll.Ordinal, d int) {
	if o < g.own {
		return
	}
	i := int(o / ledgerChunk)
	if i >= len(g.chunks) {
		g.chunks = append(g.chunks, make([]*[ledgerChunk]int32, i+1-len(g.chunks))...)
	}
	if g.chunks[i] == nil {
		g.chunks[i] = new([ledgerChunk]int32)
	}
	g.chunks[i][o%ledgerChunk] += int32(d)
}

// each calls fn for every segment whose count changed, in order.
func (g *ledger) each(fn func(o atoll.Ordinal, d int)) {
	for i, c := range g.chunks {
		if c == nil {
			continue
		}
		for k, d := range c {
			if d != 0 {
				fn(atoll.Ordinal(i*ledgerChunk+k), int(d))
			}
		}
	}
}

// fold adds another ledger to this one.
func (g *ledger) fold(o *ledger) {
	o.each(g.blocks)
	g.mapped += o.mapped
}

// sentence begins to count what is held only by the version that is going,
// whose own parent holds what above tells.
func (g *ledger) sentence(above horizon) {
	g.doom = &ledger{own: g.own, held: above}
}

// execute ends it: the version is gone.
func (g *ledger) execute() {
	g.held = g.doom.held
	g.fold(g.doom)
	g.doom = nil
}

// pardon ends it: the version stays.
func (g *ledger) pardon() { g.doom = nil }
