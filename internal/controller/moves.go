package controller

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

const (
	repairEvery = time.Second
	// headsPage is how many heads are read at once, settlesAtOnce how many media
	// are settled side by side, and settleAgain the time between tries of one.
	headsPage     = 1000
	settlesAtOnce = 4
	settleAgain   = 5 * time.Second
	settleTime    = 30 * time.Second
)

// Media is what the controller needs of the media.
type Media interface {
	// Settle seals and completes what the last owner of a medium left, if it has
	// no owner now; ErrBusy if it has.
	Settle(ctx context.Context, id atoll.MediumID) error
}

// repairing has members of copysets replaced: it starts and cancels moves, and
// notes which of them are settled. The new members do the rest.
func (c *Controller) repairing(ctx context.Context) {
	s := &settler{c: c, tried: map[atoll.MediumID]time.Time{}}
	for {
		changed := c.cat.Changed()
		st := c.cat.State()
		p := planRepair(st, time.Now(), c.repairAfter)
		err := c.carryOut(ctx, p)
		c.metrics.repair(st, p)
		if err == nil {
			err = s.settle(ctx)
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, atoll.ErrConflict) {
			c.log.WarnContext(ctx, "repair not planned", "err", err)
		}
		if !pause(ctx, settle+time.Duration(len(st.Nodes))*time.Millisecond) {
			return
		}
		t := time.NewTimer(repairEvery)
		select {
		case <-changed:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// carryOut enters a plan into the catalog. A set that has changed since is left
// to the next plan.
func (c *Controller) carryOut(ctx context.Context, p repairPlan) error {
	for _, n := range p.Down {
		since := time.Time{}
		if gone(n) {
			since = time.Now().UTC().Round(0)
		}
		if err := c.cat.SetNodeDown(ctx, n, since); err != nil {
			return err
		}
		c.log.InfoContext(ctx, "node changed", "node", n.ID, "up", !gone(n))
	}
	for _, m := range p.Cancel {
		_, err := c.cat.CancelMove(ctx, m.set, m.id)
		if err != nil && !errors.Is(err, atoll.ErrConflict) {
			return err
		}
		if err == nil {
			c.log.InfoContext(ctx, "replacement cancelled", "copyset", m.set.ID, "node", m.id, "why", m.why)
		}
	}
	for _, m := range p.Start {
		_, err := c.cat.StartMove(ctx, m.set, m.move)
		if err != nil && !errors.Is(err, atoll.ErrConflict) {
			return err
		}
		if err == nil {
			c.log.InfoContext(ctx, "replacement begun", "copyset", m.set.ID, "old", m.move.Old, "node", m.move.New, "why", m.move.Why)
		}
	}
	return nil
}

// settler finds out which copysets hold no unsealed segment any more, and sees
// to those whose owner is gone.
type settler struct {
	c     *Controller
	tried map[atoll.MediumID]time.Time
}

// settle does one round (D5). No segment can be registered on a set while its
// move stands, so what one look at all heads does not show never comes again.
func (s *settler) settle(ctx context.Context) error {
	st := s.c.cat.State()
	waiting := map[atoll.CopysetID]catalog.Copyset{}
	for _, set := range st.Copysets {
		if slices.ContainsFunc(set.Moves, func(m catalog.Move) bool { return !m.Settled }) {
			waiting[set.ID] = set
		}
	}
	if len(waiting) == 0 {
		clear(s.tried)
		return nil
	}
	unsealed, orphans, err := s.look(ctx, st, waiting)
	if err != nil {
		return err
	}
	for id, set := range waiting {
		if unsealed[id] {
			continue
		}
		for _, m := range set.Moves {
			if set, err = s.c.cat.SettleMove(ctx, set, m.New); err != nil {
				if errors.Is(err, atoll.ErrConflict) {
					break
				}
				return err
			}
		}
	}
	s.settleAll(ctx, orphans)
	return nil
}

// look goes through all heads. It returns the sets on which some segment is not
// sealed, and the media of these that have no owner.
func (s *settler) look(ctx context.Context, st *catalog.State, waiting map[atoll.CopysetID]catalog.Copyset) (unsealed map[atoll.CopysetID]bool, orphans []atoll.MediumID, err error) {
	unsealed = map[atoll.CopysetID]bool{}
	for after := atoll.MediumID(0); ; {
		heads, err := s.c.cat.Heads(ctx, after, headsPage)
		if err != nil {
			return nil, nil, err
		}
		for _, h := range heads {
			after = h.Medium
			var on []atoll.CopysetID
			for _, u := range h.Unsealed {
				if _, is := waiting[u.Seg.Copyset]; is {
					on = append(on, u.Seg.Copyset)
				}
			}
			if len(on) == 0 || s.deleted(ctx, h.Medium) {
				continue
			}
			for _, id := range on {
				unsealed[id] = true
			}
			if _, alive := st.Processes[h.Process]; !alive {
				orphans = append(orphans, h.Medium)
			}
		}
		if len(heads) < headsPage {
			return unsealed, orphans, nil
		}
	}
}

// deleted reports whether a medium is being deleted, or is: nobody will recover
// its segments.
func (s *settler) deleted(ctx context.Context, id atoll.MediumID) bool {
	m, err := s.c.cat.Medium(ctx, id)
	return err == nil && m.State == catalog.MediumDeleting || errors.Is(err, atoll.ErrNotExist)
}

// settleAll settles media without an owner, some at a time.
func (s *settler) settleAll(ctx context.Context, media []atoll.MediumID) {
	if s.c.media == nil {
		return
	}
	var all sync.WaitGroup
	defer all.Wait()
	busy := 0
	for _, id := range media {
		if time.Since(s.tried[id]) < settleAgain || busy == settlesAtOnce {
			continue
		}
		s.tried[id] = time.Now()
		busy++
		all.Go(func() {
			ctx, done := context.WithTimeout(ctx, settleTime)
			defer done()
			if err := s.c.media.Settle(ctx, id); err != nil && ctx.Err() == nil && !errors.Is(err, atoll.ErrBusy) {
				s.c.log.WarnContext(ctx, "medium not settled; its copyset waits for it", "medium", id, "err", err)
			}
		})
	}
}
