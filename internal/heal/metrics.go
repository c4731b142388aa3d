package heal

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what a process copies and evicts. A nil *Metrics counts nothing.
type Metrics struct {
	copies   prometheus.Counter
	failures prometheus.Counter
	bytes    prometheus.Counter
	took     prometheus.Histogram
	evicts   prometheus.Counter
}

// NewMetrics makes the metrics and registers them with reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &Metrics{
		copies:   counter("atoll_heal_copies_total", "Copies of segments made for new members of copysets."),
		failures: counter("atoll_heal_failures_total", "Copies that could not be made at one try."),
		bytes:    counter("atoll_heal_bytes_total", "Bytes of the copies made."),
		evicts:   counter("atoll_heal_evicted_total", "Copies removed from nodes that are no members any more."),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "atoll_heal_copy_seconds",
			Help: "Time to copy one segment and read it back.", Buckets: prometheus.ExponentialBuckets(0.01, 2, 14)}),
	}
	reg.MustRegister(m.copies, m.failures, m.bytes, m.took, m.evicts)
	return m
}

func (m *Metrics) copied(bytes int64, d time.Duration) {
	switch {
	case m == nil:
	case bytes == 0:
		m.failures.Inc()
	default:
		m.copies.Inc()
		m.bytes.Add(float64(bytes))
		m.took.Observe(d.Seconds())
	}
}

func (m *Metrics) evicted(n int) {
	if m != nil {
		m.evicts.Add(float64(n))
	}
}
