package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func page(n uint64) *host.Buffer {
	b := host.Alloc(atoll.BlockSize)
	for i := 0; i < atoll.BlockSize; i += 8 {
		binary.LittleEndian.PutUint64(b.Bytes()[i:], n)
	}
	return b
}

// rounds makes tests shorter where the race detector slows them down.
func rounds(n int) int {
	if atoll.Invariants {
		return n / 4
	}
	return n
}

// Writes all over a large volume: more leaves than may stay in memory.
func TestScattered(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		seeds(t, 2, func(t *testing.T, seed uint64) {
			rng := rand.New(rand.NewPCG(seed, 9))
			const size = 3 << 30
			s := newMemStore(size, seed)
			o := Options{Mode: mode, MapBytes: 1, CheckpointBytes: 3 << 20, FlushDelay: time.Millisecond}
			v := mustOpen(t, s, o)
			want := map[int64]uint64{}
			ctx := t.Context()
			got := make([]byte, atoll.BlockSize)
			for i := range uint64(rounds(5000)) {
				p := rng.Int64N(size / atoll.BlockSize)
				if rng.IntN(2) == 0 {
					p = p / (fan * 32) * fan * 32
				}
				switch rng.IntN(40) {
				default:
					b := page(i + 1)
					no(t, v.Write(ctx, b, b.Bytes(), p*atoll.BlockSize, false))
					b.Release()
					want[p] = i + 1
				case 0, 1, 2, 3, 4:
					no(t, v.Read(ctx, got, p*atoll.BlockSize))
					if n := binary.LittleEndian.Uint64(got); n != want[p] {
						t.Fatalf("page %d has %d, want %d", p, n, want[p])
					}
				case 5:
					n := min(1+rng.Int64N(20000), size/atoll.BlockSize-p)
					no(t, v.Discard(ctx, p*atoll.BlockSize, n*atoll.BlockSize, false))
					for q := range want {
						if q >= p && q < p+n {
							delete(want, q)
						}
					}
				case 6:
					if rng.IntN(20) == 0 {
						no(t, v.Flush(ctx))
						s = s.crash()
						v.Abort()
						v = mustOpen(t, s, o)
					}
				}
			}
			no(t, v.Verify(ctx))
			if st := v.Stats(); st.MapBytes > minMapBytes+(128<<10) || st.MappedBlocks != int64(len(want)) {
				t.Errorf("%d bytes of map in memory, %d pages mapped, want at most %d and %d", st.MapBytes, st.MappedBlocks, minMapBytes, len(want))
			}
			for p, n := range want {
				no(t, v.Read(ctx, got, p*atoll.BlockSize))
				if g := binary.LittleEndian.Uint64(got); g != n {
					t.Fatalf("page %d has %d, want %d", p, g, n)
				}
			}
			no(t, v.Close(ctx))
		})
	}
}

// Many goroutines write overlapping ranges, whole and part pages; every page
// must be from one write, in memory and after a crash.
func TestOverlappingWrites(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		s := newMemStore(1<<20, 5)
		s.lazy = true
		v := mustOpen(t, s, Options{Mode: mode, CheckpointBytes: 1 << 20, CacheBytes: 1 << 20, DirtyBytes: 128 << 10, FlushDelay: time.Millisecond})
		stop := make(chan struct{})
		var acker, wg sync.WaitGroup
		acker.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					s.ack(3)
					time.Sleep(10 * time.Microsecond)
				}
			}
		})
		var count atomic.Uint64
		for w := range 8 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 5))
				ctx := t.Context()
				buf := make([]byte, 8*atoll.BlockSize)
				for range 150 {
					p := rng.Int64N(20)
					n := 1 + rng.Int64N(8)
					var err error
					switch rng.IntN(8) {
					default:
						b := host.Alloc(int(n) * atoll.BlockSize)
						fill(b.Bytes(), count.Add(1))
						err = v.Write(ctx, b, b.Bytes(), p*atoll.BlockSize, rng.IntN(8) == 0)
						b.Release()
					case 0:
						err = v.Discard(ctx, p*atoll.BlockSize, n*atoll.BlockSize, false)
					case 1, 2:
						err = v.Read(ctx, buf[:n*atoll.BlockSize], p*atoll.BlockSize)
						if err == nil {
							err = whole(buf[:n*atoll.BlockSize])
						}
					case 3:
						err = v.Checkpoint(ctx)
					case 4:
						err = v.Flush(ctx)
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		ctx := t.Context()
		all := make([]byte, 64*atoll.BlockSize)
		no(t, v.Flush(ctx))
		no(t, v.Read(ctx, all, 0))
		no(t, whole(all))
		no(t, v.Verify(ctx))
		close(stop)
		acker.Wait()
		s.ack(1 << 20)
		s = s.crash()
		v.Abort()
		v = mustOpen(t, s, Options{})
		again := make([]byte, len(all))
		no(t, v.Read(ctx, again, 0))
		if i := diff(all, again); i >= 0 {
			t.Errorf("%v: page %d changed by a crash", mode, i/atoll.BlockSize)
		}
		no(t, v.Verify(ctx))
		no(t, v.Close(ctx))
	}
}

func fill(p []byte, n uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
}

func whole(p []byte) error {
	for i := 0; i < len(p); i += atoll.BlockSize {
		first := p[i : i+8]
		for j := i; j < i+atoll.BlockSize; j += 8 {
			if !bytes.Equal(p[j:j+8], first) {
				return fmt.Errorf("page %d is torn at byte %d: %x, %x", i/atoll.BlockSize, j-i, first, p[j:j+8])
			}
		}
	}
	return nil
}

// A background write that fails must be told by the next flush and by all
// later ones; full disks pass, and nothing is lost then.
func TestFailedFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemStore(1<<20, 1)
		s.used = 1
		v := mustOpen(t, s, Options{Mode: Writeback})
		ctx := t.Context()
		var mode atomic.Pointer[error]
		set := func(err error) { mode.Store(&err) }
		set(nil)
		s.fail = func(op string) error {
			if op == "submit" {
				return *mode.Load()
			}
			return nil
		}
		write := func(p int64, n uint64) error {
			b := page(n)
			defer b.Release()
			return v.Write(ctx, b, b.Bytes(), p*atoll.BlockSize, false)
		}
		set(atoll.ErrNoSpace)
		no(t, write(1, 1))
		if err := v.Flush(ctx); !errors.Is(err, atoll.ErrNoSpace) {
			t.Fatalf("flush to a full disk: %v, want ErrNoSpace", err)
		}
		no(t, write(1, 2))
		set(nil)
		no(t, v.Flush(ctx))
		got := make([]byte, atoll.BlockSize)
		no(t, v.Read(ctx, got, atoll.BlockSize))
		if n := binary.LittleEndian.Uint64(got); n != 2 {
			t.Errorf("page has %d after the disk was full, want 2", n)
		}
		set(atoll.ErrIO)
		no(t, write(2, 3))
		for range 3 {
			if err := v.Flush(ctx); !errors.Is(err, atoll.ErrIO) {
				t.Errorf("flush: %v, want ErrIO", err)
			}
			set(nil)
		}
		no(t, v.Read(ctx, got, 2*atoll.BlockSize))
		if n := binary.LittleEndian.Uint64(got); n != 3 {
			t.Errorf("page has %d, want what was acknowledged", n)
		}
		if err := write(3, 4); !errors.Is(err, atoll.ErrIO) {
			t.Errorf("write after a lost one: %v, want ErrIO", err)
		}
		if err := v.Close(ctx); !errors.Is(err, atoll.ErrIO) {
			t.Errorf("close: %v, want ErrIO", err)
		}
	})
}

// A checkpoint that fails at any append leaves everything as it was.
func TestFailedCheckpoint(t *testing.T) {
	for n := range 12 {
		s := newMemStore(3<<30, uint64(n))
		s.used = 1
		v := mustOpen(t, s, Options{})
		ctx := t.Context()
		write := func(round uint64) {
			for p := range int64(200) {
				b := page(uint64(p) + round<<32)
				no(t, v.Write(ctx, b, b.Bytes(), (p*1000+int64(round%3))*atoll.BlockSize, false))
				b.Release()
			}
		}
		write(1)
		no(t, v.Checkpoint(ctx))
		for round := uint64(2); round < 5; round++ {
			write(round)
			calls := 0
			s.mu.Lock()
			s.fail = func(string) error {
				if calls++; calls > n {
					return atoll.ErrNoSpace
				}
				return nil
			}
			s.mu.Unlock()
			_ = v.Checkpoint(ctx)
			s.mu.Lock()
			s.fail = nil
			s.mu.Unlock()
		}
		write(7)
		no(t, v.Verify(ctx))
		s = s.crash()
		v.Abort()
		v = mustOpen(t, s, Options{})
		no(t, v.Verify(ctx))
		got := make([]byte, atoll.BlockSize)
		for p := range int64(200) {
			no(t, v.Read(ctx, got, (p*1000+1)*atoll.BlockSize))
			if g := binary.LittleEndian.Uint64(got); g != uint64(p)+7<<32 {
				t.Fatalf("page %d has %x", p*1000+1, g)
			}
		}
		no(t, v.Close(ctx))
	}
}

// A write that is on its way when a checkpoint takes its mark must be in the
// root: it is not replayed.
func TestCheckpointWaitsForWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemStore(1<<20, 1)
		v := mustOpen(t, s, Options{})
		ctx := t.Context()
		s.mu.Lock()
		s.lazy = true
		s.mu.Unlock()
		var wg sync.WaitGroup
		wg.Go(func() {
			b := page(1)
			defer b.Release()
			no(t, v.Write(ctx, b, b.Bytes(), 0, false))
		})
		synctest.Wait()
		wg.Go(func() { no(t, v.Checkpoint(ctx)) })
		for range 10 {
			synctest.Wait()
			s.ack(1)
		}
		wg.Wait()
		s.mu.Lock()
		s.lazy = false
		s.mu.Unlock()
		s = s.crash()
		v.Abort()
		v = mustOpen(t, s, Options{})
		got := make([]byte, atoll.BlockSize)
		no(t, v.Read(ctx, got, 0))
		if binary.LittleEndian.Uint64(got) != 1 {
			t.Error("the write is lost")
		}
		no(t, v.Close(ctx))
	})
}

func TestReadAhead(t *testing.T) {
	s := newMemStore(8<<20, 1)
	v := mustOpen(t, s, Options{CacheBytes: 8 << 20})
	defer v.Abort()
	ctx := t.Context()
	p := make([]byte, 8<<20)
	for i := range p {
		p[i] = byte(i >> 9)
	}
	no(t, v.Write(ctx, nil, p, 0, false))
	got := make([]byte, 4*atoll.BlockSize)
	for off := 0; off < len(p); off += len(got) {
		no(t, v.Read(ctx, got, int64(off)))
		if i := diff(got, p[off:off+len(got)]); i >= 0 {
			t.Fatalf("byte %d is wrong", off+i)
		}
		for { // until the helper rests
			v.ahead.mu.Lock()
			busy := v.ahead.busy
			v.ahead.mu.Unlock()
			if busy == 0 {
				break
			}
			time.Sleep(20 * time.Microsecond)
		}
	}
	if st := v.Stats(); st.BlocksAhead < 1800 || st.CacheHits < 1800 {
		t.Errorf("%d blocks of 2048 read ahead, %d found", st.BlocksAhead, st.CacheHits)
	}
}

func TestNoAllocations(t *testing.T) {
	if atoll.Invariants {
		t.Skip("the race detector allocates")
	}
	s := newMemStore(64<<20, 1)
	s.noCrash, s.segSize = true, 60000
	v := mustOpen(t, s, Options{CacheBytes: 4 << 20, CheckpointBytes: 1 << 40})
	defer v.Abort()
	ctx := context.Background()
	b := page(1)
	defer b.Release()
	pages := make([]byte, 16<<20)
	for i := range pages {
		pages[i] = byte(i>>12) | 1
	}
	no(t, v.Write(ctx, nil, pages, 0, false))
	check := func(what string, fn func()) {
		t.Helper()
		if n := hosttest.Allocs(500, fn); n != 0 {
			t.Errorf("%s: %.1f allocations", what, n)
		}
	}
	i := int64(0)
	check("write", func() { i = (i + 7) % 4096; no(t, v.Write(ctx, b, b.Bytes(), i*atoll.BlockSize, false)) })
	dst := make([]byte, atoll.BlockSize)
	check("read, not cached", func() { i = (i + 1531) % 4096; no(t, v.Read(ctx, dst, i*atoll.BlockSize)) })
	check("read, cached", func() { no(t, v.Read(ctx, dst, 5*atoll.BlockSize)) })
	check("read of a hole", func() { no(t, v.Read(ctx, dst, 60<<20)) })
	big := make([]byte, 256<<10)
	check("read of 256 KiB", func() { no(t, v.Read(ctx, big, 40<<20)) })
}

// golden compares with testdata, which stays readable for ever.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	want, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		no(t, os.MkdirAll("testdata", 0o755))
		no(t, os.WriteFile(path, got, 0o644))
		t.Fatalf("%s was missing and is written", path)
	}
	no(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s: the format changed", path)
	}
}

func TestGoldenFormats(t *testing.T) {
	top := make([]topEntry, 11)
	top[2] = topEntry{loc: atoll.MakeLocation(7, 8, 9), birth: 10}
	top[10] = topEntry{loc: atoll.MakeLocation(1<<31, 65535, 65535), birth: 1<<32 - 1}
	info := rootInfo{Medium: 0x0123456789abcdef, Size: 11 << 30, Epoch: 77, Mapped: 123456}
	root := encodeRoot(info, top)
	golden(t, "v1.root", root)
	r, top2, err := decodeRoot(root)
	no(t, err)
	if r != info || len(top2) != 11 || top2[2] != top[2] || top2[10] != top[10] {
		t.Errorf("root reads as %+v, %+v", r, top2)
	}
	nd := &node{birth: 5}
	for k := range nd.locs {
		nd.locs[k], nd.births[k] = atoll.MakeLocation(atoll.Ordinal(k), atoll.BlockNo(k*3), uint16(k*5)), uint32(k*7)
	}
	p := make([]byte, nodeBlocks*atoll.BlockSize)
	encodeNode(p, 0x0123456789abcdef, 3, nd)
	golden(t, "v1.node", p)
	nd2, err := decodeNode(p, 0x0123456789abcdef, 3)
	no(t, err)
	if nd2.locs != nd.locs || nd2.births != nd.births || nd2.birth != 5 {
		t.Error("node reads differently")
	}
	if got := checkBits(0xdeadbeef, 0x0123456789abcdef, 42); got != checkGolden {
		t.Errorf("check bits are %#x, were %#x", got, checkGolden)
	}
}

const checkGolden = 0xa6c8

func FuzzRoot(f *testing.F) {
	f.Add(encodeRoot(rootInfo{Medium: 1, Size: 4096, Epoch: 1, Event: 3, Flat: true}, make([]topEntry, 1)))
	f.Add([]byte("ATVR"))
	f.Fuzz(func(t *testing.T, p []byte) {
		if r, top, err := decodeRoot(p); err == nil {
			if !bytes.Equal(encodeRoot(r, top), p) {
				t.Log("another encoding of a valid root")
			}
		}
	})
}

func FuzzNode(f *testing.F) {
	p := make([]byte, nodeBlocks*atoll.BlockSize)
	encodeNode(p, 1, 2, &node{})
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) { _, _ = decodeNode(p, 1, 2) })
}

// A page whose entry failed, and that was written again in an entry that did
// not, must not come back when the rest of the failed entry is sent again.
func TestFailedEntryDoesNotRevert(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemStore(1<<20, 1)
		s.used = 1
		s.lazy = true
		v := mustOpen(t, s, Options{Mode: Writeback})
		ctx := t.Context()
		write := func(p int64, n uint64) {
			b := page(n)
			defer b.Release()
			no(t, v.Write(ctx, b, b.Bytes(), p*atoll.BlockSize, false))
		}
		for p := range int64(132) { // two entries of 66 records
			write(p, 1)
		}
		flushed := make(chan error)
		go func() { flushed <- v.Flush(ctx) }()
		synctest.Wait()
		if n := s.waiting(); n != 2 {
			t.Fatalf("%d entries are on their way, want 2", n)
		}
		write(100, 2) // while its old contents are in the second
		s.ack(1)
		synctest.Wait()
		if n := s.waiting(); n != 2 {
			t.Fatalf("%d entries are on their way, want the second and the new one", n)
		}
		s.refuse(atoll.ErrNoSpace)
		s.ack(1)
		if err := <-flushed; !errors.Is(err, atoll.ErrNoSpace) {
			t.Errorf("flush: %v, want ErrNoSpace", err)
		}
		s.mu.Lock()
		s.lazy = false
		s.mu.Unlock()
		no(t, v.Flush(ctx))
		got := make([]byte, atoll.BlockSize)
		check := func(when string) {
			t.Helper()
			no(t, v.Read(ctx, got, 100*atoll.BlockSize))
			if n := binary.LittleEndian.Uint64(got); n != 2 {
				t.Errorf("page 100 has %d %s, want 2", n, when)
			}
		}
		check("after the flush")
		s = s.crash()
		v.Abort()
		v = mustOpen(t, s, Options{})
		check("after a crash")
		no(t, v.Close(ctx))
	})
}

// Where there is no room for data, what takes none goes on: discards, and
// resizes in both directions.
func TestFullResize(t *testing.T) {
	s := newMemStore(1<<30, 1)
	v := mustOpen(t, s, Options{})
	ctx := t.Context()
	no(t, v.Write(ctx, nil, make([]byte, 1<<20), 0, false))
	s.setFail(func(op string) error {
		if op == "full" {
			return atoll.ErrNoSpace
		}
		return nil
	})
	for _, size := range []int64{2 << 30, 1 << 28, 1 << 29} {
		no(t, v.Resize(ctx, size))
		if v.Size() != size || s.Info().Size != size {
			t.Fatalf("it has %d bytes, the catalog says %d, want %d", v.Size(), s.Info().Size, size)
		}
	}
	no(t, v.Discard(ctx, 0, 1<<20, false))
	s = s.crash()
	v.Abort()
	v = mustOpen(t, s, Options{})
	no(t, v.Checkpoint(ctx)) // until then leaves that are not in memory count as before
	if v.Size() != 1<<29 || v.Stats().MappedBlocks != 0 {
		t.Fatalf("after a crash it has %d bytes and %d pages", v.Size(), v.Stats().MappedBlocks)
	}
	no(t, v.Close(ctx))
}

// Writers for whom writeback has no room get in in the order in which they came.
func TestRoomInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemStore(64<<20, 1)
		s.lazy = true
		v := mustOpen(t, s, Options{Mode: Writeback, DirtyBytes: 16 * atoll.BlockSize})
		ctx := t.Context()
		no(t, v.Write(ctx, nil, make([]byte, 16*atoll.BlockSize), 0, false))
		var order []int
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				short := ctx
				if i == 2 { // it gives up, and holds up nobody
					c, cancel := context.WithTimeout(ctx, time.Millisecond)
					defer cancel()
					short = c
				}
				n := []int{20, 1, 3}[i%3]
				err := v.Write(short, nil, make([]byte, n*atoll.BlockSize), int64(100*(i+1))*atoll.BlockSize, false)
				if (err != nil) != (i == 2) {
					t.Errorf("writer %d: %v", i, err)
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
			})
			synctest.Wait()
		}
		got := func() int {
			mu.Lock()
			defer mu.Unlock()
			return len(order)
		}
		for got() < 8 {
			time.Sleep(10 * time.Millisecond)
			s.ack(1)
			synctest.Wait()
		}
		wg.Wait()
		if want := []int{2, 0, 1, 3, 4, 5, 6, 7}; !slices.Equal(order, want) {
			t.Errorf("they got in in the order %v, want %v", order, want)
		}
		s.mu.Lock()
		s.lazy = false
		s.mu.Unlock()
		s.ack(100)
		no(t, v.Close(ctx))
	})
}
