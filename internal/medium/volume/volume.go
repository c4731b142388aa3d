package volume

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Mode says when a write is acknowledged.
type Mode uint8

// Modes. In both, Flush makes everything acknowledged before it durable.
const (
	// Writethrough acknowledges a write when it is on stable storage on all
	// copies.
	Writethrough Mode = iota
	// Writeback acknowledges a write when it is in memory, as disks with a
	// volatile cache do.
	Writeback
)

// String returns the mode's name as flags have it.
func (m Mode) String() string {
	if m == Writeback {
		return "writeback"
	}
	return "writethrough"
}

// Options of Open. Zero values get the defaults named.
type Options struct {
	Mode     Mode
	ReadOnly bool

	// Cache is a read cache that this volume shares with others. When it is
	// nil the volume makes its own of CacheBytes (0 = none).
	Cache      *Cache
	CacheBytes int64
	// MapBytes bounds the leaves of the map in memory (64 MiB). Those that a
	// checkpoint has yet to write may go beyond; half of it in those starts one.
	MapBytes int64
	// DirtyBytes bounds what writeback holds in memory (64 MiB).
	DirtyBytes int64
	// FlushDelay is how long writeback may hold a page that nobody asks to
	// flush (200 ms).
	FlushDelay time.Duration
	// CheckpointBytes of log start a checkpoint (1 GiB), but not less than 8
	// times the map pages it would write.
	CheckpointBytes int64
	// DetectZeros turns a write of nothing but zeros into Zero.
	DetectZeros bool

	Log     *slog.Logger
	Metrics *Metrics
}

func (o *Options) defaults() {
	def := func(p *int64, v int64) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&o.MapBytes, 64<<20)
	def(&o.DirtyBytes, 64<<20)
	def(&o.CheckpointBytes, 1<<30)
	if o.FlushDelay <= 0 {
		o.FlushDelay = 200 * time.Millisecond
	}
	if o.Cache == nil {
		o.Cache = NewCache(o.CacheBytes)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Volume is an open block device. All methods may be called concurrently; what
// overlapping concurrent writes leave is one of them, page by page.
type Volume struct {
	store Store
	opts  Options
	log   *slog.Logger
	cache *Cache
	id    atoll.MediumID
	base  atoll.Ordinal // first own; lower ones are ancestors'

	size  atomic.Int64
	pages *pageMap
	locks rangeLock
	gate  gate       // between log and map
	door  gate       // into writeback's memory
	wb    *writeback // nil in writethrough mode
	ahead readAhead
	ops   sync.Pool
	sums  sync.Pool // of *[fan]uint32

	ckpt     chan struct{} // holds a token while a checkpoint or resize runs
	ckptKick chan struct{}
	logBytes atomic.Int64  // in the hot lane since the last checkpoint
	commits  chan struct{} // holds a token while a manifest is being changed

	hist    history
	era     atomic.Uint64          // counts restores
	durable atomic.Pointer[rooted] // map of the root in force; nil before the first
	reclaim reclaimer

	ctx    context.Context // ends with Close or Abort; for the goroutines only
	cancel context.CancelFunc
	wg     sync.WaitGroup
	closed atomic.Bool
	stats  counters
}

// Open loads the root, replays the log since, and returns the volume, ready to
// serve. The caller keeps the store and closes it after the volume.
func Open(ctx context.Context, s Store, o Options) (*Volume, error) {
	o.defaults()
	info := s.Info()
	v := &Volume{
		store: s, opts: o, cache: o.Cache, id: info.ID,
		log:  o.Log.With("medium", info.ID),
		base: info.Base(),
		ckpt: make(chan struct{}, 1), ckptKick: make(chan struct{}, 1), commits: make(chan struct{}, 1),
	}
	v.hist.init()
	v.reclaim.init()
	v.ctx, v.cancel = context.WithCancel(context.Background())
	v.gate.end, v.door.end = v.ctx.Done(), v.ctx.Done()
	v.ops.New = func() any { return &logOp{entry: s.NewEntry()} }
	v.sums.New = func() any { return new([fan]uint32) }
	if err := v.recover(ctx, info.Size); err != nil {
		v.cancel()
		return nil, fmt.Errorf("open volume %v: %w", v.id, err)
	}
	if size := v.size.Load(); size != info.Size && !o.ReadOnly {
		// A resize ended between its record and the catalog.
		if err := s.Update(ctx, func(m *catalogMedium) { m.Size = size }); err != nil {
			v.cancel()
			return nil, fmt.Errorf("open volume %v: record size %d: %w", v.id, size, err)
		}
	}
	if o.Mode == Writeback {
		v.wb = newWriteback(v)
		v.wg.Go(v.wb.run)
	}
	if n := len(v.hist.queue); n > 0 { // found in the log
		v.hist.keeps = n
		v.ckpt <- struct{}{}
	}
	if !o.ReadOnly {
		v.wg.Go(v.checkpoints)
		v.wg.Go(v.settler)
		v.wg.Go(v.reaper)
		for i := range compactors {
			v.wg.Go(func() { v.compactor(i == 0) })
		}
	}
	return v, nil
}

// Size returns the size in bytes.
func (v *Volume) Size() int64 { return v.size.Load() }

// ReadOnly reports whether writes are refused.
func (v *Volume) ReadOnly() bool { return v.opts.ReadOnly }

// Mode returns when writes are acknowledged.
func (v *Volume) Mode() Mode { return v.opts.Mode }

// Close flushes, writes a checkpoint and stops. The volume is unusable after it,
// whether or not it returns an error. Calls that are running end first; calls
// that come later get ErrClosed.
func (v *Volume) Close(ctx context.Context) error {
	if v.closed.Swap(true) {
		return nil
	}
	var err error
	if !v.opts.ReadOnly {
		err = v.closeClean(ctx)
	}
	v.cancel()
	v.wg.Wait()
	if v.wb != nil {
		v.wb.drop()
	}
	if err != nil {
		return fmt.Errorf("close volume %v: %w", v.id, err)
	}
	return nil
}

// closeClean leaves nothing to replay, if it can in reasonable time.
func (v *Volume) closeClean(ctx context.Context) error {
	if err := v.serving("close"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, closeLimit)
	defer cancel()
	err := v.wb.flush(ctx)
	if err == nil {
		err = v.Settled(ctx)
	}
	if err == nil && v.logBytes.Load() > 0 {
		err = v.checkpoint(ctx) // waits for writes in flight
	}
	return err
}

// closeLimit bounds the time that Close may take to write what is left.
const closeLimit = 2 * time.Minute

// Abort stops without writing anything, as a crash would: for an owner that has
// lost its lease. Writes that writeback acknowledged and that were not flushed
// are lost.
func (v *Volume) Abort() {
	v.closed.Store(true)
	v.cancel()
	v.wg.Wait()
	if v.wb != nil {
		v.wb.drop()
	}
}

// check says whether an operation on [off, off+n) may begin.
func (v *Volume) check(what string, off, n int64, write bool) error {
	switch {
	case v.closed.Load():
		return fmt.Errorf("%s volume %v: %w", what, v.id, atoll.ErrClosed)
	case write && v.opts.ReadOnly:
		return fmt.Errorf("%s volume %v: %w", what, v.id, atoll.ErrReadOnly)
	case off < 0 || n < 0 || off > v.size.Load() || n > v.size.Load()-off:
		return fmt.Errorf("%s %d bytes at %d of volume %v of %d bytes: %w", what, n, off, v.id, v.size.Load(), atoll.ErrInvalid)
	}
	return nil
}

// serving is called last in every operation: what was done counts only while
// the lease holds (V4).
func (v *Volume) serving(what string) error {
	if v.store.Valid() {
		return nil
	}
	return fmt.Errorf("%s volume %v: lease lost: %w", what, v.id, atoll.ErrFenced)
}

// span returns the pages that [off, off+n) touches.
func span(off, n int64) pageRange {
	return pageRange{pageNo(off / atoll.BlockSize), pageNo((off + n + atoll.BlockSize - 1) / atoll.BlockSize)}
}
