package server

import (
	"context"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
)

// device is an open volume as gateways see it: its operations are timed, and it
// tells what changed since which version.
type device struct {
	*volume.Volume
	ops *opTimes
	// number is that of the version that the device is; 0: the working state.
	number uint64
	// state tells the versions there are.
	state func() medium.State
}

var (
	_ nbd.Device    = (*device)(nil)
	_ nbd.Versioned = (*device)(nil)
)

// Read implements nbd.Device.
func (d *device) Read(ctx context.Context, p []byte, off int64) error {
	begun := time.Now()
	err := d.Volume.Read(ctx, p, off)
	d.ops.read.Observe(time.Since(begun).Seconds())
	return err
}

// Write implements nbd.Device.
func (d *device) Write(ctx context.Context, b *host.Buffer, p []byte, off int64, fua bool) error {
	begun := time.Now()
	err := d.Volume.Write(ctx, b, p, off, fua)
	d.ops.write.Observe(time.Since(begun).Seconds())
	return err
}

// Flush implements nbd.Device.
func (d *device) Flush(ctx context.Context) error {
	begun := time.Now()
	err := d.Volume.Flush(ctx)
	d.ops.flush.Observe(time.Since(begun).Seconds())
	return err
}

// Discard implements nbd.Device.
func (d *device) Discard(ctx context.Context, off, n int64, fua bool) error {
	begun := time.Now()
	err := d.Volume.Discard(ctx, off, n, fua)
	d.ops.discard.Observe(time.Since(begun).Seconds())
	return err
}

// Contexts implements nbd.Versioned.
func (d *device) Contexts(context.Context) ([]string, error) {
	return contextNames(visible(d.state()), d.number), nil
}

// contextNames lists what can be told of the working state, or of one version:
// what changed since each older one.
func contextNames(versions []medium.Version, number uint64) []string {
	out := []string{nbd.ContextDepth}
	for _, v := range versions {
		if number == 0 || v.Number < number {
			out = append(out, nbd.SinceContext(versionLabel(v)))
		}
	}
	return out
}

// Status implements nbd.Versioned.
func (d *device) Status(ctx context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	if name == nbd.ContextDepth {
		return d.Depth(ctx, off, n, func(n int64, depth int) bool { return fn(n, uint32(depth)) })
	}
	label, ok := nbd.SinceVersion(name)
	if !ok {
		return fmt.Errorf("tell %s: %w", name, atoll.ErrNotExist)
	}
	spec, err := medium.ParseSpec(label)
	if err != nil {
		return err
	}
	st := d.state()
	from, err := st.Resolve(spec)
	if err != nil {
		return err
	}
	return nbd.DirtyRuns(off, n, func(each func(off, n int64) bool) error {
		return d.Diff(ctx, from.Number, d.number, off, n, func(o, m int64, _ bool) bool { return each(o, m) })
	}, fn)
}
