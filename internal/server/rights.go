package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// Who may do what, by the API:
//
//   - root and administrators: everything;
//   - a user: everything with the volumes and directories it owns; make new ones in
//     the root of the tree and in directories it owns, which are then its own; take
//     its own things back from the trash or purge them; change its own password;
//     look at the state of the cluster. Lists show it only what is its own.
//
// Limits of operations, owners, settings, join tokens and other users are the
// administrators'. A call that is not named here is theirs, too.
//
// Clients of Curve come through a door of their own, whose rules are Curve's, and
// NBD knows no users.

// Login implements api.Rights.
func (b *backend) Login(ctx context.Context, name, password string) (api.Caller, error) {
	wrong := fmt.Errorf("user %q or its password is wrong: %w", name, atoll.ErrDenied)
	u, err := b.s.cat.User(ctx, name)
	if errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrInvalid) || err == nil && u.Hash == "" {
		return api.Caller{}, wrong
	}
	if err == nil {
		err = b.s.logins.verify(ctx, u, password)
	}
	if errors.Is(err, atoll.ErrDenied) {
		err = wrong
	}
	if err != nil {
		return api.Caller{}, err
	}
	return api.Caller{Name: u.Name, Root: u.Admin || u.Name == catalog.Root}, nil
}

// Authorize implements api.Rights.
func (b *backend) Authorize(ctx context.Context, who api.Caller, request any) error {
	if _, joins := request.(*atollv1.JoinRequest); joins {
		return nil // it carries a token of its own
	}
	if who.Name == "" {
		return fmt.Errorf("nobody is logged in: %w", atoll.ErrDenied)
	}
	for _, rule := range []func(context.Context, rights, any) (bool, error){ruleLook, ruleVolumes, ruleVersions, ruleNames, ruleTrash, ruleUsers} {
		if known, err := rule(ctx, rights{b, who.Name}, request); known || err != nil {
			return err
		}
	}
	return onlyAdmins()
}

func onlyAdmins() error {
	return api.WithHint(fmt.Errorf("only administrators may do this: %w", atoll.ErrDenied), "ask one, or root, to do it")
}

// rights are those of one user.
type rights struct {
	b    *backend
	user string
}

// mine is ErrDenied for a thing of another owner.
func (r rights) mine(what, name, owner string) error {
	if owner == r.user {
		return nil
	}
	return api.WithHint(fmt.Errorf("%s %q belongs to another user: %w", what, name, atoll.ErrDenied),
		"ask its owner or an administrator")
}

// own is ErrDenied if one of these media, NAME or NAME@VERSION, is another's. What
// is not there is the call's to tell.
func (r rights) own(ctx context.Context, names ...string) error {
	for _, name := range names {
		name, _, _ = strings.Cut(name, "@")
		m, err := r.b.s.cat.MediumByName(ctx, name)
		switch {
		case errors.Is(err, atoll.ErrNotExist), errors.Is(err, atoll.ErrInvalid):
		case err != nil:
			return err
		default:
			if err := r.mine("volume", name, m.Owner); err != nil {
				return err
			}
		}
	}
	return nil
}

// ownPath is own for a directory or a medium.
func (r rights) ownPath(ctx context.Context, path string) error {
	e, err := r.b.s.cat.Entry(ctx, path)
	if errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrInvalid) {
		return nil
	}
	if err != nil {
		return err
	}
	return r.ownEntry(e)
}

func (r rights) ownEntry(e catalog.Entry) error {
	if e.Medium != nil {
		return r.mine("volume", e.Path, e.Medium.Owner)
	}
	return r.mine("directory", e.Path, e.Dir.Owner)
}

// place is ErrDenied if something new at path would lie in another's directory:
// the nearest one that is there.
func (r rights) place(ctx context.Context, path string) error {
	for p := catalog.ParentPath(path); p != ""; p = catalog.ParentPath(p) {
		e, err := r.b.s.cat.Entry(ctx, p)
		if errors.Is(err, atoll.ErrNotExist) {
			continue
		}
		if errors.Is(err, atoll.ErrInvalid) {
			return nil
		}
		if err != nil {
			return err
		}
		return r.ownEntry(e)
	}
	return nil
}

// owner fills in the owner of something new, who is the caller.
func (r rights) owner(owner *string) error {
	if *owner == "" {
		*owner = r.user
	}
	if *owner != r.user {
		return api.WithHint(fmt.Errorf("something new of user %q: %w", *owner, atoll.ErrDenied), "only administrators may make things for others")
	}
	return nil
}

// ruleLook has the calls that everyone may make; Conceal leaves out of some what is
// not the caller's.
func ruleLook(_ context.Context, _ rights, request any) (known bool, err error) {
	switch request.(type) {
	case *atollv1.GetStatusRequest, *atollv1.ListNodesRequest, *atollv1.DiagnoseRequest, *atollv1.ListVolumesRequest,
		*atollv1.ListTrashRequest, *atollv1.ListUsersRequest, *atollv1.ListTasksRequest:
		return true, nil
	}
	return false, nil
}

func ruleVolumes(ctx context.Context, r rights, request any) (known bool, err error) {
	switch q := request.(type) {
	case *atollv1.CreateVolumeRequest:
		if err := r.owner(&q.Owner); err != nil {
			return true, err
		}
		return true, r.place(ctx, q.Name)
	case *atollv1.GetVolumeRequest:
		return true, r.own(ctx, q.Name)
	case *atollv1.ResizeVolumeRequest:
		return true, r.own(ctx, q.Name)
	case *atollv1.DeleteVolumeRequest:
		return true, r.own(ctx, q.Name)
	case *atollv1.CheckVolumeRequest:
		if q.Id == "" {
			return true, r.own(ctx, q.Name)
		}
		m, err := r.b.trashed(ctx, q.Id, "", "")
		if err == nil {
			err = r.mine("volume", m.Name, m.Owner)
		}
		return true, err
	}
	return false, nil
}

func ruleVersions(ctx context.Context, r rights, request any) (known bool, err error) {
	switch q := request.(type) {
	case *atollv1.CreateVersionRequest:
		return true, r.own(ctx, q.Media...)
	case *atollv1.CloneVersionRequest:
		err := r.own(ctx, q.Source)
		if err == nil {
			err = r.owner(&q.Owner)
		}
		if err == nil {
			err = r.place(ctx, q.Name)
		}
		return true, err
	case *atollv1.CommitImportRequest:
		return true, r.own(ctx, q.Medium)
	case *atollv1.AbortImportRequest:
		return true, r.own(ctx, q.Medium)
	case *atollv1.KeepImportRequest:
		return true, r.own(ctx, q.Medium)
	case *atollv1.ListVersionsRequest, *atollv1.UpdateVersionRequest, *atollv1.DeleteVersionRequest, *atollv1.ReleaseVersionRequest,
		*atollv1.RestoreVersionRequest, *atollv1.FlattenRequest, *atollv1.ListChildrenRequest, *atollv1.DiffRequest,
		*atollv1.SetScheduleRequest, *atollv1.BeginImportRequest:
		return true, r.own(ctx, q.(interface{ GetName() string }).GetName())
	}
	return false, nil
}

func ruleNames(ctx context.Context, r rights, request any) (known bool, err error) {
	switch q := request.(type) {
	case *atollv1.MakeDirectoryRequest:
		if err := r.owner(&q.Owner); err != nil {
			return true, err
		}
		return true, r.place(ctx, q.Path)
	case *atollv1.RemoveDirectoryRequest:
		return true, r.ownPath(ctx, q.Path)
	case *atollv1.ListDirectoryRequest:
		if q.Path == "" {
			return true, nil
		}
		return true, r.ownPath(ctx, q.Path)
	case *atollv1.GetEntryRequest:
		e, err := r.b.findEntry(ctx, q)
		if err != nil || e.Path == "" {
			return true, err
		}
		return true, r.ownEntry(e)
	case *atollv1.RenameRequest:
		err := r.own(ctx, q.From)
		if err == nil {
			err = r.place(ctx, q.To)
		}
		if err == nil && q.Replace {
			err = r.own(ctx, q.To)
		}
		return true, err
	case *atollv1.SetPropertiesRequest:
		return true, r.own(ctx, q.Path)
	}
	return false, nil
}

func ruleTrash(ctx context.Context, r rights, request any) (known bool, err error) {
	switch q := request.(type) {
	case *atollv1.MoveToTrashRequest:
		return true, r.own(ctx, q.Name)
	case *atollv1.RestoreTrashRequest:
		m, err := r.b.trashed(ctx, q.Id, q.Path, r.user)
		if err == nil {
			err = r.mine("volume", m.Name, m.Owner)
		}
		if err != nil {
			return true, err
		}
		q.Id = m.ID.String() // and not that of another, removed from the same path later
		to := q.NewPath
		if to == "" {
			to = m.Name
		}
		return true, r.place(ctx, to)
	case *atollv1.PurgeTrashRequest:
		if q.Id == "" {
			return true, api.WithHint(fmt.Errorf("purge what is others', too: %w", atoll.ErrDenied), "name one volume of yours")
		}
		m, err := r.b.trashed(ctx, q.Id, "", r.user)
		if err == nil {
			err = r.mine("volume", m.Name, m.Owner)
		}
		return true, err
	}
	return false, nil
}

func ruleUsers(ctx context.Context, r rights, request any) (known bool, err error) {
	switch q := request.(type) {
	case *atollv1.UpdateUserRequest:
		if q.Name == r.user && q.Strict == nil && q.Admin == nil {
			return true, nil
		}
	case *atollv1.GetTaskRequest:
		return true, r.ownTask(ctx, q.Id)
	case *atollv1.CancelTaskRequest:
		return true, r.ownTask(ctx, q.Id)
	}
	return false, nil
}

// ownTask is ErrDenied for a task about no medium of the caller's.
func (r rights) ownTask(ctx context.Context, id string) error {
	t, err := r.b.GetTask(ctx, &atollv1.GetTaskRequest{Id: id})
	if err != nil {
		return err
	}
	if own, err := r.owns(ctx, t.Medium); err != nil || own {
		return err
	}
	return onlyAdmins()
}

// owns reports whether a medium is there and the caller's.
func (r rights) owns(ctx context.Context, name string) (bool, error) {
	m, err := r.b.s.cat.MediumByName(ctx, name)
	if errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrInvalid) {
		return false, nil
	}
	return err == nil && m.Owner == r.user, err
}

// Conceal implements api.Rights.
func (b *backend) Conceal(ctx context.Context, who api.Caller, response any) error {
	other := func(owner string) bool { return owner != who.Name }
	switch r := response.(type) {
	case *atollv1.GetStatusResponse:
		r.Kept = nil
	case *atollv1.ListVolumesResponse:
		r.Volumes = slices.DeleteFunc(r.Volumes, func(v *atollv1.Volume) bool { return other(v.Owner) })
	case *atollv1.ListDirectoryResponse:
		r.Entries = slices.DeleteFunc(r.Entries, func(e *atollv1.Entry) bool { return other(e.Owner) })
	case *atollv1.ListTrashResponse:
		r.Entries = slices.DeleteFunc(r.Entries, func(e *atollv1.TrashEntry) bool { return other(e.Owner) })
	case *atollv1.ListUsersResponse:
		r.Users = slices.DeleteFunc(r.Users, func(u *atollv1.User) bool { return other(u.Name) })
	case *atollv1.ListTasksResponse:
		var mine []*atollv1.Task
		for _, t := range r.Tasks {
			own, err := (rights{b, who.Name}).owns(ctx, t.Medium)
			if err != nil {
				return err
			}
			if own {
				mine = append(mine, t)
			}
		}
		r.Tasks = mine
	}
	return nil
}
