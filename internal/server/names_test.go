package server

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/qos"
)

// The tree, the trash, users and limits, as the API shows them.
func TestNames(t *testing.T) {
	s := start(t, testConfig(t, testDir(t), "--nbd", "127.0.0.1:0"), Options{})
	defer mustStop(t, s)
	c := client(t, s)
	t.Run("tree", func(t *testing.T) { tree(t, s, c) })
	t.Run("trash", func(t *testing.T) { trash(t, s, c) })
	t.Run("users", func(t *testing.T) { users(t, c) })
	t.Run("limits", func(t *testing.T) { limits(t, s, c) })
}

func tree(t *testing.T, s *Server, c *api.Client) {
	ctx := t.Context()
	_, err := c.Volumes.CreateVolume(ctx, message(&atollv1.CreateVolumeRequest{Name: "x/y/v", SizeBytes: 1 << 20, NoParents: true}))
	want(t, err, atoll.ErrNotExist)
	v, err := c.Volumes.CreateVolume(ctx, message(&atollv1.CreateVolumeRequest{
		Name: "x/y/v", SizeBytes: 1 << 20, Owner: "bob", Description: "text", Properties: map[string]string{"k": "v"},
	}))
	if err != nil || v.Msg.Owner != "bob" || v.Msg.Properties["k"] != "v" || len(v.Msg.Properties) != 1 || v.Msg.Description != "text" {
		t.Fatalf("made %v %v", v, err)
	}
	_, err = c.Volumes.CreateVolume(ctx, message(&atollv1.CreateVolumeRequest{Name: "x/y", SizeBytes: 1 << 20}))
	want(t, err, atoll.ErrExist)
	_, err = c.Volumes.GetVolume(ctx, message(&atollv1.GetVolumeRequest{Name: "x/y"}))
	want(t, err, atoll.ErrInvalid)
	e, err := c.Names.GetEntry(ctx, message(&atollv1.GetEntryRequest{Path: "x/y/v"}))
	if err != nil || e.Msg.Kind != "volume" || e.Msg.Number == 0 || e.Msg.InUse || e.Msg.Id != v.Msg.Id {
		t.Errorf("entry %v %v", e, err)
	}
	d, err := c.Names.GetEntry(ctx, message(&atollv1.GetEntryRequest{Path: "x/y"}))
	if err != nil || d.Msg.Kind != "dir" || d.Msg.Owner != "bob" || d.Msg.Id != e.Msg.ParentId {
		t.Errorf("directory %v %v", d, err)
	}
	for _, id := range []string{e.Msg.Id, d.Msg.Id, "dir:0"} {
		if got, err := c.Names.GetEntry(ctx, message(&atollv1.GetEntryRequest{Id: id})); err != nil || got.Msg.Id != id {
			t.Errorf("by id %s: %v %v", id, got, err)
		}
	}
	for id, kind := range map[string]error{"dir:99999": atoll.ErrNotExist, "dir:x": atoll.ErrInvalid, "zz": atoll.ErrInvalid, "0123456789abcdef": atoll.ErrNotExist} {
		_, err := c.Names.GetEntry(ctx, message(&atollv1.GetEntryRequest{Id: id}))
		want(t, err, kind)
	}
	l, err := c.Names.ListDirectory(ctx, message(&atollv1.ListDirectoryRequest{Path: ""}))
	if err != nil || len(l.Msg.Entries) != 1 || l.Msg.Entries[0].Path != "x" || l.Msg.Entries[0].ParentId != "dir:0" {
		t.Errorf("root %v %v", l, err)
	}
	_, err = c.Names.RemoveDirectory(ctx, message(&atollv1.RemoveDirectoryRequest{Path: "x/y"}))
	want(t, err, atoll.ErrBusy)
	if api.Hint(err) == "" {
		t.Error("no hint on what to do with a directory that is not empty")
	}
	_, err = c.Names.MakeDirectory(ctx, message(&atollv1.MakeDirectoryRequest{Path: "m/n"}))
	want(t, err, atoll.ErrNotExist)
	if m, err := c.Names.MakeDirectory(ctx, message(&atollv1.MakeDirectoryRequest{Path: "m/n", Parents: true, Owner: "eve"})); err != nil || m.Msg.Owner != "eve" {
		t.Errorf("made %v %v", m, err)
	}
	o, err := c.Names.ChangeOwner(ctx, message(&atollv1.ChangeOwnerRequest{Path: "x/y/v", Owner: "eve"}))
	if err != nil || o.Msg.Owner != "eve" {
		t.Errorf("owner %v %v", o, err)
	}
	p, err := c.Names.SetProperties(ctx, message(&atollv1.SetPropertiesRequest{Path: "x/y/v", Properties: map[string]string{"k": "", "curve.a": "b", "description": "other"}}))
	if err != nil || len(p.Msg.Properties) != 1 || p.Msg.Properties["curve.a"] != "b" {
		t.Errorf("properties %v %v", p, err)
	}
	for k, kind := range map[string]error{"cache": atoll.ErrInvalid, "atoll.staging": atoll.ErrInvalid, "": atoll.ErrInvalid} {
		_, err := c.Names.SetProperties(ctx, message(&atollv1.SetPropertiesRequest{Path: "x/y/v", Properties: map[string]string{k: "x"}}))
		want(t, err, kind)
	}
	_, err = c.Names.SetProperties(ctx, message(&atollv1.SetPropertiesRequest{Path: "x/y/v", Properties: map[string]string{"big": strings.Repeat("x", 70<<10)}}))
	want(t, err, atoll.ErrTooLarge)

	dev := open(t, s, "x/y/v")
	_, err = c.Names.Rename(ctx, message(&atollv1.RenameRequest{From: "x/y/v", To: "m/w"}))
	want(t, err, atoll.ErrBusy)
	s.volumes.Release(dev)
	create(t, s, "m/w", "")
	_, err = c.Names.Rename(ctx, message(&atollv1.RenameRequest{From: "x/y/v", To: "m/w"}))
	want(t, err, atoll.ErrExist)
	r, err := c.Names.Rename(ctx, message(&atollv1.RenameRequest{From: "x/y/v", To: "m/w", Replace: true}))
	if err != nil || r.Msg.Path != "m/w" || r.Msg.Id != v.Msg.Id {
		t.Errorf("renamed %v %v", r, err)
	}
	tl, err := c.Trash.ListTrash(ctx, message(&atollv1.ListTrashRequest{}))
	if err != nil || len(tl.Msg.Entries) != 1 || tl.Msg.Entries[0].Path != "m/w" || tl.Msg.Entries[0].SizeBytes != 64<<20 {
		t.Errorf("replaced %v %v", tl, err)
	}
	if _, err := c.Trash.PurgeTrash(ctx, message(&atollv1.PurgeTrashRequest{All: true})); err != nil {
		t.Error(err)
	}
}

func trash(t *testing.T, s *Server, c *api.Client) {
	ctx := t.Context()
	b := &backend{s: s}
	create(t, s, "t/a", "writethrough")
	dev := open(t, s, "t/a")
	put(t, dev, 0, 4096, 5)
	s.volumes.Release(dev)
	del, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "t/a"}))
	if err != nil || del.Msg.TrashId == "" || time.Until(del.Msg.Expires.AsTime()) < 23*time.Hour {
		t.Fatalf("deleted %v %v", del, err)
	}
	_, _, err = s.volumes.Open(ctx, "t/a")
	want(t, err, atoll.ErrNotExist)
	create(t, s, "t/a", "")
	_, err = c.Trash.RestoreTrash(ctx, message(&atollv1.RestoreTrashRequest{Id: del.Msg.TrashId}))
	want(t, err, atoll.ErrExist)
	_, err = c.Trash.RestoreTrash(ctx, message(&atollv1.RestoreTrashRequest{Path: "t/a", NewPath: "q/r", NoParents: true}))
	want(t, err, atoll.ErrNotExist)
	_, err = c.Trash.RestoreTrash(ctx, message(&atollv1.RestoreTrashRequest{Path: "t/none"}))
	want(t, err, atoll.ErrNotExist)
	back, err := c.Trash.RestoreTrash(ctx, message(&atollv1.RestoreTrashRequest{Path: "t/a", NewPath: "q/r"}))
	if err != nil || back.Msg.Path != "q/r" || back.Msg.Id != del.Msg.TrashId {
		t.Fatalf("restored %v %v", back, err)
	}
	dev = open(t, s, "q/r")
	if at(t, dev, 0) != 5 {
		t.Error("the trash changed the data")
	}
	s.volumes.Release(dev)

	// Expiry, and early purge of the oldest when room is scarce.
	soon, later := timestamppb.New(time.Now().Add(time.Hour)), timestamppb.New(time.Now().Add(2*time.Hour))
	for name, at := range map[string]*timestamppb.Timestamp{"t/a": soon, "q/r": later} {
		if e, err := c.Trash.MoveToTrash(ctx, message(&atollv1.MoveToTrashRequest{Name: name, Expires: at, Source: "curve"})); err != nil || e.Msg.Source != "curve" {
			t.Fatal(e, err)
		}
	}
	left := func() (out []string) {
		l, err := c.Trash.ListTrash(ctx, message(&atollv1.ListTrashRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range l.Msg.Entries {
			out = append(out, e.Path)
		}
		slices.Sort(out)
		return out
	}
	if err := b.expireTrash(ctx, time.Now(), &scarcity{}); err != nil || len(left()) != 2 {
		t.Errorf("expired early: %v %v", left(), err)
	}
	if err := b.expireTrash(ctx, time.Now().Add(90*time.Minute), &scarcity{}); err != nil || !slices.Equal(left(), []string{"q/r"}) {
		t.Errorf("expired: %v %v", left(), err)
	}
	if r, err := c.Trash.PurgeTrash(ctx, message(&atollv1.PurgeTrashRequest{ExpiredBefore: soon})); err != nil || r.Msg.Removed != 0 {
		t.Errorf("purged %v %v", r, err)
	}
	_, err = c.Trash.PurgeTrash(ctx, message(&atollv1.PurgeTrashRequest{}))
	want(t, err, atoll.ErrInvalid)
	if r, err := c.Trash.PurgeTrash(ctx, message(&atollv1.PurgeTrashRequest{Id: del.Msg.TrashId})); err != nil || r.Msg.Removed != 1 || len(left()) != 0 {
		t.Errorf("purged %v %v", r, err)
	}
	create(t, s, "t/now", "")
	if _, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "t/now", Now: true})); err != nil || len(left()) != 0 {
		t.Errorf("deleted now: %v %v", left(), err)
	}
	now := time.Now()
	old := map[atoll.MediumID]catalog.Trash{}
	for hours := range 3 {
		old[atoll.MediumID(hours+1)] = catalog.Trash{Removed: now.Add(-time.Duration(hours) * time.Hour), Expires: now.Add(time.Hour)}
	}
	for early, want := range map[bool][]atoll.MediumID{false: nil, true: {3}} {
		if got := toPurge(old, now, early); !slices.Equal(got, want) {
			t.Errorf("early %v: purged %v", early, got)
		}
	}
}

// Room is scarce only when it has been for a while, and nothing is being deleted:
// nodes tell late what a deletion has freed.
func TestScarcity(t *testing.T) {
	var c scarcity
	now := time.Now()
	for i, step := range []struct {
		after    time.Duration
		used     float64
		deleting bool
		want     bool
	}{
		{0, 0.75, false, false}, {time.Hour, 0.95, false, false}, {9 * time.Second, 0.94, false, false}, {time.Second, 0.94, false, true},
		{time.Second, 0.99, true, false},  // the first one is on its way
		{time.Second, 0.95, false, false}, // gone, and not reported yet
		{time.Second, 0.75, false, false}, {9 * time.Second, 0.95, false, false}, {time.Second, 0.93, false, false},
		{time.Second, 0.95, false, false}, {10 * time.Second, 0.95, false, true},
	} {
		now = now.Add(step.after)
		if got := c.lasts(now, step.used, step.deleting); got != step.want {
			t.Errorf("step %d, %+v: %v", i, step, got)
		}
	}
}

func users(t *testing.T, c *api.Client) {
	ctx := t.Context()
	_, err := c.Users.CreateUser(ctx, message(&atollv1.CreateUserRequest{Name: "bob", Strict: true}))
	want(t, err, atoll.ErrInvalid)
	u, err := c.Users.CreateUser(ctx, message(&atollv1.CreateUserRequest{Name: "bob", Password: "secret", Strict: true}))
	if err != nil || !u.Msg.HasPassword || !u.Msg.Strict {
		t.Errorf("made %v %v", u, err)
	}
	_, err = c.Users.CreateUser(ctx, message(&atollv1.CreateUserRequest{Name: "bob"}))
	want(t, err, atoll.ErrExist)
	login := func(name, password string) error {
		_, err := c.Users.Authenticate(ctx, message(&atollv1.AuthenticateRequest{Name: name, Password: password}))
		return err
	}
	for range 2 { // the second time it is remembered
		want(t, login("bob", "secret"), nil)
	}
	want(t, login("bob", "Secret"), atoll.ErrDenied)
	want(t, login("bob", ""), atoll.ErrDenied)
	want(t, login("eve", "x"), atoll.ErrNotExist)
	want(t, login("root", "x"), atoll.ErrNotExist)
	other, empty, no := "other", "", false
	if _, err := c.Users.UpdateUser(ctx, message(&atollv1.UpdateUserRequest{Name: "bob", Password: &other})); err != nil {
		t.Error(err)
	}
	want(t, login("bob", "secret"), atoll.ErrDenied)
	want(t, login("bob", "other"), nil)
	_, err = c.Users.UpdateUser(ctx, message(&atollv1.UpdateUserRequest{Name: "bob", Password: &empty}))
	want(t, err, atoll.ErrInvalid)
	if _, err := c.Users.UpdateUser(ctx, message(&atollv1.UpdateUserRequest{Name: "bob", Password: &empty, Strict: &no})); err != nil {
		t.Error(err)
	}
	want(t, login("bob", ""), atoll.ErrNotExist)
	_, err = c.Users.UpdateUser(ctx, message(&atollv1.UpdateUserRequest{Name: "root", Admin: &no}))
	want(t, err, atoll.ErrInvalid)
	if _, err := c.Users.UpdateUser(ctx, message(&atollv1.UpdateUserRequest{Name: "root", Password: &other})); err != nil {
		t.Error(err)
	}
	want(t, login("root", "other"), nil)
	l, err := c.Users.ListUsers(ctx, message(&atollv1.ListUsersRequest{}))
	if err != nil || len(l.Msg.Users) != 2 || l.Msg.Users[1].Name != "root" || !l.Msg.Users[1].Admin {
		t.Errorf("users %v %v", l, err)
	}
	_, err = c.Users.DeleteUser(ctx, message(&atollv1.DeleteUserRequest{Name: "root"}))
	want(t, err, atoll.ErrInvalid)
	if _, err := c.Users.DeleteUser(ctx, message(&atollv1.DeleteUserRequest{Name: "bob"})); err != nil {
		t.Error(err)
	}
}

func limits(t *testing.T, s *Server, c *api.Client) {
	ctx := t.Context()
	_, err := c.Volumes.CreateVolume(ctx, message(&atollv1.CreateVolumeRequest{Name: "l", SizeBytes: 1 << 20, Limits: &atollv1.Limits{Iops: &atollv1.Limit{Rate: 5}}}))
	if err != nil {
		t.Fatal(err)
	}
	dev := open(t, s, "l")
	defer s.volumes.Release(dev)
	o := s.volumes.list()[0]
	if got := o.limits.Limits(); got[qos.IOPSTotal].Rate != 5 {
		t.Errorf("limits after create: %v", got)
	}
	l, err := c.Names.SetLimits(ctx, message(&atollv1.SetLimitsRequest{Name: "l", Limits: &atollv1.Limits{
		Iops: &atollv1.Limit{}, WriteBytes: &atollv1.Limit{Rate: 1 << 20, Burst: 2 << 20, BurstSeconds: 3},
	}}))
	if err != nil || l.Msg.Iops != nil || l.Msg.WriteBytes.GetBurstSeconds() != 3 {
		t.Errorf("limits %v %v", l, err)
	}
	if got := o.limits.Limits(); got[qos.IOPSTotal].Rate != 0 || got[qos.BPSWrite].Burst != 2<<20 || got[qos.BPSWrite].Length != 3*time.Second {
		t.Errorf("live limits: %v", got)
	}
	_, err = c.Names.SetLimits(ctx, message(&atollv1.SetLimitsRequest{Name: "l", Limits: &atollv1.Limits{Iops: &atollv1.Limit{Rate: 5, Burst: 1}}}))
	want(t, err, atoll.ErrInvalid)
	v, err := c.Volumes.GetVolume(ctx, message(&atollv1.GetVolumeRequest{Name: "l"}))
	if err != nil || v.Msg.Limits.GetWriteBytes().GetRate() != 1<<20 || len(v.Msg.Properties) != 0 {
		t.Errorf("volume %v %v", v, err)
	}
	_, err = c.Names.SetLimits(ctx, message(&atollv1.SetLimitsRequest{Name: "none"}))
	if !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("no such volume: %v", err)
	}
}
