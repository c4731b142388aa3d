package catalog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Session is a process's life in the catalog: a lease, renewed while the
// process runs, on which hang the process's record, the nodes it serves and the
// offices it was elected to. Who owns a medium is decided by its epoch; the
// session says only whether the owner can still be alive.
//
// Once a session is lost it never comes back; open another one. Its methods may
// be called concurrently.
type Session struct {
	c      *Catalog
	proc   Process
	lease  LeaseID
	base   time.Time    // what valid counts from
	valid  atomic.Int64 // nanoseconds after base until which the session is valid
	lost   chan struct{}
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     struct {
		sync.Mutex // held for memory work only
		lost       bool
		serves     map[atoll.NodeID]int64      // revision of the registration
		reports    map[atoll.NodeID]NodeReport // last written
	}
}

const (
	renewEvery   = atoll.LeaseTTL / 6
	renewTimeout = atoll.LeaseTTL / 3
)

// OpenSession records the process under a new lease. With a zero ID one is
// drawn: an ID belongs to one session, not to a machine. ErrBusy when the ID is
// in use. ctx bounds the opening only.
func (c *Catalog) OpenSession(ctx context.Context, p Process) (*Session, error) {
	ctx, done := bound(ctx)
	defer done()
	if p.ID.IsZero() {
		p.ID = c.newUUID()
	}
	if p.PID == 0 {
		p.PID = os.Getpid()
	}
	if p.Started.IsZero() {
		p.Started = now()
	}
	s := &Session{c: c, proc: p, lost: make(chan struct{}), base: time.Now()}
	s.mu.serves = make(map[atoll.NodeID]int64)
	s.mu.reports = make(map[atoll.NodeID]NodeReport)
	var err error
	if s.lease, err = s.grant(ctx); err != nil {
		return nil, fmt.Errorf("open session of process %v: %w", p.ID, err)
	}
	w := c.mark()
	res, ok, err := c.commit(ctx, w, Txn{
		If:   []Cmp{{Key: processKey(p.ID)}},
		Then: []Op{{Key: processKey(p.ID), Value: encode(w, p), Lease: s.lease}},
		Read: []string{processKey(p.ID)},
	})
	if err == nil && !ok {
		err = fmt.Errorf("the id is in use: %w", atoll.ErrBusy)
	}
	if err != nil {
		_ = c.kv.Revoke(ctx, s.lease) // it ends by itself otherwise
		return nil, fmt.Errorf("open session of process %v: %w", p.ID, err)
	}
	running, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.wg.Go(func() { s.renew(running) })
	c.await(ctx, res.Rev)
	return s, nil
}

// grant makes the lease. One whose answer was lost ends by itself.
func (s *Session) grant(ctx context.Context) (LeaseID, error) {
	for wait := retryWait; ; wait = min(2*wait, retryMax) {
		try, done := context.WithTimeout(ctx, tryTimeout)
		start := time.Since(s.base)
		id, err := s.c.kv.Grant(try, atoll.LeaseTTL)
		done()
		if err == nil {
			s.valid.Store(int64(start + atoll.LeaseUse))
			return id, nil
		}
		if definite(err) || sleep(ctx, wait) != nil {
			return 0, err
		}
	}
}

// ID returns the process's identity, which owns media.
func (s *Session) ID() atoll.UUID { return s.proc.ID }

// Process returns the process's record.
func (s *Session) Process() Process { return s.proc }

// Valid reports whether the process may still act as the owner of what it
// acquired: less than atoll.LeaseUse has passed since the start of the last
// renewal that succeeded, by the monotonic clock. A process that was stopped and
// goes on finds it false at once. It is cheap; ask after a read and before an
// acknowledgement.
func (s *Session) Valid() bool { return int64(time.Since(s.base)) < s.valid.Load() }

// Lost returns a channel that closes when the session has ended: its lease is
// gone, or it was not renewed in time, or it was closed.
func (s *Session) Lost() <-chan struct{} { return s.lost }

// Close ends the session and revokes its lease, so that others need not wait
// for it. When it returns an error the lease ends by itself. The caller has
// stopped acting as an owner before.
func (s *Session) Close(ctx context.Context) error {
	s.cancel()
	s.wg.Wait()
	s.end()
	ctx, done := context.WithTimeout(ctx, atoll.LeaseTTL)
	defer done()
	if err := s.c.kv.Revoke(ctx, s.lease); err != nil && !errors.Is(err, atoll.ErrNotExist) {
		return fmt.Errorf("close session of process %v: %w", s.proc.ID, err)
	}
	return nil
}

// end makes the session lost, for ever.
func (s *Session) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.lost {
		s.mu.lost = true
		s.valid.Store(0)
		close(s.lost)
	}
}

// renew keeps the lease alive until ctx ends or the session is lost. A renewal
// that does not answer must not hold up the next ones, nor the notice that time
// ran out, so each waits for less than that.
func (s *Session) renew(ctx context.Context) {
	t := time.NewTimer(renewEvery)
	defer t.Stop()
	for s.wait(ctx, t) {
		start := time.Since(s.base)
		limit := min(renewTimeout, time.Duration(s.valid.Load())-start)
		try, done := context.WithTimeout(ctx, limit)
		err := s.c.kv.KeepAlive(try, s.lease)
		done()
		switch {
		case ctx.Err() != nil:
			return
		case !s.Valid() || errors.Is(err, atoll.ErrNotExist):
			s.lose(ctx, err)
			return
		case err == nil:
			s.valid.Store(int64(start + atoll.LeaseUse))
			t.Reset(renewEvery - (time.Since(s.base)-start)%renewEvery)
		default:
			t.Reset(retryWait)
		}
	}
	if ctx.Err() == nil {
		s.lose(ctx, nil)
	}
}

// wait waits for the timer; false if ctx ended or validity ran out.
func (s *Session) wait(ctx context.Context, t *time.Timer) bool {
	select {
	case <-t.C:
		return s.Valid()
	case <-ctx.Done():
		return false
	}
}

func (s *Session) lose(ctx context.Context, err error) {
	s.end()
	s.c.metrics.leaseLost()
	s.c.log.WarnContext(ctx, "session lost", "process", s.proc.ID, "err", err)
}

// alive is the condition that the session's lease has not ended.
func (s *Session) alive() Cmp { return Cmp{Key: processKey(s.proc.ID), Kind: IfExists} }

// gone is the error of a session that has ended.
func (s *Session) gone() error {
	return fmt.Errorf("the session of process %v has ended: %w", s.proc.ID, atoll.ErrFenced)
}

// EndSession ends the session of a process that is known to be dead, so that
// nobody need wait for its lease: the caller holds a lock that the process held
// for its whole life. A session that has ended is no error.
func (c *Catalog) EndSession(ctx context.Context, id atoll.UUID) error {
	ctx, done := bound(ctx)
	defer done()
	got, err := c.read(ctx, processKey(id))
	if err == nil && got[0].Lease != 0 {
		err = c.revoke(ctx, got[0].Lease)
	}
	if err != nil && !errors.Is(err, atoll.ErrNotExist) {
		return fmt.Errorf("end session of process %v: %w", id, err)
	}
	return nil
}

// revoke ends a lease, asking again while the store does not answer.
func (c *Catalog) revoke(ctx context.Context, id LeaseID) error {
	for wait := retryWait; ; wait = min(2*wait, retryMax) {
		try, done := context.WithTimeout(ctx, tryTimeout)
		err := c.kv.Revoke(try, id)
		done()
		if err == nil || definite(err) || sleep(ctx, wait) != nil {
			return err
		}
	}
}
