package rbdstream

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/atollstore/atoll/internal/atoll"
)

// unhex turns hex with spaces, and "text" in quotes, into bytes.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	var b []byte
	for i, part := range strings.Split(s, `"`) {
		if i%2 == 1 {
			b = append(b, strings.ReplaceAll(part, `\n`, "\n")...)
			continue
		}
		p, err := hex.DecodeString(strings.Join(strings.Fields(part), ""))
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, p...)
	}
	return b
}

// rounds is how many seeds a test tries: few with -short.
func rounds(n int) int {
	if testing.Short() {
		return (n + 9) / 10
	}
	return n
}

// dump prints a diff: one line a record.
func dump(d *Reader) (string, error) {
	var b strings.Builder
	for {
		r, err := d.Next()
		if err == io.EOF {
			return b.String(), nil
		}
		if err != nil {
			return b.String(), err
		}
		switch r.Kind {
		case From:
			fmt.Fprintf(&b, "f %s\n", r.Name)
		case To:
			fmt.Fprintf(&b, "t %s\n", r.Name)
		case Protected:
			fmt.Fprintf(&b, "p %v\n", r.Flag)
		case Size:
			fmt.Fprintf(&b, "s %d\n", r.Len)
		case Write:
			p, err := io.ReadAll(io.LimitReader(d, 12))
			if err != nil {
				return b.String(), err
			}
			fmt.Fprintf(&b, "w %d %d %q\n", r.Off, r.Len, p)
		case Zero:
			fmt.Fprintf(&b, "z %d %d\n", r.Off, r.Len)
		case Unknown:
			fmt.Fprintf(&b, "? %d\n", r.Tag)
		}
	}
}

func dumpBytes(p []byte, want Format) (string, error) {
	d, err := NewReader(bytes.NewReader(p), want)
	if err != nil {
		return "", err
	}
	return dump(d)
}

const goldenV1 = `"rbd diff v1\n"
	66 01000000 61  74 01000000 62  73 0010000000000000
	77 ff0f000000000000 0100000000000000 ff  65`

const goldenV2 = `"rbd diff v2\n"
	66 0500000000000000 01000000 "a"
	74 0600000000000000 02000000 "s1"
	70 0100000000000000 01
	73 0800000000000000 f80fc00000000000
	77 1300000000000000 0000000000000000 0300000000000000 "abc"
	7a 1000000000000000 0010000000000000 0020000000000000
	65`

// goldenImage is what rbd 16.2.15 writes, with its wrong length of p.
const goldenImage = `"rbd image v2\n"
	4f 0800000000000000 1600000000000000
	54 0800000000000000 3d00000000000000
	55 0800000000000000 0000400000000000
	43 0800000000000000 0100000000000000
	4d 1400000000000000 05000000 "mykey" 07000000 "myvalue"
	45
	"rbd image diffs v2\n" 0200000000000000
	"rbd diff v2\n"
	74 0600000000000000 02000000 "s1"
	70 0800000000000000 01
	73 0800000000000000 f80fc00000000000
	77 1300000000000000 0000000000000000 0300000000000000 "abc"
	65
	"rbd diff v2\n"
	66 0600000000000000 02000000 "s1"
	73 0800000000000000 0000000100000000
	7a 1000000000000000 0000000000000000 0010000000000000
	65`

func TestGolden(t *testing.T) {
	write := func(o WriterOptions, fn func(w *Writer)) []byte {
		var b bytes.Buffer
		w := NewWriter(&b, o)
		fn(w)
		if err := w.End(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	v1 := write(WriterOptions{}, func(w *Writer) {
		_, _, _, _ = w.From("a"), w.To("b"), w.Protected(true), w.Size(4096)
		_ = w.Write(4095, []byte{255})
	})
	if want := unhex(t, goldenV1); !bytes.Equal(v1, want) {
		t.Errorf("v1\n%x, want\n%x", v1, want)
	}
	v2 := write(WriterOptions{Format: V2}, func(w *Writer) {
		_, _, _, _ = w.From("a"), w.To("s1"), w.Protected(true), w.Size(12587000)
		_, _, _ = w.Write(0, []byte("abc")), w.Write(4096, make([]byte, 4096)), w.Zero(8192, 4096)
	})
	if want := unhex(t, goldenV2); !bytes.Equal(v2, want) {
		t.Errorf("v2\n%x, want\n%x", v2, want)
	}
	if s, err := dumpBytes(v1, 0); s != "f a\nt b\ns 4096\nw 4095 1 \"\\xff\"\n" || err != nil {
		t.Errorf("%s, %v", s, err)
	}
	if s, err := dumpBytes(v2, 0); s != "f a\nt s1\np true\ns 12587000\nw 0 3 \"abc\"\nz 4096 8192\n" || err != nil {
		t.Errorf("%s, %v", s, err)
	}
	i, err := NewImageReader(bytes.NewReader(unhex(t, goldenImage)))
	if err != nil {
		t.Fatal(err)
	}
	h := DefaultHeader()
	h.Meta = []Meta{{"mykey", "myvalue"}}
	if fmt.Sprint(i.Header) != fmt.Sprint(h) || i.Diffs != 2 {
		t.Errorf("header %+v, %d diffs", i.Header, i.Diffs)
	}
	for _, want := range []string{"t s1\np true\ns 12587000\nw 0 3 \"abc\"\n", "f s1\ns 16777216\nz 0 4096\n"} {
		d, err := i.NextDiff()
		if err != nil {
			t.Fatal(err)
		}
		if s, err := dump(d); s != want || err != nil {
			t.Errorf("%q, want %q, %v", s, want, err)
		}
	}
	if _, err := i.NextDiff(); err != io.EOF {
		t.Error(err)
	}
	var b bytes.Buffer
	if err := WriteHeader(&b, h, 2, false); err != nil || !bytes.HasPrefix(unhex(t, goldenImage), b.Bytes()) {
		t.Errorf("header %x, %v", b.Bytes(), err)
	}
}

// What a reader must bear.
func TestTolerance(t *testing.T) {
	for _, c := range []struct{ name, stream, want string }{
		{"metadata in any order", `"rbd diff v1\n" 73 0100000000000000 74 01000000 62 66 01000000 61 65`, "s 1\nt b\nf a\n"},
		{"no metadata", `"rbd diff v1\n" 7a 0100000000000000 0200000000000000 65`, "z 1 2\n"},
		{"overlap and descent", `"rbd diff v1\n" 7a 0500000000000000 0200000000000000 7a 0100000000000000 0900000000000000 65`, "z 5 2\nz 1 9\n"},
		{"unknown tags in v1", `"rbd diff v1\n" 51 52 73 0100000000000000 53 65`, "? 81\n? 82\ns 1\n? 83\n"},
		{"unknown tags in v2", `"rbd diff v2\n" 51 0300000000000000 "wsx" 73 0800000000000000 0100000000000000 65`, "? 81\ns 1\n"},
		{"wrong lengths in v2", `"rbd diff v2\n" 74 0000000000000000 01000000 62 70 ffffffffffffffff 00 77 0000000000000000 0000000000000000 0100000000000000 ff 65`, "t b\np false\nw 0 1 \"\\xff\"\n"},
		{"empty records", `"rbd diff v1\n" 77 0500000000000000 0000000000000000 7a 0000000000000000 0000000000000000 65`, "w 5 0 \"\"\nz 0 0\n"},
		{"another's X", `"rbd diff v2\n" 58 0800000000000000 "other!!!" 58 0200000000000000 "XX" 65`, "? 88\n? 88\n"},
		{"more behind the end", `"rbd diff v1\n" 65 "rest"`, ""},
	} {
		for _, slow := range []bool{false, true} {
			var r io.Reader = bytes.NewReader(unhex(t, c.stream))
			if slow {
				r = iotest.OneByteReader(r)
			}
			d, err := NewReader(r, 0)
			if err != nil {
				t.Fatal(c.name, err)
			}
			if s, err := dump(d); s != c.want || err != nil {
				t.Errorf("%s: %q, want %q, %v", c.name, s, c.want, err)
			}
			if _, err := d.Next(); err != io.EOF {
				t.Errorf("%s: after the end: %v", c.name, err)
			}
		}
	}
}

// What a reader must refuse, with which kind and number, without allocating
// what the stream claims.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name, stream string
		kind         error
		errno        syscall.Errno
	}{
		{"nothing", ``, atoll.ErrCorrupt, syscall.EBADMSG},
		{"another banner", `"rbd diff v3\n"`, atoll.ErrInvalid, syscall.EINVAL},
		{"short v1", `"rbd diff v1\n" 73 01`, atoll.ErrCorrupt, syscall.EBADMSG},
		{"short v2", `"rbd diff v2\n" 73 01`, atoll.ErrCorrupt, syscall.EDOM},
		{"short data v1", `"rbd diff v1\n" 77 0000000000000000 ffffffffffffff0f "abc"`, atoll.ErrCorrupt, syscall.EBADMSG},
		{"short data v2", `"rbd diff v2\n" 77 0000000000000000 0000000000000000 ffffffffffffff0f "abc"`, atoll.ErrCorrupt, syscall.EDOM},
		{"short unknown", `"rbd diff v2\n" 51 ffffffffffffff7f "abc"`, atoll.ErrCorrupt, syscall.EDOM},
		{"unknown too long", `"rbd diff v2\n" 51 ffffffffffffffff "abc"`, atoll.ErrInvalid, syscall.EINVAL},
		{"long name", `"rbd diff v1\n" 74 01100000`, atoll.ErrTooLarge, syscall.EINVAL},
		{"size", `"rbd diff v1\n" 73 0000000000000080`, atoll.ErrInvalid, syscall.EINVAL},
		{"offset", `"rbd diff v1\n" 7a 0000000000000080 0000000000000000`, atoll.ErrInvalid, syscall.EINVAL},
		{"length", `"rbd diff v1\n" 7a 0100000000000000 ffffffffffffff7f`, atoll.ErrInvalid, syscall.EINVAL},
	} {
		_, err := dumpBytes(unhex(t, c.stream), 0)
		if !errors.Is(err, c.kind) || Errno(err) != c.errno {
			t.Errorf("%s: %v (%d)", c.name, err, Errno(err))
		}
	}
	if _, err := dumpBytes(unhex(t, goldenV2), V1); Errno(err) != syscall.EINVAL {
		t.Errorf("v2 for v1: %v", err)
	}
	image := unhex(t, goldenImage)
	for n := range image {
		if err := readImage(image[:n]); !errors.Is(err, atoll.ErrCorrupt) || Errno(err) != syscall.EDOM {
			t.Fatalf("image cut after %d bytes: %v", n, err)
		}
	}
	many := []byte(bannerImage)
	for i := range 100000 {
		many = append(many, tagMeta)
		many = le.AppendUint64(many, 0)
		many = appendString(appendString(many, fmt.Sprint(i)), "")
	}
	if err := readImage(many); !errors.Is(err, atoll.ErrTooLarge) {
		t.Errorf("too much metadata: %v", err)
	}
	broken := errors.New("broken")
	for n := range len(image) {
		r := io.MultiReader(bytes.NewReader(image[:n]), iotest.ErrReader(broken))
		if err := readImageFrom(r); !errors.Is(err, broken) {
			t.Fatalf("reader breaks after %d bytes: %v", n, err)
		}
	}
}

func readImage(p []byte) error { return readImageFrom(bytes.NewReader(p)) }

func readImageFrom(r io.Reader) error {
	i, err := NewImageReader(r)
	if err != nil {
		return err
	}
	for {
		d, err := i.NextDiff()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := dump(d); err != nil {
			return err
		}
	}
}

// pages makes data with many runs of zero pages.
func pages(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for at := 0; at < n; at += PageSize {
		if rng.IntN(3) > 0 {
			p[min(at+rng.IntN(PageSize), n-1)] = byte(1 + rng.IntN(255))
		}
	}
	return p
}

// The same contents give the same bytes however they are cut (R3), pages of
// zeros are told as zeros, records are bounded, and reading gives it all back.
func TestCanonical(t *testing.T) {
	for seed := range uint64(rounds(30)) {
		rng := rand.New(rand.NewPCG(seed, 1))
		size := 1 + rng.IntN(11<<20)
		img := pages(rng, size)
		o := WriterOptions{Format: V1 + Format(rng.IntN(2)), Checksum: true}
		var first []byte
		for try := range 3 {
			var b bytes.Buffer
			w := NewWriter(&b, o)
			_ = w.Size(int64(size))
			for at := 0; at < size && w.err == nil; {
				n := min((1+rng.IntN(1<<(1+rng.IntN(11))))*PageSize, size-at)
				if try == 0 {
					n = size
				}
				switch p := img[at : at+n]; {
				case try == 2 && bytes.Count(p, []byte{0}) == n:
					_ = w.Zero(int64(at), int64(n))
				case try == 2:
					_ = w.WriteFrom(int64(at), int64(n), iotest.HalfReader(bytes.NewReader(p)))
				default:
					_ = w.Write(int64(at), p)
				}
				at += n
			}
			if err := w.End(); err != nil {
				t.Fatal(err)
			}
			if try == 0 {
				first = b.Bytes()
			} else if !bytes.Equal(b.Bytes(), first) {
				t.Fatalf("seed %d: other bytes when cut otherwise", seed)
			}
		}
		d, err := NewReader(iotest.HalfReader(bytes.NewReader(first)), 0)
		if err != nil {
			t.Fatal(err)
		}
		got := apply(t, d, nil)
		if !bytes.Equal(got, img) || d.Summed() != (o.Format == V2) {
			t.Fatalf("seed %d: it reads back differently", seed)
		}
	}
}

// apply applies a diff to an image in memory and returns it.
func apply(t testing.TB, d *Reader, img []byte) []byte {
	t.Helper()
	end := int64(0)
	for {
		r, err := d.Next()
		if err == io.EOF {
			return img
		}
		if err != nil {
			t.Fatal(err)
		}
		switch r.Kind {
		case Size:
			img = append(img[:min(int64(len(img)), r.Len)], make([]byte, max(0, r.Len-int64(len(img))))...)
		case Write:
			if _, err := io.ReadFull(d, img[r.Off:r.Off+r.Len]); err != nil {
				t.Fatal(err)
			}
			if r.Len > MaxData || r.Off < end || r.Len == 0 {
				t.Fatalf("record %+v after %d", r, end)
			}
			for p := img[r.Off : r.Off+r.Len]; r.Off%PageSize == 0 && len(p) >= PageSize; p = p[PageSize:] {
				if bytes.Equal(p[:PageSize], zeroPage[:]) {
					t.Fatalf("zeros in the data of %+v", r)
				}
			}
			end = r.Off + r.Len
		case Zero:
			if r.Off < end || r.Len == 0 {
				t.Fatalf("record %+v after %d", r, end)
			}
			clear(img[r.Off : r.Off+r.Len])
			end = r.Off + r.Len
		}
	}
}

// A checksum finds every bit that is changed in what it covers.
func TestChecksum(t *testing.T) {
	var b bytes.Buffer
	if err := WriteHeader(&b, DefaultHeader(), 1, true); err != nil {
		t.Fatal(err)
	}
	w := NewWriter(&b, WriterOptions{Format: V2, Checksum: true})
	_, _, _, _ = w.To("s1"), w.Protected(false), w.Size(100), w.Write(3, []byte("data"))
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	if err := readImage(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	for i := range b.Len() {
		own := false // a byte of a checksum record but the sum: it turns into an unknown record
		for at := range i + 1 {
			own = own || bytes.HasPrefix(b.Bytes()[at:], []byte("X\x08\x00\x00\x00\x00\x00\x00\x00c32c")) && i < at+13
		}
		for bit := range 8 {
			p := bytes.Clone(b.Bytes())
			p[i] ^= 1 << bit
			if readImage(p) == nil && !own {
				t.Errorf("byte %d bit %d of %q", i, bit, p)
			}
		}
	}
}

// A writer that is taken over at a mark writes the same bytes.
func TestMark(t *testing.T) {
	for seed := range uint64(rounds(20)) {
		rng := rand.New(rand.NewPCG(seed, 2))
		img := pages(rng, 10<<20)
		o := WriterOptions{Format: V2, Checksum: true}
		write := func(cut bool) []byte {
			rng := rand.New(rand.NewPCG(seed, 3))
			var b bytes.Buffer
			w := NewWriter(&b, o)
			_ = w.Size(int64(len(img)))
			for at := 0; at < len(img); at += 1 << 20 {
				if err := w.Write(int64(at), img[at:at+1<<20]); err != nil {
					t.Fatal(err)
				}
				if (at+1<<20)%MaxData == 0 && cut && rng.IntN(2) == 0 {
					m, err := w.Mark()
					if err != nil || w.Pending() != 0 {
						t.Fatal(err)
					}
					w = ResumeWriter(&b, o, m)
				}
			}
			if err := w.End(); err != nil {
				t.Fatal(err)
			}
			return b.Bytes()
		}
		if !bytes.Equal(write(true), write(false)) {
			t.Fatalf("seed %d: other bytes", seed)
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	for name, fn := range map[string]func(w *Writer) error{
		"to before from":      func(w *Writer) error { return errors.Join(w.To("a"), w.From("b")) },
		"metadata after data": func(w *Writer) error { return errors.Join(w.Write(0, []byte{1}), w.Size(5)) },
		"size twice":          func(w *Writer) error { return errors.Join(w.Size(4), w.Size(5)) },
		"descent":             func(w *Writer) error { return errors.Join(w.Zero(5, 5), w.Zero(9, 1)) },
		"beyond":              func(w *Writer) error { return errors.Join(w.Size(4), w.Write(4, []byte{1})) },
		"negative":            func(w *Writer) error { return w.Zero(-1, 1) },
		"overrun":             func(w *Writer) error { return w.Zero(1<<62, 1<<62) },
		"no name":             func(w *Writer) error { return w.To("") },
		"long name":           func(w *Writer) error { return w.To(strings.Repeat("a", MaxName+1)) },
		"protection alone":    func(w *Writer) error { return w.Protected(true) },
		"after the end":       func(w *Writer) error { return errors.Join(w.End(), w.Zero(1, 1)) },
	} {
		w := NewWriter(io.Discard, WriterOptions{Format: V2})
		if err := fn(w); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		if err := w.End(); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("%s: the error is forgotten: %v", name, err)
		}
	}
	broken := errors.New("broken")
	w := NewWriter(brokenWriter{broken}, WriterOptions{})
	if err := errors.Join(w.Write(0, pages(rand.New(rand.NewPCG(1, 1)), 200000)), w.End()); !errors.Is(err, broken) {
		t.Error(err)
	}
}

type brokenWriter struct{ err error }

func (b brokenWriter) Write([]byte) (int, error) { return 0, b.err }

// Every kind of error has a number.
func TestErrno(t *testing.T) {
	for _, kind := range atoll.Kinds() {
		if n := Errno(fmt.Errorf("x: %w", kind)); n == 0 || n == syscall.EIO && kind != atoll.ErrIO && kind != atoll.ErrGap && kind != atoll.ErrSealed {
			t.Errorf("%v has no number", kind)
		}
	}
	if Errno(nil) != 0 || Errno(errors.New("x")) != syscall.EIO || Errno(&os.PathError{Err: syscall.EPIPE}) != syscall.EPIPE {
		t.Error("wrong number")
	}
}
