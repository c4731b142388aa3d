package wire

import (
	"crypto/tls"
	"log/slog"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// PeersOptions says how a process reaches others.
type PeersOptions struct {
	Net     host.Net
	TLS     *tls.Config // nil for none; not used for "unix:" addresses
	Cluster atoll.UUID
	Process atoll.UUID // the caller's
	Conns   int        // connections per address; 0 = 1
	Log     *slog.Logger
	Metrics *Metrics
}

// Peers shares connections among the clients of many nodes: all that live behind
// one address use the same. Methods may be called concurrently.
type Peers struct {
	o  PeersOptions
	mu struct {
		sync.Mutex // guards the fields below
		addrs      map[string]*peer
		closed     bool
	}
}

// peer is an address in use.
type peer struct {
	links []*link
	refs  int
}

// NewPeers returns an empty Peers. It does not connect to anything.
func NewPeers(o PeersOptions) *Peers {
	p := &Peers{o: o}
	p.mu.addrs = make(map[string]*peer)
	return p
}

// Client returns a client for the node at addr whose disk has the given
// incarnation. The caller closes it when the node is no longer there.
func (p *Peers) Client(addr string, node atoll.NodeID, incarnation atoll.UUID) *Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.mu.addrs[addr]
	if e == nil {
		e = &peer{}
		for range max(p.o.Conns, 1) {
			e.links = append(e.links, p.newLink(addr))
		}
		p.mu.addrs[addr] = e
	}
	e.refs++
	release := sync.OnceFunc(func() { p.release(addr, e) })
	return &Client{links: e.links, node: node, incarnation: incarnation, release: release}
}

func (p *Peers) newLink(addr string) *link {
	l := newLink(linkOptions{
		net: p.o.Net, addr: addr, tls: p.o.TLS, cluster: p.o.Cluster, process: p.o.Process,
		log: p.o.Log, metrics: p.o.Metrics,
	})
	if p.mu.closed {
		l.close()
	}
	return l
}

// release drops a client's share of an address.
func (p *Peers) release(addr string, e *peer) {
	p.mu.Lock()
	e.refs--
	last := e.refs == 0 && p.mu.addrs[addr] == e
	if last {
		delete(p.mu.addrs, addr)
	}
	p.mu.Unlock()
	if last {
		e.close()
	}
}

func (e *peer) close() {
	for _, l := range e.links {
		l.close()
	}
}

// Close closes every connection, ends what is outstanding with ErrClosed, and
// waits for it. Clients that remain answer ErrClosed.
func (p *Peers) Close() error {
	p.mu.Lock()
	p.mu.closed = true
	addrs := p.mu.addrs
	p.mu.addrs = make(map[string]*peer)
	p.mu.Unlock()
	for _, e := range addrs {
		e.close()
	}
	return nil
}
