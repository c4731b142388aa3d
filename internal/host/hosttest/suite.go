package hosttest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// TestFS is the suite that every host.FS passes. open returns an empty one.
func TestFS(t *testing.T, open func() host.FS) {
	tests := []struct {
		name string
		test func(*testing.T, host.FS)
	}{
		{"Names", testNames},
		{"CreateOpen", testCreateOpen},
		{"Rename", testRename},
		{"Directories", testDirectories},
		{"ReadEnd", testReadEnd},
		{"WriteVec", testWriteVec},
		{"WriteVecLong", testWriteVecLong},
		{"Sizes", testSizes},
		{"Punch", testPunch},
		{"Closed", testClosed},
		{"Lock", testLock},
		{"Space", testSpace},
		{"Model", testModel},
		{"Concurrent", testConcurrent},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) { c.test(t, open()) })
	}
}

// fatal ends the test on an error.
func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// want checks an error's kind.
func want(t *testing.T, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("got %v, want %v", err, kind)
	}
}

// make creates a file.
func create(t *testing.T, fs host.FS, name string) host.File {
	t.Helper()
	f, err := fs.Create(name)
	fatal(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// block returns n aligned bytes that differ by seed.
func block(t *testing.T, n int, seed uint64) []byte {
	b := host.Alloc(n)
	t.Cleanup(b.Release)
	fill(b.Bytes(), seed)
	return b.Bytes()
}

func fill(p []byte, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}

// expect checks the whole contents of a file.
func expect(t *testing.T, f host.File, wanted []byte) {
	t.Helper()
	size, err := f.Size()
	fatal(t, err)
	got := make([]byte, size)
	if n, err := f.ReadAt(got, 0); err != nil || n != len(got) {
		t.Fatalf("read %d of %d bytes: %v", n, size, err)
	}
	if !bytes.Equal(got, wanted) {
		at := 0
		for at < min(len(got), len(wanted)) && got[at] == wanted[at] {
			at++
		}
		t.Fatalf("%d bytes, want %d; first difference at %d", len(got), len(wanted), at)
	}
}

func testNames(t *testing.T, fs host.FS) {
	for _, name := range []string{"", "/", "/a", "..", "../a", "a/..", "a/../b", ".", "./a", "a//b", "a/", "a\x00b"} {
		_, err := fs.Create(name)
		want(t, err, atoll.ErrInvalid)
		_, err = fs.Open(name)
		want(t, err, atoll.ErrInvalid)
		_, err = fs.Lock(name)
		want(t, err, atoll.ErrInvalid)
		want(t, fs.Remove(name), atoll.ErrInvalid)
		want(t, fs.Rename(name, "x"), atoll.ErrInvalid)
		want(t, fs.Rename("x", name), atoll.ErrInvalid)
		if name != "." {
			want(t, fs.Mkdir(name), atoll.ErrInvalid)
			want(t, fs.SyncDir(name), atoll.ErrInvalid)
			_, err = fs.List(name)
			want(t, err, atoll.ErrInvalid)
		}
	}
}

func testCreateOpen(t *testing.T, fs host.FS) {
	_, err := fs.Open("a")
	want(t, err, atoll.ErrNotExist)
	_, err = fs.Create("no/a")
	want(t, err, atoll.ErrNotExist)
	f := create(t, fs, "a")
	_, err = fs.Create("a")
	want(t, err, atoll.ErrExist)
	_, err = f.WriteAt([]byte("hello"), 0)
	fatal(t, err)
	g, err := fs.Open("a")
	fatal(t, err)
	defer g.Close()
	expect(t, g, []byte("hello"))
	fatal(t, fs.Remove("a"))
	want(t, fs.Remove("a"), atoll.ErrNotExist)
	expect(t, f, []byte("hello")) // an open file outlives its name
	_, err = fs.Create("a/b")
	want(t, err, atoll.ErrNotExist)
	fatal(t, fs.Mkdir("d"))
	_, err = fs.Open("d")
	want(t, err, atoll.ErrInvalid)
}

func testRename(t *testing.T, fs host.FS) {
	want(t, fs.Rename("a", "b"), atoll.ErrNotExist)
	f := create(t, fs, "a")
	_, err := f.WriteAt([]byte("one"), 0)
	fatal(t, err)
	create(t, fs, "b")
	fatal(t, fs.Rename("a", "b"))
	_, err = fs.Open("a")
	want(t, err, atoll.ErrNotExist)
	g, err := fs.Open("b")
	fatal(t, err)
	defer g.Close()
	expect(t, g, []byte("one"))
	fatal(t, fs.Mkdir("d"))
	want(t, fs.Rename("b", "no/b"), atoll.ErrNotExist)
	fatal(t, fs.Rename("b", "d/c"))
	fatal(t, fs.Rename("d/c", "d/c"))
	fatal(t, fs.SyncDir("d"))
	fatal(t, fs.SyncDir("."))
	entries, err := fs.List("d")
	fatal(t, err)
	if !slices.Equal(entries, []host.DirEntry{{Name: "c", Size: 3}}) {
		t.Errorf("entries %v", entries)
	}
	fatal(t, fs.Rename("d", "e"))
	h, err := fs.Open("e/c")
	fatal(t, err)
	h.Close()
}

func testDirectories(t *testing.T, fs host.FS) {
	_, err := fs.List("d")
	want(t, err, atoll.ErrNotExist)
	want(t, fs.SyncDir("d"), atoll.ErrNotExist)
	want(t, fs.Mkdir("d/e"), atoll.ErrNotExist)
	fatal(t, fs.Mkdir("d"))
	fatal(t, fs.Mkdir("d"))
	fatal(t, fs.Mkdir("."))
	fatal(t, fs.Mkdir("d/e"))
	for _, name := range []string{"d/b", "d/a", "d/c"} {
		create(t, fs, name)
	}
	want(t, fs.Mkdir("d/a"), atoll.ErrExist)
	want(t, fs.Remove("d"), atoll.ErrExist)
	entries, err := fs.List("d")
	fatal(t, err)
	wanted := []host.DirEntry{{Name: "a"}, {Name: "b"}, {Name: "c"}, {Name: "e", Dir: true}}
	if !slices.Equal(entries, wanted) {
		t.Errorf("entries %v", entries)
	}
	fatal(t, fs.Remove("d/e"))
	entries, err = fs.List(".")
	fatal(t, err)
	if !slices.Equal(entries, []host.DirEntry{{Name: "d", Dir: true}}) {
		t.Errorf("entries %v", entries)
	}
}

func testReadEnd(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	p := block(t, 3*4096, 1)
	if n, err := f.ReadAt(p, 0); n != 0 || err != io.EOF {
		t.Errorf("empty file: %d, %v", n, err)
	}
	data := block(t, 2*4096+100, 2)
	_, err := f.WriteAt(data, 0)
	fatal(t, err)
	for _, c := range []struct{ off, n int }{
		{0, 3 * 4096}, {4096, 2 * 4096}, {8192, 4096}, {8292, 1}, {8192, 100}, {8292, 4096}, {12288, 4096}, {1, 4095}, {4095, 2}, {8000, 1000},
	} {
		rest := data[min(c.off, len(data)):]
		wanted := rest[:min(c.n, len(rest))]
		n, err := f.ReadAt(p[:c.n], int64(c.off))
		if !bytes.Equal(p[:n], wanted) {
			t.Errorf("%d bytes at %d: got %d wrong ones", c.n, c.off, n)
		}
		if n < c.n && err != io.EOF || n == c.n && err != nil && err != io.EOF {
			t.Errorf("%d bytes at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	_, err = f.ReadAt(p, -1)
	want(t, err, atoll.ErrInvalid)
}

func testWriteVec(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	fatal(t, f.WriteVec(nil, 0, true))
	expect(t, f, nil)
	a, b, c := block(t, 4096, 1), block(t, 3*4096, 2), block(t, 2*4096, 3)
	fatal(t, f.WriteVec([][]byte{a, nil, b, {}, c}, 0, true))
	wanted := slices.Concat(a, b, c)
	expect(t, f, wanted)
	fatal(t, f.WriteVec([][]byte{c, a}, 4096, false))
	copy(wanted[4096:], slices.Concat(c, a))
	expect(t, f, wanted)
	odd := append([]byte{0}, wanted...)[1:] // memory that is not aligned
	fatal(t, f.WriteVec([][]byte{odd[:4096], odd[4096:5000], odd[5000:8192]}, 8192, true))
	copy(wanted[8192:], odd[:8192])
	expect(t, f, wanted)
	fatal(t, f.WriteVec([][]byte{{1, 2, 3}, {4}}, 4095, true))
	copy(wanted[4095:], []byte{1, 2, 3, 4})
	expect(t, f, wanted)
	fatal(t, f.WriteVec([][]byte{a}, 8*4096, true))
	wanted = append(append(wanted, make([]byte, 2*4096)...), a...)
	expect(t, f, wanted)
	want(t, f.WriteVec([][]byte{a}, -4096, true), atoll.ErrInvalid)
}

func testWriteVecLong(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	data := block(t, 1500*4096, 1)
	var v [][]byte
	for rest := data; len(rest) > 0; rest = rest[4096:] {
		v = append(v, rest[:4096])
	}
	fatal(t, f.WriteVec(v, 0, true))
	expect(t, f, data)
	odd := append(make([]byte, 0, len(data)+1), data...)
	fill(odd, 2)
	fatal(t, f.WriteVec([][]byte{odd[:5], odd[5:]}, 4096, false))
	expect(t, f, append(data[:4096:4096], odd...))
}

func testSizes(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	fatal(t, f.Truncate(10000))
	expect(t, f, make([]byte, 10000))
	_, err := f.WriteAt([]byte("x"), 20000)
	fatal(t, err)
	wanted := make([]byte, 20001)
	wanted[20000] = 'x'
	expect(t, f, wanted)
	fatal(t, f.Truncate(5))
	fatal(t, f.Truncate(20001))
	expect(t, f, make([]byte, 20001))
	fatal(t, f.Sync())
	fatal(t, f.Truncate(0))
	fatal(t, f.Sync())
	expect(t, f, nil)
	want(t, f.Truncate(-1), atoll.ErrInvalid)
}

func testPunch(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	data := block(t, 16*4096, 1)
	_, err := f.WriteAt(data, 0)
	fatal(t, err)
	wanted := bytes.Clone(data)
	for _, c := range []struct{ off, n int64 }{{4096, 8192}, {9 * 4096, 0}, {10 * 4096, 100}, {15 * 4096, 8192}} {
		err := f.Punch(c.off, c.n)
		if errors.Is(err, atoll.ErrUnsupported) {
			t.Skip("the file system cannot punch holes")
		}
		fatal(t, err)
		clear(wanted[c.off:min(c.off+c.n, int64(len(wanted)))])
		expect(t, f, wanted)
	}
	want(t, f.Punch(-4096, 4096), atoll.ErrInvalid)
}

func testClosed(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	fatal(t, f.Close())
	p := make([]byte, 10)
	_, err := f.ReadAt(p, 0)
	want(t, err, atoll.ErrClosed)
	_, err = f.WriteAt(p, 0)
	want(t, err, atoll.ErrClosed)
	want(t, f.WriteVec([][]byte{p}, 0, true), atoll.ErrClosed)
	want(t, f.Sync(), atoll.ErrClosed)
	want(t, f.Truncate(0), atoll.ErrClosed)
	want(t, f.Punch(0, 1), atoll.ErrClosed)
	_, err = f.Size()
	want(t, err, atoll.ErrClosed)
	want(t, f.Close(), atoll.ErrClosed)
}

func testLock(t *testing.T, fs host.FS) {
	l, err := fs.Lock("LOCK")
	fatal(t, err)
	_, err = fs.Lock("LOCK")
	want(t, err, atoll.ErrBusy)
	other, err := fs.Lock("OTHER")
	fatal(t, err)
	fatal(t, other.Close())
	fatal(t, l.Close())
	l, err = fs.Lock("LOCK")
	fatal(t, err)
	fatal(t, l.Close())
}

func testSpace(t *testing.T, fs host.FS) {
	total, free, err := fs.Space()
	fatal(t, err)
	if total <= 0 || free <= 0 || free > total {
		t.Errorf("total %d, free %d", total, free)
	}
}

// testModel compares random operations on a file with a slice of bytes.
func testModel(t *testing.T, fs host.FS) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			f := create(t, fs, fmt.Sprint("model", seed))
			m := model{t: t, f: f, rng: rand.New(rand.NewPCG(seed, 2)), mem: block(t, 64<<10, seed)}
			if seed%2 == 0 {
				m.grain = 4096
			}
			for range 150 {
				m.step()
			}
			expect(t, f, m.wanted)
		})
	}
}

// model is a file and what it should hold.
type model struct {
	t      *testing.T
	f      host.File
	rng    *rand.Rand
	mem    []byte
	grain  int // what offsets and sizes are multiples of; 0 for any
	wanted []byte
}

// pick returns a number below n.
func (m *model) pick(n int) int {
	if m.grain > 1 {
		return m.rng.IntN(n/m.grain) * m.grain
	}
	return m.rng.IntN(n)
}

func (m *model) step() {
	m.t.Helper()
	off, n := m.pick(256<<10), m.pick(32<<10)
	at := m.rng.IntN(2) * m.rng.IntN(4096) // memory that is aligned or not
	p := m.mem[at : at+n]
	switch m.rng.IntN(8) {
	case 0, 1:
		_, err := m.f.WriteAt(p, int64(off))
		fatal(m.t, err)
		m.put(p, off)
	case 2, 3:
		q := m.mem[:m.pick(8192)]
		fatal(m.t, m.f.WriteVec([][]byte{p, q}, int64(off), m.rng.IntN(4) == 0))
		m.put(slices.Concat(p, q), off)
	case 4:
		m.resize(off)
	case 5:
		fatal(m.t, m.f.Sync())
	default:
		got := make([]byte, n)
		k, err := m.f.ReadAt(got, int64(off))
		if k < n && err != io.EOF || k == n && err != nil && err != io.EOF {
			m.t.Fatalf("read %d at %d: %d, %v", n, off, k, err)
		}
		rest := m.wanted[min(off, len(m.wanted)):]
		if !bytes.Equal(got[:k], rest[:min(n, len(rest))]) {
			m.t.Fatalf("read %d at %d: wrong bytes", n, off)
		}
	}
}

func (m *model) resize(size int) {
	fatal(m.t, m.f.Truncate(int64(size)))
	if size <= len(m.wanted) {
		m.wanted = m.wanted[:size]
	} else {
		m.wanted = append(m.wanted, make([]byte, size-len(m.wanted))...)
	}
}

func (m *model) put(p []byte, off int) {
	if end := off + len(p); len(p) > 0 && end > len(m.wanted) {
		m.wanted = append(m.wanted, make([]byte, end-len(m.wanted))...)
	}
	if len(p) > 0 {
		copy(m.wanted[off:], p)
	}
}

func testConcurrent(t *testing.T, fs host.FS) {
	f := create(t, fs, "a")
	const workers, size = 8, 64 << 10
	var wg sync.WaitGroup
	for i := range workers {
		b := block(t, size, uint64(i))
		wg.Go(func() {
			for k := 0; k < size; k += 8192 {
				if err := f.WriteVec([][]byte{b[k : k+4096], b[k+4096 : k+8192]}, int64(i*size+k), k%3 == 0); err != nil {
					t.Error(err)
				}
			}
			if err := f.Sync(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	wanted := make([]byte, workers*size)
	for i := range workers {
		fill(wanted[i*size:][:size], uint64(i))
	}
	expect(t, f, wanted)
}
