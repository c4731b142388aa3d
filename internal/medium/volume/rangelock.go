package volume

import (
	"context"
	"fmt"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
)

// rangeLock serialises work on overlapping ranges of pages, in the order of
// arrival. Uncontended locking allocates nothing in steady state.
type rangeLock struct {
	mu      sync.Mutex
	held    []pageRange
	waiting []*rangeWaiter // oldest first
}

// pageRange is the pages [from, to).
type pageRange struct{ from, to pageNo }

func (a pageRange) overlaps(b pageRange) bool { return a.from < b.to && b.from < a.to }

type rangeWaiter struct {
	pageRange
	ready chan struct{}
}

// lock waits until nothing that overlaps r is held or came before.
func (l *rangeLock) lock(ctx context.Context, r pageRange) error {
	l.mu.Lock()
	if !l.blocked(r, len(l.waiting)) {
		l.held = append(l.held, r)
		l.mu.Unlock()
		return nil
	}
	w := &rangeWaiter{r, make(chan struct{})}
	l.waiting = append(l.waiting, w)
	l.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, x := range l.waiting {
		if x == w {
			l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
			l.grant()
			return fmt.Errorf("wait for pages %d to %d: %w: %w", r.from, r.to, atoll.ErrTimeout, ctx.Err())
		}
	}
	return nil // granted in the same moment
}

// unlock gives r back and lets in who waited for it.
func (l *rangeLock) unlock(r pageRange) {
	l.mu.Lock()
	for i := range l.held {
		if l.held[i] == r {
			l.held[i] = l.held[len(l.held)-1]
			l.held = l.held[:len(l.held)-1]
			break
		}
	}
	if len(l.waiting) > 0 {
		l.grant()
	}
	l.mu.Unlock()
}

// blocked reports whether r must wait for a held range or one of the first n
// that wait.
func (l *rangeLock) blocked(r pageRange, n int) bool {
	for i := range l.held {
		if l.held[i].overlaps(r) {
			return true
		}
	}
	for _, w := range l.waiting[:n] {
		if w.overlaps(r) {
			return true
		}
	}
	return false
}

func (l *rangeLock) grant() {
	for i := 0; i < len(l.waiting); {
		w := l.waiting[i]
		if l.blocked(w.pageRange, i) {
			i++
			continue
		}
		l.held = append(l.held, w.pageRange)
		l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
		close(w.ready)
	}
}
