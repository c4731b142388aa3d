package wire

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

// cutNet breaks the first connection after a number of bytes in one direction.
type cutNet struct {
	host.Net
	in, out int64 // bytes until the cut; 0 = never
	dials   atomic.Int32
}

func (n *cutNet) Dial(ctx context.Context, addr string) (net.Conn, error) {
	c, err := n.Net.Dial(ctx, addr)
	if err != nil || n.dials.Add(1) > 1 {
		return c, err
	}
	cut := &cutConn{Conn: c}
	cut.in.Store(n.in)
	cut.out.Store(n.out)
	return cut, nil
}

type cutConn struct {
	net.Conn
	in, out atomic.Int64
}

func limit(left *atomic.Int64, n int) int {
	l := left.Load()
	if l == 0 {
		return n
	}
	return int(min(int64(n), l-1))
}

// use counts n bytes; false when the time for the cut has come.
func use(left *atomic.Int64, n int) bool {
	return left.Load() == 0 || left.Add(-int64(n)) > 1
}

func (c *cutConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p[:limit(&c.in, len(p))])
	if !use(&c.in, n) {
		c.Conn.Close()
	}
	return n, err
}

func (c *cutConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p[:limit(&c.out, len(p))])
	if !use(&c.out, n) {
		c.Conn.Close()
		return n, io.ErrClosedPipe
	}
	return n, err
}

// TestCutMidFrame breaks the connection after every few bytes, in both
// directions, with appends, reads and repairs outstanding. All must end with
// ErrUnreachable or done, no foreign bytes may be returned, and the next request
// must work on a new connection.
func TestCutMidFrame(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 40 {
		cut := int64(i*5 + 2)
		if i >= 25 {
			cut = 2 + rng.Int64N(60000)
		}
		cutOnce(t, 0, cut)
		cutOnce(t, cut, 0)
	}
}

func cutOnce(t *testing.T, in, out int64) {
	t.Helper()
	r := newRig(t, "tcp", nil)
	defer r.server.Close()
	node, other := r.nodes[1], atoll.SegmentID{Medium: 5}
	data := pattern(3, 4)
	node.mu.Lock()
	node.segs[seg1], node.segs[other] = &memSeg{data: append([]byte(nil), data...)}, &memSeg{}
	node.mu.Unlock()
	o := r.options(1)
	o.Net = &cutNet{Net: r.net, in: in, out: out}
	c := NewClient(o)
	defer c.Close()
	ctx := ctxFor(t)
	check := func(what string, err error) {
		if err != nil && (!errors.Is(err, atoll.ErrUnreachable) || errors.Is(err, atoll.ErrCorrupt)) {
			t.Errorf("cut in=%d out=%d: %s: %v", in, out, what, err)
		}
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			dst := make([]byte, len(data))
			err := c.Read(ctx, seg1, 0, dst)
			check("read", err)
			if err == nil {
				equal(t, "read", dst, data)
			}
		})
	}
	wg.Go(func() { check("append", appendSync(c, other, 1, 0, pattern(4, 2)).Err) })
	wg.Go(func() { check("repair", c.Repair(ctx, seg1, 0, data)) })
	wg.Wait()
	dst := make([]byte, len(data))
	var err error
	for ctx.Err() == nil { // backing off at first, if it never came to a connection
		if err = c.Read(ctx, seg1, 0, dst); err == nil {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	must(t, err)
	equal(t, "read after the cut", dst, data)
}

// rawHello connects without a Client and says hello.
func rawHello(t *testing.T, r *rig) net.Conn {
	t.Helper()
	c, err := r.net.Dial(ctxFor(t), r.addr)
	must(t, err)
	m := hello{min: 1, max: 1, cluster: cluster}
	var body [helloSize]byte
	m.encode(body[:])
	_, err = c.Write(frameOf(header{method: mHello}, body[:], nil))
	must(t, err)
	reply := make([]byte, headerSize+helloReplySize)
	_, err = io.ReadFull(c, reply)
	must(t, err)
	return c
}

func frameOf(h header, body, payload []byte) []byte {
	p := make([]byte, headerSize)
	h.body, h.payload = len(body), len(payload)
	if len(body) > 0 {
		h.bodyCRC = checksum(body)
	}
	encodeHeader(p, &h)
	return append(append(p, body...), payload...)
}

func requestFrame(m method, id uint64, q request, payload []byte) []byte {
	q.node, q.incarnation, q.timeout = 1, uuid(1), time.Second
	body := make([]byte, q.size())
	q.encode(body)
	return frameOf(header{method: m, id: id}, body, payload)
}

// TestGarbage sends rubbish and damaged frames: the connection ends, the server
// lives on, and the node sees nothing of it.
func TestGarbage(t *testing.T) {
	r := newRig(t, "tcp", nil)
	good := requestFrame(mAppend, 1, request{seg: seg1, epoch: 1}, pattern(1, 2))
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		p := append([]byte(nil), good...)
		at := rng.IntN(headerSize + requestSize) // under a CRC of the frame
		p[at] ^= byte(1 + rng.IntN(255))
		var c net.Conn
		if i%4 == 0 {
			var err error
			c, err = r.net.Dial(ctxFor(t), r.addr)
			must(t, err)
		} else {
			c = rawHello(t, r)
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		c.Write(p)
		if n, err := io.Copy(io.Discard, c); err == nil && n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("byte %d changed: %d bytes of answer, %v", at, n, err)
		}
		c.Close()
	}
	hasty := newRig(t, "tcp", func(o *ServerOptions) { o.Hello = 50 * time.Millisecond })
	silent, err := hasty.net.Dial(ctxFor(t), hasty.addr) // says nothing: hello times out
	must(t, err)
	silent.SetDeadline(time.Now().Add(time.Minute))
	if _, err := silent.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("silent connection: %v", err)
	}
	silent.Close()
	if r.nodes[1].bytes(seg1) != nil {
		t.Error("the node was reached")
	}
	if _, err := r.client(1).Ping(ctxFor(t)); err != nil {
		t.Errorf("server after garbage: %v", err)
	}
}

// TestTooManyConnections: one more than allowed is closed at once.
func TestTooManyConnections(t *testing.T) {
	r := newRig(t, "tcp", func(o *ServerOptions) { o.Conns = 1 })
	first := rawHello(t, r)
	defer first.Close()
	c, err := r.net.Dial(ctxFor(t), r.addr)
	must(t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("second connection: %v", err)
	}
}

// TestSlowReader: a peer that sends reads and takes no answers makes the server
// stop reading within its window, and is closed after a while.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 1 << 20
		r := newRig(t, "pipe", func(o *ServerOptions) { o.Window = window })
		r.nodes[1].segs[seg1] = &memSeg{data: pattern(1, 16)}
		c := rawHello(t, r)
		defer c.Close()
		c.SetWriteDeadline(time.Now().Add(5 * time.Second))
		sent := 0
		for {
			if _, err := c.Write(requestFrame(mRead, uint64(sent+1), request{seg: seg1, count: 16}, nil)); err != nil {
				break
			}
			sent++
		}
		if sent < window/(20*atoll.BlockSize) || sent > window/(16*atoll.BlockSize)+3 {
			t.Errorf("server took %d requests of 64 KiB with a window of %d", sent, window)
		}
		time.Sleep(12 * time.Second)
		synctest.Wait()
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Errorf("connection not closed: %v", err)
		}
		if n, err := r.client(1).Ping(context.Background()); err != nil {
			t.Errorf("others: %v %v", n, err)
		}
		r.server.Close()
	})
}

// stopServer answers hello and then nothing.
func stopServer(t *testing.T, l net.Listener, wg *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			io.ReadFull(c, make([]byte, headerSize+helloSize))
			w := welcome{version: 1, window: 1 << 20, requests: 8, cluster: cluster}
			body := make([]byte, w.size())
			w.encode(body)
			c.Write(frameOf(header{method: mHello, reply: true}, body, nil))
			io.Copy(io.Discard, c)
		})
	}
}

// TestSilentPeer: a stopped process is given up after about two seconds, however
// long the callers would wait, and limits on what is outstanding hold meanwhile.
func TestSilentPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPipeNet()
		l, _ := n.Listen("x:1")
		var wg sync.WaitGroup
		wg.Go(func() { stopServer(t, l, &wg) })
		c := NewClient(ClientOptions{Net: n, Addr: "x:1", Cluster: cluster, Node: 1})
		start := time.Now()
		if _, err := c.Ping(timeout(t, 100*time.Millisecond)); !errors.Is(err, atoll.ErrTimeout) || time.Since(start) != 100*time.Millisecond {
			t.Errorf("ping: %v after %v", err, time.Since(start))
		}
		done := make(chan *Append, 20)
		vec := vecOf(pattern(1, 2))
		for range 20 {
			c.Append(&Append{Seg: seg1, Vec: vec, Done: done})
		}
		busy, lost := 0, 0
		for range 20 {
			switch a := <-done; {
			case errors.Is(a.Err, atoll.ErrBusy):
				busy++
			case errors.Is(a.Err, atoll.ErrUnreachable):
				lost++
			default:
				t.Errorf("append: %v", a.Err)
			}
		}
		if took := time.Since(start); took > 3*time.Second || busy != 12 || lost != 8 {
			t.Errorf("%d busy, %d lost after %v", busy, lost, took)
		}
		vec.Release()
		c.Close()
		l.Close()
		wg.Wait()
	})
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// TestPartition cuts a machine off with requests outstanding: they end within
// about two seconds, and after the cut is healed requests work again.
func TestPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := hosttest.NewNet(1)
		l, err := n.Node("b").Listen("b:1")
		must(t, err)
		node := newMemNode(1)
		s := Serve(ServerOptions{Listener: l, Cluster: cluster, Lookup: func(atoll.NodeID) (Node, atoll.UUID, bool) {
			return node, node.inc, true
		}})
		c := NewClient(ClientOptions{Net: n.Node("a"), Addr: "b:1", Cluster: cluster, Node: 1, Incarnation: node.inc})
		ctx := context.Background()
		must(t, c.Create(ctx, seg1, 1, 8))
		must(t, appendSync(c, seg1, 1, 0, pattern(1, 2)).Err)
		if rtt, err := c.Ping(ctx); err != nil || rtt < 100*time.Microsecond || rtt > time.Millisecond {
			t.Errorf("ping %v %v", rtt, err)
		}
		n.Partition("a", "b")
		start := time.Now()
		if a := appendSync(c, seg1, 1, 2, pattern(2, 2)); !errors.Is(a.Err, atoll.ErrUnreachable) || time.Since(start) > 3*time.Second {
			t.Errorf("append: %v after %v", a.Err, time.Since(start))
		}
		n.HealAll()
		time.Sleep(2 * backoffMax)
		must(t, c.Read(ctx, seg1, 0, make([]byte, 2*atoll.BlockSize)))
		c.Close()
		s.Close()
	})
}

// TestBackoff: with nobody there, requests fail at once, and dialing slows down.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPipeNet()
		c := NewClient(ClientOptions{Net: n, Addr: "x:1", Cluster: cluster, Node: 1})
		defer c.Close()
		start := time.Now()
		for time.Since(start) < 10*time.Second {
			if err := c.Create(context.Background(), seg1, 1, 1); !errors.Is(err, atoll.ErrUnreachable) {
				t.Fatalf("create: %v", err)
			}
			if a := appendSync(c, seg1, 1, 0, pattern(1, 1)); !errors.Is(a.Err, atoll.ErrUnreachable) {
				t.Fatalf("append: %v", a.Err)
			}
			time.Sleep(time.Millisecond)
		}
		if d := len(n.dials); d < 10 || d > 17 {
			t.Errorf("%d dials in 10 s", d)
		}
		last := n.dials[len(n.dials)-1].Sub(n.dials[len(n.dials)-2])
		if last < backoffMax || last > backoffMax+10*time.Millisecond {
			t.Errorf("last interval %v", last)
		}
	})
}

// TestCancelMidPayload: a read whose context ends while its answer is arriving
// returns at once, its memory is not touched afterwards, and the connection goes
// on.
func TestCancelMidPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPipeNet()
		var gate gateConn
		n.wrap = func(c net.Conn) net.Conn { gate.Conn = c; return &gate }
		r := newRigOn(t, n)
		r.nodes[1].segs[seg1] = &memSeg{data: pattern(1, 64)}
		c := NewClient(r.options(1))
		if _, err := c.Ping(context.Background()); err != nil {
			t.Fatal(err)
		}
		gate.left.Store(100000) // then the network stalls
		dst := make([]byte, 64*atoll.BlockSize)
		start := time.Now()
		err := c.Read(timeout(t, 300*time.Millisecond), seg1, 0, dst)
		if !errors.Is(err, atoll.ErrTimeout) || !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 310*time.Millisecond {
			t.Errorf("read: %v after %v", err, time.Since(start))
		}
		for i := range dst {
			dst[i] = 0x55
		}
		gate.left.Store(0)
		gate.SetReadDeadline(time.Unix(1, 0)) // wakes the gate
		other := make([]byte, atoll.BlockSize)
		must(t, c.Read(timeout(t, time.Second), seg1, 7, other))
		equal(t, "next read", other, pattern(1, 64)[7*atoll.BlockSize:8*atoll.BlockSize])
		for _, b := range dst {
			if b != 0x55 {
				t.Fatal("memory was touched after the call returned")
			}
		}
		if len(n.dials) != 1 {
			t.Errorf("%d connections", len(n.dials))
		}
		c.Close()
		r.server.Close()
	})
}

// gateConn lets left more bytes in and then only waits; 0 lets all in.
type gateConn struct {
	net.Conn
	left atomic.Int64
}

func (g *gateConn) Read(p []byte) (int, error) {
	l := g.left.Load()
	if l == 0 {
		return g.Conn.Read(p)
	}
	if l == 1 {
		var none [0]byte
		for g.left.Load() == 1 {
			if _, err := g.Conn.Read(none[:]); err != nil {
				return 0, err
			}
			time.Sleep(time.Millisecond)
		}
		return 0, nil
	}
	n, err := g.Conn.Read(p[:min(int64(len(p)), l-1)])
	g.left.CompareAndSwap(l, l-int64(n))
	return n, err
}

// newRigOn is newRig over an existing network.
func newRigOn(t testing.TB, n *pipeNet) *rig {
	r := &rig{t: t, net: n, addr: "there:1", nodes: map[atoll.NodeID]*memNode{1: newMemNode(1)}}
	l, _ := n.Listen(r.addr)
	r.server = Serve(ServerOptions{Listener: l, Cluster: cluster, Lookup: r.lookup})
	return r
}

// TestWindow: beyond the window appends are refused with ErrBusy, and other
// requests wait for room.
func TestWindow(t *testing.T) {
	r := newRig(t, "tcp", func(o *ServerOptions) { o.Requests = 4 })
	c, node, ctx := r.client(1), r.nodes[1], ctxFor(t)
	must(t, c.Create(ctx, seg1, 1, 100))
	node.mu.Lock()
	node.keep = true
	node.mu.Unlock()
	done, vec := make(chan *Append, 8), vecOf(pattern(1, 1))
	for i := range 5 {
		c.Append(&Append{Seg: seg1, Epoch: 1, Offset: atoll.BlockNo(i), Vec: vec, Done: done})
	}
	if a := <-done; !errors.Is(a.Err, atoll.ErrBusy) || a.Offset != 4 {
		t.Fatalf("append %d: %v", a.Offset, a.Err)
	}
	if err := c.Read(timeout(t, 30*time.Millisecond), seg1, 0, make([]byte, 4096)); !errors.Is(err, atoll.ErrTimeout) {
		t.Errorf("read without room: %v", err)
	}
	errs := make(chan error)
	go func() { errs <- c.Read(ctx, seg1, 0, make([]byte, 4096)) }()
	for {
		node.mu.Lock()
		n := len(node.held)
		node.mu.Unlock()
		if n == 4 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	node.letGo()
	must(t, <-errs)
	for range 4 {
		must(t, (<-done).Err)
	}
	vec.Release()
}

// TestCloseDrains: requests under way when the server closes are answered; after
// the patience ends they are broken off.
func TestCloseDrains(t *testing.T) {
	for _, patient := range []bool{true, false} {
		r := newRig(t, "tcp", func(o *ServerOptions) {
			o.Drain = time.Minute
			if !patient {
				o.Drain = 20 * time.Millisecond
			}
		})
		c, node := r.client(1), r.nodes[1]
		node.mu.Lock()
		node.segs[seg1] = &memSeg{data: pattern(1, 1)}
		node.keep, node.hold = true, make(chan struct{})
		node.mu.Unlock()
		done, errs, vec := make(chan *Append, 1), make(chan error, 1), vecOf(pattern(2, 1))
		c.Append(&Append{Seg: seg1, Epoch: 1, Offset: 1, Vec: vec, Done: done})
		go func() { errs <- c.Read(ctxFor(t), seg1, 0, make([]byte, 4096)) }()
		for arrived := false; !arrived; time.Sleep(time.Millisecond) {
			node.mu.Lock()
			arrived = node.busy == 1 && len(node.held) == 1
			node.mu.Unlock()
		}
		closed := make(chan error, 1)
		go func() { closed <- r.server.Close() }()
		<-r.server.done
		letGo := sync.OnceFunc(func() {
			close(node.hold)
			node.letGo()
		})
		if patient {
			time.Sleep(20 * time.Millisecond) // it is waited for
			letGo()
		}
		errRead, errAppend := <-errs, (<-done).Err
		letGo()
		must(t, <-closed)
		if patient && (errRead != nil || errAppend != nil) {
			t.Errorf("read: %v, append: %v", errRead, errAppend)
		}
		if !patient && (!errors.Is(errRead, atoll.ErrUnreachable) || !errors.Is(errAppend, atoll.ErrUnreachable)) {
			t.Errorf("after patience: read: %v, append: %v", errRead, errAppend)
		}
		vec.Release()
	}
}

// TestC29ReleasedBuffers appends with buffers that are released, and in race
// builds overwritten, as soon as the append came back, also when the connection
// is lost meanwhile.
func TestC29ReleasedBuffers(t *testing.T) {
	r := newRig(t, "tcp", nil)
	c := r.client(1)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			appendMany(t, c, atoll.SegmentID{Medium: 2, Ordinal: atoll.Ordinal(i + 1)}, 100)
		})
	}
	wg.Wait()
	for i := range 20 {
		o := r.options(2)
		o.Net = &cutNet{Net: r.net, out: int64(5000 + 3000*i)}
		c := NewClient(o)
		done := make(chan *Append, 16)
		for j := range 16 {
			vec := vecOf(pattern(j, 2))
			c.Append(&Append{Seg: seg1, Offset: atoll.BlockNo(j), Vec: vec, Done: done})
			vec.Release()
		}
		for range 16 {
			<-done
		}
		c.Close()
	}
}

// TestClosed: after Close everything answers ErrClosed, and what was outstanding
// has ended with it.
func TestClosed(t *testing.T) {
	r := newRig(t, "tcp", nil)
	c, node := NewClient(r.options(1)), r.nodes[1]
	node.mu.Lock()
	node.segs[seg1], node.keep = &memSeg{}, true
	node.mu.Unlock()
	done, vec := make(chan *Append, 1), vecOf(pattern(1, 1))
	c.Append(&Append{Seg: seg1, Vec: vec, Done: done})
	c.Close()
	c.Close()
	if a := <-done; !errors.Is(a.Err, atoll.ErrClosed) && !errors.Is(a.Err, atoll.ErrUnreachable) {
		t.Errorf("outstanding: %v", a.Err)
	}
	if a := appendSync(c, seg1, 0, 0, pattern(1, 1)); !errors.Is(a.Err, atoll.ErrClosed) {
		t.Errorf("append: %v", a.Err)
	}
	if err := c.Create(ctxFor(t), seg1, 1, 1); !errors.Is(err, atoll.ErrClosed) {
		t.Errorf("create: %v", err)
	}
	vec.Release()
	for {
		node.mu.Lock()
		n := len(node.held)
		node.mu.Unlock()
		if n == 1 || r.idle() {
			break
		}
		time.Sleep(time.Millisecond)
	}
	node.letGo()
}

// idle reports whether the server has no session left.
func (r *rig) idle() bool {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return len(r.server.mu.sessions) == 0
}
