package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/pki"
)

// What members speak to each other over TLS, told apart by ALPN.
const (
	protoWire = "atoll-wire/1" // the data path
	protoEtcd = "atoll-etcd/1" // a tunnel to the embedded etcd's socket
)

const handshakeTimeout = 5 * time.Second

func serverTLS(cfg *Config) (*tls.Config, error) {
	return pki.ServerFiles(cfg.TLSCert, cfg.TLSKey, cfg.TLSCA)
}

// memberListener accepts connections of members: TLS with certificates of the
// cluster on both sides, always.
type memberListener struct {
	l      net.Listener
	tls    *tls.Config
	etcd   string // socket of the embedded etcd, empty for none
	wire   *chanListener
	log    *slog.Logger
	cancel context.CancelFunc
	ctx    context.Context
	wg     sync.WaitGroup
	slots  chan struct{}
}

func listenMembers(addr string, id *pki.Identity, etcdSocket string, log *slog.Logger) (*memberListener, error) {
	l, err := host.TCP{}.Listen(addr)
	if err != nil {
		return nil, api.WithHint(fmt.Errorf("members: %w", err), "is another server running? The members' port is the one after --listen")
	}
	conf := id.ServerTLS()
	conf.NextProtos = []string{protoWire, protoEtcd}
	ctx, cancel := context.WithCancel(context.Background())
	m := &memberListener{l: l, tls: conf, etcd: etcdSocket, log: log, cancel: cancel, ctx: ctx, slots: make(chan struct{}, 256)}
	m.wire = &chanListener{addr: l.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	m.wg.Go(m.accept)
	return m, nil
}

func (m *memberListener) addr() string { return m.l.Addr().String() }

func (m *memberListener) close() error {
	m.cancel()
	err := m.l.Close()
	m.wg.Wait()
	return err
}

func (m *memberListener) accept() {
	for {
		c, err := m.l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			m.log.Warn("connection of a member not accepted", "err", err)
			select {
			case <-time.After(50 * time.Millisecond): // such as too many open files
				continue
			case <-m.ctx.Done():
				return
			}
		}
		select {
		case m.slots <- struct{}{}:
			m.wg.Go(func() {
				defer func() { <-m.slots }()
				m.serve(c)
			})
		default:
			_ = c.Close()
		}
	}
}

// serve greets a member and hands its connection on.
func (m *memberListener) serve(c net.Conn) {
	t := tls.Server(c, m.tls)
	ctx, cancel := context.WithTimeout(m.ctx, handshakeTimeout)
	err := t.HandshakeContext(ctx)
	cancel()
	if err != nil {
		m.log.Warn("member refused", "peer", c.RemoteAddr(), "err", err)
		_ = c.Close()
		return
	}
	switch t.ConnectionState().NegotiatedProtocol {
	case protoWire:
		m.wire.put(m.ctx, t)
	case protoEtcd:
		if m.etcd == "" {
			_ = t.Close()
			return
		}
		up, err := host.TCP{}.Dial(m.ctx, "unix:"+m.etcd)
		if err != nil {
			m.log.Warn("etcd does not answer a member", "err", err)
			_ = t.Close()
			return
		}
		splice(m.ctx, t, up)
	default:
		_ = t.Close()
	}
}

// splice copies between two connections until either ends or ctx does.
func splice(ctx context.Context, a, b net.Conn) {
	stop := context.AfterFunc(ctx, func() { _, _ = a.Close(), b.Close() })
	defer stop()
	var wg sync.WaitGroup
	for _, p := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, _ = io.Copy(p[0], p[1])
			_, _ = a.Close(), b.Close()
		})
	}
	wg.Wait()
}

// chanListener is a net.Listener of connections that were accepted elsewhere.
type chanListener struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

// Accept implements net.Listener.
func (l *chanListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *chanListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *chanListener) Addr() net.Addr { return l.addr }

func (l *chanListener) put(ctx context.Context, c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		_ = c.Close()
	case <-ctx.Done():
		_ = c.Close()
	}
}

// mixedListener serves TLS and, if plain is allowed, plain connections on one
// port, told apart by their first byte.
type mixedListener struct {
	net.Listener
	out   *chanListener
	tls   *tls.Config
	plain bool
	wg    sync.WaitGroup
	slots chan struct{}
}

func newMixedListener(l net.Listener, conf *tls.Config, plain bool) *mixedListener {
	m := &mixedListener{Listener: l, tls: conf, plain: plain, slots: make(chan struct{}, 1024)}
	m.out = &chanListener{addr: l.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	m.wg.Go(m.accept)
	return m
}

// Accept implements net.Listener.
func (m *mixedListener) Accept() (net.Conn, error) { return m.out.Accept() }

// Close implements net.Listener.
func (m *mixedListener) Close() error {
	err := m.Listener.Close()
	_ = m.out.Close()
	m.wg.Wait()
	return err
}

func (m *mixedListener) accept() {
	for {
		c, err := m.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			select {
			case <-time.After(50 * time.Millisecond):
				continue
			case <-m.out.done:
				return
			}
		}
		select {
		case m.slots <- struct{}{}:
			m.wg.Go(func() {
				defer func() { <-m.slots }()
				m.sort(c)
			})
		default:
			_ = c.Close()
		}
	}
}

// sort looks at the first byte: 22 begins a TLS handshake.
func (m *mixedListener) sort(c net.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Now()) })
	r := bufio.NewReaderSize(c, 16)
	first, err := r.Peek(1)
	stop()
	if err != nil || first[0] != 22 && !m.plain {
		_ = c.Close()
		return
	}
	var out net.Conn = &peeked{c, r}
	if first[0] == 22 {
		out = tls.Server(out, m.tls)
	}
	m.out.put(context.Background(), out)
}

// peeked is a connection whose first bytes were looked at.
type peeked struct {
	net.Conn
	r *bufio.Reader
}

// Read implements net.Conn.
func (p *peeked) Read(b []byte) (int, error) { return p.r.Read(b) }
