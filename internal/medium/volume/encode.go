package volume

import (
	"context"
	"errors"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

const (
	// lateBytes of segments that wait for a mark to be encoded are a reason for a
	// checkpoint also while more is written.
	lateBytes = 256 << 20
	// encodeShare is the part of the time, one in so many, that encoding takes.
	encodeShare = 1
)

// recode brings segments into the form that the policy asks for: those of a coded
// volume are encoded, as many together as fill a coded segment; those that are
// coded otherwise than the policy says are moved. It returns how long to rest.
func (v *Volume) recode(ctx context.Context) time.Duration {
	begun := time.Now()
	did, err := v.recodeOnce(ctx)
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, atoll.ErrUnavailable), errors.Is(err, atoll.ErrNoSpace):
		v.log.DebugContext(ctx, "segments not encoded for want of nodes", "err", err)
		return easyRest
	case err != nil:
		v.log.WarnContext(ctx, "segments not encoded; will be tried again", "err", err)
	case did:
		return encodeShare * time.Since(begun)
	}
	return easyRest
}

func (v *Volume) recodeOnce(ctx context.Context) (did bool, err error) {
	if list := v.store.Miscoded(1); len(list) > 0 {
		return v.recompact(ctx, list)
	}
	list, late := v.store.Uncoded()
	quiet := late == v.reclaim.late
	v.reclaim.late = late
	if late > lateBytes || late > 0 && quiet && len(list) == 0 {
		return true, v.checkpoint(ctx)
	}
	if len(list) == 0 {
		return false, nil
	}
	return v.recompact(ctx, list)
}

// recompact compacts those of a list that nobody else does.
func (v *Volume) recompact(ctx context.Context, list []medium.Victim) (bool, error) {
	from, done := v.reclaim.claim(list)
	defer done()
	if len(from) == 0 {
		return false, nil
	}
	_, err := v.compact(ctx, from...)
	return true, err
}

// move empties segments: into a coded one if the volume is coded, unless there are
// too few nodes for that and only one is to be emptied.
func (v *Volume) move(ctx context.Context, cargo []medium.Cargo) error {
	if v.store.Info().Policy.IsCoded() {
		_, err := v.store.Encode(ctx, cargo)
		if !errors.Is(err, atoll.ErrUnavailable) || len(cargo) > 1 {
			return err
		}
	}
	for _, c := range cargo {
		if err := v.store.Move(ctx, c.Ordinal, c.Live); err != nil {
			return err
		}
	}
	return nil
}
