package medium

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Clone makes a medium that begins as a version of parent, which this process
// owns: record, name, head and the pin that keeps the version come into being in
// one transaction. Kind, and the size and policy where they are empty, are the
// parent's; rec.ID may be given. The clone's first Open has the version's root
// as its Root. ErrNotExist when the version is not in the manifest, or is being
// deleted; ErrExist when the name is taken.
func Clone(ctx context.Context, opts Options, parent *Medium, number uint64, rec catalog.Medium) (catalog.Medium, error) {
	if err := parent.check(); err != nil {
		return catalog.Medium{}, err
	}
	// No version is marked as deleted between the look and the transaction.
	if err := acquire(ctx, parent.manifests); err != nil {
		return catalog.Medium{}, fmt.Errorf("clone medium %v: %w", parent.id, err)
	}
	defer func() { <-parent.manifests }()
	s, from := parent.State(), parent.Info()
	v, err := s.Resolve(VersionSpec{Number: number})
	if err != nil {
		return catalog.Medium{}, fmt.Errorf("clone medium %v: %w", parent.id, err)
	}
	rec.Kind = from.Kind
	if rec.Size == 0 {
		rec.Size = v.Size
	}
	if rec.Policy == (catalog.Policy{}) {
		rec.Policy = from.Policy
	}
	out, err := opts.Catalog.CreateClone(ctx, rec, parent.id, number, parent.epoch)
	return out, parent.note(err)
}

// View is a version of a medium that this process reads without owning it. A
// pin keeps the version in place for as long as the process's session lives.
// All methods may be called concurrently.
type View struct {
	opts    Options
	rec     catalog.Medium
	from    *foreign
	line    *line
	pin     catalog.Pin
	version Version
	root    []byte
	closed  atomic.Bool
}

// OpenView opens a version of a live medium, whoever owns it. It sees the
// versions that are in a manifest. ErrNotExist when there is none that spec
// names, or when it is being deleted.
func OpenView(ctx context.Context, opts Options, id atoll.MediumID, spec VersionSpec) (*View, error) {
	opts = opts.withDefaults()
	v := &View{opts: opts, from: newForeign(opts, id)}
	var err error
	if v.rec, err = opts.Catalog.Medium(ctx, id); err == nil {
		v.line = newLine(opts, v.rec)
		err = v.open(ctx, spec)
	}
	if err != nil {
		return nil, fmt.Errorf("open version %v of medium %v: %w", spec, id, err)
	}
	return v, nil
}

// open pins what spec names, and then looks again whether it is still there.
func (v *View) open(ctx context.Context, spec VersionSpec) error {
	if spec.IsZero() {
		return fmt.Errorf("the present state is no version: %w", atoll.ErrInvalid)
	}
	k, err := v.from.current(ctx)
	for range maxLoads {
		if err != nil {
			return err
		}
		s := k.man.state()
		want, err := s.Resolve(spec)
		if err != nil {
			return err
		}
		if v.pin, err = v.opts.Catalog.PinVersion(ctx, v.opts.Session, v.rec.ID, want.Number); err != nil {
			return err
		}
		if k, err = v.from.reload(ctx, k); err == nil {
			s = k.man.state()
			if v.version, err = s.Resolve(VersionSpec{Number: want.Number}); err == nil {
				if v.root, err = v.from.root(ctx, want.Number); err == nil {
					return nil
				}
			}
		}
		_ = v.opts.Catalog.Unpin(context.WithoutCancel(ctx), v.pin)
		if err != nil && !errors.Is(err, atoll.ErrNotExist) {
			return err
		}
		if k, err = v.from.current(ctx); err != nil { // gone since: "last" may mean another now
			return err
		}
	}
	return fmt.Errorf("it keeps changing: %w", atoll.ErrConflict)
}

// Info returns the medium's record as it was at OpenView.
func (v *View) Info() catalog.Medium { return v.rec }

// Version returns the version that is open.
func (v *View) Version() Version { return v.version }

// State returns the versions as this process last saw them. Others than the
// open one may go at any time.
func (v *View) State() State {
	var s State
	if k := v.from.now.Load(); k != nil {
		s = k.man.state()
	}
	s.Versions, s.Ancestors = slices.Clone(s.Versions), slices.Clone(v.rec.Ancestors)
	return s
}

// Root returns the kind's root of the version. The caller must not change it.
func (v *View) Root() []byte { return v.root }

// ReadRoot returns the kind's root of any version of the medium, which may go
// at any time.
func (v *View) ReadRoot(ctx context.Context, number uint64) ([]byte, error) {
	return v.from.root(ctx, number)
}

// Valid reports whether the pin still holds. It is cheap.
func (v *View) Valid() bool { return !v.closed.Load() && v.opts.Session.Valid() }

// Base returns the first ordinal that is the medium's own.
func (v *View) Base() atoll.Ordinal { return v.rec.Base() }

// Ancestor returns whose segment an ordinal is, as Medium.Ancestor.
func (v *View) Ancestor(o atoll.Ordinal) (atoll.MediumID, bool) {
	if o >= v.rec.Base() {
		return v.rec.ID, true
	}
	return v.line.owner(o)
}

// Read fills dst, whole blocks, as Medium.Read. ErrFenced when the session ended
// before the read was complete, ErrClosed after Close.
func (v *View) Read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte) error {
	return v.ReadSums(ctx, o, block, dst, nil)
}

// ReadSums is as of Medium.
func (v *View) ReadSums(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte, sums []uint32) error {
	var err error
	if v.line != nil && o < v.line.base {
		err = v.line.read(ctx, o, block, dst, sums)
	} else {
		err = v.from.read(ctx, o, block, dst, sums)
	}
	switch {
	case v.closed.Load():
		return fmt.Errorf("view of medium %v: %w", v.rec.ID, atoll.ErrClosed)
	case !v.opts.Session.Valid():
		return fmt.Errorf("view of medium %v: its pin has ended: %w", v.rec.ID, atoll.ErrFenced)
	}
	return err
}

// Close removes the pin. After an error it ends with the session.
func (v *View) Close(ctx context.Context) error {
	if v.closed.Swap(true) {
		return nil
	}
	return v.opts.Catalog.Unpin(ctx, v.pin)
}
