package nbd

import (
	"context"

	"github.com/atollstore/atoll/internal/host"
)

// Device is what an export is made of. Its methods may be called concurrently,
// also by several connections. Offsets and lengths are any bytes within Size;
// the device does its own read-modify-write. A cancelled call returns soon.
// Errors are of the kinds of package atoll.
type Device interface {
	// Size returns the size in bytes; it may change while in use.
	Size() int64
	// ReadOnly reports whether writes are refused.
	ReadOnly() bool
	// Read fills p from offset off.
	Read(ctx context.Context, p []byte, off int64) error
	// Write stores p at offset off; durable on return if fua is set. p lies in
	// b, which the device retains if it needs it beyond the call.
	Write(ctx context.Context, b *host.Buffer, p []byte, off int64, fua bool) error
	// Flush makes every write that returned before the call durable.
	Flush(ctx context.Context) error
	// Discard gives up the contents of a range.
	Discard(ctx context.Context, off, n int64, fua bool) error
	// Zero makes a range read as zeros; with punch its room may be freed.
	Zero(ctx context.Context, off, n int64, punch, fua bool) error
	// Prefetch is a hint that a range will be read soon.
	Prefetch(ctx context.Context, off, n int64) error
	// Extents calls fn for the parts of a range in order, until the range ends
	// or fn returns false. A hole reads as zeros.
	Extents(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error
}

// Exports resolves the names that clients ask for. A name may carry a version
// ("name@version"); the empty name is the default export. All methods may be
// called concurrently.
type Exports interface {
	// List returns what a client may see.
	List(ctx context.Context) ([]ExportInfo, error)
	// Stat describes an export without opening it; ErrNotExist if there is none.
	Stat(ctx context.Context, name string) (Info, error)
	// Open gives the device of an export, the same one (by ==) to all that have
	// it open.
	Open(ctx context.Context, name string) (Device, Info, error)
	// Release gives a device back, once for each Open.
	Release(dev Device)
}

// ExportInfo is one line of a list of exports.
type ExportInfo struct {
	Name        string
	Description string // for people, such as "10 GiB, 3 snapshots"
}

// Info describes an export.
type Info struct {
	Name        string // canonical; empty means as asked for
	Description string
	Size        int64
	ReadOnly    bool
}
