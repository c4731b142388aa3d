package nbd

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	_ Device    = (*nbdtest.Memory)(nil)
	_ Versioned = (*nbdtest.Disk)(nil)
	_ Versioned = (*nbdtest.View)(nil)
)

// shelf is a set of exports in memory.
type shelf struct {
	mu    sync.Mutex
	disks map[string]Device
	infos map[string]Info
	open  int
}

func newShelf(name string, size int64) (*shelf, *nbdtest.Memory) {
	m := nbdtest.NewMemory(size)
	return &shelf{disks: map[string]Device{name: m}, infos: map[string]Info{}}, m
}

func (s *shelf) add(name string, m Device, info Info) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disks[name], s.infos[name] = m, info
}

func (s *shelf) List(context.Context) (all []ExportInfo, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, m := range s.disks {
		all = append(all, ExportInfo{Name: name, Description: fmt.Sprintf("%d bytes", m.Size())})
	}
	slices.SortFunc(all, func(a, b ExportInfo) int { return len(a.Name) - len(b.Name) })
	return all, nil
}

func (s *shelf) Stat(_ context.Context, name string) (Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, ok := s.disks[name]
	if !ok {
		return Info{}, fmt.Errorf("find export %q: %w", name, atoll.ErrNotExist)
	}
	info := s.infos[name]
	info.Name, info.Size, info.ReadOnly = name, m.Size(), info.ReadOnly || m.ReadOnly()
	if info.Description == "" {
		info.Description = fmt.Sprintf("%d bytes", m.Size())
	}
	return info, nil
}

func (s *shelf) Open(ctx context.Context, name string) (Device, Info, error) {
	info, err := s.Stat(ctx, name)
	if err != nil {
		return nil, info, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return s.disks[name], info, nil
}

func (s *shelf) Release(Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}

// serveUnix starts a server on a Unix socket and returns the URI of an export.
// At the end of the test it is closed, and every device must have been released.
func serveUnix(t testing.TB, sh *shelf, name string, o Options) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	o.Listeners = append(o.Listeners, l)
	if o.Exports == nil {
		o.Exports = sh
	}
	s := Serve(o)
	t.Cleanup(func() {
		s.Close()
		sh.mu.Lock()
		defer sh.mu.Unlock()
		if sh.open != 0 {
			t.Errorf("%d devices not released", sh.open)
		}
	})
	return s, Address{Network: "unix", Addr: path, Export: name}.String()
}

// dial connects a client that is closed at the end of the test.
func dial(t testing.TB, uri string, o DialOptions) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	c, err := Dial(ctx, uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
