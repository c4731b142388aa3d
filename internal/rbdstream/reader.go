package rbdstream

import (
	"bufio"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
)

// Kind says what a record is.
type Kind uint8

// The kinds of record.
const (
	From      Kind = iota + 1 // Name
	To                        // Name
	Protected                 // Flag
	Size                      // Len
	Write                     // Off, Len; the data are read from the Reader
	Zero                      // Off, Len
	Unknown                   // Tag; skipped
)

// Record is one record of a diff.
type Record struct {
	Kind Kind
	Name string
	Flag bool
	Off  int64
	Len  int64
	Tag  byte
}

// Reader reads one diff. One goroutine at a time may use it.
type Reader struct {
	in     source
	format Format
	left   int64 // data of the current record not read yet
	done   bool
	summed bool
	err    error
}

// NewReader reads the banner of a diff. Only the format want is taken; 0 takes
// both. A *bufio.Reader of 64 KiB and more is used as it is, so that what follows
// the diff can be read on from it.
func NewReader(r io.Reader, want Format) (*Reader, error) {
	d := &Reader{in: source{r: bufio.NewReaderSize(r, bufferSize)}, format: want}
	if want == 0 {
		d.format = V1
	}
	var b [len(bannerV1)]byte
	if err := d.fill(b[:], "banner"); err != nil {
		return nil, err
	}
	switch string(b[:]) {
	case bannerV1:
		d.format = V1
	case bannerV2:
		d.format = V2
	default:
		return nil, fail(syscall.EINVAL, atoll.ErrInvalid, "read banner of a diff: invalid or unexpected %q", b[:])
	}
	if want != 0 && d.format != want {
		return nil, fail(syscall.EINVAL, atoll.ErrInvalid, "read banner of a diff: a %v where a %v is expected", d.format, want)
	}
	return d, nil
}

// Format returns the diff's format.
func (d *Reader) Format() Format { return d.format }

// Summed reports whether a checksum was there and right. It is known at the end.
func (d *Reader) Summed() bool { return d.summed }

// Next returns the next record, after skipping what was not read of the last
// one's data. It returns io.EOF after the end record; any other error is final.
func (d *Reader) Next() (Record, error) {
	if d.err == nil && d.done {
		return Record{}, io.EOF
	}
	for d.err == nil {
		rec, again, err := d.next()
		if err != nil {
			d.err = err
			break
		}
		if !again {
			if rec.Kind == 0 {
				return Record{}, io.EOF
			}
			return rec, nil
		}
	}
	return Record{}, d.err
}

// next reads one record; again says that it was ours alone.
func (d *Reader) next() (rec Record, again bool, err error) {
	if err := d.skip(d.left); err != nil {
		return rec, false, err
	}
	d.left = 0
	sum := d.in.crc
	var b [16]byte
	if err := d.fill(b[:1], "tag"); err != nil {
		return rec, false, err
	}
	tag, length := b[0], uint64(0)
	if tag == tagEnd {
		d.done = true
		return rec, false, nil
	}
	if d.format == V2 {
		if err := d.fill(b[:8], "length"); err != nil {
			return rec, false, err
		}
		length = le.Uint64(b[:])
	}
	switch tag {
	case tagFrom:
		rec, err = d.name(From)
	case tagTo:
		rec, err = d.name(To)
	case tagSize:
		rec, err = d.size()
	case tagWrite:
		if rec, err = d.span(Write); err == nil {
			d.left = rec.Len
		}
	case tagZero:
		rec, err = d.span(Zero)
	default:
		if d.format == V2 {
			return d.private(tag, length, sum)
		}
		rec = Record{Kind: Unknown, Tag: tag}
	}
	return rec, false, err
}

// private reads the records that only V2 has: sum is the checksum of what came
// before.
func (d *Reader) private(tag byte, length uint64, sum uint32) (rec Record, again bool, err error) {
	var b [8]byte
	switch {
	case tag == tagProtected: // one byte, whatever the length says
		err = d.fill(b[:1], "protection")
		return Record{Kind: Protected, Flag: b[0] != 0}, false, err
	case tag == tagSum && length == 8:
		if err := d.fill(b[:], "checksum"); err != nil {
			return rec, false, err
		}
		if string(b[:4]) == sumMagic {
			d.summed = true
			return rec, true, checkSum(d.format.String(), sum, le.Uint32(b[4:]))
		}
	case length > math.MaxInt64:
		return rec, false, fail(syscall.EINVAL, atoll.ErrInvalid, "read %v: a record of %d bytes with tag %d", d.format, length, tag)
	default:
		if err := d.skip(int64(length)); err != nil {
			return rec, false, err
		}
	}
	return Record{Kind: Unknown, Tag: tag}, false, nil
}

func checkSum(what string, have, want uint32) error {
	if have != want {
		return fail(syscall.EBADMSG, atoll.ErrCorrupt, "read %s: checksum %08x where the stream says %08x", what, have, want)
	}
	return nil
}

func (d *Reader) name(k Kind) (Record, error) {
	s, err := d.in.str(MaxName, d.format)
	return Record{Kind: k, Name: s}, err
}

func (d *Reader) size() (Record, error) {
	var b [8]byte
	if err := d.fill(b[:], "size"); err != nil {
		return Record{}, err
	}
	n := le.Uint64(b[:])
	if n > math.MaxInt64 {
		return Record{}, fail(syscall.EINVAL, atoll.ErrInvalid, "read %v: size %d", d.format, n)
	}
	return Record{Kind: Size, Len: int64(n)}, nil
}

func (d *Reader) span(k Kind) (Record, error) {
	var b [16]byte
	if err := d.fill(b[:], "range"); err != nil {
		return Record{}, err
	}
	off, n := le.Uint64(b[:]), le.Uint64(b[8:])
	if off > math.MaxInt64 || n > math.MaxInt64-off {
		return Record{}, fail(syscall.EINVAL, atoll.ErrInvalid, "read %v: range %d+%d", d.format, off, n)
	}
	return Record{Kind: k, Off: int64(off), Len: int64(n)}, nil
}

// Read reads on in the data of the last record and returns io.EOF at their end.
func (d *Reader) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	if d.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > d.left {
		p = p[:d.left]
	}
	n, err := d.in.Read(p)
	d.left -= int64(n)
	if err == io.EOF {
		err = d.format.short("data", d.in.n)
	}
	if err != nil && (n == 0 || d.left > 0) {
		d.err = err
		return n, err
	}
	return n, nil
}

// skipData reads over n bytes of the current record's data.
func (d *Reader) skipData(n int64) error {
	if d.err == nil {
		d.left -= n
		d.err = d.skip(n)
	}
	return d.err
}

func (d *Reader) fill(p []byte, what string) error { return d.in.fill(p, what, d.format) }

func (d *Reader) skip(n int64) error { return d.in.skip(n, d.format) }

// source reads a stream and sums up what it read.
type source struct {
	r   *bufio.Reader
	crc uint32
	n   int64
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.crc = crc32.Update(s.crc, castagnoli, p[:n])
	s.n += int64(n)
	return n, err
}

// fill reads exactly p; f is the format that says how to call an early end.
func (s *source) fill(p []byte, what string, f Format) error {
	_, err := io.ReadFull(s, p)
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return f.short(what, s.n)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", what, err)
	}
	return nil
}

// skip reads over n bytes.
func (s *source) skip(n int64, f Format) error {
	if n == 0 {
		return nil
	}
	var b [4096]byte
	for n > 0 {
		m := min(n, int64(len(b)))
		if err := s.fill(b[:m], "data", f); err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// str reads a string of at most limit bytes.
func (s *source) str(limit int, f Format) (string, error) {
	var b [4]byte
	if err := s.fill(b[:], "length of a string", f); err != nil {
		return "", err
	}
	n := le.Uint32(b[:])
	if n > uint32(limit) {
		return "", fail(syscall.EINVAL, atoll.ErrTooLarge, "read a string of %d bytes: the limit is %d", n, limit)
	}
	p := make([]byte, n)
	err := s.fill(p, "string", f)
	return string(p), err
}
