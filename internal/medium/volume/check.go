package volume

import (
	"cmp"
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
)

// counted is a Store that can tell its live counts.
type counted interface {
	// LiveBlocks returns the count of a segment, false if there is no such
	// segment.
	LiveBlocks(o atoll.Ordinal) (int, bool)
	// LiveBytes returns the sum of all counts.
	LiveBytes() int64
}

// Verify is Check, and then reads all data from the log, of versions too,
// whatever the cache has. Writes are held up only where it reads at the moment.
func (v *Volume) Verify(ctx context.Context) error {
	if err := v.Check(ctx); err != nil {
		return err
	}
	buf := host.Alloc(fan * atoll.BlockSize)
	defer buf.Release()
	st := v.store.State()
	for i := range st.Versions {
		if err := v.verifyVersion(ctx, st.Versions[i].Number, buf.Bytes()); err != nil {
			return fmt.Errorf("verify version %d of volume %v: %w", st.Versions[i].Number, v.id, err)
		}
	}
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

// verifyVersion reads the data of a version that its parent does not have,
// beginning anew when one of them is removed meanwhile.
func (v *Volume) verifyVersion(ctx context.Context, number uint64, buf []byte) error {
	if _, view := v.store.(viewStore); view {
		return nil
	}
	for {
		st := v.store.State()
		p := st.Find(number)
		if p == nil {
			return nil
		}
		err := v.verifyBeyond(ctx, p, buf)
		now := v.store.State()
		if q := now.Find(number); err == nil || !moved(err) || q != nil && q.Parent == p.Parent {
			return err
		}
	}
}

// verifyBeyond reads what version p has beyond its parent.
func (v *Volume) verifyBeyond(ctx context.Context, p *medium.Version, buf []byte) error {
	mine, err := v.source(ctx, p.Number)
	if err != nil {
		return err
	}
	parent := none()
	if p.Parent != 0 {
		if parent, err = v.source(ctx, p.Parent); err != nil {
			return err
		}
	}
	w := walk{a: mine, others: []source{parent}, to: ^uint32(0), stop: ctx.Err}
	w.pages = func(li uint32, now *[fan]atoll.Location, was [][fan]atoll.Location) error {
		for i := 0; i < fan; {
			j := i
			for j < fan && now[j] != 0 && now[j] != was[0][j] && (j == i || follows(now[j-1], now[j])) {
				j++
			}
			if j == i {
				i++
				continue
			}
			if err := v.readLog(ctx, pageNo(li)<<leafBits+pageNo(i), buf[:(j-i)*atoll.BlockSize], now[i:j]); err != nil {
				return err
			}
			i = j
		}
		return nil
	}
	return w.run(ctx)
}

// Check reads the maps of the volume and of all its versions, holding up writes
// and backups, and compares them with one another and with the medium's counts.
// What it finds wrong is ErrCorrupt.
func (v *Volume) Check(ctx context.Context) error {
	if err := v.check("check", 0, 0, false); err != nil {
		return err
	}
	if !v.opts.ReadOnly {
		if err := v.lockEvent(ctx, "check"); err != nil {
			return err
		}
		defer v.unlockEvent()
		if err := v.Settled(ctx); err != nil {
			return err
		}
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
		if err := v.checkpointLocked(ctx, nil); err != nil {
			return err
		}
	}
	c := newChecker(v)
	err := c.run(ctx)
	if err == nil {
		err = c.compare()
	}
	if err != nil {
		return fmt.Errorf("check volume %v: %w", v.id, err)
	}
	return nil
}

// checker gathers what the maps of a volume reference.
type checker struct {
	v      *Volume
	seen   map[atoll.Ordinal]*segmentUse
	mapped map[uint64]int64 // pages by version; 0 is the present state
}

type segmentUse struct {
	blocks int
	used   [atoll.MaxSegmentBlocks / 64]uint64
}

func newChecker(v *Volume) *checker {
	return &checker{v: v, seen: make(map[atoll.Ordinal]*segmentUse), mapped: make(map[uint64]int64)}
}

// use notes n blocks at loc, which nothing may use yet. Ancestors' blocks are
// not noted.
func (c *checker) use(loc atoll.Location, n int, what string, idx uint64) error {
	if loc == elsewhere || loc != 0 && loc.Ordinal() < c.v.base {
		return nil
	}
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

// run notes every page, leaf and node of all maps: of each version what its
// parent does not have, which no other may have either.
func (c *checker) run(ctx context.Context) error {
	v := c.v
	st := v.store.State()
	if _, view := v.store.(viewStore); view {
		return c.version(ctx, &medium.State{}, 0, 0, liveOf(v.pages), v.size.Load())
	}
	for i := range st.Versions {
		p := &st.Versions[i]
		r, err := v.source(ctx, p.Number)
		if err == nil && (r.info.Epoch != p.Epoch || r.info.Size != p.Size) {
			err = fmt.Errorf("its root says epoch %d, size %d; the manifest %d, %d: %w", r.info.Epoch, r.info.Size, p.Epoch, p.Size, atoll.ErrCorrupt)
		}
		if err == nil {
			err = c.version(ctx, &st, p.Number, p.Parent, r, p.Size)
		}
		if err == nil && c.mapped[p.Number] != r.info.Mapped {
			err = fmt.Errorf("%d pages are mapped, the root says %d: %w", c.mapped[p.Number], r.info.Mapped, atoll.ErrCorrupt)
		}
		if err != nil {
			return fmt.Errorf("version %d: %w", p.Number, err)
		}
	}
	var cur source = liveOf(v.pages)
	if root := v.durable.Load(); root != nil && !v.opts.ReadOnly {
		cur = &rooted{m: v.pages, info: root.info, tops: root.tops}
	}
	return c.version(ctx, &st, 0, st.CurParent, cur, v.size.Load())
}

// version notes what a version, or the present state, has beyond its parent.
func (c *checker) version(ctx context.Context, st *medium.State, number, parent uint64, mine source, size int64) (err error) {
	from, to := c.v.horizon(st, parent), horizon{^atoll.Location(0), ^uint32(0)}
	if p := st.Find(number); p != nil {
		to = horizon{p.At, p.Epoch}
	}
	above := none()
	if parent != 0 {
		if above, err = c.v.source(ctx, parent); err != nil {
			return err
		}
	}
	young := func(loc atoll.Location, birth uint32, what string, idx uint64) error {
		if loc.Ordinal() >= c.v.base && (from.page(birth) || !to.page(birth)) {
			return fmt.Errorf("%s %d at %v is of epoch %d, after %d and up to %d were expected: %w", what, idx, loc, birth, from.epoch, to.epoch, atoll.ErrCorrupt)
		}
		return nil
	}
	w := walk{a: mine, others: []source{above}, to: ^uint32(0), stop: ctx.Err}
	w.node = func(ni uint32, loc atoll.Location, birth uint32) bool {
		if err == nil && loc != 0 && loc != elsewhere {
			err = cmp.Or(c.use(loc, nodeBlocks, "map node", uint64(ni)), young(loc, birth, "map node", uint64(ni)))
		}
		return true
	}
	w.leaf = func(li uint32, loc atoll.Location, birth uint32) bool {
		if err == nil && loc != 0 && loc != elsewhere {
			err = cmp.Or(c.use(loc, 1, "map leaf", uint64(li)), young(loc, birth, "map leaf", uint64(li)))
		}
		return true
	}
	c.mapped[number] = c.mapped[parent]
	if parent == 0 {
		c.mapped[number] = 0
	}
	w.pages = func(li uint32, now *[fan]atoll.Location, was [][fan]atoll.Location) error {
		for s, loc := range now {
			if err := c.page(number, uint64(li)<<leafBits+uint64(s), loc, was[0][s], size, from, to); err != nil {
				return err
			}
		}
		return err
	}
	return cmp.Or(w.run(ctx), err)
}

// page notes one page of a version, which was elsewhere in the parent.
func (c *checker) page(number, page uint64, loc, was atoll.Location, size int64, from, to horizon) error {
	if was != 0 {
		c.mapped[number]--
	}
	if loc == 0 {
		return nil
	}
	c.mapped[number]++
	if int64(page) >= size/atoll.BlockSize {
		return fmt.Errorf("page %d is mapped in a volume of %d pages: %w", page, size/atoll.BlockSize, atoll.ErrCorrupt)
	}
	if loc == was || loc.Ordinal() < c.v.base {
		return nil
	}
	if from.data(loc) || !to.data(loc) {
		return fmt.Errorf("page %d lies at %v, between %v and %v was expected: %w", page, loc, from.at, to.at, atoll.ErrCorrupt)
	}
	return c.use(loc, 1, "page", page)
}

// compare holds what was found against the counts kept.
func (c *checker) compare() error {
	if c.v.opts.ReadOnly {
		return nil
	}
	if root := c.v.durable.Load(); root != nil && root.info.Mapped != c.mapped[0] {
		return fmt.Errorf("%d pages are mapped, the root says %d: %w", c.mapped[0], root.info.Mapped, atoll.ErrCorrupt)
	}
	s, ok := c.v.store.(counted)
	if !ok {
		return nil
	}
	sum := int64(0)
	for o, use := range c.seen {
		sum += int64(use.blocks) * atoll.BlockSize
		if n, ok := s.LiveBlocks(o); !ok || n != use.blocks {
			return fmt.Errorf("segment %d has %d live blocks, the medium says %d (there: %t): %w", o, use.blocks, n, ok, atoll.ErrCorrupt)
		}
	}
	if kept := s.LiveBytes(); kept != sum {
		return fmt.Errorf("%d bytes are referenced, the medium counts %d: %w", sum, kept, atoll.ErrCorrupt)
	}
	return nil
}
