package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
)

// CloneVersion implements api.Versions.
func (b *backend) CloneVersion(ctx context.Context, r *atollv1.CloneVersionRequest) (*atollv1.Volume, error) {
	name, spec, err := splitSpec(r.Source)
	if err == nil {
		err = errors.Join(catalog.ValidateName(r.Name), checkCache(r.Cache), checkProps(nil, r.Properties))
	}
	if err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := b.checkParent(ctx, r.Name, r.NoParents); err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsClone); done {
		return out, err
	}
	var made catalog.Medium
	err = b.use(ctx, rec, func(o *openVolume) (err error) {
		defer b.s.metrics.timed("clone")()
		made, err = b.clone(ctx, o, rec, spec, r)
		return err
	})
	if err != nil {
		return nil, taken("clone "+r.Source+" to", r.Name, err)
	}
	b.s.log.Info("volume cloned", "medium", made.ID, "name", made.Name, "parent", rec.ID, "ver", made.Parent.Version)
	return b.describe(made), nil
}

// clone makes a clone of an open volume.
func (b *backend) clone(ctx context.Context, o *openVolume, rec catalog.Medium, spec medium.VersionSpec, r *atollv1.CloneVersionRequest) (catalog.Medium, error) {
	if _, err := b.s.cat.Entry(ctx, r.Name); err == nil { // before a version is made in vain
		return catalog.Medium{}, fmt.Errorf("clone %q to %q: %w", r.Source, r.Name, atoll.ErrExist)
	}
	var v medium.Version
	var err error
	if spec.IsZero() {
		v, err = o.vol.Backup(ctx, volume.BackupOptions{Memo: "for the clone " + shorten(r.Name), Props: versionProps(rec, nil)})
	} else {
		v, err = resolve(o, spec)
	}
	if err == nil {
		err = o.vol.Settled(ctx)
	}
	if err != nil {
		return catalog.Medium{}, err
	}
	m := catalog.Medium{
		Name: r.Name, Kind: catalog.KindVolume, Owner: cmp.Or(r.Owner, rec.Owner), Size: v.Size,
		Props: map[string]string{propCache: cmp.Or(r.Cache, rec.Props[propCache], cacheDefault)},
	}
	for k, p := range r.Properties {
		setProp(&m, k, p)
	}
	return medium.Clone(ctx, b.s.volumes.options(), o.medium, v.Number, m)
}

// shorten cuts a name for a memo.
func shorten(name string) string {
	if len(name) > 200 {
		return name[:200] + "…"
	}
	return name
}

// checkParent refuses a new name whose directory is missing when that is not to
// be made.
func (b *backend) checkParent(ctx context.Context, name string, noParents bool) error {
	if !noParents {
		return nil
	}
	_, err := b.s.cat.Entry(ctx, catalog.ParentPath(name))
	if err != nil {
		return api.WithHint(fmt.Errorf("directory of %q: %w", name, err), "make it first")
	}
	return nil
}

// Flatten implements api.Versions.
func (b *backend) Flatten(ctx context.Context, r *atollv1.FlattenRequest) (*atollv1.Task, error) {
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if rec.Parent == nil {
		return nil, fmt.Errorf("flatten volume %q, which is no clone: %w", r.Name, atoll.ErrInvalid)
	}
	if out, done, err := forward(ctx, b, rec, r, versionsFlatten); done {
		return out, err
	}
	for _, t := range b.s.tasks.list() {
		if m := t.message(); m.Kind == "flatten" && t.medium == rec.Name && m.State == taskRunning {
			return m, nil
		}
	}
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	if err := b.s.volumes.admit(o, ""); err != nil {
		b.s.volumes.release(o)
		return nil, err
	}
	t, err := b.startTask(&task{what: "flatten " + rec.Name, kind: "flatten", medium: rec.Name, unit: "bytes"}, func(ctx context.Context, t *task) error {
		defer b.s.volumes.release(o)
		return o.vol.Flatten(ctx, t.progress)
	})
	if err != nil {
		b.s.volumes.release(o)
		return nil, err
	}
	return t.message(), nil
}

// ListChildren implements api.Versions.
func (b *backend) ListChildren(ctx context.Context, r *atollv1.ListChildrenRequest) (*atollv1.ListChildrenResponse, error) {
	name, spec, err := splitSpec(r.Name)
	if err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	number := uint64(0)
	if !spec.IsZero() {
		if number, err = b.versionNumber(ctx, rec, spec); err != nil {
			return nil, err
		}
	}
	out := &atollv1.ListChildrenResponse{}
	return out, b.children(ctx, rec, number, r.Descendants, out, 0)
}

// versionNumber finds the number of a version without owning the volume.
func (b *backend) versionNumber(ctx context.Context, rec catalog.Medium, spec medium.VersionSpec) (uint64, error) {
	list, err := b.ListVersions(ctx, &atollv1.ListVersionsRequest{Name: rec.Name})
	if err != nil {
		return 0, err
	}
	for _, v := range list.Versions {
		if spec.Last && v.Last || spec.Release && v.Release || spec.Name != "" && v.Name == spec.Name || spec.Number == v.Number {
			return v.Number, nil
		}
	}
	return 0, fmt.Errorf("version %v of volume %q: %w", spec, rec.Name, atoll.ErrNotExist)
}

// maxDepth bounds how deep clones of clones are listed.
const maxDepth = 1000

// children adds the clones of a medium, of one version if number is not 0.
func (b *backend) children(ctx context.Context, rec catalog.Medium, number uint64, deep bool, out *atollv1.ListChildrenResponse, depth int) error {
	list, err := b.clones(ctx, rec.ID)
	if err != nil {
		return err
	}
	for _, c := range list {
		if number != 0 && c.Version != number {
			continue
		}
		c.Parent = fmt.Sprintf("%s@%d", rec.Name, c.Version)
		out.Children = append(out.Children, c)
		if !deep || depth == maxDepth {
			continue
		}
		id, err := atoll.ParseMediumID(c.Id)
		if err != nil {
			return err
		}
		if err := b.children(ctx, catalog.Medium{ID: id, Name: c.Name}, 0, true, out, depth+1); err != nil {
			return err
		}
	}
	return nil
}
