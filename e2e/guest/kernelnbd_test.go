package guest_test

import (
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

var netModules = []string{"virtio_pci", "virtio_net", "crc32c_generic", "ext4", "nbd"}

// inGuest is a server's address as guests see it: qemu's user network leads
// 10.0.2.2 to this machine's loopback.
func inGuest(addr string) string {
	return strings.Replace(addr, "127.0.0.1", "10.0.2.2", 1)
}

// TestGuestKernelNBD runs the kernel's own NBD client, set up by the nbd-client
// program, over TCP.
func TestGuestKernelNBD(t *testing.T) {
	l := needLab(t)
	extra := extraImage(t, nil, "nbd-client")
	s := newServer(t, l)
	s.start()
	s.create("disk", diskBytes("ext4"))
	v := l.boot(t, guestOptions{net: true, modules: netModules, extra: extra, args: map[string]string{
		"task": "nbdclient", "net": "1", "server": inGuest(s.nbd)}})
	words, err := v.until("trimmed")
	if err != nil {
		t.Fatal(err)
	}
	trimmed, err := strconv.ParseInt(words[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.finish(); err != nil {
		t.Fatal(err)
	}
	// What the guest trimmed is free on the server; the kept file is not.
	if mapped, most := s.mapped("disk"), diskBytes("ext4")-trimmed+1<<20; mapped < 24<<20 || mapped > most {
		t.Errorf("%d bytes are mapped after fstrim, want 24 MiB to %d", mapped, most)
	}
}

// TestGuestBlockdev sets the kernel's driver up with package blockdev on two
// connections, and kills the server under it.
func TestGuestBlockdev(t *testing.T) {
	l := needLab(t)
	s := newServer(t, l)
	s.start()
	s.create("disk", diskBytes("ext4"))
	v := l.boot(t, guestOptions{net: true, modules: netModules, cpus: 2, args: map[string]string{
		"task": "blockdev", "net": "1", "server": inGuest(s.nbd)}})
	if device, err := v.until("device"); err != nil {
		t.Fatal(err)
	} else if queues := device[len(device)-1]; queues != "2" {
		t.Errorf("the device uses %s connections", queues)
	}
	if _, err := v.until("kill"); err != nil {
		t.Fatal(err)
	}
	s.kill()
	if err := v.finish(); err != nil {
		t.Fatal(err)
	}
}

// TestGuestAttach runs "atoll volume attach" in the guest, and kills the server
// under the device in the end.
func TestGuestAttach(t *testing.T) {
	l := needLab(t)
	s := newServer(t, l)
	s.start()
	s.create("disk", diskBytes("ext4"))
	api := forwardTo(t, s.socket())
	v := l.boot(t, guestOptions{net: true, modules: netModules, memory: 512,
		extra: extraImage(t, map[string]string{"/bin/atoll": l.binary}),
		args: map[string]string{
			"task": "attach", "net": "1", "server": inGuest(s.nbd), "api": inGuest(api),
			"apisocket": s.socket(), "nbdsocket": filepath.Join(s.data(), "nbd.sock")}})
	if _, err := v.until("kill"); err != nil {
		t.Fatal(err)
	}
	s.kill()
	if err := v.finish(); err != nil {
		t.Fatal(err)
	}
}

// forwardTo opens a TCP port that leads to a Unix socket.
func forwardTo(t *testing.T, socket string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", socket)
			if err != nil {
				in.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			pipe := func(to, from net.Conn) {
				_, _ = io.Copy(to, from)
				to.Close()
			}
			wg.Go(func() { pipe(out, in) })
			wg.Go(func() { pipe(in, out) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().String()
}
