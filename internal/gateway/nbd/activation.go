package nbd

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/atollstore/atoll/internal/atoll"
)

// InheritedListeners returns the sockets that systemd, or a client such as
// nbdcopy that starts its own server, passed to this process (LISTEN_FDS), and
// nil when there are none. The environment is cleared, so that a second call
// and child processes find nothing.
func InheritedListeners() ([]net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take inherited sockets: %w: %w", err, atoll.ErrIO)
	}
	if len(all) == 0 {
		return nil, nil
	}
	for i, l := range all {
		if l == nil {
			closeListeners(all)
			return nil, fmt.Errorf("take inherited socket %d: not a listening stream socket: %w", i+3, atoll.ErrInvalid)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // the socket's file belongs to who made it
		}
	}
	return all, nil
}

// closeListeners closes those that are not nil.
func closeListeners(all []net.Listener) {
	for _, l := range all {
		if l != nil {
			l.Close()
		}
	}
}
