package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/cbd"
	"github.com/atollstore/atoll/internal/api"
)

// curveConf is where Curve's tools look for their configuration.
const curveConf = "/etc/curve/client.conf"

// curveVerb is a row of the table of Curve's commands.
type curveVerb struct {
	name, help string
	must, may  []string // options
	run        func(*curveCall) int
}

// curveVerbs is the table.
func curveVerbs() []curveVerb {
	pass := []string{"password"}
	return []curveVerb{
		{"create", "create file", []string{"filename", "length", "user"}, []string{"password", "stripeUnit", "stripeCount"}, (*curveCall).create},
		{"delete", "delete file", []string{"user", "filename"}, pass, func(c *curveCall) int { return c.client.Unlink(c.file(), c.user()) }},
		{"recover", "recover file", []string{"user", "filename"}, []string{"id", "password"}, func(c *curveCall) int {
			return c.client.Recover(c.file(), c.user(), c.number("id"))
		}},
		{"extend", "extend file", []string{"user", "filename", "length"}, pass, func(c *curveCall) int {
			return c.client.Extend(c.file(), c.user(), c.number("length")<<30)
		}},
		{"stat", "query file info", []string{"user", "filename"}, pass, (*curveCall).stat},
		{"rename", "rename file", []string{"user", "filename", "newname"}, pass, func(c *curveCall) int {
			return c.client.Rename(c.user(), c.file(), c.opts["newname"])
		}},
		{"mkdir", "create directory", []string{"user", "dirname"}, pass, func(c *curveCall) int { return c.client.Mkdir(c.opts["dirname"], c.user()) }},
		{"rmdir", "delete directory", []string{"user", "dirname"}, pass, func(c *curveCall) int { return c.client.Rmdir(c.opts["dirname"], c.user()) }},
		{"list", "list file of dir", []string{"user", "dirname"}, pass, (*curveCall).list},
	}
}

// curveCall is one command line.
type curveCall struct {
	*App
	client *cbd.CBDClient
	opts   map[string]string
}

func (c *curveCall) file() string { return c.opts["filename"] }

func (c *curveCall) user() cbd.UserInfo {
	return cbd.UserInfo{Owner: c.opts["user"], Password: c.opts["password"]}
}

// number returns an option that curveParse has found to be a number.
func (c *curveCall) number(name string) uint64 {
	n, _ := strconv.ParseInt(c.opts[name], 0, 64) // empty is 0
	return uint64(n)
}

// curveCommand is "atoll curve".
func (a *App) curveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "curve COMMAND",
		Short: "Take the command lines of Curve's curve",
		Long: `Take the command lines of Curve's command curve, with its output, messages and
exit statuses. A link to this program that is named curve does the same. The
server is that of ` + curveConf + ` or of --confpath; without either it is
the one that other commands use.`,
		Example:            "  atoll curve create --filename /disk1 --length 10 --user alice\n  ln -s $(command -v atoll) /usr/local/bin/curve",
		GroupID:            "use",
		DisableFlagParsing: true,
		RunE:               func(_ *cobra.Command, args []string) error { return a.curve(args) },
	}
}

// RunCurve is Run for a program that is called as curve or curve-nbd.
func RunCurve(ctx context.Context, app *App, root *cobra.Command, name string, args []string) int {
	return Run(ctx, app, root, append([]string{name}, args...))
}

// curve carries out one command line.
func (a *App) curve(args []string) error {
	verb, opts, err := a.curveParse(args)
	if err != nil || verb == nil {
		return err
	}
	conf, remove, err := a.curveConf(opts["confpath"])
	if err != nil {
		return err
	}
	defer remove()
	c := &curveCall{App: a, client: &cbd.CBDClient{}, opts: opts}
	if c.client.Init(conf) != 0 {
		fmt.Fprintln(a.Out, "init fail")
		return exitStatus(1)
	}
	defer c.client.UnInit()
	if ret := verb.run(c); ret != 0 {
		fmt.Fprintf(a.Out, "%s fail, ret = %d, %s\n", verb.name, ret, curveName(ret))
		return exitStatus(1)
	}
	return nil
}

// curveName is how Curve's tool spells a code.
func curveName(ret int) string {
	switch name := cbd.Strerror(ret); {
	case ret == -cbd.SnapshotFrozen:
		return "SNAPSTHO_FROZEN"
	case strings.HasPrefix(name, "code ") || ret == -cbd.RetryUntilSuccess || ret == -cbd.EpochTooOld:
		return "Unknown Error Code"
	default:
		return name
	}
}

// curveConf returns the configuration to use. Where there is none, one is made
// for the server that other commands talk to.
func (a *App) curveConf(path string) (conf string, remove func(), err error) {
	none := func() {}
	if path != "" {
		return path, none, nil
	}
	if _, err := os.Stat(curveConf); err == nil {
		return curveConf, none, nil
	}
	addr := a.server
	if addr == "" {
		addr = "unix:" + api.DefaultSocket()
	}
	f, err := os.CreateTemp("", "atoll-curve-")
	if err != nil {
		return "", none, fmt.Errorf("make a configuration: %w", err)
	}
	remove = func() { _ = os.Remove(f.Name()) }
	if _, err = fmt.Fprintf(f, "mds.listen.addr=%s\n", addr); err == nil {
		err = f.Close()
	}
	return f.Name(), remove, err
}

// curveParse reads a command line. verb is nil after help was printed.
func (a *App) curveParse(args []string) (verb *curveVerb, opts map[string]string, err error) {
	opts = map[string]string{}
	verbs := curveVerbs()
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "-h" || arg == "--help":
			fmt.Fprint(a.Out, curveUsage(verb)+curveHelp(verb))
			return nil, nil, nil
		case strings.HasPrefix(arg, "--"):
			if args, err = a.curveOption(verb, opts, arg[2:], args); err != nil {
				return nil, nil, err
			}
		case verb != nil:
			return nil, nil, a.curveWrong(nil, "unrecognized arguments: "+arg)
		default:
			i := slices.IndexFunc(verbs, func(v curveVerb) bool { return v.name == arg })
			if i < 0 {
				return nil, nil, a.curveWrong(nil, fmt.Sprintf("argument optype: invalid choice: '%s' (choose from %s)", arg, curveNames("'", ", ")))
			}
			verb = &verbs[i]
		}
	}
	if verb == nil {
		return nil, nil, a.curveWrong(nil, "too few arguments")
	}
	for _, name := range verb.must {
		if _, ok := opts[name]; !ok {
			return nil, nil, a.curveWrong(verb, "argument --"+name+" is required")
		}
	}
	return verb, opts, nil
}

// curveOption takes one option with its value off a command line.
func (a *App) curveOption(verb *curveVerb, opts map[string]string, name string, args []string) ([]string, error) {
	name, value, ok := strings.Cut(name, "=")
	known := verb == nil && name == "confpath" || verb != nil && (slices.Contains(verb.must, name) || slices.Contains(verb.may, name))
	if !known {
		return nil, a.curveWrong(nil, "unrecognized arguments: --"+name)
	}
	if !ok {
		if len(args) == 0 {
			return nil, a.curveWrong(verb, "argument --"+name+": expected one argument")
		}
		value, args = args[0], args[1:]
	}
	switch name {
	case "length", "stripeUnit", "stripeCount", "id":
		if n, err := strconv.ParseInt(value, 0, 64); err != nil || n < 0 || n >= 1<<33 {
			return nil, a.curveWrong(verb, fmt.Sprintf("argument --%s: invalid long value: '%s'", name, value))
		}
	}
	opts[name] = value
	return args, nil
}

// curveWrong says what is wrong with a command line, as Python's argparse does.
func (a *App) curveWrong(verb *curveVerb, what string) error {
	name := "curve"
	if verb != nil {
		name += " " + verb.name
	}
	fmt.Fprintf(a.Err, "%s%s: error: %s\n", curveUsage(verb), name, what)
	return exitStatus(2)
}

func curveNames(quote, sep string) string {
	var names []string
	for _, v := range curveVerbs() {
		names = append(names, quote+v.name+quote)
	}
	return strings.Join(names, sep)
}

func curveUsage(verb *curveVerb) string {
	if verb == nil {
		return "usage: curve [-h] [--confpath CONFPATH]\n             {" + curveNames("", ",") + "}\n             ...\n"
	}
	text := "usage: curve " + verb.name + " [-h]"
	for _, name := range verb.must {
		text += " --" + name + " " + strings.ToUpper(name)
	}
	for _, name := range verb.may {
		text += " [--" + name + " " + strings.ToUpper(name) + "]"
	}
	return text + "\n"
}

func curveHelp(verb *curveVerb) string {
	if verb != nil {
		return "\n" + verb.help + "\n"
	}
	text := "\ncurve tool\n\n"
	for _, v := range curveVerbs() {
		text += fmt.Sprintf("    %-20s%s\n", v.name, v.help)
	}
	return text
}

func (c *curveCall) create() int {
	return c.client.Create2(cbd.CreateContext{Name: c.file(), Length: c.number("length") << 30, User: c.user(),
		StripeUnit: c.number("stripeUnit"), StripeCount: c.number("stripeCount")})
}

// stat prints what is known of a file, in lines that other programs read.
func (c *curveCall) stat() int {
	var f cbd.FileInfo
	if ret := c.client.StatFile(c.file(), c.user(), &f); ret != 0 {
		return ret
	}
	types := []string{"INODE_DIRECTORY", "INODE_PAGEFILE", "INODE_APPENDFILE", "INODE_APPENDECFILE", "INODE_SNAPSHOT_PAGEFILE"}
	states := []string{"Created", "Deleting", "Cloning", "CloneMetaInstalled", "Cloned", "BeingCloned"}
	name := func(list []string, i int) string {
		if i < 0 || i >= len(list) {
			return strconv.Itoa(i)
		}
		return list[i]
	}
	fmt.Fprintf(c.Out, "id: %d\nparentid: %d\nfiletype: %s\nlength(GB): %d\ncreatetime: %s\nuser: %s\nfilename: %s\nfileStatus: %s\nstripeUnit: %d\nstripeCount: %d\n",
		f.ID, f.ParentID, name(types, f.FileType), f.Length>>30, time.UnixMicro(int64(f.Ctime)).Format(time.DateTime), f.Owner, f.Filename,
		name(states, f.FileStatus), f.StripeUnit, f.StripeCount)
	return 0
}

func (c *curveCall) list() int {
	names, ret := c.client.Listdir(c.opts["dirname"], c.user())
	for _, n := range names {
		fmt.Fprintln(c.Out, n)
	}
	return ret
}

// CurveName tells whether the program was called by one of Curve's names.
func CurveName(arg0 string) (name string, ok bool) {
	name = filepath.Base(arg0)
	return name, name == "curve" || name == "curve-nbd"
}
