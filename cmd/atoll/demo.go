package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/cli"
	"github.com/atollstore/atoll/internal/demo"
)

// demoCommand is "atoll demo" with its verbs that break and mend nodes.
func demoCommand(app *cli.App) *cobra.Command {
	o := demo.Options{Out: os.Stdout, Err: os.Stderr, Version: buildVersion()}
	var verbose bool
	cmd := &cobra.Command{
		Use:     "demo",
		Short:   "Run a throw-away cluster of five nodes, to try and to break",
		GroupID: "run",
		Long: `Run a throw-away cluster: five storage nodes on five directories, an embedded
catalog and all gateways in one process, on loopback only. It runs until Ctrl-C.
From another terminal, break and mend nodes with the commands below.`,
		Example: `  atoll demo
  atoll demo --script tour --rm     # play the tour and clean up
  atoll demo kill 3                 # in another terminal
  atoll demo revive 3`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
			if verbose {
				o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
			}
			return demo.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Dir, "dir", "", "directory of the demo (default: atoll-demo here; with --script and --rm a temporary one)")
	f.IntVar(&o.Nodes, "nodes", 5, "storage nodes, 1 to 16")
	f.StringVar(&o.Limit, "node-size", "10G", "bytes that each node may use")
	f.BoolVar(&o.Remove, "rm", false, "delete the demo's data at the end")
	f.StringVar(&o.Script, "script", "", `"tour" plays the tour and ends`)
	f.StringVar(&o.Listen, "listen", "127.0.0.1:7400", "address of the control API")
	f.StringVar(&o.NBD, "nbd", "127.0.0.1:10809", "address of NBD on TCP, or none")
	f.BoolVar(&verbose, "verbose", false, "show the server's log")
	for _, v := range []struct{ verb, short string }{
		{"kill", "Stop a node as if its process had died"},
		{"pause", "Make a node answer nothing, as if it hung"},
		{"slow", "Make a node's disk slow"},
		{"fail", "Make a node's disk fail"},
		{"corrupt", "Flip bits in a node's stored data"},
		{"fill", "Make a node's disk full"},
		{"revive", "Undo what was done to a node"},
	} {
		cmd.AddCommand(injectCommand(app, v.verb, v.short))
	}
	cmd.AddCommand(addNodeCommand(app))
	return cmd
}

// injectCommand is one of the verbs.
func injectCommand(app *cli.App, verb, short string) *cobra.Command {
	var delay time.Duration
	cmd := &cobra.Command{
		Use:   verb + " NODE",
		Short: short,
		Args:  cobra.ExactArgs(1),

		ValidArgsFunction: app.CompleteNodes,
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.ParseUint(args[0], 10, 32)
			if err != nil || n == 0 {
				return fmt.Errorf("node %q: want a number from \"atoll node ls\": %w", args[0], atoll.ErrInvalid)
			}
			return app.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Demo.Inject(ctx, connect.NewRequest(&atollv1.InjectRequest{Node: uint32(n), Fault: verb, Delay: durationpb.New(delay)}))
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), r.Msg.Message)
				}
				return err
			})
		},
	}
	if verb == "slow" {
		cmd.Flags().DurationVar(&delay, "delay", 100*time.Millisecond, "added to every disk operation")
	}
	return cmd
}

// addNodeCommand is "atoll demo add-node".
func addNodeCommand(app *cli.App) *cobra.Command {
	return &cobra.Command{
		Use:   "add-node",
		Short: "Start one more node",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return app.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Demo.AddNode(ctx, connect.NewRequest(&atollv1.AddNodeRequest{}))
				if err == nil {
					fmt.Fprintf(cmd.OutOrStdout(), "node %d in %s\n", r.Msg.Node, r.Msg.Path)
				}
				return err
			})
		},
	}
}
