package curve

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// trashSource marks what this gateway put into the trash.
const trashSource = "curve"

// sourceRename marks what a rename replaced.
const sourceRename = "rename"

// binName is how an entry of the trash is called in /RecycleBin.
func binName(e *atollv1.TrashEntry) string {
	base := e.Path[strings.LastIndexByte(e.Path, '/')+1:]
	if e.Source == sourceRename {
		return fmt.Sprintf("%s-%d", base, e.Number)
	}
	return fmt.Sprintf("%s-%d-%d", base, e.Number, e.Removed.AsTime().Unix())
}

// binFile tells of an entry of the trash.
func binFile(e *atollv1.TrashEntry) *node {
	return &node{trash: e, path: e.Path, File: File{
		ID: e.Number, ParentID: binID, Type: typePageFile, Length: e.SizeBytes, Created: e.Created.AsTime().UnixMicro(),
		Name: binName(e), Owner: e.Owner,
	}}
}

// eachTrash calls fn with every volume in the trash until it returns false.
func (g *Gateway) eachTrash(ctx context.Context, fn func(*atollv1.TrashEntry) bool) error {
	for after := ""; ; {
		resp, err := g.b.ListTrash(ctx, &atollv1.ListTrashRequest{After: after, Limit: 1000})
		if err != nil {
			return err
		}
		for _, e := range resp.Entries {
			if (e.Kind == "volume" || e.Kind == "") && !fn(e) {
				return nil
			}
		}
		if after = resp.Next; after == "" {
			return nil
		}
	}
}

// binAge is how old a listing of the trash may be in which a name is found: who
// empties a full bin asks for one name after the other.
const binAge = time.Second

// bin is the last listing of the trash, by names in the recycle bin.
type bin struct {
	mu struct {
		sync.Mutex // held for memory work only
		read       time.Time
		names      map[string]*atollv1.TrashEntry
	}
}

// get returns an entry of a young listing, nil if there is none.
func (b *bin) get(name string) *atollv1.TrashEntry {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.mu.read) > binAge {
		b.mu.names = nil
	}
	return b.mu.names[name]
}

// put replaces the listing, which was read since start.
func (b *bin) put(names map[string]*atollv1.TrashEntry, start time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.names, b.mu.read = names, start
}

// forget takes an entry out that is on its way out of the trash.
func (b *bin) forget(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.mu.names, name)
}

// lookupTrash finds an entry of the trash by its name in the recycle bin.
func (g *Gateway) lookupTrash(ctx context.Context, name string) (*node, error) {
	if e := g.bin.get(name); e != nil {
		return binFile(e), nil
	}
	start, names := time.Now(), map[string]*atollv1.TrashEntry{}
	err := g.eachTrash(ctx, func(e *atollv1.TrashEntry) bool {
		names[binName(e)] = e
		return true
	})
	if err != nil {
		return nil, err
	}
	e := names[name]
	g.bin.put(names, start)
	if e == nil {
		return nil, refuse(NotExist, name+" is not in the recycle bin")
	}
	return binFile(e), nil
}

// recyclable finds what a recover call means: the file of that number, else the
// one last created of those that were at the path.
func (g *Gateway) recyclable(ctx context.Context, path string, id uint64) (found *node, err error) {
	var byPath *atollv1.TrashEntry
	err = g.eachTrash(ctx, func(e *atollv1.TrashEntry) bool {
		if id != 0 && e.Number == id {
			found = binFile(e)
			return false
		}
		if e.Path == entryPath(path) && (byPath == nil || e.Created.AsTime().After(byPath.Created.AsTime())) {
			byPath = e
		}
		return true
	})
	switch {
	case err != nil:
		return nil, err
	case found == nil && byPath == nil:
		return nil, refuse(NotExist, path+" is not in the recycle bin")
	case found == nil:
		found = binFile(byPath)
	}
	return found, nil
}

// recover takes a file out of the recycle bin: to the path given, whichever way
// it was found.
func (g *Gateway) recover(ctx context.Context, in *call, _ *reply) error {
	if err := checkPath(in.Path); err != nil {
		return err
	}
	old, err := g.recyclable(ctx, in.Path, in.FileID)
	if err != nil {
		return err
	}
	if err := g.authenticate(ctx, in); err != nil {
		return err
	}
	if in.Owner != rootUser && old.Owner != in.Owner {
		return refuse(AuthFail, "the file in the recycle bin belongs to "+old.Owner)
	}
	if err := g.ownTarget(ctx, in, "/"+old.path); err != nil {
		return err
	}
	if err := g.walk(ctx, &call{Owner: rootUser}, in.Path); err != nil {
		return err
	}
	if _, err := g.lookup(ctx, in.Path, false); CodeOf(err) != NotExist {
		if err == nil {
			err = refuse(Exists, in.Path+" is there")
		}
		return err
	}
	if in.FileID != 0 && old.ID != in.FileID {
		return refuse(Unknown, fmt.Sprintf("file %d is not in the recycle bin", in.FileID))
	}
	g.bin.forget(old.Name)
	_, err = g.b.RestoreTrash(ctx, &atollv1.RestoreTrashRequest{Id: old.trash.Id, NewPath: entryPath(in.Path)})
	return err
}

// deleteForce removes for good what is in the recycle bin.
func (g *Gateway) deleteForce(ctx context.Context, in *call, out *reply) error {
	n, err := g.enterFile(ctx, in)
	if err != nil {
		return err
	}
	switch {
	case n.dir():
		return g.removeDir(ctx, in, n)
	case n.trash == nil:
		if err := g.changeable(ctx, n); err != nil {
			return err
		}
		return refuse(NotSupport, "only what is in the recycle bin can be removed for good")
	}
	g.bin.forget(n.Name)
	_, err = g.b.PurgeTrash(ctx, &atollv1.PurgeTrashRequest{Id: n.trash.Id})
	return err
}
