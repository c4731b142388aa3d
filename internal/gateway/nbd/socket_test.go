package nbd

import (
	"bytes"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"
)

// The socket of a client with one request in flight is taken off the poller, and
// goes back when the client pauses or sends many at once; no byte is lost on the
// way, and whoever ends the connection does so at any time.
func TestSocketOff(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sh, _ := newShelf("disk", 1<<20)
	s, unix := serveUnix(t, sh, "disk", Options{Listeners: []net.Listener{l}, TLSMode: TLSNone, DrainTimeout: time.Second})
	s.quick = -1 // the device never is
	for _, uri := range []string{unix, fmt.Sprintf("nbd://%v/disk", l.Addr())} {
		c := dial(t, uri, DialOptions{})
		conn := s.list()[0]
		one := func(i int) {
			p, q := bytes.Repeat([]byte{byte(i)}, 4096), make([]byte, 4096)
			if err := c.WriteAt(t.Context(), p, int64(i%64)*4096, i%8 == 0); err != nil {
				t.Error(err)
			}
			if err := c.ReadAt(t.Context(), q, int64(i%64)*4096); err != nil || !bytes.Equal(p, q) {
				t.Errorf("read %d: other bytes, error %v", i, err)
			}
		}
		alone := func() {
			i, before := 0, conn.raw.taken.Load()
			eventually(t, "the socket is taken off the poller", func() bool {
				one(i)
				i++
				return conn.raw.taken.Load() > before || conn.raw.off()
			})
		}
		for range 3 {
			alone()
			eventually(t, "the socket is back after a pause", func() bool { return !conn.raw.off() })
			alone()
			var wg sync.WaitGroup
			for k := range 16 {
				wg.Go(func() {
					for i := range 20 {
						one(i*64 + k)
					}
				})
			}
			wg.Wait()
		}
		alone()
		if !s.Disconnect(conn.id) {
			t.Error("no such connection")
		}
		eventually(t, "the connection is gone", func() bool { return len(s.list()) == 0 && s.waiting.Load() == 0 })
		if err := c.ReadAt(t.Context(), make([]byte, 512), 0); err == nil {
			t.Error("a read over a connection that was dropped succeeded")
		}
	}
	c := dial(t, unix, DialOptions{})
	conn := s.list()[0]
	eventually(t, "the socket is off the poller", func() bool {
		if err := c.ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		return conn.raw.taken.Load() > 0
	})
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
