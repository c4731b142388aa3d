package host_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// openDir opens a directory of the test's own.
func openDir(t testing.TB, opts host.DirOptions) *host.Dir {
	t.Helper()
	d, err := host.OpenDirWith(t.TempDir(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestDirFS(t *testing.T) {
	if !openDir(t, host.DirOptions{}).Direct() {
		t.Log("direct transfers are not possible here")
	}
	hosttest.TestFS(t, func() host.FS { return openDir(t, host.DirOptions{}) })
}

func TestDirFSBuffered(t *testing.T) {
	hosttest.TestFS(t, func() host.FS { return openDir(t, host.DirOptions{NoDirect: true}) })
}

func TestDirFSTmpfs(t *testing.T) {
	if _, err := os.Stat("/dev/shm"); err != nil {
		t.Skip("no tmpfs")
	}
	path, err := os.MkdirTemp("/dev/shm", "atoll")
	if err != nil {
		t.Skip(err)
	}
	defer os.RemoveAll(path)
	hosttest.TestFS(t, func() host.FS {
		d, err := host.OpenDir(mkdir(t, path))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	})
}

func mkdir(t *testing.T, under string) string {
	path, err := os.MkdirTemp(under, "fs")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpenDirAbsent(t *testing.T) {
	_, err := host.OpenDir(filepath.Join(t.TempDir(), "no"))
	if !errors.Is(err, atoll.ErrNotExist) || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}

func TestOpenDirLeavesNothing(t *testing.T) {
	d := openDir(t, host.DirOptions{})
	if entries, err := d.List("."); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestSymlinkDoesNotLeadOut(t *testing.T) {
	d := openDir(t, host.DirOptions{})
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(d.Path(), "link")); err != nil {
		t.Fatal(err)
	}
	if f, err := d.Open("link"); err == nil {
		f.Close()
		t.Error("opened a file outside")
	}
}

func TestLockTellsHolder(t *testing.T) {
	d := openDir(t, host.DirOptions{})
	l, err := d.Lock("LOCK")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	other, err := host.OpenDir(d.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err = other.Lock("LOCK"); !errors.Is(err, atoll.ErrBusy) || !strings.Contains(err.Error(), "pid") {
		t.Error(err)
	}
}

// TestDirectStays checks that files of blocks stay direct, and that the others
// work in both ways.
func TestDirectStays(t *testing.T) {
	d := openDir(t, host.DirOptions{})
	if !d.Direct() {
		t.Skip("direct transfers are not possible here")
	}
	f, err := d.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 8192+1)[1:]
	f.WriteAt(p, 0)
	f.WriteVec([][]byte{p[:5], p[5:]}, 4096, true)
	f.ReadAt(p[:7], 3)
	if !f.Direct() {
		t.Error("memory that is not aligned ended direct transfer")
	}
	f.WriteAt(p[:7], 4090)
	if f.Direct() {
		t.Error("a write of 7 bytes was direct")
	}
}

// TestWriteAllocatesNothing guards the hot path.
func TestWriteAllocatesNothing(t *testing.T) {
	if atoll.Invariants {
		t.Skip("pools do not work in this build")
	}
	d := openDir(t, host.DirOptions{})
	f, err := d.Create("a")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := host.Alloc(8192)
	defer b.Release()
	v := [][]byte{b.Bytes()[:4096], b.Bytes()[4096:]}
	if n := hosttest.Allocs(50, func() {
		if err := f.WriteVec(v, 0, false); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(b.Bytes(), 0); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkWriteVec measures durable writes of 8 KiB one after another.
func BenchmarkWriteVec(b *testing.B) {
	const size, step = 64 << 20, 8192
	for _, c := range []struct {
		name     string
		prewrite bool
		opts     host.DirOptions
	}{
		{"direct/prewritten", true, host.DirOptions{}},
		{"direct/growing", false, host.DirOptions{}},
		{"buffered/prewritten", true, host.DirOptions{NoDirect: true}},
		{"buffered/growing", false, host.DirOptions{NoDirect: true}},
	} {
		b.Run(c.name, func(b *testing.B) {
			d := openDir(b, c.opts)
			f, err := d.Create("slot")
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			if c.prewrite {
				fillZero(b, f, size)
			}
			p := host.Alloc(step)
			defer p.Release()
			v := [][]byte{p.Bytes()[:4096], p.Bytes()[4096:]}
			b.SetBytes(step)
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if err := f.WriteVec(v, off, true); err != nil {
					b.Fatal(err)
				}
				if off += step; off == size {
					off = 0
				}
			}
		})
	}
}

func fillZero(b *testing.B, f host.File, size int64) {
	p := host.Alloc(1 << 20)
	defer p.Release()
	clear(p.Bytes())
	for off := int64(0); off < size; off += 1 << 20 {
		if _, err := f.WriteAt(p.Bytes(), off); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
}
