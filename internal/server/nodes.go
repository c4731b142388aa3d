package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/controller"
)

// SetNode implements api.Backend.
func (b *backend) SetNode(ctx context.Context, r *atollv1.SetNodeRequest) (*atollv1.Node, error) {
	id, state := atoll.NodeID(r.Id), catalog.NodeState(r.State)
	st := b.s.cat.State()
	if _, is := st.Nodes[id]; !is {
		return nil, api.WithHint(fmt.Errorf("node %d: %w", id, atoll.ErrNotExist), `"atoll node ls" lists the nodes`)
	}
	var err error
	switch state {
	case catalog.NodeActive:
	case catalog.NodeDraining:
		if err = controller.MayDrain(st, id, atoll.NodeID(r.Heir)); err != nil {
			return nil, api.WithHint(err, "the node stays as it is")
		}
	case catalog.NodeRemoved:
		if err = controller.MayRemove(st, id); err != nil {
			return nil, api.WithHint(err, fmt.Sprintf(`"atoll node drain %d --wait" moves its copies to other nodes`, id))
		}
	default:
		return nil, fmt.Errorf("state %q: want active, draining or removed: %w", r.State, atoll.ErrInvalid)
	}
	if err := b.s.cat.SetNode(ctx, id, state, atoll.NodeID(r.Heir)); err != nil {
		return nil, err
	}
	b.s.log.Info("node set", "node", id, "state", state, "heir", r.Heir)
	nodes, err := b.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(nodes, func(n *atollv1.Node) bool { return n.Id == r.Id })
	if i < 0 {
		return nil, fmt.Errorf("node %d: %w", id, atoll.ErrNotExist)
	}
	return nodes[i], nil
}

// moves fills in what becomes of nodes' copies.
func moves(st *catalog.State, nodes []*atollv1.Node) {
	byID := make(map[atoll.NodeID]*atollv1.Node, len(nodes))
	for _, m := range nodes {
		n := st.Nodes[atoll.NodeID(m.Id)]
		byID[n.ID] = m
		m.StrayBytes, m.Heir = n.Report.Stray, uint32(n.Heir)
		if !n.Down.IsZero() {
			m.DownSince = timestamppb.New(n.Down)
		}
		if h := n.Report.Healing; h != nil {
			m.CopyBytes, m.CopiedBytes, m.CopyRate, m.CopyWaiting, m.CopyError = h.Bytes, h.Done, h.Rate, int32(h.Waiting), h.Err
		}
	}
	for _, set := range st.Copysets {
		for _, id := range set.Nodes {
			if m := byID[id]; m != nil {
				m.Copysets++
				if set.Leaving(id) {
					m.Leaving++
				}
			}
		}
		for _, mv := range set.Moves {
			if m := byID[mv.New]; m != nil {
				m.Joining++
			}
		}
	}
}

// repair tells how far repair is, nil when there is nothing to repair.
func (b *backend) repair(st *catalog.State) *atollv1.Repair {
	r := controller.Repairs(st, time.Now(), b.s.cfg.RepairFrom)
	if r.Moves == 0 && r.Stuck == 0 {
		return nil
	}
	out := &atollv1.Repair{Moves: int32(r.Moves), Lost: int32(r.Lost), Stuck: int32(r.Stuck), Bytes: r.Bytes, Rate: r.Rate}
	if r.Rate > 0 {
		out.Left = durationpb.New(time.Duration(float64(r.Bytes) / float64(r.Rate) * float64(time.Second)).Round(time.Second))
	}
	return out
}
