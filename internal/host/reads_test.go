package host

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

// numbered makes a file whose blocks begin with their number.
func numbered(t *testing.T, d *Dir, blocks int) File {
	t.Helper()
	f, err := d.Create("numbered")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	buf := Alloc(blocks * atoll.BlockSize)
	defer buf.Release()
	clear(buf.Bytes())
	for i := range blocks {
		binary.LittleEndian.PutUint64(buf.Bytes()[i*atoll.BlockSize:], uint64(i))
	}
	if _, err := f.WriteAt(buf.Bytes(), 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestReads lets many goroutines, more than go into the kernel at once, read
// through one Reads, and beyond its end. On a quick disk few of them are at it at
// one time, so the test counts as readers, too.
func TestReads(t *testing.T) {
	const blocks, readers, rounds = 512, 2 * readsDepth, 40
	r := NewReads()
	if r == nil {
		t.Skip("the kernel has no asynchronous reads")
	}
	d, err := OpenDirWith(t.TempDir(), DirOptions{Reads: r})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f := numbered(t, d, blocks)
	r.under.Add(readsAlone)
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			buf := Alloc(4 * atoll.BlockSize)
			defer buf.Release()
			for range rounds {
				n := 1 + rng.IntN(4)
				b, at := buf.Bytes()[:n*atoll.BlockSize], rng.IntN(blocks+2)
				got, err := f.ReadAt(b, int64(at)*atoll.BlockSize)
				if want := max(0, min(n, blocks-at)); got != want*atoll.BlockSize || err != nil != (want < n) || want < n && !errors.Is(err, io.EOF) {
					t.Errorf("read of %d blocks at %d of %d: %d bytes, %v", n, at, blocks, got, err)
					return
				}
				for k := range got / atoll.BlockSize {
					if no := binary.LittleEndian.Uint64(b[k*atoll.BlockSize:]); no != uint64(at+k) {
						t.Errorf("block %d holds %d", at+k, no)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	r.under.Add(-readsAlone)
	if d.Direct() && !r.used() {
		t.Error("no reads went together")
	}
	r.Close()
	buf := Alloc(atoll.BlockSize)
	defer buf.Release()
	if _, err := f.ReadAt(buf.Bytes(), 7*atoll.BlockSize); err != nil || buf.Bytes()[0] != 7 {
		t.Errorf("read after the end of Reads: block %d, %v", buf.Bytes()[0], err)
	}
}

// used reports whether anything was ever sent.
func (r *Reads) used() bool {
	for i := range r.ops {
		if r.ops[i].block.size > 0 {
			return true
		}
	}
	return false
}

// TestReadsErrors: what the kernel refuses is read in the plain way, which gives
// the error.
func TestReadsErrors(t *testing.T) {
	r := NewReads()
	if r == nil {
		t.Skip("the kernel has no asynchronous reads")
	}
	defer r.Close()
	buf := Alloc(atoll.BlockSize)
	defer buf.Release()
	if r.read(1<<20, buf.Bytes(), 0) {
		t.Error("a read of a file that is not open succeeded")
	}
	d, err := OpenDirWith(t.TempDir(), DirOptions{Reads: r})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f := numbered(t, d, 2)
	r.under.Store(readsAlone) // as if others were reading
	if n, err := f.ReadAt(buf.Bytes(), 2*atoll.BlockSize); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read at the end: %d bytes, %v", n, err)
	}
	if _, err := f.ReadAt(buf.Bytes(), atoll.BlockSize); err != nil || buf.Bytes()[0] != 1 {
		t.Errorf("read of block 1: %d, %v", buf.Bytes()[0], err)
	}
	if a := testing.AllocsPerRun(100, func() { f.ReadAt(buf.Bytes(), 0) }); a > 0 {
		t.Errorf("%v allocations for a read", a)
	}
	r.under.Store(0)
}
