package hosttest

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Disk is a host.FS in memory that can lose power, lie and fail. What happens
// by chance follows from its seed and the order of the calls.
//
// It is as forgetful as host.FS allows: a new file's name is lost without
// SyncDir also if the file was synced, and a durable WriteVec confirms its own
// bytes only. All methods may be called concurrently. It works in a
// testing/synctest bubble.
type Disk struct {
	rules *host.Rules
	mu    struct {
		sync.Mutex // guards everything below and all inodes
		rng        *rand.Rand
		root       *inode
		names      []*nameOp // pending changes of directories, in order
		seq        uint64    // of the last pending change
		locks      map[string]*diskLock
		total      int64
		used       int64
		syncs      int
		onSync     func(SyncPoint)
		keep       bool
		shared     bool // a Sync of one file empties the cache of the whole disk
		zeros      *chunk
	}
}

var _ host.FS = (*Disk)(nil)

// inode is a file or directory. Names point to it.
type inode struct {
	path string // the last one it had, for rules
	dir  bool

	// A file: as it reads now, as it is on the platter, and the way from there.
	live, safe         pages
	liveSize, safeSize int64
	pending            []fileOp
	room               int64

	// A directory.
	names map[string]*inode
	saved map[string]savedName
}

// savedName is a durable name. An absent inode is a durable absence.
type savedName struct {
	ino *inode
	seq uint64
}

// nameOp is a change of one or two names that is not durable yet. It happens as
// a whole, once the directories of all its names are synced.
type nameOp struct {
	seq   uint64
	parts []namePart
}

// namePart sets one name to an inode, or removes it if ino is nil.
type namePart struct {
	dir    *inode
	name   string
	ino    *inode
	synced bool
}

// SyncPoint is a moment of a sync: a power cut just before or after it is what
// a crash test wants to look at.
type SyncPoint struct {
	Op    host.Op // OpSync, OpWrite (durable WriteVec) or OpSyncDir
	Path  string
	After bool // it has taken effect, but its caller does not know yet
	N     int  // the how-manieth sync of the disk, from 1
	Disk  *Disk
}

// NewDisk returns an empty disk of 1 TiB.
func NewDisk(seed uint64) *Disk {
	d := &Disk{rules: host.NewRules(seed)}
	d.mu.rng = rand.New(rand.NewPCG(seed, 0x6469736b))
	d.mu.root = newDir("")
	d.mu.locks = make(map[string]*diskLock)
	d.mu.total = 1 << 40
	d.mu.zeros = zeroChunk()
	return d
}

func newDir(path string) *inode {
	return &inode{path: path, dir: true, names: make(map[string]*inode), saved: make(map[string]savedName)}
}

// Inject puts a rule in force. Err on a sync drops what was to be synced: the
// pages stay readable, count as clean, and the next Sync returns nil.
func (d *Disk) Inject(r host.Rule) *host.ActiveRule {
	if r.Stale {
		d.KeepHistory()
	}
	return d.rules.Add(r)
}

// Heal ends all rules. Damage that was done stays.
func (d *Disk) Heal() { d.rules.Clear() }

// KeepHistory keeps what pages held before their last write, for Stale reads.
// Inject does it for a Stale rule, but only from then on.
func (d *Disk) KeepHistory() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.keep = true
}

// SetSize sets the size of the disk in bytes. Writes that need more end with
// ErrNoSpace.
func (d *Disk) SetSize(total int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.total = total
}

// ShareFlush makes a Sync of one file empty the cache of the whole disk, as on
// ext4 and xfs with direct I/O: it then also makes durable what was written
// over durable, written pages of other files, but no size, no name and no page
// that takes room only since then. A durable WriteVec that needs the journal,
// because its file takes more room, is such a Sync.
func (d *Disk) ShareFlush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.shared = true
}

// flushAll makes durable what a flush of the disk's cache does.
func (d *Disk) flushAll() {
	for ino := range d.files() {
		ino.flush()
	}
}

// files lists every file that something points to.
func (d *Disk) files() map[*inode]bool {
	files, seen := make(map[*inode]bool), make(map[*inode]bool)
	var add func(*inode)
	add = func(ino *inode) {
		if ino == nil || seen[ino] {
			return
		}
		seen[ino] = true
		if !ino.dir {
			files[ino] = true
		}
		for _, child := range ino.names {
			add(child)
		}
		for _, s := range ino.saved {
			add(s.ino)
		}
	}
	add(d.mu.root)
	return files
}

// OnSync has f called before and after each sync takes effect, by the
// goroutine that syncs. f may use the disk, also Crash; nil ends it.
func (d *Disk) OnSync(f func(SyncPoint)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.onSync = f
}

// Syncs returns how many syncs there have been.
func (d *Disk) Syncs() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mu.syncs
}

// Corrupt inverts n stored bytes of a file at off, as rot does.
func (d *Disk) Corrupt(name string, off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	ino, err := d.file("corrupt", name)
	if err != nil {
		return err
	}
	if off < 0 || off+n > ino.liveSize {
		return fmt.Errorf("corrupt %s: %d bytes at %d of %d: %w", name, n, off, ino.liveSize, atoll.ErrInvalid)
	}
	b := make([]byte, n)
	for _, p := range []*pages{&ino.live, &ino.safe} {
		p.readAt(b, off, false)
		for i := range b {
			b[i] ^= 0xff
		}
		p.writeAt(b, off)
	}
	for i := range ino.pending {
		ino.pending[i].invert(off, n)
	}
	return nil
}

// befall applies the rules to an operation: it waits out a delay and returns
// the error to end with.
func (d *Disk) befall(op host.Op, name string, off, n int64) (host.Effect, error) {
	e, ok := d.rules.Match(op, name, off, n)
	if !ok {
		return e, nil
	}
	if e.Delay > 0 {
		<-time.After(e.Delay)
	}
	return e, e.Err
}

// walk returns the inode at name, nil if there is none.
func (d *Disk) walk(name string) *inode {
	ino := d.mu.root
	if name == "." {
		return ino
	}
	for elem := range strings.SplitSeq(name, "/") {
		if ino == nil || !ino.dir {
			return nil
		}
		ino = ino.names[elem]
	}
	return ino
}

// parent returns the directory of name and its last element.
func (d *Disk) parent(verb, name string) (*inode, string, error) {
	if err := host.CheckName(name, false); err != nil {
		return nil, "", err
	}
	dir, base := ".", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir, base = name[:i], name[i+1:]
	}
	ino := d.walk(dir)
	if ino == nil || !ino.dir {
		return nil, "", fmt.Errorf("%s %s: %w", verb, name, atoll.ErrNotExist)
	}
	return ino, base, nil
}

// file returns the regular file at name.
func (d *Disk) file(verb, name string) (*inode, error) {
	if err := host.CheckName(name, false); err != nil {
		return nil, err
	}
	ino := d.walk(name)
	switch {
	case ino == nil:
		return nil, fmt.Errorf("%s %s: %w", verb, name, atoll.ErrNotExist)
	case ino.dir:
		return nil, fmt.Errorf("%s %s: not a regular file: %w", verb, name, atoll.ErrInvalid)
	}
	return ino, nil
}

// change makes a change of names that is durable later.
func (d *Disk) change(parts ...namePart) {
	for _, p := range parts {
		if p.ino == nil {
			delete(p.dir.names, p.name)
		} else {
			p.dir.names[p.name] = p.ino
		}
	}
	d.mu.seq++
	d.mu.names = append(d.mu.names, &nameOp{seq: d.mu.seq, parts: parts})
}

// Open opens an existing regular file.
func (d *Disk) Open(name string) (host.File, error) {
	if _, err := d.befall(host.OpOpen, name, 0, 0); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ino, err := d.file("open", name)
	if err != nil {
		return nil, err
	}
	return &diskFile{d: d, ino: ino}, nil
}

// Create makes a new empty file.
func (d *Disk) Create(name string) (host.File, error) {
	if _, err := d.befall(host.OpCreate, name, 0, 0); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ino, err := d.create("create", name)
	if err != nil {
		return nil, err
	}
	return &diskFile{d: d, ino: ino}, nil
}

// create adds an empty file.
func (d *Disk) create(verb, name string) (*inode, error) {
	dir, base, err := d.parent(verb, name)
	if err != nil {
		return nil, err
	}
	if dir.names[base] != nil {
		return nil, fmt.Errorf("%s %s: %w", verb, name, atoll.ErrExist)
	}
	if d.mu.used >= d.mu.total {
		return nil, fmt.Errorf("%s %s: %w", verb, name, atoll.ErrNoSpace)
	}
	ino := &inode{path: name}
	ino.live.zeros, ino.safe.zeros = d.mu.zeros, d.mu.zeros
	d.change(namePart{dir: dir, name: base, ino: ino})
	return ino, nil
}

// Rename moves a file or directory.
func (d *Disk) Rename(oldName, newName string) error {
	if _, err := d.befall(host.OpRename, oldName, 0, 0); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	verb := "rename " + oldName + " to"
	from, oldBase, err := d.parent("rename", oldName)
	if err != nil {
		return err
	}
	to, newBase, err := d.parent(verb, newName)
	if err != nil {
		return err
	}
	ino := from.names[oldBase]
	if ino == nil {
		return fmt.Errorf("rename %s: %w", oldName, atoll.ErrNotExist)
	}
	if ino.dir && (newName == oldName || strings.HasPrefix(newName, oldName+"/")) {
		return fmt.Errorf("%s %s: %w", verb, newName, atoll.ErrInvalid)
	}
	there := to.names[newBase]
	if there == ino {
		return nil
	}
	if err := replaceable(verb, newName, ino, there); err != nil {
		return err
	}
	d.forget(there)
	ino.path = newName
	d.change(namePart{dir: from, name: oldBase}, namePart{dir: to, name: newBase, ino: ino})
	return nil
}

// replaceable returns an error unless ino may take the name of there.
func replaceable(verb, name string, ino, there *inode) error {
	switch {
	case there == nil:
		return nil
	case ino.dir != there.dir && there.dir:
		return fmt.Errorf("%s %s: is a directory: %w", verb, name, atoll.ErrInvalid)
	case ino.dir != there.dir:
		return fmt.Errorf("%s %s: not a directory: %w", verb, name, atoll.ErrNotExist)
	case there.dir && len(there.names) > 0:
		return fmt.Errorf("%s %s: not empty: %w", verb, name, atoll.ErrExist)
	}
	return nil
}

// forget gives back the room of a file that has lost its name.
func (d *Disk) forget(ino *inode) {
	if ino != nil {
		d.mu.used -= ino.room
		ino.room = 0
	}
}

// Remove deletes a file or an empty directory.
func (d *Disk) Remove(name string) error {
	if _, err := d.befall(host.OpRemove, name, 0, 0); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	dir, base, err := d.parent("remove", name)
	if err != nil {
		return err
	}
	ino := dir.names[base]
	if ino == nil {
		return fmt.Errorf("remove %s: %w", name, atoll.ErrNotExist)
	}
	if len(ino.names) > 0 {
		return fmt.Errorf("remove %s: not empty: %w", name, atoll.ErrExist)
	}
	d.forget(ino)
	d.change(namePart{dir: dir, name: base})
	return nil
}

// Mkdir makes a directory unless it exists.
func (d *Disk) Mkdir(name string) error {
	if _, err := d.befall(host.OpMkdir, name, 0, 0); err != nil || name == "." {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	dir, base, err := d.parent("make directory", name)
	if err != nil {
		return err
	}
	if there := dir.names[base]; there != nil {
		if !there.dir {
			return fmt.Errorf("make directory %s: %w", name, atoll.ErrExist)
		}
		return nil
	}
	d.change(namePart{dir: dir, name: base, ino: newDir(name)})
	return nil
}

// List returns a directory's entries by name.
func (d *Disk) List(dir string) ([]host.DirEntry, error) {
	if _, err := d.befall(host.OpList, dir, 0, 0); err != nil {
		return nil, err
	}
	if err := host.CheckName(dir, true); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ino := d.walk(dir)
	if ino == nil || !ino.dir {
		return nil, fmt.Errorf("list %s: %w", dir, atoll.ErrNotExist)
	}
	entries := make([]host.DirEntry, 0, len(ino.names))
	for name, child := range ino.names {
		entries = append(entries, host.DirEntry{Name: name, Dir: child.dir, Size: child.liveSize})
	}
	slices.SortFunc(entries, func(a, b host.DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return entries, nil
}

// SyncDir makes the entries of dir durable.
func (d *Disk) SyncDir(dir string) error {
	e, err := d.befall(host.OpSyncDir, dir, 0, 0)
	if err != nil {
		return err
	}
	if err := host.CheckName(dir, true); err != nil {
		return err
	}
	done := d.point(host.OpSyncDir, dir)
	d.mu.Lock()
	ino := d.walk(dir)
	ok := ino != nil && ino.dir
	if ok && !e.Drop {
		d.saveNames(ino)
	}
	d.mu.Unlock()
	if !ok {
		return fmt.Errorf("sync directory %s: %w", dir, atoll.ErrNotExist)
	}
	done()
	return nil
}

// saveNames makes the pending changes of dir durable.
func (d *Disk) saveNames(dir *inode) {
	rest := d.mu.names[:0]
	for _, op := range d.mu.names {
		whole := true
		for i := range op.parts {
			p := &op.parts[i]
			p.synced = p.synced || p.dir == dir
			whole = whole && p.synced
		}
		if !whole {
			rest = append(rest, op)
			continue
		}
		for _, p := range op.parts {
			save(p.dir.saved, p, op.seq)
		}
	}
	clear(d.mu.names[len(rest):])
	d.mu.names = rest
}

// save sets a durable name, unless a later change has set it already.
func save(saved map[string]savedName, p namePart, seq uint64) {
	if old, ok := saved[p.name]; !ok || old.seq < seq {
		saved[p.name] = savedName{ino: p.ino, seq: seq}
	}
}

// point counts a sync, calls the hook for the moment before it, and returns
// what to call after it.
func (d *Disk) point(op host.Op, path string) (done func()) {
	d.mu.Lock()
	d.mu.syncs++
	p, f := SyncPoint{Op: op, Path: path, N: d.mu.syncs, Disk: d}, d.mu.onSync
	d.mu.Unlock()
	if f == nil {
		return func() {}
	}
	f(p)
	return func() {
		p.After = true
		f(p)
	}
}

// diskLock is a held lock.
type diskLock struct {
	d    *Disk
	name string
}

// Lock takes a lock that ends with Close. Copies of the disk have no locks.
func (d *Disk) Lock(name string) (io.Closer, error) {
	if _, err := d.befall(host.OpLock, name, 0, 0); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.file("lock", name); err != nil {
		if _, err = d.create("lock", name); err != nil {
			return nil, err
		}
	}
	if d.mu.locks[name] != nil {
		return nil, fmt.Errorf("lock %s: %w: held by another process", name, atoll.ErrBusy)
	}
	l := &diskLock{d: d, name: name}
	d.mu.locks[name] = l
	return l, nil
}

// Close gives the lock back.
func (l *diskLock) Close() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	if l.d.mu.locks[l.name] == l {
		delete(l.d.mu.locks, l.name)
	}
	return nil
}

// Space returns the disk's size and what is free.
func (d *Disk) Space() (total, free int64, err error) {
	_, err = d.befall(host.OpSpace, ".", 0, 0)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		return host.SpaceError(d.mu.total, err)
	}
	return d.mu.total, max(0, d.mu.total-d.mu.used), nil
}
