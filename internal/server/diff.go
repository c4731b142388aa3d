package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

// Diff implements api.Versions.
func (b *backend) Diff(ctx context.Context, r *atollv1.DiffRequest, send func(*atollv1.DiffResponse) error) error {
	name, to, err := splitSpec(r.Name)
	if err != nil {
		return err
	}
	var from medium.VersionSpec
	if r.From != "" {
		if from, err = medium.ParseSpec(r.From); err == nil && from.IsZero() {
			err = fmt.Errorf("a difference from the working state: %w", atoll.ErrInvalid)
		}
		if err != nil {
			return err
		}
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return err
	}
	if c, err := b.owner(ctx, rec.ID); err != nil {
		return err
	} else if c != nil {
		return relayDiff(ctx, c.Client, r, send)
	}
	return b.use(ctx, rec, func(o *openVolume) error {
		defer b.s.metrics.timed("diff")()
		return diff(ctx, o, from, to, r, send)
	})
}

// relayDiff passes on the answers of the owner.
func relayDiff(ctx context.Context, c *api.Client, r *atollv1.DiffRequest, send func(*atollv1.DiffResponse) error) error {
	in, err := c.Versions.Diff(api.Forwarding(ctx), message(r))
	if err != nil {
		return err
	}
	for in.Receive() {
		if err := send(in.Msg()); err != nil {
			return errors.Join(err, in.Close())
		}
	}
	err = in.Err()
	return errors.Join(err, in.Close())
}

// Answers of a difference are sent when they have so many extents, or are so old.
const (
	diffBatch = 4096
	diffAge   = time.Second
)

// diff sends what differs between two states of an open volume.
func diff(ctx context.Context, o *openVolume, fromSpec, toSpec medium.VersionSpec, r *atollv1.DiffRequest, send func(*atollv1.DiffResponse) error) error {
	var from, to medium.Version
	var err error
	size := o.vol.Size()
	if !fromSpec.IsZero() {
		if from, err = resolve(o, fromSpec); err != nil {
			return err
		}
	}
	if !toSpec.IsZero() {
		if to, err = resolve(o, toSpec); err != nil {
			return err
		}
		size = to.Size
	}
	if r.Offset < 0 || r.Length < 0 || r.Offset%atoll.BlockSize != 0 {
		return fmt.Errorf("difference of %d bytes at %d: want whole blocks of %d: %w", r.Length, r.Offset, atoll.BlockSize, atoll.ErrInvalid)
	}
	n := max(0, size-r.Offset)
	if r.Length > 0 {
		n = min(n, r.Length)
	}
	if err := send(&atollv1.DiffResponse{SizeBytes: size}); err != nil || n == 0 {
		return err
	}
	var batch []*atollv1.Extent
	var bad error
	sent := time.Now()
	flush := func() bool {
		if len(batch) > 0 {
			bad = send(&atollv1.DiffResponse{Extents: batch})
			batch, sent = nil, time.Now()
		}
		return bad == nil
	}
	err = o.vol.Diff(ctx, from.Number, to.Number, r.Offset, n, func(off, n int64, zero bool) bool {
		batch = append(batch, &atollv1.Extent{Offset: off, Length: n, Zero: zero})
		return len(batch) < diffBatch && time.Since(sent) < diffAge || flush()
	})
	if err == nil {
		flush()
	}
	return errors.Join(err, bad)
}
