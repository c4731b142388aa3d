package demo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/transfer"
)

// load writes and reads random blocks of a volume and remembers what must be
// there: each worker owns its own blocks, stamps every write with a counter, and
// every read must return the last stamp. When the connection is lost, as when the
// machine stalls for longer than a lease lasts, it is made again, as a kernel or
// a virtual machine would.
type load struct {
	open    func(context.Context) (*transfer.NBD, error)
	workers []*worker
	lost    atomic.Int64 // connections
	mu      struct {
		sync.Mutex
		disk *transfer.NBD // nil while there is none
	}
	cancel context.CancelFunc
	wg     sync.WaitGroup
	ops    atomic.Int64
	last   atomic.Int64 // time of the last completion, nanoseconds since base
	stall  atomic.Int64 // longest pause between completions
	base   time.Time
}

// worker is one of the load's writers.
type worker struct {
	from, blocks int64
	stamps       []uint64 // by block, 0 = never written
	err          error
}

const loadWorkers = 16

// startLoad begins writing to a disk of that size, one durable write or checked
// read after the other in each worker. The load is to be stopped and closed.
func startLoad(ctx context.Context, size int64, open func(context.Context) (*transfer.NBD, error)) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{open: open, cancel: cancel, base: time.Now()}
	share := size / atoll.BlockSize / loadWorkers
	for i := range loadWorkers {
		w := &worker{from: int64(i) * share, blocks: share, stamps: make([]uint64, share)}
		l.workers = append(l.workers, w)
		l.wg.Go(func() { w.err = l.run(ctx, w, uint64(i)) })
	}
	return l
}

func (l *load) run(ctx context.Context, w *worker, seed uint64) error {
	rng := rand.New(rand.NewPCG(seed, 1))
	buf := make([]byte, atoll.BlockSize)
	for ctx.Err() == nil {
		b := rng.Int64N(w.blocks)
		off := (w.from + b) * atoll.BlockSize
		// A request that was begun is finished, so that what must be there is known.
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		var err error
		if w.stamps[b] != 0 && rng.IntN(4) == 0 {
			if err = l.read(rctx, buf, off); err == nil {
				err = checkStamp(buf, off, w.stamps[b])
			}
		} else {
			stamp := w.stamps[b] + 1
			fillStamp(buf, off, stamp)
			err = l.use(rctx, func(d *transfer.NBD) error { return d.WriteDurable(rctx, buf, off) })
			if err == nil {
				w.stamps[b] = stamp
			}
		}
		cancel()
		if err != nil {
			return fmt.Errorf("block at %d: %w", off, err)
		}
		l.done()
	}
	return nil
}

func (l *load) read(ctx context.Context, p []byte, off int64) error {
	return l.use(ctx, func(d *transfer.NBD) error { return d.ReadAt(ctx, p, off) })
}

// use calls fn with a connection, and again with another when that is lost.
func (l *load) use(ctx context.Context, fn func(*transfer.NBD) error) error {
	for {
		d, err := l.connection(ctx)
		if err == nil {
			err = fn(d)
		}
		if err == nil || ctx.Err() != nil || !passing(err) {
			return err
		}
		l.drop(d)
		if rest(ctx, 50*time.Millisecond) != nil {
			return err
		}
	}
}

// passing reports whether another connection may do better.
func passing(err error) bool {
	for _, kind := range []error{atoll.ErrUnreachable, atoll.ErrClosed, atoll.ErrBusy, atoll.ErrFenced} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// connection returns the one that there is, or makes one.
func (l *load) connection(ctx context.Context) (*transfer.NBD, error) {
	l.mu.Lock()
	d := l.mu.disk
	l.mu.Unlock()
	if d != nil {
		return d, nil
	}
	d, err := l.open(ctx)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.disk != nil { // another worker was quicker
		_ = d.Close()
	} else {
		l.mu.disk = d
	}
	return l.mu.disk, nil
}

// drop gives up a connection.
func (l *load) drop(d *transfer.NBD) {
	l.mu.Lock()
	mine := d != nil && l.mu.disk == d
	if mine {
		l.mu.disk = nil
	}
	l.mu.Unlock()
	if mine {
		l.lost.Add(1)
		_ = d.Close()
	}
}

// close ends the connection.
func (l *load) close() {
	l.mu.Lock()
	d := l.mu.disk
	l.mu.Unlock()
	l.drop(d)
}

// done notes a completion and the pause before it.
func (l *load) done() {
	now := int64(time.Since(l.base))
	gap := now - l.last.Swap(now)
	for {
		old := l.stall.Load()
		if gap <= old || l.stall.CompareAndSwap(old, gap) {
			break
		}
	}
	l.ops.Add(1)
}

// resetStall begins a new measurement of the longest pause.
func (l *load) resetStall() { l.stall.Store(0) }

// longestStall returns the longest time in which nothing was completed.
func (l *load) longestStall() time.Duration { return time.Duration(l.stall.Load()) }

// stop ends the load and returns the first error of a worker.
func (l *load) stop() error {
	l.cancel()
	l.wg.Wait()
	for _, w := range l.workers {
		if w.err != nil {
			return w.err
		}
	}
	return nil
}

// verify reads back every block that was written.
func (l *load) verify(ctx context.Context) (blocks int64, err error) {
	buf := make([]byte, atoll.BlockSize)
	for _, w := range l.workers {
		for b, stamp := range w.stamps {
			if stamp == 0 {
				continue
			}
			off := (w.from + int64(b)) * atoll.BlockSize
			if err := l.read(ctx, buf, off); err != nil {
				return blocks, fmt.Errorf("read back block at %d: %w", off, err)
			}
			if err := checkStamp(buf, off, stamp); err != nil {
				return blocks, err
			}
			blocks++
		}
	}
	return blocks, nil
}

// fillStamp makes a block that says where it belongs and which write made it.
func fillStamp(p []byte, off int64, stamp uint64) {
	rng := rand.New(rand.NewPCG(uint64(off), stamp))
	for i := 0; i < len(p)-24; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
	binary.LittleEndian.PutUint64(p[len(p)-24:], uint64(off))
	binary.LittleEndian.PutUint64(p[len(p)-16:], stamp)
	binary.LittleEndian.PutUint64(p[len(p)-8:], uint64(crc32.ChecksumIEEE(p[:len(p)-8])))
}

// checkStamp tells whether a block is the one that was written last.
func checkStamp(p []byte, off int64, stamp uint64) error {
	gotOff := int64(binary.LittleEndian.Uint64(p[len(p)-24:]))
	got := binary.LittleEndian.Uint64(p[len(p)-16:])
	sum := binary.LittleEndian.Uint64(p[len(p)-8:])
	if sum != uint64(crc32.ChecksumIEEE(p[:len(p)-8])) || gotOff != off || got != stamp {
		return fmt.Errorf("block at %d: wrote stamp %d, read stamp %d of block %d: %w", off, stamp, got, gotOff, atoll.ErrCorrupt)
	}
	return nil
}
