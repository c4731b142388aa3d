package transfer

import (
	"context"
	"errors"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// NBD is a Disk behind an NBD server. All methods may be called concurrently.
type NBD struct{ pool *nbd.Pool }

var _ Disk = (*NBD)(nil)

// OpenNBD connects to an export with conns connections.
func OpenNBD(ctx context.Context, uri string, conns int) (*NBD, error) {
	p, err := nbd.Open(ctx, uri, conns, nbd.DialOptions{})
	if err != nil {
		return nil, err
	}
	return &NBD{p}, nil
}

// Size returns the volume's size in bytes.
func (d *NBD) Size() int64 { return d.pool.Size() }

// ReadOnly reports whether writes are refused.
func (d *NBD) ReadOnly() bool { return d.pool.Features().ReadOnly }

// ReadAt fills p from offset off.
func (d *NBD) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.pool.ReadAt(ctx, p, off)
}

// WriteAt writes p at offset off.
func (d *NBD) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.pool.WriteAt(ctx, p, off, false)
}

// WriteDurable writes p at offset off and returns when it is durable.
func (d *NBD) WriteDurable(ctx context.Context, p []byte, off int64) error {
	return d.pool.WriteAt(ctx, p, off, true)
}

// Flush makes every write that returned before durable.
func (d *NBD) Flush(ctx context.Context) error { return d.pool.Flush(ctx) }

// Trim gives up a range's contents.
func (d *NBD) Trim(ctx context.Context, off, n int64) error { return d.pool.Trim(ctx, off, n, false) }

// Zero makes a range read as zeros and frees its room.
func (d *NBD) Zero(ctx context.Context, off, n int64) error {
	err := d.pool.Zero(ctx, off, n, true, false)
	if !errors.Is(err, atoll.ErrUnsupported) {
		return err
	}
	for n > 0 && err != nil {
		m := min(n, int64(len(zeros)))
		if err := d.pool.WriteAt(ctx, zeros[:m], off, false); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// Holes lists which parts of a range hold data.
func (d *NBD) Holes(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error {
	extents, err := d.pool.BlockStatus(ctx, off, n)
	if err != nil {
		return err
	}
	for _, e := range extents {
		if !fn(e.Length, e.Zero) {
			return nil
		}
	}
	return nil
}

// Close ends the connections.
func (d *NBD) Close() error { return d.pool.Close() }
