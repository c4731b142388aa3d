package server

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Media that nobody has open are looked after by the leader's tender: deleted
// ones that clones still need give back all that no clone needs, and in a crowded
// cluster the others are opened now and then for what compaction can give back.
// One at a time, each visit bounded.

const (
	tendEvery = 2 * time.Second
	// shrinkTime bounds a visit of a deleted medium, and pinsEvery is how often
	// the pins of one are looked at that has given back what it could.
	shrinkTime = 30 * time.Second
	pinsEvery  = time.Minute
	// tight is the part of the raw space in use from which closed volumes are
	// compacted, careTime bounds a visit (another server that wants the volume
	// waits a little longer than that), careEvery is the time between visits of
	// one volume and careEvery/crowdedCare that in a crowded cluster, where more
	// than crowded is in use.
	tight       = 0.7
	careTime    = 4 * time.Second
	careEvery   = 6 * time.Hour
	crowdedCare = 36
	crowded     = 0.85
	// carePass is how many volumes one pass looks at.
	carePass = 16
)

// visit is what the tender remembers of a medium.
type visit struct {
	next   time.Time // when to look again
	pinned []uint64  // versions that were needed then
	done   bool      // nothing more to get while these are
}

// tender is the state of one leader's care. It is used by one goroutine.
type tender struct {
	b      *backend
	pins   time.Duration // pinsEvery, less in a demo
	shrunk map[atoll.MediumID]*visit
	cared  map[atoll.MediumID]time.Time // last visits of closed volumes
	after  string                       // where the round of those is
}

func newTender(b *backend) *tender {
	t := &tender{b: b, pins: pinsEvery, shrunk: map[atoll.MediumID]*visit{}, cared: map[atoll.MediumID]time.Time{}}
	if b.s.opts.Demo {
		t.pins = tendEvery
	}
	return t
}

// tend looks after media while this process leads.
func (s *Server) tend(ctx context.Context, b *backend) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.volumes.opening, cancel)()
	t := newTender(b)
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !s.leads() {
			t = newTender(b)
			continue
		}
		if err := t.shrinkAll(ctx, time.Now()); err != nil && ctx.Err() == nil {
			s.log.Warn("deleted media not looked after", "err", err)
		}
		if used := s.used(); used >= tight {
			if err := t.careFor(ctx, time.Now(), used); err != nil && ctx.Err() == nil {
				s.log.Warn("closed volumes not looked after", "err", err)
			}
		}
	}
}

// shrinkAll visits the deleted media whose pins have changed.
func (t *tender) shrinkAll(ctx context.Context, now time.Time) error {
	there := map[atoll.MediumID]bool{}
	for after := atoll.MediumID(0); ; {
		media, err := t.b.s.cat.Deleting(ctx, after, 100)
		if err != nil {
			return err
		}
		for _, m := range media {
			after = m.ID
			if m.State != catalog.MediumDetached || m.Kind != catalog.KindVolume {
				continue
			}
			there[m.ID] = true
			if err := t.shrinkOne(ctx, m, now); err != nil {
				if ctx.Err() != nil {
					return err
				}
				t.b.s.log.Warn("room of a deleted medium not given back; will be tried again", "medium", m.ID, "name", m.Name, "err", err)
			}
		}
		if len(media) < 100 {
			break
		}
	}
	for id := range t.shrunk {
		if !there[id] {
			delete(t.shrunk, id)
		}
	}
	return nil
}

// shrinkOne visits a deleted medium if there may be something to get.
func (t *tender) shrinkOne(ctx context.Context, m catalog.Medium, now time.Time) error {
	v := t.shrunk[m.ID]
	if v == nil {
		v = &visit{}
		t.shrunk[m.ID] = v
	}
	if now.Before(v.next) {
		return nil
	}
	v.next = now.Add(t.pins)
	pinned, err := t.b.pinned(ctx, m.ID)
	if err != nil || len(pinned) == 0 || v.done && slices.Equal(pinned, v.pinned) {
		return err // without pins the controller takes all of it
	}
	if n, err := t.b.ownerOf(ctx, m.ID); err != nil || n != nil {
		v.next = now.Add(idleClose / 3) // it is about to be closed there
		return err
	}
	v.pinned = pinned
	if v.done, err = t.b.shrink(ctx, m); err == nil && !v.done {
		v.next = now
	}
	return err
}

// pinned lists the versions of a medium that clones or readers need.
func (b *backend) pinned(ctx context.Context, id atoll.MediumID) ([]uint64, error) {
	pins, err := b.s.cat.Pins(ctx, id)
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, p := range pins {
		out = append(out, p.Version)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// careFor visits the next closed volume that was not visited for long, if one is
// among the next few.
func (t *tender) careFor(ctx context.Context, now time.Time, used float64) error {
	every := careEvery
	if used >= crowded {
		every /= crowdedCare
	}
	recs, err := t.b.s.cat.Media(ctx, t.after, carePass)
	if err != nil {
		return err
	}
	for _, m := range recs {
		t.after = m.Name
		if m.Kind != catalog.KindVolume || m.State != catalog.MediumLive || now.Sub(t.cared[m.ID]) < every || t.b.s.volumes.has(m.ID) {
			continue
		}
		if n, err := t.b.ownerOf(ctx, m.ID); err != nil || n != nil {
			continue // whoever has it open cares for it
		}
		more, err := t.b.care(ctx, m)
		if errors.Is(err, atoll.ErrBusy) || errors.Is(err, atoll.ErrNotExist) {
			continue // somebody opened or removed it just now
		}
		if !more {
			t.cared[m.ID] = now
		}
		return err
	}
	if len(recs) < carePass {
		t.after = ""
		for id, at := range t.cared { // of media that are gone, too
			if now.Sub(at) > 2*careEvery {
				delete(t.cared, id)
			}
		}
	}
	return nil
}
