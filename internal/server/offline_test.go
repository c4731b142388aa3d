package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// A stopped server's data can be checked where they lie: damage is told, and
// mended when every copy is read. The server starts as if nothing had been.
func TestCheckOffline(t *testing.T) {
	t.Parallel()
	dir := testDir(t)
	cfg := testConfig(t, dir)
	s := start(t, cfg, Options{})
	create(t, s, "disk", "writethrough")
	create(t, s, "gone", "writethrough")
	dev := open(t, s, "disk")
	fill(t, dev, 64, true)
	s.volumes.Release(dev)
	if _, err := client(t, s).Volumes.DeleteVolume(t.Context(), message(&atollv1.DeleteVolumeRequest{Name: "gone"})); err != nil {
		t.Fatal(err)
	}
	check := func(read bool, names ...string) (map[string]*atollv1.CheckVolumeResponse, error) {
		out := map[string]*atollv1.CheckVolumeResponse{}
		err := CheckOffline(t.Context(), cfg, Options{Log: testLog(t), Version: "test"}, names, read, func(name string, r *atollv1.CheckVolumeResponse, err error) {
			if err != nil {
				t.Errorf("check of %s: %v", name, err)
			}
			name, _, _ = strings.Cut(name, ", ") // and an id
			out[name] = r
		})
		return out, err
	}
	_, err := check(false)
	want(t, err, atoll.ErrBusy)
	mustStop(t, s)

	begun := time.Now()
	got, err := check(false)
	if err != nil || len(got) != 2 || got["gone (in the trash"] == nil || got["disk"] == nil || got["disk"].Blocks != 64*16 || len(got["disk"].Problems)+len(got["disk"].Unchecked) != 0 {
		t.Errorf("%v %v", got, err)
	}
	t.Logf("took %v", time.Since(begun))
	if _, err := check(false, "nosuch"); err == nil {
		t.Error("checked a volume that is not there")
	}
	hurt(t, filepath.Join(dir, "disks", "1"))
	got, err = check(true, "disk")
	if err != nil || len(got) != 1 || got["disk"].DamagedBytes == 0 || got["disk"].RepairedBytes != got["disk"].DamagedBytes || len(got["disk"].Problems) != 0 {
		t.Errorf("after damage to a copy: %v %v", got, err)
	}
	for _, n := range []string{"1", "2", "3"} {
		hurt(t, filepath.Join(dir, "disks", n))
	}
	got, err = check(true)
	if err != nil || len(got["disk"].GetProblems()) == 0 {
		t.Errorf("after damage to all copies: %v %v", got, err)
	}
	cfg = testConfig(t, dir, "--disk", filepath.Join(dir, "nosuch"))
	_, err = check(false)
	want(t, err, atoll.ErrNotExist)
	if _, err := os.Stat(filepath.Join(dir, "nosuch")); err == nil {
		t.Error("a check made a disk")
	}
	cfg = testConfig(t, testDir(t))
	_, err = check(false)
	want(t, err, atoll.ErrNotExist)
	cfg = testConfig(t, dir)
	s = start(t, cfg, Options{})
	dev = open(t, s, "disk")
	s.volumes.Release(dev)
	mustStop(t, s)
}

// hurt flips bits in the data of the volume's pieces wherever a disk has them.
func hurt(t *testing.T, disk string) {
	t.Helper()
	piece := strings.Repeat("\x07", 4096)
	found := false
	err := filepath.WalkDir(disk, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		p := make([]byte, 8<<20)
		n, _ := f.ReadAt(p, 0)
		if at := strings.Index(string(p[:n]), piece); at >= 0 {
			found = true
			_, err = f.WriteAt([]byte("damage"), int64(at)+100)
		}
		return err
	})
	if err != nil || !found {
		t.Fatalf("no data to damage on %s: %v", disk, err)
	}
}
