package nbd

import "encoding/binary"

// Magic numbers.
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
)

// Handshake flags, of the server and of the client alike.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

// Options.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10
)

// Replies to options.
const (
	repAck     = 1
	repServer  = 2
	repInfo    = 3
	repMeta    = 4
	repErr     = 1 << 31 // set in all errors
	repUnsup   = repErr | 1
	repPolicy  = repErr | 2
	repInvalid = repErr | 3
	repPlat    = repErr | 4
	repTLSReqd = repErr | 5
	repUnknown = repErr | 6
	repShut    = repErr | 7
	repTooBig  = repErr | 9
)

// Kinds of information in replies to INFO and GO.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags.
const (
	flagHasFlags   = 1 << 0
	flagReadOnly   = 1 << 1
	flagFlush      = 1 << 2
	flagFUA        = 1 << 3
	flagTrim       = 1 << 5
	flagZeroes     = 1 << 6
	flagDF         = 1 << 7
	flagMultiConn  = 1 << 8
	flagCache      = 1 << 10
	flagFastZero   = 1 << 11
	flagsWritable  = flagHasFlags | flagFlush | flagFUA | flagTrim | flagZeroes | flagMultiConn | flagCache | flagFastZero
	flagsReadOnly  = flagHasFlags | flagReadOnly | flagFlush | flagFUA | flagMultiConn | flagCache
	exportPadBytes = 124
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdZeroes      = 6
	cmdBlockStatus = 7
	cmdCount       = 8
)

// Command flags.
const (
	cmdFUA      = 1 << 0
	cmdNoHole   = 1 << 1
	cmdDF       = 1 << 2
	cmdReqOne   = 1 << 3
	cmdFastZero = 1 << 4
)

// Types of chunks in structured replies, and their flag.
const (
	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkStatus      = 5
	chunkErrBit      = 1 << 15
	chunkError       = chunkErrBit | 1
	chunkErrorOffset = chunkErrBit | 2
	chunkDone        = 1 << 0
)

// Error numbers of the protocol.
const (
	errnoPerm     = 1
	errnoIO       = 5
	errnoNoMem    = 12
	errnoInval    = 22
	errnoNoSpace  = 28
	errnoOverflow = 75
	errnoNotSup   = 95
	errnoShutdown = 108
)

// Bits of a base:allocation extent.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// Sizes.
const (
	requestBytes   = 28
	optionBytes    = 16
	optReplyBytes  = 20
	simpleBytes    = 16
	chunkBytes     = 20
	minBlock       = 1
	preferredBlock = 4096
	maxPayload     = 32 << 20
	maxOptionData  = 64 << 10
	maxString      = 4096
)

// header is a request as it stands on the wire.
type header struct {
	flags, typ  uint16
	cookie, off uint64
	n           uint32
}

// parseHeader decodes a request header of requestBytes. ok is false when the
// magic is wrong, after which the stream is beyond repair.
func parseHeader(p []byte) (h header, ok bool) {
	h.flags = binary.BigEndian.Uint16(p[4:])
	h.typ = binary.BigEndian.Uint16(p[6:])
	h.cookie = binary.BigEndian.Uint64(p[8:])
	h.off = binary.BigEndian.Uint64(p[16:])
	h.n = binary.BigEndian.Uint32(p[24:])
	return h, binary.BigEndian.Uint32(p) == magicRequest
}

// appendHeader is the inverse of parseHeader.
func appendHeader(p []byte, h header) []byte {
	p = binary.BigEndian.AppendUint32(p, magicRequest)
	p = binary.BigEndian.AppendUint16(p, h.flags)
	p = binary.BigEndian.AppendUint16(p, h.typ)
	p = binary.BigEndian.AppendUint64(p, h.cookie)
	p = binary.BigEndian.AppendUint64(p, h.off)
	return binary.BigEndian.AppendUint32(p, h.n)
}

// appendSimple appends the header of a simple reply.
func appendSimple(p []byte, errno uint32, cookie uint64) []byte {
	p = binary.BigEndian.AppendUint32(p, magicSimple)
	p = binary.BigEndian.AppendUint32(p, errno)
	return binary.BigEndian.AppendUint64(p, cookie)
}

// appendChunk appends the header of a chunk whose payload has n bytes.
func appendChunk(p []byte, flags, typ uint16, cookie uint64, n int) []byte {
	p = binary.BigEndian.AppendUint32(p, magicStructured)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, typ)
	p = binary.BigEndian.AppendUint64(p, cookie)
	return binary.BigEndian.AppendUint32(p, uint32(n))
}

// infoRequest is the body of INFO and GO.
type infoRequest struct {
	name  string
	wants []uint16
}

// parseInfo decodes the body of INFO and GO.
func parseInfo(p []byte) (r infoRequest, ok bool) {
	name, p, ok := cutString(p)
	if !ok || len(p) < 2 {
		return r, false
	}
	count := int(binary.BigEndian.Uint16(p))
	if len(p) != 2+2*count {
		return r, false
	}
	r.name = name
	for i := range count {
		r.wants = append(r.wants, binary.BigEndian.Uint16(p[2+2*i:]))
	}
	return r, true
}

// metaRequest is the body of LIST_META_CONTEXT and SET_META_CONTEXT.
type metaRequest struct {
	name    string
	queries []string
}

// parseMeta decodes the body of LIST_META_CONTEXT and SET_META_CONTEXT.
func parseMeta(p []byte) (r metaRequest, ok bool) {
	r.name, p, ok = cutString(p)
	if !ok || len(p) < 4 {
		return r, false
	}
	count := binary.BigEndian.Uint32(p)
	p = p[4:]
	if uint64(count)*4 > uint64(len(p)) {
		return r, false
	}
	for range count {
		var q string
		if q, p, ok = cutString(p); !ok {
			return r, false
		}
		r.queries = append(r.queries, q)
	}
	return r, len(p) == 0
}

// cutString takes a string with a 32-bit length off the front of p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	p = p[4:]
	if n > maxString || int(n) > len(p) {
		return "", nil, false
	}
	return string(p[:n]), p[n:], true
}

// appendString is the inverse of cutString.
func appendString(p []byte, s string) []byte {
	p = binary.BigEndian.AppendUint32(p, uint32(len(s)))
	return append(p, s...)
}
