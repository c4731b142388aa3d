package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// CheckVolume implements api.Backend. With readAll every copy of every segment
// is read on its node and mended first; what could not be is in the answer, as
// is all that does not fit. An error means that the check could not be made.
func (b *backend) CheckVolume(ctx context.Context, r *atollv1.CheckVolumeRequest) (out *atollv1.CheckVolumeResponse, err error) {
	if r.Id != "" {
		return b.checkGone(ctx, r)
	}
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, volumesCheck); done {
		return out, err
	}
	return b.check(ctx, rec, r.ReadAll)
}

// checkGone checks a medium without a name. A check of one that is restored or
// purged meanwhile ends with ErrNotExist.
func (b *backend) checkGone(ctx context.Context, r *atollv1.CheckVolumeRequest) (out *atollv1.CheckVolumeResponse, err error) {
	id, err := atoll.ParseMediumID(r.Id)
	if err != nil {
		return nil, err
	}
	rec, err := b.gone(ctx, id)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, volumesCheck); done {
		return out, err
	}
	state := rec.State
	verr := b.visiting(ctx, goneName(rec), checkTime, func(ctx context.Context, o *openVolume) error {
		out, err = b.checkOpen(ctx, o, r.ReadAll)
		return err
	})
	if now, err := b.gone(ctx, id); err != nil || now.State != state {
		return nil, errors.Join(err, fmt.Errorf("medium %v was restored or purged while it was checked: %w", id, atoll.ErrNotExist))
	}
	return out, verr
}

// checkTime bounds the check of a medium that nobody uses.
const checkTime = 24 * time.Hour

// gone returns a medium that was removed: in the trash, or needed by clones.
func (b *backend) gone(ctx context.Context, id atoll.MediumID) (catalog.Medium, error) {
	m, err := b.s.cat.Medium(ctx, id)
	if err == nil && (m.Kind != catalog.KindVolume || m.State != catalog.MediumTrashed && m.State != catalog.MediumDetached) {
		err = fmt.Errorf("medium %v is %s: %w", id, m.State, atoll.ErrNotExist)
	}
	return m, err
}

// goneName gives a record without a name of its own one that tells what it is: there
// may be another of the name that it had.
func goneName(m catalog.Medium) catalog.Medium {
	what := "deleted"
	if m.State == catalog.MediumTrashed {
		what = "in the trash"
	}
	m.Name = fmt.Sprintf("%s (%s, %v)", m.Name, what, m.ID)
	return m
}

// check does what CheckVolume wants of a medium that is this server's.
func (b *backend) check(ctx context.Context, rec catalog.Medium, readAll bool) (*atollv1.CheckVolumeResponse, error) {
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	return b.checkOpen(ctx, o, readAll)
}

func (b *backend) checkOpen(ctx context.Context, o *openVolume, readAll bool) (*atollv1.CheckVolumeResponse, error) {
	out := &atollv1.CheckVolumeResponse{}
	before := o.vol.Stats().BlocksRead
	var found []error
	if readAll {
		sum, bad := o.medium.Mend(ctx)
		out.CheckedBytes, out.DamagedBytes, out.RepairedBytes = sum.Checked*atoll.BlockSize, sum.Damaged*atoll.BlockSize, sum.Repaired*atoll.BlockSize
		found = append(bad, o.vol.Verify(ctx))
	} else {
		found = append(found, o.vol.Check(ctx))
	}
	found = append(found, o.medium.Check(ctx))
	for _, err := range found {
		for _, err := range split(err) {
			if err := finding(out, err); err != nil {
				return nil, err
			}
		}
	}
	st := o.vol.Stats()
	out.Blocks, out.BytesRead = st.MappedBlocks, (st.BlocksRead-before)*atoll.BlockSize
	return out, nil
}

// maxFindings bounds the lists of an answer.
const maxFindings = 100

// finding sorts an error of a check into the answer, or returns it if it means
// that the check itself failed.
func finding(out *atollv1.CheckVolumeResponse, err error) error {
	add := func(list []string) []string {
		if len(list) < maxFindings && !slices.Contains(list, err.Error()) {
			list = append(list, err.Error())
		}
		return list
	}
	switch {
	case errors.Is(err, atoll.ErrFenced), errors.Is(err, atoll.ErrClosed):
		return err
	case errors.Is(err, atoll.ErrCorrupt):
		out.Problems = add(out.Problems)
	default: // a node that is down, paused or elsewhere
		out.Unchecked = add(out.Unchecked)
	}
	return nil
}

// split takes apart what errors.Join put together, below any prefix.
func split(err error) []error {
	if err == nil {
		return nil
	}
	for e := err; e != nil && strings.Contains(e.Error(), "\n"); e = errors.Unwrap(e) {
		if list, ok := e.(interface{ Unwrap() []error }); ok {
			var out []error
			for _, e := range list.Unwrap() {
				out = append(out, split(e)...)
			}
			return out
		}
	}
	return []error{err}
}
