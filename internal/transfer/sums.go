package transfer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// The checksums of a file F are in F.crc32c, lines of text:
//
//	atoll crc32c 4194304
//	0 1c291ca3
//	8388608 e3069283
//	end 10000000 2 5b0ef1b5
//
// The first line tells the size of a piece. Each piece of the file that is not
// all zero has a line with its offset and the CRC32C of its bytes, ascending;
// the last piece may be shorter. The end line has the size of the file, the
// number of pieces, and the CRC32C of all lines before it.
const (
	sumsSuffix = ".crc32c"
	sumsPiece  = 4 << 20
)

// sums writes the checksums of a file that is written ascending.
type sums struct {
	f    *os.File
	path string
	w    *bufio.Writer
	st   sumState
}

// sumState is where a sums can go on.
type sumState struct {
	At    int64  `json:"at"`   // of the file, summed up to here
	CRC   uint32 `json:"crc"`  // of the piece begun
	Data  bool   `json:"data"` // the piece has some
	Len   int64  `json:"len"`  // of the checksum file
	Count int64  `json:"count"`
	Lines uint32 `json:"lines"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openSums makes a checksum file, or goes on with one.
func openSums(path string, from *sumState) (*sums, error) {
	flags := os.O_CREATE | os.O_EXCL
	if from != nil {
		flags = 0
	}
	f, err := os.OpenFile(path, os.O_WRONLY|flags, 0o644)
	if os.IsExist(err) {
		return nil, fmt.Errorf("write checksums to %s: the file is there already; remove it: %w", path, atoll.ErrExist)
	}
	if err != nil {
		return nil, writeErr(path, err)
	}
	s := &sums{f: f, path: path, w: bufio.NewWriter(f)}
	if from == nil {
		return s, s.line("atoll crc32c %d\n", sumsPiece)
	}
	s.st = *from
	if err := f.Truncate(from.Len); err != nil {
		return nil, errors.Join(writeErr(path, err), f.Close())
	}
	if _, err := f.Seek(from.Len, io.SeekStart); err != nil {
		return nil, errors.Join(writeErr(path, err), f.Close())
	}
	return s, nil
}

func (s *sums) line(format string, args ...any) error {
	b := fmt.Appendf(nil, format, args...)
	s.st.Lines = crc32.Update(s.st.Lines, castagnoli, b)
	s.st.Len += int64(len(b))
	if _, err := s.w.Write(b); err != nil {
		return writeErr(s.path, err)
	}
	return nil
}

// add sums up p at off; what lies between the last call's end and off is zero.
func (s *sums) add(off int64, p []byte) error {
	if err := s.zeros(off); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(int64(len(p)), sumsPiece-s.st.At%sumsPiece)
		s.st.CRC = crc32.Update(s.st.CRC, castagnoli, p[:n])
		s.st.Data = true
		s.st.At += n
		p = p[n:]
		if err := s.piece(); err != nil {
			return err
		}
	}
	return nil
}

// zeros goes on to off over zeros.
func (s *sums) zeros(off int64) error {
	for s.st.At < off {
		if !s.st.Data && s.st.At%sumsPiece == 0 && off-s.st.At >= sumsPiece {
			s.st.At = off / sumsPiece * sumsPiece // whole pieces of zeros
			continue
		}
		n := min(off-s.st.At, sumsPiece-s.st.At%sumsPiece, int64(len(zeros)))
		s.st.CRC = crc32.Update(s.st.CRC, castagnoli, zeros[:n])
		s.st.At += n
		if err := s.piece(); err != nil {
			return err
		}
	}
	return nil
}

// piece ends a piece when its end is reached.
func (s *sums) piece() error {
	if s.st.At%sumsPiece != 0 {
		return nil
	}
	return s.endPiece()
}

func (s *sums) endPiece() error {
	start := (s.st.At - 1) / sumsPiece * sumsPiece
	crc, data := s.st.CRC, s.st.Data
	s.st.CRC, s.st.Data = 0, false
	if !data {
		return nil
	}
	s.st.Count++
	return s.line("%d %08x\n", start, crc)
}

// state makes what was summed up durable and returns where to go on.
func (s *sums) state() (sumState, error) {
	if err := s.w.Flush(); err != nil {
		return sumState{}, writeErr(s.path, err)
	}
	if err := s.f.Sync(); err != nil {
		return sumState{}, writeErr(s.path, err)
	}
	return s.st, nil
}

// end ends the sums of a file of size bytes and makes them durable.
func (s *sums) end(size int64) error {
	if err := s.zeros(size); err != nil {
		return err
	}
	if s.st.At%sumsPiece != 0 {
		if err := s.endPiece(); err != nil {
			return err
		}
	}
	if err := s.line("end %d %d %08x\n", size, s.st.Count, s.st.Lines); err != nil {
		return err
	}
	_, err := s.state()
	return err
}

func (s *sums) close() error {
	if err := s.f.Close(); err != nil {
		return writeErr(s.path, err)
	}
	return nil
}

// pieceSum is a line of a checksum file.
type pieceSum struct {
	off int64
	crc uint32
}

// readSums reads a checksum file.
func readSums(path string) (size int64, all []pieceSum, err error) {
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return 0, nil, fmt.Errorf("read checksums %s: %w", path, atoll.ErrNotExist)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("read checksums %s: %v: %w", path, err, atoll.ErrIO)
	}
	bad := func(why string) (int64, []pieceSum, error) {
		return 0, nil, fmt.Errorf("read checksums %s: %s: %w", path, why, atoll.ErrCorrupt)
	}
	last := bytes.LastIndexByte(bytes.TrimSuffix(b, []byte("\n")), '\n') + 1
	var count int64
	var crc uint32
	if _, err := fmt.Sscanf(string(b[last:]), "end %d %d %08x\n", &size, &count, &crc); err != nil {
		return bad("it has no end")
	}
	if crc32.Checksum(b[:last], castagnoli) != crc {
		return bad("it is damaged")
	}
	lines := bytes.Split(bytes.TrimSuffix(b[:last], []byte("\n")), []byte("\n"))
	var unit int64
	if _, err := fmt.Sscanf(string(lines[0]), "atoll crc32c %d", &unit); err != nil || unit != sumsPiece {
		return bad("not a checksum file")
	}
	next := int64(0)
	for _, l := range lines[1:] {
		var s pieceSum
		if _, err := fmt.Sscanf(string(l), "%d %08x", &s.off, &s.crc); err != nil || s.off < next || s.off%sumsPiece != 0 || s.off >= size {
			return bad("it makes no sense")
		}
		next = s.off + sumsPiece
		all = append(all, s)
	}
	if int64(len(all)) != count {
		return bad("lines are missing")
	}
	return size, all, nil
}

// VerifyFile compares a file with the checksums beside it, reading several
// pieces at once (concurrency; 0 means 10). ErrNotExist if there are none,
// ErrCorrupt if anything differs.
func VerifyFile(ctx context.Context, path string, concurrency int) error {
	size, all, err := readSums(path + sumsSuffix)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("verify %s: %v: %w", path, err, atoll.ErrNotExist)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("verify %s: %v: %w", path, err, atoll.ErrIO)
	}
	if st.Size() != size {
		return fmt.Errorf("verify %s: %d bytes where the checksums say %d: %w", path, st.Size(), size, atoll.ErrCorrupt)
	}
	if concurrency <= 0 {
		concurrency = defaultConcurrency
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(concurrency)
	for off := int64(0); off < size && gctx.Err() == nil; {
		want := pieceSum{off: -1}
		if len(all) > 0 && all[0].off == off {
			want, all = all[0], all[1:]
		} else if data := nextData(f, off, size) / sumsPiece * sumsPiece; data > off { // holes are zeros
			if len(all) > 0 {
				data = min(data, all[0].off)
			}
			off = data
			continue
		}
		at := off
		g.Go(func() error { return verifyPiece(f, at, min(sumsPiece, size-at), want) })
		off += sumsPiece
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// verifyPiece compares one piece; without a sum it must be all zero.
func verifyPiece(f *os.File, off, n int64, want pieceSum) error {
	b := host.Alloc(int(n))
	defer b.Release()
	if _, err := f.ReadAt(b.Bytes(), off); err != nil {
		return fmt.Errorf("verify %s at %d: %v: %w", f.Name(), off, err, atoll.ErrIO)
	}
	if want.off < 0 && isZeroLong(b.Bytes()) || want.off >= 0 && crc32.Checksum(b.Bytes(), castagnoli) == want.crc {
		return nil
	}
	return fmt.Errorf("verify %s: the %d bytes at %d are not those that were written: %w", f.Name(), n, off, atoll.ErrCorrupt)
}
