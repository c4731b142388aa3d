package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
)

func TestRBDParse(t *testing.T) {
	words, opts, err := rbdParse(strings.Fields("-c /etc/ceph.conf --id admin snap create --image a --snap=s -p pool --no-progress x --rbd-concurrent-management-ops 5 -s 10G -- --y"))
	want := map[string][]string{"conf": {"/etc/ceph.conf"}, "id": {"admin"}, "image": {"a"}, "snap": {"s"}, "pool": {"pool"}, "no-progress": {""},
		"rbd_concurrent_management_ops": {"5"}, "size": {"10G"}}
	if err != nil || strings.Join(words, " ") != "snap create x --y" || !reflect.DeepEqual(opts, want) {
		t.Errorf("%v %v %v", words, opts, err)
	}
	for _, line := range []string{"ls --bogus", "ls -Z", "create a --size"} {
		if _, _, err := rbdParse(strings.Fields(line)); err == nil {
			t.Errorf("%q is accepted", line)
		}
	}
	for line, want := range map[string]string{
		"snap create a": "snap create/a", "snap add a": "snap create/a", "deep cp a b": "deep copy/a b", "cp a b": "copy/a b", "ls": "list/",
		"trash purge schedule ls": "trash purge schedule/ls", "trash purge": "trash purge/", "group ls": "group list/", "group snap create x": "group/snap create x",
	} {
		v, rest := rbdFind(strings.Fields(line))
		if v == nil || v.name+"/"+strings.Join(rest, " ") != want {
			t.Errorf("%q is %v %v, want %s", line, v, rest, want)
		}
	}
}

// Every verb has options that the parser knows, and a name of its own.
func TestRBDVerbs(t *testing.T) {
	seen := map[string]bool{}
	for _, v := range rbdVerbs() {
		for _, name := range append([]string{v.name}, v.aliases...) {
			if seen[name] || v.run == nil || v.short == "" || strings.HasSuffix(v.short, ".") {
				t.Errorf("%q", name)
			}
			seen[name] = true
		}
		for _, o := range strings.Fields(rbdCommon + " " + v.options) {
			if _, _, err := rbdParse([]string{"--" + o, "x"}); err != nil {
				t.Errorf("%s: %v", v.name, err)
			}
		}
		code, out, _ := run(t, append([]string{"rbd", "help"}, strings.Fields(v.name)...)...)
		if code != 0 || !strings.Contains(out, "usage: rbd "+v.name) || len(tooWide(out)) > 0 {
			t.Errorf("help %s: %d\n%s", v.name, code, out)
		}
	}
}

func TestRBDSpecs(t *testing.T) {
	for text, want := range map[string]spec{
		"a": {"a", ""}, "rbd/a": {"a", ""}, "rbd/ns/a@s": {"ns/a", "s"}, "p/a@s": {"p/a", "s"}, "p/ns/a": {"p/ns/a", ""},
	} {
		if got, err := rbdSpec(text); err != nil || got != want {
			t.Errorf("%q: %v %v", text, got, err)
		}
	}
	for _, text := range []string{"a@", "a@b@c", "a/", "/a", "a//b", "a@b/c"} {
		if got, err := rbdSpec(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
	for _, w := range []struct{ pool, ns, want string }{
		{"", "", ""}, {"rbd", "", ""}, {"rbd", "n", "n"}, {"p", "", "p"}, {"p", "n", "p/n"}, {"rbd/n", "", "n"}, {"p/n", "", "p/n"},
	} {
		if got := rbdDir(w.pool, w.ns); got != w.want {
			t.Errorf("pool %q, namespace %q: %q, want %q", w.pool, w.ns, got, w.want)
		}
	}
	for path, want := range map[string]string{"a": "rbd/a", "p/a": "p/a", "p/n/a": "p/n/a"} {
		if got := rbdFull(path); got != want {
			t.Errorf("%s: %s", path, got)
		}
	}
	for text, want := range map[string]int64{"64": 64 << 20, "1G": 1 << 30, "12587000B": 12587000, "1.5G": 3 << 29, "4096K": 4 << 20, "1E": 1 << 60} {
		got, err := (&rbdCall{opts: map[string][]string{"size": {text}}}).size("size", 1<<20)
		if err != nil || got != want {
			t.Errorf("--size %s: %d %v, want %d", text, got, err, want)
		}
	}
}

// Texts are byte for byte rbd's.
func TestRBDText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 512: "512 B", 1023: "1023 B", 4096: "4 KiB", 1 << 20: "1 MiB", 12587000: "12 MiB", 3 << 29: "1.5 GiB",
		40 << 10: "40 KiB", 10 << 40: "10 TiB", 1234567: "1.2 MiB", 1<<60 + 1: "1.0 EiB"} {
		if got := rbdSize(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	var out bytes.Buffer
	r := &rbdCall{App: &App{Out: &out}, opts: map[string][]string{"format": {"json"}}}
	doc := record{{"name", `a"<&`}, {"id", 1}, {"list", list{"x", []any{"one", record{{"k", true}}}}}, {"none", list{}}}
	show := func(want string) {
		t.Helper()
		out.Reset()
		if err := r.emit("root", doc); err != nil || out.String() != want+"\n" {
			t.Errorf("%s (%v), want %s", out.String(), err, want)
		}
	}
	show(`{"name":"a\"<&","id":1,"list":["one",{"k":true}],"none":[]}`)
	r.opts["format"] = []string{"xml"}
	show(`<root><name>a&#34;&lt;&amp;</name><id>1</id><list><x>one</x><x><k>true</k></x></list><none></none></root>`)
	r.opts = map[string][]string{"format": {"json"}, "pretty-format": {""}}
	doc = record{{"a", 1}}
	show("{\n    \"a\": 1\n}")
	out.Reset()
	textTable(&out, []string{"NAME", ">SIZE", "X"}, [][]string{{"long name", "1 GiB", ""}, {"b", "512 MiB", "yes"}})
	if want := "NAME       SIZE     X  \nlong name    1 GiB     \nb          512 MiB  yes\n"; out.String() != want {
		t.Errorf("\n%q, want\n%q", out.String(), want)
	}
}

// The exit status is the number of the error.
func TestRBDErrors(t *testing.T) {
	for _, w := range []struct {
		err  error
		n    int
		text string
	}{
		{fmt.Errorf("volume %q: %w", "x", atoll.ErrNotExist), 2, "verb failed: (2) No such file or directory"},
		{api.WithHint(fmt.Errorf("volume %q: %w", "x", atoll.ErrNotExist), `did you mean "y"?`), 2, "verb failed: (2) No such file or directory\n  → did you mean \"y\"?"},
		{fmt.Errorf("volume %q: %w", "x", atoll.ErrBusy), 16, "verb failed: (16) Device or resource busy\n  → volume \"x\": " + atoll.ErrBusy.Error()},
		{context.Canceled, 4, "verb failed: (4) Interrupted system call\n  → context canceled"},
		{usagef("bad"), 22, "verb failed: (22) Invalid argument\n  → bad"},
		{syscall.EPIPE, 32, "verb failed: (32) Broken pipe"},
		{rbdInvalid("mine"), 22, "mine"},
	} {
		var f *rbdFailure
		if !errors.As(fail("verb failed", w.err), &f) || f.status != w.n || f.text != w.text {
			t.Errorf("%v: %+v", w.err, f)
		}
	}
	if fail("x", nil) != nil {
		t.Error("no error is an error")
	}
	code, out, err := run(t, "rbd", "frobnicate")
	if code != 1 || out != "" || !strings.HasPrefix(err, "error: unknown option 'frobnicate'\n\nusage: rbd <command> ...") {
		t.Errorf("%d %s%s", code, out, err)
	}
	if code, _, err := run(t, "rbd", "ls", "--server", "unix:/nowhere/s"); code != 113 || !strings.HasPrefix(err, "rbd: listing images failed: (113) ") {
		t.Errorf("no server: %d %s", code, err)
	}
	if code, out, err := run(t, "rbd"); code != 0 || !strings.HasPrefix(out, "usage: rbd") || err != "" {
		t.Errorf("%d %s%s", code, out, err)
	}
}

// A run of "rbd bench" sends --io-total bytes and no more, each request within
// the image, and stops at the first that fails.
func TestRBDBench(t *testing.T) {
	for line, want := range map[string]struct{ ops, reads int64 }{
		"--io-type write --io-total 10K": {3, 0}, "--io-type read --io-size 8K --io-total 64K --io-threads 3": {8, 8},
		"--io-type rw --rw-mix-read 100 --io-pattern rand --io-total 1M": {256, 256}, "--io-type readwrite --rw-mix-read 0 --io-pattern full-seq --io-total 1M": {256, 0},
		"--io-type write": {1 << 18, 0}, "--io-type read --io-total 0": {0, 0},
	} {
		_, opts, err := rbdParse(strings.Fields(line))
		if err != nil {
			t.Fatal(err)
		}
		b, err := (&rbdCall{opts: opts}).benchOptions()
		if err != nil {
			t.Fatal(line, err)
		}
		const size = 100<<10 - 1 // not in whole requests
		b.start(size)
		for i := 0; ; i++ {
			off, op, ok := b.next(i % b.threads)
			if !ok {
				break
			}
			if b.done(op, nil); off < 0 || off%b.ioSize != 0 || off+b.ioSize > size || b.pattern == "full-seq" && off != int64(i)%b.places*b.ioSize {
				t.Fatalf("%s: request %d at %d", line, i, off)
			}
		}
		if ops := b.count(); ops[benchRead] != want.reads || ops[benchRead]+ops[benchWrite] != want.ops {
			t.Errorf("%s: %v, want %v", line, ops, want)
		}
	}
	b := &rbdBench{kind: "read", ioSize: 4096, total: 1 << 30, threads: 1}
	b.start(4096)
	b.done(benchWrite, atoll.ErrNoSpace)
	if _, _, ok := b.next(0); ok || b.mu.firstErr == nil || !strings.HasPrefix(b.mu.firstErr.Error(), "write error: (28) No space left on device") {
		t.Errorf("after a failure: %v %v", ok, b.mu.firstErr)
	}
	for line, want := range map[string]string{
		"": "--io-type must be specified.", "--io-type x": "the argument for option '--io-type' is invalid", "--io-type read --io-size 0": "--io-size should be greater than zero.",
		"--io-type read --io-threads 0": "--io-threads should be greater than zero.", "--io-type rw --rw-mix-read 101": "--rw-mix-read should not be larger than 100.",
		"--io-type read --io-size 4G": "io-size should be less than 4G", "--io-type read --io-pattern up": "the argument for option '--io-pattern' is invalid",
	} {
		_, opts, _ := rbdParse(strings.Fields(line))
		if _, err := (&rbdCall{opts: opts}).benchOptions(); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", line, err, want)
		}
	}
}
