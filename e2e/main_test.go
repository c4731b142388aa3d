package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	iofs "io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/host/hosttest"
)

// atollPath is the program under test, built once.
var atollPath string

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("the tests of the whole program are left out with -short")
		return
	}
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	// Tools of root such as mkfs live where a plain user's PATH does not point.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	dir, err := os.MkdirTemp("", "atoll-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	atollPath = filepath.Join(dir, "atoll")
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err == nil {
		used, room := st.Blocks-st.Bfree, st.Bavail
		if room*uint64(st.Bsize) < 8<<30 || used > (used+room)/100*90 {
			// Nodes refuse new segments on a disk that is nearly full.
			fmt.Fprintf(os.Stderr, "the disk under %s has only %d MiB of room; the tests want 8 GiB and 10 %% (set TMPDIR)\n", os.TempDir(), room*uint64(st.Bsize)>>20)
			return 1
		}
	}
	build := exec.Command("go", "build", "-o", atollPath, "../cmd/atoll")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// touchSources looks at the program's sources, so that "go test" knows that the
// result depends on them and does not repeat an old one. It has to be called
// from within a test.
var touchSources = sync.OnceValue(func() error {
	for _, dir := range []string{"../cmd", "../internal"} {
		err := filepath.WalkDir(dir, func(_ string, _ iofs.DirEntry, err error) error { return err })
		if err != nil {
			return fmt.Errorf("look at the sources: %w", err)
		}
	}
	return nil
})

// rounds is how often a test that crashes things does it.
func rounds(short, long int) int {
	if os.Getenv("ATOLL_LONG") != "" {
		return long
	}
	return short
}

// need skips the test when a program is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// needRoot skips the test unless it may make block devices and mount them.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making block devices needs root")
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(dev); err != nil {
			t.Skipf("no %s here", dev)
		}
	}
}

// tempDir makes a directory with a short name: paths of sockets are limited.
func tempDir(t *testing.T) string {
	t.Helper()
	if err := touchSources(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "ae2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

// freePorts finds n ports in a row that nobody listens on.
func freePorts(t *testing.T, n int) int {
	t.Helper()
	port, err := hosttest.Ports(n)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// result is what a command did.
type result struct {
	out, err string
	code     int
}

// environ is the environment of the program under test: none of the user's.
func environ(home string, extra ...string) []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "XDG_RUNTIME_DIR=" + home, "TMPDIR=" + os.TempDir(), "LC_ALL=C"}
	for _, keep := range []string{"GOROOT", "GOTOOLCHAIN", "GOFLAGS"} {
		if v, ok := os.LookupEnv(keep); ok {
			env = append(env, keep+"="+v)
		}
	}
	return append(env, extra...)
}

// patience is how long a test waits for what must happen some time. How quick it
// is says more about the machine than about the program; the tests only tell it.
const patience = 2 * time.Minute

// command runs a program, and ends the test if it does not end.
func command(t *testing.T, env []string, stdin string, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Stdin, cmd.WaitDelay = env, strings.NewReader(stdin), 5*time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	r := result{out.String(), errOut.String(), 0}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s %s does not end:\n%s%s", name, strings.Join(args, " "), r.out, r.err)
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		t.Fatalf("%s: %v", name, err)
	}
	return r
}

// run runs a program that must succeed and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	r := command(t, os.Environ(), "", name, args...)
	if r.code != 0 {
		t.Fatalf("%s %s: exit code %d\n%s%s", name, strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out + r.err
}

// server is a running process of the program, and how to talk to it.
type server struct {
	t    *testing.T
	dir  string // holds data, log and the home of its environment
	data string
	port int
	nbd  string // TCP address, or "none"
	args []string
	env  []string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process ended
	wait error
	took time.Duration // from the start to READY=1
	log  *syncBuffer
}

// syncBuffer collects output of a process.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// tail is the end of the output.
func (b *syncBuffer) tail(lines int) string {
	all := strings.Split(strings.TrimSpace(b.String()), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// listenArg is where the address is among a server's arguments.
const listenArg = 4

// newServer describes a server with a data directory and ports of its own.
func newServer(t *testing.T, args ...string) *server {
	t.Helper()
	dir := tempDir(t)
	port := freePorts(t, 4)
	s := &server{t: t, dir: dir, data: filepath.Join(dir, "d"), port: port, nbd: fmt.Sprintf("127.0.0.1:%d", port+3), log: &syncBuffer{}}
	s.args = []string{"server", "--data", s.data, "--listen", s.api(), "--spare", "1"}
	if !contains(args, "--nbd") {
		s.args = append(s.args, "--nbd", s.nbd)
	}
	s.args = append(s.args, args...)
	s.env = environ(dir)
	t.Cleanup(func() {
		if s.cmd != nil {
			s.stop()
		}
		if t.Failed() {
			t.Logf("log of the server on %s:\n%s", s.api(), s.log.tail(60))
		}
	})
	return s
}

func contains(all []string, s string) bool {
	for _, a := range all {
		if a == s {
			return true
		}
	}
	return false
}

// startServer starts a whole cluster in one process.
func startServer(t *testing.T, args ...string) *server {
	t.Helper()
	s := newServer(t, args...)
	s.start()
	return s
}

func (s *server) api() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// start starts the process and returns when it says READY=1, as to systemd.
func (s *server) start() {
	s.t.Helper()
	path := filepath.Join(s.dir, "notify")
	_ = os.Remove(path)
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		s.t.Fatal(err)
	}
	begin := time.Now()
	s.spawn("NOTIFY_SOCKET=" + path)
	go func(done chan struct{}) {
		<-done
		l.Close()
	}(s.done)
	ready := make(chan struct{})
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := l.Read(buf)
			if err != nil {
				return
			}
			if strings.Contains(string(buf[:n]), "READY=1") {
				close(ready)
			}
		}
	}()
	select {
	case <-ready:
		s.took = time.Since(begin)
	case <-s.done:
		s.t.Fatalf("the server ended at start: %v\n%s", s.wait, s.log.tail(20))
	case <-time.After(patience):
		s.t.Fatalf("the server is not ready after %v\n%s", patience, s.log.tail(40))
	}
}

// spawn starts the process and does not wait.
func (s *server) spawn(env ...string) {
	s.t.Helper()
	s.cmd = exec.Command(atollPath, s.args...)
	s.cmd.Env = append(append([]string{}, s.env...), env...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		s.wait = cmd.Wait()
		close(done)
	}(s.cmd, s.done)
}

func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatalf("signal %v: %v", sig, err)
	}
}

// kill ends the process as a crash would.
func (s *server) kill() {
	s.t.Helper()
	s.signal(syscall.SIGKILL)
	<-s.done
	s.cmd = nil
}

// stop ends the process cleanly.
func (s *server) stop() {
	s.t.Helper()
	_ = s.cmd.Process.Signal(syscall.SIGCONT)
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
		if s.wait != nil {
			s.t.Errorf("the server on %s did not stop cleanly: %v\n%s", s.api(), s.wait, s.log.tail(15))
		}
	case <-time.After(patience):
		_ = s.cmd.Process.Signal(syscall.SIGQUIT) // shows its goroutines
		time.Sleep(time.Second)
		_ = s.cmd.Process.Kill()
		s.t.Errorf("the server on %s does not stop within %v\n%s", s.api(), patience, s.log.tail(400))
		<-s.done
	}
	s.cmd = nil
}

// socket is where the API listens.
func (s *server) socket() string { return "unix:" + filepath.Join(s.data, "api.sock") }

// try runs a command against the server.
func (s *server) try(args ...string) result {
	s.t.Helper()
	return command(s.t, s.env, "", atollPath, append(args, "--server", s.socket())...)
}

// atoll runs a command that must succeed and returns its standard output.
func (s *server) atoll(args ...string) string {
	s.t.Helper()
	r := s.try(args...)
	if r.code != 0 {
		s.t.Fatalf("atoll %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

// ask runs a command with -o json and decodes what it prints into out.
func (s *server) ask(out any, args ...string) {
	s.t.Helper()
	text := s.atoll(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(text), out); err != nil {
		s.t.Fatalf("atoll %s: %v\n%s", strings.Join(args, " "), err, text)
	}
}

// volumeJSON is a volume as the command line shows it.
type volumeJSON struct {
	Name, ServedBy                           string
	SizeBytes, MappedBytes, LiveBytes, Epoch int64
	Replicas, ShortSegments, Connections     int
	Open                                     bool
	Urls                                     []string
}

func (s *server) volume(name string) (v volumeJSON) {
	s.t.Helper()
	s.ask(&v, "volume", "info", name)
	return v
}

// create makes a volume and returns its address.
func (s *server) create(name, size string, flags ...string) string {
	s.t.Helper()
	s.atoll(append([]string{"volume", "create", name, size}, flags...)...)
	return s.uri(name)
}

func (s *server) uri(name string) string {
	s.t.Helper()
	return strings.TrimSpace(s.atoll("volume", "url", name))
}

// nodeJSON is a node as the command line shows it.
type nodeJSON struct {
	ID              int
	Up              bool
	Condition, Path string
	Segments        int
	OpenSegments    int
	Process         string
}

func (s *server) nodes() []nodeJSON {
	s.t.Helper()
	var out struct{ Nodes []nodeJSON }
	s.ask(&out, "node", "ls")
	return out.Nodes
}

// eventually repeats ok until it holds.
func eventually(t *testing.T, what string, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !ok() {
		if time.Since(begin) > patience {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(begin)
}
