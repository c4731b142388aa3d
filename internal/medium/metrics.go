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
	manifestBytes   *prometheus.CounterVec
	versionsMade    prometheus.Counter
	versions        prometheus.Gauge
	liveBytes       prometheus.Gauge
	deadBytes       prometheus.Gauge
	movedBytes      prometheus.Counter
	reclaimedBytes  prometheus.Counter
	writtenBytes    prometheus.Counter
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
		manifestBytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "atoll_medium_manifest_bytes_total", Help: "Bytes written for manifests, one copy, by part."}, []string{"part"}),
		versionsMade: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_snapshot_total", Help: "Versions made of media owned here."}),
		versions: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "atoll_medium_versions", Help: "Versions of the media owned here, with hidden ones."}),
		liveBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "atoll_gc_live_bytes", Help: "Bytes that versions and present states of media owned here refer to, one copy."}),
		deadBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "atoll_gc_dead_bytes", Help: "Bytes in sealed segments of media owned here that nothing refers to, one copy."}),
		movedBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_gc_moved_bytes_total", Help: "Bytes copied by compaction, one copy."}),
		reclaimedBytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_gc_reclaimed_bytes_total", Help: "Bytes of segments removed from all their nodes, one copy."}),
	}
	m.writtenBytes = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "atoll_medium_written_bytes_total", Help: "Bytes of all segments sealed, one copy: data, map pages, manifests, what compaction copied, and headers."})
	reg.MustRegister(m.manifestSeconds, m.openSeconds, m.segmentsRemoved, m.manifestBytes, m.versionsMade, m.versions,
		m.liveBytes, m.deadBytes, m.movedBytes, m.reclaimedBytes, m.writtenBytes)
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

func (m *Metrics) filled(bytes int64) {
	if m != nil {
		m.writtenBytes.Add(float64(bytes))
	}
}

func (m *Metrics) removed(bytes int64) {
	if m != nil {
		m.segmentsRemoved.Inc()
		m.reclaimedBytes.Add(float64(bytes))
	}
}

func (m *Metrics) moved(bytes int64) {
	if m != nil {
		m.movedBytes.Add(float64(bytes))
	}
}

func (m *Metrics) wrote(part string, bytes int) {
	if m != nil {
		m.manifestBytes.WithLabelValues(part).Add(float64(bytes))
	}
}

func (m *Metrics) made(versions int) {
	if m != nil {
		m.versionsMade.Add(float64(versions))
	}
}

// shown is what one medium adds to the gauges that all share.
type shown struct{ live, dead, versions int64 }

// show replaces what a medium adds by what it adds now.
func (m *Metrics) show(old, now shown) {
	if m != nil {
		m.liveBytes.Add(float64(now.live - old.live))
		m.deadBytes.Add(float64(now.dead - old.dead))
		m.versions.Add(float64(now.versions - old.versions))
	}
}
