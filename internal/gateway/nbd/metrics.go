package nbd

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what the servers of a process do. A nil Metrics counts
// nothing.
type Metrics struct {
	connections prometheus.Gauge
	accepted    prometheus.Counter
	duration    [cmdCount]prometheus.Observer
	errors      [cmdCount]prometheus.Counter
	read, wrote prometheus.Counter
}

// commandNames are the values of the label "op", by command number.
var commandNames = [cmdCount]string{"read", "write", "disconnect", "flush", "trim", "cache", "zero", "status"}

// NewMetrics makes the metrics and registers them with reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		connections: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "atoll_nbd_connections", Help: "NBD connections that are open.",
		}),
		accepted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_nbd_accepted_total", Help: "NBD connections that were accepted.",
		}),
	}
	duration := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "atoll_nbd_request_duration_seconds",
		Help:    "Time from a request's last byte in to its reply handed to the socket (gateway stage).",
		Buckets: prometheus.ExponentialBuckets(8e-6, 2, 20),
	}, []string{"op"})
	failed := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_nbd_errors_total", Help: "Requests that were answered with an error.",
	}, []string{"op"})
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_nbd_bytes_total", Help: "Bytes of user data read and written.",
	}, []string{"op"})
	reg.MustRegister(m.connections, m.accepted, duration, failed, bytes)
	for i, name := range commandNames {
		m.duration[i], m.errors[i] = duration.WithLabelValues(name), failed.WithLabelValues(name)
	}
	m.read, m.wrote = bytes.WithLabelValues("read"), bytes.WithLabelValues("write")
	return m
}

// opened counts a connection in (1) or out (-1).
func (m *Metrics) opened(n int) {
	if m == nil {
		return
	}
	m.connections.Add(float64(n))
	if n > 0 {
		m.accepted.Inc()
	}
}

// done counts an answered request.
func (m *Metrics) done(r *request) {
	if m == nil || int(r.typ) >= cmdCount {
		return
	}
	m.duration[r.typ].Observe(time.Since(r.start).Seconds())
	switch {
	case r.failed:
		m.errors[r.typ].Inc()
	case r.typ == cmdRead:
		m.read.Add(float64(r.n))
	case r.typ == cmdWrite:
		m.wrote.Add(float64(r.n))
	}
}
