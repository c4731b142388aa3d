package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (r *rbdCall) trashMove() error {
	s, err := r.image(snapNone)
	if err != nil {
		return err
	}
	req := &atollv1.MoveToTrashRequest{Name: s.name}
	if r.has("expires-at") {
		t, err := parseExpiry(r.option("expires-at"), time.Now())
		if err != nil {
			return rbdInvalid("the argument for option '--expires-at' is invalid")
		}
		req.Expires = timestamppb.New(t)
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Trash.MoveToTrash(ctx, connect.NewRequest(req))
		return fail("deferred delete error", err)
	})
}

// poolDir is the directory that a verb about a whole pool means.
func (r *rbdCall) poolDir() string {
	if p := r.take(); p != "" {
		return rbdDir(p, "")
	}
	return rbdDir(r.option("pool"), r.option("namespace"))
}

func (r *rbdCall) trashList() error {
	dir := r.poolDir()
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		all, err := listTrash(ctx, c)
		if err != nil {
			return fail("listing trash failed", err)
		}
		out := list{of: "trash"}
		var rows [][]string
		for _, e := range all {
			if d, _, _ := cutLast(e.Path); d != dir {
				continue
			}
			name, removed := baseName(e.Path), rbdTime(e.Removed.AsTime())
			rec := record{{"id", e.Id}, {"name", name}}
			if r.has("long") {
				rec = append(rec, field{"source", "USER"}, field{"deleted_at", removed}, field{"status", trashStatus(e)})
			}
			out.items = append(out.items, rec)
			rows = append(rows, []string{e.Id, name, "USER", removed, trashStatus(e), ""})
		}
		switch {
		case r.structured():
			return r.emit("trash", out)
		case r.has("long") && len(rows) > 0:
			textTable(r.Out, []string{"ID", "NAME", "SOURCE", "DELETED_AT", "STATUS", "PARENT"}, rows)
		case !r.has("long"):
			for _, row := range rows {
				fmt.Fprintln(r.Out, row[0]+" "+row[1])
			}
		}
		return nil
	})
}

func trashStatus(e *atollv1.TrashEntry) string {
	switch {
	case e.Expires == nil:
		return ""
	case e.Expires.AsTime().Before(time.Now()):
		return "expired at " + rbdTime(e.Expires.AsTime())
	}
	return "protected until " + rbdTime(e.Expires.AsTime())
}

// trashed reads which entry of the trash is meant; pool and namespace before an
// id mean nothing.
func (r *rbdCall) trashed(fn func(ctx context.Context, c *api.Client, e *atollv1.TrashEntry) error) error {
	id := r.option("image-id")
	if id == "" {
		id = baseName(r.take())
	}
	if id == "" {
		return rbdInvalid("image id was not specified")
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		e, err := findTrash(ctx, c, id)
		if err != nil {
			return fail("error opening image with id "+id, err)
		}
		return fn(ctx, c, e)
	})
}

func (r *rbdCall) trashRestore() error {
	as := r.option("image")
	delete(r.opts, "image")
	return r.trashed(func(ctx context.Context, c *api.Client, e *atollv1.TrashEntry) error {
		req := &atollv1.RestoreTrashRequest{Id: e.Id}
		if as != "" {
			dir, _, _ := cutLast(e.Path)
			req.NewPath = rbdPath(dir, as)
		}
		_, err := c.Trash.RestoreTrash(ctx, connect.NewRequest(req))
		return fail("restore error", err)
	})
}

func (r *rbdCall) trashRemove() error {
	return r.trashed(func(ctx context.Context, c *api.Client, e *atollv1.TrashEntry) error {
		p := r.percent("Removing image")
		if e.Expires != nil && e.Expires.AsTime().After(time.Now()) && !r.has("force") {
			fmt.Fprintf(r.Err, "Deferment time has not expired, please use --force if you really want to remove the image\n")
			return finish(p, "remove error", syscall.EPERM)
		}
		_, err := c.Trash.PurgeTrash(ctx, connect.NewRequest(&atollv1.PurgeTrashRequest{Id: e.Id}))
		return finish(p, "remove error", err)
	})
}

func (r *rbdCall) trashPurge() error {
	if r.has("threshold") {
		return unsupported("the trash is emptied by itself when room is short")(r)
	}
	before := time.Now()
	if r.has("expired-before") {
		t, err := parseExpiry(r.option("expired-before"), before)
		if err != nil {
			return rbdInvalid("the argument for option '--expired-before' is invalid")
		}
		before = t
	}
	dir := r.poolDir()
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		all, err := listTrash(ctx, c)
		p := r.percent("Removing images")
		for _, e := range all {
			d, _, _ := cutLast(e.Path)
			if err != nil || d != dir || e.Expires == nil || e.Expires.AsTime().After(before) {
				continue
			}
			_, err = c.Trash.PurgeTrash(ctx, connect.NewRequest(&atollv1.PurgeTrashRequest{Id: e.Id}))
		}
		return finish(p, "purge failed", err)
	})
}

// namespaceDir reads which namespace is meant.
func (r *rbdCall) namespaceDir() (string, error) {
	dir := ""
	if arg := r.take(); arg != "" {
		s, err := rbdSpec(arg)
		if err != nil {
			return "", err
		}
		dir = rbdPath(rbdDir(r.option("pool"), ""), s.name)
	} else {
		dir = rbdDir(r.option("pool"), r.option("namespace"))
	}
	if dir == "" {
		return "", rbdInvalid("namespace name was not specified")
	}
	return dir, nil
}

func (r *rbdCall) namespaceCreate() error {
	dir, err := r.namespaceDir()
	if err != nil {
		return err
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Names.MakeDirectory(ctx, connect.NewRequest(&atollv1.MakeDirectoryRequest{Path: dir}))
		return fail("failed to created namespace", err)
	})
}

func (r *rbdCall) namespaceRemove() error {
	dir, err := r.namespaceDir()
	if err != nil {
		return err
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Names.RemoveDirectory(ctx, connect.NewRequest(&atollv1.RemoveDirectoryRequest{Path: dir}))
		return fail("failed to remove namespace", err)
	})
}

func (r *rbdCall) namespaceList() error {
	dir := r.poolDir()
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		entries, err := listTree(ctx, c, dir, false)
		if err != nil {
			return fail("failed to list namespaces", err)
		}
		out := list{of: "namespace"}
		var rows [][]string
		for _, e := range entries {
			if e.Kind == kindDir {
				out.items = append(out.items, record{{"name", baseName(e.Path)}})
				rows = append(rows, []string{baseName(e.Path)})
			}
		}
		if r.structured() {
			return r.emit("namespaces", out)
		}
		if len(rows) > 0 {
			textTable(r.Out, []string{"NAME"}, rows)
		}
		return nil
	})
}

// poolInit makes the directory that a pool stands for.
func (r *rbdCall) poolInit() error {
	dir := r.poolDir()
	if dir == "" {
		return nil
	}
	return r.Call(r.cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Names.MakeDirectory(ctx, connect.NewRequest(&atollv1.MakeDirectoryRequest{Path: dir, Parents: true}))
		return fail("failed to initialize pool", err)
	})
}

// attachments lists what "map" and "volume attach" made on this machine.
func attachments() ([]attachment, error) {
	files, err := filepath.Glob(filepath.Join(attachDir(), "*.json"))
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	slices.Sort(files)
	var out []attachment
	for _, f := range files {
		name := strings.ReplaceAll(strings.TrimSuffix(filepath.Base(f), ".json"), "%", "/")
		if at, err := readAttachment(name); err == nil && alive(at.PID) {
			out = append(out, at)
		}
	}
	return out, nil
}

func (r *rbdCall) deviceList() error {
	all, err := attachments()
	if err != nil {
		return err
	}
	out := list{of: "device"}
	var rows [][]string
	for i, at := range all {
		s, err := parseSpec(at.Volume)
		if err != nil {
			return err
		}
		pool, namespace, name := rbdPlace(s.name)
		snap := "-"
		if s.version != "" {
			snap = s.version
		}
		id := strconv.Itoa(i)
		out.items = append(out.items, record{{"id", id}, {"pool", pool}, {"namespace", namespace}, {"name", name}, {"snap", snap}, {"device", at.Device}})
		rows = append(rows, []string{id, pool, namespace, name, snap, at.Device})
	}
	if r.structured() {
		return r.emit("devices", out)
	}
	if len(rows) > 0 {
		textTable(r.Out, []string{"id", "pool", "namespace", "image", "snap", "device"}, rows)
	}
	return nil
}

func (r *rbdCall) deviceMap() error {
	return r.with(snapMay, func(_ context.Context, _ *api.Client, s spec, _ *image, _ *atollv1.Volume) error {
		if os.Getuid() != 0 {
			return fail("map failed", syscall.EPERM)
		}
		var out bytes.Buffer
		app := *r.App
		app.Out, app.quiet, app.output = &out, true, "table"
		err := app.attach(r.cmd, s.String(), attachOptions{driver: driverAny, readOnly: r.has("read-only") || s.version != ""})
		if errors.Is(err, atoll.ErrExist) { // rbd maps again; here the device is there already
			at, rerr := readAttachment(s.String())
			if err = rerr; err == nil {
				fmt.Fprintln(&out, at.Device)
			}
		}
		if err != nil {
			return fail("map failed", err)
		}
		_, err = r.Out.Write(out.Bytes())
		return err
	})
}

func (r *rbdCall) deviceUnmap() error {
	arg := r.option("image")
	if arg == "" {
		arg = r.take()
	}
	if arg == "" {
		return rbdInvalid("unmap requires either image name or device path")
	}
	all, err := attachments()
	if err != nil {
		return err
	}
	s, err := rbdSpec(strings.TrimPrefix(arg, "/"))
	if err != nil {
		return err
	}
	if r.has("snap") {
		s.version = r.option("snap")
	}
	for _, at := range all {
		if at.Device == arg || at.Volume == s.String() || at.Volume == rbdPath(rbdDir(r.option("pool"), r.option("namespace")), s.String()) {
			return fail("unmap failed", detach(at))
		}
	}
	fmt.Fprintf(r.Err, "rbd: %s: not a mapped image or snapshot\n", arg)
	return fail("unmap failed", syscall.EINVAL)
}
