package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// cluster is a server of Atoll, a process of its own, with its nodes on the disk
// under test.
type cluster struct {
	bin, dir string
	port     int
	args     []string
	cmd      *exec.Cmd
	client   *api.Client
}

// newCluster starts a server with three nodes under dir.
func newCluster(ctx context.Context, bin, dir string, args ...string) (*cluster, error) {
	port, err := freePorts()
	if err != nil {
		return nil, err
	}
	c := &cluster{bin: bin, dir: dir, port: port, args: args}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make %s: %w", dir, err)
	}
	if c.client, err = api.NewClient(c.api(), api.Credential{}, nil); err != nil {
		return nil, err
	}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.remove())
	}
	return c, nil
}

// freePorts finds a port behind which two more are free as well.
func freePorts() (int, error) {
	for port := 17600; port < 18600; port += 10 {
		free := true
		for i := range 3 {
			l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port+i))
			if err != nil {
				free = false
				break
			}
			_ = l.Close()
		}
		if free {
			return port, nil
		}
	}
	return 0, errors.New("no three free ports from 17600 on")
}

// start runs the server until stop and waits until it answers.
func (c *cluster) start(ctx context.Context) error {
	args := append([]string{"server", "--data", c.dir, "--nbd", "none", "--log-level", "error",
		"--listen", "127.0.0.1:" + strconv.Itoa(c.port)}, c.args...)
	c.cmd = exec.Command(c.bin, args...)
	c.cmd.Stderr = os.Stderr
	if err := c.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", c.bin, err)
	}
	return await(ctx, fmt.Sprintf("http://127.0.0.1:%d/healthz", c.port))
}

// stop ends the server in order.
func (c *cluster) stop() error {
	if c.cmd == nil {
		return nil
	}
	cmd := c.cmd
	c.cmd = nil
	c.client.Close()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the server: %w", err)
	}
	late := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the server ended: %w", err)
	}
	return nil
}

// remove ends the server and removes its data.
func (c *cluster) remove() error { return errors.Join(c.stop(), os.RemoveAll(c.dir)) }

func (c *cluster) api() string { return "unix:" + filepath.Join(c.dir, "api.sock") }

// uri is where an export of NBD is.
func (c *cluster) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + filepath.Join(c.dir, "nbd.sock")
}

// open connects to an export.
func (c *cluster) open(ctx context.Context, export string) (*nbd.Client, error) {
	return nbd.Dial(ctx, c.uri(export), nbd.DialOptions{})
}

// create makes a volume and connects to it.
func (c *cluster) create(ctx context.Context, name string, size int64, cache string) (*nbd.Client, error) {
	if _, err := c.client.Volumes.CreateVolume(ctx, connect.NewRequest(&atollv1.CreateVolumeRequest{Name: name, SizeBytes: size, Cache: cache})); err != nil {
		return nil, fmt.Errorf("create volume %s: %w", name, err)
	}
	return c.open(ctx, name)
}

// drop removes a volume for good. A client that has just left may not be gone for
// the server yet.
func (c *cluster) drop(ctx context.Context, name string) error {
	var err error
	for range 50 {
		if _, err = c.client.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: name, Now: true})); err == nil {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("delete volume %s: %w", name, err)
}

// run runs a command of the program against the server; what it prints is
// thrown away.
func (c *cluster) run(ctx context.Context, args ...string) error {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", os.DevNull, err)
	}
	defer null.Close()
	cmd := exec.CommandContext(ctx, c.bin, append([]string{"--server", c.api(), "--no-progress"}, args...)...)
	var text strings.Builder
	cmd.Stdout, cmd.Stderr = null, &text
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("atoll %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(text.String()))
	}
	return nil
}

// written returns how many bytes the server has given to the disk.
func (c *cluster) written() (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", c.cmd.Process.Pid))
	if err != nil {
		return 0, fmt.Errorf("bytes written by the server: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			return strconv.ParseInt(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, errors.New("bytes written by the server: the kernel does not count them")
}

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
