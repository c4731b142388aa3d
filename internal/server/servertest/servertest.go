// Package servertest starts throw-away servers for tests and examples of what
// talks to one.
package servertest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/server"
)

// Run starts a small cluster in this process, calls fn and takes everything away
// again. ATOLL_RUNTIME_DIR and the like are set so that clients find this server,
// and no other. It returns fn's exit code, or 1 with the reason on stderr.
func Run(fn func(*server.Server) int) int {
	dir, err := os.MkdirTemp("", "at-") // short: paths of sockets are limited
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Setenv("ATOLL_RUNTIME_DIR", dir)
	for _, name := range []string{"ATOLL_SERVER", "ATOLL_TOKEN", "ATOLL_TOKEN_FILE"} {
		os.Unsetenv(name)
	}
	s, err := start(filepath.Join(dir, "data"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "start a server for the tests:", err)
		return 1
	}
	code := fn(s)
	if err := s.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, "stop the server of the tests:", err)
		code = max(code, 1)
	}
	return code
}

// start starts a server with three small nodes.
func start(dir string) (*server.Server, error) {
	port, err := hosttest.Ports(3)
	if err != nil {
		return nil, err
	}
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	server.AddFlags(flags)
	args := []string{"--data", dir, "--listen", fmt.Sprintf("127.0.0.1:%d", port), "--nbd", "none", "--spare", "0", "--disk-limit", "4G", "--memory", "128M"}
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	cfg, err := server.LoadConfig(flags, []string{"ATOLL_CONFIG=/dev/null"})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return server.Start(ctx, cfg, server.Options{Log: slog.New(slog.DiscardHandler), Version: "test"})
}
