package api

import (
	"context"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// Versions is the history of media.
type Versions interface {
	CreateVersion(ctx context.Context, r *atollv1.CreateVersionRequest) (*atollv1.CreateVersionResponse, error)
	ListVersions(ctx context.Context, r *atollv1.ListVersionsRequest) (*atollv1.ListVersionsResponse, error)
	UpdateVersion(ctx context.Context, r *atollv1.UpdateVersionRequest) (*atollv1.Version, error)
	DeleteVersion(ctx context.Context, r *atollv1.DeleteVersionRequest) (*atollv1.DeleteVersionResponse, error)
	ReleaseVersion(ctx context.Context, r *atollv1.ReleaseVersionRequest) (*atollv1.Version, error)
	RestoreVersion(ctx context.Context, r *atollv1.RestoreVersionRequest) (*atollv1.RestoreVersionResponse, error)
	CloneVersion(ctx context.Context, r *atollv1.CloneVersionRequest) (*atollv1.Volume, error)
	Flatten(ctx context.Context, r *atollv1.FlattenRequest) (*atollv1.Task, error)
	ListChildren(ctx context.Context, r *atollv1.ListChildrenRequest) (*atollv1.ListChildrenResponse, error)
	SetSchedule(ctx context.Context, r *atollv1.SetScheduleRequest) (*atollv1.SetScheduleResponse, error)
	BeginImport(ctx context.Context, r *atollv1.BeginImportRequest) (*atollv1.BeginImportResponse, error)
	CommitImport(ctx context.Context, r *atollv1.CommitImportRequest) (*atollv1.Version, error)
	AbortImport(ctx context.Context, r *atollv1.AbortImportRequest) (*atollv1.AbortImportResponse, error)
	KeepImport(ctx context.Context, r *atollv1.KeepImportRequest) (*atollv1.KeepImportResponse, error)
	// Diff calls send with the answers in order and ends with its first error.
	Diff(ctx context.Context, r *atollv1.DiffRequest, send func(*atollv1.DiffResponse) error) error
}

// Names is the tree of directories and media.
type Names interface {
	MakeDirectory(ctx context.Context, r *atollv1.MakeDirectoryRequest) (*atollv1.Entry, error)
	RemoveDirectory(ctx context.Context, r *atollv1.RemoveDirectoryRequest) (*atollv1.RemoveDirectoryResponse, error)
	ListDirectory(ctx context.Context, r *atollv1.ListDirectoryRequest) (*atollv1.ListDirectoryResponse, error)
	GetEntry(ctx context.Context, r *atollv1.GetEntryRequest) (*atollv1.Entry, error)
	Rename(ctx context.Context, r *atollv1.RenameRequest) (*atollv1.Entry, error)
	ChangeOwner(ctx context.Context, r *atollv1.ChangeOwnerRequest) (*atollv1.Entry, error)
	SetProperties(ctx context.Context, r *atollv1.SetPropertiesRequest) (*atollv1.Entry, error)
	SetLimits(ctx context.Context, r *atollv1.SetLimitsRequest) (*atollv1.Limits, error)
}

// Trash keeps what was removed for a while.
type Trash interface {
	MoveToTrash(ctx context.Context, r *atollv1.MoveToTrashRequest) (*atollv1.TrashEntry, error)
	ListTrash(ctx context.Context, r *atollv1.ListTrashRequest) (*atollv1.ListTrashResponse, error)
	RestoreTrash(ctx context.Context, r *atollv1.RestoreTrashRequest) (*atollv1.Entry, error)
	PurgeTrash(ctx context.Context, r *atollv1.PurgeTrashRequest) (*atollv1.PurgeTrashResponse, error)
}

// Users are those who own things.
type Users interface {
	CreateUser(ctx context.Context, r *atollv1.CreateUserRequest) (*atollv1.User, error)
	ListUsers(ctx context.Context, r *atollv1.ListUsersRequest) (*atollv1.ListUsersResponse, error)
	UpdateUser(ctx context.Context, r *atollv1.UpdateUserRequest) (*atollv1.User, error)
	DeleteUser(ctx context.Context, r *atollv1.DeleteUserRequest) (*atollv1.DeleteUserResponse, error)
	Authenticate(ctx context.Context, r *atollv1.AuthenticateRequest) (*atollv1.User, error)
}

// Tasks is long work in the background.
type Tasks interface {
	ListTasks(ctx context.Context, r *atollv1.ListTasksRequest) (*atollv1.ListTasksResponse, error)
	GetTask(ctx context.Context, r *atollv1.GetTaskRequest) (*atollv1.Task, error)
	CancelTask(ctx context.Context, r *atollv1.CancelTaskRequest) (*atollv1.Task, error)
}

// Rights say who may do what. They are asked for callers that are not root.
type Rights interface {
	// Login tells who shows a name and a password. ErrDenied if they are wrong.
	Login(ctx context.Context, name, password string) (Caller, error)
	// Authorize is ErrDenied for a request that a caller may not make. It gives a
	// request that leaves the owner out the caller's name.
	Authorize(ctx context.Context, who Caller, request any) error
	// Conceal takes out of an answer what its caller may not see.
	Conceal(ctx context.Context, who Caller, response any) error
}
