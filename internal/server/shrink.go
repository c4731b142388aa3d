package server

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
)

// visiting opens a medium that has no users for fn, and closes it again. The
// context of fn ends when the server stops, when someone wants the medium closed
// or after limit.
func (b *backend) visiting(ctx context.Context, rec catalog.Medium, limit time.Duration, fn func(context.Context, *openVolume) error) error {
	v := b.s.volumes
	o, err := v.acquire(ctx, rec)
	if err != nil {
		return err
	}
	ctx, leave := context.WithTimeout(ctx, limit)
	v.mu.Lock()
	o.leave = leave
	v.mu.Unlock()
	err = fn(ctx, o)
	leave()
	v.mu.Lock()
	o.leave = nil
	v.mu.Unlock()
	v.release(o)
	v.closeIdle(o, 0)
	return err
}

// shrink has a deleted medium keep only what its clones need: all versions that
// nobody pins go, and the present state. done says that there is nothing more to
// get before pins change; else it is to be called again.
func (b *backend) shrink(ctx context.Context, rec catalog.Medium) (done bool, err error) {
	id := rec.ID
	err = b.visiting(ctx, goneName(rec), shrinkTime, func(ctx context.Context, o *openVolume) error {
		before := len(o.vol.Versions())
		if err := letGo(ctx, o); err != nil {
			return err
		}
		if err := reaped(ctx, o); err != nil {
			return err
		}
		if o.vol.Stats().LogBytes > 0 || len(o.vol.Versions()) != before {
			if err := o.vol.Checkpoint(ctx); err != nil {
				return err
			}
		}
		var kept int64
		if kept, done = compacted(ctx, o); !o.medium.Valid() {
			return nil
		}
		b.s.log.Info("deleted medium keeps what its clones need", "medium", id, "bytes", kept, "done", done)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), atoll.RequestTimeout)
		defer cancel()
		return o.medium.Update(ctx, func(m *catalog.Medium) { setProp(m, propKept, strconv.FormatInt(kept, 10)) })
	})
	return done, err
}

// letGo deletes what no clone needs. Nothing can be pinned anew in a deleted
// medium, so what is not pinned now never will be.
func letGo(ctx context.Context, o *openVolume) error {
	if err := o.vol.Settled(ctx); err != nil {
		return err
	}
	pins, err := o.medium.Pins(ctx)
	if err != nil {
		return err
	}
	var gone []uint64
	for _, v := range o.vol.Versions() {
		if pins[v.Number] == 0 && v.Flags&medium.FlagDeleting == 0 {
			gone = append(gone, v.Number)
		}
	}
	if len(gone) > 0 {
		// All but one at once; the last tells the reaper.
		err := o.medium.Edit(ctx, func(st *medium.State) error {
			for i, n := range gone {
				v := st.Find(n)
				if v == nil {
					continue
				}
				v.Flags &^= medium.FlagProtected
				if i > 0 {
					v.Flags |= medium.FlagDeleting
				}
			}
			st.Release = 0
			return nil
		})
		if err == nil {
			err = o.vol.DeleteVersion(ctx, gone[0])
		}
		if err != nil {
			return err
		}
	}
	if o.vol.Stats().MappedBlocks == 0 {
		return nil
	}
	if err := o.vol.Discard(ctx, 0, o.vol.Size(), false); err != nil {
		return err
	}
	return o.vol.Flush(ctx)
}

// reaped waits until no deleted version is left that could go. At the end of its
// time it returns nil: what is left goes at the next visit.
func reaped(ctx context.Context, o *openVolume) error {
	pins, err := o.medium.Pins(ctx)
	if err != nil {
		return err
	}
	return poll(ctx, o, func() bool {
		st := o.state()
		for _, v := range st.Versions {
			lines := len(st.Children(v.Number))
			if st.CurParent == v.Number {
				lines++
			}
			if v.Flags&medium.FlagDeleting != 0 && pins[v.Number] == 0 && lines <= 1 {
				return false
			}
		}
		return true
	})
}

// settleTime is how long a medium must not have changed to count as compacted: a
// dropped segment is removed some time later.
const settleTime = 3 * time.Second

// compacted waits until compaction finds nothing more. It returns the bytes that
// the medium takes, and whether that was all: false says that there was progress
// until the end of the time.
func compacted(ctx context.Context, o *openVolume) (taken int64, done bool) {
	first := o.medium.Stats().Taken
	last, since := first, time.Now()
	_ = poll(ctx, o, func() bool {
		st := o.medium.Stats()
		if st.Taken != last || st.Dropped > 0 || len(o.medium.Victims(1)) > 0 {
			last, since = st.Taken, time.Now()
		}
		done = time.Since(since) >= settleTime
		return done
	})
	taken = o.medium.Stats().Taken
	return taken, done || taken >= first
}

// poll waits until ok, the end of ctx, or the loss of the medium.
func poll(ctx context.Context, o *openVolume, ok func() bool) error {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return nil
		case <-o.medium.Lost():
			return fmt.Errorf("volume %q: %w", o.name, atoll.ErrFenced)
		case <-t.C:
		}
	}
	return nil
}

// waitingMuch is from when on sealed segments that wait for a checkpoint are worth
// one.
const waitingMuch = 256 << 20

// care opens a closed volume for its compaction. more says that there is more to
// do at once.
func (b *backend) care(ctx context.Context, rec catalog.Medium) (more bool, err error) {
	err = b.visiting(ctx, rec, careTime, func(ctx context.Context, o *openVolume) error {
		if o.medium.Waiting() < waitingMuch && len(o.medium.Victims(1)) == 0 {
			return nil
		}
		before := o.medium.Stats().Taken
		if err := o.vol.Checkpoint(ctx); err != nil { // it wakes the compaction
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		taken, done := compacted(ctx, o)
		more = !done
		b.s.log.Info("closed volume compacted", "medium", rec.ID, "before", before, "bytes", taken)
		return nil
	})
	return more, err
}

// maxKept bounds the list of deleted media in an answer.
const maxKept = 32

// kept lists deleted media that clones need.
func (b *backend) kept(ctx context.Context) ([]*atollv1.KeptMedium, error) {
	media, err := b.s.cat.Deleting(ctx, 0, 4*maxKept)
	if err != nil {
		return nil, err
	}
	var out []*atollv1.KeptMedium
	for _, m := range media {
		if m.State != catalog.MediumDetached || len(out) == maxKept {
			continue
		}
		k := &atollv1.KeptMedium{Id: m.ID.String(), Name: m.Name, Bytes: keptBytes(m)}
		clones, err := b.clones(ctx, m.ID)
		if err != nil {
			return nil, err
		}
		for _, c := range clones {
			k.Clones = append(k.Clones, c.Name)
		}
		out = append(out, k)
	}
	return out, nil
}

// keptBytes is what a deleted medium took when it was looked at last.
func keptBytes(m catalog.Medium) int64 {
	n, _ := strconv.ParseInt(m.Props[propKept], 10, 64)
	return n
}

// keptFor sums up what the deleted parents of a clone take.
func (b *backend) keptFor(ctx context.Context, rec catalog.Medium) (sum int64) {
	for _, a := range rec.Ancestors {
		if m, err := b.s.cat.Medium(ctx, a.Medium); err == nil && m.State == catalog.MediumDetached {
			sum += keptBytes(m)
		}
	}
	return sum
}
