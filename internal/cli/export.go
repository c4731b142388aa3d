package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
)

// fileFlags are those of commands that make a file.
type fileFlags struct {
	path             string
	resume, checksum bool
}

func (f *fileFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.path, "path", "", "the file, instead of FILE")
	cmd.Flags().BoolVar(&f.resume, "resume", false, "keep the file of an export that fails, and go on with it next time (versions only)")
	cmd.Flags().BoolVar(&f.checksum, "checksum", false, "write checksums to FILE.crc32c, for \"volume verify\"")
}

// args reads the arguments before FILE, and FILE.
func (f *fileFlags) args(n int, want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if f.path == "" && len(args) == n+1 {
			f.path, args = args[n], args[:n]
		}
		if f.path == "" || len(args) != n {
			return usagef("want %s; got %s", want, count(len(args), "argument"))
		}
		return nil
	}
}

// noDirectory adds a hint to an error that comes from a file whose directory is
// not there.
func (f *fileFlags) noDirectory(err error) error {
	if !errors.Is(err, atoll.ErrNotExist) || f.path == "-" {
		return err
	}
	dir := filepath.Dir(f.path)
	if _, serr := os.Stat(dir); !os.IsNotExist(serr) {
		return err
	}
	return api.WithHint(err, "make the directory first: mkdir -p "+shellQuote(dir))
}

// write lets fn write the file, or standard output for "-".
func (a *App) write(f fileFlags, fn func(w io.Writer) error) error {
	if f.path == "-" {
		// A reader that goes away is an error to be told, not the end: there is
		// something to clean up.
		signal.Ignore(syscall.SIGPIPE)
		return fn(a.Out)
	}
	file, err := transfer.CreateFile(f.path, transfer.FileOptions{Resume: f.resume, Checksum: f.checksum})
	if err != nil {
		return err
	}
	return file.Finish(fn(file))
}

func (a *App) volumeExport() *cobra.Command {
	var t transferFlags
	var f fileFlags
	var snap snapFlag
	var format int
	cmd := &cobra.Command{
		Use:   "export NAME[@VERSION] FILE",
		Short: "Write a volume to a disk image; - writes standard output",
		Long: `Write a volume to a new raw disk image, or with --export-format 2 to an image
with all its versions, which rbd can import too. The file is sparse, must not
exist, and is on stable storage when export returns. What is exported is one
consistent state, also while the volume is in use.`,
		Example: "  atoll volume export disk1 disk1.img\n  atoll volume export disk1@monday - | zstd > monday.img.zst\n  atoll volume export disk1 disk1.rbd --export-format 2",
		Args:    f.args(1, "a name and an image file (or -)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.spec(args[0])
			switch {
			case err != nil:
				return err
			case format != 1 && format != 2:
				return usagef("--export-format %d: want 1 (raw) or 2 (with versions)", format)
			case format == 2 && s.version != "":
				return usagef("--export-format 2 exports all versions; name the volume alone: %s", s.name)
			}
			var res transfer.Result
			err = a.work(cmd.Context(), func(ctx context.Context, c *api.Client) (err error) {
				p := a.NewProgress(s.name, 0)
				m := &image{c: c, name: s.name, conns: t.conns}
				res, err = a.export(ctx, m, s, format, f, transfer.ExportOptions{Concurrency: t.concurrency, Progress: p.Reach, Checksum: f.checksum && format == 2})
				p.Done()
				return a.didYouMean(ctx, c, s.String(), f.noDirectory(err))
			})
			if err != nil || f.path == "-" {
				return err
			}
			return a.exported(s, f.path, res)
		},
	}
	t.add(cmd)
	f.add(cmd)
	snap.add(cmd)
	cmd.Flags().IntVar(&format, "export-format", 1, "1: raw; 2: rbd's image with all versions")
	return cmd
}

// export writes a volume in one of rbd's formats.
func (a *App) export(ctx context.Context, m *image, s spec, format int, f fileFlags, o transfer.ExportOptions) (res transfer.Result, err error) {
	if format == 2 {
		err = a.write(f, func(w io.Writer) (err error) {
			res, err = transfer.ExportImage(ctx, m, w, o)
			return err
		})
		return res, err
	}
	st, err := m.Open(ctx, stateName(s.version))
	if err != nil {
		return res, err
	}
	err = a.write(f, func(w io.Writer) (err error) {
		res, err = transfer.ExportRaw(ctx, st, w, o)
		return err
	})
	return res, errors.Join(err, st.Close())
}

// stateName is a version as image.Open wants it.
func stateName(version string) string {
	if version == versionCur {
		return ""
	}
	return version
}

// exportResult is what an export tells as JSON.
type exportResult struct {
	Name     string `json:"name"`
	Path     string `json:"path"`
	Bytes    int64  `json:"bytes"`
	Data     int64  `json:"dataBytes"`
	Versions int    `json:"versions"`
}

// exported tells what an export wrote.
func (a *App) exported(s spec, path string, res transfer.Result) error {
	if a.output != "table" {
		return a.plain(exportResult{s.String(), path, res.Bytes, res.Data, res.Versions})
	}
	fmt.Fprintf(a.Out, "%s: %s exported to %s, %s of data%s\n", s, a.size(res.Bytes), path, a.size(res.Data), withVersions(res.Versions))
	return nil
}

func (a *App) volumeExportDiff() *cobra.Command {
	var t transferFlags
	var f fileFlags
	var snap snapFlag
	var d transfer.Diff
	cmd := &cobra.Command{
		Use:   "export-diff NAME[@VERSION] FILE",
		Short: "Write what changed between two versions, as rbd does",
		Long: `Write what changed between --from-snap (or nothing) and a version or the present
state, in rbd's format: rbd can import it, and "volume import-diff" what rbd
exported. It takes time in proportion to the changes.`,
		Example: "  atoll volume export-diff disk1@tue --from-snap mon tue.diff\n  atoll volume export-diff disk1@mon - | ssh there rbd import-diff - disk1",
		Args:    f.args(1, "NAME[@VERSION] and a file (or -)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := snap.spec(args[0])
			if err != nil {
				return err
			}
			var res transfer.Result
			err = a.work(cmd.Context(), func(ctx context.Context, c *api.Client) (err error) {
				m := &image{c: c, name: s.name, conns: t.conns}
				d := d
				if d.From, err = m.streamNameOf(ctx, d.From); err == nil {
					d.To, err = m.streamNameOf(ctx, stateName(s.version))
				}
				if err != nil {
					return a.didYouMean(ctx, c, s.String(), f.noDirectory(err))
				}
				p := a.NewProgress(s.name, 0)
				err = a.write(f, func(w io.Writer) (err error) {
					res, err = transfer.ExportDiff(ctx, m, d, w, transfer.ExportOptions{Concurrency: t.concurrency, Progress: p.Reach})
					return err
				})
				p.Done()
				return a.didYouMean(ctx, c, s.String(), f.noDirectory(err))
			})
			if err != nil || f.path == "-" {
				return err
			}
			return a.exported(s, f.path, res)
		},
	}
	t.add(cmd)
	f.add(cmd)
	snap.add(cmd)
	cmd.Flags().StringVar(&d.From, "from-snap", "", "version that the diff begins at (default: an empty volume)")
	alsoFrom(cmd)
	cmd.Flags().BoolVar(&d.WholeObject, "whole-object", false, "write whole objects of 4 MiB of which anything changed")
	return cmd
}

// streamNameOf turns a version as users name it (last, a number…) into its name
// in rbd's streams. "" stays "".
func (m *image) streamNameOf(ctx context.Context, version string) (string, error) {
	if version == "" {
		return "", nil
	}
	r, err := m.list(ctx)
	if err != nil {
		return "", err
	}
	if v := findSnap(r, version); v != nil {
		return snapName(v), nil
	}
	return version, nil // whoever looks for it says that it is not there
}

func (a *App) volumeImportDiff() *cobra.Command {
	var t transferFlags
	var path, name string
	var force bool
	cmd := &cobra.Command{
		Use:   "import-diff FILE NAME",
		Short: "Apply a diff to a volume; - reads standard input",
		Long: `Apply a diff, as "export-diff" of this program or of rbd writes it, to a volume.
All of it or nothing: a diff that is damaged or ends too soon changes nothing.
The volume must be as it was in the version that the diff begins at.`,
		Example: "  atoll volume import-diff tue.diff disk1",
		Args:    fileAndName(&path, &name, false, "a file (or -) and a name"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			src, closeSrc, err := a.openSource(cmd.Context(), path)
			if err != nil {
				return err
			}
			defer closeSrc()
			name := volumeName(name)
			return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
				p := a.NewProgress(src.name, max(src.size, 0))
				m := &image{c: c, name: name, conns: t.conns}
				res, err := transfer.ImportDiff(ctx, target{m}, src.Reader, transfer.ImportOptions{
					Concurrency: t.concurrency, Progress: p.Reach, InputSize: max(src.size, 0), Force: force})
				p.Done()
				if err != nil {
					return a.didYouMean(ctx, c, name, err)
				}
				v, err := m.volume(ctx)
				if err != nil {
					return err
				}
				return a.show(v, func() { fmt.Fprintf(a.Out, "%s: %s of data%s\n", name, a.size(res.Data), becomes(name, res.To)) })
			})
		},
	}
	t.add(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "apply it also if the volume was changed since the version it begins at")
	cmd.Flags().StringVar(&path, "path", "", "the file, instead of FILE")
	cmd.Flags().StringVar(&name, "image", "", "the name, instead of NAME")
	return cmd
}

func becomes(name, version string) string {
	if version == "" {
		return ""
	}
	return ", now " + name + "@" + keptName(version)
}

func (a *App) volumeMergeDiff() *cobra.Command {
	var f fileFlags
	cmd := &cobra.Command{
		Use:     "merge-diff FIRST SECOND FILE",
		Short:   "Make one diff of two that follow each other",
		Example: "  atoll volume merge-diff mon-tue.diff tue-wed.diff mon-wed.diff",
		Args:    f.args(2, "two diffs (the first may be -) and a file for the result (or -)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			err := a.mergeDiff(cmd.Context(), args[0], args[1], f)
			if err == nil && f.path != "-" && a.output == "table" {
				fmt.Fprintf(a.Out, "%s\n", f.path)
			}
			return err
		},
	}
	f.add(cmd)
	return cmd
}

// mergeDiff merges two files.
func (a *App) mergeDiff(ctx context.Context, one, two string, f fileFlags) error {
	first, closeFirst, err := a.openSource(ctx, one)
	if err != nil {
		return err
	}
	defer closeFirst()
	second, closeSecond, err := a.openSource(ctx, two)
	if err != nil {
		return err
	}
	defer closeSecond()
	return a.write(f, func(w io.Writer) error { return rbdstream.Merge(w, first.Reader, second.Reader) })
}

func (a *App) volumeVerify() *cobra.Command {
	var t transferFlags
	cmd := &cobra.Command{
		Use:     "verify FILE",
		Short:   "Compare an exported file with its checksums",
		Long:    "Compare a file that was exported with --checksum with the checksums beside it.",
		Example: "  atoll volume export disk1 disk1.img --checksum\n  atoll volume verify disk1.img",
		Args:    exactArgs(1, "a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := transfer.VerifyFile(cmd.Context(), args[0], t.concurrency); err != nil {
				return err
			}
			if a.output == "table" {
				fmt.Fprintf(a.Out, "%s is as it was written\n", args[0])
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&t.concurrency, "concurrency", 10, "reads in flight")
	return cmd
}
