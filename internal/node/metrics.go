package node

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the counters of all nodes of a process. A nil Metrics counts
// nothing.
type Metrics struct {
	append, queue, commit     prometheus.Histogram
	written, read             prometheus.Counter
	ioErrors, corrupt         prometheus.Counter
	segments, open, spareSlot prometheus.Gauge
}

// NewMetrics registers the metrics with reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	hist := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "atoll", Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(16e-6, 2, 18),
		})
		reg.MustRegister(h)
		return h
	}
	count := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "atoll", Name: name, Help: help})
		reg.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "atoll", Name: name, Help: help})
		reg.MustRegister(g)
		return g
	}
	return &Metrics{
		append:    hist("append_duration_seconds", "From the arrival of a batch at a node to its being durable."),
		queue:     hist("node_queue_duration_seconds", "Waiting of a batch for its commit."),
		commit:    hist("node_commit_duration_seconds", "Write and flush of one round of the commit loop."),
		written:   count("node_written_bytes_total", "Bytes appended to segments, headers included."),
		read:      count("node_read_bytes_total", "Bytes read for clients."),
		ioErrors:  count("node_io_errors_total", "Errors of a disk."),
		corrupt:   count("node_corrupt_blocks_total", "Reads that met a bad checksum."),
		segments:  gauge("node_segments", "Segments on the nodes of this process."),
		open:      gauge("node_open_segments", "Unsealed segments on the nodes of this process."),
		spareSlot: gauge("node_spare_slots", "Prewritten files ready to become segments."),
	}
}

func (m *Metrics) appended(queued, commit time.Duration) {
	if m != nil {
		m.append.Observe((queued + commit).Seconds())
		m.queue.Observe(queued.Seconds())
	}
}

func (m *Metrics) committed(d time.Duration, bytes int64) {
	if m != nil {
		m.commit.Observe(d.Seconds())
		m.written.Add(float64(bytes))
	}
}

func (m *Metrics) didRead(bytes int) {
	if m != nil {
		m.read.Add(float64(bytes))
	}
}

func (m *Metrics) ioError() {
	if m != nil {
		m.ioErrors.Inc()
	}
}

func (m *Metrics) sawCorrupt() {
	if m != nil {
		m.corrupt.Inc()
	}
}

func (m *Metrics) count(segments, open, slots int) {
	if m != nil {
		m.segments.Add(float64(segments))
		m.open.Add(float64(open))
		m.spareSlot.Add(float64(slots))
	}
}
