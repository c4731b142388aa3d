package curve

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts the gateway's calls. A nil Metrics counts nothing.
type Metrics struct {
	calls *prometheus.CounterVec
	times *prometheus.HistogramVec
}

// NewMetrics registers the gateway's metrics.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "atoll_curve_calls_total", Help: "Calls of Curve's clients by door (call, snapshot), name and code.",
		}, []string{"door", "call", "code"}),
		times: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "atoll_curve_call_seconds", Help: "Time that calls of Curve's clients took.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10),
		}, []string{"door", "call"}),
	}
	reg.MustRegister(m.calls, m.times)
	return m
}

// done notes a call that ended. Names come from the tables of calls only.
func (m *Metrics) done(door, call string, code int, took time.Duration) {
	if m == nil {
		return
	}
	m.calls.WithLabelValues(door, call, strconv.Itoa(code)).Inc()
	m.times.WithLabelValues(door, call).Observe(took.Seconds())
}
