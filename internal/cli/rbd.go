package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
)

// rbdVerb is one command of the front end that takes rbd's command lines.
type rbdVerb struct {
	name    string   // its words: "snap create"
	aliases []string // "snap add"
	args    string   // its positional arguments, for help
	options string   // names of the options that it takes, besides the common ones
	short   string
	run     func(r *rbdCall) error
}

// rbdCommon are the options that every verb takes: rbd's global ones, most of
// which mean nothing here, and those that say which image.
const rbdCommon = "conf cluster id user name mon_host keyfile keyring pool namespace image snap no-progress format pretty-format server token-file timeout"

// rbdShort gives the long names of one-letter options.
var rbdShort = map[byte]string{'c': "conf", 'n': "name", 'm': "mon_host", 'K': "keyfile", 'k': "keyring", 'p': "pool",
	's': "size", 'l': "long", 'a': "all", 'R': "allow-shrink", 't': "device-type", 'o': "options"}

// rbdSwitches are the options that take no value.
var rbdSwitches = strings.Fields(`no-progress pretty-format long all allow-shrink image-shared thick-provision new-format whole-object
	descendants flatten exact force read-only exclusive skip-quiesce ignore-quiesce-error merge-snapshots`)

// rbdValues are the options that take a value.
var rbdValues = strings.Fields(`conf cluster id user name mon_host keyfile keyring pool namespace image snap format server token-file timeout
	size order object-size image-feature image-format stripe-unit stripe-count data-pool mirror-image-mode journal-splay-width journal-object-size
	journal-pool dest dest-pool dest-namespace dest-snap path from-snap export-format sparse-size estimated-size expires-at expired-before threshold
	image-id snap-id limit device-type options io-type io-size io-threads io-total io-pattern rw-mix-read`)

// rbdCreate are the options of verbs that make an image.
const rbdCreate = `order object-size image-feature image-format image-shared stripe-unit stripe-count data-pool thick-provision new-format
	mirror-image-mode journal-splay-width journal-object-size journal-pool`

const rbdDest = "dest dest-pool dest-namespace dest-snap "

// rbdFailure is an error of the front end with its exit status, already in
// rbd's words.
type rbdFailure struct {
	status int
	text   string
}

// Error returns what is printed after "rbd: ".
func (e *rbdFailure) Error() string { return e.text }

// Unwrap returns the number, which is the exit status.
func (e *rbdFailure) Unwrap() error { return syscall.Errno(e.status) }

func rbdInvalid(format string, args ...any) error {
	return &rbdFailure{int(syscall.EINVAL), fmt.Sprintf(format, args...)}
}

// exitStatus ends a command that has said everything with a status.
type exitStatus int

// Error implements error; it is never shown.
func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// rbdCommand is "atoll rbd", which takes rbd's command lines.
func (a *App) rbdCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rbd COMMAND",
		Short: "Take the command lines of Ceph's rbd",
		Long: `Take the command lines of Ceph's rbd, with its output, messages and exit statuses.
A link to this program that is named rbd does the same.`,
		Example:            "  atoll rbd create disk1 --size 10G\n  atoll rbd snap create disk1@monday\n  ln -s $(command -v atoll) /usr/local/bin/rbd",
		GroupID:            "use",
		DisableFlagParsing: true,
		ValidArgsFunction:  a.completeRBD,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rbd(cmd, args)
		},
	}
}

// RunRBD is Run for a program that is called as rbd.
func RunRBD(ctx context.Context, app *App, root *cobra.Command, args []string) int {
	return Run(ctx, app, root, append([]string{"rbd"}, args...))
}

// rbdCall is one command line.
type rbdCall struct {
	*App
	cmd  *cobra.Command
	opts map[string][]string
	args []string // positional ones after the verb's words
}

// rbd runs one command line and prints what went wrong as rbd does.
func (a *App) rbd(cmd *cobra.Command, args []string) error {
	err := a.rbdRun(cmd, args)
	var f *rbdFailure
	switch {
	case err == nil:
		return nil
	case errors.As(err, new(exitStatus)):
		return err
	case errors.As(err, &f):
		fmt.Fprintf(a.Err, "rbd: %s\n", f.text)
		return exitStatus(f.status)
	}
	n := rbdErrno(err)
	fmt.Fprintf(a.Err, "rbd: %s\n", strings.TrimSpace(err.Error()))
	if h := api.Hint(err); h != "" {
		fmt.Fprintf(a.Err, "  → %s\n", h)
	}
	return exitStatus(n)
}

func (a *App) rbdRun(cmd *cobra.Command, args []string) error {
	words, opts, err := rbdParse(args)
	if err != nil {
		return err
	}
	_, help := opts["help"]
	_, version := opts["version"]
	switch {
	case version:
		fmt.Fprintf(a.Out, "atoll %s, with the command lines of rbd 16.2\n", cmd.Root().Version)
		return nil
	case len(words) > 0 && words[0] == "help":
		words, help = words[1:], true
	}
	verb, rest := rbdFind(words)
	switch {
	case verb == nil && (help || len(words) == 0):
		a.rbdUsage(a.Out)
		return nil
	case verb == nil:
		fmt.Fprintf(a.Err, "error: unknown option '%s'\n\n", strings.Join(words, " "))
		a.rbdUsage(a.Err)
		return exitStatus(1)
	case help:
		a.rbdHelp(verb)
		return nil
	}
	allowed := strings.Fields(rbdCommon + " " + verb.options)
	for name := range opts {
		if !slices.Contains(allowed, name) && !strings.HasPrefix(name, "rbd_") {
			return &rbdFailure{1, fmt.Sprintf("unrecognised option '--%s'", name)}
		}
	}
	if len(rest) > len(strings.Fields(verb.args)) {
		return &rbdFailure{1, "too many arguments"}
	}
	r := &rbdCall{App: a, cmd: cmd, opts: opts, args: rest}
	if err := r.globals(); err != nil {
		return err
	}
	return verb.run(r)
}

func (r *rbdCall) has(name string) bool { return len(r.opts[name]) > 0 }

func (r *rbdCall) option(name string) string {
	if v := r.opts[name]; len(v) > 0 {
		return v[len(v)-1]
	}
	return ""
}

// globals takes over the options that the whole program knows.
func (r *rbdCall) globals() error {
	if r.has("server") {
		r.server = r.option("server")
	}
	if r.has("token-file") {
		r.tokenFile = r.option("token-file")
	}
	switch f := r.option("format"); f {
	case "", "plain", "json", "xml":
	default:
		return rbdInvalid("the argument for option '--format' is invalid")
	}
	return nil
}

// take returns the next positional argument, "" if there is none.
func (r *rbdCall) take() string {
	if len(r.args) == 0 {
		return ""
	}
	arg := r.args[0]
	r.args = r.args[1:]
	return arg
}

// Whether a spec may name a snapshot.
const (
	snapNone = iota
	snapMay
	snapMust
)

// rbdPool is the pool that rbd means when none is named; here it is the root of
// the tree. Other pools and namespaces are directories.
const rbdPool = "rbd"

// flags are those of transfers.
func (r *rbdCall) flags() transferFlags {
	t := transferFlags{concurrency: 10, conns: 2}
	if n, err := strconv.Atoi(r.option("rbd_concurrent_management_ops")); err == nil && n > 0 {
		t.concurrency = n
	}
	return t
}

// percent shows progress unless that is switched off.
func (r *rbdCall) percent(text string) *transfer.Percent {
	if r.has("no-progress") {
		return nil
	}
	return transfer.NewPercent(r.Err, text)
}

// rbdErrno is the exit status for an error.
func rbdErrno(err error) int {
	var u usageError
	switch {
	case errors.Is(err, context.Canceled):
		return int(syscall.EINTR)
	case errors.Is(err, context.DeadlineExceeded):
		return int(syscall.ETIMEDOUT)
	case errors.As(err, &u):
		return int(syscall.EINVAL)
	}
	return int(rbdstream.Errno(err))
}

// strerror is the system's text of a number, as C programs show it.
func strerror(n int) string {
	text := syscall.Errno(n).Error()
	return strings.ToUpper(text[:1]) + text[1:]
}

// fail makes an error in rbd's words, "WHAT: (NUMBER) TEXT", and beneath it what
// is known better here.
func fail(what string, err error) error {
	var f *rbdFailure
	if err == nil || errors.As(err, &f) {
		return err
	}
	n := rbdErrno(err)
	text := fmt.Sprintf("%s: (%d) %s", what, n, strerror(n))
	hint, own := api.Hint(err), new(rbdstream.Error)
	switch {
	case strings.HasPrefix(hint, `"atoll `): // commands that this user does not use
		hint = ""
	case errors.As(err, &own) || hint == "" && n != int(syscall.ENOENT) && n != int(syscall.EEXIST) && err.Error() != syscall.Errno(n).Error():
		hint = err.Error()
	}
	if hint != "" {
		text += "\n  → " + hint
	}
	return &rbdFailure{n, text}
}

// finish ends a display of progress and words an error.
func finish(p *transfer.Percent, what string, err error) error {
	p.Finish(err)
	return fail(what, err)
}

// unsupported is what verbs answer that have no meaning here.
func unsupported(hint string) func(*rbdCall) error {
	return func(*rbdCall) error {
		n := int(syscall.EOPNOTSUPP)
		text := fmt.Sprintf("this is not done here: (%d) %s", n, strerror(n))
		if hint != "" {
			text += "\n  → " + hint
		}
		return &rbdFailure{n, text}
	}
}

// nothing is what verbs answer that list what is not kept here.
func nothing(root, of string) func(*rbdCall) error {
	return func(r *rbdCall) error {
		if r.structured() {
			return r.emit(root, list{of: of})
		}
		return nil
	}
}

// rbdUsage lists the verbs.
func (a *App) rbdUsage(w io.Writer) {
	fmt.Fprintf(w, "usage: rbd <command> ...\n\nCommand-line interface for RBD users of Atoll.\n\nPositional arguments:\n  <command>\n")
	for _, v := range rbdVerbs() {
		name := v.name
		if len(v.aliases) > 0 {
			name += " (" + v.aliases[0] + ")"
		}
		for _, line := range wrap(v.short, columns-38) {
			fmt.Fprintf(w, "    %-33s %s\n", name, line)
			name = ""
		}
	}
	fmt.Fprintf(w, "\nSee 'rbd help <command>' for help on a specific command.\n")
}

// wrap breaks text into lines of at most n columns.
func wrap(text string, n int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > n {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}

// rbdHelp tells about one verb.
func (a *App) rbdHelp(v *rbdVerb) {
	fmt.Fprintf(a.Out, "usage: rbd %s %s\n\n%s.\n\nOptions:\n", v.name, v.args, v.short)
	line := " "
	for _, name := range strings.Fields(rbdCommon + " " + v.options) {
		word := " --" + name
		if slices.Contains(rbdValues, name) {
			word += " <" + name + ">"
		}
		if len(line)+len(word) > columns {
			fmt.Fprintln(a.Out, line)
			line = " "
		}
		line += word
	}
	fmt.Fprintln(a.Out, line)
}

// completeRBD completes verbs and images.
func (a *App) completeRBD(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	var out []string
	for _, v := range rbdVerbs() {
		for _, name := range append([]string{v.name}, v.aliases...) {
			w := strings.Fields(name)
			if len(w) > len(args) && slices.Equal(w[:len(args)], args) && strings.HasPrefix(w[len(args)], prefix) && !slices.Contains(out, w[len(args)]) {
				out = append(out, w[len(args)])
			}
		}
	}
	if len(out) > 0 {
		return out, cobra.ShellCompDirectiveNoFileComp
	}
	if volume, _, at := strings.Cut(prefix, "@"); at {
		return a.completeVersions(nil, volume, prefix)
	}
	names, _ := a.completeVolumes(cmd, nil, prefix)
	return names, cobra.ShellCompDirectiveDefault // files too
}
