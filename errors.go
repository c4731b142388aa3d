package atoll

import (
	"github.com/atollstore/atoll/internal/api"
	kinds "github.com/atollstore/atoll/internal/atoll"
)

// The kinds of error, for errors.Is. The kind says what the caller can do next.
var (
	// ErrInvalid: the request makes no sense; do not repeat it.
	ErrInvalid = kinds.ErrInvalid
	// ErrNotExist: what was named is not there.
	ErrNotExist = kinds.ErrNotExist
	// ErrExist: what was to be made is there already.
	ErrExist = kinds.ErrExist
	// ErrDenied: the caller has no right to do this.
	ErrDenied = kinds.ErrDenied
	// ErrBusy: in use by someone else; try again later.
	ErrBusy = kinds.ErrBusy
	// ErrConflict: changed by someone else in between; look again.
	ErrConflict = kinds.ErrConflict
	// ErrTimeout: the deadline passed; whether it was done is unknown.
	ErrTimeout = kinds.ErrTimeout
	// ErrUnreachable: no server answers, or the connection to it is lost.
	ErrUnreachable = kinds.ErrUnreachable
	// ErrUnavailable: too few copies or members answer; try later.
	ErrUnavailable = kinds.ErrUnavailable
	// ErrNoSpace: no room left, or a write beyond the end.
	ErrNoSpace = kinds.ErrNoSpace
	// ErrReadOnly: a version takes no writes.
	ErrReadOnly = kinds.ErrReadOnly
	// ErrClosed: the volume was closed, or the server is stopping.
	ErrClosed = kinds.ErrClosed
	// ErrCorrupt: no copy of the data is whole.
	ErrCorrupt = kinds.ErrCorrupt
	// ErrIO: the disks failed.
	ErrIO = kinds.ErrIO
	// ErrTooLarge: beyond a limit.
	ErrTooLarge = kinds.ErrTooLarge
	// ErrUnsupported: a known thing that this server does not offer.
	ErrUnsupported = kinds.ErrUnsupported
)

// Hint returns the server's advice on what to do about an error, or "".
func Hint(err error) string { return api.Hint(err) }
