package medium

import (
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// fakeOwned returns a medium without cluster, for drafts.
func fakeOwned(segments int) *Medium {
	m := newMedium(Options{}.withDefaults(), 1, catalog.Head{Medium: 1, Epoch: 1, Next: atoll.Ordinal(segments + 1)})
	m.mu.man = &manifest{Medium: 1, Mark: Mark{Ordinal: 1, Seq: 1, Bulk: 1}}
	for o := atoll.Ordinal(1); int(o) <= segments; o++ {
		m.table.set(o, entry{State: stateLive, Copyset: 1, Length: 100})
		m.table.count(o, 1)
	}
	return m
}

// written lists the chunks that a draft writes, and adopts it.
func written(t *testing.T, m *Medium, ck *checkpoint) (chunks []int, d *draft) {
	t.Helper()
	d, err := m.draft(ck)
	if err != nil {
		t.Fatal(err)
	}
	for i := range d.chunks {
		if dc := &d.chunks[i]; dc.write {
			chunks = append(chunks, dc.index)
			dc.ref = Ref{Ordinal: 1, Copyset: 1, Block: 1, Blocks: 1, CRC: uint32(i)}
		}
	}
	d.refs()
	m.adopt(d, Ref{Ordinal: 1, Copyset: 1, Block: 2, Blocks: 1}, time.Time{})
	return chunks, d
}

// TestChunks: only chunks that changed are written, and those whose segments
// are all gone leave the table.
func TestChunks(t *testing.T) {
	const segments = 3*chunkEntries + 10
	m := fakeOwned(segments)
	if got, _ := written(t, m, &checkpoint{mark: Mark{Ordinal: segments, Seq: 9, Bulk: 1}}); len(got) != 4 {
		t.Fatalf("first manifest writes chunks %v", got)
	}
	if got, _ := written(t, m, nil); len(got) != 0 {
		t.Fatalf("nothing changed, and chunks %v are written", got)
	}
	m.table.count(chunkEntries+5, +1)
	if got, _ := written(t, m, nil); len(got) != 0 {
		t.Fatalf("without checkpoint counts stay, and chunks %v are written", got)
	}
	got, d := written(t, m, &checkpoint{mark: Mark{Ordinal: segments, Seq: 10, Bulk: 1}})
	if len(got) != 1 || got[0] != 1 {
		t.Fatalf("one count changed, and chunks %v are written", got)
	}
	if es := d.chunks[1].entries; es[4].Live != 2 {
		t.Fatalf("chunk has %+v", es[4])
	}
	// The manifest's own records keep segment 1 until they are elsewhere.
	for o := atoll.Ordinal(1); o <= chunkEntries; o++ {
		m.table.count(o, -1)
	}
	_, d = written(t, m, &checkpoint{mark: Mark{Ordinal: segments, Seq: 11, Bulk: 1}})
	if len(d.dropped) != chunkEntries-1 {
		t.Fatalf("%d segments dropped", len(d.dropped))
	}
	for o := atoll.Ordinal(1); o <= chunkEntries; o++ {
		m.table.at(o).setState(stateGone)
		m.table.at(o).own = 0
	}
	_, d = written(t, m, nil)
	if d.man.First != 1 || m.table.at(7) != nil || !m.table.gone(7) || m.table.at(chunkEntries+1) == nil {
		t.Fatalf("first chunk is %d, slot %v", d.man.First, m.table.at(7))
	}
}

// TestDropRule: each reason to keep a segment keeps it (M5).
func TestDropRule(t *testing.T) {
	mark := Mark{Ordinal: 5, Seq: 9, Bulk: 3}
	for _, c := range []struct {
		name string
		e    entry
		o    atoll.Ordinal
		live int
		hold int32
		own  int32
		drop bool
	}{
		{"dead", entry{State: stateLive}, 4, 0, 0, 0, true},
		{"dead bulk", entry{State: stateLive, Lane: catalog.Bulk}, 2, 0, 0, 0, true},
		{"at the mark", entry{State: stateLive}, 5, 0, 0, 0, false},
		{"bulk after the mark", entry{State: stateLive, Lane: catalog.Bulk}, 3, 0, 0, 0, false},
		{"live", entry{State: stateLive}, 4, 1, 0, 0, false},
		{"held", entry{State: stateLive}, 4, 0, 1, 0, false},
		{"manifest", entry{State: stateLive}, 4, 0, 0, 1, false},
		{"open", entry{State: stateOpen}, 4, 0, 0, 0, false},
	} {
		m := fakeOwned(0)
		m.table.set(c.o, c.e)
		m.table.count(c.o, c.live)
		s := m.table.at(c.o)
		s.hold.Store(c.hold)
		s.own = c.own
		if got := m.unused(&draft{man: manifest{Mark: mark}}, c.o, s, 0); got != c.drop {
			t.Errorf("%s: %v", c.name, got)
		}
		if m.unused(&draft{man: manifest{Mark: mark}}, c.o, s, 1) {
			t.Errorf("%s: dropped although the manifest counts a block", c.name)
		}
	}
}
