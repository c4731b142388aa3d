package nbd

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
)

// Extent is a part of an export in one state.
type Extent struct {
	Length int64
	Hole   bool // not allocated
	Zero   bool // reads as zeros
}

var _ Versioned = (*Client)(nil)

// Contexts returns the names of the metadata contexts that were negotiated
// besides base:allocation, sorted.
func (c *Client) Contexts(context.Context) ([]string, error) {
	names := slices.Sorted(maps.Keys(c.p.contexts))
	return slices.DeleteFunc(names, func(n string) bool { return n == ContextAllocation }), nil
}

// hasAllocation reports whether base:allocation was negotiated.
func (c *Client) hasAllocation() bool {
	_, ok := c.p.contexts[ContextAllocation]
	return ok
}

// BlockStatus returns the extents of a range, in order, merged, and covering it
// exactly. Without base:allocation on the server all is data.
func (c *Client) BlockStatus(ctx context.Context, off, n int64) ([]Extent, error) {
	if !c.hasAllocation() {
		return []Extent{{Length: n}}, nil
	}
	var all []Extent
	err := c.Status(ctx, ContextAllocation, off, n, func(n int64, flags uint32) bool {
		all = append(all, Extent{Length: n, Hole: flags&stateHole != 0, Zero: flags&stateZero != 0})
		return true
	})
	return all, err
}

// Status calls fn with the length and flags of the parts of a range in order,
// merged and covering it exactly, until fn returns false. ErrNotExist if the
// context was not asked for in DialOptions, or the export does not have it.
func (c *Client) Status(ctx context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	id, ok := c.p.contexts[name]
	if !ok {
		return fmt.Errorf("ask %v for %s: %w", c.addr, name, atoll.ErrNotExist)
	}
	var last run // not passed on yet: what comes next may continue it
	for n > 0 {
		ask := min(n, math.MaxUint32/65536*65536)
		got, err := c.askStatus(ctx, id, off, ask)
		if err != nil {
			return err
		}
		for _, r := range got {
			r.n = min(r.n, n)
			off, n = off+r.n, n-r.n
			if r.status == last.status {
				last.n += r.n
				continue
			}
			if last.n > 0 && !fn(last.n, last.status) {
				return nil
			}
			last = r
		}
	}
	if last.n > 0 {
		fn(last.n, last.status)
	}
	return nil
}

// askStatus sends one BLOCK_STATUS and returns what one context tells.
func (c *Client) askStatus(ctx context.Context, id uint32, off, n int64) ([]run, error) {
	wish := statusWish{id: id}
	err := c.call(ctx, header{typ: cmdBlockStatus, off: uint64(off), n: uint32(n)}, nil, &wish)
	if err == nil && len(wish.runs) == 0 {
		err = fmt.Errorf("status %d+%d on %v: the answer lacks a context: %w", off, n, c.addr, atoll.ErrIO)
	}
	return wish.runs, err
}

// chunkStatus takes in the parts that one context tells.
func (c *Client) chunkStatus(o *op, n int) error {
	p := make([]byte, n)
	if err := c.in.read(p); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(p) != o.wanted {
		return nil
	}
	var ok bool
	if o.runs, ok = parseStatus(p[4:]); !ok {
		return fmt.Errorf("%w: block status of %d bytes", errProtocol, n)
	}
	return nil
}

// parseStatus decodes the payload of a BLOCK_STATUS chunk behind the id.
func parseStatus(p []byte) (all []run, ok bool) {
	if len(p) == 0 || len(p)%8 != 0 {
		return nil, false
	}
	for ; len(p) > 0; p = p[8:] {
		n, status := binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])
		if n == 0 {
			return nil, false
		}
		all = append(all, run{int64(n), status})
	}
	return all, true
}
