package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// volModel holds a volume against plain memory. For each page it knows every
// content it may have after a crash: the one of the last flush and all later.
type volModel struct {
	t     *testing.T
	rng   *rand.Rand
	store *memStore              // nil over a real medium
	next  func(crash bool) Store // the store after a crash or a clean end
	opts  Options
	v     *Volume
	data  []byte
	may   map[int][][]byte // page → contents allowed beside the present one
	count uint64
}

func newVolModel(t *testing.T, seed uint64, size int64, o Options) *volModel {
	m := &volModel{t: t, rng: rand.New(rand.NewPCG(seed, 3)), store: newMemStore(size, seed), opts: o, data: make([]byte, size), may: map[int][][]byte{}}
	m.next = func(bool) Store {
		m.store = m.store.crash()
		return m.store
	}
	m.v = mustOpen(t, m.store, o)
	return m
}

func (m *volModel) span(align bool) (off, n int64) {
	size := int64(len(m.data))
	off = m.rng.Int64N(size)
	if m.rng.IntN(2) == 0 {
		off = off % 5 * size / 5
	}
	n = 1 + m.rng.Int64N(5*atoll.BlockSize)
	if m.rng.IntN(12) == 0 {
		n = 1 + m.rng.Int64N(3<<20)
	}
	n = min(n, size-off)
	if align {
		off = off / atoll.BlockSize * atoll.BlockSize
		n = min((n+atoll.BlockSize-1)/atoll.BlockSize*atoll.BlockSize, size-off)
	}
	return off, n
}

// changed notes the present contents of pages before they change.
func (m *volModel) changing(off, n int64) {
	if m.v.Mode() == Writethrough {
		return
	}
	r := span(off, n)
	for p := int(r.from); p < int(r.to); p++ {
		m.may[p] = append(m.may[p], bytes.Clone(m.data[p*atoll.BlockSize:][:atoll.BlockSize]))
	}
}

func (m *volModel) write(ctx context.Context) {
	off, n := m.span(m.rng.IntN(3) > 0)
	buf := host.Alloc(int(n))
	p := buf.Bytes()
	m.count++
	for i := range p {
		p[i] = byte(m.count*31 + uint64(i)/7)
	}
	if n >= 8 {
		binary.LittleEndian.PutUint64(p, m.count)
	}
	m.changing(off, n)
	copy(m.data[off:], p)
	b := buf
	if m.rng.IntN(4) == 0 {
		b = nil
	}
	fua := m.rng.IntN(10) == 0
	no(m.t, m.v.Write(ctx, b, p, off, fua))
	if fua {
		clear(m.may)
	}
	buf.Release()
}

func (m *volModel) compare(off, n int64) {
	got := make([]byte, n)
	no(m.t, m.v.Read(m.t.Context(), got, off))
	if i := diff(got, m.data[off:off+n]); i >= 0 {
		m.t.Fatalf("byte %d is %#x, want %#x", off+int64(i), got[i], m.data[off+int64(i)])
	}
}

func diff(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func (m *volModel) step() {
	ctx := m.t.Context()
	switch m.rng.IntN(40) {
	default:
		m.write(ctx)
	case 0, 1, 2, 3, 4, 5, 6, 7, 8:
		off, n := m.span(false)
		m.compare(off, n)
	case 9, 10, 11:
		off, n := m.span(m.rng.IntN(2) == 0)
		m.changing(off, n)
		clear(m.data[off : off+n])
		if m.rng.IntN(2) == 0 {
			no(m.t, m.v.Discard(ctx, off, n, false))
		} else {
			no(m.t, m.v.Zero(ctx, off, n, true, false))
		}
	case 12, 13:
		no(m.t, m.v.Flush(ctx))
		clear(m.may)
	case 14:
		no(m.t, m.v.Checkpoint(ctx))
	case 15:
		m.resize(ctx)
	case 16:
		m.extents(ctx)
	case 17:
		if m.rng.IntN(2) == 0 {
			m.crash()
		}
	case 18:
		no(m.t, m.v.Close(ctx))
		clear(m.may)
		m.v = mustOpen(m.t, m.next(false), m.opts)
	}
}

func (m *volModel) resize(ctx context.Context) {
	size := (1 + m.rng.Int64N(3<<10)) * atoll.BlockSize
	no(m.t, m.v.Flush(ctx))
	clear(m.may)
	no(m.t, m.v.Resize(ctx, size))
	if old := int64(len(m.data)); size <= old {
		m.data = m.data[:size:size]
	} else {
		m.data = append(m.data, make([]byte, size-old)...)
	}
	if m.v.Size() != size || m.v.store.Info().Size != size {
		m.t.Fatalf("size is %d, record %d, want %d", m.v.Size(), m.v.store.Info().Size, size)
	}
}

// extents must cover the range, and holes must be zeros.
func (m *volModel) extents(ctx context.Context) {
	off, n := m.span(false)
	at, last := off, -1
	no(m.t, m.v.Extents(ctx, off, n, func(size int64, hole bool) bool {
		kind := 0
		if hole {
			kind = 1
			if i := diff(m.data[at:at+size], make([]byte, size)); i >= 0 {
				m.t.Fatalf("hole at %d of %d bytes has data at %d", at, size, at+int64(i))
			}
		}
		if kind == last {
			m.t.Fatalf("neighbours at %d are of one kind", at)
		}
		last = kind
		at += size
		return true
	}))
	if at != off+n {
		m.t.Fatalf("extents of [%d, %d) end at %d", off, off+n, at)
	}
}

// crash reopens what was acknowledged. What was not flushed may be lost, page by
// page, but nothing else may be there.
func (m *volModel) crash() {
	s := m.next(true)
	m.v.Abort()
	m.v = mustOpen(m.t, s, m.opts)
	if m.v.Size() != int64(len(m.data)) {
		m.t.Fatalf("size is %d after a crash, want %d", m.v.Size(), len(m.data))
	}
	got := make([]byte, len(m.data))
	no(m.t, m.v.Read(m.t.Context(), got, 0))
	for p := range len(got) / atoll.BlockSize {
		g, w := got[p*atoll.BlockSize:][:atoll.BlockSize], m.data[p*atoll.BlockSize:][:atoll.BlockSize]
		ok := bytes.Equal(g, w)
		for _, old := range m.may[p] {
			ok = ok || bytes.Equal(g, old)
		}
		if !ok {
			m.t.Fatalf("page %d has contents after a crash that are neither flushed nor later (%d allowed)", p, len(m.may[p])+1)
		}
	}
	m.data = got
	clear(m.may)
}

func TestVolumeAgainstMemory(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		t.Run(mode.String(), func(t *testing.T) {
			seeds(t, uint64(rounds(10)), func(t *testing.T, seed uint64) {
				m := newVolModel(t, seed, 8<<20, Options{
					Mode: mode, CacheBytes: int64(seed%3) * (1 << 20), MapBytes: 1 + int64(seed%2)<<20,
					DirtyBytes: 256 << 10, FlushDelay: time.Millisecond, CheckpointBytes: 2 << 20,
				})
				for range 300 {
					m.step()
				}
				m.compare(0, int64(len(m.data)))
				no(t, m.v.Verify(t.Context()))
				m.crash()
				no(t, m.v.Verify(t.Context()))
				no(t, m.v.Close(t.Context()))
				if m.store.dropped == 0 {
					t.Errorf("seed %d: no segment was ever reclaimed", seed)
				}
			})
		})
	}
}

func TestErrors(t *testing.T) {
	s := newMemStore(1<<20, 1)
	v := mustOpen(t, s, Options{})
	ctx := t.Context()
	p := make([]byte, 8192)
	for name, err := range map[string]error{
		"read beyond":     v.Read(ctx, p, 1<<20-4096),
		"read before":     v.Read(ctx, p, -1),
		"write beyond":    v.Write(ctx, nil, p, 1<<20-4096, false),
		"discard beyond":  v.Discard(ctx, 0, 1<<20+1, false),
		"overflow":        v.Discard(ctx, 4096, 1<<63-1, false),
		"size 0":          v.Resize(ctx, 0),
		"size odd":        v.Resize(ctx, 4097),
		"size too large":  v.Resize(ctx, atoll.MaxVolumeSize+4096),
		"extents, beyond": v.Extents(ctx, 1<<20, 1, nil),
	} {
		if !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	no(t, v.Write(ctx, nil, p, 0, false))
	s.mu.Lock()
	s.invalid = true
	s.mu.Unlock()
	if err := v.Read(ctx, p, 0); !errors.Is(err, atoll.ErrFenced) {
		t.Errorf("read without a lease: %v, want ErrFenced", err)
	}
	v.Abort()
	if err := v.Read(ctx, p, 0); !errors.Is(err, atoll.ErrClosed) {
		t.Errorf("read after the end: %v, want ErrClosed", err)
	}
	ro := mustOpen(t, newMemStore(1<<20, 1), Options{ReadOnly: true})
	if err := ro.Write(ctx, nil, p, 0, false); !errors.Is(err, atoll.ErrReadOnly) {
		t.Errorf("write to a read-only volume: %v, want ErrReadOnly", err)
	}
	no(t, ro.Close(ctx))
}

// A block that is valid but not the one that was written must not be served.
func TestWrongBlockIsFound(t *testing.T) {
	s := newMemStore(1<<20, 1)
	v := mustOpen(t, s, Options{})
	defer v.Abort()
	p := bytes.Repeat([]byte{1}, 8192)
	p[4096] = 2
	no(t, v.Write(t.Context(), nil, p, 0, false))
	g := s.disk.segs[1].data
	a, b := bytes.Clone(g[4096:8192]), bytes.Clone(g[8192:12288])
	copy(g[4096:], b)
	copy(g[8192:], a)
	for off := range []int64{0, 4096} {
		if err := v.Read(t.Context(), p[:4096], int64(off)*4096); !errors.Is(err, atoll.ErrCorrupt) {
			t.Errorf("page %d of swapped blocks: %v, want ErrCorrupt", off, err)
		}
	}
}
