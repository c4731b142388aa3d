package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
)

// Exit codes. They are part of the interface: scripts rely on them.
const (
	ExitOK          = 0
	ExitOther       = 1
	ExitUsage       = 2
	ExitNotFound    = 3
	ExitExists      = 4
	ExitDenied      = 5
	ExitBusy        = 6
	ExitUnavailable = 7
	ExitDamaged     = 8
	ExitNoSpace     = 9
	ExitInterrupted = 130
)

// exitTexts says what each code means, for "atoll help exit-codes".
var exitTexts = []struct {
	code int
	text string
}{
	{ExitOK, "done"},
	{ExitOther, "failed for a reason that has no code of its own"},
	{ExitUsage, "the command line is wrong"},
	{ExitNotFound, "what was named does not exist"},
	{ExitExists, "what was to be made exists already"},
	{ExitDenied, "not allowed"},
	{ExitBusy, "in use, or changed by someone else meanwhile"},
	{ExitUnavailable, "not reachable or timed out; trying again may help"},
	{ExitDamaged, "damaged data, or a comparison found a difference"},
	{ExitNoSpace, "no space left"},
	{ExitInterrupted, "interrupted"},
}

// exitKinds maps kinds of error to exit codes; a test holds it to atoll.Kinds.
var exitKinds = []struct {
	kind error
	code int
}{
	{atoll.ErrInvalid, ExitUsage}, {atoll.ErrTooLarge, ExitUsage},
	{atoll.ErrNotExist, ExitNotFound},
	{atoll.ErrExist, ExitExists},
	{atoll.ErrDenied, ExitDenied}, {atoll.ErrReadOnly, ExitDenied}, {atoll.ErrIdentity, ExitDenied},
	{atoll.ErrBusy, ExitBusy}, {atoll.ErrConflict, ExitBusy}, {atoll.ErrFenced, ExitBusy},
	{atoll.ErrTimeout, ExitUnavailable}, {atoll.ErrUnreachable, ExitUnavailable},
	{atoll.ErrUnavailable, ExitUnavailable}, {atoll.ErrClosed, ExitUnavailable},
	{atoll.ErrCorrupt, ExitDamaged}, {atoll.ErrIO, ExitDamaged}, {atoll.ErrGap, ExitDamaged}, {atoll.ErrSealed, ExitDamaged},
	{atoll.ErrNoSpace, ExitNoSpace},
	{atoll.ErrVersion, ExitOther}, {atoll.ErrUnsupported, ExitOther},
}

// usageError marks a wrong command line.
type usageError struct{ error }

// Unwrap makes errors.Is see the cause.
func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// ExitCode returns the exit code for err.
func ExitCode(err error) int {
	var u usageError
	var status exitStatus
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &status):
		return int(status)
	case errors.Is(err, context.Canceled):
		return ExitInterrupted
	case errors.As(err, &u):
		return ExitUsage
	case errors.Is(err, context.DeadlineExceeded):
		return ExitUnavailable
	}
	for _, k := range exitKinds {
		if errors.Is(err, k.kind) {
			return k.code
		}
	}
	return ExitOther
}

// printError tells the user what went wrong and what to do, as text or JSON.
func (a *App) printError(cmd *cobra.Command, err error) {
	if errors.As(err, new(exitStatus)) {
		return // it has been told
	}
	if a.output == "json" || a.output == "jsonl" {
		code := api.KindName(err)
		if ExitCode(err) == ExitUsage {
			code = "INVALID"
		}
		type detail struct {
			Code    string `json:"code"`
			Message string `json:"message"`
			Hint    string `json:"hint,omitempty"`
			Exit    int    `json:"exit"`
		}
		b, merr := json.Marshal(map[string]detail{"error": {code, err.Error(), api.Hint(err), ExitCode(err)}})
		if merr == nil {
			fmt.Fprintln(a.Err, string(b))
			return
		}
	}
	if errors.Is(err, context.Canceled) {
		fmt.Fprintln(a.Err, "interrupted")
		return
	}
	name := "atoll"
	if cmd != nil {
		name = cmd.CommandPath()
	}
	fmt.Fprintf(a.Err, "%s: %s\n", name, strings.TrimSpace(err.Error()))
	if h := api.Hint(err); h != "" {
		fmt.Fprintf(a.Err, "  → %s\n", h)
	}
}

// exitCodesHelp is the topic "atoll help exit-codes".
func exitCodesHelp() *cobra.Command {
	var b strings.Builder
	b.WriteString("Exit codes of all commands:\n\n")
	for _, e := range exitTexts {
		fmt.Fprintf(&b, "  %3d  %s\n", e.code, e.text)
	}
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: strings.TrimRight(b.String(), "\n")}
}
