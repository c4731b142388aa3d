package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
)

// Diff tells which pages of [off, off+n) were written between version from (0 =
// the beginning, when all was holes) and version to (0 = the present state),
// clipped to the range: ascending, neighbours of one kind as one, until fn
// returns false. zero tells that the page is a hole at to; else it holds data,
// which may be equal to the old. The range lies in the volume as it is at to.
// The cost is that of the changes. What changes in the present state meanwhile
// may be told either way; ErrConflict when it is restored. ErrNotExist.
func (v *Volume) Diff(ctx context.Context, from, to uint64, off, n int64, fn func(off, n int64, zero bool) bool) error {
	err := v.diff(ctx, from, to, off, n, fn)
	if err == errStop {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("compare versions %d and %d of volume %v: %w", from, to, v.id, notEra(err))
	}
	return v.serving("compare versions of")
}

// errStop ends a walk when the caller has enough.
var errStop = errors.New("enough")

func (v *Volume) diff(ctx context.Context, from, to uint64, off, n int64, fn func(off, n int64, zero bool) bool) error {
	if v.closed.Load() {
		return atoll.ErrClosed
	}
	if err := v.Settled(ctx); err != nil {
		return err
	}
	a, _, done, err := v.open(ctx, from, none())
	if err != nil {
		return err
	}
	defer done()
	b, size, done, err := v.open(ctx, to, nil)
	if err != nil {
		return err
	}
	defer done()
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%d bytes at %d of %d: %w", n, off, size, atoll.ErrInvalid)
	}
	if n == 0 {
		return nil
	}
	out := extents{off: off, end: off + n, fn: fn}
	if to == 0 {
		out.dirty = v.wb.list(span(off, n))
	}
	w := walk{
		a: b, others: []source{a}, from: uint32(span(off, n).from >> leafBits), to: uint32((span(off, n).to-1)>>leafBits) + 1,
		pages: func(li uint32, now *[fan]atoll.Location, was [][fan]atoll.Location) error {
			for s := range now {
				if now[s] != was[0][s] && !out.page(pageNo(li)<<leafBits+pageNo(s), now[s] == 0) {
					return errStop
				}
			}
			return nil
		},
		stop: ctx.Err,
	}
	if err := w.run(ctx); err != nil {
		return err
	}
	out.rest()
	return nil
}

// viewing reports whether a version is the one that a view pins.
func (v *Volume) viewing(number uint64) bool {
	view, ok := v.store.(viewStore)
	return ok && view.Version().Number == number
}

// open returns the map of a version and its size; done lets go of it. Number 0
// is zero, or the present state when that is nil.
func (v *Volume) open(ctx context.Context, number uint64, zero *rooted) (s source, size int64, done func(), err error) {
	done = func() {}
	if number == 0 && zero != nil {
		return zero, 0, done, nil
	}
	if number == 0 {
		s := liveOf(v.pages)
		return s, v.size.Load(), done, nil
	}
	v.hist.hold(number, +1) // first: the reaper looks after the flag is set
	st := v.store.State()
	p := st.Find(number)
	if p == nil || p.Flags&medium.FlagDeleting != 0 && !v.viewing(number) {
		v.hist.hold(number, -1)
		return nil, 0, nil, fmt.Errorf("version %d: %w", number, atoll.ErrNotExist)
	}
	r, err := v.source(ctx, number)
	if err != nil {
		v.hist.hold(number, -1)
		return nil, 0, nil, err
	}
	return r, r.info.Size, func() { v.hist.hold(number, -1) }, nil
}

// extents joins pages to extents.
type extents struct {
	off, end   int64 // clips
	from, next int64 // of the run so far, none when equal
	zero       bool
	dirty      []pageNo // pages in memory, ascending, not told yet
	fn         func(off, n int64, zero bool) bool
}

// page adds a page, and those in memory before it; false when the caller has
// enough.
func (x *extents) page(p pageNo, zero bool) bool {
	for len(x.dirty) > 0 && x.dirty[0] <= p {
		q := x.dirty[0]
		x.dirty = x.dirty[1:]
		if q == p {
			zero = false
		} else if !x.add(q, false) {
			return false
		}
	}
	return x.add(p, zero)
}

// rest tells what is left.
func (x *extents) rest() {
	for _, q := range x.dirty {
		if !x.add(q, false) {
			return
		}
	}
	x.flush()
}

func (x *extents) add(p pageNo, zero bool) bool {
	from, to := max(int64(p)*atoll.BlockSize, x.off), min(int64(p+1)*atoll.BlockSize, x.end)
	if from >= to {
		return true
	}
	if x.next == from && x.zero == zero && x.from != x.next {
		x.next = to
		return true
	}
	ok := x.flush()
	x.from, x.next, x.zero = from, to, zero
	return ok
}

func (x *extents) flush() bool {
	if x.from == x.next {
		return true
	}
	from := x.from
	x.from = x.next
	return x.fn(from, x.next-from, x.zero)
}

// Depth tells where the data of [off, off+n) come from, in order, neighbours of
// one depth as one, until fn returns false: 0 is a hole, 1 the volume itself, 2
// the medium it was cloned from, and so on. It reads map leaves, no data.
func (v *Volume) Depth(ctx context.Context, off, n int64, fn func(n int64, depth int) bool) error {
	if err := v.check("map", off, n, false); err != nil {
		return err
	}
	ancestors := v.store.State().Ancestors
	depth := func(loc atoll.Location) int {
		if loc == 0 {
			return 0
		}
		i := slices.IndexFunc(ancestors, func(a catalog.Ancestor) bool { return loc.Ordinal() < a.Base })
		if i < 0 {
			return 1
		}
		return len(ancestors) - i + 1
	}
	run, kind := int64(0), 0
	err := v.locations(ctx, off, n, func(p pageNo, size int64, loc atoll.Location) bool {
		d := depth(loc)
		if d != 1 && v.wb.holds(p, uint64(size+atoll.BlockSize-1)/atoll.BlockSize) {
			d = 1
		}
		if run > 0 && d != kind {
			if !fn(run, kind) {
				run = -1
				return false
			}
			run = 0
		}
		run, kind = run+size, d
		return true
	})
	if err != nil {
		return fmt.Errorf("map %d bytes at %d: %w", n, off, err)
	}
	if run > 0 {
		fn(run, kind)
	}
	return v.serving("map")
}

// locations gives the places of [off, off+n) in order, in pieces of a page, or
// of many when they are holes.
func (v *Volume) locations(ctx context.Context, off, n int64, fn func(p pageNo, size int64, loc atoll.Location) bool) error {
	var locs [readChunk]atoll.Location
	for end := off + n; off < end; {
		p := pageNo(off / atoll.BlockSize)
		if skip := v.pages.skip(p); skip > 0 && !v.wb.holds(p, skip) {
			size := min(int64(p+pageNo(skip))*atoll.BlockSize, end) - off
			if !fn(p, size, 0) {
				return nil
			}
			off += size
			continue
		}
		r := span(off, end-off)
		count := min(int(r.to-r.from), readChunk)
		if err := v.pages.lookup(ctx, p, locs[:count]); err != nil {
			return err
		}
		for i, loc := range locs[:count] {
			size := min(int64(p+pageNo(i)+1)*atoll.BlockSize, end) - off
			if !fn(p+pageNo(i), size, loc) {
				return nil
			}
			off += size
		}
	}
	return nil
}
