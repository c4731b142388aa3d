package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/pki"
)

// etcdProxy is a Unix socket in the data directory behind which the etcd of one
// controller answers: each connection becomes a tunnel to it.
type etcdProxy struct {
	l      net.Listener
	path   string
	member string
	tls    *tls.Config
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	log    *slog.Logger
}

const (
	// tunnelRetry is the time between tries to reach a member, and tunnelTries
	// how long they go on for one connection. The client waits meanwhile: one
	// that was turned away would stay away for longer and longer.
	tunnelRetry = 200 * time.Millisecond
	tunnelTries = 15 * time.Second
)

func startEtcdProxy(path, member string, id *pki.Identity, log *slog.Logger) (*etcdProxy, error) {
	l, err := host.TCP{}.Listen("unix:" + path)
	if err != nil {
		return nil, err
	}
	conf := id.ClientTLS("")
	conf.NextProtos = []string{protoEtcd}
	ctx, cancel := context.WithCancel(context.Background())
	p := &etcdProxy{l: l, path: path, member: member, tls: conf, ctx: ctx, cancel: cancel, log: log}
	p.wg.Go(p.accept)
	return p, nil
}

func (p *etcdProxy) close() error {
	p.cancel()
	err := p.l.Close()
	p.wg.Wait()
	return err
}

func (p *etcdProxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

func (p *etcdProxy) serve(c net.Conn) {
	ctx, cancel := context.WithTimeout(p.ctx, tunnelTries)
	defer cancel()
	again := time.NewTicker(tunnelRetry)
	defer again.Stop()
	for {
		t, err := p.dial(ctx)
		if err == nil {
			splice(p.ctx, c, t)
			return
		}
		p.log.Debug("catalog not reached", "member", p.member, "err", err)
		select {
		case <-again.C:
		case <-ctx.Done():
			_ = c.Close()
			return
		}
	}
}

// dial makes a tunnel to the member.
func (p *etcdProxy) dial(ctx context.Context) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	raw, err := host.TCP{}.Dial(ctx, p.member)
	if err != nil {
		return nil, err
	}
	t := tls.Client(raw, p.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("greet member %s: %w: %w", p.member, atoll.ErrUnreachable, err)
	}
	return t, nil
}

// proxyEtcd reaches the catalog of a cluster that this server joined, through
// whichever of its controllers answers.
func (s *Server) proxyEtcd() (*catalog.Etcd, error) {
	if len(s.home.rec.Members) == 0 {
		return nil, fmt.Errorf("no member of the cluster is known that has the catalog: %w", atoll.ErrUnavailable)
	}
	var endpoints []string
	for i, member := range s.home.rec.Members {
		p, err := startEtcdProxy(s.home.socket(fmt.Sprintf("etcd-%d.sock", i)), member, s.home.identity, s.log)
		if err != nil {
			return nil, errors.Join(err, s.closeProxies())
		}
		s.proxies = append(s.proxies, p)
		endpoints = append(endpoints, "unix://"+p.path)
	}
	s.onStop(s.closeProxies)
	kv, err := catalog.DialEtcd(endpoints, nil, s.log)
	if err != nil {
		return nil, err
	}
	s.onStop(kv.Close)
	return kv, nil
}

func (s *Server) closeProxies() error {
	var errs []error
	for _, p := range s.proxies {
		errs = append(errs, p.close())
	}
	s.proxies = nil
	return errors.Join(errs...)
}
