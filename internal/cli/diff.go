package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

func (a *App) volumeDiff() *cobra.Command {
	var snap snapFlag
	var from string
	cmd := &cobra.Command{
		Use:   "diff NAME[@VERSION]",
		Short: "List the ranges that differ between two versions",
		Long: `List the ranges that differ between --from-snap (or nothing) and a version or
the present state, in whole blocks of 4 KiB. "zero" ranges read as zeros now.`,
		Example: "  atoll volume diff disk1 --from-snap monday\n  atoll volume diff disk1@tuesday --from-snap monday -o jsonl",
		Args:    exactArgs(1, "NAME or NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.spec(args[0])
			if err != nil {
				return err
			}
			return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				err := a.printDiff(ctx, c, &atollv1.DiffRequest{Name: s.String(), From: from})
				return a.didYouMean(ctx, c, s.String(), err)
			})
		},
	}
	snap.add(cmd)
	cmd.Flags().StringVar(&from, "from-snap", "", "version to compare with (default: an empty volume)")
	alsoFrom(cmd)
	return cmd
}

// alsoFrom lets --from mean --from-snap.
func alsoFrom(cmd *cobra.Command) {
	cmd.Flags().SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "from" {
			name = "from-snap"
		}
		return pflag.NormalizedName(name)
	})
}

// diffRow prints one range of a diff in fixed columns, since a diff is printed
// as it comes.
const diffRow = "%14s  %14s  %s\n"

func (a *App) printDiff(ctx context.Context, c *api.Client, req *atollv1.DiffRequest) error {
	if a.output == "json" {
		return a.printDiffJSON(ctx, c, req)
	}
	var changed, zeroed int64
	err := diff(ctx, c, req, func(e *atollv1.Extent) bool {
		kind := "data"
		if e.Zero {
			kind, zeroed = "zero", zeroed+e.Length
		} else {
			changed += e.Length
		}
		if a.output == "jsonl" {
			return a.json(e) == nil
		}
		if changed+zeroed == e.Length {
			fmt.Fprintf(a.Out, diffRow, "OFFSET", "LENGTH", "KIND")
		}
		fmt.Fprintf(a.Out, diffRow, strconv.FormatInt(e.Offset, 10), strconv.FormatInt(e.Length, 10), kind)
		return true
	})
	if err == nil && a.output == "table" {
		a.hint("%s of data, %s of zeros", FormatSize(changed), FormatSize(zeroed))
	}
	return err
}

// diffJSON is a whole diff.
type diffJSON struct {
	Extents []extentJSON `json:"extents"`
	Size    int64        `json:"sizeBytes"` // of the volume, at the later version
	Data    int64        `json:"dataBytes"` // of extents that hold data
	Zero    int64        `json:"zeroBytes"` // of those that read as zeros now
}

type extentJSON struct {
	Length int64 `json:"length"`
	Offset int64 `json:"offset"`
	Zero   bool  `json:"zero"`
}

func (a *App) printDiffJSON(ctx context.Context, c *api.Client, req *atollv1.DiffRequest) error {
	all := diffJSON{Extents: []extentJSON{}}
	size, err := diffSized(ctx, c, req, func(e *atollv1.Extent) bool {
		all.Extents = append(all.Extents, extentJSON{e.Length, e.Offset, e.Zero})
		if e.Zero {
			all.Zero += e.Length
		} else {
			all.Data += e.Length
		}
		return true
	})
	if err != nil {
		return err
	}
	all.Size = size
	return a.plain(all)
}

// usage is what one state of a volume takes.
type usage struct {
	Name        string `json:"name"`
	ID          string `json:"id"`
	Snapshot    string `json:"snapshot,omitempty"`
	Number      uint64 `json:"snapshotId,omitempty"`
	Provisioned int64  `json:"provisionedBytes"`
	Used        int64  `json:"usedBytes"` // changed since the version before
}

func (a *App) volumeUsage() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "du [NAME[@VERSION]]...",
		Aliases: []string{"disk-usage"},
		Short:   "Show what volumes and their versions take",
		Long: `Show what volumes and their versions take: of each version, and of the present
state, the data that changed since the version before it.`,
		Example: "  atoll volume du\n  atoll volume du disk1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				var all []usage
				specs, err := specsOrAll(ctx, c, args)
				if err != nil {
					return err
				}
				for _, s := range specs {
					u, err := volumeUsage(ctx, c, s)
					if err != nil {
						return a.didYouMean(ctx, c, s.String(), err)
					}
					all = append(all, u...)
				}
				if err := a.printUsage(all); err != nil || len(args) > 0 {
					return err
				}
				st, err := c.Cluster.GetStatus(ctx, connect.NewRequest(&atollv1.GetStatusRequest{}))
				if err == nil {
					a.hintKept(st.Msg.Kept)
				}
				return err
			})
		},
	}
	return cmd
}

// specsOrAll reads the arguments; none means all volumes.
func specsOrAll(ctx context.Context, c *api.Client, args []string) ([]spec, error) {
	var out []spec
	for _, arg := range args {
		s, err := parseSpec(arg)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	if len(args) > 0 {
		return out, nil
	}
	vols, err := listVolumes(ctx, c)
	for _, v := range vols {
		out = append(out, spec{name: v.Name})
	}
	return out, err
}

// volumeUsage reckons what a volume takes, or one of its versions.
func volumeUsage(ctx context.Context, c *api.Client, s spec) ([]usage, error) {
	m := image{c: c, name: s.name}
	vol, err := m.volume(ctx)
	if err != nil {
		return nil, err
	}
	r, err := m.list(ctx)
	if err != nil {
		return nil, err
	}
	var only *atollv1.Version
	if s.version != "" && s.version != versionCur {
		if only = findSnap(r, s.version); only == nil {
			return nil, fmt.Errorf("version %q of volume %q: %w", s.version, s.name, atoll.ErrNotExist)
		}
	}
	var out []usage
	before := ""
	for _, v := range r.Versions {
		number := strconv.FormatUint(v.Number, 10)
		if only == nil || only == v {
			used, err := changedBytes(ctx, c, &atollv1.DiffRequest{Name: s.name + "@" + number, From: before})
			if err != nil {
				return nil, err
			}
			out = append(out, usage{vol.Name, vol.Id, versionName(v), v.Number, exactSize(v.Properties, v.SizeBytes), used})
		}
		before = number
	}
	if only != nil {
		return out, nil
	}
	used, err := changedBytes(ctx, c, &atollv1.DiffRequest{Name: s.name, From: before})
	return append(out, usage{Name: vol.Name, ID: vol.Id, Provisioned: exactSize(vol.Properties, vol.SizeBytes), Used: used}), err
}

// changedBytes counts the data of a diff.
func changedBytes(ctx context.Context, c *api.Client, req *atollv1.DiffRequest) (n int64, err error) {
	err = diff(ctx, c, req, func(e *atollv1.Extent) bool {
		if !e.Zero {
			n += e.Length
		}
		return true
	})
	return n, err
}

func (a *App) printUsage(all []usage) error {
	switch a.output {
	case "json":
		return a.plain(map[string][]usage{"images": all})
	case "jsonl":
		for _, u := range all {
			if err := a.plain(u); err != nil {
				return err
			}
		}
		return nil
	}
	var provisioned, used int64
	rows := make([][]string, 0, len(all)+1)
	for _, u := range all {
		name := u.Name
		if u.Number != 0 {
			name += "@" + u.Snapshot
		} else {
			provisioned += u.Provisioned
		}
		used += u.Used
		rows = append(rows, []string{name, a.size(u.Provisioned), a.size(u.Used)})
	}
	if len(all) > 1 {
		rows = append(rows, []string{"<TOTAL>", a.size(provisioned), a.size(used)})
	}
	a.table([]string{"NAME", ">PROVISIONED", ">USED"}, rows)
	return nil
}

func (a *App) volumeSparsify() *cobra.Command {
	var t transferFlags
	cmd := &cobra.Command{
		Use:   "sparsify NAME",
		Short: "Give back the room of blocks that hold only zeros",
		Long: `Read a volume's data and give back the room of blocks of 4 KiB that hold only
zeros. All or nothing: if the volume is written meanwhile, it stays as it is and
the command says so; try again when it is idle.`,
		Example: "  atoll volume sparsify disk1",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := volumeName(args[0])
			return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				p := a.NewProgress(name, 0)
				freed, err := sparsify(ctx, &image{c: c, name: name, conns: t.conns}, p.Reach)
				p.Done()
				if errors.Is(err, atoll.ErrConflict) {
					err = api.WithHint(err, "the volume was written meanwhile; try again when it is idle")
				}
				if err != nil {
					return a.didYouMean(ctx, c, name, err)
				}
				if a.output != "table" {
					return a.plain(map[string]int64{"freedBytes": freed})
				}
				fmt.Fprintf(a.Out, "%s: %s given back\n", name, a.size(freed))
				return nil
			})
		},
	}
	t.add(cmd)
	return cmd
}

// sparsifyPiece is how much is read at once.
const sparsifyPiece = 1 << 20

// sparsify makes holes of zeros in a private successor of the head, which then
// takes its place.
func sparsify(ctx context.Context, m *image, progress func(done, total int64)) (freed int64, err error) {
	stage, err := target{m}.Begin(ctx, "", true)
	if err != nil {
		return 0, err
	}
	s, ok := stage.(*diffStage)
	if !ok {
		return 0, errors.Join(fmt.Errorf("sparsify %s: %w", m.name, atoll.ErrUnsupported), stage.Abort(ctx))
	}
	freed, err = punchZeros(ctx, s, progress)
	if err == nil && freed > 0 {
		err = s.Commit(ctx, nil)
	}
	if err != nil || freed == 0 {
		ctx, cancel := context.WithTimeout(context.Background(), cleanTime)
		defer cancel()
		return 0, errors.Join(err, s.Abort(ctx))
	}
	return freed, nil
}

// punchZeros makes holes of the zeros in a stage.
func punchZeros(ctx context.Context, s *diffStage, progress func(done, total int64)) (freed int64, err error) {
	size := s.disk.Size()
	buf := host.Alloc(sparsifyPiece)
	defer buf.Release()
	for off := int64(0); off < size; {
		n, data := int64(0), false
		err := s.disk.Holes(ctx, off, min(1<<30, size-off), func(m int64, hole bool) bool {
			n, data = min(m, size-off), !hole
			return false
		})
		if err != nil {
			return freed, err
		}
		if n <= 0 {
			return freed, fmt.Errorf("list holes at %d: no answer: %w", off, atoll.ErrInvalid)
		}
		if data {
			n = min(n, sparsifyPiece)
			b := buf.Bytes()[:n]
			if err := s.disk.ReadAt(ctx, b, off); err != nil {
				return freed, err
			}
			if err := punch(ctx, s, b, off, &freed); err != nil {
				return freed, err
			}
		}
		off += n
		progress(off, size)
	}
	return freed, nil
}

// punch makes holes of the blocks of zeros in b, which are the bytes at off.
func punch(ctx context.Context, s *diffStage, b []byte, off int64, freed *int64) error {
	start := -1 // of a run of zeros
	for i := 0; i <= len(b); i += atoll.BlockSize {
		zero := i < len(b) && allZero(b[i:min(i+atoll.BlockSize, len(b))])
		if zero && start < 0 {
			start = i
		}
		if !zero && start >= 0 {
			n := int64(min(i, len(b)) - start)
			if err := s.disk.Zero(ctx, off+int64(start), n); err != nil {
				return err
			}
			*freed += n
			start = -1
		}
	}
	return nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
