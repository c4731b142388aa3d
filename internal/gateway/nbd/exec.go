package nbd

import (
	"encoding/binary"
	"errors"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

const (
	// holeReadBytes is from where a read looks for holes first.
	holeReadBytes = 64 << 10
	// maxReadRuns is into how many parts a read is split at most.
	maxReadRuns = 64
	// maxStatusRuns is how many extents one answer holds at most, of all contexts.
	maxStatusRuns = 1 << 16
)

// commandFlags returns the flags that a command takes. FUA is taken by every
// command, and means nothing for those that change nothing.
func commandFlags(typ uint16, structured bool) (flags uint16, known bool) {
	switch typ {
	case cmdRead:
		if structured {
			return cmdFUA | cmdDF, true
		}
		return cmdFUA, true
	case cmdWrite, cmdFlush, cmdTrim, cmdCache:
		return cmdFUA, true
	case cmdZeroes:
		return cmdFUA | cmdNoHole | cmdFastZero, true
	case cmdBlockStatus:
		return cmdFUA | cmdReqOne, true
	}
	return 0, false
}

// check returns what a request is refused with, or 0.
func (c *conn) check(h header) (code uint32, why string) {
	flags, known := commandFlags(h.typ, c.neg.structured)
	size := uint64(c.dev.Size())
	beyond := h.off > size || uint64(h.n) > size-h.off
	writes := h.typ == cmdWrite || h.typ == cmdTrim || h.typ == cmdZeroes
	switch {
	case !known:
		return errnoInval, "unknown command"
	case c.s.draining.Load():
		return errnoShutdown, "the server is shutting down"
	case writes && c.readOnly:
		return errnoPerm, "the export is read-only [READ_ONLY]" // see tagged
	case h.typ == cmdFlush && (h.off != 0 || h.n != 0):
		return errnoInval, "flush takes no range"
	case h.typ == cmdBlockStatus && len(c.contexts) == 0:
		return errnoInval, "no metadata context was negotiated"
	case h.typ == cmdBlockStatus && h.n == 0:
		return errnoInval, "block status of nothing"
	case beyond && (h.typ == cmdWrite || h.typ == cmdZeroes):
		return errnoNoSpace, "write beyond the end"
	case beyond && h.typ != cmdFlush:
		return errnoInval, "range beyond the end"
	case h.flags&^flags != 0:
		return errnoInval, "unknown command flag"
	case h.typ == cmdWrite && h.n > maxPayload:
		return errnoInval, "write is longer than the maximum payload"
	case h.typ == cmdRead && h.n > maxPayload:
		return errnoOverflow, "read is longer than the maximum payload"
	}
	return 0, ""
}

// run carries out r, makes its reply and notes how long it took.
func (c *conn) run(r *request) {
	c.execute(r)
	if r.typ <= cmdWrite && r.n <= inlineBytes && r.code == 0 {
		c.paces[r.typ].note(time.Since(r.start) <= c.s.quick)
	}
}

// execute carries out r and makes its reply.
func (c *conn) execute(r *request) {
	if r.code != 0 {
		c.fail(r, r.code, r.why, r.off)
		return
	}
	err := c.admit(r)
	if err != nil {
		c.failWith(r, err, r.off)
		return
	}
	off, n, fua := int64(r.off), int64(r.n), r.flags&cmdFUA != 0
	switch r.typ {
	case cmdRead:
		c.runRead(r)
		return
	case cmdBlockStatus:
		c.runStatus(r)
		return
	case cmdWrite:
		err = c.runWrite(r, fua)
	case cmdFlush:
		err = c.dev.Flush(c.ctx)
	case cmdTrim:
		if n > 0 {
			err = c.dev.Discard(c.ctx, off, n, fua)
		}
	case cmdZeroes:
		if n > 0 {
			err = c.dev.Zero(c.ctx, off, n, r.flags&cmdNoHole == 0, fua)
		}
	case cmdCache:
		if n > 0 {
			err = c.dev.Prefetch(c.ctx, off, n)
		}
	}
	if err != nil {
		c.failWith(r, err, r.off)
		return
	}
	r.heads = appendSimple(r.heads[:0], 0, r.cookie)
	r.head(0)
}

// runWrite writes the payload, piece by piece if it is large.
func (c *conn) runWrite(r *request, fua bool) error {
	off := int64(r.off)
	for _, b := range r.bufs {
		if err := c.dev.Write(c.ctx, b, b.Bytes(), off, fua); err != nil {
			return err
		}
		off += int64(len(b.Bytes()))
	}
	return nil
}

// runRead reads and makes the reply in the form that was negotiated.
func (c *conn) runRead(r *request) {
	if !c.neg.structured {
		c.readSimple(r)
		return
	}
	if r.n == 0 {
		r.heads = appendChunk(r.heads[:0], chunkDone, chunkNone, r.cookie, 0)
		r.head(0)
		return
	}
	n := int64(r.n)
	if r.flags&cmdDF != 0 {
		c.readWhole(r)
		return
	}
	r.startRuns(n, maxReadRuns)
	if n >= holeReadBytes {
		if err := c.dev.Extents(c.ctx, int64(r.off), n, r.addHole); err != nil {
			c.failWith(r, err, r.off)
			return
		}
	}
	if r.runsLeft > 0 { // what was not asked or told is read as data
		r.runs = append(r.runs, run{n: r.runsLeft})
	}
	c.readRuns(r)
}

// readSimple reads into a simple reply.
func (c *conn) readSimple(r *request) {
	r.heads = appendSimple(r.heads[:0], 0, r.cookie)
	r.head(0)
	c.readPieces(r)
}

// readWhole reads into one chunk, as DF asks for.
func (c *conn) readWhole(r *request) {
	r.heads = appendChunk(r.heads[:0], chunkDone, chunkData, r.cookie, 8+int(r.n))
	r.heads = binary.BigEndian.AppendUint64(r.heads, r.off)
	r.head(0)
	c.readPieces(r)
}

// readPieces reads the whole range behind the header that is there.
func (c *conn) readPieces(r *request) {
	off := int64(r.off)
	for rest := int(r.n); rest > 0; {
		p := r.alloc(rest)
		if err := c.dev.Read(c.ctx, p, off); err != nil {
			c.failWith(r, err, uint64(off))
			return
		}
		r.out = append(r.out, p)
		rest, off = rest-len(p), off+int64(len(p))
	}
}

// readRuns reads into one chunk for each run (or piece of one).
func (c *conn) readRuns(r *request) {
	r.reserve((len(r.runs) + maxPayload/maxPiece) * (chunkBytes + 12))
	off, end := int64(r.off), int64(r.off)+int64(r.n)
	for _, run := range r.runs {
		for rest := run.n; rest > 0; {
			n, err := c.readChunk(r, off, rest, end, run.status != 0)
			if err != nil {
				c.failWith(r, err, uint64(off))
				return
			}
			off, rest = off+n, rest-n
		}
	}
}

// readChunk adds one chunk of at most n bytes and returns how many it covers.
func (c *conn) readChunk(r *request, off, n, end int64, hole bool) (int64, error) {
	if !hole {
		n = min(n, maxPiece)
	}
	flags := uint16(0)
	if off+n == end {
		flags = chunkDone
	}
	from := len(r.heads)
	if hole {
		r.heads = appendChunk(r.heads, flags, chunkHole, r.cookie, 12)
		r.heads = binary.BigEndian.AppendUint64(r.heads, uint64(off))
		r.heads = binary.BigEndian.AppendUint32(r.heads, uint32(n))
		r.head(from)
		return n, nil
	}
	p := r.alloc(int(n))
	if err := c.dev.Read(c.ctx, p, off); err != nil {
		return 0, err
	}
	r.heads = appendChunk(r.heads, flags, chunkData, r.cookie, 8+int(n))
	r.heads = binary.BigEndian.AppendUint64(r.heads, uint64(off))
	r.head(from)
	r.out = append(r.out, p)
	return n, nil
}

// runStatus answers BLOCK_STATUS with one chunk for each context.
func (c *conn) runStatus(r *request) {
	limit := max(1, maxStatusRuns/max(1, len(c.contexts)))
	if r.flags&cmdReqOne != 0 {
		limit = 1
	}
	for id, x := range c.contexts {
		r.startRuns(int64(r.n), limit)
		if err := c.status(x, r); err != nil {
			c.failWith(r, err, r.off)
			return
		}
		if len(r.runs) == 0 {
			r.runs = append(r.runs, run{n: int64(r.n)})
		}
		flags := uint16(0)
		if id == len(c.contexts)-1 {
			flags = chunkDone
		}
		r.reserve(chunkBytes + 4 + 8*len(r.runs))
		from := len(r.heads)
		r.heads = appendChunk(r.heads, flags, chunkStatus, r.cookie, 4+8*len(r.runs))
		r.heads = binary.BigEndian.AppendUint32(r.heads, uint32(id))
		for _, run := range r.runs {
			r.heads = binary.BigEndian.AppendUint32(r.heads, uint32(run.n))
			r.heads = binary.BigEndian.AppendUint32(r.heads, run.status)
		}
		r.head(from)
	}
}

// failWith makes the reply of a request that the device refused.
func (c *conn) failWith(r *request, err error, at uint64) {
	code := errno(err)
	if r.typ == cmdZeroes && r.flags&cmdFastZero != 0 && errors.Is(err, atoll.ErrUnsupported) {
		code = errnoNotSup
	}
	if c.ctx.Err() != nil {
		code = errnoShutdown
	}
	c.fail(r, code, tagged(err, code), at)
}

// fail replaces whatever reply there is by an error, with text where the client
// can take it.
func (c *conn) fail(r *request, code uint32, why string, at uint64) {
	r.failed = true
	r.out, r.heads = r.out[:0], r.heads[:0]
	if !c.neg.structured {
		r.heads = appendSimple(r.heads, code, r.cookie)
		r.head(0)
		return
	}
	why = why[:min(len(why), maxString)]
	typ, n := uint16(chunkError), 6+len(why)
	if r.typ == cmdRead {
		typ, n = chunkErrorOffset, n+8
	}
	r.heads = appendChunk(r.heads, chunkDone, typ, r.cookie, n)
	r.heads = binary.BigEndian.AppendUint32(r.heads, code)
	r.heads = binary.BigEndian.AppendUint16(r.heads, uint16(len(why)))
	r.heads = append(r.heads, why...)
	if typ == chunkErrorOffset {
		r.heads = binary.BigEndian.AppendUint64(r.heads, at)
	}
	r.head(0)
}
