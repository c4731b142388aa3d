package qos

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Op says what an operation is.
type Op int

// The operations that are told apart.
const (
	Read Op = iota
	Write
	total // both
	lines = iota
)

// Throttle keeps operations to limits. A nil Throttle has none. All methods may
// be called concurrently.
type Throttle struct {
	base  time.Time
	on    atomic.Bool // there is a limit
	lines [lines]line // by Op

	waits  atomic.Uint64
	waited atomic.Int64

	mu struct {
		sync.Mutex // held for memory work only; taken before a line's
		limits     Limits
	}
}

// New returns a Throttle without limits.
func New() *Throttle { return &Throttle{base: time.Now()} }

// Set changes the limits, also for those who wait now. ErrInvalid, and nothing
// changes, if they make no sense.
func (t *Throttle) Set(l Limits) error {
	if err := l.Check(); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.limits = l
	t.on.Store(l != Limits{})
	now := t.now()
	t.lines[Read].set(now, l[IOPSRead], l[BPSRead])
	t.lines[Write].set(now, l[IOPSWrite], l[BPSWrite])
	t.lines[total].set(now, l[IOPSTotal], l[BPSTotal])
	return nil
}

// Limits returns what Set set.
func (t *Throttle) Limits() Limits {
	if t == nil {
		return Limits{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.limits
}

// Stats tells how many operations had to wait, and how long together.
func (t *Throttle) Stats() (waits uint64, waited time.Duration) {
	if t == nil {
		return 0, 0
	}
	return t.waits.Load(), time.Duration(t.waited.Load())
}

// Wait returns when an operation of n bytes may begin: at once where there is no
// limit or room for it, without allocating. It fails only when the context ends,
// with ErrTimeout after a deadline.
func (t *Throttle) Wait(ctx context.Context, op Op, n int64) error {
	if t == nil || !t.on.Load() {
		return nil
	}
	begin := t.now()
	waited, err := t.lines[op].pass(ctx, t, begin, n)
	if err == nil {
		now := begin
		if waited {
			now = t.now()
		}
		var more bool
		more, err = t.lines[total].pass(ctx, t, now, n)
		waited = waited || more
	}
	if waited {
		t.waits.Add(1)
		t.waited.Add(t.now() - begin)
	}
	return err
}

// now returns the time of the Throttle's clock.
func (t *Throttle) now() int64 { return int64(time.Since(t.base)) }

// line is what operations of one kind pass one after another.
type line struct {
	on atomic.Bool // there is a limit, or somebody waits
	mu struct {
		sync.Mutex  // held for memory work only
		ops, bytes  bucket
		first, last *waiter
		free        *waiter
	}
}

// waiter is an operation that waits. Its fields but the channel and the timer
// are guarded by the line's mutex.
type waiter struct {
	n          int64
	prev, next *waiter
	passed     bool
	poke       chan struct{} // takes one value when it passed or became the first
	timer      *time.Timer
}

// set changes the limits.
func (l *line) set(now int64, ops, bytes Limit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mu.ops.set(now, ops)
	l.mu.bytes.set(now, bytes)
	l.on.Store(ops.Rate != 0 || bytes.Rate != 0)
	if l.mu.first != nil {
		l.advance(now)
		if l.mu.first != nil {
			l.mu.first.wake() // its timer is wrong now
		}
	}
}

// delay returns how long the first has to wait. mu is held.
func (l *line) delay(now int64) int64 { return max(l.mu.ops.delay(now), l.mu.bytes.delay(now)) }

// charge lets one operation pass. mu is held.
func (l *line) charge(now, n int64) {
	l.mu.ops.charge(now, 1)
	l.mu.bytes.charge(now, n)
}

// pass returns when an operation of n bytes has passed, and whether it waited.
func (l *line) pass(ctx context.Context, t *Throttle, now, n int64) (waited bool, err error) {
	if !l.on.Load() {
		return false, nil
	}
	l.mu.Lock()
	if l.mu.first == nil && l.delay(now) <= 0 {
		l.charge(now, n)
		l.mu.Unlock()
		return false, nil
	}
	w := l.join(n)
	l.mu.Unlock()
	return true, l.wait(ctx, t, w)
}

// wait returns when w has passed.
func (l *line) wait(ctx context.Context, t *Throttle, w *waiter) error {
	for {
		due := l.step(t, w)
		if due < 0 {
			return nil
		}
		var timer <-chan time.Time
		if due > 0 {
			w.timer.Reset(time.Duration(due))
			timer = w.timer.C
		}
		select {
		case <-timer:
		case <-w.poke:
		case <-ctx.Done():
			w.timer.Stop()
			if l.quit(t, w) {
				return ctxError(ctx.Err())
			}
			return nil
		}
		if timer != nil {
			w.timer.Stop()
		}
	}
}

// step lets pass who may. It returns a negative number if w has passed (and is
// not to be touched again), how long to sleep if w is the first, and else 0.
func (l *line) step(t *Throttle, w *waiter) (due int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w == l.mu.first {
		now := t.now()
		l.advance(now)
		due = max(l.delay(now), 1)
	}
	if w.passed {
		l.recycle(w)
		return -1
	}
	if w != l.mu.first {
		return 0
	}
	return due
}

// quit takes w out of the line and reports whether it had not passed yet.
func (l *line) quit(t *Throttle, w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	gone := !w.passed
	if gone {
		l.leave(w)
		if w.prev == nil && l.mu.first != nil {
			l.mu.first.wake()
		}
	}
	l.recycle(w)
	return gone
}

// advance lets pass who may, first come first served, and wakes who is first
// after that. mu is held.
func (l *line) advance(now int64) {
	moved := false
	for l.mu.first != nil && l.delay(now) <= 0 {
		w := l.mu.first
		l.charge(now, w.n)
		l.leave(w)
		w.passed, moved = true, true
		w.wake()
	}
	if moved && l.mu.first != nil {
		l.mu.first.wake()
	}
}

// join puts an operation at the end of the line. mu is held.
func (l *line) join(n int64) *waiter {
	w := l.mu.free
	if w == nil {
		w = &waiter{poke: make(chan struct{}, 1), timer: time.NewTimer(time.Hour)}
		w.timer.Stop()
	} else {
		l.mu.free = w.next
	}
	w.n, w.passed, w.next, w.prev = n, false, nil, l.mu.last
	if w.prev == nil {
		l.mu.first = w
	} else {
		w.prev.next = w
	}
	l.mu.last = w
	return w
}

// leave takes w out of the line; w.prev stays as it was. mu is held.
func (l *line) leave(w *waiter) {
	if w.prev == nil {
		l.mu.first = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		l.mu.last = w.prev
	} else {
		w.next.prev = w.prev
	}
}

// recycle keeps w for the next one who waits. mu is held.
func (l *line) recycle(w *waiter) {
	select {
	case <-w.poke:
	default:
	}
	w.next, w.prev = l.mu.free, nil
	l.mu.free = w
}

// wake makes w look again.
func (w *waiter) wake() {
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

// ctxError gives a context's error its kind.
func ctxError(err error) error {
	if err == context.DeadlineExceeded {
		return fmt.Errorf("wait for a rate limit: %w: %w", atoll.ErrTimeout, err)
	}
	return fmt.Errorf("wait for a rate limit: %w", err)
}
