package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func (a *App) userCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "user", Short: "Manage users: the owners of volumes", GroupID: "use"}
	cmd.AddCommand(a.userAdd(), a.userList(), a.userPassword(), a.userRemove())
	return cmd
}

func (a *App) userAdd() *cobra.Command {
	var req atollv1.CreateUserRequest
	var none bool
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a user",
		Long: `Add a user. The password is asked for, or read from standard input's first line.
A strict user must prove the password in every call; of others it is asked only
where their own clients send it.`,
		Example: "  atoll user add alice\n  echo \"$SECRET\" | atoll user add backup --strict",
		Args:    exactArgs(1, "a name"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			req.Name = args[0]
			if !none {
				if req.Password, err = a.askPassword("password of " + args[0]); err != nil {
					return err
				}
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.CreateUser(ctx, connect.NewRequest(&req))
				if err != nil {
					return err
				}
				return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "user %s added\n", r.Msg.Name) })
			})
		},
	}
	cmd.Flags().BoolVar(&req.Strict, "strict", false, "every call under this name must prove the password")
	cmd.Flags().BoolVar(&req.Admin, "admin", false, "may do anything to anything, as root")
	cmd.Flags().BoolVar(&none, "no-password", false, "the user has no password")
	return cmd
}

// askPassword reads a password, twice and unseen on a terminal.
func (a *App) askPassword(what string) (string, error) {
	in, ok := a.In.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		line, err := bufio.NewReader(a.In).ReadString('\n')
		if line = strings.TrimRight(line, "\r\n"); line == "" {
			return "", usagef("%s: nothing on standard input: %v", what, err)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("read password: %w", err)
		}
		return line, nil
	}
	var words [2]string
	for i, prompt := range []string{what + ": ", "again: "} {
		fmt.Fprint(a.Err, prompt)
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(a.Err)
		if err != nil {
			return "", fmt.Errorf("read password: %w", err)
		}
		words[i] = string(b)
	}
	if words[0] != words[1] {
		return "", fmt.Errorf("%s: the two differ: %w", what, atoll.ErrInvalid)
	}
	if words[0] == "" {
		return "", fmt.Errorf("%s: it is empty: %w", what, atoll.ErrInvalid)
	}
	return words[0], nil
}

func (a *App) userList() *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List users",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.ListUsers(ctx, connect.NewRequest(&atollv1.ListUsersRequest{}))
				if err != nil {
					return err
				}
				return showList(a, r.Msg, r.Msg.Users, func() {
					rows := make([][]string, 0, len(r.Msg.Users))
					for _, u := range r.Msg.Users {
						rows = append(rows, []string{u.Name, yesNo(u.HasPassword), yesNo(u.Strict), yesNo(u.Admin), shortTime(u.Created.AsTime())})
					}
					a.table([]string{"NAME", "PASSWORD", "STRICT", "ADMIN", "CREATED"}, rows)
				})
			})
		},
	}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *App) userPassword() *cobra.Command {
	var strict, admin, none bool
	cmd := &cobra.Command{
		Use:     "passwd NAME",
		Short:   "Change a user's password, --strict or --admin",
		Example: "  atoll user passwd alice\n  atoll user passwd alice --strict=false --keep",
		Args:    exactArgs(1, "a name"),
	}
	var keep bool
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req := &atollv1.UpdateUserRequest{Name: args[0]}
		if cmd.Flags().Changed("strict") {
			req.Strict = &strict
		}
		if cmd.Flags().Changed("admin") {
			req.Admin = &admin
		}
		if !keep {
			password := ""
			if !none {
				var err error
				if password, err = a.askPassword("new password of " + args[0]); err != nil {
					return err
				}
			}
			req.Password = &password
		}
		return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
			r, err := c.Users.UpdateUser(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "user %s changed\n", r.Msg.Name) })
		})
	}
	cmd.Flags().BoolVar(&strict, "strict", false, "every call under this name must prove the password")
	cmd.Flags().BoolVar(&admin, "admin", false, "may do anything to anything, as root")
	cmd.Flags().BoolVar(&keep, "keep", false, "keep the password")
	cmd.Flags().BoolVar(&none, "no-password", false, "take the password away")
	return cmd
}

func (a *App) userRemove() *cobra.Command {
	return &cobra.Command{
		Use:     "rm NAME",
		Aliases: []string{"remove"},
		Short:   "Remove a user; what it owns stays",
		Args:    exactArgs(1, "a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Users.DeleteUser(ctx, connect.NewRequest(&atollv1.DeleteUserRequest{Name: args[0]}))
				if err != nil {
					return err
				}
				return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "user %s removed\n", args[0]) })
			})
		},
	}
}

func (a *App) taskCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "task", Short: "Look at long work in the background", GroupID: "look"}
	var all bool
	list := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List tasks",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Tasks.ListTasks(ctx, connect.NewRequest(&atollv1.ListTasksRequest{All: all}))
				if err != nil {
					return err
				}
				return showList(a, r.Msg, r.Msg.Tasks, func() { a.printTasks(r.Msg.Tasks) })
			})
		},
	}
	list.Flags().BoolVar(&all, "all", false, "also those that have ended")
	cancel := &cobra.Command{
		Use:   "cancel ID",
		Short: "Stop a task",
		Args:  exactArgs(1, "a task's id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Tasks.CancelTask(ctx, connect.NewRequest(&atollv1.CancelTaskRequest{Id: args[0]}))
				if err != nil {
					return err
				}
				return a.show(r.Msg, func() { fmt.Fprintf(a.Out, "%s: %s\n", r.Msg.What, r.Msg.State) })
			})
		},
	}
	cmd.AddCommand(list, cancel)
	return cmd
}

func (a *App) printTasks(tasks []*atollv1.Task) {
	if len(tasks) == 0 {
		a.hint("no tasks")
		return
	}
	rows := make([][]string, 0, len(tasks))
	for _, t := range tasks {
		done := "-"
		if t.Total > 0 {
			done = fmt.Sprintf("%.0f%%", 100*float64(t.Done)/float64(t.Total))
		}
		what := t.What
		if t.Error != "" {
			what += ": " + t.Error
		}
		rows = append(rows, []string{t.Id, t.State, done, ago(t.Started.AsTime()), what})
	}
	a.clippedTable([]string{"ID", "STATE", ">DONE", ">AGE", "WHAT"}, rows)
}
