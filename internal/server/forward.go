package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// What belongs to one medium is done by the process that owns it. A server that
// is asked for a medium of another passes the call on to that one's API, with
// its member certificate as the credential, and the answer or error back. A call
// is passed on once: whoever gets it does it, or says that it cannot.

// neighbours are clients of the other servers' APIs, made when they are needed.
type neighbours struct {
	s  *Server
	mu struct {
		sync.Mutex
		clients map[string]*api.Client
	}
}

func newNeighbours(s *Server) *neighbours {
	n := &neighbours{s: s}
	n.mu.clients = map[string]*api.Client{}
	return n
}

// client returns a client of the API at addr.
func (n *neighbours) client(addr string) (*api.Client, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.mu.clients[addr]; c != nil {
		return c, nil
	}
	c, err := api.NewClient("https://"+addr, api.Credential{}, n.s.home.identity.ClientTLS(""))
	if err != nil {
		return nil, err
	}
	n.mu.clients[addr] = c
	return c, nil
}

// close drops the connections.
func (n *neighbours) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.mu.clients {
		c.Close()
	}
	n.mu.clients = map[string]*api.Client{}
	return nil
}

// neighbour is another server, as the owner of a medium.
type neighbour struct {
	*api.Client
	proc catalog.Process
}

// owner returns the server that owns a medium now, or nil if it is this one's to
// deal with: it owns it, nobody does, or the call was passed on already.
func (b *backend) owner(ctx context.Context, id atoll.MediumID) (*neighbour, error) {
	if api.Forwarded(ctx) {
		return nil, nil
	}
	return b.ownerOf(ctx, id)
}

// ownerOf returns the other server that owns a medium now, nil if there is none.
func (b *backend) ownerOf(ctx context.Context, id atoll.MediumID) (*neighbour, error) {
	if b.s.volumes.owns(id) {
		return nil, nil
	}
	h, err := b.s.cat.Head(ctx, id)
	if err != nil {
		return nil, err
	}
	p, alive := b.s.cat.State().Processes[h.Process]
	if !alive || p.ID == b.s.session().ID() || p.API == "" {
		return nil, nil
	}
	c, err := b.s.neighbours.client(p.API)
	return &neighbour{c, p}, err
}

// forward has the owner of a medium answer a call. done is false when it is this
// server's to answer, also since the owner has turned out to be dead.
func forward[Q, R any](ctx context.Context, b *backend, rec catalog.Medium, q *Q,
	method func(*api.Client) func(context.Context, *connect.Request[Q]) (*connect.Response[R], error)) (r *R, done bool, err error) {
	n, err := b.owner(ctx, rec.ID)
	if err != nil || n == nil {
		return nil, err != nil, err
	}
	return passTo(ctx, b, n, rec, q, method)
}

// passTo is forward to a server that is known.
func passTo[Q, R any](ctx context.Context, b *backend, n *neighbour, rec catalog.Medium, q *Q,
	method func(*api.Client) func(context.Context, *connect.Request[Q]) (*connect.Response[R], error)) (r *R, done bool, err error) {
	resp, err := method(n.Client)(api.Forwarding(ctx), connect.NewRequest(q))
	switch {
	case err == nil:
		return resp.Msg, true, nil
	case api.Unsent(err) && b.died(ctx, n.proc.ID):
		return nil, false, nil
	case errors.Is(err, atoll.ErrUnreachable) && api.Hint(err) == "":
		err = api.WithHint(fmt.Errorf("server %s (%s), which has %q open: %w", n.proc.Host, n.proc.API, rec.Name, err),
			fmt.Sprintf("if it is dead, its volumes are free %s after its end", atoll.LeaseTTL))
	}
	return nil, true, b.s.volumes.elsewhere(ctx, rec, err)
}

// died waits for the lease of a process to end that nobody listens for any more,
// and reports whether it has.
func (b *backend) died(ctx context.Context, id atoll.UUID) bool {
	limit := time.NewTimer(atoll.LeaseTTL + time.Second)
	defer limit.Stop()
	for {
		changed := b.s.cat.Changed()
		if _, alive := b.s.cat.State().Processes[id]; !alive {
			return true
		}
		select {
		case <-changed:
		case <-limit.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// others calls do for a client of each other server that is alive, at once, and
// joins their errors.
func (b *backend) others(ctx context.Context, do func(*api.Client) error) error {
	if api.Forwarded(ctx) {
		return nil
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, p := range b.s.cat.State().Processes {
		if p.ID == b.s.session().ID() || p.API == "" {
			continue
		}
		wg.Go(func() {
			c, err := b.s.neighbours.client(p.API)
			if err == nil {
				err = do(c)
			}
			if err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("server %s (%s): %w", p.Host, p.API, err))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
