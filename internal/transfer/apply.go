package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/rbdstream"
)

// ImportOptions steer an import of a stream.
type ImportOptions struct {
	// Concurrency is how many writes are in flight; 0 means 10, as rbd does.
	Concurrency int
	// Progress is told how much of what there is to do is done, with growing
	// numbers, by one goroutine. It may be nil.
	Progress func(done, total int64)
	// InputSize is the size of the input, if it is a file, else 0. It is what
	// progress is measured by, and the size of an image whose stream tells none.
	InputSize int64
	// Force applies a diff also to a head that differs from where the diff
	// begins, as rbd does; the result is then neither here nor there.
	Force bool
	// Override changes the header before the image is made: what the user asked
	// for wins over the stream. It may be nil.
	Override func(*rbdstream.Header)
}

func (o *ImportOptions) fill() {
	if o.Concurrency <= 0 {
		o.Concurrency = defaultConcurrency
	}
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
}

// abortTime is how long an import that failed may take to clean up.
const abortTime = 30 * time.Second

// ImportDiff applies a diff (V1) to an image: all of it, or nothing. The image
// changes in one step at the end of the stream, so one that ends too soon, is
// damaged or does not fit leaves no trace. It is refused if the version that it
// begins at is missing (EINVAL) or is not what the head holds (ErrConflict), or if
// the version that it leads to exists (EEXIST).
func ImportDiff(ctx context.Context, t Target, r io.Reader, o ImportOptions) (Result, error) {
	o.fill()
	in := &counter{r: r}
	d, err := rbdstream.NewReader(in, rbdstream.V1)
	if err != nil {
		return Result{}, fmt.Errorf("import diff: %w", err)
	}
	versions, err := t.Versions(ctx)
	if err != nil {
		return Result{}, err
	}
	a := &applier{o: &o, in: in, versions: versions, size: -1}
	a.start = func(ctx context.Context) (Stage, error) { return begin(ctx, t, a.from, o.Force) }
	err = a.diff(ctx, d)
	if err == nil {
		err = a.commit(ctx)
	}
	if err != nil {
		return a.res, a.abort(ctx, fmt.Errorf("import diff: %w", err))
	}
	return a.res, nil
}

// begin starts a stage and explains a refusal.
func begin(ctx context.Context, t Target, from string, force bool) (Stage, error) {
	s, err := t.Begin(ctx, from, force)
	switch {
	case !errors.Is(err, atoll.ErrConflict):
		return s, err
	case from == "":
		return nil, rbdstream.Fail(syscall.EINVAL, fmt.Errorf("the diff begins at an empty image, but this one holds data: import it into a new image, or force it: %w", err))
	}
	return nil, rbdstream.Fail(syscall.EINVAL, fmt.Errorf("the head differs from start snapshot '%s': roll it back to that first, or force the diff: %w", from, err))
}

// ImportImage makes an image with all its versions of an image stream (rbd's
// export format 2). If anything goes wrong, no image is left.
func ImportImage(ctx context.Context, m Maker, r io.Reader, o ImportOptions) (Result, error) {
	o.fill()
	in := &counter{r: r}
	img, err := rbdstream.NewImageReader(in)
	if err != nil {
		return Result{}, fmt.Errorf("import image: %w", err)
	}
	h := img.Header
	if o.Override != nil {
		o.Override(&h)
	}
	a := &applier{o: &o, in: in, fresh: true, size: -1}
	a.res.Skipped = h.Skipped
	a.start = func(ctx context.Context) (Stage, error) { return m.Create(ctx, h, max(a.size, 0)) }
	if err := a.image(ctx, img); err != nil {
		return a.res, a.abort(ctx, fmt.Errorf("import image: %w", err))
	}
	return a.res, nil
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

// Read implements io.Reader.
func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// applier applies diffs to a stage.
type applier struct {
	o        *ImportOptions
	in       *counter
	start    func(ctx context.Context) (Stage, error)
	stage    Stage // nil before the first range
	fresh    bool  // the stage is a new image
	empty    bool  // what is still to come reads as zeros
	versions []Version

	// of the diff at hand
	from, to  string
	hasFrom   bool
	protected bool
	size      int64 // -1 until the stream tells
	base      int64 // progress: diffs done
	count     int64 // of diffs

	flight flight
	shown  int64 // progress
	res    Result
}

// image applies all diffs of an image.
func (a *applier) image(ctx context.Context, img *rbdstream.ImageReader) error {
	a.empty = true
	a.count = int64(min(img.Diffs, 1<<32))
	for {
		d, err := img.NextDiff()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		last := a.to
		a.from, a.to, a.hasFrom, a.protected = "", "", false, false
		if err := a.diff(ctx, d); err != nil {
			return err
		}
		if a.hasFrom && a.from != last {
			return fail(syscall.EINVAL, atoll.ErrInvalid, "a diff begins at snapshot '%s' where the one before leads to '%s'", a.from, last)
		}
		if a.to != "" {
			if err := a.snapshot(ctx); err != nil {
				return err
			}
		}
		a.empty = false
		a.base++
		a.progress(0, 1)
	}
	if err := a.begun(ctx); err != nil {
		return err
	}
	a.res.Bytes = a.stage.Size()
	err := a.stage.Commit(ctx, nil)
	if err == nil {
		a.stage = nil
	}
	return err
}

// snapshot makes a version of what was applied.
func (a *applier) snapshot(ctx context.Context) error {
	v := Version{Name: a.to, Size: a.stage.Size(), Protected: a.protected}
	if err := a.stage.Snapshot(ctx, v); err != nil {
		return fmt.Errorf("make snapshot '%s': %w", a.to, err)
	}
	a.versions = append(a.versions, v)
	a.res.Versions++
	return nil
}

// commit ends the import of a diff.
func (a *applier) commit(ctx context.Context) error {
	var v *Version
	if a.to != "" {
		v = &Version{Name: a.to, Size: a.stage.Size(), Protected: a.protected}
		a.res.Versions = 1
	}
	a.res.Bytes, a.res.From, a.res.To = a.stage.Size(), a.from, a.to
	err := a.stage.Commit(ctx, v)
	if errors.Is(err, atoll.ErrConflict) {
		return rbdstream.Fail(syscall.EBUSY, fmt.Errorf("the image was changed during the import; nothing was done: %w", err))
	}
	if err == nil {
		a.stage = nil
	}
	return err
}

// abort throws the stage away after err.
func (a *applier) abort(ctx context.Context, err error) error {
	if a.stage == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTime)
	defer cancel()
	if aerr := a.stage.Abort(ctx); aerr != nil {
		return errors.Join(err, fmt.Errorf("undo the import: %w", aerr))
	}
	return err
}

func fail(n syscall.Errno, kind error, format string, args ...any) error {
	return rbdstream.Fail(n, fmt.Errorf(format+": %w", append(args, kind)...))
}

// diff applies one diff up to its end record, and waits for all writes.
func (a *applier) diff(ctx context.Context, d *rbdstream.Reader) error {
	a.flight.reset(a.o.Concurrency)
	err := a.records(ctx, d)
	if werr := a.flight.wait(); werr != nil && (err == nil || errors.Is(err, errFlight)) {
		err = werr
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = a.begun(ctx)
	}
	return err
}

// errFlight says that a write that was started earlier has failed.
var errFlight = errors.New("a write failed")

func (a *applier) records(ctx context.Context, d *rbdstream.Reader) error {
	for {
		rec, err := d.Next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = a.record(ctx, d, rec)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
	}
}

func (a *applier) record(ctx context.Context, d *rbdstream.Reader, rec rbdstream.Record) error {
	switch rec.Kind {
	case rbdstream.From:
		return a.setFrom(rec.Name)
	case rbdstream.To:
		return a.setTo(rec.Name)
	case rbdstream.Protected:
		a.protected = rec.Flag
	case rbdstream.Size:
		return a.setSize(ctx, rec.Len)
	case rbdstream.Unknown:
		a.res.Skipped++
	case rbdstream.Write, rbdstream.Zero:
		return a.span(ctx, d, rec)
	}
	return nil
}

func (a *applier) setFrom(name string) error {
	switch {
	case !slices.ContainsFunc(a.versions, func(v Version) bool { return v.Name == name }):
		return fail(syscall.EINVAL, atoll.ErrNotExist, "start snapshot '%s' does not exist in the image, aborting", name)
	case a.stage != nil && !a.fresh && a.from != name:
		return fail(syscall.EINVAL, atoll.ErrInvalid, "start snapshot '%s' comes after data", name)
	}
	a.from, a.hasFrom = name, true
	return nil
}

func (a *applier) setTo(name string) error {
	if slices.ContainsFunc(a.versions, func(v Version) bool { return v.Name == name }) {
		return fail(syscall.EEXIST, atoll.ErrExist, "end snapshot '%s' already exists, aborting", name)
	}
	a.to = name
	return nil
}

// setSize notes the image's size, and resizes a stage that is there already.
func (a *applier) setSize(ctx context.Context, size int64) error {
	a.size = size
	if a.stage == nil || a.stage.Size() == size {
		return nil
	}
	if err := a.flight.wait(); err != nil {
		return err
	}
	return a.stage.Resize(ctx, size)
}

// begun makes sure that there is a stage of the size known.
func (a *applier) begun(ctx context.Context) error {
	if a.stage != nil {
		return nil
	}
	if a.fresh && a.size < 0 {
		a.size = a.o.InputSize
	}
	var err error
	if a.stage, err = a.start(ctx); err != nil {
		a.stage = nil
		return err
	}
	if a.size >= 0 && a.stage.Size() != a.size {
		return a.stage.Resize(ctx, a.size)
	}
	return nil
}

// span applies a range of data or zeros.
func (a *applier) span(ctx context.Context, d *rbdstream.Reader, rec rbdstream.Record) error {
	if err := a.begun(ctx); err != nil {
		return err
	}
	if rec.Off+rec.Len > a.stage.Size() {
		return fail(syscall.EINVAL, atoll.ErrInvalid, "range %d+%d in an image of %d bytes", rec.Off, rec.Len, a.stage.Size())
	}
	if rec.Off < a.flight.end { // what came before must be there first
		if err := a.flight.wait(); err != nil {
			return err
		}
		a.empty = false
	}
	a.flight.end = max(a.flight.end, rec.Off+rec.Len)
	if rec.Kind == rbdstream.Zero {
		return a.zero(ctx, rec.Off, rec.Len)
	}
	var err error
	pieces(rec.Off, rec.Len, rawPiece, func(off, n int64) bool {
		b := host.Alloc(int(n))
		if _, err = io.ReadFull(d, b.Bytes()); err != nil {
			b.Release()
			return false
		}
		err = a.data(ctx, b, off)
		a.progress(off+n, a.stage.Size())
		return err == nil
	})
	return err
}

// zero makes a range read as zeros.
func (a *applier) zero(ctx context.Context, off, n int64) error {
	a.res.Zeroed += n
	a.progress(off+n, a.stage.Size())
	if a.empty {
		return nil
	}
	stage := a.stage
	return a.flight.start(func() error { return stage.Zero(ctx, off, n) })
}

// data writes the buffer, which it releases.
func (a *applier) data(ctx context.Context, b *host.Buffer, off int64) error {
	a.res.Data += int64(len(b.Bytes()))
	stage, empty := a.stage, a.empty
	return a.flight.start(func() error {
		defer b.Release()
		for p := b.Bytes(); len(p) > 0; {
			n, zero := pageRun(p, off)
			var err error
			if !zero {
				err = stage.WriteAt(ctx, p[:n], off)
			} else if !empty {
				err = stage.Zero(ctx, off, int64(n))
			}
			if err != nil {
				return fmt.Errorf("write at %d: %w", off, err)
			}
			p, off = p[n:], off+int64(n)
		}
		return nil
	})
}

// progress tells how far the import is: by the input if its size is known, else
// by the diffs of an image, else by the offset in the image.
func (a *applier) progress(done, total int64) {
	switch {
	case a.o.InputSize > 0:
		done, total = min(a.in.n, a.o.InputSize), a.o.InputSize
	case a.count > 0:
		done, total = a.base, a.count
	}
	a.shown = max(a.shown, done)
	a.o.Progress(a.shown, total)
}

// flight is the writes that are under way. All but the writes themselves happens
// in one goroutine.
type flight struct {
	slots chan struct{}
	wg    sync.WaitGroup
	end   int64 // of the ranges since the last wait
	mu    sync.Mutex
	err   error // the first; under mu
}

func (f *flight) reset(limit int) {
	if cap(f.slots) != limit {
		f.slots = make(chan struct{}, limit)
	}
	f.end = 0
}

// start runs a write when there is room. It does not run it, and returns
// errFlight, once one has failed.
func (f *flight) start(write func() error) error {
	f.slots <- struct{}{}
	f.mu.Lock()
	failed := f.err != nil
	f.mu.Unlock()
	if failed {
		<-f.slots
		return errFlight
	}
	f.wg.Go(func() {
		if err := write(); err != nil {
			f.mu.Lock()
			if f.err == nil {
				f.err = err
			}
			f.mu.Unlock()
		}
		<-f.slots
	})
	return nil
}

// wait waits for all writes and returns the first error.
func (f *flight) wait() error {
	f.wg.Wait()
	f.end = 0
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}
