package server

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// CheckVolume implements api.Backend. With readAll every copy of every segment
// is read on its node and mended first; what could not be is in the answer, as
// is all that does not fit. An error means that the check could not be made.
func (b *backend) CheckVolume(ctx context.Context, name string, readAll bool) (*atollv1.CheckVolumeResponse, error) {
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, &atollv1.CheckVolumeRequest{Name: name, ReadAll: readAll}, volumesCheck); done {
		return out, err
	}
	return b.check(ctx, rec, readAll)
}

// check does what CheckVolume wants of a medium that is this server's.
func (b *backend) check(ctx context.Context, rec catalog.Medium, readAll bool) (*atollv1.CheckVolumeResponse, error) {
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
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
