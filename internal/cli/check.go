package cli

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// checkTimeout bounds a check that reads everything, unless --timeout is given.
const checkTimeout = 24 * time.Hour

func (a *App) volumeCheck() *cobra.Command {
	var full bool
	cmd := &cobra.Command{
		Use:   "check NAME",
		Short: "Prove a volume consistent; with --read, mend its copies",
		Long: `Compares the volume's map with its log and with what the nodes say they hold.

With --read, every node reads every copy and verifies every checksum; damaged
blocks are replaced by the bytes of a good copy, and missing copies are made
anew. Then the volume reads all its data. Reads and writes go on meanwhile.

Exit code 8: something is damaged and could not be repaired. Exit code 7: all
that could be looked at is well, but some nodes did not answer.`,
		Example: `  atoll volume check disk1
  atoll volume check disk1 --read`,
		Args: exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if full && !cmd.Flags().Changed("timeout") {
				a.timeout = checkTimeout
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Volumes.CheckVolume(ctx, connect.NewRequest(&atollv1.CheckVolumeRequest{Name: volumeName(args[0]), ReadAll: full}))
				if err != nil {
					return a.didYouMean(ctx, c, args[0], err)
				}
				return a.printCheck(args[0], full, r.Msg)
			})
		},
	}
	cmd.Flags().BoolVar(&full, "read", false, "read and verify every copy, and repair what is damaged")
	return cmd
}

// printCheck tells what a check found, and returns an error unless all is well.
func (a *App) printCheck(name string, full bool, r *atollv1.CheckVolumeResponse) error {
	if a.output != "table" {
		if err := a.json(r); err != nil {
			return err
		}
	} else {
		if full {
			fmt.Fprintf(a.Out, "copies     %s read and verified, %s damaged, %s repaired\n", a.size(r.CheckedBytes), a.size(r.DamagedBytes), a.size(r.RepairedBytes))
			fmt.Fprintf(a.Out, "data       %s read\n", a.size(r.BytesRead))
		}
		a.printTroubles("damaged", r.Problems)
		a.printTroubles("unchecked", r.Unchecked)
	}
	switch {
	case len(r.Problems) > 0:
		return fmt.Errorf("volume %q: %d problems could not be repaired: %w", name, len(r.Problems), atoll.ErrCorrupt)
	case len(r.Unchecked) > 0:
		return api.WithHint(fmt.Errorf("volume %q: what could be checked is consistent, but not all could be: %w", name, atoll.ErrUnavailable),
			`"atoll node ls" shows which nodes are down; check again when they are back`)
	}
	if a.output == "table" {
		fmt.Fprintf(a.Out, "%s is consistent: %d blocks mapped\n", name, r.Blocks)
	}
	return nil
}

// shownFindings is how many lines of one kind are printed.
const shownFindings = 10

func (a *App) printTroubles(title string, list []string) {
	for i, text := range list {
		if i == shownFindings {
			fmt.Fprintf(a.Out, "%-10s and %d more (-o json shows them)\n", title, len(list)-i)
			return
		}
		fmt.Fprintf(a.Out, "%-10s %s\n", title, text)
	}
}
