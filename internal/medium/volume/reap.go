package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

const (
	// reapBatch and reapTime bound what one manifest removes.
	reapBatch = 128
	reapTime  = 2 * time.Second
	// usageTries bounds how often Usage begins anew.
	usageTries = 10
	// reapRest is how often versions are looked at that could not go.
	reapRest = 5 * time.Second
)

// DeleteVersion takes a version from its users at once and durably. The space
// comes back in the background, when no clone and no reader needs the version
// any more; a version from which two lines go on stays, hidden, until only one
// does. ErrBusy while it is protected; ErrNotExist.
func (v *Volume) DeleteVersion(ctx context.Context, number uint64) error {
	if err := v.check("delete a version of", 0, 0, true); err != nil {
		return err
	}
	if err := v.Settled(ctx); err != nil {
		return err
	}
	if err := v.deleteVersion(ctx, number, false); err != nil {
		return fmt.Errorf("delete version %d of volume %v: %w", number, v.id, err)
	}
	v.kickReaper()
	return v.serving("delete a version of")
}

func (v *Volume) deleteVersion(ctx context.Context, number uint64, force bool) error {
	return v.store.Edit(ctx, func(s *medium.State) error {
		p := s.Find(number)
		switch {
		case p == nil || p.Flags&medium.FlagDeleting != 0:
			return atoll.ErrNotExist
		case p.Flags&medium.FlagProtected != 0 && !force:
			return fmt.Errorf("it is protected: %w", atoll.ErrBusy)
		}
		p.Flags = p.Flags&^medium.FlagProtected | medium.FlagDeleting
		if s.Release == number {
			s.Release = 0
		}
		return nil
	})
}

func (v *Volume) kickReaper() {
	select {
	case v.reclaim.reap <- struct{}{}:
	default:
	}
}

// reaper removes versions that were deleted.
func (v *Volume) reaper() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-v.reclaim.reap:
		case <-timer.C:
		case <-v.ctx.Done():
			return
		}
		for {
			removed, left, err := v.reap(v.ctx)
			if err != nil && err != errYield && v.ctx.Err() == nil {
				v.log.WarnContext(v.ctx, "deleted versions not removed; will be tried again", "err", err)
			}
			if removed > 0 && err == nil {
				v.kickReclaim()
				continue
			}
			if left {
				timer.Reset(reapRest)
			}
			break
		}
		if v.ctx.Err() == nil {
			v.detach(v.ctx)
		}
	}
}

// reap removes what can go now, some of it, and returns how many it removed and
// whether deleted versions are left.
func (v *Volume) reap(ctx context.Context) (removed int, left bool, err error) {
	st := v.store.State()
	if !slices.ContainsFunc(st.Versions, deleting) {
		return 0, false, nil
	}
	if v.hist.doubt.Load() { // the log may have a restore to one of them
		if err := v.checkpoint(ctx); err != nil {
			return 0, true, err
		}
	}
	pins, err := v.store.Pins(ctx)
	if err != nil {
		return 0, true, err
	}
	// What is marked only after the pins were read may have been pinned between.
	may := make(map[uint64]bool)
	for i := range st.Versions {
		p := &st.Versions[i]
		may[p.Number] = deleting(*p) && pins[p.Number] == 0
	}
	n, err := v.reapOld(ctx, may)
	if err != nil || n > 0 {
		return n, true, err
	}
	n, err = v.reapParent(ctx, may)
	return n, true, err
}

func deleting(v medium.Version) bool { return v.Flags&medium.FlagDeleting != 0 }

// removable reports whether version p of st can go: it was marked and not pinned
// then, as may tells, nobody reads it, and at most one line goes on from it. When
// two do, they share blocks that are younger than their next common version would
// be, and nothing could tell which of those die with the one or the other.
func (v *Volume) removable(st *medium.State, p *medium.Version, may map[uint64]bool) bool {
	if !deleting(*p) || !may[p.Number] {
		return false
	}
	v.hist.mu.Lock()
	held := v.hist.holds[p.Number] > 0
	v.hist.mu.Unlock()
	lines := len(st.Children(p.Number))
	if st.CurParent == p.Number {
		lines++
	}
	return !held && lines <= 1
}

// reapOld removes versions that the present state did not grow from directly,
// so that it does not matter what it does meanwhile.
func (v *Volume) reapOld(ctx context.Context, may map[uint64]bool) (int, error) {
	v.hist.mu.Lock()
	count, settled := v.hist.count, len(v.hist.queue) == 0
	v.hist.mu.Unlock()
	st := v.store.State()
	if !settled {
		return 0, nil
	}
	frees, gone := &ledger{own: v.base}, []uint64(nil)
	until := time.Now().Add(reapTime)
	for i := 0; i < len(st.Versions) && len(gone) < reapBatch && time.Now().Before(until); i++ {
		p := st.Versions[i]
		if p.Number == st.CurParent || !v.removable(&st, &p, may) {
			continue
		}
		sum, err := v.exclusive(ctx, &st, &p, nil, nil)
		if err != nil {
			return 0, err
		}
		frees.fold(sum)
		gone = append(gone, p.Number)
		dropVersion(&st, p.Number)
		i--
	}
	if len(gone) == 0 {
		return 0, nil
	}
	if err := v.hist.lock(ctx); err != nil {
		return 0, err
	}
	defer v.hist.unlock()
	v.hist.mu.Lock()
	same := v.hist.count == count
	v.hist.mu.Unlock()
	if !same || v.hist.doubt.Load() { // another line may go on from one of them
		return 0, errYield
	}
	if err := v.commit(ctx, medium.Commit{Remove: gone}, nil, frees); err != nil {
		return 0, err
	}
	v.log.InfoContext(ctx, "versions removed", "count", len(gone), "first", gone[0])
	return len(gone), nil
}

// dropVersion takes a version out of a copy of the state.
func dropVersion(st *medium.State, number uint64) {
	parent := st.Find(number).Parent
	st.Versions = slices.DeleteFunc(st.Versions, func(v medium.Version) bool { return v.Number == number })
	for i := range st.Versions {
		if st.Versions[i].Parent == number {
			st.Versions[i].Parent = parent
		}
	}
	if st.CurParent == number {
		st.CurParent = parent
	}
}

// exclusive counts what only version p of st has. cur is the present state, for
// when that grew from p.
func (v *Volume) exclusive(ctx context.Context, st *medium.State, p *medium.Version, cur source, stop func() error) (*ledger, error) {
	mine, err := v.source(ctx, p.Number)
	if err != nil {
		return nil, err
	}
	var others []source
	for _, n := range st.Children(p.Number) {
		s, err := v.source(ctx, n)
		if err != nil {
			return nil, err
		}
		others = append(others, s)
	}
	if st.CurParent == p.Number {
		others = append(others, cur)
	}
	return only(ctx, mine, others, v.horizon(st, p.Parent), v.base, stop)
}

// reapParent removes the version that the present state grew from. What that
// lets go of meanwhile is live or not depending on whether the removal succeeds,
// and is counted apart.
func (v *Volume) reapParent(ctx context.Context, may map[uint64]bool) (int, error) {
	if err := v.lockCheckpoint(ctx); err != nil {
		return 0, err
	}
	defer func() { <-v.ckpt }()
	st := v.store.State()
	p := st.Find(st.CurParent)
	if p == nil || !v.removable(&st, p, may) || v.yield() != nil {
		return 0, nil
	}
	begun, logged := time.Now(), v.logBytes.Load()
	above := v.horizon(&st, p.Parent)
	ver, mark, err := v.freeze(ctx, &above)
	if err != nil {
		return 0, err
	}
	m := v.pages
	frees, err := v.parentFrees(ctx, &st, p, ver)
	if err != nil {
		m.mu.Lock()
		m.t.led.pardon()
		m.t.abandon(ver)
		m.mu.Unlock()
		return 0, err
	}
	err = v.commit(ctx, medium.Commit{Mark: mark, Root: v.rootOf(ver, v.hist.lastEvent()), Remove: []uint64{p.Number}}, ver.led, frees)
	m.mu.Lock()
	if err == nil {
		m.t.led.execute()
	} else {
		m.t.led.pardon()
	}
	m.t.finish(ver, err == nil)
	m.mu.Unlock()
	if err != nil {
		return 0, err
	}
	v.hist.mu.Lock()
	v.hist.parent = p.Parent
	v.hist.mu.Unlock()
	v.hist.doubt.Store(false)
	v.checkpointed(begun, logged)
	v.log.InfoContext(ctx, "versions removed", "count", 1, "first", p.Number)
	return 1, nil
}

// parentFrees writes the frozen present state and counts what only its parent
// version has.
func (v *Volume) parentFrees(ctx context.Context, st *medium.State, p *medium.Version, ver *version) (*ledger, error) {
	if err := v.writeVersion(ctx, ver, v.yield); err != nil {
		return nil, err
	}
	return v.exclusive(ctx, st, p, rootedOf(v.pages, ver), v.yield)
}

// Usage tells how many bytes of a version others hold too, and how many would
// come back if it were deleted (its part of the map included). Number 0 is the
// present state. It reads map pages, of what changed. ErrNotExist.
func (v *Volume) Usage(ctx context.Context, number uint64) (shared, unique int64, err error) {
	if err := v.check("measure", 0, 0, false); err != nil {
		return 0, 0, err
	}
	for range usageTries { // versions beside it may go meanwhile
		shared, unique, err = v.usage(ctx, number)
		if err == nil || err != errEra && (!moved(err) || v.gone(number) && number != 0) {
			break
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("measure version %d of volume %v: %w", number, v.id, notEra(err))
	}
	return shared, unique, v.serving("measure")
}

// notEra makes of errEra what callers know.
func notEra(err error) error {
	if errors.Is(err, errEra) {
		return fmt.Errorf("restored meanwhile: %w", atoll.ErrConflict)
	}
	return err
}

func (v *Volume) usage(ctx context.Context, number uint64) (shared, unique int64, err error) {
	if err := v.Settled(ctx); err != nil {
		return 0, 0, err
	}
	st := v.store.State()
	cur := liveOf(v.pages)
	var sum *ledger
	var used int64
	if number == 0 {
		var others []source
		if st.CurParent != 0 {
			s, err := v.source(ctx, st.CurParent)
			if err != nil {
				return 0, 0, err
			}
			others = append(others, s)
		}
		sum, err = only(ctx, cur, others, v.horizon(&st, st.CurParent), v.base, nil)
		used = v.Stats().MappedBlocks * atoll.BlockSize
	} else {
		v.hist.hold(number, +1)
		defer v.hist.hold(number, -1)
		st = v.store.State()
		p := st.Find(number)
		if p == nil || deleting(*p) {
			return 0, 0, atoll.ErrNotExist
		}
		sum, err = v.exclusive(ctx, &st, p, cur, nil)
		used = p.Used
	}
	if err != nil {
		return 0, 0, err
	}
	sum.each(func(_ atoll.Ordinal, d int) { unique += int64(d) * atoll.BlockSize })
	return max(used-sum.mapped*atoll.BlockSize, 0), unique, nil
}
