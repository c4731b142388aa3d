package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
)

const (
	// Pauses of the background checkpoint after an error.
	ckptRetryMin = time.Second
	ckptRetryMax = 30 * time.Second
)

// recover loads the root and replays the log behind it.
func (v *Volume) recover(ctx context.Context, size int64) error {
	st := v.store.State()
	v.hist.parent = st.CurParent
	t := newTree(uint64(size / atoll.BlockSize))
	if root := v.store.Root(); len(root) > 0 {
		r, top, err := decodeRoot(root)
		if err != nil {
			return err
		}
		if r.Medium == v.id {
			v.hist.event = r.Event
		} else if !slices.ContainsFunc(st.Ancestors, func(a catalog.Ancestor) bool { return a.Medium == r.Medium }) {
			// A clone begins with a root of its parent's.
			return fmt.Errorf("the root is that of medium %v: %w", r.Medium, atoll.ErrCorrupt)
		}
		r.Flat = r.Flat && r.Medium == v.id
		size = r.Size
		t.adopt(r, slices.Clone(top)) // the present map changes, the root does not
		v.durable.Store(&rooted{info: r, tops: top})
	} else if err := CheckSize(size); err != nil {
		return err
	}
	for i := range st.Versions {
		t.epoch = max(t.epoch, st.Versions[i].Epoch+1)
	}
	t.led.own, t.led.held = v.base, v.horizon(&st, st.CurParent)
	v.size.Store(size)
	v.pages = newPageMap(v.store, v.opts.MapBytes, t)
	if _, view := v.store.(viewStore); view {
		return nil
	}
	begun, records := time.Now(), 0
	err := v.store.Replay(ctx, func(r medium.Record) error {
		records++
		return v.replay(ctx, r)
	})
	if err != nil {
		return fmt.Errorf("replay: %w", err)
	}
	v.opts.Metrics.replayed(time.Since(begun))
	v.log.InfoContext(ctx, "volume opened", "len", v.size.Load(), "records", records, "dur", time.Since(begun))
	return nil
}

// replay applies one record of the log to the map.
func (v *Volume) replay(ctx context.Context, r medium.Record) error {
	pages := uint64(v.size.Load() / atoll.BlockSize)
	bad := func() error {
		return fmt.Errorf("record of kind %d, key %d, aux %d at %d:%d is beyond a volume of %d pages: %w", r.Kind, r.Key, r.Aux, r.Seg, r.Block, pages, atoll.ErrCorrupt)
	}
	v.logBytes.Add(int64(r.Blocks+1) * atoll.BlockSize)
	switch r.Kind {
	case kindData:
		return v.replayData(ctx, r, pages, bad)
	case kindDiscard:
		if r.Key > pages || r.Aux > pages-r.Key {
			if r.Key >= maxPages || r.Aux > maxPages {
				return bad()
			}
			r.Aux = pages - min(pages, r.Key)
		}
		if err := v.pages.prepare(ctx, pageNo(r.Key), r.Aux); err != nil {
			return err
		}
		v.pages.clear(pageNo(r.Key), r.Aux)
	case kindResize:
		size, old := int64(r.Key), v.size.Load()
		if CheckSize(size) != nil {
			return bad()
		}
		if size < old {
			if err := v.pages.prepare(ctx, pageNo(size/atoll.BlockSize), uint64(old-size)/atoll.BlockSize); err != nil {
				return err
			}
		}
		v.size.Store(size)
		v.pages.resize(old, size)
	case kindSnapshot, kindRestore:
		return v.replayEvent(ctx, r)
	default:
		return fmt.Errorf("record of kind %d at %d:%d: %w", r.Kind, r.Seg, r.Block, atoll.ErrVersion)
	}
	return nil
}

const maxPages = atoll.MaxVolumeSize / atoll.BlockSize

// replayData puts a record's pages into the map. The root may hold a resize
// that comes after the record, so pages beyond the present end are left out:
// the resize discards them.
func (v *Volume) replayData(ctx context.Context, r medium.Record, pages uint64, bad func() error) error {
	if r.Key >= maxPages || int(r.Blocks) != len(r.CRCs) {
		return bad()
	}
	n := min(uint64(r.Blocks), pages-min(pages, r.Key))
	if err := v.pages.prepare(ctx, pageNo(r.Key), n); err != nil {
		return err
	}
	locs := make([]atoll.Location, n)
	for i := range locs {
		locs[i] = v.pages.location(r.Seg, r.Block+atoll.BlockNo(i), r.CRCs[i], r.Key+uint64(i))
	}
	v.pages.put(pageNo(r.Key), locs)
	return nil
}

// checkpoints runs checkpoints in the background when the log has grown.
func (v *Volume) checkpoints() {
	rest := ckptRetryMin
	for {
		select {
		case <-v.ckptKick:
		case <-v.ctx.Done():
			return
		}
		if !v.checkpointDue() {
			continue
		}
		err := v.checkpoint(v.ctx)
		if err == nil || v.ctx.Err() != nil || errors.Is(err, atoll.ErrFenced) {
			rest = ckptRetryMin
			continue
		}
		v.log.WarnContext(v.ctx, "checkpoint put off", "err", err, "dur", rest)
		timer := time.NewTimer(rest)
		select {
		case <-timer.C:
		case <-v.ctx.Done():
		}
		timer.Stop()
		rest = min(2*rest, ckptRetryMax)
	}
}

// checkpointDue bounds what checkpoints write by an eighth of the log, unless
// the map does not fit in memory otherwise, space is short, or much waits for
// one to be reclaimed.
func (v *Volume) checkpointDue() bool {
	v.pages.mu.Lock()
	dirty, crowded := v.pages.t.dirtyBytes(), v.pages.t.crowded(v.pages.limit)
	v.pages.mu.Unlock()
	logged, limit := v.logBytes.Load(), max(v.opts.CheckpointBytes, 8*dirty)
	urgent := v.reclaim.urgent.Load()
	switch {
	case v.reclaim.short.Load():
		limit = max(shortBytes, dirty)
	case urgent != 0:
		limit = min(limit, max(urgent, 16*dirty))
	case v.store.Waiting() > v.opts.CheckpointBytes:
		limit = 0
	}
	return crowded || logged > limit
}

// Checkpoint makes the present map the one that the next Open begins with, so
// that it need not replay the log so far. Writes go on meanwhile.
func (v *Volume) Checkpoint(ctx context.Context) error {
	if err := v.check("checkpoint", 0, 0, true); err != nil {
		return err
	}
	return v.checkpoint(ctx)
}

func (v *Volume) lockCheckpoint(ctx context.Context) error {
	select {
	case v.ckpt <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a checkpoint of volume %v: %w: %w", v.id, atoll.ErrTimeout, ctx.Err())
	}
}

// errYield ends a checkpoint to let a backup in.
var errYield = errors.New("a backup wants to go first")

// yield returns errYield when a backup waits for a checkpoint to end.
func (v *Volume) yield() error {
	if v.hist.waiting.Load() > 0 {
		return errYield
	}
	return nil
}

// checkpoint writes one, after the backups that come in between.
func (v *Volume) checkpoint(ctx context.Context) error {
	for {
		err := v.tryCheckpoint(ctx)
		if err != errYield {
			return err
		}
		if err := v.hist.pass(ctx); err != nil {
			return err
		}
	}
}

func (v *Volume) tryCheckpoint(ctx context.Context) error {
	if err := v.lockCheckpoint(ctx); err != nil {
		return err
	}
	defer func() { <-v.ckpt }()
	return v.checkpointLocked(ctx, v.yield)
}

// checkpointLocked writes a checkpoint, unless stop ends it. The token is held.
func (v *Volume) checkpointLocked(ctx context.Context, stop func() error) error {
	if stop != nil {
		if err := stop(); err != nil {
			return err
		}
	}
	begun, logged := time.Now(), v.logBytes.Load()
	ver, mark, err := v.freeze(ctx, nil)
	if err != nil {
		return err
	}
	write := func() error { return v.writeVersion(ctx, ver, stop) }
	if err := v.untilSpace(ctx, write(), write); err != nil {
		v.abandon(ver)
		if err == errYield {
			return err
		}
		return fmt.Errorf("checkpoint volume %v: %w", v.id, err)
	}
	commit := func() error {
		return v.commit(ctx, medium.Commit{Mark: mark, Root: v.rootOf(ver, v.hist.lastEvent())}, ver.led, nil)
	}
	err = v.untilSpace(ctx, commit(), commit)
	v.finish(ver, err == nil)
	if err != nil {
		// The map's pages have their new places whichever root stands; only
		// the log must be kept.
		return fmt.Errorf("checkpoint volume %v: %w", v.id, err)
	}
	v.hist.doubt.Store(false)
	v.checkpointed(begun, logged)
	return nil
}

// freeze takes a mark and fixes the map as it is then or a little later. With
// doom, which tells what the version above the present state's own has, what
// that own one alone holds is counted apart from then on. The checkpoint token
// is held.
func (v *Volume) freeze(ctx context.Context, doom *horizon) (*version, medium.Mark, error) {
	mark := v.store.Mark()
	// What was in the log before the mark must be in the map (V2).
	if err := v.gate.drain(ctx); err != nil {
		return nil, mark, err
	}
	v.pages.mu.Lock()
	defer v.pages.mu.Unlock()
	ver := v.pages.t.freeze(v.size.Load())
	if doom != nil {
		v.pages.t.led.sentence(*doom)
	}
	return ver, mark, nil
}

func (v *Volume) abandon(ver *version) {
	v.pages.mu.Lock()
	ver.t.abandon(ver)
	v.pages.mu.Unlock()
}

// finish ends the life of a frozen version that was written as a whole.
func (v *Volume) finish(ver *version, root bool) {
	m := v.pages
	m.mu.Lock()
	ver.t.finish(ver, root)
	m.t.evict(m.limit)
	m.mu.Unlock()
}

// checkpointed notes that replay begins anew at what was logged then.
func (v *Volume) checkpointed(begun time.Time, logged int64) {
	v.logBytes.Add(-logged)
	v.stats.checkpoints.Add(1)
	v.opts.Metrics.checkpointed(time.Since(begun))
	v.log.DebugContext(v.ctx, "map checkpoint written", "dur", time.Since(begun))
	v.kickReclaim()
}

func (v *Volume) lockCommit(ctx context.Context) error {
	select {
	case v.commits <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a manifest: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
}

func (v *Volume) unlockCommit() { <-v.commits }

// commit gives the changes of live counts to the medium, those of the new root
// and those of the versions that go, and changes the manifest (V3). One at a
// time, so that outside of it the medium's counts are those of its manifest.
// After an error they are again.
func (v *Volume) commit(ctx context.Context, c medium.Commit, led, frees *ledger) error {
	if err := v.lockCommit(ctx); err != nil {
		return err
	}
	defer v.unlockCommit()
	sum := newLedger()
	if led != nil {
		sum.fold(led)
	}
	if frees != nil {
		frees.each(func(o atoll.Ordinal, d int) { sum.blocks(o, -d) })
	}
	sum.each(v.store.Live)
	err := v.store.Commit(ctx, c)
	if err != nil {
		sum.each(func(o atoll.Ordinal, d int) { v.store.Live(o, -d) })
		return err
	}
	if len(c.Root) > 0 {
		if r, err := parseRooted(v.pages, c.Root); err == nil {
			v.durable.Store(r)
		}
	}
	return nil
}

// rootOf returns the root of a version that was written as a whole and has the
// effect of the events up to the given one.
func (v *Volume) rootOf(ver *version, event uint64) []byte {
	for ni := range ver.top {
		if ver.flat && ver.top[ni].loc != 0 && ver.top[ni].loc.Ordinal() < v.base {
			panic(fmt.Sprintf("flat %d %v %v dirty %v", ni, ver.top[ni].loc, v.base, ver.top[ni].node))
		}
	}
	return encodeRoot(rootInfo{
		Medium: v.id, Size: ver.size, Epoch: ver.epoch, Mapped: ver.mapped + ver.led.mapped, Event: event, Flat: ver.flat,
	}, ver.top)
}
