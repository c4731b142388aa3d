package nbd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// TLSMode says what part TLS plays on a server.
type TLSMode int

const (
	// TLSNone refuses STARTTLS.
	TLSNone TLSMode = iota
	// TLSRequired tells a client nothing before STARTTLS ("nbds").
	TLSRequired
	// TLSAllowed leaves it to the client.
	TLSAllowed
)

// Options configures a server. Listeners and Exports are required.
type Options struct {
	// Listeners are closed by Close.
	Listeners []net.Listener
	Exports   Exports
	// TLS is the server's certificate and which client certificates it takes.
	// Versions below 1.2 are never offered.
	TLS     *tls.Config
	TLSMode TLSMode
	// PlainUnix treats Unix sockets as TLSNone whatever TLSMode says.
	PlainUnix bool

	Log     *slog.Logger // nil is silent
	Metrics *Metrics

	// MaxConnections is how many clients may be connected at once (1024).
	MaxConnections int
	// MaxRequests is how many requests of a connection run at once (128).
	MaxRequests int
	// MaxBytes bounds the payload in flight of a connection (64 MiB). One
	// request of the largest size is always let through.
	MaxBytes int64
	// HandshakeTimeout is the longest wait for each step of a negotiation (10 s).
	HandshakeTimeout time.Duration
	// OpenTimeout bounds opening an export (30 s).
	OpenTimeout time.Duration
	// Grace is how long requests of a connection that is gone may go on before
	// they are cancelled (5 s; 250 ms once another client wants the export).
	Grace time.Duration
	// DrainTimeout is how long Close waits for requests in flight (10 s).
	DrainTimeout time.Duration
}

// Server serves exports to NBD clients. Its methods may be called concurrently.
type Server struct {
	o    Options
	ctx  context.Context // of all connections; cancelled at the end of a drain
	stop context.CancelFunc
	wg   sync.WaitGroup

	draining atomic.Bool
	drain    chan struct{} // closed when draining begins
	once     sync.Once
	nextID   atomic.Uint64

	quick     time.Duration // quickTime, but for tests
	waiting   atomic.Int32  // connections whose thread waits for a request (lone.go)
	watching  atomic.Bool   // the watchdog is awake (inline.go)
	wakeWatch chan struct{} // wakes it

	mu struct {
		sync.Mutex // held for memory work only
		conns      map[*conn]struct{}
	}
}

// Serve starts a server and returns at once. Close stops it.
func Serve(o Options) *Server {
	o.setDefaults()
	s := &Server{o: o, drain: make(chan struct{}), wakeWatch: make(chan struct{}, 1), quick: quickTime}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.mu.conns = make(map[*conn]struct{})
	s.wg.Go(s.watch)
	for _, l := range o.Listeners {
		s.wg.Go(func() { s.accept(l) })
	}
	return s
}

// setDefaults fills in what was left zero.
func (o *Options) setDefaults() {
	o.MaxConnections = cmp.Or(o.MaxConnections, 1024)
	o.MaxRequests = cmp.Or(o.MaxRequests, 128)
	o.MaxBytes = cmp.Or(o.MaxBytes, 64<<20)
	o.HandshakeTimeout = cmp.Or(o.HandshakeTimeout, 10*time.Second)
	o.OpenTimeout = cmp.Or(o.OpenTimeout, 30*time.Second)
	o.Grace = cmp.Or(o.Grace, 5*time.Second)
	o.DrainTimeout = cmp.Or(o.DrainTimeout, 10*time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.TLS != nil {
		o.TLS = o.TLS.Clone()
		o.TLS.MinVersion = max(o.TLS.MinVersion, tls.VersionTLS12)
	} else if o.TLSMode != TLSNone {
		o.TLSMode = TLSRequired // no certificate: nobody gets in, nothing leaks
	}
}

// accept takes connections until the listener is closed.
func (s *Server) accept(l net.Listener) {
	delay := 5 * time.Millisecond
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			delay = 5 * time.Millisecond
			s.wg.Go(func() { s.ServeConn(nc) })
		case s.draining.Load() || errors.Is(err, net.ErrClosed):
			return
		default: // such as too many open files: wait, it may pass
			s.o.Log.Warn("connection not accepted", "addr", l.Addr().String(), "err", err)
			select {
			case <-time.After(delay):
				delay = min(2*delay, time.Second)
			case <-s.drain:
				return
			}
		}
	}
}

// ServeConn serves one connection that was made elsewhere and returns when it
// has ended and nothing of it runs any more. It closes nc.
func (s *Server) ServeConn(nc net.Conn) {
	c := newConn(s, nc)
	defer c.raw.free()
	defer c.cancel()
	if !s.enter(c) {
		return
	}
	s.o.Metrics.opened(1)
	defer s.o.Metrics.opened(-1)
	defer s.leave(c)
	defer c.detach()
	if err := c.negotiate(); err != nil {
		if !errors.Is(err, errEnd) {
			s.o.Log.Debug("negotiation ended", "peer", c.peer, "err", err)
		}
		return
	}
	s.o.Log.Info("client connected", "peer", c.peer, "export", c.export, "tls", c.tls)
	err := c.transmit()
	s.o.Log.Info("client left", "peer", c.peer, "export", c.export, "err", err)
}

// enter adds c to the list unless the server is full or closing.
func (s *Server) enter(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining.Load() {
		return false
	}
	if len(s.mu.conns) >= s.o.MaxConnections {
		s.o.Log.Warn("connection refused: too many; raise the limit or close clients", "peer", c.peer, "limit", s.o.MaxConnections)
		return false
	}
	s.mu.conns[c] = struct{}{}
	return true
}

// leave takes c off the list.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.conns, c)
}

// ConnInfo is what a console shows of a connection.
type ConnInfo struct {
	ID                      uint64
	Peer                    string
	Export                  string // empty while negotiating
	TLS                     bool
	Since                   time.Time
	InFlight                int
	Requests                uint64
	ReadBytes, WrittenBytes uint64
}

// Connections returns the open connections, oldest first.
func (s *Server) Connections() []ConnInfo {
	var all []ConnInfo
	for _, c := range s.list() {
		all = append(all, c.info())
	}
	slices.SortFunc(all, func(a, b ConnInfo) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// Disconnect drops a connection by its ConnInfo.ID and reports whether it was
// there. Its requests in flight end as after a crash of the client.
func (s *Server) Disconnect(id uint64) bool {
	for _, c := range s.list() {
		if c.id == id {
			c.raw.Close()
			return true
		}
	}
	return false
}

// list copies the set of connections.
func (s *Server) list() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*conn, 0, len(s.mu.conns))
	for c := range s.mu.conns {
		all = append(all, c)
	}
	return all
}

// Close stops accepting, answers new requests with ESHUTDOWN, waits for those
// in flight as long as DrainTimeout, cancels the rest, and returns when nothing
// of the server runs any more. Further calls wait for the same end. The error
// tells how many connections had to be cut off.
func (s *Server) Close() error {
	var cut int
	s.once.Do(func() {
		s.mu.Lock()
		s.draining.Store(true)
		s.mu.Unlock()
		close(s.drain)
		for _, l := range s.o.Listeners {
			l.Close()
		}
		cut = s.drainConns()
		s.stop()
		for _, c := range s.list() {
			c.raw.Close()
		}
	})
	s.wg.Wait()
	if cut > 0 {
		return fmt.Errorf("drain nbd server: %d connections had requests in flight after %v: %w", cut, s.o.DrainTimeout, atoll.ErrTimeout)
	}
	return nil
}

// drainConns waits for every connection's requests in flight, closing each
// connection when it has none, and returns how many still had some at the end.
func (s *Server) drainConns() (cut int) {
	timer := time.NewTimer(s.o.DrainTimeout)
	defer timer.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		cut = 0
		for _, c := range s.list() {
			if c.inFlight.Load() > 0 {
				cut++
			} else {
				c.raw.Close()
			}
		}
		if cut == 0 {
			return 0
		}
		select {
		case <-tick.C:
		case <-timer.C:
			return cut
		}
	}
}

// awaitGone waits until no connection that is already gone has requests in
// flight on the device (N4), hurrying them, and fails with ErrBusy after the
// context's end.
func (s *Server) awaitGone(ctx context.Context, dev Device) error {
	for _, c := range s.list() {
		if !c.isGone(dev) {
			continue
		}
		if !c.hurry(ctx) {
			return fmt.Errorf("requests of a lost connection still run: %w", atoll.ErrBusy)
		}
	}
	return nil
}
