package hosttest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// TestNet is the suite that every host.Net passes. open returns one and a free
// address to listen at.
func TestNet(t *testing.T, open func(t *testing.T) (n host.Net, addr string)) {
	tests := []struct {
		name string
		test func(*testing.T, host.Net, string)
	}{
		{"Echo", testEcho},
		{"Large", testLarge},
		{"Refused", testRefused},
		{"Deadline", testDeadline},
		{"CloseWakes", testCloseWakes},
		{"ListenTwice", testListenTwice},
		{"BadAddress", testBadAddress},
	}
	for _, c := range tests {
		t.Run(c.name, func(t *testing.T) {
			n, addr := open(t)
			c.test(t, n, addr)
		})
	}
}

// pair returns the two ends of a connection.
func pair(t *testing.T, n host.Net, addr string) (client, server net.Conn) {
	t.Helper()
	l, err := n.Listen(addr)
	fatal(t, err)
	defer l.Close()
	var wg sync.WaitGroup
	wg.Go(func() { server, err = l.Accept() })
	client, dialErr := n.Dial(t.Context(), host.AddrString(l.Addr()))
	wg.Wait()
	fatal(t, dialErr)
	fatal(t, err)
	t.Cleanup(func() {
		client.Close()
		server.Close()
	})
	return client, server
}

func testEcho(t *testing.T, n host.Net, addr string) {
	client, server := pair(t, n, addr)
	var wg sync.WaitGroup
	wg.Go(func() {
		io.Copy(server, server)
		server.Close()
	})
	p := make([]byte, 5)
	for range 10 {
		_, err := client.Write([]byte("hello"))
		fatal(t, err)
		_, err = io.ReadFull(client, p)
		fatal(t, err)
	}
	if string(p) != "hello" {
		t.Errorf("%q", p)
	}
	fatal(t, client.Close())
	wg.Wait()
	_, err := client.Write(p)
	want(t, err, net.ErrClosed)
	_, err = client.Read(p)
	want(t, err, net.ErrClosed)
}

func testLarge(t *testing.T, n host.Net, addr string) {
	client, server := pair(t, n, addr)
	data := make([]byte, 10<<20)
	fill(data, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		bufs := net.Buffers{data[:1], data[1:100], data[100:]}
		if _, err := bufs.WriteTo(client); err != nil {
			t.Error(err)
		}
		client.Close()
	})
	got, err := io.ReadAll(server)
	fatal(t, err)
	wg.Wait()
	if !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes, or wrong ones", len(got), len(data))
	}
}

func testRefused(t *testing.T, n host.Net, addr string) {
	l, err := n.Listen(addr)
	fatal(t, err)
	addr = host.AddrString(l.Addr())
	fatal(t, l.Close())
	_, err = n.Dial(t.Context(), addr)
	want(t, err, atoll.ErrUnreachable)
	_, err = l.Accept()
	want(t, err, net.ErrClosed)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = n.Dial(ctx, addr)
	want(t, err, atoll.ErrUnreachable)
	want(t, err, context.Canceled)
}

func testDeadline(t *testing.T, n host.Net, addr string) {
	client, server := pair(t, n, addr)
	p := make([]byte, 10)
	fatal(t, client.SetReadDeadline(time.Now().Add(10*time.Millisecond)))
	_, err := client.Read(p)
	want(t, err, os.ErrDeadlineExceeded)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%v is not a timeout", err)
	}
	fatal(t, client.SetReadDeadline(time.Time{}))
	var wg sync.WaitGroup
	first := make(chan struct{})
	wg.Go(func() {
		if k, err := client.Read(p); k != 2 || err != nil {
			t.Errorf("read %d, %v", k, err)
		}
		close(first)
		_, err := client.Read(p)
		want(t, err, os.ErrDeadlineExceeded)
	})
	_, err = server.Write([]byte("ok"))
	fatal(t, err)
	<-first
	time.Sleep(20 * time.Millisecond)                                     // virtual where the net is
	fatal(t, client.SetReadDeadline(time.Now().Add(10*time.Millisecond))) // for the Read that waits
	wg.Wait()
	fatal(t, server.SetWriteDeadline(time.Now().Add(20*time.Millisecond)))
	for err == nil {
		_, err = server.Write(make([]byte, 1<<20)) // until nothing goes any more
	}
	want(t, err, os.ErrDeadlineExceeded)
}

func testCloseWakes(t *testing.T, n host.Net, addr string) {
	client, server := pair(t, n, addr)
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := client.Read(make([]byte, 1))
		want(t, err, net.ErrClosed)
	})
	time.Sleep(time.Millisecond)
	fatal(t, client.Close())
	wg.Wait()
	_, err := server.Read(make([]byte, 1))
	want(t, err, io.EOF)
	fatal(t, server.SetDeadline(time.Now().Add(time.Minute)))
	for err = nil; err == nil; {
		_, err = server.Write(make([]byte, 1<<16))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("writing to a closed connection goes on")
	}
}

func testListenTwice(t *testing.T, n host.Net, addr string) {
	l, err := n.Listen(addr)
	fatal(t, err)
	addr = host.AddrString(l.Addr())
	_, err = n.Listen(addr)
	want(t, err, atoll.ErrBusy)
	fatal(t, l.Close())
	l, err = n.Listen(addr)
	fatal(t, err)
	fatal(t, l.Close())
}

func testBadAddress(t *testing.T, n host.Net, _ string) {
	for _, addr := range []string{"", "nothing", "unix:"} {
		_, err := n.Listen(addr)
		want(t, err, atoll.ErrInvalid)
		_, err = n.Dial(t.Context(), addr)
		want(t, err, atoll.ErrInvalid)
	}
}
