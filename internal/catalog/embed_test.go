package catalog

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// childWriters put acknowledged counters, until the process is killed.
const childWriters = 16

// etcdChild runs an embedded member and writes as fast as it can; each line of
// its output is an acknowledged put.
func etcdChild(dir string) {
	s, err := StartEtcd(context.Background(), EtcdOptions{Dir: dir, Name: "one"})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	kv := s.KV()
	var mu sync.Mutex
	round := time.Now().UnixNano()
	for w := range childWriters {
		go func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("/kill/%d/%d/%d", round, w, i%50)
				value := fmt.Sprint(i)
				_, err := kv.Txn(context.Background(), Txn{Then: []Op{{Key: key, Value: []byte(value)}}})
				mu.Lock()
				if err != nil {
					fmt.Println("error", err)
				} else {
					fmt.Println(key, value)
				}
				mu.Unlock()
			}
		}()
	}
	select {}
}

// TestEtcdKill kills a member at a high rate of writes; every acknowledged one
// is there after the restart (C9).
func TestEtcdKill(t *testing.T) {
	dir := filepath.Join(privateDir(t), "etcd")
	acked := map[string]int{}
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "ATOLL_TEST_ETCD_CHILD="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, killed := 0, false
		end := time.Now().Add(time.Hour)
		for in := bufio.NewScanner(out); in.Scan(); lines++ {
			if lines == 100 { // however long that took
				end = time.Now().Add(time.Duration(200+137*round) * time.Millisecond)
			}
			if !killed && time.Now().After(end) {
				killed = true
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			var key string
			var n int
			if _, err := fmt.Sscanf(in.Text(), "%s %d", &key, &n); err != nil {
				t.Fatalf("round %d: child says %q", round, in.Text())
			}
			acked[key] = n
		}
		_ = cmd.Wait()
		if !killed {
			t.Fatalf("round %d: the child ended after %d writes", round, lines)
		}
		t.Logf("round %d: killed after %d acknowledged writes", round, lines)
		checkAcked(t, dir, acked)
	}
}

func checkAcked(t *testing.T, dir string, acked map[string]int) {
	t.Helper()
	start := time.Now()
	s := startEtcd(t, EtcdOptions{Dir: dir, Name: "one"})
	defer s.Close()
	kvs, _, err := s.KV().Range(testContext(t), "/kill/", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("read again after %v", time.Since(start))
	have := map[string]int{}
	for _, kv := range kvs {
		var n int
		fmt.Sscan(string(kv.Value), &n)
		have[kv.Key] = n
	}
	for key, n := range acked {
		if have[key] < n {
			t.Errorf("key %s: acknowledged %d, found %d", key, n, have[key])
		}
	}
}

// TestEtcdStart tells the time to the first put; a restart finds what was
// written.
func TestEtcdStart(t *testing.T) {
	opts := EtcdOptions{Dir: filepath.Join(privateDir(t), "etcd"), Name: "one", Log: testLog(t)}
	for i := range 2 {
		start := time.Now()
		s := startEtcd(t, opts)
		_, err := s.KV().Txn(testContext(t), Txn{If: []Cmp{{Key: "/a", Rev: map[int]int64{1: 2}[i]}}, Then: []Op{{Key: "/a"}}})
		t.Logf("first put %v after the start", time.Since(start))
		if err != nil {
			t.Fatal(err)
		}
		_, err = StartEtcd(t.Context(), opts)
		wantErr(t, err, atoll.ErrBusy)
		start = time.Now()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		t.Logf("closed in %v", time.Since(start))
	}
}

// sockets lists the abstract sockets that this process listens on.
func sockets(t *testing.T) []string {
	t.Helper()
	mine := map[string]bool{}
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil {
			mine[to] = true
		}
	}
	raw, err := os.ReadFile("/proc/self/net/unix")
	if err != nil {
		t.Skip(err)
	}
	var out []string
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 7 && strings.HasPrefix(f[7], "@") && f[3] == "00010000" && mine["socket:["+f[6]+"]"] {
			out = append(out, f[7])
		}
	}
	return out
}

// TestEtcdDoors checks who may come in: nobody without a certificate, no one
// else on this machine, and there is no abstract socket.
func TestEtcdDoors(t *testing.T) {
	dir := privateDir(t)
	before := sockets(t)
	ca := newAuthority(t, dir)
	member := ca.issue(t, "member")
	peer, client := freeAddr(t), freeAddr(t)
	socket := filepath.Join(dir, "private", "client.sock")
	s := startEtcd(t, EtcdOptions{Dir: filepath.Join(dir, "etcd"), Name: "one", PeerAddr: peer, PeerTLS: member,
		ClientAddr: client, ClientSocket: socket, Log: testLog(t)})
	defer s.Close()
	if info, err := os.Stat(filepath.Dir(socket)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("socket's directory: %v, %v", info, err)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Type() != os.ModeSocket {
		t.Errorf("socket: %v, %v", info, err)
	}
	if after := sockets(t); !slices.Equal(before, after) {
		t.Errorf("abstract sockets: %v before, %v after", before, after)
	}
	other := newAuthority(t, t.TempDir()).issue(t, "stranger")
	for _, addr := range []string{peer, client} {
		for _, c := range []struct {
			name  string
			files EtcdTLS
			ok    bool
		}{{"no certificate", EtcdTLS{}, false}, {"a stranger's", other, false}, {"a member's", member, true}} {
			if err := greet(addr, c.files); (err == nil) != c.ok {
				t.Errorf("%s at %s: %v", c.name, addr, err)
			}
		}
		plain, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(plain, "GET /version HTTP/1.0\r\n\r\n")
		plain.SetReadDeadline(time.Now().Add(20 * time.Second))
		answer, _ := bufio.NewReader(plain).ReadString('\n')
		if strings.Contains(answer, "200") {
			t.Errorf("plain text at %s: %q", addr, answer)
		}
		plain.Close()
	}
	remote, err := DialEtcd([]string{client}, clientTLS(t, member, ca), testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()
	mustTxn(t, remote, Txn{Then: []Op{{Key: "/a"}}})
}

func clientTLS(t *testing.T, files EtcdTLS, ca *authority) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: ca.pool(), MinVersion: tls.VersionTLS13}
}

// greet shakes hands; an error when the other side does not want to.
func greet(addr string, files EtcdTLS) error {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}
	if files.Cert != "" {
		pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
		if err != nil {
			return err
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	conn, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /version HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	_, err = bufio.NewReader(conn).ReadString('\n')
	return err
}

// TestEtcdOptions refuses what would open a door or cannot work.
func TestEtcdOptions(t *testing.T) {
	dir := privateDir(t)
	open := filepath.Join(dir, "open")
	if err := errors.Join(os.Mkdir(open, 0o755), os.Chmod(open, 0o755)); err != nil { // whatever the umask
		t.Fatal(err)
	}
	good := filepath.Join(dir, "etcd")
	for _, opts := range []EtcdOptions{
		{},
		{Dir: good},
		{Dir: good, Name: "a,b"},
		{Dir: good, Name: "a", PeerAddr: "127.0.0.1:1"},
		{Dir: good, Name: "a", ClientAddr: "127.0.0.1:1"},
		{Dir: good, Name: "a", Join: true},
		{Dir: open, Name: "a"},
		{Dir: good, Name: "a", ClientSocket: filepath.Join(open, "s")},
		{Dir: good, Name: "a", ClientSocket: "s"},
		{Dir: good, Name: "a", ClientSocket: "/" + strings.Repeat("x", 110)},
	} {
		_, err := StartEtcd(t.Context(), opts)
		if !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("options %+v: %v", opts, err)
		}
	}
}

// TestEtcdMembers grows a cluster from one member to three, loses one, and goes
// on; a stopped process is not valid when it wakes up.
func TestEtcdMembers(t *testing.T) {
	dir := privateDir(t)
	ca := newAuthority(t, dir)
	ctx := testContext(t)
	opts := func(name string) EtcdOptions {
		return EtcdOptions{Dir: filepath.Join(dir, name), Name: name, PeerAddr: freeAddr(t), PeerTLS: ca.issue(t, name)}
	}
	one := startEtcd(t, opts("one"))
	defer one.Close()
	mustTxn(t, one.KV(), Txn{Then: []Op{{Key: "/a", Value: []byte("1")}}})
	var others []*EtcdServer
	for _, name := range []string{"two", "three"} {
		o := opts(name)
		initial, err := one.AddMember(ctx, name, o.PeerAddr)
		if err != nil {
			t.Fatal(err)
		}
		o.InitialCluster, o.Join = initial, true
		s := startEtcd(t, o)
		others = append(others, s)
		promote(t, one, name)
	}
	three := others[1]
	kv, err := three.KV().Get(ctx, "/a")
	if err != nil || string(kv.Value) != "1" {
		t.Fatalf("the third member has %+v, %v", kv, err)
	}
	// A lease is renewed through a member that does not lead.
	id, err := three.KV().Grant(ctx, atoll.LeaseTTL)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(three.KV().KeepAlive(ctx, id), one.KV().KeepAlive(ctx, id)); err != nil {
		t.Fatal(err)
	}
	if err := others[0].Close(); err != nil {
		t.Fatal(err)
	}
	mustTxn(t, three.KV(), Txn{Then: []Op{{Key: "/a", Value: []byte("2")}}})
	members, err := one.Members(ctx)
	if err != nil || len(members) != 3 {
		t.Fatalf("members %+v, %v", members, err)
	}
	for _, m := range members {
		if m.Name == "two" {
			if err := one.RemoveMember(ctx, m.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	mustTxn(t, one.KV(), Txn{Then: []Op{{Key: "/a", Value: []byte("3")}}})
	if err := three.Close(); err != nil {
		t.Fatal(err)
	}
}

func promote(t *testing.T, s *EtcdServer, name string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		members, err := s.Members(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(members, func(m Member) bool { return m.Name == name })
		if i < 0 {
			continue
		}
		err = s.PromoteMember(testContext(t), members[i].ID)
		if err == nil {
			return
		}
		if !errors.Is(err, atoll.ErrBusy) {
			t.Logf("promote: %v", err)
		}
	}
	t.Fatalf("member %s is not promoted", name)
}

// TestStopped stops a process that holds a session (SIGSTOP) beyond its lease.
// Woken up, it must find itself invalid at once, and fenced (C8).
func TestStopped(t *testing.T) {
	dir := privateDir(t)
	socket := filepath.Join(dir, "s", "c.sock")
	s := startEtcd(t, EtcdOptions{Dir: filepath.Join(dir, "etcd"), Name: "one", ClientSocket: socket})
	defer s.Close()
	c := openCatalog(t, s.KV())
	defer c.Close()
	ctx := testContext(t)
	m := must(c.CreateMedium(ctx, volume("v")))(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "ATOLL_TEST_OWNER_CHILD="+socket)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := make(chan string)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			lines <- in.Text()
		}
	}()
	defer func() {
		for range lines {
		}
	}()
	defer cmd.Process.Kill()
	if got := <-lines; got != "owner" {
		t.Fatalf("child says %q", got)
	}
	mine := openSession(t, c, "second")
	defer mine.Close(ctx)
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var h Head
	for {
		if h, err = c.Acquire(ctx, m.ID, mine); err == nil {
			break
		}
		wantErr(t, err, atoll.ErrBusy)
		time.Sleep(20 * time.Millisecond)
	}
	took := time.Since(start)
	t.Logf("taken over after %v", took)
	if took < (atoll.LeaseTTL-renewEvery)/2 { // the last renewal may have been late
		t.Errorf("taken over after %v", took)
	}
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	got := <-lines
	for got == "valid" { // said before it was stopped
		got = <-lines
	}
	if got != "invalid fenced" {
		t.Errorf("the first owner says %q", got)
	}
	if now := must(c.Head(ctx, m.ID))(t); now.Rev != h.Rev {
		t.Errorf("the head was changed to %+v", now)
	}
}

// ownerChild owns the only medium until it notices that it does not.
func ownerChild(socket string) {
	fail := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	ctx := context.Background()
	kv, err := DialEtcd([]string{"unix://" + socket}, nil, nil)
	fail(err)
	c, err := Open(ctx, kv, nil)
	fail(err)
	s, err := c.OpenSession(ctx, Process{Host: "first"})
	fail(err)
	m, err := c.MediumByName(ctx, "v")
	fail(err)
	h, err := c.Acquire(ctx, m.ID, s)
	fail(err)
	fmt.Println("owner")
	last := time.Now()
	for {
		now := time.Now()
		valid := s.Valid()
		if now.Sub(last) > atoll.LeaseUse { // just woken up
			_, err := c.SwapHead(ctx, h)
			fmt.Println(map[bool]string{true: "valid", false: "invalid"}[valid],
				map[bool]string{true: "fenced", false: fmt.Sprint(err)}[errors.Is(err, atoll.ErrFenced)])
			return
		}
		last = now
		time.Sleep(time.Millisecond)
	}
}

// BenchmarkSwapHead is the rate of segment rolls: one writer each of its medium.
func BenchmarkSwapHead(b *testing.B) {
	s := startEtcd(b, EtcdOptions{Dir: filepath.Join(privateDir(b), "etcd"), Name: "one"})
	defer s.Close()
	c := openCatalog(b, s.KV())
	defer c.Close()
	ses := openSession(b, c, "a")
	defer ses.Close(b.Context())
	b.SetParallelism(16)
	var n int64
	var mu sync.Mutex
	b.RunParallel(func(pb *testing.PB) {
		mu.Lock()
		n++
		name := fmt.Sprint("v", n)
		mu.Unlock()
		m, err := c.CreateMedium(b.Context(), volume(name))
		if err != nil {
			b.Error(err)
			return
		}
		h, err := c.Acquire(b.Context(), m.ID, ses)
		for pb.Next() && err == nil {
			h, err = c.SwapHead(b.Context(), h)
		}
		if err != nil {
			b.Error(err)
		}
	})
}

// BenchmarkIdle reports how much of a core an idle member with a session takes.
func BenchmarkIdle(b *testing.B) {
	s := startEtcd(b, EtcdOptions{Dir: filepath.Join(privateDir(b), "etcd"), Name: "one"})
	defer s.Close()
	c := openCatalog(b, s.KV())
	defer c.Close()
	ses := openSession(b, c, "a")
	defer ses.Close(b.Context())
	var before, after syscall.Rusage
	for b.Loop() {
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
		time.Sleep(3 * time.Second)
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	}
	used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	b.ReportMetric(100*used.Seconds()/3, "%cpu")
}

// A renewal that gets no answer, since the leader it was sent to is dead, does
// not keep the next one from being answered.
func TestHedge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), renewTimeout)
		defer cancel()
		start, begun := time.Now(), 0
		err := hedge(ctx, renewAgain, 1, func(answer chan<- error) {
			if begun++; begun == 3 {
				go func() { answer <- atoll.ErrNotExist }()
			}
		})
		if !errors.Is(err, atoll.ErrNotExist) || time.Since(start) != 2*renewAgain {
			t.Errorf("after %v and %d calls: %v", time.Since(start), begun, err)
		}
		if err := hedge(ctx, renewAgain, 1, func(chan<- error) {}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without any answer: %v", err)
		}
	})
}

// relay leads connections on to another socket. While it is frozen it takes
// everything and answers nothing, as a stopped process or a cut link does.
type relay struct {
	path   string
	frozen atomic.Bool
	wg     sync.WaitGroup
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	r := &relay{path: filepath.Join(privateDir(t), "r.sock")}
	l, err := net.Listen("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("unix", to)
			if err != nil {
				c.Close()
				continue
			}
			context.AfterFunc(ctx, func() { c.Close(); up.Close() })
			r.wg.Go(func() { r.copy(up, c) })
			r.wg.Go(func() { r.copy(c, up) })
		}
	})
	t.Cleanup(func() {
		r.frozen.Store(false)
		l.Close()
		stop()
		r.wg.Wait()
	})
	return r
}

func (r *relay) copy(to, from net.Conn) {
	defer to.Close()
	for p := make([]byte, 32<<10); ; {
		n, err := from.Read(p)
		for r.frozen.Load() {
			time.Sleep(10 * time.Millisecond)
		}
		if n > 0 {
			if _, err := to.Write(p[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// A session outlives the member that it was renewed through, and the catalog
// goes on through another. A machine that stalls may cost the session its lease
// for that alone, so a lost one gets more chances.
func TestMemberFallsSilent(t *testing.T) {
	t.Parallel()
	dir := privateDir(t)
	socket := filepath.Join(dir, "s", "client.sock")
	srv := startEtcd(t, EtcdOptions{Dir: filepath.Join(dir, "etcd"), Name: "one", ClientSocket: socket, Log: testLog(t)})
	defer srv.Close()
	a, b := newRelay(t, socket), newRelay(t, socket)
	kv, err := DialEtcd([]string{"unix://" + a.path, "unix://" + b.path}, nil, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer kv.Close()
	c := openCatalog(t, kv)
	defer c.Close()
	kept, lost := 0, 0
	for kept < 2 {
		ses := openSession(t, c, "a")
		_, at, _ := kv.client()
		r := []*relay{a, b}[at]
		r.frozen.Store(true)
		must(c.CreateMedium(t.Context(), Medium{Name: fmt.Sprint("v", kept, lost), Kind: KindVolume, Size: 1 << 20}))(t)
		second := openSession(t, c, "b") // seen by the watch
		for start := time.Now(); c.State().Processes[second.ID()].ID != second.ID(); time.Sleep(10 * time.Millisecond) {
			if time.Since(start) > time.Minute {
				t.Fatal("the watch does not go on")
			}
		}
		select {
		case <-ses.Lost():
			if lost++; lost > 4 {
				t.Fatal("the session was lost each time")
			}
		case <-time.After(atoll.LeaseUse + atoll.LeaseUse/4):
			kept++
		}
		r.frozen.Store(false)
		for _, s := range []*Session{ses, second} {
			if err := s.Close(t.Context()); err != nil && !errors.Is(err, atoll.ErrTimeout) {
				t.Error(err)
			}
		}
	}
	t.Logf("%d sessions outlived the member, %d did not", kept, lost)
}
