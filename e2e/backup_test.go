package e2e_test

import (
	"strings"
	"testing"

	"github.com/atollstore/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// Versions as exports and their differences as dirty bitmaps: the tools of libnbd
// and qemu make incremental backups, and what is restored is equal.
func TestBackupClients(t *testing.T) {
	s := startServer(t)
	c, err := atoll.Dial(t.Context(), atoll.Options{Server: s.socket()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const size = 32 << 20
	s.create("disk", "32M")
	uri, err := nbd.ParseURI(s.uri("disk"))
	if err != nil {
		t.Fatal(err)
	}
	nbdtest.RunBackupSuite(t, nbdtest.Backup{
		URI:  func(export string) string { uri.Export = export; return uri.String() },
		Disk: "disk", Size: size,
		Snapshot: func(t *testing.T, name string) {
			t.Helper()
			if _, err := c.Backup(t.Context(), "disk", name, nil); err != nil {
				t.Fatal(err)
			}
		},
	})
	// A clone tells what it has of its parent.
	if _, err := c.Clone(t.Context(), "disk@next", "copy"); err != nil {
		t.Fatal(err)
	}
	v, err := c.Open(t.Context(), "copy")
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, err := v.WriteAt(make([]byte, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	uri.Export = "copy"
	nc, err := nbd.Dial(t.Context(), uri.String(), nbd.DialOptions{Contexts: []string{nbd.ContextDepth}})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var depths []uint32
	if err := nc.Status(t.Context(), nbd.ContextDepth, 0, 12<<10, func(n int64, depth uint32) bool {
		depths = append(depths, uint32(n)>>12, depth)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if len(depths) != 6 || depths[1] != 2 || depths[3] != 1 || depths[5] != 2 {
		t.Errorf("blocks and depths %v, want 1 2 1 1 1 2", depths)
	}
	if out := run(t, "nbdinfo", "--map=qemu:allocation-depth", uri.String()); !strings.Contains(out, "backing") || !strings.Contains(out, "local") {
		t.Errorf("nbdinfo shows no depths:\n%s", out)
	}
	s.atoll("volume", "check", "disk", "--read")
}
