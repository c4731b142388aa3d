package catalog

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Leadership is an office that one process of the cluster holds at a time. It
// ends with its session or with Resign. Like every lease it is no mutual
// exclusion: what a leader does is guarded by revisions and epochs besides.
type Leadership struct {
	c   *Catalog
	s   *Session
	key string
	rev int64
}

const campaignEvery = time.Second // the election is looked at anew, though nothing was heard

// Campaign waits until the session's process is elected to the office, or ctx
// ends (its error), or the session is lost (ErrFenced). name is an element of a
// medium's name.
func (c *Catalog) Campaign(ctx context.Context, s *Session, name string) (*Leadership, error) {
	if err := ValidateName(name); err != nil || strings.Contains(name, "/") {
		return nil, fmt.Errorf("campaign for %q: %w", name, atoll.ErrInvalid)
	}
	l := &Leadership{c: c, s: s, key: electPrefix + name}
	t := time.NewTimer(campaignEvery)
	defer t.Stop()
	for {
		changed := c.Changed()
		if _, taken := c.State().Leaders[name]; !taken {
			ok, err := l.stand(ctx)
			if ok || err != nil {
				return l, err
			}
		}
		select {
		case <-changed:
		case <-t.C:
			// The state may be late; ask the store.
			if ok, err := l.stand(ctx); ok || err != nil {
				return l, err
			}
			t.Reset(campaignEvery)
		case <-s.Lost():
			return nil, fmt.Errorf("campaign for %q: %w", name, s.gone())
		case <-ctx.Done():
			return nil, fmt.Errorf("campaign for %q: %w", name, ctx.Err())
		}
	}
}

// stand takes the office if it is vacant. A store that does not answer is asked
// again later.
func (l *Leadership) stand(ctx context.Context) (bool, error) {
	try, done := bound(ctx)
	defer done()
	w := l.c.mark()
	res, ok, err := l.c.commit(try, w, Txn{
		If:   []Cmp{{Key: l.key}, l.s.alive()},
		Then: []Op{{Key: l.key, Value: encode(w, served{l.s.ID()}), Lease: l.s.lease}},
		Read: []string{l.key, processKey(l.s.ID())},
	})
	switch {
	case err != nil:
		return false, nil
	case ok:
		l.rev = res.Rev
		return true, nil
	case res.Got[1].Mod == 0:
		return false, fmt.Errorf("campaign: %w", l.s.gone())
	}
	var by served
	if res.Got[0].Mod != 0 && decode(res.Got[0], &by) == nil && by.Process == l.s.ID() {
		l.rev = res.Got[0].Mod
		return true, nil
	}
	return false, nil
}

// Valid reports whether the office is still held, as Session.Valid does.
func (l *Leadership) Valid() bool { return l.s.Valid() }

// Lost returns a channel that closes when the session ends.
func (l *Leadership) Lost() <-chan struct{} { return l.s.Lost() }

// Resign gives the office up, so that another is elected at once.
func (l *Leadership) Resign(ctx context.Context) error {
	ctx, done := bound(ctx)
	defer done()
	_, _, err := l.c.commit(ctx, "", Txn{
		If:   []Cmp{{Key: l.key, Rev: l.rev}},
		Then: []Op{{Key: l.key, Delete: true}},
		Read: []string{l.key},
	})
	if err != nil {
		return fmt.Errorf("resign %s: %w", strings.TrimPrefix(l.key, electPrefix), err)
	}
	return nil
}
