package atoll

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
	kinds "github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// closeTimeout bounds the flush of Close.
const closeTimeout = 30 * time.Second

// Volume gives the bytes of an open volume or version. Any number may have it
// open at once.
//
// When its connection breaks, or the volume moves to another server, calls go on
// over a new one, for as long as Options.RetryFor. A write may then be carried
// out twice. If writes that were not flushed may have been lost with a server, the
// next Flush or Close fails, once, with ErrIO.
type Volume struct {
	c        *Client
	name     string
	size     int64
	readOnly bool
	dialing  chan struct{} // holds a value while somebody connects

	mu struct {
		sync.Mutex // held for memory work only
		link       link
		closed     bool
		wrote      uint64 // writes that have returned
		flushed    uint64 // of these, covered by a flush
		lost       bool   // some that were not flushed may be gone
	}
}

// link is the connection of a volume to the server that has it.
type link struct {
	pool *nbd.Pool // nil while there is none
	// epoch counts the servers that have had the volume; 0 is unknown. safe tells
	// that a write is durable when it returns.
	epoch uint64
	safe  bool
}

var (
	_ io.ReaderAt = (*Volume)(nil)
	_ io.WriterAt = (*Volume)(nil)
	_ io.Closer   = (*Volume)(nil)
)

// Open opens a volume, or with NAME@VERSION a version of it, read-only.
func (c *Client) Open(ctx context.Context, name string) (*Volume, error) {
	l, err := c.connect(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", name, err)
	}
	v := &Volume{c: c, name: name, size: l.pool.Size(), readOnly: l.pool.Features().ReadOnly, dialing: make(chan struct{}, 1)}
	v.mu.link = l
	return v, nil
}

// connect finds the server that has a volume and connects to it.
func (c *Client) connect(ctx context.Context, name string) (l link, err error) {
	base, _, version := strings.Cut(name, "@")
	resp, err := c.api.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: base, Open: !version}))
	if err != nil {
		return l, err
	}
	l.epoch, l.safe = resp.Msg.Epoch, resp.Msg.Cache == "writethrough"
	err = fmt.Errorf("the server has no address that can be reached from here: %w", ErrUnavailable)
	for _, u := range resp.Msg.Urls {
		a, ok := c.reachable(u)
		if !ok {
			continue
		}
		a.Export = name
		if l.pool, err = nbd.Open(ctx, a.String(), c.o.Connections, nbd.DialOptions{TLS: c.o.TLS}); err == nil {
			return l, nil
		}
		if !errors.Is(err, ErrUnreachable) {
			break
		}
	}
	return link{}, err
}

// reachable returns the address of a URL if it means the same from here as from
// the server: sockets and loopback addresses only on the same machine.
func (c *Client) reachable(uri string) (a nbd.Address, ok bool) {
	a, err := nbd.ParseURI(uri)
	if err != nil {
		return a, false
	}
	if a.Network == "unix" {
		return a, c.local
	}
	u, err := url.Parse(uri)
	if err != nil {
		return a, false
	}
	ip := net.ParseIP(u.Hostname())
	if ip != nil && ip.IsUnspecified() { // it listens everywhere: also where we found it
		_, port, err := net.SplitHostPort(a.Addr)
		if c.host == "" || err != nil {
			return a, c.host == ""
		}
		a.Addr = net.JoinHostPort(c.host, port)
		return a, true
	}
	return a, c.local || !isLoopback(u.Hostname())
}

// Name returns the name that the volume was opened by.
func (v *Volume) Name() string { return v.name }

// Size returns the size in bytes, as it was when the volume was opened.
func (v *Volume) Size() int64 { return v.size }

// ReadOnly reports whether this is a version.
func (v *Volume) ReadOnly() bool { return v.readOnly }

// ReadAt implements io.ReaderAt.
func (v *Volume) ReadAt(p []byte, off int64) (n int, err error) {
	return v.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext is ReadAt with a context. p is not touched after it returned.
func (v *Volume) ReadAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, v.fail("read", off, int64(len(p)), ErrInvalid)
	}
	whole := len(p)
	p = p[:max(0, min(int64(len(p)), v.size-off))]
	_, err = v.do(ctx, func(ctx context.Context, c *nbd.Pool) error { return c.ReadAt(ctx, p, off) })
	if err != nil {
		return 0, v.fail("read", off, int64(whole), err)
	}
	if len(p) < whole {
		return len(p), io.EOF
	}
	return whole, nil
}

// WriteAt implements io.WriterAt. The write is durable after a Flush. It goes
// nowhere, with ErrNoSpace, if it reaches beyond the end.
func (v *Volume) WriteAt(p []byte, off int64) (n int, err error) {
	return v.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext is WriteAt with a context. p is not read after it returned.
func (v *Volume) WriteAtContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	err = v.change(ctx, "write", off, int64(len(p)), func(ctx context.Context, c *nbd.Pool) error {
		return c.WriteAt(ctx, p, off, false)
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Zero makes a range read as zeros and gives its room back. The change is
// durable after a Flush.
func (v *Volume) Zero(ctx context.Context, off, n int64) error {
	return v.change(ctx, "zero", off, n, func(ctx context.Context, c *nbd.Pool) error {
		return c.Zero(ctx, off, n, true, false)
	})
}

// Flush makes durable every write that returned before it was called.
func (v *Volume) Flush(ctx context.Context) error {
	v.mu.Lock()
	wrote := v.mu.wrote
	v.mu.Unlock()
	_, err := v.do(ctx, func(ctx context.Context, c *nbd.Pool) error { return c.Flush(ctx) })
	if err != nil {
		return fmt.Errorf("flush volume %s: %w", v.name, err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mu.flushed = max(v.mu.flushed, wrote)
	if v.mu.lost {
		v.mu.lost = false
		return fmt.Errorf("flush volume %s: its server was lost, and writes since the last flush may be with it: %w", v.name, ErrIO)
	}
	return nil
}

// Extents yields the parts of a volume in order, data and zeros in turn. An error
// is the last thing it yields.
func (v *Volume) Extents(ctx context.Context) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		const step = 64 << 30
		for off := int64(0); off < v.size; off += step {
			var parts []nbd.Extent
			_, err := v.do(ctx, func(ctx context.Context, c *nbd.Pool) (err error) {
				parts, err = c.BlockStatus(ctx, off, min(step, v.size-off))
				return err
			})
			if err != nil {
				yield(Extent{}, fmt.Errorf("extents of volume %s: %w", v.name, err))
				return
			}
			at := off
			for _, p := range parts {
				if !yield(Extent{at, p.Length, p.Zero}, nil) {
					return
				}
				at += p.Length
			}
		}
	}
}

// Close flushes what was written and closes the volume. If it fails, writes since
// the last Flush may not be durable.
func (v *Volume) Close() error {
	v.mu.Lock()
	flush := !v.mu.closed && (v.mu.wrote > v.mu.flushed || v.mu.lost)
	v.mu.Unlock()
	var err error
	if flush {
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		err = v.Flush(ctx)
	}
	v.mu.Lock()
	pool := v.mu.link.pool
	v.mu.closed, v.mu.link.pool = true, nil
	v.mu.Unlock()
	if pool != nil {
		err = errors.Join(err, pool.Close())
	}
	return err
}

// change carries out a write of some kind.
func (v *Volume) change(ctx context.Context, what string, off, n int64, fn func(context.Context, *nbd.Pool) error) error {
	switch {
	case off < 0 || n < 0:
		return v.fail(what, off, n, ErrInvalid)
	case v.readOnly:
		return v.fail(what, off, n, ErrReadOnly)
	case off > v.size || n > v.size-off:
		return v.fail(what, off, n, ErrNoSpace)
	}
	used, err := v.do(ctx, fn)
	v.mu.Lock()
	v.mu.wrote++ // not before: a flush in between does not cover it
	v.mu.lost = v.mu.lost || used.pool != nil && used.moved(v.mu.link)
	v.mu.Unlock()
	if err != nil {
		return v.fail(what, off, n, err)
	}
	return nil
}

// fail names the volume in an error.
func (v *Volume) fail(what string, off, n int64, err error) error {
	return fmt.Errorf("%s %d bytes of volume %s at %d: %w", what, n, v.name, off, err)
}

// moved reports whether what was written over l and not flushed may be gone for
// who uses now.
func (l link) moved(now link) bool {
	return !l.safe && (l.epoch == 0 || l.epoch != now.epoch) && l.pool != now.pool
}

// do calls fn with a connection, and again with new ones while they break. It
// returns the one that fn used last.
func (v *Volume) do(ctx context.Context, fn func(context.Context, *nbd.Pool) error) (link, error) {
	var giveUp <-chan time.Time
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		l, err := v.connection(ctx)
		if err == nil {
			err = fn(ctx, l.pool)
		}
		if err == nil || ctx.Err() != nil || !passing(err) {
			return l, err
		}
		if l.pool != nil {
			v.drop(l.pool)
		}
		if giveUp == nil {
			giveUp = time.After(v.c.o.RetryFor)
		}
		select {
		case <-time.After(pause):
		case <-giveUp:
			return l, err
		case <-ctx.Done():
			return l, fmt.Errorf("%w: %w", err, ctx.Err())
		}
	}
}

// passing reports whether another try over another connection may succeed.
func passing(err error) bool {
	if errors.Is(err, errClosed) {
		return false
	}
	for _, kind := range []error{ErrUnreachable, ErrClosed, ErrBusy, kinds.ErrFenced} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// errClosed is the end of a volume that its user closed.
var errClosed = fmt.Errorf("use a volume after its end: %w", ErrClosed)

// connection returns the connection that there is, or makes one.
func (v *Volume) connection(ctx context.Context) (link, error) {
	if l, err := v.current(); l.pool != nil || err != nil {
		return l, err
	}
	select {
	case v.dialing <- struct{}{}:
		defer func() { <-v.dialing }()
	case <-ctx.Done():
		return link{}, ctx.Err()
	}
	if l, err := v.current(); l.pool != nil || err != nil { // somebody else made it
		return l, err
	}
	ctx, cancel := context.WithTimeout(ctx, v.c.o.RetryFor)
	defer cancel()
	l, err := v.c.connect(ctx, v.name)
	if err != nil {
		return link{}, err
	}
	if !v.adopt(l) {
		return link{}, errors.Join(errClosed, l.pool.Close())
	}
	return l, nil
}

// adopt makes l the volume's connection, unless the volume was closed.
func (v *Volume) adopt(l link) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.mu.closed {
		return false
	}
	if v.mu.wrote > v.mu.flushed && v.mu.link.moved(l) {
		v.mu.lost = true
	}
	v.mu.link = l
	return true
}

// current returns the connection that there is.
func (v *Volume) current() (link, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.mu.closed {
		return link{}, errClosed
	}
	return v.mu.link, nil
}

// drop gives up a connection that broke.
func (v *Volume) drop(pool *nbd.Pool) {
	v.mu.Lock()
	mine := v.mu.link.pool == pool
	if mine {
		v.mu.link.pool = nil
	}
	v.mu.Unlock()
	if mine {
		pool.Close()
	}
}
