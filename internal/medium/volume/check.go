package volume

import (
	"context"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// counted is a Store that can tell its live counts.
type counted interface {
	// LiveBlocks returns the count of a segment, false if there is no such
	// segment.
	LiveBlocks(o atoll.Ordinal) (int, bool)
}

// Verify is Check, and then reads all data from the log, whatever the cache has.
// Writes are held up only where it reads at the moment.
func (v *Volume) Verify(ctx context.Context) error {
	if err := v.Check(ctx); err != nil {
		return err
	}
	buf := host.Alloc(fan * atoll.BlockSize)
	defer buf.Release()
	m := v.pages
	m.mu.Lock()
	nodes := len(m.t.top)
	m.mu.Unlock()
	for ni := range nodes {
		if err := v.verifyNode(ctx, ni, buf.Bytes()); err != nil {
			return fmt.Errorf("verify volume %v: %w", v.id, err)
		}
	}
	return nil
}

// verifyNode reads the data under one node of the map.
func (v *Volume) verifyNode(ctx context.Context, ni int, buf []byte) error {
	m, first := v.pages, pageNo(ni)<<nodeBits
	if err := v.check("verify", 0, 0, false); err != nil {
		return err
	}
	if pageNo(v.size.Load()/atoll.BlockSize) <= first {
		return nil // made smaller meanwhile
	}
	if err := m.prepare(ctx, first, 1); err != nil {
		return err
	}
	var used [fan]bool
	m.mu.Lock()
	if ni < len(m.t.top) {
		if nd := m.t.nodeAt(ni); nd != nil {
			for k := range used {
				used[k] = nd.locs[k] != 0 || nd.kids[k] != nil
			}
		}
	}
	m.mu.Unlock()
	for k, is := range used {
		if !is {
			continue
		}
		if err := v.verifyLeaf(ctx, first+pageNo(k)<<leafBits, buf); err != nil {
			return err
		}
	}
	return nil
}

// verifyLeaf reads the data of one leaf, from page p on.
func (v *Volume) verifyLeaf(ctx context.Context, p pageNo, buf []byte) error {
	r := pageRange{p, p + fan}
	if err := v.locks.lock(ctx, r); err != nil {
		return err
	}
	defer v.locks.unlock(r)
	size := pageNo(v.size.Load() / atoll.BlockSize)
	if p >= size {
		return nil
	}
	var all [fan]atoll.Location
	locs := all[:min(fan, size-p)]
	if err := v.pages.lookup(ctx, p, locs); err != nil {
		return err
	}
	for i := 0; i < len(locs); {
		j := i + 1
		for j < len(locs) && locs[i] != 0 && follows(locs[j-1], locs[j]) {
			j++
		}
		if locs[i] != 0 {
			if err := v.readRun(ctx, p+pageNo(i), buf[:(j-i)*atoll.BlockSize], locs[i:j]); err != nil {
				return err
			}
		}
		i = j
	}
	return nil
}

// Check reads the whole map, holding up writes, and compares it with itself and
// with the medium's counts. What it finds wrong is ErrCorrupt.
func (v *Volume) Check(ctx context.Context) error {
	if err := v.check("check", 0, 0, false); err != nil {
		return err
	}
	all := pageRange{0, maxPages}
	if err := v.locks.lock(ctx, all); err != nil {
		return err
	}
	defer v.locks.unlock(all)
	if !v.opts.ReadOnly {
		if err := v.wb.flush(ctx); err != nil {
			return err
		}
		if err := v.checkpoint(ctx); err != nil {
			return err
		}
	}
	c := checker{v: v, seen: make(map[atoll.Ordinal]*segmentUse)}
	err := c.walk(ctx)
	if err == nil {
		err = c.compare()
	}
	if err != nil {
		return fmt.Errorf("check volume %v: %w", v.id, err)
	}
	return nil
}

// checker gathers what the map references.
type checker struct {
	v      *Volume
	seen   map[atoll.Ordinal]*segmentUse
	mapped int64
}

type segmentUse struct {
	blocks int
	used   [atoll.MaxSegmentBlocks / 64]uint64
}

// use notes n blocks at loc.
func (c *checker) use(loc atoll.Location, n int, what string, idx uint64) error {
	s := c.seen[loc.Ordinal()]
	if s == nil {
		s = new(segmentUse)
		c.seen[loc.Ordinal()] = s
	}
	s.blocks += n
	for b := int(loc.Block()); n > 0; b, n = b+1, n-1 {
		if loc.Ordinal() == 0 || b >= atoll.MaxSegmentBlocks {
			return fmt.Errorf("%s %d lies at %v, which is nowhere: %w", what, idx, loc, atoll.ErrCorrupt)
		}
		if s.used[b>>6]&(1<<(b&63)) != 0 {
			return fmt.Errorf("%s %d lies at %v, which holds something else: %w", what, idx, loc, atoll.ErrCorrupt)
		}
		s.used[b>>6] |= 1 << (b & 63)
	}
	return nil
}

// walk notes every page, leaf and node of the map.
func (c *checker) walk(ctx context.Context) error {
	m := c.v.pages
	m.mu.Lock()
	top := slices.Clone(m.t.top)
	m.mu.Unlock()
	for ni := range top {
		if top[ni].loc != 0 {
			if err := c.use(top[ni].loc, nodeBlocks, "map node", uint64(ni)); err != nil {
				return err
			}
		}
		first := pageNo(ni) << nodeBits
		if err := m.prepare(ctx, first, 1); err != nil {
			return err
		}
		m.mu.Lock()
		nd := m.t.nodeAt(ni)
		m.mu.Unlock()
		if nd == nil {
			continue
		}
		for k := range pageNo(fan) {
			if err := c.leaf(ctx, nd, first+k<<leafBits); err != nil {
				return err
			}
		}
	}
	return nil
}

// leaf notes the pages of the leaf that begins at page p.
func (c *checker) leaf(ctx context.Context, nd *node, p pageNo) error {
	m := c.v.pages
	m.mu.Lock()
	at, there := nd.locs[p.leafIdx()&(fan-1)], nd.kids[p.leafIdx()&(fan-1)] != nil
	m.mu.Unlock()
	if at == 0 && !there {
		return nil
	}
	if at != 0 {
		if err := c.use(at, 1, "map leaf", uint64(p.leafIdx())); err != nil {
			return err
		}
	}
	var locs [fan]atoll.Location
	if err := m.lookup(ctx, p, locs[:]); err != nil {
		return err
	}
	size := pageNo(c.v.size.Load() / atoll.BlockSize)
	for i, loc := range locs {
		if loc == 0 {
			continue
		}
		q := p + pageNo(i)
		if q >= size {
			return fmt.Errorf("page %d is mapped in a volume of %d pages: %w", q, size, atoll.ErrCorrupt)
		}
		if err := c.use(loc, 1, "page", uint64(q)); err != nil {
			return err
		}
		c.mapped++
	}
	return nil
}

// compare holds what was found against the counts kept.
func (c *checker) compare() error {
	if c.v.opts.ReadOnly {
		return nil
	}
	if kept := c.v.mapped.Load(); kept != c.mapped {
		return fmt.Errorf("%d pages are mapped, the root says %d: %w", c.mapped, kept, atoll.ErrCorrupt)
	}
	s, ok := c.v.store.(counted)
	if !ok {
		return nil
	}
	for o, use := range c.seen {
		if n, ok := s.LiveBlocks(o); !ok || n != use.blocks {
			return fmt.Errorf("segment %d has %d live blocks, the medium says %d (there: %t): %w", o, use.blocks, n, ok, atoll.ErrCorrupt)
		}
	}
	return nil
}
