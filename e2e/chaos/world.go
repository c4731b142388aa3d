package chaos

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	insideEnv  = "ATOLL_CHAOS_INSIDE"  // the directory of the world; set within it only
	programEnv = "ATOLL_CHAOS_PROGRAM" // the program under test
)

// Inside returns the directory in which the tests keep everything, and whether
// this process runs in a world of its own, as Enter makes it.
func Inside() (dir string, ok bool) { return os.LookupEnv(insideEnv) }

// Unable tells why no world can be made here, "" if it can.
func Unable() string {
	if runtime.GOOS != "linux" {
		return "network namespaces need Linux"
	}
	if os.Getuid() != 0 {
		return "network namespaces need root"
	}
	for _, p := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(p); err != nil {
			return p + " is not installed"
		}
	}
	// Whether the kernel lets us, and knows bridges, veth and nftables.
	probe := exec.Command("sh", "-c", "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && nft -f -")
	probe.Stdin = strings.NewReader(ruleset)
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	if out, err := probe.CombinedOutput(); err != nil {
		return fmt.Sprintf("no network namespaces here: %v: %s", err, strings.TrimSpace(string(out)))
	}
	return ""
}

// Enter runs this program again in a world of its own and returns its exit code.
// program is the one under test, dir an empty directory.
func Enter(program, dir string) (int, error) {
	// The child dies with the thread that made it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	self, err := os.Executable()
	if err != nil {
		return 0, fmt.Errorf("enter a world: %w", err)
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"="+dir, programEnv+"="+program)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	if err != nil {
		return 0, fmt.Errorf("enter a world: %w", err)
	}
	return 0, nil
}

// World is the place of all hosts. It is made once in a process.
type World struct {
	Dir     string
	Program string
	onDisk  bool // no tmpfs for the servers' disks
	hub     *os.File
	hosts   []*Host
}

// NewWorld sets up the mounts and the bridge. The caller is inside.
func NewWorld() (*World, error) {
	dir, ok := Inside()
	if !ok || os.Getpid() != 1 {
		return nil, errors.New("make a world: not inside one")
	}
	w := &World{Dir: dir, Program: os.Getenv(programEnv), onDisk: os.Getenv("CHAOS_DISK") != ""}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make a world: private mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return nil, fmt.Errorf("make a world: mount /proc: %w", err)
	}
	// Servers meet in /run otherwise, also with those outside.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return nil, fmt.Errorf("make a world: mount tmpfs: %w", err)
	}
	if !w.onDisk {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700"); err != nil {
			return nil, fmt.Errorf("make a world: mount tmpfs: %w", err)
		}
	}
	var err error
	if w.hub, err = os.Open("/proc/self/ns/net"); err != nil {
		return nil, fmt.Errorf("make a world: %w", err)
	}
	for _, line := range []string{"link set lo up", "link add hub type bridge", "link set hub up"} {
		if err := w.ip(line); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// ip runs iproute2 in the world's own network namespace.
func (w *World) ip(line string) error { return output(exec.Command("ip", strings.Fields(line)...)) }

// output runs a command and makes what it prints part of its error.
func output(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// path is a place in the world's directory.
func (w *World) path(parts ...string) string {
	return filepath.Join(append([]string{w.Dir}, parts...)...)
}
