package nbd

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/qos"
)

// Limited returns a device that keeps the use of dev to the limits of q, which
// may change at any time. Reads and writes count with their bytes, zeroing and
// discarding as writes of none; all else is free. A server counts requests as
// they come, other callers calls. Since devices are compared, make one for all
// who open dev.
func Limited(dev Device, q *qos.Throttle) Device { return &limited{Device: dev, q: q} }

// limited is a device with limits. It is as versioned as the device in it.
type limited struct {
	Device
	q *qos.Throttle
}

var _ Versioned = (*limited)(nil)

func (l *limited) Read(ctx context.Context, p []byte, off int64) error {
	if err := l.q.Wait(ctx, qos.Read, int64(len(p))); err != nil {
		return err
	}
	return l.Device.Read(ctx, p, off)
}

func (l *limited) Write(ctx context.Context, b *host.Buffer, p []byte, off int64, fua bool) error {
	if err := l.q.Wait(ctx, qos.Write, int64(len(p))); err != nil {
		return err
	}
	return l.Device.Write(ctx, b, p, off, fua)
}

func (l *limited) Discard(ctx context.Context, off, n int64, fua bool) error {
	if err := l.q.Wait(ctx, qos.Write, 0); err != nil {
		return err
	}
	return l.Device.Discard(ctx, off, n, fua)
}

func (l *limited) Zero(ctx context.Context, off, n int64, punch, fua bool) error {
	if err := l.q.Wait(ctx, qos.Write, 0); err != nil {
		return err
	}
	return l.Device.Zero(ctx, off, n, punch, fua)
}

// Contexts implements Versioned.
func (l *limited) Contexts(ctx context.Context) ([]string, error) {
	if v, ok := l.Device.(Versioned); ok {
		return v.Contexts(ctx)
	}
	return nil, nil
}

// Status implements Versioned.
func (l *limited) Status(ctx context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	v, ok := l.Device.(Versioned)
	if !ok {
		return fmt.Errorf("tell %s: %w", name, atoll.ErrNotExist)
	}
	return v.Status(ctx, name, off, n, fn)
}

// admit returns when a request may begin.
func (c *conn) admit(r *request) error {
	switch r.typ {
	case cmdRead:
		return c.limit.Wait(c.ctx, qos.Read, int64(r.n))
	case cmdWrite:
		return c.limit.Wait(c.ctx, qos.Write, int64(r.n))
	case cmdTrim, cmdZeroes:
		return c.limit.Wait(c.ctx, qos.Write, 0)
	}
	return nil
}
