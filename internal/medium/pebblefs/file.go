package pebblefs

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// file is an open file or directory. It implements vfs.File: writes and syncs
// come one at a time, reads at any time.
type file struct {
	fs          *FS
	ino         *inode
	name        string
	read, write bool
	hot         bool  // its blocks go to the hot lane
	readAt      int64 // for Read
	writeAt     int64 // for Write
	closed      bool
}

var _ vfs.File = (*file)(nil)

// Close implements vfs.File. It does not sync.
func (f *file) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.closed {
		return pathError("close", f.name, os.ErrClosed)
	}
	f.closed = true
	ino := f.ino
	if ino.dir {
		return nil
	}
	if ino.opens--; ino.opens > 0 {
		return nil
	}
	if !ino.dirty {
		ino.win = nil
	}
	for _, e := range ino.held {
		f.fs.give(delta{e.ordinal, 0, -1})
	}
	ino.held = nil
	return nil
}

// Read implements io.Reader.
func (f *file) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.readAt)
	f.readAt += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

// source is a part of a read: memory that was copied already, zeros, or blocks.
type source struct {
	at, n int64 // in the file
	ext   extent
	ok    bool // ext holds it; else it is zeros
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if !f.read || f.ino.dir {
		return 0, pathError("read", f.name, os.ErrInvalid)
	}
	if off < 0 {
		return 0, pathError("read", f.name, os.ErrInvalid)
	}
	var list [16]source
	n, sources := f.fs.plan(f.ino, p, off, list[:0])
	ctx, cancel := f.fs.wait()
	defer cancel()
	for _, s := range sources {
		if err := f.fs.readRun(ctx, s, p[s.at-off:][:s.n]); err != nil {
			return 0, fmt.Errorf("read file %s at %d: %w", f.name, s.at, err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// plan copies to p what is in memory and lists where the rest is.
func (fs *FS) plan(ino *inode, p []byte, off int64, list []source) (int, []source) {
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	end := min(off+int64(len(p)), ino.size)
	winEnd := ino.winAt + int64(len(ino.win))
	for at := off; at < end; {
		if at >= ino.winAt && at < winEnd {
			at += int64(copy(p[at-off:end-off], ino.win[at-ino.winAt:]))
			continue
		}
		e, ok := ino.run(uint64(at / atoll.BlockSize))
		stop := min(end, (int64(e.first)+int64(e.blocks))*atoll.BlockSize)
		if at < ino.winAt && len(ino.win) > 0 {
			stop = min(stop, ino.winAt)
		}
		list = append(list, source{at, stop - at, e, ok})
		at = stop
	}
	return int(max(end-off, 0)), list
}

// readRun fills p from one run of blocks, or with zeros in a hole.
func (fs *FS) readRun(ctx context.Context, s source, p []byte) error {
	if !s.ok {
		clear(p)
		return nil
	}
	skip := int(s.at % atoll.BlockSize)
	block := s.ext.block
	for len(p) > 0 {
		n := min(skip+len(p), chunkBlocks*atoll.BlockSize)
		blocks := (n + atoll.BlockSize - 1) / atoll.BlockSize
		buf := host.Alloc(blocks * atoll.BlockSize)
		err := fs.m.Read(ctx, s.ext.ordinal, block, buf.Bytes())
		n = copy(p, buf.Bytes()[skip:])
		buf.Release()
		if err != nil {
			return err
		}
		p, skip, block = p[n:], 0, block+atoll.BlockNo(blocks)
	}
	return nil
}

// Write implements io.Writer. Data wait in memory until there is much of them,
// or Sync.
func (f *file) Write(p []byte) (int, error) {
	n, err := f.WriteAt(p, f.writeAt)
	f.writeAt += int64(n)
	return n, err
}

// WriteAt implements io.WriterAt.
func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if !f.write || off < 0 {
		return 0, pathError("write", f.name, os.ErrInvalid)
	}
	ctx, cancel := f.fs.wait()
	defer cancel()
	if err := acquire(ctx, f.ino.writer); err != nil {
		return 0, err
	}
	defer func() { <-f.ino.writer }()
	done := 0
	for done < len(p) {
		if err := f.position(ctx, off+int64(done)); err != nil {
			return done, err
		}
		done += f.fs.fill(f.ino, p[done:], off+int64(done))
		if len(f.ino.win) >= flushBytes {
			if err := f.flush(ctx, false); err != nil {
				return done, err
			}
		}
	}
	return done, nil
}

// fill copies to the window, which reaches up to off, as much as it may hold.
func (fs *FS) fill(ino *inode, p []byte, off int64) int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	at := int(off - ino.winAt)
	n := min(len(p), max(flushBytes-at, 0)+atoll.BlockSize)
	if grow := at + n - len(ino.win); grow > 0 {
		ino.win = append(ino.win, make([]byte, grow)...)
	}
	copy(ino.win[at:], p[:n])
	ino.dirty = true
	ino.size = max(ino.size, off+int64(n))
	ino.changed = time.Now()
	return n
}

// position moves the window so that off lies in it or at its end. The window
// begins at a block and holds what the file has of that block.
func (f *file) position(ctx context.Context, off int64) error {
	ino := f.ino
	if end := ino.winAt + int64(len(ino.win)); len(ino.win) > 0 && off >= ino.winAt && off <= end && off < ino.winAt+flushBytes {
		return nil
	}
	if ino.dirty {
		if err := f.flush(ctx, true); err != nil {
			return err
		}
		if ino.dirty { // of a removed file: all stays in memory
			return f.stretch(ctx, off)
		}
	}
	at := off &^ (atoll.BlockSize - 1)
	return f.load(ctx, at, off-at)
}

// load makes a new window at a block with its first n bytes.
func (f *file) load(ctx context.Context, at, n int64) error {
	win := make([]byte, n, max(n, 4*atoll.BlockSize))
	if err := f.readOld(ctx, win, at); err != nil {
		return err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	f.ino.win, f.ino.winAt, f.ino.dirty = win, at, false
	return nil
}

// readOld reads what the file holds; zeros beyond its end.
func (f *file) readOld(ctx context.Context, p []byte, at int64) error {
	n, sources := f.fs.plan(f.ino, p, at, nil)
	for _, s := range sources {
		if err := f.fs.readRun(ctx, s, p[s.at-at:][:s.n]); err != nil {
			return fmt.Errorf("read file %s at %d: %w", f.name, s.at, err)
		}
	}
	clear(p[n:])
	return nil
}

// stretch lets the window of a removed file reach off. Such files are closed
// soon and not worth more.
func (f *file) stretch(ctx context.Context, off int64) error {
	ino := f.ino
	lo := min(ino.winAt, off&^(atoll.BlockSize-1))
	hi := max(ino.winAt+int64(len(ino.win)), off)
	if hi-lo > 64<<20 {
		return pathError("write", f.name, atoll.ErrTooLarge)
	}
	win := make([]byte, hi-lo)
	if err := f.readOld(ctx, win, lo); err != nil {
		return err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	ino.win, ino.winAt = win, lo
	return nil
}

// Sync implements vfs.File: all operations on names and the data of this file
// are durable on return.
func (f *file) Sync() error {
	ctx, cancel := f.fs.wait()
	defer cancel()
	if f.ino.dir {
		return f.fs.commit(ctx, nil)
	}
	if err := acquire(ctx, f.ino.writer); err != nil {
		return err
	}
	defer func() { <-f.ino.writer }()
	if err := f.flush(ctx, true); err != nil {
		return err
	}
	return f.fs.commit(ctx, nil)
}

// syncFile is Sync without a handle.
func (fs *FS) syncFile(ctx context.Context, ino *inode) error {
	f := &file{fs: fs, ino: ino, read: true, write: true}
	if err := acquire(ctx, ino.writer); err != nil {
		return err
	}
	defer func() { <-ino.writer }()
	return f.flush(ctx, true)
}

// flush writes the window to the log: all of it, or whole blocks only. What is
// left of the last block stays in the window. The writer's place is held.
func (f *file) flush(ctx context.Context, all bool) error {
	ino := f.ino
	if !ino.dirty {
		return nil
	}
	if all {
		if err := f.completeBlock(ctx); err != nil {
			return err
		}
	}
	n := len(ino.win)
	if !all {
		n -= n % atoll.BlockSize
	}
	for at := 0; at < n; at += chunkBlocks * atoll.BlockSize {
		if err := f.writePiece(ctx, at, min(n, at+chunkBlocks*atoll.BlockSize)); err != nil {
			return err
		}
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if ino.links == 0 {
		return nil
	}
	whole := n - n%atoll.BlockSize
	ino.win = append(ino.win[:0], ino.win[whole:]...)
	ino.winAt += int64(whole)
	ino.dirty = !all && len(ino.win) > 0
	return nil
}

// completeBlock adds to a window that ends within the file what its last block
// holds beyond.
func (f *file) completeBlock(ctx context.Context) error {
	ino := f.ino
	end := ino.winAt + int64(len(ino.win))
	more := min(-end&(atoll.BlockSize-1), ino.size-end)
	if more <= 0 {
		return nil
	}
	rest := make([]byte, more)
	if err := f.readOld(ctx, rest, end); err != nil {
		return err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	ino.win = append(ino.win, rest...)
	return nil
}

// writePiece writes a part of the window, padded to whole blocks.
func (f *file) writePiece(ctx context.Context, from, to int) error {
	ino := f.ino
	blocks := (to - from + atoll.BlockSize - 1) / atoll.BlockSize
	buf := host.Alloc(blocks * atoll.BlockSize)
	defer buf.Release()
	clear(buf.Bytes()[copy(buf.Bytes(), ino.win[from:to]):])
	p := &piece{
		ino: ino, first: uint64(ino.winAt+int64(from)) / atoll.BlockSize, blocks: blocks,
		last: to - from - (blocks-1)*atoll.BlockSize, buf: buf,
	}
	if f.hot {
		return f.fs.commit(ctx, p)
	}
	f.fs.mu.RLock()
	err, gone := f.fs.mu.broken, ino.links == 0
	f.fs.mu.RUnlock()
	if err != nil || gone {
		return err
	}
	return f.fs.writeBulk(ctx, p)
}

// SyncData implements vfs.File.
func (f *file) SyncData() error { return f.Sync() }

// SyncTo implements vfs.File. It queues nothing: full windows go to the log
// anyway.
func (f *file) SyncTo(int64) (fullSync bool, err error) { return false, nil }

// Preallocate implements vfs.File. A log has nothing to allocate.
func (f *file) Preallocate(_, _ int64) error { return nil }

// Prefetch implements vfs.File.
func (f *file) Prefetch(_, _ int64) error { return nil }

// Fd implements vfs.File.
func (f *file) Fd() uintptr { return vfs.InvalidFd }

// Stat implements vfs.File.
func (f *file) Stat() (vfs.FileInfo, error) {
	f.fs.mu.RLock()
	defer f.fs.mu.RUnlock()
	return info{f.name, f.ino.size, f.ino.changed, f.ino.dir}, nil
}
