package curve

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// defaultPoolset is the one poolset there is: copies are placed by Atoll.
const defaultPoolset = "default"

// create makes a volume.
func (g *Gateway) create(ctx context.Context, in *call, _ *reply) error {
	if err := g.enterNew(ctx, in); err != nil {
		return err
	}
	if in.Poolset != "" && in.Poolset != defaultPoolset {
		return refuse(NotExist, "there is no poolset "+in.Poolset)
	}
	if err := g.o.Sizes.check(in.Length); err != nil {
		return err
	}
	if err := checkStripe(in.StripeUnit, in.StripeCount); err != nil {
		return err
	}
	if err := g.vacant(ctx, in.Path); err != nil {
		return err
	}
	req := &atollv1.CreateVolumeRequest{
		Name: entryPath(in.Path), SizeBytes: int64(in.Length), Owner: in.Owner, NoParents: true,
		Cache: "writethrough", Properties: map[string]string{propPoolset: defaultPoolset},
	}
	if in.StripeUnit != 0 {
		req.Properties[propStripeUnit] = strconv.FormatUint(in.StripeUnit, 10)
		req.Properties[propStripeCount] = strconv.FormatUint(in.StripeCount, 10)
	}
	if g.o.DefaultLimits {
		req.Limits = defaultLimits(in.Length)
	}
	_, err := g.b.CreateVolume(ctx, req)
	return err
}

// vacant refuses a path whose directory is not there or that is taken.
func (g *Gateway) vacant(ctx context.Context, path string) error {
	if path == "/" {
		return refuse(Exists, "the root directory is always there")
	}
	if err := g.walk(ctx, &call{Owner: rootUser}, path); err != nil {
		return err
	}
	if _, ok := inBin(path); ok {
		return refuse(NotSupport, "nothing can be made in the recycle bin")
	}
	_, err := g.lookup(ctx, path, false)
	if CodeOf(err) == NotExist {
		return nil
	}
	if err == nil {
		err = refuse(Exists, path+" is there")
	}
	return err
}

// makeDir makes a directory.
func (g *Gateway) makeDir(ctx context.Context, in *call, _ *reply) error {
	if err := g.enterNew(ctx, in); err != nil {
		return err
	}
	if err := g.vacant(ctx, in.Path); err != nil {
		return err
	}
	_, err := g.b.MakeDirectory(ctx, &atollv1.MakeDirectoryRequest{Path: entryPath(in.Path), Owner: in.Owner})
	return err
}

// extend makes a volume longer.
func (g *Gateway) extend(ctx context.Context, in *call, _ *reply) error {
	n, err := g.enterFile(ctx, in)
	if err != nil {
		return err
	}
	length := uint64(n.Length)
	switch {
	case n.dir() || n.trash != nil:
		return refuse(NotSupport, in.Path+" is not a volume that can be extended")
	case in.Length > g.o.Sizes.Max:
		return refuse(LengthNotSupport, fmt.Sprintf("length %d: want at most %d", in.Length, g.o.Sizes.Max))
	case in.Length < length:
		return refuse(NoShrink, fmt.Sprintf("%s has %d bytes, more than %d", in.Path, length, in.Length))
	case in.Length == length:
		return nil
	case (in.Length-length)%g.o.Sizes.Unit != 0:
		return refuse(Unknown, fmt.Sprintf("a volume grows in steps of %d", g.o.Sizes.Unit))
	}
	_, err = g.b.ResizeVolume(ctx, n.path, int64(in.Length), false)
	return err
}

// stat tells of a file.
func (g *Gateway) stat(ctx context.Context, in *call, out *reply) error {
	n, err := g.enterFile(ctx, in)
	if err != nil {
		return err
	}
	if n.entry != nil && strings.Contains(n.path, "/") {
		if n, err = g.lookup(ctx, in.Path, true); err != nil {
			return err
		}
	}
	if n.entry != nil && n.Status == statusCreated && n.entry.Properties[propCloned] != "" {
		used, err := g.hasClones(ctx, n)
		if err != nil {
			return err
		}
		if used {
			n.Status = statusBeingCloned
		}
	}
	out.File = &n.File
	return nil
}

// unlink moves a volume to the recycle bin or removes an empty directory.
func (g *Gateway) unlink(ctx context.Context, in *call, _ *reply) error {
	if err := g.enter(ctx, in, in.Path); err != nil {
		return err
	}
	if err := g.own(ctx, in, in.Path); err != nil {
		return err
	}
	if in.Path == "/" {
		return refuse(ParamError, "the root directory cannot be removed")
	}
	if err := g.walk(ctx, &call{Owner: rootUser}, in.Path); err != nil {
		return err
	}
	n, err := g.lookup(ctx, in.Path, false)
	switch {
	case err != nil:
		return err
	case n.dir():
		return g.removeDir(ctx, in, n)
	case n.trash != nil:
		return refuse(NotSupport, "it is in the recycle bin already; remove it with force")
	}
	if err := g.changeable(ctx, n); err != nil {
		return err
	}
	_, err = g.b.MoveToTrash(ctx, &atollv1.MoveToTrashRequest{Name: n.path, Source: trashSource})
	return err
}

// removeDir removes an empty directory.
func (g *Gateway) removeDir(ctx context.Context, in *call, n *node) error {
	if n.entry == nil {
		return refuse(NotSupport, in.Path+" is always there")
	}
	if err := g.empty(ctx, n); err != nil {
		return err
	}
	_, err := g.b.RemoveDirectory(ctx, &atollv1.RemoveDirectoryRequest{Path: n.path})
	if errors.Is(err, atoll.ErrBusy) {
		return refuse(NotEmpty, err.Error())
	}
	return err
}

// empty refuses a directory that has something in it.
func (g *Gateway) empty(ctx context.Context, n *node) error {
	resp, err := g.b.ListDirectory(ctx, &atollv1.ListDirectoryRequest{Path: n.path, Limit: 1})
	if err == nil && len(resp.Entries) > 0 {
		err = refuse(NotEmpty, "the directory /"+n.path+" is not empty")
	}
	return err
}

// changeable refuses a volume that has snapshots, that clones still need, or
// that is mounted.
func (g *Gateway) changeable(ctx context.Context, n *node) error {
	snapshots, err := g.hasSnapshots(ctx, n)
	if err != nil {
		return err
	}
	if snapshots {
		return refuse(UnderSnapshot, "/"+n.path+" has snapshots")
	}
	if n.entry.Properties[propCloned] != "" {
		used, err := g.hasClones(ctx, n)
		if err != nil {
			return err
		}
		if used {
			return refuse(DeleteBeingCloned, "clones of /"+n.path+" still need it; flatten them first")
		}
	}
	return g.idle(ctx, n)
}

const (
	// leaveWait is how long a client that has just closed may take to be gone.
	leaveWait = time.Second
	leaveTick = 20 * time.Millisecond
)

// idle refuses a volume that is mounted: opened a moment ago, or with a client
// connected. A connection without a session may be one that is just ending.
func (g *Gateway) idle(ctx context.Context, n *node) error {
	mounted := refuse(FileOccupied, "/"+n.path+" is mounted")
	known, young := g.mounts.state(n.entry.Id)
	if young || known && n.entry.InUse {
		return mounted
	}
	inUse := n.entry.InUse
	for end := time.Now().Add(leaveWait); inUse; {
		if time.Now().After(end) {
			return mounted
		}
		select {
		case <-time.After(leaveTick):
		case <-ctx.Done():
			return mounted
		}
		e, err := g.b.GetEntry(ctx, &atollv1.GetEntryRequest{Id: n.entry.Id})
		if err != nil {
			return err
		}
		inUse = e.InUse
	}
	return nil
}

// rename moves a volume. A volume of the new name goes to the recycle bin.
func (g *Gateway) rename(ctx context.Context, in *call, _ *reply) error {
	if err := g.enter(ctx, in, in.Path, in.NewPath); err != nil {
		return err
	}
	if err := g.own(ctx, in, in.Path); err != nil {
		return err
	}
	if in.Owner != rootUser {
		if err := g.ownTarget(ctx, in, in.NewPath); err != nil {
			return err
		}
	}
	if in.Path == in.NewPath {
		return refuse(Exists, "the new name is the old one")
	}
	n, err := g.find(ctx, in.Path)
	switch {
	case err != nil:
		return err
	case n.dir():
		return refuse(NotSupport, "directories cannot be renamed")
	case n.trash != nil:
		return refuse(NotSupport, "take it out of the recycle bin with recover")
	}
	if err := g.changeable(ctx, n); err != nil {
		return err
	}
	if err := g.replaceable(ctx, in.NewPath); err != nil {
		return err
	}
	_, err = g.b.Rename(ctx, &atollv1.RenameRequest{From: n.path, To: entryPath(in.NewPath), Replace: true, NoParents: true})
	return err
}

// replaceable refuses a new name that cannot be taken.
func (g *Gateway) replaceable(ctx context.Context, path string) error {
	if _, ok := inBin(path); ok {
		return refuse(NotSupport, "nothing can be moved into the recycle bin; unlink it")
	}
	if err := g.walk(ctx, &call{Owner: rootUser}, path); err != nil {
		if CodeOf(err) == Unknown {
			return refuse(NotExist, err.Error())
		}
		return err
	}
	old, err := g.lookup(ctx, path, false)
	switch {
	case CodeOf(err) == NotExist:
		return nil
	case err != nil:
		return err
	case old.dir():
		return refuse(Exists, path+" is a directory")
	}
	return g.changeable(ctx, old)
}

// changeOwner gives a file to another owner. Only root may.
func (g *Gateway) changeOwner(ctx context.Context, in *call, _ *reply) error {
	if err := g.enter(ctx, in, in.Path); err != nil {
		return err
	}
	if in.Owner != rootUser {
		return refuse(AuthFail, "only root may change owners")
	}
	n, err := g.find(ctx, in.Path)
	if err != nil {
		return err
	}
	if in.NewOwner == n.Owner {
		return nil
	}
	switch {
	case n.entry == nil:
		return refuse(NotSupport, in.Path+" keeps its owner")
	case in.NewOwner == "":
		return refuse(ParamError, "the new owner is empty")
	case n.dir():
		err = g.empty(ctx, n)
	default:
		err = g.changeable(ctx, n)
	}
	if err == nil {
		_, err = g.b.ChangeOwner(ctx, &atollv1.ChangeOwnerRequest{Path: n.path, Owner: in.NewOwner})
	}
	return err
}

// listDir lists a directory.
func (g *Gateway) listDir(ctx context.Context, in *call, out *reply) error {
	n, err := g.enterFile(ctx, in)
	if err != nil {
		return err
	}
	if !n.dir() {
		return refuse(Unknown, in.Path+" is not a directory")
	}
	out.Files = []File{}
	if n.ID == binID && n.entry == nil {
		return g.eachTrash(ctx, func(e *atollv1.TrashEntry) bool {
			out.Files = append(out.Files, binFile(e).File)
			return true
		})
	}
	if in.Path == "/" {
		out.Files = append(out.Files, File{ID: binID, ParentID: rootID, Name: recycleBin, Owner: rootUser})
	}
	for after := ""; ; {
		resp, err := g.b.ListDirectory(ctx, &atollv1.ListDirectoryRequest{Path: n.path, After: after, Limit: 1000})
		if err != nil {
			return err
		}
		for _, e := range resp.Entries {
			if e.Kind != "dir" && e.Kind != "volume" || in.Path == "/" && e.Path == recycleBin {
				continue // Curve knows no others, or cannot reach it
			}
			f := fileOf(e)
			f.ParentID = n.ID
			out.Files = append(out.Files, f)
		}
		if after = resp.Next; after == "" {
			return nil
		}
	}
}

// clusterID tells which cluster this is. It asks for no credentials.
func (g *Gateway) clusterID(_ context.Context, _ *call, out *reply) error {
	out.Cluster = dashed(g.o.Cluster)
	return nil
}

// dashed writes an id of 32 digits as UUIDs are usually written.
func dashed(id string) string {
	if len(id) != 32 {
		return id
	}
	return id[:8] + "-" + id[8:12] + "-" + id[12:16] + "-" + id[16:20] + "-" + id[20:]
}

// poolsets lists the one there is.
func (g *Gateway) poolsets(_ context.Context, _ *call, out *reply) error {
	out.Poolsets = []string{defaultPoolset}
	return nil
}
