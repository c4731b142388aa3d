package demo

import (
	"context"
	"encoding/binary"
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
// every read must return the last stamp.
type load struct {
	disk    *transfer.NBD
	workers []*worker
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	ops     atomic.Int64
	last    atomic.Int64 // time of the last completion, nanoseconds since base
	stall   atomic.Int64 // longest pause between completions
	base    time.Time
}

// worker is one of the load's writers.
type worker struct {
	from, blocks int64
	stamps       []uint64 // by block, 0 = never written
	err          error
}

const loadWorkers = 16

// startLoad begins writing to disk, one durable write or checked read after the
// other in each worker.
func startLoad(ctx context.Context, disk *transfer.NBD) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{disk: disk, cancel: cancel, base: time.Now()}
	share := disk.Size() / atoll.BlockSize / loadWorkers
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
			if err = l.disk.ReadAt(rctx, buf, off); err == nil {
				err = checkStamp(buf, off, w.stamps[b])
			}
		} else {
			stamp := w.stamps[b] + 1
			fillStamp(buf, off, stamp)
			if err = l.disk.WriteDurable(rctx, buf, off); err == nil {
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
			if err := l.disk.ReadAt(ctx, buf, off); err != nil {
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
