package nbd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// Names of metadata contexts.
const (
	// ContextAllocation tells holes from data. Every export has it.
	ContextAllocation = "base:allocation"
	// ContextDepth tells whose data a part is: 0 nobody's (a hole), 1 the
	// export's own, 2 and more an ancestor's of a clone.
	ContextDepth = "qemu:allocation-depth"

	contextDirty = "qemu:dirty-bitmap:"
	contextSince = contextDirty + "since-"
)

// StatusDirty is the flag of a part that changed, in a dirty bitmap.
const StatusDirty = 1

// SinceContext returns the name of the context that tells what changed since a
// version.
func SinceContext(version string) string { return contextSince + version }

// SinceVersion is the inverse of SinceContext; ok is false for other contexts.
func SinceVersion(name string) (version string, ok bool) {
	return strings.CutPrefix(name, contextSince)
}

// Versioned is a Device that can tell more of its parts than whether they are
// holes. Its methods may be called concurrently.
type Versioned interface {
	// Contexts lists the names of the contexts besides base:allocation.
	Contexts(ctx context.Context) ([]string, error)
	// Status calls fn with the length and flags of the parts of a range in
	// order, until the range ends or fn returns false. Neighbours may be equal.
	// A context that is not there (any more) is ErrNotExist.
	Status(ctx context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error
}

// ContextLister is an Exports that knows the contexts of an export without
// opening it. Other Exports have it opened when a client asks.
type ContextLister interface {
	// Contexts lists the names of the contexts besides base:allocation.
	Contexts(ctx context.Context, name string) ([]string, error)
}

// DirtyRuns is the Status of a dirty bitmap for what is known as a list of
// changes: changed calls its argument with the changed parts of the range in
// ascending order, until that returns false. Parts may stick out of the range.
func DirtyRuns(off, n int64, changed func(fn func(off, n int64) bool) error, fn func(n int64, flags uint32) bool) error {
	at, end, more := off, off+n, true
	err := changed(func(o, m int64) bool {
		from, to := max(o, at), min(o+m, end)
		if from >= to {
			return o < end
		}
		if from > at {
			more = fn(from-at, 0)
		}
		if more {
			more = fn(to-from, StatusDirty)
		}
		at = to
		return more && at < end
	})
	if err == nil && more && at < end {
		fn(end-at, 0)
	}
	return err
}

// status calls r.addState for the parts of a request's range in a context.
func (c *conn) status(name string, r *request) error {
	if name == ContextAllocation {
		return c.dev.Extents(c.ctx, int64(r.off), int64(r.n), r.addHole)
	}
	v, ok := c.dev.(Versioned)
	if !ok {
		return fmt.Errorf("tell %s of export %q: %w", name, c.export, atoll.ErrNotExist)
	}
	return v.Status(c.ctx, name, int64(r.off), int64(r.n), r.addState)
}

// contextsOf lists the contexts of an export, as far as the queries may match
// them. A list is not worth failing for: what an export that cannot be opened
// now could tell is left out.
func (c *conn) contextsOf(name string, queries []string, listing bool) ([]string, error) {
	all := []string{ContextAllocation}
	wanted := func(q string) bool { return strings.HasPrefix(q, "qemu:") }
	if !slices.ContainsFunc(queries, wanted) && !(listing && len(queries) == 0) {
		return all, nil
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.s.o.OpenTimeout)
	defer cancel()
	defer c.renewDeadline()
	more, err := c.s.contexts(ctx, name)
	if err != nil && listing && !errors.Is(err, atoll.ErrNotExist) {
		c.s.o.Log.Debug("contexts not listed", "peer", c.peer, "export", name, "err", err)
		return all, nil
	}
	return append(all, more...), err
}

// contexts asks for the contexts of an export besides base:allocation, or else
// asks the device itself.
func (s *Server) contexts(ctx context.Context, name string) ([]string, error) {
	if l, ok := s.o.Exports.(ContextLister); ok {
		return l.Contexts(ctx, name)
	}
	dev, _, err := s.o.Exports.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer s.o.Exports.Release(dev)
	if v, ok := dev.(Versioned); ok {
		return v.Contexts(ctx)
	}
	return nil, nil
}

// matchContexts returns the contexts that the queries name, each once and in
// the order of all. When listing, no query means all, and a namespace (with
// "qemu:dirty-bitmap:" for one too) means all that are in it.
func matchContexts(all, queries []string, listing bool) []string {
	var found []string
	for _, name := range all {
		match := listing && len(queries) == 0
		for _, q := range queries {
			space := q == "base:" || q == "qemu:" || q == contextDirty
			match = match || q == name || listing && space && strings.HasPrefix(name, q)
		}
		if match && (listing || len(found) < maxQueries) {
			found = append(found, name)
		}
	}
	return found
}
