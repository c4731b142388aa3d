package server

import (
	"context"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
)

// message wraps a request to another server.
func message[T any](m *T) *connect.Request[T] { return connect.NewRequest(m) }

// method is how forward finds the call that it passes on.
type method[Q, R any] = func(context.Context, *connect.Request[Q]) (*connect.Response[R], error)

func volumesGet(c *api.Client) method[atollv1.GetVolumeRequest, atollv1.Volume] {
	return c.Volumes.GetVolume
}

func volumesResize(c *api.Client) method[atollv1.ResizeVolumeRequest, atollv1.Volume] {
	return c.Volumes.ResizeVolume
}

func volumesDelete(c *api.Client) method[atollv1.DeleteVolumeRequest, atollv1.DeleteVolumeResponse] {
	return c.Volumes.DeleteVolume
}

func volumesCheck(c *api.Client) method[atollv1.CheckVolumeRequest, atollv1.CheckVolumeResponse] {
	return c.Volumes.CheckVolume
}

func namesRename(c *api.Client) method[atollv1.RenameRequest, atollv1.Entry] { return c.Names.Rename }

func namesLimits(c *api.Client) method[atollv1.SetLimitsRequest, atollv1.Limits] {
	return c.Names.SetLimits
}

func trashMove(c *api.Client) method[atollv1.MoveToTrashRequest, atollv1.TrashEntry] {
	return c.Trash.MoveToTrash
}

func trashRestore(c *api.Client) method[atollv1.RestoreTrashRequest, atollv1.Entry] {
	return c.Trash.RestoreTrash
}

func versionsCreate(c *api.Client) method[atollv1.CreateVersionRequest, atollv1.CreateVersionResponse] {
	return c.Versions.CreateVersion
}

func versionsList(c *api.Client) method[atollv1.ListVersionsRequest, atollv1.ListVersionsResponse] {
	return c.Versions.ListVersions
}

func versionsUpdate(c *api.Client) method[atollv1.UpdateVersionRequest, atollv1.Version] {
	return c.Versions.UpdateVersion
}

func versionsDelete(c *api.Client) method[atollv1.DeleteVersionRequest, atollv1.DeleteVersionResponse] {
	return c.Versions.DeleteVersion
}

func versionsRelease(c *api.Client) method[atollv1.ReleaseVersionRequest, atollv1.Version] {
	return c.Versions.ReleaseVersion
}

func versionsRestore(c *api.Client) method[atollv1.RestoreVersionRequest, atollv1.RestoreVersionResponse] {
	return c.Versions.RestoreVersion
}

func versionsClone(c *api.Client) method[atollv1.CloneVersionRequest, atollv1.Volume] {
	return c.Versions.CloneVersion
}

func versionsFlatten(c *api.Client) method[atollv1.FlattenRequest, atollv1.Task] {
	return c.Versions.Flatten
}

func versionsBegin(c *api.Client) method[atollv1.BeginImportRequest, atollv1.BeginImportResponse] {
	return c.Versions.BeginImport
}

func versionsCommit(c *api.Client) method[atollv1.CommitImportRequest, atollv1.Version] {
	return c.Versions.CommitImport
}

func versionsAbort(c *api.Client) method[atollv1.AbortImportRequest, atollv1.AbortImportResponse] {
	return c.Versions.AbortImport
}

func versionsKeep(c *api.Client) method[atollv1.KeepImportRequest, atollv1.KeepImportResponse] {
	return c.Versions.KeepImport
}
