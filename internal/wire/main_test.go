package wire

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memNode is a small storage node in memory. It keeps bytes as they come and
// checks offsets and epochs only.
type memNode struct {
	id  atoll.NodeID
	inc atoll.UUID

	mu   sync.Mutex
	segs map[atoll.SegmentID]*memSeg
	fail error         // answer of every method
	hold chan struct{} // methods but Append wait for it to close
	busy int           // of these, how many have come to wait
	runs []Run
	held []*Append // appends not answered while keep is set
	keep bool
}

type memSeg struct {
	data   []byte
	epoch  atoll.Epoch
	size   atoll.BlockNo // as asked for
	sealed bool
}

func newMemNode(id atoll.NodeID) *memNode {
	return &memNode{id: id, inc: uuid(byte(id)), segs: make(map[atoll.SegmentID]*memSeg)}
}

func uuid(b byte) (u atoll.UUID) {
	for i := range u {
		u[i] = b
	}
	return u
}

func (n *memNode) Append(a *Append) {
	n.mu.Lock()
	defer n.mu.Unlock()
	a.Err = n.append(a)
	a.Queued, a.Commit = 3*time.Microsecond, 5*time.Microsecond
	if n.keep {
		n.held = append(n.held, a)
		return
	}
	a.Done <- a
}

func (n *memNode) append(a *Append) error {
	if n.fail != nil {
		return n.fail
	}
	s := n.segs[a.Seg]
	switch {
	case s == nil:
		return fmt.Errorf("segment %v: %w", a.Seg, atoll.ErrNotExist)
	case a.Epoch < s.epoch:
		return atoll.ErrFenced
	case a.Offset.Bytes() != int64(len(s.data)):
		return atoll.ErrGap
	}
	for _, p := range a.Vec.Slices() {
		s.data = append(s.data, p...)
	}
	return nil
}

// letGo answers the appends that were held back.
func (n *memNode) letGo() {
	n.mu.Lock()
	held := n.held
	n.held, n.keep = nil, false
	n.mu.Unlock()
	for _, a := range held {
		a.Done <- a
	}
}

func (n *memNode) seg(ctx context.Context, seg atoll.SegmentID) (*memSeg, error) {
	n.mu.Lock()
	hold := n.hold
	if hold != nil {
		n.busy++
	}
	n.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return nil, n.fail
	}
	s := n.segs[seg]
	if s == nil {
		return nil, fmt.Errorf("segment %v: %w", seg, atoll.ErrNotExist)
	}
	return s, nil
}

func (n *memNode) failure() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.fail
}

func (n *memNode) setFailure(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fail = err
}

// bytes returns a copy of what the node holds of a segment.
func (n *memNode) bytes(seg atoll.SegmentID) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.segs[seg]; s != nil {
		return append([]byte(nil), s.data...)
	}
	return nil
}

func (n *memNode) Create(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error {
	if err := n.failure(); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.segs[seg] = &memSeg{epoch: epoch, size: blocks}
	return nil
}

func (n *memNode) Fence(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (Tail, error) {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return Tail{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s.epoch = epoch
	return Tail{Grade: Intact, Length: s.length(), Sealed: s.sealed, Epoch: epoch, Sum: 0xCAFE, Seq: 1 << 40}, nil
}

func (s *memSeg) length() atoll.BlockNo { return atoll.BlockNo(len(s.data) / atoll.BlockSize) }

func (n *memNode) Extend(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s.data = append(s.data[:at.Bytes()], raw...)
	return nil
}

func (n *memNode) Seal(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if length > s.length() {
		return atoll.ErrGap
	}
	s.data, s.sealed = s.data[:length.Bytes()], true
	return nil
}

func (n *memNode) Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if int(block.Bytes())+len(dst) > len(s.data) {
		return fmt.Errorf("block %d: %w", block, atoll.ErrNotExist)
	}
	copy(dst, s.data[block.Bytes():])
	return nil
}

func (n *memNode) Fetch(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	p := s.data[min(int(at.Bytes()), len(s.data)):]
	p = p[:min(len(p), max)]
	b := host.Alloc(len(p))
	copy(b.Bytes(), p)
	return b, nil
}

func (n *memNode) Index(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	return n.Fetch(ctx, seg, at, max*atoll.BlockSize)
}

func (n *memNode) Repair(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, p []byte) error {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	copy(s.data[block.Bytes():], p)
	return nil
}

func (n *memNode) Discard(ctx context.Context, seg atoll.SegmentID, runs []Run) error {
	_, err := n.seg(ctx, seg)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.runs = append(n.runs, runs...)
	return err
}

func (n *memNode) Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error {
	if _, err := n.seg(ctx, seg); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.segs, seg)
	return nil
}

// List answers with made-up entries, numbered after the given one, 10000 in all.
func (n *memNode) List(ctx context.Context, after atoll.SegmentID, max int) ([]SegmentInfo, error) {
	if err := n.failure(); err != nil {
		return nil, err
	}
	var out []SegmentInfo
	for i := int(after.Ordinal) + 1; i <= 10000 && len(out) < max; i++ {
		out = append(out, madeUp(i))
	}
	return out, nil
}

func madeUp(i int) SegmentInfo {
	return SegmentInfo{
		Seg: atoll.SegmentID{Medium: 7, Ordinal: atoll.Ordinal(i), Copyset: 3}, Length: atoll.BlockNo(i),
		Size: 16384, Sealed: i%2 == 0, Damaged: i%3 == 0, Epoch: atoll.Epoch(i) << 33,
	}
}

func (n *memNode) Stat(ctx context.Context) (Stat, error) {
	if err := n.failure(); err != nil {
		return Stat{}, err
	}
	return Stat{
		Cluster: cluster, Node: n.id, Disk: uuid(0xD0), Incarnation: n.inc, Total: 1 << 50, Free: 1 << 49,
		Segments: 12345, Open: 7, ReadOnly: true, Full: true, Errors: 99, AppendP99: time.Second,
	}, nil
}

func (n *memNode) Verify(ctx context.Context, seg atoll.SegmentID) (VerifyResult, error) {
	s, err := n.seg(ctx, seg)
	if err != nil {
		return VerifyResult{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return VerifyResult{Blocks: s.length(), Damaged: []Run{{1, 2}, {30, 4}}}, nil
}

var _ Node = (*memNode)(nil)

var cluster = uuid(0xC1)

// realNet is TCP and Unix sockets as the machine has them.
type realNet struct{}

func split(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	return "tcp", addr
}

func (realNet) Dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	network, address := split(addr)
	c, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w: %w", addr, atoll.ErrUnreachable, err)
	}
	return c, nil
}

func (realNet) Listen(addr string) (net.Listener, error) { return net.Listen(split(addr)) }

// pipeNet is a network of net.Pipe for tests in a bubble.
type pipeNet struct {
	mu        sync.Mutex
	listeners map[string]*pipeListener
	dials     []time.Time
	wrap      func(net.Conn) net.Conn // of the dialing side
}

type pipeListener struct {
	addr  string
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipeNet() *pipeNet { return &pipeNet{listeners: make(map[string]*pipeListener)} }

func (n *pipeNet) Dial(ctx context.Context, addr string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[addr]
	n.dials = append(n.dials, time.Now())
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: %w", addr, atoll.ErrUnreachable)
	}
	near, far := net.Pipe()
	select {
	case l.conns <- far:
	case <-l.done:
		return nil, fmt.Errorf("dial %s: %w", addr, atoll.ErrUnreachable)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if n.wrap != nil {
		return n.wrap(near), nil
	}
	return near, nil
}

func (n *pipeNet) Listen(addr string) (net.Listener, error) {
	l := &pipeListener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
	n.mu.Lock()
	n.listeners[addr] = l
	n.mu.Unlock()
	return l, nil
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return pipeAddr(l.addr) }

type pipeAddr string

func (pipeAddr) Network() string  { return "pipe" }
func (a pipeAddr) String() string { return string(a) }

// testTLS returns configurations that trust one self-signed certificate.
func testTLS(t testing.TB) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"atoll"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13},
		&tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: "atoll", MinVersion: tls.VersionTLS13}
}

// rig is a server with some nodes, and a way to reach it.
type rig struct {
	t      testing.TB
	net    host.Net
	server *Server
	addr   string
	tls    *tls.Config
	mu     sync.Mutex
	nodes  map[atoll.NodeID]*memNode
}

func (r *rig) lookup(id atoll.NodeID) (Node, atoll.UUID, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil {
		return nil, atoll.UUID{}, false
	}
	return n, n.inc, true
}

// newRig starts a server over "tcp", "tls", "unix" or "pipe".
func newRig(t testing.TB, kind string, change func(*ServerOptions)) *rig {
	t.Helper()
	r := &rig{t: t, net: realNet{}, nodes: map[atoll.NodeID]*memNode{1: newMemNode(1), 2: newMemNode(2)}}
	o := ServerOptions{Cluster: cluster, Process: uuid(0x5E), Lookup: r.lookup}
	listen := "127.0.0.1:0"
	switch kind {
	case "tls":
		o.TLS, r.tls = testTLS(t)
	case "unix":
		listen = "unix:" + filepath.Join(t.TempDir(), "s")
	case "pipe":
		r.net, listen = newPipeNet(), "there:1"
	}
	var err error
	if o.Listener, err = r.net.Listen(listen); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&o)
	}
	r.server = Serve(o)
	r.addr = r.server.Addr().String()
	if kind == "unix" {
		r.addr = "unix:" + r.addr
	}
	t.Cleanup(func() { r.server.Close() })
	return r
}

func (r *rig) options(node atoll.NodeID) ClientOptions {
	return ClientOptions{
		Net: r.net, Addr: r.addr, TLS: r.tls, Cluster: cluster, Process: uuid(0xCC),
		Node: node, Incarnation: uuid(byte(node)),
	}
}

func (r *rig) client(node atoll.NodeID) *Client {
	c := NewClient(r.options(node))
	r.t.Cleanup(func() { c.Close() })
	return c
}

var seg1 = atoll.SegmentID{Medium: 0xABCDEF, Ordinal: 9, Copyset: 4}

// pattern returns blocks of recognisable bytes.
func pattern(seed, blocks int) []byte {
	p := make([]byte, blocks*atoll.BlockSize)
	for i := range p {
		p[i] = byte(i>>8 ^ i*7 ^ seed*31)
	}
	return p
}

// vecOf returns a Vec of a header block and the rest.
func vecOf(p []byte) *host.Vec {
	v := host.NewVec()
	for len(p) > 0 {
		n := min(len(p), atoll.BlockSize)
		if v.Size() > 0 {
			n = len(p)
		}
		b := host.Alloc(n)
		copy(b.Bytes(), p[:n])
		v.Add(b, b.Bytes())
		b.Release()
		p = p[n:]
	}
	return v
}

// appendSync appends and waits.
func appendSync(n Node, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, p []byte) *Append {
	done := make(chan *Append, 1)
	vec := vecOf(p)
	n.Append(&Append{Seg: seg, Epoch: epoch, Offset: at, Vec: vec, Done: done})
	a := <-done
	vec.Release()
	return a
}

func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: %d bytes differ from the %d expected", what, len(got), len(want))
	}
}
