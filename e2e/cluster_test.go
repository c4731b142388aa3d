package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// cluster is several processes that are one cluster. The first has the catalog.
type cluster struct {
	t   *testing.T
	all []*server
}

// join starts one more process with the roles.
func (c *cluster) join(roles string, flags ...string) *server {
	c.t.Helper()
	flags = append([]string{"--roles", roles, "--host", fmt.Sprintf("host%d", len(c.all)+1)}, flags...)
	s := newServer(c.t, append(flags, "--nbd", "none")...)
	if strings.Contains(roles, "node") {
		s.args = append(s.args, "--disk", s.dir+"/disk")
	}
	if len(c.all) > 0 {
		first := c.all[0]
		s.args = append(s.args, "--join", first.api(), "--token", strings.TrimSpace(first.atoll("token", "create", "-q")))
	}
	s.start()
	c.all = append(c.all, s)
	return s
}

// id is the node of a process with one disk.
func (c *cluster) id(s *server) int {
	c.t.Helper()
	for _, n := range s.nodes() {
		if strings.HasPrefix(n.Path, s.dir) {
			return n.ID
		}
	}
	c.t.Fatalf("the process on %s has no node", s.api())
	return 0
}

// healthy waits until the cluster says so of all its nodes.
func (c *cluster) healthy(s *server, nodes int) time.Duration {
	c.t.Helper()
	return eventually(c.t, fmt.Sprintf("%d nodes up and healthy", nodes), func() bool {
		// The catalog may be away for a moment.
		r := s.try("node", "ls", "-o", "json")
		var out struct{ Nodes []nodeJSON }
		if r.code != 0 || json.Unmarshal([]byte(r.out), &out) != nil {
			return false
		}
		up := 0
		for _, n := range out.Nodes {
			if n.Up && n.Condition == "up" {
				up++
			}
		}
		return up == nodes && strings.HasPrefix(s.try("status").out, "HEALTHY")
	})
}

// whole waits until no segment of the volume lacks a verified copy.
func (c *cluster) whole(s *server, volume string) {
	c.t.Helper()
	took := eventually(c.t, "every segment has all its copies", func() bool { return s.volume(volume).ShortSegments == 0 })
	c.t.Logf("every segment had its copies again after %v", took.Round(time.Millisecond))
}

// writer finds the process of a node that holds open segments, among candidates.
func (c *cluster) writer(s *server, candidates ...*server) *server {
	c.t.Helper()
	best, most := candidates[0], -1
	for _, n := range s.nodes() {
		for _, k := range candidates {
			if n.OpenSegments > most && n.ID == c.id(k) {
				best, most = k, n.OpenSegments
			}
		}
	}
	return best
}

// stallLimit is far above what clients see on a machine with time to spare; how
// long that is tell the benchmarks. Requests that nobody answers take longer.
const stallLimit = 20 * time.Second

// measure lets the load run after a fault and reports its longest stall.
func measure(t *testing.T, l *load, what string, goal time.Duration, fault func()) {
	t.Helper()
	l.reset()
	before := l.ops.Load()
	fault()
	time.Sleep(3 * time.Second)
	for at := l.ops.Load(); l.ops.Load() < at+loadWorkers && l.broken.Load() == 0; { // it goes on
		if time.Sleep(10 * time.Millisecond); l.idle() > stallLimit {
			break
		}
	}
	l.note()
	stall, slow := time.Duration(l.stall.Load()), time.Duration(l.slowest.Load())
	t.Logf("%s: longest stall %v, slowest operation %v (goal %v); %d operations in the 3 s after it, %d errors",
		what, stall.Round(time.Millisecond), slow.Round(time.Millisecond), goal, l.ops.Load()-before, l.broken.Load())
	if stall > stallLimit || slow > stallLimit {
		t.Errorf("%s: longest stall %v, slowest operation %v, limit %v", what, stall, slow, stallLimit)
	}
	if l.broken.Load() > 0 {
		t.Errorf("%s: clients saw errors", what)
	}
}

// Storage nodes in processes of their own die and hang under load: clients see a
// short stall and no error. The owner of a volume dies or hangs: another gateway
// serves it, with all that was acknowledged, and the old one never again.
func TestCluster(t *testing.T) {
	c := &cluster{t: t}
	a := c.join("controller,node")
	b, d, e := c.join("node"), c.join("node"), c.join("node")
	g1, g2 := c.join("gateway"), c.join("gateway")
	c.healthy(g1, 4)
	uri1 := g1.create("disk1", "64M")
	uri2 := g2.uri("disk1")
	h := newHistory(t, 64<<20)

	t.Run("node killed", func(t *testing.T) {
		l := startLoad(h, false, dialer(uri1))
		time.Sleep(time.Second)
		victim := c.writer(g1, b, d, e)
		measure(t, l, "SIGKILL of a node", 300*time.Millisecond, victim.kill)
		victim.start()
		c.healthy(g1, 4)
		if err := l.stop(); err != nil {
			t.Errorf("load: %v", err)
		}
		c.whole(g1, "disk1")
	})
	t.Run("node hangs", func(t *testing.T) {
		l := startLoad(h, false, dialer(uri1))
		time.Sleep(time.Second)
		victim := c.writer(g1, b, d, e)
		measure(t, l, "SIGSTOP of a node", 500*time.Millisecond, func() { victim.signal(syscall.SIGSTOP) })
		victim.signal(syscall.SIGCONT)
		c.healthy(g1, 4)
		if err := l.stop(); err != nil {
			t.Errorf("load: %v", err)
		}
		c.whole(g1, "disk1")
		conn := dial(t, uri1)
		t.Logf("%d durable blocks are right", h.verify(t, conn))
		conn.Close()
	})
	t.Run("other gateway", func(t *testing.T) {
		// What another gateway has open, this one leaves alone, and says who has it.
		conn := dial(t, uri1)
		defer conn.Close()
		if r := g2.try("volume", "rm", "disk1", "--now", "--yes"); r.code != 6 || !strings.Contains(r.err, "1 NBD connections") {
			t.Errorf("rm through another gateway: %+v", r)
		}
		if _, err := nbd.Dial(t.Context(), uri2, nbd.DialOptions{}); !errors.Is(err, atoll.ErrBusy) || !strings.Contains(err.Error(), g1.api()) {
			t.Errorf("NBD through another gateway: %v", err)
		}
		if r := g2.try("volume", "bench", "disk1", "--duration", "100ms"); r.code != 0 && r.code != 6 {
			t.Errorf("bench through another gateway: %+v", r)
		}
		if err := conn.WriteAt(t.Context(), make([]byte, blockSize), 0, true); err != nil {
			t.Errorf("the owner after that: %v", err)
		}
		h.blocks[0] = block{}
	})
	t.Run("owner killed", func(t *testing.T) {
		l := startLoad(h, false, dialer(uri1))
		time.Sleep(time.Second)
		begin := time.Now()
		g1.kill()
		l.wait(t)
		conn := takeover(t, uri2, begin)
		t.Logf("%d durable blocks are right", h.verify(t, conn))
		conn.Close()
		g1.start()
		g2.stop() // cleanly: the volume is free at once
		begin = time.Now()
		conn = takeover(t, uri1, begin)
		h.verify(t, conn)
		conn.Close()
		g2.start()
	})
	t.Run("owner hangs", func(t *testing.T) { ownerHangs(t, h, g1, uri1, uri2) })
	t.Run("catalog gone", func(t *testing.T) {
		// Without the catalog a gateway serves on until it can no longer know
		// that it is the owner; with it, it is back by itself.
		l := startLoad(h, true, dialer(uri2))
		time.Sleep(500 * time.Millisecond)
		a.kill()
		time.Sleep(4 * time.Second)
		a.start()
		begin, ops := time.Now(), l.ops.Load()
		eventually(t, "the load goes on", func() bool { return l.ops.Load() > ops+200 })
		t.Logf("serving again %v after the catalog was back", time.Since(begin).Round(time.Millisecond))
		l.cancel()
		l.wg.Wait()
		conn := dial(t, uri2)
		t.Logf("%d durable blocks are right", h.verify(t, conn))
		conn.Close()
	})
	t.Run("all killed", func(t *testing.T) {
		l := startLoad(h, false, dialer(uri2))
		time.Sleep(time.Second)
		for _, s := range c.all {
			s.signal(syscall.SIGKILL)
		}
		for _, s := range c.all {
			<-s.done
			s.cmd = nil
		}
		_ = l.stop()
		for _, s := range c.all {
			s.start()
		}
		conn := takeover(t, uri1, time.Now())
		t.Logf("%d durable blocks are right", h.verify(t, conn))
		conn.Close()
		g1.atoll("volume", "check", "disk1", "--read")
	})
}

// takeover connects through the other gateway, as soon as that serves.
func takeover(t *testing.T, uri string, since time.Time) *nbd.Client {
	t.Helper()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		conn, err := nbd.Dial(ctx, uri, nbd.DialOptions{})
		buf := make([]byte, blockSize)
		if err == nil {
			if err = conn.ReadAt(ctx, buf, 0); err == nil {
				err = conn.WriteAt(ctx, buf, 0, true)
			}
		}
		cancel()
		took := time.Since(since)
		if err == nil {
			t.Logf("served by the other gateway after %v (goal 4 s)", took.Round(time.Millisecond))
			return conn
		}
		if conn != nil {
			conn.Close()
		}
		if took > patience {
			t.Fatalf("not taken over after %v: %v", took, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ownerHangs stops the owner past its lease, lets another gateway take over and
// write, and wakes the first.
func ownerHangs(t *testing.T, h *history, g1 *server, uri1, uri2 string) {
	l := startLoad(h, false, dialer(uri1))
	time.Sleep(time.Second)
	g1.signal(syscall.SIGSTOP)
	begin := time.Now()
	conn := takeover(t, uri2, begin)
	ops := l.ops.Load()
	after := &history{blocks: append([]block(nil), h.blocks...), seed: h.seed, loads: 1000}
	t.Logf("%d durable blocks are right", after.verify(t, conn))
	found := append([]block(nil), after.blocks...)
	for b := range after.blocks { // so that the new owner's writes differ from the old one's
		after.blocks[b].issued += 1000
	}
	l2 := startLoad(after, false, dialer(uri2))
	time.Sleep(time.Second)
	g1.signal(syscall.SIGCONT)
	time.Sleep(time.Second)
	// New clients of the first learn that it is not theirs any more.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	if stale, err := nbd.Dial(ctx, uri1, nbd.DialOptions{}); err == nil {
		buf := make([]byte, blockSize)
		if err := stale.WriteAt(ctx, buf, 0, true); err == nil {
			t.Error("two gateways write to one volume")
		}
		stale.Close()
	} else {
		t.Logf("a client of the first gateway is told: %v", err)
	}
	cancel()
	l.wait(t)
	t.Logf("clients of the first gateway saw: %v", l.stop())
	if late := l.ops.Load() - ops; late > 0 {
		t.Logf("%d operations that were in flight completed late", late)
		if late > loadWorkers {
			t.Errorf("the first gateway served %d operations after the takeover", late)
		}
	}
	for b := range found {
		if h.blocks[b].durable > found[b].durable {
			t.Errorf("block %d: write %d was acknowledged by the first gateway, the second found %d", b, h.blocks[b].durable, found[b].durable)
		}
	}
	if err := l2.stop(); err != nil {
		t.Errorf("clients of the second gateway saw: %v", err)
	}
	t.Logf("%d durable blocks are right after the first woke up", after.verify(t, conn))
	conn.Close()
	copy(h.blocks, after.blocks)
}

// Three controllers: any of them may die, also the first.
func TestThreeControllers(t *testing.T) {
	t.Parallel()
	c := &cluster{t: t}
	a := c.join("controller,node")
	b, d := c.join("controller,node"), c.join("controller,node")
	c.join("node")
	g := c.join("gateway")
	c.healthy(g, 4)
	uri := g.create("disk1", "32M")
	h := newHistory(t, 32<<20)
	for i, victim := range []*server{a, b, d} {
		var errs atomic.Int64
		l := startLoad(h, true, dialer(uri))
		time.Sleep(time.Second)
		l.reset()
		victim.kill()
		time.Sleep(4 * time.Second)
		stall := time.Duration(l.stall.Load())
		errs.Store(l.broken.Load())
		t.Logf("controller %d killed at %s: longest stall %v, %d errors", i+1, time.Now().Add(-4*time.Second).UTC().Format("15:04:05.000"), stall.Round(time.Millisecond), errs.Load())
		if stall > time.Minute {
			t.Errorf("controller %d killed: stall of %v", i+1, stall)
		}
		g.atoll("volume", "create", fmt.Sprintf("new%d", i), "64M", "--replicas", "3")
		victim.start()
		c.healthy(g, 4)
		l.cancel()
		l.wg.Wait()
		conn := dial(t, uri)
		t.Logf("%d durable blocks are right", h.verify(t, conn))
		conn.Close()
	}
}

// Two nodes that come back under each other's addresses are told apart: what is
// meant for one never reaches the other.
func TestSwappedAddresses(t *testing.T) {
	t.Parallel()
	c := &cluster{t: t}
	dir := tempDir(t)
	c.join("controller,node", "--disk", dir+"/a", "--disk", dir+"/b")
	b, d := c.join("node"), c.join("node")
	g := c.join("gateway")
	c.healthy(g, 5)
	uri := g.create("disk1", "32M")
	h := newHistory(t, 32<<20)
	l := startLoad(h, false, dialer(uri))
	for range 2 {
		time.Sleep(500 * time.Millisecond)
		b.kill()
		d.kill()
		b.port, d.port = d.port, b.port
		b.args[listenArg], d.args[listenArg] = b.api(), d.api()
		b.start()
		d.start()
		c.healthy(g, 5)
	}
	time.Sleep(500 * time.Millisecond)
	if err := l.stop(); err != nil {
		t.Errorf("load: %v", err)
	}
	conn := dial(t, uri)
	t.Logf("%d durable blocks are right", h.verify(t, conn))
	conn.Close()
	c.whole(g, "disk1")
	g.atoll("volume", "check", "disk1", "--read")
}
