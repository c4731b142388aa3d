package server

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// What belongs to a volume is done by the server that owns it, whichever is
// asked; versions are read from any.
func TestForward(t *testing.T) {
	first := start(t, testConfig(t, testDir(t), "--disk", testDir(t)), Options{})
	second := start(t, testConfig(t, testDir(t), "--roles", "gateway", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	defer mustStop(t, first)
	defer mustStop(t, second)
	ctx := t.Context()
	c := client(t, first) // asked is the first; owner is the second
	create(t, second, "disk1", "writethrough")
	dev := open(t, second, "disk1")
	put(t, dev, 0, 8192, 1)
	v := backup(t, c, "one", "disk1")[0]
	if v.Name != "one" || len(first.volumes.list()) != 0 {
		t.Errorf("made %v, the first server has %d volumes open", v, len(first.volumes.list()))
	}
	put(t, dev, 4096, 4096, 2)
	l, err := c.Versions.ListVersions(ctx, message(&atollv1.ListVersionsRequest{Name: "disk1"}))
	if err != nil || len(l.Msg.Versions) != 1 {
		t.Errorf("listed %v %v", l, err)
	}
	if d := differences(t, c, "disk1", "one"); d != "1+1" {
		t.Errorf("differences %s", d)
	}
	in, err := c.Versions.Diff(ctx, message(&atollv1.DiffRequest{Name: "disk1", From: "none"}))
	if err == nil {
		for in.Receive() {
		}
		err = in.Err()
	}
	want(t, err, atoll.ErrNotExist)
	if !strings.Contains(api.Hint(err), "disk1") {
		t.Errorf("the hint was lost: %v (%s)", err, api.Hint(err))
	}
	_, err = c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"disk1"}, Name: "one"}))
	want(t, err, atoll.ErrExist)
	got, err := c.Volumes.GetVolume(ctx, message(&atollv1.GetVolumeRequest{Name: "disk1", Open: true}))
	if err != nil || !got.Msg.Open || got.Msg.GetVersions() != 1 || got.Msg.ServedBy != second.session().ID().String() || !strings.Contains(got.Msg.Urls[0], second.home.dir) {
		t.Errorf("volume %v %v", got, err)
	}
	_, err = c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "disk1"}))
	want(t, err, atoll.ErrBusy)
	if r, err := c.Volumes.ResizeVolume(ctx, message(&atollv1.ResizeVolumeRequest{Name: "disk1", SizeBytes: 128 << 20})); err != nil || r.Msg.SizeBytes != 128<<20 || dev.Size() != 128<<20 {
		t.Errorf("resized %v %v", r, err)
	}
	clone, err := c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "disk1@one", Name: "clone"}))
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.Versions.Flatten(ctx, message(&atollv1.FlattenRequest{Name: "clone"}))
	if err != nil {
		t.Fatal(clone, err)
	}
	far := client(t, second)
	eventually(t, "the task is seen from the other server, and ends", func() bool {
		got, err := far.Tasks.GetTask(ctx, message(&atollv1.GetTaskRequest{Id: task.Msg.Id}))
		return err == nil && got.Msg.State == taskDone
	})
	if all, err := far.Tasks.ListTasks(ctx, message(&atollv1.ListTasksRequest{})); err != nil || len(all.Msg.Tasks) != 1 {
		t.Errorf("tasks %v %v", all, err)
	}
	_, err = c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"clone", "disk1"}}))
	want(t, err, atoll.ErrBusy) // open on two servers
	if o, ok := hosted(first, "clone"); ok && !first.volumes.closeIdle(o, 0) {
		t.Error("the clone is in use")
	}
	if g := backup(t, c, "", "clone", "disk1"); len(g) != 2 || g[0].Group == "" {
		t.Errorf("group %v", g)
	}

	view, _, err := first.volumes.Open(ctx, "disk1@one")
	if err != nil {
		t.Fatal(err)
	}
	if at(t, view, 4096) != 1 {
		t.Error("the version is not what was")
	}
	if _, err := c.Versions.DeleteVersion(ctx, message(&atollv1.DeleteVersionRequest{Name: "disk1@one"})); err != nil {
		t.Error(err)
	}
	if at(t, view, 4096) != 1 {
		t.Error("the view changed with the deletion of its version")
	}
	first.volumes.Release(view)
	second.volumes.Release(dev)
	if _, err := c.Names.Rename(ctx, message(&atollv1.RenameRequest{From: "disk1", To: "clone", Replace: true})); err != nil {
		t.Errorf("rename over a volume of the other server: %v", err)
	}
	if tr, err := c.Trash.ListTrash(ctx, message(&atollv1.ListTrashRequest{})); err != nil || len(tr.Msg.Entries) != 1 || tr.Msg.Entries[0].Id != clone.Msg.Id {
		t.Errorf("trash %v %v", tr, err)
	}
	if d, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "clone"})); err != nil || d.Msg.TrashId != v.MediumId {
		t.Errorf("deleted %v %v", d, err)
	}
}

// A client that waits at one server for a volume that another has open does not
// keep that server from passing calls on.
func TestForwardWhileAwaited(t *testing.T) {
	first := start(t, testConfig(t, testDir(t), "--disk", testDir(t)), Options{})
	second := start(t, testConfig(t, testDir(t), "--roles", "gateway", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	defer mustStop(t, first)
	defer mustStop(t, second)
	create(t, second, "disk1", "writethrough")
	dev := open(t, second, "disk1")
	rec, err := first.volumes.find(t.Context(), "disk1")
	if err != nil {
		t.Fatal(err)
	}
	defer second.volumes.Release(dev)
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, 1)
	go func() {
		_, _, err := first.volumes.Open(ctx, "disk1")
		waited <- err
	}()
	eventually(t, "the client waits", func() bool { return first.volumes.has(rec.ID) })
	if _, err := client(t, first).Volumes.CheckVolume(t.Context(), message(&atollv1.CheckVolumeRequest{Name: "disk1"})); err != nil {
		t.Errorf("a call while a client waits: %v", err)
	}
	cancel()
	if err := <-waited; err == nil {
		t.Error("two servers have the volume open")
	}
}

// hosted finds an open volume by name.
func hosted(s *Server, name string) (*openVolume, bool) {
	list := s.volumes.list()
	i := slices.IndexFunc(list, func(o *openVolume) bool { return o.name == name })
	if i < 0 {
		return nil, false
	}
	return list[i], true
}

// A call about a volume whose owner has just died waits for its lease to end, and
// is done here then.
func TestForwardToDead(t *testing.T) {
	t.Parallel()
	first := start(t, testConfig(t, testDir(t), "--disk", testDir(t)), Options{})
	second := start(t, testConfig(t, testDir(t), "--roles", "gateway", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	defer mustStop(t, first)
	defer mustStop(t, second)
	create(t, second, "disk1", "writethrough")
	dev := open(t, second, "disk1")
	put(t, dev, 0, 4096, 1)
	// Nobody listens at the owner's address any more; its lease ends a second
	// later.
	for _, srv := range second.https {
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var ended atomic.Bool
	gone := time.AfterFunc(time.Second, func() {
		ended.Store(true)
		if err := first.cat.EndSession(t.Context(), second.session().ID()); err != nil {
			t.Error(err)
		}
	})
	defer gone.Stop()
	v := backup(t, client(t, first), "one", "disk1")[0]
	if v.Name != "one" || !ended.Load() {
		t.Errorf("made %v; the owner had lost its lease: %v", v, ended.Load())
	}
	if _, ok := hosted(first, "disk1"); !ok {
		t.Error("not taken over")
	}
	second.volumes.Release(dev)
}
