package volume

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

const (
	// leafBatch and nodeBatch are how many map pages go into one entry.
	leafBatch = 64
	nodeBatch = 32
	// Pauses of the background checkpoint after an error.
	ckptRetryMin = time.Second
	ckptRetryMax = 30 * time.Second
)

// recover loads the root and replays the log behind it.
func (v *Volume) recover(ctx context.Context, size int64) error {
	t := newTree(uint64(size / atoll.BlockSize))
	if root := v.store.Root(); len(root) > 0 {
		r, top, err := decodeRoot(root)
		if err != nil {
			return err
		}
		if r.Medium != v.id {
			return fmt.Errorf("the root is that of medium %v: %w", r.Medium, atoll.ErrCorrupt)
		}
		size = r.Size
		t.top, t.epoch = top, r.Epoch+1
		t.resize(uint64(size / atoll.BlockSize))
		v.mapped.Store(r.Mapped)
	} else if err := CheckSize(size); err != nil {
		return err
	}
	v.size.Store(size)
	v.pages = newPageMap(v.store, v.opts.MapBytes, t)
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
// the map does not fit in memory otherwise.
func (v *Volume) checkpointDue() bool {
	v.pages.mu.Lock()
	dirty, crowded := v.pages.t.dirtyBytes(), v.pages.t.crowded(v.pages.limit)
	v.pages.mu.Unlock()
	return crowded || v.logBytes.Load() > max(v.opts.CheckpointBytes, 8*dirty)
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

func (v *Volume) checkpoint(ctx context.Context) error {
	if err := v.lockCheckpoint(ctx); err != nil {
		return err
	}
	defer func() { <-v.ckpt }()
	begun, logged := time.Now(), v.logBytes.Load()
	mark := v.store.Mark()
	// What was in the log before the mark must be in the map (V2).
	if err := v.gate.drain(ctx); err != nil {
		return err
	}
	m := v.pages
	m.mu.Lock()
	ver := m.t.freeze(v.size.Load())
	m.mu.Unlock()
	err := v.writeVersion(ctx, ver)
	if err != nil {
		m.mu.Lock()
		m.t.abandon(ver)
		m.mu.Unlock()
		return fmt.Errorf("checkpoint volume %v: %w", v.id, err)
	}
	err = v.store.Checkpoint(ctx, mark, v.rootOf(ver))
	m.mu.Lock()
	m.t.finish(ver)
	m.t.evict(m.limit)
	m.mu.Unlock()
	if err != nil {
		// The map's pages have their new places whichever root stands; only
		// the log must be kept.
		return fmt.Errorf("checkpoint volume %v: %w", v.id, err)
	}
	v.logBytes.Add(-logged)
	v.stats.checkpoints.Add(1)
	v.opts.Metrics.checkpointed(time.Since(begun))
	v.log.DebugContext(ctx, "map checkpoint written", "dur", time.Since(begun))
	return nil
}

// rootOf gives the version's ledger to the medium (V3) and returns its root.
func (v *Volume) rootOf(ver *version) []byte {
	ver.led.each(v.store.Live)
	mapped := v.mapped.Add(ver.led.mapped)
	return encodeRoot(rootInfo{Medium: v.id, Size: ver.size, Epoch: ver.epoch, Mapped: mapped}, ver.top)
}

// writeVersion writes the dirty leaves of a version, then its dirty nodes.
func (v *Volume) writeVersion(ctx context.Context, ver *version) error {
	w := mapWriter{v: v, ver: ver, entry: v.store.NewEntry()}
	batch := make([]uint32, 0, leafBatch)
	for li, ok := ver.first(v.pages); ok; {
		batch = batch[:0]
		v.pages.mu.Lock()
		for next := li; ok && len(batch) < leafBatch; next = li + 1 {
			if li, ok = ver.nextDirty(next); ok {
				batch = append(batch, li)
			}
		}
		v.pages.mu.Unlock()
		if err := w.leaves(ctx, batch); err != nil {
			return err
		}
		li++
	}
	for ni := uint32(0); ; {
		batch = batch[:0]
		v.pages.mu.Lock()
		for len(batch) < nodeBatch {
			next, ok := ver.nextDirtyNode(ni)
			if !ok {
				break
			}
			batch, ni = append(batch, next), next+1
		}
		v.pages.mu.Unlock()
		if len(batch) == 0 {
			return nil
		}
		if err := w.nodes(ctx, batch); err != nil {
			return err
		}
	}
}

// first returns the first dirty leaf.
func (v *version) first(m *pageMap) (uint32, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return v.nextDirty(0)
}

// mapWriter writes pages of the map to the bulk lane.
type mapWriter struct {
	v     *Volume
	ver   *version
	entry Entry
}

// leaves completes the given leaves from the log, writes them and tells the
// tree where they are.
func (w *mapWriter) leaves(ctx context.Context, batch []uint32) error {
	m := w.v.pages
	for _, li := range batch {
		if err := w.complete(ctx, li); err != nil {
			return err
		}
	}
	buf := host.Alloc(len(batch) * atoll.BlockSize)
	defer buf.Release()
	recs := make([]int, len(batch)) // the leaf's record in the entry, -1 if empty
	w.entry.Reset()
	for i, li := range batch {
		p := buf.Bytes()[i*atoll.BlockSize:][:atoll.BlockSize]
		m.mu.Lock()
		l, _ := w.ver.leaf(li)
		empty := l.empty()
		if !empty {
			l.encode(p)
		}
		birth := l.birth
		m.mu.Unlock()
		recs[i] = -1
		if !empty {
			recs[i] = w.entry.Records()
			w.entry.Add(segment.Record{Kind: kindLeaf, Blocks: 1, Key: uint64(li), Aux: uint64(birth)}, buf, p)
		}
	}
	if err := w.append(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, li := range batch {
		var loc atoll.Location
		if r := recs[i]; r >= 0 {
			loc = m.location(w.entry.Seg().Ordinal, w.entry.Block(r), w.entry.CRC(r), leafKey|uint64(li))
		}
		m.t.leafWritten(w.ver, li, loc)
	}
	if m.t.mem > m.limit {
		m.t.evict(m.limit)
	}
	return nil
}

// complete merges what the log holds for a leaf under it, if that is owed.
func (w *mapWriter) complete(ctx context.Context, li uint32) error {
	m := w.v.pages
	m.mu.Lock()
	l, loc := w.ver.leaf(li)
	owed := l.owed
	m.mu.Unlock()
	if !owed {
		return nil
	}
	buf, err := m.fetch(ctx, want{leaf: true, idx: li, loc: loc})
	if err != nil {
		return err
	}
	base := decodeLeaf(buf.Bytes())
	buf.Release()
	m.mu.Lock()
	m.t.mergeFrozen(w.ver, li, base)
	m.mu.Unlock()
	return nil
}

// nodes writes the given nodes; their leaves are written already.
func (w *mapWriter) nodes(ctx context.Context, batch []uint32) error {
	m := w.v.pages
	const size = nodeBlocks * atoll.BlockSize
	buf := host.Alloc(len(batch) * size)
	defer buf.Release()
	w.entry.Reset()
	for i, ni := range batch {
		p := buf.Bytes()[i*size:][:size]
		m.mu.Lock()
		nd := w.ver.top[ni].node
		encodeNode(p, m.medium, ni, nd)
		birth := nd.birth
		m.mu.Unlock()
		w.entry.Add(segment.Record{Kind: kindNode, Blocks: nodeBlocks, Key: uint64(ni), Aux: uint64(birth)}, buf, p)
	}
	if err := w.append(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, ni := range batch {
		loc := m.location(w.entry.Seg().Ordinal, w.entry.Block(i), w.entry.CRC(i*nodeBlocks), nodeKey|uint64(ni))
		m.t.nodeWritten(w.ver, ni, loc)
	}
	return nil
}

// append writes the entry if there is something in it. An entry whose outcome
// is unknown is left to the writer.
func (w *mapWriter) append(ctx context.Context) error {
	if w.entry.Records() == 0 {
		return nil
	}
	err := w.v.store.Submit(ctx, catalog.Bulk, w.entry)
	if err == nil {
		err = w.entry.Wait(ctx)
	}
	if err != nil {
		w.entry = w.v.store.NewEntry()
	}
	return err
}
