package server

import (
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
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/pki"
)

// etcdProxy is a Unix socket in the data directory behind which the etcd of one
// controller answers: each connection becomes a tunnel to it.
type etcdProxy struct {
	l      net.Listener
	path   string
	member atomic.Pointer[string] // the controller's address; it may become another's
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
	p := &etcdProxy{l: l, path: path, tls: conf, ctx: ctx, cancel: cancel, log: log}
	p.member.Store(&member)
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
		p.log.Debug("catalog not reached", "member", *p.member.Load(), "err", err)
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
	member := *p.member.Load()
	raw, err := host.TCP{}.Dial(ctx, member)
	if err != nil {
		return nil, err
	}
	t := tls.Client(raw, p.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("greet member %s: %w: %w", member, atoll.ErrUnreachable, err)
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
	for i, member := range spread(s.home.rec.Members, max(tunnels, len(s.home.rec.Members))) {
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

// tunnels is how many sockets there are at least, so that controllers that come
// later have one, and maxMembers how many controllers are remembered.
const (
	tunnels    = 3
	maxMembers = 7
)

// spread deals n sockets to members, each at least once if there are enough.
func spread(members []string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = members[i%len(members)]
	}
	return out
}

// remember is the list of controllers to be kept: those that are alive, then those
// that were known, which may only be away.
func remember(alive, known []string) []string {
	out := slices.Sorted(slices.Values(alive))
	for _, m := range known {
		if len(out) < maxMembers && !slices.Contains(out, m) {
			out = append(out, m)
		}
	}
	return slices.Compact(out)
}

// retarget gives controllers that are alive and to which no socket leads one that
// leads where another does, too, or to one that is not alive.
func retarget(have, alive []string) []string {
	out := slices.Clone(have)
	missing := slices.DeleteFunc(slices.Sorted(slices.Values(alive)), func(m string) bool { return slices.Contains(have, m) })
	seen := map[string]bool{}
	for i, m := range have {
		if len(missing) > 0 && (seen[m] || !slices.Contains(alive, m)) {
			out[i], missing = missing[0], missing[1:]
		}
		seen[out[i]] = true
	}
	return out
}

// learn keeps up with the cluster's controllers, for a server that is none: its
// tunnels lead to those that there are now, and they are noted for the next start.
func (s *Server) learn(ctx context.Context) {
	for {
		changed := s.cat.Changed()
		var alive []string
		for _, p := range s.cat.State().Processes {
			if slices.Contains(p.Roles, "controller") && p.Wire != "" {
				alive = append(alive, p.Wire)
			}
		}
		if err := s.learned(alive); err != nil {
			s.log.Warn("controllers not noted; the next start knows those of before", "err", err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// learned takes in which controllers are alive.
func (s *Server) learned(alive []string) error {
	members := remember(alive, s.home.rec.Members)
	if len(alive) == 0 || slices.Equal(members, s.home.rec.Members) {
		return nil
	}
	have := make([]string, len(s.proxies))
	for i, p := range s.proxies {
		have[i] = *p.member.Load()
	}
	for i, m := range retarget(have, alive) {
		s.proxies[i].member.Store(&m)
	}
	s.log.Info("controllers of the cluster changed", "members", members)
	s.home.rec.Members = members
	return s.home.save()
}
