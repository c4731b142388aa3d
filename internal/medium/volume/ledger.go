package volume

import "github.com/atollstore/atoll/internal/atoll"

// ledger sums up by how much the live blocks of each segment changed between
// two versions of the map, and by how much the number of mapped pages did.
type ledger struct {
	chunks []*[ledgerChunk]int32 // by ordinal
	mapped int64
}

const ledgerChunk = 512

func newLedger() *ledger { return &ledger{} }

// add counts a page's location in (d = 1) or out (d = -1). Holes do not count.
func (g *ledger) add(loc atoll.Location, d int) {
	if loc == 0 {
		return
	}
	g.mapped += int64(d)
	g.blocks(loc.Ordinal(), d)
}

// node counts blocks of map nodes and leaves, which are no pages.
func (g *ledger) node(loc atoll.Location, blocks int) {
	if loc != 0 {
		g.blocks(loc.Ordinal(), blocks)
	}
}

// blocks counts d blocks of a segment.
func (g *ledger) blocks(o atoll.Ordinal, d int) {
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
