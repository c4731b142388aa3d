package volume

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// counters are what a volume counts as it goes.
type counters struct {
	reads, writes, discards, flushes atomic.Int64
	readBytes, writeBytes            atomic.Int64
	blocksRead, ahead, checkpoints   atomic.Int64
}

// Stats is a snapshot of what a volume did and holds.
type Stats struct {
	Reads, Writes, Discards, Flushes int64
	ReadBytes, WriteBytes            int64
	BlocksRead                       int64 // from the log
	BlocksAhead                      int64 // of those, read ahead
	CacheHits, CacheMisses           uint64
	CacheBytes                       int64 // limit
	DirtyBytes                       int64 // acknowledged, not in the log yet
	// MappedBlocks is the pages that hold data as of the last checkpoint and
	// what is known since; pages overwritten without a look at the map count
	// twice until the next one.
	MappedBlocks int64
	MapBytes     int64  // leaves in memory
	MapLoads     uint64 // leaves and nodes read from the log
	LogBytes     int64  // to replay if it ended now
	Checkpoints  int64
}

// Stats returns what the volume did since Open.
func (v *Volume) Stats() Stats {
	c := &v.stats
	s := Stats{
		Reads: c.reads.Load(), Writes: c.writes.Load(), Discards: c.discards.Load(), Flushes: c.flushes.Load(),
		ReadBytes: c.readBytes.Load(), WriteBytes: c.writeBytes.Load(),
		BlocksRead: c.blocksRead.Load(), BlocksAhead: c.ahead.Load(), Checkpoints: c.checkpoints.Load(),
		LogBytes: v.logBytes.Load(), CacheBytes: v.cache.Bytes(),
	}
	if v.cache != nil {
		s.CacheHits, s.CacheMisses = v.cache.hits.Load(), v.cache.misses.Load()
	}
	v.pages.mu.Lock()
	s.MapBytes, s.MapLoads = v.pages.t.mem, v.pages.loads
	s.MappedBlocks = v.pages.t.total()
	v.pages.mu.Unlock()
	if v.wb != nil {
		v.wb.mu.Lock()
		s.DirtyBytes = v.wb.held()
		v.wb.mu.Unlock()
	}
	return s
}

// Metrics are the histograms that volumes of a process share. A nil Metrics
// counts nothing.
type Metrics struct {
	replay     prometheus.Histogram
	checkpoint prometheus.Histogram
}

// NewMetrics registers the metrics of volumes.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	buckets := prometheus.ExponentialBuckets(0.001, 4, 8)
	m := &Metrics{
		replay:     prometheus.NewHistogram(prometheus.HistogramOpts{Name: "atoll_volume_replay_seconds", Help: "Time to replay the log when a volume was opened.", Buckets: buckets}),
		checkpoint: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "atoll_volume_checkpoint_seconds", Help: "Time to write a checkpoint of a volume's map.", Buckets: buckets}),
	}
	if reg != nil {
		reg.MustRegister(m.replay, m.checkpoint)
	}
	return m
}

// RegisterCache exports the hits and misses of a cache.
func RegisterCache(reg prometheus.Registerer, c *Cache) {
	if c == nil {
		return
	}
	reg.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "atoll_cache_hits_total", Help: "Blocks found in the read cache."}, func() float64 { return float64(c.hits.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "atoll_cache_misses_total", Help: "Blocks not found in the read cache."}, func() float64 { return float64(c.misses.Load()) }),
	)
}

func (m *Metrics) replayed(d time.Duration) {
	if m != nil {
		m.replay.Observe(d.Seconds())
	}
}

func (m *Metrics) checkpointed(d time.Duration) {
	if m != nil {
		m.checkpoint.Observe(d.Seconds())
	}
}
