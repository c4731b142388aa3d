package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// wire speaks the protocol byte by byte, right or wrong.
type wire struct {
	t  testing.TB
	nc net.Conn
}

// rawConn connects to the server of a URI and reads its greeting.
func rawConn(t testing.TB, uri string, flags uint32) *wire {
	t.Helper()
	a, err := ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial(a.Network, a.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(2 * time.Minute))
	w := &wire{t, nc}
	if got := w.read(18); !bytes.Equal(got, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
		t.Fatalf("greeting %q", got)
	}
	w.write(binary.BigEndian.AppendUint32(nil, flags))
	return w
}

func (w *wire) write(p []byte) {
	w.t.Helper()
	if _, err := w.nc.Write(p); err != nil {
		w.t.Fatal(err)
	}
}

func (w *wire) read(n int) []byte {
	w.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(w.nc, p); err != nil {
		w.t.Fatalf("read %d bytes: %v", n, err)
	}
	return p
}

// closed fails unless the server has hung up.
func (w *wire) closed() {
	w.t.Helper()
	if n, err := w.nc.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.Fatal("the server did not hang up")
	}
}

func (w *wire) send(opt uint32, data string) {
	w.t.Helper()
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	w.write(append(p, data...))
}

// reply reads one reply to an option.
func (w *wire) reply(opt uint32) (uint32, string) {
	w.t.Helper()
	h := w.read(20)
	if binary.BigEndian.Uint64(h) != magicOptReply || binary.BigEndian.Uint32(h[8:]) != opt {
		w.t.Fatalf("reply %x to option %d", h, opt)
	}
	return binary.BigEndian.Uint32(h[12:]), string(w.read(int(binary.BigEndian.Uint32(h[16:]))))
}

// option sends an option and returns its last reply and the data of the others.
func (w *wire) option(opt uint32, data string) (last uint32, text string, others []string) {
	w.t.Helper()
	w.send(opt, data)
	for {
		rep, text := w.reply(opt)
		if rep == repAck || rep&repErr != 0 {
			if rep&repErr != 0 && text == "" {
				w.t.Fatalf("option %d: error %#x without a text", opt, rep)
			}
			return rep, text, others
		}
		others = append(others, text)
	}
}

// want sends an option and checks its last reply.
func (w *wire) want(rep, opt uint32, data string) []string {
	w.t.Helper()
	got, text, others := w.option(opt, data)
	if got != rep {
		w.t.Fatalf("option %d answered %#x %q, want %#x", opt, got, text, rep)
	}
	return others
}

func nameBody(name string, wants ...uint16) string {
	p := appendString(nil, name)
	p = binary.BigEndian.AppendUint16(p, uint16(len(wants)))
	for _, x := range wants {
		p = binary.BigEndian.AppendUint16(p, x)
	}
	return string(p)
}

func metaBody(name string, queries ...string) string {
	p := binary.BigEndian.AppendUint32(appendString(nil, name), uint32(len(queries)))
	for _, q := range queries {
		p = appendString(p, q)
	}
	return string(p)
}

// command sends a request.
func (w *wire) command(typ, flags uint16, off uint64, n uint32, payload []byte) {
	w.t.Helper()
	w.write(append(appendHeader(nil, header{flags, typ, 77, off, n}), payload...))
}

// simple reads a simple reply and checks its error number.
func (w *wire) simple(code uint32) {
	w.t.Helper()
	want := appendSimple(nil, code, 77)
	if got := w.read(16); !bytes.Equal(got, want) {
		w.t.Fatalf("reply %x, want %x", got, want)
	}
}

const bothFlags = flagFixedNewstyle | flagNoZeroes

func TestOptions(t *testing.T) {
	sh, _ := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{})
	w := rawConn(t, uri, bothFlags)
	w.want(repUnsup, 99, "some data to skip")
	w.want(repUnsup, 11, "")
	w.want(repTooBig, 99, strings.Repeat("x", maxOptionData+1))
	w.want(repInvalid, optList, "x")
	w.want(repInvalid, optStructuredReply, "x")
	w.want(repPolicy, optStartTLS, "")
	w.want(repInvalid, optGo, "")
	w.want(repInvalid, optInfo, nameBody("disk", 1, 2)+"x")
	w.want(repInvalid, optInfo, "\xff\xff\xff\xffdisk\x00\x00")
	w.want(repUnknown, optInfo, nameBody("none"))
	w.want(repUnknown, optGo, nameBody("none"))
	if got := w.want(repAck, optList, ""); len(got) != 1 || got[0] != "\x00\x00\x00\x04disk1048576 bytes" {
		t.Errorf("list %q", got)
	}
	got := w.want(repAck, optInfo, nameBody("disk", infoName, infoDescription, infoBlockSize, 4711, infoName))
	want := []string{
		"\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x0d\x6d", "\x00\x01disk", "\x00\x021048576 bytes",
		"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00",
	}
	if !slices.Equal(got, want) {
		t.Errorf("info %q, want %q", got, want)
	}
	w.want(repAck, optStructuredReply, "")
	if got := w.want(repAck, optInfo, nameBody("disk")); got[0] != "\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x0d\xed" {
		t.Errorf("info %q", got)
	}
	w.want(repAck, optAbort, "")
	w.closed()
}

// striped is a device whose every other KiB has changed.
type striped struct{ *nbdtest.Memory }

func (striped) Contexts(context.Context) ([]string, error) {
	return []string{"qemu:dirty-bitmap:since-x"}, nil
}

func (striped) Status(_ context.Context, _ string, off, n int64, fn func(int64, uint32) bool) error {
	for i := int64(0); i < n; i += 512 {
		if !fn(512, uint32((off+i)/1024%2)) {
			break
		}
	}
	return nil
}

func TestMetaContexts(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	sh.add("disk", striped{m}, Info{})
	sh.add("other", nbdtest.NewMemory(4096), Info{})
	_, uri := serveUnix(t, sh, "disk", Options{})
	w := rawConn(t, uri, bothFlags)
	base, dirty := "\x00\x00\x00\x00base:allocation", "\x00\x00\x00\x00qemu:dirty-bitmap:since-x"
	for _, c := range []struct {
		queries, want []string
	}{
		{nil, []string{base, dirty}}, {[]string{"base:"}, []string{base}}, {[]string{"qemu:dirty-bitmap:"}, []string{dirty}},
		{[]string{"qemu:", "base:allocation"}, []string{base, dirty}}, {[]string{"x-none:y", "base:other", ""}, nil},
	} {
		if got := w.want(repAck, optListMeta, metaBody("disk", c.queries...)); !slices.Equal(got, c.want) {
			t.Errorf("%q lists %q", c.queries, got)
		}
	}
	w.want(repInvalid, optSetMeta, metaBody("disk", "base:allocation"))
	w.want(repAck, optStructuredReply, "")
	w.want(repInvalid, optSetMeta, metaBody("disk", "base:allocation")+"x")
	w.want(repUnknown, optSetMeta, metaBody("none", "base:allocation"))
	if got := w.want(repAck, optSetMeta, metaBody("disk", "base:")); got != nil {
		t.Errorf("SET with a wildcard gives %q", got)
	}
	got := w.want(repAck, optSetMeta, metaBody("disk", "qemu:dirty-bitmap:since-x", "base:allocation", "base:allocation"))
	if !slices.Equal(got, []string{base, "\x00\x00\x00\x01qemu:dirty-bitmap:since-x"}) {
		t.Errorf("SET gives %q", got)
	}
	w.want(repAck, optGo, nameBody("disk"))
	w.command(cmdBlockStatus, 0, 0, 2048, nil)
	want := appendChunk(nil, 0, chunkStatus, 77, 12)
	want = append(want, "\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x03"...)
	want = appendChunk(want, chunkDone, chunkStatus, 77, 20)
	want = append(want, "\x00\x00\x00\x01\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x01"...)
	if got := w.read(len(want)); !bytes.Equal(got, want) {
		t.Errorf("status %x, want %x", got, want)
	}
	w.command(cmdBlockStatus, cmdReqOne, 512, 1<<20-512, nil)
	w.read(20 + 12)
	want = append(appendChunk(nil, chunkDone, chunkStatus, 77, 12), "\x00\x00\x00\x01\x00\x00\x02\x00\x00\x00\x00\x00"...)
	if got := w.read(len(want)); !bytes.Equal(got, want) {
		t.Errorf("status %x, want %x", got, want)
	}

	// A SET that fails, or is for another export, leaves nothing.
	for _, spoil := range []func(w *wire) string{
		func(w *wire) string {
			w.want(repUnknown, optSetMeta, metaBody("none", "base:allocation"))
			return "disk"
		},
		func(*wire) string { return "other" },
	} {
		w := rawConn(t, uri, bothFlags)
		w.want(repAck, optStructuredReply, "")
		w.want(repAck, optSetMeta, metaBody("disk", "base:allocation"))
		w.want(repAck, optGo, nameBody(spoil(w)))
		w.command(cmdBlockStatus, 0, 0, 512, nil)
		if got := w.read(20); binary.BigEndian.Uint16(got[6:]) != chunkError {
			t.Errorf("status without a context answered %x", got)
		}
	}
}

func TestExportName(t *testing.T) {
	sh, _ := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{})
	for _, c := range []struct {
		flags uint32
		pad   int
	}{{bothFlags, 0}, {flagFixedNewstyle, 124}} {
		w := rawConn(t, uri, c.flags)
		w.send(optExportName, "disk")
		got := w.read(10 + c.pad)
		want := append([]byte("\x00\x00\x00\x00\x00\x10\x00\x00\x0d\x6d"), make([]byte, c.pad)...)
		if !bytes.Equal(got, want) {
			t.Errorf("answer %x", got)
		}
		w.command(cmdWrite, cmdFUA, 0, 3, []byte("abc"))
		w.simple(0)
		w.command(cmdRead, 0, 0, 3, nil)
		w.simple(0)
		if got := w.read(3); string(got) != "abc" {
			t.Errorf("read %q", got)
		}
		w.command(cmdDisconnect, 0, 0, 0, nil)
		w.closed()
	}
	w := rawConn(t, uri, bothFlags)
	w.send(optExportName, "none")
	w.closed()
	w = rawConn(t, uri, 1<<7|bothFlags)
	w.closed()
	w = rawConn(t, uri, bothFlags)
	w.write(make([]byte, 16))
	w.closed()
}

// Whatever is wrong with a request, the stream stays in step (N1).
func TestBadRequests(t *testing.T) {
	sh, m := newShelf("disk", 40<<20)
	_, uri := serveUnix(t, sh, "disk", Options{})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	size := uint64(m.Size())
	for _, c := range []struct {
		typ, flags uint16
		off        uint64
		n          uint32
		code       uint32
	}{
		{99, 0, 0, 4096, errnoInval}, {cmdFlush, 0, 1, 0, errnoInval}, {cmdFlush, 0, 0, 1, errnoInval},
		{cmdRead, 0, size, 1, errnoInval}, {cmdRead, 0, ^uint64(0), 2, errnoInval}, {cmdRead, cmdDF, 0, 1, errnoInval},
		{cmdRead, 0, 0, maxPayload + 1, errnoOverflow}, {cmdWrite, 0, size - 1, 2, errnoNoSpace},
		{cmdWrite, cmdFastZero, 0, 9, errnoInval}, {cmdWrite, 0, 0, maxPayload + 1, errnoInval},
		{cmdZeroes, 0, size - 1, 2, errnoNoSpace}, {cmdZeroes, cmdReqOne, 0, 2, errnoInval},
		{cmdTrim, 0, size - 1, 2, errnoInval}, {cmdTrim, cmdNoHole, 0, 2, errnoInval}, {cmdCache, 0, size, 1, errnoInval},
		{cmdBlockStatus, 0, 0, 512, errnoInval}, {cmdWrite, 0, 0, 0, 0}, {cmdTrim, 0, 0, 0, 0}, {cmdZeroes, 0, size, 0, 0},
		{cmdWrite, 0, 0, maxPayload, 0}, {cmdZeroes, cmdFUA | cmdNoHole | cmdFastZero, 0, uint32(size), 0},
		{cmdFlush, cmdFUA, 0, 0, 0}, {cmdCache, cmdFUA, 0, uint32(size), 0},
	} {
		var payload []byte
		if c.typ == cmdWrite {
			payload = make([]byte, c.n)
		}
		w.command(c.typ, c.flags, c.off, c.n, payload)
		w.simple(c.code)
	}
	w.command(cmdRead, 0, 0, 0, nil)
	w.simple(0)
	w.write(make([]byte, 28))
	w.closed()
}

func TestReadOnly(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	m.Refuse = true
	_, uri := serveUnix(t, sh, "disk", Options{})
	c := dial(t, uri, DialOptions{})
	if !c.Features().ReadOnly {
		t.Error("not read-only")
	}
	for _, err := range []error{
		c.WriteAt(t.Context(), make([]byte, 4096), 0, false),
		c.call(t.Context(), header{typ: cmdTrim, n: 1}, nil, nil), c.call(t.Context(), header{typ: cmdZeroes, n: 1}, nil, nil),
	} {
		var se *ServerError
		if !errors.As(err, &se) || se.Code != errnoPerm || !errors.Is(err, atoll.ErrReadOnly) || se.Text != "the export is read-only" {
			t.Error(err)
		}
	}
	if err := c.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

// The errors of a device reach the client, that of a flush above all, and
// ENOTSUP is for FAST_ZERO only.
func TestDeviceErrors(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	m.Before = func(_ context.Context, op string, off, n int64) error {
		if op == "zero" {
			return fmt.Errorf("zero: %w", atoll.ErrUnsupported)
		}
		return errors.New("the disk is on fire")
	}
	_, uri := serveUnix(t, sh, "disk", Options{})
	w := rawConn(t, uri, bothFlags)
	w.want(repAck, optGo, nameBody("disk"))
	for _, typ := range []uint16{cmdRead, cmdTrim, cmdCache} {
		w.command(typ, 0, 0, 1, nil)
		w.simple(errnoIO)
	}
	w.command(cmdFlush, 0, 0, 0, nil)
	w.simple(errnoIO)
	w.command(cmdWrite, 0, 0, 1, []byte{1})
	w.simple(errnoIO)
	w.command(cmdZeroes, 0, 0, 1, nil)
	w.simple(errnoInval)
	w.command(cmdZeroes, cmdFastZero, 0, 1, nil)
	w.simple(errnoNotSup)
}

func TestErrnoTable(t *testing.T) {
	rows := kindCodes()
	allowed := []uint32{errnoPerm, errnoIO, errnoInval, errnoNoSpace, errnoShutdown}
	for i, kind := range atoll.Kinds() {
		if i >= len(rows) || rows[i].kind != kind {
			t.Fatalf("kind %d, %v, is not in the table", i, kind)
		}
		if !slices.Contains(allowed, errno(fmt.Errorf("x: %w", kind))) || optionError(kind)&repErr == 0 {
			t.Errorf("%v maps to %d and %#x", kind, rows[i].errno, rows[i].rep)
		}
	}
	if len(rows) != len(atoll.Kinds()) {
		t.Error("the table has rows of unknown kinds")
	}
	if errno(errors.New("?")) != errnoIO || optionError(errors.New("?")) != repPolicy {
		t.Error("an error without a kind")
	}
}
