package volume

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Flatten copies what a clone has of its ancestors into its own log, so that
// they are no longer needed: not by the present state when it returns nil, and
// not at all when the versions made before are gone as well; then the volume
// lets go of them. Reads and writes go on meanwhile. progress, if not nil, is
// told bytes looked at and bytes in all. Started again it goes on where it was.
func (v *Volume) Flatten(ctx context.Context, progress func(done, total int64)) error {
	if err := v.check("flatten", 0, 0, true); err != nil {
		return err
	}
	if len(v.store.State().Ancestors) == 0 {
		return nil
	}
	for try := 0; ; try++ {
		err := v.flatten(ctx, progress)
		if err == nil {
			break
		}
		if err != errEra || try == readTries {
			return fmt.Errorf("flatten volume %v: %w", v.id, notEra(err))
		}
	}
	if err := v.checkpoint(ctx); err != nil {
		return fmt.Errorf("flatten volume %v: %w", v.id, err)
	}
	v.detach(ctx)
	return v.serving("flatten")
}

func (v *Volume) flatten(ctx context.Context, progress func(done, total int64)) error {
	era := v.era.Load()
	buf := host.Alloc(fan * atoll.BlockSize)
	defer func() { buf.Release() }()
	for off := int64(0); off < v.size.Load(); {
		p := pageNo(off / atoll.BlockSize)
		pages := v.pages.skip(p)
		if pages == 0 {
			pages = uint64(fan - p.slot())
			if err := v.flattenLeaf(ctx, p, &buf); err != nil {
				return err
			}
		}
		off = min(off+int64(pages)*atoll.BlockSize, v.size.Load())
		if progress != nil {
			progress(off, v.size.Load())
		}
	}
	if err := v.wb.flush(ctx); err != nil {
		return err
	}
	if err := v.flattenNodes(ctx); err != nil {
		return err
	}
	v.pages.mu.Lock()
	defer v.pages.mu.Unlock()
	if v.era.Load() != era {
		return errEra
	}
	v.pages.t.flat = true
	return nil
}

// flattenNodes has the nodes that are an ancestor's written anew, also those
// beyond the end, which are empty.
func (v *Volume) flattenNodes(ctx context.Context) error {
	m := v.pages
	for ni := 0; ; {
		m.mu.Lock()
		switch {
		case ni >= len(m.t.top):
			m.mu.Unlock()
			return nil
		case m.t.top[ni].loc == 0 || m.t.top[ni].loc.Ordinal() >= v.base:
			ni++
		case m.t.top[ni].node != nil:
			m.t.writableNode(uint32(ni))
			ni++
		default:
			m.mu.Unlock()
			if err := m.prepare(ctx, pageNo(ni)<<nodeBits, 1); err != nil {
				return err
			}
			continue
		}
		m.mu.Unlock()
	}
}

// flattenLeaf copies the pages of the leaf that begins at page p. Pages that
// are not in the log yet are written there anyway.
func (v *Volume) flattenLeaf(ctx context.Context, p pageNo, buf **host.Buffer) error {
	r := pageRange{p, p + fan}
	if err := v.locks.lock(ctx, r); err != nil {
		return err
	}
	defer v.locks.unlock(r)
	era := v.era.Load()
	size := pageNo(v.size.Load() / atoll.BlockSize)
	if p >= size {
		return nil
	}
	var all [fan]atoll.Location
	locs := all[:min(fan, size-p)]
	if err := v.pages.lookup(ctx, p, locs); err != nil {
		return err
	}
	foreign := func(i int) bool { return locs[i] != 0 && locs[i].Ordinal() < v.base && !v.wb.holds(p+pageNo(i), 1) }
	for i := 0; i < len(locs); {
		j := i
		for j < len(locs) && foreign(j) {
			j++
		}
		if j == i {
			i++
			continue
		}
		b := host.Alloc((j - i) * atoll.BlockSize) // writeback keeps it
		err := v.readPages(ctx, p+pageNo(i), b.Bytes())
		if err == nil {
			err = v.writePages(ctx, p+pageNo(i), b, b.Bytes(), era)
		}
		b.Release()
		if err != nil {
			return err
		}
		i = j
	}
	return nil
}

// detach gives up the ancestors when no root names their blocks any more.
func (v *Volume) detach(ctx context.Context) {
	st := v.store.State()
	root := v.durable.Load()
	if len(st.Ancestors) == 0 || root == nil || !root.info.Flat || root.info.Medium != v.id {
		return
	}
	for _, p := range st.Versions {
		s, err := v.source(ctx, p.Number)
		if err != nil || !s.info.Flat {
			return
		}
	}
	if err := v.store.Detach(ctx); err != nil && ctx.Err() == nil {
		v.log.WarnContext(ctx, "ancestors not given up; will be tried again", "err", err)
	}
}
