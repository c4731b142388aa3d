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

// kindDir is a directory among the entries of the tree.
const kindDir = "dir"

// treeCommands are those of the tree of directories and volumes.
func (a *App) treeCommands() []*cobra.Command {
	cmds := []*cobra.Command{a.treeList(), a.treeMake(), a.treeRemove(), a.treeMove(), a.treeOwner()}
	for _, c := range cmds {
		c.GroupID, c.ValidArgsFunction = "use", a.completeArgs
	}
	dir := &cobra.Command{Use: "dir", Short: "Make and remove directories", GroupID: "use"}
	list, mk, rm := a.treeList(), a.treeMake(), a.treeRemove()
	mk.Use, mk.Aliases = "mk PATH...", []string{"create", "mkdir"}
	rm.Use, rm.Aliases = "rm PATH...", []string{"remove", "rmdir"}
	dir.AddCommand(list, mk, rm)
	for _, c := range dir.Commands() {
		c.ValidArgsFunction = a.completeArgs
	}
	return append(cmds, dir)
}

// cleanPath takes slashes off both ends; "" and "/" are the root.
func cleanPath(p string) string { return strings.Trim(p, "/") }

func (a *App) treeList() *cobra.Command {
	var recursive bool
	cmd := &cobra.Command{
		Use:     "ls [PATH]",
		Short:   "List a directory",
		Example: "  atoll ls\n  atoll ls projects -r",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := ""
			if len(args) == 1 {
				path = cleanPath(args[0])
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				all, err := listTree(ctx, c, path, recursive)
				if err != nil {
					return err
				}
				return showList(a, &atollv1.ListDirectoryResponse{Entries: all}, all, func() { a.printTree(path, recursive, all) })
			})
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "also what is in directories below")
	return cmd
}

// listTree lists a directory, and with deep those below it.
func listTree(ctx context.Context, c *api.Client, path string, deep bool) ([]*atollv1.Entry, error) {
	var all []*atollv1.Entry
	for after := ""; ; {
		r, err := c.Names.ListDirectory(ctx, connect.NewRequest(&atollv1.ListDirectoryRequest{Path: path, After: after}))
		if err != nil {
			return nil, err
		}
		for _, e := range r.Msg.Entries {
			all = append(all, e)
			if deep && e.Kind == kindDir {
				below, err := listTree(ctx, c, e.Path, deep)
				if err != nil {
					return nil, err
				}
				all = append(all, below...)
			}
		}
		if after = r.Msg.Next; after == "" {
			return all, nil
		}
	}
}

func (a *App) printTree(path string, recursive bool, all []*atollv1.Entry) {
	if len(all) == 0 {
		a.hint("nothing is there")
		return
	}
	rows := make([][]string, 0, len(all))
	for _, e := range all {
		name, size, use := e.Path, a.size(e.SizeBytes), ""
		if !recursive {
			name = strings.TrimPrefix(strings.TrimPrefix(name, path), "/")
		}
		if e.Kind == kindDir {
			name, size = name+"/", "-"
		}
		if e.InUse {
			use = "open"
		}
		owner := e.Owner
		if owner == "" {
			owner = "-"
		}
		rows = append(rows, []string{e.Kind, owner, size, shortTime(e.Created.AsTime()), use, name})
	}
	a.table([]string{"KIND", "OWNER", ">SIZE", "CREATED", "USE", "NAME"}, rows)
}

func (a *App) treeMake() *cobra.Command {
	var req atollv1.MakeDirectoryRequest
	var parents bool
	cmd := &cobra.Command{
		Use:     "mkdir PATH...",
		Short:   "Make directories",
		Example: "  atoll mkdir projects\n  atoll mkdir -P projects/2026/mail",
		Args:    someArgs("a path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Parents = parents
			return a.eachPath(cmd, args, func(ctx context.Context, c *api.Client, path string) error {
				req.Path = path
				r, err := c.Names.MakeDirectory(ctx, connect.NewRequest(&req))
				if errors.Is(err, atoll.ErrNotExist) && !parents {
					err = api.WithHint(err, "--parents (-P) also makes the directories above")
				}
				if err != nil {
					return err
				}
				return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "%s/\n", r.Msg.Path) })
			})
		},
	}
	cmd.Flags().BoolVarP(&parents, "parents", "P", false, "also directories above, and no error if it is there")
	cmd.Flags().StringVar(&req.Owner, "owner", "", "owner (default: you)")
	return cmd
}

func (a *App) treeRemove() *cobra.Command {
	return &cobra.Command{
		Use:     "rmdir PATH...",
		Short:   "Remove empty directories",
		Example: "  atoll rmdir projects",
		Args:    someArgs("a path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachPath(cmd, args, func(ctx context.Context, c *api.Client, path string) error {
				_, err := c.Names.RemoveDirectory(ctx, connect.NewRequest(&atollv1.RemoveDirectoryRequest{Path: path}))
				return err
			})
		},
	}
}

// eachPath calls fn for each argument in one session.
func (a *App) eachPath(cmd *cobra.Command, args []string, fn func(ctx context.Context, c *api.Client, path string) error) error {
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		for _, arg := range args {
			if err := fn(ctx, c, cleanPath(arg)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (a *App) treeMove() *cobra.Command {
	var replace bool
	cmd := &cobra.Command{
		Use:     "mv PATH NEW",
		Short:   "Give a volume or directory another name",
		Example: "  atoll mv disk1 archive/disk1",
		Args:    exactArgs(2, "a path and the new path"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rename(cmd, cleanPath(args[0]), cleanPath(args[1]), replace)
		},
	}
	cmd.Flags().BoolVar(&replace, "replace", false, "move a volume of the new name to the trash")
	return cmd
}

func (a *App) treeOwner() *cobra.Command {
	return &cobra.Command{
		Use:     "chown USER PATH...",
		Short:   "Give volumes and directories another owner",
		Example: "  atoll chown alice projects/mail",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef("want a user and at least one path")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachPath(cmd, args[1:], func(ctx context.Context, c *api.Client, path string) error {
				r, err := c.Names.ChangeOwner(ctx, connect.NewRequest(&atollv1.ChangeOwnerRequest{Path: path, Owner: args[0]}))
				if err != nil {
					return a.didYouMean(ctx, c, path, err)
				}
				return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "%s belongs to %s\n", r.Msg.Path, r.Msg.Owner) })
			})
		},
	}
}
