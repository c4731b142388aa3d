package cli

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
)

// snapCommand is "atoll snap", the same as "atoll volume snap".
func (a *App) snapCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snap", Aliases: []string{"snapshot"}, Short: "Make and use versions of volumes", GroupID: "use"}
	a.addSnapVerbs(cmd)
	return cmd
}

func (a *App) volumeSnap() *cobra.Command {
	cmd := &cobra.Command{Use: "snap", Aliases: []string{"snapshot"}, Short: "Make and use versions, under rbd's names"}
	a.addSnapVerbs(cmd)
	return cmd
}

func (a *App) addSnapVerbs(cmd *cobra.Command) {
	list := a.volumeVersions()
	list.Use, list.Aliases, list.Short, list.Example = "ls NAME", []string{"list"}, "List the versions of a volume", "  atoll snap ls disk1"
	cmd.AddCommand(a.snapCreate(), list, a.snapRemove(), a.snapPurge(), a.snapRename(), a.snapRollback(), a.snapProtect(true), a.snapProtect(false))
	for _, c := range cmd.Commands() {
		c.ValidArgsFunction = a.completeArgs
	}
}

// volumeBackup is "atoll volume backup".
func (a *App) volumeBackup() *cobra.Command {
	var req atollv1.CreateVersionRequest
	cmd := &cobra.Command{
		Use:   "backup NAME[@NEW]...",
		Short: "Record the present state as a version",
		Long: `Record the present state of a volume as a version (a snapshot), without copying
anything and while it is in use. A version has a number, and a name if you give
it one. Several volumes are recorded at one and the same point.

The version is durable when backup returns. In a guest's file system, flush or
freeze first what the guest has only in memory.`,
		Example: "  atoll volume backup disk1 -m \"before the upgrade\"\n  atoll volume backup disk1@monday\n  atoll volume backup data logs --name nightly",
		Args:    someArgs("the name of at least one volume"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.backup(cmd, args, &req)
		},
	}
	cmd.Flags().StringVar(&req.Name, "name", "", "name of the version")
	cmd.Flags().StringVarP(&req.Memo, "memo", "m", "", "a remark")
	cmd.Flags().BoolVar(&req.Protected, "protect", false, "refuse to delete it until \"snap unprotect\"")
	return cmd
}

func (a *App) snapCreate() *cobra.Command {
	var req atollv1.CreateVersionRequest
	cmd := &cobra.Command{
		Use:     "create NAME@NEW...",
		Aliases: []string{"add"},
		Short:   "Record the present state as a version",
		Example: "  atoll snap create disk1@monday\n  atoll snap create data@nightly logs@nightly",
		Args:    someArgs("NAME@NEW, as in: atoll snap create disk1@monday"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.backup(cmd, args, &req)
		},
	}
	cmd.Flags().StringVar(&req.Name, "snap", "", "name of the version, instead of NAME@NEW")
	cmd.Flags().StringVarP(&req.Memo, "memo", "m", "", "a remark")
	cmd.Flags().BoolVar(&req.Protected, "protect", false, "refuse to delete it until \"snap unprotect\"")
	return cmd
}

// backup makes versions of one or more volumes at one point.
func (a *App) backup(cmd *cobra.Command, args []string, req *atollv1.CreateVersionRequest) error {
	for _, arg := range args {
		s, err := parseSpec(arg)
		if err != nil {
			return err
		}
		if s.version != "" && req.Name != "" && s.version != req.Name {
			return usagef("versions made together have one name; got %q and %q", req.Name, s.version)
		}
		if s.version != "" {
			req.Name = s.version
		}
		req.Media = append(req.Media, s.name)
	}
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		began := time.Now()
		r, err := c.Versions.CreateVersion(ctx, connect.NewRequest(req))
		if err != nil {
			return a.didYouMean(ctx, c, req.Media[0], err)
		}
		took := time.Since(began)
		return showList(a, r.Msg, r.Msg.Versions, func() {
			for _, v := range r.Msg.Versions {
				fmt.Fprintf(a.Out, "%s@%s  version %d, %s\n", v.Medium, versionName(v), v.Number, took.Round(100*time.Microsecond))
			}
		})
	})
}

func (a *App) volumeVersions() *cobra.Command {
	var all, unique bool
	cmd := &cobra.Command{
		Use:   "versions NAME",
		Short: "List the versions of a volume",
		Long: `List the versions of a volume, oldest first. USED is what a version holds; with
--unique, UNIQUE is what only it holds: what deleting it would give back.`,
		Example: "  atoll volume versions disk1 --unique",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := parseSpec(args[0])
			if err != nil {
				return err
			}
			if s.version != "" {
				return usagef("%q names a version; want a volume, to list all its versions", args[0])
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Versions.ListVersions(ctx, connect.NewRequest(&atollv1.ListVersionsRequest{Name: s.name, Exact: unique, All: all}))
				if err != nil {
					return a.didYouMean(ctx, c, s.name, err)
				}
				if !all {
					r.Msg.Versions = visible(r.Msg.Versions)
				}
				return showList(a, r.Msg, r.Msg.Versions, func() { a.printVersions(s.name, r.Msg, unique) })
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "also those that are being deleted, and internal ones")
	cmd.Flags().BoolVar(&unique, "unique", false, "count what only each version holds (takes longer)")
	return cmd
}

func (a *App) printVersions(name string, r *atollv1.ListVersionsResponse, unique bool) {
	if len(r.Versions) == 0 {
		a.hint("no versions yet; make one with: atoll volume backup %s", name)
		return
	}
	headers := []string{">#", "NAME", "TIME", ">SIZE", ">USED"}
	if unique {
		headers = append(headers, ">UNIQUE")
	}
	rows := make([][]string, 0, len(r.Versions))
	before := uint64(0)
	for _, v := range r.Versions {
		row := []string{fmt.Sprint(v.Number), orDash(v.Name), shortTime(v.Time.AsTime()), a.size(v.SizeBytes), a.size(v.UsedBytes)}
		if unique && v.UniqueBytes >= 0 {
			row = append(row, a.size(v.UniqueBytes))
		} else if unique {
			row = append(row, "-")
		}
		rows = append(rows, append(row, notes(v, r.CurParent, r.Last, before)))
		before = v.Number
	}
	a.clippedTable(append(headers, "NOTES"), rows)
}

// notes sums up what else is to be known of a version.
func notes(v *atollv1.Version, curParent, last, before uint64) string {
	var n []string
	add := func(yes bool, text string) {
		if yes {
			n = append(n, text)
		}
	}
	add(v.Last, "last")
	add(v.Release, "release")
	add(v.Protected, "protected")
	add(v.Deleting, "deleting")
	add(v.Internal, "internal")
	add(v.Number == curParent && curParent != last, "cur is from it")
	add(v.Parent != before && v.Parent != 0, fmt.Sprintf("from %d", v.Parent))
	add(len(v.Children) > 0, count(len(v.Children), "clone"))
	text := strings.Join(n, ", ")
	if v.Memo != "" && text != "" {
		return text + "; " + v.Memo
	}
	return text + v.Memo
}

// shortTime is a time in twelve columns, as ls shows it.
func shortTime(t time.Time) string {
	t = t.Local()
	if t.Year() != time.Now().Year() {
		return t.Format("Jan _2  2006")
	}
	return t.Format("Jan _2 15:04")
}

// clippedTable is table with the last column cut off at the width of a terminal.
func (a *App) clippedTable(headers []string, rows [][]string) {
	last := len(headers) - 1
	room := columns
	for i, h := range headers[:last] {
		w := utf8.RuneCountInString(strings.TrimPrefix(h, ">"))
		for _, r := range rows {
			w = max(w, utf8.RuneCountInString(r[i]))
		}
		room -= w + 2
	}
	for _, r := range rows {
		r[last] = clip(r[last], max(room, len(headers[last]), 10))
	}
	a.table(headers, rows)
}

// clip shortens text to n columns.
func clip(text string, n int) string {
	if utf8.RuneCountInString(text) <= n {
		return text
	}
	return string([]rune(text)[:n-1]) + "…"
}

func (a *App) snapRemove() *cobra.Command {
	var snap snapFlag
	var dry bool
	cmd := &cobra.Command{
		Use:     "rm NAME@VERSION...",
		Aliases: []string{"remove"},
		Short:   "Delete versions",
		Long: `Delete versions. Their room comes back in the background, as far as no other
version needs it. Clones of a version stay: its data live as long as they need
them. A protected version has to be unprotected first.`,
		Example: "  atoll snap rm disk1@monday\n  atoll snap rm disk1@3 disk1@4 -n",
		Args:    someArgs("NAME@VERSION, as in: atoll snap rm disk1@monday"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				for _, arg := range args {
					s, err := snap.version(arg)
					if err != nil {
						return err
					}
					if err := a.deleteVersions(ctx, c, s.String(), &atollv1.DeleteVersionRequest{Name: s.String(), DryRun: dry}); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	snap.add(cmd)
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be deleted")
	return cmd
}

// deleteVersions deletes and tells what it gives back.
func (a *App) deleteVersions(ctx context.Context, c *api.Client, what string, req *atollv1.DeleteVersionRequest) error {
	r, err := c.Versions.DeleteVersion(ctx, connect.NewRequest(req))
	if err != nil {
		return a.didYouMean(ctx, c, req.Name, err)
	}
	return a.show(r.Msg, func() {
		verb, room := "deleted", ""
		if req.DryRun {
			verb = "would delete"
		}
		if r.Msg.Bytes > 0 {
			room = fmt.Sprintf(" (%s in each copy)", a.size(r.Msg.Bytes))
		}
		fmt.Fprintf(a.Out, "%s %s%s\n", verb, what, room)
	})
}

func (a *App) snapPurge() *cobra.Command {
	var dry, yes bool
	cmd := &cobra.Command{
		Use:     "purge NAME",
		Short:   "Delete all versions of a volume but protected ones",
		Example: "  atoll snap purge disk1 -n\n  atoll snap purge disk1 --yes",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := parseSpec(args[0])
			if err != nil {
				return err
			}
			if !dry && !yes {
				ok, err := a.confirm("delete all versions of %s?", s.name)
				if err != nil || !ok {
					return err
				}
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				return a.purgeVersions(ctx, c, s.name, dry)
			})
		},
	}
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be deleted")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// purgeVersions deletes all versions that are not protected.
func (a *App) purgeVersions(ctx context.Context, c *api.Client, name string, dry bool) error {
	r, err := (&image{c: c, name: name}).list(ctx)
	if err != nil {
		return a.didYouMean(ctx, c, name, err)
	}
	kept := 0
	for _, v := range r.Versions {
		if v.Protected {
			kept++
			continue
		}
		if err := a.deleteVersions(ctx, c, name+"@"+versionName(v), &atollv1.DeleteVersionRequest{Name: numbered(name, v), DryRun: dry}); err != nil {
			return err
		}
	}
	if kept > 0 {
		a.hint("%s kept: protected", count(kept, "version"))
	}
	return nil
}

func (a *App) snapRename() *cobra.Command {
	return &cobra.Command{
		Use:     "rename NAME@VERSION NEW",
		Short:   "Give a version another name",
		Example: "  atoll snap rename disk1@3 before-upgrade\n  atoll snap rename disk1@monday disk1@tuesday",
		Args:    exactArgs(2, "NAME@VERSION and the new name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var none snapFlag
			s, err := none.version(args[0])
			if err != nil {
				return err
			}
			name := args[1]
			if vol, version, ok := strings.Cut(volumeName(name), "@"); ok {
				if name = version; vol != s.name {
					return usagef("a version cannot move to another volume; want %s@NEW", s.name)
				}
			}
			return a.updateVersion(cmd, &atollv1.UpdateVersionRequest{Name: s.String(), NewName: &name})
		},
	}
}

func (a *App) snapProtect(yes bool) *cobra.Command {
	var snap snapFlag
	use, short := "protect", "Refuse to delete a version"
	if !yes {
		use, short = "unprotect", "Allow a version to be deleted"
	}
	cmd := &cobra.Command{
		Use:   use + " NAME@VERSION",
		Short: short,
		Args:  exactArgs(1, "NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.version(args[0])
			if err != nil {
				return err
			}
			return a.updateVersion(cmd, &atollv1.UpdateVersionRequest{Name: s.String(), Protected: &yes})
		},
	}
	snap.add(cmd)
	return cmd
}

func (a *App) updateVersion(cmd *cobra.Command, req *atollv1.UpdateVersionRequest) error {
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Versions.UpdateVersion(ctx, connect.NewRequest(req))
		if err != nil {
			return a.didYouMean(ctx, c, req.Name, err)
		}
		return a.show(r.Msg, func() {
			text := ""
			if req.Protected != nil {
				text = "  not protected"
				if r.Msg.Protected {
					text = "  protected"
				}
			}
			fmt.Fprintf(a.Out, "%s@%s%s\n", r.Msg.Medium, versionName(r.Msg), text)
		})
	})
}

func (a *App) volumeRelease() *cobra.Command {
	return &cobra.Command{
		Use:   "release NAME[@VERSION]",
		Short: "Make a version the released one (NAME@release)",
		Long: `Make NAME@release mean this version. Without a version the present state is
recorded as one first.`,
		Example: "  atoll volume release disk1@monday\n  atoll volume release disk1",
		Args:    exactArgs(1, "NAME or NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := parseSpec(args[0])
			if err != nil {
				return err
			}
			if s.version == "" {
				s.version = versionCur
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Versions.ReleaseVersion(ctx, connect.NewRequest(&atollv1.ReleaseVersionRequest{Name: s.String()}))
				if err != nil {
					return a.didYouMean(ctx, c, s.String(), err)
				}
				return a.show(r.Msg, func() {
					fmt.Fprintf(a.Out, "%s@%s  released (version %d)\n", s.name, versionName(r.Msg), r.Msg.Number)
				})
			})
		},
	}
}

func (a *App) volumeRestore() *cobra.Command {
	var discard bool
	cmd := &cobra.Command{
		Use:   "restore NAME@VERSION",
		Short: "Take a volume back to a version",
		Long: `Take the working state of a volume back to a version, at once, whatever its
size. The present state is recorded as a version first, so this can be undone,
unless --discard is given. Later versions stay. Unmount and disconnect clients
first: what they have in memory is of the state that goes.`,
		Example: "  atoll volume restore disk1@monday\n  atoll volume restore disk1@last --discard",
		Args:    exactArgs(1, "NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var none snapFlag
			s, err := none.version(args[0])
			if err != nil {
				return err
			}
			return a.restore(cmd, s, !discard)
		},
	}
	cmd.Flags().BoolVar(&discard, "discard", false, "do not keep the present state")
	return cmd
}

func (a *App) snapRollback() *cobra.Command {
	var snap snapFlag
	cmd := &cobra.Command{
		Use:     "rollback NAME@VERSION",
		Aliases: []string{"revert"},
		Short:   "Take a volume back to a version; the present state is lost",
		Example: "  atoll snap rollback disk1@monday",
		Args:    exactArgs(1, "NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.version(args[0])
			if err != nil {
				return err
			}
			return a.restore(cmd, s, false)
		},
	}
	snap.add(cmd)
	return cmd
}

// restore takes a volume back to a version.
func (a *App) restore(cmd *cobra.Command, s spec, keep bool) error {
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Versions.RestoreVersion(ctx, connect.NewRequest(&atollv1.RestoreVersionRequest{Name: s.String(), Backup: keep}))
		if err != nil {
			return a.didYouMean(ctx, c, s.String(), err)
		}
		v, err := (&image{c: c, name: s.name}).volume(ctx)
		if err == nil {
			err = keepSize(ctx, c, s.name, v.Properties, exactSize(r.Msg.Version.Properties, r.Msg.Version.SizeBytes))
		}
		if err != nil {
			return err
		}
		return a.show(r.Msg, func() {
			fmt.Fprintf(a.Out, "%s is as it was in version %s of %s\n", s.name, versionName(r.Msg.Version), moment(r.Msg.Version.Time.AsTime()))
			if v := r.Msg.Saved; v != nil {
				a.hint("undo with: atoll volume restore %s@%s", s.name, versionName(v))
			}
		})
	})
}

// someArgs wants at least one argument.
func someArgs(want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef("want %s", want)
		}
		return nil
	}
}
