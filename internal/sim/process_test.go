package sim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// process is a running program: what dies when it is killed.
type process struct {
	w       *world
	name    string // of the machine; the same for its next process
	catalog *catalog.Catalog
	killed  atomic.Bool
	mu      struct {
		sync.Mutex
		open map[*request]uint64 // requests on their way, numbered in order
		next uint64
	}
}

// newProcess starts a process and connects it to the catalog.
func (w *world) newProcess(ctx context.Context, name string) (*process, error) {
	p := &process{w: w, name: name}
	p.mu.open = make(map[*request]uint64)
	var err error
	p.catalog, err = catalog.OpenWith(ctx, mortal{w.memory.Client(name), p}, catalog.Options{
		Log: w.logger(name), Rand: w.random(fmt.Sprint(name, w.now())),
	})
	return p, err
}

func (p *process) dead() bool { return p.killed.Load() }

func (p *process) remember(r *request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.next++
	p.mu.open[r] = p.mu.next
}

func (p *process) forget(r *request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.mu.open, r)
}

// fail ends the requests to a machine, or all if m is nil, in order.
func (p *process) fail(m *machine, why string) {
	p.mu.Lock()
	var list []*request
	for r := range p.mu.open {
		if m == nil || r.link.m == m {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b *request) int { return cmp.Compare(p.mu.open[a], p.mu.open[b]) })
	p.mu.Unlock()
	for _, r := range list {
		r.end(r.link.lost(why))
	}
}

// kill ends the process as SIGKILL does: what it has sent is on its way, and it
// sends and hears nothing more. What is left of it must still be closed.
func (p *process) kill() {
	p.killed.Store(true)
	p.fail(nil, "process killed")
}

// mortal is a catalog client that ends with its process.
type mortal struct {
	kv catalog.KV
	p  *process
}

func (m mortal) up() error {
	if m.p.dead() {
		return fmt.Errorf("process %s is dead: %w", m.p.name, atoll.ErrClosed)
	}
	return nil
}

func (m mortal) Get(ctx context.Context, key string) (catalog.KeyValue, error) {
	if err := m.up(); err != nil {
		return catalog.KeyValue{}, err
	}
	kv, err := m.kv.Get(ctx, key)
	return kv, errors.Join(err, m.up())
}

func (m mortal) Range(ctx context.Context, prefix, after string, limit int) ([]catalog.KeyValue, int64, error) {
	if err := m.up(); err != nil {
		return nil, 0, err
	}
	list, rev, err := m.kv.Range(ctx, prefix, after, limit)
	return list, rev, errors.Join(err, m.up())
}

func (m mortal) Txn(ctx context.Context, t catalog.Txn) (catalog.TxnResult, error) {
	if err := m.up(); err != nil {
		return catalog.TxnResult{}, err
	}
	res, err := m.kv.Txn(ctx, t)
	if err == nil && len(t.Then) > 0 {
		m.p.w.note("txn", m.p.name, len(t.If), len(t.Then), res.OK)
	}
	return res, errors.Join(err, m.up())
}

func (m mortal) Watch(ctx context.Context, prefix string, rev int64) <-chan catalog.WatchBatch {
	return m.kv.Watch(ctx, prefix, rev)
}

func (m mortal) Grant(ctx context.Context, ttl time.Duration) (catalog.LeaseID, error) {
	if err := m.up(); err != nil {
		return 0, err
	}
	id, err := m.kv.Grant(ctx, ttl)
	return id, errors.Join(err, m.up())
}

func (m mortal) KeepAlive(ctx context.Context, id catalog.LeaseID) error {
	if err := m.up(); err != nil {
		return err
	}
	return errors.Join(m.kv.KeepAlive(ctx, id), m.up())
}

func (m mortal) Revoke(ctx context.Context, id catalog.LeaseID) error {
	if err := m.up(); err != nil {
		return err
	}
	return errors.Join(m.kv.Revoke(ctx, id), m.up())
}
