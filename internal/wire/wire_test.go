package wire

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/prometheus/client_golang/prometheus"
)

// kinds of connection that every method is tried over.
var kinds = []string{"tcp", "tls", "unix", "pipe"}

func TestRoundTrip(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			reg := prometheus.NewPedanticRegistry()
			m := NewMetrics(reg)
			r := newRig(t, kind, func(o *ServerOptions) { o.Metrics = m })
			o := r.options(1)
			o.Metrics = m
			c := NewClient(o)
			defer c.Close()
			roundTrip(t, r, c)
			if _, err := reg.Gather(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func roundTrip(t *testing.T, r *rig, c *Client) {
	ctx := ctxFor(t)
	must(t, c.Create(ctx, seg1, 5, 16384))
	small, large := pattern(1, 2), pattern(2, atoll.MaxBatchBlocks+1)
	a := appendSync(c, seg1, 5, 0, small)
	must(t, a.Err)
	if a.Queued != 3*time.Microsecond || a.Commit != 5*time.Microsecond {
		t.Fatalf("times %v %v", a.Queued, a.Commit)
	}
	must(t, appendSync(c, seg1, 5, 2, large).Err)
	all := append(append([]byte(nil), small...), large...)
	equal(t, "node", r.nodes[1].bytes(seg1), all)

	dst := make([]byte, len(all)) // more than a frame holds
	must(t, c.Read(ctx, seg1, 0, dst))
	equal(t, "read", dst, all)
	buf, err := c.Fetch(ctx, seg1, 1, 1<<30)
	must(t, err)
	equal(t, "fetch", buf.Bytes(), all[atoll.BlockSize:][:len(buf.Bytes())])
	if len(buf.Bytes()) == 0 {
		t.Fatal("fetch gave nothing")
	}
	buf.Release()
	buf, err = c.Index(ctx, seg1, 1, 3)
	must(t, err)
	equal(t, "index", buf.Bytes(), all[atoll.BlockSize:4*atoll.BlockSize])
	buf.Release()
	buf, err = c.Fetch(ctx, seg1, 60000, 4096)
	must(t, err)
	if buf == nil || len(buf.Bytes()) != 0 {
		t.Fatal("fetch at the end is not empty")
	}
	buf.Release()

	must(t, c.Repair(ctx, seg1, 1, small[:atoll.BlockSize]))
	must(t, c.Extend(ctx, seg1, 6, 515, small))
	equal(t, "extended", r.nodes[1].bytes(seg1)[515*atoll.BlockSize:], small)
	equal(t, "repaired", r.nodes[1].bytes(seg1)[atoll.BlockSize:2*atoll.BlockSize], small[:atoll.BlockSize])
	tail, err := c.Fence(ctx, seg1, 8)
	must(t, err)
	if want := (Tail{Intact, 517, false, 8, 0xCAFE, 1 << 40}); tail != want {
		t.Fatalf("tail %+v, want %+v", tail, want)
	}
	must(t, c.Seal(ctx, seg1, 8, 3))
	runs := []Run{{1, 1}, {70000, 5}}
	must(t, c.Discard(ctx, seg1, runs))
	r.nodes[1].mu.Lock()
	got := r.nodes[1].runs
	r.nodes[1].mu.Unlock()
	if !reflect.DeepEqual(got, runs) {
		t.Fatalf("runs %v", got)
	}
	res, err := c.Verify(ctx, seg1)
	must(t, err)
	if want := (VerifyResult{3, []Run{{1, 2}, {30, 4}}}); !reflect.DeepEqual(res, want) {
		t.Fatalf("verify %+v", res)
	}
	stat, err := c.Stat(ctx)
	must(t, err)
	want, _ := r.nodes[1].Stat(ctx)
	if stat != want {
		t.Fatalf("stat %+v, want %+v", stat, want)
	}
	list, err := c.List(ctx, atoll.SegmentID{Ordinal: 2}, 9000)
	must(t, err)
	if len(list) != 9000 || list[0] != madeUp(3) || list[8999] != madeUp(9002) {
		t.Fatalf("list of %d", len(list))
	}
	must(t, c.Delete(ctx, seg1, 9))
	if r.nodes[1].bytes(seg1) != nil {
		t.Fatal("not deleted")
	}
	if rtt, err := c.Ping(ctx); err != nil || rtt <= 0 && r.addr != "there:1" {
		t.Fatalf("ping %v %v", rtt, err)
	}
}

func TestErrorsCross(t *testing.T) {
	r := newRig(t, "tcp", nil)
	c, ctx := r.client(1), ctxFor(t)
	for _, kind := range atoll.Kinds() {
		r.nodes[1].setFailure(fmt.Errorf("a text of its own: %w", kind))
		_, errFence := c.Fence(ctx, seg1, 1)
		_, errFetch := c.Fetch(ctx, seg1, 0, 1)
		_, errIndex := c.Index(ctx, seg1, 0, 1)
		_, errList := c.List(ctx, seg1, 1)
		_, errStat := c.Stat(ctx)
		_, errVerify := c.Verify(ctx, seg1)
		for i, err := range []error{
			appendSync(c, seg1, 1, 0, pattern(0, 1)).Err, c.Create(ctx, seg1, 1, 1), errFence,
			c.Extend(ctx, seg1, 1, 0, pattern(0, 1)), c.Seal(ctx, seg1, 1, 0), c.Read(ctx, seg1, 0, make([]byte, 4096)),
			errFetch, errIndex, c.Repair(ctx, seg1, 0, pattern(0, 1)), c.Discard(ctx, seg1, []Run{{1, 1}}),
			c.Delete(ctx, seg1, 1), errList, errStat, errVerify,
		} {
			if !errors.Is(err, kind) || !strings.Contains(err.Error(), "a text of its own") {
				t.Errorf("method %d: %v, want %v", i, err, kind)
			}
			for _, other := range atoll.Kinds() {
				if other != kind && errors.Is(err, other) {
					t.Errorf("method %d: %v is also %v", i, err, other)
				}
			}
		}
	}
}

func TestCodes(t *testing.T) {
	if len(atoll.Kinds())+1 != numCodes || len(codeNames()) != numCodes {
		t.Fatalf("%d kinds, %d codes, %d names", len(atoll.Kinds()), numCodes, len(codeNames()))
	}
	seen := make(map[string]bool)
	for i, kind := range atoll.Kinds() {
		code := codeOf(fmt.Errorf("x: %w", kind))
		if int(code) != i+1 || kindOf(code) != kind || seen[codeNames()[code]] {
			t.Errorf("kind %v has code %d, which is %v, named %s", kind, code, kindOf(code), codeNames()[code])
		}
		seen[codeNames()[code]] = true
	}
	if codeOf(nil) != 0 || kindOf(0) != nil || errorOf(0, "x") != nil {
		t.Error("success is not 0")
	}
	if !errors.Is(errorOf(60000, "from the future"), atoll.ErrUnavailable) {
		t.Error("an unknown code has no kind")
	}
	if kindOf(codeOf(context.Canceled)) != atoll.ErrTimeout || kindOf(codeOf(errors.New("x"))) != atoll.ErrIO {
		t.Error("errors of no kind")
	}
	if got := errorText(errors.New(strings.Repeat("x", 9999))); len(got) != maxText {
		t.Errorf("text of %d bytes", len(got))
	}
}

// TestReserve: the leave to use the reserve reaches the node, and the size as it
// was.
func TestReserve(t *testing.T) {
	r := newRig(t, "tcp", nil)
	c := r.client(1)
	for _, blocks := range []atoll.BlockNo{64, 64 | Reserve} {
		must(t, c.Create(ctxFor(t), seg1, 1, blocks))
		n := r.nodes[1]
		n.mu.Lock()
		if got := n.segs[seg1].size; got != blocks {
			t.Errorf("asked for %x, the node got %x", blocks, got)
		}
		n.mu.Unlock()
	}
}

// TestC11WrongIdentity swaps what lives behind an address: another cluster,
// another node, another disk in the node's place. Nothing may be answered.
func TestC11WrongIdentity(t *testing.T) {
	r := newRig(t, "tcp", nil)
	ctx := ctxFor(t)
	try := func(name string, change func(*ClientOptions)) {
		o := r.options(1)
		change(&o)
		c := NewClient(o)
		defer c.Close()
		if err := c.Create(ctx, seg1, 1, 8); !errors.Is(err, atoll.ErrIdentity) {
			t.Errorf("%s: create: %v", name, err)
		}
		if err := appendSync(c, seg1, 1, 0, pattern(1, 2)).Err; !errors.Is(err, atoll.ErrIdentity) {
			t.Errorf("%s: append: %v", name, err)
		}
		if err := c.Extend(ctx, seg1, 1, 0, pattern(1, 2)); !errors.Is(err, atoll.ErrIdentity) {
			t.Errorf("%s: extend: %v", name, err)
		}
	}
	try("cluster", func(o *ClientOptions) { o.Cluster = uuid(1) })
	try("node", func(o *ClientOptions) { o.Node = 77 })
	try("incarnation", func(o *ClientOptions) { o.Incarnation = uuid(77) })
	try("other node's incarnation", func(o *ClientOptions) { o.Node = 2 })

	c := r.client(1)
	must(t, c.Create(ctx, seg1, 1, 8))
	r.mu.Lock()
	r.nodes[1], r.nodes[2] = r.nodes[2], r.nodes[1]
	r.mu.Unlock()
	if err := appendSync(c, seg1, 1, 0, pattern(1, 2)).Err; !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("after a swap on a live connection: %v", err)
	}
}

// TestOrder starts appends to some segments from as many goroutines and expects
// the node to see each segment's in order.
func TestOrder(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, kind, func(o *ServerOptions) { o.Requests = 64 })
			o := PeersOptions{Net: r.net, TLS: r.tls, Cluster: cluster, Conns: 2}
			peers := NewPeers(o)
			defer peers.Close()
			var wg sync.WaitGroup
			for i := range 4 {
				wg.Go(func() {
					node := atoll.NodeID(i%2 + 1)
					c := peers.Client(r.addr, node, uuid(byte(node)))
					defer c.Close()
					appendMany(t, c, atoll.SegmentID{Medium: 1, Ordinal: atoll.Ordinal(i + 1)}, 60)
				})
			}
			wg.Wait()
		})
	}
}

// appendMany keeps 8 appends in flight and reads all back.
func appendMany(t *testing.T, c *Client, seg atoll.SegmentID, n int) {
	ctx := ctxFor(t)
	if err := c.Create(ctx, seg, 1, 16384); err != nil {
		t.Error(err)
		return
	}
	done := make(chan *Append, 8)
	for i := range 8 {
		done <- &Append{User: uint64(i)}
	}
	var want []byte
	at := atoll.BlockNo(0)
	for i := range n + 8 {
		a := <-done
		if a.Err != nil {
			t.Errorf("append: %v", a.Err)
			return
		}
		a.Vec.Release()
		if a.Vec = nil; i >= n {
			continue
		}
		p := pattern(i, 1+i%5)
		*a = Append{Seg: seg, Epoch: 1, Offset: at, Vec: vecOf(p), Done: done}
		at += atoll.BlockNo(len(p) / atoll.BlockSize)
		want = append(want, p...)
		c.Append(a)
	}
	got := make([]byte, len(want))
	if err := c.Read(ctx, seg, 0, got); err != nil {
		t.Error(err)
		return
	}
	equal(t, "read back", got, want)
}
