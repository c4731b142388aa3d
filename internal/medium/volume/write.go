package volume

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

type catalogMedium = catalog.Medium

const (
	// maxParallel is how many entries a single large write has in the log at
	// once.
	maxParallel = 8
	// copyPages is the largest piece that is copied at once.
	copyPages = 1024
)

// logOp is an entry on its way to the log with the places it gets there.
type logOp struct {
	entry Entry
	locs  [atoll.MaxBatchBlocks]atoll.Location
	pages int
}

// Write writes p at off. p lies in b, on which the volume takes references of
// its own if it needs the bytes beyond the call; they must not change until the
// last reference is released. With b nil the bytes are copied. Whole pages in b
// are not copied. In writethrough mode, or with fua, the write is durable on
// return. After an error what was written is unknown, page by page.
func (v *Volume) Write(ctx context.Context, b *host.Buffer, p []byte, off int64, fua bool) error {
	n := int64(len(p))
	if err := v.check("write", off, n, true); err != nil || n == 0 {
		return err
	}
	if v.opts.DetectZeros && allZero(p) {
		return v.Zero(ctx, off, n, true, fua)
	}
	if err := v.pace(ctx, n); err != nil {
		return err
	}
	r := span(off, n)
	if err := v.locks.lock(ctx, r); err != nil {
		return err
	}
	err := v.check("write", off, n, true) // a resize may have come first
	if err == nil {
		if b != nil && off%atoll.BlockSize == 0 && n%atoll.BlockSize == 0 {
			err = v.writePages(ctx, r.from, b, p, anyEra)
		} else {
			err = v.writeCopied(ctx, p, off)
		}
	}
	v.locks.unlock(r)
	if err == nil && fua && v.wb != nil {
		err = v.wb.flush(ctx)
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", n, off, err)
	}
	v.stats.writes.Add(1)
	v.stats.writeBytes.Add(n)
	return v.serving("write")
}

// Flush makes every write that was acknowledged before it durable, whoever made
// it. After a write in the background failed for good, it returns that error
// now and until the volume is opened again.
func (v *Volume) Flush(ctx context.Context) error {
	if v.closed.Load() {
		return fmt.Errorf("flush volume %v: %w", v.id, atoll.ErrClosed)
	}
	v.stats.flushes.Add(1)
	if v.wb != nil {
		if err := v.wb.flush(ctx); err != nil {
			return fmt.Errorf("flush volume %v: %w", v.id, err)
		}
	}
	return v.serving("flush")
}

// writeCopied writes bytes that are not whole pages of a buffer: it makes them
// so, reading the rest of the pages at the edges. The range is locked.
func (v *Volume) writeCopied(ctx context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		skip := int(off % atoll.BlockSize)
		n := min(len(p), copyPages*atoll.BlockSize-skip)
		pages := (skip + n + atoll.BlockSize - 1) / atoll.BlockSize
		err := v.writePiece(ctx, p[:n], pageNo(off/atoll.BlockSize), skip, pages)
		for err == errEra {
			err = v.writePiece(ctx, p[:n], pageNo(off/atoll.BlockSize), skip, pages)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (v *Volume) writePiece(ctx context.Context, p []byte, first pageNo, skip, pages int) error {
	buf := host.Alloc(pages * atoll.BlockSize)
	defer buf.Release()
	mem := buf.Bytes()
	era := v.era.Load()
	tail := (skip + len(p)) % atoll.BlockSize
	if skip != 0 {
		if err := v.readPages(ctx, first, mem[:atoll.BlockSize]); err != nil {
			return err
		}
	}
	if tail != 0 && (pages > 1 || skip == 0) {
		if err := v.readPages(ctx, first+pageNo(pages-1), mem[len(mem)-atoll.BlockSize:]); err != nil {
			return err
		}
	}
	copy(mem[skip:], p)
	return v.writePages(ctx, first, buf, mem, era)
}

// anyEra is for writes of whole pages, which do not depend on what was there.
const anyEra = ^uint64(0)

// errEra tells that a restore replaced what a write was based on.
var errEra = errors.New("the volume was restored meanwhile")

// enter lets a change of pages [p, p+n) in through a gate, with all that the map
// needs for it. It is errEra when the era is another than that given.
func (v *Volume) enter(ctx context.Context, g *gate, p pageNo, n, era uint64) (gen int, err error) {
	for {
		if gen, err = g.enter(ctx); err != nil {
			return 0, err
		}
		size := uint64(v.size.Load() / atoll.BlockSize)
		switch {
		case era != anyEra && era != v.era.Load():
			err = errEra
		case uint64(p) > size || n > size-uint64(p): // restored to a smaller size
			err = fmt.Errorf("pages %d to %d of a volume of %d: %w", p, uint64(p)+n, size, atoll.ErrInvalid)
		case v.pages.ready(p, n):
			return gen, nil
		}
		g.exit(gen)
		if err == nil {
			err = v.pages.prepare(ctx, p, n)
		}
		if err != nil {
			return 0, err
		}
	}
}

// writePages writes whole pages that lie in buf. The range is locked.
func (v *Volume) writePages(ctx context.Context, p pageNo, buf *host.Buffer, data []byte, era uint64) error {
	if v.wb != nil {
		return v.wb.add(ctx, p, buf, data, era)
	}
	for len(data) > 0 {
		n := min(len(data), maxParallel*atoll.MaxBatchBlocks*atoll.BlockSize)
		if err := v.logPages(ctx, p, buf, data[:n], era); err != nil {
			return err
		}
		p, data = p+pageNo(n/atoll.BlockSize), data[n:]
	}
	return nil
}

// logPages appends up to maxParallel entries' worth of pages, waits until they
// are durable and puts them into the map. Without space it waits for reclaim.
func (v *Volume) logPages(ctx context.Context, p pageNo, buf *host.Buffer, data []byte, era uint64) error {
	err := v.tryLogPages(ctx, p, buf, data, era)
	if err == nil || !errors.Is(err, atoll.ErrNoSpace) {
		return err
	}
	return v.untilSpace(ctx, err, func() error { return v.tryLogPages(ctx, p, buf, data, era) })
}

func (v *Volume) tryLogPages(ctx context.Context, p pageNo, buf *host.Buffer, data []byte, era uint64) error {
	gen, err := v.enter(ctx, &v.gate, p, uint64(len(data)/atoll.BlockSize), era)
	if err != nil {
		return err
	}
	defer v.gate.exit(gen)
	if len(data) <= atoll.MaxBatchBlocks*atoll.BlockSize {
		return v.logRun(ctx, p, buf, data)
	}
	var ops [maxParallel]*logOp
	n := 0
	for q := p; len(data) > 0 && err == nil; n++ {
		op := v.ops.Get().(*logOp)
		size := min(len(data), atoll.MaxBatchBlocks*atoll.BlockSize)
		op.pages = size / atoll.BlockSize
		op.entry.Add(segment.Record{Kind: kindData, Blocks: uint16(op.pages), Key: uint64(q)}, buf, data[:size])
		if err = v.store.Submit(ctx, catalog.Hot, op.entry); err != nil {
			break // the entry goes with op
		}
		ops[n] = op
		q, data = q+pageNo(op.pages), data[size:]
	}
	for _, op := range ops[:n] {
		e := op.entry.Wait(ctx)
		at := p
		p += pageNo(op.pages)
		if e != nil { // op is still the writer's, perhaps: it is not used again
			err = cmp.Or(err, e)
			continue
		}
		v.apply(at, op)
		op.entry.Reset()
		v.ops.Put(op)
	}
	return err
}

// logRun is logPages for one entry.
func (v *Volume) logRun(ctx context.Context, p pageNo, buf *host.Buffer, data []byte) error {
	op := v.ops.Get().(*logOp)
	op.pages = len(data) / atoll.BlockSize
	op.entry.Add(segment.Record{Kind: kindData, Blocks: uint16(op.pages), Key: uint64(p)}, buf, data)
	if err := v.store.Append(ctx, catalog.Hot, op.entry); err != nil {
		return err // op is still the writer's, perhaps: it is not used again
	}
	v.apply(p, op)
	op.entry.Reset()
	v.ops.Put(op)
	return nil
}

// apply puts what a durable entry holds, one run of pages, into the map.
func (v *Volume) apply(p pageNo, op *logOp) {
	o, b := op.entry.Seg().Ordinal, op.entry.Block(0)
	for i := range op.pages {
		op.locs[i] = v.pages.location(o, b+atoll.BlockNo(i), op.entry.CRC(i), uint64(p)+uint64(i))
	}
	v.pages.put(p, op.locs[:op.pages])
	v.logged(op.pages)
}

// logged counts a batch in the log and starts a checkpoint when it is time.
func (v *Volume) logged(blocks int) {
	n := int64(blocks+1) * atoll.BlockSize
	if v.reclaim.logged.Add(n) > gaugeBytes {
		v.gauge()
	}
	if v.logBytes.Add(n) > v.opts.CheckpointBytes || v.pages.crowded() {
		v.kickCheckpoint()
	}
}

func (v *Volume) kickCheckpoint() {
	select {
	case v.ckptKick <- struct{}{}:
	default:
	}
}

// logRecord appends a record without payload, durably.
func (v *Volume) logRecord(ctx context.Context, rec segment.Record) error {
	op := v.ops.Get().(*logOp)
	op.entry.Add(rec, nil, nil)
	if err := v.store.Append(ctx, catalog.Hot, op.entry); err != nil {
		return err
	}
	op.entry.Reset()
	v.ops.Put(op)
	v.logged(0)
	return nil
}

// Discard makes a range holes, which read as zeros; pages that are only partly
// in it are zeroed in that part. Its effect on the map is durable on return.
func (v *Volume) Discard(ctx context.Context, off, n int64, fua bool) error {
	return v.zero(ctx, "discard", off, n)
}

// Zero makes a range read as zeros. It never writes more than the pages at its
// edges, whether or not punch asks for holes, and is durable on return but, in
// writeback mode without fua, for those edges.
func (v *Volume) Zero(ctx context.Context, off, n int64, punch, fua bool) error {
	if err := v.zero(ctx, "zero", off, n); err != nil {
		return err
	}
	if fua && v.wb != nil {
		return v.Flush(ctx)
	}
	return nil
}

func (v *Volume) zero(ctx context.Context, what string, off, n int64) error {
	if err := v.check(what, off, n, true); err != nil || n == 0 {
		return err
	}
	r := span(off, n)
	if err := v.locks.lock(ctx, r); err != nil {
		return err
	}
	defer v.locks.unlock(r)
	err := v.check(what, off, n, true)
	if err == nil {
		err = v.zeroLocked(ctx, off, n)
	}
	if err != nil {
		return fmt.Errorf("%s %d bytes at %d: %w", what, n, off, err)
	}
	v.stats.discards.Add(1)
	return v.serving(what)
}

func (v *Volume) zeroLocked(ctx context.Context, off, n int64) error {
	// Even what has nothing to do must wait while a restore is in doubt: the
	// other state may have something there.
	gen, err := v.gate.enter(ctx)
	if err != nil {
		return err
	}
	v.gate.exit(gen)
	from := pageNo((off + atoll.BlockSize - 1) / atoll.BlockSize)
	to := pageNo((off + n) / atoll.BlockSize)
	if from > to { // inside one page
		return v.zeroEdge(ctx, off, n)
	}
	if head := int64(from)*atoll.BlockSize - off; head > 0 {
		if err := v.zeroEdge(ctx, off, head); err != nil {
			return err
		}
	}
	if tail := (off + n) % atoll.BlockSize; tail > 0 {
		if err := v.zeroEdge(ctx, off+n-tail, tail); err != nil {
			return err
		}
	}
	if from == to {
		return nil
	}
	return v.dropPages(ctx, from, uint64(to-from))
}

// zeroEdge zeroes a part of one page, which is locked.
func (v *Volume) zeroEdge(ctx context.Context, off, n int64) error {
	p := pageNo(off / atoll.BlockSize)
	var loc [1]atoll.Location
	if err := v.pages.lookup(ctx, p, loc[:]); err != nil {
		return err
	}
	if loc[0] == 0 && !v.wb.holds(p, 1) {
		return nil
	}
	buf := host.Alloc(int(n))
	defer buf.Release()
	clear(buf.Bytes())
	return v.writeCopied(ctx, buf.Bytes(), off)
}

// dropPages makes locked pages holes: one record, then the map.
func (v *Volume) dropPages(ctx context.Context, p pageNo, n uint64) error {
	if v.wb.holds(p, n) {
		// Pages in flight must be in the log, and in the map, before the
		// record; the lock keeps new ones out.
		if err := v.wb.flush(ctx); err != nil {
			return err
		}
	}
	if v.pages.holes(p, n) {
		return nil
	}
	gen, err := v.enter(ctx, &v.gate, p, n, anyEra)
	if err != nil {
		return err
	}
	defer v.gate.exit(gen)
	if err := v.logFree(ctx, segment.Record{Kind: kindDiscard, Key: uint64(p), Aux: n}); err != nil {
		return err
	}
	v.pages.clear(p, n)
	return nil
}

// logFree appends a record of what takes no space, durably: without room it may
// lie in what is kept for what gives space back.
func (v *Volume) logFree(ctx context.Context, rec segment.Record) error {
	err := v.logRecord(ctx, rec)
	if !errors.Is(err, atoll.ErrNoSpace) {
		return err
	}
	e := v.store.NewEntry()
	e.Add(rec, nil, nil)
	if _, err := v.store.AppendMark(ctx, e); err != nil {
		return err
	}
	v.reclaim.short.Store(true)
	v.kickCheckpoint()
	return nil
}

// Resize changes the size; what lies beyond a smaller one is discarded, and
// reads as zeros if the volume grows again. Durable on return.
func (v *Volume) Resize(ctx context.Context, size int64) error {
	if err := v.check("resize", 0, 0, true); err != nil {
		return err
	}
	if err := CheckSize(size); err != nil {
		return err
	}
	if err := v.lockCheckpoint(ctx); err != nil {
		return err
	}
	old := v.size.Load()
	r := span(min(size, old), max(size, old)-min(size, old))
	if err := v.locks.lock(ctx, r); err != nil {
		<-v.ckpt
		return err
	}
	unlock := func() {
		v.locks.unlock(r)
		<-v.ckpt
	}
	doubt, err := v.resizeLocked(ctx, old, size)
	if doubt { // of what is written beyond a smaller size nothing would be left
		err = v.doubt(ctx, err, unlock)
	} else {
		unlock()
	}
	if err != nil {
		return fmt.Errorf("resize volume %v to %d bytes: %w", v.id, size, err)
	}
	return v.serving("resize")
}

// resizeLocked resizes; doubt tells that it failed and may have happened. The
// range between the sizes and the checkpoint token are locked.
func (v *Volume) resizeLocked(ctx context.Context, old, size int64) (doubt bool, err error) {
	if size == old {
		return false, nil
	}
	r := span(size, max(old-size, 0))
	if size < old {
		if v.wb.holds(r.from, uint64(r.to-r.from)) {
			if err := v.wb.flush(ctx); err != nil {
				return false, err
			}
		}
		if err := v.pages.prepare(ctx, r.from, uint64(r.to-r.from)); err != nil {
			return false, err
		}
	}
	gen, err := v.gate.enter(ctx)
	if err != nil {
		return false, err
	}
	err = v.logFree(ctx, segment.Record{Kind: kindResize, Key: uint64(size)})
	if err == nil {
		v.size.Store(size)
		v.pages.resize(old, size)
	}
	v.gate.exit(gen)
	if err != nil {
		return true, err
	}
	return false, v.store.Update(ctx, func(m *catalogMedium) { m.Size = size })
}

// allZero reports whether p holds nothing but zeros.
func allZero(p []byte) bool {
	if len(p) == 0 || p[0] != 0 {
		return false
	}
	return bytes.Equal(p[:len(p)-1], p[1:])
}
