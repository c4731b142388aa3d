package guest_test

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// bootTimeout bounds the wait for a guest's next line; a busy machine emulates
// slowly.
const bootTimeout = 5 * time.Minute

// lab is what the guests of this test run share.
type lab struct {
	kernel *kernel
	dir    string
	binary string // atoll
	base   []byte // the initramfs
	skip   string // why there are no guests
}

// theLab is set up by TestMain and never changed.
var theLab lab

func TestMain(m *testing.M) {
	flag.Parse() // for testing.Short
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	_ = os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	dir, err := os.MkdirTemp("", "atoll-guest-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	theLab.dir = dir
	if theLab.skip = theLab.missing(); theLab.skip == "" {
		if err := theLab.build(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return m.Run()
}

// missing tells why guests cannot run here.
func (l *lab) missing() string {
	if testing.Short() {
		return "guests take long"
	}
	for _, p := range append([]string{"qemu-system-x86_64", "ldd"}, programs...) {
		if _, err := exec.LookPath(p); err != nil {
			return p + " is not installed"
		}
	}
	k, err := findKernel()
	if err != nil {
		return err.Error()
	}
	if f, err := os.Open(k.image); err != nil {
		return err.Error()
	} else {
		f.Close()
	}
	l.kernel = k
	return ""
}

// build makes the program under test, the guest's init and the initramfs.
func (l *lab) build() error {
	l.binary = os.Getenv("ATOLL_BINARY")
	if l.binary == "" {
		l.binary = filepath.Join(l.dir, "atoll")
		if err := goBuild(l.binary, "../../cmd/atoll"); err != nil {
			return err
		}
	}
	init := filepath.Join(l.dir, "init")
	if err := goBuild(init, "./testdata/guestinit"); err != nil {
		return err
	}
	var err error
	l.base, err = l.kernel.baseImage(init)
	return err
}

func goBuild(out, pkg string) error {
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %v\n%s", pkg, err, text)
	}
	return nil
}

// needLab skips the test where no guest can run.
func needLab(t *testing.T) *lab {
	t.Helper()
	if theLab.skip != "" {
		t.Skip(theLab.skip)
	}
	return &theLab
}

// rounds is how often the power is cut.
func rounds(short, long int) int {
	if os.Getenv("ATOLL_LONG") != "" {
		return long
	}
	return short
}

// guestOptions describe one boot.
type guestOptions struct {
	disk    string // NBD URI of a virtio disk; empty for none
	net     bool   // a card on qemu's user network
	modules []string
	extra   []byte // behind the common initramfs
	memory  int    // MiB (256)
	cpus    int    // (1)
	args    map[string]string
}

// vm is a running guest.
type vm struct {
	t       *testing.T
	cmd     *exec.Cmd
	lines   chan string // what init reports; closed at the end
	begin   time.Time
	console tail
	wg      sync.WaitGroup
	once    sync.Once
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (b *tail) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if len(b.buf) > 16<<10 {
		b.buf = append([]byte(nil), b.buf[len(b.buf)-8<<10:]...)
	}
	return len(p), nil
}

func (b *tail) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(bytes.ToValidUTF8(b.buf, nil))
}

// boot starts a guest. It is gone at the end of the test at the latest.
func (l *lab) boot(t *testing.T, o guestOptions) *vm {
	t.Helper()
	initrd := filepath.Join(l.dir, "initrd")
	if err := os.WriteFile(initrd, append(append([]byte(nil), l.base...), o.extra...), 0o600); err != nil {
		t.Fatal(err)
	}
	line := "console=ttyS0 quiet panic=-1 guest.modules=" + strings.Join(l.kernel.order(o.modules...), ",")
	for key, value := range o.args {
		line += " guest." + key + "=" + value
	}
	report, reportTo, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reportTo.Close()
	args := []string{
		"-accel", "tcg,thread=multi", "-machine", "pc",
		"-cpu", "qemu64,+rdrand", // else programs wait seconds for the first random number
		"-m", strconv.Itoa(max(o.memory, 256)), "-smp", strconv.Itoa(max(o.cpus, 1)),
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", l.kernel.image, "-initrd", initrd, "-append", line,
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-chardev", "file,id=report,path=/dev/fd/3", "-serial", "chardev:report",
	}
	if o.disk != "" {
		args = append(args, "-drive", "file="+o.disk+",format=raw,if=virtio,cache=none,discard=unmap")
	}
	if o.net {
		args = append(args, "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	v := &vm{t: t, lines: make(chan string, 1<<16), begin: time.Now()}
	v.cmd = exec.Command("qemu-system-x86_64", args...)
	v.cmd.Stdout, v.cmd.Stderr = &v.console, &v.console
	v.cmd.ExtraFiles = []*os.File{reportTo}
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := v.cmd.Start(); err != nil {
		report.Close()
		t.Fatal(err)
	}
	v.wg.Go(func() { v.read(report) })
	t.Cleanup(func() {
		v.kill()
		if t.Failed() && v.console.String() != "" {
			t.Logf("console of the guest:\n%s", v.console.String())
		}
	})
	return v
}

// read passes the guest's lines on.
func (v *vm) read(r io.ReadCloser) {
	defer close(v.lines)
	defer r.Close()
	for s := bufio.NewScanner(r); s.Scan(); {
		v.lines <- strings.TrimRight(s.Text(), "\r")
	}
}

// cut ends the guest as a power cut would. What it has reported by then stays
// readable.
func (v *vm) cut() {
	_ = v.cmd.Process.Kill()
}

// kill ends the guest and everything around it.
func (v *vm) kill() {
	v.once.Do(func() {
		v.cut()
		go func() {
			for range v.lines { // nobody may be reading any more
			}
		}()
		_ = v.cmd.Wait()
		v.wg.Wait()
	})
}

// next returns the guest's next line; false when the guest has ended.
func (v *vm) next() (string, bool) {
	v.t.Helper()
	timer := time.NewTimer(bootTimeout)
	defer timer.Stop()
	select {
	case line, ok := <-v.lines:
		return line, ok
	case <-timer.C:
		v.t.Fatalf("the guest says nothing for %v", bootTimeout)
		return "", false
	}
}

// until reads lines up to one of the given kind and returns its words. A
// complaint of the guest comes back as an error.
func (v *vm) until(kind string) (words []string, err error) {
	v.t.Helper()
	for {
		line, ok := v.next()
		words := strings.Fields(line)
		switch {
		case !ok:
			return nil, fmt.Errorf("the guest ended before %q", kind)
		case len(words) == 0:
			continue
		case words[0] == "fail":
			return nil, fmt.Errorf("guest: %s", line)
		case words[0] == kind:
			return words, nil
		}
		v.t.Logf("%6.2f s  %s", time.Since(v.begin).Seconds(), line)
	}
}

// finish reads to the end of the task.
func (v *vm) finish() error {
	v.t.Helper()
	_, err := v.until("done")
	v.kill()
	return err
}
