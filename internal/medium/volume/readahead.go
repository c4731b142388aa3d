package volume

import (
	"context"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

const (
	aheadStreams = 8   // sequential readers followed at once
	aheadMin     = 32  // pages of the first window
	aheadMax     = 512 // pages of the largest window
	aheadBusy    = 4   // windows being read at once
	aheadBig     = 64  // a reader with requests of so many pages needs no help
	aheadPiece   = 256 // pages read at once
)

// readAhead follows sequential readers and says what they will want next. The
// rule is next, which is pure.
type readAhead struct {
	mu      sync.Mutex
	streams [aheadStreams]aheadStream
	clock   uint64
	busy    int
}

// aheadStream is one reader: it was last at next, pages up to upTo were asked
// for ahead of it.
type aheadStream struct {
	next, upTo pageNo
	window     pageNo
	hits       int
	used       uint64
}

// next notes a read and returns the pages to read ahead, none if empty.
func (a *readAhead) next(r pageRange, end pageNo) pageRange {
	a.clock++
	oldest := &a.streams[0]
	for i := range a.streams {
		s := &a.streams[i]
		if s.used > 0 && s.next == r.from {
			return s.advance(r, end, a.clock)
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = aheadStream{next: r.to, upTo: r.to, window: aheadMin, used: a.clock}
	return pageRange{}
}

func (s *aheadStream) advance(r pageRange, end pageNo, clock uint64) pageRange {
	s.next, s.used = r.to, clock
	s.hits++
	s.upTo = max(s.upTo, r.to)
	if s.hits < 2 || r.to-r.from >= aheadBig || s.upTo > r.to+s.window/2 {
		return pageRange{}
	}
	from, to := s.upTo, min(s.upTo+s.window, end)
	if from >= to {
		return pageRange{}
	}
	s.upTo = to
	s.window = min(2*s.window, aheadMax)
	return pageRange{from, to}
}

// readOn lets the reader of r be helped.
func (v *Volume) readOn(r pageRange) {
	if v.cache == nil {
		return
	}
	a := &v.ahead
	a.mu.Lock()
	next := a.next(r, pageNo(v.size.Load()/atoll.BlockSize))
	start := next.from < next.to && a.busy < aheadBusy && !v.closed.Load()
	if start {
		a.busy++
		v.wg.Go(func() {
			_ = v.prefetch(v.ctx, next) // a reader that needs it will see the error
			a.mu.Lock()
			a.busy--
			a.mu.Unlock()
		})
	}
	a.mu.Unlock()
}

// Prefetch reads a range into the cache, no more than a quarter of what the
// cache holds. It is a hint: a block that cannot be read is no error.
func (v *Volume) Prefetch(ctx context.Context, off, n int64) error {
	if err := v.check("prefetch", off, n, false); err != nil {
		return err
	}
	if v.cache == nil || n == 0 {
		return nil
	}
	_ = v.prefetch(ctx, span(off, min(n, v.cache.Bytes()/4)))
	return v.serving("prefetch")
}

// prefetch reads the pages of r that are neither holes nor cached.
func (v *Volume) prefetch(ctx context.Context, r pageRange) error {
	var locs [aheadPiece]atoll.Location
	for p := r.from; p < r.to; {
		n := min(int(r.to-p), aheadPiece)
		if err := v.pages.lookup(ctx, p, locs[:n]); err != nil {
			return err
		}
		for i := 0; i < n; {
			j := i
			for j < n && locs[j] != 0 && (j == i || follows(locs[j-1], locs[j])) && !v.cache.has(v.key(locs[j])) {
				j++
			}
			if j == i {
				i++
				continue
			}
			if err := v.prefetchRun(ctx, p+pageNo(i), locs[i:j]); err != nil {
				return err
			}
			i = j
		}
		p += pageNo(n)
	}
	return nil
}

func (v *Volume) prefetchRun(ctx context.Context, p pageNo, locs []atoll.Location) error {
	buf := host.Alloc(len(locs) * atoll.BlockSize)
	defer buf.Release()
	mem := buf.Bytes()
	if err := v.readLog(ctx, p, mem, locs); err != nil {
		return err
	}
	for i, loc := range locs {
		v.cache.add(v.key(loc), mem[i*atoll.BlockSize:][:atoll.BlockSize], true)
	}
	v.stats.ahead.Add(int64(len(locs)))
	return nil
}
