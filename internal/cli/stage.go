package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
)

// keepEvery is how often a server is told that an import is alive; it gives one
// up after a minute of silence.
const keepEvery = 15 * time.Second

// target is a volume that takes a diff.
type target struct{ *image }

var _ transfer.Target = target{}

// Begin implements transfer.Target. An import that begins at no version, or is
// forced, begins at one made for it of the head as it is.
func (t target) Begin(ctx context.Context, from string, force bool) (transfer.Stage, error) {
	vol, err := t.volume(ctx)
	if err != nil {
		return nil, err
	}
	s := &diffStage{stageDisk: stageDisk{image: t.image, urls: vol.Urls}, vol: vol, stop: make(chan struct{})}
	var v *atollv1.Version
	if from == "" || force {
		if v, err = t.freeze(ctx); err != nil {
			return nil, err
		}
		s.base = &state{c: t.c, name: t.name, v: v, temporary: true}
		if !force {
			err = t.mustBeEmpty(ctx, v)
		}
	} else if v, err = t.find(ctx, from); err == nil && v == nil {
		err = fmt.Errorf("version %q of volume %q: %w", from, t.name, atoll.ErrNotExist)
	}
	if err == nil {
		err = s.begin(ctx, v)
	}
	if err != nil {
		return nil, errors.Join(err, s.Abort(ctx))
	}
	return s, nil
}

func (t target) find(ctx context.Context, name string) (*atollv1.Version, error) {
	r, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	return findSnap(r, name), nil
}

// mustBeEmpty fails with ErrConflict if a version holds anything but zeros.
func (t target) mustBeEmpty(ctx context.Context, v *atollv1.Version) error {
	empty := true
	err := diff(ctx, t.c, &atollv1.DiffRequest{Name: fmt.Sprintf("%s@%d", t.name, v.Number)}, func(e *atollv1.Extent) bool {
		empty = empty && e.Zero
		return empty
	})
	if err == nil && !empty {
		err = fmt.Errorf("volume %q holds data: %w", t.name, atoll.ErrConflict)
	}
	return err
}

// stageDisk is what is written to, over NBD.
type stageDisk struct {
	*image
	export string
	urls   []string
	disk   *transfer.NBD // nil while it is not open
	size   int64         // exact
}

// open connects, also to see a new size.
func (d *stageDisk) open(ctx context.Context) (err error) {
	if err = d.close(); err == nil {
		d.disk, err = openExport(ctx, d.urls, d.export, d.conns)
	}
	return err
}

func (d *stageDisk) close() error {
	if d.disk == nil {
		return nil
	}
	err := d.disk.Close()
	d.disk = nil
	return err
}

// Size implements transfer.Stage.
func (d *stageDisk) Size() int64 { return d.size }

// WriteAt implements transfer.Stage.
func (d *stageDisk) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.disk.WriteAt(ctx, p, off)
}

// Zero implements transfer.Stage. The last block of an image may be partly
// behind its end; it is zeroed whole.
func (d *stageDisk) Zero(ctx context.Context, off, n int64) error {
	if off+n == d.size {
		n = roundUp(d.size) - off
	}
	return d.disk.Zero(ctx, off, n)
}

// Resize implements transfer.Stage.
func (d *stageDisk) Resize(ctx context.Context, size int64) error {
	if n := roundUp(size); n != d.disk.Size() {
		if err := d.disk.Flush(ctx); err != nil {
			return err
		}
		_, err := d.c.Volumes.ResizeVolume(ctx, connect.NewRequest(&atollv1.ResizeVolumeRequest{Name: d.export, SizeBytes: n, Shrink: true}))
		if err != nil {
			return err
		}
		if err := d.open(ctx); err != nil {
			return err
		}
	}
	if tail := roundUp(size) - size; size < d.size && tail > 0 {
		if err := d.disk.Zero(ctx, size, tail); err != nil {
			return err
		}
	}
	d.size = size
	return nil
}

// sizeProps is the exact size as a version's properties keep it.
func (d *stageDisk) sizeProps() map[string]string {
	if roundUp(d.size) == d.size {
		return nil
	}
	return map[string]string{propSize: strconv.FormatInt(d.size, 10)}
}

// diffStage is the private successor of a volume's head.
type diffStage struct {
	stageDisk
	vol  *atollv1.Volume
	base *state        // a version made for this import, nil if none
	id   string        // empty before it has begun
	stop chan struct{} // closed when the import ends
	wg   sync.WaitGroup
}

// begin starts the import on the server.
func (s *diffStage) begin(ctx context.Context, from *atollv1.Version) error {
	r, err := s.c.Versions.BeginImport(ctx, connect.NewRequest(&atollv1.BeginImportRequest{Name: s.name, From: strconv.FormatUint(from.Number, 10)}))
	if err != nil {
		return err
	}
	s.id, s.export = r.Msg.ImportId, r.Msg.Export
	if err := s.open(ctx); err != nil {
		return err
	}
	s.size = exactSize(s.vol.Properties, s.disk.Size())
	s.wg.Go(s.keep)
	return nil
}

// keep tells the server that the import is alive.
func (s *diffStage) keep() {
	t := time.NewTicker(keepEvery)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
		}
		ctx, cancel := context.WithTimeout(context.Background(), keepEvery)
		// An import that the server does not know any more fails at its next step.
		_, _ = s.c.Versions.KeepImport(ctx, connect.NewRequest(&atollv1.KeepImportRequest{ImportId: s.id, Medium: s.name}))
		cancel()
	}
}

// end stops keeping the import alive and disconnects.
func (s *diffStage) end() error {
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	s.wg.Wait()
	err := s.close()
	if s.base != nil {
		err = errors.Join(err, s.base.Close())
		s.base = nil
	}
	return err
}

// Snapshot implements transfer.Stage; diffs have no use for it.
func (s *diffStage) Snapshot(context.Context, transfer.Version) error {
	return fmt.Errorf("make a version amid a diff: %w", atoll.ErrUnsupported)
}

// Commit implements transfer.Stage.
func (s *diffStage) Commit(ctx context.Context, version *transfer.Version) error {
	if err := s.disk.Flush(ctx); err != nil {
		return err
	}
	if err := s.close(); err != nil { // the server takes over what is idle
		return err
	}
	req := &atollv1.CommitImportRequest{ImportId: s.id, Medium: s.name, Properties: s.sizeProps()}
	if version != nil {
		req.To, req.Protected = keptName(version.Name), version.Protected
	}
	if _, err := s.c.Versions.CommitImport(ctx, connect.NewRequest(req)); err != nil {
		return err
	}
	return errors.Join(s.end(), keepSize(ctx, s.c, s.name, s.vol.Properties, s.size))
}

// Abort implements transfer.Stage.
func (s *diffStage) Abort(ctx context.Context) error {
	err := s.close()
	if s.id != "" {
		_, aerr := s.c.Versions.AbortImport(ctx, connect.NewRequest(&atollv1.AbortImportRequest{ImportId: s.id, Medium: s.name}))
		err = errors.Join(err, aerr)
	}
	return errors.Join(err, s.end())
}

// maker makes a volume of an image stream.
type maker struct {
	*image
	req *atollv1.CreateVolumeRequest // replicas, cache and so on
}

var _ transfer.Maker = (*maker)(nil)

// Create implements transfer.Maker.
func (m *maker) Create(ctx context.Context, h rbdstream.Header, size int64) (transfer.Stage, error) {
	req := &atollv1.CreateVolumeRequest{Name: m.name, SizeBytes: roundUp(size), Replicas: m.req.Replicas, Cache: m.req.Cache,
		Description: m.req.Description, Owner: m.req.Owner, Properties: headerProperties(h)}
	maps.Copy(req.Properties, m.req.Properties)
	r, err := m.c.Volumes.CreateVolume(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	s := &newStage{stageDisk{image: m.image, export: m.name, urls: r.Msg.Urls, size: size}}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.Abort(ctx))
	}
	return s, nil
}

// newStage is a volume in the making.
type newStage struct{ stageDisk }

// Snapshot implements transfer.Stage.
func (s *newStage) Snapshot(ctx context.Context, v transfer.Version) error {
	if err := s.disk.Flush(ctx); err != nil {
		return err
	}
	_, err := s.c.Versions.CreateVersion(ctx, connect.NewRequest(&atollv1.CreateVersionRequest{
		Media: []string{s.name}, Name: keptName(v.Name), Protected: v.Protected, Properties: s.sizeProps()}))
	return err
}

// Commit implements transfer.Stage.
func (s *newStage) Commit(ctx context.Context, version *transfer.Version) error {
	if err := s.disk.Flush(ctx); err != nil {
		return err
	}
	if version != nil {
		if err := s.Snapshot(ctx, *version); err != nil {
			return err
		}
	}
	if err := keepSize(ctx, s.c, s.name, nil, s.size); err != nil {
		return err
	}
	return s.close()
}

// Abort implements transfer.Stage.
func (s *newStage) Abort(ctx context.Context) error {
	return errors.Join(s.close(), removeVolume(ctx, s.c, s.name))
}
