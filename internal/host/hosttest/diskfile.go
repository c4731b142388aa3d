package hosttest

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// fileOp is a change of a file that is not durable yet.
type fileOp struct {
	seq  uint64
	kind fileOpKind
	off  int64 // the new size, for a change of size
	n    int64
	data []byte // n bytes; nil for zeros
}

type fileOpKind uint8

const (
	opData fileOpKind = iota
	opSize
	opHole
)

// zeroPage is what zeros are compared with.
var zeroPage [pageSize]byte

// allZero reports whether b is zeros.
func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), pageSize)
		if !bytes.Equal(b[:n], zeroPage[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// invert inverts what the change writes in a range.
func (op *fileOp) invert(off, n int64) {
	lo, hi := max(off, op.off), min(off+n, op.off+op.n)
	if op.kind != opData || lo >= hi {
		return
	}
	data := make([]byte, op.n)
	copy(data, op.data)
	for i := lo; i < hi; i++ {
		data[i-op.off] ^= 0xff
	}
	op.data = data
}

// part returns the part of a data change from lo to hi, in bytes of the file.
func (op fileOp) part(lo, hi int64) fileOp {
	if op.data != nil {
		op.data = op.data[lo-op.off : hi-op.off]
	}
	op.off, op.n = lo, hi-lo
	return op
}

// apply does the change to durable pages.
func (op fileOp) apply(p *pages) {
	switch {
	case op.kind == opHole:
		p.zero(op.off, op.n, true)
	case op.data == nil:
		p.zero(op.off, op.n, false)
	default:
		p.writeAt(op.data, op.off)
	}
}

// diskFile is an open file of a Disk.
type diskFile struct {
	d      *Disk
	ino    *inode
	closed atomic.Bool
}

var _ host.File = (*diskFile)(nil)

// enter checks the arguments of a call and applies the rules to it.
func (f *diskFile) enter(op host.Op, off, n int64) (host.Effect, error) {
	name := f.name()
	if f.closed.Load() {
		return host.Effect{}, fmt.Errorf("%s %s: %w", op, name, atoll.ErrClosed)
	}
	if off < 0 || n < 0 {
		return host.Effect{}, fmt.Errorf("%s %s: %d bytes at %d: %w", op, name, n, off, atoll.ErrInvalid)
	}
	return f.d.befall(op, name, off, n)
}

func (f *diskFile) name() string {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.ino.path
}

// elsewhere picks a block of the file other than the one at off.
func (f *diskFile) elsewhere(off int64, pick uint64) int64 {
	blocks := uint64(max(2, f.ino.liveSize/pageSize))
	at := int64(pick%blocks) * pageSize
	if at == off {
		at = int64((pick+1)%blocks) * pageSize
	}
	return at
}

// ReadAt fills p from offset off.
func (f *diskFile) ReadAt(p []byte, off int64) (int, error) {
	e, err := f.enter(host.OpRead, off, int64(len(p)))
	if err != nil || len(p) == 0 {
		return 0, err
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	n := int(max(0, min(int64(len(p)), f.ino.liveSize-off)))
	if e.Misdirect {
		off = f.elsewhere(off, e.Rand)
	}
	f.ino.live.readAt(p[:n], off, e.Stale)
	if e.Flip && n > 0 {
		bit := e.Rand % uint64(8*n)
		p[bit/8] ^= 1 << (bit % 8)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes p at offset off.
func (f *diskFile) WriteAt(p []byte, off int64) (int, error) {
	v := [1][]byte{p}
	if err := f.write(v[:], off, false); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteVec writes the slices one after another.
func (f *diskFile) WriteVec(v [][]byte, off int64, durable bool) error {
	return f.write(v, off, durable)
}

// size returns the bytes in v.
func size(v [][]byte) (n int64) {
	for _, p := range v {
		n += int64(len(p))
	}
	return n
}

// head returns the first n bytes of v.
func head(v [][]byte, n int64) (cut [][]byte) {
	for _, p := range v {
		m := min(int64(len(p)), n)
		cut, n = append(cut, p[:m]), n-m
	}
	return cut
}

// write writes v, and makes it durable if asked for. A write that fails has
// written some of its sectors.
func (f *diskFile) write(v [][]byte, off int64, durable bool) error {
	n := size(v)
	e, err := f.enter(host.OpWrite, off, n)
	if err != nil && e.Err == nil {
		return err
	}
	if e.Err != nil {
		f.store(head(v, int64(e.Rand%uint64(n/512+1))*512), off, false)
		return e.Err
	}
	if e.Drop || n == 0 {
		return nil
	}
	if e.Misdirect {
		f.d.mu.Lock()
		off = f.elsewhere(off, e.Rand)
		f.d.mu.Unlock()
	}
	if !durable {
		return f.store(v, off, false)
	}
	return f.writeDurable(v, off, n)
}

// writeDurable writes v and flushes it.
func (f *diskFile) writeDurable(v [][]byte, off, n int64) error {
	e, err := f.enter(host.OpSync, off, n)
	if err != nil {
		if e := f.store(v, off, false); e != nil {
			return e
		}
		f.d.mu.Lock()
		defer f.d.mu.Unlock()
		f.ino.trim(off, n)
		return err
	}
	done := f.d.point(host.OpWrite, f.name())
	if err := f.store(v, off, !e.Drop); err != nil {
		return err
	}
	done()
	return nil
}

// store changes the file as it reads, and as it is on the platter if durable.
func (f *diskFile) store(v [][]byte, off int64, durable bool) error {
	d, ino, n := f.d, f.ino, size(v)
	d.mu.Lock()
	defer d.mu.Unlock()
	add := ino.live.newRoom(off, n)
	if d.mu.used+add > d.mu.total {
		return fmt.Errorf("write %s: %d bytes at %d: %w", ino.path, n, off, atoll.ErrNoSpace)
	}
	ino.room, d.mu.used = ino.room+add, d.mu.used+add
	ino.live.keep, ino.safe.keep = d.mu.keep, d.mu.keep
	end := off + n
	if durable {
		ino.trim(off, n)
	}
	for _, p := range v {
		if durable {
			ino.writeBoth(p, off)
		} else if len(p) > 0 {
			d.mu.seq++
			ino.writeLive(p, off, d.mu.seq)
		}
		off += int64(len(p))
	}
	if end > ino.liveSize {
		ino.liveSize = end
		d.mu.seq++
		ino.pending = append(ino.pending, fileOp{seq: d.mu.seq, kind: opSize, off: end})
	}
	if durable && (end > ino.safeSize || ino.shrinks()) {
		ino.saveSizes()
	}
	if durable && d.mu.shared && (add > 0 || ino.grows()) {
		// The journal commits what is known of the file, and flushes.
		ino.save()
		d.flushAll()
	}
	return nil
}

// grows reports whether a pending change needs the journal.
func (ino *inode) grows() bool {
	for _, op := range ino.pending {
		if op.kind != opData || op.off+op.n > ino.safeSize || ino.safe.newRoom(op.off, op.n) > 0 {
			return true
		}
	}
	return false
}

// writeLive changes the file as it reads and notes the pending change.
func (ino *inode) writeLive(p []byte, off int64, seq uint64) {
	op := fileOp{seq: seq, kind: opData, off: off, n: int64(len(p))}
	if allZero(p) {
		ino.live.zero(off, op.n, false)
	} else {
		op.data = bytes.Clone(p)
		ino.live.writeAt(p, off)
	}
	ino.pending = append(ino.pending, op)
}

// writeBoth changes the file as it reads and as it is on the platter. Whole
// pages are shared by the two.
func (ino *inode) writeBoth(p []byte, off int64) {
	for len(p) > 0 {
		at := off % pageSize
		n := min(int64(len(p)), pageSize-at)
		switch {
		case n < pageSize:
			ino.live.writeAt(p[:n], off)
			ino.safe.writeAt(p[:n], off)
		case allZero(p[:n]) && !ino.live.keep:
			ino.live.zero(off, n, false)
			ino.safe.zero(off, n, false)
		default:
			pg := &page{prev: ino.live.history(ino.live.get(off / pageSize))}
			copy(pg.data[:], p)
			ino.live.set(off/pageSize, pg)
			ino.safe.set(off/pageSize, pg)
		}
		p, off = p[n:], off+n
	}
}

// trim takes a range out of the pending changes of data.
func (ino *inode) trim(off, n int64) {
	end := off + n
	overlap := false
	for _, op := range ino.pending {
		overlap = overlap || op.kind != opSize && op.off < end && off < op.off+op.n
	}
	if !overlap {
		return
	}
	var rest []fileOp
	for _, op := range ino.pending {
		if op.kind == opSize || op.off >= end || op.off+op.n <= off {
			rest = append(rest, op)
			continue
		}
		if op.off < off {
			rest = append(rest, op.part(op.off, off))
		}
		if op.off+op.n > end {
			rest = append(rest, op.part(end, op.off+op.n))
		}
	}
	ino.pending = rest
}

// shrinks reports whether a pending change makes the file smaller.
func (ino *inode) shrinks() bool {
	size := ino.safeSize
	for _, op := range ino.pending {
		if op.kind == opSize {
			if op.off < size {
				return true
			}
			size = op.off
		}
	}
	return false
}

// saveSizes makes the pending changes of size durable, and no data.
func (ino *inode) saveSizes() {
	var rest []fileOp
	for _, op := range ino.pending {
		if op.kind != opSize {
			rest = append(rest, op)
			continue
		}
		if op.off < ino.safeSize {
			ino.safe.cut(op.off)
			rest = cutOps(rest, op.off)
		}
		ino.safeSize = op.off
	}
	ino.pending = rest
}

// cutOps takes everything from size on out of changes of data.
func cutOps(ops []fileOp, size int64) []fileOp {
	rest := ops[:0]
	for _, op := range ops {
		if op.off+op.n > size && op.off < size {
			op = op.part(op.off, size)
		}
		if op.off < size {
			rest = append(rest, op)
		}
	}
	return rest
}

// Sync makes data and size durable.
func (f *diskFile) Sync() error {
	e, err := f.enter(host.OpSync, 0, 0)
	if err != nil {
		if e.Err != nil { // the pages count as clean now, and will not be written again
			f.d.mu.Lock()
			f.ino.pending = nil
			f.d.mu.Unlock()
		}
		return err
	}
	done := f.d.point(host.OpSync, f.name())
	if !e.Drop {
		f.d.mu.Lock()
		f.ino.save()
		if f.d.mu.shared {
			f.d.flushAll()
		}
		f.d.mu.Unlock()
	}
	done()
	return nil
}

// flush makes those pending changes of data durable that lie in durable,
// written pages. Those that come after a change of size or a hole wait for it.
func (ino *inode) flush() {
	if len(ino.pending) == 0 {
		return
	}
	var left []fileOp
	for i, op := range ino.pending {
		if op.kind != opData {
			left = append(left, ino.pending[i:]...)
			break
		}
		if op.off+op.n <= ino.safeSize && ino.safe.newRoom(op.off, op.n) == 0 {
			op.apply(&ino.safe)
		} else {
			left = append(left, op)
		}
	}
	ino.pending = left
}

// save makes all pending changes durable. Whole pages are taken from the file
// as it reads, which holds what the last of the changes left there.
func (ino *inode) save() {
	for _, op := range ino.pending {
		switch {
		case op.kind == opSize:
			if op.off < ino.safeSize {
				ino.safe.cut(op.off)
			}
			ino.safeSize = op.off
		case op.data == nil:
			op.apply(&ino.safe)
		default:
			ino.savePages(op)
		}
	}
	ino.pending = nil
	ino.live.own = new(owner) // what is shared now must not change in place
	ino.safe.own = new(owner)
}

// savePages makes a change of data durable.
func (ino *inode) savePages(op fileOp) {
	for op.n > 0 {
		n := min(op.n, pageSize-op.off%pageSize)
		if pg := ino.live.get(op.off / pageSize); n == pageSize && pg != nil {
			ino.safe.set(op.off/pageSize, pg)
		} else {
			op.part(op.off, op.off+n).apply(&ino.safe)
		}
		op = op.part(op.off+n, op.off+op.n)
	}
}

// Truncate sets the size in bytes.
func (f *diskFile) Truncate(size int64) error {
	if _, err := f.enter(host.OpTruncate, size, 0); err != nil {
		return err
	}
	d, ino := f.d, f.ino
	d.mu.Lock()
	defer d.mu.Unlock()
	if size < ino.liveSize {
		ino.live.cut(size)
		d.recount(ino)
	}
	ino.liveSize = size
	d.mu.seq++
	ino.pending = append(ino.pending, fileOp{seq: d.mu.seq, kind: opSize, off: size})
	return nil
}

// recount finds out how much room a file takes after it lost some.
func (d *Disk) recount(ino *inode) {
	room := min(ino.room, ino.live.room())
	d.mu.used += room - ino.room
	ino.room = room
}

// Punch frees a range.
func (f *diskFile) Punch(off, n int64) error {
	if _, err := f.enter(host.OpPunch, off, n); err != nil {
		return err
	}
	d, ino := f.d, f.ino
	d.mu.Lock()
	defer d.mu.Unlock()
	n = min(n, ino.liveSize-off)
	if n <= 0 {
		return nil
	}
	ino.live.zero(off, n, true)
	d.recount(ino)
	d.mu.seq++
	ino.pending = append(ino.pending, fileOp{seq: d.mu.seq, kind: opHole, off: off, n: n})
	return nil
}

// Size returns the size in bytes.
func (f *diskFile) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.closed.Load() {
		return 0, fmt.Errorf("ask size of %s: %w", f.ino.path, atoll.ErrClosed)
	}
	return f.ino.liveSize, nil
}

// Direct reports true: there is no page cache.
func (f *diskFile) Direct() bool { return true }

// Close releases the file.
func (f *diskFile) Close() error {
	if f.closed.Swap(true) {
		return fmt.Errorf("close %s: %w", f.name(), atoll.ErrClosed)
	}
	return nil
}
