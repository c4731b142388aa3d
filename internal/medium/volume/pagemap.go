package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

// pageMap is the tree with its lock and the loading of what is not in memory.
// The lock is held for memory work only.
type pageMap struct {
	store  Reader
	medium atoll.MediumID
	base   atoll.Ordinal // first own; lower ones are ancestors'
	limit  int64         // bytes of leaves to keep

	mu      sync.Mutex
	t       *tree
	loading map[want]chan struct{}
	loads   uint64
}

// minMapBytes keeps room for the leaves that are being looked at.
const minMapBytes = 512 << 10

func newPageMap(s Reader, limit int64, t *tree) *pageMap {
	info := s.Info()
	return &pageMap{store: s, medium: info.ID, base: info.Base(), limit: max(limit, minMapBytes), t: t, loading: make(map[want]chan struct{})}
}

// lookup fills out with the locations of the pages from p on.
func (m *pageMap) lookup(ctx context.Context, p pageNo, out []atoll.Location) error {
	for {
		m.mu.Lock()
		n, w := m.t.lookup(p, out)
		m.mu.Unlock()
		if n == len(out) {
			return nil
		}
		p, out = p+pageNo(n), out[n:]
		if err := m.load(ctx, w); err != nil {
			return err
		}
	}
}

// prepare loads what put and clear need for pages [p, p+n), so that they
// cannot fail later.
func (m *pageMap) prepare(ctx context.Context, p pageNo, n uint64) error {
	for {
		m.mu.Lock()
		w := m.t.needNodes(p, n)
		m.mu.Unlock()
		if w.none() {
			return nil
		}
		if err := m.load(ctx, w); err != nil {
			return err
		}
	}
}

// ready reports whether put and clear have what they need for [p, p+n).
func (m *pageMap) ready(p pageNo, n uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.t.needNodes(p, n).none()
}

// put records locations. The range must have been prepared.
func (m *pageMap) put(p pageNo, locs []atoll.Location) {
	m.mu.Lock()
	m.t.put(p, locs)
	if m.t.mem > m.limit {
		m.t.evict(m.limit)
	}
	m.mu.Unlock()
}

// clear makes pages holes. The range must have been prepared. Others get in
// between the parts of a long range.
func (m *pageMap) clear(p pageNo, n uint64) {
	for n > 0 {
		part := min(n, 1<<nodeBits-uint64(p)&(1<<nodeBits-1))
		m.mu.Lock()
		m.t.clear(p, part)
		m.mu.Unlock()
		p, n = p+pageNo(part), n-part
	}
}

// load brings what w names into memory, once for all who want it.
func (m *pageMap) load(ctx context.Context, w want) error {
	m.mu.Lock()
	if done, ok := m.loading[w]; ok {
		m.mu.Unlock()
		select {
		case <-done: // the caller looks again
			return nil
		case <-ctx.Done():
			return fmt.Errorf("load map: %w: %w", atoll.ErrTimeout, ctx.Err())
		}
	}
	done := make(chan struct{})
	m.loading[w] = done
	m.loads++
	m.mu.Unlock()

	buf, err := m.fetch(ctx, w)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.loading, w)
	close(done)
	if err != nil {
		if !m.wanted(w) { // moved by a checkpoint while it was read
			return nil
		}
		return err
	}
	defer buf.Release()
	return m.install(w, buf.Bytes())
}

// wanted reports whether w still is what a lookup would ask for.
func (m *pageMap) wanted(w want) bool {
	if w.node {
		if int(w.idx) >= len(m.t.top) {
			return false
		}
		e := m.t.top[w.idx]
		return e.node == nil && e.loc == w.loc
	}
	nd := m.t.nodeAt(int(w.idx >> leafBits))
	return nd != nil && nd.locs[w.idx&(fan-1)] == w.loc
}

func (m *pageMap) install(w want, p []byte) error {
	if w.leaf {
		if m.t.mem > m.limit { // before, so that the new one is there to be used
			m.t.evict(m.limit)
		}
		m.t.installLeaf(w.idx, w.loc, decodeLeaf(p))
		return nil
	}
	nd, err := decodeNode(p, m.owner(w.loc), w.idx)
	if err != nil {
		return err
	}
	m.t.installNode(w.idx, w.loc, nd)
	return nil
}

// fetch reads and checks the block or blocks that w names.
func (m *pageMap) fetch(ctx context.Context, w want) (*host.Buffer, error) {
	what := "leaf"
	if w.node {
		what = "node"
	}
	buf := host.Alloc(w.blocks() * atoll.BlockSize)
	err := m.store.Read(ctx, w.loc.Ordinal(), w.loc.Block(), buf.Bytes())
	if err == nil && !m.fits(w, buf.Bytes()) {
		err = atoll.ErrCorrupt
	}
	if err != nil {
		buf.Release()
		return nil, fmt.Errorf("load map %s %d at %v: %w", what, w.idx, w.loc, err)
	}
	return buf, nil
}

// fetchAll reads and checks what list names, all of it leaves or all nodes, and
// gives each to fn, in no special order. Neighbours in the log are read at once:
// pages of the map that were written together are.
func (m *pageMap) fetchAll(ctx context.Context, list []want, fn func(i int, p []byte)) error {
	order := make([]int, len(list))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(list[a].loc, list[b].loc) })
	var runs [][]int
	for from := 0; from < len(order); {
		to := from + 1
		for to < len(order) && to-from < fetchMost && list[order[to-1]].before(list[order[to]]) {
			to++
		}
		runs, from = append(runs, order[from:to]), to
	}
	var wg errgroup.Group
	wg.SetLimit(readParallel)
	for _, run := range runs {
		wg.Go(func() error { return m.fetchRun(ctx, list, run, fn) })
	}
	return wg.Wait()
}

// fetchMost is how many pages of the map are read at once at most.
const fetchMost = 128

// before reports whether the next block after those of w is that of x.
func (w want) before(x want) bool {
	return w.loc.Ordinal() == x.loc.Ordinal() && w.loc.Block()+atoll.BlockNo(w.blocks()) == x.loc.Block()
}

func (w want) blocks() int {
	if w.node {
		return nodeBlocks
	}
	return 1
}

// fetchRun reads what run names of list, neighbours in the log; one by one when
// something is wrong with that.
func (m *pageMap) fetchRun(ctx context.Context, list []want, run []int, fn func(i int, p []byte)) error {
	first := list[run[0]]
	size := first.blocks() * atoll.BlockSize
	var all []byte
	if len(run) > 1 {
		buf := host.Alloc(len(run) * size)
		defer buf.Release()
		if m.store.Read(ctx, first.loc.Ordinal(), first.loc.Block(), buf.Bytes()) == nil {
			all = buf.Bytes()
		}
	}
	for k, i := range run {
		if all != nil && m.fits(list[i], all[k*size:][:size]) {
			fn(i, all[k*size:][:size])
			continue
		}
		buf, err := m.fetch(ctx, list[i])
		if err != nil {
			return err
		}
		fn(i, buf.Bytes())
		buf.Release()
	}
	return nil
}

// fits reports whether p is what w names.
func (m *pageMap) fits(w want, p []byte) bool {
	key := uint64(leafKey)
	if w.node {
		key = nodeKey
	}
	return checkBits(segment.CRC(p[:atoll.BlockSize]), m.owner(w.loc), key|uint64(w.idx)) == w.loc.Check()
}

// location builds the location of a block whose checksum is known.
func (m *pageMap) location(o atoll.Ordinal, b atoll.BlockNo, crc uint32, key uint64) atoll.Location {
	return atoll.MakeLocation(o, b, checkBits(crc, m.medium, key))
}

// owner returns the medium that wrote the block at loc: this one or an ancestor.
func (m *pageMap) owner(loc atoll.Location) atoll.MediumID {
	if loc.Ordinal() >= m.base {
		return m.medium
	}
	id, _ := m.store.Ancestor(loc.Ordinal()) // 0, which fits no block, if unknown
	return id
}

// moved reports whether an error of Store.Read may come from reading at a
// place that the map has left meanwhile.
func moved(err error) bool {
	return errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrCorrupt)
}

// resize follows a change of the size from old to size bytes. What is beyond a
// smaller size must have been prepared.
func (m *pageMap) resize(old, size int64) {
	if size < old {
		r := span(size, old-size)
		m.clear(r.from, uint64(r.to-r.from))
	}
	m.mu.Lock()
	m.t.resize(uint64(size / atoll.BlockSize))
	m.mu.Unlock()
}

// crowded reports whether leaves that wait for a checkpoint take too much.
func (m *pageMap) crowded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.t.crowded(m.limit)
}

// holes reports whether pages [p, p+n) are known to be holes without loading
// anything.
func (m *pageMap) holes(p pageNo, n uint64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.t.holes(p, n)
}
