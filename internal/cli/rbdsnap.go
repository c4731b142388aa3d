package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (r *rbdCall) snapCreate() error {
	return r.with(snapMust, func(ctx context.Context, c *api.Client, s spec, _ *image, _ *atollv1.Volume) error {
		req := &atollv1.CreateVersionRequest{Media: []string{s.name}, Name: keptName(s.version)}
		p := r.percent("Creating snap")
		_, err := c.Versions.CreateVersion(ctx, connect.NewRequest(req))
		return finish(p, "failed to create snapshot", err)
	})
}

func (r *rbdCall) snapList() error {
	return r.with(snapNone, func(ctx context.Context, _ *api.Client, _ spec, m *image, _ *atollv1.Volume) error {
		resp, err := m.list(ctx)
		if err != nil {
			return fail("failed to list snapshots", err)
		}
		out := list{of: "snapshot"}
		var rows [][]string
		for _, v := range resp.Versions {
			size := exactSize(v.Properties, v.SizeBytes)
			out.items = append(out.items, record{{"id", v.Number}, {"name", snapName(v)}, {"size", size},
				{"protected", strconv.FormatBool(v.Protected)}, {"timestamp", rbdTime(v.Time.AsTime())}})
			row := []string{strconv.FormatUint(v.Number, 10), snapName(v), rbdSize(size), rbdYes(v.Protected), rbdTime(v.Time.AsTime())}
			if r.has("all") {
				row = append(row, "user")
			}
			rows = append(rows, row)
		}
		headers := []string{">SNAPID", "NAME", ">SIZE", "PROTECTED", "TIMESTAMP"}
		if r.has("all") {
			headers = append(headers, "NAMESPACE")
		}
		switch {
		case r.structured():
			return r.emit("snapshots", out)
		case len(rows) > 0:
			textTable(r.Out, headers, rows)
		}
		return nil
	})
}

func (r *rbdCall) snapRemove() error {
	return r.with(snapMust, func(ctx context.Context, c *api.Client, s spec, m *image, _ *atollv1.Volume) error {
		p := r.percent("Removing snap")
		v, err := m.snapOf(ctx, s.version)
		switch {
		case errors.Is(err, errNoSnap):
			err = fmt.Errorf("version %q: %w", s.version, atoll.ErrNotExist)
		case err != nil:
		case v.Protected:
			err = &rbdFailure{int(syscall.EBUSY), fmt.Sprintf("snapshot '%s' is protected from removal.", snapName(v))}
		default:
			_, err = c.Versions.DeleteVersion(ctx, connect.NewRequest(&atollv1.DeleteVersionRequest{Name: numbered(s.name, v)}))
		}
		return finish(p, "failed to remove snapshot", err)
	})
}

func (r *rbdCall) snapPurge() error {
	return r.with(snapNone, func(ctx context.Context, c *api.Client, s spec, m *image, _ *atollv1.Volume) error {
		resp, err := m.list(ctx)
		if err != nil {
			return fail("failed to list snapshots", err)
		}
		p := r.percent("Removing all snapshots")
		var kept []string
		for i, v := range resp.Versions {
			if v.Protected {
				kept = append(kept, "'"+snapName(v)+"'")
				continue
			}
			_, err := c.Versions.DeleteVersion(ctx, connect.NewRequest(&atollv1.DeleteVersionRequest{Name: numbered(s.name, v)}))
			if err != nil {
				return finish(p, "removing snaps failed", err)
			}
			p.Update(int64(i+1), int64(len(resp.Versions)))
		}
		if len(kept) > 0 {
			verb := map[bool]string{true: "is", false: "are"}[len(kept) == 1]
			fmt.Fprintf(r.Out, "rbd: error removing snapshot(s) %s, which %s protected - these must be unprotected with `rbd snap unprotect`.\n", strings.Join(kept, ", "), verb)
			p.Finish(atoll.ErrBusy)
			return nil
		}
		if len(resp.Versions) > 0 {
			p.Finish(nil)
		}
		return nil
	})
}

func (r *rbdCall) snapProtect() error   { return r.protect(true) }
func (r *rbdCall) snapUnprotect() error { return r.protect(false) }

func (r *rbdCall) protect(yes bool) error {
	what, already := "protecting snap failed", syscall.EBUSY
	if !yes {
		what, already = "unprotecting snap failed", syscall.EINVAL
	}
	return r.with(snapMust, func(ctx context.Context, c *api.Client, s spec, m *image, _ *atollv1.Volume) error {
		v, err := m.snapOf(ctx, s.version)
		switch {
		case errors.Is(err, errNoSnap):
			err = syscall.ENOENT
		case err != nil:
		case v.Protected == yes:
			err = already
		default:
			_, err = c.Versions.UpdateVersion(ctx, connect.NewRequest(&atollv1.UpdateVersionRequest{Name: numbered(s.name, v), Protected: &yes}))
		}
		return fail(what, err)
	})
}

func (r *rbdCall) snapRename() error {
	from, err := r.image(snapMust)
	if err != nil {
		return err
	}
	if r.option("dest") == "" && len(r.args) == 0 {
		r.opts["dest"] = []string{from.name}
	}
	to, err := r.dest(snapMust)
	if err != nil {
		return err
	}
	if baseName(to.name) != baseName(from.name) {
		return rbdInvalid("source and destination image name must be the same")
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		m, _, err := r.open(ctx, c, from)
		if err != nil {
			return err
		}
		v, err := m.snapOf(ctx, from.version)
		if err == nil {
			name := keptName(to.version)
			_, err = c.Versions.UpdateVersion(ctx, connect.NewRequest(&atollv1.UpdateVersionRequest{Name: numbered(from.name, v), NewName: &name}))
		} else if errors.Is(err, errNoSnap) {
			err = syscall.ENOENT
		}
		return fail("renaming snap failed", err)
	})
}

func (r *rbdCall) snapRollback() error {
	return r.with(snapMust, func(ctx context.Context, c *api.Client, s spec, m *image, vol *atollv1.Volume) error {
		p := r.percent("Rolling back to snapshot")
		v, err := m.snapOf(ctx, s.version)
		if errors.Is(err, errNoSnap) {
			err = syscall.ENOENT
		}
		if err == nil {
			_, err = c.Versions.RestoreVersion(ctx, connect.NewRequest(&atollv1.RestoreVersionRequest{Name: numbered(s.name, v)}))
		}
		if err == nil {
			err = keepSize(ctx, c, s.name, vol.Properties, exactSize(v.Properties, v.SizeBytes))
		}
		return finish(p, "rollback failed", err)
	})
}
