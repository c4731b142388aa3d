package api

import (
	"context"
	"errors"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// kind ties a kind of error to its name in the API and to a Connect code.
type kind struct {
	err  error
	name string
	code connect.Code
}

// kinds is the table of this border; a test holds it to atoll.Kinds.
var kinds = []kind{
	{atoll.ErrInvalid, "INVALID", connect.CodeInvalidArgument},
	{atoll.ErrNotExist, "NOT_EXIST", connect.CodeNotFound},
	{atoll.ErrExist, "EXIST", connect.CodeAlreadyExists},
	{atoll.ErrDenied, "DENIED", connect.CodePermissionDenied},
	{atoll.ErrBusy, "BUSY", connect.CodeFailedPrecondition},
	{atoll.ErrTimeout, "TIMEOUT", connect.CodeDeadlineExceeded},
	{atoll.ErrUnreachable, "UNREACHABLE", connect.CodeUnavailable},
	{atoll.ErrUnavailable, "UNAVAILABLE", connect.CodeUnavailable},
	{atoll.ErrFenced, "FENCED", connect.CodeAborted},
	{atoll.ErrConflict, "CONFLICT", connect.CodeAborted},
	{atoll.ErrCorrupt, "CORRUPT", connect.CodeDataLoss},
	{atoll.ErrNoSpace, "NO_SPACE", connect.CodeResourceExhausted},
	{atoll.ErrReadOnly, "READ_ONLY", connect.CodeFailedPrecondition},
	{atoll.ErrClosed, "CLOSED", connect.CodeUnavailable},
	{atoll.ErrGap, "GAP", connect.CodeInternal},
	{atoll.ErrSealed, "SEALED", connect.CodeInternal},
	{atoll.ErrIO, "IO", connect.CodeInternal},
	{atoll.ErrVersion, "VERSION", connect.CodeFailedPrecondition},
	{atoll.ErrIdentity, "IDENTITY", connect.CodeFailedPrecondition},
	{atoll.ErrTooLarge, "TOO_LARGE", connect.CodeInvalidArgument},
	{atoll.ErrUnsupported, "UNSUPPORTED", connect.CodeUnimplemented},
}

// hinted is an error that knows what the user can do about it.
type hinted struct {
	error
	hint string
}

// Unwrap makes errors.Is see the kind.
func (h *hinted) Unwrap() error { return h.error }

// Hint is for borders that do not know this package.
func (h *hinted) Hint() string { return h.hint }

// WithHint attaches to err a sentence that says what to do.
func WithHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{err, hint}
}

// Hint returns what WithHint attached, or "".
func Hint(err error) string {
	var h *hinted
	if errors.As(err, &h) {
		return h.hint
	}
	return ""
}

// KindName returns the API's name of err's kind, "INTERNAL" when it has none.
func KindName(err error) string {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.name
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "TIMEOUT"
	}
	if errors.Is(err, context.Canceled) {
		return "CANCELED"
	}
	return "INTERNAL"
}

// toConnect turns an error of ours into one that crosses the wire.
func toConnect(err error) error {
	if err == nil {
		return nil
	}
	if ce := new(connect.Error); errors.As(err, &ce) {
		return err
	}
	code := connect.CodeInternal
	name := KindName(err)
	switch name {
	case "TIMEOUT":
		code = connect.CodeDeadlineExceeded
	case "CANCELED":
		code = connect.CodeCanceled
	}
	for _, k := range kinds {
		if k.name == name {
			code = k.code
		}
	}
	ce := connect.NewError(code, errors.New(err.Error()))
	if d, derr := connect.NewErrorDetail(&atollv1.ErrorDetail{Code: name, Hint: Hint(err)}); derr == nil {
		ce.AddDetail(d)
	}
	return ce
}

// fromConnect gives an error that came over the wire its kind back.
func fromConnect(err error) error {
	ce := new(connect.Error)
	if !errors.As(err, &ce) {
		return err
	}
	var base error
	var hint string
	for _, d := range ce.Details() {
		if v, verr := d.Value(); verr == nil {
			if ed, ok := v.(*atollv1.ErrorDetail); ok {
				hint = ed.Hint
				for _, k := range kinds {
					if k.name == ed.Code {
						base = k.err
					}
				}
			}
		}
	}
	text := ce.Message()
	if base == nil {
		switch ce.Code() {
		case connect.CodeUnavailable:
			base = atoll.ErrUnreachable
		case connect.CodeDeadlineExceeded:
			base = atoll.ErrTimeout
		case connect.CodeUnauthenticated, connect.CodePermissionDenied:
			base = atoll.ErrDenied
		case connect.CodeUnimplemented:
			base = atoll.ErrUnsupported
		default:
			return WithHint(errors.New(text), hint)
		}
	}
	out := error(&remote{text: text, kind: base, unsent: errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)})
	if hint != "" {
		out = WithHint(out, hint)
	}
	return out
}

// remote is an error told by a server: its whole text, and its kind.
type remote struct {
	text   string
	kind   error
	unsent bool // nobody listens there: the call was not made
}

// Unsent reports whether a call was surely not made, since nobody listens at the
// server's address.
func Unsent(err error) bool {
	var r *remote
	return errors.As(err, &r) && r.unsent
}

// Error returns the server's text, with the kind if the text does not say it.
func (r *remote) Error() string {
	if strings.Contains(r.text, r.kind.Error()) {
		return r.text
	}
	return r.text + ": " + r.kind.Error()
}

// Unwrap makes errors.Is see the kind.
func (r *remote) Unwrap() error { return r.kind }
