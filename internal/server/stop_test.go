package server

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// stopLimit is how long a stop may take, whatever has broken: systemd loses its
// patience after 90 s. On a machine with time to spare it is a few seconds.
const stopLimit = time.Minute

// A server stops in time with data to write and nodes that do not answer, and
// the next start has what was durable.
func TestStopPausedNodes(t *testing.T) {
	t.Parallel()
	for _, w := range []struct {
		fault  string
		paused int
	}{{"pause", 1}, {"pause", 2}, {"pause", 3}, {"kill", 1}, {"kill", 3}, {"fill", 3}} {
		t.Run(fmt.Sprintf("%s-%d", w.fault, w.paused), func(t *testing.T) {
			t.Parallel()
			dir := testDir(t)
			s := start(t, testConfig(t, dir), Options{Demo: true})
			create(t, s, "disk1", "writeback")
			dev := open(t, s, "disk1")
			fill(t, dev, 20, false)
			if err := dev.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			for id := range w.paused {
				if _, err := (&backend{s: s}).Inject(t.Context(), atoll.NodeID(id+1), w.fault, 0); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_ = dev.Write(ctx, nil, make([]byte, 4096), 40<<20, false)
			cancel()
			stop(t, s, stopLimit)
			s = start(t, testConfig(t, dir), Options{})
			dev = open(t, s, "disk1")
			verify(t, dev, 20)
			s.volumes.Release(dev)
			mustStop(t, s)
		})
	}
}

// A server stops in time when the catalog is gone, with a volume open, and
// while one is being opened.
func TestStopCatalogGone(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"at once", "after the lease"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := testDir(t) + "/etcd.sock"
			etcd, err := catalog.StartEtcd(t.Context(), catalog.EtcdOptions{Dir: testDir(t) + "/etcd", Name: "one", ClientSocket: socket, Log: testLog(t)})
			if err != nil {
				t.Fatal(err)
			}
			s := start(t, testConfig(t, testDir(t), "--etcd", "unix://"+socket), Options{})
			create(t, s, "disk1", "writeback")
			create(t, s, "disk2", "writeback")
			dev := open(t, s, "disk1")
			fill(t, dev, 20, false)
			if err := etcd.Close(); err != nil {
				t.Fatal(err)
			}
			if name == "after the lease" {
				eventually(t, "session lost", func() bool { return !s.session().Valid() })
			}
			opened := make(chan struct{})
			go func() {
				defer close(opened)
				if dev, _, err := s.volumes.Open(context.Background(), "disk2"); err == nil {
					s.volumes.Release(dev)
				}
			}()
			stop(t, s, stopLimit)
			<-opened
		})
	}
}
