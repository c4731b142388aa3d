package host_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

// TestTogether writes to many files at once, in every way that Together knows,
// and reads back what each must hold.
func TestTogether(t *testing.T) {
	for name, fs := range map[string]host.FS{
		"direct":   openDir(t, host.DirOptions{}),
		"buffered": openDir(t, host.DirOptions{NoDirect: true}),
		"memory":   hosttest.NewDisk(1),
	} {
		t.Run(name, func(t *testing.T) {
			var w host.Together
			defer w.Close()
			for _, files := range []int{1, 2, 3, 40} {
				together(t, fs, &w, fmt.Sprintf("%s-%d", name, files), files)
			}
		})
	}
}

func together(t *testing.T, fs host.FS, w *host.Together, name string, files int) {
	ops := make([]host.WriteOp, files)
	want := make([][]byte, files)
	for i := range ops {
		f, err := fs.Create(fmt.Sprintf("%s-%d", name, i))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		buf := host.Alloc((2 + i%3) * atoll.BlockSize)
		t.Cleanup(buf.Release)
		for j := range buf.Bytes() {
			buf.Bytes()[j] = byte(i + j>>12)
		}
		b := buf.Bytes()
		want[i] = bytes.Clone(b)
		ops[i] = host.WriteOp{File: f, Vec: [][]byte{b[:atoll.BlockSize], b[atoll.BlockSize:]}, Off: int64(i%2) * atoll.BlockSize, Durable: i%5 == 4}
		if i%7 == 6 { // not whole blocks of memory
			ops[i].Vec = [][]byte{want[i][:100], want[i][100:]}
		}
	}
	w.Write(ops)
	for i := range ops {
		if ops[i].Err != nil {
			t.Fatalf("write %d of %d: %v", i, files, ops[i].Err)
		}
		got := make([]byte, len(want[i]))
		if _, err := ops[i].File.ReadAt(got, ops[i].Off); err != nil || !bytes.Equal(got, want[i]) {
			t.Fatalf("file %d of %d does not hold what was written (%v)", i, files, err)
		}
	}
}

// TestTogetherErrors checks that each write has an outcome of its own.
func TestTogetherErrors(t *testing.T) {
	fs := openDir(t, host.DirOptions{})
	var w host.Together
	defer w.Close()
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	ops := make([]host.WriteOp, 4)
	for i := range ops {
		f, err := fs.Create(fmt.Sprint("f", i))
		if err != nil {
			t.Fatal(err)
		}
		ops[i] = host.WriteOp{File: f, Vec: [][]byte{buf.Bytes()}}
		if i == 1 {
			f.Close()
		} else {
			defer f.Close()
		}
	}
	ops[3].Off = -atoll.BlockSize
	w.Write(ops)
	for i, kind := range []error{nil, atoll.ErrClosed, nil, atoll.ErrInvalid} {
		if !errors.Is(ops[i].Err, kind) {
			t.Errorf("write %d: %v, want %v", i, ops[i].Err, kind)
		}
	}
}
