package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/host"
)

const (
	page  = 4 << 10
	piece = 1 << 20
)

// disk is what a load works on: a volume over NBD, or a file on the bare disk.
type disk interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64, fua bool) error
	Flush(ctx context.Context) error
}

// file is the bare disk: no cache of the kernel's.
type file struct{ f *os.File }

// openFile opens a file on the bare disk; with durable, every write is on the
// medium when it returns, as every write to Atoll in writethrough is.
func openFile(path string, durable bool) (file, error) {
	flags := os.O_RDWR | os.O_CREATE | unix.O_DIRECT
	if durable {
		flags |= unix.O_DSYNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return file{}, fmt.Errorf("open %s: %w", path, err)
	}
	return file{f}, nil
}

func (d file) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d file) WriteAt(_ context.Context, p []byte, off int64, _ bool) error {
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d file) Flush(context.Context) error { return d.f.Sync() }

func (d file) Close() error { return d.f.Close() }

// extent is where the written part of a disk is: count pieces, stride apart.
type extent struct{ count, stride int64 }

// spread lays written bytes evenly over a disk.
func spread(size, written int64) extent {
	count := min(written, size) / piece
	return extent{count, size / count / piece * piece}
}

// page returns the offset of a random page.
func (e extent) page(rng *mathrand.Rand) int64 {
	return rng.Int64N(e.count)*e.stride + rng.Int64N(piece/page)*page
}

// noise returns a buffer of bytes that cannot be taken for zeros.
func noise(n int) *host.Buffer {
	b := host.Alloc(n)
	_, _ = rand.Read(b.Bytes())
	return b
}

// fill writes the pieces of e in order, several in flight, and makes them
// durable.
func fill(ctx context.Context, d disk, e extent, depth int) error {
	b := noise(4 * piece)
	defer b.Release()
	err := inOrder(ctx, e, depth, func(ctx context.Context, i int64) error {
		at := i % 3 * piece
		return d.WriteAt(ctx, b.Bytes()[at:at+piece], i*e.stride, false)
	})
	if err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	return d.Flush(ctx)
}

// readAll reads the pieces of e in order, several in flight.
func readAll(ctx context.Context, d disk, e extent, depth int) error {
	bufs := make(chan *host.Buffer, depth)
	for range depth {
		bufs <- host.Alloc(piece)
	}
	return inOrder(ctx, e, depth, func(ctx context.Context, i int64) error {
		b := <-bufs
		defer func() { bufs <- b }()
		return d.ReadAt(ctx, b.Bytes(), i*e.stride)
	})
}

// inOrder calls fn for each piece, depth at a time, begun in order.
func inOrder(ctx context.Context, e extent, depth int, fn func(ctx context.Context, i int64) error) error {
	g, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range depth {
		g.Go(func() error {
			for i := next.Add(1) - 1; i < e.count && ctx.Err() == nil; i = next.Add(1) - 1 {
				if err := fn(ctx, i); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}

// randomWrites writes count random pages, several in flight, and makes them
// durable.
func randomWrites(ctx context.Context, d disk, e extent, count int64, depth int) error {
	b := noise(page)
	defer b.Release()
	g, gctx := errgroup.WithContext(ctx)
	var done atomic.Int64
	for range depth {
		g.Go(func() error {
			rng := mathrand.New(mathrand.NewPCG(mathrand.Uint64(), 1))
			for done.Add(1) <= count {
				if err := d.WriteAt(gctx, b.Bytes(), e.page(rng), false); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("random writes: %w", err)
	}
	return d.Flush(ctx)
}

// randomReads reads count random pages, several in flight.
func randomReads(ctx context.Context, d disk, e extent, count int64, depth int) error {
	g, ctx := errgroup.WithContext(ctx)
	var done atomic.Int64
	for range depth {
		g.Go(func() error {
			b := host.Alloc(page)
			defer b.Release()
			rng := mathrand.New(mathrand.NewPCG(mathrand.Uint64(), 1))
			for done.Add(1) <= count {
				if err := d.ReadAt(ctx, b.Bytes(), e.page(rng)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// write is one write of a load.
type write struct {
	at   time.Time
	took time.Duration
}

// load writes 4 KiB at random places until it is stopped, and keeps how long
// each write took.
type load struct {
	cancel context.CancelFunc
	group  *errgroup.Group
	begun  []atomic.Int64 // of each writer's write under way, 0 without
	mu     sync.Mutex
	writes []write
}

// startLoad starts depth writers.
func startLoad(ctx context.Context, d disk, e extent, depth int) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, group: &errgroup.Group{}, writes: make([]write, 0, 1<<20), begun: make([]atomic.Int64, depth)}
	for i := range depth {
		l.group.Go(func() error {
			b := noise(page)
			defer b.Release()
			rng := mathrand.New(mathrand.NewPCG(mathrand.Uint64(), 1))
			for ctx.Err() == nil {
				at := time.Now()
				l.begun[i].Store(at.UnixNano())
				// Not cancelled: a write ends, however long it takes.
				if err := d.WriteAt(context.WithoutCancel(ctx), b.Bytes(), e.page(rng), false); err != nil {
					return err
				}
				took := time.Since(at)
				l.begun[i].Store(0)
				l.mu.Lock()
				l.writes = append(l.writes, write{at, took})
				l.mu.Unlock()
			}
			return nil
		})
	}
	return l
}

// stop ends the load and returns how many writes there were.
func (l *load) stop() (int, error) {
	l.cancel()
	if err := l.group.Wait(); err != nil {
		return 0, fmt.Errorf("random writes: %w", err)
	}
	return len(l.writes), nil
}

// count returns how many writes have ended.
func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.writes)
}

// longest returns the time of the longest write that was under way at any moment
// between from and to, by now if it has not ended.
func (l *load) longest(from, to time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var most time.Duration
	for i := range l.begun {
		if at := l.begun[i].Load(); at != 0 && at < to.UnixNano() {
			most = max(most, time.Duration(time.Now().UnixNano()-at))
		}
	}
	for i := len(l.writes) - 1; i >= 0; i-- {
		w := l.writes[i]
		if w.at.Before(to) && w.at.Add(w.took).After(from) {
			most = max(most, w.took)
		}
		if w.at.Add(w.took).Before(from.Add(-time.Second)) {
			break // they are kept by their ends
		}
	}
	return most
}

// speed returns how many random writes a second d does, and how many these were.
// What it takes until they are durable counts, as memory is not what is measured.
func speed(ctx context.Context, d disk, e extent, depth int, during time.Duration) (rate float64, n int, err error) {
	l := startLoad(ctx, d, e, depth)
	start := time.Now()
	err = sleep(ctx, during)
	n, lerr := l.stop()
	err = errors.Join(err, lerr, d.Flush(ctx))
	return float64(n) / time.Since(start).Seconds(), n, err
}
