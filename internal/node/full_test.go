package node_test

import (
	"errors"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/node"
)

// A node starts on a full disk when it can give up prewritten files, and says
// what is wrong when it cannot.
func TestOpenOnFullDisk(t *testing.T) {
	disk := hosttest.NewDisk(1)
	if err := node.Format(disk, node.Identity{Cluster: atoll.UUID{1}, Node: 1}); err != nil {
		t.Fatal(err)
	}
	total, free, err := disk.Space()
	if err != nil {
		t.Fatal(err)
	}
	disk.SetSize(total - free)
	if n, err := node.Open(node.Options{FS: disk, NoPrewrite: true}); err == nil {
		n.Close()
		t.Log("the states file needed no more room")
	} else if !errors.Is(err, atoll.ErrNoSpace) {
		t.Fatalf("open on a full disk: %v", err)
	}
	disk.SetSize(total)
	f, err := disk.Create("slots/1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close(), disk.SyncDir("slots")); err != nil {
		t.Fatal(err)
	}
	if total, free, err = disk.Space(); err != nil {
		t.Fatal(err)
	}
	disk.SetSize(total - free)
	n, err := node.Open(node.Options{FS: disk, NoPrewrite: true})
	if err != nil {
		t.Fatalf("open on a disk full of prewritten files: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}
