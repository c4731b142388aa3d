package atoll_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/api/atollv1/atollv1connect"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// fake is a server with volumes in memory: the calls that the client makes.
type fake struct {
	atollv1connect.UnimplementedClusterServiceHandler
	atollv1connect.UnimplementedVolumeServiceHandler
	atollv1connect.UnimplementedVersionServiceHandler
	atollv1connect.UnimplementedNamespaceServiceHandler
	dir   string
	cache string // of all volumes

	mu       sync.Mutex
	epoch    uint64
	urls     []string // with %s for the export
	nbd      *nbd.Server
	hook     func(off int64) // before every access
	broken   error           // of every flush
	disks    map[string]*nbdtest.Disk
	versions map[string][]*atollv1.Version
	calls    []string
}

// listen listens on a Unix socket.
func listen(t *testing.T, dir, name string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// serve serves NBD, in place of the server before.
func (f *fake) serve(t *testing.T) {
	t.Helper()
	name := fmt.Sprintf("nbd%d", time.Now().UnixNano())
	s := nbd.Serve(nbd.Options{Listeners: []net.Listener{listen(t, f.dir, name)}, Exports: f})
	t.Cleanup(func() { s.Close() })
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nbd = s
	f.urls = []string{"nbd+unix:///%s?socket=/nowhere", "nbd+unix:///%s?socket=" + filepath.Join(f.dir, name)}
}

// startFake serves the API and NBD on Unix sockets.
func startFake(t *testing.T) (*fake, string) {
	t.Helper()
	dir := t.TempDir()
	f := &fake{dir: dir, epoch: 1, disks: map[string]*nbdtest.Disk{}, versions: map[string][]*atollv1.Version{}}
	f.serve(t)
	mux := http.NewServeMux()
	mux.Handle(atollv1connect.NewClusterServiceHandler(f))
	mux.Handle(atollv1connect.NewVolumeServiceHandler(f))
	mux.Handle(atollv1connect.NewVersionServiceHandler(f))
	mux.Handle(atollv1connect.NewNamespaceServiceHandler(f))
	h := &http.Server{Handler: mux}
	l := listen(t, dir, "api")
	go h.Serve(l)
	t.Cleanup(func() { h.Close() })
	return f, "unix:" + filepath.Join(dir, "api")
}

func missing(what, name string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("%s %q: does not exist", what, name))
}

// refused is an error with a kind and a hint, as servers send it.
func refused(code connect.Code, kind, hint string) error {
	err := connect.NewError(code, errors.New("refused"))
	d, derr := connect.NewErrorDetail(&atollv1.ErrorDetail{Code: kind, Hint: hint})
	if derr != nil {
		return derr
	}
	err.AddDetail(d)
	return err
}

func (f *fake) GetStatus(context.Context, *connect.Request[atollv1.GetStatusRequest]) (*connect.Response[atollv1.GetStatusResponse], error) {
	return connect.NewResponse(&atollv1.GetStatusResponse{}), nil
}

func (f *fake) volume(name string) *atollv1.Volume {
	v := &atollv1.Volume{Name: name, SizeBytes: f.disks[name].Size(), Replicas: 3, Cache: f.cache, Epoch: f.epoch, Created: timestamppb.Now(), Versions: proto.Int32(int32(len(f.versions[name])))}
	for _, u := range f.urls {
		v.Urls = append(v.Urls, fmt.Sprintf(u, name))
	}
	return v
}

func (f *fake) CreateVolume(_ context.Context, r *connect.Request[atollv1.CreateVolumeRequest]) (*connect.Response[atollv1.Volume], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disks[r.Msg.Name] != nil {
		return nil, refused(connect.CodeAlreadyExists, "EXIST", "take another name")
	}
	d := nbdtest.NewDisk(r.Msg.SizeBytes)
	d.Before = func(_ context.Context, op string, off, _ int64) error {
		f.mu.Lock()
		fn, broken := f.hook, f.broken
		f.mu.Unlock()
		if fn != nil {
			fn(off)
		}
		if op == "flush" {
			return broken
		}
		return nil
	}
	f.disks[r.Msg.Name] = d
	return connect.NewResponse(f.volume(r.Msg.Name)), nil
}

func (f *fake) GetVolume(_ context.Context, r *connect.Request[atollv1.GetVolumeRequest]) (*connect.Response[atollv1.Volume], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disks[r.Msg.Name] == nil {
		return nil, refused(connect.CodeNotFound, "NOT_EXIST", "")
	}
	return connect.NewResponse(f.volume(r.Msg.Name)), nil
}

func (f *fake) ListVolumes(_ context.Context, r *connect.Request[atollv1.ListVolumesRequest]) (*connect.Response[atollv1.ListVolumesResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out atollv1.ListVolumesResponse
	for _, name := range slices.Sorted(maps.Keys(f.disks)) {
		if name <= r.Msg.After {
			continue
		}
		if len(out.Volumes) == 2 { // pages are small here
			out.Next = out.Volumes[1].Name
			break
		}
		out.Volumes = append(out.Volumes, f.volume(name))
	}
	return connect.NewResponse(&out), nil
}

func (f *fake) DeleteVolume(_ context.Context, r *connect.Request[atollv1.DeleteVolumeRequest]) (*connect.Response[atollv1.DeleteVolumeResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.disks, r.Msg.Name)
	f.calls = append(f.calls, fmt.Sprintf("delete %s now=%v", r.Msg.Name, r.Msg.Now))
	return connect.NewResponse(&atollv1.DeleteVolumeResponse{}), nil
}

func (f *fake) Rename(_ context.Context, r *connect.Request[atollv1.RenameRequest]) (*connect.Response[atollv1.Entry], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.disks[r.Msg.To] = f.disks[r.Msg.From]
	delete(f.disks, r.Msg.From)
	return connect.NewResponse(&atollv1.Entry{}), nil
}

func (f *fake) CreateVersion(_ context.Context, r *connect.Request[atollv1.CreateVersionRequest]) (*connect.Response[atollv1.CreateVersionResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out atollv1.CreateVersionResponse
	for _, m := range r.Msg.Media {
		if f.disks[m] == nil {
			return nil, missing("volume", m)
		}
		n := uint64(len(f.versions[m]) + 1)
		v := &atollv1.Version{Number: n, Name: r.Msg.Name, Memo: r.Msg.Memo, Medium: m, Time: timestamppb.Now(), SizeBytes: f.disks[m].Size(), UniqueBytes: -1, Protected: r.Msg.Protected}
		if v.Name == "" {
			v.Name = strconv.FormatUint(n, 10) // so that Disk finds it
		}
		f.disks[m].Snapshot(v.Name)
		f.versions[m] = append(f.versions[m], v)
		out.Versions = append(out.Versions, v)
	}
	return connect.NewResponse(&out), nil
}

func (f *fake) ListVersions(_ context.Context, r *connect.Request[atollv1.ListVersionsRequest]) (*connect.Response[atollv1.ListVersionsResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return connect.NewResponse(&atollv1.ListVersionsResponse{Versions: f.versions[r.Msg.Name]}), nil
}

func (f *fake) DeleteVersion(_ context.Context, r *connect.Request[atollv1.DeleteVersionRequest]) (*connect.Response[atollv1.DeleteVersionResponse], error) {
	return nil, refused(connect.CodeFailedPrecondition, "BUSY", "take the protection off")
}

func (f *fake) RestoreVersion(_ context.Context, r *connect.Request[atollv1.RestoreVersionRequest]) (*connect.Response[atollv1.RestoreVersionResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "restore "+r.Msg.Name)
	return connect.NewResponse(&atollv1.RestoreVersionResponse{}), nil
}

func (f *fake) ReleaseVersion(_ context.Context, r *connect.Request[atollv1.ReleaseVersionRequest]) (*connect.Response[atollv1.Version], error) {
	return connect.NewResponse(&atollv1.Version{Number: 1, Release: true}), nil
}

func (f *fake) CloneVersion(_ context.Context, r *connect.Request[atollv1.CloneVersionRequest]) (*connect.Response[atollv1.Volume], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.view(r.Msg.Source)
	if v == nil {
		return nil, missing("version", r.Msg.Source)
	}
	f.disks[r.Msg.Name] = v.Clone()
	return connect.NewResponse(f.volume(r.Msg.Name)), nil
}

func (f *fake) Diff(ctx context.Context, r *connect.Request[atollv1.DiffRequest], s *connect.ServerStream[atollv1.DiffResponse]) error {
	f.mu.Lock()
	d := f.disks[r.Msg.Name]
	f.mu.Unlock()
	if d == nil {
		return missing("volume", r.Msg.Name)
	}
	var off int64
	err := d.Status(ctx, nbd.SinceContext(r.Msg.From), 0, d.Size(), func(n int64, flags uint32) bool {
		if off += n; flags != nbd.StatusDirty {
			return true
		}
		return s.Send(&atollv1.DiffResponse{SizeBytes: d.Size(), Extents: []*atollv1.Extent{{Offset: off - n, Length: n}}}) == nil
	})
	if err != nil {
		return refused(connect.CodeNotFound, "NOT_EXIST", "")
	}
	return nil
}

// view finds NAME@VERSION.
func (f *fake) view(name string) *nbdtest.View {
	base, version, _ := strings.Cut(name, "@")
	if d := f.disks[base]; d != nil {
		for _, v := range d.Versions() {
			if v.Name == version {
				return v
			}
		}
	}
	return nil
}

func (f *fake) List(context.Context) ([]nbd.ExportInfo, error) { return nil, nil }

func (f *fake) Stat(ctx context.Context, name string) (nbd.Info, error) {
	_, info, err := f.Open(ctx, name)
	return info, err
}

func (f *fake) Open(_ context.Context, name string) (nbd.Device, nbd.Info, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v := f.view(name); v != nil {
		return v, nbd.Info{Size: v.Size()}, nil
	}
	d := f.disks[name]
	if d == nil {
		return nil, nbd.Info{}, fmt.Errorf("open %q: %w", name, atoll.ErrNotExist)
	}
	return d, nbd.Info{Size: d.Size()}, nil
}

func (f *fake) Release(nbd.Device) {}

func dial(t *testing.T, o atoll.Options) *atoll.Client {
	t.Helper()
	c, err := atoll.Dial(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestClientVolumes(t *testing.T) {
	f, addr := startFake(t)
	t.Setenv("ATOLL_SERVER", addr)
	c, ctx := dial(t, atoll.Options{}), t.Context()
	for _, name := range []string{"c", "a", "d", "b", "e"} {
		if v, err := c.Create(ctx, name, 4<<20, nil); err != nil || v.Name != name || v.Size != 4<<20 || v.Replicas != 3 {
			t.Fatalf("%+v %v", v, err)
		}
	}
	_, err := c.Create(ctx, "a", 4<<20, nil)
	if !errors.Is(err, atoll.ErrExist) || atoll.Hint(err) != "take another name" {
		t.Errorf("%v, hint %q", err, atoll.Hint(err))
	}
	if _, err := c.Stat(ctx, "none"); !errors.Is(err, atoll.ErrNotExist) {
		t.Error(err)
	}
	if _, err := c.Open(ctx, "none"); !errors.Is(err, atoll.ErrNotExist) {
		t.Error(err)
	}
	if _, err := c.Resize(ctx, "a", 8<<20, false); !errors.Is(err, atoll.ErrUnsupported) {
		t.Error(err)
	}
	if err := errors.Join(c.Rename(ctx, "e", "f"), c.Remove(ctx, "d", false), c.Remove(ctx, "c", true)); err != nil {
		t.Fatal(err)
	}
	var names []string
	for v, err := range c.List(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, v.Name)
	}
	if !slices.Equal(names, []string{"a", "b", "f"}) || !slices.Equal(f.calls, []string{"delete d now=false", "delete c now=true"}) {
		t.Errorf("names %q, calls %q", names, f.calls)
	}
	for v := range c.List(ctx) {
		if v.Name == "b" {
			t.Error("goes on after the break")
		}
		break
	}
}

func TestVolumeIO(t *testing.T) {
	_, addr := startFake(t)
	c, ctx := dial(t, atoll.Options{Server: addr}), t.Context()
	if _, err := c.Create(ctx, "disk", 1<<20+4096, nil); err != nil {
		t.Fatal(err)
	}
	v, err := c.Open(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	size := v.Size()
	if v.Name() != "disk" || size != 1<<20+4096 || v.ReadOnly() {
		t.Errorf("%s has %d bytes", v.Name(), size)
	}
	image := bytes.Repeat([]byte("0123456789abcdef"), int(size)/16)
	n, err := io.Copy(io.NewOffsetWriter(v, 0), bytes.NewReader(image))
	if err != nil || n != size {
		t.Fatal(n, err)
	}
	got, err := io.ReadAll(io.NewSectionReader(v, 0, 1<<40))
	if err != nil || !bytes.Equal(got, image) {
		t.Fatalf("%d bytes read: %v", len(got), err)
	}
	for _, x := range []struct {
		off     int64
		n, want int
		err     error
	}{{0, 0, 0, nil}, {size - 10, 10, 10, nil}, {size - 10, 11, 10, io.EOF}, {size, 1, 0, io.EOF}, {size + 9, 1, 0, io.EOF}, {-1, 1, 0, atoll.ErrInvalid}, {3, 5, 5, nil}} {
		p := make([]byte, x.n)
		if n, err := v.ReadAt(p, x.off); n != x.want || !errors.Is(err, x.err) || n > 0 && !bytes.Equal(p[:n], image[x.off:][:n]) {
			t.Errorf("read of %d at %d: %d %v", x.n, x.off, n, err)
		}
	}
	for _, x := range []struct {
		off int64
		n   int
		err error
	}{{size - 1, 2, atoll.ErrNoSpace}, {size, 1, atoll.ErrNoSpace}, {1 << 62, 1, atoll.ErrNoSpace}, {-1, 1, atoll.ErrInvalid}, {size, 0, nil}, {5, 3, nil}} {
		if n, err := v.WriteAt(make([]byte, x.n), x.off); !errors.Is(err, x.err) || err == nil && n != x.n {
			t.Errorf("write of %d at %d: %d %v", x.n, x.off, n, err)
		}
	}
	if err := errors.Join(v.Zero(ctx, 64<<10, 128<<10), v.Flush(ctx)); err != nil {
		t.Error(err)
	}
	var parts []atoll.Extent
	for e, err := range v.Extents(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, e)
	}
	if want := []atoll.Extent{{0, 64 << 10, false}, {64 << 10, 128 << 10, true}, {192 << 10, size - 192<<10, false}}; !slices.Equal(parts, want) {
		t.Errorf("extents %v, want %v", parts, want)
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := v.ReadAtContext(done, make([]byte, 1), 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := v.WriteAtContext(done, make([]byte, 1), 0); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Close flushes what was written, and only then.
func TestCloseFlushes(t *testing.T) {
	f, addr := startFake(t)
	c, ctx := dial(t, atoll.Options{Server: addr, Connections: 1}), t.Context()
	if _, err := c.Create(ctx, "disk", 1<<20, nil); err != nil {
		t.Fatal(err)
	}
	flushes := &f.disks["disk"].Flushes
	for i, x := range []struct {
		use  func(v *atoll.Volume) error
		want int64
	}{
		{func(v *atoll.Volume) error { _, err := v.ReadAt(make([]byte, 1), 0); return err }, 0},
		{func(v *atoll.Volume) error { _, err := v.WriteAt(make([]byte, 1), 0); return err }, 1},
		{func(v *atoll.Volume) error { return v.Zero(ctx, 0, 1) }, 1},
		{func(v *atoll.Volume) error {
			_, err := v.WriteAt(make([]byte, 1), 0)
			return errors.Join(err, v.Flush(ctx))
		}, 1},
	} {
		before := flushes.Load()
		v, err := c.Open(ctx, "disk")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(x.use(v), v.Close()); err != nil {
			t.Error(err)
		}
		if n := flushes.Load() - before; n != x.want {
			t.Errorf("case %d: %d flushes, want %d", i, n, x.want)
		}
		if _, err := v.ReadAt(make([]byte, 1), 0); !errors.Is(err, atoll.ErrClosed) {
			t.Error(err)
		}
	}
	f.mu.Lock()
	f.broken = errors.New("no")
	f.mu.Unlock()
	v, err := c.Open(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(make([]byte, 1), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); !errors.Is(err, atoll.ErrIO) {
		t.Errorf("a flush that fails gives %v", err)
	}
}

// openNew makes a volume of 1 MiB and opens it.
func openNew(t *testing.T, c *atoll.Client, name string) *atoll.Volume {
	t.Helper()
	if _, err := c.Create(t.Context(), name, 1<<20, nil); err != nil {
		t.Fatal(err)
	}
	v, err := c.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

// restart breaks all connections to volumes. moved makes it look as if others
// had the volumes now.
func (f *fake) restart(t *testing.T, moved bool) {
	t.Helper()
	f.nbd.Close()
	f.mu.Lock()
	if moved {
		f.epoch++
	}
	f.mu.Unlock()
	f.serve(t)
}

// A volume goes on over other connections, and tells when writes may be lost.
func TestReconnect(t *testing.T) {
	f, addr := startFake(t)
	c := dial(t, atoll.Options{Server: addr, RetryFor: 2 * time.Minute})
	const cut, moved, write, read, flush, lost = "cut", "moved", "write", "read", "flush", "flush fails"
	for i, steps := range [][]string{
		{write, cut, read, flush},
		{write, flush, moved, read, flush},
		{write, moved, read, lost, flush},
		{write, moved, lost, flush},
		{write, moved, write, lost},
		{moved, write, flush},
		{write, moved, moved, lost, write, flush, moved, flush},
	} {
		v := openNew(t, c, fmt.Sprint("disk", i))
		for at, step := range steps {
			var err, want error
			switch step {
			case write:
				_, err = v.WriteAt([]byte("written"), 4096)
			case read:
				p := make([]byte, 7)
				if _, err = v.ReadAt(p, 4096); err == nil && string(p) != "written" {
					err = fmt.Errorf("read %q", p)
				}
			case lost:
				want = atoll.ErrIO
				err = v.Flush(t.Context())
			case flush:
				err = v.Flush(t.Context())
			default:
				f.restart(t, step == moved)
			}
			if !errors.Is(err, want) {
				t.Errorf("%q, step %d: %v, want %v", steps, at, err, want)
			}
		}
	}
	v := openNew(t, c, "closed")
	_, err := v.WriteAt([]byte("written"), 4096)
	f.restart(t, true)
	if cerr := v.Close(); err != nil || !errors.Is(cerr, atoll.ErrIO) {
		t.Errorf("write: %v, close: %v", err, cerr)
	}
	f.cache = "writethrough"
	v = openNew(t, c, "through")
	_, err = v.WriteAt([]byte("written"), 4096)
	f.restart(t, true)
	if ferr := v.Flush(t.Context()); err != nil || ferr != nil {
		t.Errorf("write: %v, flush: %v", err, ferr)
	}
}

// Many callers, while the volume moves.
func TestReconnectMany(t *testing.T) {
	f, addr := startFake(t)
	v := openNew(t, dial(t, atoll.Options{Server: addr, RetryFor: 2 * time.Minute}), "disk")
	var wg sync.WaitGroup
	var rounds atomic.Int64
	stop := make(chan struct{})
	for i := range int64(8) {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := v.WriteAt([]byte{byte(n)}, i<<12); err != nil {
					t.Error(err)
					return
				}
				p := []byte{99}
				if _, err := v.ReadAt(p, i<<12); err != nil || p[0] != byte(n) {
					t.Errorf("read %d, wrote %d: %v", p[0], n, err)
					return
				}
				rounds.Add(1)
				time.Sleep(time.Millisecond)
			}
		})
	}
	for range 4 { // with writes before each move
		for before := rounds.Load(); rounds.Load() < before+40 && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
		f.restart(t, true)
	}
	close(stop)
	wg.Wait()
	if err := v.Flush(t.Context()); !errors.Is(err, atoll.ErrIO) {
		t.Errorf("flush: %v", err)
	}
}

// A call that is given up does not harm the others.
func TestGivenUp(t *testing.T) {
	f, addr := startFake(t)
	v := openNew(t, dial(t, atoll.Options{Server: addr}), "disk")
	release := make(chan struct{})
	defer close(release)
	f.mu.Lock()
	f.hook = func(off int64) {
		if off == 512<<10 {
			<-release
		}
	}
	f.mu.Unlock()
	for range 10 {
		short, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		if _, err := v.ReadAtContext(short, make([]byte, 4096), 512<<10); !errors.Is(err, atoll.ErrTimeout) {
			t.Error(err)
		}
		cancel()
	}
	if _, err := v.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

// When nothing comes back, calls end.
func TestRetryEnds(t *testing.T) {
	f, addr := startFake(t)
	c, ctx := dial(t, atoll.Options{Server: addr, RetryFor: time.Second}), t.Context()
	if _, err := c.Create(ctx, "disk", 1<<20, nil); err != nil {
		t.Fatal(err)
	}
	v, err := c.Open(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	f.nbd.Close()
	ended := func(err error) bool { // the connection's or, on a slow machine, the deadline's
		return errors.Is(err, atoll.ErrUnreachable) || errors.Is(err, atoll.ErrTimeout)
	}
	began := time.Now()
	if _, err := v.ReadAt(make([]byte, 1), 0); !ended(err) {
		t.Error(err)
	}
	if err := v.Flush(ctx); !ended(err) {
		t.Error(err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if _, err := v.ReadAt(make([]byte, 1), 0); !errors.Is(err, atoll.ErrClosed) {
		t.Error(err)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("took %v", took)
	}
}

func TestVersions(t *testing.T) {
	f, addr := startFake(t)
	c, ctx := dial(t, atoll.Options{Server: addr}), t.Context()
	for _, name := range []string{"disk", "log"} {
		if _, err := c.Create(ctx, name, 1<<20, nil); err != nil {
			t.Fatal(err)
		}
	}
	v, err := c.Open(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, err := v.WriteAt([]byte("old"), 8192); err != nil {
		t.Fatal(err)
	}
	one, err := c.Backup(ctx, "disk", "one", &atoll.BackupOptions{Memo: "before", Protected: true})
	if err != nil || one.Number != 1 || one.Memo != "before" || !one.Protected || one.String() != "disk@one" || one.Unique != -1 || time.Since(one.Time) > time.Minute {
		t.Errorf("%+v %v", one, err)
	}
	if _, err := v.WriteAt([]byte("new"), 8192); err != nil {
		t.Fatal(err)
	}
	old, err := c.Open(ctx, "disk@one")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	p := make([]byte, 3)
	if _, err := old.ReadAt(p, 8192); err != nil || string(p) != "old" || !old.ReadOnly() {
		t.Errorf("the version reads %q: %v", p, err)
	}
	if _, err := old.WriteAt(p, 0); !errors.Is(err, atoll.ErrReadOnly) {
		t.Error(err)
	}
	if _, err := c.Open(ctx, "disk@none"); !errors.Is(err, atoll.ErrNotExist) {
		t.Error(err)
	}
	var parts []atoll.Extent
	for e, err := range c.Diff(ctx, "disk", "one") {
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, e)
	}
	if !slices.Equal(parts, []atoll.Extent{{8192, 4096, false}}) {
		t.Errorf("diff %v", parts)
	}
	for _, err := range c.Diff(ctx, "disk", "none") {
		if !errors.Is(err, atoll.ErrNotExist) {
			t.Error(err)
		}
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	for _, err := range c.Diff(done, "disk", "one") {
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	both, err := c.BackupGroup(ctx, []string{"log", "disk"}, "", nil)
	if err != nil || len(both) != 2 || both[0].Volume != "log" || both[1].Number != 2 {
		t.Errorf("%+v %v", both, err)
	}
	if all, err := c.Versions(ctx, "disk"); err != nil || len(all) != 2 || all[0].Name != "one" {
		t.Errorf("%+v %v", all, err)
	}
	if v, err := c.Clone(ctx, "disk@one", "copy"); err != nil || v.Name != "copy" || v.Size != 1<<20 {
		t.Errorf("%+v %v", v, err)
	}
	if err := c.Restore(ctx, "disk@one"); err != nil || !slices.Equal(f.calls, []string{"restore disk@one"}) {
		t.Errorf("%q %v", f.calls, err)
	}
	if v, err := c.Release(ctx, "disk@one"); err != nil || !v.Release || v.String() != "disk@1" {
		t.Errorf("%+v %v", v, err)
	}
	if err := c.RemoveVersion(ctx, "disk@one"); !errors.Is(err, atoll.ErrBusy) || atoll.Hint(err) == "" {
		t.Error(err)
	}
}

func TestDial(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("ATOLL_RUNTIME_DIR", dir)
	t.Setenv("ATOLL_SERVER", "")
	for server, kind := range map[string]error{"": atoll.ErrUnreachable, "unix:/nowhere/api": atoll.ErrUnreachable, "127.0.0.1:1": atoll.ErrUnreachable, "what": atoll.ErrInvalid} {
		if _, err := atoll.Dial(t.Context(), atoll.Options{Server: server}); !errors.Is(err, kind) {
			t.Errorf("%q: %v", server, err)
		}
	}
	var seen atomic.Value
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r.Header.Get("Authorization"))
		w.WriteHeader(http.StatusUnauthorized)
	})}
	go h.Serve(l)
	defer h.Close()
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte("from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("ATOLL_TOKEN_FILE", file)
	for i, want := range []string{"Bearer from-file", "Bearer from-env", "Bearer given"} {
		o := atoll.Options{Server: l.Addr().String()}
		if i > 0 {
			t.Setenv("ATOLL_TOKEN", "from-env")
		}
		if i > 1 {
			o.Credential = "given"
		}
		if _, err := atoll.Dial(t.Context(), o); !errors.Is(err, atoll.ErrDenied) || seen.Load() != want {
			t.Errorf("sent %q, want %q: %v", seen.Load(), want, err)
		}
	}
	t.Setenv("ATOLL_USER", "bob")
	t.Setenv("ATOLL_PASSWORD", "b")
	for user, want := range map[string]string{"": "Basic Ym9iOmI=", "al": "Basic YWw6YQ=="} { // goes before the token
		_, err := atoll.Dial(t.Context(), atoll.Options{Server: l.Addr().String(), User: user, Password: "a"})
		if !errors.Is(err, atoll.ErrDenied) || seen.Load() != want {
			t.Errorf("sent %q, want %q: %v", seen.Load(), want, err)
		}
	}
}
