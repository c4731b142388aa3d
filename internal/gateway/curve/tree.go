package curve

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// Types and states of files, as Curve's clients number them.
const (
	typeDirectory = 0
	typePageFile  = 1

	statusCreated       = 0
	statusCloning       = 2
	statusMetaInstalled = 3
	statusCloned        = 4
	statusBeingCloned   = 5
)

// The numbers of the two directories that are always there.
const (
	rootID = 0
	binID  = 1
)

// Keys of a volume's properties that this gateway keeps.
const (
	propStripeUnit  = "curve.stripe_unit"
	propStripeCount = "curve.stripe_count"
	propPoolset     = "curve.poolset"
	propTask        = "curve.task"      // the clone or recovery that made it, in JSON
	propSnapshots   = "curve.snapshots" // it had snapshots
	propCloned      = "curve.cloned"    // it had clones
)

// File is what Curve's stat and listdir tell.
type File struct {
	ID          uint64 `json:"id"`
	ParentID    uint64 `json:"parentid"`
	Type        int    `json:"filetype"`
	Length      int64  `json:"length"`
	Created     int64  `json:"ctime"` // microseconds
	Name        string `json:"filename"`
	Owner       string `json:"owner"`
	Status      int    `json:"filestatus"`
	StripeUnit  uint64 `json:"stripeunit"`
	StripeCount uint64 `json:"stripecount"`
}

// node is a file with what lies behind it: an entry, or one of the trash.
type node struct {
	File
	path  string // Atoll's, without the leading slash
	entry *atollv1.Entry
	trash *atollv1.TrashEntry
}

func (n *node) dir() bool { return n.Type == typeDirectory }

// entryPath is Atoll's name for Curve's.
func entryPath(path string) string { return strings.TrimPrefix(path, "/") }

// lookup finds a file. Its parent's number is filled in only with parent.
func (g *Gateway) lookup(ctx context.Context, path string, parent bool) (*node, error) {
	switch path {
	case "/":
		return &node{File: File{ID: rootID, ParentID: rootID, Name: "/", Owner: rootUser}}, nil
	case "/" + recycleBin:
		return &node{File: File{ID: binID, ParentID: rootID, Name: recycleBin, Owner: rootUser}}, nil
	}
	if name, ok := inBin(path); ok {
		return g.lookupTrash(ctx, name)
	}
	e, err := g.b.GetEntry(ctx, &atollv1.GetEntryRequest{Path: entryPath(path)})
	if err != nil {
		if errors.Is(err, atoll.ErrInvalid) { // no such name can exist
			return nil, refuse(NotExist, err.Error())
		}
		return nil, err
	}
	n := &node{File: fileOf(e), path: e.Path, entry: e}
	if up := path[:strings.LastIndexByte(path, '/')]; parent && up != "" {
		p, err := g.b.GetEntry(ctx, &atollv1.GetEntryRequest{Path: entryPath(up)})
		if err != nil {
			return nil, err
		}
		n.ParentID = p.Number
	}
	return n, nil
}

// fileOf tells of an entry all but its parent and whether it is being cloned.
func fileOf(e *atollv1.Entry) File {
	f := File{
		ID: e.Number, Name: e.Path[strings.LastIndexByte(e.Path, '/')+1:], Owner: e.Owner, Length: e.SizeBytes,
		Created: e.Created.AsTime().UnixMicro(), StripeUnit: number(e.Properties[propStripeUnit]),
		StripeCount: number(e.Properties[propStripeCount]),
	}
	if e.Kind == "dir" {
		f.Length = 0
		return f
	}
	f.Type = typePageFile
	if t, ok := parseTask(e.Properties[propTask]); ok {
		f.Status = t.fileStatus()
	}
	return f
}

func number(text string) uint64 {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// walk checks that every directory above a path is there and, unless the caller
// is root, its own.
func (g *Gateway) walk(ctx context.Context, in *call, path string) error {
	parts := elements(path)
	for i := 1; i < len(parts); i++ {
		up := "/" + strings.Join(parts[:i], "/")
		n, err := g.lookup(ctx, up, false)
		if err != nil {
			return err
		}
		if !n.dir() {
			return refuse(Unknown, up+" is not a directory")
		}
		if in.Owner != rootUser && n.Owner != in.Owner {
			return refuse(AuthFail, "the directory "+up+" belongs to "+n.Owner)
		}
	}
	return nil
}

// enter holds the path to the rules and proves the caller: what every call
// begins with.
func (g *Gateway) enter(ctx context.Context, in *call, paths ...string) error {
	for _, p := range paths {
		if err := checkPath(p); err != nil {
			return err
		}
	}
	if len(paths) == 2 {
		if err := checkRename(paths[0], paths[1]); err != nil {
			return err
		}
	}
	return g.authenticate(ctx, in)
}

// enterNew is enter for a path that need not exist: the caller must own the
// directories above it, not those directly below the root.
func (g *Gateway) enterNew(ctx context.Context, in *call) error {
	if err := g.enter(ctx, in, in.Path); err != nil {
		return err
	}
	if in.Owner == rootUser {
		return nil
	}
	return g.ownAbove(ctx, in, in.Path)
}

// ownAbove refuses who does not own the directories above a path.
func (g *Gateway) ownAbove(ctx context.Context, in *call, path string) error {
	if path == "/" {
		return refuse(AuthFail, "the root directory belongs to root")
	}
	return g.walk(ctx, in, path)
}

// own refuses who does not own an existing file with all directories above it.
// Root passes before anything is looked up.
func (g *Gateway) own(ctx context.Context, in *call, path string) error {
	if in.Owner == rootUser {
		return nil
	}
	if err := g.ownAbove(ctx, in, path); err != nil {
		return err
	}
	n, err := g.lookup(ctx, path, false)
	if err != nil {
		return err
	}
	if n.Owner != in.Owner {
		return refuse(AuthFail, fmt.Sprintf("%s belongs to %s", path, n.Owner))
	}
	return nil
}

// ownTarget is own for a path that may be free.
func (g *Gateway) ownTarget(ctx context.Context, in *call, path string) error {
	err := g.own(ctx, in, path)
	if CodeOf(err) != NotExist {
		return err
	}
	return g.walk(ctx, in, path) // missing above: so it says; missing itself: free
}

// enterFile is enter and own, and returns the file.
func (g *Gateway) enterFile(ctx context.Context, in *call) (*node, error) {
	if err := g.enter(ctx, in, in.Path); err != nil {
		return nil, err
	}
	if err := g.own(ctx, in, in.Path); err != nil {
		return nil, err
	}
	return g.find(ctx, in.Path)
}

// find returns a file; one below something that is no directory is not there.
func (g *Gateway) find(ctx context.Context, path string) (*node, error) {
	if name, ok := inBin(path); ok && strings.Contains(name, "/") {
		return nil, refuse(NotExist, path+" is not there")
	}
	return g.lookup(ctx, path, false)
}
