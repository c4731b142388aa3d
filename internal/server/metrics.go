package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
)

// opTimes are how long operations on media take.
type opTimes struct {
	vec                               *prometheus.HistogramVec
	read, write, flush, discard, open prometheus.Observer
}

func newOpTimes(reg prometheus.Registerer) *opTimes {
	vec := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "atoll_media_op_duration_seconds", Help: "How long operations on media that are open here took.",
		Buckets: prometheus.ExponentialBuckets(20e-6, 2, 20),
	}, []string{"type", "op"})
	reg.MustRegister(vec)
	of := func(op string) prometheus.Observer { return vec.WithLabelValues(string(catalog.KindVolume), op) }
	return &opTimes{vec, of("read"), of("write"), of("flush"), of("discard"), of("open")}
}

// timed measures an operation on a volume until the returned function is called.
func (m *metrics) timed(op string) func() {
	begun := time.Now()
	return func() {
		m.ops.vec.WithLabelValues(string(catalog.KindVolume), op).Observe(time.Since(begun).Seconds())
	}
}

// mediaCollector shows what the media that are open here do and hold, read at
// the moment of the scrape. Only these metrics carry the names of media.
// Counters begin at zero each time a medium is opened.
type mediaCollector struct{ v *volumeSet }

var _ prometheus.Collector = mediaCollector{}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("atoll_"+name, help, labels, nil)
}

// mediaDescs are the metrics of mediaCollector.
type mediaDescs struct {
	ops, bytes, size, segments, pending, open, versions, views, imports, trash, trashBytes, waited *prometheus.Desc
}

func (d *mediaDescs) all() []*prometheus.Desc {
	return []*prometheus.Desc{d.ops, d.bytes, d.size, d.segments, d.pending, d.open, d.versions, d.views, d.imports, d.trash, d.trashBytes, d.waited}
}

func newMediaDescs() mediaDescs {
	return mediaDescs{
		ops:      desc("media_ops_total", "Operations on media since they were opened here.", "type", "name", "op"),
		bytes:    desc("media_bytes_total", "Bytes read from and written to media since they were opened here.", "type", "name", "op"),
		size:     desc("media_size_bytes", "Size of media: as users see it, with data in it, and stored in segments (one copy).", "type", "name", "kind"),
		segments: desc("media_segments", "Segments of open media.", "state"),
		pending:  desc("repair_pending_copies", "Copies of segments of open media that are missing or not verified."),
		open:     desc("media_open", "Media that are open here.", "type"),
		versions: desc("media_versions", "Versions of media that are open here: those that users see, and hidden ones that still hold data.", "type", "name", "state"),
		views:    desc("media_views_open", "Versions that are open here for reading.", "type"),
		imports:  desc("media_imports", "Imports of differences that are under way here.", "type"),
		trash:    desc("trash_media", "Media in the trash. Told by the leader only."),

		waited:     desc("media_limit_wait_seconds_total", "How long operations on media waited for limits since the media were opened here, together.", "type", "name"),
		trashBytes: desc("trash_bytes", "Bytes in segments of media in the trash, one copy, as far as known. Told by the leader only."),
	}
}

// Describe implements prometheus.Collector.
func (c mediaCollector) Describe(out chan<- *prometheus.Desc) {
	d := newMediaDescs()
	for _, e := range d.all() {
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
	var open, pending, segments, dropped int64
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
		_, waited := o.limits.Stats()
		out <- prometheus.MustNewConstMetric(d.waited, prometheus.CounterValue, waited.Seconds(), kind, name)
		count(d.bytes, v.ReadBytes, kind, name, "read")
		count(d.bytes, v.WriteBytes, kind, name, "write")
		gauge(d.size, o.vol.Size(), kind, name, "logical")
		gauge(d.size, v.MappedBlocks*atoll.BlockSize, kind, name, "unique")
		gauge(d.size, m.Stored+m.Log, kind, name, "stored")
		seen, hidden := countVersions(o.vol.Versions())
		gauge(d.versions, seen, kind, name, "visible")
		gauge(d.versions, hidden, kind, name, "hidden")
		pending += int64(m.Unverified)
		segments, dropped = segments+int64(m.Segments), dropped+int64(m.Dropped)
	}
	gauge(d.pending, pending)
	gauge(d.segments, segments, "used")
	gauge(d.segments, dropped, "dropped")
	gauge(d.open, open, kind)
	views, imports := c.v.counts()
	gauge(d.views, views, kind)
	gauge(d.imports, imports, kind)
	if n, bytes, ok := c.v.s.trashed(); ok {
		gauge(d.trash, n)
		gauge(d.trashBytes, bytes)
	}
}

// countVersions counts the versions that users see and the others.
func countVersions(list []medium.Version) (seen, hidden int64) {
	for i := range list {
		if list[i].Hidden() {
			hidden++
		} else {
			seen++
		}
	}
	return seen, hidden
}

// counts tells how many views are open and imports under way.
func (v *volumeSet) counts() (views, imports int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, o := range v.mu.open {
		if o.staging != nil {
			imports++
		}
	}
	return int64(len(v.mu.viewed)), imports
}

// trashed is what the leader counted in the trash last.
func (s *Server) trashed() (n, bytes int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.trash, s.mu.trashBytes, s.mu.trashKnown
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
