package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// maxUnixPath is the longest path of a unix socket in bytes.
const maxUnixPath = 107

// TCP is the real Net: "host:port" over TCP, without delay of small writes and
// with keepalive that finds a dead peer in half a minute, and "unix:/path" over
// unix sockets. The zero value is ready.
type TCP struct{}

var _ Net = TCP{}

// keepAlive ends a connection 30 s after its peer has vanished.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}

// Dial opens a stream connection. It waits at most atoll.RequestTimeout, less
// if ctx ends before.
func (TCP) Dial(ctx context.Context, addr string) (net.Conn, error) {
	network, address, err := splitAddr(addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	d := net.Dialer{Timeout: atoll.RequestTimeout, KeepAliveConfig: keepAlive}
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("dial %s: %w: %w", addr, atoll.ErrUnreachable, context.Cause(ctx))
		}
		return nil, fmt.Errorf("dial %s: %w (%s)", addr, atoll.ErrUnreachable, cause(err))
	}
	if c, ok := conn.(*net.TCPConn); ok {
		c.SetNoDelay(true)
	}
	return conn, nil
}

// Listen accepts connections at addr. A unix socket that nobody listens on any
// more is replaced; one in use is ErrBusy, as a TCP port in use.
func (TCP) Listen(addr string) (net.Listener, error) {
	network, address, err := splitAddr(addr)
	if err == nil && network == "unix" {
		err = removeStale(address)
	}
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", addr, err)
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive}
	l, err := lc.Listen(context.Background(), network, address)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w (%s)", addr, listenKind(err), cause(err))
	}
	return l, nil
}

// AddrString returns an address in the form that Dial and Listen take.
func AddrString(a net.Addr) string {
	if a.Network() == "unix" {
		return "unix:" + a.String()
	}
	return a.String()
}

// splitAddr returns what package net calls the parts of addr.
func splitAddr(addr string) (network, address string, err error) {
	path, ok := strings.CutPrefix(addr, "unix:")
	if !ok {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return "", "", fmt.Errorf("%w: want host:port or unix:/path", atoll.ErrInvalid)
		}
		return "tcp", addr, nil
	}
	switch {
	case path == "" || path[0] == '@' || strings.ContainsRune(path, 0):
		return "", "", fmt.Errorf("%w: a unix socket needs a path", atoll.ErrInvalid)
	case len(path) > maxUnixPath:
		return "", "", fmt.Errorf("%w: the path of a unix socket has at most %d bytes, this one %d; choose a shorter directory",
			atoll.ErrInvalid, maxUnixPath, len(path))
	}
	return "unix", path, nil
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w (%s)", kindOf(err), cause(err))
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%w, and is not a socket", atoll.ErrExist)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) { // connected, or a full backlog
		return fmt.Errorf("%w: another process listens there", atoll.ErrBusy)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w (%s)", kindOf(err), cause(err))
	}
	return nil
}

// listenKind returns the kind of an error of listen.
func listenKind(err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return atoll.ErrBusy
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return atoll.ErrInvalid
	}
	var dns *net.DNSError
	var bad *net.AddrError
	if errors.As(err, &dns) || errors.As(err, &bad) {
		return atoll.ErrInvalid
	}
	return kindOf(err)
}

// cause returns the innermost text of an error of package net.
func cause(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err.Error()
	}
	return err.Error()
}
