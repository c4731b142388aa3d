package curve_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/curve"
	"github.com/atollstore/atoll/internal/gateway/curve/curvetest"
)

// faults makes a server fail as it is told.
type faults struct {
	s     *curvetest.Server
	left  atomic.Int64 // failures to come, -1 for no end
	err   atomic.Value
	hang  atomic.Bool
	done  chan struct{}
	close func()
}

func (f *faults) data(string, int64, int64) error {
	if f.hang.Load() {
		<-f.done
		return atoll.ErrClosed
	}
	for {
		n := f.left.Load()
		if n == 0 {
			return nil
		}
		if n < 0 || f.left.CompareAndSwap(n, n-1) {
			return f.err.Load().(error)
		}
	}
}

// set makes what a script asks for be wrong.
func (f *faults) set(t *testing.T, name string) {
	kinds := map[string]error{"CORRUPT": atoll.ErrCorrupt, "IO": atoll.ErrIO, "NO_SPACE": atoll.ErrNoSpace, "READ_ONLY": atoll.ErrReadOnly,
		"CONFLICT": atoll.ErrConflict, "UNAVAILABLE": atoll.ErrUnavailable, "TIMEOUT": atoll.ErrTimeout}
	kind, once := strings.CutSuffix(name, " once")
	f.left.Store(0)
	f.hang.Store(false)
	switch {
	case kinds[kind] != nil:
		f.err.Store(fmt.Errorf("block: %w", kinds[kind]))
		f.left.Store(-1)
		if once {
			f.left.Store(1)
		}
	case name == "hang up":
		for _, c := range f.s.NBD.Connections() {
			f.s.NBD.Disconnect(c.ID)
		}
	case name == "hang":
		f.hang.Store(true)
	case name == "down":
		f.close()
	case name != "none":
		t.Errorf("fault %q", name)
	}
}

// What is wrong with the data comes out as its code; what passes is waited for;
// what does not ends at the deadline.
func TestFaults(t *testing.T) {
	t.Parallel()
	pys := pythons(t)
	for _, py := range pys[len(pys)-1:] {
		f := &faults{done: make(chan struct{})}
		f.s = curvetest.Serve(t, curve.Options{})
		f.s.Fault = f.data
		f.close = f.s.Stop
		dir, conf := module(t, f.s.Addr)
		text, err := os.ReadFile(conf)
		if err == nil {
			err = os.WriteFile(conf+".more", append(text, "atoll.ioTimeoutMS=300\natoll.timeoutMS=300\n"...), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, py, "-B", "testdata/faults.py", conf)
		cmd.Env = append(os.Environ(), "PYTHONPATH="+dir, "ATOLL_TOKEN=")
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		last, once := "", sync.OnceFunc(func() { close(f.done) })
		for s := bufio.NewScanner(out); s.Scan(); {
			if last = s.Text(); last == "GOOD" || strings.Contains(last, "BAD") || strings.Contains(last, ":") {
				t.Log(py, last)
				continue
			}
			if last == "none" {
				once() // what hangs goes on
			}
			f.set(t, last)
			fmt.Fprintln(in, "set")
		}
		once()
		if err := cmd.Wait(); err != nil || last != "GOOD" {
			t.Errorf("%s: %v, %s", py, err, last)
		}
	}
}
