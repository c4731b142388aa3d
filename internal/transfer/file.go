package transfer

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
)

// FileOptions steer how an export's file is made.
type FileOptions struct {
	// Resume keeps the file of an export that failed, and beside it, in
	// PATH.resume, how far it came; the next export of the same contents with
	// Resume goes on there. Without it such a file is removed.
	Resume bool
	// ResumeEvery is after how many bytes the place is kept; 0 means 256 MiB.
	ResumeEvery int64
	// Checksum writes PATH.crc32c, the checksums by which VerifyFile tells
	// whether the file is as it was written.
	Checksum bool
	// NoSync leaves it to the system when the file reaches the disk.
	NoSync bool
}

// File is the target of an export: made by it, never one that was there before.
// One goroutine at a time may use it.
type File struct {
	o     FileOptions
	path  string
	f     *os.File
	raw   *os.File // the same past the system's cache, nil where that cannot be
	pos   int64    // where Write goes on
	sums  *sums    // nil without Checksum
	kind  string
	id    string
	place *mark // where an earlier export stopped, until it is taken up
	last  int64 // place of the last mark
	early int64 // what is before was handed to the disk
}

// earlyBytes is how much of a file is handed to the disk at once while it is
// written, so that the sync at the end finds little left to do.
const earlyBytes = 16 << 20

// mark is a place in an export at which it can go on.
type mark struct {
	Kind   string          `json:"kind"`
	ID     string          `json:"contents"`
	File   int64           `json:"file"`
	Sums   *sumState       `json:"sums,omitempty"`
	Next   int64           `json:"next"`
	Data   int64           `json:"data"`
	Zeroed int64           `json:"zeroed"`
	Diff   int             `json:"diff"`
	Stream *rbdstream.Mark `json:"stream,omitempty"`
}

// CreateFile makes the file of an export with mode 0644. It fails with ErrExist,
// leaving it alone, if path is there already, unless Resume is set and it is an
// unfinished export. Call Finish in any case.
func CreateFile(path string, o FileOptions) (*File, error) {
	if o.ResumeEvery <= 0 {
		o.ResumeEvery = 256 << 20
	}
	f := &File{o: o, path: path}
	flags := os.O_CREATE | os.O_EXCL
	if o.Resume {
		m, err := readMark(path + ".resume")
		if err != nil {
			return nil, err
		}
		if f.place = m; m != nil {
			flags = 0
		}
	}
	var err error
	f.f, err = os.OpenFile(path, os.O_WRONLY|flags, 0o644)
	switch {
	case os.IsExist(err):
		return nil, fmt.Errorf("export to %s: the file is there already; remove it or choose another name: %w", path, atoll.ErrExist)
	case os.IsNotExist(err) && f.place != nil:
		return nil, fmt.Errorf("resume export to %s: the file is gone, but %s.resume is there; remove that: %w", path, path, atoll.ErrNotExist)
	case os.IsNotExist(err):
		return nil, fmt.Errorf("export to %s: no such directory: %w", path, atoll.ErrNotExist)
	case os.IsPermission(err):
		return nil, fmt.Errorf("export to %s: %w", path, atoll.ErrDenied)
	case err != nil:
		return nil, fmt.Errorf("export to %s: %v: %w", path, err, atoll.ErrInvalid)
	}
	if o.Checksum {
		var from *sumState
		if f.place != nil {
			if from = f.place.Sums; from == nil {
				return nil, errors.Join(fmt.Errorf("resume export to %s: it was begun without checksums: %w", path, atoll.ErrInvalid), f.f.Close())
			}
		}
		if f.sums, err = openSums(path+sumsSuffix, from); err != nil {
			if f.place == nil {
				err = errors.Join(err, os.Remove(path))
			}
			return nil, errors.Join(err, f.f.Close())
		}
	}
	return f, nil
}

// readMark reads where an export stopped; nil if there is none.
func readMark(path string) (*mark, error) {
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	var m mark
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil || m.File < 0 || m.Next < 0 || m.Diff < 0 {
		return nil, fmt.Errorf("resume export: read %s: %v: %w", path, err, atoll.ErrInvalid)
	}
	return &m, nil
}

// identity names contents by all that an export of them depends on.
func identity(id string, more ...any) string {
	if id == "" {
		return ""
	}
	b, _ := json.Marshal(append([]any{id}, more...)) // of strings and numbers
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// begin says what is to be written and returns the place to begin at.
func (f *File) begin(kind, id string) (mark, error) {
	f.kind, f.id = kind, id
	if f.o.Resume && id == "" {
		return mark{}, fmt.Errorf("resume export to %s: what is exported may change meanwhile; export a version: %w", f.path, atoll.ErrUnsupported)
	}
	m := f.place
	if m == nil {
		return mark{}, nil
	}
	if m.Kind != kind || m.ID != id {
		return mark{}, fmt.Errorf("resume export to %s: it was begun with other contents or options; remove it and %s.resume: %w", f.path, f.path, atoll.ErrConflict)
	}
	st, err := f.f.Stat()
	if err != nil {
		return mark{}, writeErr(f.path, err)
	}
	if st.Size() < m.File {
		return mark{}, fmt.Errorf("resume export to %s: the file is shorter than it was; remove it and %s.resume: %w", f.path, f.path, atoll.ErrConflict)
	}
	if err := f.f.Truncate(m.File); err != nil {
		return mark{}, writeErr(f.path, err)
	}
	f.pos, f.last, f.place = m.File, m.File, nil
	return *m, nil
}

// due reports whether a mark is to be made when pos is reached.
func (f *File) due(pos int64) bool { return f.o.Resume && pos-f.last >= f.o.ResumeEvery }

// mark keeps the place m when it is time to: everything before it is durable
// first.
func (f *File) mark(m mark) error {
	if f.kind == "raw" {
		f.pos = m.Next
	}
	if !f.due(f.pos) {
		return nil
	}
	if f.kind == "raw" { // behind the last data there may be a hole
		if err := f.f.Truncate(f.pos); err != nil {
			return writeErr(f.path, err)
		}
	}
	m.Kind, m.ID, m.File = f.kind, f.id, f.pos
	if err := f.f.Sync(); err != nil {
		return writeErr(f.path, err)
	}
	if f.sums != nil {
		st, err := f.sums.state()
		if err != nil {
			return err
		}
		m.Sums = &st
	}
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("keep place of export: %w", err)
	}
	f.last = f.pos
	return replaceFile(f.path+".resume", b)
}

// replaceFile writes a small file so that a crash leaves the old or the new one.
func replaceFile(path string, b []byte) error {
	tmp, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return writeErr(path, err)
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return writeErr(path, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return writeErr(path, err)
	}
	return syncDir(path)
}

// syncDir makes the names in a file's directory durable.
func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return writeErr(path, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return writeErr(path, err)
	}
	return nil
}

// Write appends p. It makes File an io.Writer.
func (f *File) Write(p []byte) (int, error) {
	n, err := f.f.WriteAt(p, f.pos)
	if err != nil {
		return n, writeErr(f.path, err)
	}
	if f.sums != nil {
		if err := f.sums.add(f.pos, p); err != nil {
			return n, err
		}
	}
	f.pos += int64(n)
	f.startWriteback(f.pos)
	return n, nil
}

// startWriteback lets the system begin to write what was written up to pos. It is
// only a hint: an error shows at the sync.
func (f *File) startWriteback(pos int64) {
	if n := pos - f.early; !f.o.NoSync && n >= earlyBytes {
		_ = unix.SyncFileRange(int(f.f.Fd()), f.early, n, unix.SYNC_FILE_RANGE_WRITE)
		f.early = pos
	}
}

// writeSparse writes p at off, leaving out pages of zeros.
func (f *File) writeSparse(p []byte, off int64) (int64, error) {
	return dataRuns(p, off, func(p []byte, off int64) error {
		if _, err := f.f.WriteAt(p, off); err != nil {
			return writeErr(f.path, err)
		}
		f.startWriteback(off + int64(len(p)))
		if f.sums != nil {
			return f.sums.add(off, p)
		}
		return nil
	})
}

// anywhere gets the file, of size bytes, ready for writeAnywhere and reports
// whether that may be used: not while the order of writes matters, and not where
// the file is better left to the system's cache.
func (f *File) anywhere(size int64) (bool, error) {
	if f.o.Resume || f.o.NoSync || f.sums != nil {
		return false, nil
	}
	var err error
	if f.raw, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.f.Fd()), os.O_WRONLY|unix.O_DIRECT, 0); err != nil {
		return false, nil
	}
	// Writes within a file go side by side, those that make it longer do not.
	return true, f.setSize(size)
}

// writeAnywhere is writeSparse for several goroutines. The system's cache is
// passed by, which would copy all that is written and then hold it.
func (f *File) writeAnywhere(p []byte, off int64) (int64, error) {
	return dataRuns(p, off, func(p []byte, off int64) error {
		err := error(unix.EINVAL)
		if (int64(len(p))|off)%atoll.BlockSize == 0 {
			_, err = f.raw.WriteAt(p, off)
		}
		if errors.Is(err, unix.EINVAL) { // not these bytes, or not on this disk
			_, err = f.f.WriteAt(p, off)
		}
		if err != nil {
			return writeErr(f.path, err)
		}
		return nil
	})
}

// setSize makes the file as long as the image.
func (f *File) setSize(size int64) error {
	f.pos = size
	if err := f.f.Truncate(size); err != nil {
		return writeErr(f.path, err)
	}
	return nil
}

// Finish ends the export with the result err of what wrote the file, and
// returns it joined with its own. With a nil result the file is made durable
// and what helped to resume is removed. Otherwise the file is removed, or kept
// for the next try if that was asked for and there is something to go on from.
// A Finish of nil that fails counts as a failed export.
func (f *File) Finish(err error) error {
	if err == nil {
		err = f.complete()
	}
	err = errors.Join(err, f.close())
	if err == nil {
		return f.tidy()
	}
	if f.place != nil {
		return err // another export's file
	}
	if f.o.Resume && f.last > 0 {
		return fmt.Errorf("%w (repeat the command to go on)", err)
	}
	err = errors.Join(err, os.Remove(f.path))
	if f.o.Checksum {
		err = errors.Join(err, os.Remove(f.path+sumsSuffix))
	}
	return err
}

// complete writes the checksums and makes everything durable.
func (f *File) complete() error {
	if f.sums != nil {
		if err := f.sums.end(f.pos); err != nil {
			return err
		}
	}
	if f.o.NoSync {
		return nil
	}
	if err := f.f.Sync(); err != nil {
		return writeErr(f.path, err)
	}
	return syncDir(f.path)
}

func (f *File) close() error {
	var err error
	if f.sums != nil {
		err = f.sums.close()
	}
	if f.raw != nil {
		err = errors.Join(err, f.raw.Close())
	}
	if cerr := f.f.Close(); cerr != nil {
		err = errors.Join(err, writeErr(f.path, cerr))
	}
	return err
}

// tidy removes what helped to resume.
func (f *File) tidy() error {
	if !f.o.Resume {
		return nil
	}
	if err := os.Remove(f.path + ".resume"); err != nil && !os.IsNotExist(err) {
		return writeErr(f.path+".resume", err)
	}
	return nil
}
