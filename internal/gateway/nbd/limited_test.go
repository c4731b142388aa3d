package nbd

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
	"github.com/atollstore/atoll/internal/qos"
)

// pipe serves exports in memory, for use in a bubble, and returns a client.
func pipe(t *testing.T, e Exports, name string) *Client {
	t.Helper()
	s := Serve(Options{Exports: e})
	t.Cleanup(func() { s.Close() })
	c, err := Dial(t.Context(), "nbd://x/"+name, DialOptions{Contexts: []string{ContextDepth}, DialContext: func(context.Context, string, string) (net.Conn, error) {
		mine, theirs := net.Pipe()
		s.wg.Go(func() { s.ServeConn(theirs) })
		return mine, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A request counts once with its bytes, whatever parts it is carried out in, and
// limits that change hold at once.
func TestLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := qos.New()
		disk := nbdtest.NewDisk(8 << 20)
		for off := int64(0); off < 8<<20; off += 128 << 10 { // every other page is a hole
			if err := disk.Write(t.Context(), nil, []byte{1}, off, false); err != nil {
				t.Fatal(err)
			}
		}
		sh := &shelf{disks: map[string]Device{"disk": Limited(disk, q)}, infos: map[string]Info{}}
		c := pipe(t, sh, "disk")
		ctx, p := t.Context(), make([]byte, 1<<20)
		count := func(l qos.Limits, want int64, call func() error) {
			t.Helper()
			if err := q.Set(l); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour) // from rest
			if err := call(); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			var n atomic.Int64
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for time.Since(begin) < 10*time.Second {
						if err := call(); err != nil {
							t.Error(err)
							return
						}
						n.Add(1)
					}
				})
			}
			wg.Wait()
			if got := n.Load(); got < want-want/50-1 || got > want+want/50+9 {
				t.Errorf("%v: %d in 10 s, want %d", l, got, want)
			}
		}
		read := func() error { return c.ReadAt(ctx, p[:1<<20:1<<20], 0) }
		fresh := func() error { return c.ReadAt(ctx, make([]byte, 1<<20), 0) }
		write := func() error { return c.WriteAt(ctx, p[:4096], 0, false) }
		if err := read(); err != nil {
			t.Fatal(err)
		}
		count(qos.Limits{qos.IOPSRead: {Rate: 50}}, 500, fresh)
		count(qos.Limits{qos.BPSTotal: {Rate: 10 << 20}}, 100, fresh)
		count(qos.Limits{qos.IOPSTotal: {Rate: 100}, qos.BPSRead: {Rate: 1}}, 1000, write)
		count(qos.Limits{qos.BPSWrite: {Rate: 1 << 20}}, 2560, write)
		count(qos.Limits{qos.IOPSWrite: {Rate: 20}, qos.BPSWrite: {Rate: 1}}, 200, func() error { return c.Zero(ctx, 0, 1<<20, true, false) })
		count(qos.Limits{qos.IOPSWrite: {Rate: 20}, qos.BPSWrite: {Rate: 1}}, 200, func() error { return c.Trim(ctx, 0, 1<<20, false) })

		// Those who wait for the limit of writes do not hold up the others, and end
		// with the connection.
		if err := q.Set(qos.Limits{qos.IOPSWrite: {Rate: 1}}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var failed atomic.Int32
		for range 20 {
			wg.Go(func() {
				if err := write(); errors.Is(err, atoll.ErrClosed) {
					failed.Add(1)
				}
			})
		}
		begin := time.Now()
		if err := errors.Join(fresh(), c.Flush(ctx)); err != nil || time.Since(begin) > 10*time.Millisecond {
			t.Errorf("a read and a flush took %v: %v", time.Since(begin), err)
		}
		time.Sleep(3 * time.Second)
		c.Close()
		wg.Wait()
		if n := failed.Load(); n < 14 || n > 17 {
			t.Errorf("%d writes failed with the connection", n)
		}
	})
}

func TestLimitedVersioned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sh, d := history(t)
		sh.add("disk", Limited(d, nil), Info{})
		c := pipe(t, sh, "disk")
		if got := runsOf(t, c, ContextDepth); !slices.Equal(got, []run{{1 << 20, 1}, {3 << 20, 0}}) {
			t.Errorf("depth %v", got)
		}
		sh.add("plain", Limited(nbdtest.NewMemory(4096), nil), Info{})
		c = pipe(t, sh, "plain")
		if err := c.Status(t.Context(), ContextDepth, 0, 4096, nil); !errors.Is(err, atoll.ErrNotExist) {
			t.Error(err)
		}
	})
}

// The methods of a limited device keep the limits too.
func TestLimitedDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := qos.New()
		if err := q.Set(qos.Limits{qos.IOPSTotal: {Rate: 1}}); err != nil {
			t.Fatal(err)
		}
		dev, ctx := Limited(nbdtest.NewMemory(1<<20), q), t.Context()
		p := make([]byte, 512)
		begin := time.Now()
		err := errors.Join(dev.Read(ctx, p, 0), dev.Write(ctx, nil, p, 0, false), dev.Zero(ctx, 0, 512, true, false), dev.Discard(ctx, 0, 512, false), dev.Flush(ctx))
		if took := time.Since(begin); err != nil || took != 3*time.Second-qos.Slack {
			t.Errorf("four operations took %v: %v", took, err)
		}
	})
}
