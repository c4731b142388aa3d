package qos

import (
	"math/bits"
	"time"
)

// Slack is how far use may run ahead of the rate, at the beginning and after
// having fallen behind.
const Slack = 50 * time.Millisecond

// far bounds how far a meter runs ahead, so that no sum overflows.
const far = 1 << 60

// meter is one rate. Times are nanoseconds of the Throttle's clock.
type meter struct {
	rate   int64 // a second; 0 means that it does not count
	ahead, // how far paid may be ahead of the clock
	paid int64 // up to when what passed is paid for
	rest uint64 // of the last division, in 1/rate nanoseconds
}

// set changes the rate. What is owed stays, as far as ahead allows.
func (m *meter) set(now, rate, ahead int64) {
	if rate != m.rate {
		m.rate, m.rest = rate, 0
	}
	m.ahead = min(ahead, far)
	m.paid = min(m.paid, now+m.ahead)
}

// delay returns how long the next one has to wait.
func (m *meter) delay(now int64) int64 {
	if m.rate == 0 {
		return 0
	}
	return m.paid - m.ahead - now
}

// charge lets n pass.
func (m *meter) charge(now, n int64) {
	if m.rate == 0 {
		return
	}
	if m.paid < now {
		m.paid, m.rest = now, 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(time.Second))
	lo, carry := bits.Add64(lo, m.rest, 0)
	hi += carry
	cost := uint64(far)
	if hi < uint64(m.rate) {
		cost, m.rest = bits.Div64(hi, lo, uint64(m.rate))
	}
	m.paid += int64(min(cost, far))
	m.paid = min(m.paid, now+2*far)
}

// bucket is one Limit: the rate of the long run, and that of bursts.
type bucket struct{ long, burst meter }

// set changes the limit. Time spent above the rate is bounded so that Burst can
// be kept up for exactly Length.
func (b *bucket) set(now int64, l Limit) {
	ahead := int64(Slack)
	if l.Burst <= l.Rate {
		b.burst.set(now, 0, 0)
		b.long.set(now, l.Rate, ahead)
		return
	}
	length := l.Length
	if length == 0 {
		length = time.Second
	}
	over := float64(l.Burst-l.Rate) / float64(l.Rate) * float64(length)
	b.burst.set(now, l.Burst, ahead)
	b.long.set(now, l.Rate, ahead+int64(min(over, far)))
}

func (b *bucket) delay(now int64) int64 { return max(b.long.delay(now), b.burst.delay(now)) }

func (b *bucket) charge(now, n int64) {
	b.long.charge(now, n)
	b.burst.charge(now, n)
}
