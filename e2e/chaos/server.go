package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Server is a process of the program on a host of its own.
type Server struct {
	*Host
	Controller bool
	dir        string // of its data and its sockets
	Disk       string // of its storage node
	args       []string
	joining    []string // arguments of the first start
	log        *logFile

	mu   sync.Mutex // guards the fields below
	cmd  *exec.Cmd
	done chan struct{} // closed when the process ended
	wait error
}

const (
	apiPort   = "7400"
	nbdPort   = "10809"
	startTime = 3 * time.Minute
)

// API returns where the server's API listens.
func (s *Server) API() string { return net.JoinHostPort(s.Addr, apiPort) }

// environ is the environment of the program: none of the user's.
func (s *Server) environ(extra ...string) []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "XDG_RUNTIME_DIR=" + s.dir, "TMPDIR=" + s.w.Dir, "LC_ALL=C", "ATOLL_TEST_FAULTS=1"}, extra...)
}

// Start starts the process and returns when it says that it is ready.
func (s *Server) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	path := filepath.Join(s.dir, "notify")
	_ = os.Remove(path)
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("start server %s: %w", s.Name, err)
	}
	defer l.Close()
	done, err := s.spawn("NOTIFY_SOCKET=" + path)
	if err != nil {
		return fmt.Errorf("start server %s: %w", s.Name, err)
	}
	stop := context.AfterFunc(ctx, func() { l.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-done:
			l.SetReadDeadline(time.Unix(1, 0))
		case <-ended:
		}
	}()
	buf := make([]byte, 4096)
	for {
		n, err := l.Read(buf)
		if err == nil && strings.Contains(string(buf[:n]), "READY=1") {
			return nil
		}
		if err != nil {
			return fmt.Errorf("start server %s: not ready: %w\n%s", s.Name, errors.Join(ctx.Err(), s.ended()), s.Tail(30))
		}
	}
}

// spawn starts the process and does not wait.
func (s *Server) spawn(env ...string) (<-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		return nil, errors.New("it runs already")
	}
	cmd := exec.Command(s.w.Program, append(append([]string{}, s.args...), s.joining...)...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.Dir = s.environ(env...), s.log, s.log, s.dir
	if err := s.within(cmd.Start); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	s.cmd, s.done, s.wait = cmd, done, nil
	go func() {
		err := cmd.Wait()
		s.mu.Lock()
		s.wait, s.cmd = err, nil
		s.mu.Unlock()
		close(done)
	}()
	return done, nil
}

// Running reports whether the process is there.
func (s *Server) Running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd != nil
}

// ended tells how the process ended, nil while it runs.
func (s *Server) ended() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil && s.wait != nil {
		return fmt.Errorf("it ended: %w", s.wait)
	}
	return nil
}

// Signal sends a signal to the process, if it is there.
func (s *Server) Signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(sig)
	}
}

// Kill ends the process as a crash would and waits for its end.
func (s *Server) Kill() { s.end(syscall.SIGKILL, time.Minute) }

// Stop ends the process cleanly; an error if it does not, or says that it could
// not.
func (s *Server) Stop() error {
	if !s.Running() {
		return nil
	}
	if !s.end(syscall.SIGTERM, 60*time.Second) {
		s.end(syscall.SIGQUIT, 5*time.Second)
		s.Kill()
		return fmt.Errorf("stop server %s: it does not end\n%s", s.Name, s.Tail(300))
	}
	if err := s.ended(); err != nil {
		return fmt.Errorf("stop server %s: %w\n%s", s.Name, err, s.Tail(30))
	}
	return nil
}

// end sends a signal and waits for the end; false if it takes too long.
func (s *Server) end(sig syscall.Signal, limit time.Duration) bool {
	s.mu.Lock()
	done := s.done
	running := s.cmd != nil
	s.mu.Unlock()
	if !running {
		return true
	}
	s.Signal(sig)
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}

// Tail returns the last lines of the process's log.
func (s *Server) Tail(lines int) string { return s.log.tail(lines) }

// Exit is a command that ended with another exit code than 0.
type Exit struct {
	Args     []string
	Code     int
	Out, Err string
}

// Error implements error.
func (e *Exit) Error() string {
	return fmt.Sprintf("atoll %s: exit code %d\n%s%s", strings.Join(e.Args, " "), e.Code, e.Out, e.Err)
}

// Atoll runs a command of the program against the server and returns what it
// prints. The error is an *Exit when the command failed.
func (s *Server) Atoll(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.w.Program, append(args, "--server", "unix:"+filepath.Join(s.dir, "d", "api.sock"))...)
	cmd.Env, cmd.WaitDelay = s.environ(), 5*time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() == nil && errors.As(err, &exit) {
		return out.String(), &Exit{args, exit.ExitCode(), out.String(), errOut.String()}
	}
	if err != nil {
		return "", fmt.Errorf("run atoll %s: %w", strings.Join(args, " "), errors.Join(err, ctx.Err()))
	}
	return out.String(), nil
}

// Ask runs a command with -o json and decodes what it prints into out.
func (s *Server) Ask(ctx context.Context, out any, args ...string) error {
	text, err := s.Atoll(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(text), out); err != nil {
		return fmt.Errorf("decode what atoll %s printed: %w\n%s", strings.Join(args, " "), err, text)
	}
	return nil
}

// logFile keeps a process's output in a file and its end in memory.
type logFile struct {
	f   *os.File
	mu  sync.Mutex
	end []byte
}

const logTail = 256 << 10

// Write implements io.Writer.
func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end = append(l.end, p...)
	if n := len(l.end); n > 2*logTail {
		l.end = append([]byte(nil), l.end[n-logTail:]...)
	}
	return l.f.Write(p)
}

func (l *logFile) tail(lines int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := strings.Split(strings.TrimSpace(string(l.end)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
