package guest_test

import (
	"context"
	"math/rand/v2"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
)

// nbdDevice makes a volatileDisk a device of our NBD server.
type nbdDevice struct{ *volatileDisk }

func (d nbdDevice) Size() int64    { return d.size }
func (d nbdDevice) ReadOnly() bool { return false }

func (d nbdDevice) Read(_ context.Context, p []byte, off int64) error { return d.read(p, off) }

func (d nbdDevice) Write(_ context.Context, _ *host.Buffer, p []byte, off int64, fua bool) error {
	return d.write(p, off, fua)
}

func (d nbdDevice) Flush(context.Context) error { return d.flush() }

func (d nbdDevice) Discard(_ context.Context, off, n int64, fua bool) error {
	return d.zero(off, n, fua)
}

func (d nbdDevice) Zero(_ context.Context, off, n int64, _, fua bool) error {
	return d.zero(off, n, fua)
}

func (d nbdDevice) Prefetch(context.Context, int64, int64) error { return nil }

func (d nbdDevice) Extents(_ context.Context, _, n int64, fn func(n int64, hole bool) bool) error {
	fn(n, false)
	return nil
}

// volatileSite serves a volatileDisk with our NBD server.
type volatileSite struct {
	t      *testing.T
	dir    string
	disk   *volatileDisk
	rng    *rand.Rand
	server *nbd.Server
}

func newVolatileSite(t *testing.T, l *lab, fs string, lies bool) *volatileSite {
	s := &volatileSite{t: t, dir: l.dir, rng: rand.New(rand.NewPCG(rand.Uint64(), 2))}
	s.disk = newVolatileDisk(t, l.dir, diskBytes(fs))
	s.disk.lies = lies
	t.Cleanup(s.stop)
	return s
}

func (s *volatileSite) uri() string {
	return "nbd+unix:///disk?socket=" + filepath.Join(s.dir, "lossy.sock")
}
func (s *volatileSite) restarted() time.Duration { return 0 }

func (s *volatileSite) start() {
	s.stop()
	l, err := net.Listen("unix", filepath.Join(s.dir, "lossy.sock"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.disk.set(powerOn)
	s.server = nbd.Serve(nbd.Options{Listeners: []net.Listener{l}, Exports: s, Grace: time.Millisecond, DrainTimeout: time.Second})
}

func (s *volatileSite) stop() {
	if s.server != nil {
		s.server.Close()
		s.server = nil
	}
}

func (s *volatileSite) arm() { s.disk.arm() }
func (s *volatileSite) cut() { s.disk.cut(s.t, s.rng) }

// List, Stat, Open and Release make the site the exports of its server.
func (s *volatileSite) List(context.Context) ([]nbd.ExportInfo, error) {
	return []nbd.ExportInfo{{Name: "disk"}}, nil
}

func (s *volatileSite) Stat(_ context.Context, name string) (nbd.Info, error) {
	return nbd.Info{Name: name, Size: s.disk.size}, nil
}

func (s *volatileSite) Open(ctx context.Context, name string) (nbd.Device, nbd.Info, error) {
	info, err := s.Stat(ctx, name)
	return nbdDevice{s.disk}, info, err
}

func (s *volatileSite) Release(nbd.Device) {}

// TestGuestDetectsLies is the negative control: the same guest and the same
// questions find out a disk that answers flushes and does nothing.
func TestGuestDetectsLies(t *testing.T) {
	l := needLab(t)
	for _, fs := range []string{"ext4", "xfs"}[:rounds(1, 2)] {
		t.Run(fs, func(t *testing.T) {
			found := false
			cutRounds(t, l, newVolatileSite(t, l, fs, true), fs, 1, func(_ int, err error) {
				if found = err != nil; found {
					t.Logf("found out: %v", err)
				}
			})
			if !found {
				t.Error("a disk that ignores flushes passed")
			}
		})
	}
}

// TestGuestBelievesHonestDisk is the positive control: a disk that loses only
// what was not flushed passes.
func TestGuestBelievesHonestDisk(t *testing.T) {
	if rounds(0, 1) == 0 {
		t.Skip("runs with ATOLL_LONG=1")
	}
	l := needLab(t)
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			cutRounds(t, l, newVolatileSite(t, l, fs, false), fs, 10, func(round int, err error) {
				if err != nil {
					t.Fatalf("after cut %d: %v", round, err)
				}
			})
		})
	}
}
