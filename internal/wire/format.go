package wire

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// A frame, all numbers little-endian:
//
//	off  size
//	  0     4  magic "ATWF"
//	  4     1  version (1; that of HELLO and its answer stays 1 for ever)
//	  5     1  type; an answer has the request's type with bit 7 set
//	  6     2  flags: bit 0 = the payload's CRC is given. Others 0
//	  8     8  request id, chosen by the client, repeated in the answer
//	 16     4  length of the body, with its extension
//	 20     4  length of the payload
//	 24     4  CRC32C of the body, 0 if empty
//	 28     4  CRC32C of the payload, 0 if not given
//	 32     4  length of the extension: the first bytes of the body, which a
//	           receiver that does not know them skips. Reserved for a W3C
//	           traceparent (55 bytes); 0 for now
//	 36     8  0
//	 44     4  CRC32C of bytes 0 to 43
//	 48        body, then payload
//
// The body of HELLO (type 1):
//
//	 0     1  lowest version that the client speaks
//	 1     1  highest version
//	 2     6  0
//	 8    16  cluster
//	24    16  process that calls
//
// Its answer:
//
//	 0     2  code, 0 = welcome
//	 2     2  length of the error's text
//	 4     1  version to use from now on
//	 5     3  0
//	 8     4  bytes that the client may have outstanding
//	12     4  requests that the client may have outstanding
//	16    16  cluster
//	32    16  process that answers
//	48        text
//
// PING (type 2) and its answer have no body. The body of every other request:
//
//	 0     4  node
//	 4     4  time the client will wait, microseconds
//	 8    16  incarnation of the node's disk
//	24    16  segment: medium (8), ordinal (4), copyset (4); LIST: the one before
//	40     8  epoch
//	48     4  block: offset of a batch, first block; CREATE, SEAL: blocks
//	52     4  count: blocks to read, most bytes to FETCH, most entries, runs;
//	          CREATE: flags, bit 0 = may use the reserve. Others 0, and ignored
//	56   8*n  DISCARD: runs, each block (4) and blocks (4)
//
// The body of their answers:
//
//	0     2  code, 0 = done; see code.go
//	2     2  length of the error's text; then only the text follows, at 8
//	4     4  number of entries
//	8        APPEND: nanoseconds queued (8) and in commit (8)
//	         FENCE:  grade (1), sealed (1), 0 (2), length (4), epoch (8),
//	                 sum (4), 0 (4), sequence (8)
//	         LIST:   n times segment (16), length (4), size (4), flags (4:
//	                 bit 0 sealed, bit 1 damaged), 0 (4), epoch (8)
//	         STAT:   cluster (16), disk (16), incarnation (16), node (4),
//	                 flags (4: bit 0 read-only, bit 1 full), total (8),
//	                 free (8), segments (8), open (8), errors (8), p99 in
//	                 nanoseconds (8)
//	         VERIFY: blocks (4), 0 (4), n runs of 8
//
// An example, the frame of PING with request id 7:
//
//	41 54 57 46 01 02 00 00  07 00 00 00 00 00 00 00
//	00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
//	00 00 00 00 00 00 00 00  00 00 00 00 3f 5e 17 80
const (
	frameMagic = 0x46575441 // "ATWF"
	version    = 1
	headerSize = 48

	helloSize      = 40
	helloReplySize = 48
	requestSize    = 56
	replySize      = 8
	runSize        = 8
	infoSize       = 40
	tailSize       = 32
	statSize       = 104
	timesSize      = 16

	maxRuns    = 1 << 14
	maxEntries = 1 << 12
	maxText    = 512
	maxExt     = 256
	maxBody    = maxExt + replySize + maxEntries*infoSize
	maxPayload = atoll.MaxFrame

	flagSum = 1 << 0

	createReserve = 1 << 0
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// checksum returns the CRC32C of p.
func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// method is the type of a frame without the bit that marks an answer.
type method uint8

// Methods. The numbers are part of the format.
const (
	mHello   method = 1
	mPing    method = 2
	mAppend  method = 16
	mCreate  method = 17
	mFence   method = 18
	mExtend  method = 19
	mSeal    method = 20
	mRead    method = 21
	mFetch   method = 22
	mIndex   method = 23
	mRepair  method = 24
	mDiscard method = 25
	mDelete  method = 26
	mList    method = 27
	mStat    method = 28
	mVerify  method = 29

	answer = 0x80
)

// String returns the method's name as used in metrics.
func (m method) String() string {
	switch m {
	case mHello:
		return "hello"
	case mPing:
		return "ping"
	}
	names := [...]string{"append", "create", "fence", "extend", "seal", "read", "fetch",
		"index", "repair", "discard", "delete", "list", "stat", "verify"}
	if m >= mAppend && int(m-mAppend) < len(names) {
		return names[m-mAppend]
	}
	return "invalid"
}

// carries reports whether a frame of this method may have a payload.
func (m method) carries(reply bool) bool {
	switch m {
	case mAppend, mExtend, mRepair:
		return !reply
	case mRead, mFetch, mIndex:
		return reply
	}
	return false
}

// header is a decoded frame header.
type header struct {
	method  method
	reply   bool
	sum     bool // payloadCRC is given
	version uint8
	id      uint64
	body    int
	payload int
	ext     int
	bodyCRC uint32
	dataCRC uint32
}

// encodeHeader writes h into p, which has headerSize bytes.
func encodeHeader(p []byte, h *header) {
	p = p[:headerSize]
	clear(p)
	le.PutUint32(p[0:], frameMagic)
	p[4] = version
	p[5] = byte(h.method)
	if h.reply {
		p[5] |= answer
	}
	if h.sum {
		le.PutUint16(p[6:], flagSum)
	}
	le.PutUint64(p[8:], h.id)
	le.PutUint32(p[16:], uint32(h.body))
	le.PutUint32(p[20:], uint32(h.payload))
	le.PutUint32(p[24:], h.bodyCRC)
	le.PutUint32(p[28:], h.dataCRC)
	le.PutUint32(p[32:], uint32(h.ext))
	le.PutUint32(p[44:], checksum(p[:44]))
}

// decodeHeader checks p, of headerSize bytes, and every limit in it. It returns
// ErrCorrupt for what is no frame, ErrVersion for a newer version, and
// ErrTooLarge beyond a limit: none can be continued from.
func decodeHeader(p []byte) (header, error) {
	if len(p) < headerSize || le.Uint32(p) != frameMagic {
		return header{}, fmt.Errorf("parse frame: no magic: %w", atoll.ErrCorrupt)
	}
	if sum := checksum(p[:44]); sum != le.Uint32(p[44:]) {
		return header{}, fmt.Errorf("parse frame: header checksum %08x, sent %08x: %w", sum, le.Uint32(p[44:]), atoll.ErrCorrupt)
	}
	if p[4] != version {
		return header{}, fmt.Errorf("parse frame: version %d, this program knows %d: %w", p[4], version, atoll.ErrVersion)
	}
	flags := le.Uint16(p[6:])
	if flags&^flagSum != 0 || le.Uint64(p[36:]) != 0 {
		return header{}, fmt.Errorf("parse frame: unknown flags %04x: %w", flags, atoll.ErrVersion)
	}
	h := header{
		method: method(p[5] &^ answer), reply: p[5]&answer != 0, sum: flags&flagSum != 0,
		version: p[4], id: le.Uint64(p[8:]), bodyCRC: le.Uint32(p[24:]), dataCRC: le.Uint32(p[28:]),
	}
	body, payload, ext := le.Uint32(p[16:]), le.Uint32(p[20:]), le.Uint32(p[32:])
	if body > maxBody || payload > maxPayload || ext > maxExt || ext > body {
		return header{}, fmt.Errorf("parse frame: body %d, extension %d, payload %d bytes: %w", body, ext, payload, atoll.ErrTooLarge)
	}
	h.body, h.payload, h.ext = int(body), int(payload), int(ext)
	if h.method.String() == "invalid" || h.payload > 0 && !h.method.carries(h.reply) || h.payload%atoll.BlockSize != 0 {
		return header{}, fmt.Errorf("parse frame: type %02x with a payload of %d bytes: %w", p[5], payload, atoll.ErrCorrupt)
	}
	return h, nil
}

// hello is the first frame on a connection.
type hello struct {
	min, max uint8
	cluster  atoll.UUID
	process  atoll.UUID
}

func (h *hello) encode(p []byte) {
	clear(p[:helloSize])
	p[0], p[1] = h.min, h.max
	copy(p[8:], h.cluster[:])
	copy(p[24:], h.process[:])
}

func (h *hello) decode(p []byte) error {
	if len(p) < helloSize {
		return shortBody(mHello, len(p))
	}
	h.min, h.max = p[0], p[1]
	copy(h.cluster[:], p[8:])
	copy(h.process[:], p[24:])
	return nil
}

// welcome answers hello.
type welcome struct {
	err      error
	version  uint8
	window   int // bytes
	requests int
	cluster  atoll.UUID
	process  atoll.UUID
}

func (w *welcome) size() int { return helloReplySize + len(errorText(w.err)) }

func (w *welcome) encode(p []byte) {
	clear(p[:helloReplySize])
	le.PutUint16(p[0:], codeOf(w.err))
	le.PutUint16(p[2:], uint16(copy(p[helloReplySize:], errorText(w.err))))
	p[4] = w.version
	le.PutUint32(p[8:], uint32(w.window))
	le.PutUint32(p[12:], uint32(w.requests))
	copy(p[16:], w.cluster[:])
	copy(p[32:], w.process[:])
}

func (w *welcome) decode(p []byte) error {
	if len(p) < helloReplySize {
		return shortBody(mHello, len(p))
	}
	text := int(le.Uint16(p[2:]))
	if text > maxText || len(p) < helloReplySize+text {
		return shortBody(mHello, len(p))
	}
	w.err = errorOf(le.Uint16(p), string(p[helloReplySize:helloReplySize+text]))
	w.version = p[4]
	w.window, w.requests = int(le.Uint32(p[8:])), int(le.Uint32(p[12:]))
	copy(w.cluster[:], p[16:])
	copy(w.process[:], p[32:])
	return nil
}

// request is the body of every request but HELLO and PING.
type request struct {
	node        atoll.NodeID
	timeout     time.Duration
	incarnation atoll.UUID
	seg         atoll.SegmentID
	epoch       atoll.Epoch
	block       atoll.BlockNo
	count       int
	runs        []Run
}

func (r *request) size() int { return requestSize + runSize*len(r.runs) }

func (r *request) encode(p []byte) {
	le.PutUint32(p[0:], uint32(r.node))
	le.PutUint32(p[4:], uint32(min(max(r.timeout, 0), atoll.RequestTimeout)/time.Microsecond))
	copy(p[8:24], r.incarnation[:])
	putSegment(p[24:], r.seg)
	le.PutUint64(p[40:], uint64(r.epoch))
	le.PutUint32(p[48:], uint32(r.block))
	le.PutUint32(p[52:], uint32(r.count))
	putRuns(p[requestSize:], r.runs)
}

// decode checks p as the body of a request of the given method. The runs are a
// fresh slice.
func (r *request) decode(m method, p []byte) error {
	if len(p) < requestSize {
		return shortBody(m, len(p))
	}
	r.node = atoll.NodeID(le.Uint32(p))
	r.timeout = min(time.Duration(le.Uint32(p[4:]))*time.Microsecond, atoll.RequestTimeout)
	copy(r.incarnation[:], p[8:24])
	r.seg = getSegment(p[24:])
	r.epoch = atoll.Epoch(le.Uint64(p[40:]))
	r.block = atoll.BlockNo(le.Uint32(p[48:]))
	count := le.Uint32(p[52:])
	r.runs = nil
	if count > 1<<30 {
		return fmt.Errorf("parse body of %v: count %d: %w", m, count, atoll.ErrTooLarge)
	}
	r.count = int(count)
	if m != mDiscard {
		return nil
	}
	if r.count > maxRuns || len(p) < requestSize+runSize*r.count {
		return fmt.Errorf("parse body of %v: %d runs in %d bytes: %w", m, count, len(p), atoll.ErrCorrupt)
	}
	r.runs = getRuns(p[requestSize:], r.count)
	return nil
}

// response is the body of an answer; which fields count depends on the method.
type response struct {
	err            error
	queued, commit time.Duration // APPEND
	tail           Tail          // FENCE
	list           []SegmentInfo // LIST
	stat           Stat          // STAT
	verify         VerifyResult  // VERIFY
}

func (r *response) size(m method) int {
	if r.err != nil {
		return replySize + len(errorText(r.err))
	}
	switch m {
	case mAppend:
		return replySize + timesSize
	case mFence:
		return replySize + tailSize
	case mList:
		return replySize + infoSize*len(r.list)
	case mStat:
		return replySize + statSize
	case mVerify:
		return replySize + 8 + runSize*len(r.verify.Damaged)
	}
	return replySize
}

// encode writes the body into p, which has size(m) bytes.
func (r *response) encode(m method, p []byte) {
	clear(p)
	if r.err != nil {
		le.PutUint16(p[0:], codeOf(r.err))
		le.PutUint16(p[2:], uint16(copy(p[replySize:], errorText(r.err))))
		return
	}
	q := p[replySize:]
	switch m {
	case mAppend:
		le.PutUint64(q[0:], uint64(r.queued))
		le.PutUint64(q[8:], uint64(r.commit))
	case mFence:
		putTail(q, r.tail)
	case mList:
		le.PutUint32(p[4:], uint32(len(r.list)))
		for i := range r.list {
			putInfo(q[infoSize*i:], &r.list[i])
		}
	case mStat:
		putStat(q, &r.stat)
	case mVerify:
		le.PutUint32(p[4:], uint32(len(r.verify.Damaged)))
		le.PutUint32(q[0:], uint32(r.verify.Blocks))
		putRuns(q[8:], r.verify.Damaged)
	}
}

// decode checks p as the body of an answer to the given method. r.err is what
// the other side reports; the returned error means that p makes no sense. Lists
// are fresh slices.
func (r *response) decode(m method, p []byte) error {
	r.err = nil
	if len(p) < replySize {
		return shortBody(m, len(p))
	}
	q := p[replySize:]
	if code := le.Uint16(p); code != 0 {
		text := int(le.Uint16(p[2:]))
		if text > maxText || text > len(q) {
			return shortBody(m, len(p))
		}
		r.err = errorOf(code, string(q[:text]))
		return nil
	}
	n := int(le.Uint32(p[4:]))
	need := 0
	switch m {
	case mAppend:
		need = timesSize
	case mFence:
		need = tailSize
	case mStat:
		need = statSize
	case mList:
		need = infoSize * min(n, maxEntries+1)
	case mVerify:
		need = 8 + runSize*min(n, maxRuns+1)
	}
	if len(q) < need || n < 0 || n > maxRuns {
		return shortBody(m, len(p))
	}
	switch m {
	case mAppend:
		r.queued, r.commit = time.Duration(le.Uint64(q)), time.Duration(le.Uint64(q[8:]))
	case mFence:
		r.tail = getTail(q)
	case mStat:
		r.stat = getStat(q)
	case mList:
		r.list = make([]SegmentInfo, n)
		for i := range r.list {
			r.list[i] = getInfo(q[infoSize*i:])
		}
	case mVerify:
		r.verify = VerifyResult{Blocks: atoll.BlockNo(le.Uint32(q)), Damaged: getRuns(q[8:], n)}
	}
	return nil
}

func shortBody(m method, n int) error {
	return fmt.Errorf("parse body of %v: %d bytes do not hold it: %w", m, n, atoll.ErrCorrupt)
}

func putSegment(p []byte, s atoll.SegmentID) {
	le.PutUint64(p[0:], uint64(s.Medium))
	le.PutUint32(p[8:], uint32(s.Ordinal))
	le.PutUint32(p[12:], uint32(s.Copyset))
}

func getSegment(p []byte) atoll.SegmentID {
	return atoll.SegmentID{
		Medium:  atoll.MediumID(le.Uint64(p)),
		Ordinal: atoll.Ordinal(le.Uint32(p[8:])),
		Copyset: atoll.CopysetID(le.Uint32(p[12:])),
	}
}

func putRuns(p []byte, runs []Run) {
	for i, r := range runs {
		le.PutUint32(p[runSize*i:], uint32(r.Block))
		le.PutUint32(p[runSize*i+4:], uint32(r.Blocks))
	}
}

func getRuns(p []byte, n int) []Run {
	if n == 0 {
		return nil
	}
	runs := make([]Run, n)
	for i := range runs {
		runs[i].Block = atoll.BlockNo(le.Uint32(p[runSize*i:]))
		runs[i].Blocks = atoll.BlockNo(le.Uint32(p[runSize*i+4:]))
	}
	return runs
}

func putTail(p []byte, t Tail) {
	p[0] = byte(t.Grade)
	p[1] = bit(t.Sealed, 0)
	le.PutUint32(p[4:], uint32(t.Length))
	le.PutUint64(p[8:], uint64(t.Epoch))
	le.PutUint32(p[16:], t.Sum)
	le.PutUint64(p[24:], t.Seq)
}

// getTail reads a Tail. A grade that this program does not know is Unknown: it
// must not count for anything.
func getTail(p []byte) Tail {
	t := Tail{
		Grade: Grade(p[0]), Sealed: p[1]&1 != 0, Length: atoll.BlockNo(le.Uint32(p[4:])),
		Epoch: atoll.Epoch(le.Uint64(p[8:])), Sum: le.Uint32(p[16:]), Seq: le.Uint64(p[24:]),
	}
	if t.Grade > Clean {
		t.Grade = Unknown
	}
	return t
}

func putInfo(p []byte, s *SegmentInfo) {
	putSegment(p, s.Seg)
	le.PutUint32(p[16:], uint32(s.Length))
	le.PutUint32(p[20:], uint32(s.Size))
	le.PutUint32(p[24:], uint32(bit(s.Sealed, 0)|bit(s.Damaged, 1)))
	le.PutUint64(p[32:], uint64(s.Epoch))
}

func getInfo(p []byte) SegmentInfo {
	return SegmentInfo{
		Seg: getSegment(p), Length: atoll.BlockNo(le.Uint32(p[16:])), Size: atoll.BlockNo(le.Uint32(p[20:])),
		Sealed: p[24]&1 != 0, Damaged: p[24]&2 != 0, Epoch: atoll.Epoch(le.Uint64(p[32:])),
	}
}

func putStat(p []byte, s *Stat) {
	copy(p[0:], s.Cluster[:])
	copy(p[16:], s.Disk[:])
	copy(p[32:], s.Incarnation[:])
	le.PutUint32(p[48:], uint32(s.Node))
	le.PutUint32(p[52:], uint32(bit(s.ReadOnly, 0)|bit(s.Full, 1)))
	le.PutUint64(p[56:], uint64(s.Total))
	le.PutUint64(p[64:], uint64(s.Free))
	le.PutUint64(p[72:], uint64(s.Segments))
	le.PutUint64(p[80:], uint64(s.Open))
	le.PutUint64(p[88:], s.Errors)
	le.PutUint64(p[96:], uint64(s.AppendP99))
}

func getStat(p []byte) Stat {
	s := Stat{
		Node: atoll.NodeID(le.Uint32(p[48:])), ReadOnly: p[52]&1 != 0, Full: p[52]&2 != 0,
		Total: int64(le.Uint64(p[56:])), Free: int64(le.Uint64(p[64:])),
		Segments: int(le.Uint64(p[72:])), Open: int(le.Uint64(p[80:])),
		Errors: le.Uint64(p[88:]), AppendP99: time.Duration(le.Uint64(p[96:])),
	}
	copy(s.Cluster[:], p[0:])
	copy(s.Disk[:], p[16:])
	copy(s.Incarnation[:], p[32:])
	return s
}

// bit returns 1<<n if set.
func bit(set bool, n uint) byte {
	if set {
		return 1 << n
	}
	return 0
}
