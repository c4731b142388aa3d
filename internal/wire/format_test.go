package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// golden returns one frame of every kind, by name.
func golden() (names []string, frames map[string][]byte) {
	frames = make(map[string][]byte)
	add := func(name string, p []byte) {
		names = append(names, name)
		frames[name] = p
	}
	ask := func(m method, q request) []byte {
		q.node, q.incarnation, q.timeout, q.seg = 3, uuid(0x1C), time.Second, seg1
		body := make([]byte, q.size())
		q.encode(body)
		return body
	}
	reply := func(m method, r response) []byte {
		body := make([]byte, r.size(m))
		r.encode(m, body)
		return body
	}
	frame := func(name string, m method, isReply bool, body, payload []byte) {
		h := header{method: m, reply: isReply, id: 0x0102030405060708, sum: len(payload) > 0 && m != mAppend}
		if h.sum {
			h.dataCRC = checksum(payload)
		}
		add(name, frameOf(h, body, payload)[:headerSize+len(body)])
	}
	h, w := hello{min: 1, max: 1, cluster: uuid(0xC1), process: uuid(0xCC)}, welcome{version: 1, window: 64 << 20, requests: 1024, cluster: uuid(0xC1), process: uuid(0x5E)}
	hb, wb := make([]byte, helloSize), make([]byte, w.size())
	h.encode(hb)
	w.encode(wb)
	frame("hello", mHello, false, hb, nil)
	frame("welcome", mHello, true, wb, nil)
	w.err = fmt.Errorf("no: %w", atoll.ErrIdentity)
	wb = make([]byte, w.size())
	w.encode(wb)
	frame("refusal", mHello, true, wb, nil)
	add("ping", frameOf(header{method: mPing, id: 7}, nil, nil))
	frame("append", mAppend, false, ask(mAppend, request{epoch: 5, block: 77}), pattern(1, 2))
	frame("appended", mAppend, true, reply(mAppend, response{queued: 3, commit: 1 << 33}), nil)
	frame("fenced", mAppend, true, reply(mAppend, response{err: atoll.ErrFenced}), nil)
	frame("tail", mFence, true, reply(mFence, response{tail: Tail{Clean, 9, true, 8, 7, 6}}), nil)
	frame("read", mRead, false, ask(mRead, request{block: 5, count: 2}), nil)
	frame("readreply", mRead, true, reply(mRead, response{}), pattern(1, 2))
	frame("discard", mDiscard, false, ask(mDiscard, request{count: 2, runs: []Run{{1, 2}, {65535, 1}}}), nil)
	frame("list", mList, true, reply(mList, response{list: []SegmentInfo{madeUp(1), madeUp(6)}}), nil)
	frame("stat", mStat, true, reply(mStat, response{stat: Stat{cluster, 3, uuid(1), uuid(2), 4, 5, 6, 7, true, true, 8, 9}}), nil)
	frame("verify", mVerify, true, reply(mVerify, response{verify: VerifyResult{5, []Run{{1, 2}}}}), nil)
	frame("reserve", mCreate, false, ask(mCreate, request{epoch: 5, block: 77, count: createReserve}), nil)
	return names, frames
}

// TestGolden holds the format to the bytes that were once written. The file may
// grow but not change.
func TestGolden(t *testing.T) {
	const file = "testdata/v1.frames"
	names, frames := golden()
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "%s %s\n", n, hex.EncodeToString(frames[n]))
	}
	if *rewrite {
		must(t, os.WriteFile(file, []byte(b.String()), 0o644))
	}
	want, err := os.ReadFile(file)
	must(t, err)
	if b.String() != string(want) {
		t.Errorf("frames are now\n%s", b.String())
	}
	if got := hex.EncodeToString(frames["ping"][44:]); got != "3f5e1780" {
		t.Errorf("the example in format.go ends in %s", got)
	}
}

// TestBodies decodes what was encoded.
func TestBodies(t *testing.T) {
	q := request{4, 7 * time.Second, uuid(9), seg1, 1 << 60, 65535, 2, []Run{{1, 2}, {3, 4}}}
	p := make([]byte, q.size())
	q.encode(p)
	var got request
	must(t, got.decode(mDiscard, p))
	if !reflect.DeepEqual(got, q) {
		t.Errorf("request %+v, want %+v", got, q)
	}
	for n := range p {
		if err := got.decode(mDiscard, p[:n]); !errors.Is(err, atoll.ErrCorrupt) {
			t.Fatalf("request of %d bytes: %v", n, err)
		}
	}
	for m, r := range map[method]response{
		mAppend: {queued: 1, commit: 2},
		mFence:  {tail: Tail{Torn, 1, true, 2, 3, 4}},
		mList:   {list: []SegmentInfo{madeUp(5), madeUp(6), madeUp(7)}},
		mStat:   {stat: Stat{cluster, 3, uuid(1), uuid(2), 4, 5, 6, 7, false, true, 8, 9}},
		mVerify: {verify: VerifyResult{9, []Run{{1, 1}}}},
		mSeal:   {},
	} {
		p := make([]byte, r.size(m))
		r.encode(m, p)
		var got response
		must(t, got.decode(m, p))
		if !reflect.DeepEqual(got, r) {
			t.Errorf("%v: %+v, want %+v", m, got, r)
		}
		for n := range p {
			if err := got.decode(m, p[:n]); !errors.Is(err, atoll.ErrCorrupt) {
				t.Fatalf("%v of %d bytes: %v", m, n, err)
			}
		}
	}
	tail := make([]byte, tailSize)
	putTail(tail, Tail{Grade: Clean})
	tail[0] = 200
	if got := getTail(tail); got.Grade != Unknown {
		t.Errorf("unknown grade became %v", got.Grade)
	}
}

// TestHeaderLimits: what is beyond a limit is refused before anything is
// allocated for it.
func TestHeaderLimits(t *testing.T) {
	good := header{method: mAppend, body: requestSize, payload: atoll.BlockSize}
	for name, change := range map[string]func(p []byte){
		"body":             func(p []byte) { le.PutUint32(p[16:], maxBody+1) },
		"payload":          func(p []byte) { le.PutUint32(p[20:], maxPayload+atoll.BlockSize) },
		"huge payload":     func(p []byte) { le.PutUint32(p[20:], 1<<32-4096) },
		"odd payload":      func(p []byte) { le.PutUint32(p[20:], 100) },
		"extension":        func(p []byte) { le.PutUint32(p[32:], requestSize+1) },
		"flags":            func(p []byte) { p[7] = 1 },
		"version":          func(p []byte) { p[4] = 2 },
		"method":           func(p []byte) { p[5] = 99 },
		"payload of reply": func(p []byte) { p[5] |= answer },
		"reserved":         func(p []byte) { p[40] = 1 },
	} {
		p := make([]byte, headerSize)
		encodeHeader(p, &good)
		_, err := decodeHeader(p)
		must(t, err)
		change(p)
		if _, err := decodeHeader(p); !errors.Is(err, atoll.ErrCorrupt) {
			t.Errorf("%s, checksum wrong: %v", name, err)
		}
		le.PutUint32(p[44:], checksum(p[:44]))
		if _, err := decodeHeader(p); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func FuzzHeader(f *testing.F) {
	names, frames := golden()
	for _, n := range names {
		f.Add(frames[n][:headerSize], true)
	}
	f.Fuzz(func(t *testing.T, p []byte, fix bool) {
		if fix && len(p) >= headerSize {
			le.PutUint32(p[0:], frameMagic)
			le.PutUint32(p[44:], checksum(p[:44]))
		}
		h, err := decodeHeader(p)
		if err != nil {
			return
		}
		if h.body > maxBody || h.payload > maxPayload || h.ext > h.body {
			t.Fatalf("beyond a limit: %+v", h)
		}
		again := make([]byte, headerSize)
		encodeHeader(again, &h)
		if !bytes.Equal(again, p[:headerSize]) {
			t.Fatalf("%x became %x", p[:headerSize], again)
		}
	})
}

// FuzzBody decodes bytes as the body of any frame; what is accepted must encode
// to a prefix of the same meaning.
func FuzzBody(f *testing.F) {
	names, frames := golden()
	for _, n := range names {
		p := frames[n]
		f.Add(p[5]&^answer, p[5]&answer != 0, p[headerSize:])
	}
	f.Fuzz(func(t *testing.T, m uint8, reply bool, p []byte) {
		if len(p) > maxBody {
			return
		}
		switch {
		case method(m) == mHello && reply:
			var w welcome
			w.decode(p)
		case method(m) == mHello:
			var h hello
			h.decode(p)
		case reply:
			fuzzResponse(t, method(m), p)
		default:
			fuzzRequest(t, method(m), p)
		}
	})
}

func fuzzRequest(t *testing.T, m method, p []byte) {
	var q, again request
	if q.decode(m, p) != nil {
		return
	}
	b := make([]byte, q.size())
	q.encode(b)
	if err := again.decode(m, b); err != nil || !reflect.DeepEqual(q, again) {
		t.Fatalf("%+v became %+v: %v", q, again, err)
	}
}

func fuzzResponse(t *testing.T, m method, p []byte) {
	var r, again response
	if r.decode(m, p) != nil {
		return
	}
	if r.err != nil {
		return
	}
	b := make([]byte, r.size(m))
	r.encode(m, b)
	if err := again.decode(m, b); err != nil || len(r.list) != len(again.list) || !reflect.DeepEqual(r.verify, again.verify) || r.tail != again.tail || r.stat != again.stat {
		t.Fatalf("%+v became %+v: %v", r, again, err)
	}
}
