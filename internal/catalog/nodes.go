package catalog

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// RegisterNode says that the session's process serves a disk. The disk is known
// by its UUID; at the first time it gets a number. Process, Addr, Host and Rack
// of the record follow what is given; State and Created stay. The node is up
// while the session lives.
//
// ErrIdentity if the record shows another incarnation (the disk was emptied, or
// is an old copy) or the node was removed, and both ErrIdentity and ErrBusy
// while another live process serves it: after a crash, its lease has to end
// first.
func (c *Catalog) RegisterNode(ctx context.Context, s *Session, n Node) (Node, error) {
	if n.Disk.IsZero() || n.Incarnation.IsZero() {
		return Node{}, fmt.Errorf("register node without disk or incarnation: %w", atoll.ErrInvalid)
	}
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		got, err := c.read(ctx, diskKey(n.Disk))
		if err != nil {
			return Node{}, fmt.Errorf("register disk %v: %w", n.Disk, err)
		}
		var out Node
		var ok bool
		if got[0].Mod == 0 {
			out, ok, err = c.newNode(ctx, s, n)
		} else {
			out, ok, err = c.oldNode(ctx, s, n, got[0])
		}
		if err != nil {
			return Node{}, fmt.Errorf("register disk %v: %w", n.Disk, err)
		}
		if ok {
			return out, nil
		}
	}
	return Node{}, fmt.Errorf("register disk %v: %w", n.Disk, atoll.ErrConflict)
}

// newNode gives a disk its number; false if another was faster.
func (c *Catalog) newNode(ctx context.Context, s *Session, n Node) (Node, bool, error) {
	last, rev, err := c.last(ctx, keyLastNode)
	if err != nil {
		return Node{}, false, err
	}
	n.ID, n.Process, n.Rev = atoll.NodeID(last+1), s.ID(), 0
	if n.State == "" {
		n.State = NodeActive
	}
	if n.Created.IsZero() {
		n.Created = now()
	}
	w := c.mark()
	res, ok, err := c.commit(ctx, w, Txn{
		If: []Cmp{{Key: keyLastNode, Rev: rev}, {Key: diskKey(n.Disk)}, s.alive()},
		Then: append(s.serve(w, n),
			Op{Key: keyLastNode, Value: encode(w, n.ID)},
			Op{Key: diskKey(n.Disk), Value: encode(w, n.ID)}),
		Read: []string{nodeKey(n.ID), processKey(s.ID())},
	})
	return c.registered(ctx, s, n, res, ok, err)
}

// oldNode registers a disk that has a number; false if the record changed
// meanwhile.
func (c *Catalog) oldNode(ctx context.Context, s *Session, n Node, disk KeyValue) (Node, bool, error) {
	var id atoll.NodeID
	if err := decode(disk, &id); err != nil {
		return Node{}, false, err
	}
	got, err := c.read(ctx, nodeKey(id), serveKey(id))
	if err != nil {
		return Node{}, false, err
	}
	have, err := decodeNode(got[0])
	if err != nil {
		return Node{}, false, err
	}
	if err := c.mayServe(s, n, have, got[1]); err != nil {
		return Node{}, false, err
	}
	have.Process, have.Addr, have.Host, have.Rack, have.Report = s.ID(), n.Addr, n.Host, n.Rack, n.Report
	w := c.mark()
	res, ok, err := c.commit(ctx, w, Txn{
		If: []Cmp{{Key: nodeKey(id), Rev: got[0].Mod}, {Key: serveKey(id), Rev: got[1].Mod},
			{Key: diskKey(n.Disk), Rev: disk.Mod}, s.alive()},
		Then: s.serve(w, have),
		Read: []string{nodeKey(id), processKey(s.ID())},
	})
	return c.registered(ctx, s, have, res, ok, err)
}

// mayServe checks a disk against its record.
func (c *Catalog) mayServe(s *Session, n, have Node, serve KeyValue) error {
	if have.Incarnation != n.Incarnation {
		return fmt.Errorf("node %v has incarnation %v, the disk has %v: %w",
			have.ID, have.Incarnation, n.Incarnation, atoll.ErrIdentity)
	}
	if have.State == NodeRemoved {
		return fmt.Errorf("node %v was removed from the cluster: %w", have.ID, atoll.ErrIdentity)
	}
	if serve.Mod == 0 {
		return nil
	}
	var by served
	if err := decode(serve, &by); err != nil {
		return err
	}
	if by.Process != s.ID() {
		return fmt.Errorf("node %v is served by process %v at %s: %w: %w",
			have.ID, by.Process, have.Addr, atoll.ErrIdentity, atoll.ErrBusy)
	}
	return nil
}

// serve lists the writes that say that the session serves a node.
func (s *Session) serve(w string, n Node) []Op {
	report := n.Report
	n.Up, n.Report = false, NodeReport{}
	ops := []Op{
		{Key: nodeKey(n.ID), Value: encode(w, n)},
		{Key: serveKey(n.ID), Value: encode(w, served{s.ID()}), Lease: s.lease},
	}
	if !report.At.IsZero() {
		ops = append(ops, Op{Key: reportKey(n.ID), Value: encode(w, report), Lease: s.lease})
	}
	return ops
}

func (c *Catalog) registered(ctx context.Context, s *Session, n Node, res TxnResult, ok bool, err error) (Node, bool, error) {
	switch {
	case err != nil:
		return Node{}, false, err
	case !ok && res.Got[1].Mod == 0:
		return Node{}, false, s.gone()
	case !ok:
		return Node{}, false, nil
	}
	s.mu.Lock()
	s.mu.serves[n.ID] = res.Rev
	delete(s.mu.reports, n.ID)
	s.mu.Unlock()
	c.await(ctx, res.Rev)
	n.Up, n.Rev = true, res.Rev
	return n, true, nil
}

// ReportNode publishes what a node says of itself, for as long as the session
// lives. Reports that differ little from the last one are written every few
// seconds only, for every process of the cluster hears of each. ErrFenced when
// the session has ended or does not serve the node.
func (c *Catalog) ReportNode(ctx context.Context, s *Session, id atoll.NodeID, r NodeReport) error {
	if r.At.IsZero() {
		r.At = now()
	}
	s.mu.Lock()
	rev, serves := s.mu.serves[id]
	last, known := s.mu.reports[id]
	s.mu.Unlock()
	if !serves {
		return fmt.Errorf("report node %v that this session does not serve: %w", id, atoll.ErrFenced)
	}
	if known && !worthTelling(last, r) {
		return nil
	}
	ctx, done := bound(ctx)
	defer done()
	w := c.mark()
	_, ok, err := c.commit(ctx, w, Txn{
		If:   []Cmp{{Key: serveKey(id), Rev: rev}},
		Then: []Op{{Key: reportKey(id), Value: encode(w, r), Lease: s.lease}},
		Read: []string{reportKey(id)},
	})
	if err == nil && !ok {
		err = s.gone()
	}
	if err != nil {
		return fmt.Errorf("report node %v: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.reports[id] = r
	return nil
}

// WithdrawNode says that the session's process no longer serves a node: it
// counts as down at once. Registering it again brings it back.
func (c *Catalog) WithdrawNode(ctx context.Context, s *Session, id atoll.NodeID) error {
	s.mu.Lock()
	rev, serves := s.mu.serves[id]
	delete(s.mu.serves, id)
	delete(s.mu.reports, id)
	s.mu.Unlock()
	if !serves {
		return nil
	}
	ctx, done := bound(ctx)
	defer done()
	w := c.mark()
	// A registration by someone else meanwhile is left alone.
	res, _, err := c.commit(ctx, w, Txn{
		If:   []Cmp{{Key: serveKey(id), Rev: rev}},
		Then: []Op{{Key: serveKey(id), Delete: true}, {Key: reportKey(id), Delete: true}},
	})
	if err != nil {
		return fmt.Errorf("withdraw node %v: %w", id, err)
	}
	c.await(ctx, res.Rev)
	return nil
}

const reportEvery = 5 * time.Second

// worthTelling decides whether a report says enough that the last one did not.
func worthTelling(last, r NodeReport) bool {
	moved := last.Free - r.Free
	return r.At.Sub(last.At) >= reportEvery || r.At.Before(last.At) ||
		r.ReadOnly != last.ReadOnly || r.Full != last.Full || r.Silent != last.Silent || r.Errors != last.Errors ||
		r.Total != last.Total || (r.Healing == nil) != (last.Healing == nil) || (r.Stray == 0) != (last.Stray == 0) || max(moved, -moved) > r.Total/100 ||
		r.P99 > 2*last.P99 || 2*r.P99 < last.P99
}

// SetNodeState says what is wanted of a node. ErrNotExist; ErrInvalid for an
// unknown state and for any change of a removed node.
func (c *Catalog) SetNodeState(ctx context.Context, id atoll.NodeID, state NodeState) error {
	return c.SetNode(ctx, id, state, 0)
}

// SetNode is SetNodeState, and names the node that is to take the place of one
// that is drained, where that can be; 0 for any.
func (c *Catalog) SetNode(ctx context.Context, id atoll.NodeID, state NodeState, heir atoll.NodeID) error {
	if state != NodeDraining {
		heir = 0
	}
	if !slices.Contains([]NodeState{NodeActive, NodeDraining, NodeRemoved}, state) {
		return fmt.Errorf("set state of node %v to %q: %w", id, state, atoll.ErrInvalid)
	}
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		got, err := c.read(ctx, nodeKey(id))
		if err != nil {
			return fmt.Errorf("set state of node %v: %w", id, err)
		}
		if got[0].Mod == 0 {
			return fmt.Errorf("set state of node %v: %w", id, atoll.ErrNotExist)
		}
		n, err := decodeNode(got[0])
		switch {
		case err != nil:
			return fmt.Errorf("set state of node %v: %w", id, err)
		case n.State == state && n.Heir == heir:
			return nil
		case n.State == NodeRemoved:
			return fmt.Errorf("set state of node %v: it was removed: %w", id, atoll.ErrInvalid)
		}
		n.State, n.Heir = state, heir
		ok, err := c.replaceKey(ctx, got[0], n)
		if err != nil {
			return fmt.Errorf("set state of node %v: %w", id, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("set state of node %v: %w", id, atoll.ErrConflict)
}

// replaceKey writes a record if its key is as it was read, and waits for the
// state to show it.
func (c *Catalog) replaceKey(ctx context.Context, old KeyValue, record any) (bool, error) {
	w := c.mark()
	res, ok, err := c.commit(ctx, w, Txn{
		If:   []Cmp{{Key: old.Key, Rev: old.Mod}},
		Then: []Op{{Key: old.Key, Value: encode(w, record)}},
		Read: []string{old.Key},
	})
	if ok {
		c.await(ctx, res.Rev)
	}
	return ok, err
}

// last reads a counter.
func (c *Catalog) last(ctx context.Context, key string) (n uint32, rev int64, err error) {
	got, err := c.read(ctx, key)
	if err != nil || got[0].Mod == 0 {
		return 0, 0, err
	}
	return n, got[0].Mod, decode(got[0], &n)
}
