package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
	"github.com/atollstore/atoll/internal/transfer/transfertest"
)

// must fails the test at an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rounds is how many seeds a test tries: few with -short.
func rounds(n int) int {
	if testing.Short() {
		return (n + 9) / 10
	}
	return n
}

// content makes n bytes, some pages of them zero.
func content(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for at := 0; at < n; at += atoll.BlockSize {
		if rng.IntN(5) == 0 {
			continue
		}
		fill := byte(rng.IntN(255) + 1)
		for i := at; i < min(at+atoll.BlockSize, n); i++ {
			p[i] = fill ^ byte(i)
		}
	}
	return p
}

// scribble changes an image in random ways.
func scribble(t *testing.T, rng *rand.Rand, m *transfertest.Image, size *int64, ops int) {
	t.Helper()
	for range ops {
		off := rng.Int64N(*size)
		n := min(rng.Int64N(1<<(1+rng.IntN(20))), *size-off)
		switch rng.IntN(10) {
		case 0:
			*size = 1 + rng.Int64N(12<<20)
			must(t, m.Resize(*size))
		case 1, 2:
			must(t, m.Discard(off, n))
		case 3: // the same again
			p, err := m.Bytes("")
			must(t, err)
			must(t, m.Write(p[off:off+n], off))
		case 4:
			off, n = off&^4095, min(n|4095+1, *size-off&^4095)
			must(t, m.Discard(off, n))
		default:
			must(t, m.Write(content(rng, int(n)), off))
		}
	}
}

// history makes an image with versions s1 to sN and a head beyond.
func history(t *testing.T, rng *rand.Rand, versions, ops int) *transfertest.Image {
	t.Helper()
	size := 1 + rng.Int64N(12<<20)
	m := transfertest.New(size)
	h := rbdstream.DefaultHeader()
	h.Meta = []rbdstream.Meta{{Key: "a", Value: "1"}, {Key: "conf_rbd_cache", Value: "false"}}
	m.SetHeader(h)
	for i := range versions {
		scribble(t, rng, m, &size, rng.IntN(ops))
		must(t, m.Snapshot(fmt.Sprintf("s%d", i+1), rng.IntN(3) == 0))
	}
	scribble(t, rng, m, &size, rng.IntN(ops))
	return m
}

// same compares all versions and heads of two images.
func same(t *testing.T, got, want *transfertest.Image) {
	t.Helper()
	gv, err := got.Versions(t.Context())
	must(t, err)
	wv, err := want.Versions(t.Context())
	must(t, err)
	if fmt.Sprint(gv) != fmt.Sprint(wv) {
		t.Fatalf("versions %v, want %v", gv, wv)
	}
	for _, v := range append(wv, transfer.Version{}) {
		g, err := got.Bytes(v.Name)
		must(t, err)
		w, err := want.Bytes(v.Name)
		must(t, err)
		if !bytes.Equal(g, w) {
			t.Fatalf("version %q differs (%d and %d bytes)", v.Name, len(g), len(w))
		}
	}
	gh, _ := got.Header(t.Context())
	wh, _ := want.Header(t.Context())
	gh.Skipped, gh.Summed = 0, false
	if fmt.Sprint(gh) != fmt.Sprint(wh) {
		t.Fatalf("header %+v, want %+v", gh, wh)
	}
}

func exportImage(t *testing.T, m transfer.Image, o transfer.ExportOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := transfer.ExportImage(t.Context(), m, &b, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func importImage(t *testing.T, stream []byte) *transfertest.Image {
	t.Helper()
	p := &transfertest.Pool{Name: "copy"}
	if _, err := transfer.ImportImage(t.Context(), p, bytes.NewReader(stream), transfer.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	return p.Get("copy")
}

func exportDiff(t *testing.T, m transfer.Image, d transfer.Diff) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := transfer.ExportDiff(t.Context(), m, d, &b, transfer.ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// name of version i of n; the last is the head.
func name(i, n int) string {
	if i == 0 || i > n {
		return ""
	}
	return fmt.Sprintf("s%d", i)
}

// Random histories go out and come in again with all versions, as an image and
// as a chain of diffs, and what is exported of the copy has the same bytes.
func TestHistories(t *testing.T) {
	for seed := range uint64(rounds(60)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 7))
			n := rng.IntN(5)
			m := history(t, rng, n, 6)
			stream := exportImage(t, m, transfer.ExportOptions{Concurrency: 1 + rng.IntN(12), Checksum: seed%2 == 0})
			c := importImage(t, stream)
			same(t, c, m)
			if again := exportImage(t, c, transfer.ExportOptions{Checksum: seed%2 == 0}); !bytes.Equal(again, stream) {
				t.Fatalf("the export of the copy has other bytes (%d and %d)", len(again), len(stream))
			}
			target := transfertest.New(0)
			for i := 1; i <= n+1; i++ {
				d := exportDiff(t, m, transfer.Diff{From: name(i-1, n), To: name(i, n), WholeObject: rng.IntN(3) == 0})
				if _, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(d), transfer.ImportOptions{}); err != nil {
					t.Fatalf("diff %d: %v", i, err)
				}
			}
			for i := 1; i <= n+1; i++ {
				g, err := target.Bytes(name(i, n))
				must(t, err)
				w, err := m.Bytes(name(i, n))
				must(t, err)
				if !bytes.Equal(g, w) {
					t.Fatalf("version %d differs after a chain of diffs", i)
				}
			}
		})
	}
}

// What was given back at either end of an image is in the diff.
func TestDiffOfEnds(t *testing.T) {
	for _, size := range []int64{5 << 20, 5<<20 + 1000} {
		m := transfertest.New(size)
		must(t, m.Write(bytes.Repeat([]byte{7}, int(size)), 0))
		must(t, m.Snapshot("s1", false))
		whole := exportDiff(t, m, transfer.Diff{To: "s1"})
		must(t, m.Discard(0, 8192))
		must(t, m.Discard(size-9192, 9192))
		d := exportDiff(t, m, transfer.Diff{From: "s1"})
		target := transfertest.New(0)
		for _, stream := range [][]byte{whole, d} {
			_, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(stream), transfer.ImportOptions{})
			must(t, err)
		}
		want, err := m.Bytes("")
		must(t, err)
		got, err := target.Bytes("")
		must(t, err)
		if want[0] != 0 || want[size-1] != 0 || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: the copy differs", size)
		}
	}
}

// Two diffs merged do what both did.
func TestMergedDiffs(t *testing.T) {
	for seed := range uint64(rounds(60)) {
		rng := rand.New(rand.NewPCG(seed, 8))
		const n = 3
		m := history(t, rng, n, 6)
		from := rng.IntN(n) // 0: the beginning
		to := from + 2      // n+1 never: head if n
		all := name(from, n) + "…" + name(to, n)
		a := exportDiff(t, m, transfer.Diff{From: name(from, n), To: name(from+1, n)})
		b := exportDiff(t, m, transfer.Diff{From: name(from+1, n), To: name(to, n)})
		var merged bytes.Buffer
		if err := rbdstream.Merge(&merged, bytes.NewReader(a), bytes.NewReader(b)); err != nil {
			t.Fatalf("seed %d %s: %v", seed, all, err)
		}
		target := transfertest.New(0)
		for i := 1; i <= from; i++ {
			d := exportDiff(t, m, transfer.Diff{From: name(i-1, n), To: name(i, n)})
			if _, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(d), transfer.ImportOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := transfer.ImportDiff(t.Context(), target, &merged, transfer.ImportOptions{}); err != nil {
			t.Fatalf("seed %d %s: %v", seed, all, err)
		}
		g, err := target.Bytes("")
		must(t, err)
		w, err := m.Bytes(name(to, n))
		must(t, err)
		if !bytes.Equal(g, w) {
			t.Fatalf("seed %d %s: the merged diff does something else", seed, all)
		}
	}
}

// A diff that is cut short anywhere, or fails anywhere, changes nothing; so
// does an image.
func TestNothingByHalves(t *testing.T) {
	m := transfertest.New(64 << 10)
	must(t, m.Write(bytes.Repeat([]byte{1}, 9000), 3000))
	must(t, m.Snapshot("s1", false))
	base := exportDiff(t, m, transfer.Diff{To: "s1"})
	must(t, m.Write(bytes.Repeat([]byte{2}, 5000), 20000))
	must(t, m.Discard(4096, 4096))
	must(t, m.Resize(70001))
	must(t, m.Snapshot("s2", false))
	diff := exportDiff(t, m, transfer.Diff{From: "s1", To: "s2"})
	stream := exportImage(t, m, transfer.ExportOptions{})

	target := transfertest.New(0)
	apply := func(p []byte) error {
		_, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(p), transfer.ImportOptions{})
		return err
	}
	must(t, apply(base))
	before := exportImage(t, target, transfer.ExportOptions{})
	unchanged := func(what string) {
		t.Helper()
		if !bytes.Equal(exportImage(t, target, transfer.ExportOptions{}), before) {
			t.Fatalf("%s: the image changed", what)
		}
	}
	// Everywhere near the ends, where the records are, and here and there within.
	next := func(n, all int) int {
		if n < 150 || n > all-150 {
			return n + 1
		}
		return n + 37
	}
	for n := 0; n < len(diff); n = next(n, len(diff)) {
		want := syscall.EBADMSG
		err := apply(diff[:n])
		if !errors.Is(err, atoll.ErrCorrupt) || rbdstream.Errno(err) != want {
			t.Fatalf("cut after %d of %d bytes: %v (%d)", n, len(diff), err, rbdstream.Errno(err))
		}
		unchanged(fmt.Sprintf("cut after %d bytes", n))
	}
	for _, op := range []string{"versions", "begin", "write", "zero", "resize", "commit"} {
		target.Fail = func(got string, _ int64) error {
			if got == op {
				return atoll.ErrNoSpace
			}
			return nil
		}
		if err := apply(diff); !errors.Is(err, atoll.ErrNoSpace) {
			t.Errorf("%s fails: %v", op, err)
		}
		target.Fail = nil
		unchanged(op + " fails")
	}
	must(t, apply(diff))

	pool := &transfertest.Pool{Name: "x"}
	for n := 0; n < len(stream); n = next(n, len(stream)) {
		_, err := transfer.ImportImage(t.Context(), pool, bytes.NewReader(stream[:n]), transfer.ImportOptions{})
		if !errors.Is(err, atoll.ErrCorrupt) || rbdstream.Errno(err) != syscall.EDOM || pool.Get("x") != nil {
			t.Fatalf("image cut after %d of %d bytes: %v", n, len(stream), err)
		}
	}
	for _, op := range []string{"create", "write", "zero", "snapshot", "resize", "commit"} {
		pool.Fail = func(got string, _ int64) error {
			if got == op {
				return atoll.ErrNoSpace
			}
			return nil
		}
		if _, err := transfer.ImportImage(t.Context(), pool, bytes.NewReader(stream), transfer.ImportOptions{}); !errors.Is(err, atoll.ErrNoSpace) || pool.Get("x") != nil {
			t.Errorf("image, %s fails: %v", op, err)
		}
	}
}

// Every refusal has its kind and rbd's number.
func TestDiffRefusals(t *testing.T) {
	m := transfertest.New(64 << 10)
	must(t, m.Write([]byte("one"), 0))
	must(t, m.Snapshot("s1", false))
	must(t, m.Write([]byte("two"), 8192))
	must(t, m.Snapshot("s2", false))
	first, second := exportDiff(t, m, transfer.Diff{To: "s1"}), exportDiff(t, m, transfer.Diff{From: "s1", To: "s2"})
	diff := func(fn func(w *rbdstream.Writer)) []byte {
		var b bytes.Buffer
		w := rbdstream.NewWriter(&b, rbdstream.WriterOptions{})
		fn(w)
		must(t, w.End())
		return b.Bytes()
	}
	fresh := func() *transfertest.Image { return transfertest.New(0) }
	based := func() *transfertest.Image {
		target := fresh()
		_, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(first), transfer.ImportOptions{})
		must(t, err)
		return target
	}
	dirty := func() *transfertest.Image {
		target := based()
		must(t, target.Write([]byte("other"), 60000))
		return target
	}
	for _, c := range []struct {
		name   string
		target *transfertest.Image
		stream []byte
		kind   error
		errno  syscall.Errno
	}{
		{"no start snapshot", fresh(), second, atoll.ErrNotExist, 22},
		{"end snapshot exists", based(), first, atoll.ErrExist, 17},
		{"head written", dirty(), second, atoll.ErrConflict, 22},
		{"head not empty", dirty(), diff(func(w *rbdstream.Writer) { _ = w.Size(1) }), atoll.ErrConflict, 22},
		{"beyond the end", fresh(), diff(func(w *rbdstream.Writer) { _ = w.Write(0, []byte{1}) }), atoll.ErrInvalid, 22},
		{"other banner", fresh(), []byte("rbd diff v3\n"), atoll.ErrInvalid, 22},
		{"banner of v2", fresh(), []byte("rbd diff v2\ne"), atoll.ErrInvalid, 22},
		{"an image", fresh(), exportImage(t, m, transfer.ExportOptions{}), atoll.ErrInvalid, 22},
	} {
		before, err := c.target.Bytes("")
		must(t, err)
		_, err = transfer.ImportDiff(t.Context(), c.target, bytes.NewReader(c.stream), transfer.ImportOptions{})
		if !errors.Is(err, c.kind) || rbdstream.Errno(err) != c.errno {
			t.Errorf("%s: %v (%d)", c.name, err, rbdstream.Errno(err))
		}
		if after, _ := c.target.Bytes(""); !bytes.Equal(before, after) {
			t.Errorf("%s: changed", c.name)
		}
	}
	forced := dirty()
	if _, err := transfer.ImportDiff(t.Context(), forced, bytes.NewReader(second), transfer.ImportOptions{Force: true}); err != nil {
		t.Errorf("forced: %v", err)
	}
	if p, _ := forced.Bytes("s2"); string(p[8192:8195]) != "two" || string(p[60000:60005]) != "other" {
		t.Error("forced: not applied")
	}
	if _, err := transfer.ExportDiff(t.Context(), m, transfer.Diff{From: "nope"}, io.Discard, transfer.ExportOptions{}); rbdstream.Errno(err) != 2 {
		t.Errorf("export from a missing version: %v", err)
	}
}

// A diff of an image stream must begin where the one before ended.
func TestImageRefusals(t *testing.T) {
	stream := func(from string) []byte {
		var b bytes.Buffer
		must(t, rbdstream.WriteHeader(&b, rbdstream.DefaultHeader(), 3, false))
		for _, d := range [][2]string{{"", "s1"}, {"s1", "s2"}, {from, ""}} {
			w := rbdstream.NewWriter(&b, rbdstream.WriterOptions{Format: rbdstream.V2})
			if d[0] != "" {
				must(t, w.From(d[0]))
			}
			if d[1] != "" {
				must(t, w.To(d[1]))
			}
			must(t, w.Size(4096))
			must(t, w.End())
		}
		return b.Bytes()
	}
	for from, want := range map[string]error{"s2": nil, "s1": atoll.ErrInvalid, "s3": atoll.ErrNotExist} {
		pool := &transfertest.Pool{Name: "x"}
		_, err := transfer.ImportImage(t.Context(), pool, bytes.NewReader(stream(from)), transfer.ImportOptions{})
		if !errors.Is(err, want) || (pool.Get("x") != nil) != (want == nil) {
			t.Errorf("from %s: %v", from, err)
		}
	}
}

// Ranges beyond 4 GiB, and large holes, cost as little as small ones.
func TestLargeAndEmpty(t *testing.T) {
	m := transfertest.New(9<<30 + 17)
	must(t, m.Write([]byte("here"), 8<<30))
	must(t, m.Snapshot("s1", false))
	must(t, m.Write([]byte("end"), 9<<30+14))
	must(t, m.Discard(8<<30, 4096))
	var calls int64
	m.Fail = func(op string, _ int64) error {
		calls++
		return nil
	}
	stream := exportImage(t, m, transfer.ExportOptions{Concurrency: 1})
	if calls > 40 || len(stream) > 20000 {
		t.Errorf("%d calls, %d bytes", calls, len(stream))
	}
	m.Fail = nil
	c := importImage(t, stream)
	if !bytes.Equal(exportImage(t, c, transfer.ExportOptions{}), stream) {
		t.Error("it comes back differently")
	}
}

// The head changes during an import: the import fails and the change stays.
func TestDiffConflict(t *testing.T) {
	m := transfertest.New(8192)
	must(t, m.Write([]byte("one"), 0))
	must(t, m.Snapshot("s1", false))
	d := exportDiff(t, m, transfer.Diff{To: "s1"})
	target := transfertest.New(8192)
	target.Fail = func(op string, _ int64) error {
		if op == "write" {
			return target.Write([]byte("mine"), 100)
		}
		return nil
	}
	_, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(d), transfer.ImportOptions{})
	if !errors.Is(err, atoll.ErrConflict) {
		t.Errorf("%v", err)
	}
	if p, _ := target.Bytes(""); string(p[100:104]) != "mine" || p[0] != 0 {
		t.Error("not as it was left")
	}
}

// Ranges that overlap are applied in the order of the stream.
func TestOverlaps(t *testing.T) {
	var b bytes.Buffer
	b.WriteString("rbd diff v1\ns\x00\x00\x10\x00\x00\x00\x00\x00")
	rng := rand.New(rand.NewPCG(1, 1))
	want := make([]byte, 1<<20)
	le := func(v int) []byte { return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24), 0, 0, 0, 0} }
	for range 300 {
		off := rng.IntN(len(want))
		n := min(rng.IntN(40000), len(want)-off)
		if rng.IntN(3) == 0 {
			b.WriteByte('z')
			b.Write(le(off))
			b.Write(le(n))
			clear(want[off : off+n])
			continue
		}
		p := content(rng, n)
		b.WriteByte('w')
		b.Write(le(off))
		b.Write(le(n))
		b.Write(p)
		copy(want[off:], p)
	}
	b.WriteByte('e')
	target := transfertest.New(0)
	if _, err := transfer.ImportDiff(t.Context(), target, bytes.NewReader(b.Bytes()), transfer.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, _ := target.Bytes(""); !bytes.Equal(got, want) {
		t.Error("it differs")
	}
}

// kinds are the exports that can be resumed.
var kinds = map[string]func(ctx context.Context, m transfer.Image, w io.Writer, o transfer.ExportOptions) error{
	"raw": func(ctx context.Context, m transfer.Image, w io.Writer, o transfer.ExportOptions) error {
		s, err := m.Open(ctx, "s2")
		if err != nil {
			return err
		}
		_, err = transfer.ExportRaw(ctx, s, w, o)
		return err
	},
	"diff": func(ctx context.Context, m transfer.Image, w io.Writer, o transfer.ExportOptions) error {
		_, err := transfer.ExportDiff(ctx, m, transfer.Diff{From: "s1", To: "s2"}, w, o)
		return err
	},
	"whole": func(ctx context.Context, m transfer.Image, w io.Writer, o transfer.ExportOptions) error {
		_, err := transfer.ExportDiff(ctx, m, transfer.Diff{From: "s1", To: "s2", WholeObject: true}, w, o)
		return err
	},
	"image": func(ctx context.Context, m transfer.Image, w io.Writer, o transfer.ExportOptions) error {
		o.Checksum = true
		_, err := transfer.ExportImage(ctx, m, w, o)
		return err
	},
}

// An export that fails again and again ends with the same file as one that does
// not, and its checksums fit.
func TestResume(t *testing.T) {
	for kind, export := range kinds {
		t.Run(kind, func(t *testing.T) {
			most, odds := 0, 9
			if kind == "raw" { // it reads a lot at once
				odds = 2
			}
			for seed := range uint64(rounds(3)) {
				rng := rand.New(rand.NewPCG(seed, 9))
				m := history(t, rng, 3, 60)
				if h, _ := m.Header(t.Context()); kind == "whole" { // objects larger than the reads
					h.Order = 24
					m.SetHeader(h)
				}
				dir := t.TempDir()
				plain, path := filepath.Join(dir, "plain"), filepath.Join(dir, "resumed")
				f, err := transfer.CreateFile(plain, transfer.FileOptions{Checksum: true})
				must(t, err)
				must(t, f.Finish(export(t.Context(), m, f, transfer.ExportOptions{})))
				m.Fail = func(op string, _ int64) error {
					if op == "read" && rng.IntN(odds) == 0 {
						return atoll.ErrUnreachable
					}
					return nil
				}
				tries, resumed := 0, 0
				for ; tries < 1000; tries++ {
					if _, err := os.Stat(path); err == nil {
						resumed++
					}
					f, err := transfer.CreateFile(path, transfer.FileOptions{Checksum: true, Resume: true, ResumeEvery: 100000})
					must(t, err)
					if err = f.Finish(export(t.Context(), m, f, transfer.ExportOptions{Concurrency: 1})); err == nil {
						break
					} else if !errors.Is(err, atoll.ErrUnreachable) {
						t.Fatal(err)
					}
				}
				most = max(most, resumed)
				want, err := os.ReadFile(plain)
				must(t, err)
				got, err := os.ReadFile(path)
				must(t, err)
				if !bytes.Equal(got, want) {
					t.Fatalf("seed %d: %d bytes, want %d", seed, len(got), len(want))
				}
				must(t, transfer.VerifyFile(t.Context(), path, 2))
				left, err := os.ReadDir(dir)
				if len(left) != 4 || err != nil {
					t.Errorf("left: %v", left)
				}
			}
			if most < 2 && !testing.Short() {
				t.Errorf("no more than %d times resumed", most)
			}
		})
	}
}

// An export of whole objects goes on within an object of which only the
// beginning changed.
func TestResumeWithinObject(t *testing.T) {
	m := transfertest.New(16 << 20)
	h := rbdstream.DefaultHeader()
	h.Order = 24
	m.SetHeader(h)
	must(t, m.Write(bytes.Repeat([]byte{1}, 16<<20), 0))
	must(t, m.Snapshot("s1", false))
	must(t, m.Write([]byte{2}, 0))
	must(t, m.Snapshot("s2", false))
	d := transfer.Diff{From: "s1", To: "s2", WholeObject: true}
	want := exportDiff(t, m, d)
	path := filepath.Join(t.TempDir(), "out")
	for _, fails := range []bool{true, false} {
		m.Fail = func(op string, off int64) error {
			if fails && op == "read" && off >= 8<<20 {
				return atoll.ErrUnreachable
			}
			return nil
		}
		f, err := transfer.CreateFile(path, transfer.FileOptions{Resume: true, ResumeEvery: 4096})
		must(t, err)
		_, err = transfer.ExportDiff(t.Context(), m, d, f, transfer.ExportOptions{Concurrency: 1})
		if err = f.Finish(err); (err != nil) != fails {
			t.Fatal(err)
		}
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d", len(got), len(want))
	}
}

// What can not be resumed is refused, and nothing is removed that was there.
func TestResumeRefusals(t *testing.T) {
	m := history(t, rand.New(rand.NewPCG(1, 2)), 3, 6)
	must(t, m.Write(bytes.Repeat([]byte{1}, 400000), 0))
	must(t, m.Snapshot("s9", false))
	path := filepath.Join(t.TempDir(), "out")
	o := transfer.FileOptions{Resume: true, ResumeEvery: 4096}
	export := func(o transfer.FileOptions, version string) error {
		f, err := transfer.CreateFile(path, o)
		if err != nil {
			return err
		}
		_, err = transfer.ExportDiff(t.Context(), m, transfer.Diff{To: version}, f, transfer.ExportOptions{Concurrency: 1})
		return f.Finish(err)
	}
	m.Fail = func(op string, off int64) error {
		if op == "read" && off > 0 {
			return atoll.ErrUnreachable
		}
		return nil
	}
	must(t, m.Discard(300000, 4096))
	must(t, m.Snapshot("s10", false))
	if err := export(o, "s10"); !errors.Is(err, atoll.ErrUnreachable) {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + ".resume"); err != nil {
		t.Fatal(err)
	}
	m.Fail = nil
	if err := export(transfer.FileOptions{}, "s10"); !errors.Is(err, atoll.ErrExist) {
		t.Errorf("without resume: %v", err)
	}
	if err := export(o, "s9"); !errors.Is(err, atoll.ErrConflict) {
		t.Errorf("other version: %v", err)
	}
	with := o
	with.Checksum = true
	if err := export(with, "s10"); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("with checksums now: %v", err)
	}
	must(t, os.Truncate(path, 10))
	if err := export(o, "s10"); !errors.Is(err, atoll.ErrConflict) {
		t.Errorf("shortened: %v", err)
	}
	must(t, os.WriteFile(path+".resume", []byte("{"), 0o644))
	if err := export(o, "s10"); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("damaged state: %v", err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 10 {
		t.Errorf("the file was touched: %v", err)
	}
}

// Every byte that is changed in a file is found by its checksums.
func TestVerify(t *testing.T) {
	m := transfertest.New(13<<20 + 5)
	must(t, m.Write(bytes.Repeat([]byte{1}, 9000), 3000))
	must(t, m.Write(bytes.Repeat([]byte{3}, 9000), 12<<20))
	path := filepath.Join(t.TempDir(), "out")
	f, err := transfer.CreateFile(path, transfer.FileOptions{Checksum: true})
	must(t, err)
	s, err := m.Open(t.Context(), "")
	must(t, err)
	_, err = transfer.ExportRaw(t.Context(), s, f, transfer.ExportOptions{})
	must(t, f.Finish(err))
	must(t, transfer.VerifyFile(t.Context(), path, 0))
	want, err := os.ReadFile(path)
	must(t, err)
	if p, _ := m.Bytes(""); !bytes.Equal(p, want) {
		t.Error("the file differs")
	}
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	if st.Blocks*512 > 64<<10 || st.Mode&0o777 != 0o644 {
		t.Errorf("%d bytes on disk, mode %o", st.Blocks*512, st.Mode)
	}
	sums, err := os.ReadFile(path + ".crc32c")
	must(t, err)
	flip := func(path string, off int) {
		t.Helper()
		p, err := os.ReadFile(path)
		must(t, err)
		p[off] ^= 0x10
		must(t, os.WriteFile(path, p, 0o644))
		if err := transfer.VerifyFile(t.Context(), filepath.Join(filepath.Dir(path), "out"), 0); !errors.Is(err, atoll.ErrCorrupt) {
			t.Errorf("byte %d of %s changed: %v", off, filepath.Base(path), err)
		}
		p[off] ^= 0x10
		must(t, os.WriteFile(path, p, 0o644))
	}
	for _, off := range []int{0, 3000, 5 << 20, 9 << 20, 12<<20 + 1, len(want) - 1} {
		flip(path, off)
	}
	for off := range sums {
		flip(path+".crc32c", off)
	}
	must(t, os.Truncate(path, int64(len(want)-1)))
	if err := transfer.VerifyFile(t.Context(), path, 0); !errors.Is(err, atoll.ErrCorrupt) {
		t.Errorf("shorter: %v", err)
	}
	must(t, os.Remove(path+".crc32c"))
	if err := transfer.VerifyFile(t.Context(), path, 0); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("no checksums: %v", err)
	}
}

// A failed export leaves no file; one that is there is left alone.
func TestExportFile(t *testing.T) {
	m := history(t, rand.New(rand.NewPCG(3, 3)), 2, 6)
	must(t, m.Write([]byte{1}, 0))
	for kind, export := range kinds {
		path := filepath.Join(t.TempDir(), kind)
		m.Fail = func(op string, _ int64) error {
			if op == "holes" {
				return atoll.ErrCorrupt
			}
			return nil
		}
		f, err := transfer.CreateFile(path, transfer.FileOptions{Checksum: true})
		must(t, err)
		if err := f.Finish(export(t.Context(), m, f, transfer.ExportOptions{})); !errors.Is(err, atoll.ErrCorrupt) && kind != "diff" && kind != "whole" {
			t.Errorf("%s: %v", kind, err)
		} else if err != nil {
			if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
				t.Errorf("%s left %v", kind, left)
			}
		}
		must(t, os.WriteFile(path+"2", []byte("x"), 0o600))
		if _, err := transfer.CreateFile(path+"2", transfer.FileOptions{Checksum: true}); !errors.Is(err, atoll.ErrExist) {
			t.Errorf("%s: %v", kind, err)
		}
		if p, _ := os.ReadFile(path + "2"); string(p) != "x" {
			t.Errorf("%s: a file that was there was changed", kind)
		}
	}
}

// Reads run ahead, as many as allowed and no more, and the output is in order.
func TestReadAhead(t *testing.T) {
	m := transfertest.New(40 << 20)
	must(t, m.Write(content(rand.New(rand.NewPCG(1, 1)), 40<<20), 0))
	gate, all := make(chan struct{}), make(chan struct{}, 100)
	m.Fail = func(op string, _ int64) error {
		if op == "read" {
			all <- struct{}{}
			if len(all) == 10 {
				close(gate)
			}
			<-gate
		}
		return nil
	}
	s, err := m.Open(t.Context(), "")
	must(t, err)
	var b bytes.Buffer
	last := int64(0)
	_, err = transfer.ExportRaw(t.Context(), s, &b, transfer.ExportOptions{Progress: func(done, total int64) {
		if done < last || total != 40<<20 {
			t.Errorf("progress %d after %d of %d", done, last, total)
		}
		last = done
	}})
	must(t, err)
	if want, _ := m.Bytes(""); !bytes.Equal(b.Bytes(), want) || last != 40<<20 {
		t.Error("it differs")
	}
}

func TestPercent(t *testing.T) {
	var b bytes.Buffer
	p := transfer.NewPercent(&b, "Exporting image")
	for _, n := range []int64{0, 1, 400, 401, 999} {
		p.Update(n, 1000)
	}
	p.Finish(nil)
	want := "\rExporting image: 40% complete...\rExporting image: 99% complete...\rExporting image: 100% complete...done.\n"
	if b.String() != want {
		t.Errorf("%q", b.String())
	}
	b.Reset()
	p.Finish(errors.New("x"))
	if b.String() != "\rExporting image: 99% complete...failed.\n" {
		t.Errorf("%q", b.String())
	}
	p = nil
	p.Update(1, 2)
	p.Finish(nil)
}
