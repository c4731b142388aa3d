package nbdtest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// RunClientSuite drives the export at uri, of the given size, with the clients
// that people use. It overwrites the export and copies all of it several times,
// so keep size near 64 MiB; 16 MiB is the least. Programs that are missing are
// skipped with a reason.
func RunClientSuite(t *testing.T, uri string, size int64) {
	s := &suite{uri: uri, size: size}
	t.Run("nbdinfo", s.info)
	t.Run("nbdcopy", s.copies)
	t.Run("qemu-img", s.qemuImg)
	t.Run("qemu-io", s.qemuIO)
	t.Run("fio", s.fio)
	t.Run("checkwrite", s.checkwrite)
	t.Run("libnbd", s.illegal)
}

type suite struct {
	uri  string
	size int64
}

// need skips the test when a program is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// run runs a program, which must succeed, and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try runs a program and returns its output.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	cmd.Dir = t.TempDir() // fio leaves files behind
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// image writes a file of n bytes: random data with holes and runs of zeros.
func image(t *testing.T, path string, n, seed int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rng := rand.New(rand.NewPCG(uint64(seed), 7))
	chunk := make([]byte, 64<<10)
	for off := int64(0); off < n; off += int64(len(chunk)) {
		p := chunk[:min(int64(len(chunk)), n-off)]
		if kind := off >> 16 % 8; kind == 3 || kind == 4 {
			continue
		}
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		if off>>16%8 == 6 {
			clear(p[len(p)/3:])
		}
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
}

// same fails unless the first n bytes of two files are equal.
func same(t *testing.T, a, b string, n int64) {
	t.Helper()
	fa, err1 := os.Open(a)
	fb, err2 := os.Open(b)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	defer fa.Close()
	defer fb.Close()
	pa, pb := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < n; off += 1 << 20 {
		m := min(1<<20, n-off)
		if _, err := io.ReadFull(fa, pa[:m]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(fb, pb[:m]); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(pa[:m], pb[:m]) {
			t.Fatalf("%s and %s differ in the megabyte at %d", a, b, off)
		}
	}
}

func (s *suite) info(t *testing.T) {
	need(t, "nbdinfo")
	var got struct {
		Protocol   string
		Structured bool
		Exports    []map[string]any
	}
	text := run(t, "nbdinfo", "--json", s.uri)
	if err := json.Unmarshal([]byte(text), &got); err != nil || len(got.Exports) != 1 {
		t.Fatalf("%v: %s", err, text)
	}
	e := got.Exports[0]
	want := map[string]any{
		"export-size": float64(s.size), "is_read_only": false, "can_cache": true, "can_df": true,
		"can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true,
		"can_trim": true, "can_zero": true, "is_rotational": false,
		"block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": float64(32 << 20),
	}
	for k, v := range want {
		if e[k] != v {
			t.Errorf("%s is %v, want %v", k, e[k], v)
		}
	}
	for _, can := range []string{"flush", "fua", "trim", "zero", "fast-zero", "multi-conn", "cache", "df", "structured-reply"} {
		run(t, "nbdinfo", "--can", can, s.uri)
	}
	if _, err := try(t, "nbdinfo", "--is", "read-only", s.uri); err == nil {
		t.Error("the export says it is read-only")
	}
	if got := strings.TrimSpace(run(t, "nbdinfo", "--size", s.uri)); got != fmt.Sprint(s.size) {
		t.Errorf("size %s", got)
	}
	run(t, "nbdinfo", "--list", s.uri)
	run(t, "nbdinfo", "--map", s.uri)
	if _, err := try(t, "nbdinfo", "--map=qemu:none", s.uri); err == nil {
		t.Error("an unknown context is offered")
	}
}

// copies goes there and back with nbdcopy in several ways.
func (s *suite) copies(t *testing.T) {
	need(t, "nbdcopy", "qemu-io")
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	for i, c := range []struct {
		size int64
		up   []string
		down []string
	}{
		{s.size, []string{"-C", "4", "-R", "64", "--flush"}, []string{"-C", "4"}},
		{s.size - 1, []string{"--synchronous"}, []string{"--synchronous"}},
		{s.size - 4097, []string{"--allocated", "-C", "2"}, []string{"--no-extents"}},
		{s.size/2 + 513, []string{"--destination-is-zero", "--flush"}, []string{"--request-size=65536"}},
		{1, []string{"--request-size=4096"}, []string{"--request-size=33554432"}},
	} {
		image(t, src, c.size, int64(i))
		run(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("discard 0 %d", s.size/512*512), "-c", fmt.Sprintf("write -z 0 %d", s.size/512*512), s.uri)
		run(t, "nbdcopy", append(c.up, src, s.uri)...)
		os.Remove(dst)
		run(t, "nbdcopy", append(c.down, s.uri, dst)...)
		same(t, src, dst, c.size)
	}
}

func (s *suite) qemuImg(t *testing.T) {
	need(t, "qemu-img")
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	image(t, src, s.size, 99)
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", src, s.uri)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, s.uri)
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri, dst)
	same(t, src, dst, s.size)
	var parts []struct {
		Start, Length int64
		Data, Zero    bool
	}
	text := run(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri)
	if err := json.Unmarshal([]byte(text), &parts); err != nil {
		t.Fatal(err)
	}
	var end int64
	for _, p := range parts {
		if p.Start != end {
			t.Fatalf("map has a gap at %d: %s", end, text)
		}
		end += p.Length
	}
	if end != s.size {
		t.Errorf("map ends at %d of %d", end, s.size)
	}
	run(t, "qemu-img", "bench", "-f", "raw", "-w", "-c", "2000", "-d", "32", "--flush-interval=100", s.uri)
	run(t, "qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "8192", s.uri)
}

func (s *suite) qemuIO(t *testing.T) {
	need(t, "qemu-io")
	end := s.size
	script := []string{
		"write -P 1 0 1M", "write -P 2 4095 2", "write -P 3 512 513", "read -P 1 0 512", "read -P 3 512 513",
		"read -P 1 1025 3070", "read -P 2 4095 2", "read -P 1 4097 1044479",
		"write -z 8191 8194", "read -P 0 8191 8194", "read -P 1 16385 4096",
		"write -z -u 65536 131072", "read -P 0 65536 131072", "write -f -P 5 65537 1", "read -P 5 65537 1", "read -P 0 65538 131070",
		"discard 262144 65536", "flush", "read -P 1 327680 65536",
		fmt.Sprintf("write -P 8 %d 4097", end-4097), fmt.Sprintf("read -P 8 %d 4097", end-4097),
		fmt.Sprintf("write -P 9 %d 1", end-1), fmt.Sprintf("read -P 9 %d 1", end-1), fmt.Sprintf("read -P 8 %d 4096", end-4097),
		fmt.Sprintf("write -z %d 3", end-3), fmt.Sprintf("read -P 0 %d 3", end-3),
		"aio_write -P 11 2M 1M", "aio_write -P 12 3M 1M", "aio_flush", "read -P 11 2M 1M", "read -P 12 3M 1M",
	}
	var args = []string{"-f", "raw"}
	for _, line := range script {
		args = append(args, "-c", line)
	}
	out := run(t, "qemu-io", append(args, s.uri)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Errorf("qemu-io:\n%s", out)
	}
	out, _ = try(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("read %d 4096", end-1), s.uri)
	if !strings.Contains(out, "failed") {
		t.Errorf("a read over the end succeeds:\n%s", out)
	}
}

func (s *suite) fio(t *testing.T) {
	need(t, "fio")
	base := []string{"--ioengine=nbd", "--uri=" + s.uri, "--thread", "--iodepth=32", "--time_based=0"}
	verify := append(base, "--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
	half := fmt.Sprint(s.size / 4 / 4096 * 4096)
	out, err := try(t, "fio", append(verify, "--name=v", "--rw=randwrite", "--bs=4k", "--size="+half, "--numjobs=3",
		"--offset_increment="+half, "--fsync=256")...)
	if err != nil || !strings.Contains(out, "err= 0") {
		t.Fatalf("fio verify: %v\n%s", err, out)
	}
	run(t, "fio", append(verify, "--name=odd", "--rw=randwrite", "--bsrange=512-70000", "--bs_unaligned", "--size=8M")...)
	run(t, "fio", append(base, "--name=trim", "--rw=randtrim", "--bs=64k", "--size=8M")...)
	run(t, "fio", append(base, "--name=mix", "--rw=randrw", "--bs=512", "--size=1M", "--numjobs=2")...)
}

// checkwrite uses nbdkit as an oracle: it fails on any byte that differs and on
// any extent that is missing.
func (s *suite) checkwrite(t *testing.T) {
	need(t, "nbdkit", "nbdcopy")
	src := filepath.Join(t.TempDir(), "src")
	image(t, src, s.size, 5)
	run(t, "nbdcopy", "--flush", src, s.uri)
	run(t, "nbdkit", "-U", "-", "--filter=checkwrite", "file", src, "--run", fmt.Sprintf("nbdcopy '%s' \"$uri\"", s.uri))
}

// illegal sends what no decent client sends and checks each answer.
func (s *suite) illegal(t *testing.T) {
	const python = "/usr/bin/python3"
	if out, err := try(t, python, "-c", "import nbd"); err != nil {
		t.Skipf("python3-libnbd is not installed: %s", out)
	}
	if out, err := try(t, python, "-c", illegalScript, s.uri); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// illegalScript is run by Python with the URI as its argument.
const illegalScript = `
import nbd, sys, errno
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
size = h.get_size()
def want(code, f, *a, **k):
    try:
        f(*a, **k)
        got = None
    except nbd.Error as e:
        got = e.errno
    ok = got == code or (isinstance(code, tuple) and got in code)
    assert ok, "%s%r: got %r, want %r" % (f.__name__, a[1:] if f == h.pwrite else a, got, code)
    assert h.aio_is_ready(), "connection lost after %s" % f.__name__
    assert len(h.pread(512, 0)) == 512
ext = lambda *a: 0
buf = bytearray(4096)
want("EINVAL", h.pread, 4096, size - 4095)
want("EINVAL", h.pread, 1, 1 << 62)
want("ENOSPC", h.pwrite, buf, size - 4095)
want("ENOSPC", h.zero, 4096, size)
want("EINVAL", h.trim, 4096, size - 1)
want("EINVAL", h.cache, 4096, size - 1)
want("EINVAL", h.block_status, 4096, size, ext)
want("EINVAL", h.pread, 512, 0, 1 << 4)
want("EINVAL", h.pwrite, buf, 0, 1 << 9)
want("EINVAL", h.trim, 512, 0, 1 << 3)
want("EINVAL", h.flush, 1 << 7)
want("EINVAL", h.zero, 512, 0, 1 << 2)
want((None, "EINVAL"), h.pread, 0, 0)
want((None, "EINVAL"), h.pwrite, bytearray(0), 0)
want((None, "EINVAL"), h.trim, 0, 0)
want((None, "EINVAL"), h.zero, 0, 0)
want((None, "EINVAL"), h.cache, 0, 0)
want((None, "EINVAL"), h.block_status, 0, 0, ext)
want(None, h.pread, 512, 0, nbd.CMD_FLAG_DF)
want(None, h.pwrite, buf, 0, nbd.CMD_FLAG_FUA)
want(None, h.trim, 4096, 0, nbd.CMD_FLAG_FUA)
want(None, h.cache, 4096, 0, nbd.CMD_FLAG_FUA)
want(None, h.flush, nbd.CMD_FLAG_FUA)
want(None, h.zero, 4096, 0, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
want(None, h.block_status, size, 0, ext, nbd.CMD_FLAG_REQ_ONE)
h.shutdown()
`
