package curve

import (
	"context"
	"errors"

	"github.com/atollstore/atoll/internal/atoll"
)

// Code is a result as Curve's clients know it: 0, or one of these, negated on
// its way out.
type Code int

// The codes of Curve's client library.
const (
	OK                Code = 0
	Exists            Code = 1
	Failed            Code = 2
	DisableIO         Code = 3
	AuthFail          Code = 4
	Deleting          Code = 5
	NotExist          Code = 6
	UnderSnapshot     Code = 7
	NotUnderSnapshot  Code = 8
	DeleteError       Code = 9
	NotAllocate       Code = 10
	NotSupport        Code = 11
	NotEmpty          Code = 12
	NoShrink          Code = 13
	SessionNotExists  Code = 14
	FileOccupied      Code = 15
	ParamError        Code = 16
	InternalError     Code = 17
	CRCError          Code = 18
	InvalidRequest    Code = 19
	DiskFail          Code = 20
	NoSpace           Code = 21
	NotAligned        Code = 22
	BadFD             Code = 23
	LengthNotSupport  Code = 24
	SessionNotExist   Code = 25
	StatusNotMatch    Code = 26
	DeleteBeingCloned Code = 27
	ClientNoSnapshot  Code = 28
	SnapshotFrozen    Code = 29
	Unknown           Code = 100
)

// kindCodes is the table of this border; a test holds it to atoll.Kinds.
func kindCodes() []struct {
	kind error
	code Code
} {
	return []struct {
		kind error
		code Code
	}{
		{atoll.ErrInvalid, ParamError},
		{atoll.ErrNotExist, NotExist},
		{atoll.ErrExist, Exists},
		{atoll.ErrDenied, AuthFail},
		{atoll.ErrBusy, FileOccupied},
		{atoll.ErrTimeout, Failed},
		{atoll.ErrUnreachable, Failed},
		{atoll.ErrUnavailable, Failed},
		{atoll.ErrFenced, Failed},
		{atoll.ErrConflict, InternalError},
		{atoll.ErrCorrupt, CRCError},
		{atoll.ErrNoSpace, NoSpace},
		{atoll.ErrReadOnly, NotSupport},
		{atoll.ErrClosed, Failed},
		{atoll.ErrGap, InternalError},
		{atoll.ErrSealed, InternalError},
		{atoll.ErrIO, DiskFail},
		{atoll.ErrVersion, InternalError},
		{atoll.ErrIdentity, InternalError},
		{atoll.ErrTooLarge, LengthNotSupport},
		{atoll.ErrUnsupported, NotSupport},
	}
}

// refusal is a code with the reason in words.
type refusal struct {
	code Code
	why  string
}

// Error returns the reason.
func (r *refusal) Error() string { return r.why }

// refuse makes an error that ends a call with a code.
func refuse(code Code, why string) error { return &refusal{code, why} }

// CodeOf returns the code of an error: of a refusal its own, else by kind.
func CodeOf(err error) Code {
	if err == nil {
		return OK
	}
	var r *refusal
	if errors.As(err, &r) {
		return r.code
	}
	for _, row := range kindCodes() {
		if errors.Is(err, row.kind) {
			return row.code
		}
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return Failed
	}
	return InternalError
}
