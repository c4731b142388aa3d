package stream

import (
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// load is what a process knows of how fast a node answers its reads.
type load struct {
	reading atomic.Int64 // reads under way
	average atomic.Int64 // of a small read in nanoseconds, recent ones weigh most
	since   atomic.Int64 // when it answered last, or when the oldest of the reads under way began
}

// Bounds of what a node may take for a read.
const (
	slowRead  = 5 * time.Millisecond  // on average, to be read without a watch
	stuckRead = 30 * time.Millisecond // without any answer
	minHedge  = 2 * time.Millisecond
	maxHedge  = 50 * time.Millisecond

	// byteTime is what a byte of a read may take besides: many long reads at once
	// take a disk that long, which does not make it a slow one.
	byteTime = float64(time.Second) / (100 << 20)
)

// begin notes the start of a read and returns its time.
func (l *load) begin(epoch time.Time) time.Duration {
	now := time.Since(epoch)
	if l.reading.Add(1) == 1 {
		l.since.Store(int64(now))
	}
	return now
}

// end notes the end of a read of so many bytes.
func (l *load) end(epoch time.Time, began time.Duration, bytes int) {
	now := time.Since(epoch)
	l.reading.Add(-1)
	l.since.Store(int64(now))
	old := l.average.Load()
	took := max(now-began-extra(bytes), 0)
	l.average.Store(old + (int64(took)-old)/8)
}

// slow reports whether a read should be watched and hedged.
func (l *load) slow(epoch time.Time) bool {
	if time.Duration(l.average.Load()) > slowRead {
		return true
	}
	return l.reading.Load() > 0 && time.Since(epoch)-time.Duration(l.since.Load()) > stuckRead
}

// cost orders nodes by how long a read is likely to take.
func (l *load) cost() int64 { return (l.average.Load() + 1000) * (l.reading.Load() + 1) }

// hedge returns how long to wait for so many bytes before asking another copy as
// well.
func (l *load) hedge(bytes int) time.Duration {
	return min(max(3*time.Duration(l.average.Load()), minHedge), maxHedge) + extra(bytes)
}

// extra is what a read may take because it is not of one block only.
func extra(bytes int) time.Duration { return time.Duration(float64(bytes-atoll.BlockSize) * byteTime) }
