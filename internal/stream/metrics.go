package stream

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the counters and histograms of streams. A nil Metrics counts
// nothing. One Metrics serves all writers and readers of a process.
type Metrics struct {
	queue, wire, node, commit, total prometheus.Observer

	batches, entries, bytes prometheus.Counter
	rolls, breaks, suspects prometheus.Counter
	short                   prometheus.Counter
	hedges, failovers       prometheus.Counter
	rebuilds, encoded       prometheus.Counter
	repairs, repairFailures prometheus.Counter
	repairBytes             prometheus.Counter
	recoveries              prometheus.Counter
}

// NewMetrics makes the metrics and registers them with reg, which may be nil.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	stages := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "atoll_write_duration_seconds",
		Help:    "Time that an append spends in each stage, and in all of them (stage=total).",
		Buckets: prometheus.ExponentialBuckets(20e-6, 2, 18),
	}, []string{"stage"})
	var all []prometheus.Collector
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_" + name, Help: help})
		all = append(all, c)
		return c
	}
	m := &Metrics{
		queue: stages.WithLabelValues("queue"), wire: stages.WithLabelValues("wire"),
		node: stages.WithLabelValues("node"), commit: stages.WithLabelValues("commit"),
		total:          stages.WithLabelValues("total"),
		batches:        counter("append_batches_total", "Batches acknowledged."),
		entries:        counter("append_entries_total", "Entries acknowledged."),
		bytes:          counter("append_bytes_total", "Payload bytes acknowledged, counted once for all copies."),
		rolls:          counter("segment_rolls_total", "Segments taken into use."),
		breaks:         counter("segment_breaks_total", "Segments sealed early because a copy failed or was too slow."),
		suspects:       counter("node_suspicions_total", "Times that a node failed or was too slow for a writer."),
		short:          counter("segment_short_total", "Segments opened with fewer copies than their policy asks for."),
		hedges:         counter("read_hedges_total", "Reads sent to a second copy because the first was slow."),
		failovers:      counter("read_failovers_total", "Reads that another copy answered after an error."),
		rebuilds:       counter("read_rebuilds_total", "Reads of coded segments reckoned from other shards."),
		encoded:        counter("encoded_bytes_total", "Bytes of coded segments written, without parity."),
		repairs:        counter("read_repairs_total", "Damaged ranges repaired in place from another copy."),
		repairFailures: counter("read_repair_failures_total", "Damaged ranges that could not be repaired."),
		repairBytes:    counter("repair_bytes_total", "Bytes copied to complete or repair copies."),
		recoveries:     counter("segment_recoveries_total", "Unsealed segments that a new owner recovered."),
	}
	if reg != nil {
		reg.MustRegister(append(all, stages)...)
	}
	return m
}

func observe(o prometheus.Observer, d time.Duration) { o.Observe(d.Seconds()) }
