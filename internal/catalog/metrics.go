package catalog

import "github.com/prometheus/client_golang/prometheus"

// Metrics counts what the catalog does. A nil *Metrics counts nothing.
type Metrics struct {
	conflicts prometheus.Counter
	unknown   prometheus.Counter
	lost      prometheus.Counter
	reloads   prometheus.Counter
	txn       prometheus.Histogram
}

// NewMetrics makes the metrics and registers them with reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_meta_txn_conflicts_total",
			Help: "Catalog transactions whose conditions did not hold."}),
		unknown: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_meta_txn_unknown_total",
			Help: "Catalog transactions that were not answered."}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_lease_lost_total",
			Help: "Sessions that ended because their lease could not be renewed."}),
		reloads: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_meta_reloads_total",
			Help: "Times the cluster's state was loaded anew because the watch broke."}),
		txn: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "atoll_meta_txn_duration_seconds",
			Help:    "Duration of catalog transactions, with repeats.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 17)}),
	}
	reg.MustRegister(m.conflicts, m.unknown, m.lost, m.reloads, m.txn)
	return m
}

func (m *Metrics) conflict() {
	if m != nil {
		m.conflicts.Inc()
	}
}

func (m *Metrics) noAnswer() {
	if m != nil {
		m.unknown.Inc()
	}
}

func (m *Metrics) leaseLost() {
	if m != nil {
		m.lost.Inc()
	}
}

func (m *Metrics) reload() {
	if m != nil {
		m.reloads.Inc()
	}
}

func (m *Metrics) took(seconds float64) {
	if m != nil {
		m.txn.Observe(seconds)
	}
}
