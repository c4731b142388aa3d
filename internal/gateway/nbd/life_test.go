package nbd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

// eventually waits until fn is true.
func eventually(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !fn(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// A write that hangs when its connection dies is cancelled before the next
// client gets the export, so it cannot land later (N4).
func TestLostConnection(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	hung, cancelled := make(chan struct{}), atomic.Bool{}
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		if op == "write" && off == 4096 {
			close(hung)
			<-ctx.Done()
			cancelled.Store(true)
			return ctx.Err()
		}
		return nil
	}
	s, uri := serveUnix(t, sh, "disk", Options{Grace: time.Hour})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	w.command(cmdWrite, 0, 4096, 1, []byte{1})
	<-hung
	if all := s.Connections(); len(all) != 1 || all[0].InFlight != 1 || all[0].Export != "disk" {
		t.Errorf("connections %+v", all)
	}
	w.nc.Close()
	eventually(t, "the server sees the loss", func() bool { return s.list()[0].isGone(m) })
	c := dial(t, uri, DialOptions{})
	if !cancelled.Load() {
		t.Fatal("the new client was let in beside the old one's write")
	}
	if err := c.WriteAt(t.Context(), make([]byte, 10), 0, false); err != nil {
		t.Fatal(err)
	}
}

// A device that ignores cancellation keeps the next client out, with an error.
func TestLostConnectionStuck(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	hung, release := make(chan struct{}), make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		if op == "write" {
			close(hung)
			<-release
		}
		return nil
	}
	s, uri := serveUnix(t, sh, "disk", Options{Grace: time.Millisecond, OpenTimeout: 50 * time.Millisecond})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	w.command(cmdWrite, 0, 4096, 1, []byte{1})
	<-hung
	w.nc.Close()
	eventually(t, "the server sees the loss", func() bool { return s.list()[0].isGone(m) })
	_, err := Dial(t.Context(), uri, DialOptions{})
	if !errors.Is(err, atoll.ErrBusy) || !strings.Contains(err.Error(), "lost connection") {
		t.Error(err)
	}
	close(release)
	eventually(t, "the connection ends", func() bool { return len(s.Connections()) == 0 })
	eventually(t, "the next client is let in", func() bool {
		c, err := Dial(t.Context(), uri, DialOptions{})
		return err == nil && c.Close() == nil
	})
}

// Close lets requests in flight end and answers new ones with ESHUTDOWN.
func TestDrain(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	hung, release := make(chan struct{}), make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		if op == "write" {
			close(hung)
			<-release
		}
		return nil
	}
	s, uri := serveUnix(t, sh, "disk", Options{})
	c := dial(t, uri, DialOptions{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.WriteAt(t.Context(), []byte{1}, 0, false); err != nil {
			t.Error(err)
		}
	})
	<-hung
	wg.Go(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	<-s.drain
	if err := c.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, atoll.ErrClosed) {
		t.Error(err)
	}
	close(release)
	wg.Wait()
	if err := c.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, atoll.ErrUnreachable) {
		t.Error(err)
	}
}

// A drain that takes too long is cut off.
func TestDrainCut(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	hung := make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		close(hung)
		<-ctx.Done()
		return ctx.Err()
	}
	s, uri := serveUnix(t, sh, "disk", Options{DrainTimeout: 20 * time.Millisecond})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	w.command(cmdFlush, 0, 0, 0, nil)
	<-hung
	if err := s.Close(); !errors.Is(err, atoll.ErrTimeout) {
		t.Error(err)
	}
}

// DISC ends a connection only after the requests before it.
func TestDisconnectDrains(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	release := make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		<-release
		return ctx.Err()
	}
	_, uri := serveUnix(t, sh, "disk", Options{})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	for range 3 {
		w.command(cmdWrite, 0, 0, 1, []byte{1})
	}
	w.command(cmdDisconnect, 0, 0, 0, nil)
	time.AfterFunc(10*time.Millisecond, func() { close(release) })
	for range 3 {
		w.simple(0)
	}
	w.closed()
}

func TestLimits(t *testing.T) {
	sh, _ := newShelf("disk", 1<<20)
	s, uri := serveUnix(t, sh, "disk", Options{MaxConnections: 1})
	w := rawConn(t, uri, bothFlags)
	a, _ := ParseURI(uri)
	nc, err := net.Dial(a.Network, a.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	(&wire{t, nc}).closed() // one too many
	w.nc.Close()
	const short = 100 * time.Millisecond
	sh, _ = newShelf("disk", 1<<20)
	s, uri = serveUnix(t, sh, "disk", Options{HandshakeTimeout: short})
	a, _ = ParseURI(uri)
	if nc, err = net.Dial(a.Network, a.Addr); err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	w = &wire{t, nc}
	w.read(18)
	w.closed() // too slow
	eventually(t, "the slow one is gone", func() bool { return len(s.Connections()) == 0 })
	var c *Client
	eventually(t, "another is quick enough", func() bool {
		c, err = Dial(t.Context(), uri, DialOptions{})
		return err == nil
	})
	defer c.Close()
	time.Sleep(2 * short) // no such deadline in transmission
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !s.Disconnect(s.Connections()[0].ID) || s.Disconnect(4711) {
		t.Error("disconnect")
	}
	eventually(t, "the client notices", func() bool { return c.Flush(t.Context()) != nil })
}

// The byte budget holds back a client that sends more, and lets through one
// request that is larger than all of it.
func TestBudget(t *testing.T) {
	sh, m := newShelf("disk", 64<<20)
	var running, most atomic.Int64
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		now := running.Add(n)
		for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
		}
		time.Sleep(time.Millisecond)
		running.Add(-n)
		return nil
	}
	_, uri := serveUnix(t, sh, "disk", Options{MaxBytes: 256 << 10})
	c := dial(t, uri, DialOptions{})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			if err := c.WriteAt(t.Context(), make([]byte, 64<<10), int64(i)<<16, false); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() > 256<<10 {
		t.Errorf("%d bytes at once", most.Load())
	}
	if err := c.WriteAt(t.Context(), make([]byte, 1<<20), 0, false); err != nil {
		t.Error(err)
	}
}

// Reads and writes allocate nothing in steady state, on either side.
func TestNoAllocations(t *testing.T) {
	if atoll.Invariants {
		t.Skip("the race detector allocates")
	}
	sh, _ := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{Metrics: NewMetrics(prometheus.NewRegistry())})
	buffers := hosttest.Allocs(1000, func() {
		host.Alloc(4096).Release() // one for the write,
		host.Alloc(4096).Release() // one for the read
	})
	for _, o := range []DialOptions{{}, {NoStructured: true}} {
		c := dial(t, uri, o)
		p := make([]byte, 4096)
		n := hosttest.Allocs(2000, func() {
			if err := errors.Join(c.WriteAt(t.Context(), p, 8192, false), c.ReadAt(t.Context(), p, 8192)); err != nil {
				t.Fatal(err)
			}
		})
		if n >= 1+buffers {
			t.Errorf("%v allocations for a write and a read, %v of them for buffers", n, buffers)
		}
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	sh, _ := newShelf("disk", 1<<20)
	s, uri := serveUnix(t, sh, "disk", Options{Metrics: NewMetrics(reg)})
	c := dial(t, uri, DialOptions{})
	c.WriteAt(t.Context(), make([]byte, 4096), 0, false)
	c.ReadAt(t.Context(), make([]byte, 512), 0)
	c.call(t.Context(), header{typ: cmdRead, off: 1 << 20, n: 1}, nil, nil)
	all := map[string]float64{}
	read := func() {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.Metric {
				name := f.GetName()
				for _, l := range m.Label {
					name += " " + l.GetValue()
				}
				all[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	want := map[string]float64{
		"atoll_nbd_connections": 1, "atoll_nbd_request_duration_seconds write": 1, "atoll_nbd_request_duration_seconds read": 2,
		"atoll_nbd_bytes_total write": 4096, "atoll_nbd_bytes_total read": 512, "atoll_nbd_accepted_total": 1, "atoll_nbd_errors_total read": 1,
	}
	eventually(t, "all is counted", func() bool {
		read()
		for name := range want {
			if all[name] < want[name] {
				return false
			}
		}
		return s.Connections()[0].Requests >= 3
	})
	for name := range want {
		if all[name] != want[name] {
			t.Errorf("%s is %v, want %v", name, all[name], want[name])
		}
	}
	if got := s.Connections()[0]; got.ReadBytes != 512 || got.WrittenBytes != 4096 || got.Requests != 3 {
		t.Errorf("%+v", got)
	}
}

// certificates makes a CA and a certificate for localhost that it signed.
func certificates(t *testing.T) (*x509.CertPool, tls.Certificate, map[string][]byte) {
	t.Helper()
	make1 := func(tmpl, parent *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			parent, signer = tmpl, key
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		return der, key
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, caKey := make1(ca, nil, nil)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, key := make1(leaf, ca, caKey)
	parsed, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := func(typ string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}) }
	files := map[string][]byte{
		"ca-cert.pem": block("CERTIFICATE", caDER), "client-cert.pem": block("CERTIFICATE", der), "client-key.pem": block("PRIVATE KEY", keyDER),
	}
	return pool, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, files
}

func TestTLS(t *testing.T) {
	pool, cert, files := certificates(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	sh, _ := newShelf("disk", 4<<20)
	server := &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	s, plain := serveUnix(t, sh, "disk", Options{Listeners: []net.Listener{l}, TLS: server, TLSMode: TLSRequired})

	w := rawConn(t, plain, bothFlags)
	w.want(repTLSReqd, optList, "")
	w.want(repTLSReqd, optGo, nameBody("disk"))
	w.want(repTLSReqd, optStructuredReply, "")
	w.want(repTLSReqd, 99, "x")
	w.want(repInvalid, optStartTLS, "x")
	w.want(repAck, optAbort, "")
	w = rawConn(t, plain, bothFlags)
	w.send(optExportName, "disk")
	w.closed()
	if _, err := Dial(t.Context(), plain, DialOptions{}); !errors.Is(err, atoll.ErrDenied) {
		t.Error(err)
	}
	uri := "nbds://localhost:" + port + "/disk"
	if _, err := Dial(t.Context(), uri, DialOptions{TLS: &tls.Config{RootCAs: pool}}); err == nil {
		t.Error("let in without a client certificate")
	}
	if _, err := Dial(t.Context(), uri, DialOptions{}); !errors.Is(err, atoll.ErrDenied) {
		t.Error("a server of an unknown CA is trusted:", err)
	}
	o := DialOptions{TLS: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}}
	c := dial(t, uri, o)
	p := make([]byte, 3<<20)
	rand.Read(p)
	got := make([]byte, len(p))
	if err := errors.Join(c.WriteAt(t.Context(), p, 1, true), c.ReadAt(t.Context(), got, 1)); err != nil || string(got) != string(p) {
		t.Fatal("bytes over TLS differ", err)
	}
	if all := s.Connections(); !all[len(all)-1].TLS {
		t.Errorf("%+v", all)
	}
	tlsInfo(t, uri, files)
}

// tlsInfo lets libnbd try TLS, if it is installed.
func tlsInfo(t *testing.T, uri string, files map[string][]byte) {
	if _, err := exec.LookPath("nbdinfo"); err != nil {
		t.Log("nbdinfo is not installed")
		return
	}
	dir := t.TempDir()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("nbdinfo", uri+"?tls-certificates="+dir).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "TLS") {
		t.Errorf("nbdinfo: %v\n%s", err, out)
	}
}

// STARTTLS forgets what was negotiated before it (N5), and comes once.
func TestTLSReset(t *testing.T) {
	pool, cert, _ := certificates(t)
	sh, _ := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, TLSMode: TLSAllowed})
	dial(t, uri, DialOptions{})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optStructuredReply, "")
	w.want(repAck, optSetMeta, metaBody("disk", "base:allocation"))
	w.want(repAck, optStartTLS, "")
	tc := tls.Client(w.nc, &tls.Config{RootCAs: pool, ServerName: "localhost"})
	w = &wire{t, tc}
	w.want(repInvalid, optStartTLS, "")
	w.want(repInvalid, optSetMeta, metaBody("disk", "base:allocation"))
	w.want(repAck, optGo, nameBody("disk"))
	w.command(cmdBlockStatus, 0, 0, 512, nil)
	w.simple(errnoInval)
}

func TestPlainUnix(t *testing.T) {
	_, cert, _ := certificates(t)
	sh, _ := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, TLSMode: TLSRequired, PlainUnix: true})
	dial(t, uri, DialOptions{})
	sh2, _ := newShelf("disk", 1<<20)
	_, uri = serveUnix(t, sh2, "disk", Options{TLSMode: TLSAllowed}) // no certificate
	if _, err := Dial(t.Context(), uri, DialOptions{}); !errors.Is(err, atoll.ErrDenied) {
		t.Error(err)
	}
}

// A flush on one connection covers writes that were answered on others.
func TestMultiConnFlush(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	var dirty atomic.Int64
	m.Before = func(_ context.Context, op string, off, n int64) error {
		switch op {
		case "write":
			dirty.Add(1)
		case "flush":
			dirty.Store(0)
		}
		return nil
	}
	_, uri := serveUnix(t, sh, "disk", Options{})
	var all []*Client
	for range 4 {
		all = append(all, dial(t, uri, DialOptions{}))
	}
	for _, c := range all {
		if err := c.WriteAt(t.Context(), []byte{1}, 0, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := all[2].Flush(t.Context()); err != nil || dirty.Load() != 0 {
		t.Errorf("%d writes not flushed, %v", dirty.Load(), err)
	}
}

// A socket can be inherited, as from systemd and as from libnbd clients.
func TestActivation(t *testing.T) {
	if os.Getenv("NBD_TEST_INHERIT") != "" {
		ls, err := InheritedListeners()
		if err != nil || len(ls) != 1 {
			t.Fatal(ls, err)
		}
		sh := &shelf{disks: map[string]Device{"": nbdtest.NewMemory(4711)}, infos: map[string]Info{}}
		s := Serve(Options{Listeners: ls, Exports: sh})
		eventually(t, "a client", func() bool { return s.nextID.Load() > 0 })
		eventually(t, "no client", func() bool { return len(s.Connections()) == 0 })
		s.Close()
		return
	}
	if ls, err := InheritedListeners(); ls != nil || err != nil {
		t.Fatal(ls, err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" -test.run '^TestActivation$'`, os.Args[0])
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "NBD_TEST_INHERIT=1")
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := Dial(t.Context(), Address{Network: "unix", Addr: l.Addr().String()}.String(), DialOptions{})
	if err != nil || c.Size() != 4711 {
		t.Error(err)
	} else {
		c.Close()
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// A reader that carries out requests itself because the device is quick gives
// way when one hangs: others of the same connection go on.
func TestInlineGivesWay(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	hung, release := make(chan struct{}), make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		if off == 4096 {
			close(hung)
			<-release
		}
		return nil
	}
	s, uri := serveUnix(t, sh, "disk", Options{})
	s.quick = time.Hour // also on a busy machine
	c := dial(t, uri, DialOptions{})
	p := make([]byte, 512)
	conn := s.list()[0]
	eventually(t, "the reader works itself", func() bool {
		if err := c.ReadAt(t.Context(), p, 0); err != nil {
			t.Fatal(err)
		}
		return conn.held.Load() > 100 && conn.paces[cmdRead].quick()
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.ReadAt(t.Context(), make([]byte, 512), 4096); err != nil {
			t.Error(err)
		}
	})
	<-hung
	for range 100 {
		if err := c.ReadAt(t.Context(), p, 0); err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	wg.Wait()
	eventually(t, "the watchdog sleeps", func() bool { return !s.watching.Load() })
}

// A reader that carries out the requests of a client that has one at a time in
// flight gives way when one hangs, and when the client changes its ways.
func TestLoneGivesWay(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	hung, release := make(chan struct{}), make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		if off == 4096 {
			close(hung)
			<-release
		}
		return nil
	}
	s, uri := serveUnix(t, sh, "disk", Options{})
	s.quick = -1 // the device never is
	c := dial(t, uri, DialOptions{})
	read := func(off int64) {
		if err := c.ReadAt(t.Context(), make([]byte, 512), off); err != nil {
			t.Error(err)
		}
	}
	conn := s.list()[0]
	alone := func() {
		eventually(t, "the reader works itself", func() bool {
			read(0)
			return conn.lone.sure()
		})
	}
	eventually(t, "the reader keeps the token", func() bool {
		alone()
		held := conn.held.Load()
		read(0)
		return conn.held.Load() > held
	})
	alone()
	var wg sync.WaitGroup
	wg.Go(func() { read(4096) })
	<-hung
	for range 100 {
		read(0)
	}
	close(release)
	wg.Wait()
	alone()
	eventually(t, "the reader passes the token on", func() bool {
		for range 4 {
			wg.Go(func() {
				for range 25 {
					read(0)
				}
			})
		}
		wg.Wait()
		return !conn.lone.sure()
	})
}

// A client that sends much and reads no reply for long is served all the same.
func TestLateReader(t *testing.T) {
	sh, _ := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	const n = 3000
	for range n { // 12 MiB of writes and 12 MiB of answers
		w.command(cmdWrite, 0, 0, 4096, make([]byte, 4096))
		w.command(cmdRead, 0, 0, 4096, nil)
	}
	for got := 0; got < 2*n*16+n*4096; {
		m, err := w.nc.Read(make([]byte, 64<<10))
		if err != nil {
			t.Fatal(err)
		}
		got += m
	}
}
