package curve_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/gateway/curve"
	"github.com/atollstore/atoll/internal/gateway/curve/curvetest"
	"github.com/atollstore/atoll/python"
)

// pythons finds all interpreters of this machine that the module is for.
func pythons(t *testing.T) (paths []string) {
	t.Helper()
	all, _ := filepath.Glob(filepath.Join(os.Getenv("HOME"), ".pyenv/versions/*/bin/python"))
	for _, name := range []string{"python3", "python2", "python2.7", "pypy", "pypy3"} {
		if p, err := exec.LookPath(name); err == nil {
			all = append(all, p)
		}
	}
	seen := map[string]bool{}
	for _, p := range all {
		out, err := exec.Command(p, "-c", "import sys; print('%d.%d.%d %s' % (sys.version_info[:3] + (sys.prefix,)))").Output()
		version := strings.TrimSpace(string(out))
		if err == nil && !seen[version] {
			seen[version] = true
			paths = append(paths, p)
		}
	}
	if len(paths) == 0 {
		t.Fatal("no Python on this machine: install python3")
	}
	return paths
}

// module writes curvefs.py and a client.conf for addr into a new directory.
func module(t *testing.T, addr string) (dir, conf string) {
	t.Helper()
	dir = t.TempDir()
	conf = filepath.Join(dir, "client.conf")
	text := "# of a test\nmds.listen.addr=" + addr + "\nmds.maxRetryMS=8000\nglobal.logPath=/data/log\natoll.ioTimeoutMS=60000\n"
	for path, text := range map[string]string{conf: text, filepath.Join(dir, "curvefs.py"): python.Curvefs} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, conf
}

// run runs a script of testdata and returns what it printed.
func run(t *testing.T, py, dir, script string, args ...string) string {
	t.Helper()
	cmd := exec.Command("timeout", append([]string{"300", py, "-B", "testdata/" + script}, args...)...)
	cmd.Env = append(os.Environ(), "PYTHONPATH="+dir, "ATOLL_TOKEN=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %s: %v\n%s", py, script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// Every call and code, on every Python.
func TestTable(t *testing.T) {
	t.Parallel()
	s := curvetest.Serve(t, curve.Options{})
	dir, conf := module(t, "127.0.0.1:1,"+s.Addr)
	slots := make(chan struct{}, 2)
	var wg sync.WaitGroup
	for i, py := range pythons(t) {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			start := time.Now()
			out := run(t, py, dir, "table.py", conf, fmt.Sprint(i))
			t.Logf("%s: %s, %v", py, out, time.Since(start).Round(time.Millisecond))
		})
	}
	wg.Wait()
}

// Scripts made for Curve run as they are.
func TestScripts(t *testing.T) {
	t.Parallel()
	want, err := os.ReadFile("testdata/script.out")
	if err != nil {
		t.Fatal(err)
	}
	for _, py := range pythons(t) {
		s := curvetest.Serve(t, curve.Options{})
		dir, _ := module(t, s.Addr)
		script := "script3.py"
		if out, _ := exec.Command(py, "-c", "import sys; print(sys.version_info[0])").Output(); string(out) == "2\n" {
			script = "script2.py"
		}
		path, err := filepath.Abs("testdata/" + script)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("timeout", "60", py, "-B", path)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "PYTHONPATH="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != string(want) {
			t.Errorf("%s %s: %v\n%s", py, script, err, out)
		}
	}
}
