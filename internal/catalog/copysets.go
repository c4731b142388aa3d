package catalog

import (
	"context"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
)

// EnsureCopyset finds or makes the copyset with exactly these members, in any
// order. One that was retired takes new segments again. ErrInvalid for no
// members, too many or the same twice; ErrNotExist for an unknown node.
func (c *Catalog) EnsureCopyset(ctx context.Context, nodes []atoll.NodeID) (Copyset, error) {
	sorted := slices.Clone(nodes)
	slices.Sort(sorted)
	if len(sorted) == 0 || len(sorted) > atoll.MaxShards || len(slices.Compact(slices.Clone(sorted))) != len(sorted) {
		return Copyset{}, fmt.Errorf("make copyset of nodes %v: want 1 to %d different ones: %w",
			nodes, atoll.MaxShards, atoll.ErrInvalid)
	}
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		set, ok, err := c.ensureCopyset(ctx, sorted)
		if err != nil {
			return Copyset{}, fmt.Errorf("make copyset of nodes %v: %w", sorted, err)
		}
		if ok {
			return set, nil
		}
	}
	return Copyset{}, fmt.Errorf("make copyset of nodes %v: %w", sorted, atoll.ErrConflict)
}

func (c *Catalog) ensureCopyset(ctx context.Context, nodes []atoll.NodeID) (Copyset, bool, error) {
	got, err := c.read(ctx, membersKey(nodes), keyLastSet)
	if err != nil {
		return Copyset{}, false, err
	}
	if got[0].Mod != 0 {
		var id atoll.CopysetID
		if err := decode(got[0], &id); err != nil {
			return Copyset{}, false, err
		}
		return c.retire(ctx, id, false)
	}
	var last atoll.CopysetID
	if got[1].Mod != 0 {
		if err := decode(got[1], &last); err != nil {
			return Copyset{}, false, err
		}
	}
	return c.newCopyset(ctx, Copyset{ID: last + 1, Nodes: nodes, Version: 1}, got[1].Mod)
}

func (c *Catalog) newCopyset(ctx context.Context, set Copyset, lastRev int64) (Copyset, bool, error) {
	w := c.mark()
	t := Txn{
		If: []Cmp{{Key: keyLastSet, Rev: lastRev}, {Key: membersKey(set.Nodes)}},
		Then: []Op{
			{Key: keyLastSet, Value: encode(w, set.ID)},
			{Key: membersKey(set.Nodes), Value: encode(w, set.ID)},
			{Key: copysetKey(set.ID), Value: encode(w, set)},
		},
		Read: []string{copysetKey(set.ID)},
	}
	for _, n := range set.Nodes {
		t.If = append(t.If, Cmp{Key: nodeKey(n), Kind: IfExists})
		t.Read = append(t.Read, nodeKey(n))
	}
	res, ok, err := c.commit(ctx, w, t)
	if err != nil {
		return Copyset{}, false, err
	}
	for i, kv := range res.Got[1:] {
		if kv.Mod == 0 {
			return Copyset{}, false, fmt.Errorf("node %v: %w", set.Nodes[i], atoll.ErrNotExist)
		}
	}
	if ok {
		set.Rev = res.Rev
		c.await(ctx, res.Rev)
	}
	return set, ok, nil
}

// RetireCopyset says whether a copyset takes no new segments. What it holds
// stays where it is. ErrNotExist; ErrBusy while a member is being replaced.
func (c *Catalog) RetireCopyset(ctx context.Context, id atoll.CopysetID, retired bool) (Copyset, error) {
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		set, ok, err := c.retire(ctx, id, retired)
		if err != nil {
			return Copyset{}, fmt.Errorf("retire copyset %v: %w", id, err)
		}
		if ok {
			return set, nil
		}
	}
	return Copyset{}, fmt.Errorf("retire copyset %v: %w", id, atoll.ErrConflict)
}

// retire sets Retired; false if the record changed meanwhile.
func (c *Catalog) retire(ctx context.Context, id atoll.CopysetID, retired bool) (Copyset, bool, error) {
	got, err := c.read(ctx, copysetKey(id))
	if err != nil {
		return Copyset{}, false, err
	}
	if got[0].Mod == 0 {
		return Copyset{}, false, fmt.Errorf("copyset %v: %w", id, atoll.ErrNotExist)
	}
	var set Copyset
	if err := decode(got[0], &set); err != nil {
		return Copyset{}, false, err
	}
	set.Rev = got[0].Mod
	if len(set.Moves) > 0 && !retired {
		return Copyset{}, false, fmt.Errorf("a member is being replaced: %w", atoll.ErrBusy)
	}
	if set.Retired == retired {
		c.await(ctx, set.Rev)
		return set, true, nil
	}
	set.Retired = retired
	ok, err := c.replaceKey(ctx, got[0], set)
	return set, ok, err
}
