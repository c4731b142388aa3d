package volume

import (
	"flag"
	"math/rand/v2"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

var seedFlag = flag.Uint64("seed", 0, "run only this seed")

// seeds calls fn for n seeds, or the one asked for.
func seeds(t *testing.T, n uint64, fn func(t *testing.T, seed uint64)) {
	if *seedFlag != 0 {
		fn(t, *seedFlag)
		return
	}
	for s := uint64(1); s <= n; s++ {
		fn(t, s)
		if t.Failed() {
			t.Fatalf("repeat with -seed=%d", s)
		}
	}
}

// treeModel holds a tree against a plain table, with the log as maps and with
// live counts kept from scratch.
type treeModel struct {
	t       *testing.T
	rng     *rand.Rand
	tree    *tree
	want    []atoll.Location
	leaves  map[atoll.Location][]byte
	nodes   map[atoll.Location]node
	next    uint64
	live    map[atoll.Ordinal]int // given out so far
	mapped  int64
	frozen  []*version
	frozenW [][]atoll.Location
}

func (m *treeModel) loc() atoll.Location {
	m.next++
	return atoll.MakeLocation(atoll.Ordinal(m.next/40+1), atoll.BlockNo(m.next%40), uint16(m.next*77))
}

func (m *treeModel) load(w want) {
	if w.node {
		nd := m.nodes[w.loc]
		if !m.tree.installNode(w.idx, w.loc, &nd) {
			m.t.Fatalf("node %d at %v was asked for and not taken", w.idx, w.loc)
		}
		return
	}
	if !m.tree.installLeaf(w.idx, w.loc, decodeLeaf(m.leaves[w.loc])) {
		m.t.Fatalf("leaf %d at %v was asked for and not taken", w.idx, w.loc)
	}
}

func (m *treeModel) prepare(p pageNo, n uint64) {
	for w := m.tree.needNodes(p, n); !w.none(); w = m.tree.needNodes(p, n) {
		m.load(w)
	}
}

func (m *treeModel) read(p pageNo, n int) {
	out := make([]atoll.Location, n)
	for q, rest := p, out; len(rest) > 0; {
		k, w := m.tree.lookup(q, rest)
		q, rest = q+pageNo(k), rest[k:]
		if !w.none() {
			m.load(w)
		}
	}
	for i := range out {
		if out[i] != m.want[int(p)+i] {
			m.t.Fatalf("page %d is at %v, want %v", int(p)+i, out[i], m.want[int(p)+i])
		}
	}
}

// span returns a random range, small ones in a few places more often.
func (m *treeModel) span() (pageNo, int) {
	n := len(m.want)
	p := m.rng.IntN(n)
	if m.rng.IntN(3) > 0 {
		p = (p % 7) * n / 7
	}
	size := 1 + m.rng.IntN(8)
	switch m.rng.IntN(10) {
	case 0:
		size = 1 + m.rng.IntN(3000)
	case 1:
		p, size = p/fan*fan, fan
	}
	return pageNo(p), min(size, n-p)
}

func (m *treeModel) step() {
	p, n := m.span()
	switch m.rng.IntN(12) {
	case 0, 1, 2, 3, 4:
		n = min(n, 600)
		locs := make([]atoll.Location, n)
		for i := range locs {
			locs[i] = m.loc()
			m.want[int(p)+i] = locs[i]
		}
		m.prepare(p, uint64(n))
		m.tree.put(p, locs)
	case 5:
		m.prepare(p, uint64(n))
		m.tree.clear(p, uint64(n))
		clear(m.want[p:][:n])
	case 6, 7, 8:
		m.read(p, n)
	case 9:
		m.tree.evict(int64(m.rng.IntN(100_000)))
	case 10:
		if len(m.frozen) < 4 {
			m.freeze()
		}
	case 11:
		m.write()
	}
}

func (m *treeModel) freeze() {
	m.frozen = append(m.frozen, m.tree.freeze(int64(len(m.want))*atoll.BlockSize))
	m.frozenW = append(m.frozenW, append([]atoll.Location(nil), m.want...))
}

func (m *treeModel) thaw() { m.frozen, m.frozenW = m.frozen[1:], m.frozenW[1:] }

// write goes on with the oldest frozen version: a leaf or node, the end, or, when
// it is the only one, giving up.
func (m *treeModel) write() {
	if len(m.frozen) == 0 {
		return
	}
	v := m.frozen[0]
	for range 1 + m.rng.IntN(20) {
		li, ok := v.nextDirty(0)
		if !ok {
			break
		}
		l, loc := v.leaf(li)
		if l.owed {
			m.tree.mergeFrozen(v, li, decodeLeaf(m.leaves[loc]))
		}
		var at atoll.Location
		if !l.empty() {
			at = m.loc()
			m.leaves[at] = make([]byte, atoll.BlockSize)
			l.encode(m.leaves[at])
		}
		m.tree.leafWritten(v, li, at)
	}
	if len(m.frozen) == 1 && m.rng.IntN(8) == 0 {
		m.tree.abandon(v)
		m.thaw()
		return
	}
	if _, more := v.nextDirty(0); more {
		return
	}
	for ni, ok := v.nextDirtyNode(0); ok; ni, ok = v.nextDirtyNode(0) {
		at := m.loc()
		m.nodes[at] = node{locs: v.top[ni].node.locs, births: v.top[ni].node.births}
		m.tree.nodeWritten(v, ni, at)
	}
	v.led.each(func(o atoll.Ordinal, n int) { m.live[o] += n })
	m.mapped += v.led.mapped
	m.tree.finish(v, true)
	m.checkRoot(v, m.frozenW[0])
	m.thaw()
}

// checkRoot reads a version from the log alone and counts what it references.
func (m *treeModel) checkRoot(v *version, want []atoll.Location) {
	count := map[atoll.Ordinal]int{}
	mapped := int64(0)
	for ni, e := range v.top {
		if e.loc == 0 {
			for p := ni << nodeBits; p < min((ni+1)<<nodeBits, len(want)); p++ {
				if want[p] != 0 {
					m.t.Fatalf("page %d is lost from the root", p)
				}
			}
			continue
		}
		count[e.loc.Ordinal()] += nodeBlocks
		nd := m.nodes[e.loc]
		for k, at := range nd.locs {
			l := &leaf{whole: true}
			if at != 0 {
				count[at.Ordinal()]++
				l = decodeLeaf(m.leaves[at])
			}
			for s := range fan {
				p := ni<<nodeBits + k<<leafBits + s
				loc, _ := l.get(s)
				if p < len(want) && loc != want[p] {
					m.t.Fatalf("page %d is at %v in the root, was %v when it was frozen", p, loc, want[p])
				}
				if loc != 0 {
					count[loc.Ordinal()]++
					mapped++
				}
			}
		}
	}
	for o := range atoll.Ordinal(m.next/40 + 2) {
		if count[o] != m.live[o] {
			m.t.Fatalf("segment %d has %d live blocks in the root, counted %d", o, count[o], m.live[o])
		}
	}
	if mapped != m.mapped {
		m.t.Fatalf("%d pages in the root, counted %d", mapped, m.mapped)
	}
}

func (m *treeModel) memory() {
	sum, dirty := int64(0), 0
	for _, e := range m.tree.top {
		if e.node == nil {
			continue
		}
		for _, l := range e.node.kids {
			if l == nil {
				continue
			}
			sum += l.mem()
			if n := len(m.frozen); l.dirty && (n == 0 || l.birth > m.frozen[n-1].epoch) {
				dirty++
			}
		}
	}
	if sum != m.tree.mem || dirty != m.tree.dirtyN {
		m.t.Fatalf("%d bytes in memory, %d dirty leaves; counted %d, %d", sum, dirty, m.tree.mem, m.tree.dirtyN)
	}
}

func TestTreeAgainstTable(t *testing.T) {
	seeds(t, uint64(rounds(12)), func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 1))
		pages := 1<<nodeBits + 5*fan + 100
		m := &treeModel{
			t: t, rng: rng, tree: newTree(uint64(pages)), want: make([]atoll.Location, pages),
			leaves: map[atoll.Location][]byte{}, nodes: map[atoll.Location]node{}, live: map[atoll.Ordinal]int{},
		}
		for i := range rounds(1500) {
			m.step()
			if i%50 == 0 {
				m.memory()
			}
		}
		for len(m.frozen) > 0 {
			m.write()
		}
		m.freeze()
		for len(m.frozen) > 0 {
			m.write()
		}
		m.read(0, pages)
		m.memory()
	})
}

func BenchmarkTreePut(b *testing.B) {
	const pages = 4 << 18
	t := newTree(pages)
	var loc [1]atoll.Location
	rng := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for i := range b.N {
		loc[0] = atoll.MakeLocation(atoll.Ordinal(i>>14+1), atoll.BlockNo(i&16383), 0)
		t.put(pageNo(rng.Uint64N(pages)), loc[:])
	}
}

func BenchmarkTreeGet(b *testing.B) {
	const pages = 4 << 18
	t := newTree(pages)
	for p := range pageNo(pages) {
		t.put(p, []atoll.Location{atoll.MakeLocation(atoll.Ordinal(p>>14+1), atoll.BlockNo(p&16383), 0)})
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var loc [1]atoll.Location
	b.ReportAllocs()
	for b.Loop() {
		t.lookup(pageNo(rng.Uint64N(pages)), loc[:])
	}
}
