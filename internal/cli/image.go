package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
)

// Properties of volumes and versions that keep what rbd's images have and
// volumes do not.
const (
	propSize        = "rbd.size" // exact bytes; volumes are multiples of 4 KiB. Versions get their volume's
	propOrder       = "rbd.order"
	propFeatures    = "rbd.features"
	propStripeUnit  = "rbd.stripe_unit"
	propStripeCount = "rbd.stripe_count"
	propMeta        = "rbd.meta." // and a key of image-meta
)

// exactSize returns the exact size of an image: as kept in its properties, as
// long as that agrees with the size of the volume.
func exactSize(props map[string]string, size int64) int64 {
	if n, err := strconv.ParseInt(props[propSize], 10, 64); err == nil && n >= 0 && roundUp(n) == size {
		return n
	}
	return size
}

// keepSize notes the exact size of a volume's head.
func keepSize(ctx context.Context, c *api.Client, name string, props map[string]string, exact int64) error {
	value := ""
	if roundUp(exact) != exact {
		value = strconv.FormatInt(exact, 10)
	}
	if props[propSize] == value {
		return nil
	}
	_, err := c.Names.SetProperties(ctx, connect.NewRequest(&atollv1.SetPropertiesRequest{Path: name, Properties: map[string]string{propSize: value}}))
	return err
}

// rbd lets snapshots have names that here mean a number or a role. Such names
// are kept with a tilde before them.
func keptName(rbd string) string {
	if needsTilde(strings.TrimLeft(rbd, "~")) {
		return "~" + rbd
	}
	return rbd
}

// streamName is the inverse of keptName.
func streamName(kept string) string {
	if bare := strings.TrimLeft(kept, "~"); bare != kept && needsTilde(bare) {
		return kept[1:]
	}
	return kept
}

func needsTilde(name string) bool {
	digits := name != "" && strings.Trim(name, "0123456789") == ""
	return digits || name == versionCur || name == versionLast || name == versionRelease
}

// findSnap looks a version up by the name that it has in rbd's streams, or as
// users name versions.
func findSnap(r *atollv1.ListVersionsResponse, name string) *atollv1.Version {
	for _, v := range r.Versions {
		if v.Name != "" && v.Name == keptName(name) {
			return v
		}
	}
	return findVersion(r, name)
}

// snapName is a version's name in rbd's streams.
func snapName(v *atollv1.Version) string { return streamName(versionName(v)) }

// header makes the header of an image stream of a volume's properties.
func header(props map[string]string) rbdstream.Header {
	h := rbdstream.DefaultHeader()
	number := func(key string, to *uint64) {
		if n, err := strconv.ParseUint(props[key], 10, 64); err == nil {
			*to = n
		}
	}
	number(propOrder, &h.Order)
	number(propFeatures, &h.Features)
	h.StripeUnit = uint64(h.ObjectSize())
	number(propStripeUnit, &h.StripeUnit)
	number(propStripeCount, &h.StripeCount)
	for k, v := range props {
		if key, ok := strings.CutPrefix(k, propMeta); ok {
			h.Meta = append(h.Meta, rbdstream.Meta{Key: key, Value: v})
		}
	}
	slices.SortFunc(h.Meta, func(a, b rbdstream.Meta) int { return strings.Compare(a.Key, b.Key) })
	return h
}

// headerProperties is the inverse of header: what differs from the defaults.
func headerProperties(h rbdstream.Header) map[string]string {
	props := map[string]string{}
	d := rbdstream.DefaultHeader()
	d.StripeUnit = uint64(h.ObjectSize())
	for _, f := range []struct {
		has        rbdstream.Fields
		key        string
		value, def uint64
	}{
		{rbdstream.HasOrder, propOrder, h.Order, d.Order}, {rbdstream.HasFeatures, propFeatures, h.Features, d.Features},
		{rbdstream.HasStripeUnit, propStripeUnit, h.StripeUnit, d.StripeUnit}, {rbdstream.HasStripeCount, propStripeCount, h.StripeCount, d.StripeCount},
	} {
		if h.Has&f.has != 0 && f.value != f.def {
			props[f.key] = strconv.FormatUint(f.value, 10)
		}
	}
	for _, m := range h.Meta {
		props[propMeta+m.Key] = m.Value
	}
	return props
}

// image is a volume on a server as an image with its history.
type image struct {
	c     *api.Client
	name  string
	conns int // NBD connections for each state
}

var _ transfer.Image = (*image)(nil)

// volume asks the server about the image.
func (m *image) volume(ctx context.Context) (*atollv1.Volume, error) {
	r, err := m.c.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: m.name}))
	if err != nil {
		return nil, err
	}
	return r.Msg, nil
}

// list asks the server for the versions.
func (m *image) list(ctx context.Context) (*atollv1.ListVersionsResponse, error) {
	r, err := m.c.Versions.ListVersions(ctx, connect.NewRequest(&atollv1.ListVersionsRequest{Name: m.name}))
	if err != nil {
		return nil, err
	}
	r.Msg.Versions = visible(r.Msg.Versions)
	return r.Msg, nil
}

// Header implements transfer.Image.
func (m *image) Header(ctx context.Context) (rbdstream.Header, error) {
	v, err := m.volume(ctx)
	if err != nil {
		return rbdstream.Header{}, err
	}
	return header(v.Properties), nil
}

// Versions implements transfer.Image. Versions without a name go by their number.
func (m *image) Versions(ctx context.Context) ([]transfer.Version, error) {
	r, err := m.list(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]transfer.Version, 0, len(r.Versions))
	for _, v := range r.Versions {
		out = append(out, transfer.Version{Name: snapName(v), Size: exactSize(v.Properties, v.SizeBytes), Protected: v.Protected})
	}
	return out, nil
}

// Open implements transfer.Image. For the head it makes a version, which goes
// away when the state is closed.
func (m *image) Open(ctx context.Context, version string) (transfer.State, error) {
	vol, err := m.volume(ctx)
	if err != nil {
		return nil, err
	}
	s := &state{c: m.c, name: m.name}
	if version == "" {
		if s.v, err = m.freeze(ctx); err != nil {
			return nil, err
		}
		s.temporary = true
	} else {
		r, err := m.list(ctx)
		if err != nil {
			return nil, err
		}
		if s.v = findSnap(r, version); s.v == nil {
			return nil, fmt.Errorf("version %q of volume %q: %w", version, m.name, atoll.ErrNotExist)
		}
		s.id = fmt.Sprintf("%s@%d", vol.Id, s.v.Number)
	}
	if s.disk, err = openExport(ctx, vol.Urls, numbered(m.name, s.v), m.conns); err == nil {
		err = s.measure(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// leftover is how old a version must be that a command made for itself to be one
// that the command could not delete any more.
const leftover = 24 * time.Hour

// sweep deletes what commands that were killed have left.
func (m *image) sweep(ctx context.Context) error {
	r, err := m.c.Versions.ListVersions(ctx, connect.NewRequest(&atollv1.ListVersionsRequest{Name: m.name, All: true}))
	if err != nil {
		return err
	}
	for _, v := range r.Msg.Versions {
		if v.Properties[temporaryProperty] == "" || v.Deleting || time.Since(v.Time.AsTime()) < leftover {
			continue
		}
		_, err := m.c.Versions.DeleteVersion(ctx, connect.NewRequest(&atollv1.DeleteVersionRequest{Name: numbered(m.name, v)}))
		if err != nil && !errors.Is(err, atoll.ErrNotExist) {
			return err
		}
	}
	return nil
}

// freeze makes a version of the head for as long as it is read.
func (m *image) freeze(ctx context.Context) (*atollv1.Version, error) {
	if err := m.sweep(ctx); err != nil {
		return nil, err
	}
	r, err := m.c.Versions.CreateVersion(ctx, connect.NewRequest(&atollv1.CreateVersionRequest{
		Media: []string{m.name}, Memo: "for a command that reads it", Properties: map[string]string{temporaryProperty: "1"}}))
	if err != nil {
		return nil, err
	}
	if len(r.Msg.Versions) != 1 {
		return nil, fmt.Errorf("make a version of %s: the server made %d: %w", m.name, len(r.Msg.Versions), atoll.ErrInvalid)
	}
	return r.Msg.Versions[0], nil
}

// headOnly shows one state of an image as if it had no history.
type headOnly struct {
	*image
	version string // "" = the head
}

// Versions implements transfer.Image.
func (headOnly) Versions(context.Context) ([]transfer.Version, error) { return nil, nil }

// Open implements transfer.Image.
func (h headOnly) Open(ctx context.Context, version string) (transfer.State, error) {
	if version == "" {
		version = h.version
	}
	return h.image.Open(ctx, version)
}

// state is one version of an image, read over NBD.
type state struct {
	c         *api.Client
	name      string
	v         *atollv1.Version
	id        string
	temporary bool
	size      int64
	disk      *transfer.NBD // nil until it is open
}

var _ transfer.State = (*state)(nil)

// measure finds the exact size. What was kept is believed only if nobody wrote
// behind it.
func (s *state) measure(ctx context.Context) error {
	s.size = s.disk.Size()
	exact := exactSize(s.v.Properties, s.size)
	tail := make([]byte, s.size-exact)
	if len(tail) == 0 {
		return nil
	}
	if err := s.disk.ReadAt(ctx, tail, exact); err != nil {
		return err
	}
	for _, b := range tail {
		if b != 0 {
			return nil
		}
	}
	s.size = exact
	return nil
}

// Size implements transfer.State.
func (s *state) Size() int64 { return s.size }

// ID implements transfer.State.
func (s *state) ID() string { return s.id }

// ReadAt implements transfer.State.
func (s *state) ReadAt(ctx context.Context, p []byte, off int64) error {
	return s.disk.ReadAt(ctx, p, off)
}

// Holes implements transfer.State.
func (s *state) Holes(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error {
	return s.disk.Holes(ctx, off, n, fn)
}

// Changes implements transfer.State.
func (s *state) Changes(ctx context.Context, since string, off, n int64, fn func(n int64, changed bool) bool) error {
	m := image{c: s.c, name: s.name}
	r, err := m.list(ctx)
	if err != nil {
		return err
	}
	from := findSnap(r, since)
	if from == nil {
		return fmt.Errorf("version %q of volume %q: %w", since, s.name, atoll.ErrNotExist)
	}
	at, end, more := off, off+n, true
	emit := func(to int64, changed bool) {
		if to = min(to, end); more && to > at {
			more = fn(to-at, changed)
			at = to
		}
	}
	// The changes are asked for in whole blocks.
	first, last := off&^(atoll.BlockSize-1), min((end+atoll.BlockSize-1)&^(atoll.BlockSize-1), s.v.SizeBytes)
	err = diff(ctx, s.c, &atollv1.DiffRequest{
		Name: numbered(s.name, s.v), From: strconv.FormatUint(from.Number, 10), Offset: first, Length: last - first,
	}, func(e *atollv1.Extent) bool {
		if e.Zero && e.Offset >= from.SizeBytes {
			return true
		}
		emit(e.Offset, false)
		emit(e.Offset+e.Length, true)
		return more
	})
	emit(end, false)
	return err
}

// cleanTime bounds the work of cleaning up after a command, which happens also
// when that was interrupted.
const cleanTime = 30 * time.Second

// Close implements transfer.State.
func (s *state) Close() error {
	var err error
	if s.disk != nil {
		err = s.disk.Close()
	}
	if !s.temporary {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanTime)
	defer cancel()
	_, derr := s.c.Versions.DeleteVersion(ctx, connect.NewRequest(&atollv1.DeleteVersionRequest{Name: numbered(s.name, s.v)}))
	return errors.Join(err, derr)
}

// diff calls fn for what differs, until it returns false.
func diff(ctx context.Context, c *api.Client, req *atollv1.DiffRequest, fn func(*atollv1.Extent) bool) error {
	if req.Length < 0 {
		return nil
	}
	_, err := diffSized(ctx, c, req, fn)
	return err
}

// diffSized is diff that also returns the size of the volume at its end.
func diffSized(ctx context.Context, c *api.Client, req *atollv1.DiffRequest, fn func(*atollv1.Extent) bool) (size int64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Versions.Diff(ctx, connect.NewRequest(req))
	if err != nil {
		return 0, err
	}
	for stream.Receive() {
		size = max(size, stream.Msg().SizeBytes) // only the first tells
		for _, e := range stream.Msg().Extents {
			if !fn(e) {
				return size, stream.Close()
			}
		}
	}
	err = stream.Err()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return size, errors.Join(err, stream.Close())
}

// openExport connects to an export that is beside those of the given addresses.
func openExport(ctx context.Context, urls []string, export string, conns int) (*transfer.NBD, error) {
	v := &atollv1.Volume{Name: export}
	for _, u := range urls {
		p, err := exportURL(u, export)
		if err != nil {
			return nil, err
		}
		v.Urls = append(v.Urls, p)
	}
	return openVolume(ctx, v, max(1, conns))
}

// exportURL is the address of another export beside the one that u names.
func exportURL(u, export string) (string, error) {
	p, err := url.Parse(u)
	if err != nil {
		return "", fmt.Errorf("address %q: %v: %w", u, err, atoll.ErrInvalid)
	}
	p.Path, p.RawPath = "/"+export, ""
	return p.String(), nil
}
