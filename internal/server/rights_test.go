package server

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// people makes alice, bob and carol, an administrator, and what alice owns: the
// directory "hers" with "hers/disk", "disk", and one in the trash, whose id it
// returns. Bob has one in the trash that was at the same path, removed later.
func people(t *testing.T, s *Server) (trashID string) {
	t.Helper()
	b, ctx := &backend{s: s}, t.Context()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, u := range []*atollv1.CreateUserRequest{{Name: "alice", Password: "a"}, {Name: "bob", Password: "b"}, {Name: "carol", Password: "c", Admin: true}, {Name: "open"}} {
		_, err := b.CreateUser(ctx, u)
		do(err)
	}
	_, err := b.MakeDirectory(ctx, &atollv1.MakeDirectoryRequest{Path: "hers", Owner: "alice"})
	do(err)
	for _, name := range []string{"hers/disk", "disk", "old"} {
		_, err := b.CreateVolume(ctx, &atollv1.CreateVolumeRequest{Name: name, SizeBytes: 1 << 20, Owner: "alice"})
		do(err)
	}
	gone, err := b.MoveToTrash(ctx, &atollv1.MoveToTrashRequest{Name: "old"})
	do(err)
	_, err = b.CreateVolume(ctx, &atollv1.CreateVolumeRequest{Name: "old", SizeBytes: 1 << 20, Owner: "bob"})
	do(err)
	_, err = b.MoveToTrash(ctx, &atollv1.MoveToTrashRequest{Name: "old"})
	do(err)
	return gone.Id
}

// Who may make which call. Each request is about things of alice, whom the first
// column is about; the second is about bob.
func TestRights(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	id := people(t, s)
	b, yes, text := &backend{s: s}, true, "x"
	cases := []struct {
		owner, other bool
		request      proto.Message
	}{
		{true, true, &atollv1.GetStatusRequest{}},
		{true, true, &atollv1.ListNodesRequest{}},
		{true, true, &atollv1.DiagnoseRequest{}},
		{true, true, &atollv1.JoinRequest{}},
		{true, true, &atollv1.ListVolumesRequest{}},
		{true, true, &atollv1.ListTrashRequest{}},
		{true, true, &atollv1.ListUsersRequest{}},
		{true, true, &atollv1.ListTasksRequest{}},
		{false, false, &atollv1.GetConfigRequest{}},
		{false, false, &atollv1.CreateTokenRequest{}},
		{false, false, &atollv1.SetNodeRequest{Id: 1, State: "draining"}},
		{false, false, &atollv1.InjectRequest{}},
		{false, false, &atollv1.AddNodeRequest{}},
		{true, true, &atollv1.CreateVolumeRequest{Name: "new"}},
		{true, false, &atollv1.CreateVolumeRequest{Name: "hers/new"}},
		{true, false, &atollv1.CreateVolumeRequest{Name: "hers/deep/down/new"}},
		{true, false, &atollv1.CreateVolumeRequest{Name: "new", Owner: "alice"}},
		{false, false, &atollv1.CreateVolumeRequest{Name: "new", Owner: "root"}},
		{true, false, &atollv1.GetVolumeRequest{Name: "disk"}},
		{true, true, &atollv1.GetVolumeRequest{Name: "none"}}, // the call says what is missing
		{true, false, &atollv1.ResizeVolumeRequest{Name: "disk"}},
		{true, false, &atollv1.SetRedundancyRequest{Name: "disk"}},
		{true, false, &atollv1.DeleteVolumeRequest{Name: "hers/disk"}},
		{true, false, &atollv1.DeleteVolumeRequest{Name: "disk", Now: true}},
		{true, false, &atollv1.CheckVolumeRequest{Name: "disk"}},
		{true, false, &atollv1.CheckVolumeRequest{Id: id}},
		{true, false, &atollv1.CreateVersionRequest{Media: []string{"disk"}}},
		{true, false, &atollv1.CreateVersionRequest{Media: []string{"none", "hers/disk"}}},
		{true, false, &atollv1.ListVersionsRequest{Name: "disk"}},
		{true, false, &atollv1.UpdateVersionRequest{Name: "disk@1"}},
		{true, false, &atollv1.DeleteVersionRequest{Name: "disk@1"}},
		{true, false, &atollv1.DeleteVersionRequest{Name: "disk", All: true}},
		{true, false, &atollv1.ReleaseVersionRequest{Name: "disk@1"}},
		{true, false, &atollv1.RestoreVersionRequest{Name: "disk@1"}},
		{true, false, &atollv1.CloneVersionRequest{Source: "disk@1", Name: "new"}},
		{true, false, &atollv1.CloneVersionRequest{Source: "disk", Name: "hers/new"}},
		{false, false, &atollv1.CloneVersionRequest{Source: "disk", Name: "new", Owner: "root"}},
		{true, false, &atollv1.FlattenRequest{Name: "disk"}},
		{true, false, &atollv1.ListChildrenRequest{Name: "disk@1"}},
		{true, false, &atollv1.DiffRequest{Name: "disk@1"}},
		{true, false, &atollv1.SetScheduleRequest{Name: "disk"}},
		{true, false, &atollv1.BeginImportRequest{Name: "disk"}},
		{true, false, &atollv1.CommitImportRequest{Medium: "disk"}},
		{true, false, &atollv1.AbortImportRequest{Medium: "disk"}},
		{true, false, &atollv1.KeepImportRequest{Medium: "disk"}},
		{true, true, &atollv1.MakeDirectoryRequest{Path: "new"}},
		{true, false, &atollv1.MakeDirectoryRequest{Path: "hers/new"}},
		{false, false, &atollv1.MakeDirectoryRequest{Path: "new", Owner: "root"}},
		{true, false, &atollv1.RemoveDirectoryRequest{Path: "hers"}},
		{true, true, &atollv1.ListDirectoryRequest{}},
		{true, false, &atollv1.ListDirectoryRequest{Path: "hers"}},
		{true, true, &atollv1.GetEntryRequest{}},
		{true, false, &atollv1.GetEntryRequest{Path: "disk"}},
		{true, false, &atollv1.GetEntryRequest{Path: "hers"}},
		{true, false, &atollv1.RenameRequest{From: "disk", To: "new"}},
		{true, false, &atollv1.RenameRequest{From: "none", To: "hers/new"}},
		{true, false, &atollv1.RenameRequest{From: "none", To: "disk", Replace: true}},
		{false, false, &atollv1.ChangeOwnerRequest{Path: "disk", Owner: "bob"}},
		{true, false, &atollv1.SetPropertiesRequest{Path: "disk"}},
		{false, false, &atollv1.SetLimitsRequest{Name: "disk"}},
		{true, false, &atollv1.MoveToTrashRequest{Name: "disk"}},
		{true, true, &atollv1.RestoreTrashRequest{Path: "old"}}, // each the own one
		{true, false, &atollv1.RestoreTrashRequest{Id: id}},
		{true, false, &atollv1.RestoreTrashRequest{Path: "old", NewPath: "hers/back"}},
		{true, false, &atollv1.PurgeTrashRequest{Id: id}},
		{false, false, &atollv1.PurgeTrashRequest{All: true}},
		{false, false, &atollv1.CreateUserRequest{Name: "eve"}},
		{false, false, &atollv1.DeleteUserRequest{Name: "alice"}},
		{true, false, &atollv1.UpdateUserRequest{Name: "alice", Password: &text}},
		{false, false, &atollv1.UpdateUserRequest{Name: "alice", Admin: &yes}},
		{false, false, &atollv1.UpdateUserRequest{Name: "alice", Strict: &yes}},
		{false, false, &atollv1.AuthenticateRequest{Name: "alice"}},
	}
	seen := map[protoreflect.FullName]bool{"atoll.v1.GetTaskRequest": true, "atoll.v1.CancelTaskRequest": true} // below
	for _, c := range cases {
		name := c.request.ProtoReflect().Descriptor().FullName()
		seen[name] = true
		for who, may := range map[string]bool{"alice": c.owner, "bob": c.other, "": strings.HasSuffix(string(name), ".JoinRequest")} {
			err := b.Authorize(t.Context(), api.Caller{Name: who}, proto.Clone(c.request))
			if may && err != nil || !may && !errors.Is(err, atoll.ErrDenied) {
				t.Errorf("%s %v for %q: %v", name.Name(), c.request, who, err)
			}
		}
	}
	// A call that is new must be thought of here.
	protoregistry.GlobalFiles.RangeFilesByPackage("atoll.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			for m, j := f.Services().Get(i).Methods(), 0; j < m.Len(); j++ {
				if in := m.Get(j).Input().FullName(); !seen[in] {
					t.Errorf("nothing says who may call %s", m.Get(j).FullName())
				}
			}
		}
		return true
	})
}

// A user's calls over TCP and over the Unix socket, from the login to what lists
// show.
func TestLogin(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	people(t, s)
	ctx := t.Context()
	as := func(cred api.Credential) *api.Client {
		c, err := api.NewClient(s.APIAddr(), cred, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	status := func(c *api.Client) error {
		_, err := c.Cluster.GetStatus(ctx, message(&atollv1.GetStatusRequest{}))
		return err
	}
	alice := as(api.Credential{User: "alice", Password: "a", Token: s.home.token}) // the user counts
	bob, carol := as(api.Credential{User: "bob", Password: "b"}), as(api.Credential{User: "carol", Password: "c"})
	for cred, may := range map[api.Credential]bool{
		{}: false, {Token: s.home.token}: true, {Token: "x"}: false, {User: "alice", Password: "b", Token: s.home.token}: false,
		{User: "alice"}: false, {User: "open"}: false, {User: "nobody", Password: "x"}: false, {User: "root"}: false, {User: "root", Password: "root_password"}: false,
		{User: "bob", Password: "b"}: true,
	} {
		if err := status(as(cred)); may && err != nil || !may && !errors.Is(err, atoll.ErrDenied) {
			t.Errorf("credential %+v: %v", cred, err)
		}
	}
	local, err := api.NewClient("unix:"+s.Socket(), api.Credential{User: "bob", Password: "b"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	for _, c := range []*api.Client{bob, local} {
		_, err := c.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "disk", Now: true}))
		want(t, err, atoll.ErrDenied)
		if api.Hint(err) == "" {
			t.Error("no hint")
		}
		in, err := c.Versions.Diff(ctx, message(&atollv1.DiffRequest{Name: "disk"}))
		if err == nil {
			in.Receive()
			err = errors.Join(in.Err(), in.Close())
		}
		want(t, err, atoll.ErrDenied)
	}
	v, err := bob.Volumes.CreateVolume(ctx, message(&atollv1.CreateVolumeRequest{Name: "his/disk", SizeBytes: 1 << 20}))
	if err != nil || v.Msg.Owner != "bob" {
		t.Errorf("created %v %v", v, err)
	}
	names := func(c *api.Client) (out []string) {
		l, err := c.Volumes.ListVolumes(ctx, message(&atollv1.ListVolumesRequest{}))
		d, err2 := c.Names.ListDirectory(ctx, message(&atollv1.ListDirectoryRequest{}))
		tr, err3 := c.Trash.ListTrash(ctx, message(&atollv1.ListTrashRequest{}))
		u, err4 := c.Users.ListUsers(ctx, message(&atollv1.ListUsersRequest{}))
		if err := errors.Join(err, err2, err3, err4); err != nil {
			t.Fatal(err)
		}
		for _, v := range l.Msg.Volumes {
			out = append(out, v.Name)
		}
		for _, e := range d.Msg.Entries {
			out = append(out, e.Path+"/")
		}
		for _, e := range tr.Msg.Entries {
			out = append(out, e.Owner+" old")
		}
		for _, x := range u.Msg.Users {
			out = append(out, x.Name)
		}
		slices.Sort(out)
		return out
	}
	for who, want := range map[*api.Client]string{
		alice: "alice,alice old,disk,disk/,hers/,hers/disk",
		bob:   "bob,bob old,his/,his/disk",
		carol: "alice,alice old,bob,bob old,carol,disk,disk/,hers/,hers/disk,his/,his/disk,open,root",
	} {
		if got := strings.Join(names(who), ","); got != want {
			t.Errorf("sees %s, want %s", got, want)
		}
	}
	e, err := alice.Trash.RestoreTrash(ctx, message(&atollv1.RestoreTrashRequest{Path: "old"}))
	if err != nil || e.Msg.Owner != "alice" {
		t.Errorf("restored %v %v", e, err)
	}
	if _, err := alice.Versions.CloneVersion(ctx, message(&atollv1.CloneVersionRequest{Source: "disk", Name: "copy"})); err != nil {
		t.Error(err)
	}
	task, err := alice.Versions.Flatten(ctx, message(&atollv1.FlattenRequest{Name: "copy"}))
	if err != nil {
		t.Fatal(err)
	}
	for c, kind := range map[*api.Client]error{alice: nil, carol: nil, bob: atoll.ErrDenied} {
		_, err := c.Tasks.GetTask(ctx, message(&atollv1.GetTaskRequest{Id: task.Msg.Id}))
		want(t, err, kind)
		l, err := c.Tasks.ListTasks(ctx, message(&atollv1.ListTasksRequest{}))
		if err != nil || (len(l.Msg.Tasks) > 0) != (kind == nil) {
			t.Errorf("tasks %v %v, want %v", l, err, kind)
		}
	}
	doctor, err := carol.Cluster.Diagnose(ctx, message(&atollv1.DiagnoseRequest{}))
	if err != nil || !slices.ContainsFunc(doctor.Msg.Findings, func(f *atollv1.Finding) bool { return strings.Contains(f.Fix, "--curve-auth strict") }) {
		t.Errorf("doctor says nothing of Curve's door: %v %v", doctor, err)
	}
	if _, err := carol.Volumes.DeleteVolume(ctx, message(&atollv1.DeleteVolumeRequest{Name: "disk"})); err != nil {
		t.Error(err)
	}
}
