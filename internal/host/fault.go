package host

import (
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Fault is an FS in front of another that spoils operations by rules: errors,
// slowness, a full disk, flipped bits, lost and misdirected transfers. It is
// how `atoll demo` breaks a disk, and safe to have in place always: without
// rules an operation costs one atomic load more.
//
// A rule's Path is compared with the name that a file has now, also if it was
// renamed while open. An error given to Sync comes instead of the sync. A
// dropped or misdirected transfer really happens so: what it does to stored
// bytes stays after the rule is gone. Stale has no effect here.
type Fault struct {
	fs    FS
	rules *Rules
	mu    struct {
		sync.Mutex // guards open
		open       map[*faultFile]struct{}
	}
}

var _ FS = (*Fault)(nil)

// NewFault returns a filter without rules in front of fs.
func NewFault(fs FS) *Fault {
	f := &Fault{fs: fs, rules: NewRules(uint64(time.Now().UnixNano()))}
	f.mu.open = make(map[*faultFile]struct{})
	return f
}

// Inject puts a rule in force.
func (f *Fault) Inject(r Rule) *ActiveRule { return f.rules.Add(r) }

// Heal ends all rules.
func (f *Fault) Heal() { f.rules.Clear() }

// befall applies the rules to an operation: it waits out the delay and returns
// the error to end with.
func (f *Fault) befall(op Op, name string, off, n int64) (Effect, error) {
	e, ok := f.rules.Match(op, name, off, n)
	if !ok {
		return e, nil
	}
	if e.Delay > 0 {
		<-time.After(e.Delay)
	}
	return e, e.Err
}

// track wraps a file that was opened.
func (f *Fault) track(name string, file File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	g := &faultFile{File: file, f: f}
	g.name.Store(&name)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.open[g] = struct{}{}
	return g, nil
}

// Open opens an existing regular file.
func (f *Fault) Open(name string) (File, error) {
	if _, err := f.befall(OpOpen, name, 0, 0); err != nil {
		return nil, err
	}
	file, err := f.fs.Open(name)
	return f.track(name, file, err)
}

// Create makes a new empty file.
func (f *Fault) Create(name string) (File, error) {
	if _, err := f.befall(OpCreate, name, 0, 0); err != nil {
		return nil, err
	}
	file, err := f.fs.Create(name)
	return f.track(name, file, err)
}

// Rename moves a file.
func (f *Fault) Rename(oldName, newName string) error {
	if _, err := f.befall(OpRename, oldName, 0, 0); err != nil {
		return err
	}
	if err := f.fs.Rename(oldName, newName); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for g := range f.mu.open {
		if *g.name.Load() == oldName {
			g.name.Store(&newName)
		}
	}
	return nil
}

// Remove deletes a file or an empty directory.
func (f *Fault) Remove(name string) error {
	if _, err := f.befall(OpRemove, name, 0, 0); err != nil {
		return err
	}
	return f.fs.Remove(name)
}

// Mkdir makes a directory.
func (f *Fault) Mkdir(name string) error {
	if _, err := f.befall(OpMkdir, name, 0, 0); err != nil {
		return err
	}
	return f.fs.Mkdir(name)
}

// List returns a directory's entries by name.
func (f *Fault) List(dir string) ([]DirEntry, error) {
	if _, err := f.befall(OpList, dir, 0, 0); err != nil {
		return nil, err
	}
	return f.fs.List(dir)
}

// SyncDir makes a directory's entries durable.
func (f *Fault) SyncDir(dir string) error {
	if e, err := f.befall(OpSyncDir, dir, 0, 0); err != nil || e.Drop {
		return err
	}
	return f.fs.SyncDir(dir)
}

// Lock takes an exclusive lock.
func (f *Fault) Lock(name string) (io.Closer, error) {
	if _, err := f.befall(OpLock, name, 0, 0); err != nil {
		return nil, err
	}
	return f.fs.Lock(name)
}

// Space returns the disk's size and what is free, nothing for a rule with
// ErrNoSpace.
func (f *Fault) Space() (total, free int64, err error) {
	total, free, err = f.fs.Space()
	if _, e := f.befall(OpSpace, ".", 0, 0); e != nil && err == nil {
		return SpaceError(total, e)
	}
	return total, free, err
}

// faultFile is an open file of a Fault. What no rule can spoil goes straight
// to the file below.
type faultFile struct {
	File
	f    *Fault
	name atomic.Pointer[string]
}

// befall applies the rules to an operation on the file.
func (g *faultFile) befall(op Op, off, n int64) (Effect, error) {
	if g.f.rules.active.Load() == 0 {
		return Effect{}, nil
	}
	return g.f.befall(op, *g.name.Load(), off, n)
}

// elsewhere returns the offset of another block of the file.
func (g *faultFile) elsewhere(off int64, pick uint64) int64 {
	size, _ := g.File.Size()
	blocks := uint64(max(2, size/atoll.BlockSize))
	at := int64(pick%blocks) * atoll.BlockSize
	if at == off {
		at = int64((pick+1)%blocks) * atoll.BlockSize
	}
	return at
}

// ReadAt fills p from offset off.
func (g *faultFile) ReadAt(p []byte, off int64) (int, error) {
	e, err := g.befall(OpRead, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	if e.Misdirect {
		off = g.elsewhere(off, e.Rand)
	}
	n, err := g.File.ReadAt(p, off)
	if e.Flip && n > 0 {
		bit := e.Rand % uint64(8*n)
		p[bit/8] ^= 1 << (bit % 8)
	}
	return n, err
}

// WriteAt writes p at offset off.
func (g *faultFile) WriteAt(p []byte, off int64) (int, error) {
	e, err := g.befall(OpWrite, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	if e.Drop {
		return len(p), nil
	}
	if e.Misdirect {
		off = g.elsewhere(off, e.Rand)
	}
	return g.File.WriteAt(p, off)
}

// WriteVec writes the slices in order.
func (g *faultFile) WriteVec(v [][]byte, off int64, durable bool) error {
	if g.f.rules.active.Load() == 0 {
		return g.File.WriteVec(v, off, durable)
	}
	n := int64(0)
	for _, p := range v {
		n += int64(len(p))
	}
	e, err := g.befall(OpWrite, off, n)
	if err != nil || e.Drop {
		return err
	}
	if e.Misdirect {
		off = g.elsewhere(off, e.Rand)
	}
	if !durable {
		return g.File.WriteVec(v, off, false)
	}
	e, err = g.befall(OpSync, off, n)
	if werr := g.File.WriteVec(v, off, err == nil && !e.Drop); werr != nil {
		return werr
	}
	return err
}

// Sync makes data and size durable.
func (g *faultFile) Sync() error {
	if e, err := g.befall(OpSync, 0, 0); err != nil || e.Drop {
		return err
	}
	return g.File.Sync()
}

// Truncate sets the size.
func (g *faultFile) Truncate(size int64) error {
	if _, err := g.befall(OpTruncate, size, 0); err != nil {
		return err
	}
	return g.File.Truncate(size)
}

// Punch frees a range.
func (g *faultFile) Punch(off, n int64) error {
	if _, err := g.befall(OpPunch, off, n); err != nil {
		return err
	}
	return g.File.Punch(off, n)
}

// Close releases the file.
func (g *faultFile) Close() error {
	g.f.mu.Lock()
	delete(g.f.mu.open, g)
	g.f.mu.Unlock()
	return g.File.Close()
}
