package server

import (
	"context"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/heal"
	"github.com/atollstore/atoll/internal/medium"
)

// startHealer has this process's nodes join and leave copysets as the catalog
// says.
func (s *Server) startHealer(_, _ context.Context) error {
	if !s.cfg.has("node") {
		return nil
	}
	h := heal.Open(heal.Options{
		Catalog: s.cat, Nodes: s.nodes, Local: s.disks.local, Media: settling{s}, Rate: s.cfg.RepairRate, Grace: max(s.cfg.EvictAfter, 1),
		Sweep: min(max(s.cfg.EvictAfter/4, 100*time.Millisecond), sweepMost), Log: s.log, Metrics: s.metrics.heal,
	})
	s.disks.setHealer(h)
	s.onStop(h.Close)
	return nil
}

// sweepMost is the longest time between looks for copies to evict.
const sweepMost = time.Minute

// settling settles media for the controller and the healer.
type settling struct{ s *Server }

// Settle implements controller.Media and heal.Media.
func (m settling) Settle(ctx context.Context, id atoll.MediumID) error {
	_, err := medium.Settle(ctx, medium.Options{
		Catalog: m.s.cat, Nodes: m.s.nodes, Session: m.s.session(), Log: m.s.log, Metrics: m.s.metrics.medium, Streams: m.s.metrics.stream,
	}, id)
	return err
}

// local lists the storage nodes that this process serves now.
func (d *diskSet) local() map[atoll.NodeID]heal.Node {
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := make(map[atoll.NodeID]heal.Node, len(d.mu.disks))
	for id, k := range d.mu.disks {
		if k.node != nil {
			out[id] = k.node
		}
	}
	return out
}

func (d *diskSet) setHealer(h *heal.Healer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.healer = h
}

func (d *diskSet) healer() *heal.Healer {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.mu.healer
}
