package rbdstream

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

// op is a range of a diff.
type op struct {
	off  int
	data []byte // nil: n zeros
	n    int
}

// rawDiff makes a V1 diff without the Writer's care.
func rawDiff(from, to string, size int, ops ...op) []byte {
	b := []byte(bannerV1)
	if from != "" {
		b = appendString(append(b, 'f'), from)
	}
	if to != "" {
		b = appendString(append(b, 't'), to)
	}
	if size >= 0 {
		b = le.AppendUint64(append(b, 's'), uint64(size))
	}
	for _, o := range ops {
		tag, n := byte('w'), len(o.data)
		if o.data == nil {
			tag, n = 'z', o.n
		}
		b = le.AppendUint64(append(b, tag), uint64(o.off))
		b = le.AppendUint64(b, uint64(n))
		b = append(b, o.data...)
	}
	return append(b, 'e')
}

func data(off int, s string) op { return op{off: off, data: []byte(s)} }
func zeros(off, n int) op       { return op{off: off, n: n} }

func merged(t *testing.T, a, b []byte) (string, error) {
	t.Helper()
	var out bytes.Buffer
	if err := Merge(&out, bytes.NewReader(a), bytes.NewReader(b)); err != nil {
		return "", err
	}
	s, err := dumpBytes(out.Bytes(), V1)
	if err != nil {
		t.Fatal(err)
	}
	return s, nil
}

func TestMerge(t *testing.T) {
	for _, c := range []struct {
		name string
		a, b []byte
		want string
	}{
		{"b wins", rawDiff("f", "x", 1000, data(0, "abc"), zeros(500, 100)), rawDiff("x", "y", 1000, data(1, "Q"), data(550, "RR")),
			"f f\nt y\ns 1000\nw 0 1 \"a\"\nw 1 1 \"Q\"\nw 2 1 \"c\"\nz 500 50\nw 550 2 \"RR\"\nz 552 48\n"},
		{"b cuts off", rawDiff("", "x", 1000, data(0, "abc"), data(500, "aaaaaaaaaaaaaaaaaaaa")), rawDiff("x", "", 510, data(1, "Q")),
			"s 510\nw 0 1 \"a\"\nw 1 1 \"Q\"\nw 2 1 \"c\"\nw 500 10 \"aaaaaaaaaa\"\n"},
		{"b grows", rawDiff("", "x", 1000, data(0, "abc"), data(500, "a")), rawDiff("x", "y", 1500, data(990, "QQQQQQQQQQQQ")),
			"t y\ns 1500\nw 0 3 \"abc\"\nw 500 1 \"a\"\nw 990 12 \"QQQQQQQQQQQQ\"\nz 1002 498\n"},
		{"b covers several", rawDiff("", "x", 100, data(0, "abc"), zeros(5, 5), data(20, "xyz")), rawDiff("x", "y", 100, zeros(2, 19)),
			"t y\ns 100\nw 0 2 \"ab\"\nz 2 19\nw 21 2 \"yz\"\n"},
		{"nothing", rawDiff("", "x", 100), rawDiff("x", "", 100), "s 100\n"},
		{"only growth", rawDiff("", "x", 100), rawDiff("x", "y", 5000), "t y\ns 5000\nz 100 4900\n"},
		{"touching, and zeros as data", rawDiff("", "x", 100, data(0, "ab"), data(2, "\x00\x00"), zeros(4, 2)), rawDiff("x", "y", 100, zeros(6, 1)),
			"t y\ns 100\nw 0 2 \"ab\"\nw 2 2 \"\\x00\\x00\"\nz 4 2\nz 6 1\n"},
		{"empty ranges", rawDiff("", "x", 100, zeros(0, 0), data(0, "a")), rawDiff("x", "y", 100, zeros(1, 0), data(1, "b")), "t y\ns 100\nw 0 1 \"a\"\nw 1 1 \"b\"\n"},
	} {
		got, err := merged(t, c.a, c.b)
		if err != nil || got != c.want {
			t.Errorf("%s: %q, want %q, %v", c.name, got, c.want, err)
		}
	}
}

func TestMergeRefuses(t *testing.T) {
	a, b := rawDiff("", "x", 1000, data(0, "abc")), rawDiff("x", "y", 1000, data(1, "Q"))
	late := rawDiff("", "x", 1000, data(0, "abc"))
	late = append(late[:len(late)-1], unhex(t, "73 e803000000000000 65")...)
	for _, c := range []struct {
		name  string
		a, b  []byte
		kind  error
		errno syscall.Errno
	}{
		{"other version", a, rawDiff("z", "y", 1000), atoll.ErrInvalid, syscall.EINVAL},
		{"first leads to no version", rawDiff("", "", 1000), rawDiff("", "y", 1000), atoll.ErrInvalid, syscall.EINVAL},
		{"descent", rawDiff("", "x", 1000, data(10, "a"), data(5, "b")), b, atoll.ErrInvalid, syscall.ENOTSUP},
		{"descent in the second", a, rawDiff("x", "", 1000, data(10, "a"), data(5, "b")), atoll.ErrInvalid, syscall.ENOTSUP},
		{"overlap", rawDiff("", "x", 1000, data(10, "aaa"), data(12, "b")), b, atoll.ErrInvalid, syscall.ENOTSUP},
		{"beyond its size", rawDiff("", "x", 2, data(0, "abc")), b, atoll.ErrInvalid, syscall.ENOTSUP},
		{"metadata after data", late, b, atoll.ErrInvalid, syscall.ENOTSUP},
		{"v2", unhex(t, goldenV2), b, atoll.ErrInvalid, syscall.EINVAL},
		{"v2 second", a, unhex(t, goldenV2), atoll.ErrInvalid, syscall.EINVAL},
	} {
		if _, err := merged(t, c.a, c.b); !errors.Is(err, c.kind) || Errno(err) != c.errno {
			t.Errorf("%s: %v (%d)", c.name, err, Errno(err))
		}
	}
	for n := range a {
		if _, err := merged(t, a[:n], b); !errors.Is(err, atoll.ErrCorrupt) || Errno(err) != syscall.EDOM {
			t.Errorf("first cut after %d bytes: %v (%d)", n, err, Errno(err))
		}
	}
	for n := range b {
		if _, err := merged(t, a, b[:n]); !errors.Is(err, atoll.ErrCorrupt) || Errno(err) != syscall.EDOM {
			t.Errorf("second cut after %d bytes: %v (%d)", n, err, Errno(err))
		}
	}
}

// randomDiff makes a diff of random ranges, ascending, in an image of size.
func randomDiff(rng *rand.Rand, from, to string, size int) []byte {
	var ops []op
	for at := rng.IntN(size + 1); at < size; {
		n := 1 + rng.IntN(min(size-at, 1<<(1+rng.IntN(17))))
		o := op{off: at, n: n}
		if rng.IntN(3) > 0 {
			o.data = bytes.Repeat([]byte{byte(rng.IntN(3))}, n)
		}
		ops = append(ops, o)
		at += n
		if rng.IntN(3) > 0 {
			at += rng.IntN(20000)
		}
	}
	return rawDiff(from, to, size, ops...)
}

// The merged diff does what the two do one after the other, on any image.
func TestMergeRandom(t *testing.T) {
	for seed := range uint64(rounds(300)) {
		rng := rand.New(rand.NewPCG(seed, 4))
		a := randomDiff(rng, "o", "x", 1+rng.IntN(200000))
		b := randomDiff(rng, "x", "y", 1+rng.IntN(200000))
		var out bytes.Buffer
		if err := Merge(&out, bytes.NewReader(a), bytes.NewReader(b)); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		old := bytes.Repeat([]byte{9}, 1+rng.IntN(200000))
		run := func(img []byte, diff []byte) []byte {
			d, err := NewReader(bytes.NewReader(diff), V1)
			if err != nil {
				t.Fatal(err)
			}
			return applyAny(t, d, bytes.Clone(img))
		}
		if got, want := run(old, out.Bytes()), run(run(old, a), b); !bytes.Equal(got, want) {
			t.Fatalf("seed %d: the merged diff does something else", seed)
		}
	}
}

// applyAny applies a diff without looking at its form.
func applyAny(t *testing.T, d *Reader, img []byte) []byte {
	t.Helper()
	for {
		r, err := d.Next()
		if err != nil {
			return img
		}
		switch r.Kind {
		case Size:
			img = append(img[:min(int64(len(img)), r.Len)], make([]byte, max(0, r.Len-int64(len(img))))...)
		case Write:
			if _, err := readFull(d, img[r.Off:r.Off+r.Len]); err != nil {
				t.Fatal(err)
			}
		case Zero:
			clear(img[r.Off : r.Off+r.Len])
		}
	}
}

func readFull(d *Reader, p []byte) (int, error) {
	for n := 0; n < len(p); {
		m, err := d.Read(p[n:])
		if err != nil {
			return n, fmt.Errorf("after %d: %w", n, err)
		}
		n += m
	}
	return len(p), nil
}
