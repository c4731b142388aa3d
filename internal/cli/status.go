package cli

import (
	"context"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
)

func (a *App) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Sum up the cluster's health and capacity",
		GroupID: "look",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Cluster.GetStatus(ctx, connect.NewRequest(&atollv1.GetStatusRequest{}))
				if err != nil {
					return err
				}
				if a.output != "table" {
					return a.json(r.Msg)
				}
				a.printStatus(r.Msg)
				return nil
			})
		},
	}
}

func (a *App) printStatus(s *atollv1.GetStatusResponse) {
	down := ""
	if n := s.NodesTotal - s.NodesUp; n > 0 {
		down = fmt.Sprintf(" (%d down)", n)
	}
	fmt.Fprintf(a.Out, "%s   %s%s, %s\n", strings.ToUpper(s.Health), count(int(s.NodesTotal), "node"), down, count(int(s.Volumes), "volume"))
	for _, r := range s.Reasons {
		fmt.Fprintf(a.Out, "  - %s\n", r)
	}
	fmt.Fprintf(a.Out, "usable     %s free of %s%s\n", a.size(s.UsableFreeBytes), a.size(s.UsableTotalBytes), copiesOf(s))
	fmt.Fprintf(a.Out, "raw        %s free of %s\n", a.size(s.RawFreeBytes), a.size(s.RawTotalBytes))
	if r := s.Repair; r != nil {
		fmt.Fprintf(a.Out, "repair     %s\n", a.repairText(r))
	}
	for _, k := range s.Kept {
		fmt.Fprintf(a.Out, "kept       %s\n", a.keptLine(k))
	}
	for _, p := range s.Processes {
		mark := ""
		if p.Answering {
			mark = "   ← answers"
		}
		fmt.Fprintf(a.Out, "server     %s, pid %d, up %s, %s%s\n", p.Host, p.Pid, ago(p.Started.AsTime()), strings.Join(p.Roles, "+"), mark)
		if p.Nbd != "" {
			fmt.Fprintf(a.Out, "           api %s   nbd %s\n", p.Api, p.Nbd)
		}
	}
	fmt.Fprintf(a.Out, "cluster    %s   atoll %s\n", s.ClusterId, s.Version)
}

// repairText tells how far repair is.
func (a *App) repairText(r *atollv1.Repair) string {
	var parts []string
	if r.Moves > 0 {
		text := fmt.Sprintf("%s of copysets being replaced", count(int(r.Moves), "member"))
		if r.Bytes > 0 {
			text += ", " + a.size(r.Bytes) + " to copy"
		}
		if r.Rate > 0 {
			text += fmt.Sprintf(", %s/s, %s left", a.size(r.Rate), r.Left.AsDuration())
		}
		parts = append(parts, text)
	}
	if r.Stuck > 0 {
		parts = append(parts, fmt.Sprintf("%s without a node that could take a copy; add one", count(int(r.Stuck), "copyset")))
	}
	return strings.Join(parts, "; ")
}

// copiesOf tells how many copies the usable space is reckoned with.
func copiesOf(s *atollv1.GetStatusResponse) string {
	if s.UsableTotalBytes <= 0 {
		return ""
	}
	return ", with " + plural(int((s.RawTotalBytes+s.UsableTotalBytes/2)/s.UsableTotalBytes), "copy", "copies") + " of everything"
}

// count is a number of things in words: "1 node", "3 nodes".
func count(n int, what string) string { return plural(n, what, what+"s") }

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (a *App) nodeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Look at storage nodes, drain and remove them", GroupID: "look"}
	cmd.AddCommand(a.nodeVerbs()...)
	cmd.AddCommand(&cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the storage nodes",
		Args:    cobra.NoArgs,
		Example: "  atoll node ls\n  atoll node ls -o jsonl | jq 'select(.up|not)'",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Cluster.ListNodes(ctx, connect.NewRequest(&atollv1.ListNodesRequest{}))
				if err != nil {
					return err
				}
				if a.output == "jsonl" {
					return jsonLines(a, r.Msg.Nodes)
				}
				if a.output != "table" {
					return a.json(r.Msg)
				}
				a.printNodes(r.Msg.Nodes)
				return nil
			})
		},
	})
	return cmd
}

func (a *App) printNodes(nodes []*atollv1.Node) {
	sort.Slice(nodes, func(i, j int) bool { return nodes[i].Id < nodes[j].Id })
	rows := make([][]string, 0, len(nodes))
	moving := false
	for _, n := range nodes {
		moving = moving || a.movesText(n) != "-"
	}
	for _, n := range nodes {
		used := "-"
		if n.TotalBytes > 0 {
			used = fmt.Sprintf("%.0f%%", 100*float64(n.TotalBytes-n.FreeBytes)/float64(n.TotalBytes))
		}
		p99 := "-"
		if d := n.AppendP99.AsDuration(); d > 0 {
			p99 = d.Round(10 * time.Microsecond).String()
		}
		where := n.Path
		if where == "" {
			where = n.Address
		}
		rows = append(rows, []string{strconv.Itoa(int(n.Id)), n.Condition, a.size(n.FreeBytes), used,
			strconv.Itoa(int(n.Segments)), p99, strconv.FormatUint(n.Errors, 10), where})
		if moving {
			i := len(rows) - 1
			rows[i] = append(rows[i][:7:7], a.movesText(n), where)
		}
	}
	headers := []string{">ID", "STATE", ">FREE", ">USED", ">SEGMENTS", ">P99", ">ERRORS", "WHERE"}
	if moving {
		headers = append(headers[:7:7], "REPAIR", "WHERE")
	}
	a.table(headers, rows)
}

// movesText tells what becomes of a node's copies.
func (a *App) movesText(n *atollv1.Node) string {
	var parts []string
	if n.Leaving > 0 || n.State == "draining" {
		parts = append(parts, fmt.Sprintf("leaves %s", count(int(n.Copysets), "copyset")))
	}
	if n.Joining > 0 {
		text := fmt.Sprintf("joins %d", n.Joining)
		if n.CopyBytes > 0 {
			text += ", " + a.size(n.CopyBytes) + " to copy"
		}
		if n.CopyRate > 0 {
			text += ", " + a.size(n.CopyRate) + "/s"
		}
		if n.CopyWaiting > 0 {
			text += fmt.Sprintf(", %d wait", n.CopyWaiting)
		}
		parts = append(parts, text)
	}
	if n.StrayBytes > 0 {
		parts = append(parts, a.size(n.StrayBytes)+" to go")
	}
	return orDash(strings.Join(parts, "; "))
}

func (a *App) configCommand() *cobra.Command {
	var origin bool
	cmd := &cobra.Command{Use: "config", Short: "Look at a server's settings", GroupID: "look"}
	show := &cobra.Command{
		Use:   "show",
		Short: "Show the running server's settings",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Cluster.GetConfig(ctx, connect.NewRequest(&atollv1.GetConfigRequest{}))
				if err != nil {
					return err
				}
				if a.output != "table" {
					return a.json(r.Msg)
				}
				rows := make([][]string, 0, len(r.Msg.Settings))
				for _, s := range r.Msg.Settings {
					row := []string{s.Key, s.Value}
					if origin {
						row = append(row, s.Origin)
					}
					rows = append(rows, row)
				}
				headers := []string{"SETTING", "VALUE"}
				if origin {
					headers = append(headers, "ORIGIN")
				}
				a.table(headers, rows)
				return nil
			})
		},
	}
	show.Flags().BoolVar(&origin, "origin", false, "also show where each value comes from")
	cmd.AddCommand(show)
	return cmd
}

func (a *App) tokenCommand() *cobra.Command {
	var ttl time.Duration
	cmd := &cobra.Command{Use: "token", Short: "Let other servers join", GroupID: "run"}
	create := &cobra.Command{
		Use:     "create",
		Short:   "Make a token with which one more server may join",
		Args:    cobra.NoArgs,
		Example: "  atoll token create --ttl 10m\n  atoll server --join 127.0.0.1:7400 --token A1…",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Cluster.CreateToken(ctx, connect.NewRequest(&atollv1.CreateTokenRequest{Ttl: durationpb.New(ttl)}))
				if err != nil {
					return err
				}
				if a.output != "table" {
					return a.json(r.Msg)
				}
				fmt.Fprintln(a.Out, r.Msg.Token)
				a.hint("valid until %s; use it with: atoll server --join ADDRESS --token TOKEN", r.Msg.Expires.AsTime().Local().Format(time.DateTime))
				return nil
			})
		},
	}
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token is valid, at most 24h")
	cmd.AddCommand(create)
	return cmd
}
