package host

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// Dir is an FS on a directory of the machine. Names cannot lead out of it, also
// not through symbolic links.
//
// All transfers of a file go through one descriptor, so that there is never a
// page cache beside direct transfers that could disagree with them. It is
// opened with O_DIRECT where the file system takes that:
//
//   - a read that is not aligned goes through an aligned bounce buffer;
//   - a write whose offset and length are aligned but whose memory is not is
//     copied to a bounce buffer;
//   - the first write whose offset or length is not aligned clears O_DIRECT on
//     that open file for good. Rounding such a write up to blocks instead would
//     change the file's size and could undo a concurrent write.
//
// So files of blocks stay direct and small files of bytes are buffered. A file
// that is written in both ways should be opened once at a time.
type Dir struct {
	path  string
	root  *os.Root
	flags int  // O_DIRECT or 0
	dsync bool // the kernel knows pwritev2 with RWF_DSYNC
	reads *Reads
}

var _ FS = (*Dir)(nil)

// DirOptions change how a Dir works.
type DirOptions struct {
	// NoDirect keeps all transfers in the page cache.
	NoDirect bool
	// Reads takes the direct reads of this and other directories of one disk
	// together; nil for each on its own. It must outlive the files.
	Reads *Reads
}

// OpenDir opens the directory at path, which must exist. It tries with a
// temporary file whether direct transfers work there, and falls back to the
// page cache if not.
func OpenDir(path string) (*Dir, error) { return OpenDirWith(path, DirOptions{}) }

// OpenDirWith is OpenDir with options.
func OpenDirWith(path string, opts DirOptions) (*Dir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, wrap("open directory", path, err)
	}
	d := &Dir{path: path, root: root, reads: opts.Reads}
	if err := d.probe(!opts.NoDirect); err != nil {
		root.Close()
		return nil, err
	}
	return d, nil
}

// Path returns the directory's path as it was given to OpenDir.
func (d *Dir) Path() string { return d.path }

// Direct reports whether files bypass the page cache.
func (d *Dir) Direct() bool { return d.flags != 0 }

// Close releases the directory. Open files stay usable.
func (d *Dir) Close() error { return wrap("close directory", d.path, d.root.Close()) }

// probe finds out what the file system can do. A file system that cannot be
// written at all is not an error here: reading it may be all that is wanted.
func (d *Dir) probe(direct bool) error {
	name := ".probe-" + strconv.FormatUint(rand.Uint64(), 36)
	f, err := d.open("probe", name, unix.O_CREAT|unix.O_RDWR)
	if err != nil {
		if errors.Is(err, atoll.ErrReadOnly) || errors.Is(err, atoll.ErrDenied) || errors.Is(err, atoll.ErrNoSpace) {
			return nil
		}
		return err
	}
	defer d.root.Remove(name)
	defer f.Close()
	b := Alloc(atoll.BlockSize)
	defer b.Release()
	clear(b.Bytes())
	full := false
	if d.dsync, full = f.tryDsync(b.Bytes()); full {
		d.dsync = true // every kernel since 4.7; writeVec copes with others
	}
	if direct && (f.tryDirect(b.Bytes()) || full && f.setDirect(true) == nil) {
		d.flags = unix.O_DIRECT
	}
	return nil
}

// open opens name and takes over its descriptor.
func (d *Dir) open(verb, name string, flags int) (*dirFile, error) {
	if err := CheckName(name, false); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(name, flags|d.flags, 0o600)
	if err != nil {
		return nil, wrap(verb, name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, wrap(verb, name, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s %s: not a regular file: %w", verb, name, atoll.ErrInvalid)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, wrap(verb, name, err)
	}
	file := &dirFile{name: name, fd: fd, dsync: d.dsync, reads: d.reads}
	file.direct.Store(d.flags != 0)
	return file, nil
}

// Open opens an existing regular file, for reading only if it may not be
// written; writing it is ErrReadOnly then.
func (d *Dir) Open(name string) (File, error) {
	f, err := d.open("open", name, unix.O_RDWR)
	if errors.Is(err, atoll.ErrReadOnly) || errors.Is(err, atoll.ErrDenied) {
		if f, err = d.open("open", name, unix.O_RDONLY); err == nil {
			f.ro = true
		}
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Create makes a new file with mode 0600.
func (d *Dir) Create(name string) (File, error) {
	f, err := d.open("create", name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Rename moves a file.
func (d *Dir) Rename(oldName, newName string) error {
	if err := errors.Join(CheckName(oldName, false), CheckName(newName, false)); err != nil {
		return err
	}
	return wrap("rename", oldName+" to "+newName, d.root.Rename(oldName, newName))
}

// Remove deletes a file or an empty directory.
func (d *Dir) Remove(name string) error {
	if err := CheckName(name, false); err != nil {
		return err
	}
	return wrap("remove", name, d.root.Remove(name))
}

// Mkdir makes a directory with mode 0700 unless it exists.
func (d *Dir) Mkdir(name string) error {
	if err := CheckName(name, true); err != nil {
		return err
	}
	err := d.root.Mkdir(name, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if info, e := d.root.Stat(name); e == nil && info.IsDir() {
			return nil
		}
	}
	return wrap("make directory", name, err)
}

// List returns a directory's entries by name. An entry that vanishes meanwhile
// is left out.
func (d *Dir) List(dir string) ([]DirEntry, error) {
	if err := CheckName(dir, true); err != nil {
		return nil, err
	}
	f, err := d.root.Open(dir)
	if err != nil {
		return nil, wrap("list", dir, err)
	}
	defer f.Close()
	found, err := f.ReadDir(-1)
	if err != nil {
		return nil, wrap("list", dir, err)
	}
	entries := make([]DirEntry, 0, len(found))
	for _, e := range found {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, wrap("list", dir, err)
		}
		entry := DirEntry{Name: e.Name(), Dir: e.IsDir()}
		if !entry.Dir {
			entry.Size = info.Size()
		}
		entries = append(entries, entry)
	}
	slices.SortFunc(entries, func(a, b DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return entries, nil
}

// SyncDir makes a directory's entries durable.
func (d *Dir) SyncDir(dir string) error {
	if err := CheckName(dir, true); err != nil {
		return err
	}
	f, err := d.root.Open(dir)
	if err != nil {
		return wrap("sync directory", dir, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !info.IsDir() {
		return fmt.Errorf("sync directory %s: not a directory: %w", dir, atoll.ErrInvalid)
	}
	err = f.Sync()
	if errors.Is(err, unix.EINVAL) { // a file system without such a thing
		return nil
	}
	return wrap("sync directory", dir, err)
}

// Lock takes an exclusive lock (flock) on name and writes this process's id
// into it for whoever meets the lock.
func (d *Dir) Lock(name string) (io.Closer, error) {
	if err := CheckName(name, false); err != nil {
		return nil, err
	}
	f, err := d.root.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, wrap("lock", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s in %s: %w: held by %s", name, d.path, atoll.ErrBusy, holder(f))
		}
		return nil, wrap("lock", name, err)
	}
	l := &dirLock{f: f}
	if err := l.note(strconv.Itoa(os.Getpid()) + "\n"); err != nil && !errors.Is(err, unix.ENOSPC) {
		f.Close()
		return nil, wrap("lock", name, err)
	}
	return l, nil
}

// holder tells who has written its process id into a lock file.
func holder(f *os.File) string {
	var b [32]byte
	n, _ := f.ReadAt(b[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	switch {
	case err != nil:
		return "another process"
	case pid == os.Getpid():
		return "this process (pid " + strconv.Itoa(pid) + ")"
	}
	return "process " + strconv.Itoa(pid)
}

// dirLock is a held lock file.
type dirLock struct {
	f    *os.File
	once sync.Once
	err  error
}

// note replaces the text in the lock file.
func (l *dirLock) note(text string) error {
	if err := l.f.Truncate(0); err != nil {
		return err
	}
	_, err := l.f.WriteAt([]byte(text), 0)
	return err
}

// Close gives the lock back. The file stays: removing it would let two
// processes hold locks on two files of one name.
func (l *dirLock) Close() error {
	l.once.Do(func() {
		l.note("")
		l.err = l.f.Close()
	})
	return l.err
}

// Space returns the file system's size and what this user may still fill.
func (d *Dir) Space() (total, free int64, err error) {
	f, err := d.root.Open(".")
	if err != nil {
		return 0, 0, wrap("ask space of", d.path, err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, 0, wrap("ask space of", d.path, err)
	}
	bsize := int64(st.Bsize)
	if st.Frsize > 0 {
		bsize = int64(st.Frsize)
	}
	// What is reserved for the system is neither used nor to be had: counting it
	// would make a disk look full too early. df counts in the same way.
	used := int64(st.Blocks) - int64(st.Bfree)
	return (used + int64(st.Bavail)) * bsize, int64(st.Bavail) * bsize, nil
}

// WholeFlush reports whether syncing one file flushes the write cache of the
// whole disk, so that a sync also covers completed direct writes to other files
// whose blocks were allocated and written before. That is so for ext4 and xfs.
func (d *Dir) WholeFlush() bool {
	var st unix.Statfs_t
	if err := unix.Statfs(d.path, &st); err != nil {
		return false
	}
	return st.Type == unix.EXT4_SUPER_MAGIC || st.Type == unix.XFS_SUPER_MAGIC
}
