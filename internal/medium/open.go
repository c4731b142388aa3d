package medium

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
)

// Create records a new medium. Its identity, name and first head come into
// being in one transaction, so a crash leaves all of it or nothing.
func Create(ctx context.Context, opts Options, rec catalog.Medium) (catalog.Medium, error) {
	return opts.Catalog.CreateMedium(ctx, rec)
}

// Delete gives a medium up for ever: it waits out a dead owner, marks the
// record and fences what is unsealed, so that a late writer cannot go on. Its
// name is free. While clones or readers pin versions of it, it stays for them,
// detached; then the controller removes the segments and the record. ErrBusy
// while another process owns it. It may be repeated; a crash in between leaves
// either a live medium or one that the controller goes on to delete.
func Delete(ctx context.Context, opts Options, id atoll.MediumID) error {
	opts = opts.withDefaults()
	rec, err := opts.Catalog.Medium(ctx, id)
	if err != nil {
		return fmt.Errorf("delete medium %v: %w", id, err)
	}
	if rec.State != catalog.MediumLive {
		return nil
	}
	h, err := take(ctx, opts, id)
	if err != nil {
		return fmt.Errorf("delete medium %v: %w", id, err)
	}
	own := newOwner(opts.Catalog, h, func(error) {})
	rec.State = catalog.MediumDetached
	if rec, err = opts.Catalog.UpdateMedium(ctx, rec); err != nil {
		_ = own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headReleased(h), nil })
		return fmt.Errorf("delete medium %v: %w", id, err)
	}
	// From here on it is deleted. Fencing and sealing spare the controller work
	// and stop a late writer at once; the controller does them again anyway, and
	// goes on when the last pin is gone.
	if sealed, err := stream.Recover(ctx, opts.Nodes, h.Unsealed, h.Epoch); err == nil {
		_ = own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headRecovered(h, sealed) })
	}
	if err := own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headReleased(h), nil }); err != nil && !errors.Is(err, atoll.ErrFenced) {
		return fmt.Errorf("delete medium %v: %w", id, err)
	}
	rec.State = catalog.MediumDeleting
	_, err = opts.Catalog.UpdateMedium(ctx, rec)
	opts.Log.InfoContext(ctx, "medium deleted", "medium", id, "name", rec.Name, "pinned", errors.Is(err, atoll.ErrBusy))
	return nil
}

// take acquires a medium and waits up to opts.Wait for another owner's lease to
// end.
func take(ctx context.Context, opts Options, id atoll.MediumID) (catalog.Head, error) {
	limit := time.Now().Add(opts.Wait)
	acquire := opts.Catalog.Acquire
	if opts.Trashed {
		acquire = opts.Catalog.AcquireTrashed
	}
	for {
		h, err := acquire(ctx, id, opts.Session)
		if !errors.Is(err, atoll.ErrBusy) || time.Now().After(limit) {
			return h, err
		}
		if sleep(ctx, 100*time.Millisecond) != nil {
			return h, err
		}
	}
}

// Open makes this process the owner of a medium: it takes the next epoch,
// fences and seals what the last owner left unsealed, records that, and loads
// the manifest. The kind then calls Replay. ErrBusy while another process owns
// it; ErrUnavailable when too few copies of an unsealed segment answer.
func Open(ctx context.Context, opts Options, id atoll.MediumID) (*Medium, error) {
	opts = opts.withDefaults()
	start := time.Now()
	h, err := take(ctx, opts, id)
	if err != nil {
		return nil, fmt.Errorf("open medium %v: %w", id, err)
	}
	m := newMedium(opts, id, h)
	if err := m.recover(ctx); err != nil {
		// Give it up, so that another process may try at once.
		_ = m.own.change(context.WithoutCancel(ctx), func(h catalog.Head) (catalog.Head, error) { return headReleased(h), nil })
		return nil, fmt.Errorf("open medium %v: %w", id, m.note(err))
	}
	background, stop := context.WithCancel(context.Background())
	m.stop = stop
	m.wg.Go(func() { m.guard(background) })
	m.wg.Go(func() { m.keep(background) })
	m.wg.Go(func() { m.sweep(background) })
	m.metrics.opened(time.Since(start))
	m.log.InfoContext(ctx, "medium opened", "medium", id, "name", m.Info().Name, "epoch", m.epoch, "dur", time.Since(start))
	return m, nil
}

func newMedium(opts Options, id atoll.MediumID, h catalog.Head) *Medium {
	m := &Medium{
		born: time.Now(),
		opts: opts, log: opts.Log, metrics: opts.Metrics, id: id, epoch: h.Epoch, table: newTable(),
		manifests: make(chan struct{}, 1), copies: make(chan struct{}, maxMoves), moves: make(chan struct{}, 1), updates: make(chan struct{}, 1), lost: make(chan struct{}),
		keeps: make(chan struct{}, 1), sweeps: make(chan struct{}, 1),
	}
	m.own = newOwner(opts.Catalog, h, m.lose)
	for l := range m.lanes {
		m.lanes[l].init(catalog.Lane(l), h.Epoch)
	}
	return m
}

// recover brings head and table in order. Until its change of the head is
// written, a crash leaves all to the next owner, who does the same again.
func (m *Medium) recover(ctx context.Context) error {
	rec, err := m.opts.Catalog.Medium(ctx, m.id)
	if err != nil {
		return err
	}
	m.info.Store(&rec)
	m.line.Store(newLine(m.opts, rec))
	if left := m.own.head().Unsealed; len(left) > 0 {
		sealed, err := stream.Recover(ctx, m.opts.Nodes, left, m.epoch)
		if err != nil {
			return err
		}
		err = m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headRecovered(h, sealed) })
		if err != nil {
			return err
		}
	}
	return m.loadManifest(ctx)
}
