package pebblefs

import (
	"os"
	"path"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// tree is the table of names and files. Applying an operation to it is pure
// memory work, the same when it is called for and when it is replayed.
type tree struct {
	names map[string]*inode // clean absolute paths
	byID  map[uint64]*inode
	next  uint64 // number of the next file
}

// inode is a file or a directory.
type inode struct {
	id      uint64
	dir     bool
	links   int
	size    int64 // as readers see it
	logged  int64 // as the log has it, or will when the pending operations are in
	extents []extent
	changed time.Time

	// Of a file in use.
	writer chan struct{} // room for one: whoever writes or flushes it
	opens  int
	held   []extent // extents kept for readers though the file was removed
	win    []byte   // bytes from winAt on that are not in the log, or not whole blocks
	winAt  int64    // a multiple of the block size
	dirty  bool     // win holds bytes that are not in the log
}

func newInode(id uint64) *inode {
	return &inode{id: id, writer: make(chan struct{}, 1), changed: time.Now()}
}

func newTree() *tree {
	return &tree{names: map[string]*inode{"/": {dir: true}}, byID: map[uint64]*inode{}, next: 1}
}

// clean gives a path the form it has in the table.
func clean(name string) string { return path.Clean("/" + name) }

func pathError(op, name string, err error) error {
	return &os.PathError{Op: op, Path: name, Err: err}
}

// parent checks that the directory of a name is there.
func (t *tree) parent(op, name string) error {
	if d := t.names[path.Dir(name)]; d == nil || !d.dir {
		return pathError(op, name, os.ErrNotExist)
	}
	return nil
}

// file returns the file of a name.
func (t *tree) file(op, name string) (*inode, error) {
	ino := t.names[name]
	switch {
	case ino == nil:
		return nil, pathError(op, name, os.ErrNotExist)
	case ino.dir:
		return nil, pathError(op, name, atoll.ErrInvalid)
	}
	return ino, nil
}

// apply carries out an operation on names and returns the file that lost its
// last name by it, if any.
func (t *tree) apply(o *op) (gone *inode, err error) {
	switch o.code {
	case opCreate:
		return t.create(o)
	case opLink:
		return nil, t.link(o.name, o.to)
	case opRename:
		return t.rename(o.name, o.to)
	case opRemove:
		return t.remove(o.name)
	case opMkdir:
		if err := t.parent("mkdir", o.name); err != nil {
			return nil, err
		}
		if t.names[o.name] != nil {
			return nil, pathError("mkdir", o.name, os.ErrExist)
		}
		t.names[o.name] = &inode{dir: true, changed: time.Now()}
		return nil, nil
	}
	return nil, pathError("apply", o.name, atoll.ErrInvalid)
}

// create makes an empty file and takes the name from another one.
func (t *tree) create(o *op) (gone *inode, err error) {
	if err := t.parent("create", o.name); err != nil {
		return nil, err
	}
	if t.names[o.name] != nil {
		if gone, err = t.remove(o.name); err != nil {
			return nil, err
		}
	}
	ino := newInode(o.id)
	ino.links = 1
	t.names[o.name], t.byID[o.id] = ino, ino
	t.next = max(t.next, o.id+1)
	return gone, nil
}

func (t *tree) link(name, to string) error {
	ino, err := t.file("link", name)
	if err != nil {
		return err
	}
	if err := t.parent("link", to); err != nil {
		return err
	}
	if t.names[to] != nil {
		return pathError("link", to, os.ErrExist)
	}
	t.names[to] = ino
	ino.links++
	return nil
}

func (t *tree) rename(name, to string) (gone *inode, err error) {
	ino := t.names[name]
	if ino == nil {
		return nil, pathError("rename", name, os.ErrNotExist)
	}
	if err := t.parent("rename", to); err != nil {
		return nil, err
	}
	if name == to {
		return nil, nil
	}
	if old := t.names[to]; old != nil {
		if old.dir != ino.dir {
			return nil, pathError("rename", to, os.ErrExist)
		}
		if gone, err = t.remove(to); err != nil {
			return nil, err
		}
	}
	if !ino.dir {
		delete(t.names, name)
		t.names[to] = ino
		return gone, nil
	}
	if strings.HasPrefix(to, name+"/") {
		return nil, pathError("rename", to, atoll.ErrInvalid)
	}
	for p, ino := range t.names { // each name moves once, whatever the order
		if p == name || strings.HasPrefix(p, name+"/") {
			delete(t.names, p)
			t.names[to+p[len(name):]] = ino
		}
	}
	return gone, nil
}

func (t *tree) remove(name string) (gone *inode, err error) {
	ino := t.names[name]
	switch {
	case ino == nil:
		return nil, pathError("remove", name, os.ErrNotExist)
	case name == "/", ino.dir && len(t.list(name)) > 0:
		return nil, pathError("remove", name, os.ErrInvalid)
	}
	delete(t.names, name)
	if ino.dir {
		return nil, nil
	}
	if ino.links--; ino.links > 0 {
		return nil, nil
	}
	delete(t.byID, ino.id)
	return ino, nil
}

// list returns the names in a directory in order.
func (t *tree) list(dir string) []string {
	prefix := strings.TrimSuffix(dir, "/") + "/"
	var names []string
	for p := range t.names {
		if rest, ok := strings.CutPrefix(p, prefix); ok && rest != "" && !strings.Contains(rest, "/") {
			names = append(names, rest)
		}
	}
	sort.Strings(names)
	return names
}

// dirs lists the directories but the root, parents first.
func (t *tree) dirs() []string {
	var dirs []string
	for p, ino := range t.names {
		if ino.dir && p != "/" {
			dirs = append(dirs, p)
		}
	}
	sort.Strings(dirs)
	return dirs
}

type namedFile struct {
	ino   *inode
	names []string
}

// files lists the files by number, with their names.
func (t *tree) files() []namedFile {
	index := map[uint64]int{}
	var files []namedFile
	for _, ino := range t.byID {
		files = append(files, namedFile{ino: ino})
	}
	slices.SortFunc(files, func(a, b namedFile) int {
		if a.ino.id < b.ino.id {
			return -1
		}
		return 1
	})
	for i, f := range files {
		index[f.ino.id] = i
	}
	for p, ino := range t.names {
		if !ino.dir {
			i := index[ino.id]
			files[i].names = append(files[i].names, p)
		}
	}
	for i := range files {
		sort.Strings(files[i].names)
	}
	return files
}

// place puts a run of blocks into a file and returns the runs that it takes the
// place of.
func (ino *inode) place(e extent) (old []extent) {
	end := e.first + uint64(e.blocks)
	i := sort.Search(len(ino.extents), func(i int) bool {
		x := &ino.extents[i]
		return x.first+uint64(x.blocks) > e.first
	})
	j := i
	var keep []extent
	for ; j < len(ino.extents) && ino.extents[j].first < end; j++ {
		x := ino.extents[j]
		xEnd := x.first + uint64(x.blocks)
		lo, hi := max(x.first, e.first), min(xEnd, end)
		old = append(old, x.cut(lo, hi))
		if x.first < lo {
			keep = append(keep, x.cut(x.first, lo))
		}
		if hi < xEnd {
			keep = append(keep, x.cut(hi, xEnd))
		}
	}
	keep = append(keep, e)
	slices.SortFunc(keep, func(a, b extent) int { return int(int64(a.first) - int64(b.first)) })
	ino.extents = slices.Replace(ino.extents, i, j, keep...)
	return old
}

// cut returns the part of a run between two blocks of the file.
func (e extent) cut(lo, hi uint64) extent {
	return extent{first: lo, blocks: uint32(hi - lo), ordinal: e.ordinal, block: e.block + atoll.BlockNo(lo-e.first)}
}

// run returns the run that holds a block of the file, from that block on. ok is
// false in a hole, and blocks then counts up to the next run (at least 1).
func (ino *inode) run(block uint64) (e extent, ok bool) {
	i := sort.Search(len(ino.extents), func(i int) bool {
		x := &ino.extents[i]
		return x.first+uint64(x.blocks) > block
	})
	if i == len(ino.extents) {
		return extent{first: block, blocks: 1 << 20}, false
	}
	x := ino.extents[i]
	if block < x.first {
		return extent{first: block, blocks: uint32(min(x.first-block, 1<<20))}, false
	}
	return x.cut(block, x.first+uint64(x.blocks)), true
}
