package transfer

import (
	"context"

	"github.com/atollstore/atoll/internal/rbdstream"
)

// Version names one version of an image.
type Version struct {
	Name      string
	Size      int64 // bytes, exact: it need not be a multiple of anything
	Protected bool  // it may not be removed
}

// Image is an image with its history, to be exported. All methods may be called
// concurrently.
type Image interface {
	// Header returns what else an image stream carries: layout and metadata, as
	// kept from an import, or rbdstream.DefaultHeader.
	Header(ctx context.Context) (rbdstream.Header, error)
	// Versions lists the named versions, oldest first.
	Versions(ctx context.Context) ([]Version, error)
	// Open opens a version, or the head with "". What is read of it never
	// changes: a head that is being written is read as of the call. ErrNotExist
	// if there is no such version.
	Open(ctx context.Context, version string) (State, error)
}

// State is the contents of an image at one moment. All methods but Close may be
// called concurrently.
type State interface {
	// Size returns the exact size in bytes.
	Size() int64
	// ID identifies the contents for good: equal IDs mean equal bytes, after
	// restarts too. "" means that nobody can tell, and then an export of the
	// state cannot be resumed.
	ID() string
	// ReadAt fills p from offset off; the range lies within the size.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Holes calls fn for consecutive ranges from off on, up to n bytes, until it
	// returns false. What is a hole reads as zeros. An answer may cover less than
	// was asked for, but something.
	Holes(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error
	// Changes is like Holes, and tells which ranges were written, zeroed or
	// discarded since version since of the same image. What is beyond the end of
	// the older version counts as changed only where there are data. ErrNotExist
	// if there is no such version, ErrInvalid if it is not an ancestor.
	Changes(ctx context.Context, since string, off, n int64, fn func(n int64, changed bool) bool) error
	// Close gives the state up.
	Close() error
}

// Target is an existing image that a diff is applied to.
type Target interface {
	// Versions lists the named versions, oldest first.
	Versions(ctx context.Context) ([]Version, error)
	// Begin starts a private successor of the head. Nobody sees it, and the head
	// stays as it is, until Commit. It fails with ErrConflict if the head is not
	// exactly the version from (the same bytes and size; with from "" one that
	// holds nothing but zeros), unless force is set: then the stage begins as
	// the head whatever it is.
	Begin(ctx context.Context, from string, force bool) (Stage, error)
}

// Maker makes new images.
type Maker interface {
	// Create makes an image of size bytes that reads as zeros, with what the
	// header says kept beside it. Nobody sees it until Commit, or it may be seen
	// but goes away at Abort. ErrExist if the name is taken.
	Create(ctx context.Context, h rbdstream.Header, size int64) (Stage, error)
}

// Stage is contents in the making. WriteAt and Zero may be called concurrently,
// for ranges that do not overlap; the other methods are called alone. After
// Commit or Abort it must not be used.
type Stage interface {
	Size() int64
	// Resize changes the exact size. What is cut off is gone: if the image grows
	// again it reads as zeros there.
	Resize(ctx context.Context, size int64) error
	// WriteAt writes p at off, of any alignment. p is the caller's again when it
	// returns.
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes a range read as zeros and frees its room.
	Zero(ctx context.Context, off, n int64) error
	// Snapshot makes a version of what was written so far, durably. It is called
	// only on a Stage of a Maker. ErrExist if the name is taken.
	Snapshot(ctx context.Context, v Version) error
	// Commit makes everything durable and, in one step, makes the stage the
	// image's head and, unless version is nil, a version of it. It fails with
	// ErrConflict, changing nothing, if the head was written or another version
	// made since Begin. An error that wraps ErrTimeout or ErrUnreachable leaves
	// open whether it was done.
	Commit(ctx context.Context, version *Version) error
	// Abort throws everything away: the target is as before Begin, an image that
	// was made is gone. It may be called after a failed Commit, and with a ctx of
	// its own after the first was cancelled.
	Abort(ctx context.Context) error
}
