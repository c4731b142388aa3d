package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/transfer"
)

// transferFlags are common to import and export.
type transferFlags struct{ concurrency, conns int }

func (t *transferFlags) add(cmd *cobra.Command) {
	cmd.Flags().IntVar(&t.concurrency, "concurrency", 16, "requests of 1 MiB in flight")
	cmd.Flags().IntVar(&t.conns, "connections", 2, "NBD connections")
}

func (a *App) volumeImport() *cobra.Command {
	var t transferFlags
	var req atollv1.CreateVolumeRequest
	var sizeText string
	var replicas int
	var overwrite bool
	cmd := &cobra.Command{
		Use:   "import FILE NAME",
		Short: "Make a volume from a raw disk image; - reads standard input",
		Long: `Make a volume from a raw disk image. Holes and zeros in the image take no room.
The volume gets the image's size, rounded up to 4 KiB, unless --size says more.
When import returns, every byte is on stable storage on all copies. If it fails,
a volume that it made is removed again.`,
		Example: "  atoll volume import disk.img disk1\n  zstdcat disk.img.zst | atoll volume import - disk1\n  atoll volume import new.img disk1 --overwrite",
		Args:    exactArgs(2, "an image file (or -) and a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Name, req.Replicas = volumeName(args[1]), int32(replicas)
			if sizeText != "" {
				size, err := ParseSize(sizeText)
				if err != nil {
					return err
				}
				req.SizeBytes = size
			}
			return a.runImport(cmd, args[0], &req, overwrite, t)
		},
	}
	t.add(cmd)
	cmd.Flags().StringVar(&sizeText, "size", "", "size of the volume (default: the image's)")
	cmd.Flags().IntVar(&replicas, "replicas", 0, "copies, as in volume create")
	cmd.Flags().StringVar(&req.Cache, "cache", "", "cache mode, as in volume create")
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "write into an existing volume")
	return cmd
}

// source is an opened image.
type source struct {
	io.Reader
	name string
	size int64 // -1 if it is not known
}

// pipe reads a file that may keep its reader waiting, until ctx ends.
type pipe struct {
	ctx context.Context
	f   *os.File
}

// Read implements io.Reader.
func (p pipe) Read(b []byte) (int, error) {
	for {
		if err := p.ctx.Err(); err != nil {
			return 0, err
		}
		fds := []unix.PollFd{{Fd: int32(p.f.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 100)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, fmt.Errorf("wait for %s: %w", p.f.Name(), err)
		case n > 0:
			return p.f.Read(b)
		}
	}
}

// openSource opens the image, or standard input for "-".
func (a *App) openSource(ctx context.Context, path string) (source, func() error, error) {
	if path == "-" {
		in := a.In
		if f, ok := in.(*os.File); ok {
			in = pipe{ctx, f}
		}
		return source{in, "stdin", -1}, func() error { return nil }, nil
	}
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return source{}, nil, fmt.Errorf("image %s: %w", path, atoll.ErrNotExist)
	}
	if err != nil {
		return source{}, nil, fmt.Errorf("image %s: %v: %w", path, err, atoll.ErrInvalid)
	}
	size := int64(-1)
	st, err := f.Stat()
	switch {
	case err != nil:
		return source{}, nil, errors.Join(err, f.Close())
	case st.IsDir():
		return source{}, nil, errors.Join(fmt.Errorf("image %s is a directory: %w", path, atoll.ErrInvalid), f.Close())
	case st.Mode().IsRegular():
		size = st.Size()
	default: // a block device tells its size by seeking
		if n, serr := f.Seek(0, io.SeekEnd); serr == nil && n > 0 {
			size = n
			if _, serr = f.Seek(0, io.SeekStart); serr != nil {
				return source{}, nil, errors.Join(serr, f.Close())
			}
		}
	}
	if size < 0 {
		return source{pipe{ctx, f}, filepath.Base(path), size}, f.Close, nil
	}
	return source{f, filepath.Base(path), size}, f.Close, nil
}

func (a *App) runImport(cmd *cobra.Command, path string, req *atollv1.CreateVolumeRequest, overwrite bool, t transferFlags) error {
	src, closeSrc, err := a.openSource(cmd.Context(), path)
	if err != nil {
		return err
	}
	defer closeSrc()
	if src.size == 0 {
		return fmt.Errorf("image %s is empty: %w", path, atoll.ErrInvalid)
	}
	fit := src.size < 0 && req.SizeBytes == 0 // make it as large as what comes
	if req.SizeBytes == 0 {
		req.SizeBytes = roundUp(src.size)
		if fit {
			req.SizeBytes = atoll.MaxVolumeSize
		}
	}
	var v *atollv1.Volume
	err = a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Volumes.CreateVolume(ctx, connect.NewRequest(req))
		if errors.Is(err, atoll.ErrExist) && !overwrite {
			return api.WithHint(err, "choose another name, or --overwrite it")
		}
		if errors.Is(err, atoll.ErrExist) {
			fit = false
			g, gerr := c.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: req.Name}))
			if gerr != nil {
				return gerr
			}
			v = g.Msg
			return nil
		}
		if err != nil {
			return err
		}
		v, overwrite = r.Msg, false
		return nil
	})
	if err != nil {
		return err
	}
	res, err := a.copyIn(cmd.Context(), v, src, !overwrite, t)
	if err == nil && fit {
		err = a.resizeTo(cmd, req.Name, roundUp(res.Bytes))
	}
	if err != nil {
		if !overwrite {
			err = errors.Join(err, a.undoImport(req.Name))
		}
		return err
	}
	if a.output != "table" {
		return a.json(v)
	}
	fmt.Fprintf(a.Out, "%s: %s imported, %s of data   %s\n", req.Name, a.size(res.Bytes), a.size(res.Data), shellQuote(first(v.Urls)))
	return nil
}

// roundUp gives the size of a volume that holds n bytes.
func roundUp(n int64) int64 {
	return max(atoll.BlockSize, (n+atoll.BlockSize-1)&^(atoll.BlockSize-1))
}

// copyIn writes the image to the volume.
func (a *App) copyIn(ctx context.Context, v *atollv1.Volume, src source, fresh bool, t transferFlags) (transfer.Result, error) {
	d, err := openVolume(ctx, v, t.conns)
	if err != nil {
		return transfer.Result{}, err
	}
	defer d.Close()
	p := a.NewProgress(src.name, max(src.size, 0))
	defer p.Done()
	return transfer.Import(ctx, d, src.Reader, src.size, transfer.Options{
		Concurrency: t.concurrency, Progress: p.Add, DestIsZero: fresh,
	})
}

// openVolume connects to a volume over NBD, by the first address that works.
func openVolume(ctx context.Context, v *atollv1.Volume, conns int) (*transfer.NBD, error) {
	err := error(nil)
	for _, u := range v.Urls {
		var d *transfer.NBD
		if d, err = transfer.OpenNBD(ctx, u, conns); err == nil {
			return d, nil
		}
	}
	if err == nil {
		err = fmt.Errorf("no server with a gateway runs: %w", atoll.ErrUnavailable)
	}
	return nil, fmt.Errorf("open volume %s: %w", v.Name, err)
}

func (a *App) resizeTo(cmd *cobra.Command, name string, size int64) error {
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Volumes.ResizeVolume(ctx, connect.NewRequest(&atollv1.ResizeVolumeRequest{Name: name, SizeBytes: size, Shrink: true}))
		return err
	})
}

// undoImport removes a volume that was half imported, also after an interrupt.
func (a *App) undoImport(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), a.timeout)
	defer cancel()
	c, err := a.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	for range 50 {
		_, err = c.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: name}))
		if !errors.Is(err, atoll.ErrBusy) { // the server may not have seen yet that we left
			break
		}
		<-time.After(100 * time.Millisecond)
	}
	if err != nil {
		a.hint("volume %s holds a part of the image; remove it with: atoll volume rm %s", name, name)
	}
	return err
}

func (a *App) volumeExport() *cobra.Command {
	var t transferFlags
	cmd := &cobra.Command{
		Use:   "export NAME FILE",
		Short: "Write a volume to a raw disk image; - writes standard output",
		Long: `Write a volume to a new raw disk image. The file is sparse, must not exist, and
is on stable storage when export returns. With - the image goes to standard
output.`,
		Example: "  atoll volume export disk1 disk1.img\n  atoll volume export disk1 - | zstd > disk1.img.zst",
		Args:    exactArgs(2, "a name and an image file (or -)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			d, err := openVolume(cmd.Context(), v, t.conns)
			if err != nil {
				return err
			}
			defer d.Close()
			p := a.NewProgress(v.Name, d.Size())
			o := transfer.Options{Concurrency: t.concurrency, Progress: p.Add}
			var res transfer.Result
			if args[1] == "-" {
				res, err = transfer.ExportStream(cmd.Context(), d, a.Out, o)
			} else {
				res, err = transfer.ExportFile(cmd.Context(), d, args[1], o)
			}
			p.Done()
			if err != nil || args[1] == "-" {
				return err
			}
			if a.output != "table" {
				return a.json(v)
			}
			fmt.Fprintf(a.Out, "%s: %s exported to %s, %s of data\n", v.Name, a.size(res.Bytes), args[1], a.size(res.Data))
			return nil
		},
	}
	t.add(cmd)
	return cmd
}
