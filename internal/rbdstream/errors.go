package rbdstream

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
)

// Error is an error for which rbd has an exit status of its own. It wraps a kind
// of package atoll.
type Error struct {
	Errno syscall.Errno // what rbd exits with
	err   error
}

// Error returns the text.
func (e *Error) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.err }

// Fail makes an Error of an errno and an error that wraps a kind.
func Fail(n syscall.Errno, err error) error { return &Error{n, err} }

func fail(n syscall.Errno, kind error, format string, args ...any) error {
	return &Error{n, fmt.Errorf(format+": %w", append(args, kind)...)}
}

// errnos gives each kind of error the number that rbd would use.
var errnos = []struct {
	kind  error
	errno syscall.Errno
}{
	{atoll.ErrInvalid, syscall.EINVAL}, {atoll.ErrNotExist, syscall.ENOENT}, {atoll.ErrExist, syscall.EEXIST},
	{atoll.ErrDenied, syscall.EPERM}, {atoll.ErrBusy, syscall.EBUSY}, {atoll.ErrTimeout, syscall.ETIMEDOUT},
	{atoll.ErrUnreachable, syscall.EHOSTUNREACH}, {atoll.ErrUnavailable, syscall.EAGAIN},
	{atoll.ErrFenced, syscall.ESHUTDOWN}, {atoll.ErrConflict, syscall.EBUSY}, {atoll.ErrCorrupt, syscall.EBADMSG},
	{atoll.ErrNoSpace, syscall.ENOSPC}, {atoll.ErrReadOnly, syscall.EROFS}, {atoll.ErrClosed, syscall.ESHUTDOWN},
	{atoll.ErrGap, syscall.EIO}, {atoll.ErrSealed, syscall.EIO}, {atoll.ErrIO, syscall.EIO},
	{atoll.ErrVersion, syscall.ENOTSUP}, {atoll.ErrIdentity, syscall.EPERM}, {atoll.ErrTooLarge, syscall.EFBIG},
	{atoll.ErrUnsupported, syscall.ENOTSUP},
}

// Errno returns the number with which rbd would exit after err: that of the
// Error within, else of the system's error, else of the kind; EIO for an
// unknown error and 0 for nil.
func Errno(err error) syscall.Errno {
	var own *Error
	var sys syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &own):
		return own.Errno
	case errors.As(err, &sys):
		return sys
	}
	for _, e := range errnos {
		if errors.Is(err, e.kind) {
			return e.errno
		}
	}
	return syscall.EIO
}
