package transfer

import (
	"context"
	"fmt"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// defaultConcurrency is how many requests rbd keeps in flight.
const defaultConcurrency = 10

// chunk is a piece of an image on its way from a volume to a stream.
type chunk struct {
	off, n int64
	hole   bool         // reads as zeros, buf is nil
	buf    *host.Buffer // of n bytes
	parts  []part       // set by a diff's fetch
	data   int64        // bytes that fetch has written already
	ready  chan error   // takes one
}

// window reads chunks of a volume, several at once, and hands them on in order.
type window struct {
	limit int // chunks between walk and use
	// walk calls emit for chunks by ascending offsets until it returns false.
	walk func(ctx context.Context, emit func(off, n int64, hole bool) bool) error
	// fetch reads the chunk's bytes into its buffer; several run at once.
	fetch func(ctx context.Context, c *chunk) error
	// use gets the chunks in the order of walk, one at a time. The buffer is
	// valid until it returns.
	use func(c *chunk) error
}

// run moves everything and returns the first error. When it returns, nothing
// runs any more.
func (w *window) run(ctx context.Context) error {
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	free, queue := make(chan *chunk, w.limit), make(chan *chunk, w.limit)
	for range w.limit {
		free <- &chunk{ready: make(chan error, 1)}
	}
	var wg sync.WaitGroup
	var walkErr error
	wg.Go(func() {
		defer close(queue)
		walkErr = w.walk(ctx, func(off, n int64, hole bool) bool {
			select {
			case c := <-free:
				c.off, c.n, c.hole, c.data = off, n, hole, 0
				w.start(ctx, &wg, c)
				queue <- c // there is room for all
				return true
			case <-ctx.Done():
				return false
			}
		})
	})
	var err error
	for c := range queue {
		if ferr := <-c.ready; err == nil && ferr != nil {
			err = ferr
		}
		if err == nil {
			err = w.use(c)
		}
		if err != nil {
			cancel()
		}
		c.buf.Release()
		c.buf = nil
		free <- c
	}
	wg.Wait()
	switch {
	case err == nil && walkErr == nil:
		return outer.Err()
	case err == nil:
		return walkErr
	}
	if cause := outer.Err(); cause != nil {
		return cause
	}
	return err
}

// start lets a chunk be fetched.
func (w *window) start(ctx context.Context, wg *sync.WaitGroup, c *chunk) {
	if c.hole {
		c.ready <- nil
		return
	}
	c.buf = host.Alloc(int(c.n))
	wg.Go(func() { c.ready <- w.fetch(ctx, c) })
}

// lister tells of consecutive ranges from off on which ones are so.
type lister func(ctx context.Context, off, n int64, fn func(n int64, yes bool) bool) error

// How much of a volume is asked about at once: more when there was little to
// tell, so that a large and nearly empty volume takes few questions, less when
// there was much, so that the answer takes little memory.
const (
	minListWindow = 64 << 20
	listWindow    = 1 << 30
	maxListWindow = 1 << 40
	littleToTell  = 1 << 10 // ranges
	muchToTell    = 1 << 14
)

// ranges calls fn for the longest ranges of [from, to) that are alike, in order,
// until it returns false.
func ranges(ctx context.Context, list lister, from, to int64, fn func(off, n int64, yes bool) bool) error {
	start, at, kind, more := from, from, false, true
	for window := int64(listWindow); at < to && more; {
		asked, told := at, 0
		end := min(at+window, to)
		err := list(ctx, at, end-at, func(n int64, yes bool) bool {
			if n = min(n, to-at); n <= 0 {
				return true
			}
			if yes != kind && at > start {
				more = fn(start, at-start, kind)
				start = at
				told++
			}
			kind = yes
			at += n
			return more && at < end
		})
		switch {
		case err != nil:
			return fmt.Errorf("list extents at %d: %w", asked, err)
		case at == asked:
			return fmt.Errorf("list extents at %d: no answer: %w", asked, atoll.ErrInvalid)
		case told < littleToTell:
			window = min(2*window, maxListWindow)
		case told > muchToTell:
			window = max(window/2, minListWindow)
		}
	}
	if more && at > start {
		fn(start, at-start, kind)
	}
	return nil
}

// pieces cuts a range at the multiples of size.
func pieces(off, n, size int64, fn func(off, n int64) bool) bool {
	for n > 0 {
		m := min(n, size-off%size)
		if !fn(off, m) {
			return false
		}
		off, n = off+m, n-m
	}
	return true
}
