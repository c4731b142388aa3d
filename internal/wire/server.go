package wire

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// ServerOptions says what a Server serves.
type ServerOptions struct {
	Listener net.Listener // closed by Close
	TLS      *tls.Config  // nil for none
	Cluster  atoll.UUID
	Process  atoll.UUID // of this server
	// Lookup finds a node of this process and the incarnation of its disk. It is
	// called for every request, by many goroutines, and must be quick.
	Lookup func(atoll.NodeID) (n Node, incarnation atoll.UUID, ok bool)

	Window   int           // bytes outstanding per connection; 0 = 64 MiB
	Requests int           // requests outstanding per connection; 0 = 1024
	Workers  int           // requests other than appends that run at once per connection; 0 = 32
	Conns    int           // connections; 0 = 1024
	Hello    time.Duration // how long a new connection has to identify itself; 0 = 5 s
	Idle     time.Duration // after which a silent connection is closed; 0 = 30 s
	Stall    time.Duration // how long a peer may take nothing of what is sent; 0 = 10 s
	Drain    time.Duration // how long Close waits for requests under way; 0 = 2 s

	Log     *slog.Logger
	Metrics *Metrics
}

func (o *ServerOptions) setDefaults() {
	number := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	span := func(p *time.Duration, v time.Duration) {
		if *p <= 0 {
			*p = v
		}
	}
	number(&o.Window, 64<<20)
	number(&o.Requests, 1024)
	number(&o.Workers, 32)
	number(&o.Conns, 1024)
	span(&o.Hello, 5*time.Second)
	span(&o.Idle, 30*time.Second)
	span(&o.Stall, 10*time.Second)
	span(&o.Drain, 2*time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// Server answers the requests of Clients with the nodes of this process.
type Server struct {
	o    ServerOptions
	wg   sync.WaitGroup
	done chan struct{} // closed by Close

	mu struct {
		sync.Mutex // guards the fields below
		sessions   map[*session]struct{}
		closed     bool
	}
}

// Serve starts to answer on o.Listener and returns at once.
func Serve(o ServerOptions) *Server {
	o.setDefaults()
	s := &Server{o: o, done: make(chan struct{})}
	s.mu.sessions = make(map[*session]struct{})
	s.wg.Go(s.accept)
	s.wg.Go(s.watch)
	return s
}

// Addr returns the address that the server listens on.
func (s *Server) Addr() net.Addr { return s.o.Listener.Addr() }

// Close stops accepting, lets the requests under way end and be answered, but
// not longer than Options.Drain, closes all connections and waits for
// everything. Appends that a node holds are waited for in any case: a node ends
// them.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.mu.closed {
		s.mu.Unlock()
		s.wg.Wait()
		return nil
	}
	s.mu.closed = true
	all := s.listLocked()
	s.mu.Unlock()
	close(s.done)
	err := s.o.Listener.Close()
	for _, c := range all {
		c.drain()
	}
	hurry := time.AfterFunc(s.o.Drain, func() {
		for _, c := range all {
			c.kill()
		}
	})
	s.wg.Wait()
	hurry.Stop()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close listener %v: %w", s.o.Listener.Addr(), err)
	}
	return nil
}

func (s *Server) listLocked() []*session {
	all := make([]*session, 0, len(s.mu.sessions))
	for c := range s.mu.sessions {
		all = append(all, c)
	}
	return all
}

func (s *Server) accept() {
	wait := backoffMin
	for {
		raw, err := s.o.Listener.Accept()
		if err == nil {
			wait = backoffMin
			s.admit(raw)
			continue
		}
		select {
		case <-s.done:
			return
		default:
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of descriptors, as a rule: it passes.
		s.o.Log.Warn("connection not accepted", "err", err)
		select {
		case <-s.done:
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, backoffMax)
	}
}

// admit starts a session unless there are too many.
func (s *Server) admit(raw net.Conn) {
	c := newSession(s, raw)
	s.mu.Lock()
	full := s.mu.closed || len(s.mu.sessions) >= s.o.Conns
	if !full {
		s.mu.sessions[c] = struct{}{}
	}
	s.mu.Unlock()
	if full {
		s.o.Metrics.denied()
		c.cancel()
		raw.Close()
		return
	}
	s.wg.Go(func() {
		c.run()
		s.mu.Lock()
		delete(s.mu.sessions, c)
		s.mu.Unlock()
	})
}

// watch closes connections that are silent or take nothing.
func (s *Server) watch() {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-t.C:
		}
		s.mu.Lock()
		all := s.listLocked()
		s.mu.Unlock()
		now := time.Now()
		for _, c := range all {
			c.check(now)
		}
	}
}
