// Package curvetest has a backend in memory for tests of the Curve gateway.
package curvetest

import (
	"context"
	"fmt"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/curve"
)

// Backend keeps names, trash, users and versions in memory, by the rules of the
// real server. Flattening takes until Finish.
type Backend struct {
	curve.Backend // nil: what is missing below is never called

	// Before runs before every call with its name; an error is the result.
	Before func(ctx context.Context, call string) error
	// URL makes the address of a volume's data.
	URL func(path string) string
	// InUse tells whether a client is connected to a volume; SetInUse does, too.
	InUse func(path string) bool

	mu    sync.Mutex
	next  uint64
	dirs  map[string]*atollv1.Entry
	vols  map[string]*volume // by path
	trash map[string]*volume // by id
	user  map[string]*user
	tasks map[string]*atollv1.Task
}

type volume struct {
	entry    *atollv1.Entry
	trash    *atollv1.TrashEntry
	versions []*atollv1.Version
	last     uint64
	parent   string // id@number of what it is a clone of
	limits   string
}

type user struct {
	*atollv1.User
	password string
}

// New returns an empty backend.
func New() *Backend {
	return &Backend{next: 100, dirs: map[string]*atollv1.Entry{"": {Id: "dir:1", Kind: "dir", Owner: "root", Created: timestamppb.Now(), Number: 1}},
		vols: map[string]*volume{}, trash: map[string]*volume{}, user: map[string]*user{}, tasks: map[string]*atollv1.Task{}}
}

// begin runs the hook and takes the lock.
func (b *Backend) begin(ctx context.Context, call string) error {
	if b.Before != nil {
		if err := b.Before(ctx, call); err != nil {
			return err
		}
	}
	b.mu.Lock()
	return nil
}

func (b *Backend) number() uint64 { b.next++; return b.next }

func parent(path string) string {
	return path[:max(0, strings.LastIndexByte(path, '/'))]
}

// free checks that a new name may be used.
func (b *Backend) free(path string) error {
	if path == "" || strings.Contains(path, "@") {
		return fmt.Errorf("name %q: %w", path, atoll.ErrInvalid)
	}
	if b.dirs[parent(path)] == nil {
		return fmt.Errorf("directory of %q: %w", path, atoll.ErrNotExist)
	}
	if b.dirs[path] != nil || b.vols[path] != nil {
		return fmt.Errorf("%q: %w", path, atoll.ErrExist)
	}
	return nil
}

// SetInUse makes a volume look as if a client were connected.
func (b *Backend) SetInUse(path string, inUse bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.vols[path].entry.InUse = inUse
}

// SetUser records a user.
func (b *Backend) SetUser(name, password string, strict bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.user[name] = &user{&atollv1.User{Name: name, HasPassword: password != "", Strict: strict}, password}
}

// Finish ends all tasks.
func (b *Backend) Finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, t := range b.tasks {
		t.State, t.Done = "done", t.Total
		for _, v := range b.vols {
			if v.entry.Path == t.Medium {
				v.parent = ""
			}
		}
	}
}

// Forget forgets all tasks, as a restart does.
func (b *Backend) Forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.tasks)
}

// MakeDirectory implements api.Names.
func (b *Backend) MakeDirectory(ctx context.Context, r *atollv1.MakeDirectoryRequest) (*atollv1.Entry, error) {
	if err := b.begin(ctx, "MakeDirectory"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	if err := b.free(r.Path); err != nil {
		return nil, err
	}
	n := b.number()
	e := &atollv1.Entry{Path: r.Path, Id: fmt.Sprintf("dir:%d", n), Kind: "dir", Owner: r.Owner, Created: timestamppb.Now(), Number: n}
	b.dirs[r.Path] = e
	return e, nil
}

// below lists the entries of a directory by name.
func (b *Backend) below(dir string) (out []*atollv1.Entry) {
	for p, e := range b.dirs {
		if p != "" && parent(p) == dir {
			out = append(out, e)
		}
	}
	for p, v := range b.vols {
		if parent(p) == dir {
			out = append(out, v.entry)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	return out
}

// RemoveDirectory implements api.Names.
func (b *Backend) RemoveDirectory(ctx context.Context, r *atollv1.RemoveDirectoryRequest) (*atollv1.RemoveDirectoryResponse, error) {
	if err := b.begin(ctx, "RemoveDirectory"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	if b.dirs[r.Path] == nil {
		return nil, fmt.Errorf("directory %q: %w", r.Path, atoll.ErrNotExist)
	}
	if len(b.below(r.Path)) > 0 {
		return nil, fmt.Errorf("directory %q is not empty: %w", r.Path, atoll.ErrBusy)
	}
	delete(b.dirs, r.Path)
	return &atollv1.RemoveDirectoryResponse{}, nil
}

// ListDirectory implements api.Names, in pages of at most 3.
func (b *Backend) ListDirectory(ctx context.Context, r *atollv1.ListDirectoryRequest) (*atollv1.ListDirectoryResponse, error) {
	if err := b.begin(ctx, "ListDirectory"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	out := &atollv1.ListDirectoryResponse{}
	for _, e := range b.below(r.Path) {
		if e.Path <= r.After {
			continue
		}
		if len(out.Entries) == min(3, int(r.Limit)) {
			out.Next = out.Entries[len(out.Entries)-1].Path
			break
		}
		out.Entries = append(out.Entries, proto.CloneOf(e))
	}
	return out, nil
}

func (b *Backend) entry(path, id string) (*atollv1.Entry, error) {
	if id != "" {
		for _, v := range b.vols {
			if v.entry.Id == id {
				return v.entry, nil
			}
		}
		return nil, fmt.Errorf("medium %s: %w", id, atoll.ErrNotExist)
	}
	if d := b.dirs[path]; d != nil {
		return d, nil
	}
	if v := b.vols[path]; v != nil {
		return v.entry, nil
	}
	return nil, fmt.Errorf("%q: %w", path, atoll.ErrNotExist)
}

// GetEntry implements api.Names.
func (b *Backend) GetEntry(ctx context.Context, r *atollv1.GetEntryRequest) (*atollv1.Entry, error) {
	if err := b.begin(ctx, "GetEntry"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	e, err := b.entry(r.Path, r.Id)
	e = proto.CloneOf(e)
	if err == nil && b.InUse != nil && b.InUse(e.Path) {
		e.InUse = true
	}
	return e, err
}

func (b *Backend) volume(path string) (*volume, error) {
	v := b.vols[path]
	if v == nil {
		return nil, fmt.Errorf("volume %q: %w", path, atoll.ErrNotExist)
	}
	return v, nil
}

func (b *Backend) drop(path, source string) *volume {
	v := b.vols[path]
	delete(b.vols, path)
	e := v.entry
	v.trash = &atollv1.TrashEntry{Id: e.Id, Path: path, Owner: e.Owner, SizeBytes: e.SizeBytes, Removed: timestamppb.Now(), Created: e.Created,
		Number: e.Number, Kind: "volume", Source: source}
	b.trash[e.Id] = v
	return v
}

// Rename implements api.Names.
func (b *Backend) Rename(ctx context.Context, r *atollv1.RenameRequest) (*atollv1.Entry, error) {
	if err := b.begin(ctx, "Rename"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(r.From)
	if err != nil {
		return nil, err
	}
	if b.vols[r.To] != nil && r.Replace {
		b.drop(r.To, "rename")
	}
	if err := b.free(r.To); err != nil {
		return nil, err
	}
	delete(b.vols, r.From)
	b.vols[r.To] = v
	v.entry.Path = r.To
	return proto.CloneOf(v.entry), nil
}

// ChangeOwner implements api.Names.
func (b *Backend) ChangeOwner(ctx context.Context, r *atollv1.ChangeOwnerRequest) (*atollv1.Entry, error) {
	if err := b.begin(ctx, "ChangeOwner"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	e, err := b.entry(r.Path, "")
	if err == nil {
		e.Owner = r.Owner
	}
	return proto.CloneOf(e), err
}

// SetProperties implements api.Names.
func (b *Backend) SetProperties(ctx context.Context, r *atollv1.SetPropertiesRequest) (*atollv1.Entry, error) {
	if err := b.begin(ctx, "SetProperties"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(r.Path)
	if err != nil {
		return nil, err
	}
	for k, x := range r.Properties {
		if v.entry.Properties[k] = x; x == "" {
			delete(v.entry.Properties, k)
		}
	}
	return proto.CloneOf(v.entry), nil
}

// Limits shows the limits of a volume.
func (b *Backend) Limits(path string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.vols[path].limits
}

// showLimits writes limits without protobuf's random spaces.
func showLimits(l *atollv1.Limits) string { return strings.ReplaceAll(l.String(), "  ", " ") }

// SetLimits implements api.Names.
func (b *Backend) SetLimits(ctx context.Context, r *atollv1.SetLimitsRequest) (*atollv1.Limits, error) {
	if err := b.begin(ctx, "SetLimits"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(r.Name)
	if err == nil {
		v.limits = showLimits(r.Limits)
	}
	return r.Limits, err
}

// MoveToTrash implements api.Trash.
func (b *Backend) MoveToTrash(ctx context.Context, r *atollv1.MoveToTrashRequest) (*atollv1.TrashEntry, error) {
	if err := b.begin(ctx, "MoveToTrash"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	if _, err := b.volume(r.Name); err != nil {
		return nil, err
	}
	return b.drop(r.Name, r.Source).trash, nil
}

// ListTrash implements api.Trash, in pages of 2.
func (b *Backend) ListTrash(ctx context.Context, r *atollv1.ListTrashRequest) (*atollv1.ListTrashResponse, error) {
	if err := b.begin(ctx, "ListTrash"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	ids := make([]string, 0, len(b.trash))
	for id := range b.trash {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	out := &atollv1.ListTrashResponse{}
	for _, id := range ids {
		if id <= r.After {
			continue
		}
		if len(out.Entries) == 2 {
			out.Next = out.Entries[1].Id
			break
		}
		out.Entries = append(out.Entries, b.trash[id].trash)
	}
	return out, nil
}

// RestoreTrash implements api.Trash.
func (b *Backend) RestoreTrash(ctx context.Context, r *atollv1.RestoreTrashRequest) (*atollv1.Entry, error) {
	if err := b.begin(ctx, "RestoreTrash"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v := b.trash[r.Id]
	if v == nil {
		return nil, fmt.Errorf("trash %s: %w", r.Id, atoll.ErrNotExist)
	}
	if err := b.free(r.NewPath); err != nil {
		return nil, err
	}
	delete(b.trash, r.Id)
	v.entry.Path, v.trash = r.NewPath, nil
	b.vols[r.NewPath] = v
	return v.entry, nil
}

// PurgeTrash implements api.Trash.
func (b *Backend) PurgeTrash(ctx context.Context, r *atollv1.PurgeTrashRequest) (*atollv1.PurgeTrashResponse, error) {
	if err := b.begin(ctx, "PurgeTrash"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	if b.trash[r.Id] == nil {
		return nil, fmt.Errorf("trash %s: %w", r.Id, atoll.ErrNotExist)
	}
	delete(b.trash, r.Id)
	return &atollv1.PurgeTrashResponse{Removed: 1}, nil
}

// ListUsers implements api.Users.
func (b *Backend) ListUsers(ctx context.Context, _ *atollv1.ListUsersRequest) (*atollv1.ListUsersResponse, error) {
	if err := b.begin(ctx, "ListUsers"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	out := &atollv1.ListUsersResponse{}
	for _, u := range b.user {
		out.Users = append(out.Users, u.User)
	}
	return out, nil
}

// Authenticate implements api.Users.
func (b *Backend) Authenticate(ctx context.Context, r *atollv1.AuthenticateRequest) (*atollv1.User, error) {
	if err := b.begin(ctx, "Authenticate"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	u := b.user[r.Name]
	switch {
	case u == nil || u.password == "":
		return nil, fmt.Errorf("user %q: %w", r.Name, atoll.ErrNotExist)
	case u.password != r.Password:
		return nil, fmt.Errorf("password of %q: %w", r.Name, atoll.ErrDenied)
	}
	return u.User, nil
}

func (b *Backend) describe(v *volume) *atollv1.Volume {
	e := v.entry
	out := &atollv1.Volume{Id: e.Id, Name: e.Path, SizeBytes: e.SizeBytes, Owner: e.Owner, Created: e.Created, Properties: proto.CloneOf(e).Properties, Parent: v.parent}
	if b.URL != nil {
		out.Urls = []string{b.URL(e.Path)}
	}
	return out
}

func (b *Backend) add(path, owner string, size int64, props map[string]string) *volume {
	n := b.number()
	if props == nil {
		props = map[string]string{}
	}
	v := &volume{entry: &atollv1.Entry{Path: path, Id: atoll.MediumID(0xfedcba9876540000 + n).String(), Kind: "volume", Owner: owner, SizeBytes: size,
		Created: timestamppb.New(time.Now()), Number: n, Properties: props}}
	b.vols[path] = v
	return v
}

// CreateVolume implements curve.Backend.
func (b *Backend) CreateVolume(ctx context.Context, r *atollv1.CreateVolumeRequest) (*atollv1.Volume, error) {
	if err := b.begin(ctx, "CreateVolume"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	if err := b.free(r.Name); err != nil {
		return nil, err
	}
	v := b.add(r.Name, r.Owner, r.SizeBytes, r.Properties)
	v.limits = showLimits(r.Limits)
	return b.describe(v), nil
}

// Volume implements curve.Backend.
func (b *Backend) Volume(ctx context.Context, name string, _ bool) (*atollv1.Volume, error) {
	if err := b.begin(ctx, "Volume"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	return b.describe(v), nil
}

// Volumes implements curve.Backend.
func (b *Backend) Volumes(ctx context.Context, after string, limit int) ([]*atollv1.Volume, error) {
	if err := b.begin(ctx, "Volumes"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	var out []*atollv1.Volume
	for p, v := range b.vols {
		if p > after {
			out = append(out, b.describe(v))
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out[:min(limit, len(out))], nil
}

// ResizeVolume implements curve.Backend.
func (b *Backend) ResizeVolume(ctx context.Context, name string, size int64, _ bool) (*atollv1.Volume, error) {
	if err := b.begin(ctx, "ResizeVolume"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(name)
	if err != nil {
		return nil, err
	}
	v.entry.SizeBytes = size
	return b.describe(v), nil
}

// version splits NAME@NUMBER.
func (b *Backend) version(name string) (*volume, *atollv1.Version, error) {
	path, spec, _ := strings.Cut(name, "@")
	v, err := b.volume(path)
	if err != nil {
		return nil, nil, err
	}
	for _, x := range v.versions {
		if strconv.FormatUint(x.Number, 10) == spec {
			return v, x, nil
		}
	}
	return v, nil, fmt.Errorf("version %q: %w", name, atoll.ErrNotExist)
}

// CreateVersion implements api.Versions.
func (b *Backend) CreateVersion(ctx context.Context, r *atollv1.CreateVersionRequest) (*atollv1.CreateVersionResponse, error) {
	if err := b.begin(ctx, "CreateVersion"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(r.Media[0])
	if err != nil {
		return nil, err
	}
	for _, x := range v.versions {
		if r.Name != "" && x.Name == r.Name {
			return nil, fmt.Errorf("version %q: %w", r.Name, atoll.ErrExist)
		}
	}
	v.last++
	x := &atollv1.Version{Number: v.last, Name: r.Name, Memo: r.Memo, Time: timestamppb.Now(), SizeBytes: v.entry.SizeBytes, Properties: r.Properties, MediumId: v.entry.Id}
	v.versions = append(v.versions, x)
	return &atollv1.CreateVersionResponse{Versions: []*atollv1.Version{x}}, nil
}

// ListVersions implements api.Versions.
func (b *Backend) ListVersions(ctx context.Context, r *atollv1.ListVersionsRequest) (*atollv1.ListVersionsResponse, error) {
	if err := b.begin(ctx, "ListVersions"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(r.Name)
	if err != nil {
		return nil, err
	}
	return &atollv1.ListVersionsResponse{Versions: append([]*atollv1.Version(nil), v.versions...)}, nil
}

// DeleteVersion implements api.Versions.
func (b *Backend) DeleteVersion(ctx context.Context, r *atollv1.DeleteVersionRequest) (*atollv1.DeleteVersionResponse, error) {
	if err := b.begin(ctx, "DeleteVersion"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, x, err := b.version(r.Name)
	if err != nil {
		return nil, err
	}
	for i, y := range v.versions {
		if x == y {
			v.versions = append(v.versions[:i:i], v.versions[i+1:]...)
		}
	}
	return &atollv1.DeleteVersionResponse{Versions: 1}, nil
}

// RestoreVersion implements api.Versions.
func (b *Backend) RestoreVersion(ctx context.Context, r *atollv1.RestoreVersionRequest) (*atollv1.RestoreVersionResponse, error) {
	if err := b.begin(ctx, "RestoreVersion"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, x, err := b.version(r.Name)
	if err == nil {
		v.entry.SizeBytes = x.SizeBytes
	}
	return &atollv1.RestoreVersionResponse{Version: x}, err
}

// CloneVersion implements api.Versions.
func (b *Backend) CloneVersion(ctx context.Context, r *atollv1.CloneVersionRequest) (*atollv1.Volume, error) {
	if err := b.begin(ctx, "CloneVersion"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, x, err := b.version(r.Source)
	if err == nil {
		err = b.free(r.Name)
	}
	if err != nil {
		return nil, err
	}
	c := b.add(r.Name, r.Owner, x.SizeBytes, r.Properties)
	c.parent = fmt.Sprintf("%s@%d", v.entry.Id, x.Number)
	return b.describe(c), nil
}

// Flatten implements api.Versions.
func (b *Backend) Flatten(ctx context.Context, r *atollv1.FlattenRequest) (*atollv1.Task, error) {
	if err := b.begin(ctx, "Flatten"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	v, err := b.volume(r.Name)
	if err == nil && v.parent == "" {
		err = fmt.Errorf("flatten %q, which is no clone: %w", r.Name, atoll.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	t := &atollv1.Task{Id: fmt.Sprintf("task-%d", b.number()), Kind: "flatten", Medium: r.Name, Total: 10, State: "running"}
	b.tasks[t.Id] = t
	return proto.CloneOf(t), nil
}

// GetTask implements api.Tasks.
func (b *Backend) GetTask(ctx context.Context, r *atollv1.GetTaskRequest) (*atollv1.Task, error) {
	if err := b.begin(ctx, "GetTask"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	if t := b.tasks[r.Id]; t != nil {
		return proto.CloneOf(t), nil
	}
	return nil, fmt.Errorf("task %s: %w", r.Id, atoll.ErrNotExist)
}

// ListChildren implements api.Versions.
func (b *Backend) ListChildren(ctx context.Context, r *atollv1.ListChildrenRequest) (*atollv1.ListChildrenResponse, error) {
	if err := b.begin(ctx, "ListChildren"); err != nil {
		return nil, err
	}
	defer b.mu.Unlock()
	path, spec, one := strings.Cut(r.Name, "@")
	v, err := b.volume(path)
	if err != nil {
		return nil, err
	}
	out := &atollv1.ListChildrenResponse{}
	for p, c := range b.vols {
		id, number, _ := strings.Cut(c.parent, "@")
		if id == v.entry.Id && (!one || number == spec) {
			out.Children = append(out.Children, &atollv1.Child{Name: p, Id: c.entry.Id})
		}
	}
	return out, nil
}
