package curvetest

import (
	"context"
	"fmt"
	"net"
	"net/http/httptest"
	"sync"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/curve"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// Server is a whole server for Curve's clients: a gateway over a Backend, and
// NBD exports of its volumes, all in memory.
type Server struct {
	*Backend
	Addr string // of the gateway
	NBD  *nbd.Server

	// Stop ends the server before the test does.
	Stop func()
	// Fault runs before every read and write of data; an error is the result.
	Fault func(op string, off, n int64) error

	mu      sync.Mutex
	devices map[string]*device // by medium
}

// device is the data of a volume. Its size is that of the volume.
type device struct {
	*nbdtest.Memory
	s  *Server
	id string
}

// maxDevice is the largest device whose data can be kept.
const maxDevice = 64 << 30

// Size implements nbd.Device.
func (d *device) Size() int64 {
	d.s.Backend.mu.Lock()
	defer d.s.Backend.mu.Unlock()
	for _, v := range d.s.vols {
		if v.entry.Id == d.id {
			return min(v.entry.SizeBytes, maxDevice)
		}
	}
	return 0
}

// Serve starts a server that ends with the test.
func Serve(t testing.TB, o curve.Options) *Server {
	t.Helper()
	s := &Server{Backend: New(), devices: map[string]*device{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.Listen("unix", t.TempDir()+"/nbd")
	if err != nil {
		t.Fatal(err)
	}
	s.NBD = nbd.Serve(nbd.Options{Listeners: []net.Listener{l, u}, Exports: s})
	s.Backend.InUse = func(path string) bool {
		for _, c := range s.NBD.Connections() {
			if c.Export == path {
				return true
			}
		}
		return false
	}
	s.Backend.URL = func(path string) string {
		return nbd.Address{Network: "unix", Addr: u.Addr().String(), Export: path}.String()
	}
	o.Backend, o.Cluster = s, "0123456789abcdef0123456789abcdef"
	web := httptest.NewServer(curve.New(o))
	s.Addr = web.Listener.Addr().String()
	s.Stop = sync.OnceFunc(func() {
		web.CloseClientConnections()
		web.Close()
		if err := s.NBD.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	t.Cleanup(s.Stop)
	return s
}

// List implements nbd.Exports.
func (s *Server) List(context.Context) ([]nbd.ExportInfo, error) { return nil, nil }

// Stat implements nbd.Exports.
func (s *Server) Stat(_ context.Context, name string) (nbd.Info, error) {
	_, info, err := s.find(name)
	return info, err
}

func (s *Server) find(name string) (*device, nbd.Info, error) {
	s.Backend.mu.Lock()
	v := s.vols[name]
	s.Backend.mu.Unlock()
	if v == nil {
		return nil, nbd.Info{}, fmt.Errorf("export %q: %w", name, atoll.ErrNotExist)
	}
	s.mu.Lock()
	d := s.devices[v.entry.Id]
	if d == nil {
		d = &device{Memory: nbdtest.NewMemory(maxDevice), s: s, id: v.entry.Id}
		d.Before = func(_ context.Context, op string, off, n int64) error {
			if s.Fault != nil {
				return s.Fault(op, off, n)
			}
			return nil
		}
		s.devices[v.entry.Id] = d
	}
	s.mu.Unlock()
	return d, nbd.Info{Size: d.Size()}, nil
}

// Open implements nbd.Exports.
func (s *Server) Open(_ context.Context, name string) (nbd.Device, nbd.Info, error) {
	d, info, err := s.find(name)
	if err != nil {
		return nil, info, err
	}
	return d, info, nil
}

// Release implements nbd.Exports.
func (s *Server) Release(nbd.Device) {}
