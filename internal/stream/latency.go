package stream

import (
	"math/bits"
	"time"
)

// latencies is a small decaying histogram: four buckets for each power of two
// microseconds, so a quantile is right within a fifth.
type latencies struct {
	counts [96]uint32
	total  uint32
}

func latencyBucket(d time.Duration) int {
	us := uint64(max(d/time.Microsecond, 1))
	e := bits.Len64(us) - 1
	sub := uint64(0)
	if e >= 2 {
		sub = us >> (e - 2) & 3
	}
	return min(4*e+int(sub), 95)
}

// add counts a latency. After 4096 of them the older ones weigh half.
func (l *latencies) add(d time.Duration) {
	l.counts[latencyBucket(d)]++
	if l.total++; l.total < 4096 {
		return
	}
	l.total = 0
	for i := range l.counts {
		l.counts[i] /= 2
		l.total += l.counts[i]
	}
}

// quantile returns the upper edge of the bucket that holds the quantile q of
// the latencies; 0 when there are too few to tell.
func (l *latencies) quantile(q float64) time.Duration {
	if l.total < 32 {
		return 0
	}
	left := int64(float64(l.total) * (1 - q))
	for i := len(l.counts) - 1; i >= 0; i-- {
		if left -= int64(l.counts[i]); left < 0 {
			e, sub := i/4, uint64(i%4)
			return time.Duration((uint64(1)<<e)+(sub+1)<<max(e-2, 0)) * time.Microsecond
		}
	}
	return 0
}

func (l *latencies) p99() time.Duration { return l.quantile(0.99) }
