package hosttest

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

func TestMemNet(t *testing.T) {
	TestNet(t, func(*testing.T) (host.Net, string) { return NewNet(1).Node("a"), "a:0" })
	TestNet(t, func(*testing.T) (host.Net, string) { return NewNet(1).Node("a"), "unix:/run/x.sock" })
}

func TestMemNetInBubble(t *testing.T) {
	for _, c := range []struct {
		name string
		test func(*testing.T, host.Net, string)
	}{{"Echo", testEcho}, {"Large", testLarge}, {"Refused", testRefused}, {"Deadline", testDeadline}, {"CloseWakes", testCloseWakes}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { c.test(t, NewNet(1).Node("a"), ":0") })
		})
	}
}

// between returns a connection from machine a to machine b.
func between(t *testing.T, n *Net) (a, b net.Conn) {
	t.Helper()
	l, err := n.Node("b").Listen(":1")
	fatal(t, err)
	defer l.Close()
	a, err = n.Node("a").Dial(t.Context(), "b:1")
	fatal(t, err)
	b, err = l.Accept()
	fatal(t, err)
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1)
		a, b := between(t, n)
		p := make([]byte, 3)
		n.Cut("a", "b")
		_, err := a.Write([]byte("one"))
		fatal(t, err)
		_, err = b.Write([]byte("two"))
		fatal(t, err)
		_, err = io.ReadFull(a, p)
		fatal(t, err) // the other direction still works
		fatal(t, b.SetReadDeadline(time.Now().Add(time.Minute)))
		if _, err = b.Read(p); err == nil {
			t.Error("a cut lets data through")
		}
		start := time.Now()
		_, err = n.Node("a").Dial(t.Context(), "b:1")
		want(t, err, atoll.ErrUnreachable)
		if took := time.Since(start); took != atoll.RequestTimeout {
			t.Errorf("dial took %v", took)
		}
		n.Heal("a", "b")
		fatal(t, b.SetReadDeadline(time.Now().Add(time.Minute)))
		_, err = io.ReadFull(b, p)
		fatal(t, err)
		if string(p) != "one" {
			t.Errorf("%q", p)
		}
	})
}

func TestIsolate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1)
		n.Partition("b", "*")
		l, err := n.Node("b").Listen(":1")
		fatal(t, err)
		defer l.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = n.Node("a").Dial(ctx, "b:1")
		want(t, err, atoll.ErrUnreachable)
		want(t, err, context.DeadlineExceeded)
		c, err := n.Node("b").Dial(t.Context(), "localhost:1") // loopback is never cut
		fatal(t, err)
		fatal(t, c.Close())
		n.HealAll()
		c, err = n.Node("a").Dial(t.Context(), "b:1")
		fatal(t, err)
		fatal(t, c.Close())
	})
}

func TestReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1)
		a, b := between(t, n)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := b.Read(make([]byte, 1))
			want(t, err, syscall.ECONNRESET)
		})
		synctest.Wait()
		if k := n.Reset("b", "a"); k != 1 {
			t.Errorf("%d connections", k)
		}
		wg.Wait()
		_, err := a.Write([]byte("x"))
		want(t, err, syscall.ECONNRESET)
		if k := n.Reset("*", "*"); k != 0 {
			t.Errorf("%d connections", k)
		}
	})
}

func TestKill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1)
		l, err := n.Node("b").Listen(":1")
		fatal(t, err)
		a, err := n.Node("a").Dial(t.Context(), "b:1")
		fatal(t, err)
		defer a.Close()
		n.Kill("b")
		_, err = l.Accept()
		want(t, err, net.ErrClosed)
		_, err = a.Read(make([]byte, 1))
		want(t, err, syscall.ECONNRESET)
		_, err = n.Node("a").Dial(t.Context(), "b:1")
		want(t, err, atoll.ErrUnreachable)
	})
}

// TestSeedRepeats runs several connections at once, twice.
func TestSeedRepeats(t *testing.T) {
	run := func(seed uint64) string {
		var log strings.Builder
		synctest.Test(t, func(t *testing.T) {
			n := NewNet(seed)
			start := time.Now()
			var mu sync.Mutex
			var wg sync.WaitGroup
			l, err := n.Node("hub").Listen(":1")
			fatal(t, err)
			defer l.Close()
			for i := range 4 {
				name := fmt.Sprint("n", i)
				c, err := n.Node(name).Dial(t.Context(), "hub:1")
				fatal(t, err)
				s, err := l.Accept()
				fatal(t, err)
				wg.Go(func() { io.Copy(s, s); s.Close() })
				wg.Go(func() {
					defer c.Close()
					p := make([]byte, 1)
					for range 50 {
						c.Write(p)
						io.ReadFull(c, p)
						mu.Lock()
						fmt.Fprintln(&log, name, time.Since(start))
						mu.Unlock()
					}
				})
			}
			wg.Wait()
		})
		return log.String()
	}
	first := run(5)
	for range 10 {
		if run(5) != first {
			t.Fatal("one seed, two histories")
		}
	}
	if run(6) == first {
		t.Error("the seed does nothing")
	}
}

// TestPorts: nobody gets a port twice, and servers can be started on them.
func TestPorts(t *testing.T) {
	seen := map[int]bool{}
	for n := 1; n < portBlock; n++ {
		base, err := Ports(n)
		fatal(t, err)
		for p := base; p < base+n; p++ {
			if seen[p] {
				t.Errorf("port %d is given out twice", p)
			}
			seen[p] = true
		}
		if guard(base + portBlock - 1) {
			t.Errorf("ports from %d on are not guarded", base)
		}
		for range 2 { // a server, and its next start
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", base+n-1))
			fatal(t, err)
			fatal(t, l.Close())
		}
	}
	for _, n := range []int{0, portBlock} {
		if _, err := Ports(n); err == nil {
			t.Errorf("%d ports are given", n)
		}
	}
}
