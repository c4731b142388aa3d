package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
)

// open asks the server about an image; its error is rbd's.
func (r *rbdCall) open(ctx context.Context, c *api.Client, s spec) (*image, *atollv1.Volume, error) {
	m := &image{c: c, name: s.name, conns: r.flags().conns}
	v, err := m.volume(ctx)
	if err != nil {
		return nil, nil, fail("error opening image "+baseName(s.name), r.didYouMean(ctx, c, s.name, err))
	}
	return m, v, nil
}

// with runs fn with the image that the command line names.
func (r *rbdCall) with(snap int, fn func(ctx context.Context, c *api.Client, s spec, m *image, v *atollv1.Volume) error) error {
	s, err := r.image(snap)
	if err != nil {
		return err
	}
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		m, v, err := r.open(ctx, c, s)
		if err != nil {
			return err
		}
		return fn(ctx, c, s, m, v)
	})
}

// errNoSnap is what rbd says about a snapshot that is not there.
var errNoSnap = &rbdFailure{int(syscall.ENOENT), "error setting snapshot context: (2) No such file or directory"}

// snapOf finds a version; errNoSnap if it is not there.
func (m *image) snapOf(ctx context.Context, name string) (*atollv1.Version, error) {
	r, err := m.list(ctx)
	if err != nil {
		return nil, err
	}
	v := findSnap(r, name)
	if v == nil {
		return nil, errNoSnap
	}
	return v, nil
}

// numbered names a version by its number, which has no second meaning.
func numbered(name string, v *atollv1.Version) string { return fmt.Sprintf("%s@%d", name, v.Number) }

// layout reads the options of verbs that make an image.
func (r *rbdCall) layout() (*layoutFlags, error) {
	l := &layoutFlags{stripeUnit: r.option("stripe-unit"), features: r.opts["image-feature"]}
	var err error
	if l.order, err = r.number("order"); err != nil {
		return nil, err
	}
	if l.stripeCount, err = r.number("stripe-count"); err != nil {
		return nil, err
	}
	for name, to := range map[string]*string{"object-size": &l.objectSize, "stripe-unit": &l.stripeUnit} {
		if r.has(name) {
			n, err := r.size(name, 1)
			if err != nil {
				return nil, err
			}
			*to = fmt.Sprintf("%dB", n)
		}
	}
	if _, err := featureMask(l.features); err != nil {
		return nil, &rbdFailure{1, "the argument for option '--image-feature' is invalid"}
	}
	if l.order != 0 && (l.order < 12 || l.order > 25) {
		return nil, &rbdFailure{1, "the argument for option '--order' is invalid"}
	}
	return l, nil
}

// newImage is what a verb makes: an image of exactly size bytes.
func (r *rbdCall) newImage(s spec) (*importOptions, error) {
	l, err := r.layout()
	if err != nil {
		return nil, err
	}
	o := &importOptions{req: atollv1.CreateVolumeRequest{Name: s.name}, exact: true, empty: true}
	if o.layout, err = l.override(); err != nil {
		return nil, rbdInvalid("%v", err)
	}
	return o, nil
}

func (r *rbdCall) create() error {
	s, err := r.image(snapNone)
	if err != nil {
		return err
	}
	if !r.has("size") {
		return rbdInvalid("must specify --size <M/G/T>")
	}
	size, err := r.size("size", 1<<20)
	if err != nil {
		return err
	}
	o, err := r.newImage(s)
	if err != nil {
		return err
	}
	o.properties()
	o.req.SizeBytes = roundUp(size)
	if size != o.req.SizeBytes {
		if o.req.Properties == nil {
			o.req.Properties = map[string]string{}
		}
		o.req.Properties[propSize] = fmt.Sprint(size)
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Volumes.CreateVolume(ctx, connect.NewRequest(&o.req))
		return fail("create error", err)
	})
}

func (r *rbdCall) list() error {
	pool, namespace := r.option("pool"), r.option("namespace")
	if p := r.take(); p != "" {
		pool, namespace = p, ""
	}
	dir := rbdDir(pool, namespace)
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		names, err := r.imagesIn(ctx, c, dir)
		if errors.Is(err, atoll.ErrNotExist) {
			fmt.Fprintf(r.Err, "rbd: error opening pool '%s': (2) No such file or directory\n", pool)
		}
		switch {
		case err != nil:
			return fail("listing images failed", err)
		case r.has("long"):
			return r.listLong(ctx, c, names)
		case r.structured():
			out := list{of: "name"}
			for _, n := range names {
				out.items = append(out.items, baseName(n))
			}
			return r.emit("images", out)
		}
		for _, n := range names {
			fmt.Fprintln(r.Out, baseName(n))
		}
		return nil
	})
}

// imagesIn lists the volumes of a directory.
func (r *rbdCall) imagesIn(ctx context.Context, c *api.Client, dir string) ([]string, error) {
	entries, err := listTree(ctx, c, dir, false)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Kind == "volume" {
			names = append(names, e.Path)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (r *rbdCall) listLong(ctx context.Context, c *api.Client, names []string) error {
	var rows [][]string
	out := list{of: "image"}
	for _, name := range names {
		m := &image{c: c, name: name}
		v, err := m.volume(ctx)
		if errors.Is(err, atoll.ErrNotExist) {
			continue // it went away meanwhile
		}
		if err != nil {
			return fail("listing images failed", err)
		}
		versions, err := m.list(ctx)
		if err != nil {
			return fail("listing images failed", err)
		}
		size := exactSize(v.Properties, v.SizeBytes)
		rec := record{{"image", baseName(name)}, {"id", rbdID(v)}, {"size", size}}
		parent := ""
		if v.Parent != "" {
			parent = rbdFull(v.Parent)
			rec = append(rec, field{"parent", parentRecord(v)})
		}
		out.items = append(out.items, append(rec, field{"format", 2}))
		rows = append(rows, []string{baseName(name), rbdSize(size), parent, "2", "", ""})
		for _, s := range versions.Versions {
			size := exactSize(s.Properties, s.SizeBytes)
			rec := record{{"image", baseName(name)}, {"id", rbdID(v)}, {"snapshot", snapName(s)}, {"snapshot_id", s.Number}, {"size", size}, {"format", 2}}
			rec.add(s.Protected, "protected", "true")
			out.items = append(out.items, rec)
			rows = append(rows, []string{baseName(name) + "@" + snapName(s), rbdSize(size), "", "2", rbdYes(s.Protected), ""})
		}
	}
	if r.structured() {
		return r.emit("images", out)
	}
	if len(rows) > 0 {
		textTable(r.Out, []string{"NAME", ">SIZE", "PARENT", ">FMT", "PROT", "LOCK"}, rows)
	}
	return nil
}

func rbdYes(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

// parentRecord tells of a volume's parent.
func parentRecord(v *atollv1.Volume) record {
	name, snap, _ := strings.Cut(v.Parent, "@")
	pool, namespace, image := rbdPlace(name)
	return record{{"pool", pool}, {"pool_namespace", namespace}, {"image", image}, {"snapshot", streamName(snap)}}
}

func (r *rbdCall) info() error {
	return r.with(snapMay, func(ctx context.Context, _ *api.Client, s spec, m *image, v *atollv1.Volume) error {
		size := exactSize(v.Properties, v.SizeBytes)
		versions, err := m.list(ctx) // of a volume that is not open they are not told otherwise
		if err != nil {
			return fail("error listing snapshots", err)
		}
		n := int32(len(versions.Versions))
		v.Versions = &n
		var snap *atollv1.Version
		if s.version != "" {
			if snap = findSnap(versions, s.version); snap == nil {
				return errNoSnap
			}
			size = exactSize(snap.Properties, snap.SizeBytes)
		}
		if r.structured() {
			return r.emit("image", infoRecord(v, snap, size))
		}
		r.printInfo(v, snap, size)
		return nil
	})
}

func objects(size, object int64) int64 { return (size + object - 1) / object }

func infoRecord(v *atollv1.Volume, snap *atollv1.Version, size int64) record {
	h := header(v.Properties)
	feats := list{of: "feature"}
	for _, f := range featureNames(h.Features) {
		feats.items = append(feats.items, f)
	}
	created := rbdTime(v.Created.AsTime())
	rec := record{{"name", baseName(v.Name)}, {"id", rbdID(v)}, {"size", size}, {"objects", objects(size, h.ObjectSize())}, {"order", h.Order},
		{"object_size", h.ObjectSize()}, {"snapshot_count", v.GetVersions()}, {"block_name_prefix", "rbd_data." + rbdID(v)}, {"format", 2}, {"features", feats},
		{"op_features", list{}}, {"flags", list{}}, {"create_timestamp", created}, {"access_timestamp", created}, {"modify_timestamp", created}}
	rec.add(snap != nil, "protected", fmt.Sprint(snap.GetProtected()))
	if v.Parent != "" {
		rec = append(rec, field{"parent", append(parentRecord(v), field{"trash", false}, field{"overlap", size})})
	}
	striped := h.Features&featureStriping != 0
	rec.add(striped, "stripe_unit", h.StripeUnit)
	rec.add(striped, "stripe_count", h.StripeCount)
	return rec
}

func (r *rbdCall) printInfo(v *atollv1.Volume, snap *atollv1.Version, size int64) {
	h := header(v.Properties)
	line := func(format string, args ...any) { fmt.Fprintf(r.Out, "\t"+format+"\n", args...) }
	created := rbdTime(v.Created.AsTime())
	fmt.Fprintf(r.Out, "rbd image '%s':\n", baseName(v.Name))
	line("size %s in %d objects", rbdSize(size), objects(size, h.ObjectSize()))
	line("order %d (%s objects)", h.Order, rbdSize(h.ObjectSize()))
	line("snapshot_count: %d", v.GetVersions())
	line("id: %s", rbdID(v))
	line("block_name_prefix: rbd_data.%s", rbdID(v))
	line("format: 2")
	line("features: %s", strings.Join(featureNames(h.Features), ", "))
	line("op_features: ")
	line("flags: ")
	line("create_timestamp: %s", created)
	line("access_timestamp: %s", created)
	line("modify_timestamp: %s", created)
	if snap != nil {
		line("protected: %s", map[bool]string{true: "True", false: "False"}[snap.Protected])
	}
	if v.Parent != "" {
		name, version, _ := strings.Cut(v.Parent, "@")
		line("parent: %s@%s", rbdFull(name), streamName(version))
		line("overlap: %s", rbdSize(size))
	}
	if h.Features&featureStriping != 0 {
		line("stripe unit: %s", rbdSize(int64(h.StripeUnit)))
		line("stripe count: %d", h.StripeCount)
	}
}

func (r *rbdCall) resize() error {
	if !r.has("size") {
		return rbdInvalid("must specify --size <M/G/T>")
	}
	size, err := r.size("size", 1<<20)
	if err != nil {
		return err
	}
	return r.with(snapNone, func(ctx context.Context, c *api.Client, s spec, _ *image, v *atollv1.Volume) error {
		if size < exactSize(v.Properties, v.SizeBytes) && !r.has("allow-shrink") {
			return rbdInvalid("shrinking an image is only allowed with the --allow-shrink flag")
		}
		var err error
		if roundUp(size) != v.SizeBytes {
			_, err = c.Volumes.ResizeVolume(ctx, connect.NewRequest(&atollv1.ResizeVolumeRequest{Name: s.name, SizeBytes: roundUp(size), Shrink: true}))
		}
		if err == nil {
			err = keepSize(ctx, c, s.name, v.Properties, size)
		}
		return finish(r.percent("Resizing image"), "resize error", err)
	})
}

func (r *rbdCall) remove() error {
	s, err := r.image(snapNone)
	if err != nil {
		return err
	}
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		p := r.percent("Removing image")
		versions, err := (&image{c: c, name: s.name}).list(ctx)
		if err == nil && len(versions.Versions) > 0 {
			err = &rbdFailure{int(syscall.ENOTEMPTY), "image has snapshots - these must be deleted with 'rbd snap purge' before the image can be removed."}
		}
		if err == nil {
			_, err = c.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: s.name}))
		}
		return finish(p, "delete error", err)
	})
}

// status shows the clients of an image; who they are is not known.
func (r *rbdCall) status() error {
	return r.with(snapNone, func(_ context.Context, _ *api.Client, _ spec, _ *image, v *atollv1.Volume) error {
		out := list{of: "watcher"}
		for i := range v.Connections {
			out.items = append(out.items, record{{"address", v.ServedBy}, {"client", i + 1}, {"cookie", i + 1}})
		}
		if r.structured() {
			return r.emit("status", record{{"watchers", out}})
		}
		if v.Connections == 0 {
			fmt.Fprintln(r.Out, "Watchers: none")
			return nil
		}
		fmt.Fprintln(r.Out, "Watchers:")
		for i := range v.Connections {
			fmt.Fprintf(r.Out, "\twatcher=%s client.%d cookie=%d\n", v.ServedBy, i+1, i+1)
		}
		return nil
	})
}

// mustExist is for verbs that have nothing to do but to look whether the image
// is there.
func (r *rbdCall) mustExist() error {
	return r.with(snapMay, func(context.Context, *api.Client, spec, *image, *atollv1.Volume) error { return nil })
}

// lockList shows the advisory locks of an image, of which there are none.
func (r *rbdCall) lockList() error {
	if err := r.mustExist(); err != nil {
		return err
	}
	return nothing("locks", "lock")(r)
}

// poolStats counts images and what they may take, also those in the trash.
func (r *rbdCall) poolStats() error {
	dir := r.poolDir()
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		var live, gone poolSum
		names, err := r.imagesIn(ctx, c, dir)
		for _, name := range names {
			m := &image{c: c, name: name}
			v, verr := m.volume(ctx)
			l, lerr := m.list(ctx)
			if err = errors.Join(verr, lerr); err != nil {
				break
			}
			live.add(exactSize(v.Properties, v.SizeBytes), len(l.Versions))
		}
		if err != nil {
			return fail("pool stats failed", err)
		}
		all, err := listTrash(ctx, c)
		if err != nil {
			return fail("pool stats failed", err)
		}
		for _, e := range all {
			if d, _, _ := cutLast(e.Path); d == dir {
				gone.add(e.SizeBytes, 0)
			}
		}
		if r.structured() {
			return r.emit("stats", record{{"images", live.record()}, {"trash", gone.record()}})
		}
		fmt.Fprintf(r.Out, "Total Images: %s\n", inTrash(fmt.Sprint(live.images), gone.images, fmt.Sprint(gone.images)))
		fmt.Fprintf(r.Out, "Total Snapshots: %d\n", live.snaps)
		fmt.Fprintf(r.Out, "Provisioned Size: %s\n", inTrash(rbdSize(live.bytes), gone.images, rbdSize(gone.bytes)))
		return nil
	})
}

// poolSum is what poolStats counts. Of those in the trash the snapshots are not
// known.
type poolSum struct {
	images, snaps int
	bytes         int64
}

func (p *poolSum) add(size int64, snaps int) {
	p.images, p.bytes, p.snaps = p.images+1, p.bytes+size, p.snaps+snaps
}

func (p *poolSum) record() record {
	return record{{"count", p.images}, {"provisioned_bytes", p.bytes}, {"snap_count", p.snaps}}
}

// inTrash adds to a figure what of it is in the trash, if anything is.
func inTrash(text string, n int, trash string) string {
	if n > 0 {
		text += " (" + trash + " in trash)"
	}
	return text
}

func (r *rbdCall) featureEnable() error  { return r.feature(true) }
func (r *rbdCall) featureDisable() error { return r.feature(false) }

// feature changes the features that are kept for exports.
func (r *rbdCall) feature(on bool) error {
	return r.with(snapNone, func(ctx context.Context, c *api.Client, s spec, _ *image, v *atollv1.Volume) error {
		if len(r.args) == 0 {
			return rbdInvalid("at least one feature name must be specified")
		}
		mask, err := featureMask(r.args)
		if err != nil {
			return rbdInvalid("%v", err)
		}
		h := header(v.Properties)
		if h.Features &^= mask; on {
			h.Features |= mask
		}
		value := fmt.Sprint(h.Features)
		if h.Features == rbdstream.DefaultFeatures {
			value = ""
		}
		_, err = c.Names.SetProperties(ctx, connect.NewRequest(&atollv1.SetPropertiesRequest{Path: s.name, Properties: map[string]string{propFeatures: value}}))
		return fail("failed to update image features", err)
	})
}
