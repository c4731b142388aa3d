package catalog

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// A move changes the members of a copyset. Each step of it is one transaction on
// the revision of the set that it was decided from; ErrConflict says that the
// set has changed since, and that the decision is void.

// StartMove has m.New begin to take the place of m.Old in a copyset, which takes
// no new segments from then on. Its members can be given to another copyset.
// ErrInvalid if that cannot be, ErrNotExist for an unknown node, ErrConflict.
func (c *Catalog) StartMove(ctx context.Context, set Copyset, m Move) (Copyset, error) {
	if m.Since.IsZero() {
		m.Since = now()
	}
	next, err := set.started(m)
	if err == nil {
		next, err = c.swapCopyset(ctx, set, next, Cmp{Key: nodeKey(m.New), Kind: IfExists})
	}
	if err != nil {
		return Copyset{}, fmt.Errorf("replace node %v by %v in copyset %v: %w", m.Old, m.New, set.ID, err)
	}
	return next, nil
}

// SettleMove notes that no head lists an unsealed segment of the set, so that
// the move of id may be finished. ErrNotExist if there is none, ErrConflict.
func (c *Catalog) SettleMove(ctx context.Context, set Copyset, id atoll.NodeID) (Copyset, error) {
	next := set.clone()
	i := next.moveOf(id)
	if i < 0 {
		return Copyset{}, fmt.Errorf("settle move of node %v to copyset %v: %w", id, set.ID, atoll.ErrNotExist)
	}
	if next.Moves[i].Settled {
		return set, nil
	}
	next.Moves[i].Settled = true
	next, err := c.swapCopyset(ctx, set, next)
	if err != nil {
		return Copyset{}, fmt.Errorf("settle move of node %v to copyset %v: %w", id, set.ID, err)
	}
	return next, nil
}

// FinishMove makes id a member in the place of the one it replaces, and raises
// the version. Whoever calls it has read back on id every segment of the set.
// Without other moves the set takes new segments again, unless another set has
// the same members by now. ErrInvalid if the move is not settled, ErrNotExist if
// there is none, ErrConflict.
func (c *Catalog) FinishMove(ctx context.Context, set Copyset, id atoll.NodeID) (Copyset, error) {
	next, err := set.finished(id)
	if err == nil {
		next, err = c.swapCopyset(ctx, set, next)
	}
	if err != nil {
		return Copyset{}, fmt.Errorf("make node %v a member of copyset %v: %w", id, set.ID, err)
	}
	return next, nil
}

// CancelMove gives up the move of id. What it copied is left to it.
// ErrNotExist if there is none, ErrConflict.
func (c *Catalog) CancelMove(ctx context.Context, set Copyset, id atoll.NodeID) (Copyset, error) {
	next := set.clone()
	i := next.moveOf(id)
	if i < 0 {
		return Copyset{}, fmt.Errorf("cancel move of node %v to copyset %v: %w", id, set.ID, atoll.ErrNotExist)
	}
	next.Moves = slices.Delete(next.Moves, i, i+1)
	next, err := c.swapCopyset(ctx, set, next)
	if err != nil {
		return Copyset{}, fmt.Errorf("cancel move of node %v to copyset %v: %w", id, set.ID, err)
	}
	return next, nil
}

func (s Copyset) clone() Copyset {
	s.Nodes, s.Moves = slices.Clone(s.Nodes), slices.Clone(s.Moves)
	return s
}

func (s Copyset) moveOf(id atoll.NodeID) int {
	return slices.IndexFunc(s.Moves, func(m Move) bool { return m.New == id })
}

// Incoming returns the move by which a node is to join the set.
func (s Copyset) Incoming(id atoll.NodeID) (Move, bool) {
	if i := s.moveOf(id); i >= 0 {
		return s.Moves[i], true
	}
	return Move{}, false
}

// Leaving reports whether a member is being replaced.
func (s Copyset) Leaving(id atoll.NodeID) bool {
	return slices.ContainsFunc(s.Moves, func(m Move) bool { return m.Old == id && id != 0 })
}

func (s Copyset) started(m Move) (Copyset, error) {
	switch {
	case m.New == 0 || slices.Contains(s.Nodes, m.New):
		return s, fmt.Errorf("node %v is a member already: %w", m.New, atoll.ErrInvalid)
	case m.Old != 0 && !slices.Contains(s.Nodes, m.Old):
		return s, fmt.Errorf("node %v is no member: %w", m.Old, atoll.ErrInvalid)
	case m.Old != 0 && s.Leaving(m.Old) || s.moveOf(m.New) >= 0:
		return s, fmt.Errorf("one of the nodes is in a move: %w", atoll.ErrInvalid)
	case m.Old == 0 && len(s.Nodes)+len(s.Moves) >= atoll.MaxCopies:
		return s, fmt.Errorf("it has %d members: %w", len(s.Nodes), atoll.ErrInvalid)
	}
	s = s.clone()
	m.Settled = false
	s.Moves = append(s.Moves, m)
	return s, nil
}

func (s Copyset) finished(id atoll.NodeID) (Copyset, error) {
	i := s.moveOf(id)
	if i < 0 {
		return s, atoll.ErrNotExist
	}
	m := s.Moves[i]
	if !m.Settled {
		return s, fmt.Errorf("there may be unsealed segments: %w", atoll.ErrInvalid)
	}
	s = s.clone()
	s.Moves = slices.Delete(s.Moves, i, i+1)
	if at := slices.Index(s.Nodes, m.Old); at >= 0 {
		s.Nodes[at] = id // which shard it holds depends on the place
	} else {
		s.Nodes = append(s.Nodes, id)
	}
	s.Version++
	return s, nil
}

// swapCopyset replaces a set by next and keeps the index of members right: it
// lists the sets that take new segments when all their members are well, each
// list of members once. A set in a move is not listed; afterwards it is, if its
// place is free, and else it stays retired.
func (c *Catalog) swapCopyset(ctx context.Context, set, next Copyset, conds ...Cmp) (Copyset, error) {
	if set.Rev == 0 {
		return Copyset{}, fmt.Errorf("change a copyset that was never read: %w", atoll.ErrInvalid)
	}
	ctx, done := bound(ctx)
	defer done()
	w := c.mark()
	t := Txn{If: append(conds, Cmp{Key: copysetKey(set.ID), Rev: set.Rev}), Read: []string{copysetKey(set.ID)}}
	for _, cond := range conds {
		t.Read = append(t.Read, cond.Key)
	}
	moving := len(next.Moves) > 0
	switch listed, kv, err := c.listed(ctx, set, next); {
	case err != nil:
		return Copyset{}, err
	case listed && moving:
		next.Retired = true
		t.If = append(t.If, Cmp{Key: kv.Key, Rev: kv.Mod})
		t.Then = append(t.Then, Op{Key: kv.Key, Delete: true})
	case moving:
		next.Retired = true
	default:
		next.Retired = kv.Mod != 0
		t.If = append(t.If, Cmp{Key: kv.Key, Rev: kv.Mod})
		if kv.Mod == 0 {
			t.Then = append(t.Then, Op{Key: kv.Key, Value: encode(w, set.ID)})
		}
	}
	t.Then = append(t.Then, Op{Key: copysetKey(set.ID), Value: encode(w, next)})
	res, ok, err := c.commit(ctx, w, t)
	switch {
	case err != nil:
		return Copyset{}, err
	case ok:
		next.Rev = res.Rev
		c.await(ctx, res.Rev)
		return next, nil
	case len(conds) > 0 && res.Got[1].Mod == 0:
		return Copyset{}, fmt.Errorf("node: %w", atoll.ErrNotExist)
	}
	return Copyset{}, fmt.Errorf("copyset %v has changed: %w", set.ID, atoll.ErrConflict)
}

// listed looks up the members of a set in the index: of set if next is in a
// move, to take it out, else of next, to enter it. It reports whether the index
// names this set.
func (c *Catalog) listed(ctx context.Context, set, next Copyset) (bool, KeyValue, error) {
	key := membersKey(next.Nodes)
	if len(next.Moves) > 0 {
		key = membersKey(set.Nodes)
	}
	got, err := c.read(ctx, key)
	if err != nil || got[0].Mod == 0 {
		return false, KeyValue{Key: key}, err
	}
	var id atoll.CopysetID
	err = decode(got[0], &id)
	return id == set.ID, got[0], err
}

// SetNodeDown notes since when a node is down; the zero time that it is not. It
// returns without an error when the record has changed since n was read: whoever
// looks next decides anew.
func (c *Catalog) SetNodeDown(ctx context.Context, n Node, since time.Time) error {
	ctx, done := bound(ctx)
	defer done()
	got, err := c.read(ctx, nodeKey(n.ID))
	if err == nil && got[0].Mod == n.Rev && n.Rev != 0 {
		var have Node
		if have, err = decodeNode(got[0]); err == nil {
			have.Down = since
			_, err = c.replaceKey(ctx, got[0], have)
		}
	}
	if err != nil {
		return fmt.Errorf("note that node %v is down: %w", n.ID, err)
	}
	return nil
}
