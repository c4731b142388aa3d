// Package nbdtest helps to test NBD servers: a device in memory, and a suite
// that drives a server with the clients that people use (libnbd, qemu, fio,
// nbdkit).
package nbdtest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

const (
	pageBytes = 64 << 10
	leafPages = 4096
	leafBytes = pageBytes * leafPages
)

// page is the unit of allocation.
type page struct {
	mu   sync.RWMutex
	data []byte // nil is a hole
}

type leaf [leafPages]page

// Memory is a sparse device in memory. It counts calls and can be made to fail.
type Memory struct {
	size   atomic.Int64
	leaves []atomic.Pointer[leaf]

	// Refuse makes the device read-only.
	Refuse bool
	// Before runs before every call with its name; an error is the call's
	// result. Set it before use.
	Before func(ctx context.Context, op string, off, n int64) error

	Reads, Writes, Flushes, Discards, Zeros, Prefetches, FUAs atomic.Int64
}

// NewMemory returns an empty device.
func NewMemory(size int64) *Memory {
	m := &Memory{leaves: make([]atomic.Pointer[leaf], (size+leafBytes-1)/leafBytes)}
	m.size.Store(size)
	return m
}

// Size returns the size in bytes.
func (m *Memory) Size() int64 { return m.size.Load() }

// ReadOnly reports whether writes are refused.
func (m *Memory) ReadOnly() bool { return m.Refuse }

// each calls fn for the part of every page in a range. The page is nil where
// none was ever made, unless made is set.
func (m *Memory) each(off, n int64, made bool, fn func(p *page, from, to int64) error) error {
	if off < 0 || n < 0 || off+n > m.Size() {
		return fmt.Errorf("access %d+%d of %d bytes: %w", off, n, m.Size(), atoll.ErrInvalid)
	}
	for end := off + n; off < end; {
		slot := &m.leaves[off/leafBytes]
		l := slot.Load()
		if l == nil && made {
			slot.CompareAndSwap(nil, new(leaf))
			l = slot.Load()
		}
		from := off % pageBytes
		to := min(pageBytes, from+end-off)
		var p *page
		if l != nil {
			p = &l[off%leafBytes/pageBytes]
		}
		if err := fn(p, from, to); err != nil {
			return err
		}
		off += to - from
	}
	return nil
}

// before runs the hook.
func (m *Memory) before(ctx context.Context, op string, off, n int64) error {
	if m.Before == nil {
		return nil
	}
	return m.Before(ctx, op, off, n)
}

// Read fills p.
func (m *Memory) Read(ctx context.Context, p []byte, off int64) error {
	if err := m.before(ctx, "read", off, int64(len(p))); err != nil {
		return err
	}
	m.Reads.Add(1)
	return m.each(off, int64(len(p)), false, func(pg *page, from, to int64) error {
		dst := p[:to-from]
		p = p[to-from:]
		if pg == nil {
			clear(dst)
			return nil
		}
		pg.mu.RLock()
		defer pg.mu.RUnlock()
		if pg.data == nil {
			clear(dst)
		} else {
			copy(dst, pg.data[from:to])
		}
		return nil
	})
}

// Write stores p.
func (m *Memory) Write(ctx context.Context, _ *host.Buffer, p []byte, off int64, fua bool) error {
	if err := m.before(ctx, "write", off, int64(len(p))); err != nil {
		return err
	}
	m.Writes.Add(1)
	m.fua(fua)
	return m.each(off, int64(len(p)), true, func(pg *page, from, to int64) error {
		pg.mu.Lock()
		defer pg.mu.Unlock()
		if pg.data == nil {
			pg.data = make([]byte, pageBytes)
		}
		copy(pg.data[from:to], p)
		p = p[to-from:]
		return nil
	})
}

// fua counts.
func (m *Memory) fua(fua bool) {
	if fua {
		m.FUAs.Add(1)
	}
}

// Flush only counts.
func (m *Memory) Flush(ctx context.Context) error {
	if err := m.before(ctx, "flush", 0, 0); err != nil {
		return err
	}
	m.Flushes.Add(1)
	return nil
}

// Discard makes whole pages holes and clears the rest.
func (m *Memory) Discard(ctx context.Context, off, n int64, fua bool) error {
	if err := m.before(ctx, "discard", off, n); err != nil {
		return err
	}
	m.Discards.Add(1)
	m.fua(fua)
	return m.zero(off, n, true)
}

// Zero clears a range; with punch whole pages become holes.
func (m *Memory) Zero(ctx context.Context, off, n int64, punch, fua bool) error {
	if err := m.before(ctx, "zero", off, n); err != nil {
		return err
	}
	m.Zeros.Add(1)
	m.fua(fua)
	return m.zero(off, n, punch)
}

func (m *Memory) zero(off, n int64, punch bool) error {
	return m.each(off, n, !punch, func(pg *page, from, to int64) error {
		if pg == nil {
			return nil
		}
		pg.mu.Lock()
		defer pg.mu.Unlock()
		switch {
		case punch && to-from == pageBytes:
			pg.data = nil
		case pg.data != nil:
			clear(pg.data[from:to])
		case !punch:
			pg.data = make([]byte, pageBytes)
		}
		return nil
	})
}

// Prefetch only counts.
func (m *Memory) Prefetch(ctx context.Context, off, n int64) error {
	m.Prefetches.Add(1)
	return m.before(ctx, "prefetch", off, n)
}

// errStop ends a walk.
var errStop = fmt.Errorf("stop")

// Extents tells holes from pages, page by page (neighbours are not merged).
func (m *Memory) Extents(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error {
	if err := m.before(ctx, "extents", off, n); err != nil {
		return err
	}
	err := m.each(off, n, false, func(pg *page, from, to int64) error {
		hole := true
		if pg != nil {
			pg.mu.RLock()
			hole = pg.data == nil
			pg.mu.RUnlock()
		}
		if !fn(to-from, hole) {
			return errStop
		}
		return nil
	})
	if err == errStop {
		return nil
	}
	return err
}
