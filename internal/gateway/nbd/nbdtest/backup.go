package nbdtest

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Backup describes a disk whose versions RunBackupSuite copies with the tools
// that people use.
type Backup struct {
	// URI returns where an export is.
	URI func(export string) string
	// Disk is the export's name, whose versions are at Disk@VERSION. It is
	// overwritten. Size is a multiple of 64 KiB and 4 MiB at least.
	Disk string
	Size int64
	// Snapshot makes a version of the disk.
	Snapshot func(t *testing.T, name string)
}

// RunBackupSuite writes a disk, backs it up in full, writes it again and backs
// up the difference, with libnbd and with qemu: what is restored must be equal
// to the version. Tests whose programs are missing are skipped.
func RunBackupSuite(t *testing.T, b Backup) {
	need(t, "qemu-io", "qemu-img", "nbdinfo", "nbdcopy")
	dir := t.TempDir()
	s := &backupSuite{Backup: b, full: filepath.Join(dir, "full"), next: filepath.Join(dir, "next")}
	image(t, s.full, b.Size, 11)
	run(t, "nbdcopy", "--flush", s.full, b.URI(b.Disk))
	b.Snapshot(t, "full")
	run(t, "nbdcopy", b.URI(b.Disk+"@full"), s.full)
	half := b.Size / 2
	script := []string{
		"write -P 71 4096 4096", "write -P 72 131072 65536", "write -P 73 1000001 1", // data
		fmt.Sprintf("write -P 74 %d 12288", half), fmt.Sprintf("write -P 74 %d 4096", b.Size-4096),
		fmt.Sprintf("write -z -u %d 65536", half+1<<19), fmt.Sprintf("discard %d 65536", half+3<<17),
		"flush",
	}
	args := []string{"-f", "raw"}
	for _, line := range script {
		args = append(args, "-c", line)
	}
	if out := run(t, "qemu-io", append(args, b.URI(b.Disk))...); strings.Contains(out, "failed") {
		t.Fatal(out)
	}
	b.Snapshot(t, "next")
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 99 0 1M", b.URI(b.Disk)) // later than what is backed up
	run(t, "nbdcopy", b.URI(b.Disk+"@next"), s.next)
	t.Run("versions", s.versions)
	t.Run("map", s.maps)
	t.Run("libnbd", s.libnbd)
	t.Run("qemu", s.qemu)
}

type backupSuite struct {
	Backup
	full, next string // raw images of the two versions
}

// versions checks how versions show up as exports.
func (s *backupSuite) versions(t *testing.T) {
	for _, v := range []string{"@full", "@next"} {
		uri := s.URI(s.Disk + v)
		run(t, "nbdinfo", "--is", "read-only", uri)
		out, err := try(t, "qemu-io", "-f", "raw", "-c", "write 0 4096", uri)
		if err == nil && !strings.Contains(out, "failed") && !strings.Contains(out, "read-only") {
			t.Errorf("%s takes a write: %s", v, out)
		}
	}
	list := run(t, "nbdinfo", "--list", s.URI(s.Disk))
	for _, want := range []string{fmt.Sprintf("export=%q", s.Disk), fmt.Sprintf("export=%q", s.Disk+"@full"), fmt.Sprintf("export=%q", s.Disk+"@next"),
		"base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:since-full"} {
		if !strings.Contains(list, want) {
			t.Errorf("nbdinfo --list lacks %s:\n%s", want, list)
		}
	}
}

// maps checks what nbdinfo prints of the contexts.
func (s *backupSuite) maps(t *testing.T) {
	for _, c := range []struct {
		export, context string
		want, never     []string
	}{
		{"@next", "qemu:dirty-bitmap:since-full", []string{"clean", "dirty"}, nil},
		{"", "qemu:dirty-bitmap:since-next", []string{"dirty", "clean"}, nil},
		{"", "qemu:allocation-depth", []string{"local", "absent"}, []string{"backing"}},
		{"", "base:allocation", []string{"data", "hole,zero"}, nil},
	} {
		out := run(t, "nbdinfo", "--map="+c.context, s.URI(s.Disk+c.export))
		var end int64
		for line := range strings.Lines(out) {
			var off, n, flags int64
			var word string
			if got, err := fmt.Sscan(line, &off, &n, &flags, &word); got < 4 || off != end {
				t.Fatalf("%s: line %q at %d: %v", c.context, line, end, err)
			}
			end = off + n
		}
		if end != s.Size {
			t.Errorf("%s ends at %d of %d", c.context, end, s.Size)
		}
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %q is missing:\n%s", c.context, want, out)
			}
		}
		for _, never := range c.never {
			if strings.Contains(out, never) {
				t.Errorf("%s: %q appears:\n%s", c.context, never, out)
			}
		}
	}
	if out, err := try(t, "nbdinfo", "--map=qemu:dirty-bitmap:since-next", s.URI(s.Disk+"@full")); err == nil {
		t.Errorf("the older version knows what changed since the newer one:\n%s", out)
	}
}

// libnbd copies what changed to a copy of the full backup.
func (s *backupSuite) libnbd(t *testing.T) {
	const python = "/usr/bin/python3"
	if out, err := try(t, python, "-c", "import nbd"); err != nil {
		t.Skipf("python3-libnbd is not installed: %s", out)
	}
	copied := copyFile(t, s.full)
	out := run(t, python, "-c", incrementalScript, s.URI(s.Disk+"@next"), "qemu:dirty-bitmap:since-full", copied)
	same(t, copied, s.next, s.Size)
	var n int64
	if _, err := fmt.Sscan(out, &n); err != nil || n == 0 || n > s.Size/2 {
		t.Errorf("%q bytes copied of %d: %v", out, s.Size, err)
	}
}

// incrementalScript copies the dirty parts of an export to a file, and tells how
// many bytes that were.
const incrementalScript = `
import nbd, sys
uri, bitmap, path = sys.argv[1:]
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context(bitmap)
h.connect_uri(uri)
assert h.can_meta_context(bitmap) and h.can_meta_context("base:allocation") and h.is_read_only()
size, at, copied, seen = h.get_size(), 0, 0, set()
with open(path, "r+b") as out:
    while at < size:
        got = {}
        def extent(context, offset, entries, err):
            got[context] = entries
        h.block_status(min(size - at, 1 << 22), at, extent)
        seen |= set(got)
        for n, flags in zip(got[bitmap][::2], got[bitmap][1::2]):
            if flags & 1:
                out.seek(at)
                out.write(h.pread(n, at))
                copied += n
            at += n
assert seen == {"base:allocation", bitmap}, seen
print(copied)
`

// qemu makes an overlay of the full backup that holds what changed.
func (s *backupSuite) qemu(t *testing.T) {
	dir := t.TempDir()
	full, inc := filepath.Join(dir, "full.qcow2"), filepath.Join(dir, "inc.qcow2")
	next := s.URI(s.Disk + "@next")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.URI(s.Disk+"@full"), full)
	node, err := json.Marshal(map[string]any{"driver": "raw", "file": map[string]any{
		"driver": "nbd", "export": s.Disk + "@next", "x-dirty-bitmap": "qemu:dirty-bitmap:since-full", "server": serverOf(t, next)}})
	if err != nil {
		t.Fatal(err)
	}
	var parts []struct {
		Start, Length int64
		Data          bool
	}
	text := run(t, "qemu-img", "map", "--output=json", "json:"+string(node))
	if err := json.Unmarshal([]byte(text), &parts); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "create", "-f", "qcow2", "-b", next, "-F", "raw", inc)
	args := []string{"-C", "-f", "qcow2"}
	var dirty int64
	for _, p := range parts {
		if !p.Data { // so qemu shows what is dirty
			dirty += p.Length
			args = append(args, "-c", fmt.Sprintf("read %d %d", p.Start, p.Length))
		}
	}
	if dirty == 0 || dirty > s.Size/2 {
		t.Fatalf("%d of %d bytes are dirty:\n%s", dirty, s.Size, text)
	}
	run(t, "qemu-io", append(args, inc)...)
	run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", full, inc)
	restored := filepath.Join(dir, "restored")
	run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", inc, restored)
	same(t, restored, s.next, s.Size)
}

// copyFile copies a file and returns the copy's path.
func copyFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		path = filepath.Join(t.TempDir(), "copy")
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// serverOf returns the address in a URI as qemu wants it.
func serverOf(t *testing.T, uri string) map[string]any {
	t.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	if socket := u.Query().Get("socket"); socket != "" {
		return map[string]any{"type": "unix", "path": socket}
	}
	port := u.Port()
	if port == "" {
		port = "10809"
	}
	return map[string]any{"type": "inet", "host": u.Hostname(), "port": port}
}
