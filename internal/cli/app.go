package cli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/pki"
)

// App is one run of the command line: its streams and the global flags.
type App struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer

	server     string
	tokenFile  string
	user       string // to act as; empty: root, by the token or the socket
	asked      string // the user's password, as typed
	output     string
	format     string // rbd's spelling of output
	exact      bool
	quiet      bool
	noProgress bool

	passwordFile string
	timeout      time.Duration
}

// New returns the command tree with the client's commands. The caller adds those
// that run a server.
func New(app *App, version string) *cobra.Command {
	root := &cobra.Command{
		Use:   "atoll",
		Short: "Disks that remember, on storage that heals",
		Long: `Atoll keeps block volumes on replicated storage nodes. One binary runs the
cluster and talks to it: start with "atoll demo", or with "atoll server" and
then "atoll volume create".`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetUsageTemplate(usageTemplate(root.UsageTemplate()))
	root.SetVersionTemplate("atoll {{.Version}}\n")
	root.SetIn(app.In)
	root.SetOut(app.Out)
	root.SetErr(app.Err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see \"%s --help\"", err, cmd.CommandPath())}
	})
	f := root.PersistentFlags()
	f.StringVar(&app.server, "server", envOr("ATOLL_SERVER", ""), "server to talk to: unix:/path, host:port or URL; default the one here (env ATOLL_SERVER)")
	f.StringVar(&app.tokenFile, "token-file", envOr("ATOLL_TOKEN_FILE", ""), "file with the credential for a server on TCP (env ATOLL_TOKEN_FILE, or ATOLL_TOKEN)")
	f.StringVar(&app.user, "user", envOr("ATOLL_USER", ""), "act as this user, not as root; its password is in ATOLL_PASSWORD or is asked for (env ATOLL_USER)")
	f.StringVar(&app.passwordFile, "password-file", envOr("ATOLL_PASSWORD_FILE", ""), "file with the password of --user (env ATOLL_PASSWORD_FILE)")
	f.StringVarP(&app.output, "output", "o", "table", "output: table, json or jsonl")
	f.StringVar(&app.format, "format", "", "output, as rbd calls it: plain or json")
	_ = f.MarkHidden("format") // fails only for a flag that is not there
	f.BoolVarP(&app.exact, "exact", "p", false, "sizes as exact bytes")
	f.BoolVarP(&app.quiet, "quiet", "q", false, "no progress and no hints")
	f.BoolVar(&app.noProgress, "no-progress", false, "no progress")
	f.DurationVar(&app.timeout, "timeout", 60*time.Second, "give up waiting for the server after this")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		switch app.format {
		case "":
		case "plain":
			app.output = "table"
		default:
			app.output = app.format
		}
		switch app.output {
		case "table", "json", "jsonl":
			return nil
		}
		return usageError{fmt.Errorf("unknown output %q; want table, json or jsonl", app.output)}
	}
	root.AddGroup(&cobra.Group{ID: "run", Title: "Run:"}, &cobra.Group{ID: "use", Title: "Use:"}, &cobra.Group{ID: "look", Title: "Look:"})
	root.AddCommand(app.volumeCommand(), app.snapCommand(), app.nodeCommand(), app.statusCommand(), app.doctorCommand(),
		app.configCommand(), app.tokenCommand(), app.userCommand(), app.taskCommand(), app.rbdCommand(), exitCodesHelp())
	root.AddCommand(app.treeCommands()...)
	root.AddCommand(app.pythonCommand(), app.curveCommand(), app.curveNBDCommand())
	return root
}

// Run executes the command and returns the exit code; it has printed the error.
func Run(ctx context.Context, app *App, root *cobra.Command, args []string) int {
	root.SetArgs(args)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd(args...)
	strictHelp(root)
	strict(root)
	completeFlags(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	app.printError(cmd, err)
	return ExitCode(err)
}

// strict makes every group of commands refuse a word that is none of them (by
// itself cobra would print the group's help and succeed), and wrong arguments
// wrong usage.
func strict(c *cobra.Command) {
	for _, sub := range c.Commands() {
		strict(sub)
	}
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usageArgs(c, args, err)
			}
			return nil
		}
	}
	if c.HasSubCommands() && !c.Runnable() {
		c.SuggestionsMinimumDistance, c.DisableFlagsInUseLine = 2, true
		c.Annotations = map[string]string{isGroup: "yes"}
		c.Args = cobra.ArbitraryArgs
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			text := fmt.Sprintf("unknown command %q for %q", args[0], c.CommandPath())
			if s := c.SuggestionsFor(args[0]); len(s) > 0 {
				text += fmt.Sprintf("; did you mean %q?", s[0])
			} else if list, _, err := c.Find([]string{"ls"}); err == nil && list != c && c.HasParent() {
				text += fmt.Sprintf("; to list: %q", list.CommandPath())
			}
			return usageError{errors.New(text)}
		}
	}
}

// usageArgs makes an error of a command's arguments one of usage.
func usageArgs(c *cobra.Command, args []string, err error) error {
	u := usageError{}
	switch {
	case errors.As(err, &u):
		return err
	case len(args) > 0 && len(strings.Fields(c.Use)) == 1:
		return usagef("unexpected argument %q; see \"%s --help\"", args[0], c.CommandPath())
	}
	return usagef("want: %s; got %s", strings.TrimSuffix(c.UseLine(), " [flags]"), count(len(args), "argument"))
}

// strictHelp makes "help" refuse a topic that there is not.
func strictHelp(root *cobra.Command) {
	for _, c := range root.Commands() {
		if c.Name() != "help" {
			continue
		}
		c.Run = nil
		c.RunE = func(_ *cobra.Command, args []string) error {
			topic, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return usagef("no help on %q; \"%s --help\" lists the commands", strings.Join(args, " "), root.Name())
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		}
	}
}

// isGroup marks commands that only have subcommands.
const isGroup = "group"

// columns is the width that help texts are made for.
const columns = 80

// usageTemplate is cobra's with flags wrapped to the width of a terminal, no
// useless line for groups of commands, and help topics as they are called.
func usageTemplate(text string) string {
	return strings.NewReplacer(
		"Flags.FlagUsages", "Flags.FlagUsagesWrapped "+strconv.Itoa(columns),
		"{{if .Runnable}}", `{{if and .Runnable (not (index .Annotations "`+isGroup+`"))}}`,
		"{{rpad .CommandPath .CommandPathPadding}} {{.Short}}", "{{.Root.Name}} help {{.Name}}   {{.Short}}",
	).Replace(text)
}

// envOr returns the environment variable, or def when it is not set.
func envOr(name, def string) string {
	if v, ok := os.LookupEnv(name); ok {
		return v
	}
	return def
}

// dial connects to the server that the flags name, or to the one running here.
func (a *App) dial() (_ *api.Client, err error) {
	addr := a.server
	if addr == "" {
		addr = "unix:" + api.DefaultSocket()
		if _, err := os.Stat(api.DefaultSocket()); err != nil {
			return nil, api.WithHint(fmt.Errorf("no server runs here (%s is not there): %w", api.DefaultSocket(), atoll.ErrUnreachable),
				`start one with "atoll server" or "atoll demo", or name one with --server`)
		}
		if err := api.CheckPrivate(api.RuntimeDir()); err != nil {
			return nil, err
		}
	}
	token := os.Getenv("ATOLL_TOKEN")
	if a.tokenFile != "" {
		b, err := os.ReadFile(a.tokenFile)
		if err != nil {
			return nil, fmt.Errorf("read token: %v: %w", err, atoll.ErrInvalid)
		}
		token = strings.TrimSpace(string(b))
	}
	var conf *tls.Config
	if hash, ok := caHash(token); ok && strings.HasPrefix(addr, "https://") {
		conf = pki.PinnedTLS(hash, nil)
	}
	cred := api.Credential{Token: token}
	if cred.User, cred.Password, err = a.login(); err != nil {
		return nil, err
	}
	return api.NewClient(addr, cred, conf)
}

// login returns the user to act as and the password, empty for none. On a terminal
// the password is asked for, once.
func (a *App) login() (user, password string, err error) {
	if a.user == "" {
		return "", "", nil
	}
	password, given := os.LookupEnv("ATOLL_PASSWORD")
	switch {
	case a.passwordFile != "":
		text, err := os.ReadFile(a.passwordFile)
		if err != nil {
			return "", "", fmt.Errorf("read password: %v: %w", err, atoll.ErrInvalid)
		}
		password = strings.TrimRight(string(text), "\r\n")
	case given:
	case a.asked != "":
		password = a.asked
	default:
		in, ok := a.In.(*os.File)
		if !ok || !term.IsTerminal(int(in.Fd())) {
			return "", "", usagef("user %s: no password; give it in ATOLL_PASSWORD or with --password-file", a.user)
		}
		fmt.Fprintf(a.Err, "password of %s: ", a.user)
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(a.Err)
		if err != nil {
			return "", "", fmt.Errorf("read password: %w", err)
		}
		password, a.asked = string(b), string(b)
	}
	return a.user, password, nil
}

// caHash takes the hash of the cluster's authority out of a credential,
// "atoll1:HASH:SECRET".
func caHash(credential string) (string, bool) {
	parts := strings.Split(credential, ":")
	if len(parts) != 3 || parts[0] != "atoll1" {
		return "", false
	}
	return parts[1], true
}

// Call runs fn with a client and the global deadline.
func (a *App) Call(cmd *cobra.Command, fn func(ctx context.Context, c *api.Client) error) error {
	return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
		ctx, cancel := context.WithTimeout(ctx, a.timeout)
		defer cancel()
		return fn(ctx, c)
	})
}

// work runs fn with a client and no deadline, for what takes its time.
func (a *App) work(ctx context.Context, fn func(ctx context.Context, c *api.Client) error) error {
	c, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	err = fn(ctx, c)
	switch {
	case api.Hint(err) != "":
	case errors.Is(err, atoll.ErrUnreachable):
		err = api.WithHint(err, `is the server running? Try "atoll doctor"`)
	case errors.Is(err, atoll.ErrDenied) && c.Anonymous():
		err = api.WithHint(err, `--token-file names a file with root's token (the file "credential" in the server's data directory), --user a user`)
	}
	return err
}

// hint prints a remark on standard error.
func (a *App) hint(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.Err, format+"\n", args...)
	}
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
