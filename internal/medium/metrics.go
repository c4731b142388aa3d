package medium

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what the media of a process do. A nil Metrics counts nothing.
type Metrics struct {
	manifestSeconds prometheus.Histogram
	openSeconds     prometheus.Histogram
	segmentsRemoved prometheus.Counter
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	buckets := prometheus.ExponentialBuckets(0.0005, 2, 16)
	m := &Metrics{
		manifestSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "atoll_medium_manifest_duration_seconds", Help: "Time to write a manifest.", Buckets: buckets}),
		openSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "atoll_medium_open_duration_seconds", Help: "Time to open a medium, without replay.", Buckets: buckets}),
		segmentsRemoved: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_gc_segments_removed_total", Help: "Dead segments removed from all their nodes."}),
	}
	reg.MustRegister(m.manifestSeconds, m.openSeconds, m.segmentsRemoved)
	return m
}

func (m *Metrics) manifest(d time.Duration) {
	if m != nil {
		m.manifestSeconds.Observe(d.Seconds())
	}
}

func (m *Metrics) opened(d time.Duration) {
	if m != nil {
		m.openSeconds.Observe(d.Seconds())
	}
}

func (m *Metrics) removed() {
	if m != nil {
		m.segmentsRemoved.Inc()
	}
}
