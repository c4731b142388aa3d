package server

import (
	"slices"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// keptMedia is the list of deleted media that status shows.
func keptMedia(t *testing.T, c *api.Client) []*atollv1.KeptMedium {
	t.Helper()
	st, err := c.Cluster.GetStatus(t.Context(), message(&atollv1.GetStatusRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return st.Msg.Kept
}

// A deleted volume keeps the versions that clones need, and no more; when one of
// the clones goes, its version goes too, and with the last one all of it.
func TestDeletedParentKeepsWhatClonesNeed(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{Demo: true})
	defer mustStop(t, s)
	c := client(t, s)
	ctx := t.Context()
	create(t, s, "disk", "writethrough")
	const part = 8 << 20
	dev := open(t, s, "disk")
	for i := range 6 { // five versions, each all new, and more in cur
		for off := int64(0); off < part; off += 1 << 20 {
			put(t, dev, off, 1<<20, byte('a'+i))
		}
		if i < 5 {
			backup(t, c, string(rune('a'+i)), "disk")
		}
	}
	s.volumes.Release(dev)
	protect := true
	if _, err := c.Versions.UpdateVersion(ctx, message(&atollv1.UpdateVersionRequest{Name: "disk@c", Protected: &protect})); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"b", "d"} {
		if _, err := c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "disk@" + v, Name: "clone-" + v})); err != nil {
			t.Fatal(err)
		}
	}
	rec, err := s.cat.MediumByName(ctx, "disk")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "disk", Now: true})); err != nil {
		t.Fatal(err)
	}
	create(t, s, "disk", "writethrough") // the name is free
	var kept []*atollv1.KeptMedium
	eventually(t, "room of two versions kept", func() bool {
		kept = keptMedia(t, c)
		return len(kept) == 1 && kept[0].Bytes > 0
	})
	slices.Sort(kept[0].Clones)
	if kept[0].Name != "disk" || kept[0].Bytes > 4*64<<20 || !slices.Equal(kept[0].Clones, []string{"clone-b", "clone-d"}) {
		t.Errorf("kept %v", kept)
	}
	holds(t, s, rec, 2, 2*part)
	v, err := c.Volumes.GetVolume(ctx, message(&atollv1.GetVolumeRequest{Name: "clone-b"}))
	if err != nil || v.Msg.KeptBytes != kept[0].Bytes {
		t.Errorf("clone %v %v, want %d bytes kept", v, err, kept[0].Bytes)
	}
	dev = open(t, s, "clone-d")
	if at(t, dev, 0) != 'd' || at(t, dev, part-4096) != 'd' {
		t.Error("the clone lost its parent's data")
	}
	s.volumes.Release(dev)

	del := func(name string) {
		t.Helper()
		if _, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: name, Now: true})); err != nil {
			t.Fatal(err)
		}
	}
	del("clone-d")
	eventually(t, "one clone left", func() bool {
		kept = keptMedia(t, c)
		return len(kept) == 1 && slices.Equal(kept[0].Clones, []string{"clone-b"})
	})
	eventually(t, "one version left", func() bool { return !s.volumes.has(rec.ID) && versionsOf(t, s, rec) == 1 })
	dev = open(t, s, "clone-b")
	if at(t, dev, 0) != 'b' || at(t, dev, part-4096) != 'b' {
		t.Error("the clone lost its parent's data")
	}
	s.volumes.Release(dev)
	del("clone-b")
	eventually(t, "all of it gone", func() bool { return len(keptMedia(t, c)) == 0 })
}

// opened opens a medium for a look at it, also one that is deleted.
func opened(t *testing.T, s *Server, rec catalog.Medium, fn func(*openVolume)) {
	t.Helper()
	o, err := s.volumes.acquire(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	fn(o)
	s.volumes.release(o)
	s.volumes.closeIdle(o, 0)
}

func versionsOf(t *testing.T, s *Server, rec catalog.Medium) (n int) {
	rec.Name = "old one"
	opened(t, s, rec, func(o *openVolume) { n = len(o.vol.Versions()) })
	return n
}

// holds checks how many versions a deleted medium has, and that not much more
// than so many bytes of it are live.
func holds(t *testing.T, s *Server, rec catalog.Medium, versions int, bytes int64) {
	t.Helper()
	rec.Name = "old one"
	opened(t, s, rec, func(o *openVolume) {
		live := o.medium.Stats().Live
		if n := len(o.vol.Versions()); n != versions || live < bytes || live > bytes+bytes/4 {
			t.Errorf("%d versions and %d bytes are live, want %d and %d", n, live, versions, bytes)
		}
		if n := o.vol.Stats().MappedBlocks; n != 0 {
			t.Errorf("the present state still has %d blocks", n)
		}
		if err := o.vol.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// A closed volume is compacted where it lies, and leaves when it is wanted.
func TestCareForClosedVolumes(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	create(t, s, "disk", "writethrough")
	dev := open(t, s, "disk")
	for i := range 3 {
		for off := int64(0); off < 40<<20; off += 4 << 20 {
			put(t, dev, off, 4<<20, byte('a'+i))
		}
	}
	o := s.volumes.list()[0]
	id := o.id
	s.volumes.Release(dev)
	if err := o.vol.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.volumes.closeIdle(o, 0)
	td := newTender(&backend{s: s})
	for range 10 {
		if err := td.careFor(t.Context(), time.Now(), tight); err != nil {
			t.Fatal(err)
		}
		if !td.cared[id].IsZero() {
			break
		}
	}
	if td.cared[id].IsZero() || s.volumes.has(id) {
		t.Error("not visited, or not closed afterwards")
	}
	rec, err := s.cat.Medium(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	opened(t, s, rec, func(o *openVolume) {
		if n := len(o.medium.Victims(1)); n > 0 || o.medium.Stats().Taken > 4*atoll.SegmentBlocks*atoll.BlockSize {
			t.Errorf("%d victims left, %d bytes taken", n, o.medium.Stats().Taken)
		}
	})
	before := td.cared[id]
	if err := td.careFor(t.Context(), time.Now(), tight); err != nil || td.cared[id] != before {
		t.Errorf("visited again at once, %v", err)
	}
}
