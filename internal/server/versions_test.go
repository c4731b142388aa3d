package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
)

// put writes n bytes of one value at off.
func put(t *testing.T, dev nbd.Device, off int64, n int, value byte) {
	t.Helper()
	b := host.Alloc(n)
	defer b.Release()
	copy(b.Bytes(), bytes.Repeat([]byte{value}, n))
	if err := dev.Write(t.Context(), b, b.Bytes(), off, false); err != nil {
		t.Fatal(err)
	}
}

// at reads the byte at off.
func at(t *testing.T, dev nbd.Device, off int64) byte {
	t.Helper()
	p := make([]byte, atoll.BlockSize)
	if err := dev.Read(t.Context(), p, off); err != nil {
		t.Fatal(err)
	}
	return p[0]
}

// want fails unless err is of a kind.
func want(t *testing.T, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("error %v, want %v", err, kind)
	}
}

// backup makes a version through the API.
func backup(t *testing.T, c *api.Client, name string, media ...string) []*atollv1.Version {
	t.Helper()
	resp, err := c.Versions.CreateVersion(t.Context(), message(&atollv1.CreateVersionRequest{Media: media, Name: name, Memo: "memo of " + name}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg.Versions
}

// differences reads a whole difference through the API.
func differences(t *testing.T, c *api.Client, name, from string) string {
	t.Helper()
	in, err := c.Versions.Diff(t.Context(), message(&atollv1.DiffRequest{Name: name, From: from}))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for in.Receive() {
		for _, e := range in.Msg().Extents {
			text := fmt.Sprintf("%d+%d", e.Offset>>12, e.Length>>12)
			if e.Zero {
				text += "z"
			}
			out = append(out, text)
		}
	}
	if err := in.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

// The life of versions: made, listed, read, compared, renamed, released,
// restored, deleted.
func TestVersions(t *testing.T) {
	s := start(t, testConfig(t, testDir(t), "--nbd", "127.0.0.1:0"), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	ctx := t.Context()
	create(t, s, "dir/disk1", "writeback")
	dev := open(t, s, "dir/disk1")
	defer s.volumes.Release(dev)
	put(t, dev, 0, 64<<10, 1)
	one := backup(t, c, "one", "dir/disk1")[0]
	if one.Number == 0 || one.Name != "one" || !one.Last || one.SizeBytes != 64<<20 || one.Medium != "dir/disk1" {
		t.Errorf("made %v", one)
	}
	put(t, dev, 8<<10, 4<<10, 2)
	two := backup(t, c, "", "dir/disk1")[0]
	put(t, dev, 1<<20, 8<<10, 3)
	if err := dev.Discard(ctx, 0, 4<<10, false); err != nil {
		t.Fatal(err)
	}
	if d := differences(t, c, "dir/disk1", "one"); d != "0+1z 2+1 256+2" {
		t.Errorf("since one: %s", d)
	}
	if d := differences(t, c, "dir/disk1@last", "one"); d != "2+1" {
		t.Errorf("last since one: %s", d)
	}
	if d := differences(t, c, "dir/disk1@one", ""); d != "0+16" {
		t.Errorf("one: %s", d)
	}

	view, info, err := s.volumes.Open(ctx, "dir/disk1@one")
	if err != nil || !info.ReadOnly || info.Size != 64<<20 || info.Name != "dir/disk1@one" {
		t.Fatalf("view %+v %v", info, err)
	}
	again, _, err := s.volumes.Open(ctx, fmt.Sprintf("dir/disk1@%d", one.Number))
	if err != nil || again != view {
		t.Errorf("two users have two devices of one version, %v", err)
	}
	s.volumes.Release(again)
	if at(t, view, 8<<10) != 1 || at(t, dev, 8<<10) != 2 {
		t.Error("the version is not what was")
	}
	names, err := s.volumes.Contexts(ctx, "dir/disk1")
	if err != nil || !slices.Equal(names, []string{nbd.ContextDepth, nbd.SinceContext("one"), nbd.SinceContext("2")}) {
		t.Errorf("contexts %v %v", names, err)
	}
	var dirty []string
	err = dev.(nbd.Versioned).Status(ctx, nbd.SinceContext("one"), 0, 16<<12, func(n int64, flags uint32) bool {
		dirty = append(dirty, fmt.Sprintf("%d:%d", n>>12, flags))
		return true
	})
	if err != nil || strings.Join(dirty, " ") != "1:1 1:0 1:1 13:0" {
		t.Errorf("dirty %v %v", dirty, err)
	}
	list, err := s.volumes.List(ctx)
	if err != nil || len(list) != 3 || list[1].Name != "dir/disk1@one" || list[2].Name != "dir/disk1@2" || !strings.Contains(list[0].Description, "2 snapshots") {
		t.Errorf("exports %+v %v", list, err)
	}
	if _, err := s.volumes.Stat(ctx, "dir/disk1@one"); err != nil {
		t.Error(err)
	}
	if _, _, err := s.volumes.Open(ctx, "dir/disk1@nine"); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("no such version: %v", err)
	}
	changes(t, s, c, one, two)

	// The view outlives its version.
	if _, err := c.Versions.DeleteVersion(ctx, message(&atollv1.DeleteVersionRequest{Name: "dir/disk1@uno"})); err != nil {
		t.Fatal(err)
	}
	if at(t, view, 8<<10) != 1 {
		t.Error("the view changed with the deletion of its version")
	}
	s.volumes.Release(view)
	if _, _, err := s.volumes.Open(ctx, "dir/disk1@uno"); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("deleted version: %v", err)
	}
	if text := get(t, s, "/metrics"); !strings.Contains(text, `atoll_media_op_duration_seconds_count{op="backup",type="volume"}`) ||
		!strings.Contains(text, `atoll_media_versions{name="dir/disk1",state="visible",type="volume"}`) {
		t.Error("metrics of versions are missing")
	}
	if r, err := (&backend{s: s}).CheckVolume(ctx, &atollv1.CheckVolumeRequest{Name: "dir/disk1"}); err != nil || len(r.Problems)+len(r.Unchecked) > 0 {
		t.Errorf("check: %v %v", r, err)
	}
}

// changes renames, protects, releases, restores and deletes versions.
func changes(t *testing.T, s *Server, c *api.Client, one, two *atollv1.Version) {
	ctx := t.Context()
	uno, memo, yes, no := "uno", "first", true, false
	v, err := c.Versions.UpdateVersion(ctx, message(&atollv1.UpdateVersionRequest{Name: "dir/disk1@one", NewName: &uno, Memo: &memo, Protected: &yes}))
	if err != nil || v.Msg.Name != "uno" || v.Msg.Memo != "first" || !v.Msg.Protected {
		t.Errorf("changed %v %v", v, err)
	}
	for _, bad := range []string{"9", "last", "a/b", "a@b"} {
		_, err := c.Versions.UpdateVersion(ctx, message(&atollv1.UpdateVersionRequest{Name: "dir/disk1@uno", NewName: &bad}))
		want(t, err, atoll.ErrInvalid)
	}
	_, err = c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"dir/disk1"}, Name: "uno"}))
	want(t, err, atoll.ErrExist)
	_, err = c.Versions.DeleteVersion(ctx, message(&atollv1.DeleteVersionRequest{Name: "dir/disk1@uno"}))
	want(t, err, atoll.ErrBusy)
	_, err = c.Versions.DeleteVersion(ctx, message(&atollv1.DeleteVersionRequest{Name: "dir/disk1"}))
	want(t, err, atoll.ErrInvalid)
	if _, err = c.Versions.UpdateVersion(ctx, message(&atollv1.UpdateVersionRequest{Name: "dir/disk1@uno", Protected: &no})); err != nil {
		t.Error(err)
	}
	rel, err := c.Versions.ReleaseVersion(ctx, message(&atollv1.ReleaseVersionRequest{Name: "dir/disk1@uno"}))
	if err != nil || rel.Msg.Number != one.Number || !rel.Msg.Release {
		t.Errorf("released %v %v", rel, err)
	}
	back, err := c.Versions.RestoreVersion(ctx, message(&atollv1.RestoreVersionRequest{Name: "dir/disk1@release", Backup: true}))
	if err != nil || back.Msg.Version.Number != one.Number || back.Msg.Saved == nil {
		t.Fatalf("restored %v %v", back, err)
	}
	dev := open(t, s, "dir/disk1")
	if at(t, dev, 8<<10) != 1 || at(t, dev, 1<<20) != 0 {
		t.Error("the volume is not what it was")
	}
	s.volumes.Release(dev)
	l, err := c.Versions.ListVersions(ctx, message(&atollv1.ListVersionsRequest{Name: "dir/disk1", Exact: true}))
	if err != nil || len(l.Msg.Versions) != 3 || l.Msg.CurParent != one.Number || l.Msg.Release != one.Number || l.Msg.Last != back.Msg.Saved.Number {
		t.Fatalf("listed %v %v", l, err)
	}
	// "one" shares all it has with the working state that went back to it; the
	// second has its own map at least.
	if one, two := l.Msg.Versions[0].UniqueBytes, l.Msg.Versions[1].UniqueBytes; one != 0 || two <= 0 || two > 64<<10 {
		t.Errorf("unique bytes %d and %d", one, two)
	}
	del, err := c.Versions.DeleteVersion(ctx, message(&atollv1.DeleteVersionRequest{Name: fmt.Sprintf("dir/disk1@%d", two.Number)}))
	if err != nil || del.Msg.Versions != 1 {
		t.Errorf("deleted %v %v", del, err)
	}
}

// Several volumes at one point, clones of versions, children, flatten, and
// parents that go before their clones.
func TestClones(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	ctx := t.Context()
	for _, name := range []string{"a", "b"} {
		create(t, s, name, "writethrough")
		dev := open(t, s, name)
		put(t, dev, 0, 1<<20, name[0])
		s.volumes.Release(dev)
	}
	group := backup(t, c, "base", "a", "b")
	if len(group) != 2 || group[0].Group == "" || group[0].Group != group[1].Group {
		t.Errorf("group %v", group)
	}
	_, err := c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"a", "none"}}))
	want(t, err, atoll.ErrNotExist)

	clone := func(source, name string) *atollv1.Volume {
		t.Helper()
		v, err := c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: source, Name: name, Properties: map[string]string{"k": "v"}}))
		if err != nil {
			t.Fatal(err)
		}
		return v.Msg
	}
	v := clone("a@base", "clones/one")
	if v.Parent == "" || v.Properties["k"] != "v" || v.SizeBytes != 64<<20 {
		t.Errorf("clone %v", v)
	}
	_, err = c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "a@base", Name: "clones/one"}))
	want(t, err, atoll.ErrExist)
	_, err = c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "a@base", Name: "nowhere/one", NoParents: true}))
	want(t, err, atoll.ErrNotExist)
	_, err = c.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "a@none", Name: "x"}))
	want(t, err, atoll.ErrNotExist)
	dev := open(t, s, "clones/one")
	put(t, dev, 4096, 4096, 'x')
	if at(t, dev, 0) != 'a' || at(t, dev, 4096) != 'x' {
		t.Error("the clone is wrong")
	}
	s.volumes.Release(dev)
	clone("clones/one", "clones/two") // makes a version for itself
	kids, err := c.Versions.ListChildren(ctx, message(&atollv1.ListChildrenRequest{Name: "a@base", Descendants: true}))
	if err != nil || len(kids.Msg.Children) != 2 || kids.Msg.Children[0].Name != "clones/one" || kids.Msg.Children[1].Name != "clones/two" {
		t.Errorf("children %v %v", kids, err)
	}
	l, err := c.Versions.ListVersions(ctx, message(&atollv1.ListVersionsRequest{Name: "a"}))
	if err != nil || len(l.Msg.Versions) != 1 || !slices.Equal(l.Msg.Versions[0].Children, []string{"clones/one"}) {
		t.Errorf("versions of the parent %v %v", l, err)
	}
	got, err := c.Volumes.GetVolume(ctx, message(&atollv1.GetVolumeRequest{Name: "clones/one"}))
	if err != nil || got.Msg.Parent != "a@base" {
		t.Errorf("parent is %v %v", got, err)
	}
	// The parents go; what their clones need stays.
	for _, name := range []string{"a", "clones/one"} {
		if _, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: name, Now: true})); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range s.volumes.list() {
		s.volumes.closeIdle(o, 0)
	}
	dev = open(t, s, "clones/two")
	if at(t, dev, 0) != 'a' || at(t, dev, 4096) != 'x' || at(t, dev, 1<<20) != 0 {
		t.Error("the clone lost its parents' data")
	}
	s.volumes.Release(dev)

	task, err := c.Versions.Flatten(ctx, message(&atollv1.FlattenRequest{Name: "clones/two"}))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "flattened", func() bool {
		got, err := c.Tasks.GetTask(ctx, message(&atollv1.GetTaskRequest{Id: task.Msg.Id}))
		if err != nil || got.Msg.State == taskFailed {
			t.Fatalf("task %v %v", got, err)
		}
		return got.Msg.State == taskDone && got.Msg.Done == got.Msg.Total && got.Msg.Total > 0
	})
	if all, err := c.Tasks.ListTasks(ctx, message(&atollv1.ListTasksRequest{})); err != nil || len(all.Msg.Tasks) != 1 {
		t.Errorf("tasks %v %v", all, err)
	}
	_, err = c.Versions.Flatten(ctx, message(&atollv1.FlattenRequest{Name: "b"}))
	want(t, err, atoll.ErrInvalid)
	eventually(t, "parents gone for good", func() bool {
		left, err := s.cat.Deleting(ctx, 0, 0)
		return err == nil && len(left) == 0
	})
	dev = open(t, s, "clones/two")
	defer s.volumes.Release(dev)
	if at(t, dev, 0) != 'a' || at(t, dev, 4096) != 'x' {
		t.Error("flattening changed the clone")
	}
}

// An import is the only user of its volume; it ends whole or not at all, also
// by silence and by a restart.
func TestImports(t *testing.T) {
	dir := testDir(t)
	s := start(t, testConfig(t, dir), Options{})
	c := client(t, s)
	ctx := t.Context()
	create(t, s, "disk1", "writeback")
	dev := open(t, s, "disk1")
	put(t, dev, 0, 64<<10, 1)
	base := backup(t, c, "base", "disk1")[0]
	begin := func() (*atollv1.BeginImportResponse, error) {
		r, err := c.Versions.BeginImport(ctx, message(&atollv1.BeginImportRequest{Name: "disk1", From: "base", To: "next", SizeBytes: 128 << 20}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	}
	_, err := begin()
	want(t, err, atoll.ErrBusy) // dev is open
	put(t, dev, 0, 4096, 9)
	s.volumes.Release(dev)
	_, err = begin()
	want(t, err, atoll.ErrConflict)
	if hint := api.Hint(err); !strings.Contains(hint, "restore") {
		t.Errorf("hint is %q", hint)
	}
	if _, err := c.Versions.RestoreVersion(ctx, message(&atollv1.RestoreVersionRequest{Name: "disk1@base"})); err != nil {
		t.Fatal(err)
	}
	stage := func() (*atollv1.BeginImportResponse, nbd.Device) {
		t.Helper()
		im, err := begin()
		if err != nil {
			t.Fatal(err)
		}
		dev, info, err := s.volumes.Open(ctx, im.Export)
		if err != nil || info.Size != 128<<20 {
			t.Fatalf("open %s: %+v %v", im.Export, info, err)
		}
		put(t, dev, 4096, 4096, 7)
		put(t, dev, 100<<20, 4096, 8)
		return im, dev
	}
	unchanged := func(s *Server) {
		t.Helper()
		dev := open(t, s, "disk1")
		defer s.volumes.Release(dev)
		if at(t, dev, 4096) != 1 || dev.Size() != 64<<20 {
			t.Errorf("after an import that was taken back: %d, %d bytes", at(t, dev, 4096), dev.Size())
		}
		l, err := (&backend{s: s}).ListVersions(ctx, &atollv1.ListVersionsRequest{Name: "disk1", All: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range l.Versions {
			if !v.Deleting && (v.Internal || v.Name != "base") {
				t.Errorf("left behind: %v", v)
			}
		}
	}

	im, dev := stage()
	_, _, err = s.volumes.Open(ctx, "disk1")
	want(t, err, atoll.ErrBusy)
	_, err = begin()
	want(t, err, atoll.ErrBusy)
	_, err = c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "disk1"}))
	want(t, err, atoll.ErrBusy)
	_, err = c.Versions.CreateVersion(ctx, message(&atollv1.CreateVersionRequest{Media: []string{"disk1"}}))
	want(t, err, atoll.ErrBusy)
	_, err = c.Versions.KeepImport(ctx, message(&atollv1.KeepImportRequest{Medium: "disk1", ImportId: "nonsense"}))
	want(t, err, atoll.ErrNotExist)
	if _, err := c.Versions.KeepImport(ctx, message(&atollv1.KeepImportRequest{Medium: "disk1", ImportId: im.ImportId})); err != nil {
		t.Error(err)
	}
	s.volumes.Release(dev)
	if _, err := c.Versions.AbortImport(ctx, message(&atollv1.AbortImportRequest{Medium: "disk1", ImportId: im.ImportId})); err != nil {
		t.Fatal(err)
	}
	_, err = c.Versions.CommitImport(ctx, message(&atollv1.CommitImportRequest{Medium: "disk1", ImportId: im.ImportId, To: "next"}))
	want(t, err, atoll.ErrNotExist)
	unchanged(s)

	_, dev = stage() // silence
	s.volumes.Release(dev)
	s.volumes.expireImports(ctx, time.Hour)
	if _, err := begin(); !errors.Is(err, atoll.ErrBusy) {
		t.Errorf("an import that is young was taken back: %v", err)
	}
	s.volumes.expireImports(ctx, 0)
	unchanged(s)

	_, dev = stage() // a restart
	s.volumes.Release(dev)
	mustStop(t, s)
	s = start(t, testConfig(t, dir), Options{})
	defer func() { mustStop(t, s) }()
	c = client(t, s)
	unchanged(s)

	im, dev = stage()
	s.volumes.Release(dev)
	v, err := c.Versions.CommitImport(ctx, message(&atollv1.CommitImportRequest{Medium: "disk1", ImportId: im.ImportId, To: "next", Properties: map[string]string{"size": "1"}}))
	if err != nil || v.Msg.Name != "next" || v.Msg.Parent == base.Number || v.Msg.Properties["size"] != "1" || v.Msg.SizeBytes != 128<<20 {
		t.Fatalf("committed %v %v", v, err)
	}
	dev = open(t, s, "disk1")
	if at(t, dev, 4096) != 7 || at(t, dev, 100<<20) != 8 || dev.Size() != 128<<20 {
		t.Error("the import is not there")
	}
	s.volumes.Release(dev)
	_, err = begin()
	want(t, err, atoll.ErrExist) // "next" is there
	committed(t, s)
}

// committed crashes a server between the version that an import makes and the
// end of the import: it was committed.
func committed(t *testing.T, s *Server) {
	ctx := t.Context()
	b := &backend{s: s}
	r, err := b.BeginImport(ctx, &atollv1.BeginImportRequest{Name: "disk1", From: "next"})
	if err != nil {
		t.Fatal(err)
	}
	o, im, err := s.volumes.imported(r.ImportId, true)
	if err != nil {
		t.Fatal(err)
	}
	put(t, o.dev, 0, 4096, 33)
	resp, err := s.volumes.commitPoint(ctx, o, im, &atollv1.CommitImportRequest{To: "third"})
	if err != nil || resp.Name != "third" {
		t.Fatal(resp, err)
	}
	s.volumes.release(o)
	s.volumes.mu.Lock()
	o.staging = nil // so that it is closed as after a loss of the lease
	s.volumes.mu.Unlock()
	if !s.volumes.closeIdle(o, 0) {
		t.Fatal("not closed")
	}
	dev := open(t, s, "disk1")
	defer s.volumes.Release(dev)
	if at(t, dev, 0) != 33 {
		t.Error("a committed import was taken back")
	}
	rec, err := s.volumes.find(context.WithoutCancel(ctx), "disk1")
	if err != nil || rec.Props[propStaging] != "" {
		t.Errorf("the note stays: %v %v", rec.Props, err)
	}
}

// When the session is lost, versions and volumes are opened anew, and an import
// that was under way is taken back.
func TestVersionsSessionLost(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	ctx := t.Context()
	create(t, s, "disk1", "writethrough")
	dev := open(t, s, "disk1")
	put(t, dev, 0, 8192, 1)
	backup(t, c, "one", "disk1")
	s.volumes.Release(dev)
	im, err := c.Versions.BeginImport(ctx, message(&atollv1.BeginImportRequest{Name: "disk1", From: "one"}))
	if err != nil {
		t.Fatal(err)
	}
	staged := open(t, s, im.Msg.Export)
	put(t, staged, 0, 4096, 2)
	tasks, err := c.Tasks.ListTasks(ctx, message(&atollv1.ListTasksRequest{}))
	if err != nil || len(tasks.Msg.Tasks) != 1 || tasks.Msg.Tasks[0].Kind != "import" || tasks.Msg.Tasks[0].Done != 4096 {
		t.Errorf("tasks %v %v", tasks, err)
	}
	view := open(t, s, "disk1@one")
	old := s.session()
	if err := s.cat.EndSession(ctx, old.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another session", func() bool { return s.session() != old && s.session().Valid() })
	eventually(t, "open again", func() bool {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		again, _, err := s.volumes.Open(ctx, "disk1@one")
		if err != nil {
			return false
		}
		defer s.volumes.Release(again)
		dev, _, err := s.volumes.Open(ctx, "disk1")
		if err != nil {
			return false
		}
		defer s.volumes.Release(dev)
		return again != view && at(t, again, 0) == 1 && at(t, dev, 0) == 1
	})
	_, err = c.Versions.CommitImport(ctx, message(&atollv1.CommitImportRequest{Medium: "disk1", ImportId: im.Msg.ImportId}))
	want(t, err, atoll.ErrNotExist)
	s.volumes.Release(staged)
	s.volumes.Release(view)
}

// An import is taken back while its client still writes, over the real protocol:
// nothing of what it sent lands after that.
func TestImportAbortUnderWrites(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	ctx := t.Context()
	create(t, s, "disk1", "writeback")
	dev := open(t, s, "disk1")
	put(t, dev, 0, 1<<20, 1)
	backup(t, c, "one", "disk1")
	s.volumes.Release(dev)
	for round := range 3 {
		im, err := c.Versions.BeginImport(ctx, message(&atollv1.BeginImportRequest{Name: "disk1", From: "one"}))
		if err != nil {
			t.Fatal(err)
		}
		importer, err := nbd.Open(ctx, im.Msg.Urls[0], 2, nbd.DialOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		started := make(chan struct{}, 8)
		for i := range 8 {
			wg.Go(func() {
				p := bytes.Repeat([]byte{9}, 64<<10)
				for n := 0; ; n++ {
					if err := importer.WriteAt(ctx, p, int64((i*7+n)%16)<<16, n%3 == 0); err != nil {
						return
					}
					if n == 3 {
						started <- struct{}{}
					}
				}
			})
		}
		for range 8 {
			<-started
		}
		if round == 2 { // or the volume is lost meanwhile
			s.volumes.drop(s.volumes.list()[0])
		} else if _, err := c.Versions.AbortImport(ctx, message(&atollv1.AbortImportRequest{Medium: "disk1", ImportId: im.Msg.ImportId})); err != nil {
			t.Fatal(err)
		}
		dev := open(t, s, "disk1")
		check := func() {
			t.Helper()
			for off := int64(0); off < 1<<20; off += 4096 {
				if v := at(t, dev, off); v != 1 {
					t.Fatalf("round %d: %d at %d", round, v, off)
				}
			}
		}
		check()
		wg.Wait()
		check()
		_ = importer.Close()
		s.volumes.Release(dev)
	}
	if r, err := (&backend{s: s}).CheckVolume(ctx, &atollv1.CheckVolumeRequest{Name: "disk1"}); err != nil || len(r.Problems)+len(r.Unchecked) > 0 {
		t.Errorf("check: %v %v", r, err)
	}
}
