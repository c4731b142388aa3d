package cli

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (a *App) volumeList() *cobra.Command {
	var long bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List volumes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				all, err := listVolumes(ctx, c)
				if err != nil {
					return err
				}
				return showList(a, &atollv1.ListVolumesResponse{Volumes: all}, all, func() {
					kept := a.kept(ctx, c, all)
					a.printVolumes(all, long, kept)
					a.hintKept(kept)
				})
			})
		},
	}
	cmd.Flags().BoolVarP(&long, "long", "l", false, "also owner and parent")
	return cmd
}

// kept asks for the deleted volumes whose room clones keep taken, if there may be
// some. They are a remark: an error leaves them out.
func (a *App) kept(ctx context.Context, c *api.Client, all []*atollv1.Volume) []*atollv1.KeptMedium {
	for _, v := range all {
		if v.Parent == "" {
			continue
		}
		r, err := c.Cluster.GetStatus(ctx, connect.NewRequest(&atollv1.GetStatusRequest{}))
		if err != nil {
			return nil
		}
		return r.Msg.Kept
	}
	return nil
}

// hintKept tells of room that no volume in a list accounts for.
func (a *App) hintKept(kept []*atollv1.KeptMedium) {
	for _, k := range kept {
		a.hint("and %s", a.keptLine(k))
	}
}

// keptLine says what a deleted volume takes, and why.
func (a *App) keptLine(k *atollv1.KeptMedium) string {
	room := "room not known yet"
	if k.Bytes > 0 {
		room = a.size(k.Bytes) + " in each copy"
	}
	return fmt.Sprintf("%s of %s, which is deleted, for %s", room, k.Name, orDash(strings.Join(k.Clones, ", ")))
}

func (a *App) printVolumes(all []*atollv1.Volume, long bool, kept []*atollv1.KeptMedium) {
	rows := make([][]string, 0, len(all))
	for _, v := range all {
		mapped, versions := "-", "-" // of one that is not open nobody knows without opening it
		if v.Open {
			mapped, versions = a.size(v.GetMappedBytes()), fmt.Sprint(v.GetVersions())
		}
		row := []string{v.Name, a.size(v.SizeBytes), mapped, versions, fmt.Sprint(v.Replicas), v.Cache, fmt.Sprint(v.Connections), ago(v.Created.AsTime())}
		if long {
			row = []string{v.Name, a.size(v.SizeBytes), mapped, versions, orDash(v.Owner), orDash(v.Schedule), orDash(namedParent(v.Parent, all, kept))}
		}
		rows = append(rows, row)
	}
	headers := []string{"NAME", ">SIZE", ">MAPPED", ">VERSIONS", ">COPIES", "CACHE", ">CONNS", ">AGE"}
	if long {
		headers = []string{"NAME", ">SIZE", ">MAPPED", ">VERSIONS", "OWNER", "SCHEDULE", "PARENT"}
	}
	a.table(headers, rows)
	if len(rows) == 0 {
		a.hint("no volumes yet; make one with: atoll volume create disk1 10G")
	}
}

// namedParent is a parent with its name instead of its id.
func namedParent(parent string, all []*atollv1.Volume, kept []*atollv1.KeptMedium) string {
	id, version, at := strings.Cut(parent, "@")
	for _, v := range all {
		if at && v.Id == id {
			return v.Name + "@" + version
		}
	}
	for _, k := range kept {
		if at && k.Id == id {
			return k.Name + "@" + version + " (deleted)"
		}
	}
	return parent
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *App) volumeInfo() *cobra.Command {
	return &cobra.Command{
		Use:     "info NAME[@VERSION]",
		Aliases: []string{"show", "status"},
		Short:   "Show all about a volume",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			return a.show(v, func() { a.printVolume(v) })
		},
	}
}

// line prints one property of a thing.
func (a *App) line(key, format string, args ...any) {
	fmt.Fprintf(a.Out, "%-12s %s\n", key, fmt.Sprintf(format, args...))
}

func (a *App) printVolume(v *atollv1.Volume) {
	a.line("name", "%s", v.Name)
	a.line("id", "%s", v.Id)
	a.line("size", "%s", a.size(v.SizeBytes))
	if exact := exactSize(v.Properties, v.SizeBytes); exact != v.SizeBytes {
		a.line("image size", "%d bytes", exact)
	}
	a.line("copies", "%d", v.Replicas)
	a.line("cache", "%s", v.Cache)
	a.line("created", "%s", moment(v.Created.AsTime()))
	a.lineIf("owner", v.Owner)
	a.lineIf("description", v.Description)
	a.lineIf("versions", versionsLine(v))
	a.lineIf("parent", v.Parent)
	a.lineIf("schedule", v.Schedule)
	if v.Limits != nil {
		a.lineIf("limits", a.limitsLine(v.Limits))
	}
	if v.Expires != nil {
		a.line("expires", "%s", moment(v.Expires.AsTime()))
	}
	for _, u := range v.Urls {
		a.line("url", "%s", u)
	}
	a.printMeta(v)
	a.printState(v)
}

func (a *App) lineIf(key, value string) {
	if value != "" {
		a.line(key, "%s", value)
	}
}

func versionsLine(v *atollv1.Volume) string {
	if v.GetVersions() == 0 {
		return ""
	}
	text := fmt.Sprintf("%d, last %d", v.GetVersions(), v.GetLast())
	if v.GetRelease() > 0 {
		text += fmt.Sprintf(", release %d", v.GetRelease())
	}
	return text
}

// printMeta prints what is kept beside the volume.
func (a *App) printMeta(v *atollv1.Volume) {
	for _, key := range sortedKeys(v.Properties) {
		if name, ok := strings.CutPrefix(key, propMeta); ok {
			a.line("meta", "%s = %s", name, v.Properties[key])
		} else if key != propSize {
			a.line("property", "%s = %s", key, v.Properties[key])
		}
	}
}

// printState prints what is known of a volume that is open.
func (a *App) printState(v *atollv1.Volume) {
	if v.Cache == "read-only" {
		a.line("used", "%s", a.size(v.GetMappedBytes()))
		return
	}
	switch _, err := atoll.ParseMediumID(strings.Split(v.Parent, "@")[0]); {
	case v.KeptBytes > 0:
		a.line("kept", "%s of deleted parents, until it is flattened or deleted", a.size(v.KeptBytes))
	case v.Parent != "" && err == nil: // by its id: it has no name any more
		a.line("kept", "what it shares with its parent, which is removed; how much is not known yet")
	}
	if !v.Open {
		if v.ServedBy != "" {
			a.line("state", "open on another server (process %s)", v.ServedBy)
		} else {
			a.line("state", "idle")
		}
		return
	}
	a.line("state", "open, epoch %d, %s", v.Epoch, count(int(v.Connections), "connection"))
	a.line("mapped", "%s", a.size(v.GetMappedBytes()))
	live := ""
	if v.GetLiveBytes() > 0 {
		live = a.size(v.GetLiveBytes()) + " of it live at the last checkpoint, "
	}
	a.line("log", "%s in %s, %skept %s", a.size(v.GetLogBytes()), count(int(v.GetSegments()), "segment"), live, count(int(v.Replicas), "time"))
	if v.GetReclaimableBytes() > 0 {
		a.line("reclaimable", "%s", a.size(v.GetReclaimableBytes()))
	}
	if v.GetShortSegments() > 0 {
		a.line("short", "%s missing or not verified yet", plural(int(v.GetShortSegments()), "copy", "copies"))
	}
}

// asVolume is a version as if it were a volume.
func asVolume(v *atollv1.Volume, version *atollv1.Version) (*atollv1.Volume, error) {
	out := &atollv1.Volume{Id: v.Id, Name: v.Name + "@" + versionName(version), SizeBytes: version.SizeBytes, Replicas: v.Replicas, Cache: "read-only",
		Created: version.Time, Owner: v.Owner, Description: version.Memo, Properties: version.Properties, MappedBytes: &version.UsedBytes}
	for _, u := range v.Urls {
		p, err := exportURL(u, out.Name)
		if err != nil {
			return nil, err
		}
		out.Urls = append(out.Urls, p)
	}
	return out, nil
}

func (a *App) volumeURL() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "url NAME[@VERSION]",
		Short:   "Print the NBD address of a volume or version for other tools",
		Example: "  nbdinfo \"$(atoll volume url disk1)\"\n  qemu-img info \"$(atoll volume url disk1)\"",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			if a.output != "table" {
				return a.json(v)
			}
			if len(v.Urls) == 0 {
				return fmt.Errorf("url of %s: no server with a gateway runs: %w", v.Name, atoll.ErrUnavailable)
			}
			if !all {
				v.Urls = v.Urls[:1]
			}
			for _, u := range v.Urls {
				fmt.Fprintln(a.Out, u)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all addresses, not only the best")
	return cmd
}
