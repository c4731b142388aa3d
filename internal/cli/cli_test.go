package cli

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

func twoVolumes() []*atollv1.Volume {
	return []*atollv1.Volume{
		{Id: "0123456789abcdef", Name: "disk1", SizeBytes: 10 << 30, Replicas: 3, Cache: "writethrough", Created: timestamppb.Now(), Open: true, MappedBytes: proto.Int64(1 << 30), Connections: 16, Urls: []string{"nbd+unix:///disk1?socket=/run/atoll/nbd.sock", "nbd://127.0.0.1/disk1"}},
		{Name: "projects/build-cache", SizeBytes: 64 << 40, Replicas: 1, Cache: "writeback", Created: timestamppb.New(time.Now().Add(-1000 * time.Hour))},
	}
}

// Every command's help fits a terminal, says what it does, and shows examples
// that are commands.
func TestHelp(t *testing.T) {
	app := &App{}
	root := New(app, "test")
	strict(root)
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		args := append(strings.Fields(c.CommandPath())[1:], "--help")
		code, out, _ := run(t, args...)
		if code != 0 || c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: %d, short %q", c.CommandPath(), code, c.Short)
		}
		for _, l := range tooWide(out) {
			if c.Name() != "curve-nbd" { // its help is that of the program whose place it takes
				t.Errorf("%s: too wide: %s", c.CommandPath(), l)
			}
		}
		if c.HasSubCommands() && c != root && strings.Contains(out, "Usage:\n  "+c.CommandPath()+"\n") {
			t.Errorf("%s: shows a usage that does nothing", c.CommandPath())
		}
		for _, l := range strings.Split(c.Example, "\n") {
			_, words, ok := strings.Cut(l, "atoll ")
			if !ok || strings.HasPrefix(words, "server") {
				continue
			}
			found, _, err := root.Find(strings.Fields(words))
			if err != nil || found == root {
				t.Errorf("%s: the example %q names no command", c.CommandPath(), l)
			}
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(root)
}

// What fits no command is an error with a suggestion, not a page of help.
func TestUnknown(t *testing.T) {
	for _, w := range []struct {
		args []string
		want string
	}{
		{[]string{"volum", "ls"}, `unknown command "volum" for "atoll"; did you mean "volume"?`},
		{[]string{"volume", "lss"}, `unknown command "lss" for "atoll volume"; did you mean "ls"?`},
		{[]string{"xyzzy"}, `unknown command "xyzzy" for "atoll"`},
		{[]string{"volume", "meta", "disk1"}, `unknown command "disk1" for "atoll volume meta"; to list: "atoll volume meta ls"`},
		{[]string{"help", "xyzzy"}, `no help on "xyzzy"`},
		{[]string{"completion", "tcsh"}, `unknown command "tcsh"`},
		{[]string{"volume", "ls", "--bogus"}, `unknown flag: --bogus; see "atoll volume ls --help"`},
		{[]string{"volume", "create", "x"}, "want a name and a size"},
		{[]string{"volume", "create", "x", "10"}, "has no unit"},
		{[]string{"volume", "ls", "-o", "xml"}, `unknown output "xml"`},
		{[]string{"volume", "rm"}, "at least one volume"},
		{[]string{"status", "me"}, `unexpected argument "me"; see "atoll status --help"`},
		{[]string{"volume", "info"}, "want a volume's name; got 0 arguments"},
	} {
		code, out, err := run(t, w.args...)
		if code != ExitUsage || out != "" || !strings.Contains(err, w.want) || strings.Count(err, "\n") > 2 {
			t.Errorf("%v: %d\n%s%s", w.args, code, out, err)
		}
	}
}

// Errors say what to do, as text and as JSON.
func TestErrors(t *testing.T) {
	serveFake(t, &fakeServer{volumes: twoVolumes()})
	code, _, err := run(t, "volume", "info", "disk2")
	if code != ExitNotFound || !strings.Contains(err, `volume "disk2"`) || !strings.Contains(err, `→ did you mean "disk1"?`) {
		t.Errorf("%d %s", code, err)
	}
	code, _, err = run(t, "volume", "info", "something")
	if code != ExitNotFound || !strings.Contains(err, `"atoll volume ls" lists the volumes`) {
		t.Errorf("%d %s", code, err)
	}
	for _, format := range []string{"json", "jsonl"} {
		code, out, err := run(t, "volume", "info", "disk2", "-o", format)
		var e struct {
			Error struct {
				Code, Message, Hint string
				Exit                int
			}
		}
		if jerr := json.Unmarshal([]byte(err), &e); jerr != nil || out != "" || code != ExitNotFound ||
			e.Error.Code != "NOT_EXIST" || e.Error.Exit != code || e.Error.Hint != `did you mean "disk1"?` || e.Error.Message == "" {
			t.Errorf("%d %s%s (%v)", code, out, err, jerr)
		}
	}
	if code, _, err := run(t, "status", "--server", "unix:/nowhere/api.sock"); code != ExitUnavailable || !strings.Contains(err, "→ ") {
		t.Errorf("no server: %d %s", code, err)
	}
	if code, _, err := run(t, "volume", "rm", "disk1", "--now"); code != ExitUsage || !strings.Contains(err, "--yes") {
		t.Errorf("no terminal to ask on: %d %s", code, err)
	}
}

// Tables fit a terminal, and their columns stand under their headers.
func TestTables(t *testing.T) {
	serveFake(t, &fakeServer{volumes: twoVolumes()})
	for _, args := range [][]string{{"volume", "ls"}, {"node", "ls"}, {"status"}, {"config", "show", "--origin"}, {"volume", "info", "disk1"}} {
		code, out, err := run(t, args...)
		if code != 0 || err != "" {
			t.Errorf("%v: %d %s", args, code, err)
		}
		for _, l := range tooWide(out) {
			t.Errorf("%v: too wide: %s", args, l)
		}
		if strings.Contains(out, " \n") || strings.Contains(out, "\t") {
			t.Errorf("%v: blanks at line ends or tabs in\n%s", args, out)
		}
	}
	_, out, _ := run(t, "volume", "ls")
	lines := strings.Split(out, "\n")
	if at := strings.Index(lines[0], "CACHE"); at < 0 || strings.Index(lines[1], "writethrough") != at || strings.Index(lines[2], "writeback") != at {
		t.Errorf("columns:\n%s", out)
	}
	if end := strings.Index(lines[0], "SIZE") + 4; !strings.HasSuffix(lines[1][:end], "10 GiB") || !strings.HasSuffix(lines[2][:end], "64 TiB") {
		t.Errorf("sizes are not aligned:\n%s", out)
	}
	if _, out, _ := run(t, "volume", "ls", "--exact"); !strings.Contains(out, " 10737418240 ") {
		t.Errorf("--exact:\n%s", out)
	}
	if _, out, _ := run(t, "node", "ls", "-o", "jsonl"); strings.Count(out, "\n") != 2 || !strings.Contains(out, `"freeBytes":549755813888,`) {
		t.Errorf("jsonl:\n%s", out)
	}
	if _, out, _ := run(t, "status"); !strings.Contains(out, "DEGRADED   2 nodes (1 down), 1 volume\n") || !strings.Contains(out, "with 3 copies of everything") {
		t.Errorf("status:\n%s", out)
	}
	if _, out, _ := run(t, "volume", "create", "disk3", "1G"); out != "disk3: 1 GiB, thin, 1 copy   'nbd+unix:///disk3?socket=/x/nbd.sock'\n" {
		t.Errorf("create: %s", out)
	}
	if _, out, _ := run(t, "volume", "url", "disk1"); out != "nbd+unix:///disk1?socket=/run/atoll/nbd.sock\n" {
		t.Errorf("url: %s", out)
	}
	if _, out, _ := run(t, "volume", "rm", "disk1", "-n"); out != "would delete disk1 (5 MiB in each copy)\n" {
		t.Errorf("rm -n: %s", out)
	}
}

// A check tells what it found and ends with the code that says how bad it is.
func TestCheck(t *testing.T) {
	f := &fakeServer{}
	serveFake(t, f)
	for _, w := range []struct {
		r    *atollv1.CheckVolumeResponse
		code int
		want string
	}{
		{&atollv1.CheckVolumeResponse{Blocks: 5}, ExitOK, "disk1 is consistent: 5 blocks mapped"},
		{&atollv1.CheckVolumeResponse{DamagedBytes: 8192, RepairedBytes: 8192}, ExitOK, "8 KiB damaged, 8 KiB repaired"},
		{&atollv1.CheckVolumeResponse{Problems: []string{"segment 7: gone"}}, ExitDamaged, "damaged    segment 7: gone"},
		{&atollv1.CheckVolumeResponse{Unchecked: make([]string, 30)}, ExitUnavailable, "and 20 more"},
	} {
		f.check = w.r
		code, out, _ := run(t, "volume", "check", "disk1", "--read")
		if code != w.code || !strings.Contains(out, w.want) {
			t.Errorf("%v: %d\n%s", w.r, code, out)
		}
	}
}

// Shells complete names, values of flags and commands, and never wait long.
func TestCompletion(t *testing.T) {
	f := &fakeServer{volumes: twoVolumes()}
	serveFake(t, f)
	for _, w := range []struct {
		args []string
		want string // first words of the lines
	}{
		{[]string{"volume", "info", ""}, "disk1 projects/build-cache :4"},
		{[]string{"volume", "info", "d"}, "disk1 :4"},
		{[]string{"volume", "info", "disk1", ""}, ":4"},
		{[]string{"volume", "rm", "disk1", ""}, "projects/build-cache :4"},
		{[]string{"volume", "create", ""}, ":4"},
		{[]string{"volume", "import", ""}, ":0"},
		{[]string{"volume", "export", ""}, "disk1 projects/build-cache :4"},
		{[]string{"volume", "export", "disk1", ""}, ":0"},
		{[]string{"volume", "ls", "-o", "j"}, "table json jsonl :4"},
		{[]string{"volume", "create", "x", "1G", "--cache", ""}, "writeback writethrough :4"},
		{[]string{"sta"}, "status :4"},
	} {
		_, out, _ := run(t, append([]string{"__complete"}, w.args...)...)
		var words []string
		for _, l := range strings.Split(strings.TrimSpace(out), "\n") {
			word, _, _ := strings.Cut(l, "\t")
			words = append(words, word)
		}
		if got := strings.Join(words, " "); got != w.want {
			t.Errorf("%v completes to %q, want %q", w.args, got, w.want)
		}
	}
	f.wait = make(chan struct{})
	defer close(f.wait)
	began := time.Now()
	run(t, "__complete", "volume", "info", "")
	if took := time.Since(began); took > time.Minute {
		t.Errorf("completion by a server that hangs took %v", took)
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, out, err := run(t, "completion", shell); code != 0 || !strings.Contains(out, "atoll") {
			t.Errorf("completion %s: %d %s", shell, code, err)
		}
	}
}

// Without a terminal progress is a line now and then, on standard error only,
// and none when told so.
func TestProgress(t *testing.T) {
	var b strings.Builder
	app := &App{Err: &b}
	p := app.NewProgress("a-name-that-is-much-too-long", 2<<20)
	p.Add(1 << 20)
	p.Add(1 << 20)
	p.Done()
	if text := b.String(); !strings.HasPrefix(text, "a-name-that-is-much…: 100% 2 MiB ") || strings.Count(text, "\n") != 1 || strings.Contains(text, "\r") {
		t.Errorf("progress: %q", text)
	}
	b.Reset()
	app.noProgress = true
	p = app.NewProgress("quiet", 1)
	p.Add(1)
	p.Done()
	if b.Len() != 0 {
		t.Errorf("--no-progress: %q", b.String())
	}
}
