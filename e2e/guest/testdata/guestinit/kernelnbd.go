package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/gateway/blockdev"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// nbdClient uses the volume with the usual client program and the kernel's
// driver.
func (g *guest) nbdClient() error {
	host, port, err := net.SplitHostPort(g.args["server"])
	if err != nil {
		return err
	}
	if err := g.step("connect", func() error {
		return command("nbd-client", host, port, "/dev/nbd0", "-N", "disk", "-b", "4096")
	}); err != nil {
		return err
	}
	if err := g.useDevice("/dev/nbd0"); err != nil {
		return err
	}
	return g.step("disconnect", func() error { return command("nbd-client", "-d", "/dev/nbd0") })
}

// blockdev uses the volume through our own calls of the driver, and then lets
// the server end under the device.
func (g *guest) blockdev() error {
	o := blockdev.KernelOptions{SectorBytes: 4096}
	for range 2 {
		n, err := nbd.Negotiate(context.Background(), "nbd://"+g.args["server"]+"/disk", nbd.DialOptions{})
		if err != nil {
			return err
		}
		o.Conns, o.Size, o.Flags = append(o.Conns, n.Conn), n.Size, n.Flags
	}
	k, err := blockdev.AttachKernel(o)
	if err != nil {
		return err
	}
	if err := g.useDevice(k.Path); err != nil {
		return err
	}
	if err := g.claimed(k); err != nil {
		return err
	}
	g.say("kill")
	select {
	case <-k.Done():
	case <-time.After(time.Minute):
		return fmt.Errorf("the device lives on without a server")
	}
	if err := k.Detach(); !strings.Contains(fmt.Sprint(err), "closed the connection") {
		return fmt.Errorf("detach after the server's end: %v", err)
	}
	if _, err := os.Stat("/sys/block/" + filepath.Base(k.Path) + "/pid"); err == nil {
		return fmt.Errorf("the device is still in use")
	}
	return nil
}

// claimed tries to detach a mounted device.
func (g *guest) claimed(k *blockdev.Kernel) error {
	if err := mount("ext4", k.Path); err != nil {
		return err
	}
	if err := k.Detach(); !strings.Contains(fmt.Sprint(err), "in use") {
		return fmt.Errorf("detach a mounted device: %v", err)
	}
	return unix.Unmount(mountAt, 0)
}

// useDevice makes ext4 on a device, fills and trims it and checks it.
func (g *guest) useDevice(dev string) error {
	name := filepath.Base(dev)
	g.say("device %s size %s sector %s discard %s cache %s queues %d", name, attr(name, "size"), attr(name, "queue/logical_block_size"),
		attr(name, "queue/discard_max_bytes"), strings.ReplaceAll(attr(name, "queue/write_cache"), " ", "-"), queues(name))
	if attr(name, "queue/write_cache") != "write back" {
		return fmt.Errorf("the kernel will send no flush")
	}
	data := content(7, 7)
	for len(data) < 24<<20 {
		data = append(data, data[:min(len(data), 24<<20-len(data))]...)
	}
	for _, s := range []struct {
		name string
		do   func() error
	}{
		{"mkfs", func() error { return mkfs("ext4", dev) }},
		{"mount", func() error { return unix.Mount(dev, mountAt, "ext4", 0, "") }},
		{"write", func() error { return writeSync(mountAt+"/keep", data) }},
		{"write", func() error { return writeSync(mountAt+"/gone", data) }},
		{"remove", func() error { return os.Remove(mountAt + "/gone") }},
		{"sync", func() error { unix.Sync(); return nil }}, // only then is the room free
		{"fstrim", g.fstrim},
		{"umount", func() error { return unix.Unmount(mountAt, 0) }},
		{"fsck", func() error { return fsck("ext4", dev) }},
		{"forget", forget},
		{"mount", func() error { return unix.Mount(dev, mountAt, "ext4", 0, "") }},
		{"compare", func() error { return compare(mountAt+"/keep", data) }},
		{"umount", func() error { return unix.Unmount(mountAt, 0) }},
	} {
		if err := g.step(s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

func attr(dev, name string) string { return strings.TrimSpace(read("/sys/block/" + dev + "/" + name)) }

// queues is how many connections the driver uses.
func queues(dev string) int {
	all, _ := filepath.Glob("/sys/block/" + dev + "/mq/*") // the pattern is well formed
	return len(all)
}

// fstrim gives the file system's free room back (linux/fs.h, FITRIM).
func (g *guest) fstrim() error {
	dir, err := os.Open(mountAt)
	if err != nil {
		return err
	}
	defer dir.Close()
	whole := struct{ start, length, least uint64 }{length: ^uint64(0)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), 0xc0185879, uintptr(unsafe.Pointer(&whole))); errno != 0 {
		return errno
	}
	g.say("trimmed %d", whole.length)
	return nil
}

func writeSync(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// forget drops the kernel's caches, so that the next read asks the server.
func forget() error { return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0) }

func compare(path string, want []byte) error {
	got, err := os.ReadFile(path)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s differs", path)
	}
	return err
}

// attach runs the command line of the program under test against the server
// outside, whose sockets it finds here at the paths that the server tells.
func (g *guest) attach() error {
	for socket, server := range map[string]string{g.args["apisocket"]: g.args["api"], g.args["nbdsocket"]: g.args["server"]} {
		l, err := listen(socket)
		if err != nil {
			return err
		}
		go forward(l, server)
	}
	cli := func(args ...string) (string, error) {
		out, err := exec.Command("/bin/atoll", append(args, "--server", "unix:"+g.args["apisocket"])...).CombinedOutput()
		text := strings.TrimSpace(string(out))
		g.say("atoll %s: %s", strings.Join(args, " "), text)
		if err != nil {
			return "", fmt.Errorf("atoll %s: %w: %s", strings.Join(args, " "), err, text)
		}
		return text, nil
	}
	if err := g.attachTwice(cli); err != nil {
		return err
	}
	return g.serverGone(cli)
}

// serverGone lets the server end under an attached device: the helper must end
// and leave nothing behind.
func (g *guest) serverGone(cli func(args ...string) (string, error)) error {
	if _, err := cli("volume", "attach", "disk"); err != nil {
		return err
	}
	g.say("kill")
	for _, path := range []string{"/sys/block/nbd0/pid", "/run/atoll/attach/disk.json"} {
		if err := waitGone(path); err != nil {
			return err
		}
	}
	if _, err := cli("volume", "detach", "disk"); !strings.Contains(fmt.Sprint(err), "not attached here") {
		return fmt.Errorf("detach without a server: %v", err)
	}
	return nil
}

// waitGone waits until a file is gone.
func waitGone(path string) error {
	for range 600 {
		if _, err := os.Stat(path); os.IsNotExist(err) {
			return nil
		}
		<-time.After(100 * time.Millisecond)
	}
	return fmt.Errorf("%s stays", path)
}

// attachTwice attaches with a new file system, detaches and attaches again.
func (g *guest) attachTwice(cli func(args ...string) (string, error)) error {
	data := content(9, 9)
	out := ""
	steps := []struct {
		name string
		do   func() (err error)
	}{
		{"attach", func() (err error) {
			out, err = cli("volume", "attach", "disk", "--mkfs", "ext4", "--mount", mountAt)
			return err
		}},
		{"way", func() error {
			if !strings.Contains(out, "/dev/nbd0") || !strings.Contains(out, "kernel's NBD driver") {
				return fmt.Errorf("not by the kernel's driver: %s", out)
			}
			return nil
		}},
		{"write", func() error { return writeSync(mountAt+"/keep", data) }},
		{"detach", func() (err error) { _, err = cli("volume", "detach", "disk"); return err }},
		{"gone", func() error {
			if _, err := os.Stat("/sys/block/nbd0/pid"); err == nil {
				return fmt.Errorf("the device is still there")
			}
			return nil
		}},
		{"attach", func() (err error) {
			_, err = cli("volume", "attach", "disk", "--read-only", "--mount", mountAt)
			return err
		}},
		{"read-only", func() error {
			if attr("nbd0", "ro") != "1" {
				return fmt.Errorf("the device is writable")
			}
			return nil
		}},
		{"compare", func() error { return compare(mountAt+"/keep", data) }},
		{"detach", func() (err error) { _, err = cli("volume", "detach", "disk"); return err }},
	}
	for _, s := range steps {
		if err := g.step(s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

// listen makes a socket at a path of the host.
func listen(path string) (net.Listener, error) {
	path, err := url.QueryUnescape(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return net.Listen("unix", path)
}

// forward connects whoever comes to the server outside.
func forward(l net.Listener, server string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("tcp", server)
			if err != nil {
				return
			}
			defer out.Close()
			go func() {
				_, _ = io.Copy(out, in)
				_ = out.(*net.TCPConn).CloseWrite()
			}()
			_, _ = io.Copy(in, out)
		}()
	}
}
