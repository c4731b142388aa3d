package server

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// redundancy returns the policy for a volume that is to be kept as text says, or
// else in so many copies; 0 and "" are the default.
func (b *backend) redundancy(text string, replicas int) (catalog.Policy, error) {
	if text != "" && replicas != 0 {
		return catalog.Policy{}, fmt.Errorf("%d copies and redundancy %q: want one of them: %w", replicas, text, atoll.ErrInvalid)
	}
	p := catalog.Policy{Replicas: replicas}
	if text != "" {
		var err error
		if p, err = catalog.ParseRedundancy(text); err != nil {
			return p, err
		}
	}
	if p.Replicas == 0 {
		p.Replicas = b.s.defaultReplicas()
	}
	if !p.IsCoded() {
		return p, b.checkReplicas(p.Replicas)
	}
	if have := b.activeNodes(); p.Data+p.Parity > have {
		return p, api.WithHint(fmt.Errorf("ec=%v needs %d nodes, there are %d: %w", p.Code(), p.Data+p.Parity, have, atoll.ErrInvalid),
			"ask for fewer shards or add nodes")
	}
	return p, nil
}

// activeNodes returns how many nodes may be given data.
func (b *backend) activeNodes() (n int) {
	for _, node := range b.s.cat.State().Nodes {
		if node.State == catalog.NodeActive {
			n++
		}
	}
	return n
}

// SetRedundancy implements api.Backend. What is there already is brought into the
// new form in the background while the volume is open, which it stays for that.
func (b *backend) SetRedundancy(ctx context.Context, r *atollv1.SetRedundancyRequest) (*atollv1.Volume, error) {
	p, err := b.redundancy(r.Redundancy, 0)
	if err == nil && r.Redundancy == "" {
		err = fmt.Errorf("no redundancy: want replicas=N or ec=K+M: %w", atoll.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, volumesRedundancy); done {
		return out, err
	}
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	err = o.medium.Update(ctx, func(m *catalog.Medium) {
		m.Policy.Replicas, m.Policy.MinReplicas, m.Policy.Data, m.Policy.Parity = p.Replicas, 0, p.Data, p.Parity
	})
	if err != nil {
		return nil, named(fmt.Errorf("set redundancy of volume %q: %w", r.Name, err), rec)
	}
	o.vol.Reclaim()
	return b.describe(o.medium.Info()), nil
}

// recodeWait is how long a volume without users is kept open at most for its
// segments to be encoded: there may be too few nodes for it.
const recodeWait = 20 * idleClose

// recoding reports whether segments of an open volume are being brought into the
// form that its policy asks for.
func (o *openVolume) recoding() bool {
	select {
	case <-o.ready:
		return o.err == nil && o.medium.Valid() && o.medium.Recoding()
	default:
		return false
	}
}
