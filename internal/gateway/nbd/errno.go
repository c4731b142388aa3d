package nbd

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// kindCode is one row of the table of errors.
type kindCode struct {
	kind  error
	errno uint32 // in answer to a request
	rep   uint32 // in answer to an option
}

// kindCodes returns the table: every kind of error, what a request is answered
// with and what an option is answered with. ENOMEM is never sent, ENOTSUP only
// for FAST_ZERO, EOVERFLOW only for reads that are too large.
func kindCodes() []kindCode {
	return []kindCode{
		{atoll.ErrInvalid, errnoInval, repInvalid},
		{atoll.ErrNotExist, errnoIO, repUnknown},
		{atoll.ErrExist, errnoIO, repPolicy},
		{atoll.ErrDenied, errnoPerm, repPolicy},
		{atoll.ErrBusy, errnoIO, repPolicy},
		{atoll.ErrTimeout, errnoIO, repPolicy},
		{atoll.ErrUnreachable, errnoIO, repPolicy},
		{atoll.ErrUnavailable, errnoIO, repPolicy},
		{atoll.ErrFenced, errnoShutdown, repPolicy},
		{atoll.ErrConflict, errnoIO, repPolicy},
		{atoll.ErrCorrupt, errnoIO, repPolicy},
		{atoll.ErrNoSpace, errnoNoSpace, repPolicy},
		{atoll.ErrReadOnly, errnoPerm, repPolicy},
		{atoll.ErrClosed, errnoShutdown, repShut},
		{atoll.ErrGap, errnoIO, repPolicy},
		{atoll.ErrSealed, errnoIO, repPolicy},
		{atoll.ErrIO, errnoIO, repPolicy},
		{atoll.ErrVersion, errnoIO, repPlat},
		{atoll.ErrIdentity, errnoIO, repPolicy},
		{atoll.ErrTooLarge, errnoInval, repTooBig},
		{atoll.ErrUnsupported, errnoInval, repPlat},
	}
}

// errno returns the number that a failed request is answered with.
func errno(err error) uint32 {
	for _, row := range kindCodes() {
		if errors.Is(err, row.kind) {
			return row.errno
		}
	}
	return errnoIO
}

// optionError returns the reply that a failed option is answered with.
func optionError(err error) uint32 {
	for _, row := range kindCodes() {
		if errors.Is(err, row.kind) {
			return row.rep
		}
	}
	return repPolicy
}

// ServerError is an error that a server answered a client's request or option
// with. It unwraps to the nearest kind of package atoll.
type ServerError struct {
	Op   string // what was asked, with its range
	Code uint32 // the number of the protocol
	Text string // the server's words, may be empty
}

// Error tells what was asked and what the server said.
func (e *ServerError) Error() string {
	if e.Text != "" {
		return fmt.Sprintf("%s: server answers %q (code %#x): %v", e.Op, e.Text, e.Code, e.Unwrap())
	}
	return fmt.Sprintf("%s: server answers code %#x: %v", e.Op, e.Code, e.Unwrap())
}

// Unwrap returns the kind of the error.
func (e *ServerError) Unwrap() error {
	switch e.Code {
	case errnoPerm, repPolicy, repTLSReqd:
		return atoll.ErrDenied
	case errnoInval, repInvalid:
		return atoll.ErrInvalid
	case errnoNoSpace:
		return atoll.ErrNoSpace
	case errnoOverflow, repTooBig:
		return atoll.ErrTooLarge
	case errnoNotSup, repUnsup, repPlat:
		return atoll.ErrUnsupported
	case errnoShutdown, repShut:
		return atoll.ErrClosed
	case repUnknown:
		return atoll.ErrNotExist
	}
	return atoll.ErrIO
}

// ctxError gives a context's error its kind.
func ctxError(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", atoll.ErrTimeout, err)
	}
	return err
}
