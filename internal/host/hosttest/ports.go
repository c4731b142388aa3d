package hosttest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
)

// portBlock is how many ports are given out together; the last is the guard.
const portBlock = 16

// Ports returns the first of n neighbouring TCP ports of 127.0.0.1, at most 15,
// on which nobody listens. They stay with this process until it ends: nobody else
// who asks gets them, and the kernel does not give them to connections that go
// out, also while a server that had them is away.
func Ports(n int) (int, error) {
	if n < 1 || n >= portBlock {
		return 0, fmt.Errorf("want 1 to %d ports, not %d", portBlock-1, n)
	}
	blocks := firstOutgoing()/portBlock - 10000/portBlock
	for range 1000 {
		base := 10000/portBlock*portBlock + rand.IntN(blocks)*portBlock
		if guard(base+portBlock-1) && free(base, n) {
			return base, nil
		}
	}
	return 0, fmt.Errorf("no %d free ports in a row", n)
}

// firstOutgoing is where the ports begin that the kernel uses by itself, or the
// usual value where that leaves too few.
func firstOutgoing() int {
	low, high := 0, 0
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		fmt.Sscan(string(text), &low, &high)
	}
	if low < 16384 {
		return 32768
	}
	return low
}

// guard binds a port for as long as the process lives. The descriptor is not
// passed on to children, and nothing closes it.
func guard(port int) bool {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	if syscall.Bind(fd, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}) != nil {
		syscall.Close(fd)
		return false
	}
	return true
}

// free reports whether nobody listens on any of n ports. A block that is taken
// keeps its guard: it is not tried again.
func free(base, n int) bool {
	for p := base; p < base+n; p++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", p))
		if err != nil {
			return false
		}
		l.Close()
	}
	return true
}
