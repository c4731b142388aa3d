package catalog

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/atollstore/atoll/internal/atoll"
)

// Etcd is a KV on an etcd cluster: the embedded one (EtcdServer.KV) or any other
// (DialEtcd).
//
// With several endpoints it uses one until a request there goes without an
// answer, and then the next: a member may be dead, stopped, or cut off from the
// others, and what counts on a lease cannot wait until its connection breaks.
type Etcd struct {
	clients []*clientv3.Client // one for each endpoint
	own     bool               // Close closes the clients
	// renew renews a lease within the process; nil: by the clients.
	renew    func(ctx context.Context, id LeaseID) error
	renewals sync.WaitGroup // joined by Close
	mu       struct {
		sync.Mutex               // held for memory work only
		at         int           // of clients, which is used
		heard      time.Time     // when that one gave its last answer, or was turned to
		moved      chan struct{} // closed when at changes
	}
}

var _ KV = (*Etcd)(nil)

// NewEtcd returns the KV of a client, which the caller closes.
func NewEtcd(client *clientv3.Client) *Etcd { return newEtcd(client) }

func newEtcd(clients ...*clientv3.Client) *Etcd {
	e := &Etcd{clients: clients}
	e.mu.moved = make(chan struct{})
	return e
}

// DialEtcd connects to an etcd cluster. An endpoint is "host:port", an http or
// https URL, or "unix:///path"; several are members of the same cluster. config
// is nil for a cluster without TLS, which must not be reachable by others. It
// does not wait for the cluster to answer.
func DialEtcd(endpoints []string, config *tls.Config, log *slog.Logger) (*Etcd, error) {
	e := newEtcd()
	e.own = true
	for _, endpoint := range endpoints {
		client, err := clientv3.New(clientv3.Config{
			Endpoints:            []string{endpoint},
			TLS:                  config,
			DialKeepAliveTime:    2 * time.Second,
			DialKeepAliveTimeout: 2 * time.Second,
			Logger:               zapLogger(log, new(atomic.Bool)),
		})
		if err != nil {
			_ = e.Close()
			return nil, fmt.Errorf("dial etcd at %s: %w: %w", endpoint, err, atoll.ErrInvalid)
		}
		e.clients = append(e.clients, client)
	}
	if len(e.clients) == 0 {
		return nil, fmt.Errorf("dial etcd: no endpoint: %w", atoll.ErrInvalid)
	}
	return e, nil
}

// Close ends the connections that DialEtcd made, and their watches.
func (e *Etcd) Close() error {
	if !e.own {
		return nil
	}
	var errs []error
	for _, c := range e.clients {
		if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, fmt.Errorf("close etcd client: %w", err))
		}
	}
	e.renewals.Wait()
	return errors.Join(errs...)
}

// client returns the client to use, and what closes when it is another one.
func (e *Etcd) client() (c *clientv3.Client, at int, moved <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.clients[e.mu.at], e.mu.at, e.mu.moved
}

// silence is how long the client in use goes without an answer before requests
// go to another one: longer than the time between renewals, so that a member
// that is only slow is not left, and watches with it, again and again.
const silence = 2 * renewEvery

// hear notes an answer of a client.
func (e *Etcd) hear(at int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mu.at == at {
		e.mu.heard = time.Now()
	}
}

// move has requests go to client to from now on, unless they do not go to client
// from any more, or that one gave an answer not long ago.
func (e *Etcd) move(from, to int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mu.at == from && from != to && time.Since(e.mu.heard) >= silence {
		e.mu.at, e.mu.heard = to, time.Now()
		close(e.mu.moved)
		e.mu.moved = make(chan struct{})
	}
}

// judge gives the error of a request to client at its kind. If that gave no
// answer, the next request goes to another one.
func (e *Etcd) judge(at int, err error) error {
	canceled := errors.Is(err, context.Canceled)
	err = kind(err)
	if !canceled && (errors.Is(err, atoll.ErrTimeout) || errors.Is(err, atoll.ErrUnreachable)) {
		e.move(at, (at+1)%len(e.clients))
	}
	return err
}

// Get implements KV.
func (e *Etcd) Get(ctx context.Context, key string) (KeyValue, error) {
	ctx, done := bound(ctx)
	defer done()
	c, at, _ := e.client()
	resp, err := c.Get(ctx, key)
	if err != nil {
		return KeyValue{}, fmt.Errorf("get key %s: %w", key, e.judge(at, err))
	}
	if len(resp.Kvs) == 0 {
		return KeyValue{}, fmt.Errorf("get key %s: %w", key, atoll.ErrNotExist)
	}
	return keyValue(resp.Kvs[0]), nil
}

// Range implements KV.
func (e *Etcd) Range(ctx context.Context, prefix, after string, limit int) ([]KeyValue, int64, error) {
	ctx, done := bound(ctx)
	defer done()
	from := prefix
	if after >= prefix {
		from = after + "\x00"
	}
	end := clientv3.GetPrefixRangeEnd(prefix)
	if end != "\x00" && from >= end { // etcd refuses an empty range
		from, limit = prefix, -1
	}
	c, at, _ := e.client()
	resp, err := c.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(int64(max(limit, 0))))
	if err != nil {
		return nil, 0, fmt.Errorf("list keys under %s: %w", prefix, e.judge(at, err))
	}
	if limit < 0 {
		return nil, resp.Header.Revision, nil
	}
	out := make([]KeyValue, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		out[i] = keyValue(kv)
	}
	return out, resp.Header.Revision, nil
}

// Txn implements KV.
func (e *Etcd) Txn(ctx context.Context, t Txn) (TxnResult, error) {
	if err := checkTxn(t); err != nil {
		return TxnResult{}, err
	}
	ctx, done := bound(ctx)
	defer done()
	cmps := make([]clientv3.Cmp, len(t.If))
	for i, c := range t.If {
		cmps[i] = compare(c)
	}
	reads := make([]clientv3.Op, 0, len(t.Read)+len(t.Then))
	for _, key := range t.Read {
		reads = append(reads, clientv3.OpGet(key))
	}
	then := reads
	for _, op := range t.Then {
		if op.Delete {
			then = append(then, clientv3.OpDelete(op.Key))
		} else {
			then = append(then, clientv3.OpPut(op.Key, string(op.Value), clientv3.WithLease(clientv3.LeaseID(op.Lease))))
		}
	}
	c, at, _ := e.client()
	resp, err := c.Txn(ctx).If(cmps...).Then(then...).Else(reads...).Commit()
	if err != nil {
		return TxnResult{}, fmt.Errorf("run transaction: %w", e.judge(at, err))
	}
	res := TxnResult{OK: resp.Succeeded, Rev: resp.Header.Revision}
	for i, key := range t.Read {
		kv := KeyValue{Key: key}
		if kvs := resp.Responses[i].GetResponseRange().Kvs; len(kvs) > 0 {
			kv = keyValue(kvs[0])
		}
		res.Got = append(res.Got, kv)
	}
	return res, nil
}

func compare(c Cmp) clientv3.Cmp {
	switch c.Kind {
	case IfExists:
		return clientv3.Compare(clientv3.CreateRevision(c.Key), ">", 0)
	case IfValue:
		return clientv3.Compare(clientv3.Value(c.Key), "=", string(c.Val))
	}
	return clientv3.Compare(clientv3.ModRevision(c.Key), "=", c.Rev)
}

// Grant implements KV. etcd counts whole seconds; a part of one is rounded up.
func (e *Etcd) Grant(ctx context.Context, ttl time.Duration) (LeaseID, error) {
	ctx, done := bound(ctx)
	defer done()
	c, at, _ := e.client()
	resp, err := c.Grant(ctx, int64((ttl+time.Second-1)/time.Second))
	if err != nil {
		return 0, fmt.Errorf("grant lease: %w", e.judge(at, err))
	}
	return LeaseID(resp.ID), nil
}

// KeepAlive implements KV.
func (e *Etcd) KeepAlive(ctx context.Context, id LeaseID) error {
	ctx, done := bound(ctx)
	defer done()
	if e.renew != nil {
		if err := e.renew(ctx, id); err != nil {
			return fmt.Errorf("renew lease %x: %w", id, kind(err))
		}
		return nil
	}
	_, at, _ := e.client()
	next := at
	err := hedge(ctx, renewAgain, len(e.clients), func(answer chan<- error) {
		to := next
		next = (next + 1) % len(e.clients)
		e.renewals.Go(func() {
			// A late answer is none for the lease, but a sign of life.
			late, done := context.WithTimeout(context.WithoutCancel(ctx), silence)
			defer done()
			_, err := e.clients[to].KeepAliveOnce(late, clientv3.LeaseID(id))
			if err == nil {
				e.hear(to)
				e.move(at, to)
			}
			select {
			case answer <- err:
			case <-ctx.Done():
			}
		})
	})
	if err != nil {
		return fmt.Errorf("renew lease %x: %w", id, e.judge(at, err))
	}
	return nil
}

// Revoke implements KV.
func (e *Etcd) Revoke(ctx context.Context, id LeaseID) error {
	ctx, done := bound(ctx)
	defer done()
	c, at, _ := e.client()
	_, err := c.Revoke(ctx, clientv3.LeaseID(id))
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("revoke lease %x: %w", id, e.judge(at, err))
	}
	return nil
}

// Watch implements KV.
func (e *Etcd) Watch(ctx context.Context, prefix string, rev int64) <-chan WatchBatch {
	out := make(chan WatchBatch)
	c, _, moved := e.client()
	wctx, stop := context.WithCancel(clientv3.WithRequireLeader(ctx))
	in := c.Watch(wctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(rev))
	go func() { // ends with in, which ends with ctx or the client
		defer close(out)
		defer stop()
		for {
			b := WatchBatch{Err: fmt.Errorf("watch: the member gave no answer: %w", atoll.ErrUnreachable)}
			select {
			case <-moved:
			case resp, ok := <-in:
				if !ok {
					return
				}
				if b = batch(resp); b.Err == nil && len(b.Events) == 0 {
					continue
				}
			}
			select {
			case out <- b:
			case <-ctx.Done():
				return
			}
			if b.Err != nil {
				return
			}
		}
	}()
	return out
}

func batch(resp clientv3.WatchResponse) WatchBatch {
	b := WatchBatch{Err: watchError(resp)}
	for _, ev := range resp.Events {
		b.Events = append(b.Events, Event{KeyValue: keyValue(ev.Kv), Deleted: ev.Type == mvccpb.DELETE})
	}
	return b
}

func watchError(resp clientv3.WatchResponse) error {
	switch err := resp.Err(); {
	case err == nil:
		return nil
	case resp.CompactRevision != 0:
		return fmt.Errorf("watch, compacted at %d: %w: %w", resp.CompactRevision, err, atoll.ErrConflict)
	default:
		return fmt.Errorf("watch: %w: %w", err, atoll.ErrUnreachable)
	}
}

func keyValue(kv *mvccpb.KeyValue) KeyValue {
	return KeyValue{Key: string(kv.Key), Value: kv.Value, Mod: kv.ModRevision, Lease: LeaseID(kv.Lease)}
}

// kind gives an error of etcd its kind. What is not known to have been refused
// may have been done.
func kind(err error) error {
	table := []struct{ from, to error }{
		{rpctypes.ErrLeaseNotFound, atoll.ErrNotExist},
		{rpctypes.ErrNoSpace, atoll.ErrNoSpace},
		{rpctypes.ErrTooManyOps, atoll.ErrTooLarge},
		{rpctypes.ErrRequestTooLarge, atoll.ErrTooLarge},
		{rpctypes.ErrDuplicateKey, atoll.ErrInvalid},
		{rpctypes.ErrEmptyKey, atoll.ErrInvalid},
		{rpctypes.ErrCompacted, atoll.ErrConflict},
		{rpctypes.ErrPermissionDenied, atoll.ErrDenied},
		{rpctypes.ErrTimeout, atoll.ErrTimeout},
		{context.DeadlineExceeded, atoll.ErrTimeout},
		{context.Canceled, atoll.ErrTimeout},
	}
	if errors.Is(err, atoll.ErrNotExist) {
		return err
	}
	for _, row := range table {
		if errors.Is(err, row.from) {
			return fmt.Errorf("%w: %w", err, row.to)
		}
	}
	return fmt.Errorf("%w: %w", err, atoll.ErrUnreachable)
}
