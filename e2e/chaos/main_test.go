package chaos

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	iofs "io/fs"
)

// unable is why the tests with a world skip.
var unable string

func TestMain(m *testing.M) {
	flag.Parse()
	_, inside := Inside()
	switch {
	case inside:
		os.Exit(m.Run())
	case testing.Short():
		unable = "left out with -short"
	default:
		os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
		unable = Unable()
	}
	if unable != "" {
		os.Exit(m.Run())
	}
	code, err := enter()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(code)
}

// enter builds the program and runs the tests inside a world.
func enter() (int, error) {
	if os.Getenv("CHAOS_DISK") == "" && memory() < 8<<30 {
		os.Setenv("CHAOS_DISK", os.TempDir()) // tmpfs would need too much of it
	}
	dir, err := os.MkdirTemp(os.Getenv("CHAOS_DISK"), "atoll-chaos-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "atoll")
	build := exec.Command("go", "build", "-o", program, "../../cmd/atoll")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build the program: %v\n%s", err, out)
	}
	world := filepath.Join(dir, "w")
	if err := os.Mkdir(world, 0o700); err != nil {
		return 0, err
	}
	return Enter(program, world)
}

// memory is how many bytes are available.
func memory() (n int64) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	if _, rest, ok := strings.Cut(string(text), "MemAvailable:"); ok {
		_, _ = fmt.Sscan(rest, &n)
	}
	return n << 10
}

// touchSources looks at the program's sources, so that "go test" knows that the
// result depends on them.
var touchSources = sync.OnceValue(func() error {
	for _, dir := range []string{"../../cmd", "../../internal"} {
		if err := filepath.WalkDir(dir, func(_ string, _ iofs.DirEntry, err error) error { return err }); err != nil {
			return err
		}
	}
	return nil
})

// newWorld makes the world of a test.
func newWorld(t *testing.T) *World {
	t.Helper()
	if unable != "" {
		t.Skip(unable)
	}
	if err := touchSources(); err != nil {
		t.Fatal(err)
	}
	w, err := NewWorld()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// testLog is a logger to the test's output.
func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, nil))
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// newCluster makes a cluster, whose logs are shown when the test fails.
func newCluster(t *testing.T, servers, controllers int) *Cluster {
	t.Helper()
	begun := time.Now()
	c, err := NewCluster(context.Background(), newWorld(t), Options{Servers: servers, Controllers: controllers, Log: testLog(t)})
	if c != nil {
		t.Cleanup(func() {
			if t.Failed() {
				if os.Getenv("CHAOS_LOGS") != "" { // with what all goroutines do
					for _, s := range c.Servers {
						s.Signal(syscall.SIGCONT)
						s.end(syscall.SIGQUIT, 10*time.Second)
					}
				}
				var b strings.Builder
				c.Logs(&b, 80)
				t.Log(b.String())
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	took, err := c.Healthy(context.Background(), healLimit)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d servers joined in %v, healthy %v later", servers, time.Since(begun)-took, took)
	return c
}
