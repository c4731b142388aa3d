package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a Disk in memory.
type memory struct {
	*nbdtest.Memory
	flushes atomic.Int64
	inUse   atomic.Int64
	most    atomic.Int64 // requests at once
	fail    func(op string, off int64) error
}

var _ Disk = (*memory)(nil)

func newMemory(size int64) *memory { return &memory{Memory: nbdtest.NewMemory(size)} }

func (m *memory) call(ctx context.Context, op string, off int64) (func(), error) {
	n := m.inUse.Add(1)
	for old := m.most.Load(); n > old && !m.most.CompareAndSwap(old, n); old = m.most.Load() {
	}
	end := func() { m.inUse.Add(-1) }
	if err := ctx.Err(); err != nil {
		return end, err
	}
	if m.fail != nil {
		return end, m.fail(op, off)
	}
	return end, nil
}

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	end, err := m.call(ctx, "read", off)
	defer end()
	if err != nil {
		return err
	}
	return m.Memory.Read(ctx, p, off)
}

func (m *memory) WriteAt(ctx context.Context, p []byte, off int64) error {
	end, err := m.call(ctx, "write", off)
	defer end()
	if err != nil {
		return err
	}
	return m.Memory.Write(ctx, nil, p, off, false)
}

func (m *memory) Zero(ctx context.Context, off, n int64) error {
	end, err := m.call(ctx, "zero", off)
	defer end()
	if err != nil {
		return err
	}
	return m.Memory.Zero(ctx, off, n, true, false)
}

func (m *memory) Flush(ctx context.Context) error {
	m.flushes.Add(1)
	_, err := m.call(ctx, "flush", 0)
	return err
}

func (m *memory) Holes(ctx context.Context, off, n int64, fn func(n int64, hole bool) bool) error {
	return m.Memory.Extents(ctx, off, n, fn)
}

// content returns everything a disk holds.
func content(t *testing.T, d Disk) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	for off := 0; off < len(p); off += 1 << 20 {
		if err := d.ReadAt(context.Background(), p[off:min(len(p), off+1<<20)], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// image makes data with runs of zeros of many lengths.
func image(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(size-off, 1<<(8+rng.IntN(14)))
		if rng.IntN(2) == 0 {
			for i := off; i < off+n; i++ {
				p[i] = byte(rng.Uint32())
			}
		}
		off += n
	}
	return p
}

// sparseFile writes an image to a file with its zero blocks left out.
func sparseFile(t *testing.T, p []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(int64(len(p))); err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(p); off += 4096 {
		b := p[off:min(len(p), off+4096)]
		if isZero(b) {
			continue
		}
		if _, err := f.WriteAt(b, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

var sizes = []int{0, 1, 511, 4096, 4097, 65536 + 7, 1 << 20, 3<<20 + 12345, 9 << 20}

// disks are the kinds of disk that every transfer is tried on.
func disks(t *testing.T, each func(t *testing.T, open func(size int64) (Disk, *nbdtest.Memory))) {
	t.Run("memory", func(t *testing.T) {
		each(t, func(size int64) (Disk, *nbdtest.Memory) {
			m := newMemory(size)
			return m, m.Memory
		})
	})
	t.Run("nbd", func(t *testing.T) {
		each(t, func(size int64) (Disk, *nbdtest.Memory) { return serve(t, size) })
	})
}

// share is one device under every name.
type share struct{ m *nbdtest.Memory }

func (s share) List(context.Context) ([]nbd.ExportInfo, error) { return nil, nil }
func (s share) Stat(_ context.Context, name string) (nbd.Info, error) {
	return nbd.Info{Name: name, Size: s.m.Size()}, nil
}
func (s share) Open(_ context.Context, name string) (nbd.Device, nbd.Info, error) {
	return s.m, nbd.Info{Name: name, Size: s.m.Size()}, nil
}
func (s share) Release(nbd.Device) {}

// serve serves a device in memory over NBD.
func serve(t *testing.T, size int64) (Disk, *nbdtest.Memory) {
	t.Helper()
	m := nbdtest.NewMemory(size)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.Serve(nbd.Options{Listeners: []net.Listener{l}, Exports: share{m}})
	d, err := OpenNBD(context.Background(), fmt.Sprintf("nbd://%v/disk", l.Addr()), 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = d.Close(), s.Close() })
	return d, m
}

// An image goes in and comes out again, by files and by pipes, with all sizes;
// the file that comes out has its holes.
func TestRoundTrip(t *testing.T) {
	disks(t, func(t *testing.T, open func(int64) (Disk, *nbdtest.Memory)) {
		for i, size := range sizes {
			want := image(uint64(i), size)
			room := (int64(size) + 4095) &^ 4095
			for _, how := range []string{"file", "pipe", "pipe of unknown size"} {
				d, mem := open(room + 8192)
				// What was there before must not shine through.
				old := bytes.Repeat([]byte{0xee}, int(room))
				if err := mem.Write(t.Context(), nil, old, 0, false); err != nil {
					t.Fatal(err)
				}
				var src io.Reader = sparseFile(t, want)
				length := int64(size)
				if how != "file" {
					src = io.MultiReader(bytes.NewReader(want)) // gives whatever pieces
				}
				if how == "pipe of unknown size" {
					length = -1
				}
				done := atomic.Int64{}
				r, err := Import(t.Context(), d, src, length, Options{Progress: func(n int64) { done.Add(n) }})
				if err != nil || r.Bytes != int64(size) || r.Data > r.Bytes {
					t.Fatalf("%s of %d bytes: %+v, %v", how, size, r, err)
				}
				if done.Load() != int64(size) {
					t.Errorf("%s of %d bytes: progress told of %d", how, size, done.Load())
				}
				if mem.Flushes.Load() == 0 && how == "nbd" {
					t.Error("not flushed")
				}
				if got := content(t, d); !bytes.Equal(got[:size], want) {
					t.Fatalf("%s of %d bytes: the volume differs", how, size)
				}
				export(t, d, append(bytes.Clone(want), content(t, d)[size:]...))
			}
		}
	})
}

// export writes a disk to a file and to a pipe and compares.
func export(t *testing.T, d Disk, want []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "out")
	r, err := ExportFile(t.Context(), d, path, Options{})
	if err != nil || r.Bytes != d.Size() {
		t.Fatalf("export: %+v, %v", r, err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the exported file differs (%v)", err)
	}
	if _, err := ExportFile(t.Context(), d, path, Options{}); !errors.Is(err, atoll.ErrExist) {
		t.Errorf("export over a file: %v", err)
	}
	var pipe bytes.Buffer
	if r, err := ExportStream(t.Context(), d, &pipe, Options{Concurrency: 3}); err != nil || r.Bytes != d.Size() || !bytes.Equal(pipe.Bytes(), want) {
		t.Fatalf("the exported stream differs (%+v, %v)", r, err)
	}
}

// Holes are neither read nor written.
func TestSparse(t *testing.T) {
	const size = 64 << 20
	want := make([]byte, size)
	copy(want[20<<20:], image(3, 1<<20))
	d := newMemory(size)
	r, err := Import(t.Context(), d, sparseFile(t, want), size, Options{DestIsZero: true})
	if err != nil || r.Data > 1<<20+65536 || d.Zeros.Load() > 0 || d.Writes.Load() > 40 {
		t.Errorf("import: %+v, %v, %d writes, %d zeros", r, err, d.Writes.Load(), d.Zeros.Load())
	}
	d.Reads.Store(0)
	path := filepath.Join(t.TempDir(), "out")
	if r, err = ExportFile(t.Context(), d, path, Options{}); err != nil || d.Reads.Load() > 20 {
		t.Errorf("export: %+v, %v, %d reads", r, err, d.Reads.Load())
	}
	again := newMemory(size)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Import(t.Context(), again, f, size, Options{DestIsZero: true}); err != nil || again.Writes.Load() > 40 {
		t.Errorf("the exported file is not sparse: %d writes, %v", again.Writes.Load(), err)
	}
	if !bytes.Equal(content(t, again), want) {
		t.Error("it differs")
	}
}

func TestParallel(t *testing.T) {
	d := newMemory(32 << 20)
	gate := make(chan struct{})
	var waiting atomic.Int64
	d.fail = func(op string, _ int64) error {
		if op == "write" && waiting.Add(1) == 8 {
			close(gate)
		}
		if op == "write" {
			<-gate // until eight are under way
		}
		return nil
	}
	p := bytes.Repeat([]byte{1}, 32<<20)
	if _, err := Import(t.Context(), d, sparseFile(t, p), int64(len(p)), Options{Concurrency: 8}); err != nil {
		t.Fatal(err)
	}
	if most := d.most.Load(); most != 8 {
		t.Errorf("%d requests at once, want 8", most)
	}
}

func TestRefusals(t *testing.T) {
	ctx := t.Context()
	p := image(1, 3<<20)
	if _, err := Import(ctx, newMemory(1<<20), sparseFile(t, p), int64(len(p)), Options{}); !errors.Is(err, atoll.ErrTooLarge) {
		t.Errorf("file too large: %v", err)
	}
	if _, err := Import(ctx, newMemory(1<<20), io.MultiReader(bytes.NewReader(p)), -1, Options{}); !errors.Is(err, atoll.ErrTooLarge) {
		t.Errorf("pipe too large: %v", err)
	}
	if _, err := Import(ctx, newMemory(4<<20), io.MultiReader(bytes.NewReader(p)), 4<<20, Options{}); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("pipe too short: %v", err)
	}
	broken := errors.New("broken")
	if _, err := Import(ctx, newMemory(4<<20), io.MultiReader(bytes.NewReader(p), reader{broken}), -1, Options{}); !errors.Is(err, broken) {
		t.Errorf("pipe breaks: %v", err)
	}
	for _, op := range []string{"write", "zero", "flush"} {
		d := newMemory(4 << 20)
		d.fail = func(got string, _ int64) error {
			if got == op {
				return atoll.ErrNoSpace
			}
			return nil
		}
		if _, err := Import(ctx, d, sparseFile(t, p), int64(len(p)), Options{}); !errors.Is(err, atoll.ErrNoSpace) {
			t.Errorf("%s fails: %v", op, err)
		}
	}
	d := newMemory(4 << 20)
	if _, err := Import(ctx, d, bytes.NewReader(p), int64(len(p)), Options{}); err != nil {
		t.Fatal(err)
	}
	d.fail = func(string, int64) error { return atoll.ErrCorrupt }
	path := filepath.Join(t.TempDir(), "out")
	if _, err := ExportFile(ctx, d, path, Options{}); !errors.Is(err, atoll.ErrCorrupt) {
		t.Errorf("export of a damaged volume: %v", err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("half a file is left: %v", err)
	}
	if _, err := ExportStream(ctx, d, io.Discard, Options{}); !errors.Is(err, atoll.ErrCorrupt) {
		t.Errorf("stream of a damaged volume: %v", err)
	}
	d.fail = nil
	if _, err := ExportStream(ctx, d, writer{broken}, Options{}); !errors.Is(err, broken) {
		t.Errorf("output breaks: %v", err)
	}
}

type reader struct{ err error }

func (r reader) Read([]byte) (int, error) { return 0, r.err }

type writer struct{ err error }

func (w writer) Write([]byte) (int, error) { return 0, w.err }

// A cancelled transfer returns soon.
func TestCancel(t *testing.T) {
	soon := func(name string, run func(ctx context.Context) error) {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
		defer cancel()
		began := time.Now()
		err := run(ctx)
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) && !errors.Is(err, atoll.ErrTimeout) {
			t.Errorf("%s: %v", name, err)
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("%s took %v", name, took)
		}
	}
	soon("import from a pipe that ends with its context", func(ctx context.Context) error {
		r, w := io.Pipe()
		defer context.AfterFunc(ctx, func() { _ = w.CloseWithError(ctx.Err()) })()
		_, err := Import(ctx, newMemory(1<<20), r, -1, Options{})
		return err
	})
	stuck := func(ctx context.Context, size int64) *memory {
		d := newMemory(size)
		d.Before = func(ctx context.Context, _ string, _, _ int64) error {
			<-ctx.Done()
			return ctx.Err()
		}
		return d
	}
	p := bytes.Repeat([]byte{1}, 40<<20)
	f := sparseFile(t, p)
	soon("import into a stuck volume", func(ctx context.Context) error {
		_, err := Import(ctx, stuck(ctx, int64(len(p))), f, int64(len(p)), Options{})
		return err
	})
	path := filepath.Join(t.TempDir(), "out")
	soon("export of a stuck volume", func(ctx context.Context) error {
		_, err := ExportFile(ctx, stuck(ctx, 40<<20), path, Options{})
		return err
	})
	soon("stream of a stuck volume", func(ctx context.Context) error {
		_, err := ExportStream(ctx, stuck(ctx, 40<<20), io.Discard, Options{})
		return err
	})
}
