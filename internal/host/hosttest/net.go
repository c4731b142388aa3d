package hosttest

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Net is a network of simulated machines in memory. Each piece written arrives
// after a delay of its own, in order within its direction, and no two pieces
// arrive at the same nanosecond, so that in a testing/synctest bubble a seed
// repeats its history. Delays follow from the seed, the pair of machines, the
// connection's number between them and the piece's number.
//
// A Net used in a bubble must be made in it. All methods may be called
// concurrently.
type Net struct {
	seed uint64
	mu   struct {
		sync.Mutex // guards the fields below; taken before a half's own
		min, max   time.Duration
		listeners  map[string]*listener
		port       int
		cuts       map[[2]string]bool
		conns      []*conn // one of each pair, in order of their making
		made       map[[2]string]uint64
		arrivals   map[int64]struct{} // nanoseconds that are taken
	}
}

// NewNet returns a network with delays of 50 to 200 microseconds.
func NewNet(seed uint64) *Net {
	n := &Net{seed: seed}
	n.mu.min, n.mu.max = 50*time.Microsecond, 200*time.Microsecond
	n.mu.listeners = make(map[string]*listener)
	n.mu.cuts = make(map[[2]string]bool)
	n.mu.made = make(map[[2]string]uint64)
	n.mu.arrivals = make(map[int64]struct{})
	n.mu.port = 40000
	return n
}

// SetDelay sets the bounds of the delay of each piece from now on.
func (n *Net) SetDelay(lo, hi time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mu.min, n.mu.max = lo, hi
}

// Node returns the network as the machine called name sees it. The name is its
// host name. Loopback addresses and unix sockets are the machine's own.
func (n *Net) Node(name string) host.Net { return &nodeNet{net: n, name: name} }

// Cut stops what goes from one machine to another; "*" is any other machine.
// What is on its way or written meanwhile waits, as with TCP, until Heal.
func (n *Net) Cut(from, to string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mu.cuts[[2]string{from, to}] = true
}

// Partition cuts two machines from each other in both directions.
func (n *Net) Partition(a, b string) {
	n.Cut(a, b)
	n.Cut(b, a)
}

// Heal ends the cuts between two machines in both directions, named as in Cut.
func (n *Net) Heal(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.mu.cuts, [2]string{a, b})
	delete(n.mu.cuts, [2]string{b, a})
	n.resend()
}

// HealAll ends all cuts.
func (n *Net) HealAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.mu.cuts)
	n.resend()
}

// resend sends what a cut has held back.
func (n *Net) resend() {
	for _, c := range n.mu.conns {
		for _, h := range []*half{c.out, c.in} {
			if !n.isCut(h.from, h.to) {
				h.resend()
			}
		}
	}
}

// isCut reports whether nothing gets from one machine to another.
func (n *Net) isCut(from, to string) bool {
	return from != to && (n.mu.cuts[[2]string{from, to}] ||
		n.mu.cuts[[2]string{from, "*"}] || n.mu.cuts[[2]string{"*", to}])
}

// Reset breaks all connections between two machines ("*" is any) at once. What
// is on its way is lost. It returns how many there were.
func (n *Net) Reset(a, b string) int {
	n.mu.Lock()
	is := func(name, want string) bool { return want == "*" || name == want }
	var hit []*conn
	for _, c := range n.mu.conns {
		from, to := c.out.from, c.out.to
		if is(from, a) && is(to, b) || is(from, b) && is(to, a) {
			hit = append(hit, c)
		}
	}
	n.mu.Unlock()
	for _, c := range hit {
		c.out.abort()
		c.in.abort()
		n.drop(c)
	}
	return len(hit)
}

// Kill ends all that a machine's process has open: its listeners are gone and
// its connections reset.
func (n *Net) Kill(name string) {
	n.mu.Lock()
	var gone []*listener
	for _, l := range n.mu.listeners {
		if l.node == name {
			gone = append(gone, l)
		}
	}
	n.mu.Unlock()
	for _, l := range gone {
		l.Close()
	}
	n.Reset(name, "*")
}

// drop forgets a connection.
func (n *Net) drop(c *conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.mu.conns = slices.DeleteFunc(n.mu.conns, func(d *conn) bool { return d == c || d.peer == c })
}

// delay draws from rng.
func (n *Net) delay(rng *rand.Rand) time.Duration {
	return n.mu.min + time.Duration(rng.Int64N(int64(n.mu.max-n.mu.min)+1))
}

// claim returns the first free nanosecond not before t.
func (n *Net) claim(t time.Time) time.Time {
	for {
		if _, taken := n.mu.arrivals[t.UnixNano()]; !taken {
			n.mu.arrivals[t.UnixNano()] = struct{}{}
			return t
		}
		t = t.Add(1)
	}
}

// source returns randomness for one more thing that goes from one machine to
// another.
func (n *Net) source(from, to string) *rand.Rand {
	pair := [2]string{from, to}
	n.mu.made[pair]++
	h := fnv.New64a()
	h.Write([]byte(from + "\x00" + to))
	return rand.New(rand.NewPCG(n.seed^h.Sum64(), n.mu.made[pair]))
}

// nodeNet is a Net as one machine sees it.
type nodeNet struct {
	net  *Net
	name string
}

var _ host.Net = (*nodeNet)(nil)

// memAddr is an address in a Net.
type memAddr struct{ network, s string }

func (a memAddr) Network() string { return a.network }
func (a memAddr) String() string  { return a.s }

// resolve returns the machine and the key in listeners of an address.
func (m *nodeNet) resolve(addr string) (node, key string, a memAddr, err error) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if path == "" {
			return "", "", a, fmt.Errorf("%w: a unix socket needs a path", atoll.ErrInvalid)
		}
		return m.name, m.name + "\x00" + path, memAddr{"unix", path}, nil
	}
	node, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", "", a, fmt.Errorf("%w: want host:port or unix:/path", atoll.ErrInvalid)
	}
	switch node {
	case "", "0.0.0.0", "::", "127.0.0.1", "::1", "localhost":
		node = m.name
	}
	key = net.JoinHostPort(node, port)
	return node, key, memAddr{"tcp", key}, nil
}

// Listen accepts connections at one of the machine's addresses.
func (m *nodeNet) Listen(addr string) (net.Listener, error) {
	node, key, a, err := m.resolve(addr)
	if err == nil && node != m.name {
		err = fmt.Errorf("%w: that is another machine", atoll.ErrInvalid)
	}
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", addr, err)
	}
	n := m.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if base, free := strings.CutSuffix(key, ":0"); free && a.network == "tcp" {
		n.mu.port++
		key = base + ":" + strconv.Itoa(n.mu.port)
		a.s = key
	}
	if n.mu.listeners[key] != nil {
		return nil, fmt.Errorf("listen at %s: %w", addr, atoll.ErrBusy)
	}
	l := &listener{net: n, node: node, key: key, addr: a, backlog: make(chan *conn, 128), done: make(chan struct{})}
	n.mu.listeners[key] = l
	return l, nil
}

// Dial opens a connection. It takes two delays; through a cut it waits until
// ctx ends, at most atoll.RequestTimeout.
func (m *nodeNet) Dial(ctx context.Context, addr string) (net.Conn, error) {
	c, err := m.dial(ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	return c, nil
}

func (m *nodeNet) dial(ctx context.Context, addr string) (*conn, error) {
	node, key, a, err := m.resolve(addr)
	if err != nil {
		return nil, err
	}
	n := m.net
	n.mu.Lock()
	out, in := n.source(m.name, node), n.source(node, m.name)
	wait := n.delay(out) + n.delay(in)
	if n.isCut(m.name, node) || n.isCut(node, m.name) {
		wait = atoll.RequestTimeout
	} else {
		wait = time.Until(n.claim(time.Now().Add(wait)))
	}
	n.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", atoll.ErrUnreachable, context.Cause(ctx))
	}
	return n.connect(m.name, node, key, a, out, in)
}

// connect makes the two ends of a connection.
func (n *Net) connect(from, to, key string, a memAddr, out, in *rand.Rand) (*conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.isCut(from, to) || n.isCut(to, from) {
		return nil, fmt.Errorf("%w (no answer)", atoll.ErrUnreachable)
	}
	l := n.mu.listeners[key]
	if l == nil {
		return nil, fmt.Errorf("%w (%s)", atoll.ErrUnreachable, syscall.ECONNREFUSED.Error())
	}
	n.mu.port++
	local := memAddr{a.network, net.JoinHostPort(from, strconv.Itoa(n.mu.port))}
	there, back := newHalf(n, from, to, out), newHalf(n, to, from, in)
	c := newConn(there, back, local, a)
	c.peer = newConn(back, there, a, local)
	c.peer.peer = c
	select {
	case l.backlog <- c.peer:
	default:
		return nil, fmt.Errorf("%w (backlog is full)", atoll.ErrUnreachable)
	}
	n.mu.conns = append(n.mu.conns, c)
	return c, nil
}

// listener is a net.Listener of a Net.
type listener struct {
	net     *Net
	node    string
	key     string
	addr    memAddr
	backlog chan *conn
	once    sync.Once
	done    chan struct{}
}

// Accept waits for a connection.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
	default:
		select {
		case c := <-l.backlog:
			return c, nil
		case <-l.done:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: l.addr.network, Addr: l.addr, Err: net.ErrClosed}
}

// Close ends Accept and resets the connections that nobody has accepted.
func (l *listener) Close() error {
	err := error(&net.OpError{Op: "close", Net: l.addr.network, Addr: l.addr, Err: net.ErrClosed})
	l.once.Do(func() {
		err = nil
		l.net.mu.Lock()
		delete(l.net.mu.listeners, l.key)
		l.net.mu.Unlock()
		close(l.done)
		l.refuse()
	})
	return err
}

// refuse resets what waits in the backlog.
func (l *listener) refuse() {
	for {
		select {
		case c := <-l.backlog:
			c.out.abort()
			c.in.abort()
			l.net.drop(c)
		default:
			return
		}
	}
}

// Addr returns the listener's address.
func (l *listener) Addr() net.Addr { return l.addr }
