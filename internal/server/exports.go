package server

import (
	"context"
	"fmt"
	"strings"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// What the NBD gateway offers:
//
//	NAME            a volume's working state, for reading and writing
//	NAME@VERSION    a version, for reading only, from any server
//	NAME@@IMPORT    a volume that an import is under way to, for that import

var (
	_ nbd.Exports       = (*volumeSet)(nil)
	_ nbd.ContextLister = (*volumeSet)(nil)
)

// splitName takes the name of an export apart.
func splitName(name string) (volume, version, staging string) {
	volume, rest, _ := strings.Cut(name, "@")
	if id, ok := strings.CutPrefix(rest, "@"); ok {
		return volume, "", id
	}
	if rest == "cur" {
		rest = ""
	}
	return volume, rest, ""
}

// stagingExport is the name of the export that an import writes to.
func stagingExport(name, id string) string { return name + "@@" + id }

// List implements nbd.Exports.
func (v *volumeSet) List(ctx context.Context) ([]nbd.ExportInfo, error) {
	var out []nbd.ExportInfo
	peeks := maxPeeks
	err := v.each(ctx, func(r catalog.Medium) {
		versions := v.listed(ctx, r, &peeks)
		out = append(out, nbd.ExportInfo{Name: r.Name, Description: describe(r, len(versions))})
		for _, x := range versions {
			out = append(out, nbd.ExportInfo{Name: r.Name + "@" + versionLabel(x), Description: describeVersion(r, x)})
		}
	})
	return out, err
}

// each calls fn for every live volume.
func (v *volumeSet) each(ctx context.Context, fn func(catalog.Medium)) error {
	for after := ""; ; {
		recs, err := v.s.cat.Media(ctx, after, 1000)
		if err != nil {
			return err
		}
		for _, r := range recs {
			if r.Kind == catalog.KindVolume && r.State == catalog.MediumLive {
				fn(r)
			}
		}
		if len(recs) < 1000 {
			return nil
		}
		after = recs[len(recs)-1].Name
	}
}

// count counts the live volumes.
func (v *volumeSet) count(ctx context.Context) (n int, err error) {
	err = v.each(ctx, func(catalog.Medium) { n++ })
	return n, err
}

// describe is a line about a volume for people.
func describe(r catalog.Medium, versions int) string {
	text := atoll.FormatSize(r.Size) + fmt.Sprintf(", %d copies", r.Policy.Replicas)
	switch {
	case versions == 1:
		text += ", 1 snapshot"
	case versions > 1:
		text += fmt.Sprintf(", %d snapshots", versions)
	}
	if d := r.Props[propDescription]; d != "" {
		text += ", " + d
	}
	return text
}

// exported finds the volume that a client names; the empty name means the only
// one there is.
func (v *volumeSet) exported(ctx context.Context, name string) (catalog.Medium, error) {
	if name != "" {
		return v.find(ctx, name)
	}
	var only catalog.Medium
	n := 0
	if err := v.each(ctx, func(r catalog.Medium) { only, n = r, n+1 }); err != nil {
		return only, err
	}
	if n != 1 {
		return catalog.Medium{}, fmt.Errorf("there are %d volumes; name one: %w", n, atoll.ErrNotExist)
	}
	return only, nil
}

// Stat implements nbd.Exports.
func (v *volumeSet) Stat(ctx context.Context, name string) (nbd.Info, error) {
	vol, version, _ := splitName(name)
	r, err := v.exported(ctx, vol)
	if err != nil {
		return nbd.Info{}, err
	}
	if version != "" {
		return v.statVersion(ctx, r, version)
	}
	return nbd.Info{Name: name, Description: describe(r, 0), Size: r.Size}, nil
}

// Open implements nbd.Exports.
func (v *volumeSet) Open(ctx context.Context, name string) (nbd.Device, nbd.Info, error) {
	vol, version, staging := splitName(name)
	r, err := v.exported(ctx, vol)
	if err != nil {
		return nil, nbd.Info{}, err
	}
	if version != "" {
		return v.openVersion(ctx, r, version)
	}
	o, err := v.acquire(ctx, r)
	if err != nil {
		return nil, nbd.Info{}, err
	}
	if err := v.enter(o, staging); err != nil {
		v.release(o)
		return nil, nbd.Info{}, err
	}
	info := nbd.Info{Name: name, Description: describe(r, 0), Size: o.vol.Size()}
	if name == "" {
		info.Name = r.Name
	}
	return o.dev, info, nil
}

// admit refuses others than an import that is under way.
func (v *volumeSet) admit(o *openVolume, staging string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.admitted(o, staging)
}

// enter is admit for a gateway's user, who is counted until Release.
func (v *volumeSet) enter(o *openVolume, staging string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	err := v.admitted(o, staging)
	if err == nil {
		o.users++
	}
	return err
}

// admitted is admit with v.mu held.
func (v *volumeSet) admitted(o *openVolume, staging string) error {
	switch s := o.staging; {
	case s == nil && staging != "":
		return fmt.Errorf("import %s to volume %q: %w", staging, o.name, atoll.ErrNotExist)
	case s != nil && (s.id != staging || s.begun):
		return api.WithHint(fmt.Errorf("volume %q is being imported to: %w", o.name, atoll.ErrBusy), "wait until the import has ended")
	}
	return nil
}

// Release implements nbd.Exports.
func (v *volumeSet) Release(dev nbd.Device) {
	v.mu.Lock()
	o, view := v.mu.devices[dev], v.mu.viewed[dev]
	if o != nil {
		o.users--
	}
	v.mu.Unlock()
	switch {
	case o != nil:
		v.release(o)
	case view != nil:
		v.releaseView(view)
	}
}
