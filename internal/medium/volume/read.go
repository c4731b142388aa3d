package volume

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

const (
	// readChunk is how many pages are looked up at once.
	readChunk = 256
	// readParallel is how many runs of a scattered read are in flight.
	readParallel = 8
	// readTries bounds how often a read starts over because the map moved on.
	readTries = 4
)

// Read fills p from off. Blocks are read straight into p; memory that is
// aligned to 4096 bytes, for whole pages, lets the disks do so without a copy.
// A block that fails its check is ErrCorrupt, never wrong bytes.
func (v *Volume) Read(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := v.check("read", off, n, false); err != nil || n == 0 {
		return err
	}
	for again := true; again; {
		era := v.era.Load()
		err := v.readBytes(ctx, p, off)
		again = era != v.era.Load() // a restore came in between: not half of each
		if err != nil && !again {
			return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		}
		if again {
			if err := v.check("read", off, n, false); err != nil {
				return err
			}
		}
	}
	v.stats.reads.Add(1)
	v.stats.readBytes.Add(n)
	v.readOn(span(off, n))
	return v.serving("read")
}

// readBytes reads any range: the pages at the edges through a buffer.
func (v *Volume) readBytes(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		first, skip := pageNo(off/atoll.BlockSize), int(off%atoll.BlockSize)
		whole := len(p) / atoll.BlockSize * atoll.BlockSize
		n := whole
		if skip != 0 || whole == 0 {
			n = min(len(p), atoll.BlockSize-skip)
			buf := host.Alloc(atoll.BlockSize)
			err := v.readPages(ctx, first, buf.Bytes())
			copy(p[:n], buf.Bytes()[skip:])
			buf.Release()
			if err != nil {
				return err
			}
		} else if err := v.readPages(ctx, first, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// pageSet is a set of the pages of a chunk.
type pageSet [readChunk / 64]uint64

func (s *pageSet) add(i int)      { s[i>>6] |= 1 << (i & 63) }
func (s *pageSet) has(i int) bool { return s[i>>6]&(1<<(i&63)) != 0 }

// readPages fills dst, whole pages, from page p on. What is not flushed yet is
// looked for before the map, because a page enters the map before it leaves
// memory.
func (v *Volume) readPages(ctx context.Context, p pageNo, dst []byte) error {
	var locs [readChunk]atoll.Location
	for len(dst) > 0 {
		n := min(len(dst)/atoll.BlockSize, readChunk)
		var done pageSet
		if v.wb.copyTo(p, dst[:n*atoll.BlockSize], &done) < n {
			if err := v.pages.lookup(ctx, p, locs[:n]); err != nil {
				return err
			}
			if err := v.fill(ctx, p, dst[:n*atoll.BlockSize], locs[:n], &done); err != nil {
				return err
			}
		}
		p, dst = p+pageNo(n), dst[n*atoll.BlockSize:]
	}
	return nil
}

// readRun is neighbouring pages that are neighbours in the log as well.
type readRun struct{ from, to int }

// fill reads the pages that are not done: zeros for holes, then the cache, then
// the log, each run at once.
func (v *Volume) fill(ctx context.Context, p pageNo, dst []byte, locs []atoll.Location, done *pageSet) error {
	var runs [readChunk]readRun
	n := 0
	for i, loc := range locs {
		b := dst[i*atoll.BlockSize:][:atoll.BlockSize]
		switch {
		case done.has(i):
		case loc == 0:
			clear(b)
		case v.cache.get(v.key(loc), b):
		case n > 0 && runs[n-1].to == i && follows(locs[i-1], loc):
			runs[n-1].to++
		default:
			runs[n] = readRun{i, i + 1}
			n++
		}
	}
	switch n {
	case 0:
		return nil
	case 1:
		r := runs[0]
		return v.readRun(ctx, p+pageNo(r.from), dst[r.from*atoll.BlockSize:r.to*atoll.BlockSize], locs[r.from:r.to])
	}
	return v.readScattered(ctx, p, dst, locs, runs[:n])
}

// key names a block in the cache, which ancestors and clones share.
func (v *Volume) key(loc atoll.Location) cacheKey { return cacheKey{v.pages.owner(loc), loc} }

// follows reports whether b lies just behind a in the log.
func follows(a, b atoll.Location) bool {
	return a.Ordinal() == b.Ordinal() && a.Block()+1 == b.Block()
}

// readScattered reads several runs, some at a time.
func (v *Volume) readScattered(ctx context.Context, p pageNo, dst []byte, locs []atoll.Location, runs []readRun) error {
	places := append([]atoll.Location(nil), locs...)
	todo := append([]readRun(nil), runs...)
	errs := make([]error, len(todo))
	var next atomic.Int64
	work := func() {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(todo) {
				return
			}
			r := todo[i]
			errs[i] = v.readRun(ctx, p+pageNo(r.from), dst[r.from*atoll.BlockSize:r.to*atoll.BlockSize], places[r.from:r.to])
		}
	}
	var wg sync.WaitGroup
	for range min(len(todo), readParallel) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return cmp.Or(errs...)
}

// readRun reads pages that are neighbours in the log into dst, checks them and
// offers them to the cache. When the place turns out to be left by the map in
// the meantime, it looks again.
func (v *Volume) readRun(ctx context.Context, p pageNo, dst []byte, locs []atoll.Location) error {
	err := v.readLog(ctx, p, dst, locs)
	for tries := 1; err != nil && moved(err) && tries < readTries; tries++ {
		now := make([]atoll.Location, len(locs))
		if e := v.pages.lookup(ctx, p, now); e != nil {
			return e
		}
		if same(locs, now) {
			return err
		}
		locs = now
		err = v.readAgain(ctx, p, dst, locs)
	}
	return err
}

// readAgain reads pages one by one from places that need not be neighbours.
func (v *Volume) readAgain(ctx context.Context, p pageNo, dst []byte, locs []atoll.Location) error {
	for i := range locs {
		b := dst[i*atoll.BlockSize:][:atoll.BlockSize]
		if locs[i] == 0 {
			clear(b)
		} else if err := v.readLog(ctx, p+pageNo(i), b, locs[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}

// readLog reads a run from the log and checks every block. Long runs are left
// out of the cache: who reads much at once rarely reads it again, and what
// others keep there would go.
func (v *Volume) readLog(ctx context.Context, p pageNo, dst []byte, locs []atoll.Location) error {
	at := locs[0]
	sums := v.sums.Get().(*[fan]uint32)
	defer v.sums.Put(sums)
	if err := v.store.ReadSums(ctx, at.Ordinal(), at.Block(), dst, sums[:len(locs)]); err != nil {
		return err
	}
	v.stats.blocksRead.Add(int64(len(locs)))
	owner := v.pages.owner(at)
	for i, loc := range locs {
		b := dst[i*atoll.BlockSize:][:atoll.BlockSize]
		if checkBits(sums[i], owner, uint64(p)+uint64(i)) != loc.Check() {
			return fmt.Errorf("page %d at %v of the log is not the block that was written there: %w", p+pageNo(i), loc, atoll.ErrCorrupt)
		}
		if len(locs) < aheadBig {
			v.cache.add(v.key(loc), b, false)
		}
	}
	return nil
}

func same(a, b []atoll.Location) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// Extents tells which parts of [off, off+n) hold data and which are holes, in
// order, neighbours of one kind as one, until fn returns false. It reads map
// leaves, no data. What changes meanwhile may be told either way.
func (v *Volume) Extents(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error {
	if err := v.check("map", off, n, false); err != nil {
		return err
	}
	var locs [readChunk]atoll.Location
	var held [readChunk]bool
	run, runHole := int64(0), false
	emit := func(size int64, hole bool) bool {
		if run > 0 && hole != runHole {
			if !fn(run, runHole) {
				return false
			}
			run = 0
		}
		run, runHole = run+size, hole
		return true
	}
	for end := off + n; off < end; {
		p := pageNo(off / atoll.BlockSize)
		// A page goes from memory to the map: whoever finds it in neither must
		// have looked in that order.
		if skip := v.pages.skip(p); skip > 0 && !v.wb.holds(p, skip) && v.pages.skip(p) == skip {
			size := min(int64(p+pageNo(skip))*atoll.BlockSize, end) - off
			if !emit(size, true) {
				return nil
			}
			off += size
			continue
		}
		r := span(off, end-off)
		count := min(int(r.to-r.from), readChunk)
		for i := range count {
			held[i] = v.wb.holds(p+pageNo(i), 1)
		}
		if err := v.pages.lookup(ctx, p, locs[:count]); err != nil {
			return fmt.Errorf("map %d bytes at %d: %w", n, off, err)
		}
		for i, loc := range locs[:count] {
			size := min(int64(p+pageNo(i)+1)*atoll.BlockSize, end) - off
			if !emit(size, loc == 0 && !held[i]) {
				return nil
			}
			off += size
		}
	}
	if run > 0 {
		fn(run, runHole)
	}
	return v.serving("map")
}

// skip returns how many pages from p on lie in a part of the map that is not
// there at all, 0 if p itself may be mapped.
func (m *pageMap) skip(p pageNo) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	ni := uint32(p >> nodeBits)
	if int(ni) >= len(m.t.top) {
		return 0
	}
	e := &m.t.top[ni]
	if e.node == nil && e.loc == 0 {
		return 1<<nodeBits - uint64(p)&(1<<nodeBits-1)
	}
	k := p.leafIdx() & (fan - 1)
	if e.node != nil && e.node.kids[k] == nil && e.node.locs[k] == 0 {
		return uint64(fan - p.slot())
	}
	return 0
}
