package host

import (
	"context"
	"net"
)

// Net is how a process reaches others. Addresses are "host:port" or
// "unix:/path". All methods may be called concurrently.
type Net interface {
	// Dial opens a stream connection; ErrUnreachable if nobody answers.
	Dial(ctx context.Context, addr string) (net.Conn, error)
	// Listen accepts connections at addr. Port 0 picks a free one, told by the
	// listener's Addr.
	Listen(addr string) (net.Listener, error)
}
