package medium

import (
	"context"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Settle does what an owner would, for a medium that has none: it fences and
// seals what the last one left unsealed, completes copies that are not known to
// be whole, removes what was dropped, and lets go. left is how many segments
// still have such copies. ErrBusy while any process owns it, which does all that
// by itself; ErrUnavailable as for Open. A user who opens the medium meanwhile
// takes it over, and this ends.
func Settle(ctx context.Context, opts Options, id atoll.MediumID) (left int, err error) {
	opts = opts.withDefaults()
	h, err := opts.Catalog.AcquireIdle(ctx, id, opts.Session)
	if err != nil {
		return 0, fmt.Errorf("settle medium %v: %w", id, err)
	}
	m := newMedium(opts, id, h)
	defer m.lose(nil)
	if err = m.recover(ctx); err == nil {
		m.completeCopies(ctx)
		if wait := m.untilDoom(); wait <= opts.Grace+time.Second {
			if err = sleep(ctx, wait); err == nil {
				m.removeDoomed(ctx)
			}
		}
		m.removeLeftovers(ctx)
		left = len(m.unverified())
	}
	away, cancel := context.WithTimeout(context.WithoutCancel(ctx), atoll.RequestTimeout)
	defer cancel()
	_ = m.own.change(away, func(h catalog.Head) (catalog.Head, error) { return headReleased(h), nil }) // or the lease ends
	if err != nil {
		return left, fmt.Errorf("settle medium %v: %w", id, err)
	}
	return left, nil
}
