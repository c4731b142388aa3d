package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (a *App) volumeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Aliases: []string{"vol"}, Short: "Make and use block volumes", GroupID: "use"}
	cmd.AddGroup(&cobra.Group{ID: "vol", Title: "Volumes:"}, &cobra.Group{ID: "versions", Title: "Versions:"},
		&cobra.Group{ID: "data", Title: "Data:"}, &cobra.Group{ID: "device", Title: "Devices:"})
	for _, g := range []struct {
		id   string
		cmds []*cobra.Command
	}{
		{"vol", []*cobra.Command{a.volumeCreate(), a.volumeList(), a.volumeInfo(), a.volumeResize(), a.volumeRename(), a.volumeRemove(),
			a.volumeTrash(), a.volumeLimits(), a.volumeMeta(), a.volumeCheck()}},
		{"versions", []*cobra.Command{a.volumeBackup(), a.volumeVersions(), a.volumeSnap(), a.volumeRelease(), a.volumeRestore(),
			a.volumeClone(), a.volumeChildren(), a.volumeFlatten(), a.volumeSchedule()}},
		{"data", []*cobra.Command{a.volumeCopy(), a.volumeUsage(), a.volumeDiff(), a.volumeSparsify(), a.volumeImport(), a.volumeExport(),
			a.volumeExportDiff(), a.volumeImportDiff(), a.volumeMergeDiff(), a.volumeVerify()}},
		{"device", []*cobra.Command{a.volumeURL(), a.volumeAttach(), a.volumeDetach(), a.volumeBench()}},
	} {
		for _, c := range g.cmds {
			c.GroupID = g.id
			if !c.HasSubCommands() {
				c.ValidArgsFunction = a.completeArgs
			}
			cmd.AddCommand(c)
		}
	}
	return cmd
}

// volumeName takes the optional "vol/" prefix off.
func volumeName(arg string) string { return strings.TrimPrefix(arg, "vol/") }

func (a *App) volumeCreate() *cobra.Command {
	var req atollv1.CreateVolumeRequest
	var layout layoutFlags
	var sizeText string
	cmd := &cobra.Command{
		Use:     "create NAME SIZE",
		Short:   "Make a thin volume",
		Example: "  atoll volume create disk1 10G\n  atoll volume create fast 512M --replicas 2 --cache writethrough",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 2 && sizeText == "" {
				sizeText, args = args[1], args[:1]
			}
			if len(args) != 1 || sizeText == "" {
				return usagef("want a name and a size, as in: atoll volume create disk1 10G; got %s", count(len(args), "argument"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := parseSize(sizeText)
			if err != nil {
				return err
			}
			o := importOptions{}
			if o.layout, err = layout.override(); err != nil {
				return err
			}
			o.properties()
			req.Name, req.SizeBytes, req.Properties = volumeName(args[0]), size, o.req.Properties
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Volumes.CreateVolume(ctx, connect.NewRequest(&req))
				if err != nil {
					return err
				}
				v := r.Msg
				return a.show(v, func() {
					fmt.Fprintf(a.Out, "%s: %s, thin, %s   %s\n", v.Name, a.size(v.SizeBytes), plural(int(v.Replicas), "copy", "copies"), shellQuote(first(v.Urls)))
				})
			})
		},
	}
	cmd.Flags().Int32Var(&req.Replicas, "replicas", 0, "copies, 1 to 5 (default: 3, or as many as there are nodes)")
	cmd.Flags().StringVar(&req.Cache, "cache", "", "writeback (durable at FLUSH and FUA; the default) or writethrough (every write durable before its reply)")
	cmd.Flags().StringVar(&req.Description, "description", "", "a remark, shown in listings")
	cmd.Flags().StringVar(&sizeText, "size", "", "the size, instead of SIZE")
	cmd.Flags().StringVar(&req.Owner, "owner", "", "owner (default: you)")
	layout.add(cmd)
	return cmd
}

// listVolumes fetches all volumes.
func listVolumes(ctx context.Context, c *api.Client) ([]*atollv1.Volume, error) {
	var all []*atollv1.Volume
	for after := ""; ; {
		r, err := c.Volumes.ListVolumes(ctx, connect.NewRequest(&atollv1.ListVolumesRequest{After: after}))
		if err != nil {
			return nil, err
		}
		all = append(all, r.Msg.Volumes...)
		if after = r.Msg.Next; after == "" {
			return all, nil
		}
	}
}

// volume fetches one volume; open asks the server to open it. Of NAME@VERSION it
// makes what there would be to say of a volume that is that version.
func (a *App) volume(cmd *cobra.Command, name string, open bool) (v *atollv1.Volume, err error) {
	s, err := parseSpec(name)
	if err != nil {
		return nil, err
	}
	err = a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: s.name, Open: open}))
		if err != nil {
			return a.didYouMean(ctx, c, s.name, err)
		}
		if v = r.Msg; s.version == "" || s.version == versionCur {
			return nil
		}
		list, err := (&image{c: c, name: s.name}).list(ctx)
		if err != nil {
			return err
		}
		version := findVersion(list, s.version)
		if version == nil {
			return a.didYouMean(ctx, c, s.String(), fmt.Errorf("version %q of volume %q: %w", s.version, s.name, atoll.ErrNotExist))
		}
		v, err = asVolume(v, version)
		return err
	})
	return v, err
}

func (a *App) volumeResize() *cobra.Command {
	var shrink bool
	var sizeText string
	cmd := &cobra.Command{
		Use:     "resize NAME SIZE",
		Short:   "Grow a volume, or shrink it with --shrink",
		Example: "  atoll volume resize disk1 20G",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 2 && sizeText == "" {
				sizeText, args = args[1], args[:1]
			}
			if len(args) != 1 || sizeText == "" {
				return usagef("want a name and the new size, as in: atoll volume resize disk1 20G; got %s", count(len(args), "argument"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := parseSize(sizeText)
			if err != nil {
				return err
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Volumes.ResizeVolume(ctx, connect.NewRequest(&atollv1.ResizeVolumeRequest{Name: volumeName(args[0]), SizeBytes: size, Shrink: shrink}))
				if err != nil {
					return a.didYouMean(ctx, c, args[0], err)
				}
				if a.output != "table" {
					return a.json(r.Msg)
				}
				fmt.Fprintf(a.Out, "%s: %s\n", r.Msg.Name, a.size(r.Msg.SizeBytes))
				a.hint("clients see the new size when they connect again")
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&shrink, "shrink", false, "allow a smaller size; what lies beyond is lost, but for versions")
	cmd.Flags().BoolVar(&shrink, "allow-shrink", false, "the same, as rbd calls it")
	cmd.Flags().StringVar(&sizeText, "size", "", "the size, instead of SIZE")
	_ = cmd.Flags().MarkHidden("allow-shrink") // fails only for a flag that is not there
	return cmd
}

func (a *App) volumeRemove() *cobra.Command {
	var dry, yes, now bool
	cmd := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"remove", "delete"},
		Short:   "Move volumes to the trash, or with --now delete them for good",
		Long: `Move volumes with all their versions to the trash, from where they come back
with "atoll volume trash restore" until they expire. With --now they are deleted
for good and their room is free soon; -n shows what would go. Clones stay.`,
		Example: "  atoll volume rm disk1\n  atoll volume rm disk1 -n\n  atoll volume rm disk1 --now --yes",
		Args:    someArgs("the name of at least one volume"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				for _, name := range args {
					if strings.Contains(name, "@") {
						return usagef("%q is a version; delete it with: atoll snap rm %s", name, name)
					}
					if now && !dry && !yes {
						ok, err := a.confirm("delete volume %s and its data for good?", name)
						if err != nil || !ok {
							return err
						}
					}
					req := &atollv1.DeleteVolumeRequest{Name: volumeName(name), DryRun: dry, Now: now}
					r, err := c.Volumes.DeleteVolume(ctx, connect.NewRequest(req))
					if err != nil {
						return a.didYouMean(ctx, c, name, err)
					}
					if err := a.show(r.Msg, func() { a.removed(req, r.Msg) }); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be deleted")
	cmd.Flags().BoolVar(&now, "now", false, "for good, not to the trash")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// removed tells what became of a volume.
func (a *App) removed(req *atollv1.DeleteVolumeRequest, r *atollv1.DeleteVolumeResponse) {
	if r.TrashId != "" {
		a.moved(req.Name, r.TrashId, r.Expires)
		return
	}
	verb, room := "deleted", ""
	if req.DryRun {
		verb = "would delete"
	}
	if r.Bytes > 0 {
		room = fmt.Sprintf(" (%s in each copy)", a.size(r.Bytes))
	}
	fmt.Fprintf(a.Out, "%s %s%s\n", verb, req.Name, room)
}

// confirm asks on the terminal; without one it refuses.
func (a *App) confirm(format string, args ...any) (bool, error) {
	if !isTerminal(a.Err) {
		return false, usagef("%s: say --yes to confirm, or -n to see what would happen", fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(a.Err, format+" [y/N] ", args...)
	var answer string
	if _, err := fmt.Fscanln(a.In, &answer); err != nil {
		answer = ""
	}
	return strings.EqualFold(answer, "y") || strings.EqualFold(answer, "yes"), nil
}

// didYouMean adds the nearest name of a volume, or of a version of one that
// exists, to a "does not exist".
func (a *App) didYouMean(ctx context.Context, c *api.Client, what string, err error) error {
	s, perr := parseSpec(what)
	if !errors.Is(err, atoll.ErrNotExist) || perr != nil {
		return err
	}
	r, lerr := c.Volumes.ListVolumes(ctx, connect.NewRequest(&atollv1.ListVolumesRequest{}))
	if lerr != nil {
		return err
	}
	names := make([]string, 0, len(r.Msg.Volumes))
	for _, v := range r.Msg.Volumes {
		if v.Name == s.name {
			return didYouMeanVersion(ctx, c, s, err)
		}
		names = append(names, v.Name)
	}
	if best := nearest(s.name, names); best != "" && best != s.name {
		s.name = best
		return api.WithHint(err, fmt.Sprintf("did you mean %q?", s))
	}
	return hintOr(err, `"atoll volume ls" lists the volumes`)
}

// hintOr adds a hint to an error that has none.
func hintOr(err error, hint string) error {
	if api.Hint(err) != "" {
		return err
	}
	return api.WithHint(err, hint)
}

func didYouMeanVersion(ctx context.Context, c *api.Client, s spec, err error) error {
	r, lerr := (&image{c: c, name: s.name}).list(ctx)
	if lerr != nil {
		return err
	}
	names := make([]string, 0, len(r.Versions))
	for _, v := range r.Versions {
		names = append(names, versionName(v))
	}
	if best := nearest(s.version, names); s.version != "" && best != "" && best != s.version {
		return api.WithHint(err, fmt.Sprintf("did you mean %q?", s.name+"@"+best))
	}
	return hintOr(err, fmt.Sprintf(`"atoll volume versions %s" lists the versions`, s.name))
}

// nearest returns the name that is at most two letters off, "" if there is none.
func nearest(name string, names []string) string {
	best, dist := "", 3
	for _, n := range names {
		if d := editDistance(name, n); d < dist {
			best, dist = n, d
		}
	}
	return best
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := diag
			if a[i] != b[j] {
				next = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// exactArgs is cobra.ExactArgs with words.
func exactArgs(n int, want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef("want %s; got %d arguments", want, len(args))
		}
		return nil
	}
}

// shellQuote makes a word safe to paste into a shell.
func shellQuote(s string) string {
	if !strings.ContainsAny(s, " \t\n?*[]#~=%!{}&|;<>()$`\"'\\") {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}
