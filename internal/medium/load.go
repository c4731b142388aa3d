package medium

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// loadManifest fills the table from the manifest and the head.
func (m *Medium) loadManifest(ctx context.Context) error {
	h, info := m.own.head(), m.Info()
	base := info.Base()
	man := &manifest{Medium: m.id, Mark: Mark{Ordinal: base, Seq: 1, Bulk: base}}
	if h.Manifest != nil {
		m.mu.ref = fromBlockRef(h.Manifest)
		var err error
		if man, err = loadRoot(m.id, m.mu.ref, func(r Ref) ([]byte, error) { return m.readOwn(ctx, r) }); err != nil {
			return fmt.Errorf("load manifest: %w", err)
		}
	}
	m.mu.man, m.mu.lastNumber = man, man.LastNumber
	for i := range max(man.First, int(base-1)/chunkEntries) {
		m.table.install(i, nil)
	}
	for i, r := range man.Chunks {
		if err := m.loadChunk(ctx, man.First+i, r); err != nil {
			return err
		}
	}
	m.mergeHead(h)
	m.countOwn()
	if err := m.loadRemaps(ctx); err != nil {
		return err
	}
	return m.loadKind(ctx)
}

// loadRoot reads a manifest and its versions.
func loadRoot(id atoll.MediumID, ref Ref, read func(Ref) ([]byte, error)) (*manifest, error) {
	p, err := read(ref)
	if err != nil {
		return nil, err
	}
	man, err := parseManifest(p)
	if err != nil {
		return nil, err
	}
	if man.Medium != id {
		return nil, fmt.Errorf("it is of medium %v: %w", man.Medium, atoll.ErrCorrupt)
	}
	return man, man.loadPages(read)
}

func (m *Medium) loadChunk(ctx context.Context, i int, r Ref) error {
	if r.IsZero() {
		m.table.install(i, nil)
		return nil
	}
	entries, err := readChunk(m.id, i, r, func(r Ref) ([]byte, error) { return m.readOwn(ctx, r) })
	if err != nil {
		return err
	}
	m.table.load(i, r, entries)
	first := atoll.Ordinal(i*chunkEntries + 1)
	for j, e := range entries {
		if e.State == stateDropped || e.State == stateVirtual && !e.Removed {
			m.mu.doomed = append(m.mu.doomed, doomed{ordinal: first + atoll.Ordinal(j), due: time.Now().Add(m.opts.Grace)})
		}
	}
	return nil
}

// readChunk reads chunk i of a medium's segment table.
func readChunk(id atoll.MediumID, i int, r Ref, read func(Ref) ([]byte, error)) ([]entry, error) {
	p, err := read(r)
	if err != nil {
		return nil, fmt.Errorf("load chunk %d of the segment table: %w", i, err)
	}
	of, first, entries, err := parseChunk(p)
	if err != nil {
		return nil, fmt.Errorf("load chunk %d: %w", i, err)
	}
	if of != id || first != atoll.Ordinal(i*chunkEntries+1) {
		return nil, fmt.Errorf("load chunk %d: it is of medium %v from %d on: %w", i, of, first, atoll.ErrCorrupt)
	}
	return entries, nil
}

// readRemap reads the remap of a segment.
func readRemap(id atoll.MediumID, o atoll.Ordinal, r Ref, read func(Ref) ([]byte, error)) (*remap, error) {
	p, err := read(r)
	if err != nil {
		return nil, fmt.Errorf("load remap of segment %d: %w", o, err)
	}
	rm, err := parseRemap(p)
	if err != nil {
		return nil, err
	}
	if rm.Medium != id || rm.Ordinal != o {
		return nil, fmt.Errorf("load remap of segment %d: it is of %v-%d: %w", o, rm.Medium, rm.Ordinal, atoll.ErrCorrupt)
	}
	return rm, nil
}

// loadRemaps reads where the blocks of compacted segments went, some at once.
func (m *Medium) loadRemaps(ctx context.Context) error {
	refs := map[atoll.Ordinal]Ref{}
	for o, r := range m.table.rare {
		if !r.remap.IsZero() {
			refs[o] = r.remap
		}
	}
	todo := make(chan atoll.Ordinal, len(refs))
	for o := range refs {
		todo <- o
	}
	close(todo)
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() {
			for o := range todo {
				r, err := readRemap(m.id, o, refs[o], func(r Ref) ([]byte, error) { return m.readOwn(ctx, r) })
				if err != nil {
					errs[i] = err
					return
				}
				m.mu.Lock()
				m.table.setRemap(o, refs[o], r)
				m.mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// mergeHead adds to the table what the head says.
func (m *Medium) mergeHead(h catalog.Head) {
	for _, s := range h.Sealed {
		m.settleLocked(s.Seg, entry{State: stateLive, Lane: s.Lane, Copyset: s.Seg.Copyset, Length: s.Length, Unverified: s.Unverified})
	}
	for _, d := range h.Dropped {
		m.settleLocked(d, entry{State: stateDropped, Copyset: d.Copyset})
	}
	for _, u := range h.Unsealed {
		m.settleLocked(u.Seg, entry{State: stateOpen, Lane: u.Lane, Copyset: u.Seg.Copyset, Size: u.Size})
	}
}

// countOwn counts the records of the manifest that was loaded.
func (m *Medium) countOwn() {
	m.table.own(m.mu.ref, +1)
	m.table.own(m.mu.man.RootRef, +1)
	m.table.ownVersions(m.mu.man, +1)
	for _, c := range m.mu.man.Chunks {
		m.table.own(c, +1)
	}
}

// loadKind reads the kind's root if it is not inline. A clone that has none yet
// begins with that of its parent's version.
func (m *Medium) loadKind(ctx context.Context) error {
	man := m.mu.man
	m.root = man.Root
	if parent := m.Info().Parent; m.mu.ref.IsZero() && parent != nil {
		root, err := m.line.Load().root(ctx, parent.Version)
		if err != nil {
			return fmt.Errorf("load the parent's root: %w", err)
		}
		m.root = root
	}
	if man.RootRef.IsZero() {
		return nil
	}
	p, err := m.readOwn(ctx, man.RootRef)
	if err != nil {
		return fmt.Errorf("load root: %w", err)
	}
	if man.RootLen > len(p) {
		return fmt.Errorf("load root: %d bytes of %d: %w", len(p), man.RootLen, atoll.ErrCorrupt)
	}
	m.root = p[:man.RootLen]
	return nil
}
