package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (a *App) volumeTrash() *cobra.Command {
	cmd := &cobra.Command{Use: "trash", Short: "Look at removed volumes, get them back, remove them for good"}
	cmd.AddCommand(a.trashMove(), a.trashList(), a.trashRestore(), a.trashRemove(), a.trashPurge())
	return cmd
}

func (a *App) trashMove() *cobra.Command {
	var expires string
	cmd := &cobra.Command{
		Use:               "mv NAME...",
		Aliases:           []string{"move"},
		Short:             "Move volumes to the trash",
		Example:           "  atoll volume trash mv disk1 --expires-at 30d",
		Args:              someArgs("the name of at least one volume"),
		ValidArgsFunction: a.completeArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &atollv1.MoveToTrashRequest{}
			if expires != "" {
				t, err := parseExpiry(expires, time.Now())
				if err != nil {
					return err
				}
				req.Expires = timestamppb.New(t)
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				for _, name := range args {
					req.Name = volumeName(name)
					r, err := c.Trash.MoveToTrash(ctx, connect.NewRequest(req))
					if err != nil {
						return a.didYouMean(ctx, c, name, err)
					}
					if err := a.show(r.Msg, func() { a.moved(req.Name, r.Msg.Id, r.Msg.Expires) }); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&expires, "expires-at", "", "when it may be removed for good: a date, or how long from now")
	return cmd
}

// moved tells where a volume went and how it comes back.
func (a *App) moved(name, id string, expires *timestamppb.Timestamp) {
	until := ""
	if expires != nil {
		until = ", kept until " + expires.AsTime().Local().Format("2006-01-02 15:04")
	}
	fmt.Fprintf(a.Out, "%s is in the trash%s\n", name, until)
	a.hint("undo with: atoll volume trash restore %s", id)
}

// listTrash fetches what is in the trash.
func listTrash(ctx context.Context, c *api.Client) ([]*atollv1.TrashEntry, error) {
	var all []*atollv1.TrashEntry
	for after := ""; ; {
		r, err := c.Trash.ListTrash(ctx, connect.NewRequest(&atollv1.ListTrashRequest{After: after}))
		if err != nil {
			return nil, err
		}
		all = append(all, r.Msg.Entries...)
		if after = r.Msg.Next; after == "" {
			return all, nil
		}
	}
}

func (a *App) trashList() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List what is in the trash",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				all, err := listTrash(ctx, c)
				if err != nil {
					return err
				}
				return showList(a, &atollv1.ListTrashResponse{Entries: all}, all, func() {
					rows := make([][]string, 0, len(all))
					for _, e := range all {
						rows = append(rows, []string{shortID(e.Id, all), a.size(e.SizeBytes), shortTime(e.Removed.AsTime()), expiry(e.Expires), e.Path})
					}
					if len(rows) == 0 {
						a.hint("the trash is empty")
						return
					}
					a.table([]string{"ID", ">SIZE", "REMOVED", "EXPIRES", "NAME"}, rows)
				})
			})
		},
	}
}

func expiry(t *timestamppb.Timestamp) string {
	if t == nil {
		return "never"
	}
	return shortTime(t.AsTime())
}

// shortID is the beginning of an id that no other entry has.
func shortID(id string, all []*atollv1.TrashEntry) string {
	n := min(8, len(id))
	for _, e := range all {
		for e.Id != id && n < len(id) && strings.HasPrefix(e.Id, id[:n]) {
			n++
		}
	}
	return id[:n]
}

// findTrash finds the entry that a user means: by id, the beginning of one, or
// the name it had, of which the newest counts.
func findTrash(ctx context.Context, c *api.Client, word string) (*atollv1.TrashEntry, error) {
	all, err := listTrash(ctx, c)
	if err != nil {
		return nil, err
	}
	var byID, byPath *atollv1.TrashEntry
	matches := 0
	for _, e := range all {
		if e.Id == word {
			return e, nil
		}
		if len(word) >= 4 && strings.HasPrefix(e.Id, word) {
			byID, matches = e, matches+1
		}
		if e.Path == volumeName(word) && (byPath == nil || byPath.Removed.AsTime().Before(e.Removed.AsTime())) {
			byPath = e
		}
	}
	switch {
	case byPath != nil:
		return byPath, nil
	case matches == 1:
		return byID, nil
	case matches > 1:
		return nil, usagef("%q is the beginning of %d ids", word, matches)
	}
	return nil, api.WithHint(fmt.Errorf("%q in the trash: %w", word, atoll.ErrNotExist), `"atoll volume trash ls" lists what is there`)
}

func (a *App) trashRestore() *cobra.Command {
	var as string
	cmd := &cobra.Command{
		Use:               "restore ID|NAME",
		Aliases:           []string{"undelete"},
		Short:             "Get a volume back from the trash",
		Example:           "  atoll volume trash restore disk1\n  atoll volume trash restore 3f9a01c2 --image disk1-old",
		Args:              exactArgs(1, "an id or a name"),
		ValidArgsFunction: a.completeTrash,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				e, err := findTrash(ctx, c, args[0])
				if err != nil {
					return err
				}
				r, err := c.Trash.RestoreTrash(ctx, connect.NewRequest(&atollv1.RestoreTrashRequest{Id: e.Id, NewPath: volumeName(as)}))
				if err != nil {
					return err
				}
				return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "%s is back\n", r.Msg.Path) })
			})
		},
	}
	cmd.Flags().StringVar(&as, "image", "", "another name for it")
	return cmd
}

func (a *App) trashRemove() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:               "rm ID|NAME...",
		Aliases:           []string{"remove"},
		Short:             "Remove volumes in the trash for good",
		Example:           "  atoll volume trash rm 3f9a01c2 --yes",
		Args:              someArgs("an id or a name"),
		ValidArgsFunction: a.completeTrash,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				for _, word := range args {
					e, err := findTrash(ctx, c, word)
					if err != nil {
						return err
					}
					if !yes {
						ok, err := a.confirm("remove %s (%s) for good?", e.Path, a.size(e.SizeBytes))
						if err != nil || !ok {
							return err
						}
					}
					if err := a.purge(ctx, c, &atollv1.PurgeTrashRequest{Id: e.Id}, e.Path); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *App) purge(ctx context.Context, c *api.Client, req *atollv1.PurgeTrashRequest, what string) error {
	r, err := c.Trash.PurgeTrash(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	return a.show(r.Msg, func() {
		if what == "" {
			what = count(int(r.Msg.Removed), "volume")
		}
		room := ""
		if r.Msg.Bytes > 0 {
			room = fmt.Sprintf(" (%s in each copy)", a.size(r.Msg.Bytes))
		}
		fmt.Fprintf(a.Out, "removed %s for good%s\n", what, room)
	})
}

func (a *App) trashPurge() *cobra.Command {
	var before string
	var all, yes bool
	cmd := &cobra.Command{
		Use:     "purge",
		Short:   "Remove for good what has expired, or with --all everything",
		Example: "  atoll volume trash purge\n  atoll volume trash purge --expired-before 7d\n  atoll volume trash purge --all --yes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := &atollv1.PurgeTrashRequest{All: all, ExpiredBefore: timestamppb.Now()}
			if before != "" {
				t, err := parseExpiry(before, time.Now())
				if err != nil {
					return err
				}
				req.ExpiredBefore = timestamppb.New(t)
			}
			if all {
				req.ExpiredBefore = nil
			}
			if (all || before != "") && !yes {
				ok, err := a.confirm("remove volumes in the trash for good?")
				if err != nil || !ok {
					return err
				}
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error { return a.purge(ctx, c, req, "") })
		},
	}
	cmd.Flags().StringVar(&before, "expired-before", "", "what expires before a date, or within a time from now")
	cmd.Flags().BoolVar(&all, "all", false, "everything")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
