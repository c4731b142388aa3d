package atoll

import "errors"

// The kinds of error. The list is append-only: every border (wire, NBD, HTTP,
// command line) maps each kind, and tests hold the tables to this list. The
// kind tells the caller what to do next.
var (
	// ErrInvalid: the request makes no sense; do not repeat it.
	ErrInvalid = errors.New("invalid argument")
	// ErrNotExist: what was named is not there.
	ErrNotExist = errors.New("does not exist")
	// ErrExist: what was to be made is there already.
	ErrExist = errors.New("already exists")
	// ErrDenied: the caller has no right to do this.
	ErrDenied = errors.New("permission denied")
	// ErrBusy: in use by someone else, or too much work at hand; try again.
	ErrBusy = errors.New("busy")
	// ErrTimeout: the deadline passed; whether it was done is unknown.
	ErrTimeout = errors.New("timed out")
	// ErrUnreachable: the other side cannot be reached; try elsewhere.
	ErrUnreachable = errors.New("unreachable")
	// ErrUnavailable: too few copies or members answer; try later.
	ErrUnavailable = errors.New("unavailable")
	// ErrFenced: a newer owner has taken over; stop writing.
	ErrFenced = errors.New("fenced by a newer owner")
	// ErrConflict: the catalog changed in between; read again and decide anew.
	ErrConflict = errors.New("changed by someone else")
	// ErrCorrupt: stored bytes fail their checksum; read another copy, repair.
	ErrCorrupt = errors.New("corrupt data")
	// ErrNoSpace: no room left.
	ErrNoSpace = errors.New("no space left")
	// ErrReadOnly: the target takes no writes.
	ErrReadOnly = errors.New("read-only")
	// ErrClosed: the object was closed.
	ErrClosed = errors.New("closed")
	// ErrGap: an append does not begin where the segment ends.
	ErrGap = errors.New("append leaves a gap")
	// ErrSealed: the segment takes no more appends.
	ErrSealed = errors.New("sealed")
	// ErrIO: the disk failed.
	ErrIO = errors.New("input/output error")
	// ErrVersion: the bytes are of a newer format than this program knows.
	ErrVersion = errors.New("newer format")
	// ErrIdentity: this is not the cluster, node or disk that was expected.
	ErrIdentity = errors.New("wrong identity")
	// ErrTooLarge: beyond a limit.
	ErrTooLarge = errors.New("too large")
	// ErrUnsupported: a known thing that is not offered here.
	ErrUnsupported = errors.New("not supported")
)

// Kinds lists every kind of error, in the order of their wire codes. It is for
// the tables at the borders and their tests; do not change the order.
func Kinds() []error {
	return []error{
		ErrInvalid, ErrNotExist, ErrExist, ErrDenied, ErrBusy, ErrTimeout,
		ErrUnreachable, ErrUnavailable, ErrFenced, ErrConflict, ErrCorrupt,
		ErrNoSpace, ErrReadOnly, ErrClosed, ErrGap, ErrSealed, ErrIO,
		ErrVersion, ErrIdentity, ErrTooLarge, ErrUnsupported,
	}
}
