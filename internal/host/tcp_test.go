package host_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

func TestTCP(t *testing.T) {
	hosttest.TestNet(t, func(*testing.T) (host.Net, string) { return host.TCP{}, "127.0.0.1:0" })
}

// sockDir returns a directory with a short path.
func sockDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/tmp", "host")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestUnix(t *testing.T) {
	hosttest.TestNet(t, func(t *testing.T) (host.Net, string) {
		return host.TCP{}, "unix:" + filepath.Join(sockDir(t), "s")
	})
}

func TestStaleSocket(t *testing.T) {
	path := filepath.Join(sockDir(t), "s")
	l, err := host.TCP{}.Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after a crash
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	l, err = host.TCP{}.Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = (host.TCP{}).Listen("unix:" + path); !errors.Is(err, atoll.ErrExist) {
		t.Error(err)
	}
}

func TestLongSocketPath(t *testing.T) {
	_, err := host.TCP{}.Listen("unix:/" + strings.Repeat("x", 107))
	if !errors.Is(err, atoll.ErrInvalid) || !strings.Contains(err.Error(), "at most 107 bytes") {
		t.Error(err)
	}
}
