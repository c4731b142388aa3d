package catalog

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Memory is a KV store in memory: the twin of etcd for simulation and tests. It
// is deterministic (it draws no randomness and its leases end in the time of
// package time, virtual in a bubble), and it can be made to misbehave as etcd
// may: lost requests, unknown outcomes, slow or cut-off clients, late watches,
// compaction. Its methods may be called concurrently.
type Memory struct {
	opts MemoryOptions
	wg   sync.WaitGroup
	done chan struct{} // closed by Close
	mu   struct {
		sync.Mutex // held for memory work only
		closed     bool
		rev        int64
		compacted  int64 // changes up to here are forgotten
		keys       []string
		vals       map[string]KeyValue
		history    []change
		leases     map[LeaseID]*memoryLease
		lastLease  LeaseID
		changed    chan struct{} // closed at the next change
		cut        map[string]chan struct{}
	}
}

// MemoryOptions says how a Memory behaves. The zero value is a perfect one.
// The functions are called without locks held, possibly concurrently.
type MemoryOptions struct {
	// Delay is the time one way between a client and the store.
	Delay func(client string) time.Duration
	// Fault decides the fate of one request. op is one of "get", "range",
	// "txn", "grant", "keepalive" and "revoke".
	Fault func(client, op string) Fault
	// WatchLag is how long after a change a client's watch hears of it.
	WatchLag func(client string) time.Duration
}

// Fault is the fate of a request.
type Fault uint8

// Fates of a request.
const (
	Healthy   Fault = iota
	LoseAsk         // the request is lost: not done, ErrTimeout
	LoseReply       // the reply is lost: done, ErrTimeout
)

const maxHistory = 1 << 16 // changes remembered for watches

type change struct {
	Event
	at time.Time
}

type memoryLease struct {
	ttl   time.Duration
	ends  time.Time
	timer *time.Timer
	keys  map[string]struct{}
}

// NewMemory returns an empty store. Close it when done.
func NewMemory(opts MemoryOptions) *Memory {
	m := &Memory{opts: opts, done: make(chan struct{})}
	m.mu.vals = make(map[string]KeyValue)
	m.mu.leases = make(map[LeaseID]*memoryLease)
	m.mu.cut = make(map[string]chan struct{})
	m.mu.changed = make(chan struct{})
	m.mu.rev = 1
	return m
}

// Client returns the store as the client of this name sees it.
func (m *Memory) Client(name string) KV { return &memoryClient{m: m, name: name} }

// Cut cuts a client off (its requests time out and its watches stall), or
// reconnects it.
func (m *Memory) Cut(client string, cut bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	heal, is := m.mu.cut[client]
	switch {
	case cut && !is:
		m.mu.cut[client] = make(chan struct{})
	case !cut && is:
		close(heal)
		delete(m.mu.cut, client)
	}
}

// Compact forgets the changes up to the present, so that a watch that is behind
// or starts from before ends with ErrConflict.
func (m *Memory) Compact() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.compacted, m.mu.history = m.mu.rev, nil
}

// Rev returns the present revision.
func (m *Memory) Rev() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.rev
}

// Expire ends the leases of which a key begins with prefix, at once, as after
// their time.
func (m *Memory) Expire(prefix string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []LeaseID
	for id, l := range m.mu.leases {
		for k := range l.keys {
			if strings.HasPrefix(k, prefix) {
				ids = append(ids, id)
				break
			}
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		m.endLease(id)
	}
}

// Close ends all watches and waits for them. Later requests end with ErrClosed.
func (m *Memory) Close() error {
	m.mu.Lock()
	if !m.mu.closed {
		m.mu.closed = true
		close(m.done)
		for _, l := range m.mu.leases {
			l.timer.Stop()
		}
	}
	m.mu.Unlock()
	m.wg.Wait()
	return nil
}

// endLease deletes the lease and its keys in one revision. m.mu is held.
func (m *Memory) endLease(id LeaseID) {
	l := m.mu.leases[id]
	if l == nil || m.mu.closed {
		return
	}
	l.timer.Stop()
	delete(m.mu.leases, id)
	keys := make([]string, 0, len(l.keys))
	for k := range l.keys {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var ops []Op
	for _, k := range keys {
		ops = append(ops, Op{Key: k, Delete: true})
	}
	m.apply(ops)
}

// expire is what a lease's timer does. A renewal may have come in between.
func (m *Memory) expire(id LeaseID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.mu.leases[id]
	if l == nil || m.mu.closed {
		return
	}
	if left := time.Until(l.ends); left > 0 {
		l.timer.Reset(left)
		return
	}
	m.endLease(id)
}

// apply does the operations as one revision. m.mu is held.
func (m *Memory) apply(ops []Op) {
	rev, now, n := m.mu.rev+1, time.Now(), 0
	for _, op := range ops {
		old, is := m.mu.vals[op.Key]
		if op.Delete && !is {
			continue
		}
		if l := m.mu.leases[old.Lease]; is && l != nil {
			delete(l.keys, op.Key)
		}
		ev := Event{KeyValue: KeyValue{Key: op.Key, Mod: rev}, Deleted: op.Delete}
		if op.Delete {
			delete(m.mu.vals, op.Key)
			i, _ := slices.BinarySearch(m.mu.keys, op.Key)
			m.mu.keys = slices.Delete(m.mu.keys, i, i+1)
		} else {
			ev.Value, ev.Lease = bytes.Clone(op.Value), op.Lease
			if l := m.mu.leases[op.Lease]; l != nil {
				l.keys[op.Key] = struct{}{}
			}
			if !is {
				i, _ := slices.BinarySearch(m.mu.keys, op.Key)
				m.mu.keys = slices.Insert(m.mu.keys, i, op.Key)
			}
			m.mu.vals[op.Key] = ev.KeyValue
		}
		m.mu.history = append(m.mu.history, change{ev, now})
		n++
	}
	if n == 0 {
		return
	}
	m.mu.rev = rev
	if len(m.mu.history) > maxHistory {
		m.forget(len(m.mu.history) - maxHistory/2)
	}
	close(m.mu.changed)
	m.mu.changed = make(chan struct{})
}

// forget drops the n oldest changes, and the rest of the last one's revision.
func (m *Memory) forget(n int) {
	m.mu.compacted = m.mu.history[n-1].Mod
	for n < len(m.mu.history) && m.mu.history[n].Mod == m.mu.compacted {
		n++
	}
	m.mu.history = slices.Clone(m.mu.history[n:])
}

// holds reports whether a condition holds. m.mu is held.
func (m *Memory) holds(c Cmp) bool {
	kv, is := m.mu.vals[c.Key]
	switch c.Kind {
	case IfRev:
		return kv.Mod == c.Rev
	case IfExists:
		return is
	case IfValue:
		return is && bytes.Equal(kv.Value, c.Val)
	}
	return false
}

// memoryClient is the KV of one client.
type memoryClient struct {
	m    *Memory
	name string
}

var _ KV = (*memoryClient)(nil)

// call carries one request there and back, or loses it. do runs under m.mu.
func (c *memoryClient) call(ctx context.Context, op string, do func() error) error {
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	fate := Healthy
	if c.m.opts.Fault != nil {
		fate = c.m.opts.Fault(c.name, op)
	}
	if err := c.travel(ctx); err != nil {
		return err
	}
	if fate == LoseAsk {
		return fmt.Errorf("%s: %w", op, atoll.ErrTimeout)
	}
	c.m.mu.Lock()
	err := error(atoll.ErrClosed)
	if !c.m.mu.closed {
		err = do()
	}
	c.m.mu.Unlock()
	if fate == LoseReply {
		return fmt.Errorf("%s: %w", op, atoll.ErrTimeout)
	}
	if travelErr := c.travel(ctx); travelErr != nil {
		return travelErr
	}
	return err
}

// travel takes the time of one way. It waits while the client is cut off.
func (c *memoryClient) travel(ctx context.Context) error {
	if c.m.opts.Delay != nil {
		if d := c.m.opts.Delay(c.name); d > 0 {
			if err := c.wait(ctx, d); err != nil {
				return err
			}
		}
	}
	for {
		c.m.mu.Lock()
		heal := c.m.mu.cut[c.name]
		c.m.mu.Unlock()
		if heal == nil {
			break
		}
		select {
		case <-heal:
		case <-c.m.done:
			return fmt.Errorf("reach the catalog: %w", atoll.ErrClosed)
		case <-ctx.Done():
			return fmt.Errorf("reach the catalog: %w: %w", atoll.ErrTimeout, ctx.Err())
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("reach the catalog: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
	return nil
}

func (c *memoryClient) wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-c.m.done:
		return fmt.Errorf("reach the catalog: %w", atoll.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("reach the catalog: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
}

// Get implements KV.
func (c *memoryClient) Get(ctx context.Context, key string) (kv KeyValue, err error) {
	err = c.call(ctx, "get", func() error {
		var is bool
		if kv, is = c.m.mu.vals[key]; !is {
			return fmt.Errorf("get key %s: %w", key, atoll.ErrNotExist)
		}
		return nil
	})
	return kv, err
}

// Range implements KV.
func (c *memoryClient) Range(ctx context.Context, prefix, after string, limit int) (out []KeyValue, rev int64, err error) {
	err = c.call(ctx, "range", func() error {
		keys := c.m.mu.keys
		for i := sort.SearchStrings(keys, max(prefix, after)); i < len(keys); i++ {
			if !strings.HasPrefix(keys[i], prefix) || limit > 0 && len(out) == limit {
				break
			}
			if keys[i] > after {
				out = append(out, c.m.mu.vals[keys[i]])
			}
		}
		rev = c.m.mu.rev
		return nil
	})
	return out, rev, err
}

// Txn implements KV.
func (c *memoryClient) Txn(ctx context.Context, t Txn) (res TxnResult, err error) {
	if err := checkTxn(t); err != nil {
		return TxnResult{}, err
	}
	err = c.call(ctx, "txn", func() error {
		res.OK = !slices.ContainsFunc(t.If, func(cmp Cmp) bool { return !c.m.holds(cmp) })
		for _, key := range t.Read {
			kv := c.m.mu.vals[key]
			kv.Key = key
			res.Got = append(res.Got, kv)
		}
		if res.OK {
			for _, op := range t.Then {
				if op.Lease != 0 && c.m.mu.leases[op.Lease] == nil {
					return fmt.Errorf("put key %s under lease %x: %w", op.Key, op.Lease, atoll.ErrNotExist)
				}
			}
			c.m.apply(t.Then)
		}
		res.Rev = c.m.mu.rev
		return nil
	})
	if err != nil {
		return TxnResult{}, err
	}
	return res, nil
}

const maxTxnOps = 128 // of etcd

// checkTxn refuses what etcd would refuse.
func checkTxn(t Txn) error {
	if len(t.If) > maxTxnOps || len(t.Then)+len(t.Read) > maxTxnOps {
		return fmt.Errorf("run transaction of %d conditions, %d operations, %d reads: %w",
			len(t.If), len(t.Then), len(t.Read), atoll.ErrTooLarge)
	}
	seen := make(map[string]bool, len(t.Then))
	for _, op := range t.Then {
		if op.Key == "" || seen[op.Key] {
			return fmt.Errorf("run transaction that names key %q twice or not: %w", op.Key, atoll.ErrInvalid)
		}
		seen[op.Key] = true
	}
	return nil
}

// Grant implements KV.
func (c *memoryClient) Grant(ctx context.Context, ttl time.Duration) (id LeaseID, err error) {
	err = c.call(ctx, "grant", func() error {
		c.m.mu.lastLease++
		id = c.m.mu.lastLease
		l := &memoryLease{ttl: ttl, ends: time.Now().Add(ttl), keys: make(map[string]struct{})}
		l.timer = time.AfterFunc(ttl, func() { c.m.expire(id) })
		c.m.mu.leases[id] = l
		return nil
	})
	if err != nil {
		return 0, err
	}
	return id, nil
}

// KeepAlive implements KV.
func (c *memoryClient) KeepAlive(ctx context.Context, id LeaseID) error {
	return c.call(ctx, "keepalive", func() error {
		l := c.m.mu.leases[id]
		if l == nil {
			return fmt.Errorf("renew lease %x: %w", id, atoll.ErrNotExist)
		}
		l.ends = time.Now().Add(l.ttl)
		l.timer.Reset(l.ttl)
		return nil
	})
}

// Revoke implements KV.
func (c *memoryClient) Revoke(ctx context.Context, id LeaseID) error {
	return c.call(ctx, "revoke", func() error {
		c.m.endLease(id)
		return nil
	})
}

// Watch implements KV.
func (c *memoryClient) Watch(ctx context.Context, prefix string, rev int64) <-chan WatchBatch {
	out := make(chan WatchBatch)
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.m.mu.closed {
		close(out)
		return out
	}
	c.m.wg.Go(func() {
		defer close(out)
		c.watch(ctx, prefix, rev, out)
	})
	return out
}

func (c *memoryClient) watch(ctx context.Context, prefix string, rev int64, out chan<- WatchBatch) {
	for {
		batch, last, at, changed := c.since(prefix, rev)
		if lag := c.m.opts.WatchLag; lag != nil && len(batch.Events) > 0 {
			if d := time.Until(at.Add(lag(c.name))); d > 0 && c.wait(ctx, d) != nil {
				return
			}
		}
		if (batch.Err != nil || len(batch.Events) > 0) && !c.deliver(ctx, out, batch) || batch.Err != nil {
			return
		}
		rev = max(rev, last+1)
		select {
		case <-changed:
		case <-ctx.Done():
			return
		case <-c.m.done:
			return
		}
	}
}

// deliver hands a batch over once the client can be reached.
func (c *memoryClient) deliver(ctx context.Context, out chan<- WatchBatch, b WatchBatch) bool {
	for {
		c.m.mu.Lock()
		heal := c.m.mu.cut[c.name]
		c.m.mu.Unlock()
		if heal == nil {
			break
		}
		select {
		case <-heal:
		case <-ctx.Done():
			return false
		case <-c.m.done:
			return false
		}
	}
	select {
	case out <- b:
		return true
	case <-ctx.Done():
		return false
	case <-c.m.done:
		return false
	}
}

// since collects the changes from rev on, the last revision seen, when the
// first of them happened, and a channel that closes at the next change.
func (c *memoryClient) since(prefix string, rev int64) (b WatchBatch, last int64, at time.Time, changed <-chan struct{}) {
	m := c.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if rev > 0 && rev <= m.mu.compacted {
		b.Err = fmt.Errorf("watch from revision %d, compacted at %d: %w", rev, m.mu.compacted, atoll.ErrConflict)
		return b, 0, at, m.mu.changed
	}
	h := m.mu.history
	for i := sort.Search(len(h), func(i int) bool { return h[i].Mod >= rev }); i < len(h); i++ {
		if strings.HasPrefix(h[i].Key, prefix) {
			if len(b.Events) == 0 {
				at = h[i].at
			}
			b.Events = append(b.Events, h[i].Event)
		}
	}
	return b, m.mu.rev, at, m.mu.changed
}
