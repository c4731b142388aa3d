package medium

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// owner holds the head and makes every change of it, one at a time. It is the
// shell around the steps in head.go.
type owner struct {
	catalog *catalog.Catalog
	sem     chan struct{}   // room for one: whoever changes the head
	lose    func(err error) // called when the epoch turns out to be lost
	mu      struct {
		sync.Mutex
		head catalog.Head
	}
}

func newOwner(c *catalog.Catalog, h catalog.Head, lose func(error)) *owner {
	o := &owner{catalog: c, sem: make(chan struct{}, 1), lose: lose}
	o.mu.head = h
	return o
}

// head returns the head as last written. Its slices must not be changed.
func (o *owner) head() catalog.Head {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.head
}

func (o *owner) put(h catalog.Head) {
	o.mu.Lock()
	o.mu.head = h
	o.mu.Unlock()
}

// change applies a step to the head and writes it. When it returns nil the new
// head is durable. A lost answer is settled by reading the head again; the wait
// ends with ctx or after atoll.RequestTimeout, and what happened is then
// unknown until the next change reads it.
func (o *owner) change(ctx context.Context, step func(catalog.Head) (catalog.Head, error)) error {
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	if err := acquire(ctx, o.sem); err != nil {
		return fmt.Errorf("change head: %w", err)
	}
	defer func() { <-o.sem }()
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		old := o.head()
		want, err := step(old)
		if err != nil || sameHead(old, want) {
			return err
		}
		got, err := o.catalog.SwapHead(ctx, want, added(old, want)...)
		if err == nil {
			o.put(got)
			return nil
		}
		if errors.Is(err, atoll.ErrBusy) {
			return err // nothing was written, and another copyset is to be chosen
		}
		if errors.Is(err, atoll.ErrFenced) {
			o.lose(err)
			return fmt.Errorf("change head of medium %v: %w", old.Medium, err)
		}
		if done, err := o.settle(ctx, want, err); done || err != nil {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return fmt.Errorf("change head of medium %v: %w", old.Medium, err)
		}
	}
}

// added lists the copysets of the segments that want registers.
func added(old, want catalog.Head) (into []atoll.CopysetID) {
	for _, u := range want.Unsealed {
		if u.Seg.Ordinal >= old.Next {
			into = append(into, u.Seg.Copyset)
		}
	}
	return into
}

// settle finds out what became of a change that ended with cause: done, to be
// tried again from the head that stands, or lost to another owner. A head of
// our epoch is our own work, if only that of an earlier change whose answer
// never came.
func (o *owner) settle(ctx context.Context, want catalog.Head, cause error) (done bool, err error) {
	got, err := o.catalog.Head(ctx, want.Medium)
	if err != nil {
		if ctx.Err() != nil {
			return false, fmt.Errorf("change head of medium %v: %w", want.Medium, timeout(cause))
		}
		return false, nil
	}
	if got.Epoch == want.Epoch {
		o.put(got)
		return sameHead(got, want), nil
	}
	err = fmt.Errorf("change head of medium %v: epoch %v stands, ours is %v: %w", want.Medium, got.Epoch, want.Epoch, atoll.ErrFenced)
	o.lose(err)
	return false, err
}

// timeout gives an error of a context the kind it has in this project.
func timeout(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", atoll.ErrTimeout, err)
	}
	return err
}

// acquire takes a place in a channel semaphore.
func acquire(ctx context.Context, sem chan struct{}) error {
	select {
	case sem <- struct{}{}:
		return nil
	default:
	}
	select {
	case sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return timeout(ctx.Err())
	}
}

// sleep waits, at most until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return timeout(ctx.Err())
	}
}
