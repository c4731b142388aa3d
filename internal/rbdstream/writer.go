package rbdstream

import (
	"bufio"
	"bytes"
	"fmt"
	"hash/crc32"
	"io"
	"syscall"

	"github.com/atollstore/atoll/internal/atoll"
)

// WriterOptions steer a Writer.
type WriterOptions struct {
	// Format of the diff; V1 if zero.
	Format Format
	// Checksum adds a checksum record to V2. Other programs skip it with a
	// warning.
	Checksum bool
}

// Writer writes one diff. Its errors are sticky: after the first, every call
// returns it. One goroutine at a time may use it.
type Writer struct {
	o     WriterOptions
	w     *bufio.Writer
	stage int   // how far the order f t p s data has gone
	size  int64 // -1 before Size
	next  int64 // the smallest offset that may come
	zero  span  // zeros not written out yet
	data  []byte
	at    int64 // offset of data
	crc   uint32
	err   error
	head  [1 + 8 + 16]byte
	page  []byte // for WriteFrom
}

// span is a range of an image.
type span struct{ off, n int64 }

// The stages of a diff.
const (
	stageNew = iota
	stageBanner
	stageFrom
	stageTo
	stageProtected
	stageSize
	stageData
	stageEnd
)

// bufferSize is the size of the buffers between records and the stream.
const bufferSize = 64 << 10

// copySize is the size of the buffer of what is copied from a reader.
const copySize = 256 << 10

// zeroPage is never written to.
var zeroPage [PageSize]byte

// NewWriter returns a Writer of one diff to w. A *bufio.Writer of 64 KiB and
// more is used as it is.
func NewWriter(w io.Writer, o WriterOptions) *Writer {
	if o.Format != V2 {
		o.Format, o.Checksum = V1, false
	}
	return &Writer{o: o, w: bufio.NewWriterSize(w, bufferSize), size: -1}
}

// From names the version that the diff begins at.
func (w *Writer) From(name string) error { return w.name(tagFrom, stageFrom, name) }

// To names the version that the diff leads to.
func (w *Writer) To(name string) error { return w.name(tagTo, stageTo, name) }

func (w *Writer) name(tag byte, stage int, name string) error {
	if len(name) > MaxName || name == "" {
		return w.fail(fail(syscall.EINVAL, atoll.ErrInvalid, "write %v: a name of %d bytes", w.o.Format, len(name)))
	}
	if !w.enter(stage) {
		return w.err
	}
	w.tag(tag, 4+int64(len(name)))
	le.PutUint32(w.head[:], uint32(len(name)))
	w.put(w.head[:4])
	w.put([]byte(name))
	return w.err
}

// Protected says whether the version that the diff leads to is protected against
// removal. V1 cannot say it and writes nothing.
func (w *Writer) Protected(yes bool) error {
	if w.o.Format != V2 {
		return w.err
	}
	if w.stage != stageTo {
		return w.fail(fmt.Errorf("write %v: protection of no version: %w", w.o.Format, atoll.ErrInvalid))
	}
	if !w.enter(stageProtected) {
		return w.err
	}
	w.tag(tagProtected, 1)
	w.head[0] = 0
	if yes {
		w.head[0] = 1
	}
	w.put(w.head[:1])
	return w.err
}

// Size tells the size of the image at the end of the diff. Later ranges must lie
// within.
func (w *Writer) Size(n int64) error {
	if n < 0 {
		return w.fail(fmt.Errorf("write %v: size %d: %w", w.o.Format, n, atoll.ErrInvalid))
	}
	if !w.enter(stageSize) {
		return w.err
	}
	w.size = n
	w.tag(tagSize, 8)
	le.PutUint64(w.head[:], uint64(n))
	w.put(w.head[:8])
	return w.err
}

// Write adds the data p at off, which must not lie before the end of what came
// before. Pages of zeros in p become zeros. Write keeps nothing of p.
func (w *Writer) Write(off int64, p []byte) error {
	if !w.enterRange(off, int64(len(p))) {
		return w.err
	}
	for len(p) > 0 && w.err == nil {
		n, zero := run(off, p)
		if zero {
			w.addZero(off, int64(n))
		} else {
			w.addData(off, p[:n], n < len(p))
		}
		off, p = off+int64(n), p[n:]
	}
	return w.err
}

// WriteFrom adds n bytes of data from r at off.
func (w *Writer) WriteFrom(off, n int64, r io.Reader) error {
	if w.page == nil {
		w.page = make([]byte, copySize)
	}
	for n > 0 {
		m := min(n, int64(len(w.page))-off%PageSize)
		if _, err := io.ReadFull(r, w.page[:m]); err != nil {
			return w.fail(fmt.Errorf("write %v: read data for %d: %w", w.o.Format, off, err))
		}
		if err := w.Write(off, w.page[:m]); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return w.err
}

// Zero adds n zeros at off, which must not lie before the end of what came
// before.
func (w *Writer) Zero(off, n int64) error {
	if w.enterRange(off, n) {
		w.addZero(off, n)
	}
	return w.err
}

// piece adds n bytes at off as a record of their own, as they are: data from r, or
// zeros if r is nil.
func (w *Writer) piece(off, n int64, r io.Reader) error {
	if !w.enterRange(off, n) {
		return w.err
	}
	w.flushRuns()
	if r == nil {
		w.tag(tagZero, 16)
		w.span(off, n)
		return w.err
	}
	w.tag(tagWrite, 16+n)
	w.span(off, n)
	if w.page == nil {
		w.page = make([]byte, copySize)
	}
	for n > 0 && w.err == nil {
		p := w.page[:min(n, copySize)]
		if _, err := io.ReadFull(r, p); err != nil {
			return w.fail(fmt.Errorf("write %v: read data for %d: %w", w.o.Format, off, err))
		}
		w.put(p)
		n -= int64(len(p))
	}
	return w.err
}

// End ends the diff and hands everything to the underlying writer.
func (w *Writer) End() error {
	w.flushRuns()
	if !w.enter(stageEnd) {
		return w.err
	}
	if w.o.Checksum {
		sum := w.crc
		w.tag(tagSum, 8)
		copy(w.head[:4], sumMagic)
		le.PutUint32(w.head[4:], sum)
		w.put(w.head[:8])
	}
	w.head[0] = tagEnd
	w.put(w.head[:1])
	if w.err == nil {
		w.err = w.w.Flush()
	}
	return w.err
}

// run returns how many bytes at the beginning of p, the data at off, are alike:
// only pages of zeros, or only others.
func run(off int64, p []byte) (n int, zero bool) {
	for n < len(p) {
		m := min(PageSize-int((off+int64(n))%PageSize), len(p)-n)
		z := bytes.Equal(p[n:n+m], zeroPage[:m])
		if n > 0 && z != zero {
			break
		}
		zero, n = z, n+m
	}
	return n, zero
}

// addZero puts zeros to those that wait.
func (w *Writer) addZero(off, n int64) {
	w.flushData()
	if w.zero.n > 0 && w.zero.off+w.zero.n != off {
		w.flushZero()
	}
	if w.zero.n == 0 {
		w.zero.off = off
	}
	w.zero.n += n
}

// addData puts data to those that wait, or writes out what is known to be a
// whole record; ended says that no more data follow these without a gap.
func (w *Writer) addData(off int64, p []byte, ended bool) {
	w.flushZero()
	if len(w.data) > 0 && w.at+int64(len(w.data)) != off {
		w.flushData()
	}
	for len(p) > 0 && w.err == nil {
		m := int(min(int64(len(p)), MaxData-off%MaxData))
		whole := (off+int64(m))%MaxData == 0 || m == len(p) && ended
		switch {
		case len(w.data) == 0 && whole:
			w.record(off, p[:m])
		default:
			if len(w.data) == 0 {
				w.at = off
			}
			w.data = append(w.data, p[:m]...)
			if whole {
				w.flushData()
			}
		}
		off, p = off+int64(m), p[m:]
	}
}

func (w *Writer) flushRuns() { w.flushZero(); w.flushData() }

func (w *Writer) flushData() {
	if len(w.data) > 0 {
		w.record(w.at, w.data)
		w.data = w.data[:0]
	}
}

func (w *Writer) flushZero() {
	if w.zero.n == 0 {
		return
	}
	w.tag(tagZero, 16)
	w.span(w.zero.off, w.zero.n)
	w.zero = span{}
}

// record writes out a record of data.
func (w *Writer) record(off int64, p []byte) {
	w.tag(tagWrite, 16+int64(len(p)))
	w.span(off, int64(len(p)))
	w.put(p)
}

func (w *Writer) span(off, n int64) {
	le.PutUint64(w.head[:], uint64(off))
	le.PutUint64(w.head[8:], uint64(n))
	w.put(w.head[:16])
}

// tag writes out a tag and, in V2, the length of its payload.
func (w *Writer) tag(tag byte, n int64) {
	w.head[0] = tag
	if w.o.Format == V1 {
		w.put(w.head[:1])
		return
	}
	le.PutUint64(w.head[1:], uint64(n))
	w.put(w.head[:9])
}

func (w *Writer) put(p []byte) {
	if w.err != nil {
		return
	}
	if w.o.Checksum {
		w.crc = crc32.Update(w.crc, castagnoli, p)
	}
	_, w.err = w.w.Write(p)
}

// fail makes err the Writer's error, unless it has one.
func (w *Writer) fail(err error) error {
	if w.err == nil {
		w.err = err
	}
	return w.err
}

// enter goes on to a stage and reports whether all is well.
func (w *Writer) enter(stage int) bool {
	if w.err != nil {
		return false
	}
	if stage < w.stage || stage == w.stage && stage != stageData {
		w.err = fmt.Errorf("write %v: record out of order: %w", w.o.Format, atoll.ErrInvalid)
		return false
	}
	if w.stage == stageNew {
		w.put([]byte(w.o.Format.banner()))
	}
	w.stage = stage
	return w.err == nil
}

// enterRange goes on to the data and checks a range of them; false if there is
// nothing to do.
func (w *Writer) enterRange(off, n int64) bool {
	if n == 0 || !w.enter(stageData) {
		return false
	}
	switch {
	case off < 0 || n < 0 || off+n < off:
		w.err = fmt.Errorf("write %v: range %d+%d: %w", w.o.Format, off, n, atoll.ErrInvalid)
	case off < w.next:
		w.err = fail(syscall.ENOTSUP, atoll.ErrInvalid, "write %v: offset %d after data up to %d", w.o.Format, off, w.next)
	case w.size >= 0 && off+n > w.size:
		w.err = fmt.Errorf("write %v: range %d+%d in an image of %d bytes: %w", w.o.Format, off, n, w.size, atoll.ErrInvalid)
	}
	w.next = off + n
	return w.err == nil
}

// Mark is a place in a diff at which another Writer can go on. It can be kept
// as JSON.
type Mark struct {
	Stage   int    `json:"stage"`
	Size    int64  `json:"size"`
	Next    int64  `json:"next"`
	ZeroOff int64  `json:"zero_off"`
	ZeroLen int64  `json:"zero_len"`
	CRC     uint32 `json:"crc"`
}

// Pending returns how many bytes were not yet handed to the underlying writer.
func (w *Writer) Pending() int64 { return int64(len(w.data) + w.w.Buffered()) }

// Mark hands all data to the underlying writer and returns the place reached. It
// ends a record there, so to get the usual bytes call it only where no data
// follow without a gap, or at a multiple of MaxData.
func (w *Writer) Mark() (Mark, error) {
	w.flushData()
	if w.err == nil {
		w.err = w.w.Flush()
	}
	return Mark{w.stage, w.size, w.next, w.zero.off, w.zero.n, w.crc}, w.err
}

// ResumeWriter returns a Writer that goes on where another was at m; w must
// take up right behind the bytes of that one.
func ResumeWriter(w io.Writer, o WriterOptions, m Mark) *Writer {
	d := NewWriter(w, o)
	d.stage, d.size, d.next, d.zero, d.crc = m.Stage, m.Size, m.Next, span{m.ZeroOff, m.ZeroLen}, m.CRC
	return d
}
