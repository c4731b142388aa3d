package atoll

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// Version is a recorded state of a volume. It never changes.
type Version struct {
	Volume     string // its name
	Number     uint64
	Name       string // may be empty
	Memo       string
	Time       time.Time
	Parent     uint64 // number of the version it grew from, 0 if none
	Size       int64
	Used       int64 // bytes that hold data
	Unique     int64 // bytes that only this version holds; -1 if not known
	Last       bool  // the newest
	Release    bool
	Protected  bool     // cannot be removed
	Children   []string // names of clones
	Properties map[string]string
}

// String returns NAME@VERSION, with the version's own name if it has one.
func (v Version) String() string {
	if v.Name != "" {
		return v.Volume + "@" + v.Name
	}
	return fmt.Sprintf("%s@%d", v.Volume, v.Number)
}

func version(v *atollv1.Version, volume string) Version {
	if v.Medium != "" {
		volume = v.Medium
	}
	return Version{
		Volume: volume, Number: v.Number, Name: v.Name, Memo: v.Memo, Time: v.Time.AsTime(), Parent: v.Parent,
		Size: v.SizeBytes, Used: v.UsedBytes, Unique: v.UniqueBytes, Last: v.Last, Release: v.Release,
		Protected: v.Protected, Children: v.Children, Properties: v.Properties,
	}
}

// BackupOptions are what a new version may have.
type BackupOptions struct {
	Memo       string
	Protected  bool // cannot be removed until it is no longer
	Properties map[string]string
}

// Backup records the present state of a volume as a version, in an instant
// whatever the size. What was written before the call is in it. name may be
// empty: the version then has only its number. ErrExist if the name is taken. o
// may be nil.
func (c *Client) Backup(ctx context.Context, volume, name string, o *BackupOptions) (Version, error) {
	all, err := c.BackupGroup(ctx, []string{volume}, name, o)
	if err != nil {
		return Version{}, err
	}
	return all[0], nil
}

// BackupGroup records several volumes at one point: no version has a write that
// was begun after a write missing in another had returned. The versions are in
// the order of the volumes.
func (c *Client) BackupGroup(ctx context.Context, volumes []string, name string, o *BackupOptions) ([]Version, error) {
	if o == nil {
		o = &BackupOptions{}
	}
	resp, err := c.api.Versions.CreateVersion(ctx, connect.NewRequest(&atollv1.CreateVersionRequest{
		Media: volumes, Name: name, Memo: o.Memo, Protected: o.Protected, Properties: o.Properties,
	}))
	if err != nil {
		return nil, err
	}
	if len(resp.Msg.Versions) != len(volumes) {
		return nil, fmt.Errorf("backup of %q: the server tells of %d versions: %w", volumes, len(resp.Msg.Versions), ErrInvalid)
	}
	all := make([]Version, len(volumes))
	for i, v := range resp.Msg.Versions {
		all[i] = version(v, volumes[i])
	}
	return all, nil
}

// Versions lists the versions of a volume, oldest first.
func (c *Client) Versions(ctx context.Context, volume string) ([]Version, error) {
	resp, err := c.api.Versions.ListVersions(ctx, connect.NewRequest(&atollv1.ListVersionsRequest{Name: volume}))
	if err != nil {
		return nil, err
	}
	all := make([]Version, len(resp.Msg.Versions))
	for i, v := range resp.Msg.Versions {
		all[i] = version(v, volume)
	}
	return all, nil
}

// Release makes NAME@release mean this version, which is given as NAME@VERSION;
// NAME@cur makes a version of the present state first.
func (c *Client) Release(ctx context.Context, name string) (Version, error) {
	resp, err := c.api.Versions.ReleaseVersion(ctx, connect.NewRequest(&atollv1.ReleaseVersionRequest{Name: name}))
	if err != nil {
		return Version{}, err
	}
	volume, _, _ := strings.Cut(name, "@")
	return version(resp.Msg, volume), nil
}

// Restore takes the working state of a volume back to a version, given as
// NAME@VERSION, in an instant. Later versions stay. What was written since the
// last version is lost; Backup keeps it.
func (c *Client) Restore(ctx context.Context, name string) error {
	_, err := c.api.Versions.RestoreVersion(ctx, connect.NewRequest(&atollv1.RestoreVersionRequest{Name: name}))
	return err
}

// Clone makes a volume that begins as a version of another, given as
// NAME@VERSION, in an instant and without taking room. NAME alone makes a version
// for it. The parent may be removed while clones of it live on.
func (c *Client) Clone(ctx context.Context, source, name string) (VolumeInfo, error) {
	resp, err := c.api.Versions.CloneVersion(ctx, connect.NewRequest(&atollv1.CloneVersionRequest{Source: source, Name: name}))
	if err != nil {
		return VolumeInfo{}, err
	}
	return volumeInfo(resp.Msg), nil
}

// RemoveVersion removes a version, given as NAME@VERSION. Its room comes back in
// the background; clones and open handles of it stay as they are. ErrBusy if it
// is protected.
func (c *Client) RemoveVersion(ctx context.Context, name string) error {
	_, err := c.api.Versions.DeleteVersion(ctx, connect.NewRequest(&atollv1.DeleteVersionRequest{Name: name}))
	return err
}

// Extent is a part of a volume. Zero parts read as zeros and take no room.
type Extent struct {
	Offset, Length int64
	Zero           bool
}

// Diff yields what differs between a version and the end point, which is name
// (NAME is the present state, NAME@VERSION a version), in ascending order and
// whole 4 KiB. from names a version of the same volume by name or number; empty
// is the beginning, when all was zeros. The work is in proportion to the changes,
// not to the size. An error is the last thing it yields.
func (c *Client) Diff(ctx context.Context, name, from string) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := c.api.Versions.Diff(ctx, connect.NewRequest(&atollv1.DiffRequest{Name: name, From: from}))
		if err != nil {
			yield(Extent{}, err)
			return
		}
		defer stream.Close()
		for stream.Receive() {
			for _, e := range stream.Msg().Extents {
				if !yield(Extent{e.Offset, e.Length, e.Zero}, nil) {
					return
				}
			}
		}
		if err := stream.Err(); err != nil {
			yield(Extent{}, err)
		}
	}
}
