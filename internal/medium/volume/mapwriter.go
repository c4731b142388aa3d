package volume

import (
	"cmp"
	"context"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

const (
	// leafBatch and nodeBatch are how many map pages go into one entry.
	leafBatch = 64
	nodeBatch = 32
	// mapEntries is how many entries of map pages are in the log at once.
	mapEntries = 8
)

// writeVersion writes the dirty leaves of a version, then its dirty nodes. It
// ends with the error of stop, which it asks now and then, if that is not nil.
// It may be called again after an error.
func (v *Volume) writeVersion(ctx context.Context, ver *version, stop func() error) error {
	w := mapWriter{v: v, ver: ver}
	err := w.eachBatch(leafBatch, ver.nextDirty, func(batch []uint32) error {
		if stop != nil {
			if err := stop(); err != nil {
				return err
			}
		}
		return w.leaves(ctx, batch)
	})
	if err = cmp.Or(err, w.drain(ctx)); err != nil {
		return err
	}
	err = w.eachBatch(nodeBatch, ver.nextDirtyNode, func(batch []uint32) error { return w.nodes(ctx, batch) })
	return cmp.Or(err, w.drain(ctx))
}

// mapWriter writes pages of the map to the bulk lane, several entries at once.
type mapWriter struct {
	v      *Volume
	ver    *version
	flight []mapEntry
	free   []Entry
}

// mapEntry is an entry on its way; done tells the tree where its pages are, and
// is called with the map locked.
type mapEntry struct {
	entry Entry // nil when there was nothing to write
	done  func(e Entry)
}

// eachBatch calls fn with the numbers that next gives, at most size at a time.
func (w *mapWriter) eachBatch(size int, next func(from uint32) (uint32, bool), fn func(batch []uint32) error) error {
	batch := make([]uint32, 0, size)
	for from := uint32(0); ; {
		batch = batch[:0]
		w.v.pages.mu.Lock()
		for len(batch) < size {
			i, ok := next(from)
			if !ok {
				break
			}
			batch, from = append(batch, i), i+1
		}
		w.v.pages.mu.Unlock()
		if len(batch) == 0 {
			return nil
		}
		if err := fn(batch); err != nil {
			return err
		}
	}
}

// leaves completes the given leaves from the log and writes them.
func (w *mapWriter) leaves(ctx context.Context, batch []uint32) error {
	m := w.v.pages
	if err := w.complete(ctx, batch); err != nil {
		return err
	}
	buf := host.Alloc(len(batch) * atoll.BlockSize)
	defer buf.Release()
	list := append([]uint32(nil), batch...)
	recs := make([]int, len(list)) // the leaf's record in the entry, -1 if empty
	e := w.entry()
	for i, li := range list {
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
			recs[i] = e.Records()
			e.Add(segment.Record{Kind: kindLeaf, Blocks: 1, Key: uint64(li), Aux: uint64(birth)}, buf, p)
		}
	}
	return w.submit(ctx, e, func(e Entry) {
		for i, li := range list {
			var loc atoll.Location
			if r := recs[i]; r >= 0 {
				loc = m.location(e.Seg().Ordinal, e.Block(r), e.CRC(r), leafKey|uint64(li))
			}
			w.ver.t.leafWritten(w.ver, li, loc)
		}
		if m.t.mem > m.limit {
			m.t.evict(m.limit)
		}
	})
}

// complete merges what the log holds for leaves under them, where that is owed.
func (w *mapWriter) complete(ctx context.Context, batch []uint32) error {
	m := w.v.pages
	var owed []want
	m.mu.Lock()
	for _, li := range batch {
		if l, loc := w.ver.leaf(li); l.owed {
			owed = append(owed, want{leaf: true, idx: li, loc: loc})
		}
	}
	m.mu.Unlock()
	return m.fetchAll(ctx, owed, func(i int, p []byte) {
		base := decodeLeaf(p)
		m.mu.Lock()
		w.ver.t.mergeFrozen(w.ver, owed[i].idx, base)
		m.mu.Unlock()
	})
}

// nodes writes the given nodes; their leaves are written already.
func (w *mapWriter) nodes(ctx context.Context, batch []uint32) error {
	m := w.v.pages
	const size = nodeBlocks * atoll.BlockSize
	buf := host.Alloc(len(batch) * size)
	defer buf.Release()
	list := append([]uint32(nil), batch...)
	e := w.entry()
	for i, ni := range list {
		p := buf.Bytes()[i*size:][:size]
		m.mu.Lock()
		nd := w.ver.top[ni].node
		encodeNode(p, m.medium, ni, nd)
		birth := nd.birth
		m.mu.Unlock()
		e.Add(segment.Record{Kind: kindNode, Blocks: nodeBlocks, Key: uint64(ni), Aux: uint64(birth)}, buf, p)
	}
	return w.submit(ctx, e, func(e Entry) {
		for i, ni := range list {
			loc := m.location(e.Seg().Ordinal, e.Block(i), e.CRC(i*nodeBlocks), nodeKey|uint64(ni))
			w.ver.t.nodeWritten(w.ver, ni, loc)
		}
	})
}

// entry returns an empty entry.
func (w *mapWriter) entry() Entry {
	n := len(w.free)
	if n == 0 {
		return w.v.store.NewEntry()
	}
	e := w.free[n-1]
	w.free = w.free[:n-1]
	e.Reset()
	return e
}

// submit sends an entry off, when fewer than mapEntries are on their way.
func (w *mapWriter) submit(ctx context.Context, e Entry, done func(e Entry)) error {
	if e.Records() == 0 {
		w.v.pages.mu.Lock()
		done(e)
		w.v.pages.mu.Unlock()
		w.free = append(w.free, e)
		return nil
	}
	for len(w.flight) >= mapEntries {
		if err := w.wait(ctx); err != nil {
			return err
		}
	}
	if err := w.v.store.Submit(ctx, catalog.Bulk, e); err != nil {
		return err
	}
	w.flight = append(w.flight, mapEntry{e, done})
	return nil
}

// wait waits for the oldest entry. One whose outcome is unknown is left to the
// log's writer.
func (w *mapWriter) wait(ctx context.Context) error {
	f := w.flight[0]
	w.flight = w.flight[1:]
	if err := f.entry.Wait(ctx); err != nil {
		return err
	}
	w.v.pages.mu.Lock()
	f.done(f.entry)
	w.v.pages.mu.Unlock()
	w.free = append(w.free, f.entry)
	return nil
}

// drain waits for all entries and returns the first error.
func (w *mapWriter) drain(ctx context.Context) (err error) {
	for len(w.flight) > 0 {
		err = cmp.Or(err, w.wait(ctx))
	}
	return err
}
