package nbd

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
)

// TestDifferential sends the same random requests, good and bad, to this server
// and to nbdkit's memory plugin and compares every answer.
func TestDifferential(t *testing.T) {
	const size = 1<<20 + 77
	theirURI, _ := startNbdkit(t, "memory", "1048653")
	sh, _ := newShelf("disk", size)
	_, ourURI := serveUnix(t, sh, "disk", Options{})
	for i, o := range []DialOptions{{}, {NoStructured: true}} {
		ours, theirs := dial(t, ourURI, o), dial(t, theirURI, o)
		if ours.p.flags != theirs.p.flags || ours.p.size != theirs.p.size {
			t.Fatalf("flags %#x and %#x", ours.p.flags, theirs.p.flags)
		}
		rng := rand.New(rand.NewPCG(uint64(i), 0))
		for i := range 3000 {
			h := header{typ: uint16(rng.IntN(7)), off: uint64(rng.IntN(size)), n: 1 + uint32(rng.IntN(20000))}
			switch {
			case h.typ == cmdDisconnect:
				continue
			case h.typ == cmdFlush:
				h.off, h.n = 0, 0
			case rng.IntN(4) > 0: // mostly within the disk
				h.n = min(h.n, uint32(size-h.off))
			}
			if rng.IntN(8) == 0 {
				h.flags = 1 << rng.IntN(7)
			}
			if h.typ == cmdTrim {
				h.typ = cmdZeroes // what a trim leaves is not defined
			}
			code1, data1 := tryRequest(t, ours, h, rng.Uint64())
			code2, data2 := tryRequest(t, theirs, h, rng.Uint64())
			if code1 != code2 || h.typ == cmdRead && !bytes.Equal(data1, data2) {
				t.Fatalf("request %d, %+v: we answer %d, nbdkit %d, same data: %v", i, h, code1, code2, bytes.Equal(data1, data2))
			}
		}
	}
}

// tryRequest sends a request and returns its error number and data.
func tryRequest(t *testing.T, c *Client, h header, _ uint64) (code uint32, data []byte) {
	t.Helper()
	if h.typ == cmdRead || h.typ == cmdWrite {
		data = bytes.Repeat([]byte{byte(h.off), byte(h.n), 3}, int(h.n)/3+1)[:h.n]
	}
	err := c.call(t.Context(), h, data, nil)
	var se *ServerError
	if err != nil && !errors.As(err, &se) {
		t.Fatalf("%+v: %v", h, err)
	}
	if se != nil {
		return se.Code, nil
	}
	return 0, data
}
