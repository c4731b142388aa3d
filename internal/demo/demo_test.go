package demo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// options are those of a small demo in a directory with a short name.
func options(t *testing.T, out io.Writer) Options {
	t.Helper()
	dir, err := os.MkdirTemp("", "demo-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	t.Setenv("ATOLL_RUNTIME_DIR", filepath.Join(dir, "run"))
	return Options{
		Dir: filepath.Join(dir, "demo"), Nodes: 4, Limit: "2G", Listen: "127.0.0.1:0", NBD: "127.0.0.1:0", Version: "test",
		Out: out, Err: io.Discard, Log: slog.New(slog.DiscardHandler),
	}
}

// The tour on a little data does all it promises and leaves nothing behind.
func TestTour(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	var out bytes.Buffer
	o := options(t, &out)
	o.Script, o.Remove, o.Source = "tour", true, t.TempDir()
	rng := rand.New(rand.NewPCG(1, 1))
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(filepath.Join(o.Source, "file"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), o); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	text := out.String()
	for _, want := range []string{
		"catalog  ready", "Kill node ", "; the longest stall was", "blocks read back as last written",
		"every segment has its", "the same, byte for byte", "What happened", "4 nodes in one process",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if _, err := os.Stat(o.Dir); !os.IsNotExist(err) {
		t.Errorf("data are left: %v", err)
	}
}

// lockedBuffer may be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A demo runs until it is told to stop, and starts again on what it left.
func TestRunStop(t *testing.T) {
	out := &lockedBuffer{}
	o := options(t, out)
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- Run(ctx, o) }()
		tick := time.NewTicker(10 * time.Millisecond)
		for limit := time.After(2 * time.Minute); !strings.Contains(out.String(), "Stop with Ctrl-C."); {
			select {
			case <-tick.C:
			case err := <-done:
				t.Fatalf("ended early: %v\n%s", err, out.String())
			case <-limit:
				t.Fatalf("not ready:\n%s", out.String())
			}
		}
		tick.Stop()
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "stopped cleanly") {
			t.Errorf("no farewell:\n%s", out.String())
		}
		out.mu.Lock()
		out.b.Reset()
		out.mu.Unlock()
	}
}

func TestRefusals(t *testing.T) {
	o := options(t, io.Discard)
	o.Nodes = 17
	if err := Run(t.Context(), o); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("17 nodes: %v", err)
	}
	o.Nodes, o.Script = 4, "dance"
	if err := Run(t.Context(), o); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("another script: %v", err)
	}
	o.Script, o.Limit = "", "10"
	if err := Run(t.Context(), o); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("size without unit: %v", err)
	}
	o = options(t, io.Discard)
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	precious := filepath.Join(o.Dir, "precious")
	if err := os.WriteFile(precious, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o.Remove = true
	if err := Run(t.Context(), o); !errors.Is(err, atoll.ErrExist) {
		t.Errorf("a directory in use: %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("someone else's file is gone: %v", err)
	}
}
