package transfer_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
	"github.com/atollstore/atoll/internal/transfer/transfertest"
)

// bounded refuses images that a test should not make.
func bounded(op string, n int64) error {
	if (op == "resize" || op == "create") && n > 16<<20 {
		return atoll.ErrTooLarge
	}
	return nil
}

// fuzzBase is an image with a version s1.
func fuzzBase(t testing.TB) *transfertest.Image {
	t.Helper()
	m := transfertest.New(20000)
	for _, err := range []error{m.Write([]byte("one"), 5000), m.Snapshot("s1", false)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// FuzzImportDiff: any bytes are applied as a whole, or change nothing and say
// why with a number.
func FuzzImportDiff(f *testing.F) {
	m := fuzzBase(f)
	if err := errors.Join(m.Write([]byte("two"), 9000), m.Discard(4096, 4096), m.Snapshot("s2", true)); err != nil {
		f.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := transfer.ExportDiff(f.Context(), m, transfer.Diff{From: "s1", To: "s2"}, &b, transfer.ExportOptions{}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte("rbd diff v1\ns\x00\x10\x00\x00\x00\x00\x00\x00e"))
	f.Fuzz(func(t *testing.T, p []byte) {
		target := fuzzBase(t)
		target.Fail = bounded
		before, _ := target.Bytes("")
		_, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(p), transfer.ImportOptions{})
		after, _ := target.Bytes("")
		if err != nil && (!bytes.Equal(before, after) || rbdstream.Errno(err) == 0) {
			t.Fatalf("changed in spite of %v", err)
		}
	})
}

// FuzzImportImage: any bytes make an image as a whole, or none.
func FuzzImportImage(f *testing.F) {
	var b bytes.Buffer
	if _, err := transfer.ExportImage(f.Context(), fuzzBase(f), &b, transfer.ExportOptions{Checksum: true}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, p []byte) {
		pool := &transfertest.Pool{Name: "x", Fail: bounded}
		_, err := transfer.ImportImage(t.Context(), pool, bytes.NewReader(p), transfer.ImportOptions{})
		if (err == nil) != (pool.Get("x") != nil) || err != nil && rbdstream.Errno(err) == 0 {
			t.Fatalf("an image in spite of %v", err)
		}
	})
}

// FuzzSums: any checksum file is understood or refused.
func FuzzSums(f *testing.F) {
	dir := f.TempDir()
	path := filepath.Join(dir, "out")
	file, err := transfer.CreateFile(path, transfer.FileOptions{Checksum: true, NoSync: true})
	if err == nil {
		_, err = file.Write([]byte("hello"))
		err = file.Finish(err)
	}
	if err != nil {
		f.Fatal(err)
	}
	sums, err := os.ReadFile(path + ".crc32c")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sums)
	f.Fuzz(func(t *testing.T, p []byte) {
		path := filepath.Join(t.TempDir(), "out")
		if err := errors.Join(os.WriteFile(path, []byte("hello"), 0o600), os.WriteFile(path+".crc32c", p, 0o600)); err != nil {
			t.Fatal(err)
		}
		err := transfer.VerifyFile(t.Context(), path, 1)
		if err != nil && !errors.Is(err, atoll.ErrCorrupt) {
			t.Fatal(err)
		}
	})
}
