package nbd

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// feed gives a server the bytes of a client over a pipe and waits for its end.
func feed(t *testing.T, input []byte) {
	t.Helper()
	sh := &shelf{disks: map[string]Device{"": nbdtest.NewDisk(1 << 20)}, infos: map[string]Info{}}
	s := Serve(Options{Exports: sh, HandshakeTimeout: time.Second, Grace: time.Second})
	defer s.Close()
	mine, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(io.Discard, mine)
	}()
	go func() {
		mine.Write(input)
		mine.Close()
	}()
	s.ServeConn(theirs)
	<-done
	if sh.open != 0 {
		t.Fatal("a device was not released")
	}
}

func optionBytesOf(opt uint32, data string) []byte {
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

func FuzzHandshake(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3})
	for opt := uint32(0); opt < 12; opt++ {
		for _, data := range []string{"", nameBody("", 0, 1, 2, 3), metaBody("", "base:allocation", "base:", "qemu:allocation-depth", "qemu:")} {
			p := append([]byte{0, 0, 0, 3}, optionBytesOf(optStructuredReply, "")...)
			p = append(p, optionBytesOf(opt, data)...)
			f.Add(append(p, optionBytesOf(optGo, nameBody(""))...))
		}
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) < 1<<16 {
			feed(t, input)
		}
	})
}

func FuzzRequests(f *testing.F) {
	for typ := uint16(0); typ < 10; typ++ {
		for _, flags := range []uint16{0, 1, 2, 4, 8, 16, 32} {
			p := appendHeader(nil, header{flags, typ, 1, 100, 200})
			f.Add(true, append(p, make([]byte, 200)...))
			f.Add(false, appendHeader(p, header{flags, cmdRead, 1, 1 << 20, 1 << 31}))
		}
	}
	f.Fuzz(func(t *testing.T, structured bool, input []byte) {
		if len(input) > 1<<16 {
			return
		}
		p := []byte{0, 0, 0, 3}
		if structured {
			p = append(p, optionBytesOf(optStructuredReply, "")...)
			p = append(p, optionBytesOf(optSetMeta, metaBody("", "base:allocation", "qemu:allocation-depth"))...)
		}
		p = append(p, optionBytesOf(optGo, nameBody(""))...)
		feed(t, append(p, input...))
	})
}

// FuzzClient gives a client the bytes of a server, first in the negotiation and
// then in answer to a read and a block status.
func FuzzClient(f *testing.F) {
	hello := "NBDMAGICIHAVEOPT\x00\x03"
	ack := func(opt, rep uint32, data string) string {
		p := binary.BigEndian.AppendUint64(nil, magicOptReply)
		p = binary.BigEndian.AppendUint32(p, opt)
		p = binary.BigEndian.AppendUint32(p, rep)
		p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
		return string(p) + data
	}
	export := "\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x0d\xed"
	start := hello + ack(8, repAck, "") + ack(10, repMeta, "\x00\x00\x00\x00base:allocation") + ack(10, repMeta, "\x00\x00\x00\x07qemu:allocation-depth") + ack(10, repAck, "") +
		ack(7, repInfo, export) + ack(7, repInfo, "\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00") + ack(7, repAck, "")
	f.Add([]byte(hello))
	f.Add([]byte(start))
	data := string(appendChunk(nil, 0, chunkData, 1, 8+16)) + "\x00\x00\x00\x00\x00\x00\x00\x00" + "0123456789abcdef"
	hole := string(appendChunk(nil, chunkDone, chunkHole, 1, 12)) + "\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x10"
	status := string(appendChunk(nil, chunkDone, chunkStatus, 2, 12)) + "\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x03"
	fail := string(appendChunk(nil, chunkDone, chunkErrorOffset, 1, 16)) + "\x00\x00\x00\x05\x00\x02no\x00\x00\x00\x00\x00\x00\x00\x00"
	f.Add([]byte(start + data + hole + status))
	depth := string(appendChunk(nil, chunkDone, chunkStatus, 3, 20)) + "\x00\x00\x00\x07\x00\x00\x01\x00\x00\x00\x00\x02\x00\x00\x01\x00\x00\x00\x00\x01"
	f.Add([]byte(start + data + hole + status + depth))
	f.Add([]byte(start + fail + status))
	f.Add([]byte(start + string(appendSimple(nil, 5, 1)) + string(appendSimple(nil, 0, 2))))
	f.Fuzz(func(t *testing.T, input []byte) {
		mine, theirs := net.Pipe()
		done := make(chan struct{}, 2)
		go func() { io.Copy(io.Discard, mine); done <- struct{}{} }()
		go func() { mine.Write(input); mine.Close(); done <- struct{}{} }()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := Dial(ctx, "nbd://x/", DialOptions{Contexts: []string{ContextDepth}, DialContext: func(context.Context, string, string) (net.Conn, error) { return theirs, nil }})
		if err == nil {
			p := make([]byte, 32)
			if c.ReadAt(ctx, p, 0) == nil {
				c.BlockStatus(ctx, 0, 512)
				var sum int64
				err := c.Status(ctx, ContextDepth, 0, 512, func(n int64, _ uint32) bool { sum += n; return n > 0 })
				if err == nil && sum != 512 {
					t.Fatalf("parts of %d bytes in all", sum)
				}
			}
			c.Close()
		}
		theirs.Close()
		<-done
		<-done
		if ctx.Err() != nil {
			t.Fatal("the client hangs")
		}
	})
}
