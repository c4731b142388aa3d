package server

import (
	"slices"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// What is in the trash, and what was deleted but is needed by a clone, is checked
// by its id; it stays what it is, and can be restored.
func TestCheckGone(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	b, c, ctx := &backend{s: s}, client(t, s), t.Context()
	for _, name := range []string{"parent", "trashed"} {
		create(t, s, name, "")
		dev := open(t, s, name)
		fill(t, dev, 4, true)
		s.volumes.Release(dev)
	}
	if _, err := b.CloneVersion(ctx, &atollv1.CloneVersionRequest{Source: "parent", Name: "clone"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.DeleteVolume(ctx, &atollv1.DeleteVolumeRequest{Name: "parent", Now: true}); err != nil {
		t.Fatal(err)
	}
	gone, err := b.DeleteVolume(ctx, &atollv1.DeleteVolumeRequest{Name: "trashed"})
	if err != nil {
		t.Fatal(err)
	}
	st, err := b.Status(ctx)
	if err != nil || len(st.Kept) != 1 {
		t.Fatalf("kept %v, %v", st.GetKept(), err)
	}
	for _, id := range []string{st.Kept[0].Id, gone.TrashId} {
		for range 2 {
			r, err := c.Volumes.CheckVolume(ctx, message(&atollv1.CheckVolumeRequest{Id: id, ReadAll: true}))
			if err != nil || len(r.Msg.Problems) > 0 || r.Msg.CheckedBytes == 0 {
				t.Errorf("%s: %v, %v", id, r, err)
			}
		}
	}
	if l, err := b.ListTrash(ctx, &atollv1.ListTrashRequest{}); err != nil || len(l.Entries) != 1 || l.Entries[0].Path != "trashed" {
		t.Errorf("in the trash: %v, %v", l, err)
	}
	if _, err := b.RestoreTrash(ctx, &atollv1.RestoreTrashRequest{Id: gone.TrashId}); err != nil {
		t.Fatal(err)
	}
	_, err = b.CheckVolume(ctx, &atollv1.CheckVolumeRequest{Id: gone.TrashId})
	want(t, err, atoll.ErrNotExist)
	for _, name := range []string{"trashed", "clone"} {
		dev := open(t, s, name)
		verify(t, dev, 4)
		s.volumes.Release(dev)
		// Whoever takes care of deleted volumes may just have one open.
		eventually(t, "no deleted volume is open", func() bool {
			return !slices.ContainsFunc(s.volumes.list(), func(o *openVolume) bool { return strings.Contains(o.name, "(") })
		})
	}
}
