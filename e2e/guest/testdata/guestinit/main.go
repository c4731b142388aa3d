// Command guestinit is the init of a test guest. It loads modules, carries out
// the task on the kernel's command line and reports on the second serial port,
// one line per fact:
//
//	ready 4.21          the guest is up, seconds since the kernel's start
//	synced 17           file 17 and everything before it is on stable storage
//	step mkfs 1.20      a step of a task ended, with its seconds
//	checked 17          the file system is sound and holds files up to 17
//	fail TEXT           something that must not be; the guest goes on if it can
//	done                the task is over; the guest powers off
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guest is the running task.
type guest struct {
	args   map[string]string
	report *os.File
}

func main() {
	g := &guest{args: map[string]string{}}
	if err := g.setUp(); err != nil {
		g.say("fail set up: %v", err)
	} else {
		g.say("ready %s", strings.Fields(read("/proc/uptime"))[0])
		if err := g.run(); err != nil {
			g.say("fail %s: %v", g.args["task"], err)
		}
	}
	g.say("done")
	syscall.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	<-time.After(time.Minute)
}

// run carries out the task.
func (g *guest) run() error {
	switch g.args["task"] {
	case "powercut":
		return g.powercut()
	case "nbdclient":
		return g.nbdClient()
	case "blockdev":
		return g.blockdev()
	case "attach":
		return g.attach()
	}
	return fmt.Errorf("no such task")
}

// setUp mounts what a kernel offers, reads the task and loads modules.
func (g *guest) setUp() error {
	for _, m := range [][3]string{{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"devtmpfs", "/dev", "devtmpfs"}, {"tmpfs", "/run", "tmpfs"}} {
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	report, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	g.report = report
	for _, word := range strings.Fields(read("/proc/cmdline")) {
		if key, value, ok := strings.Cut(word, "="); ok {
			if key, ok := strings.CutPrefix(key, "guest."); ok {
				g.args[key] = value
			}
		}
	}
	for _, env := range []string{"PATH=/bin:/sbin", "HOME=/run", "XDG_RUNTIME_DIR=/run", "LC_ALL=C"} {
		key, value, _ := strings.Cut(env, "=")
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	for _, m := range strings.Split(g.args["modules"], ",") {
		if err := load(m); err != nil {
			return err
		}
	}
	if g.args["net"] != "" {
		return g.network()
	}
	return nil
}

// load loads one module; those it needs are loaded.
func load(name string) error {
	if name == "" {
		return nil
	}
	f, err := os.Open("/modules/" + name + ".ko")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("load %s: %w", name, err)
	}
	return nil
}

// network brings up the card with the address that qemu's user network gives.
func (g *guest) network() error {
	for _, args := range [][]string{{"link", "set", "lo", "up"}, {"link", "set", "eth0", "up"}, {"addr", "add", "10.0.2.15/24", "dev", "eth0"}} {
		if err := command("ip", args...); err != nil {
			return err
		}
	}
	return nil
}

// say reports one line to the host.
func (g *guest) say(format string, args ...any) {
	line := strings.ReplaceAll(strings.TrimSpace(fmt.Sprintf(format, args...)), "\n", " | ")
	if g.report != nil {
		_, _ = g.report.WriteString(line + "\n")
	} else {
		fmt.Println(line)
	}
}

// step runs one part of a task and reports how long it took.
func (g *guest) step(name string, do func() error) error {
	start := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	g.say("step %s %.2f", name, time.Since(start).Seconds())
	return nil
}

// command runs a program; its output is part of the error.
func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil || len(b) == 0 {
		return "?"
	}
	return string(b)
}

// waitFile waits until a file is there.
func waitFile(path string) error {
	for range 600 {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		<-time.After(50 * time.Millisecond)
	}
	return fmt.Errorf("%s does not appear", path)
}
