package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (a *App) volumeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Aliases: []string{"vol"}, Short: "Make and use block volumes", GroupID: "use"}
	cmd.AddCommand(a.volumeCreate(), a.volumeList(), a.volumeInfo(), a.volumeResize(), a.volumeRemove(), a.volumeURL(),
		a.volumeCheck(), a.volumeImport(), a.volumeExport(), a.volumeAttach(), a.volumeDetach(), a.volumeBench())
	for _, c := range cmd.Commands() {
		c.ValidArgsFunction = a.completeArgs
	}
	return cmd
}

// volumeName takes the optional "vol/" prefix off.
func volumeName(arg string) string { return strings.TrimPrefix(arg, "vol/") }

func (a *App) volumeCreate() *cobra.Command {
	var req atollv1.CreateVolumeRequest
	var replicas int
	cmd := &cobra.Command{
		Use:     "create NAME SIZE",
		Short:   "Make a thin volume",
		Example: "  atoll volume create disk1 10G\n  atoll volume create fast 512M --replicas 2 --cache writethrough",
		Args:    exactArgs(2, "a name and a size, as in: atoll volume create disk1 10G"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := ParseSize(args[1])
			if err != nil {
				return err
			}
			req.Name, req.SizeBytes, req.Replicas = volumeName(args[0]), size, int32(replicas)
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Volumes.CreateVolume(ctx, connect.NewRequest(&req))
				if err != nil {
					return err
				}
				if a.output != "table" {
					return a.json(r.Msg)
				}
				v := r.Msg
				fmt.Fprintf(a.Out, "%s: %s, thin, %s   %s\n", v.Name, a.size(v.SizeBytes), plural(int(v.Replicas), "copy", "copies"), shellQuote(first(v.Urls)))
				return nil
			})
		},
	}
	cmd.Flags().IntVar(&replicas, "replicas", 0, "copies, 1 to 5 (default: 3, or as many as there are nodes)")
	cmd.Flags().StringVar(&req.Cache, "cache", "", "writeback (durable at FLUSH and FUA; the default) or writethrough (every write durable before its reply)")
	cmd.Flags().StringVar(&req.Description, "description", "", "a remark, shown in listings")
	return cmd
}

func (a *App) volumeList() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List volumes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				all := &atollv1.ListVolumesResponse{}
				for after := ""; ; {
					r, err := c.Volumes.ListVolumes(ctx, connect.NewRequest(&atollv1.ListVolumesRequest{After: after}))
					if err != nil {
						return err
					}
					all.Volumes = append(all.Volumes, r.Msg.Volumes...)
					if after = r.Msg.Next; after == "" {
						break
					}
				}
				if a.output == "jsonl" {
					return jsonLines(a, all.Volumes)
				}
				if a.output == "json" {
					return a.json(all)
				}
				rows := make([][]string, 0, len(all.Volumes))
				for _, v := range all.Volumes {
					mapped := "-"
					if v.Open {
						mapped = a.size(v.MappedBytes)
					}
					rows = append(rows, []string{v.Name, a.size(v.SizeBytes), mapped, fmt.Sprint(v.Replicas), v.Cache, fmt.Sprint(v.Connections), ago(v.Created.AsTime())})
				}
				a.table([]string{"NAME", ">SIZE", ">MAPPED", ">COPIES", "CACHE", ">CONNS", ">AGE"}, rows)
				if len(rows) == 0 {
					a.hint("no volumes yet; make one with: atoll volume create disk1 10G")
				}
				return nil
			})
		},
	}
}

func (a *App) volumeInfo() *cobra.Command {
	return &cobra.Command{
		Use:     "info NAME",
		Aliases: []string{"show"},
		Short:   "Show all about a volume",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			if a.output != "table" {
				return a.json(v)
			}
			line := func(k, format string, args ...any) { fmt.Fprintf(a.Out, "%-12s %s\n", k, fmt.Sprintf(format, args...)) }
			line("name", "%s", v.Name)
			line("id", "%s", v.Id)
			line("size", "%s", a.size(v.SizeBytes))
			line("copies", "%d", v.Replicas)
			line("cache", "%s", v.Cache)
			line("created", "%s", v.Created.AsTime().Local().Format(time.DateTime))
			if v.Description != "" {
				line("description", "%s", v.Description)
			}
			for _, u := range v.Urls {
				line("url", "%s", u)
			}
			if !v.Open {
				if v.ServedBy != "" {
					line("state", "open on another server (process %s)", v.ServedBy)
				} else {
					line("state", "idle")
				}
				return nil
			}
			line("state", "open, epoch %d, %s", v.Epoch, count(int(v.Connections), "connection"))
			line("mapped", "%s", a.size(v.MappedBytes))
			live := ""
			if v.LiveBytes > 0 {
				live = a.size(v.LiveBytes) + " of it live at the last checkpoint, "
			}
			line("log", "%s in %s, %skept %s", a.size(v.LogBytes), count(int(v.Segments), "segment"), live, count(int(v.Replicas), "time"))
			if v.ShortSegments > 0 {
				line("short", "%s missing or not verified yet", plural(int(v.ShortSegments), "copy", "copies"))
			}
			return nil
		},
	}
}

// volume fetches one volume; open asks the server to open it.
func (a *App) volume(cmd *cobra.Command, name string, open bool) (v *atollv1.Volume, err error) {
	err = a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: volumeName(name), Open: open}))
		if err == nil {
			v = r.Msg
			return nil
		}
		return a.didYouMean(ctx, c, name, err)
	})
	return v, err
}

func (a *App) volumeResize() *cobra.Command {
	var shrink bool
	cmd := &cobra.Command{
		Use:     "resize NAME SIZE",
		Short:   "Grow a volume, or shrink it with --shrink",
		Example: "  atoll volume resize disk1 20G",
		Args:    exactArgs(2, "a name and the new size, as in: atoll volume resize disk1 20G"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := ParseSize(args[1])
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
	cmd.Flags().BoolVar(&shrink, "shrink", false, "allow a smaller size; what lies beyond is lost")
	return cmd
}

func (a *App) volumeRemove() *cobra.Command {
	var dry, yes bool
	cmd := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"remove", "delete"},
		Short:   "Delete volumes and their data",
		Long:    "Delete volumes and their data. There is no undo; -n shows what would go.",
		Example: "  atoll volume rm disk1 -n\n  atoll volume rm disk1 --yes",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("want the name of at least one volume")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				for _, name := range args {
					if !dry && !yes {
						ok, err := a.confirm("delete volume %s and its data?", name)
						if err != nil || !ok {
							return err
						}
					}
					r, err := c.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: volumeName(name), DryRun: dry}))
					if err != nil {
						return a.didYouMean(ctx, c, name, err)
					}
					verb := "deleted"
					if dry {
						verb = "would delete"
					}
					if a.output != "table" {
						if err := a.json(r.Msg); err != nil {
							return err
						}
						continue
					}
					room := ""
					if r.Msg.Bytes > 0 {
						room = fmt.Sprintf(" (%s in each copy)", a.size(r.Msg.Bytes))
					}
					fmt.Fprintf(a.Out, "%s %s%s\n", verb, name, room)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&dry, "dry-run", "n", false, "only say what would be deleted")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
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

func (a *App) volumeURL() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "url NAME",
		Short:   "Print the volume's NBD address for other tools",
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

// didYouMean adds the nearest volume name to a "does not exist".
func (a *App) didYouMean(ctx context.Context, c *api.Client, name string, err error) error {
	if !errors.Is(err, atoll.ErrNotExist) {
		return err
	}
	r, lerr := c.Volumes.ListVolumes(ctx, connect.NewRequest(&atollv1.ListVolumesRequest{}))
	if lerr != nil {
		return err
	}
	best, dist := "", 3
	for _, v := range r.Msg.Volumes {
		if d := editDistance(volumeName(name), v.Name); d < dist {
			best, dist = v.Name, d
		}
	}
	if best != "" {
		return api.WithHint(err, fmt.Sprintf("did you mean %q?", best))
	}
	return api.WithHint(err, `"atoll volume ls" lists the volumes`)
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
