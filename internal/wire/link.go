package wire

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Times and bounds of a link.
const (
	dialTimeout  = 2 * time.Second
	helloTimeout = 2 * time.Second
	backoffMin   = 20 * time.Millisecond
	backoffMax   = time.Second
	tick         = 500 * time.Millisecond
	silentTicks  = 4 // without a byte after which a peer is given up (L7)
	idleTicks    = 240
	readBuffer   = 64 << 10

	// Until the server tells what it takes.
	firstWindow   = 8 << 20
	firstRequests = 256
	// Each request counts at least this much against the window.
	minCost = 256
)

// linkOptions is what a link needs; see PeersOptions.
type linkOptions struct {
	net     host.Net
	addr    string
	tls     *tls.Config
	cluster atoll.UUID
	process atoll.UUID
	log     *slog.Logger
	metrics *Metrics
}

// link is the client's end for one address. It has at most one connection,
// made when there is something to send.
type link struct {
	o    linkOptions
	ctx  context.Context // ends with close
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu struct {
		sync.Mutex // guards the fields below
		conn       *conn
		fails      int
		notBefore  time.Time // no dialing until then
		cause      error     // why the last connection could not be made
		closed     bool
	}
}

func newLink(o linkOptions) *link {
	if o.log == nil {
		o.log = slog.New(slog.DiscardHandler)
	}
	o.log = o.log.With("addr", o.addr)
	if strings.HasPrefix(o.addr, "unix:") {
		o.tls = nil
	}
	l := &link{o: o}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// current returns the connection, possibly one that is still being made. While
// backing off it returns ErrUnreachable or ErrIdentity, whatever the last
// attempt ended with.
func (l *link) current() (*conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.conn != nil {
		return l.mu.conn, nil
	}
	if l.mu.closed {
		return nil, fmt.Errorf("reach %s: %w", l.o.addr, atoll.ErrClosed)
	}
	if l.mu.cause != nil && time.Now().Before(l.mu.notBefore) {
		return nil, l.mu.cause
	}
	c := newConn(l)
	l.mu.conn = c
	l.wg.Go(c.run)
	return c, nil
}

// gone is told by a connection that it has ended, before its requests end, so
// that whoever tries again gets another. made says whether it ever worked.
func (l *link) gone(c *conn, made bool, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.conn == c {
		l.mu.conn = nil
	}
	if made {
		l.mu.fails, l.mu.cause = 0, nil
		return
	}
	wait := min(backoffMin<<min(l.mu.fails, 10), backoffMax)
	l.mu.fails++
	l.mu.cause, l.mu.notBefore = cause, time.Now().Add(wait)
}

// close ends the connection and everything outstanding, and waits for it.
func (l *link) close() {
	l.mu.Lock()
	l.mu.closed = true
	c := l.mu.conn
	l.mu.Unlock()
	l.stop()
	if c != nil {
		c.kill(fmt.Errorf("reach %s: %w", l.o.addr, atoll.ErrClosed))
	}
	l.wg.Wait()
}
