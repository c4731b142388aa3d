package rbdstream

import (
	"bytes"
	"io"
	"testing"
)

// seeds are streams to begin with.
func seeds(f *testing.F) [][]byte {
	return [][]byte{
		unhex(f, goldenV1), unhex(f, goldenV2), unhex(f, goldenImage),
		rawDiff("", "x", 1000, data(0, "abc"), zeros(500, 100)),
		rawDiff("x", "y", 2000, data(1, "Q"), data(550, "RR")),
	}
}

// FuzzReader: any bytes give records and an end, never a panic; what a Writer
// makes of the records, if it can, reads the same.
func FuzzReader(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		d, err := NewReader(bytes.NewReader(p), 0)
		if err != nil {
			return
		}
		var out bytes.Buffer
		w := NewWriter(&out, WriterOptions{Format: d.Format()})
		for {
			r, err := d.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				if Errno(err) == 0 {
					t.Fatal("an error without a number")
				}
				return
			}
			switch r.Kind {
			case From:
				_ = w.From(r.Name)
			case To:
				_ = w.To(r.Name)
			case Protected:
				_ = w.Protected(r.Flag)
			case Size:
				_ = w.Size(r.Len)
			case Write:
				if r.Len > 1<<20 {
					return
				}
				_ = w.WriteFrom(r.Off, r.Len, d)
			case Zero:
				if r.Len > 1<<40 {
					return
				}
				_ = w.Zero(r.Off, r.Len)
			}
		}
		if w.End() != nil {
			return
		}
		if _, err := dumpBytes(out.Bytes(), d.Format()); err != nil {
			t.Fatalf("what was written again cannot be read: %v", err)
		}
	})
}

// FuzzImage: any bytes give a header and diffs and an end, never a panic.
func FuzzImage(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		i, err := NewImageReader(bytes.NewReader(p))
		if err != nil {
			return
		}
		for range 100 {
			d, err := i.NextDiff()
			if err != nil {
				return
			}
			if len(p)%2 == 0 { // else they are skipped
				_, _ = dump(d)
			}
		}
	})
}

// FuzzMerge: any two streams give one that can be read, or an error.
func FuzzMerge(f *testing.F) {
	all := seeds(f)
	for _, a := range all {
		f.Add(a, all[4])
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var out bytes.Buffer
		if Merge(&limited{&out}, bytes.NewReader(a), bytes.NewReader(b)) != nil {
			return
		}
		if _, err := dumpBytes(out.Bytes(), V1); err != nil {
			t.Fatalf("what was merged cannot be read: %v", err)
		}
	})
}

// limited bounds an output.
type limited struct{ b *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.b.Len() > 1<<20 {
		return 0, io.ErrShortWrite
	}
	return l.b.Write(p)
}
