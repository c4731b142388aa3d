package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/rbdstream"
)

// Diff says which diff to export.
type Diff struct {
	From string // the version to begin at; "" = an empty image
	To   string // the version to lead to; "" = the head
	// WholeObject sends every object (4 MiB, or as the image's header says) of
	// which anything changed as a whole.
	WholeObject bool
}

// ExportDiff writes a diff (V1) between two versions of an image to w, with the
// changed pages of 4 KiB in ascending order, in time proportional to the changes.
// Pages that are zero now are told only if they were not zero before, so the
// bytes depend on nothing but the contents and the set of changed pages. It
// fails with ErrNotExist (and rbd's number for it) if a version is missing.
func ExportDiff(ctx context.Context, img Image, d Diff, w io.Writer, o ExportOptions) (Result, error) {
	o.fill()
	e := &exporter{img: img, o: o, w: w, whole: d.WholeObject}
	e.f, _ = w.(*File)
	s, old, err := openBoth(ctx, img, d.To, d.From)
	if err != nil {
		return e.res, err
	}
	defer s.Close()
	if old != nil {
		defer old.Close()
	}
	h, err := img.Header(ctx)
	if err != nil {
		return e.res, err
	}
	e.object = h.ObjectSize()
	e.total = s.Size()
	e.res.Bytes = s.Size()
	if err := e.begin("diff", identity(s.ID(), d.From, d.To, d.WholeObject, e.object, s.Size())); err != nil {
		return e.res, err
	}
	var to *Version
	if d.To != "" {
		to = &Version{Name: d.To}
	}
	if err := e.diff(ctx, rbdstream.WriterOptions{Format: rbdstream.V1}, d.From, old, to, s); err != nil {
		return e.res, fmt.Errorf("export diff: %w", err)
	}
	return e.res, nil
}

// ExportImage writes an image with all its versions and its head to w, as rbd's
// export format 2. The head is that of the call; versions made or removed
// meanwhile make it fail or leave it unaware, never inconsistent.
func ExportImage(ctx context.Context, img Image, w io.Writer, o ExportOptions) (Result, error) {
	o.fill()
	e := &exporter{img: img, o: o, w: w}
	e.f, _ = w.(*File)
	head, err := openState(ctx, img, "") // first: what it is based on is listed then
	if err != nil {
		return e.res, err
	}
	defer head.Close()
	h, err := img.Header(ctx)
	if err != nil {
		return e.res, err
	}
	versions, err := img.Versions(ctx)
	if err != nil {
		return e.res, err
	}
	e.res.Bytes, e.res.Versions = head.Size(), len(versions)
	e.total = head.Size()
	for _, v := range versions {
		e.total += v.Size
	}
	if err := e.begin("image", identity(head.ID(), h, versions, o.Checksum)); err != nil {
		return e.res, err
	}
	if e.at.Stream == nil {
		if err := rbdstream.WriteHeader(w, h, len(versions)+1, o.Checksum); err != nil {
			return e.res, err
		}
	}
	if err := e.versions(ctx, versions, head); err != nil {
		return e.res, fmt.Errorf("export image: %w", err)
	}
	return e.res, nil
}

// openState opens a version with rbd's number for one that is missing.
func openState(ctx context.Context, img Image, version string) (State, error) {
	s, err := img.Open(ctx, version)
	if errors.Is(err, atoll.ErrNotExist) {
		return nil, rbdstream.Fail(syscall.ENOENT, err)
	}
	return s, err
}

// openBoth opens the ends of a diff side by side, since each open takes the
// server a durable record. Without from, old is nil.
func openBoth(ctx context.Context, img Image, to, from string) (s, old State, err error) {
	if from == "" {
		s, err = openState(ctx, img, to)
		return s, nil, err
	}
	var wg sync.WaitGroup
	var oldErr error
	wg.Go(func() { old, oldErr = openState(ctx, img, from) })
	s, err = openState(ctx, img, to)
	wg.Wait()
	if err == nil && oldErr == nil {
		return s, old, nil
	}
	if err == nil {
		err = errors.Join(oldErr, s.Close())
	} else if oldErr == nil {
		err = errors.Join(err, old.Close())
	}
	return nil, nil, err
}

// exporter writes the diffs of one export.
type exporter struct {
	img    Image
	o      ExportOptions
	w      io.Writer
	f      *File // w, if it is one
	whole  bool
	object int64 // size of an object, with whole
	at     mark  // where to take up an earlier export
	index  int   // of the diff
	base   int64 // progress before this diff
	total  int64
	res    Result
}

// begin takes up an earlier export.
func (e *exporter) begin(kind, id string) error {
	if e.f == nil {
		return nil
	}
	var err error
	e.at, err = e.f.begin(kind, id)
	e.res.Data, e.res.Zeroed = e.at.Data, e.at.Zeroed
	return err
}

// versions writes one diff per version and one for the head.
func (e *exporter) versions(ctx context.Context, versions []Version, head State) error {
	from := ""
	for i := range versions {
		v := &versions[i]
		if i >= e.at.Diff {
			if err := e.version(ctx, i, from, v); err != nil {
				return err
			}
		}
		e.base += v.Size
		from = v.Name
	}
	e.index = len(versions)
	return e.between(ctx, from, nil, head)
}

// between writes the diff from a version ("" = nothing), which it opens, to the
// state s.
func (e *exporter) between(ctx context.Context, from string, to *Version, s State) error {
	if from == "" {
		return e.diff(ctx, e.writerOptions(), "", nil, to, s)
	}
	old, err := openState(ctx, e.img, from)
	if err != nil {
		return err
	}
	defer old.Close()
	return e.diff(ctx, e.writerOptions(), from, old, to, s)
}

func (e *exporter) writerOptions() rbdstream.WriterOptions {
	return rbdstream.WriterOptions{Format: rbdstream.V2, Checksum: e.o.Checksum}
}

// version writes the diff that leads to one version.
func (e *exporter) version(ctx context.Context, i int, from string, v *Version) error {
	s, err := openState(ctx, e.img, v.Name)
	if err != nil {
		return err
	}
	defer s.Close()
	e.index = i
	return e.between(ctx, from, v, s)
}

// diff writes one diff: from a version ("" = nothing), which is the state old, to
// the state s, which is the version to, or the head.
func (e *exporter) diff(ctx context.Context, o rbdstream.WriterOptions, from string, old State, to *Version, s State) error {
	d := &differ{exporter: e, from: from, old: old, to: s}
	start := int64(0)
	if m := e.at.Stream; m != nil && e.at.Diff == e.index {
		d.w = rbdstream.ResumeWriter(e.w, o, *m)
		start = e.at.Next
	} else {
		d.w = rbdstream.NewWriter(e.w, o)
		if err := d.metadata(to); err != nil {
			return err
		}
	}
	win := window{limit: e.o.Concurrency, fetch: d.fetch, use: d.use,
		walk: func(ctx context.Context, emit func(int64, int64, bool) bool) error { return d.walk(ctx, start, emit) }}
	if err := win.run(ctx); err != nil {
		return err
	}
	e.o.Progress(e.base+s.Size(), e.total)
	return d.w.End()
}

// differ makes one diff.
type differ struct {
	*exporter
	w    *rbdstream.Writer
	from string
	old  State // the version from; nil = nothing
	to   State
}

// part is a part of a chunk that goes into the stream.
type part struct {
	off, n int64
	zero   bool
}

func (d *differ) metadata(to *Version) error {
	if d.from != "" {
		if err := d.w.From(d.from); err != nil {
			return err
		}
	}
	if to != nil {
		if err := d.w.To(to.Name); err != nil {
			return err
		}
		if err := d.w.Protected(to.Protected); err != nil {
			return err
		}
	}
	return d.w.Size(d.to.Size())
}

// askFirst is a changed range so long that it pays to ask which parts of it are
// holes; shorter ones are read at once.
const askFirst = 2 << 20

// walk emits what may have changed, from start on: data to be read, and holes
// that may have been data before.
func (d *differ) walk(ctx context.Context, start int64, emit func(off, n int64, hole bool) bool) error {
	size := d.to.Size()
	var inner error
	visit := func(off, n int64) bool {
		if d.old == nil || n < askFirst {
			return emitData(off, n, emit)
		}
		more := true
		err := ranges(ctx, d.to.Holes, off, off+n, func(off, n int64, hole bool) bool {
			if hole {
				inner = d.walkHole(ctx, off, n, emit)
				more = inner == nil
			} else {
				more = emitData(off, n, emit)
			}
			return more
		})
		inner = errors.Join(inner, err)
		return more && inner == nil
	}
	list := func(ctx context.Context, off, n int64, fn func(int64, bool) bool) error {
		return d.to.Changes(ctx, d.from, off, n, fn)
	}
	if d.old == nil {
		list = func(ctx context.Context, off, n int64, fn func(int64, bool) bool) error {
			return d.to.Holes(ctx, off, n, func(n int64, hole bool) bool { return fn(n, !hole) })
		}
	}
	w := widener{unit: d.unit(), size: size, next: start, visit: visit}
	err := ranges(ctx, list, start/w.unit*w.unit, size, func(off, n int64, changed bool) bool { return !changed || w.add(off, n) })
	if err == nil && inner == nil {
		w.flush()
	}
	return errors.Join(err, inner)
}

// emitData emits a range in pieces.
func emitData(off, n int64, emit func(off, n int64, hole bool) bool) bool {
	return pieces(off, n, rbdstream.MaxData, func(off, n int64) bool { return emit(off, n, false) })
}

// unit is what changed ranges are widened to.
func (d *differ) unit() int64 {
	if d.whole {
		return d.object
	}
	return atoll.BlockSize
}

// walkHole emits what is a hole now and was not one before.
func (d *differ) walkHole(ctx context.Context, off, n int64, emit func(off, n int64, hole bool) bool) error {
	if d.old == nil || off >= d.old.Size() {
		return nil
	}
	return ranges(ctx, d.old.Holes, off, min(off+n, d.old.Size()), func(off, n int64, hole bool) bool {
		return hole || emitData(off, n, emit)
	})
}

// widener widens ranges to whole units and joins those that touch.
type widener struct {
	unit, size int64
	next       int64 // the first byte not visited
	off, n     int64 // waiting
	visit      func(off, n int64) bool
}

func (w *widener) add(off, n int64) bool {
	end := min((off+n+w.unit-1)/w.unit*w.unit, w.size)
	off = max(off/w.unit*w.unit, w.next)
	if off >= end {
		return true
	}
	if w.n > 0 && off <= w.off+w.n {
		w.n = max(end, w.off+w.n) - w.off
		return true
	}
	if !w.flush() {
		return false
	}
	w.off, w.n = off, end-off
	return true
}

func (w *widener) flush() bool {
	if w.n == 0 {
		return true
	}
	off, n := w.off, w.n
	w.next, w.n = off+n, 0
	return w.visit(off, n)
}

// fetch reads a chunk and finds out which of its parts go into the stream.
func (d *differ) fetch(ctx context.Context, c *chunk) error {
	p := c.buf.Bytes()
	if err := d.to.ReadAt(ctx, p, c.off); err != nil {
		return fmt.Errorf("read volume at %d: %w", c.off, err)
	}
	c.parts = c.parts[:0]
	for at := int64(0); at < c.n; {
		n, zero := pageRun(p[at:], c.off+at)
		if !zero {
			c.parts = append(c.parts, part{c.off + at, int64(n), false})
		} else if err := d.fetchZeros(ctx, c, c.off+at, int64(n)); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// fetchZeros finds out which of n zeros at off were not zeros before. A diff from
// the beginning tells of no zeros.
func (d *differ) fetchZeros(ctx context.Context, c *chunk, off, n int64) error {
	if d.old == nil || off >= d.old.Size() {
		return nil
	}
	n = min(n, d.old.Size()-off)
	b := host.Alloc(int(n))
	defer b.Release()
	if err := d.old.ReadAt(ctx, b.Bytes(), off); err != nil {
		return fmt.Errorf("read version %s at %d: %w", d.from, off, err)
	}
	for p := b.Bytes(); len(p) > 0; {
		m, zero := pageRun(p, off)
		if !zero {
			c.parts = append(c.parts, part{off, int64(m), true})
		}
		p, off = p[m:], off+int64(m)
	}
	return nil
}

// use writes a chunk to the stream.
func (d *differ) use(c *chunk) error {
	for _, p := range c.parts {
		var err error
		if p.zero {
			d.res.Zeroed += p.n
			err = d.w.Zero(p.off, p.n)
		} else {
			d.res.Data += p.n
			err = d.w.Write(p.off, c.buf.Bytes()[p.off-c.off:][:p.n])
		}
		if err != nil {
			return err
		}
	}
	d.o.Progress(d.base+c.off+c.n, d.total)
	if d.f == nil || !d.f.due(d.f.pos+d.w.Pending()) {
		return nil
	}
	m, err := d.w.Mark()
	if err != nil {
		return err
	}
	return d.f.mark(mark{Next: c.off + c.n, Data: d.res.Data, Zeroed: d.res.Zeroed, Diff: d.index, Stream: &m})
}
