package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

func TestRoundTrip(t *testing.T) {
	for _, o := range []DialOptions{{}, {NoStructured: true}} {
		sh, m := newShelf("disk", 100<<20+123)
		_, uri := serveUnix(t, sh, "disk", Options{})
		c := dial(t, uri, o)
		if c.Size() != m.Size() || c.Features().Structured == o.NoStructured {
			t.Fatalf("size %d, features %+v", c.Size(), c.Features())
		}
		ctx := t.Context()
		rng := rand.New(rand.NewPCG(1, 2))
		for _, n := range []int{1, 511, 4096, 4097, 65536, 1 << 20, 9<<20 + 5, 33 << 20} {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			off := c.Size() - int64(n)
			if err := c.WriteAt(ctx, p, off, n%2 == 1); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, n)
			if err := c.ReadAt(ctx, got, off); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, got) {
				t.Fatalf("%d bytes came back different", n)
			}
		}
		if err := errors.Join(c.Flush(ctx), c.Cache(ctx, 0, 4096), c.Trim(ctx, 0, 1<<20, true), c.Zero(ctx, 100, 1<<20, false, false)); err != nil {
			t.Fatal(err)
		}
		if m.Flushes.Load() != 1 || m.Prefetches.Load() != 1 || m.Discards.Load() != 1 || m.Zeros.Load() != 1 {
			t.Fatal("not every command reached the device")
		}
	}
}

func TestSparseReadAndStatus(t *testing.T) {
	sh, _ := newShelf("disk", 1<<40)
	_, uri := serveUnix(t, sh, "disk", Options{})
	c := dial(t, uri, DialOptions{})
	ctx := t.Context()
	data := bytes.Repeat([]byte{7}, 64<<10)
	for _, at := range []int64{1 << 20, 3 << 20, 3<<20 + 64<<10} {
		if err := c.WriteAt(ctx, data, at, false); err != nil {
			t.Fatal(err)
		}
	}
	got := bytes.Repeat([]byte{9}, 8<<20)
	if err := c.ReadAt(ctx, got, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 8<<20)
	copy(want[1<<20:], data)
	copy(want[3<<20:], data)
	copy(want[3<<20+64<<10:], data)
	if !bytes.Equal(got, want) {
		t.Fatal("sparse read is wrong")
	}
	all, err := c.BlockStatus(ctx, 0, 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	exp := []Extent{{1 << 20, true, true}, {64 << 10, false, false}, {2<<20 - 64<<10, true, true}, {128 << 10, false, false}, {1<<40 - 3<<20 - 128<<10, true, true}}
	if !slices.Equal(all, exp) {
		t.Fatalf("extents %v, want %v", all, exp)
	}
}

func TestManyCallers(t *testing.T) {
	sh, m := newShelf("disk", 64<<20)
	_, uri := serveUnix(t, sh, "disk", Options{MaxRequests: 8, MaxBytes: 1 << 20})
	p, err := Open(t.Context(), uri, 3, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Conns() != 3 {
		t.Fatalf("%d connections", p.Conns())
	}
	var wg sync.WaitGroup
	for g := range int64(32) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			model := make([]byte, 1<<20)
			for range 60 {
				off, n := rng.Int64N(1<<20-70000), 1+rng.Int64N(70000)
				b := model[off : off+n]
				var err error
				switch rng.IntN(4) {
				case 0:
					clear(b)
					err = p.Zero(t.Context(), g<<20+off, n, rng.IntN(2) == 0, false)
				case 1:
					got := make([]byte, n)
					err = p.ReadAt(t.Context(), got, g<<20+off)
					if !bytes.Equal(got, b) {
						err = errors.New("read differs")
					}
				default:
					for i := range b {
						b[i] = byte(rng.Uint32())
					}
					err = p.WriteAt(t.Context(), b, g<<20+off, false)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := p.Flush(t.Context()); err != nil || m.Flushes.Load() != 1 {
		t.Fatal(err)
	}
}

func TestClientErrors(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	kinds := atoll.Kinds()
	m.Before = func(_ context.Context, op string, off, n int64) error {
		if op == "read" {
			return kinds[off]
		}
		return nil
	}
	_, uri := serveUnix(t, sh, "disk", Options{})
	for _, o := range []DialOptions{{}, {NoStructured: true}} {
		c := dial(t, uri, o)
		for i, kind := range kinds {
			err := c.ReadAt(t.Context(), make([]byte, 1), int64(i))
			var se *ServerError
			if !errors.As(err, &se) || se.Code != errno(kind) {
				t.Errorf("%v arrives as %v", kind, err)
			}
			if o.NoStructured == (se.Text == kind.Error()) {
				t.Errorf("text %q", se.Text)
			}
		}
	}
	if _, err := Dial(t.Context(), uri[:len(uri)-2]+"none", DialOptions{}); !errors.Is(err, atoll.ErrUnreachable) {
		t.Error(err)
	}
	other := Address{Network: "unix", Export: "nothing"}
	a, _ := ParseURI(uri)
	other.Addr = a.Addr
	if _, err := Dial(t.Context(), other.String(), DialOptions{}); !errors.Is(err, atoll.ErrNotExist) {
		t.Error(err)
	}
	all, err := List(t.Context(), uri, DialOptions{})
	if err != nil || len(all) != 1 || all[0].Name != "disk" || all[0].Description == "" {
		t.Error(all, err)
	}
}

// A cancelled call returns at once, its memory is not touched later, and the
// connection goes on where possible.
func TestClientCancel(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	release := make(chan struct{})
	m.Before = func(ctx context.Context, op string, off, n int64) error {
		if off == 4096 {
			<-release
		}
		return nil
	}
	_, uri := serveUnix(t, sh, "disk", Options{})
	c := dial(t, uri, DialOptions{})
	if err := c.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 8192), 0, false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p := make([]byte, 4096)
	if err := c.ReadAt(ctx, p, 4096); !errors.Is(err, atoll.ErrTimeout) {
		t.Fatal(err)
	}
	close(release)
	if err := c.ReadAt(t.Context(), make([]byte, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, make([]byte, 4096)) {
		t.Fatal("the memory of a cancelled read was written")
	}
}

func TestURI(t *testing.T) {
	good := map[string]Address{
		"nbd://h/disk":                       {"tcp", "h:10809", false, "disk"},
		"nbds://h:1/":                        {"tcp", "h:1", true, ""},
		"nbd://[::1]/a%20b":                  {"tcp", "[::1]:10809", false, "a b"},
		"nbd+unix:///a@3?socket=/run/x":      {"unix", "/run/x", false, "a@3"},
		"nbds+unix:///?socket=/tmp/x%20y":    {"unix", "/tmp/x y", true, ""},
		"nbd+unix:///a/b?socket=/tmp/s.sock": {"unix", "/tmp/s.sock", false, "a/b"},
	}
	for uri, want := range good {
		got, err := ParseURI(uri)
		if err != nil || got != want {
			t.Errorf("%s: %+v %v", uri, got, err)
		}
		if again, err := ParseURI(got.String()); err != nil || again != got {
			t.Errorf("%s prints as %s: %v", uri, got, err)
		}
	}
	for _, uri := range []string{"", "http://h/", "nbd+unix:///x", "nbd+vsock:///x", "nbd+unix://host/x?socket=/s", "nbd://h:x/"} {
		if a, err := ParseURI(uri); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("%q: %+v %v", uri, a, err)
		}
	}
	_ = nbdtest.Memory{}
}

func TestNegotiate(t *testing.T) {
	sh, m := newShelf("disk", 1<<20)
	_, uri := serveUnix(t, sh, "disk", Options{})
	if err := m.Write(t.Context(), nil, []byte("here"), 4096, false); err != nil {
		t.Fatal(err)
	}
	n, err := Negotiate(t.Context(), uri, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Conn.Close()
	if n.Size != 1<<20 || n.Flags&(flagHasFlags|flagFlush|flagFUA|flagMultiConn) != flagHasFlags|flagFlush|flagFUA|flagMultiConn {
		t.Fatalf("size %d, flags %#x", n.Size, n.Flags)
	}
	if _, err := n.Conn.Write(appendHeader(nil, header{typ: cmdRead, cookie: 7, off: 4096, n: 4})); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 20) // a simple one: magic, error, cookie, data
	if _, err := io.ReadFull(n.Conn, reply); err != nil {
		t.Fatal(err)
	}
	if want := "\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07here"; string(reply) != want {
		t.Fatalf("reply %q, want %q", reply, want)
	}
	if _, err := Negotiate(t.Context(), uri+".not", DialOptions{}); err == nil {
		t.Fatal("connected to nothing")
	}
}
