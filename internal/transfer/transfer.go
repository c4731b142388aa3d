// Package transfer moves whole disk images between a volume and a file or a
// pipe: many requests in flight, holes kept as holes, order kept where the other
// side is a pipe, and everything made durable before it reports success.
package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Disk is a volume as a client sees it. All methods may be called concurrently.
type Disk interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	Zero(ctx context.Context, off, n int64) error
	Flush(ctx context.Context) error
	// Holes calls fn for consecutive ranges from off on, up to n bytes, until it
	// returns false.
	Holes(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error
}

// Options steer a transfer.
type Options struct {
	Concurrency int         // requests in flight; 0 = 16
	Progress    func(int64) // told of bytes done, concurrently; may be nil
	DestIsZero  bool        // import: the volume reads as zeros, so skip zeros
}

const piece = 1 << 20 // bytes per request

func (o *Options) fill() {
	if o.Concurrency <= 0 {
		o.Concurrency = 16
	}
	if o.Progress == nil {
		o.Progress = func(int64) {}
	}
}

// Result sums up a transfer.
type Result struct {
	Bytes    int64  // of the image
	Data     int64  // of data moved: bytes that are not holes
	Zeroed   int64  // of zeros told by diffs
	Versions int    // named ones moved
	From, To string // of an imported diff
	Skipped  int    // unknown records of an imported stream
}

// Import writes the image in src, of size bytes, to d and flushes it. src may be
// a pipe (size as announced or found out by the caller; -1 = until its end); one
// that may keep its reader waiting must itself end with ctx.
// It fails when the image is larger than the volume.
func Import(ctx context.Context, d Disk, src io.Reader, size int64, o Options) (Result, error) {
	o.fill()
	if size > d.Size() {
		return Result{}, fmt.Errorf("import %d bytes into a volume of %d: %w", size, d.Size(), atoll.ErrTooLarge)
	}
	var data atomic.Int64
	var res Result
	var err error
	if f, ok := src.(*os.File); ok && seekable(f) && size >= 0 {
		res.Bytes, err = importFile(ctx, d, f, size, &o, &data)
	} else {
		res.Bytes, err = importStream(ctx, d, src, size, &o, &data)
	}
	res.Data = data.Load()
	if err != nil {
		return res, err
	}
	if err := d.Flush(ctx); err != nil {
		return res, fmt.Errorf("flush after import: %w", err)
	}
	return res, nil
}

func seekable(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode().IsRegular()
}

// importFile reads pieces of a file in parallel, skipping its holes.
func importFile(ctx context.Context, d Disk, f *os.File, size int64, o *Options, data *atomic.Int64) (int64, error) {
	outer := ctx
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Concurrency)
	for off := int64(0); off < size && ctx.Err() == nil; {
		start := nextData(f, off, size)
		if start > off {
			if !o.DestIsZero {
				hole, at := start-off, off
				g.Go(func() error { return d.Zero(ctx, at, hole) })
			}
			o.Progress(start - off)
			off = start
			continue
		}
		n, at := min(piece, size-off), off
		g.Go(func() error {
			b := host.Alloc(int(n))
			defer b.Release()
			if _, err := f.ReadAt(b.Bytes(), at); err != nil {
				return fmt.Errorf("read %s at %d: %w", f.Name(), at, err)
			}
			return put(ctx, d, b.Bytes(), at, o, data)
		})
		off += n
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	return size, outer.Err() // the group's own context is cancelled by now
}

// nextData returns where data begin at or after off, in steps of blocks.
func nextData(f *os.File, off, size int64) int64 {
	at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if err == unix.ENXIO {
		return size
	}
	if err != nil {
		return off
	}
	return min(max(off, at&^(atoll.BlockSize-1)), size)
}

// importStream reads pieces in order and writes them in parallel.
func importStream(ctx context.Context, d Disk, src io.Reader, size int64, o *Options, data *atomic.Int64) (int64, error) {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Concurrency)
	off := int64(0)
	var readErr error
	for gctx.Err() == nil && (size < 0 || off < size) {
		want := int64(piece)
		if size >= 0 {
			want = min(want, size-off)
		}
		b := host.Alloc(int(want))
		n, err := io.ReadFull(src, b.Bytes())
		b.SetLen(n)
		if n > 0 {
			if off+int64(n) > d.Size() {
				b.Release()
				readErr = fmt.Errorf("import more than %d bytes: the volume is not larger: %w", d.Size(), atoll.ErrTooLarge)
				break
			}
			at := off
			g.Go(func() error {
				defer b.Release()
				return put(gctx, d, b.Bytes(), at, o, data)
			})
			off += int64(n)
		} else {
			b.Release()
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			if size >= 0 && off < size {
				readErr = fmt.Errorf("import: input ends after %d of %d bytes: %w", off, size, atoll.ErrInvalid)
			}
			break
		}
		if err != nil {
			readErr = fmt.Errorf("read input at %d: %w", off, err)
			break
		}
	}
	err := g.Wait()
	if err == nil {
		err = readErr
	}
	if err == nil {
		err = ctx.Err()
	}
	return off, err
}

// put writes one piece, leaving out the zeros at block granularity.
func put(ctx context.Context, d Disk, p []byte, off int64, o *Options, data *atomic.Int64) error {
	const grain = 64 << 10
	for len(p) > 0 {
		n := min(grain, len(p))
		zero := isZero(p[:n])
		for n < len(p) {
			m := min(grain, len(p)-n)
			if isZero(p[n:n+m]) != zero {
				break
			}
			n += m
		}
		var err error
		switch {
		case !zero:
			err = d.WriteAt(ctx, p[:n], off)
			data.Add(int64(n))
		case !o.DestIsZero:
			err = d.Zero(ctx, off, int64(n))
		}
		if err != nil {
			return fmt.Errorf("write volume at %d: %w", off, err)
		}
		o.Progress(int64(n))
		p, off = p[n:], off+int64(n)
	}
	return nil
}

var zeros [64 << 10]byte

func isZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

// ExportFile writes d's contents to a new file at path (it must not exist),
// sparse, and makes it durable. On error the file is removed.
func ExportFile(ctx context.Context, d Disk, path string, o Options) (Result, error) {
	f, err := CreateFile(path, FileOptions{})
	if err != nil {
		return Result{}, err
	}
	res, err := ExportStream(ctx, d, f, o)
	return res, f.Finish(err)
}

// ExportStream writes d's contents to w from first to last byte, reading ahead
// in parallel.
func ExportStream(ctx context.Context, d Disk, w io.Writer, o Options) (Result, error) {
	o.fill()
	last := int64(0)
	return ExportRaw(ctx, d, w, ExportOptions{Concurrency: o.Concurrency, Progress: func(done, _ int64) {
		o.Progress(done - last)
		last = done
	}})
}

func writeErr(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("write %s: %v: %w", path, err, atoll.ErrNoSpace)
	}
	return fmt.Errorf("write %s: %v: %w", path, err, atoll.ErrIO)
}

func isZeroLong(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !isZero(p[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
