package e2e_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// The clients that people use, with a volume of either cache mode, over a Unix
// socket and over TCP.
func TestClients(t *testing.T) {
	s := startServer(t)
	s.create("back", "64M")
	s.create("through", "16M", "--cache", "writethrough")
	t.Run("writeback", func(t *testing.T) { nbdtest.RunClientSuite(t, s.uri("back"), 64<<20) })
	t.Run("writethrough", func(t *testing.T) {
		nbdtest.RunClientSuite(t, fmt.Sprintf("nbd://%s/through", s.nbd), 16<<20)
	})
	for _, name := range []string{"back", "through"} {
		s.atoll("volume", "check", name, "--read")
	}
}

// image writes a file of n bytes of random data with holes, and returns its
// checksum.
func image(t *testing.T, path string, n int64, seed uint64) [32]byte {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	p := make([]byte, 256<<10)
	for off := int64(0); off < n; off += int64(len(p)) {
		if rng.IntN(3) == 0 {
			continue
		}
		fillStamp(p, off, rng.Uint64())
		if _, err := f.WriteAt(p[:min(int64(len(p)), n-off)], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return checksum(t, path, n)
}

// checksum is that of the first n bytes of a file, whose rest must be zeros.
func checksum(t *testing.T, path string, n int64) (sum [32]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyN(h, f, n); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(f)
	if err != nil || len(bytes.Trim(rest, "\x00")) > 0 {
		t.Errorf("%s: the rest of %d bytes is not zero, %v", path, len(rest), err)
	}
	copy(sum[:], h.Sum(nil))
	return sum
}

// allocated is the room that a file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// Images go in and out, from and to files and pipes, sparse, and what fails
// leaves nothing behind.
func TestImportExport(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	src, dst := filepath.Join(s.dir, "src.img"), filepath.Join(s.dir, "dst.img")
	const size = 48<<20 + 1234
	sum := image(t, src, size, 1)
	out := s.atoll("volume", "import", src, "a")
	if !strings.Contains(out, "a: 48 MiB imported") {
		t.Errorf("import says %q", out)
	}
	if v := s.volume("a"); v.SizeBytes != (size+4095)&^4095 {
		t.Errorf("the volume has %d bytes", v.SizeBytes)
	}
	s.atoll("volume", "export", "a", dst)
	if checksum(t, dst, size) != sum {
		t.Fatal("the export differs")
	}
	if got, was := allocated(t, dst), allocated(t, src); got > was+1<<20 {
		t.Errorf("the export takes %d bytes, the image %d", got, was)
	}
	if r := s.try("volume", "export", "a", dst); r.code != 4 || !strings.Contains(r.err, "there already") {
		t.Errorf("export over a file: %+v", r)
	}
	if checksum(t, dst, size) != sum {
		t.Error("the refused export harmed the file")
	}
	// Through pipes, with the size unknown.
	shell := func(script string) result {
		t.Helper()
		return command(t, append(s.env, "ATOLL="+atollPath, "ATOLL_SERVER="+s.socket(), "SRC="+src, "DIR="+s.dir), "", "bash", "-o", "pipefail", "-c", script)
	}
	if r := shell(`cat "$SRC" | "$ATOLL" volume import - b && "$ATOLL" volume export b - | cat >"$DIR/pipe.img"`); r.code != 0 {
		t.Fatalf("pipes: %+v", r)
	}
	if checksum(t, filepath.Join(s.dir, "pipe.img"), size) != sum {
		t.Error("through pipes the image differs")
	}
	if v := s.volume("b"); v.SizeBytes != (size+4095)&^4095 {
		t.Errorf("from a pipe the volume has %d bytes", v.SizeBytes)
	}
	if r := shell(`"$ATOLL" volume export a - >/dev/full`); r.code != 9 && r.code != 1 && r.code != 8 {
		t.Errorf("export to a full disk: %+v", r)
	}
	// Over an existing volume, what was there is gone.
	small := filepath.Join(s.dir, "small.img")
	smallSum := image(t, small, 10<<20, 2)
	if r := s.try("volume", "import", small, "a"); r.code != 4 || !strings.Contains(r.err, "--overwrite") {
		t.Errorf("import over a volume: %+v", r)
	}
	s.atoll("volume", "import", small, "a", "--overwrite")
	if r := shell(`"$ATOLL" volume export a - | head -c 10485760 | sha256sum`); !strings.HasPrefix(r.out, fmt.Sprintf("%x", smallSum)) {
		t.Errorf("after --overwrite: %+v", r)
	}
	if r := s.try("volume", "import", src, "c", "--size", "1M"); r.code == 0 {
		t.Error("an image larger than --size is taken")
	}
	s.atoll("volume", "import", small, "d", "--size", "20M")
	if v := s.volume("d"); v.SizeBytes != 20<<20 {
		t.Errorf("with --size 20M the volume has %d bytes", v.SizeBytes)
	}
	// Interrupted imports, of either kind, leave no volume.
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		cmd := exec.Command(atollPath, "volume", "import", "-", "half", "--server", s.socket())
		cmd.Env = s.env
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		piece := make([]byte, 1<<20)
		fillStamp(piece, 0, 1)
		for range 8 {
			if _, err := in.Write(piece); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the import begins", func() bool { return s.try("volume", "info", "half").code == 0 })
		cmd.Process.Signal(sig)
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case <-done:
		case <-time.After(patience):
			t.Errorf("%v does not end an import that waits for its input", sig)
			in.Close()
			<-done
		}
		if code := cmd.ProcessState.ExitCode(); code != 130 {
			t.Errorf("%v: exit code %d, want 130", sig, code)
		}
		if r := s.try("volume", "info", "half"); r.code != 3 {
			t.Errorf("%v: the half volume is still there: %+v", sig, r)
		}
	}
	// An interrupted export leaves no file.
	s.atoll("volume", "create", "big", "4G")
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 512M", s.uri("big"))
	half := filepath.Join(s.dir, "half.img")
	cmd := exec.Command(atollPath, "volume", "export", "big", half, "--server", s.socket(), "--concurrency", "1")
	cmd.Env = s.env
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the export begins", func() bool { _, err := os.Stat(half); return err == nil })
	cmd.Process.Signal(syscall.SIGINT)
	if err := cmd.Wait(); err == nil {
		t.Log("the export ended before it was interrupted")
	} else if _, err := os.Stat(half); err == nil {
		t.Error("the half export is still there")
	}
}

// Writes that were in flight when their connection died never come through after
// newer ones on the next connection.
func TestBrokenConnections(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	uri := s.create("disk1", "16M")
	const size = 16 << 20
	h := newHistory(t, size)
	rng := rand.New(rand.NewPCG(h.seed, 1))
	for round := range 60 {
		c := dial(t, uri)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		blocks := rng.Perm(64)
		for _, b := range blocks {
			h.blocks[b].issued++
			buf := make([]byte, blockSize)
			fillStamp(buf, int64(b)*blockSize, h.blocks[b].issued)
			wg.Go(func() { _ = c.WriteAt(ctx, buf, int64(b)*blockSize, round%2 == 0) })
		}
		time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
		c.Close()
		cancel()
		wg.Wait()
		c = dial(t, uri)
		buf := make([]byte, blockSize)
		for _, b := range blocks {
			h.blocks[b].issued++
			fillStamp(buf, int64(b)*blockSize, h.blocks[b].issued)
			if err := c.WriteAt(context.Background(), buf, int64(b)*blockSize, false); err != nil {
				t.Fatal(err)
			}
			h.blocks[b].durable = h.blocks[b].issued
		}
		if round%10 == 9 {
			time.Sleep(50 * time.Millisecond) // for what is late
		}
		h.verify(t, c)
		c.Close()
	}
}

// authority makes certificates for a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.key, a.cert, a.pem, _ = a.issue(t, "test authority", true)
	return a
}

// issue makes a certificate, its own authority's when a has none yet.
func (a *authority) issue(t *testing.T, name string, ca bool) (*ecdsa.PrivateKey, *x509.Certificate, []byte, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(rand.Int64()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, IsCA: ca,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.cert, a.key
	if ca {
		tmpl.KeyUsage |= x509.KeyUsageCertSign
		tmpl.ExtKeyUsage, tmpl.DNSNames, tmpl.IPAddresses = nil, nil, nil
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(crand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// save writes a certificate directory as libnbd and qemu want it.
func (a *authority) save(t *testing.T, dir, role string) string {
	t.Helper()
	_, _, cert, key := a.issue(t, role, false)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"ca-cert.pem": a.pem, role + "-cert.pem": cert, role + "-key.pem": key} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TLS with certificates on both sides: those of the authority are served, nobody
// else is, and nothing goes in the clear over TCP.
func TestTLS(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo", "nbdcopy", "qemu-img")
	s := newServer(t)
	ca := newAuthority(t)
	server := ca.save(t, filepath.Join(s.dir, "tls-server"), "server")
	client := ca.save(t, filepath.Join(s.dir, "tls-client"), "client")
	stranger := newAuthority(t).save(t, filepath.Join(s.dir, "tls-stranger"), "client")
	if err := os.WriteFile(filepath.Join(stranger, "ca-cert.pem"), ca.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	s.args = append(s.args, "--nbd-tls-cert", filepath.Join(server, "server-cert.pem"),
		"--nbd-tls-key", filepath.Join(server, "server-key.pem"), "--nbd-tls-ca", filepath.Join(server, "ca-cert.pem"))
	s.start()
	s.create("disk1", "16M")
	uri := fmt.Sprintf("nbds://%s/disk1?tls-certificates=%s", s.nbd, client)
	if out := run(t, "nbdinfo", uri); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo:\n%s", out)
	}
	src, dst := filepath.Join(s.dir, "src"), filepath.Join(s.dir, "dst")
	sum := image(t, src, 16<<20, 3)
	run(t, "nbdcopy", "-C", "4", src, uri)
	run(t, "nbdcopy", "-C", "4", uri, dst)
	if checksum(t, dst, 16<<20) != sum {
		t.Error("through TLS the image differs")
	}
	hostPort := strings.Split(s.nbd, ":")
	run(t, "qemu-img", "compare", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+client, "--image-opts",
		"driver=file,filename="+src, fmt.Sprintf("driver=nbd,host=%s,port=%s,export=disk1,tls-creds=t", hostPort[0], hostPort[1]))
	for what, bad := range map[string]string{
		"plain":                  fmt.Sprintf("nbd://%s/disk1", s.nbd),
		"certificate of another": fmt.Sprintf("nbds://%s/disk1?tls-certificates=%s", s.nbd, stranger),
	} {
		if r := command(t, os.Environ(), "", "nbdinfo", bad); r.code == 0 {
			t.Errorf("%s: served", what)
		}
		if r := command(t, os.Environ(), "", "nbdinfo", "--list", bad); r.code == 0 || strings.Contains(r.out, "disk1") {
			t.Errorf("%s: volumes are listed", what)
		}
	}
	run(t, "nbdinfo", "--size", s.uri("disk1")) // the Unix socket needs no TLS
}

// libnbd starts the server itself and hands it a socket.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo", "nbdcopy")
	s := startServer(t, "--nbd", "none")
	s.create("disk1", "16M")
	s.stop()
	inner := append(append([]string{"--", "[", atollPath}, s.args...), "]")
	env := append(s.env, "ATOLL_LOG_LEVEL=warn")
	r := command(t, env, "", "nbdinfo", append([]string{"--size"}, inner...)...)
	if r.code != 0 || strings.TrimSpace(r.out) != fmt.Sprint(16<<20) {
		t.Fatalf("nbdinfo: %+v", r)
	}
	src, dst := filepath.Join(s.dir, "src"), filepath.Join(s.dir, "dst")
	sum := image(t, src, 16<<20, 4)
	unlocked := func() {
		t.Helper()
		eventually(t, "the server that libnbd started ends", func() bool {
			f, err := os.Open(filepath.Join(s.data, "lock"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil
		})
	}
	unlocked()
	if r = command(t, env, "", "nbdcopy", append([]string{"--", src}, inner[1:]...)...); r.code != 0 {
		t.Fatalf("nbdcopy up: %+v", r)
	}
	unlocked()
	if r = command(t, env, "", "nbdcopy", append(inner, dst)...); r.code != 0 {
		t.Fatalf("nbdcopy down: %+v", r)
	}
	unlocked()
	if checksum(t, dst, 16<<20) != sum {
		t.Error("the image differs")
	}
}

// Several connections see each other's writes at once, and a flush on one covers
// all: that is what multi-conn promises.
func TestConnectionsAgree(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	uri := s.create("disk1", "16M")
	var conns []*nbd.Client
	for range 4 {
		c := dial(t, uri)
		defer c.Close()
		conns = append(conns, c)
	}
	ctx := t.Context()
	w, r := make([]byte, blockSize), make([]byte, blockSize)
	for i := range 2000 {
		off := int64(i%256) * blockSize
		fillStamp(w, off, uint64(i))
		if err := conns[i%4].WriteAt(ctx, w, off, false); err != nil {
			t.Fatal(err)
		}
		if err := conns[(i+1)%4].ReadAt(ctx, r, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w, r) {
			t.Fatalf("write %d on one connection is not seen on another", i)
		}
	}
	if err := conns[3].Flush(ctx); err != nil {
		t.Fatal(err)
	}
	s.kill()
	s.start()
	c := dial(t, s.uri("disk1"))
	defer c.Close()
	for i := 2000 - 256; i < 2000; i++ {
		off := int64(i%256) * blockSize
		fillStamp(w, off, uint64(i))
		if err := c.ReadAt(ctx, r, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w, r) {
			t.Fatalf("write %d is lost though a flush on another connection followed", i)
		}
	}
}
