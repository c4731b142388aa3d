package heal

import (
	"context"
	"sync"
	"time"
)

const (
	// calm is how long a node must not have been asked anything to count as idle.
	calm = 500 * time.Millisecond
	// share is the part of what it does when idle that a busy node copies, and
	// least the least.
	share = 4
	least = 16 << 20
	first = 256 << 20 // taken as its speed before it is known
)

// pacer holds a node's copying down: at full speed while nobody asks the node
// for anything, and at a share of that while somebody does.
type pacer struct {
	requests func() uint64
	limit    int64 // 0: none

	mu struct {
		sync.Mutex
		seen    uint64
		busy    time.Time // when something was asked last
		looked  time.Time
		speed   float64 // bytes a second when idle
		next    time.Time
		window  time.Time // of the measurement of speed
		bytes   int64
		held    bool // something was held down in this window
		started bool
	}
}

func newPacer(requests func() uint64, limit int64) *pacer {
	p := &pacer{requests: requests, limit: limit}
	p.mu.seen, p.mu.speed, p.mu.window = requests(), first, time.Now()
	return p
}

// Wait implements stream.Pacer.
func (p *pacer) Wait(ctx context.Context, bytes int) error {
	d := p.take(bytes, time.Now())
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// take enters bytes and returns how long to wait before they are copied.
func (p *pacer) take(bytes int, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := &p.mu
	if n := p.requests(); n != m.seen {
		m.seen, m.busy = n, now
	}
	p.measure(bytes, now)
	rate := float64(p.limit)
	if now.Sub(m.busy) < calm && !m.busy.IsZero() {
		if slow := max(m.speed/share, least); rate == 0 || slow < rate {
			rate = slow
		}
	}
	if rate == 0 {
		m.next = now
		return 0
	}
	m.held = true
	at := m.next
	if at.Before(now) {
		at = now
	}
	m.next = at.Add(time.Duration(float64(bytes) / rate * float64(time.Second)))
	return at.Sub(now)
}

// measure learns the speed from seconds in which nothing was held down.
func (p *pacer) measure(bytes int, now time.Time) {
	m := &p.mu
	m.bytes += int64(bytes)
	d := now.Sub(m.window)
	if d < time.Second {
		return
	}
	if !m.held && d < 3*time.Second && m.started {
		m.speed = 0.7*m.speed + 0.3*float64(m.bytes)/d.Seconds()
	}
	m.window, m.bytes, m.held, m.started = now, 0, false, true
}
