package host

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/atollstore/atoll/internal/atoll"
)

// Buffer is memory for I/O: aligned to 4096 bytes, pooled, and counted, because
// the same bytes may be on their way to several disks at once. Whoever keeps a
// Buffer beyond a call holds a reference; the last Release returns it to the
// pool. In race builds a released buffer is overwritten, so that a late reader
// shows up as a checksum error.
type Buffer struct {
	mem   []byte // aligned, of the class's full size
	n     int
	class int
	refs  atomic.Int32
}

const (
	minClass = 12 // 4 KiB
	maxClass = 23 // 8 MiB
)

// pools holds free buffers by size class. It is a package variable because the
// memory of a process is one thing; it carries no state that a caller can see.
var pools [maxClass + 1]sync.Pool

// Alloc returns a buffer of n bytes with undefined contents and one reference.
// n is at most 8 MiB.
func Alloc(n int) *Buffer {
	if n < 0 || n > 1<<maxClass { // not passed to Assert: that would allocate
		atoll.Assert(false, "buffer of %d bytes", n)
	}
	class := max(minClass, bits.Len(uint(max(n, 1)-1)))
	b, _ := pools[class].Get().(*Buffer)
	if b == nil {
		raw := make([]byte, 1<<class+atoll.BlockSize-1)
		skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(raw))) & (atoll.BlockSize - 1))
		b = &Buffer{mem: raw[skip : skip+1<<class : skip+1<<class], class: class}
	}
	b.n = n
	b.refs.Store(1)
	return b
}

// Bytes returns the buffer's memory, of the length asked for. It is valid while
// the caller holds a reference.
func (b *Buffer) Bytes() []byte { return b.mem[:b.n] }

// SetLen changes the length within the capacity.
func (b *Buffer) SetLen(n int) {
	atoll.Assert(n >= 0 && n <= len(b.mem), "set length %d of a buffer of %d", n, len(b.mem))
	b.n = n
}

// Cap returns the capacity in bytes.
func (b *Buffer) Cap() int { return len(b.mem) }

// Retain adds a reference and returns b.
func (b *Buffer) Retain() *Buffer {
	n := b.refs.Add(1)
	atoll.Assert(n > 1, "retain of a released buffer")
	return b
}

// Release drops a reference. A nil buffer is ignored.
func (b *Buffer) Release() {
	if b == nil {
		return
	}
	n := b.refs.Add(-1)
	atoll.Assert(n >= 0, "buffer released twice")
	if n > 0 {
		return
	}
	if atoll.Invariants {
		for i := range b.mem {
			b.mem[i] = 0xDB
		}
	}
	pools[b.class].Put(b)
}

// Vec is an immutable list of slices over buffers, counted as a whole. It is
// how one batch is shared by the appends to several nodes without a copy.
type Vec struct {
	slices [][]byte
	bufs   []*Buffer
	size   int
	refs   atomic.Int32
	sound  atomic.Bool
}

var vecs = sync.Pool{New: func() any { return new(Vec) }}

// NewVec returns an empty Vec with one reference. Only its maker may Add, and
// only before sharing it.
func NewVec() *Vec {
	v := vecs.Get().(*Vec)
	v.refs.Store(1)
	return v
}

// Add appends p, which lies in b, and takes a reference on b. b may be nil for
// memory that outlives the Vec.
func (v *Vec) Add(b *Buffer, p []byte) {
	if b != nil {
		b.Retain()
		v.bufs = append(v.bufs, b)
	}
	v.slices = append(v.slices, p)
	v.size += len(p)
}

// Slices returns the parts in order. Neither the list nor the bytes may be
// changed.
func (v *Vec) Slices() [][]byte { return v.slices }

// Size returns the total length in bytes.
func (v *Vec) Size() int { return v.size }

// Sound reports whether SetSound was called. As the bytes never change, those
// who share a Vec need to verify its checksums only once.
func (v *Vec) Sound() bool { return v.sound.Load() }

// SetSound notes that the bytes were found to fit their checksums.
func (v *Vec) SetSound() { v.sound.Store(true) }

// Retain adds a reference and returns v.
func (v *Vec) Retain() *Vec {
	n := v.refs.Add(1)
	atoll.Assert(n > 1, "retain of a released vec")
	return v
}

// Release drops a reference; the last one releases the buffers.
func (v *Vec) Release() {
	if v == nil {
		return
	}
	n := v.refs.Add(-1)
	atoll.Assert(n >= 0, "vec released twice")
	if n > 0 {
		return
	}
	for i, b := range v.bufs {
		b.Release()
		v.bufs[i] = nil
	}
	clear(v.slices)
	v.sound.Store(false)
	v.slices, v.bufs, v.size = v.slices[:0], v.bufs[:0], 0
	vecs.Put(v)
}
