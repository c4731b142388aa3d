package stream

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Appends that come one by one are carried out by their senders; as soon as two
// come together they are not.
func TestDirect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		rounds := c.direct()
		w := c.writer(nil)
		for _, n := range c.nodes {
			n.delay = func(string) time.Duration { return time.Millisecond }
		}
		for key := range uint64(100) {
			mustAppend(t, w, key, 1)
			synctest.Wait() // the writer's goroutine may have the turn still
		}
		if n := rounds.Load(); n != 100-aloneRuns {
			t.Errorf("%d of 100 lone appends were carried out by their senders", n)
		}
		rounds.Store(0)
		var wg sync.WaitGroup
		for k := range uint64(2) {
			wg.Go(func() {
				for i := range uint64(100) {
					mustAppend(t, w, k<<32|i, 1)
				}
			})
		}
		wg.Wait()
		if n := rounds.Load(); n > 50 {
			t.Errorf("%d appends that had company were carried out by their senders", n)
		}
		if err := w.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// While a sender is stuck in its append, the others' fail in time, the writer
// can be closed, and the sender ends with the disks.
func TestDirectStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, 3)
		rounds := c.direct()
		w := c.writer(func(o *WriterOptions) { o.Timeout = 2 * time.Second })
		for key := range uint64(50) {
			mustAppend(t, w, key, 1)
			synctest.Wait() // the writer's goroutine may have the turn still
		}
		for _, n := range c.nodes {
			n.pause()
		}
		before := rounds.Load()
		stuck := make(chan error)
		go func() { stuck <- w.Append(context.Background(), mustEntry(100)) }()
		synctest.Wait()
		if rounds.Load() != before+1 {
			t.Fatal("the append was not carried out by its sender")
		}
		began := time.Now()
		if err := w.Append(context.Background(), mustEntry(101)); !errors.Is(err, atoll.ErrUnavailable) {
			t.Errorf("append behind a stuck one: %v", err)
		}
		if d := time.Since(began); d > 3*time.Second {
			t.Errorf("it took %v to fail", d)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := w.Close(ctx); errors.Is(err, atoll.ErrTimeout) {
			t.Error(err)
		}
		for _, n := range c.nodes {
			n.resume()
		}
		if err := <-stuck; !errors.Is(err, atoll.ErrUnavailable) {
			t.Errorf("the stuck append: %v", err)
		}
	})
}
