package controller

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atollstore/atoll/internal/catalog"
)

// Metrics shows the cluster as the elected controller sees it. A nil *Metrics
// shows nothing.
type Metrics struct {
	health   *prometheus.GaugeVec
	up       *prometheus.GaugeVec
	total    *prometheus.GaugeVec
	free     *prometheus.GaugeVec
	capacity [4]*prometheus.GaugeVec // raw total and free, usable total and free
	copysets *prometheus.GaugeVec
	segments prometheus.Counter
	moves    *prometheus.GaugeVec
	stuck    *prometheus.GaugeVec
}

// NewMetrics makes the metrics and registers them with reg.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	vec := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	m := &Metrics{
		health: vec("atoll_cluster_health", "1 for the present state of the cluster.", "state"),
		up:     vec("atoll_node_up", "Whether a node is up.", "node"),
		total:  vec("atoll_node_disk_total_bytes", "Size of a node's disk.", "node"),
		free:   vec("atoll_node_disk_free_bytes", "Free space on a node's disk.", "node"),
		capacity: [4]*prometheus.GaugeVec{
			vec("atoll_cluster_capacity_raw_total_bytes", "Size of the disks of all nodes that are up."),
			vec("atoll_cluster_capacity_raw_free_bytes", "Free space on the disks of all nodes that are up."),
			vec("atoll_cluster_capacity_usable_total_bytes", "Data that fit the nodes that are up, with the usual number of copies."),
			vec("atoll_cluster_capacity_usable_free_bytes", "Data for which there is room, with the usual number of copies."),
		},
		copysets: vec("atoll_copysets", "Copysets that take new segments."),
		segments: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "atoll_controller_segments_deleted_total", Help: "Segments deleted with their media."}),
	}
	m.moves = vec("atoll_copyset_moves", "Members of copysets that are being replaced, by reason.", "reason")
	m.stuck = vec("atoll_copysets_stuck", "Copysets with a member to be replaced that no node can take the place of.")
	reg.MustRegister(m.health, m.up, m.total, m.free, m.copysets, m.segments, m.moves, m.stuck)
	for _, c := range m.capacity {
		reg.MustRegister(c)
	}
	return m
}

// forget shows nothing of the cluster any more: another controller is elected.
func (m *Metrics) forget() {
	if m == nil {
		return
	}
	for _, v := range append(m.capacity[:], m.health, m.up, m.total, m.free, m.copysets, m.moves, m.stuck) {
		v.Reset()
	}
}

// observe shows a state, with capacity for so many copies.
func (m *Metrics) observe(st *catalog.State, copies int) {
	if m == nil {
		return
	}
	grade := Health(st).Grade
	for _, g := range []Grade{Healthy, Degraded, Critical} {
		m.health.WithLabelValues(string(g)).Set(truth(g == grade))
	}
	var raw, free int64
	for id, n := range st.Nodes {
		label := id.String()
		if n.State == catalog.NodeRemoved {
			m.up.DeleteLabelValues(label)
			m.total.DeleteLabelValues(label)
			m.free.DeleteLabelValues(label)
			continue
		}
		m.up.WithLabelValues(label).Set(truth(n.Up))
		if n.Up {
			m.total.WithLabelValues(label).Set(float64(n.Report.Total))
			m.free.WithLabelValues(label).Set(float64(n.Report.Free))
			raw, free = raw+n.Report.Total, free+n.Report.Free
		}
	}
	n := int64(copies)
	for i, bytes := range []int64{raw, free, raw / n, free / n} {
		m.capacity[i].WithLabelValues().Set(float64(bytes))
	}
	sets := 0
	for _, s := range st.Copysets {
		if !s.Retired {
			sets++
		}
	}
	m.copysets.WithLabelValues().Set(float64(sets))
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m *Metrics) deleted() {
	if m != nil {
		m.segments.Inc()
	}
}

// repair shows what is being repaired.
func (m *Metrics) repair(st *catalog.State, p repairPlan) {
	if m == nil {
		return
	}
	count := map[catalog.MoveReason]int{catalog.MoveLost: 0, catalog.MoveErrors: 0, catalog.MoveDrain: 0, catalog.MoveShort: 0, catalog.MoveBalance: 0}
	for _, set := range st.Copysets {
		for _, mv := range set.Moves {
			count[mv.Why]++
		}
	}
	for why, n := range count {
		m.moves.WithLabelValues(string(why)).Set(float64(n))
	}
	m.stuck.WithLabelValues().Set(float64(len(p.Stuck)))
}
