package cbd

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd"
)

const (
	blockBytes = 4096
	// connections is how many each open file uses.
	connections = 2
)

// file is an open volume.
type file struct {
	s    *servers
	path string
	user UserInfo

	mu struct {
		sync.Mutex // held for memory work only
		urls       []string
		session    string
		size       int64
		pool       *nbd.Pool // nil while there is no connection
		closed     bool
	}
	dialing  chan struct{} // holds a value while somebody connects
	renewing chan struct{} // holds one while somebody asks for the addresses again
}

// openFile opens a volume and connects to it.
func openFile(s *servers, path string, user UserInfo) (*file, error) {
	f := &file{s: s, path: path, user: user, dialing: make(chan struct{}, 1), renewing: make(chan struct{}, 1)}
	if err := f.locate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.c.ioTimeout)
	defer cancel()
	if _, err := f.connection(ctx); err != nil {
		f.close()
		return nil, fail(Failed, "%v", err)
	}
	return f, nil
}

// locate asks where the volume is served.
func (f *file) locate() error {
	a, err := f.s.call("open", f.ask(question{Precise: f.s.c.precise}))
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.urls, f.mu.session, f.mu.size = a.URLs, a.Session, a.Length
	return nil
}

// ask fills in the path and who asks.
func (f *file) ask(q question) question {
	q.Owner, q.Password, q.Path = f.user.Owner, f.user.Password, f.path
	return q
}

// connection returns the connection that there is, or makes one.
func (f *file) connection(ctx context.Context) (*nbd.Pool, error) {
	select {
	case f.dialing <- struct{}{}:
		defer func() { <-f.dialing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	f.mu.Lock()
	pool, urls, closed := f.mu.pool, f.mu.urls, f.mu.closed
	f.mu.Unlock()
	if closed {
		return nil, fail(BadFD, "the file was closed")
	}
	if pool != nil {
		return pool, nil
	}
	err := errors.New("the server tells no address")
	for _, u := range urls {
		if pool, err = nbd.Open(ctx, u, connections, nbd.DialOptions{TLS: f.s.c.dataTLS}); err == nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.mu.size = max(f.mu.size, pool.Size())
	closed = f.mu.closed
	if !closed {
		f.mu.pool = pool
	}
	f.mu.Unlock()
	if closed {
		return nil, errors.Join(fail(BadFD, "the file was closed"), pool.Close())
	}
	return pool, nil
}

// current returns the connection that there is, or nil.
func (f *file) current() *nbd.Pool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.pool
}

// drop gives up a connection that failed.
func (f *file) drop(pool *nbd.Pool) {
	f.mu.Lock()
	mine := pool != nil && f.mu.pool == pool
	if mine {
		f.mu.pool = nil
	}
	f.mu.Unlock()
	if mine {
		pool.Close()
	}
}

// run does something over a connection, again over new ones until the deadline.
func (f *file) run(do func(ctx context.Context, p *nbd.Pool) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), f.s.c.ioTimeout)
	defer cancel()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		pool, err := f.current(), error(nil)
		if pool == nil {
			pool, err = f.connection(ctx)
		}
		if err == nil {
			if err = do(ctx, pool); err == nil {
				return nil
			}
		}
		var known *failure
		if errors.As(err, &known) {
			return known
		}
		if code, passing := dataCode(err); !passing {
			return fail(code, "%v", err)
		}
		f.drop(pool)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fail(Failed, "no answer in time: %v", err)
		}
		if f.current() == nil { // nobody else has found it yet
			f.renew()
		}
	}
}

// renew asks where the volume is served now, unless another goroutine does. If
// nobody knows, the old addresses are tried until the deadline.
func (f *file) renew() {
	select {
	case f.renewing <- struct{}{}:
		defer func() { <-f.renewing }()
	default:
		return
	}
	f.mu.Lock()
	gone := f.mu.session
	f.mu.Unlock()
	if f.locate() != nil {
		return
	}
	f.mu.Lock()
	if f.mu.closed { // meanwhile, with the old session
		gone = f.mu.session
	}
	f.mu.Unlock()
	_, _ = f.s.call("close", f.ask(question{Session: gone})) // it would be forgotten anyway
}

// check refuses a range that is not in whole blocks or not in the volume.
func (f *file) check(off, n uint64) error {
	if (off|n)%blockBytes != 0 {
		return fail(NotAligned, "offset %d, length %d: want multiples of %d", off, n, blockBytes)
	}
	f.mu.Lock()
	size := uint64(f.mu.size)
	f.mu.Unlock()
	end := off + n
	if end >= off && end <= size {
		return nil
	}
	a, err := f.s.call("stat", f.ask(question{})) // it may have grown
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.mu.size = int64(a.File.Length)
	f.mu.Unlock()
	if end < off || end > a.File.Length {
		return fail(Failed, "%d bytes at %d: the volume has %d", n, off, a.File.Length)
	}
	return nil
}

// read fills p.
func (f *file) read(p []byte, off uint64) error {
	return f.run(func(ctx context.Context, c *nbd.Pool) error { return c.ReadAt(ctx, p, int64(off)) })
}

// write stores p, durably unless the configuration says otherwise.
func (f *file) write(p []byte, off uint64) error {
	fua := !f.s.c.writeback
	return f.run(func(ctx context.Context, c *nbd.Pool) error { return c.WriteAt(ctx, p, int64(off), fua) })
}

// close flushes what may not be durable yet and gives the file back.
func (f *file) close() {
	pool := f.current()
	if pool != nil && f.s.c.writeback {
		ctx, cancel := context.WithTimeout(context.Background(), f.s.c.ioTimeout)
		defer cancel()
		_ = pool.Flush(ctx) // Curve's Close knows no failure but a bad descriptor
	}
	f.mu.Lock()
	f.mu.closed = true
	pool, f.mu.pool = f.mu.pool, nil
	session := f.mu.session
	f.mu.Unlock()
	if pool != nil {
		pool.Close()
	}
	_, _ = f.s.call("close", f.ask(question{Session: session})) // the server forgets it by itself
}
