package medium

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// line is where a clone came from: its ancestors, whose segments it reads
// without owning them. Its durable pin keeps what it reads in place; compaction
// by their owners may move it.
type line struct {
	base atoll.Ordinal // first own ordinal
	list []catalog.Ancestor
	from []*foreign
}

// newLine returns the line of a medium, nil if it is no clone.
func newLine(opts Options, rec catalog.Medium) *line {
	if rec.Parent == nil || len(rec.Ancestors) == 0 {
		return nil
	}
	l := &line{base: rec.Base(), list: rec.Ancestors}
	for _, a := range rec.Ancestors {
		l.from = append(l.from, newForeign(opts, a.Medium))
	}
	return l
}

// find returns the ancestor that an ordinal belongs to, or -1.
func (l *line) find(o atoll.Ordinal) int {
	if l != nil && o > 0 {
		for i := range l.list {
			if o < l.list[i].Base {
				return i
			}
		}
	}
	return -1
}

func (l *line) owner(o atoll.Ordinal) (atoll.MediumID, bool) {
	if i := l.find(o); i >= 0 {
		return l.list[i].Medium, true
	}
	return 0, false
}

func (l *line) read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte, sums []uint32) error {
	i := l.find(o)
	if i < 0 {
		return fmt.Errorf("read segment %d: it is no ancestor's: %w", o, atoll.ErrNotExist)
	}
	return l.from[i].read(ctx, o, block, dst, sums)
}

// root returns the kind's root of a version of the parent.
func (l *line) root(ctx context.Context, version uint64) ([]byte, error) {
	if l == nil {
		return nil, fmt.Errorf("read root of version %d of the parent: no ancestors: %w", version, atoll.ErrCorrupt)
	}
	return l.from[len(l.from)-1].root(ctx, version)
}

// foreign reads the log of a medium that another process may own. What it knows
// is as of one manifest; when a read fails as if the bytes were gone it looks
// whether there is a newer one, and tries again.
type foreign struct {
	opts Options
	id   atoll.MediumID
	now  atomic.Pointer[known]
	sem  chan struct{} // room for one: whoever loads
}

// known is a medium as one manifest and the head with it describe it. It does
// not change, but for remaps that are loaded.
type known struct {
	rev    int64 // of the head
	ref    Ref   // of the manifest
	man    *manifest
	chunks [][]entry               // from man.First on
	late   map[atoll.Ordinal]entry // what the head says beyond that
	remaps sync.Map                // atoll.Ordinal: *remap
}

func newForeign(opts Options, id atoll.MediumID) *foreign {
	return &foreign{opts: opts, id: id, sem: make(chan struct{}, 1)}
}

// maxLoads bounds how often one call starts anew because the owner was faster.
const maxLoads = 16

// current returns what is known, loading it at the first call.
func (f *foreign) current(ctx context.Context) (*known, error) {
	if k := f.now.Load(); k != nil {
		return k, nil
	}
	return f.reload(ctx, nil)
}

// reload replaces what is known if it still is old. It returns old itself when
// there is nothing newer.
func (f *foreign) reload(ctx context.Context, old *known) (*known, error) {
	if err := acquire(ctx, f.sem); err != nil {
		return nil, fmt.Errorf("load medium %v: %w", f.id, err)
	}
	defer func() { <-f.sem }()
	if k := f.now.Load(); k != old {
		return k, nil
	}
	rev := int64(0)
	if old != nil {
		rev = old.rev
	}
	var last error
	for range maxLoads {
		h, err := f.opts.Catalog.Head(ctx, f.id)
		if err != nil {
			return nil, fmt.Errorf("load medium %v: %w", f.id, err)
		}
		if h.Rev == rev { // nothing newer than what just failed
			if last != nil {
				return nil, fmt.Errorf("load medium %v: %w", f.id, last)
			}
			return old, nil
		}
		rev = h.Rev
		k, err := f.load(ctx, h)
		if err == nil {
			f.now.Store(k)
			return k, nil
		}
		if last = err; !moved(err) {
			break
		}
	}
	return nil, fmt.Errorf("load medium %v: %w", f.id, last)
}

func (f *foreign) fetch(ctx context.Context) func(Ref) ([]byte, error) {
	return func(r Ref) ([]byte, error) { return readRecord(ctx, f.opts.Nodes, f.id, r) }
}

// load reads the manifest that a head points at.
func (f *foreign) load(ctx context.Context, h catalog.Head) (*known, error) {
	k := &known{rev: h.Rev, man: &manifest{Medium: f.id}, late: map[atoll.Ordinal]entry{}}
	if h.Manifest != nil {
		var err error
		k.ref = fromBlockRef(h.Manifest)
		if k.man, err = loadRoot(f.id, k.ref, f.fetch(ctx)); err != nil {
			return nil, err
		}
	}
	for i, r := range k.man.Chunks {
		var entries []entry
		if !r.IsZero() {
			var err error
			if entries, err = readChunk(f.id, k.man.First+i, r, f.fetch(ctx)); err != nil {
				return nil, err
			}
		}
		k.chunks = append(k.chunks, entries)
	}
	for _, s := range h.Sealed {
		k.late[s.Seg.Ordinal] = entry{State: stateLive, Copyset: s.Seg.Copyset, Length: s.Length}
	}
	for _, u := range h.Unsealed {
		k.late[u.Seg.Ordinal] = entry{State: stateOpen, Copyset: u.Seg.Copyset}
	}
	return k, nil
}

// entry returns what is known of a segment.
func (k *known) entry(o atoll.Ordinal) entry {
	if o == 0 {
		return entry{}
	}
	i := int(o-1)/chunkEntries - k.man.First
	var e entry
	if j := int(o-1) % chunkEntries; i >= 0 && i < len(k.chunks) && j < len(k.chunks[i]) {
		e = k.chunks[i][j]
	}
	if late, ok := k.late[o]; ok && (e.State == stateNone || e.State == stateOpen) {
		return late
	}
	return e
}

// read fills dst from a segment, wherever its blocks are by now, and sums, if not
// nil, with their checksums.
func (f *foreign) read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte, sums []uint32) error {
	k, err := f.current(ctx)
	for err == nil {
		bad := f.readAs(ctx, k, o, block, dst, sums)
		if bad == nil || !moved(bad) {
			return bad
		}
		var newer *known
		if newer, err = f.reload(ctx, k); newer == k {
			return bad
		}
		k = newer
	}
	return err
}

// readAs reads where k says that the blocks are.
func (f *foreign) readAs(ctx context.Context, k *known, o atoll.Ordinal, block atoll.BlockNo, dst []byte, sums []uint32) error {
	e := k.entry(o)
	if e.State != stateOpen && e.State != stateLive && e.State != stateVirtual {
		return fmt.Errorf("read segment %d of medium %v: %w", o, f.id, atoll.ErrNotExist)
	}
	if e.Remap.IsZero() {
		return f.opts.Nodes.ReadSums(ctx, atoll.SegmentID{Medium: f.id, Ordinal: o, Copyset: e.Copyset}, block, dst, sums)
	}
	r, err := f.remap(ctx, k, o, e.Remap)
	if err != nil {
		return err
	}
	for len(dst) > 0 {
		to, at, run, ok := r.find(block)
		n := min(len(dst), int(run)*atoll.BlockSize)
		if !ok {
			return fmt.Errorf("read block %d of compacted segment %d of medium %v: %w", block, o, f.id, atoll.ErrNotExist)
		}
		some := firstSums(&sums, n)
		if err := f.opts.Nodes.ReadSums(ctx, atoll.SegmentID{Medium: f.id, Ordinal: to, Copyset: k.entry(to).Copyset}, at, dst[:n], some); err != nil {
			return err
		}
		dst, block = dst[n:], block+atoll.BlockNo(n/atoll.BlockSize)
	}
	return nil
}

// firstSums takes the checksums of n bytes off a list, if there is one.
func firstSums(sums *[]uint32, n int) []uint32 {
	if *sums == nil {
		return nil
	}
	some := (*sums)[:n/atoll.BlockSize]
	*sums = (*sums)[len(some):]
	return some
}

// remap returns where the blocks of a compacted segment went.
func (f *foreign) remap(ctx context.Context, k *known, o atoll.Ordinal, ref Ref) (*remap, error) {
	if r, ok := k.remaps.Load(o); ok {
		return r.(*remap), nil
	}
	r, err := readRemap(f.id, o, ref, f.fetch(ctx))
	if err != nil {
		return nil, err
	}
	k.remaps.Store(o, r)
	return r, nil
}

// root reads the kind's root of a version.
func (f *foreign) root(ctx context.Context, number uint64) ([]byte, error) {
	k, err := f.current(ctx)
	for err == nil {
		s := k.man.state()
		v, bad := s.Find(number), fmt.Errorf("read root of version %d of medium %v: %w", number, f.id, atoll.ErrNotExist)
		if v != nil {
			var p []byte
			if p, bad = readVersionRoot(ctx, f.opts.Nodes, f.id, v); bad == nil || !moved(bad) {
				return p, bad
			}
		}
		var newer *known
		if newer, err = f.reload(ctx, k); newer == k {
			return nil, bad
		}
		k = newer
	}
	return nil, err
}
