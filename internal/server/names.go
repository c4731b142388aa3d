package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Properties of a medium's record that have a meaning here. Those that users see
// as properties do not begin with propOwn.
const (
	propOwn         = "atoll."
	propCache       = "cache" // the volume's cache mode
	propDescription = "description"
	propSchedule    = propOwn + "schedule"
	propLimits      = propOwn + "limits"
	propStaging     = propOwn + "staging" // an import is under way
	propKept        = propOwn + "kept"    // bytes that a deleted medium takes for its clones
)

// Bounds of what users may keep in a record.
const (
	maxProps     = 256
	maxPropKey   = 255
	maxPropBytes = 64 << 10
)

// freeProps are the properties that users set and see.
func freeProps(m catalog.Medium) map[string]string {
	var out map[string]string
	for k, v := range m.Props {
		if !ownProp(k) {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

func ownProp(key string) bool {
	return key == propCache || key == propDescription || strings.HasPrefix(key, propOwn)
}

// checkProps refuses properties that cannot be kept.
func checkProps(have, change map[string]string) error {
	total, n := 0, 0
	for k, v := range have {
		if _, over := change[k]; !over {
			total, n = total+len(k)+len(v), n+1
		}
	}
	for k, v := range change {
		if ownProp(k) {
			return fmt.Errorf("property %q is kept by the server itself: %w", k, atoll.ErrInvalid)
		}
		if k == "" || len(k) > maxPropKey {
			return fmt.Errorf("property %q: want a name of 1 to %d bytes: %w", k, maxPropKey, atoll.ErrInvalid)
		}
		if v != "" {
			total, n = total+len(k)+len(v), n+1
		}
	}
	if n > maxProps || total > maxPropBytes {
		return fmt.Errorf("%d properties of %d bytes: want at most %d of %s: %w", n, total, maxProps, atoll.FormatSize(maxPropBytes), atoll.ErrTooLarge)
	}
	return nil
}

// dirID is how the API names a directory by its number.
func dirID(number uint64) string { return "dir:" + strconv.FormatUint(number, 10) }

// number is a medium's small number; those of old media are their ids.
func number(m catalog.Medium) uint64 {
	if m.Number == 0 {
		return uint64(m.ID)
	}
	return m.Number
}

// entryMessage describes an entry of the tree in the directory parent.
func entryMessage(g glance, e catalog.Entry, parent uint64) *atollv1.Entry {
	out := &atollv1.Entry{Path: e.Path, ParentId: dirID(parent)}
	if d := e.Dir; d != nil {
		out.Id, out.Kind, out.Owner, out.Number = dirID(d.Number), "dir", d.Owner, d.Number
		if !d.Created.IsZero() {
			out.Created = timestamppb.New(d.Created)
		}
		if e.Path == "" {
			out.ParentId = ""
		}
		return out
	}
	m := *e.Medium
	out.Id, out.Kind, out.Owner, out.SizeBytes, out.Number = m.ID.String(), string(m.Kind), m.Owner, m.Size, number(m)
	out.Created, out.Properties = timestamppb.New(m.Created), freeProps(m)
	out.InUse = g.connections[m.Name] > 0
	return out
}

// describeEntry is entryMessage with the directory looked up.
func (b *backend) describeEntry(ctx context.Context, e catalog.Entry) (*atollv1.Entry, error) {
	var above uint64
	if p := catalog.ParentPath(e.Path); p != "" {
		d, err := b.s.cat.Entry(ctx, p)
		if err != nil {
			return nil, err
		}
		if d.Dir != nil {
			above = d.Dir.Number
		}
	}
	return entryMessage(b.glance(), e, above), nil
}

// MakeDirectory implements api.Names.
func (b *backend) MakeDirectory(ctx context.Context, r *atollv1.MakeDirectoryRequest) (*atollv1.Entry, error) {
	d, err := b.s.cat.MakeDirectory(ctx, r.Path, r.Owner, r.Parents)
	if errors.Is(err, atoll.ErrNotExist) {
		err = api.WithHint(err, "ask for the directories above it to be made, too")
	}
	if err != nil {
		return nil, err
	}
	return b.describeEntry(ctx, catalog.Entry{Path: d.Path, Dir: &d})
}

// RemoveDirectory implements api.Names.
func (b *backend) RemoveDirectory(ctx context.Context, r *atollv1.RemoveDirectoryRequest) (*atollv1.RemoveDirectoryResponse, error) {
	err := b.s.cat.RemoveDirectory(ctx, r.Path)
	if errors.Is(err, atoll.ErrBusy) {
		err = api.WithHint(err, "remove or move what lies in it first")
	}
	return &atollv1.RemoveDirectoryResponse{}, err
}

// ListDirectory implements api.Names.
func (b *backend) ListDirectory(ctx context.Context, r *atollv1.ListDirectoryRequest) (*atollv1.ListDirectoryResponse, error) {
	dir, err := b.s.cat.Entry(ctx, r.Path)
	if err != nil {
		return nil, err
	}
	list, next, err := b.s.cat.List(ctx, r.Path, r.After, int(r.Limit))
	if err != nil {
		return nil, err
	}
	out, g := &atollv1.ListDirectoryResponse{Next: next}, b.glance()
	for _, e := range list {
		out.Entries = append(out.Entries, entryMessage(g, e, dir.Dir.Number))
	}
	return out, nil
}

// GetEntry implements api.Names.
func (b *backend) GetEntry(ctx context.Context, r *atollv1.GetEntryRequest) (*atollv1.Entry, error) {
	e, err := b.findEntry(ctx, r)
	if err != nil {
		return nil, err
	}
	out, err := b.describeEntry(ctx, e)
	if err != nil || e.Medium == nil || out.InUse {
		return out, err
	}
	if c, err := b.owner(ctx, e.Medium.ID); err == nil && c != nil {
		if far, err := c.Names.GetEntry(api.Forwarding(ctx), message(r)); err == nil {
			out.InUse = far.Msg.InUse
		}
	}
	return out, nil
}

// findEntry finds what a request names by path or id.
func (b *backend) findEntry(ctx context.Context, r *atollv1.GetEntryRequest) (catalog.Entry, error) {
	if r.Id == "" {
		return b.s.cat.Entry(ctx, r.Path)
	}
	if text, ok := strings.CutPrefix(r.Id, "dir:"); ok {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return catalog.Entry{}, fmt.Errorf("directory id %q: %w", r.Id, atoll.ErrInvalid)
		}
		return b.s.cat.DirectoryByNumber(ctx, n)
	}
	id, err := atoll.ParseMediumID(r.Id)
	if err != nil {
		return catalog.Entry{}, err
	}
	m, err := b.s.cat.Medium(ctx, id)
	if err == nil && m.State != catalog.MediumLive {
		err = fmt.Errorf("medium %v is %s: %w", id, m.State, atoll.ErrNotExist)
	}
	return catalog.Entry{Path: m.Name, Medium: &m}, err
}

// Rename implements api.Names. The medium, and the one that it replaces, are in
// nobody's use.
func (b *backend) Rename(ctx context.Context, r *atollv1.RenameRequest) (*atollv1.Entry, error) {
	rec, err := b.s.volumes.find(ctx, r.From)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, namesRename); done {
		return out, err
	}
	if err := b.unused(ctx, rec); err != nil {
		return nil, err
	}
	o := catalog.RenameOptions{NoParents: r.NoParents}
	if r.Replace {
		if err := b.freeTarget(ctx, r.To); err != nil {
			return nil, err
		}
		note := b.trashNote("rename", time.Time{})
		o.Replace = &note
	}
	if rec, err = b.s.cat.Medium(ctx, rec.ID); err != nil {
		return nil, err
	}
	moved, old, err := b.s.cat.RenameMedium(ctx, rec, r.To, o)
	if err != nil {
		return nil, named(taken("rename "+r.From+" to", r.To, err), rec)
	}
	if old != nil {
		b.s.log.Info("medium replaced, old one in the trash", "medium", old.ID, "name", old.Name, "expires", old.Trash.Expires)
	}
	return b.describeEntry(ctx, catalog.Entry{Path: moved.Name, Medium: &moved})
}

// freeTarget sees to it that nobody has the medium open that a rename replaces.
// One of another server goes to the trash there.
func (b *backend) freeTarget(ctx context.Context, name string) error {
	rec, err := b.s.volumes.find(ctx, name)
	if errors.Is(err, atoll.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if c, err := b.ownerOf(ctx, rec.ID); err != nil {
		return err
	} else if c != nil {
		_, err := c.Trash.MoveToTrash(api.Forwarding(ctx), message(&atollv1.MoveToTrashRequest{Name: name}))
		return err
	}
	return b.unused(ctx, rec)
}

// ChangeOwner implements api.Names.
func (b *backend) ChangeOwner(ctx context.Context, r *atollv1.ChangeOwnerRequest) (*atollv1.Entry, error) {
	if err := catalog.CheckUserName(r.Owner); err != nil {
		return nil, err
	}
	e, err := b.s.cat.Entry(ctx, r.Path)
	if err != nil {
		return nil, err
	}
	if e.Dir != nil {
		d, err := b.s.cat.SetDirectoryOwner(ctx, r.Path, r.Owner)
		if err != nil {
			return nil, err
		}
		return b.describeEntry(ctx, catalog.Entry{Path: r.Path, Dir: &d})
	}
	m, err := b.update(ctx, e.Medium.ID, func(m *catalog.Medium) error {
		m.Owner = r.Owner
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b.describeEntry(ctx, catalog.Entry{Path: m.Name, Medium: &m})
}

// SetProperties implements api.Names.
func (b *backend) SetProperties(ctx context.Context, r *atollv1.SetPropertiesRequest) (*atollv1.Entry, error) {
	rec, err := b.s.volumes.find(ctx, r.Path)
	if err != nil {
		return nil, err
	}
	m, err := b.update(ctx, rec.ID, func(m *catalog.Medium) error {
		change := maps.Clone(r.Properties)
		if d, is := change[propDescription]; is {
			setProp(m, propDescription, d)
			delete(change, propDescription)
		}
		if err := checkProps(freeProps(*m), change); err != nil {
			return err
		}
		for k, v := range change {
			setProp(m, k, v)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b.describeEntry(ctx, catalog.Entry{Path: m.Name, Medium: &m})
}

// setProp changes a property of a record that is this caller's; an empty value
// removes it.
func setProp(m *catalog.Medium, key, value string) {
	props := maps.Clone(m.Props)
	if props == nil {
		props = map[string]string{}
	}
	props[key] = value
	if value == "" {
		delete(props, key)
	}
	m.Props = props
}

// update changes a medium's record, again if someone else did in between.
func (b *backend) update(ctx context.Context, id atoll.MediumID, change func(*catalog.Medium) error) (catalog.Medium, error) {
	for range maxTries {
		m, err := b.s.cat.Medium(ctx, id)
		if err == nil && m.State != catalog.MediumLive {
			err = fmt.Errorf("medium %v is %s: %w", id, m.State, atoll.ErrNotExist)
		}
		if err == nil {
			err = change(&m)
		}
		if err != nil {
			return catalog.Medium{}, err
		}
		m, err = b.s.cat.UpdateMedium(ctx, m)
		if !errors.Is(err, atoll.ErrConflict) {
			return m, err
		}
	}
	return catalog.Medium{}, fmt.Errorf("change medium %v: %w", id, atoll.ErrConflict)
}
