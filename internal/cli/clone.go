package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/transfer"
)

func (a *App) volumeClone() *cobra.Command {
	var req atollv1.CloneVersionRequest
	var snap snapFlag
	cmd := &cobra.Command{
		Use:   "clone NAME[@VERSION] NEW",
		Short: "Make a new volume that begins as a version of another",
		Long: `Make a new volume that begins as a version of another, at once and without
copying. Without a version, one of the present state is made. Nothing has to be
protected, and the parent may be deleted: its data live on as long as the clone
needs them. "volume flatten" makes the clone independent.`,
		Example: "  atoll volume clone disk1@monday rescue\n  atoll volume clone disk1 try-out",
		Args:    exactArgs(2, "NAME[@VERSION] and the new name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.spec(args[0])
			if err != nil {
				return err
			}
			req.Source, req.Name = s.String(), volumeName(args[1])
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				v, err := cloneVersion(ctx, c, &req)
				if err == nil {
					v, err = (&image{c: c, name: req.Name}).volume(ctx)
				}
				if err != nil {
					return a.didYouMean(ctx, c, s.String(), err)
				}
				return a.show(v, func() {
					fmt.Fprintf(a.Out, "%s: clone of %s, %s   %s\n", v.Name, parentOf(v, s.String()), a.size(v.SizeBytes), shellQuote(first(v.Urls)))
				})
			})
		},
	}
	snap.add(cmd)
	cmd.Flags().StringVar(&req.Cache, "cache", "", "cache mode, as in volume create")
	cmd.Flags().StringVar(&req.Owner, "owner", "", "owner of the clone (default: you)")
	return cmd
}

// cloneVersion clones, and takes along the layout that rbd's images have.
func cloneVersion(ctx context.Context, c *api.Client, req *atollv1.CloneVersionRequest) (*atollv1.Volume, error) {
	s, err := parseSpec(req.Source)
	if err != nil {
		return nil, err
	}
	m := image{c: c, name: s.name}
	vol, err := m.volume(ctx)
	if err != nil {
		return nil, err
	}
	props := map[string]string{}
	for _, key := range []string{propSize, propOrder, propFeatures, propStripeUnit, propStripeCount} {
		if value := vol.Properties[key]; value != "" {
			props[key] = value
		}
	}
	if s.version != "" && s.version != versionCur {
		r, err := m.list(ctx)
		if err != nil {
			return nil, err
		}
		v := findVersion(r, s.version)
		if v != nil && v.Properties[propSize] != "" {
			props[propSize] = v.Properties[propSize]
		}
	}
	for key, value := range req.Properties {
		props[key] = value
	}
	r, err := c.Versions.CloneVersion(ctx, connect.NewRequest(&atollv1.CloneVersionRequest{
		Source: req.Source, Name: req.Name, Owner: req.Owner, Cache: req.Cache, Properties: props}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

func parentOf(v *atollv1.Volume, or string) string {
	if v.Parent != "" {
		return v.Parent
	}
	return or
}

func (a *App) volumeFlatten() *cobra.Command {
	var background bool
	cmd := &cobra.Command{
		Use:   "flatten NAME",
		Short: "Copy what a clone shares with its parent",
		Long: `Copy what a clone shares with its parent, so that it needs the parent no more.
It is hardly ever needed: clones of any depth are as fast as their parents, and
parents may be deleted.`,
		Example: "  atoll volume flatten rescue\n  atoll volume flatten rescue --background; atoll task ls",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := volumeName(args[0])
			return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				r, err := c.Versions.Flatten(ctx, connect.NewRequest(&atollv1.FlattenRequest{Name: name}))
				if err != nil {
					return a.didYouMean(ctx, c, name, err)
				}
				task := r.Msg
				if !background {
					p := a.NewProgress(name, task.Total)
					task, err = waitTask(ctx, c, task, p.Add)
					p.Done()
					if err != nil {
						return err
					}
				}
				return a.show(task, func() {
					if background {
						fmt.Fprintf(a.Out, "task %s: %s\n", task.Id, task.What)
						return
					}
					fmt.Fprintf(a.Out, "%s is independent\n", name)
				})
			})
		},
	}
	cmd.Flags().BoolVar(&background, "background", false, "do not wait for it")
	return cmd
}

// States of a task.
const (
	taskRunning   = "running"
	taskFailed    = "failed"
	taskCancelled = "cancelled"
)

// waitTask waits until a task ends and tells add of what it has done.
func waitTask(ctx context.Context, c *api.Client, t *atollv1.Task, add func(int64)) (*atollv1.Task, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	told := int64(0)
	for {
		add(t.Done - told)
		told = t.Done
		switch t.State {
		case taskRunning, "":
		case taskFailed:
			return t, fmt.Errorf("%s: %s: %w", t.What, t.Error, atoll.ErrIO)
		case taskCancelled:
			return t, fmt.Errorf("%s: it was cancelled: %w", t.What, atoll.ErrConflict)
		default:
			return t, nil
		}
		select {
		case <-ctx.Done():
			return t, ctx.Err()
		case <-tick.C:
		}
		r, err := c.Tasks.GetTask(ctx, connect.NewRequest(&atollv1.GetTaskRequest{Id: t.Id}))
		if err != nil {
			return t, err
		}
		t = r.Msg
	}
}

func (a *App) volumeChildren() *cobra.Command {
	var deep bool
	var snap snapFlag
	cmd := &cobra.Command{
		Use:     "children NAME[@VERSION]",
		Short:   "List the clones of a volume or of a version",
		Example: "  atoll volume children disk1 --descendants",
		Args:    exactArgs(1, "NAME or NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.spec(args[0])
			if err != nil {
				return err
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Versions.ListChildren(ctx, connect.NewRequest(&atollv1.ListChildrenRequest{Name: s.String(), Descendants: deep}))
				if err != nil {
					return a.didYouMean(ctx, c, s.String(), err)
				}
				return showList(a, r.Msg, r.Msg.Children, func() {
					rows := make([][]string, 0, len(r.Msg.Children))
					for _, ch := range r.Msg.Children {
						state := ""
						if ch.Trashed {
							state = "in the trash"
						}
						rows = append(rows, []string{ch.Name, ch.Parent, state})
					}
					if len(rows) == 0 {
						a.hint("no clones")
						return
					}
					a.table([]string{"NAME", "OF", "STATE"}, rows)
				})
			})
		},
	}
	snap.add(cmd)
	cmd.Flags().BoolVar(&deep, "descendants", false, "also clones of clones")
	return cmd
}

func (a *App) volumeRename() *cobra.Command {
	var replace bool
	cmd := &cobra.Command{
		Use:     "rename NAME NEW",
		Aliases: []string{"mv"},
		Short:   "Give a volume another name or directory",
		Example: "  atoll volume rename disk1 archive/disk1",
		Args:    exactArgs(2, "a name and the new name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rename(cmd, volumeName(args[0]), volumeName(args[1]), replace)
		},
	}
	cmd.Flags().BoolVar(&replace, "replace", false, "move a volume of the new name to the trash")
	return cmd
}

func (a *App) rename(cmd *cobra.Command, from, to string, replace bool) error {
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Names.Rename(ctx, connect.NewRequest(&atollv1.RenameRequest{From: from, To: to, Replace: replace}))
		if err != nil {
			return a.didYouMean(ctx, c, from, err)
		}
		return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "%s is %s now\n", from, r.Msg.Path) })
	})
}

func (a *App) volumeCopy() *cobra.Command {
	var t transferFlags
	var history bool
	var snap snapFlag
	var req atollv1.CreateVolumeRequest
	cmd := &cobra.Command{
		Use:     "cp NAME[@VERSION] NEW",
		Aliases: []string{"copy"},
		Short:   "Copy a volume, with --history all its versions too",
		Long: `Copy a volume's data to a new volume that shares nothing with it. What is copied
is one consistent state, also while the volume is in use. With --history the
copy gets all versions. "volume clone" makes a copy at once, without copying.`,
		Example: "  atoll volume cp disk1@monday disk2\n  atoll volume cp disk1 archive/disk1 --history",
		Args:    exactArgs(2, "NAME[@VERSION] and the new name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.spec(args[0])
			if err != nil {
				return err
			}
			if history && s.version != "" {
				return usagef("--history copies all versions; name the volume alone: %s", s.name)
			}
			req.Name = volumeName(args[1])
			return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				p := a.NewProgress(s.name, 0)
				res, err := copyImage(ctx, c, s, &req, copyOptions{history, t, p.Reach})
				p.Done()
				if err != nil {
					return a.didYouMean(ctx, c, s.String(), err)
				}
				v, err := (&image{c: c, name: req.Name}).volume(ctx)
				if err != nil {
					return err
				}
				return a.show(v, func() {
					fmt.Fprintf(a.Out, "%s: %s copied, %s of data%s   %s\n", v.Name, a.size(res.Bytes), a.size(res.Data), withVersions(res.Versions), shellQuote(first(v.Urls)))
				})
			})
		},
	}
	t.add(cmd)
	snap.add(cmd)
	cmd.Flags().BoolVar(&history, "history", false, "copy all versions too")
	addCreateFlags(cmd, &req)
	return cmd
}

func withVersions(n int) string {
	if n == 0 {
		return ""
	}
	return ", " + count(n, "version")
}

type copyOptions struct {
	history  bool
	flags    transferFlags
	progress func(done, total int64)
}

// copyImage copies a volume through this process.
func copyImage(ctx context.Context, c *api.Client, s spec, req *atollv1.CreateVolumeRequest, o copyOptions) (transfer.Result, error) {
	src := &image{c: c, name: s.name, conns: o.flags.conns}
	dst := &maker{&image{c: c, name: req.Name, conns: o.flags.conns}, req}
	from := transfer.Image(headOnly{src, s.version})
	if o.history {
		from = src
	}
	r, w := io.Pipe()
	var res, in transfer.Result
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		res, err = transfer.ExportImage(ctx, from, w, transfer.ExportOptions{Concurrency: o.flags.concurrency, Progress: o.progress})
		return errors.Join(err, w.CloseWithError(err))
	})
	g.Go(func() (err error) {
		in, err = transfer.ImportImage(ctx, dst, r, transfer.ImportOptions{Concurrency: o.flags.concurrency})
		return errors.Join(err, r.CloseWithError(err))
	})
	err := g.Wait()
	res.Versions = in.Versions
	return res, err
}
