package rbdstream

import (
	"bufio"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"slices"
	"strings"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
)

// Fields says which fields of a Header are there.
type Fields uint8

// The fields of a Header that may be missing.
const (
	HasOrder Fields = 1 << iota
	HasFeatures
	HasStripeUnit
	HasStripeCount

	HasAll = HasOrder | HasFeatures | HasStripeUnit | HasStripeCount
)

// Header is what an image stream says of an image beyond its contents. Fields
// that are not in Has are zero, and the reader of the stream chooses.
type Header struct {
	Has         Fields
	Order       uint64 // log2 of the size of an object
	Features    uint64 // of the image; see DefaultFeatures
	StripeUnit  uint64 // bytes
	StripeCount uint64
	Meta        []Meta // by key
	Skipped     int    // unknown records; Reader only
	Summed      bool   // a checksum was there and right; Reader only
}

// Meta is one pair of an image's metadata.
type Meta struct{ Key, Value string }

// metaCost is what a pair costs beside its bytes, so that many tiny ones are
// bounded too.
const metaCost = 64

// DefaultFeatures is the set of features that every current rbd can give an
// image: layering, exclusive lock, object map, fast diff and deep flatten.
const DefaultFeatures = 61

// DefaultOrder is log2 of the usual size of an object, 4 MiB.
const DefaultOrder = 22

// DefaultHeader returns the header of an image with rbd's usual layout.
func DefaultHeader() Header {
	return Header{Has: HasAll, Order: DefaultOrder, Features: DefaultFeatures, StripeUnit: 1 << DefaultOrder, StripeCount: 1}
}

// ObjectSize returns the size of an object in bytes, 4 MiB if the header does
// not say or says nonsense.
func (h *Header) ObjectSize() int64 {
	if h.Has&HasOrder == 0 || h.Order < 12 || h.Order > 25 {
		return 1 << DefaultOrder
	}
	return 1 << h.Order
}

// WriteHeader writes the beginning of an image stream with diffs diffs to w; the
// diffs follow, each by a Writer of V2. sum adds a checksum to the header.
func WriteHeader(w io.Writer, h Header, diffs int, sum bool) error {
	b := []byte(bannerImage)
	for _, f := range []struct {
		has Fields
		tag byte
		v   uint64
	}{
		{HasOrder, tagOrder, h.Order}, {HasFeatures, tagFeatures, h.Features},
		{HasStripeUnit, tagStripeUnit, h.StripeUnit}, {HasStripeCount, tagStripeCount, h.StripeCount},
	} {
		if h.Has&f.has != 0 {
			b = append(b, f.tag)
			b = le.AppendUint64(b, 8)
			b = le.AppendUint64(b, f.v)
		}
	}
	meta := slices.SortedStableFunc(slices.Values(h.Meta), func(a, b Meta) int { return strings.Compare(a.Key, b.Key) })
	total := 0
	for _, m := range meta {
		if total += metaCost + len(m.Key) + len(m.Value); len(m.Key) > MaxMeta || len(m.Value) > MaxMeta || total > MaxMetaTotal {
			return fmt.Errorf("write image header: metadata %.40q of %d bytes: %w", m.Key, len(m.Value), atoll.ErrTooLarge)
		}
		b = append(b, tagMeta)
		b = le.AppendUint64(b, uint64(8+len(m.Key)+len(m.Value)))
		b = appendString(b, m.Key)
		b = appendString(b, m.Value)
	}
	count := le.AppendUint64(nil, uint64(diffs))
	if sum {
		crc := crc32.Update(crc32.Checksum(b, castagnoli), castagnoli, count)
		b = append(b, tagSum)
		b = le.AppendUint64(b, 8)
		b = append(b, sumMagic...)
		b = le.AppendUint32(b, crc)
	}
	b = append(b, tagHeaderEnd)
	b = append(b, bannerDiffs...)
	b = append(b, count...)
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("write image header: %w", err)
	}
	return nil
}

func appendString(b []byte, s string) []byte {
	return append(le.AppendUint32(b, uint32(len(s))), s...)
}

// ImageReader reads an image stream. One goroutine at a time may use it.
type ImageReader struct {
	// Header of the image, known from the beginning.
	Header Header
	// Diffs is how many diffs the stream claims to hold.
	Diffs uint64

	r    *bufio.Reader
	cur  *Reader
	left uint64
	err  error
}

// headerSum is the checksum of a header that a stream claims, and the checksum
// of what it covers up to the number of diffs.
type headerSum struct{ want, have uint32 }

// NewImageReader reads the header of an image stream.
func NewImageReader(r io.Reader) (*ImageReader, error) {
	s := &source{r: bufio.NewReaderSize(r, bufferSize)}
	if err := expect(s, bannerImage, "banner of an image"); err != nil {
		return nil, err
	}
	i := &ImageReader{r: s.r}
	total := 0
	var sum headerSum
	for more := true; more; {
		var err error
		if more, err = i.Header.read(s, &total, &sum); err != nil {
			return nil, err
		}
	}
	if err := expect(s, bannerDiffs, "banner of an image's diffs"); err != nil {
		return nil, err
	}
	var b [8]byte
	if err := s.fill(b[:], "number of diffs", V2); err != nil {
		return nil, err
	}
	if i.Header.Summed {
		if err := checkSum("image header", crc32.Update(sum.have, castagnoli, b[:]), sum.want); err != nil {
			return nil, err
		}
	}
	i.Diffs = le.Uint64(b[:])
	i.left = i.Diffs
	return i, nil
}

// NextDiff returns a Reader of the next diff, after reading over what is left of
// the last one. It returns io.EOF after the last.
func (i *ImageReader) NextDiff() (*Reader, error) {
	for i.cur != nil && i.err == nil {
		_, err := i.cur.Next()
		if err == io.EOF {
			i.cur = nil
		} else if err != nil {
			i.err = err
		}
	}
	if i.err != nil {
		return nil, i.err
	}
	if i.left == 0 {
		return nil, io.EOF
	}
	i.left--
	i.cur, i.err = NewReader(i.r, V2)
	return i.cur, i.err
}

func expect(s *source, banner, what string) error {
	b := make([]byte, len(banner))
	if err := s.fill(b, what, V2); err != nil {
		return err
	}
	if string(b) != banner {
		return fail(syscall.EINVAL, atoll.ErrInvalid, "read %s: invalid or unexpected %q", what, b)
	}
	return nil
}

// read reads one record of the header; it reports false after the last. total
// is the room that metadata take so far.
func (h *Header) read(s *source, total *int, sum *headerSum) (more bool, err error) {
	before := s.crc
	var b [9]byte
	if err := s.fill(b[:1], "tag of an image's header", V2); err != nil || b[0] == tagHeaderEnd {
		return false, err
	}
	if err := s.fill(b[1:], "length", V2); err != nil {
		return false, err
	}
	tag, length := b[0], le.Uint64(b[1:])
	switch tag {
	case tagOrder:
		return true, h.field(s, HasOrder, &h.Order)
	case tagFeatures:
		return true, h.field(s, HasFeatures, &h.Features)
	case tagStripeUnit:
		return true, h.field(s, HasStripeUnit, &h.StripeUnit)
	case tagStripeCount:
		return true, h.field(s, HasStripeCount, &h.StripeCount)
	case tagMeta:
		return true, h.meta(s, total)
	case tagSum:
		if length == 8 {
			return true, h.sum(s, before, sum)
		}
	}
	if length > math.MaxInt64 {
		return false, fail(syscall.EINVAL, atoll.ErrInvalid, "read image header: a record of %d bytes with tag %d", length, tag)
	}
	h.Skipped++
	return true, s.skip(int64(length), V2)
}

func (h *Header) field(s *source, has Fields, v *uint64) error {
	var b [8]byte
	if err := s.fill(b[:], "field of an image's header", V2); err != nil {
		return err
	}
	*v = le.Uint64(b[:])
	h.Has |= has
	return nil
}

func (h *Header) sum(s *source, have uint32, sum *headerSum) error {
	var b [8]byte
	if err := s.fill(b[:], "checksum of an image's header", V2); err != nil {
		return err
	}
	if string(b[:4]) != sumMagic {
		h.Skipped++
		return nil
	}
	h.Summed = true
	*sum = headerSum{le.Uint32(b[4:]), have}
	return nil
}

func (h *Header) meta(s *source, total *int) error {
	key, err := s.str(MaxMeta, V2)
	if err != nil {
		return err
	}
	value, err := s.str(MaxMeta, V2)
	if err != nil {
		return err
	}
	if *total += metaCost + len(key) + len(value); *total > MaxMetaTotal {
		return fail(syscall.EINVAL, atoll.ErrTooLarge, "read image header: more than %d bytes of metadata", MaxMetaTotal)
	}
	i, found := slices.BinarySearchFunc(h.Meta, key, func(m Meta, key string) int { return strings.Compare(m.Key, key) })
	if found {
		h.Meta[i].Value = value
		return nil
	}
	h.Meta = slices.Insert(h.Meta, i, Meta{key, value})
	return nil
}
