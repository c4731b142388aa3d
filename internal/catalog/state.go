package catalog

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// State is what a process knows of its cluster at one revision. It is shared
// and must not be changed.
type State struct {
	Cluster   Cluster
	Nodes     map[atoll.NodeID]Node
	Copysets  map[atoll.CopysetID]Copyset
	Processes map[atoll.UUID]Process
	Leaders   map[string]atoll.UUID // who was elected to what
	Copies    map[int]bool          // numbers of copies that media want
	Codes     map[Code]bool         // codes that media want
	Rev       int64                 // of the last change seen
}

// view is a State together with the channel that closes when it is replaced.
type view struct {
	State
	next chan struct{}
}

// raw is the part of the store under statePrefix, as last seen.
type raw struct {
	kvs map[string]KeyValue
	rev int64
}

// State returns the state as this process knows it now: changes by others
// arrive by a watch, changes by this Catalog before their call returns, if the
// watch is not late. Decisions that need more are transactions.
func (c *Catalog) State() *State { return &c.state.Load().State }

// Changed returns a channel that closes when State changes next. Take it before
// State to miss nothing.
func (c *Catalog) Changed() <-chan struct{} { return c.state.Load().next }

// load reads the whole state at one revision.
func (c *Catalog) load(ctx context.Context) (*raw, error) {
	kvs, rev, err := c.scan(ctx, statePrefix, "", 0)
	if err != nil {
		return nil, err
	}
	r := &raw{kvs: make(map[string]KeyValue, len(kvs)), rev: rev}
	for _, kv := range kvs {
		r.kvs[kv.Key] = kv
	}
	return r, nil
}

// watch follows the store until ctx ends. When the watch breaks, or what it
// tells cannot be understood, it loads everything anew.
func (c *Catalog) watch(ctx context.Context, r *raw) {
	for ctx.Err() == nil {
		err := c.follow(ctx, r)
		if ctx.Err() != nil {
			return
		}
		c.metrics.reload()
		c.log.WarnContext(ctx, "catalog watch broken", "err", err)
		for wait := retryWait; ; wait = min(2*wait, retryMax) {
			if sleep(ctx, wait) != nil {
				return
			}
			fresh, v, err := c.reload(ctx)
			if err == nil {
				r = fresh
				c.replace(v)
				break
			}
			c.log.DebugContext(ctx, "catalog not loaded", "err", err)
		}
	}
}

func (c *Catalog) reload(ctx context.Context) (*raw, *view, error) {
	ctx, done := bound(ctx)
	defer done()
	fresh, err := c.load(ctx)
	if err != nil {
		return nil, nil, err
	}
	v, err := newView(fresh)
	return fresh, v, err
}

// follow applies changes until the watch ends.
func (c *Catalog) follow(ctx context.Context, r *raw) error {
	ctx, stop := context.WithCancel(ctx)
	batches := c.kv.Watch(ctx, statePrefix, r.rev+1)
	defer func() {
		stop()
		for range batches { // until its goroutine has ended
		}
	}()
	for b := range batches {
		if b.Err != nil {
			return b.Err
		}
		v := c.state.Load().clone(b.Events)
		for _, ev := range b.Events {
			if err := r.apply(v, ev); err != nil {
				return err
			}
		}
		v.Rev = r.rev
		c.replace(v)
	}
	return fmt.Errorf("watch the catalog: %w", atoll.ErrClosed)
}

// replace publishes a new state and wakes those who wait for it.
func (c *Catalog) replace(v *view) {
	old := c.state.Swap(v)
	close(old.next)
}

// await gives the watch a moment to show revision rev.
func (c *Catalog) await(ctx context.Context, rev int64) {
	t := time.NewTimer(time.Second)
	defer t.Stop()
	for {
		changed := c.Changed()
		if c.State().Rev >= rev {
			return
		}
		select {
		case <-changed:
		case <-t.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

func newView(r *raw) (*view, error) {
	v := &view{next: make(chan struct{}), State: State{
		Nodes:     make(map[atoll.NodeID]Node),
		Copysets:  make(map[atoll.CopysetID]Copyset),
		Processes: make(map[atoll.UUID]Process),
		Leaders:   make(map[string]atoll.UUID),
		Copies:    make(map[int]bool),
		Codes:     make(map[Code]bool),
		Rev:       r.rev,
	}}
	for _, kv := range r.kvs {
		if err := v.set(r, kv); err != nil {
			return nil, err
		}
	}
	for id := range v.Nodes {
		v.refresh(r, id)
	}
	return v, nil
}

// clone copies the maps that the events are going to change.
func (v *view) clone(events []Event) *view {
	n := &view{State: v.State, next: make(chan struct{})}
	var nodes, sets bool
	for _, ev := range events {
		nodes = nodes || !strings.HasPrefix(ev.Key, copysetPrefix)
		sets = sets || strings.HasPrefix(ev.Key, copysetPrefix)
	}
	if nodes {
		n.Nodes, n.Processes = maps.Clone(v.Nodes), maps.Clone(v.Processes)
		n.Leaders, n.Copies, n.Codes = maps.Clone(v.Leaders), maps.Clone(v.Copies), maps.Clone(v.Codes)
	}
	if sets {
		n.Copysets = maps.Clone(v.Copysets)
	}
	return n
}

// apply enters one change into r and v.
func (r *raw) apply(v *view, ev Event) error {
	if ev.Mod <= r.kvs[ev.Key].Mod {
		return nil
	}
	r.rev = max(r.rev, ev.Mod)
	if ev.Deleted {
		delete(r.kvs, ev.Key)
		v.unset(r, ev.Key)
		return nil
	}
	r.kvs[ev.Key] = ev.KeyValue
	if err := v.set(r, ev.KeyValue); err != nil {
		return err
	}
	return v.touch(r, ev.Key)
}

// set enters one key. What hangs on several keys is left to refresh.
func (v *view) set(r *raw, kv KeyValue) error {
	switch key := kv.Key; {
	case key == keyCluster:
		var cl Cluster
		err := decode(kv, &cl)
		v.Cluster = cl
		return err
	case strings.HasPrefix(key, nodePrefix):
		n, err := decodeNode(kv)
		v.Nodes[n.ID] = n
		return err
	case strings.HasPrefix(key, copysetPrefix):
		var s Copyset
		err := decode(kv, &s)
		s.Rev = kv.Mod
		v.Copysets[s.ID] = s
		return err
	case strings.HasPrefix(key, processPrefix):
		var p Process
		err := decode(kv, &p)
		v.Processes[p.ID] = p
		return err
	case strings.HasPrefix(key, electPrefix):
		var s served
		err := decode(kv, &s)
		v.Leaders[strings.TrimPrefix(key, electPrefix)] = s.Process
		return err
	case strings.HasPrefix(key, copiesPrefix):
		n, err := strconv.Atoi(strings.TrimPrefix(key, copiesPrefix))
		if err != nil {
			return fmt.Errorf("parse key %q: %w", key, atoll.ErrCorrupt)
		}
		v.Copies[n] = true
	case strings.HasPrefix(key, codesPrefix):
		code, err := ParseCode(strings.TrimPrefix(key, codesPrefix))
		if err != nil {
			return fmt.Errorf("parse key %q: %w", key, atoll.ErrCorrupt)
		}
		v.Codes[code] = true
	}
	return nil // serve, report: by refresh; others: of a newer program
}

// unset removes one key.
func (v *view) unset(r *raw, key string) {
	switch {
	case strings.HasPrefix(key, nodePrefix):
		if id, err := number(key, nodePrefix); err == nil {
			delete(v.Nodes, atoll.NodeID(id))
		}
	case strings.HasPrefix(key, copysetPrefix):
		if id, err := number(key, copysetPrefix); err == nil {
			delete(v.Copysets, atoll.CopysetID(id))
		}
	case strings.HasPrefix(key, processPrefix):
		var id atoll.UUID
		if id.UnmarshalText([]byte(strings.TrimPrefix(key, processPrefix))) == nil {
			delete(v.Processes, id)
		}
	case strings.HasPrefix(key, electPrefix):
		delete(v.Leaders, strings.TrimPrefix(key, electPrefix))
	case strings.HasPrefix(key, copiesPrefix):
		if n, err := strconv.Atoi(strings.TrimPrefix(key, copiesPrefix)); err == nil {
			delete(v.Copies, n)
		}
	case strings.HasPrefix(key, codesPrefix):
		if code, err := ParseCode(strings.TrimPrefix(key, codesPrefix)); err == nil {
			delete(v.Codes, code)
		}
	}
	_ = v.touch(r, key)
}

// touch brings up to date the nodes that hang on a key.
func (v *view) touch(r *raw, key string) error {
	for _, prefix := range []string{nodePrefix, servePrefix, reportPrefix} {
		if strings.HasPrefix(key, prefix) {
			id, err := number(key, prefix)
			if err == nil {
				v.refresh(r, atoll.NodeID(id))
			}
			return err
		}
	}
	if strings.HasPrefix(key, processPrefix) {
		for id := range v.Nodes {
			v.refresh(r, id)
		}
	}
	return nil
}

// refresh sets what a node's entry takes from other keys: it is up while a
// process with a live lease says that it serves it.
func (v *view) refresh(r *raw, id atoll.NodeID) {
	n, is := v.Nodes[id]
	if !is {
		return
	}
	n.Up, n.Report = false, NodeReport{}
	var s served
	if kv := r.kvs[serveKey(id)]; kv.Mod != 0 && decode(kv, &s) == nil {
		_, n.Up = v.Processes[s.Process]
	}
	if kv := r.kvs[reportKey(id)]; n.Up && kv.Mod != 0 {
		_ = decode(kv, &n.Report)
	}
	v.Nodes[id] = n
}

func decodeNode(kv KeyValue) (Node, error) {
	var n Node
	err := decode(kv, &n)
	n.Rev = kv.Mod
	return n, err
}
