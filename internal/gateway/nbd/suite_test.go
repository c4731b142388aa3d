package nbd_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// one is a single export.
type one struct{ m *nbdtest.Memory }

func (o one) info() nbd.Info { return nbd.Info{Size: o.m.Size(), Description: "a disk in memory"} }

func (o one) List(context.Context) ([]nbd.ExportInfo, error) {
	return []nbd.ExportInfo{{Name: "disk", Description: "a disk in memory"}}, nil
}
func (o one) Stat(context.Context, string) (nbd.Info, error) { return o.info(), nil }
func (o one) Open(context.Context, string) (nbd.Device, nbd.Info, error) {
	return o.m, o.info(), nil
}
func (o one) Release(nbd.Device) {}

func TestClients(t *testing.T) {
	if testing.Short() {
		t.Skip("runs foreign programs")
	}
	const size = 24<<20 + 512*3
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.Serve(nbd.Options{Listeners: []net.Listener{l}, Exports: one{nbdtest.NewMemory(size)}})
	defer s.Close()
	nbdtest.RunClientSuite(t, nbd.Address{Network: "unix", Addr: path, Export: "disk"}.String(), size)
}

// cabinet is a disk with its versions.
type cabinet struct{ d *nbdtest.Disk }

func (c cabinet) List(context.Context) ([]nbd.ExportInfo, error) {
	all := []nbd.ExportInfo{{Name: "disk", Description: fmt.Sprintf("%d snapshots", len(c.d.Versions()))}}
	for _, v := range c.d.Versions() {
		all = append(all, nbd.ExportInfo{Name: "disk@" + v.Name, Description: "a snapshot"})
	}
	return all, nil
}

func (c cabinet) Stat(ctx context.Context, name string) (nbd.Info, error) {
	_, info, err := c.Open(ctx, name)
	return info, err
}

func (c cabinet) Open(_ context.Context, name string) (nbd.Device, nbd.Info, error) {
	if name == "disk" {
		return c.d, nbd.Info{Size: c.d.Size()}, nil
	}
	for _, v := range c.d.Versions() {
		if name == "disk@"+v.Name {
			return v, nbd.Info{Size: v.Size(), ReadOnly: true}, nil
		}
	}
	return nil, nbd.Info{}, fmt.Errorf("open export %q: %w", name, atoll.ErrNotExist)
}

func (c cabinet) Release(nbd.Device) {}

func TestBackupClients(t *testing.T) {
	if testing.Short() {
		t.Skip("runs foreign programs")
	}
	const size = 8 << 20
	d := nbdtest.NewDisk(size)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := nbd.Serve(nbd.Options{Listeners: []net.Listener{l}, Exports: cabinet{d}})
	defer s.Close()
	nbdtest.RunBackupSuite(t, nbdtest.Backup{
		URI:  func(name string) string { return nbd.Address{Network: "unix", Addr: path, Export: name}.String() },
		Disk: "disk", Size: size, Snapshot: func(_ *testing.T, name string) { d.Snapshot(name) },
	})
}
