package api

import (
	"context"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// The services whose requests a Backend takes as they are.
type (
	versionService struct{ b Versions }
	nameService    struct{ b Names }
	trashService   struct{ b Trash }
	userService    struct{ b Users }
	taskService    struct{ b Tasks }
)

// pass hands a request's message to the backend and wraps its answer.
func pass[Q, R any](ctx context.Context, r *connect.Request[Q], call func(context.Context, *Q) (*R, error)) (*connect.Response[R], error) {
	return reply(call(ctx, r.Msg))
}

func (s versionService) CreateVersion(ctx context.Context, r *connect.Request[atollv1.CreateVersionRequest]) (*connect.Response[atollv1.CreateVersionResponse], error) {
	return pass(ctx, r, s.b.CreateVersion)
}

func (s versionService) ListVersions(ctx context.Context, r *connect.Request[atollv1.ListVersionsRequest]) (*connect.Response[atollv1.ListVersionsResponse], error) {
	return pass(ctx, r, s.b.ListVersions)
}

func (s versionService) UpdateVersion(ctx context.Context, r *connect.Request[atollv1.UpdateVersionRequest]) (*connect.Response[atollv1.Version], error) {
	return pass(ctx, r, s.b.UpdateVersion)
}

func (s versionService) DeleteVersion(ctx context.Context, r *connect.Request[atollv1.DeleteVersionRequest]) (*connect.Response[atollv1.DeleteVersionResponse], error) {
	return pass(ctx, r, s.b.DeleteVersion)
}

func (s versionService) ReleaseVersion(ctx context.Context, r *connect.Request[atollv1.ReleaseVersionRequest]) (*connect.Response[atollv1.Version], error) {
	return pass(ctx, r, s.b.ReleaseVersion)
}

func (s versionService) RestoreVersion(ctx context.Context, r *connect.Request[atollv1.RestoreVersionRequest]) (*connect.Response[atollv1.RestoreVersionResponse], error) {
	return pass(ctx, r, s.b.RestoreVersion)
}

func (s versionService) CloneVersion(ctx context.Context, r *connect.Request[atollv1.CloneVersionRequest]) (*connect.Response[atollv1.Volume], error) {
	return pass(ctx, r, s.b.CloneVersion)
}

func (s versionService) Flatten(ctx context.Context, r *connect.Request[atollv1.FlattenRequest]) (*connect.Response[atollv1.Task], error) {
	return pass(ctx, r, s.b.Flatten)
}

func (s versionService) ListChildren(ctx context.Context, r *connect.Request[atollv1.ListChildrenRequest]) (*connect.Response[atollv1.ListChildrenResponse], error) {
	return pass(ctx, r, s.b.ListChildren)
}

func (s versionService) SetSchedule(ctx context.Context, r *connect.Request[atollv1.SetScheduleRequest]) (*connect.Response[atollv1.SetScheduleResponse], error) {
	return pass(ctx, r, s.b.SetSchedule)
}

func (s versionService) BeginImport(ctx context.Context, r *connect.Request[atollv1.BeginImportRequest]) (*connect.Response[atollv1.BeginImportResponse], error) {
	return pass(ctx, r, s.b.BeginImport)
}

func (s versionService) CommitImport(ctx context.Context, r *connect.Request[atollv1.CommitImportRequest]) (*connect.Response[atollv1.Version], error) {
	return pass(ctx, r, s.b.CommitImport)
}

func (s versionService) AbortImport(ctx context.Context, r *connect.Request[atollv1.AbortImportRequest]) (*connect.Response[atollv1.AbortImportResponse], error) {
	return pass(ctx, r, s.b.AbortImport)
}

func (s versionService) KeepImport(ctx context.Context, r *connect.Request[atollv1.KeepImportRequest]) (*connect.Response[atollv1.KeepImportResponse], error) {
	return pass(ctx, r, s.b.KeepImport)
}

func (s versionService) Diff(ctx context.Context, r *connect.Request[atollv1.DiffRequest], out *connect.ServerStream[atollv1.DiffResponse]) error {
	return s.b.Diff(ctx, r.Msg, out.Send)
}

func (s nameService) MakeDirectory(ctx context.Context, r *connect.Request[atollv1.MakeDirectoryRequest]) (*connect.Response[atollv1.Entry], error) {
	return pass(ctx, r, s.b.MakeDirectory)
}

func (s nameService) RemoveDirectory(ctx context.Context, r *connect.Request[atollv1.RemoveDirectoryRequest]) (*connect.Response[atollv1.RemoveDirectoryResponse], error) {
	return pass(ctx, r, s.b.RemoveDirectory)
}

func (s nameService) ListDirectory(ctx context.Context, r *connect.Request[atollv1.ListDirectoryRequest]) (*connect.Response[atollv1.ListDirectoryResponse], error) {
	return pass(ctx, r, s.b.ListDirectory)
}

func (s nameService) GetEntry(ctx context.Context, r *connect.Request[atollv1.GetEntryRequest]) (*connect.Response[atollv1.Entry], error) {
	return pass(ctx, r, s.b.GetEntry)
}

func (s nameService) Rename(ctx context.Context, r *connect.Request[atollv1.RenameRequest]) (*connect.Response[atollv1.Entry], error) {
	return pass(ctx, r, s.b.Rename)
}

func (s nameService) ChangeOwner(ctx context.Context, r *connect.Request[atollv1.ChangeOwnerRequest]) (*connect.Response[atollv1.Entry], error) {
	return pass(ctx, r, s.b.ChangeOwner)
}

func (s nameService) SetProperties(ctx context.Context, r *connect.Request[atollv1.SetPropertiesRequest]) (*connect.Response[atollv1.Entry], error) {
	return pass(ctx, r, s.b.SetProperties)
}

func (s nameService) SetLimits(ctx context.Context, r *connect.Request[atollv1.SetLimitsRequest]) (*connect.Response[atollv1.Limits], error) {
	return pass(ctx, r, s.b.SetLimits)
}

func (s trashService) MoveToTrash(ctx context.Context, r *connect.Request[atollv1.MoveToTrashRequest]) (*connect.Response[atollv1.TrashEntry], error) {
	return pass(ctx, r, s.b.MoveToTrash)
}

func (s trashService) ListTrash(ctx context.Context, r *connect.Request[atollv1.ListTrashRequest]) (*connect.Response[atollv1.ListTrashResponse], error) {
	return pass(ctx, r, s.b.ListTrash)
}

func (s trashService) RestoreTrash(ctx context.Context, r *connect.Request[atollv1.RestoreTrashRequest]) (*connect.Response[atollv1.Entry], error) {
	return pass(ctx, r, s.b.RestoreTrash)
}

func (s trashService) PurgeTrash(ctx context.Context, r *connect.Request[atollv1.PurgeTrashRequest]) (*connect.Response[atollv1.PurgeTrashResponse], error) {
	return pass(ctx, r, s.b.PurgeTrash)
}

func (s userService) CreateUser(ctx context.Context, r *connect.Request[atollv1.CreateUserRequest]) (*connect.Response[atollv1.User], error) {
	return pass(ctx, r, s.b.CreateUser)
}

func (s userService) ListUsers(ctx context.Context, r *connect.Request[atollv1.ListUsersRequest]) (*connect.Response[atollv1.ListUsersResponse], error) {
	return pass(ctx, r, s.b.ListUsers)
}

func (s userService) UpdateUser(ctx context.Context, r *connect.Request[atollv1.UpdateUserRequest]) (*connect.Response[atollv1.User], error) {
	return pass(ctx, r, s.b.UpdateUser)
}

func (s userService) DeleteUser(ctx context.Context, r *connect.Request[atollv1.DeleteUserRequest]) (*connect.Response[atollv1.DeleteUserResponse], error) {
	return pass(ctx, r, s.b.DeleteUser)
}

func (s userService) Authenticate(ctx context.Context, r *connect.Request[atollv1.AuthenticateRequest]) (*connect.Response[atollv1.User], error) {
	return pass(ctx, r, s.b.Authenticate)
}

func (s taskService) ListTasks(ctx context.Context, r *connect.Request[atollv1.ListTasksRequest]) (*connect.Response[atollv1.ListTasksResponse], error) {
	return pass(ctx, r, s.b.ListTasks)
}

func (s taskService) GetTask(ctx context.Context, r *connect.Request[atollv1.GetTaskRequest]) (*connect.Response[atollv1.Task], error) {
	return pass(ctx, r, s.b.GetTask)
}

func (s taskService) CancelTask(ctx context.Context, r *connect.Request[atollv1.CancelTaskRequest]) (*connect.Response[atollv1.Task], error) {
	return pass(ctx, r, s.b.CancelTask)
}
