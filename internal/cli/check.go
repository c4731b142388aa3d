package cli

import (
	"context"
	"encoding/json"
	"errors"
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

// OfflineCheck checks volumes of a stopped server, as CheckVolume does those of
// a cluster: those named, or all, read from all copies when read is set. each
// gets every outcome.
type OfflineCheck func(ctx context.Context, data string, disks, names []string, read bool, each func(name string, r *atollv1.CheckVolumeResponse, err error)) error

// CheckCommand is "atoll check".
func (a *App) CheckCommand(offline OfflineCheck) *cobra.Command {
	var read bool
	var data string
	var disks []string
	cmd := &cobra.Command{
		Use:     "check [NAME...]",
		Short:   "Prove all volumes consistent, of a cluster or of a stopped server",
		GroupID: "look",
		Long: `Compares maps, manifests and segments of the volumes named, or of all of them,
with each other; reads and writes go on meanwhile. With --read, every copy is
read and verified, and what is damaged is mended.

With --data, the data of a server that is stopped are checked where they lie;
name its --disk directories, too, if it has some. That is possible for a server
that is a cluster by itself.

Without names, volumes in the trash are checked, too, and deleted ones that
clones need.

Exit code 8: something is damaged and could not be repaired. Exit code 7: all
that could be looked at is well, but not all could be.`,
		Example: `  atoll check
  atoll check --read disk1 disk2
  atoll check --data /var/lib/atoll --read
  atoll check --data /srv/atoll --disk /mnt/a --disk /mnt/b --disk /mnt/c`,
		RunE: func(cmd *cobra.Command, args []string) error {
			for i := range args {
				args[i] = volumeName(args[i])
			}
			if len(disks) > 0 && data == "" {
				return usagef("--disk goes with --data")
			}
			s := &checkSum{a: a, read: read}
			var err error
			if data != "" {
				err = offline(cmd.Context(), data, disks, args, read, s.add)
			} else {
				if !cmd.Flags().Changed("timeout") {
					a.timeout = checkTimeout
				}
				err = a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error { return s.online(ctx, c, args) })
			}
			return s.end(err)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&read, "read", false, "read and verify every copy, and repair what is damaged")
	f.StringVar(&data, "data", "", "check a stopped server: its data directory")
	f.StringSliceVar(&disks, "disk", nil, "a disk of that server; repeatable (default: those under --data)")
	cmd.ValidArgsFunction = a.completeVolumes
	return cmd
}

// checked is the outcome of one volume's check.
type checked struct {
	Name  string          `json:"name"`
	State string          `json:"state"` // consistent, damaged, unchecked or failed
	Error string          `json:"error,omitempty"`
	Check json.RawMessage `json:"check,omitempty"`
}

// checkSum collects outcomes.
type checkSum struct {
	a                          *App
	read                       bool
	all                        []checked
	damaged, unchecked, failed int
	first                      error // of what failed
	broken                     error // of printing
}

// online checks volumes of a cluster: those named, or all, also those in the trash
// and deleted ones that clones need.
func (s *checkSum) online(ctx context.Context, c *api.Client, names []string) error {
	what, given := map[string]*atollv1.CheckVolumeRequest{}, len(names) > 0
	for _, name := range names {
		what[name] = &atollv1.CheckVolumeRequest{Name: name}
	}
	if !given {
		var err error
		if names, err = everything(ctx, c, what); err != nil {
			return err
		}
	}
	for _, name := range names {
		one, cancel := context.WithTimeout(ctx, s.a.timeout)
		req := what[name]
		req.ReadAll = s.read
		r, err := c.Volumes.CheckVolume(one, connect.NewRequest(req))
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && !given && errors.Is(err, atoll.ErrNotExist):
			// removed, restored or purged meanwhile
		case err != nil:
			s.add(name, nil, s.a.didYouMean(ctx, c, name, err))
		default:
			s.add(name, r.Msg, nil)
		}
	}
	return nil
}

// everything lists what there is to check, in order, and adds how to ask for it.
func everything(ctx context.Context, c *api.Client, what map[string]*atollv1.CheckVolumeRequest) (names []string, err error) {
	add := func(name string, r *atollv1.CheckVolumeRequest) {
		names = append(names, name)
		what[name] = r
	}
	list, err := listVolumes(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, v := range list {
		add(v.Name, &atollv1.CheckVolumeRequest{Name: v.Name})
	}
	trash, err := listTrash(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, e := range trash {
		add(fmt.Sprintf("%s (in the trash, %s)", e.Path, e.Id), &atollv1.CheckVolumeRequest{Id: e.Id})
	}
	st, err := c.Cluster.GetStatus(ctx, connect.NewRequest(&atollv1.GetStatusRequest{}))
	if err != nil {
		return nil, err
	}
	for _, k := range st.Msg.Kept {
		add(fmt.Sprintf("%s (deleted, %s)", k.Name, k.Id), &atollv1.CheckVolumeRequest{Id: k.Id})
	}
	return names, nil
}

// add takes an outcome in and prints its line.
func (s *checkSum) add(name string, r *atollv1.CheckVolumeResponse, err error) {
	one := checked{Name: name, State: "consistent"}
	switch {
	case err != nil:
		one.State, one.Error = "failed", err.Error()
		s.failed++
		if s.first == nil {
			s.first = err
		}
	case len(r.Problems) > 0:
		one.State = "damaged"
		s.damaged++
	case len(r.Unchecked) > 0:
		one.State = "unchecked"
		s.unchecked++
	}
	if r != nil && s.a.output != "table" {
		if one.Check, err = plainJSON(r); err != nil {
			s.broken = err
		}
	}
	s.all = append(s.all, one)
	switch s.a.output {
	case "table":
		s.line(one, r)
	case "jsonl":
		s.broken = errors.Join(s.broken, s.a.plain(one))
	}
}

// line prints an outcome for people.
func (s *checkSum) line(one checked, r *atollv1.CheckVolumeResponse) {
	text := one.Error
	if r != nil {
		text = fmt.Sprintf("%d blocks mapped", r.Blocks)
		if s.read {
			text += fmt.Sprintf("; %s of copies read, %s damaged, %s repaired", s.a.size(r.CheckedBytes), s.a.size(r.DamagedBytes), s.a.size(r.RepairedBytes))
		}
	}
	fmt.Fprintf(s.a.Out, "%-10s  %s: %s\n", one.State, one.Name, text)
	if r != nil {
		s.a.printTroubles("  damaged", r.Problems)
		s.a.printTroubles("  unchecked", r.Unchecked)
	}
}

// end prints the rest and returns the error that sums up, after err of the check
// as a whole.
func (s *checkSum) end(err error) error {
	if s.a.output == "json" && (err == nil || len(s.all) > 0) {
		all := s.all
		if all == nil {
			all = []checked{}
		}
		s.broken = errors.Join(s.broken, s.a.plain(all))
	}
	volumes := func(n int) string { return fmt.Sprintf("%d of %s", n, plural(len(s.all), "volume", "volumes")) }
	switch {
	case s.damaged > 0:
		return errors.Join(fmt.Errorf("%s damaged beyond repair: %w", volumes(s.damaged), atoll.ErrCorrupt), err)
	case err != nil:
		return err
	case s.broken != nil:
		return s.broken
	case s.failed > 0 && len(s.all) == 1:
		return s.first
	case s.failed > 0:
		return fmt.Errorf("%s could not be checked: %w", volumes(s.failed), s.first)
	case s.unchecked > 0:
		return api.WithHint(fmt.Errorf("%s: not all could be looked at, the rest is consistent: %w", volumes(s.unchecked), atoll.ErrUnavailable),
			`"atoll node ls" shows which nodes are down; check again when they are back`)
	}
	if s.a.output == "table" {
		fmt.Fprintf(s.a.Out, "%s consistent\n", plural(len(s.all), "volume", "volumes"))
	}
	return nil
}
