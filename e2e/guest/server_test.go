package guest_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/host/hosttest"
)

// server is the program under test: a whole cluster in one process.
type server struct {
	t       *testing.T
	l       *lab
	dir     string
	api     string
	nbd     string // on TCP
	cmd     *exec.Cmd
	log     tail
	started time.Duration
}

// newServer describes a server with a directory and ports of its own.
func newServer(t *testing.T, l *lab) *server {
	t.Helper()
	dir, err := os.MkdirTemp("", "ag-") // short: paths of sockets are limited
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, l: l, dir: dir, api: freeAddr(t), nbd: freeAddr(t)}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("log of the server:\n%s", s.log.String())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return s
}

func freeAddr(t *testing.T) string {
	t.Helper()
	port, err := hosttest.Ports(3)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

func (s *server) data() string   { return filepath.Join(s.dir, "d") }
func (s *server) socket() string { return filepath.Join(s.data(), "api.sock") }

// uri is the address of a volume on the server's Unix socket.
func (s *server) uri(volume string) string {
	return "nbd+unix:///" + volume + "?socket=" + filepath.Join(s.data(), "nbd.sock")
}

// start runs the server and returns when it is ready.
func (s *server) start() {
	s.t.Helper()
	begin := time.Now()
	path := filepath.Join(s.dir, "notify")
	_ = os.Remove(path)
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		s.t.Fatal(err)
	}
	defer ready.Close()
	s.cmd = exec.Command(s.l.binary, "server", "--data", s.data(), "--listen", s.api, "--nbd", s.nbd, "--log-level", "warn", "--spare", "1")
	s.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+path, "XDG_RUNTIME_DIR="+s.dir)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	_ = ready.SetReadDeadline(begin.Add(bootTimeout))
	for buf := make([]byte, 4096); ; {
		n, err := ready.Read(buf)
		if err != nil {
			s.t.Fatalf("the server is not ready after %v: %v", bootTimeout, err)
		}
		if bytes.Contains(buf[:n], []byte("READY=1")) {
			s.started = time.Since(begin)
			return
		}
	}
}

// cut ends the server as a power cut would.
func (s *server) cut() {
	_ = s.cmd.Process.Kill()
}

// kill ends the server and waits for it.
func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	s.cut()
	_ = s.cmd.Wait()
	s.cmd = nil
}

// atoll runs a command of the program that must succeed.
func (s *server) atoll(args ...string) string {
	s.t.Helper()
	cmd := exec.Command(s.l.binary, append(args, "--server", "unix:"+s.socket())...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("atoll %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// create makes a volume.
func (s *server) create(name string, size int64) {
	s.t.Helper()
	s.atoll("volume", "create", name, fmt.Sprintf("%dM", size>>20))
}

// mapped is how many bytes of a volume are not holes.
func (s *server) mapped(volume string) int64 {
	s.t.Helper()
	var v struct{ MappedBytes int64 }
	if err := json.Unmarshal([]byte(s.atoll("volume", "info", volume, "-o", "json")), &v); err != nil {
		s.t.Fatal(err)
	}
	return v.MappedBytes
}
