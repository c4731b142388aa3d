package server

import (
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// Messages call volumes by their names, and say what users know.
func TestTexts(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	ctx := t.Context()
	create(t, s, "disk1", "writethrough")
	backup(t, c, "g1", "disk1")
	rec, err := s.cat.MediumByName(ctx, "disk1")
	if err != nil {
		t.Fatal(err)
	}
	says := func(err, kind error, with string) {
		t.Helper()
		want(t, err, kind)
		if err == nil || !strings.Contains(err.Error(), with) || strings.Contains(err.Error(), rec.ID.String()) || strings.Contains(err.Error(), "medium") {
			t.Errorf("message %q, want one with %q", err, with)
		}
	}
	_, err = c.Volumes.CreateVolume(ctx, message(&atollv1.CreateVolumeRequest{Name: "disk1", SizeBytes: 1 << 20}))
	says(err, atoll.ErrExist, `create volume "disk1": that name is taken`)
	_, err = c.Volumes.GetVolume(ctx, message(&atollv1.GetVolumeRequest{Name: "nosuch"}))
	says(err, atoll.ErrNotExist, `volume "nosuch": does not exist`)
	_, err = c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"disk1"}, Name: "g1"}))
	says(err, atoll.ErrExist, `volume "disk1"`)
	_, err = c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"disk1", "disk1"}}))
	says(err, atoll.ErrInvalid, `volume "disk1" is named twice`)
	_, err = c.Versions.ListVersions(ctx, message(&atollv1.ListVersionsRequest{Name: "disk1@nope"}))
	says(err, atoll.ErrInvalid, `not its version "nope"`)
	_, err = c.Versions.DeleteVersion(ctx, message(&atollv1.DeleteVersionRequest{Name: "disk1@cur"}))
	says(err, atoll.ErrInvalid, "present state")
	_, err = c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "disk1@g1", Name: "disk1"}))
	says(err, atoll.ErrExist, `"disk1": that name is taken`)
	if _, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "disk1"})); err != nil {
		t.Fatal(err)
	}
	create(t, s, "disk1", "writethrough")
	_, err = c.Trash.RestoreTrash(ctx, message(&atollv1.RestoreTrashRequest{Path: "disk1"}))
	says(err, atoll.ErrExist, `restore "disk1" to "disk1": that name is taken`)
}

// What only an open volume knows is not told as zero of a closed one.
func TestClosedVolumesTellNoZeros(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	create(t, s, "disk1", "writethrough")
	look := func() *atollv1.Volume {
		t.Helper()
		l, err := c.Volumes.ListVolumes(t.Context(), message(&atollv1.ListVolumesRequest{}))
		if err != nil || len(l.Msg.Volumes) != 1 {
			t.Fatalf("%v %v", l, err)
		}
		return l.Msg.Volumes[0]
	}
	if v := look(); v.Open || v.Versions != nil || v.Last != nil || v.Release != nil || v.MappedBytes != nil || v.LogBytes != nil {
		t.Errorf("closed: %v", v)
	}
	backup(t, c, "g1", "disk1")
	if v := look(); !v.Open || v.GetVersions() != 1 || v.GetLast() != 1 || v.Release == nil || v.MappedBytes == nil {
		t.Errorf("open: %v", v)
	}
}

// A server that announces itself anew has not been started anew.
func TestStartedStays(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	first := s.session()
	if err := s.cat.EndSession(t.Context(), first.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "announced anew", func() bool { return s.session() != first })
	c := client(t, s)
	eventually(t, "listed", func() bool {
		st, err := c.Cluster.GetStatus(t.Context(), message(&atollv1.GetStatusRequest{}))
		if err != nil || len(st.Msg.Processes) != 1 {
			return false
		}
		if at := st.Msg.Processes[0].Started.AsTime(); !at.Equal(s.started) {
			t.Errorf("started %v, want %v", at, s.started)
		}
		return true
	})
}
