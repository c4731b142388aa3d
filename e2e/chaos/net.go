package chaos

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host is a test host: a network namespace on the world's bridge.
type Host struct {
	w    *World
	Name string
	Addr string
	ns   *os.File
	cut  map[*Host]bool // whose packets are dropped here
}

// AddHost makes a host with the next address.
func (w *World) AddHost(name string) (*Host, error) {
	n := len(w.hosts) + 1
	h := &Host{w: w, Name: name, Addr: fmt.Sprintf("10.77.0.%d", n), cut: map[*Host]bool{}}
	var err error
	if h.ns, err = newNamespace(); err != nil {
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	port := fmt.Sprintf("port%d", n)
	for _, line := range []string{
		"link set lo up",
		fmt.Sprintf("link add eth0 type veth peer name %s netns /proc/1/fd/%d", port, w.hub.Fd()),
		fmt.Sprintf("addr add %s/24 dev eth0", h.Addr),
		"link set eth0 up",
	} {
		if err := h.run("", "ip", strings.Fields(line)...); err != nil {
			return nil, fmt.Errorf("make host %s: %w", name, err)
		}
	}
	for _, line := range []string{"link set " + port + " master hub", "link set " + port + " up"} {
		if err := w.ip(line); err != nil {
			return nil, fmt.Errorf("make host %s: %w", name, err)
		}
	}
	if err := h.run(ruleset, "nft", "-f", "-"); err != nil {
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	w.hosts = append(w.hosts, h)
	return h, nil
}

// ruleset drops what comes from the addresses in a set: packets vanish as on a
// broken link, and nobody is told.
const ruleset = `
table inet atoll {
	set gone { type ipv4_addr; }
	chain in {
		type filter hook input priority 0; policy accept;
		ip saddr @gone drop
	}
}
`

// newNamespace makes a network namespace, which lives as long as the file or a
// process in it.
func newNamespace() (*os.File, error) {
	var ns *os.File
	err := elsewhere(func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() (err error) {
		ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return ns, err
}

// elsewhere runs fn on a thread that enter has moved to another network
// namespace, and brings the thread back. One that cannot come back ends.
func elsewhere(enter, fn func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("network namespace: %w", err)
	}
	defer home.Close()
	if err := enter(); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	err = fn()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave network namespace: %w", back)) // stays locked
	}
	runtime.UnlockOSThread()
	return err
}

// within runs fn on a thread in the host's namespace: sockets that it makes and
// processes that it starts belong to the host.
func (h *Host) within(fn func() error) error {
	return elsewhere(func() error { return unix.Setns(int(h.ns.Fd()), unix.CLONE_NEWNET) }, fn)
}

// run runs a command on the host.
func (h *Host) run(stdin, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := h.within(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("run %s %s on %s: %w: %s", name, strings.Join(args, " "), h.Name, err, strings.TrimSpace(out.String()))
	}
	return nil
}

// Dial connects from the host. addr is one of a host of this world.
func (h *Host) Dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = h.within(func() (err error) {
		// With a literal address the socket is made by this very goroutine.
		d := net.Dialer{Timeout: 1500 * time.Millisecond} // one that is dark does not answer
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Cut drops all packets from the host from to the host to: one direction.
func (w *World) Cut(from, to *Host) error {
	if from == to || to.cut[from] {
		return nil
	}
	if err := to.run("", "nft", "add", "element", "inet", "atoll", "gone", "{", from.Addr, "}"); err != nil {
		return err
	}
	to.cut[from] = true
	return nil
}

// Partition cuts both directions between each host of a and each of b.
func (w *World) Partition(a, b []*Host) error {
	var errs []error
	for _, x := range a {
		for _, y := range b {
			errs = append(errs, w.Cut(x, y), w.Cut(y, x))
		}
	}
	return errors.Join(errs...)
}

// Heal mends all links.
func (w *World) Heal() error {
	var errs []error
	for _, h := range w.hosts {
		if len(h.cut) == 0 {
			continue
		}
		if err := h.run("", "nft", "flush", "set", "inet", "atoll", "gone"); err != nil {
			errs = append(errs, err)
			continue
		}
		clear(h.cut)
	}
	return errors.Join(errs...)
}
