package rbd_test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/host/hosttest"
)

// ceph is a throw-away cluster that keeps everything in memory.
type ceph struct {
	dir    string
	python struct {
		in  io.Writer
		out *bufio.Scanner
	}
	serial int
}

const conf = `[global]
fsid = %[1]v
mon host = [v2:127.0.0.1:%[2]d]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
keyring = /dev/null
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 0
paxos propose interval = .05
paxos min wait = .01
run dir = %[3]s
admin socket =
pid file =
log file = %[3]s/$name.log
mon cluster log file = %[3]s/cluster.log
crash dir = %[3]s
[client]
log file = /dev/null
[mon]
mon data = %[3]s/mon
[osd]
osd data = %[3]s/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd memory target = 939524096
ms bind port min = %[4]d
ms bind port max = %[5]d
`

// start brings a cluster up for the test and takes it down at its end.
func start(t *testing.T) *ceph {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a Ceph cluster")
	}
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	for _, p := range []string{"ceph-mon", "ceph-osd", "monmaptool", "ceph", "rbd", "/usr/bin/python3"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed (make packages): the streams that it made once, in internal/transfer/testdata, must do", p)
		}
	}
	dir, err := os.MkdirTemp("", "arbd-") // short: there will be sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &ceph{dir: dir}
	for _, d := range []string{"mon", "osd"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	port := freePort(t)
	cluster, osd := uuid(), uuid()
	text := fmt.Sprintf(conf, cluster, port, dir, port+1, port+14)
	if err := os.WriteFile(c.conf(), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	c.must(t, "monmaptool", "--create", "--fsid", cluster, "--enable-all-features",
		"--addv", "a", fmt.Sprintf("[v2:127.0.0.1:%d]", port), filepath.Join(dir, "map"))
	c.must(t, "ceph-mon", "-i", "a", "--mkfs", "--monmap", filepath.Join(dir, "map"))
	c.daemon(t, "ceph-mon", "-f", "-i", "a")
	c.must(t, "ceph", "osd", "new", osd, "0")
	c.must(t, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
	c.daemon(t, "ceph-osd", "-f", "-i", "0")
	c.must(t, "ceph", "osd", "pool", "create", "rbd", "8", "8")
	c.must(t, "rbd", "pool", "init", "rbd")
	c.startPython(t)
	t.Logf("%s up after %v", bytes.TrimSpace(c.must(t, "rbd", "--version")), time.Since(began).Round(time.Millisecond))
	return c
}

func (c *ceph) conf() string { return filepath.Join(c.dir, "ceph.conf") }

func uuid() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// freePort finds the first of 15 ports that nobody listens on.
func freePort(t *testing.T) int {
	t.Helper()
	port, err := hosttest.Ports(15)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func (c *ceph) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "CEPH_CONF="+c.conf(), "CEPH_ARGS=")
	cmd.Dir = c.dir
	return cmd
}

// daemon starts a program that ends with the test.
func (c *ceph) daemon(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := c.command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it keeps nothing
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", name, out.String())
		}
	})
}

// run runs a program with input and returns its output and exit status.
func (c *ceph) run(t *testing.T, input []byte, name string, args ...string) (out []byte, status int, text string) {
	t.Helper()
	cmd := c.command(name, args...)
	cmd.Stdin = bytes.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(5*time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Wait()
	return stdout.Bytes(), cmd.ProcessState.ExitCode(), stderr.String()
}

// must runs a program that must succeed.
func (c *ceph) must(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	return c.feed(t, nil, name, args...)
}

// feed is must with an input.
func (c *ceph) feed(t *testing.T, input []byte, name string, args ...string) []byte {
	t.Helper()
	out, status, text := c.run(t, input, name, args...)
	if status != 0 {
		t.Fatalf("%s %q: status %d: %s", name, args, status, text)
	}
	return out
}

// name returns a name for a new image.
func (c *ceph) name() string {
	c.serial++
	return fmt.Sprintf("image%d", c.serial)
}

func (c *ceph) startPython(t *testing.T) {
	t.Helper()
	script, err := filepath.Abs("testdata/images.py")
	if err != nil {
		t.Fatal(err)
	}
	cmd := c.command("/usr/bin/python3", script, c.conf())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.python.in, c.python.out = in, bufio.NewScanner(out)
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("images.py: %s", stderr.String())
		}
	})
}

// cmd is a command to images.py.
type cmd map[string]any

// info is what images.py says about an image.
type info struct {
	Size        int64             `json:"size"`
	StripeUnit  uint64            `json:"stripe_unit"`
	StripeCount uint64            `json:"stripe_count"`
	Order       uint64            `json:"order"`
	Features    uint64            `json:"features"`
	Meta        map[string]string `json:"meta"`
	Snaps       [][3]any          `json:"snaps"`
	Error       string            `json:"error"`
}

// do runs a command of images.py.
func (c *ceph) do(t *testing.T, command cmd) (answer info) {
	t.Helper()
	b, err := json.Marshal(command)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.python.in.Write(append(b, '\n')); err != nil {
		t.Fatal(err)
	}
	if !c.python.out.Scan() {
		t.Fatalf("%s: images.py ended", b)
	}
	if err := json.Unmarshal(c.python.out.Bytes(), &answer); err != nil || answer.Error != "" {
		t.Fatalf("%s: %s %v", b, answer.Error, err)
	}
	return answer
}

// read returns the bytes of an image or one of its snapshots.
func (c *ceph) read(t *testing.T, image, snap string) []byte {
	t.Helper()
	file := filepath.Join(c.dir, "read")
	command := cmd{"op": "read", "image": image, "file": file}
	if snap != "" {
		command["snap"] = snap
	}
	c.do(t, command)
	p, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
