package cli

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// nodeVerbs are the commands that change nodes.
func (a *App) nodeVerbs() []*cobra.Command {
	var wait bool
	drain := &cobra.Command{
		Use:   "drain ID",
		Short: "Have other nodes take over a node's copies",
		Long: `Have other nodes take over all copies that a node holds. It takes no new
segments from then on, and serves reads until others hold everything. Nothing
stops meanwhile; undrain takes it back. Refused when the other nodes are too few
or have too little room.`,
		Args:    cobra.ExactArgs(1),
		Example: "  atoll node drain 3 --wait\n  atoll node remove 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.drainNode(cmd, args[0], "0", wait)
		},
	}
	drain.Flags().BoolVar(&wait, "wait", false, "return when the node holds nothing that is needed")
	replace := &cobra.Command{
		Use:   "replace ID NEW",
		Short: "Have another node take the place of one",
		Long: `Like drain, but the copies go to the node NEW wherever failure domains allow it.
The old node may be down. Remove it when it is done.`,
		Args:    cobra.ExactArgs(2),
		Example: "  atoll node replace 3 7 --wait\n  atoll node remove 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.drainNode(cmd, args[0], args[1], wait)
		},
	}
	replace.Flags().BoolVar(&wait, "wait", false, "return when the old node holds nothing that is needed")
	undrain := &cobra.Command{
		Use:   "undrain ID",
		Short: "Let a node that is drained take segments again",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := a.setNode(cmd, args[0], "active", "0")
			if err == nil {
				a.hint("node %d is active", n.Id)
			}
			return err
		},
	}
	remove := &cobra.Command{
		Use:   "remove ID",
		Short: "Take a node out of the cluster for good",
		Long: `Take a node out of the cluster for good. One that lives has to be drained
first; what one held that is down is copied anew on others at once. Refused when
data would be lost. A removed disk is not let in again unless it is emptied.`,
		Args:    cobra.ExactArgs(1),
		Example: "  atoll node remove 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := a.setNode(cmd, args[0], "removed", "0")
			if err == nil {
				a.hint("node %d is removed", n.Id)
			}
			return err
		},
	}
	return []*cobra.Command{drain, undrain, replace, remove}
}

func nodeID(text string) (uint32, error) {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("node %q: want a number as \"atoll node ls\" lists them: %w", text, atoll.ErrInvalid)
	}
	return uint32(n), nil
}

func (a *App) setNode(cmd *cobra.Command, id, state, heir string) (*atollv1.Node, error) {
	req := &atollv1.SetNodeRequest{State: state}
	var err error
	if req.Id, err = nodeID(id); err != nil {
		return nil, err
	}
	if req.Heir, err = nodeID(heir); err != nil {
		return nil, err
	}
	var n *atollv1.Node
	err = a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Cluster.SetNode(ctx, connect.NewRequest(req))
		if err == nil {
			n = r.Msg
		}
		return err
	})
	return n, err
}

// drainNode begins to drain a node and, if asked to, waits for the end.
func (a *App) drainNode(cmd *cobra.Command, id, heir string, wait bool) error {
	n, err := a.setNode(cmd, id, "draining", heir)
	if err != nil {
		return err
	}
	if !wait {
		a.hint("node %d is being drained; \"atoll node ls\" shows how far it is", n.Id)
		return nil
	}
	return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		said := ""
		for {
			text, done, err := drained(ctx, c, n.Id)
			if err != nil {
				return err
			}
			if text != said {
				a.hint("%s", text)
				said = text
			}
			if done {
				return nil
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
}

// drained tells how far a node is with being drained.
func drained(ctx context.Context, c *api.Client, id uint32) (text string, done bool, err error) {
	r, err := c.Cluster.ListNodes(ctx, connect.NewRequest(&atollv1.ListNodesRequest{}))
	if err != nil {
		return "", false, err
	}
	var left, rate int64
	var node *atollv1.Node
	for _, n := range r.Msg.Nodes {
		left, rate = left+n.CopyBytes, rate+n.CopyRate
		if n.Id == id {
			node = n
		}
	}
	switch {
	case node == nil:
		return "", false, fmt.Errorf("node %d: %w", id, atoll.ErrNotExist)
	case node.State == "active":
		return "", false, fmt.Errorf("node %d is not drained any more: %w", id, atoll.ErrConflict)
	case node.Copysets == 0:
		return fmt.Sprintf("node %d is drained", id), true, nil
	}
	text = fmt.Sprintf("node %d: %s left, %s to copy", id, count(int(node.Copysets), "copyset"), FormatSize(left))
	if rate > 0 {
		text += fmt.Sprintf(", %s/s, %v", FormatSize(rate), (time.Duration(float64(left)/float64(rate)) * time.Second).Round(time.Second))
	}
	return text, false, nil
}
