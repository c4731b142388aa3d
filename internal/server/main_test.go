package server

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

func TestMain(m *testing.M) {
	// The tests' servers keep away from the user's default socket.
	dir, err := os.MkdirTemp("", "atoll-run-test-")
	if err == nil {
		err = os.Setenv("ATOLL_RUNTIME_DIR", dir)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	// The tests that run beside others wait most of their time.
	if err := flag.Set("test.parallel", "6"); err != nil {
		fmt.Println(err)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	if code == 0 {
		// The log goroutine of etcd's packages starts at import and stays.
		if err := hosttest.Leaks(goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start")); err != nil {
			fmt.Println(err)
			code = 1
		}
	}
	os.Exit(code)
}

// testDir is a directory with a short name, as the paths of sockets must be.
func testDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "at-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// freePort finds three neighbouring ports of which nobody listens on any.
func freePort(t *testing.T) string {
	t.Helper()
	port, err := hosttest.Ports(3)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// load reads a configuration from flags.
func load(t *testing.T, environ []string, args ...string) (*Config, error) {
	t.Helper()
	fs := pflag.NewFlagSet("server", pflag.ContinueOnError)
	AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	if environ == nil {
		environ = []string{"ATOLL_CONFIG=/dev/null"}
	}
	return LoadConfig(fs, environ)
}

// testConfig is a server in dir with three small nodes.
func testConfig(t *testing.T, dir string, args ...string) *Config {
	t.Helper()
	args = append([]string{"--data", dir, "--listen", freePort(t), "--nbd", "none", "--spare", "0", "--disk-limit", "4G", "--memory", "128M"}, args...)
	cfg, err := load(t, nil, args...)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func testLog(t *testing.T) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
}

func start(t *testing.T, cfg *Config, o Options) *Server {
	t.Helper()
	o.Log, o.Version = testLog(t), "test"
	s, err := Start(t.Context(), cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Stop() })
	return s
}

// stop stops a server and fails when that takes too long.
func stop(t *testing.T, s *Server, within time.Duration) {
	t.Helper()
	began := time.Now()
	err := s.Stop()
	if took := time.Since(began); took > within {
		t.Errorf("stop took %v", took)
	} else {
		t.Logf("stop took %v, err %v", took, err)
	}
}

func mustStop(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func client(t *testing.T, s *Server) *api.Client {
	t.Helper()
	c, err := api.NewClient("unix:"+s.Socket(), api.Credential{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// create makes a volume of 64 MiB.
func create(t *testing.T, s *Server, name, cache string) {
	t.Helper()
	_, err := (&backend{s: s}).CreateVolume(t.Context(), &atollv1.CreateVolumeRequest{Name: name, SizeBytes: 64 << 20, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a volume as the NBD gateway does.
func open(t *testing.T, s *Server, name string) nbd.Device {
	t.Helper()
	dev, _, err := s.volumes.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// fill writes n pieces of 64 KiB, each full of its own byte.
func fill(t *testing.T, dev nbd.Device, n int, fua bool) {
	t.Helper()
	for i := range n {
		b := host.Alloc(64 << 10)
		for j := range b.Bytes() {
			b.Bytes()[j] = byte(i + 1)
		}
		err := dev.Write(t.Context(), b, b.Bytes(), int64(i)<<16, fua)
		b.Release()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// verify reads what fill wrote.
func verify(t *testing.T, dev nbd.Device, n int) {
	t.Helper()
	p := make([]byte, 64<<10)
	for i := range n {
		if err := dev.Read(t.Context(), p, int64(i)<<16); err != nil {
			t.Fatal(err)
		}
		if want := strings.Repeat(string([]byte{byte(i + 1)}), len(p)); string(p) != want {
			t.Fatalf("piece %d is wrong", i)
		}
	}
}

// get fetches a page of the API.
func get(t *testing.T, s *Server, path string) string {
	t.Helper()
	resp, err := client(t, s).Get(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("get %s: %d %v %s", path, resp.StatusCode, err, b)
	}
	return string(b)
}

// patience is how long a test waits for what must happen some time: how quick it
// is on this machine is not what the tests ask.
const patience = 2 * time.Minute

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}
