package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
)

// propGroup is the property of versions that were made at one point.
const propGroup = "group"

// propTemporary is the property of versions that a client makes for itself, to
// read a state that does not change, and deletes when it is done. They are not
// shown.
const propTemporary = "atoll.temporary"

// propImageSize is the property in which clients keep the exact size of an image
// that is not a multiple of 4 KiB. Versions get that of the moment.
const propImageSize = "rbd.size"

// versionProps are the properties of a version to be made of rec: those given,
// and what of the record belongs to the state of the moment.
func versionProps(rec catalog.Medium, given map[string]string) map[string]string {
	size := rec.Props[propImageSize]
	if size == "" || given[propImageSize] != "" {
		return given
	}
	props := maps.Clone(given)
	if props == nil {
		props = map[string]string{}
	}
	props[propImageSize] = size
	return props
}

// use opens a volume that this server may deal with and hands it to fn, unless an
// import to it is under way.
func (b *backend) use(ctx context.Context, rec catalog.Medium, fn func(*openVolume) error) error {
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return err
	}
	defer b.s.volumes.release(o)
	if err := b.s.volumes.admit(o, ""); err != nil {
		return err
	}
	return named(fn(o), rec)
}

// resolve finds a version that users see. ErrNotExist with what to do.
func resolve(o *openVolume, spec medium.VersionSpec) (medium.Version, error) {
	st := o.state()
	v, err := st.Resolve(spec)
	if err != nil {
		return v, api.WithHint(fmt.Errorf("volume %q: %w", o.name, err), fmt.Sprintf("%q shows what there is", "atoll volume versions "+o.name))
	}
	return v, nil
}

// findVersion finds the volume of NAME@VERSION and refuses a name without a
// version.
func (b *backend) findVersion(ctx context.Context, text string) (rec catalog.Medium, spec medium.VersionSpec, err error) {
	name, spec, err := splitSpec(text)
	if err == nil && spec.IsZero() {
		err = fmt.Errorf("%q names no version; want NAME@VERSION: %w", text, atoll.ErrInvalid)
	}
	if err == nil {
		rec, err = b.s.volumes.find(ctx, name)
	}
	return rec, spec, err
}

// versionMessage describes a version of rec.
func versionMessage(rec catalog.Medium, st medium.State, v medium.Version, children []string) *atollv1.Version {
	last, _ := st.Resolve(medium.VersionSpec{Last: true})
	out := &atollv1.Version{
		Number: v.Number, Name: v.Name, Memo: v.Memo, Time: timestamppb.New(v.Time), Parent: v.Parent, SizeBytes: v.Size,
		UsedBytes: v.Used, UniqueBytes: v.Unique, Last: v.Number == last.Number, Release: v.Number == st.Release,
		Protected: v.Flags&medium.FlagProtected != 0, Deleting: v.Flags&medium.FlagDeleting != 0,
		Internal: v.Flags&medium.FlagInternal != 0, Children: children, Group: v.Props[propGroup],
		Medium: rec.Name, MediumId: rec.ID.String(),
	}
	for k, p := range v.Props {
		if k != propGroup {
			if out.Properties == nil {
				out.Properties = map[string]string{}
			}
			out.Properties[k] = p
		}
	}
	return out
}

// CreateVersion implements api.Versions.
func (b *backend) CreateVersion(ctx context.Context, r *atollv1.CreateVersionRequest) (*atollv1.CreateVersionResponse, error) {
	if len(r.Media) == 0 {
		return nil, fmt.Errorf("make a version of what? name one volume at least: %w", atoll.ErrInvalid)
	}
	if r.Name != "" {
		if err := catalog.ValidateVersionName(r.Name); err != nil {
			return nil, err
		}
	}
	recs := make([]catalog.Medium, len(r.Media))
	for i, name := range r.Media {
		var err error
		if recs[i], err = b.s.volumes.find(ctx, name); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(recs[:i], func(m catalog.Medium) bool { return m.ID == recs[i].ID }) {
			return nil, fmt.Errorf("volume %q is named twice: %w", name, atoll.ErrInvalid)
		}
	}
	n, err := b.oneOwner(ctx, recs)
	if err != nil {
		return nil, err
	}
	if n != nil {
		if out, done, err := passTo(ctx, b, n, recs[0], r, versionsCreate); done {
			return out, err
		}
	}
	return b.createVersions(ctx, recs, r)
}

// oneOwner returns a client of the server that owns these media, nil for this
// one. Versions at one point are made by one process.
func (b *backend) oneOwner(ctx context.Context, recs []catalog.Medium) (*neighbour, error) {
	var one *neighbour
	here := 0
	for _, rec := range recs {
		c, err := b.owner(ctx, rec.ID)
		if err != nil {
			return nil, err
		}
		if c == nil && b.s.volumes.has(rec.ID) {
			here++
		}
		if c != nil && one != nil && one.proc.ID != c.proc.ID || c != nil && here > 0 || one != nil && here > 0 {
			return nil, api.WithHint(fmt.Errorf("volume %q and others of the group are open on different servers: %w", rec.Name, atoll.ErrBusy),
				fmt.Sprintf("connect their clients through one server, or wait %s after the others' clients have gone", idleClose))
		}
		if c != nil {
			one = c
		}
	}
	return one, nil
}

// createVersions makes versions of volumes of this server at one point.
func (b *backend) createVersions(ctx context.Context, recs []catalog.Medium, r *atollv1.CreateVersionRequest) (*atollv1.CreateVersionResponse, error) {
	defer b.s.metrics.timed("backup")()
	props := map[string]string{}
	for k, v := range r.Properties {
		props[k] = v
	}
	if len(recs) > 1 {
		props[propGroup] = b.s.newID()
	}
	var open []*openVolume
	defer func() {
		for _, o := range open {
			b.s.volumes.release(o)
		}
	}()
	vols, opts := make([]*volume.Volume, len(recs)), make([]volume.BackupOptions, len(recs))
	for i, rec := range recs {
		o, err := b.s.volumes.acquire(ctx, rec)
		if err != nil {
			return nil, err
		}
		open = append(open, o)
		if err := b.s.volumes.admit(o, ""); err != nil {
			return nil, err
		}
		vols[i], opts[i] = o.vol, volume.BackupOptions{Name: r.Name, Memo: r.Memo, Protected: r.Protected, Props: versionProps(rec, props)}
		if r.Properties[propTemporary] != "" {
			opts[i].Flags = medium.FlagInternal
		}
	}
	made, err := volume.Group(ctx, vols, opts)
	err = named(err, recs...)
	if errors.Is(err, atoll.ErrExist) {
		err = api.WithHint(err, "choose another name, or delete that version first")
	}
	if err != nil {
		return nil, err
	}
	out := &atollv1.CreateVersionResponse{}
	for i, v := range made {
		out.Versions = append(out.Versions, versionMessage(recs[i], open[i].state(), v, nil))
	}
	return out, nil
}

// ListVersions implements api.Versions.
func (b *backend) ListVersions(ctx context.Context, r *atollv1.ListVersionsRequest) (*atollv1.ListVersionsResponse, error) {
	if name, version, found := strings.Cut(r.Name, "@"); found {
		return nil, api.WithHint(fmt.Errorf("versions of %q: want a volume, not its version %q: %w", r.Name, version, atoll.ErrInvalid),
			fmt.Sprintf("%q shows all of them", "atoll volume versions "+name))
	}
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsList); done {
		return out, err
	}
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	children, err := b.clones(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	st := o.state()
	out := &atollv1.ListVersionsResponse{CurParent: st.CurParent, Release: st.Release}
	if last, err := st.Resolve(medium.VersionSpec{Last: true}); err == nil {
		out.Last = last.Number
	}
	for _, v := range st.Versions {
		if v.Hidden() && !r.All {
			continue
		}
		if r.Exact {
			if _, v.Unique, err = o.vol.Usage(ctx, v.Number); errors.Is(err, atoll.ErrNotExist) {
				continue // deleted meanwhile
			}
			if err != nil {
				return nil, err
			}
		}
		var names []string
		for _, c := range children {
			if c.Version == v.Number {
				names = append(names, c.Name)
			}
		}
		out.Versions = append(out.Versions, versionMessage(rec, st, v, names))
	}
	return out, nil
}

// clones lists the media that began as versions of one.
func (b *backend) clones(ctx context.Context, id atoll.MediumID) ([]*atollv1.Child, error) {
	pins, err := b.s.cat.Pins(ctx, id)
	if err != nil {
		return nil, err
	}
	var out []*atollv1.Child
	for _, p := range pins {
		if p.Clone == 0 {
			continue
		}
		m, err := b.s.cat.Medium(ctx, p.Clone)
		if errors.Is(err, atoll.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m.State == catalog.MediumLive || m.State == catalog.MediumTrashed {
			out = append(out, &atollv1.Child{Name: m.Name, Id: m.ID.String(), Version: p.Version, Trashed: m.State == catalog.MediumTrashed})
		}
	}
	return out, nil
}

// UpdateVersion implements api.Versions.
func (b *backend) UpdateVersion(ctx context.Context, r *atollv1.UpdateVersionRequest) (*atollv1.Version, error) {
	rec, spec, err := b.findVersion(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsUpdate); done {
		return out, err
	}
	var out *atollv1.Version
	err = b.use(ctx, rec, func(o *openVolume) error {
		if err := o.vol.Settled(ctx); err != nil {
			return err
		}
		v, err := resolve(o, spec)
		if err != nil {
			return err
		}
		err = o.medium.Edit(ctx, func(st *medium.State) error {
			x := st.Find(v.Number)
			if x == nil || x.Hidden() {
				return fmt.Errorf("version %d: %w", v.Number, atoll.ErrNotExist)
			}
			change(x, r)
			v = *x
			return nil
		})
		out = versionMessage(rec, o.state(), v, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// change applies a request to a version.
func change(v *medium.Version, r *atollv1.UpdateVersionRequest) {
	if r.NewName != nil {
		v.Name = *r.NewName
	}
	if r.Memo != nil {
		v.Memo = *r.Memo
	}
	if r.Protected != nil {
		v.Flags &^= medium.FlagProtected
		if *r.Protected {
			v.Flags |= medium.FlagProtected
		}
	}
}

// DeleteVersion implements api.Versions.
func (b *backend) DeleteVersion(ctx context.Context, r *atollv1.DeleteVersionRequest) (*atollv1.DeleteVersionResponse, error) {
	name, spec, err := splitSpec(r.Name)
	switch {
	case err != nil:
	case spec.IsZero() && strings.Contains(r.Name, "@"):
		err = api.WithHint(fmt.Errorf("delete %q: that is the present state of the volume, no version: %w", r.Name, atoll.ErrInvalid),
			fmt.Sprintf("%q shows its versions", "atoll volume versions "+name))
	case spec.IsZero() != r.All:
		err = fmt.Errorf("delete %q: want NAME@VERSION for one version, or NAME for all: %w", r.Name, atoll.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsDelete); done {
		return out, err
	}
	out := &atollv1.DeleteVersionResponse{}
	err = b.use(ctx, rec, func(o *openVolume) error {
		list := visible(o.state())
		if !r.All {
			v, err := resolve(o, spec)
			if err != nil {
				return err
			}
			list = []medium.Version{v}
		}
		return b.deleteVersions(ctx, o, list, r.DryRun, out)
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// deleteVersions deletes some versions, or none if one of them is protected.
func (b *backend) deleteVersions(ctx context.Context, o *openVolume, list []medium.Version, dryRun bool, out *atollv1.DeleteVersionResponse) error {
	for _, v := range list {
		if v.Flags&medium.FlagProtected != 0 {
			return api.WithHint(fmt.Errorf("version %s of volume %q is protected: %w", versionLabel(v), o.name, atoll.ErrBusy), "take the protection away first")
		}
	}
	for _, v := range list {
		if dryRun {
			if _, unique, err := o.vol.Usage(ctx, v.Number); err == nil {
				out.Bytes += max(0, unique)
			}
		} else if err := o.vol.DeleteVersion(ctx, v.Number); err != nil {
			return err
		}
		out.Versions++
	}
	return nil
}

// ReleaseVersion implements api.Versions.
func (b *backend) ReleaseVersion(ctx context.Context, r *atollv1.ReleaseVersionRequest) (*atollv1.Version, error) {
	name, spec, err := splitSpec(r.Name)
	if err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsRelease); done {
		return out, err
	}
	var out *atollv1.Version
	err = b.use(ctx, rec, func(o *openVolume) error {
		v, err := medium.Version{}, error(nil)
		if spec.IsZero() {
			v, err = o.vol.Backup(ctx, volume.BackupOptions{Props: versionProps(rec, nil)})
		} else {
			v, err = resolve(o, spec)
		}
		if err == nil {
			err = o.vol.Settled(ctx)
		}
		if err != nil {
			return err
		}
		err = o.medium.Edit(ctx, func(st *medium.State) error {
			if x := st.Find(v.Number); x == nil || x.Hidden() {
				return fmt.Errorf("version %d: %w", v.Number, atoll.ErrNotExist)
			}
			st.Release = v.Number
			return nil
		})
		out = versionMessage(rec, o.state(), v, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// RestoreVersion implements api.Versions.
func (b *backend) RestoreVersion(ctx context.Context, r *atollv1.RestoreVersionRequest) (*atollv1.RestoreVersionResponse, error) {
	rec, spec, err := b.findVersion(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsRestore); done {
		return out, err
	}
	out := &atollv1.RestoreVersionResponse{}
	err = b.use(ctx, rec, func(o *openVolume) error {
		defer b.s.metrics.timed("restore")()
		v, err := resolve(o, spec)
		if err != nil {
			return err
		}
		if r.Backup {
			saved, err := o.vol.Backup(ctx, volume.BackupOptions{Memo: "before the restore of " + versionLabel(v), Props: versionProps(rec, nil)})
			if err != nil {
				return err
			}
			out.Saved = versionMessage(rec, o.state(), saved, nil)
		}
		if err := o.vol.Restore(ctx, v.Number); err != nil {
			return err
		}
		out.Version = versionMessage(rec, o.state(), v, nil)
		return nil
	})
	if err != nil {
		return nil, err
	}
	b.s.log.Info("volume restored", "medium", rec.ID, "name", rec.Name, "ver", out.Version.Number)
	return out, nil
}
