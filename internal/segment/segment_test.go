package segment

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

var rewrite = flag.Bool("rewrite", false, "write the scripts' outputs and golden files anew")

var testID = atoll.SegmentID{Medium: 0x1122334455667788, Ordinal: 5, Copyset: 9}

// builder makes the bytes of a segment.
type builder struct {
	p    []byte
	head Head
}

// batch adds a batch of n blocks, split into records of at most two.
func (b *builder) batch(n int) {
	payload := make([]byte, n*atoll.BlockSize)
	var crcs []uint32
	var recs []Record
	for i := range n {
		q := payload[i*atoll.BlockSize:][:atoll.BlockSize]
		for j := range q {
			q[j] = byte(int(b.head.Offset)*31 + i*7 + j)
		}
		crcs = append(crcs, CRC(q))
	}
	for i := 0; i < n; i += 2 {
		recs = append(recs, Record{Kind: 17, Flags: 1, Blocks: uint16(min(2, n-i)), Key: b.head.Seq + uint64(i), Aux: 3})
	}
	h := make([]byte, atoll.BlockSize)
	b.head.Prev = EncodeHeader(h, &b.head, recs, crcs)
	b.p = append(append(b.p[:b.head.Offset.Bytes()], h...), payload...)
	b.head.Offset += atoll.BlockNo(n) + 1
	b.head.Seq += uint64(len(recs))
}

func newBuilder(id atoll.SegmentID, epoch atoll.Epoch) *builder {
	return &builder{head: Head{Segment: id, Epoch: epoch, Seq: 100, Clock: time.Unix(1700000000, 5)}}
}

func (b *builder) footer() []byte {
	s := Scan(bytes.NewReader(b.p), b.head.Segment, atoll.MaxSegmentBlocks)
	p := make([]byte, s.Blocks().Bytes())
	s.Encode(p)
	return p
}

// TestScan runs testdata/scan/*.txt: a segment is built and damaged, one
// command a line, and what Scan or Rebuild makes of it is the output.
func TestScan(t *testing.T) {
	files, err := filepath.Glob("testdata/scan/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			in, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			out := runScan(string(in))
			if *rewrite {
				err = os.WriteFile(file, []byte(out), 0o644)
			} else if out != string(in) {
				err = fmt.Errorf("output differs; it is now:\n%s", out)
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func runScan(in string) string {
	var out strings.Builder
	b := newBuilder(testID, 1)
	for line := range strings.Lines(in) {
		line = strings.TrimSpace(line)
		if line != "" && strings.HasPrefix(line, "= ") {
			continue
		}
		out.WriteString(line + "\n")
		words := strings.Fields(line)
		if len(words) > 0 && words[0] != "#" {
			if got := b.command(words); got != "" {
				out.WriteString("= " + got + "\n")
			}
		}
	}
	return out.String()
}

func (b *builder) command(words []string) string {
	arg := func(i int) int {
		if i >= len(words) {
			return 0
		}
		n, err := strconv.Atoi(words[i])
		if err != nil {
			panic(err)
		}
		return n
	}
	switch words[0] {
	case "new":
		*b = *newBuilder(testID, 1)
	case "batch":
		b.batch(arg(1))
	case "epoch":
		b.head.Epoch = atoll.Epoch(arg(1))
	case "acked":
		b.head.Acked = atoll.BlockNo(arg(1))
	case "prev":
		b.head.Prev = uint32(arg(1))
	case "flip": // a bit of block n
		b.p[arg(1)*atoll.BlockSize+100] ^= 1
	case "zero":
		clear(b.p[arg(1)*atoll.BlockSize:][:atoll.BlockSize])
	case "grow":
		b.p = append(b.p, make([]byte, arg(1)*atoll.BlockSize)...)
	case "stale": // a batch of another segment, or of this one at another place
		s := newBuilder(testID, 1)
		if words[1] == "other" {
			s.head.Segment.Ordinal++
		}
		s.head.Offset = atoll.BlockNo(arg(2))
		s.p = make([]byte, s.head.Offset.Bytes())
		s.head.Acked = atoll.BlockNo(arg(4))
		s.batch(1)
		at := arg(3) * atoll.BlockSize
		b.p = append(b.p, make([]byte, max(0, at+2*atoll.BlockSize-len(b.p)))...)
		copy(b.p[at:], s.p[arg(2)*atoll.BlockSize:])
	case "footer":
		b.p = append(b.p[:b.head.Offset.Bytes()], b.footer()...)
	case "scan":
		s := Scan(bytes.NewReader(b.p), testID, 64)
		text := fmt.Sprintf("%v length=%d batches=%v epoch=%v seq=%d sealed=%v later=%d acked=%d", s.Ending, s.Length, s.Batches, s.Epoch, s.Seq, s.Sealed, s.Later, s.Acked)
		if s.Err != nil {
			text += "\n= " + s.Err.Error()
		}
		return text
	case "rebuild":
		f, lost := Rebuild(bytes.NewReader(b.p), testID, b.head.Offset)
		return fmt.Sprintf("length=%d batches=%v seq=%d lost=%v", f.Length, f.Batches, f.Seq, lost)
	default:
		return "unknown command"
	}
	return ""
}

// TestGolden holds the formats to the bytes of testdata/v1.*, which every later
// version must read.
func TestGolden(t *testing.T) {
	b := newBuilder(testID, 3)
	b.batch(3)
	b.head.Acked = 4
	b.batch(0)
	golden(t, "v1.batches", b.p, func(p []byte) error {
		s := Scan(bytes.NewReader(p), testID, 64)
		if s.Length != 5 || s.Seq != 102 || s.Acked != 4 || s.Epoch != 3 || s.Ending != Whole {
			return fmt.Errorf("scan %+v", s)
		}
		return nil
	})
	golden(t, "v1.footer", b.footer(), func(p []byte) error {
		f, err := ParseFooterHead(p)
		if err == nil {
			err = f.ParseBody(p[atoll.BlockSize:])
		}
		if err == nil && (f.Segment != testID || f.Length != 5 || f.Seq != 102 || fmt.Sprint(f.Batches) != "[0 4]" || len(f.CRCs) != 5) {
			err = fmt.Errorf("footer %+v", f)
		}
		return err
	})
	super := Super{Cluster: atoll.UUID{1, 2}, Disk: atoll.UUID{3}, Incarnation: atoll.UUID{4}, Node: 7, Created: 8}
	golden(t, "v1.super", EncodeSuper(super), func(p []byte) error {
		s, err := ParseSuper(p)
		if err == nil && s != super {
			err = fmt.Errorf("super %+v", s)
		}
		p[20] ^= 1 // one of the two blocks is enough
		if _, err := ParseSuper(p); err != nil {
			return err
		}
		p[atoll.BlockSize+20] ^= 1
		if _, err := ParseSuper(p); !errors.Is(err, atoll.ErrCorrupt) {
			return fmt.Errorf("two damaged blocks: %v", err)
		}
		return err
	})
}

func golden(t *testing.T, name string, now []byte, check func([]byte) error) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *rewrite {
		if err := os.WriteFile(path, now, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, now) {
		t.Errorf("%s: the format changed", name)
	}
	if err := check(p); err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

// TestNewerVersion: bytes of a newer format are told from damage.
func TestNewerVersion(t *testing.T) {
	b := newBuilder(testID, 1)
	b.batch(1)
	h := b.p[:atoll.BlockSize]
	h[4] = 2
	le.PutUint32(h[12:], crcWithout(h, 12))
	if _, err := ParseHeader(h); !errors.Is(err, atoll.ErrVersion) {
		t.Errorf("header: %v", err)
	}
	f := newBuilder(testID, 1).footer()
	f[4] = 2
	le.PutUint32(f[8:], crcWithout(f[:atoll.BlockSize], 8))
	if _, err := ParseFooterHead(f); !errors.Is(err, atoll.ErrVersion) {
		t.Errorf("footer: %v", err)
	}
	s := EncodeSuper(Super{})
	for _, p := range [][]byte{s[:atoll.BlockSize], s[atoll.BlockSize:]} {
		p[8] = 2
		le.PutUint32(p[12:], crcWithout(p, 12))
	}
	if _, err := ParseSuper(s); !errors.Is(err, atoll.ErrVersion) {
		t.Errorf("superblock: %v", err)
	}
}

func FuzzHeader(f *testing.F) {
	b := newBuilder(testID, 1)
	b.batch(2)
	f.Add(b.p[:atoll.BlockSize])
	f.Fuzz(func(t *testing.T, p []byte) {
		for _, fix := range []bool{false, true} {
			if fix && len(p) >= atoll.BlockSize {
				p = bytes.Clone(p[:atoll.BlockSize])
				le.PutUint32(p, batchMagic)
				le.PutUint32(p[12:], crcWithout(p, 12))
			}
			h, err := ParseHeader(p)
			if err != nil {
				continue
			}
			for i := range h.Records() {
				h.Record(i)
			}
			for i := range h.Blocks() {
				h.BlockCRC(i)
			}
			h.Head()
		}
	})
}

func FuzzFooter(f *testing.F) {
	b := newBuilder(testID, 1)
	b.batch(2)
	f.Add(b.footer())
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) < 2*atoll.BlockSize {
			return
		}
		p = bytes.Clone(p)
		le.PutUint32(p, footerMagic)
		le.PutUint32(p[12:], CRC(p[atoll.BlockSize:]))
		le.PutUint32(p[8:], crcWithout(p[:atoll.BlockSize], 8))
		foot, err := ParseFooterHead(p)
		if err != nil || foot.ParseBody(p[atoll.BlockSize:]) != nil {
			return
		}
		q := make([]byte, foot.Blocks().Bytes())
		foot.Encode(q) // panics when the counts do not agree
	})
}

func FuzzSuper(f *testing.F) {
	f.Add(EncodeSuper(Super{Node: 3}))
	f.Fuzz(func(t *testing.T, p []byte) { ParseSuper(p) })
}

// FuzzScan: no bytes make Scan or Rebuild fail, and what they report holds.
func FuzzScan(f *testing.F) {
	b := newBuilder(testID, 1)
	b.batch(2)
	b.batch(1)
	f.Add(append(b.p, b.footer()...), uint16(0), byte(0))
	f.Add(b.p, uint16(atoll.BlockSize+7), byte(1))
	f.Fuzz(func(t *testing.T, p []byte, at uint16, x byte) {
		if len(p) == 0 || len(p) > 32*atoll.BlockSize {
			return
		}
		p = bytes.Clone(p)
		p[int(at)%len(p)] ^= x
		s := Scan(bytes.NewReader(p), testID, 32)
		if int(s.Length) != len(s.CRCs) || s.Length.Bytes() > int64(len(p)) {
			t.Fatalf("length %d with %d checksums in %d bytes", s.Length, len(s.CRCs), len(p))
		}
		for i, crc := range s.CRCs {
			if CRC(p[i*atoll.BlockSize:][:atoll.BlockSize]) != crc {
				t.Fatalf("block %d counts with another checksum", i)
			}
		}
		Rebuild(bytes.NewReader(p), testID, 32)
		CheckBatches(p, testID, 0, func(Header, []byte) error { return nil })
	})
}
