package blockdev

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

func TestSectorBytes(t *testing.T) {
	head := func(parts ...any) []byte {
		b := make([]byte, 8192)
		for i := 0; i < len(parts); i += 2 {
			copy(b[parts[i].(int):], parts[i+1].(string))
		}
		return b
	}
	for _, c := range []struct {
		what string
		head []byte
		size int64
		want int
	}{
		{"empty", head(), 1 << 20, 4096},
		{"odd size", head(), 1<<20 + 512, 512},
		{"short", []byte("XFSB"), 4096, 4096},
		{"MBR", head(510, "\x55\xaa"), 1 << 20, 512},
		{"GPT on 512", head(510, "\x55\xaa", 512, "EFI PART"), 1 << 20, 512},
		{"GPT on 4096", head(510, "\x55\xaa", 4096, "EFI PART"), 1 << 20, 4096},
		{"XFS on 512", head(0, "XFSB", 102, "\x02\x00"), 1 << 20, 512},
		{"XFS on 4096", head(0, "XFSB", 102, "\x10\x00"), 1 << 20, 4096},
		{"XFS damaged", head(0, "XFSB", 102, "\x02\x01"), 1 << 20, 4096},
	} {
		if got := SectorBytes(c.head, c.size); got != c.want {
			t.Errorf("%s: %d, want %d", c.what, got, c.want)
		}
	}
}

// Success is tested with a real kernel, in e2e/guest.
func TestAttachKernelRefuses(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := AttachKernel(KernelOptions{Conns: []net.Conn{a}, Size: 4096, SectorBytes: 512}); !errors.Is(err, atoll.ErrUnsupported) {
		t.Errorf("connection that is no socket: %v", err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, o := range []KernelOptions{
		{Size: 4096, SectorBytes: 512},
		{Conns: []net.Conn{c}, Size: 4097, SectorBytes: 512},
		{Conns: []net.Conn{c}, Size: 4096},
	} {
		if _, err := AttachKernel(o); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := os.Stat("/sys/block/nbd0"); err == nil || os.Getuid() == 0 {
		return // it might find a driver
	}
	if _, err := AttachKernel(KernelOptions{Conns: []net.Conn{c}, Size: 4096, SectorBytes: 512}); !errors.Is(err, atoll.ErrUnsupported) {
		t.Errorf("no driver: %v", err)
	}
}
