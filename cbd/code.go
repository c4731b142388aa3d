package cbd

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// The codes of Curve's client library. Calls return them negated.
const (
	OK                 = 0
	Exists             = 1
	Failed             = 2
	DisableIO          = 3
	AuthFail           = 4
	Deleting           = 5
	NotExist           = 6
	UnderSnapshot      = 7
	NotUnderSnapshot   = 8
	DeleteError        = 9
	NotAllocate        = 10
	NotSupport         = 11
	NotEmpty           = 12
	NoShrinkBiggerFile = 13
	SessionNotExists   = 14
	FileOccupied       = 15
	ParamError         = 16
	InternalError      = 17
	CRCError           = 18
	InvalidRequest     = 19
	DiskFail           = 20
	NoSpace            = 21
	NotAligned         = 22
	BadFD              = 23
	LengthNotSupport   = 24
	SessionNotExist    = 25
	StatusNotMatch     = 26
	DeleteBeingCloned  = 27
	ClientNoSnapshot   = 28
	SnapshotFrozen     = 29
	RetryUntilSuccess  = 30
	EpochTooOld        = 31
	Unknown            = 100
)

// Strerror returns the name of a code, negated or not: "NOTEXIST" for -6.
func Strerror(code int) string {
	names := map[int]string{
		OK: "OK", Exists: "EXISTS", Failed: "FAILED", DisableIO: "DISABLEIO", AuthFail: "AUTHFAIL", Deleting: "DELETING",
		NotExist: "NOTEXIST", UnderSnapshot: "UNDER_SNAPSHOT", NotUnderSnapshot: "NOT_UNDERSNAPSHOT",
		DeleteError: "DELETE_ERROR", NotAllocate: "NOT_ALLOCATE", NotSupport: "NOT_SUPPORT", NotEmpty: "NOT_EMPTY",
		NoShrinkBiggerFile: "NO_SHRINK_BIGGER_FILE", SessionNotExists: "SESSION_NOTEXISTS", FileOccupied: "FILE_OCCUPIED",
		ParamError: "PARAM_ERROR", InternalError: "INTERNAL_ERROR", CRCError: "CRC_ERROR", InvalidRequest: "INVALID_REQUEST",
		DiskFail: "DISK_FAIL", NoSpace: "NO_SPACE", NotAligned: "NOT_ALIGNED", BadFD: "BAD_FD",
		LengthNotSupport: "LENGTH_NOT_SUPPORT", SessionNotExist: "SESSION_NOT_EXIST", StatusNotMatch: "STATUS_NOT_MATCH",
		DeleteBeingCloned: "DELETE_BEING_CLONED", ClientNoSnapshot: "CLIENT_NOT_SUPPORT_SNAPSHOT",
		SnapshotFrozen: "SNAPSHOT_FROZEN", RetryUntilSuccess: "RETRY_UNTIL_SUCCESS", EpochTooOld: "EPOCH_TOO_OLD", Unknown: "UNKNOWN",
	}
	if code < 0 {
		code = -code
	}
	if name, ok := names[code]; ok {
		return name
	}
	return fmt.Sprintf("code %d", code)
}

// failure is a call that ends in a code, with the reason.
type failure struct {
	code int
	why  string
}

// Error returns the reason.
func (f *failure) Error() string { return f.why }

func fail(code int, format string, args ...any) *failure {
	return &failure{code, fmt.Sprintf(format, args...)}
}

// dataCode returns the code for an error of a read or write. passing is true for
// those that pass: the volume moves to another server, or soon answers again.
func dataCode(err error) (code int, passing bool) {
	if errors.Is(err, context.DeadlineExceeded) {
		return Failed, false
	}
	for _, row := range []struct {
		kind    error
		code    int
		passing bool
	}{
		{atoll.ErrTimeout, Failed, true}, {atoll.ErrUnreachable, Failed, true}, {atoll.ErrUnavailable, Failed, true},
		{atoll.ErrFenced, Failed, true}, {atoll.ErrClosed, Failed, true}, {atoll.ErrBusy, Failed, true}, {atoll.ErrConflict, Failed, true},
		{atoll.ErrNotExist, Failed, false}, {atoll.ErrCorrupt, CRCError, false}, {atoll.ErrIO, DiskFail, false},
		{atoll.ErrNoSpace, NoSpace, false}, {atoll.ErrReadOnly, NotSupport, false}, {atoll.ErrDenied, AuthFail, false},
		{atoll.ErrInvalid, InvalidRequest, false}, {atoll.ErrTooLarge, InvalidRequest, false}, {atoll.ErrUnsupported, InvalidRequest, false},
	} {
		if errors.Is(err, row.kind) {
			return row.code, row.passing
		}
	}
	return InternalError, false
}
