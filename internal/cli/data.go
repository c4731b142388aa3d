package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
)

// transferFlags are common to import and export.
type transferFlags struct{ concurrency, conns int }

func (t *transferFlags) add(cmd *cobra.Command) {
	cmd.Flags().IntVar(&t.concurrency, "concurrency", 10, "requests of 1 MiB in flight")
	cmd.Flags().IntVar(&t.conns, "connections", 2, "NBD connections")
}

func (a *App) volumeImport() *cobra.Command {
	var t transferFlags
	var layout layoutFlags
	var sizeText, dest, path string
	var format int
	o := &importOptions{}
	cmd := &cobra.Command{
		Use:   "import FILE NAME",
		Short: "Make a volume from a disk image; - reads standard input",
		Long: `Make a volume from a raw disk image, or with --export-format 2 from an image
with all its versions, as this program and rbd export them. Holes and zeros take
no room. The volume gets the image's size, unless --size says more: exports give
back exactly as many bytes, NBD clients see it rounded up to 4 KiB. When import
returns, every byte is on stable storage on all copies. If it fails, a volume
that it made is removed again.`,
		Example: "  atoll volume import disk.img disk1\n  zstdcat disk.img.zst | atoll volume import - disk1\n  atoll volume import disk1.rbd disk1 --export-format 2",
		Args:    fileAndName(&path, &dest, true, "an image file (or -) and a name"),
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			o.req.Name = volumeName(dest)
			if sizeText != "" {
				if o.req.SizeBytes, err = parseSize(sizeText); err != nil {
					return err
				}
			}
			if o.layout, err = layout.override(); err != nil {
				return err
			}
			switch {
			case format != 1 && format != 2:
				return usagef("--export-format %d: want 1 (raw) or 2 (with versions)", format)
			case format == 2 && (o.overwrite || sizeText != ""):
				return usagef("an image with versions makes a new volume of its own size: no --overwrite, no --size")
			case format == 2:
				return a.importImage(cmd, path, o, t)
			}
			o.exact = sizeText == ""
			return a.runImport(cmd, path, o, t)
		},
	}
	t.add(cmd)
	layout.add(cmd)
	addCreateFlags(cmd, &o.req)
	cmd.Flags().StringVar(&sizeText, "size", "", "size of the volume (default: the image's)")
	cmd.Flags().IntVar(&format, "export-format", 1, "1: raw; 2: rbd's image with all versions")
	cmd.Flags().BoolVar(&o.overwrite, "overwrite", false, "write into an existing volume")
	cmd.Flags().StringVar(&dest, "dest", "", "the name, instead of NAME")
	cmd.Flags().StringVar(&path, "path", "", "the file, instead of FILE")
	return cmd
}

// importOptions say what an import makes.
type importOptions struct {
	req       atollv1.CreateVolumeRequest
	layout    func(*rbdstream.Header) // may be nil
	overwrite bool
	exact     bool // keep the exact size beside the volume
	empty     bool // an image without a byte is one, too
}

// addCreateFlags adds the flags of commands that make a volume.
func addCreateFlags(cmd *cobra.Command, req *atollv1.CreateVolumeRequest) {
	cmd.Flags().Int32Var(&req.Replicas, "replicas", 0, "copies, as in volume create")
	cmd.Flags().StringVar(&req.Cache, "cache", "", "cache mode, as in volume create")
}

// fileAndName reads FILE NAME; either may be given by a flag instead. With named,
// NAME may be left out and is the file's.
func fileAndName(path, name *string, named bool, want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		n := len(args)
		if *path == "" && len(args) > 0 {
			*path, args = args[0], args[1:]
		}
		if *name == "" && len(args) > 0 {
			*name, args = args[0], args[1:]
		}
		if *name == "" && named && *path != "-" && *path != "" {
			*name = filepath.Base(*path)
		}
		if *path == "" || *name == "" || len(args) > 0 {
			return usagef("want %s; got %s", want, count(n, "argument"))
		}
		return nil
	}
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

func (a *App) runImport(cmd *cobra.Command, path string, o *importOptions, t transferFlags) error {
	src, closeSrc, err := a.openSource(cmd.Context(), path)
	if err != nil {
		return err
	}
	defer closeSrc()
	v, res, err := a.importRaw(cmd, src, o, t)
	if errors.Is(err, atoll.ErrExist) {
		err = api.WithHint(err, "choose another name, or --overwrite it")
	}
	if err != nil {
		return err
	}
	return a.show(v, func() {
		fmt.Fprintf(a.Out, "%s: %s imported, %s of data   %s\n", v.Name, a.size(res.Bytes), a.size(res.Data), shellQuote(first(v.Urls)))
	})
}

// importRaw makes a volume of a raw image, or writes it into one.
func (a *App) importRaw(cmd *cobra.Command, src source, o *importOptions, t transferFlags) (v *atollv1.Volume, res transfer.Result, err error) {
	req, overwrite := &o.req, o.overwrite
	empty := fmt.Errorf("image %s is empty: %w", src.name, atoll.ErrInvalid)
	if src.size == 0 && !o.empty {
		return nil, res, empty
	}
	fit := src.size < 0 && req.SizeBytes == 0 // make it as large as what comes
	if req.SizeBytes == 0 {
		req.SizeBytes = roundUp(src.size)
		if fit {
			req.SizeBytes = atoll.MaxVolumeSize
		}
	}
	o.properties()
	err = a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		r, err := c.Volumes.CreateVolume(ctx, connect.NewRequest(req))
		if errors.Is(err, atoll.ErrExist) && overwrite {
			fit = false
			v, err = (&image{c: c, name: req.Name}).volume(ctx)
			return err
		}
		if err != nil {
			return err
		}
		v, overwrite = r.Msg, false
		return nil
	})
	if err != nil {
		return nil, res, err
	}
	res, err = a.copyIn(cmd.Context(), v, src, !overwrite, t)
	if err == nil && res.Bytes == 0 && !o.empty {
		err = empty
	}
	if err == nil && fit {
		err = a.resizeTo(cmd, req.Name, roundUp(res.Bytes))
	}
	exact := int64(-1) // to be kept from now on
	switch {
	case !overwrite && o.exact:
		exact = res.Bytes
	case overwrite && res.Bytes > exactSize(v.Properties, v.SizeBytes):
		exact = v.SizeBytes
	}
	if err == nil && exact >= 0 {
		err = a.Call(cmd, func(ctx context.Context, c *api.Client) error {
			return keepSize(ctx, c, req.Name, v.Properties, exact)
		})
	}
	if err != nil && !overwrite {
		err = errors.Join(err, a.undoImport(req.Name))
	}
	return v, res, err
}

// properties puts the layout that the user asked for into the request.
func (o *importOptions) properties() {
	if o.layout == nil {
		return
	}
	h := rbdstream.DefaultHeader()
	o.layout(&h)
	if o.req.Properties == nil {
		o.req.Properties = map[string]string{}
	}
	maps.Copy(o.req.Properties, headerProperties(h))
}

// importImage makes a volume with versions.
func (a *App) importImage(cmd *cobra.Command, path string, o *importOptions, t transferFlags) error {
	src, closeSrc, err := a.openSource(cmd.Context(), path)
	if err != nil {
		return err
	}
	defer closeSrc()
	return a.work(cmd.Context(), func(ctx context.Context, c *api.Client) error {
		p := a.NewProgress(src.name, max(src.size, 0))
		m := &image{c: c, name: o.req.Name, conns: t.conns}
		res, err := transfer.ImportImage(ctx, &maker{m, &o.req}, src.Reader, transfer.ImportOptions{
			Concurrency: t.concurrency, Progress: p.Reach, InputSize: max(src.size, 0), Override: o.layout})
		p.Done()
		if err != nil {
			return err
		}
		v, err := m.volume(ctx)
		if err != nil {
			return err
		}
		return a.show(v, func() {
			fmt.Fprintf(a.Out, "%s: %s imported%s   %s\n", v.Name, a.size(v.SizeBytes), withVersions(res.Versions), shellQuote(first(v.Urls)))
		})
	})
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
	err := a.work(ctx, func(ctx context.Context, c *api.Client) error { return removeVolume(ctx, c, name) })
	if err != nil {
		a.hint("volume %s holds a part of the image; remove it with: atoll volume rm %s --now", name, name)
	}
	return err
}

// removeVolume removes a volume for good that was just being written.
func removeVolume(ctx context.Context, c *api.Client, name string) error {
	var err error
	for range 50 {
		_, err = c.Volumes.DeleteVolume(ctx, connect.NewRequest(&atollv1.DeleteVolumeRequest{Name: name, Now: true}))
		if !errors.Is(err, atoll.ErrBusy) { // the server may not have seen yet that we left
			break
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
	return err
}
