package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/host"
)

const streamDepth = 10 // requests in flight, as exports have

// timed returns how long fn takes, in seconds.
func timed(fn func() error) (float64, error) {
	start := time.Now()
	err := fn()
	return time.Since(start).Seconds(), err
}

// export measures exports beside a read and a copy of the same bytes on the bare
// disk.
func (b *versionsBench) export(ctx context.Context) error {
	c, err := b.cluster(ctx, "export")
	if err != nil {
		return err
	}
	return errors.Join(b.exportIn(ctx, c), c.remove())
}

func (b *versionsBench) exportIn(ctx context.Context, c *cluster) error {
	size := 4 * gib / b.scale
	e := spread(size, size)
	raw, err := openFile(filepath.Join(b.dir, "raw"), false)
	if err != nil {
		return err
	}
	defer os.Remove(raw.f.Name())
	defer raw.Close()
	vol, err := c.create(ctx, "disk", size, "")
	if err != nil {
		return err
	}
	defer vol.Close()
	b.tell("write %d MiB to a file and to a volume", e.count)
	if err := errors.Join(fill(ctx, raw, e, 8), fill(ctx, vol, e, 8), backup(ctx, c, "disk")); err != nil {
		return err
	}
	for round := range b.rounds {
		b.tell("export: round %d", round+1)
		if err := b.exportRound(ctx, c, raw, e); err != nil {
			return err
		}
	}
	return b.exportDiffs(ctx, c, vol, raw, e)
}

// backup makes a version.
func backup(ctx context.Context, c *cluster, name string) error {
	_, err := c.client.Versions.CreateVersion(ctx, connect.NewRequest(&atollv1.CreateVersionRequest{Media: []string{name}}))
	return err
}

func (b *versionsBench) exportRound(ctx context.Context, c *cluster, raw file, e extent) error {
	mb := float64(e.count*piece) / megab
	bareRead, err := timed(func() error { return readAll(ctx, raw, e, streamDepth) })
	if err != nil {
		return err
	}
	toNull, err := timed(func() error { return c.run(ctx, "volume", "export", "disk@1", "-") })
	if err != nil {
		return err
	}
	b.table.add("export to /dev/null (beside: bare read)", "MB/s", goal{}, mb/toNull, mb/bareRead)
	b.table.add("export to /dev/null: of the bare read", "×", goal{least: 0.9}, bareRead/toNull)
	out := filepath.Join(b.dir, "out")
	defer os.Remove(out)
	bareCopy, err := timed(func() error { return copyFile(ctx, raw, out, e) })
	if err != nil {
		return err
	}
	if err := os.Remove(out); err != nil {
		return fmt.Errorf("remove the copy: %w", err)
	}
	toFile, err := timed(func() error { return c.run(ctx, "volume", "export", "disk@1", out) })
	if err != nil {
		return err
	}
	b.table.add("export to a file (beside: bare copy)", "MB/s", goal{}, mb/toFile, mb/bareCopy)
	b.table.add("export to a file: of the bare copy", "×", goal{least: 0.8}, bareCopy/toFile)
	return nil
}

// copyFile copies a file as fast as the disk can: several pieces at once, past
// the kernel's cache, durable in the end.
func copyFile(ctx context.Context, src file, path string, e extent) error {
	dst, err := openFile(path, false)
	if err != nil {
		return err
	}
	defer dst.Close()
	bufs := make(chan *host.Buffer, streamDepth)
	for range streamDepth {
		bufs <- host.Alloc(piece)
	}
	err = inOrder(ctx, e, streamDepth, func(ctx context.Context, i int64) error {
		p := <-bufs
		defer func() { bufs <- p }()
		if err := src.ReadAt(ctx, p.Bytes(), i*piece); err != nil {
			return err
		}
		return dst.WriteAt(ctx, p.Bytes(), i*piece, false)
	})
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return dst.Flush(ctx)
}

// exportDiffs measures diffs of two sizes beside reading as many random pages
// from the bare disk.
func (b *versionsBench) exportDiffs(ctx context.Context, c *cluster, vol disk, raw file, e extent) error {
	pages := e.count * piece / page
	last := 1
	for range b.rounds {
		var took [2]float64
		for i, part := range []struct {
			text  string
			pages int64
		}{{"1 %", pages / 100}, {"0.1 %", pages / 1000}} {
			if err := errors.Join(randomWrites(ctx, vol, e, part.pages, 8), backup(ctx, c, "disk")); err != nil {
				return err
			}
			bare, err := timed(func() error { return randomReads(ctx, raw, e, part.pages, streamDepth) })
			if err != nil {
				return err
			}
			took[i], err = timed(func() error {
				return c.run(ctx, "volume", "export-diff", fmt.Sprintf("disk@%d", last+1), "-", "--from-snap", fmt.Sprint(last))
			})
			if err != nil {
				return err
			}
			last++
			b.table.add("export-diff, "+part.text+" changed (beside: bare random reads)", "ms", goal{}, took[i]*1e3, bare*1e3)
		}
		b.table.add("export-diff: 0.1 % of the time of 1 %", "×", goal{most: 0.5}, took[1]/took[0])
	}
	return nil
}

// imports measures imports beside writing as much to a volume in order. The
// file is in the kernel's cache, so that what is measured is the import.
func (b *versionsBench) imports(ctx context.Context) error {
	c, err := b.cluster(ctx, "import")
	if err != nil {
		return err
	}
	return errors.Join(b.importIn(ctx, c), c.remove())
}

func (b *versionsBench) importIn(ctx context.Context, c *cluster) error {
	size := 2 * gib / b.scale
	e := spread(size, size)
	path := filepath.Join(b.dir, "raw")
	raw, err := openFile(path, false)
	if err != nil {
		return err
	}
	defer os.Remove(path)
	defer raw.Close()
	cached, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the image: %w", err)
	}
	defer cached.Close()
	mb := float64(size) / megab
	for round := range b.rounds {
		b.tell("import: round %d", round+1)
		bare, err := timed(func() error { return fill(ctx, raw, e, 8) })
		if err != nil {
			return err
		}
		if err := readAll(ctx, file{cached}, e, 2); err != nil {
			return err
		}
		vol, err := c.create(ctx, "written", size, "")
		if err != nil {
			return err
		}
		plain, err := timed(func() error { return fill(ctx, vol, e, 8) })
		if err := errors.Join(err, vol.Close()); err != nil {
			return err
		}
		if err := c.drop(ctx, "written"); err != nil {
			return err
		}
		took, err := timed(func() error { return c.run(ctx, "volume", "import", path, "imported") })
		if err != nil {
			return err
		}
		if err := c.drop(ctx, "imported"); err != nil {
			return err
		}
		b.table.add("sequential writes to a volume, 3 copies (beside: bare, 1 copy)", "MB/s", goal{}, mb/plain, mb/bare)
		b.table.add("import (beside: sequential writes)", "MB/s", goal{}, mb/took, mb/plain)
		b.table.add("import: of sequential writes", "×", goal{least: 0.8}, plain/took)
	}
	return nil
}
