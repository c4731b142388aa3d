package server

import (
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// A running server's metrics have the names and units that dashboards rely on,
// and few series.
func TestMetrics(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	create(t, s, "disk1", "writethrough")
	dev := open(t, s, "disk1")
	fill(t, dev, 10, true)
	verify(t, dev, 10)
	defer s.volumes.Release(dev)
	text := ""
	eventually(t, "health", func() bool {
		text = get(t, s, "/metrics")
		return strings.Contains(text, `atoll_cluster_health{state="healthy"} 1`)
	})
	for _, want := range []string{
		`atoll_build_info{version="test"} 1`,
		`atoll_cluster_health{state="critical"} 0`,
		`atoll_cluster_capacity_raw_total_bytes `, `atoll_cluster_capacity_raw_free_bytes `,
		`atoll_cluster_capacity_usable_total_bytes `, `atoll_cluster_capacity_usable_free_bytes `,
		`atoll_node_up{node="1"} 1`, `atoll_node_disk_total_bytes{node="3"} `, `atoll_node_disk_free_bytes{node="3"} `,
		`atoll_media_ops_total{name="disk1",op="write",type="volume"} 10`,
		`atoll_media_bytes_total{name="disk1",op="write",type="volume"} 655360`,
		`atoll_media_bytes_total{name="disk1",op="read",type="volume"} 655360`,
		`atoll_media_size_bytes{kind="logical",name="disk1",type="volume"} 6.7108864e+07`,
		`atoll_media_size_bytes{kind="unique",name="disk1",type="volume"} 655360`,
		`atoll_media_size_bytes{kind="stored",name="disk1",type="volume"} `,
		`atoll_media_limit_wait_seconds_total{name="disk1",type="volume"} 0`,
		`atoll_gc_live_bytes `, `atoll_gc_dead_bytes `, `atoll_repair_pending_copies 0`,
		`atoll_cache_hits_total `, `atoll_cache_misses_total `, `atoll_lease_lost_total 0`,
		`atoll_nbd_connections`, `atoll_append_duration_seconds_bucket`, `atoll_node_commit_duration_seconds_bucket`,
		`atoll_write_duration_seconds_bucket{stage="total"`, `atoll_meta_txn_conflicts_total`, `go_goroutines `, `process_resident_memory_bytes `,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("no %s", want)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "atoll_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	named := regexp.MustCompile(`[{,]name="disk1"`)
	if n := len(named.FindAllString(text, -1)); n == 0 || n > 12 {
		t.Errorf("%d series carry the name of one medium", n)
	}
	if n := len(regexp.MustCompile(`(?m)^atoll_`).FindAllString(text, -1)); n > 1500 {
		t.Errorf("%d series", n)
	}
}
