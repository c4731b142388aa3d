package wire

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what crosses the wire. A nil *Metrics counts nothing. One may
// be shared by any number of clients and servers.
type Metrics struct {
	client, server *timings
	sent, received prometheus.Counter
	links          prometheus.Gauge // connections we opened
	sessions       prometheus.Gauge // connections we accepted
	dials, lost    prometheus.Counter
	refused        prometheus.Counter
}

// NewMetrics registers the metrics with reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		reg.MustRegister(c)
		return c
	}
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_rpc_bytes_total", Help: "Bytes on connections between processes."}, []string{"direction"})
	conns := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "atoll_rpc_connections", Help: "Open connections between processes."}, []string{"side"})
	reg.MustRegister(bytes, conns)
	return &Metrics{
		client:   newTimings(reg, "atoll_rpc_duration_seconds", "Time of requests to other processes, as the caller sees it."),
		server:   newTimings(reg, "atoll_rpc_served_duration_seconds", "Time of requests of other processes, from receipt to answer."),
		sent:     bytes.WithLabelValues("sent"),
		received: bytes.WithLabelValues("received"),
		links:    conns.WithLabelValues("client"),
		sessions: conns.WithLabelValues("server"),
		dials:    counter("atoll_rpc_dials_total", "Attempts to connect to another process."),
		lost:     counter("atoll_rpc_connections_lost_total", "Connections that ended with an error."),
		refused:  counter("atoll_rpc_connections_refused_total", "Connections refused: too many, wrong identity or not our protocol."),
	}
}

// timings is a histogram by method and code whose children are looked up once.
type timings struct {
	vec   *prometheus.HistogramVec
	cells [32][numCodes]atomic.Pointer[prometheus.Observer]
}

func newTimings(reg prometheus.Registerer, name, help string) *timings {
	t := &timings{vec: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: name, Help: help,
		Buckets: []float64{50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1, 2, 5, 10},
	}, []string{"method", "code"})}
	reg.MustRegister(t.vec)
	return t
}

func (t *timings) observe(m method, err error, d time.Duration) {
	code := min(int(codeOf(err)), numCodes-1)
	cell := &t.cells[int(m)%len(t.cells)][code]
	o := cell.Load()
	if o == nil {
		made := t.vec.WithLabelValues(m.String(), codeNames()[code])
		o = &made
		cell.Store(o)
	}
	(*o).Observe(d.Seconds())
}

func (m *Metrics) called(meth method, err error, start time.Time) {
	if m != nil {
		m.client.observe(meth, err, time.Since(start))
	}
}

func (m *Metrics) served(meth method, err error, start time.Time) {
	if m != nil {
		m.server.observe(meth, err, time.Since(start))
	}
}

func (m *Metrics) wrote(n int) {
	if m != nil {
		m.sent.Add(float64(n))
	}
}

func (m *Metrics) got(n int) {
	if m != nil {
		m.received.Add(float64(n))
	}
}

func (m *Metrics) dialed() {
	if m != nil {
		m.dials.Inc()
	}
}

func (m *Metrics) denied() {
	if m != nil {
		m.refused.Inc()
	}
}

// opened counts a connection; the result undoes it, told whether the connection
// ended with an error.
func (m *Metrics) opened(server bool) func(bad bool) {
	if m == nil {
		return func(bool) {}
	}
	g := m.links
	if server {
		g = m.sessions
	}
	g.Inc()
	return func(bad bool) {
		g.Dec()
		if bad {
			m.lost.Inc()
		}
	}
}
