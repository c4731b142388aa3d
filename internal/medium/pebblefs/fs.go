package pebblefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sync/semaphore"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

// Options are the settings of Open. The zero value will do.
type Options struct {
	// CheckpointBytes is how much may be logged before a checkpoint is made in
	// the background; 0 means 64 MiB.
	CheckpointBytes int64
	// Timeout bounds each operation that waits for the medium; 0 means three
	// times atoll.RequestTimeout. vfs.FS knows no contexts.
	Timeout time.Duration
	Log     *slog.Logger
}

// FS is a file system in the log of a medium. It implements vfs.FS; all methods
// may be called concurrently.
type FS struct {
	m           *medium.Medium
	opts        Options
	log         chan struct{}       // room for one: whoever writes to the hot lane
	checkpoints chan struct{}       // room for one: whoever makes a checkpoint
	gate        *semaphore.Weighted // bulk appends that are not yet held
	kick        chan struct{}       // a checkpoint is due
	background  context.Context     // ends with Close; vfs.FS knows no contexts
	stop        context.CancelFunc
	wg          sync.WaitGroup

	mu struct {
		sync.RWMutex // memory work only; guards inodes too
		tree         *tree
		pending      []byte   // operations that are not in the log
		cuts         []int    // where each of them ends
		deltas       []delta  // to be given when they are
		gone         []*inode // files that lose their last name by them
		frozen       bool     // a checkpoint is being made
		deferred     []delta  // to be given when it is done
		parts        []extent // of the table of the last checkpoint
		oldParts     []extent
		since        int64 // bytes logged since the last checkpoint
		broken       error
		locks        map[string]bool
		closed       bool
	}
}

var _ vfs.FS = (*FS)(nil)

// Open loads the table from the medium's root and replays the log. The FS uses
// the medium alone from then on; close the FS before the medium.
func Open(ctx context.Context, m *medium.Medium, opts Options) (*FS, error) {
	if opts.CheckpointBytes == 0 {
		opts.CheckpointBytes = 64 << 20
	}
	if opts.Timeout == 0 {
		opts.Timeout = 3 * atoll.RequestTimeout
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	fs := &FS{
		m: m, opts: opts, log: make(chan struct{}, 1), checkpoints: make(chan struct{}, 1),
		gate: semaphore.NewWeighted(bulkAppends), kick: make(chan struct{}, 1),
	}
	fs.mu.locks = map[string]bool{}
	if err := fs.load(ctx); err != nil {
		return nil, fmt.Errorf("open file system in medium %v: %w", m.Info().ID, err)
	}
	fs.background, fs.stop = context.WithCancel(context.Background())
	fs.wg.Go(fs.run)
	return fs, nil
}

// run makes checkpoints when enough was logged.
func (fs *FS) run() {
	for {
		select {
		case <-fs.background.Done():
			return
		case <-fs.kick:
		}
		ctx, cancel := context.WithTimeout(fs.background, fs.opts.Timeout)
		if err := fs.Checkpoint(ctx); err != nil && fs.background.Err() == nil {
			fs.opts.Log.Warn("checkpoint not made", "medium", fs.m.Info().ID, "err", err)
		}
		cancel()
	}
}

// Close makes all operations and the data of all files durable and a checkpoint
// of the table. Files must be closed before; the medium stays open.
func (fs *FS) Close(ctx context.Context) error {
	fs.mu.Lock()
	if fs.mu.closed {
		fs.mu.Unlock()
		return nil
	}
	fs.mu.closed = true
	var dirty []*inode
	for _, f := range fs.mu.tree.files() {
		if f.ino.dirty {
			dirty = append(dirty, f.ino)
		}
	}
	fs.mu.Unlock()
	fs.stop()
	fs.wg.Wait()
	for _, ino := range dirty {
		if err := fs.syncFile(ctx, ino); err != nil {
			return err
		}
	}
	return fs.Checkpoint(ctx)
}

// wait returns the context of one operation.
func (fs *FS) wait() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), fs.opts.Timeout)
}

// change applies an operation on names and queues it.
func (fs *FS) change(o op) (*inode, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.changeLocked(o)
}

func (fs *FS) changeLocked(o op) (*inode, error) {
	if fs.mu.broken != nil {
		return nil, fs.mu.broken
	}
	if o.code == opCreate {
		o.id = fs.mu.tree.next
	}
	gone, err := fs.mu.tree.apply(&o)
	if err != nil {
		return nil, err
	}
	if gone != nil {
		fs.mu.gone = append(fs.mu.gone, gone)
	}
	fs.queue(o)
	if o.code == opCreate {
		return fs.mu.tree.byID[o.id], nil
	}
	return nil, nil
}

// spill commits pending operations when there are many.
func (fs *FS) spill(err error) error {
	fs.mu.RLock()
	many := len(fs.mu.pending) > opsBytes
	fs.mu.RUnlock()
	if err != nil || !many {
		return err
	}
	ctx, cancel := fs.wait()
	defer cancel()
	return fs.commit(ctx, nil)
}

// Create implements vfs.FS.
func (fs *FS) Create(name string, _ vfs.DiskWriteCategory) (vfs.File, error) {
	name = clean(name)
	fs.mu.Lock()
	if d := fs.mu.tree.names[name]; d != nil && d.dir {
		fs.mu.Unlock()
		return nil, pathError("create", name, os.ErrExist)
	}
	ino, err := fs.changeLocked(op{code: opCreate, name: name})
	var f *file
	if err == nil {
		f = fs.open(ino, name, true, true)
	}
	fs.mu.Unlock()
	if err := fs.spill(err); err != nil {
		return nil, err
	}
	return f, nil
}

// open returns a new handle. fs.mu is held.
func (fs *FS) open(ino *inode, name string, read, write bool) *file {
	if !ino.dir {
		ino.opens++
	}
	return &file{fs: fs, ino: ino, name: path.Base(name), read: read, write: write, hot: strings.HasSuffix(name, ".log")}
}

// Link implements vfs.FS.
func (fs *FS) Link(oldName, newName string) error {
	_, err := fs.change(op{code: opLink, name: clean(oldName), to: clean(newName)})
	return fs.spill(err)
}

// Open implements vfs.FS.
func (fs *FS) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := fs.find("open", name, true, false)
	if err != nil {
		return nil, err
	}
	for _, o := range opts {
		o.Apply(f)
	}
	return f, nil
}

func (fs *FS) find(what, name string, read, write bool) (*file, error) {
	name = clean(name)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	ino := fs.mu.tree.names[name]
	if ino == nil {
		return nil, pathError(what, name, os.ErrNotExist)
	}
	if ino.dir && write {
		return nil, pathError(what, name, os.ErrInvalid)
	}
	return fs.open(ino, name, read, write), nil
}

// OpenReadWrite implements vfs.FS.
func (fs *FS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	var f vfs.File
	h, err := fs.find("open", name, true, true)
	f = h
	if errors.Is(err, os.ErrNotExist) {
		f, err = fs.Create(name, c)
	}
	if err != nil {
		return nil, err
	}
	for _, o := range opts {
		o.Apply(f)
	}
	return f, nil
}

// OpenDir implements vfs.FS.
func (fs *FS) OpenDir(name string) (vfs.File, error) {
	f, err := fs.find("open", name, false, false)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Remove implements vfs.FS. The blocks of a file that is still open are kept
// until it is closed.
func (fs *FS) Remove(name string) error {
	_, err := fs.change(op{code: opRemove, name: clean(name)})
	return fs.spill(err)
}

// RemoveAll implements vfs.FS.
func (fs *FS) RemoveAll(name string) error {
	name = clean(name)
	fs.mu.Lock()
	err := fs.removeAll(name)
	fs.mu.Unlock()
	return fs.spill(err)
}

func (fs *FS) removeAll(name string) error {
	ino := fs.mu.tree.names[name]
	if ino == nil {
		return nil
	}
	if ino.dir {
		for _, child := range fs.mu.tree.list(name) {
			if err := fs.removeAll(path.Join(name, child)); err != nil {
				return err
			}
		}
		if name == "/" {
			return nil
		}
	}
	_, err := fs.changeLocked(op{code: opRemove, name: name})
	return err
}

// Rename implements vfs.FS. It is atomic.
func (fs *FS) Rename(oldName, newName string) error {
	_, err := fs.change(op{code: opRename, name: clean(oldName), to: clean(newName)})
	return fs.spill(err)
}

// ReuseForWrite implements vfs.FS. Nothing is gained by reusing blocks of a
// log, so it makes a new file and removes the old one.
func (fs *FS) ReuseForWrite(oldName, newName string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := fs.Remove(oldName); err != nil {
		return nil, err
	}
	return fs.Create(newName, c)
}

// MkdirAll implements vfs.FS.
func (fs *FS) MkdirAll(dir string, _ os.FileMode) error {
	dir = clean(dir)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for i := 1; i <= len(dir); i++ {
		if i < len(dir) && dir[i] != '/' || dir == "/" {
			continue
		}
		ino := fs.mu.tree.names[dir[:i]]
		if ino != nil && !ino.dir {
			return pathError("mkdir", dir[:i], os.ErrExist)
		}
		if ino == nil {
			if _, err := fs.changeLocked(op{code: opMkdir, name: dir[:i]}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Lock implements vfs.FS. The medium has one owner anyway, so the lock is one
// within this process.
func (fs *FS) Lock(name string) (io.Closer, error) {
	name = clean(name)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.mu.locks[name] {
		return nil, pathError("lock", name, atoll.ErrBusy)
	}
	if fs.mu.tree.names[name] == nil {
		if _, err := fs.changeLocked(op{code: opCreate, name: name}); err != nil {
			return nil, err
		}
	}
	fs.mu.locks[name] = true
	return &lock{fs, name}, nil
}

type lock struct {
	fs   *FS
	name string
}

// Close releases the lock.
func (l *lock) Close() error {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	delete(l.fs.mu.locks, l.name)
	return nil
}

// List implements vfs.FS.
func (fs *FS) List(dir string) ([]string, error) {
	dir = clean(dir)
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	if ino := fs.mu.tree.names[dir]; ino == nil || !ino.dir {
		return nil, pathError("list", dir, os.ErrNotExist)
	}
	return fs.mu.tree.list(dir), nil
}

// Stat implements vfs.FS.
func (fs *FS) Stat(name string) (vfs.FileInfo, error) {
	name = clean(name)
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	ino := fs.mu.tree.names[name]
	if ino == nil {
		return nil, pathError("stat", name, os.ErrNotExist)
	}
	return info{path.Base(name), ino.size, ino.changed, ino.dir}, nil
}

// PathBase implements vfs.FS.
func (fs *FS) PathBase(p string) string { return path.Base(p) }

// PathJoin implements vfs.FS.
func (fs *FS) PathJoin(elem ...string) string { return path.Join(elem...) }

// PathDir implements vfs.FS.
func (fs *FS) PathDir(p string) string { return path.Dir(p) }

// GetDiskUsage implements vfs.FS. The room on the nodes is not known here.
func (fs *FS) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{}, vfs.ErrUnsupported
}

// Unwrap implements vfs.FS.
func (fs *FS) Unwrap() vfs.FS { return nil }

// info implements vfs.FileInfo.
type info struct {
	name    string
	size    int64
	changed time.Time
	dir     bool
}

func (i info) Name() string           { return i.name }
func (i info) Size() int64            { return i.size }
func (i info) ModTime() time.Time     { return i.changed }
func (i info) IsDir() bool            { return i.dir }
func (i info) Sys() any               { return nil }
func (i info) DeviceID() vfs.DeviceID { return vfs.DeviceID{} }

func (i info) Mode() os.FileMode {
	if i.dir {
		return os.ModeDir | 0o755
	}
	return 0o644
}

// acquire takes a place in a channel semaphore.
func acquire(ctx context.Context, sem chan struct{}) error {
	select {
	case sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another writer: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
}
