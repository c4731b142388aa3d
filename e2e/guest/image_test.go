package guest_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"testing"
)

// archive is an initramfs in the making: a cpio archive of the "newc" format,
// not compressed, because the emulated processor unpacks slowly. Archives may be
// concatenated.
type archive struct {
	buf   bytes.Buffer
	inode int
	has   map[string]bool
}

func newArchive() *archive { return &archive{has: map[string]bool{}} }

// entry adds one entry and the directories above it.
func (a *archive) entry(name string, mode uint32, data []byte) {
	name = strings.Trim(name, "/")
	if a.has[name] {
		return
	}
	a.has[name] = true
	if dir := path.Dir(name); dir != "." {
		a.entry(dir, 0o040755, nil)
	}
	a.inode++
	a.header(name, mode, len(data))
	a.buf.Write(data)
	a.pad()
}

func (a *archive) header(name string, mode uint32, size int) {
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

// file adds a file of the machine.
func (a *archive) file(name, from string) error {
	data, err := os.ReadFile(from)
	if err == nil {
		a.entry(name, 0o100755, data)
	}
	return err
}

// program adds a program with the libraries it needs; false if the machine does
// not have it.
func (a *archive) program(name string) (bool, error) {
	from, err := exec.LookPath(name)
	if err != nil {
		return false, nil
	}
	if err := a.file("/bin/"+name, from); err != nil {
		return false, err
	}
	out, err := exec.Command("ldd", from).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "not a dynamic executable") {
		return false, fmt.Errorf("ldd %s: %v: %s", from, err, out)
	}
	for _, word := range strings.Fields(string(out)) {
		if strings.HasPrefix(word, "/") && !strings.HasSuffix(word, ":") {
			if err := a.file(word, word); err != nil {
				return false, err
			}
		}
	}
	return true, nil
}

// bytes ends the archive.
func (a *archive) bytes() []byte {
	a.header("TRAILER!!!", 0, 0)
	for a.buf.Len()%512 != 0 {
		a.buf.WriteByte(0)
	}
	return a.buf.Bytes()
}

// kernel is the Linux that the guest runs.
type kernel struct {
	image, dir string // the bzImage; its modules
	deps       map[string][]string
	paths      map[string]string
}

// findKernel looks for the newest installed cloud kernel.
func findKernel() (*kernel, error) {
	images, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(images) == 0 {
		return nil, fmt.Errorf("no /boot/vmlinuz-*-cloud-amd64 (package linux-image-cloud-amd64)")
	}
	sort.Strings(images)
	k := &kernel{image: images[len(images)-1], deps: map[string][]string{}, paths: map[string]string{}}
	k.dir = "/lib/modules/" + strings.TrimPrefix(filepath.Base(k.image), "vmlinuz-")
	text, err := os.ReadFile(filepath.Join(k.dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		file, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		name := moduleName(file)
		k.paths[name] = file
		for _, d := range strings.Fields(deps) {
			k.deps[name] = append(k.deps[name], moduleName(d))
		}
	}
	return k, nil
}

func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

// order lists modules with those they need, in the order of loading. What is
// built into the kernel is left out.
func (k *kernel) order(names ...string) (all []string) {
	seen := map[string]bool{}
	var visit func(name string)
	visit = func(name string) {
		if seen[name] || k.paths[name] == "" {
			return
		}
		seen[name] = true
		// modules.dep lists what a module needs with the needed ones behind
		// those that need them.
		deps := k.deps[name]
		for i := len(deps) - 1; i >= 0; i-- {
			visit(deps[i])
		}
		all = append(all, name)
	}
	for _, n := range names {
		visit(n)
	}
	return all
}

// programs are what the guest may need; those with a question mark may be
// missing.
var programs = []string{"busybox", "mkfs.ext4", "fsck.ext4", "mkfs.xfs", "xfs_repair", "blkid"}

// baseImage builds the initramfs that every guest uses.
func (k *kernel) baseImage(init string) ([]byte, error) {
	a := newArchive()
	if err := a.file("/init", init); err != nil {
		return nil, err
	}
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "mnt", "run", "etc"} {
		a.entry(dir, 0o040755, nil)
	}
	a.entry("/etc/mtab", 0o120777, []byte("/proc/self/mounts"))
	for _, m := range k.order(modules...) {
		if err := a.file("/modules/"+m+".ko", filepath.Join(k.dir, k.paths[m])); err != nil {
			return nil, err
		}
	}
	for _, p := range programs {
		if ok, err := a.program(p); err != nil {
			return nil, err
		} else if !ok {
			return nil, fmt.Errorf("%s: %w", p, fs.ErrNotExist)
		}
	}
	for _, applet := range []string{"sh", "ip", "mount", "umount"} {
		a.entry("/bin/"+applet, 0o120777, []byte("busybox"))
	}
	return a.bytes(), nil
}

// modules are the ones that some guest loads. ext4 is built into Debian's cloud
// kernel.
var modules = []string{"virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4", "xfs", "nbd", "fuse", "loop"}

// extraImage builds an archive of programs for one test.
func extraImage(t *testing.T, files map[string]string, names ...string) []byte {
	t.Helper()
	a := newArchive()
	for name, from := range files {
		if err := a.file(name, from); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range names {
		if ok, err := a.program(n); err != nil {
			t.Fatal(err)
		} else if !ok {
			t.Skipf("%s is not installed", n)
		}
	}
	return a.bytes()
}
