package wire

import (
	"context"
	"errors"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// Codes of errors on the wire: 0 is success, and kind i of atoll.Kinds has code
// i+1. codeNames has a name for each, for metrics, in the same order.
func codeNames() []string {
	return []string{
		"ok", "invalid", "not_exist", "exist", "denied", "busy", "timeout",
		"unreachable", "unavailable", "fenced", "conflict", "corrupt",
		"no_space", "read_only", "closed", "gap", "sealed", "io",
		"version", "identity", "too_large", "unsupported",
	}
}

// numCodes is the number of codes, with success.
const numCodes = 22

// codeOf returns the code of err's kind. An end of the context counts as
// ErrTimeout, an error of no kind as ErrIO.
func codeOf(err error) uint16 {
	if err == nil {
		return 0
	}
	other := uint16(0)
	for i, kind := range atoll.Kinds() {
		if errors.Is(err, kind) {
			return uint16(i + 1)
		}
		if kind == atoll.ErrIO {
			other = uint16(i + 1)
		}
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return codeOf(atoll.ErrTimeout)
	}
	return other
}

// kindOf is the inverse. A code of a newer program is ErrUnavailable: it failed,
// and what to do about it is not known here.
func kindOf(code uint16) error {
	kinds := atoll.Kinds()
	if code == 0 {
		return nil
	}
	if int(code) <= len(kinds) {
		return kinds[code-1]
	}
	return atoll.ErrUnavailable
}

// remoteError is what the other side reported: its text and its kind.
type remoteError struct {
	kind error
	text string
}

// Error returns the text of the other side.
func (e *remoteError) Error() string {
	if e.text == "" {
		return e.kind.Error()
	}
	return e.text
}

// Unwrap returns the kind.
func (e *remoteError) Unwrap() error { return e.kind }

// errorOf returns the error for a code and text, nil for code 0.
func errorOf(code uint16, text string) error {
	if code == 0 {
		return nil
	}
	return &remoteError{kindOf(code), strings.ToValidUTF8(text, "?")}
}

// errorText returns what of err crosses the wire.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	text := err.Error()
	return text[:min(len(text), maxText)]
}
