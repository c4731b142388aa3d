package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// kindCode is one row of the table of errors.
type kindCode struct {
	kind  error
	errno uint32 // in answer to a request
	rep   uint32 // in answer to an option
	tag   string // what tells the kind where the number does not (see tagged)
}

// kindCodes returns the table: every kind of error, what a request is answered
// with and what an option is answered with. ENOMEM is never sent, ENOTSUP only
// for FAST_ZERO, EOVERFLOW only for reads that are too large.
func kindCodes() []kindCode {
	return []kindCode{
		{atoll.ErrInvalid, errnoInval, repInvalid, "INVALID"},
		{atoll.ErrNotExist, errnoIO, repUnknown, "NOT_EXIST"},
		{atoll.ErrExist, errnoIO, repPolicy, "EXIST"},
		{atoll.ErrDenied, errnoPerm, repPolicy, "DENIED"},
		{atoll.ErrBusy, errnoIO, repPolicy, "BUSY"},
		{atoll.ErrTimeout, errnoIO, repPolicy, "TIMEOUT"},
		{atoll.ErrUnreachable, errnoIO, repPolicy, "UNREACHABLE"},
		{atoll.ErrUnavailable, errnoIO, repPolicy, "UNAVAILABLE"},
		{atoll.ErrFenced, errnoShutdown, repPolicy, "FENCED"},
		{atoll.ErrConflict, errnoIO, repPolicy, "CONFLICT"},
		{atoll.ErrCorrupt, errnoIO, repPolicy, "CORRUPT"},
		{atoll.ErrNoSpace, errnoNoSpace, repPolicy, "NO_SPACE"},
		{atoll.ErrReadOnly, errnoPerm, repPolicy, "READ_ONLY"},
		{atoll.ErrClosed, errnoShutdown, repShut, "CLOSED"},
		{atoll.ErrGap, errnoIO, repPolicy, "GAP"},
		{atoll.ErrSealed, errnoIO, repPolicy, "SEALED"},
		{atoll.ErrIO, errnoIO, repPolicy, "IO"},
		{atoll.ErrVersion, errnoIO, repPlat, "VERSION"},
		{atoll.ErrIdentity, errnoIO, repPolicy, "IDENTITY"},
		{atoll.ErrTooLarge, errnoInval, repTooBig, "TOO_LARGE"},
		{atoll.ErrUnsupported, errnoInval, repPlat, "UNSUPPORTED"},
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

// tagged returns the text for an error that is answered with a number. The
// protocol has few numbers; where that one would be taken for another kind, the
// text ends with a tag, as in "… [BUSY]", by which our client knows it again.
func tagged(err error, code uint32) string {
	text := err.Error()
	var h interface{ Hint() string }
	if errors.As(err, &h) && h.Hint() != "" {
		text += " (" + h.Hint() + ")"
	}
	tag := ""
	for _, row := range kindCodes() {
		if errors.Is(err, row.kind) {
			if kindOf(code) != row.kind {
				tag = " [" + row.tag + "]"
			}
			break
		}
	}
	return text[:min(len(text), maxString-len(tag))] + tag
}

// untag takes a tag off a text. kind is nil if there is none.
func untag(text string) (rest string, kind error) {
	for _, row := range kindCodes() {
		if rest, ok := strings.CutSuffix(text, " ["+row.tag+"]"); ok {
			return rest, row.kind
		}
	}
	return text, nil
}

// kindOf returns the kind that a number of the protocol stands for.
func kindOf(code uint32) error {
	switch code {
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

// ServerError is an error that a server answered a client's request or option
// with. It unwraps to the nearest kind of package atoll.
type ServerError struct {
	Op   string // what was asked, with its range
	Code uint32 // the number of the protocol
	Text string // the server's words, may be empty
	kind error
}

// newServerError makes the error of an answer.
func newServerError(op string, code uint32, text string) *ServerError {
	text, kind := untag(text)
	if kind == nil {
		kind = kindOf(code)
	}
	return &ServerError{Op: op, Code: code, Text: text, kind: kind}
}

// Error tells what was asked and what the server said.
func (e *ServerError) Error() string {
	if e.Text != "" {
		return fmt.Sprintf("%s: server answers %q (code %#x): %v", e.Op, e.Text, e.Code, e.kind)
	}
	return fmt.Sprintf("%s: server answers code %#x: %v", e.Op, e.Code, e.kind)
}

// Unwrap returns the kind of the error.
func (e *ServerError) Unwrap() error { return e.kind }

// ctxError gives a context's error its kind.
func ctxError(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", atoll.ErrTimeout, err)
	}
	return err
}
