package server

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atollstore/atoll/internal/atoll"
)

// mediaCollector shows what the media that are open here do and hold, read at
// the moment of the scrape. Only these metrics carry the names of media.
// Counters begin at zero each time a medium is opened.
type mediaCollector struct{ v *volumeSet }

var _ prometheus.Collector = mediaCollector{}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("atoll_"+name, help, labels, nil)
}

// mediaDescs are the metrics of mediaCollector.
type mediaDescs struct{ ops, bytes, size, live, dead, segments, pending, open *prometheus.Desc }

func newMediaDescs() mediaDescs {
	return mediaDescs{
		ops:      desc("media_ops_total", "Operations on media since they were opened here.", "type", "name", "op"),
		bytes:    desc("media_bytes_total", "Bytes read from and written to media since they were opened here.", "type", "name", "op"),
		size:     desc("media_size_bytes", "Size of media: as users see it, with data in it, and stored in segments (one copy).", "type", "name", "kind"),
		live:     desc("gc_live_bytes", "Bytes in segments of open media that are still needed, one copy."),
		dead:     desc("gc_dead_bytes", "Bytes in sealed segments of open media that nothing needs any more, one copy."),
		segments: desc("media_segments", "Segments of open media.", "state"),
		pending:  desc("repair_pending_copies", "Copies of segments of open media that are missing or not verified."),
		open:     desc("media_open", "Media that are open here.", "type"),
	}
}

// Describe implements prometheus.Collector.
func (c mediaCollector) Describe(out chan<- *prometheus.Desc) {
	d := newMediaDescs()
	for _, e := range []*prometheus.Desc{d.ops, d.bytes, d.size, d.live, d.dead, d.segments, d.pending, d.open} {
		out <- e
	}
}

// Collect implements prometheus.Collector.
func (c mediaCollector) Collect(out chan<- prometheus.Metric) {
	const kind = "volume"
	d := newMediaDescs()
	gauge := func(d *prometheus.Desc, v int64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	count := func(d *prometheus.Desc, v int64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	var live, dead, open, pending, segments, dropped int64
	for _, o := range c.v.list() {
		if !o.usable() {
			continue
		}
		open++
		m, v, name := o.medium.Stats(), o.vol.Stats(), o.name
		count(d.ops, v.Reads, kind, name, "read")
		count(d.ops, v.Writes, kind, name, "write")
		count(d.ops, v.Discards, kind, name, "discard")
		count(d.ops, v.Flushes, kind, name, "flush")
		count(d.bytes, v.ReadBytes, kind, name, "read")
		count(d.bytes, v.WriteBytes, kind, name, "write")
		gauge(d.size, o.vol.Size(), kind, name, "logical")
		gauge(d.size, v.MappedBlocks*atoll.BlockSize, kind, name, "unique")
		gauge(d.size, m.Stored+m.Log, kind, name, "stored")
		live += m.Live
		dead += max(0, m.Stored-m.Live)
		pending += int64(m.Unverified)
		segments, dropped = segments+int64(m.Segments), dropped+int64(m.Dropped)
	}
	gauge(d.live, live)
	gauge(d.dead, dead)
	gauge(d.pending, pending)
	gauge(d.segments, segments, "used")
	gauge(d.segments, dropped, "dropped")
	gauge(d.open, open, kind)
}

// usable reports whether a volume was opened and can be asked.
func (o *openVolume) usable() bool {
	select {
	case <-o.ready:
		return o.err == nil
	default:
		return false
	}
}
