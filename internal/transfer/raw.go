package transfer

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Contents is what a raw export reads. A State and a Disk are Contents.
type Contents interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	Holes(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error
}

// ExportOptions steer an export.
type ExportOptions struct {
	// Concurrency is how many reads are in flight; 0 means 10, as rbd does.
	Concurrency int
	// Progress is told how much of what there is to do is done, with growing
	// numbers, by one goroutine. It may be nil.
	Progress func(done, total int64)
	// Checksum adds checksums to an image stream (ExportImage only). Other
	// programs skip them with a warning for each diff.
	Checksum bool
}

func (o *ExportOptions) fill() {
	if o.Concurrency <= 0 {
		o.Concurrency = defaultConcurrency
	}
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
}

const (
	// rawPiece is how much a raw export reads at once.
	rawPiece = 1 << 20
	// smallHole is a hole that is read with the data around it.
	smallHole = 64 << 10
)

// ExportRaw writes the bytes of s to w, ascending. In a *File, holes and pages of
// zeros stay holes, and an interrupted export goes on where it was; anything
// else gets zeros. It reads ahead within o.Concurrency requests and holds no
// more memory than they need. Making a *File durable is File.Finish's work.
func ExportRaw(ctx context.Context, s Contents, w io.Writer, o ExportOptions) (Result, error) {
	o.fill()
	size := s.Size()
	res := Result{Bytes: size}
	from, anywhere := int64(0), false
	f, _ := w.(*File)
	if f != nil {
		var id string
		if v, ok := s.(interface{ ID() string }); ok {
			id = v.ID()
		}
		m, err := f.begin("raw", identity(id, size))
		if err != nil {
			return res, err
		}
		from, res.Data = m.Next, m.Data
		if anywhere, err = f.anywhere(size); err != nil {
			return res, err
		}
	}
	win := window{
		limit: o.Concurrency,
		walk: func(ctx context.Context, emit func(int64, int64, bool) bool) error {
			return walkRaw(ctx, s, from, emit)
		},
		fetch: func(ctx context.Context, c *chunk) error {
			if err := s.ReadAt(ctx, c.buf.Bytes(), c.off); err != nil {
				return fmt.Errorf("read volume at %d: %w", c.off, err)
			}
			if !anywhere {
				return nil
			}
			var err error
			c.data, err = f.writeAnywhere(c.buf.Bytes(), c.off)
			return err
		},
		use: func(c *chunk) error {
			n, err := c.data, error(nil)
			if !anywhere {
				n, err = useRaw(w, f, c)
			}
			if err != nil {
				return err
			}
			res.Data += n
			o.Progress(c.off+c.n, size)
			if f == nil {
				return nil
			}
			return f.mark(mark{Next: c.off + c.n, Data: res.Data})
		},
	}
	if err := win.run(ctx); err != nil {
		return res, err
	}
	if f != nil {
		return res, f.setSize(size)
	}
	return res, nil
}

// useRaw writes one chunk and returns how many bytes of data it had.
func useRaw(w io.Writer, f *File, c *chunk) (int64, error) {
	switch {
	case f != nil && c.hole:
		return 0, nil
	case f != nil:
		return f.writeSparse(c.buf.Bytes(), c.off)
	case c.hole:
		return 0, writePart(w, nil, c.n)
	}
	return c.n, writePart(w, c.buf, c.n)
}

// walkRaw emits data in pieces, and holes unless they are small.
func walkRaw(ctx context.Context, s Contents, from int64, emit func(off, n int64, hole bool) bool) error {
	data := from // where data that were not emitted begin
	size := s.Size()
	flush := func(to int64) bool {
		return pieces(data, to-data, rawPiece, func(off, n int64) bool { return emit(off, n, false) })
	}
	stopped := false
	err := ranges(ctx, s.Holes, from, size, func(off, n int64, hole bool) bool {
		if !hole || n < smallHole && off > data && off+n < size {
			return true
		}
		stopped = !flush(off) || !emit(off, n, true)
		data = off + n
		return !stopped
	})
	if err == nil && !stopped {
		flush(size)
	}
	return err
}

// dataRuns calls fn for each run of pages in p, the bytes at off, that are not
// all zero.
func dataRuns(p []byte, off int64, fn func(p []byte, off int64) error) (data int64, err error) {
	for len(p) > 0 {
		n, zero := pageRun(p, off)
		if !zero {
			if err := fn(p[:n], off); err != nil {
				return data, err
			}
			data += int64(n)
		}
		p, off = p[n:], off+int64(n)
	}
	return data, nil
}

// pageRun returns how many bytes at the beginning of p, the bytes at off, are
// alike: pages of zeros, or others.
func pageRun(p []byte, off int64) (n int, zero bool) {
	for n < len(p) {
		m := min(atoll.BlockSize-int((off+int64(n))%atoll.BlockSize), len(p)-n)
		z := bytes.Equal(p[n:n+m], zeros[:m])
		if n > 0 && z != zero {
			break
		}
		zero, n = z, n+m
	}
	return n, zero
}

// writePart writes a buffer, or n zeros.
func writePart(w io.Writer, b *host.Buffer, n int64) error {
	if b != nil {
		_, err := w.Write(b.Bytes())
		return err
	}
	for n > 0 {
		m := min(n, int64(len(zeros)))
		if _, err := w.Write(zeros[:m]); err != nil {
			return err
		}
		n -= m
	}
	return nil
}
