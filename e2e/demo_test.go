package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The tour does the main job on real data by itself and leaves nothing.
func TestDemoTour(t *testing.T) {
	dir := tempDir(t)
	port := freePorts(t, 4)
	sh := fmt.Sprintf("cd %s && exec %s demo --script tour --rm --listen 127.0.0.1:%d --nbd 127.0.0.1:%d", dir, atollPath, port, port+3)
	begin := time.Now()
	r := command(t, environ(tempDir(t)), "", "sh", "-c", sh)
	t.Logf("the tour took %v", time.Since(begin).Round(time.Millisecond))
	if r.code != 0 {
		t.Fatalf("exit code %d\n%s%s", r.code, r.out, r.err)
	}
	for _, want := range []string{"All ready", `SHA-256 [0-9a-f]{16}…: the same, byte for byte`, `longest stall \d+ ms, (no error|connections made again)`, "every segment has its three copies again"} {
		if !regexp.MustCompile(want).MatchString(r.out) {
			t.Errorf("no %q in:\n%s", want, r.out)
		}
	}
	for _, line := range strings.Split(r.out, "\n") {
		if strings.Contains(line, "stall") || strings.Contains(line, "All ready") || strings.Contains(line, "port   ") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("the tour leaves %v", left)
	}
}

// newDemo describes a demo that runs until it is interrupted.
func newDemo(t *testing.T, flags ...string) *server {
	t.Helper()
	s := newServer(t)
	s.args = append([]string{"demo", "--dir", s.data, "--listen", s.api(), "--nbd", s.nbd, "--verbose"}, flags...)
	return s
}

func (s *server) startDemo() {
	s.t.Helper()
	before := len(s.log.String())
	begin := time.Now()
	s.spawn()
	eventually(s.t, "the demo is ready", func() bool {
		select {
		case <-s.done:
			s.t.Fatalf("the demo ended: %v\n%s", s.wait, s.log.tail(20))
		default:
		}
		return strings.Contains(s.log.String()[before:], "All ready")
	})
	s.took = time.Since(begin)
}

// interrupt is Ctrl-C.
func (s *server) interrupt() {
	s.t.Helper()
	s.signal(syscall.SIGINT)
	select {
	case <-s.done:
		if s.wait != nil || !strings.Contains(s.log.String(), "stopped cleanly") {
			s.t.Errorf("after Ctrl-C: %v\n%s", s.wait, s.log.tail(10))
		}
		s.cmd = nil
	case <-time.After(patience):
		s.t.Fatal("Ctrl-C does not end the demo")
	}
}

// Nodes are killed, hung, slowed and filled under load, and come back; clients
// see no error and what was written is there.
func TestDemoFaults(t *testing.T) {
	s := newDemo(t)
	s.startDemo()
	t.Logf("ready after %v (goal 2 s)", s.took.Round(time.Millisecond))
	uri := s.create("disk1", "64M")
	h := newHistory(t, 64<<20)
	l := startLoad(h, false, dialer(uri))
	time.Sleep(time.Second)
	busiest := func() string {
		best, most := 1, -1
		for _, n := range s.nodes() {
			if n.OpenSegments > most {
				best, most = n.ID, n.OpenSegments
			}
		}
		return fmt.Sprint(best)
	}
	for _, c := range []struct {
		verb []string
		goal time.Duration
	}{
		{[]string{"kill"}, 300 * time.Millisecond},
		{[]string{"pause"}, 500 * time.Millisecond},
		{[]string{"slow", "--delay", "200ms"}, 500 * time.Millisecond},
		{[]string{"fill"}, 300 * time.Millisecond},
	} {
		victim := busiest()
		measure(t, l, "demo "+strings.Join(c.verb, " "), c.goal, func() {
			s.atoll(append([]string{"demo", c.verb[0], victim}, c.verb[1:]...)...)
		})
		s.atoll("demo", "revive", victim)
		eventually(t, "node "+victim+" is well", func() bool {
			for _, n := range s.nodes() {
				if fmt.Sprint(n.ID) == victim {
					return n.Up && n.Condition == "up"
				}
			}
			return false
		})
	}
	// Two nodes at once: three are left.
	s.atoll("demo", "kill", "1")
	s.atoll("demo", "kill", "2")
	eventually(t, "the status tells of two dead nodes", func() bool { return !strings.HasPrefix(s.atoll("status"), "HEALTHY") })
	if r := s.try("demo", "kill", "2"); r.code != 6 || !strings.Contains(r.err, "revive 2") {
		t.Errorf("killed twice: %+v", r)
	}
	if r := s.try("demo", "kill", "99"); r.code != 3 {
		t.Errorf("unknown node: %+v", r)
	}
	s.atoll("demo", "revive", "1")
	s.atoll("demo", "revive", "2")
	if out := s.atoll("demo", "add-node"); !strings.Contains(out, "node 6") {
		t.Errorf("add-node says %q", out)
	}
	eventually(t, "six nodes", func() bool { n := s.nodes(); return len(n) == 6 && n[5].Up })
	time.Sleep(500 * time.Millisecond)
	if err := l.stop(); err != nil {
		t.Fatalf("load: %v", err)
	}
	took := eventually(t, "every segment has all its copies", func() bool { return s.volume("disk1").ShortSegments == 0 })
	t.Logf("every segment had its copies again after %v", took.Round(time.Millisecond))
	conn := dial(t, uri)
	t.Logf("%d durable blocks are right after %d operations", h.verify(t, conn), l.ops.Load())
	conn.Close()
	s.interrupt()
	s.startDemo()
	conn = dial(t, s.uri("disk1"))
	t.Logf("%d durable blocks are right after a restart", h.verify(t, conn))
	conn.Close()
	if n := s.nodes(); len(n) != 6 {
		t.Errorf("after a restart there are %d nodes", len(n))
	}
	s.atoll("volume", "check", "disk1", "--read")
	s.interrupt()
}

// With every disk full, writers are told so, readers go on, and nothing that was
// acknowledged is lost; when there is room again, writing goes on.
func TestDemoAllFull(t *testing.T) {
	t.Parallel()
	s := newDemo(t, "--nodes", "3")
	s.startDemo()
	uri := s.create("disk1", "32M")
	h := newHistory(t, 32<<20)
	l := startLoad(h, false, dialer(uri))
	time.Sleep(500 * time.Millisecond)
	begin := time.Now()
	for n := 1; n <= 3; n++ {
		s.atoll("demo", "fill", fmt.Sprint(n))
	}
	l.wait(t)
	err := l.stop()
	t.Logf("after %v every writer was told: %v", time.Since(begin).Round(time.Millisecond), err)
	if err == nil || !strings.Contains(err.Error(), "no space") {
		t.Errorf("the error does not say that there is no space: %v", err)
	}
	conn := dial(t, uri)
	verifyOnly(t, h, conn)
	buf := make([]byte, blockSize)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := conn.WriteAt(ctx, buf, 0, true); err == nil {
		t.Error("a durable write succeeds on full disks")
	} else {
		h.blocks[0].durable = 0 // zeros may be there now
		h.blocks[0].issued = max(h.blocks[0].issued, 1)
	}
	conn.Close()
	for n := 1; n <= 3; n++ {
		s.atoll("demo", "revive", fmt.Sprint(n))
	}
	took := eventually(t, "writing goes on", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		conn, err := dialer(uri)(ctx)
		if err != nil {
			return false
		}
		defer conn.Close()
		return conn.WriteAt(ctx, buf, 0, true) == nil
	})
	t.Logf("writing went on %v after there was room", took.Round(time.Millisecond))
	h.blocks[0] = block{}
	conn = dial(t, uri)
	t.Logf("%d durable blocks are right", h.verify(t, conn))
	conn.Close()
	l = startLoad(h, false, dialer(uri))
	time.Sleep(500 * time.Millisecond)
	if err := l.stop(); err != nil {
		t.Errorf("load: %v", err)
	}
	s.interrupt()
	s.startDemo()
	conn = dial(t, uri)
	t.Logf("%d durable blocks are right after a restart", h.verify(t, conn))
	conn.Close()
}

// verifyOnly is verify without taking what was found as the truth from now on.
func verifyOnly(t *testing.T, h *history, conn reader) {
	t.Helper()
	buf := make([]byte, blockSize)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for b := range h.blocks {
		if h.blocks[b].durable == 0 {
			continue
		}
		if err := conn.ReadAt(ctx, buf, int64(b)*blockSize); err != nil {
			t.Fatalf("read block %d: %v", b, err)
		}
		if err := h.check(b, buf, false); err != nil {
			t.Error(err)
		}
	}
}

type reader interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
}

// Flipped bits on a node are noticed, read around and repaired.
func TestDemoCorrupt(t *testing.T) {
	t.Parallel()
	s := newDemo(t, "--nodes", "3")
	s.startDemo()
	src := filepath.Join(s.dir, "src.img")
	const size = 100 << 20
	sum := image(t, src, size, 9)
	s.atoll("volume", "import", src, "disk1")
	same := func(what string) {
		t.Helper()
		dst := filepath.Join(s.dir, "dst.img")
		s.atoll("volume", "export", "disk1", dst)
		if checksum(t, dst, size) != sum {
			t.Fatalf("%s: the export differs", what)
		}
		if err := os.Remove(dst); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 2 {
		s.interrupt() // empties the caches
		s.startDemo()
		victim := fmt.Sprint(round + 1)
		out := s.atoll("demo", "corrupt", victim)
		t.Log(strings.TrimSpace(out))
		if strings.Contains(out, " 0 blocks") {
			t.Errorf("corrupt %s damaged nothing", victim)
		}
		same("node " + victim + " corrupted")
		s.atoll("volume", "check", "disk1", "--read")
		t.Log(grep(metrics(t, s, "atoll_"), "repair|corrupt"))
	}
	s.interrupt()
	s.startDemo()
	same("restarted")
	s.atoll("volume", "check", "disk1", "--read")
	s.interrupt()
}

// grep keeps lines that match.
func grep(text, pattern string) string {
	re := regexp.MustCompile(pattern)
	var out []string
	for _, line := range strings.Split(text, "\n") {
		if re.MatchString(line) && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

// A demo refuses to use a directory that is not its own.
func TestDemoDirectory(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	if err := os.WriteFile(filepath.Join(dir, "precious"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := command(t, environ(dir), "", atollPath, "demo", "--dir", dir, "--rm", "--script", "tour")
	if r.code != 4 || !strings.Contains(r.err, "--dir") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(filepath.Join(dir, "precious")); err != nil {
		t.Error("the demo removed what was not its own")
	}
	for _, args := range [][]string{{"--nodes", "0"}, {"--script", "dance"}, {"--node-size", "many"}, {"extra"}} {
		if r := command(t, environ(dir), "", atollPath, append([]string{"demo", "--dir", filepath.Join(dir, "d")}, args...)...); r.code != 2 {
			t.Errorf("demo %v: %+v", args, r)
		}
	}
}
