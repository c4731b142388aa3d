package host

import "io"

// FS is a directory tree on one disk. Names are relative to its root, separated
// by slashes, and never lead out of it. All methods may be called concurrently.
//
// Errors are of the kinds in package atoll: ErrNotExist, ErrExist, ErrNoSpace,
// ErrReadOnly, ErrBusy (a lock that is held) and ErrIO for anything else.
type FS interface {
	// Open opens an existing regular file for reading and writing.
	Open(name string) (File, error)
	// Create makes a new empty file; ErrExist if there is one. The directory
	// entry is durable only after SyncDir.
	Create(name string) (File, error)
	// Rename moves a file, replacing newName if it exists, atomically. It is
	// durable only after SyncDir of both directories.
	Rename(oldName, newName string) error
	// Remove deletes a file or an empty directory; durable after SyncDir.
	Remove(name string) error
	// Mkdir makes a directory; no error if it exists. Durable after SyncDir of
	// its parent.
	Mkdir(name string) error
	// List returns the entries of a directory in ascending order of name.
	List(dir string) ([]DirEntry, error)
	// SyncDir makes the entries of dir durable.
	SyncDir(dir string) error
	// Lock takes an exclusive lock on name (made if absent) that ends with the
	// process or with Close; ErrBusy if another process or FS holds it.
	Lock(name string) (io.Closer, error)
	// Space returns the disk's size and what is free for this user, in bytes.
	Space() (total, free int64, err error)
}

// DirEntry is one name in a directory.
type DirEntry struct {
	Name string // last element only
	Dir  bool
	Size int64 // of a file, in bytes
}

// File is an open file. ReadAt, WriteAt and Sync may be called concurrently;
// Close may not run beside any other call.
//
// Where the disk can (see Direct), transfers whose memory, offset and length
// are multiples of 4096 bytes bypass the page cache. Others work too, slower.
type File interface {
	// ReadAt fills p from offset off. It returns io.EOF when fewer bytes are
	// there, and ErrIO-kind errors as the disk gives them.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes p at offset off, growing the file if needed. Durable only
	// after Sync.
	WriteAt(p []byte, off int64) (int, error)
	// WriteVec writes the slices one after another at offset off in as few
	// system calls as possible. It returns nil only when all was written. With
	// durable set, these data (and the size, if they lie beyond the former end)
	// are on stable storage on return, as after Sync of this file; what other
	// calls wrote before is not, unless synced. The slices are not kept.
	WriteVec(v [][]byte, off int64, durable bool) error
	// Sync makes data and size durable (fdatasync). After an error the file's
	// unsynced contents are unknown for ever: never call Sync again (S6).
	Sync() error
	// Truncate sets the size in bytes.
	Truncate(size int64) error
	// Punch frees the given range, which then reads as zeros. ErrUnsupported
	// where the file system cannot.
	Punch(off, n int64) error
	// Size returns the size in bytes.
	Size() (int64, error)
	// Direct reports whether aligned transfers bypass the page cache.
	Direct() bool
	// Close releases the file. It does not sync.
	Close() error
}
