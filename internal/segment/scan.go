package segment

import (
	"errors"
	"fmt"
	"io"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// How a segment is read after a crash, when nothing but the bytes is known:
//
//	S1  Batches are walked from block 0, or from the end of what is known. A
//	    batch counts when its header is valid, names this segment and the block
//	    where it lies, repeats the checksum of the batch before it, has an epoch
//	    not below it, and every payload block matches its checksum.
//	S2  The first place where no such batch lies is the segment's end. What was
//	    acknowledged by this copy lies before it.
//	S3  A valid footer of this segment at the end says that it was sealed there.
//	S4  Otherwise the rest of the file is searched for a batch header of this
//	    segment at its own place. None: the tail simply ends (Whole).
//	S5  One whose Acked is above the end: data that every copy had on stable
//	    storage are damaged here (Damaged). Nothing may be concluded from this
//	    copy's length; nothing is cut off or overwritten but by bytes from
//	    another copy.
//	S6  One without that proof: writes that were never acknowledged reached the
//	    disk out of order, as a power cut leaves it, or this is damage that
//	    cannot be told from it (Torn).
//	S7  A block that cannot be read counts as damage (Damaged).

// Ending says how a segment ends.
type Ending uint8

// Endings of a scanned segment.
const (
	Whole   Ending = iota // the tail ends there
	Torn                  // a bad batch with a later valid one behind it
	Damaged               // a bad batch below acknowledged data, or a read error
)

// String returns the ending's name in lower case.
func (e Ending) String() string { return [...]string{"whole", "torn", "damaged"}[e] }

// Scanned is what Scan found: everything up to the end, and how it ends.
type Scanned struct {
	Footer // of the batches that count, as if sealed there
	Ending Ending
	Sealed bool          // a valid footer lies at the end
	Later  atoll.BlockNo // of a later header found by S4, 0 if none
	Acked  atoll.BlockNo // highest Acked seen, also in later headers
	Err    error         // why the batch at the end does not count, or the read error
}

// scanWindow is how many blocks are read at once.
const scanWindow = 256

// Scan walks a segment by the rules S1 to S7. r has the file's bytes, size the
// number of blocks that the segment may have. It allocates the lists it
// returns and borrows one buffer of 1 MiB.
func Scan(r io.ReaderAt, id atoll.SegmentID, size atoll.BlockNo) Scanned {
	s := scanner{r: r, id: id, size: size, out: Scanned{Footer: Footer{Segment: id}}}
	defer func() { s.buf.Release() }()
	for s.step(true) {
	}
	out := &s.out
	if s.ioErr != nil {
		out.Ending, out.Err = Damaged, s.ioErr
		return *out
	}
	if s.sealedHere() {
		out.Sealed = true
		return *out
	}
	s.search()
	return *out
}

type scanner struct {
	r     io.ReaderAt
	id    atoll.SegmentID
	size  atoll.BlockNo
	buf   *host.Buffer
	win   []byte
	first atoll.BlockNo // of the window
	have  atoll.BlockNo // blocks in the window
	ioErr error
	out   Scanned
}

// block returns block b, or nil at the end of the file or after a read error.
func (s *scanner) block(b atoll.BlockNo) []byte {
	if b < s.first || b >= s.first+s.have {
		s.fill(b)
	}
	if b >= s.first+s.have {
		return nil
	}
	off := (b - s.first).Bytes()
	return s.win[off : off+atoll.BlockSize]
}

func (s *scanner) fill(b atoll.BlockNo) {
	if s.win == nil {
		s.buf = host.Alloc(scanWindow * atoll.BlockSize)
		s.win = s.buf.Bytes()
	}
	s.first, s.have = b, 0
	if b >= s.size || s.ioErr != nil {
		return
	}
	want := min(scanWindow, s.size-b)
	n, err := s.r.ReadAt(s.win[:want.Bytes()], b.Bytes())
	if err == nil || errors.Is(err, io.EOF) {
		s.have = atoll.BlockNo(n / atoll.BlockSize)
		return
	}
	if want > 1 { // find out which block it is
		n, err = s.r.ReadAt(s.win[:atoll.BlockSize], b.Bytes())
		if err == nil || errors.Is(err, io.EOF) {
			s.have = atoll.BlockNo(n / atoll.BlockSize)
			return
		}
	}
	s.ioErr = fmt.Errorf("read block %d of segment %v: %w", b, s.id, err)
}

// step takes the batch at the end if it counts (S1), with its payload or by its
// header alone.
func (s *scanner) step(payload bool) bool {
	f := &s.out.Footer
	p := s.block(f.Length)
	if p == nil {
		return false
	}
	h, err := ParseHeader(p)
	if err == nil {
		err = s.follows(h)
	}
	if err != nil {
		s.out.Err = err
		return false
	}
	n := len(f.CRCs)
	f.CRCs = append(f.CRCs, CRC(p))
	for i := range h.Blocks() {
		f.CRCs = append(f.CRCs, h.BlockCRC(i))
	}
	next, sum, seq := h.Next(), h.Sum(), h.Seq()+uint64(h.Records())
	epoch, acked := h.Epoch(), h.Acked() // h is gone once the window moves
	for b := f.Length + 1; payload && b < next; b++ {
		if q := s.block(b); q == nil || CRC(q) != f.CRCs[b] {
			s.out.Err = fmt.Errorf("check batch at block %d of segment %v: block %d: %w", f.Length, s.id, b, atoll.ErrCorrupt)
			f.CRCs = f.CRCs[:n]
			return false
		}
	}
	f.Batches = append(f.Batches, f.Length)
	f.Length, f.Sum, f.Seq, f.Epoch = next, sum, seq, epoch
	s.out.Acked = max(s.out.Acked, acked)
	return true
}

// follows reports whether h is the batch that comes next.
func (s *scanner) follows(h Header) error {
	f := &s.out.Footer
	switch {
	case h.Segment() != s.id:
		return fmt.Errorf("check batch at block %d of segment %v: it is of segment %v: %w", f.Length, s.id, h.Segment(), atoll.ErrCorrupt)
	case h.Offset() != f.Length || h.Next() > s.size:
		return fmt.Errorf("check batch at block %d of segment %v: it is for block %d: %w", f.Length, s.id, h.Offset(), atoll.ErrCorrupt)
	case h.Prev() != f.Sum:
		return fmt.Errorf("check batch at block %d of segment %v: follows %08x, not %08x: %w", f.Length, s.id, h.Prev(), f.Sum, atoll.ErrCorrupt)
	case h.Epoch() < f.Epoch:
		return fmt.Errorf("check batch at block %d of segment %v: epoch %v after %v: %w", f.Length, s.id, h.Epoch(), f.Epoch, atoll.ErrCorrupt)
	}
	return nil
}

// sealedHere looks for the footer at the end (S3).
func (s *scanner) sealedHere() bool {
	p := s.block(s.out.Length)
	if p == nil {
		return false
	}
	f, err := ParseFooterHead(p)
	return err == nil && f.Segment == s.id && f.Length == s.out.Length && f.Sum == s.out.Sum
}

// search looks for later headers (S4 to S7).
func (s *scanner) search() {
	out := &s.out
	for b := out.Length + 1; b < s.size; b++ {
		p := s.block(b)
		if p == nil {
			break
		}
		if le.Uint32(p) != batchMagic {
			continue
		}
		h, err := ParseHeader(p)
		if err != nil || h.Segment() != s.id || h.Offset() != b {
			continue
		}
		if out.Later == 0 {
			out.Later = b
		}
		out.Acked = max(out.Acked, h.Acked())
	}
	switch {
	case s.ioErr != nil:
		out.Ending, out.Err = Damaged, s.ioErr
	case out.Later > 0 && out.Acked > out.Length:
		out.Ending = Damaged
	case out.Later > 0:
		out.Ending = Torn
	}
}

// CheckBatches splits raw into whole batches of segment id from block at on,
// and verifies every checksum and the chain between them. It calls fn with each
// header and the batch's bytes, in order.
func CheckBatches(raw []byte, id atoll.SegmentID, at atoll.BlockNo, fn func(h Header, batch []byte) error) error {
	var prev uint32
	for first := true; len(raw) > 0; first = false {
		h, err := ParseHeader(raw)
		if err != nil {
			return fmt.Errorf("check batch at block %d of segment %v: %w", at, id, err)
		}
		n := (1 + h.Blocks()) * atoll.BlockSize
		if h.Segment() != id || h.Offset() != at || len(raw) < n || !first && h.Prev() != prev {
			return fmt.Errorf("check batch at block %d of segment %v: not that batch: %w", at, id, atoll.ErrCorrupt)
		}
		for i := range h.Blocks() {
			if q := raw[(1+i)*atoll.BlockSize:][:atoll.BlockSize]; CRC(q) != h.BlockCRC(i) {
				return fmt.Errorf("check batch at block %d of segment %v: block %d: %w", at, id, int(at)+1+i, atoll.ErrCorrupt)
			}
		}
		if err := fn(h, raw[:n]); err != nil {
			return err
		}
		raw, at, prev = raw[n:], h.Next(), h.Sum()
	}
	return nil
}

// Rebuild reads a segment whose sealed length is known but whose footer is not,
// and returns what the footer said, as far as the batch headers tell it, and
// the runs of blocks [from, to) that belong to headers which are not readable.
// Payload is not read: it is verified whenever it is. After a bad header it
// goes on at the next one of this segment that lies at its own place.
func Rebuild(r io.ReaderAt, id atoll.SegmentID, length atoll.BlockNo) (Footer, [][2]atoll.BlockNo) {
	s := scanner{r: r, id: id, size: length, out: Scanned{Footer: Footer{Segment: id}}}
	defer func() { s.buf.Release() }()
	var lost [][2]atoll.BlockNo
	f := &s.out.Footer
	for f.Length < length {
		if s.step(false) {
			continue
		}
		from := f.Length
		s.resync(length)
		lost = append(lost, [2]atoll.BlockNo{from, f.Length})
	}
	return *f, lost
}

// resync moves the end to the next batch header after a bad place, and takes
// its word for what came before it.
func (s *scanner) resync(length atoll.BlockNo) {
	f := &s.out.Footer
	at := f.Length + 1
	for ; at < length; at++ {
		s.ioErr = nil
		p := s.block(at)
		if p == nil || le.Uint32(p) != batchMagic {
			continue
		}
		h, err := ParseHeader(p)
		if err == nil && h.Segment() == s.id && h.Offset() == at && h.Next() <= length && h.Epoch() >= f.Epoch {
			f.Sum = h.Prev()
			break
		}
	}
	s.ioErr = nil
	for f.Length < min(at, length) {
		f.CRCs = append(f.CRCs, 0)
		f.Length++
	}
}
