package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

const (
	// spaceWait bounds how long a write waits for space that is being
	// reclaimed, and spaceStill how long while nothing moves.
	spaceWait  = 20 * time.Second
	spaceStill = 2 * time.Second
	spaceLook  = 100 * time.Millisecond
	// Bytes per second that may be written at slowUsed and at fullUsed.
	slowRate = 400 << 20
	fullRate = 4 << 20
	// paceSlack is what a write need not wait for.
	paceSlack = 500 * time.Microsecond
)

// paceDelay slows writers down while space is short, all of them together, so
// that reclaim keeps up.
type paceDelay struct {
	perPage atomic.Int64 // nanoseconds
	mu      sync.Mutex
	next    time.Time     // when the next page may be written
	more    chan struct{} // closed when space may have come back
}

func (d *paceDelay) init() { d.more = make(chan struct{}) }

// set follows the pressure.
func (d *paceDelay) set(used float64, reclaimable int64) {
	d.perPage.Store(int64(delayFor(used, reclaimable)))
}

// delayFor returns what a page costs: nothing up to slowUsed or when there is
// nothing to wait for.
func delayFor(used float64, reclaimable int64) time.Duration {
	if used <= slowUsed || reclaimable == 0 {
		return 0
	}
	room := 1 - min((used-slowUsed)/(fullUsed-slowUsed), 1)
	rate := slowRate*room*room*room + fullRate
	return time.Duration(float64(time.Second) * atoll.BlockSize / rate)
}

// freed wakes those who wait for space.
func (d *paceDelay) freed() {
	d.mu.Lock()
	close(d.more)
	d.more = make(chan struct{})
	d.mu.Unlock()
}

// take books a write of so many pages and returns how long it has to wait.
func (d *paceDelay) take(pages int64, now time.Time) time.Duration {
	cost := time.Duration(d.perPage.Load() * pages)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.next.Before(now) {
		d.next = now
	}
	wait := d.next.Sub(now)
	d.next = d.next.Add(cost)
	return wait
}

// pace waits as long as a write of n bytes has to. It costs nothing while there
// is space.
func (v *Volume) pace(ctx context.Context, n int64) error {
	d := &v.reclaim.delay
	if d.perPage.Load() == 0 {
		return nil
	}
	wait := d.take(max(n/atoll.BlockSize, 1), time.Now())
	if wait < paceSlack {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for reclaim: %w: %w", atoll.ErrTimeout, ctx.Err())
	case <-v.ctx.Done():
		return nil // what comes next will say it
	}
}

// hope is how someone who found no space judges whether more will come.
type hope struct {
	since   time.Time // of the first failure; zero when there was none
	moved   time.Time // when something last changed
	left    int64     // reclaimable then
	waiting int64
	used    float64
	writes  int64 // checkpoints
	first   int64 // checkpoints when it began
}

// more reports whether an append that failed with err should be tried again:
// while there is something to reclaim, and it gets on.
func (h *hope) more(v *Volume, err error) bool {
	if !errors.Is(err, atoll.ErrNoSpace) {
		return false
	}
	now := time.Now()
	left, waiting, used, writes := v.store.Reclaimable(), v.store.Waiting(), v.store.Pressure(), v.stats.checkpoints.Load()
	if h.since.IsZero() {
		h.since, h.moved, h.first = now, now, writes
	} else if left != h.left || waiting != h.waiting || used != h.used || writes != h.writes {
		h.moved = now
	}
	h.left, h.waiting, h.used, h.writes = left, waiting, used, writes
	if now.Sub(h.since) > spaceWait || now.Sub(h.moved) > spaceStill {
		return false
	}
	// What waits for a checkpoint is worth one, no more. With room again it is
	// placement that has not noticed.
	return left > 0 || waiting > 0 && writes == h.first || used < slowUsed
}

// untilSpace tries again what failed with err, as long as there is hope.
func (v *Volume) untilSpace(ctx context.Context, err error, try func() error) error {
	var h hope
	for err != nil && h.more(v, err) && v.awaitSpace(ctx) {
		err = try()
	}
	return err
}

// awaitSpace has space reclaimed and waits a while for it; false when it is no
// use to go on.
func (v *Volume) awaitSpace(ctx context.Context) bool {
	d := &v.reclaim.delay
	d.mu.Lock()
	more := d.more
	d.mu.Unlock()
	v.reclaim.urgent.Store(true)
	v.reclaim.short.Store(true)
	v.kickReclaim()
	v.kickCheckpoint()
	timer := time.NewTimer(spaceLook)
	defer timer.Stop()
	select {
	case <-more:
		return true
	case <-timer.C:
		return true
	case <-ctx.Done():
	case <-v.ctx.Done():
	}
	return false
}
