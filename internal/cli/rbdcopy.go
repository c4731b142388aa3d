package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// cutLast splits a path at its last slash.
func cutLast(path string) (dir, name string, ok bool) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path, false
	}
	return path[:i], path[i+1:], true
}

// fromTo reads the two images of a command.
func (r *rbdCall) fromTo(rule int) (from, to spec, err error) {
	if from, err = r.image(rule); err == nil {
		to, err = r.dest(snapNone)
	}
	return from, to, err
}

// fromNew is fromTo for a command that makes the second image.
func (r *rbdCall) fromNew(rule int) (from, to spec, o *importOptions, err error) {
	if from, to, err = r.fromTo(rule); err == nil {
		o, err = r.newImage(to)
	}
	if err == nil {
		o.properties()
	}
	return from, to, o, err
}

func (r *rbdCall) rename() error {
	from, to, err := r.fromTo(snapNone)
	if err != nil {
		return err
	}
	if dir, _, ok := cutLast(from.name); ok && !strings.Contains(to.name, "/") && !r.has("dest-pool") {
		to.name = dir + "/" + to.name // in the same pool
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Names.Rename(ctx, connect.NewRequest(&atollv1.RenameRequest{From: from.name, To: to.name}))
		return fail("rename error", err)
	})
}

func (r *rbdCall) clone() error {
	from, to, o, err := r.fromNew(snapMust)
	if err != nil {
		return err
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		m, _, err := r.open(ctx, c, from)
		if err != nil {
			return err
		}
		v, err := m.snapOf(ctx, from.version)
		if err == nil {
			_, err = cloneVersion(ctx, c, &atollv1.CloneVersionRequest{Source: numbered(from.name, v), Name: to.name, Properties: o.req.Properties})
		}
		return fail("clone error", err)
	})
}

func (r *rbdCall) children() error {
	return r.with(snapMay, func(ctx context.Context, c *api.Client, s spec, m *image, _ *atollv1.Volume) error {
		source := s.name
		if s.version != "" {
			v, err := m.snapOf(ctx, s.version)
			if err != nil {
				return err
			}
			source = numbered(s.name, v)
		}
		resp, err := c.Versions.ListChildren(ctx, connect.NewRequest(&atollv1.ListChildrenRequest{Name: source, Descendants: r.has("descendants")}))
		if err != nil {
			return fail("listing children failed", err)
		}
		out := list{of: "child"}
		for _, ch := range resp.Msg.Children {
			if ch.Trashed && !r.has("all") {
				continue
			}
			pool, namespace, image := rbdPlace(ch.Name)
			rec := record{{"pool", pool}, {"pool_namespace", namespace}, {"image", image}}
			rec.add(ch.Trashed, "id", ch.Id)
			rec.add(ch.Trashed, "trash", true)
			if out.items = append(out.items, rec); !r.structured() {
				fmt.Fprintln(r.Out, rbdFull(ch.Name)+map[bool]string{true: " (trash " + ch.Id + ")"}[ch.Trashed])
			}
		}
		if r.structured() {
			return r.emit("children", out)
		}
		return nil
	})
}

func (r *rbdCall) flatten() error {
	return r.with(snapNone, func(ctx context.Context, c *api.Client, s spec, _ *image, v *atollv1.Volume) error {
		p := r.percent("Image flatten")
		if v.Parent == "" {
			return finish(p, "flatten error", rbdInvalid("flatten error: (22) Invalid argument\n  → image has no parent"))
		}
		resp, err := c.Versions.Flatten(ctx, connect.NewRequest(&atollv1.FlattenRequest{Name: s.name}))
		if err == nil {
			task, done := resp.Msg, int64(0)
			_, err = waitTask(ctx, c, task, func(n int64) {
				done += n
				p.Update(done, max(task.Total, done+1))
			})
		}
		return finish(p, "flatten error", err)
	})
}

func (r *rbdCall) copy() error { return r.copyImage(false) }

func (r *rbdCall) deepCopy() error { return r.copyImage(true) }

func (r *rbdCall) copyImage(history bool) error {
	from, to, o, err := r.fromNew(snapMay)
	if err != nil {
		return err
	}
	return r.work(r.cmd.Context(), func(ctx context.Context, c *api.Client) error {
		m, _, err := r.open(ctx, c, from)
		if err != nil {
			return err
		}
		if from.version != "" {
			v, err := m.snapOf(ctx, from.version)
			if err != nil {
				return err
			}
			from.version = snapName(v)
		}
		text, what := "Image copy", "copy failed"
		if history {
			text, what = "Image deep copy", "deep copy failed"
		}
		p := r.percent(text)
		if _, err = (&image{c: c, name: to.name}).volume(ctx); err == nil {
			err = fmt.Errorf("volume %q: %w", to.name, atoll.ErrExist)
		} else if errors.Is(err, atoll.ErrNotExist) {
			_, err = copyImage(ctx, c, from, &o.req, copyOptions{history && from.version == "", r.flags(), p.Update})
		}
		return finish(p, what, err)
	})
}

func (r *rbdCall) sparsify() error {
	return r.with(snapNone, func(ctx context.Context, _ *api.Client, _ spec, m *image, _ *atollv1.Volume) error {
		p := r.percent("Image sparsify")
		_, err := sparsify(ctx, m, p.Update)
		return finish(p, "sparsify error", err)
	})
}
