package rbdstream

import (
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
)

// Merge writes to out one diff that does what diff a and then diff b do, all of
// V1. It reads both once and holds no more than one record of each. The second
// must begin at the version where the first ends, and both must have their
// metadata first and their ranges in ascending order without overlap, as every
// diff of rbd and of Writer has. Ranges are copied as they are, but for what the
// other diff cuts off: the result is rbd's own, byte for byte.
func Merge(out io.Writer, a, b io.Reader) error {
	err := mergeDiffs(out, a, b)
	if errors.Is(err, atoll.ErrCorrupt) {
		err = Fail(syscall.EDOM, err) // unlike an import of such a diff
	}
	return err
}

func mergeDiffs(out io.Writer, a, b io.Reader) error {
	ca, err := newCursor(a, "first")
	if err != nil {
		return err
	}
	cb, err := newCursor(b, "second")
	if err != nil {
		return err
	}
	if ca.to == "" || ca.to != cb.from {
		return fail(syscall.EINVAL, atoll.ErrInvalid,
			"merge diffs: the first leads to version %q and the second begins at %q", ca.to, cb.from)
	}
	w := NewWriter(out, WriterOptions{Format: V1})
	if ca.from != "" {
		_ = w.From(ca.from) // the Writer keeps its error
	}
	if cb.to != "" {
		_ = w.To(cb.to)
	}
	if cb.size >= 0 {
		_ = w.Size(cb.size)
	}
	if ca.size >= 0 && cb.size > ca.size { // nothing of an older, larger image may shine through
		ca.gap = span{ca.size, cb.size - ca.size}
	}
	if err := ca.load(); err != nil {
		return err
	}
	if err := mergeRanges(w, ca, cb); err != nil {
		return err
	}
	return w.End()
}

// mergeRanges copies the ranges of both, b's where they overlap.
func mergeRanges(w *Writer, a, b *cursor) error {
	for !a.done || !b.done {
		if !b.done && (a.done || b.at.off <= a.at.off) {
			end := b.at.off + b.at.n
			if err := b.copy(w, b.at.n); err != nil {
				return err
			}
			for !a.done && a.at.off < end {
				if err := a.skip(min(a.at.n, end-a.at.off)); err != nil {
					return err
				}
			}
			continue
		}
		n := a.at.n
		if !b.done {
			n = min(n, b.at.off-a.at.off)
		}
		keep := n
		if w.size >= 0 { // the rest was cut off by the second diff
			keep = min(max(0, w.size-a.at.off), n)
		}
		if err := a.copy(w, keep); err != nil {
			return err
		}
		if err := a.skip(n - keep); err != nil {
			return err
		}
	}
	return nil
}

// cursor walks the ranges of one diff.
type cursor struct {
	which    string
	r        *Reader
	from, to string
	size     int64 // -1 if the diff does not say
	rec      Record
	at       span // what is left of the current range
	end      int64
	gap      span // zeros behind the last range
	done     bool
}

// newCursor reads the metadata of a diff. The first range is in rec.
func newCursor(in io.Reader, which string) (*cursor, error) {
	c := &cursor{which: which, size: -1}
	var err error
	if c.r, err = NewReader(in, V1); err != nil {
		return nil, c.wrap(err)
	}
	for {
		rec, err := c.r.Next()
		if err == io.EOF {
			c.done = true
			return c, nil
		}
		if err != nil {
			return nil, c.wrap(err)
		}
		switch rec.Kind {
		case From:
			c.from = rec.Name
		case To:
			c.to = rec.Name
		case Size:
			c.size = rec.Len
		case Write, Zero:
			return c, c.enter(rec)
		}
	}
}

func (c *cursor) wrap(err error) error { return fmt.Errorf("merge diffs: %s: %w", c.which, err) }

// enter makes rec the current range.
func (c *cursor) enter(rec Record) error {
	switch {
	case rec.Kind != Write && rec.Kind != Zero:
		return fail(syscall.ENOTSUP, atoll.ErrInvalid, "merge diffs: %s: metadata or an unknown record after data", c.which)
	case rec.Off < c.end:
		return fail(syscall.ENOTSUP, atoll.ErrInvalid, "merge diffs: %s: out-of-order offset %d after %d", c.which, rec.Off, c.end)
	case c.size >= 0 && rec.Off+rec.Len > c.size:
		return fail(syscall.ENOTSUP, atoll.ErrInvalid, "merge diffs: %s: range %d+%d in an image of %d bytes", c.which, rec.Off, rec.Len, c.size)
	}
	c.rec, c.at, c.end = rec, span{rec.Off, rec.Len}, rec.Off+rec.Len
	return nil
}

// load goes on to the next range when the current one is used up.
func (c *cursor) load() error {
	for c.at.n == 0 && !c.done || c.done && c.gap.n > 0 {
		if c.done { // the gap comes last
			c.rec, c.at, c.gap, c.done = Record{Kind: Zero}, c.gap, span{}, false
			c.end = c.at.off + c.at.n
			return nil
		}
		rec, err := c.r.Next()
		switch {
		case err == io.EOF:
			c.done = true
		case err != nil:
			return c.wrap(err)
		default:
			if err := c.enter(rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// copy moves n bytes of the current range to w.
func (c *cursor) copy(w *Writer, n int64) error {
	var data io.Reader
	if c.rec.Kind == Write {
		data = c.r
	}
	if err := w.piece(c.at.off, n, data); err != nil {
		return err
	}
	c.at.off, c.at.n = c.at.off+n, c.at.n-n
	return c.load()
}

// skip leaves out n bytes of the current range.
func (c *cursor) skip(n int64) error {
	if c.rec.Kind == Write {
		if err := c.r.skipData(n); err != nil {
			return c.wrap(err)
		}
	}
	c.at.off, c.at.n = c.at.off+n, c.at.n-n
	return c.load()
}
