package nbd_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"

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
