package stream

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// mustAppend appends an entry of one record.
func mustAppend(t testing.TB, w *Writer, key uint64, blocks int) *Entry {
	t.Helper()
	e := new(Entry)
	payload(e, key, blocks)
	if err := w.Append(context.Background(), e); err != nil {
		t.Fatalf("append %d: %v", key, err)
	}
	return e
}

// mustRead checks that every copy of the segment, and Read, give the entry back.
func mustRead(t testing.TB, c *fakeCluster, e *Entry, key uint64, skip ...atoll.NodeID) {
	t.Helper()
	want := make([]byte, e.Blocks()*atoll.BlockSize)
	fill(want, key)
	got := make([]byte, len(want))
	if err := c.view.Read(context.Background(), e.Seg(), e.Block(0), got); err != nil {
		t.Fatalf("read entry %d: %v", key, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("read entry %d: wrong bytes", key)
	}
	members, _ := c.view.Members(e.Seg())
	for _, id := range members {
		p := c.nodes[id].data(e.Seg())
		at := e.Block(0).Bytes()
		if int64(len(p)) < at+int64(len(want)) || !bytes.Equal(p[at:at+int64(len(want))], want) {
			t.Fatalf("entry %d is not on node %d", key, id)
		}
	}
}

func TestAppendReadClose(t *testing.T) {
	c := newFakeCluster(t, 3)
	w := c.writer(nil)
	for key := uint64(1); key <= 300; key++ { // several segments
		e := mustAppend(t, w, key, int(key%5)+1)
		mustRead(t, c, e, key)
		if e.Seq() != key {
			t.Fatalf("entry %d has sequence number %d", key, e.Seq())
		}
	}
	if err := w.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if open := c.open(); len(open) != 0 {
		t.Fatalf("open after close: %v", open)
	}
	seq := uint64(1)
	for _, s := range c.log() {
		if len(s.Unverified) > 0 {
			t.Errorf("segment %v has unverified copies", s.Seg)
		}
		err := c.view.Headers(context.Background(), s.Seg, 0, s.Length, func(h segment.Header) error {
			if h.Seq() != seq {
				t.Fatalf("batch at %v:%d begins with %d, want %d", s.Seg, h.Offset(), h.Seq(), seq)
			}
			seq += uint64(h.Records())
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if seq != 301 {
		t.Fatalf("log ends at %d", seq)
	}
	if err := w.Append(context.Background(), mustEntry(1)); !errors.Is(err, atoll.ErrClosed) {
		t.Fatalf("append after close: %v", err)
	}
}

func mustEntry(key uint64) *Entry {
	e := new(Entry)
	payload(e, key, 1)
	return e
}

// TestStall kills, and then stops, a node under load, and looks at the longest
// time that an append took.
func TestStall(t *testing.T) {
	cases := map[string]struct {
		harm func(*fakeNode)
		most time.Duration
	}{
		"killed":  {func(n *fakeNode) { n.fail(atoll.ErrUnreachable) }, 50 * time.Millisecond},
		"stopped": {func(n *fakeNode) { n.pause() }, 350 * time.Millisecond},
		"full":    {func(n *fakeNode) { n.fail(atoll.ErrNoSpace) }, 50 * time.Millisecond},
		"broken":  {func(n *fakeNode) { n.fail(atoll.ErrIO) }, 50 * time.Millisecond},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newFakeCluster(t, 5)
				for _, n := range c.nodes {
					n.delay = func(string) time.Duration { return time.Millisecond }
				}
				w := c.writer(nil)
				longest := time.Duration(0)
				for key := uint64(1); key <= 400; key++ {
					if key == 200 {
						e := mustAppend(t, w, 10000, 1)
						members, _ := c.view.Members(e.Seg())
						tc.harm(c.nodes[members[0]])
					}
					began := time.Now()
					mustAppend(t, w, key, 1)
					longest = max(longest, time.Since(began))
				}
				if longest > tc.most {
					t.Errorf("longest append took %v", longest)
				}
				t.Logf("longest append took %v", longest)
				if err := w.Close(context.Background()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Roll and Close end in time although neither nodes nor catalog answer, also
// when the caller set no deadline.
func TestCloseUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		w := c.writer(nil)
		mustAppend(t, w, 1, 1)
		c.mu.Lock()
		c.refuse = atoll.ErrUnreachable
		c.mu.Unlock()
		for _, n := range c.nodes {
			n.pause()
		}
		e := mustEntry(2)
		if err := w.Submit(context.Background(), e); err != nil {
			t.Fatal(err)
		}
		for _, end := range []func(context.Context) error{w.Roll, w.Close} {
			began := time.Now()
			if err := end(context.Background()); err == nil {
				t.Error("it ended well")
			}
			if d := time.Since(began); d > 2*atoll.RequestTimeout {
				t.Errorf("it took %v", d)
			}
		}
		if err := e.Wait(context.Background()); err == nil {
			t.Error("an append that nobody answered for succeeded")
		}
		for _, n := range c.nodes {
			n.resume()
		}
	})
}

// W1: an owner whose lease ran out acknowledges nothing any more, also when all
// copies have it, and a write that hangs then ends by itself.
func TestLeaseRanOut(t *testing.T) {
	for _, hang := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := newFakeCluster(t, 3)
			valid := true
			var mu sync.Mutex
			w := c.writer(func(o *WriterOptions) {
				o.Valid = func() bool { mu.Lock(); defer mu.Unlock(); return valid }
			})
			e := mustAppend(t, w, 1, 2)
			if hang {
				for _, n := range c.nodes {
					n.pause()
				}
			}
			second := mustEntry(2)
			if hang {
				if err := w.Submit(t.Context(), second); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
			}
			mu.Lock()
			valid = false
			mu.Unlock()
			var err error
			if hang {
				err = second.Wait(t.Context())
			} else {
				err = w.Append(t.Context(), second)
			}
			if !errors.Is(err, atoll.ErrFenced) {
				t.Errorf("append after the lease (nodes hang: %v): %v", hang, err)
			}
			for _, n := range c.nodes {
				n.resume()
			}
			mustRead(t, c, e, 1)
			if err := w.Close(t.Context()); !errors.Is(err, atoll.ErrFenced) {
				t.Errorf("close after the lease: %v", err)
			}
		})
	}
}
