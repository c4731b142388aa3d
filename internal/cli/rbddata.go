package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/transfer"
)

// exportFormat reads --export-format.
func (r *rbdCall) exportFormat() (int, error) {
	switch r.option("export-format") {
	case "", "1":
		return 1, nil
	case "2":
		return 2, nil
	}
	return 0, &rbdFailure{1, "the argument for option '--export-format' is invalid"}
}

// imageToFile reads an image or snapshot and the file to write it to.
func (r *rbdCall) imageToFile() (s spec, path string, err error) {
	if s, err = r.image(snapMay); err == nil {
		path, err = r.path()
	}
	return s, path, err
}

// openState opens an image whose snapshot, if one is named, must be there.
func (r *rbdCall) openState(ctx context.Context, c *api.Client, s spec) (*image, error) {
	m, _, err := r.open(ctx, c, s)
	if err == nil && s.version != "" {
		_, err = m.snapOf(ctx, s.version)
	}
	return m, err
}

func (r *rbdCall) export() error {
	s, path, err := r.imageToFile()
	if err != nil {
		return err
	}
	format, err := r.exportFormat()
	if err != nil {
		return err
	}
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		m, err := r.openState(ctx, c, s)
		if err != nil {
			return err
		}
		p := r.percent("Exporting image")
		_, err = r.App.export(ctx, m, s, format, fileFlags{path: path}, transfer.ExportOptions{Concurrency: r.flags().concurrency, Progress: p.Update})
		if errors.Is(err, atoll.ErrExist) {
			p = nil // rbd says nothing of progress then
		}
		return finish(p, "export error", err)
	})
}

func (r *rbdCall) exportDiff() error {
	s, path, err := r.imageToFile()
	if err != nil {
		return err
	}
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		m, err := r.openState(ctx, c, s)
		if err != nil {
			return err
		}
		p := r.percent("Exporting image")
		err = r.write(fileFlags{path: path}, func(w io.Writer) error {
			_, err := transfer.ExportDiff(ctx, m, transfer.Diff{From: r.option("from-snap"), To: s.version, WholeObject: r.has("whole-object")}, w,
				transfer.ExportOptions{Concurrency: r.flags().concurrency, Progress: p.Update})
			return err
		})
		return finish(p, "export-diff error", err)
	})
}

// importAny is "rbd import" of both formats.
func (r *rbdCall) importAny() error {
	path, err := r.path()
	if err != nil {
		return err
	}
	if r.option("dest") == "" && len(r.args) == 0 && path != "-" {
		r.opts["dest"] = []string{filepath.Base(path)}
		if r.has("image") {
			r.opts["dest"] = r.opts["image"]
		}
	}
	if !r.has("dest-pool") && r.has("pool") {
		r.opts["dest-pool"] = r.opts["pool"]
	}
	to, err := r.dest(snapNone)
	if err != nil {
		return err
	}
	format, err := r.exportFormat()
	if err != nil {
		return err
	}
	o, err := r.newImage(to)
	if err != nil {
		return err
	}
	p := r.percent("Importing image")
	src, closeSrc, err := r.openSource(r.cmd.Context(), path)
	if err != nil {
		if errors.Is(err, atoll.ErrNotExist) {
			fmt.Fprintf(r.Err, "rbd: error opening %s\n", path)
		}
		return fail("import failed", err)
	}
	defer closeSrc()
	if format == 2 {
		err = r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
			_, err := transfer.ImportImage(ctx, &maker{&image{c: c, name: to.name, conns: r.flags().conns}, &o.req}, src.Reader, transfer.ImportOptions{
				Concurrency: r.flags().concurrency, Progress: p.Update, InputSize: max(src.size, 0), Override: o.layout})
			return err
		})
	} else {
		err = r.importPlain(src, o, p)
	}
	if errors.Is(err, atoll.ErrExist) {
		fmt.Fprintln(r.Err, "rbd: image creation failed")
	}
	return finish(p, "import failed", err)
}

// importPlain imports a raw image and keeps its exact size.
func (r *rbdCall) importPlain(src source, o *importOptions, p *transfer.Percent) error {
	quiet := *r.App
	quiet.quiet = true
	if src.size == 0 { // as rbd does
		return &rbdFailure{int(syscall.ENOTTY), "import failed: (25) Inappropriate ioctl for device\n  → the file is empty"}
	}
	_, _, err := quiet.importRaw(r.cmd, src, o, r.flags())
	if err == nil {
		p.Update(1, 1)
	}
	return err
}

func (r *rbdCall) importDiff() error {
	path, err := r.path()
	if err != nil {
		return err
	}
	return r.with(snapNone, func(ctx context.Context, _ *api.Client, _ spec, m *image, _ *atollv1.Volume) error {
		p := r.percent("Importing image diff")
		src, closeSrc, err := r.openSource(ctx, path)
		if err != nil {
			return fail("import-diff failed", err)
		}
		defer closeSrc()
		_, err = transfer.ImportDiff(ctx, target{m}, src.Reader, transfer.ImportOptions{
			Concurrency: r.flags().concurrency, Progress: p.Update, InputSize: max(src.size, 0)})
		return finish(p, "import-diff failed", err)
	})
}

func (r *rbdCall) mergeDiff() error {
	one, two := r.take(), r.take()
	switch {
	case one == "":
		return rbdInvalid("first diff was not specified")
	case two == "":
		return rbdInvalid("second diff was not specified")
	}
	path, err := r.path()
	if err != nil {
		return err
	}
	p := r.percent("Merging image diff")
	err = r.App.mergeDiff(r.cmd.Context(), one, two, fileFlags{path: path})
	return finish(p, "merge-diff error", err)
}

func (r *rbdCall) diff() error {
	return r.with(snapMay, func(ctx context.Context, c *api.Client, s spec, m *image, _ *atollv1.Volume) error {
		req := &atollv1.DiffRequest{Name: s.name}
		if s.version != "" {
			v, err := m.snapOf(ctx, s.version)
			if err != nil {
				return err
			}
			req.Name = numbered(s.name, v)
		}
		if from := r.option("from-snap"); from != "" {
			v, err := m.snapOf(ctx, from)
			if err != nil {
				return fail("diff error", syscall.ENOENT)
			}
			req.From = fmt.Sprint(v.Number)
		}
		out := list{of: "extent"}
		var rows [][]string
		err := diff(ctx, c, req, func(e *atollv1.Extent) bool {
			kind := map[bool]string{true: "zero", false: "data"}[e.Zero]
			out.items = append(out.items, record{{"offset", e.Offset}, {"length", e.Length}, {"exists", fmt.Sprint(!e.Zero)}})
			rows = append(rows, []string{fmt.Sprint(e.Offset), fmt.Sprint(e.Length), kind})
			return true
		})
		switch {
		case err != nil:
			return fail("diff error", err)
		case r.structured():
			return r.emit("extents", out)
		case len(rows) > 0:
			textTable(r.Out, []string{"Offset", "Length", "Type"}, rows)
		}
		return nil
	})
}

// usage is "rbd du": of an image, a snapshot, or all images of a pool.
func (r *rbdCall) usage() error {
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		var specs []spec
		if len(r.args) > 0 || r.has("image") {
			s, err := r.image(snapMay)
			if err != nil {
				return err
			}
			if _, _, err := r.open(ctx, c, s); err != nil {
				return err
			}
			specs = append(specs, s)
		} else {
			names, err := r.imagesIn(ctx, c, rbdDir(r.option("pool"), r.option("namespace")))
			if err != nil {
				return fail("du failed", err)
			}
			for _, n := range names {
				specs = append(specs, spec{name: n})
			}
		}
		var all []usage
		for _, s := range specs {
			u, err := volumeUsage(ctx, c, s)
			if errors.Is(err, atoll.ErrNotExist) && s.version != "" {
				return errNoSnap
			}
			if err != nil {
				return fail("du failed", err)
			}
			all = append(all, u...)
		}
		return r.printUsageRBD(all, len(specs) > 1 || len(all) > 1)
	})
}

func (r *rbdCall) printUsageRBD(all []usage, total bool) error {
	out := list{of: "image"}
	var rows [][]string
	var provisioned, used int64
	for _, u := range all {
		name := baseName(u.Name)
		rec := record{{"name", name}, {"id", u.ID}}
		snap := streamName(u.Snapshot)
		rec.add(u.Number != 0, "snapshot", snap)
		rec.add(u.Number != 0, "snapshot_id", u.Number)
		out.items = append(out.items, append(rec, field{"provisioned_size", u.Provisioned}, field{"used_size", u.Used}))
		if u.Number != 0 {
			name += "@" + snap
		} else {
			provisioned += u.Provisioned
		}
		used += u.Used
		rows = append(rows, []string{name, rbdSize(u.Provisioned), rbdSize(u.Used)})
	}
	if r.structured() {
		return r.emit("stats", record{{"images", out}})
	}
	if total {
		rows = append(rows, []string{"<TOTAL>", rbdSize(provisioned), rbdSize(used)})
	}
	textTable(r.Out, []string{"NAME", ">PROVISIONED", ">USED"}, rows)
	return nil
}

func (r *rbdCall) metaList() error {
	return r.with(snapNone, func(_ context.Context, _ *api.Client, _ spec, _ *image, v *atollv1.Volume) error {
		meta := header(v.Properties).Meta
		rec := record{}
		var rows [][]string
		for _, m := range meta {
			rec = append(rec, field{m.Key, m.Value})
			rows = append(rows, []string{m.Key, m.Value})
		}
		if r.structured() {
			return r.emit("metadatas", rec)
		}
		switch len(meta) {
		case 0:
			fmt.Fprintln(r.Out, "There are 0 metadata on this image.")
			return nil
		case 1:
			fmt.Fprint(r.Out, "There is 1 metadatum on this image:\n\n")
		default:
			fmt.Fprintf(r.Out, "There are %d metadata on this image:\n\n", len(meta))
		}
		textTable(r.Out, []string{"Key", "Value"}, rows)
		return nil
	})
}

// key reads the key that an image-meta or config verb names.
func (r *rbdCall) key() (string, error) {
	if k := r.take(); k != "" {
		return k, nil
	}
	return "", rbdInvalid("metadata key was not specified")
}

func (r *rbdCall) metaGet() error {
	return r.metaOf("", func(_ context.Context, _ *api.Client, _ spec, v *atollv1.Volume, key string) error {
		value, ok := v.Properties[propMeta+key]
		if !ok {
			fmt.Fprintf(r.Err, "failed to get metadata %s of image : (2) No such file or directory\n", key)
			return fail("getting metadata failed", syscall.ENOENT)
		}
		fmt.Fprintln(r.Out, value)
		return nil
	})
}

// metaOf runs fn with an image and the key that is named, behind a prefix.
func (r *rbdCall) metaOf(prefix string, fn func(ctx context.Context, c *api.Client, s spec, v *atollv1.Volume, key string) error) error {
	return r.with(snapNone, func(ctx context.Context, c *api.Client, s spec, _ *image, v *atollv1.Volume) error {
		key, err := r.key()
		if err != nil {
			return err
		}
		return fn(ctx, c, s, v, prefix+key)
	})
}

func (r *rbdCall) metaSet() error { return r.setMeta("") }

func (r *rbdCall) setMeta(prefix string) error {
	return r.metaOf(prefix, func(ctx context.Context, c *api.Client, s spec, _ *atollv1.Volume, key string) error {
		value := r.take()
		if value == "" {
			return rbdInvalid("metadata value was not specified")
		}
		if err := r.configLimit(ctx, c, s, key, value); err != nil {
			return fail("setting metadata failed", err)
		}
		_, err := c.Names.SetProperties(ctx, connect.NewRequest(&atollv1.SetPropertiesRequest{Path: s.name, Properties: map[string]string{propMeta + key: value}}))
		return fail("setting metadata failed", err)
	})
}

func (r *rbdCall) metaRemove() error { return r.removeMeta("") }

func (r *rbdCall) removeMeta(prefix string) error {
	return r.metaOf(prefix, func(ctx context.Context, c *api.Client, s spec, v *atollv1.Volume, key string) error {
		if _, ok := v.Properties[propMeta+key]; !ok {
			return fail("removing metadata failed", syscall.ENOENT)
		}
		if err := r.configLimit(ctx, c, s, key, "0"); err != nil {
			return fail("removing metadata failed", err)
		}
		_, err := c.Names.SetProperties(ctx, connect.NewRequest(&atollv1.SetPropertiesRequest{Path: s.name, Properties: map[string]string{propMeta + key: ""}}))
		return fail("removing metadata failed", err)
	})
}

// configPrefix is what the keys of overrides of settings begin with in
// image-meta.
const configPrefix = "conf_"

func (r *rbdCall) configSet() error    { return r.setMeta(configPrefix) }
func (r *rbdCall) configRemove() error { return r.removeMeta(configPrefix) }

func (r *rbdCall) configGet() error {
	return r.metaOf(configPrefix, func(_ context.Context, _ *api.Client, _ spec, v *atollv1.Volume, key string) error {
		value, ok := v.Properties[propMeta+key]
		if !ok {
			return &rbdFailure{int(syscall.ENOENT), strings.TrimPrefix(key, configPrefix) + " is not set"}
		}
		fmt.Fprintln(r.Out, value)
		return nil
	})
}

func (r *rbdCall) configList() error {
	return r.with(snapNone, func(_ context.Context, _ *api.Client, _ spec, _ *image, v *atollv1.Volume) error {
		out := list{of: "config"}
		var rows [][]string
		for _, m := range header(v.Properties).Meta {
			if key, ok := strings.CutPrefix(m.Key, configPrefix); ok {
				out.items = append(out.items, record{{"name", key}, {"value", m.Value}, {"source", "image"}})
				rows = append(rows, []string{key, m.Value, "image"})
			}
		}
		if r.structured() {
			return r.emit("options", out)
		}
		fmt.Fprintf(r.Out, "There are %d values:\n", len(rows))
		if len(rows) > 0 {
			textTable(r.Out, []string{"Name", "Value", "Source"}, rows)
		}
		return nil
	})
}

// configLimit makes rbd's settings of QoS limits of the volume.
func (r *rbdCall) configLimit(ctx context.Context, c *api.Client, s spec, key, value string) error {
	name, ok := strings.CutPrefix(key, configPrefix+"rbd_qos_")
	if !ok {
		return nil
	}
	kinds := map[string]string{"iops": "iops", "read_iops": "read-iops", "write_iops": "write-iops", "bps": "bytes", "read_bps": "read-bytes", "write_bps": "write-bytes"}
	for rbd, flag := range kinds {
		what, ok := strings.CutPrefix(name, rbd+"_")
		if !ok || what != "limit" && what != "burst" && what != "burst_seconds" {
			continue
		}
		n, err := (&rbdCall{opts: map[string][]string{"value": {value}}}).size("value", 1)
		if err != nil {
			return rbdInvalid("%s: %q is not a number", key, value)
		}
		return setLimit(ctx, c, s.name, flag, what, n)
	}
	return nil
}

// setLimit changes one number of one limit.
func setLimit(ctx context.Context, c *api.Client, name, flag, what string, n int64) error {
	v, err := (&image{c: c, name: name}).volume(ctx)
	if err != nil {
		return err
	}
	now, change := v.Limits, &atollv1.Limits{}
	if now == nil {
		now = &atollv1.Limits{}
	}
	for _, k := range limitKinds {
		if k.flag != flag {
			continue
		}
		l := &atollv1.Limit{}
		if old := *k.of(now); old != nil {
			l = &atollv1.Limit{Rate: old.Rate, Burst: old.Burst, BurstSeconds: old.BurstSeconds}
		}
		switch what {
		case "limit":
			l.Rate = n
		case "burst":
			l.Burst = n
		default:
			l.BurstSeconds = n
		}
		if l.Rate == 0 && what != "limit" {
			return nil // kept in image-meta; it means nothing before there is a limit
		}
		*k.of(change) = l
	}
	_, err = c.Names.SetLimits(ctx, connect.NewRequest(&atollv1.SetLimitsRequest{Name: name, Limits: change}))
	return err
}
