package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// scarce is the part of the raw space in use from which the trash is emptied before
// its time, and scarceFor how long that must last. Writers are held below it as long
// as compaction can give room back, so above it only the trash can. What nodes report
// lags behind deletions, and a burst of writes holds room for a moment that it does
// not need.
const (
	scarce    = 0.94
	scarceFor = 10 * time.Second
)

// scarcity remembers since when room is scarce while nothing is being deleted that
// would give some back.
type scarcity struct{ since time.Time }

// lasts notes what is seen now and reports whether the trash must give room back.
func (c *scarcity) lasts(now time.Time, used float64, deleting bool) bool {
	switch {
	case used < scarce || deleting:
		c.since = time.Time{}
	case c.since.IsZero():
		c.since = now
	}
	return !c.since.IsZero() && now.Sub(c.since) >= scarceFor
}

// trashNote is the note on what goes to the trash now.
func (b *backend) trashNote(source string, expires time.Time) catalog.Trash {
	now := time.Now().UTC()
	if expires.IsZero() {
		expires = now.Add(b.s.cfg.TrashKeep)
	}
	return catalog.Trash{Removed: now, Expires: expires, Source: source}
}

func trashMessage(m catalog.Medium) *atollv1.TrashEntry {
	return &atollv1.TrashEntry{
		Id: m.ID.String(), Path: m.Name, Owner: m.Owner, SizeBytes: m.Size, Removed: timestamppb.New(m.Trash.Removed),
		Expires: timestamppb.New(m.Trash.Expires), Created: timestamppb.New(m.Created), Number: number(m), Kind: string(m.Kind),
		Source: m.Trash.Source, Bytes: m.Trash.Bytes,
	}
}

// connections counts the NBD clients of a volume's working state here.
func (b *backend) connections(name string) int {
	if b.s.nbd == nil {
		return 0
	}
	n := 0
	for _, c := range b.s.nbd.Connections() {
		if c.Export == name {
			n++
		}
	}
	return n
}

// unused sees to it that nobody uses a volume here, and closes it if it is open.
// ErrBusy when clients are connected: one that has just left may not be gone
// yet, so that is waited for a little.
func (b *backend) unused(ctx context.Context, rec catalog.Medium) error {
	busy := func(what string) error {
		return api.WithHint(fmt.Errorf("volume %q %s: %w", rec.Name, what, atoll.ErrBusy), "disconnect its clients first")
	}
	for try := 0; ; try++ {
		n := b.connections(rec.Name)
		if n == 0 && b.s.volumes.closeID(ctx, rec.ID) {
			return nil
		}
		switch {
		case rec.Props[propStaging] != "":
			return api.WithHint(fmt.Errorf("volume %q is being imported to: %w", rec.Name, atoll.ErrBusy), "let the import end, or stop it; without a sign of life it is taken back after a minute")
		case try >= 50 && n > 0:
			return busy(fmt.Sprintf("has %d NBD connections", n))
		case try >= 50:
			return busy("is in use")
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("wait for the clients of volume %q: %w", rec.Name, atoll.ErrTimeout)
		}
	}
}

// discard moves a volume that this server may deal with to the trash.
func (b *backend) discard(ctx context.Context, rec catalog.Medium, note catalog.Trash) (catalog.Medium, error) {
	note.Bytes = b.describe(rec).GetLogBytes()
	for range maxTries {
		if err := b.unused(ctx, rec); err != nil {
			return rec, err
		}
		now, err := b.s.cat.Medium(ctx, rec.ID)
		if err == nil && (now.State != catalog.MediumLive || now.Name != rec.Name) {
			err = fmt.Errorf("volume %q: %w", rec.Name, atoll.ErrNotExist)
		}
		if err != nil {
			return rec, err
		}
		out, err := b.s.cat.TrashMedium(ctx, now, note)
		if err == nil {
			b.s.log.Info("medium moved to the trash", "medium", out.ID, "name", out.Name, "expires", out.Trash.Expires, "source", out.Trash.Source)
		}
		if !errors.Is(err, atoll.ErrConflict) {
			return out, err
		}
	}
	return rec, fmt.Errorf("move volume %q to the trash: %w", rec.Name, atoll.ErrConflict)
}

// MoveToTrash implements api.Trash.
func (b *backend) MoveToTrash(ctx context.Context, r *atollv1.MoveToTrashRequest) (*atollv1.TrashEntry, error) {
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, trashMove); done {
		return out, err
	}
	var expires time.Time
	if r.Expires != nil {
		expires = r.Expires.AsTime()
	}
	rec, err = b.discard(ctx, rec, b.trashNote(cmp.Or(r.Source, "user"), expires))
	if err != nil {
		return nil, err
	}
	return trashMessage(rec), nil
}

// DeleteVolume implements api.Backend. It goes to the trash, unless that keeps
// nothing or the caller wants it gone now.
func (b *backend) DeleteVolume(ctx context.Context, r *atollv1.DeleteVolumeRequest) (*atollv1.DeleteVolumeResponse, error) {
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, volumesDelete); done {
		return out, err
	}
	out := &atollv1.DeleteVolumeResponse{Bytes: b.describe(rec).GetLogBytes()}
	if r.DryRun {
		if n := b.connections(rec.Name); n > 0 {
			return nil, api.WithHint(fmt.Errorf("volume %q has %d NBD connections: %w", rec.Name, n, atoll.ErrBusy), "disconnect its clients first")
		}
		o, err := b.s.volumes.acquire(ctx, rec) // only an open one tells its size
		if err == nil {
			out.Bytes = b.describe(rec).GetLogBytes()
			b.s.volumes.release(o)
		}
		return out, nil
	}
	note := b.trashNote("user", time.Time{})
	rec, err = b.discard(ctx, rec, note)
	if err != nil {
		return nil, err
	}
	if r.Now || b.s.cfg.TrashKeep == 0 {
		_, err := b.s.cat.PurgeMedium(ctx, rec.ID)
		return out, err
	}
	out.TrashId, out.Expires = rec.ID.String(), timestamppb.New(rec.Trash.Expires)
	return out, nil
}

// ListTrash implements api.Trash.
func (b *backend) ListTrash(ctx context.Context, r *atollv1.ListTrashRequest) (*atollv1.ListTrashResponse, error) {
	limit := int(r.Limit)
	if limit <= 0 || limit > 1000 {
		limit = 1000
	}
	var after atoll.MediumID
	if r.After != "" {
		id, err := atoll.ParseMediumID(r.After)
		if err != nil {
			return nil, err
		}
		after = id
	}
	media, err := b.s.cat.Trashed(ctx, after, limit)
	if err != nil {
		return nil, err
	}
	out := &atollv1.ListTrashResponse{}
	for _, m := range media {
		out.Entries = append(out.Entries, trashMessage(m))
	}
	if len(media) == limit {
		out.Next = media[limit-1].ID.String()
	}
	return out, nil
}

// trashed finds one medium in the trash: by id, or the one that was removed last
// from a path, of an owner if that is not empty.
func (b *backend) trashed(ctx context.Context, id, path, owner string) (catalog.Medium, error) {
	if id != "" {
		mid, err := atoll.ParseMediumID(id)
		if err != nil {
			return catalog.Medium{}, err
		}
		m, err := b.s.cat.Medium(ctx, mid)
		if err == nil && m.State != catalog.MediumTrashed {
			err = fmt.Errorf("medium %v is not in the trash: %w", mid, atoll.ErrNotExist)
		}
		return m, err
	}
	all, err := b.s.cat.Trashed(ctx, 0, 0)
	if err != nil {
		return catalog.Medium{}, err
	}
	all = slices.DeleteFunc(all, func(m catalog.Medium) bool { return m.Name != path || owner != "" && m.Owner != owner })
	if len(all) == 0 {
		return catalog.Medium{}, api.WithHint(fmt.Errorf("nothing that was at %q is in the trash: %w", path, atoll.ErrNotExist), `"atoll volume trash ls" shows what is`)
	}
	return slices.MaxFunc(all, func(a, b catalog.Medium) int { return a.Trash.Removed.Compare(b.Trash.Removed) }), nil
}

// unchecked ends a check of a medium in the trash that is under way here.
func (b *backend) unchecked(ctx context.Context, m catalog.Medium) error {
	limit := time.NewTimer(closeTimeout)
	defer limit.Stop()
	for !b.s.volumes.closeID(ctx, m.ID) {
		select {
		case <-time.After(20 * time.Millisecond):
			continue
		case <-limit.C:
		case <-ctx.Done():
		}
		return fmt.Errorf("volume %q in the trash is being checked: %w", m.Name, atoll.ErrBusy)
	}
	return nil
}

// RestoreTrash implements api.Trash.
func (b *backend) RestoreTrash(ctx context.Context, r *atollv1.RestoreTrashRequest) (*atollv1.Entry, error) {
	old, err := b.trashed(ctx, r.Id, r.Path, "")
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, old, &atollv1.RestoreTrashRequest{Id: old.ID.String(), NewPath: r.NewPath, NoParents: r.NoParents}, trashRestore); done {
		return out, err
	}
	if err := b.unchecked(ctx, old); err != nil {
		return nil, err
	}
	to := cmp.Or(r.NewPath, old.Name)
	m, err := b.s.cat.RestoreMedium(ctx, old.ID, to, !r.NoParents)
	if errors.Is(err, atoll.ErrExist) {
		err = api.WithHint(fmt.Errorf("restore %q to %q: that name is taken: %w", old.Name, to, atoll.ErrExist), "restore it under another name")
	}
	if err != nil {
		return nil, named(err, old)
	}
	b.s.log.Info("medium restored from the trash", "medium", m.ID, "name", m.Name)
	return b.describeEntry(ctx, catalog.Entry{Path: m.Name, Medium: &m})
}

// PurgeTrash implements api.Trash.
func (b *backend) PurgeTrash(ctx context.Context, r *atollv1.PurgeTrashRequest) (*atollv1.PurgeTrashResponse, error) {
	if r.Id == "" && r.ExpiredBefore == nil && !r.All {
		return nil, fmt.Errorf("purge what? want an id, a time or all: %w", atoll.ErrInvalid)
	}
	var list []catalog.Medium
	if r.Id != "" {
		m, err := b.trashed(ctx, r.Id, "", "")
		if err != nil {
			return nil, err
		}
		list = []catalog.Medium{m}
	} else {
		all, err := b.s.cat.Trashed(ctx, 0, 0)
		if err != nil {
			return nil, err
		}
		list = slices.DeleteFunc(all, func(m catalog.Medium) bool { return !r.All && m.Trash.Expires.After(r.ExpiredBefore.AsTime()) })
	}
	out := &atollv1.PurgeTrashResponse{}
	for _, m := range list {
		if err := b.unchecked(ctx, m); err != nil {
			return nil, err
		}
		gone, err := b.s.cat.PurgeMedium(ctx, m.ID)
		if errors.Is(err, atoll.ErrNotExist) {
			continue // somebody else was faster
		}
		if err != nil {
			return nil, err
		}
		out.Removed++
		out.Bytes += gone.Trash.Bytes
		b.s.log.Info("medium purged from the trash", "medium", m.ID, "name", gone.Name)
	}
	return out, nil
}

// toPurge decides what of the trash goes now: what is past its time, or else, when
// something must go early, the oldest.
func toPurge(all map[atoll.MediumID]catalog.Trash, now time.Time, early bool) []atoll.MediumID {
	var purge []atoll.MediumID
	var oldest atoll.MediumID
	for id, t := range all {
		if t.Expires.Before(now) {
			purge = append(purge, id)
		}
		if oldest == 0 || t.Removed.Before(all[oldest].Removed) {
			oldest = id
		}
	}
	if len(purge) == 0 && oldest != 0 && early {
		purge = append(purge, oldest)
	}
	return purge
}

// expireTrash purges what is past its time, and the oldest when room is scarce:
// one at a time, since the room comes back only after its deletion.
func (b *backend) expireTrash(ctx context.Context, now time.Time, c *scarcity) error {
	all, err := b.s.cat.TrashNotes(ctx)
	if err != nil {
		return err
	}
	b.s.noteTrash(all)
	used, deleting := b.s.used(), false
	if used >= scarce && len(all) > 0 {
		if deleting, err = b.deleting(ctx); err != nil {
			return err
		}
	}
	early := c.lasts(now, used, deleting)
	var errs []error
	for _, id := range toPurge(all, now, early) {
		m, err := b.s.cat.PurgeMedium(ctx, id)
		if err != nil {
			if !errors.Is(err, atoll.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		if expires := all[id].Expires; expires.After(now) {
			*c = scarcity{} // what is deleted now gives room back
			b.s.log.Warn("medium purged from the trash before its time: the cluster is nearly full", "medium", id, "name", m.Name, "expires", expires, "used", used)
		} else {
			b.s.log.Info("medium purged from the trash", "medium", id, "name", m.Name, "expires", expires)
		}
	}
	return errors.Join(errs...)
}

// deleting reports whether the deletion of some medium is under way, so that room
// comes back by itself. Those that only wait for their clones do not count.
func (b *backend) deleting(ctx context.Context) (bool, error) {
	list, err := b.s.cat.Deleting(ctx, 0, 1000)
	if err != nil {
		return false, err
	}
	for _, m := range list {
		if m.State == catalog.MediumDeleting {
			return true, nil
		}
		pins, err := b.s.cat.Pins(ctx, m.ID)
		if err != nil || len(pins) == 0 {
			return len(pins) == 0, err
		}
	}
	return false, nil
}

// used is the part of the raw space of all nodes that is in use, 0 to 1.
func (s *Server) used() float64 {
	var total, free int64
	for _, n := range s.cat.State().Nodes {
		if n.Up && n.State != catalog.NodeRemoved {
			total += n.Report.Total
			free += n.Report.Free
		}
	}
	if total == 0 {
		return 0
	}
	return 1 - float64(free)/float64(total)
}
