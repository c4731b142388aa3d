package nbd

import (
	"context"
	"errors"
	"sync/atomic"
)

// Pool spreads requests over several connections to one export. All methods may
// be called concurrently. Its guarantees are those of Client: a Flush covers
// the writes of all connections, because more than one is made only if the
// server promises so.
type Pool struct {
	clients []*Client
	next    atomic.Uint32
}

// Open connects to an export with up to conns connections, one if the server
// does not allow more.
func Open(ctx context.Context, uri string, conns int, o DialOptions) (*Pool, error) {
	p := &Pool{}
	for range max(conns, 1) {
		c, err := Dial(ctx, uri, o)
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
		p.clients = append(p.clients, c)
		if !c.Features().MultiConn {
			break
		}
	}
	return p, nil
}

// pick returns the connection of the next request.
func (p *Pool) pick() *Client {
	return p.clients[int(p.next.Add(1)%uint32(len(p.clients)))]
}

// Conns returns how many connections there are.
func (p *Pool) Conns() int { return len(p.clients) }

// Size returns the export's size in bytes.
func (p *Pool) Size() int64 { return p.clients[0].Size() }

// Blocks is as of Client.
func (p *Pool) Blocks() Blocks { return p.clients[0].Blocks() }

// Features is as of Client.
func (p *Pool) Features() Features { return p.clients[0].Features() }

// ReadAt is as of Client.
func (p *Pool) ReadAt(ctx context.Context, b []byte, off int64) error {
	return p.pick().ReadAt(ctx, b, off)
}

// WriteAt is as of Client.
func (p *Pool) WriteAt(ctx context.Context, b []byte, off int64, fua bool) error {
	return p.pick().WriteAt(ctx, b, off, fua)
}

// Flush is as of Client.
func (p *Pool) Flush(ctx context.Context) error { return p.pick().Flush(ctx) }

// Trim is as of Client.
func (p *Pool) Trim(ctx context.Context, off, n int64, fua bool) error {
	return p.pick().Trim(ctx, off, n, fua)
}

// Zero is as of Client.
func (p *Pool) Zero(ctx context.Context, off, n int64, punch, fua bool) error {
	return p.pick().Zero(ctx, off, n, punch, fua)
}

// BlockStatus is as of Client.
func (p *Pool) BlockStatus(ctx context.Context, off, n int64) ([]Extent, error) {
	return p.pick().BlockStatus(ctx, off, n)
}

// Contexts is as of Client.
func (p *Pool) Contexts(ctx context.Context) ([]string, error) { return p.clients[0].Contexts(ctx) }

// Status is as of Client.
func (p *Pool) Status(ctx context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	return p.pick().Status(ctx, name, off, n, fn)
}

// Close closes all connections.
func (p *Pool) Close() error {
	var errs []error
	for _, c := range p.clients {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}
