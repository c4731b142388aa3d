package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

const (
	// spaceWait bounds how long a write waits for space that is being
	// reclaimed, and spaceStill how long while nothing moves.
	spaceWait  = 20 * time.Second
	spaceStill = 2 * time.Second
	spaceLook  = 100 * time.Millisecond
	// Bytes per second: what may always be written, and what reclaim is taken to
	// free before it is known.
	leastRate = 4 << 20
	firstRate = 64 << 20
	rateOver  = 100 * time.Millisecond
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
	rate    float64       // bytes that reclaim frees in a second of its work
	since   time.Time     // when it was taken last,
	won     int64         // and what was freed since then
	worked  time.Time     // when the last compaction ended
}

func (d *paceDelay) init() { d.more, d.rate = make(chan struct{}), firstRate }

// set follows the space. Nobody waits when there is nothing to wait for.
func (d *paceDelay) set(s stock, waits bool) {
	if !waits {
		d.perPage.Store(0)
		return
	}
	d.mu.Lock()
	rate := d.rate
	d.mu.Unlock()
	d.perPage.Store(int64(delayFor(s, rate)))
}

// delayFor returns what a page costs when reclaim frees rate bytes a second.
func delayFor(s stock, rate float64) time.Duration {
	if s.part >= stockPace {
		return 0
	}
	rate *= max(s.part, 0) + 1 - stockHeld
	if soon := 2 * s.Segment; s.Free < soon { // what comes back is not there yet
		rate *= max(float64(s.Free), 0) / float64(soon)
	}
	return time.Duration(float64(time.Second) * atoll.BlockSize / max(rate, leastRate))
}

// freed notes that a compaction that began then won so many bytes, and wakes
// those who wait for space. Several may run at once.
func (d *paceDelay) freed(bytes int64, begun time.Time) {
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if begun.Sub(d.worked) > rateOver { // nothing ran in between
		d.since, d.won = begun, 0
	}
	d.worked, d.won = now, d.won+bytes
	if took := now.Sub(d.since); took >= rateOver {
		d.rate += 0.3 * (float64(d.won)/took.Seconds() - d.rate)
		d.since, d.won = now, 0
	}
	close(d.more)
	d.more = make(chan struct{})
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
	if time.Now().UnixNano()-v.reclaim.looked.Load() > int64(gaugeTime) {
		v.gauge()
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
	room    medium.Room
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
	room := v.store.Room()
	left, waiting, writes := v.store.Reclaimable(), v.store.Waiting(), v.stats.checkpoints.Load()
	if h.since.IsZero() {
		h.since, h.moved, h.first = now, now, writes
	} else if left != h.left || waiting != h.waiting || room != h.room || writes != h.writes {
		h.moved = now
	}
	h.left, h.waiting, h.room, h.writes = left, waiting, room, writes
	if now.Sub(h.since) > spaceWait || now.Sub(h.moved) > spaceStill {
		return false
	}
	// What waits for a checkpoint is worth one, no more. With room again it is
	// placement that has not noticed.
	return left > 0 || waiting > 0 && writes == h.first || room.Total == 0 || room.Free > 2*room.Segment
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
