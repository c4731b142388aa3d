package curve_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/cbd"
	"github.com/atollstore/atoll/internal/gateway/curve"
	"github.com/atollstore/atoll/internal/gateway/curve/curvetest"
)

// certificate makes a certificate for 127.0.0.1 that is its own authority.
func certificate(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, x, x, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "nbd.crt"), filepath.Join(dir, "nbd.key")
	for path, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: kder}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// Calls go over HTTPS and data over TLS with certificates on both sides.
func TestTLS(t *testing.T) {
	cert, key := certificate(t, t.TempDir())
	s := real(t, "--nbd-tls-cert", cert, "--nbd-tls-key", key, "--nbd-tls-ca", cert)
	ours, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := os.ReadFile(filepath.Join(filepath.Dir(s.Socket()), "keys", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	dir, conf := module(t, s.APIAddr())
	cas := filepath.Join(dir, "cas.pem")
	if err := os.WriteFile(cas, append(ours, authority...), 0o644); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(conf)
	if err == nil {
		err = os.WriteFile(conf, append(text, "atoll.caFile="+cas+"\natoll.certFile="+cert+"\natoll.keyFile="+key+"\n"...), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	pys := pythons(t)
	for _, py := range []string{pys[0], pys[len(pys)-1]} {
		if out := run(t, py, dir, "tls.py", conf, "nbds", "SSLSocket"); out != "GOOD" {
			t.Errorf("%s: %s", py, out)
		}
	}
}

// The Go client reads the same keys; without the certificate it gets no data.
func TestTLSGo(t *testing.T) {
	cert, key := certificate(t, t.TempDir())
	s := real(t, "--nbd-tls-cert", cert, "--nbd-tls-key", key, "--nbd-tls-ca", cert)
	ours, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	authority, err := os.ReadFile(filepath.Join(filepath.Dir(s.Socket()), "keys", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(filepath.Dir(s.Socket()), "nbd.sock")); err != nil { // or data go there
		t.Fatal(err)
	}
	dir := t.TempDir()
	cas, conf := filepath.Join(dir, "cas.pem"), filepath.Join(dir, "client.conf")
	if err := os.WriteFile(cas, append(ours, authority...), 0o644); err != nil {
		t.Fatal(err)
	}
	user, page := cbd.UserInfo{Owner: "me"}, make([]byte, 4096)
	for _, w := range []struct {
		keys string
		good bool
	}{{"atoll.certFile=" + cert + "\natoll.keyFile=" + key + "\n", true}, {"", false}, {"atoll.certFile=" + key + "\n", false}} {
		text := "mds.listen.addr=" + s.APIAddr() + "\natoll.caFile=" + cas + "\natoll.ioTimeoutMS=3000\n" + w.keys
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		var c cbd.CBDClient
		if ret := c.Init(conf); ret != 0 {
			t.Fatal(ret, c.LastError())
		}
		if w.good {
			if ret := c.Create("/tls", user, 10<<30); ret != 0 {
				t.Fatal(ret, c.LastError())
			}
		}
		fd := c.Open("/tls", user)
		if w.good && (fd < 0 || c.Write(fd, page, 0, 4096) != 4096 || c.Read(fd, page, 0, 4096) != 4096) || !w.good && fd != -cbd.Failed {
			t.Errorf("%q: descriptor %d: %s", w.keys, fd, c.LastError())
		}
		c.UnInit()
	}
}

// Plain TCP, and several clusters in one process.
func TestClusters(t *testing.T) {
	s := real(t)
	dir, conf := module(t, s.APIAddr())
	pys := pythons(t)
	for _, py := range []string{pys[0], pys[len(pys)-1]} {
		kind := "socket"
		if strings.Contains(py, "/2.7") || strings.HasSuffix(py, "2.7") || strings.HasSuffix(py, "2") {
			kind = "_socketobject"
		}
		if out := run(t, py, dir, "tls.py", conf, "nbd", kind); out != "GOOD" {
			t.Errorf("%s: %s", py, out)
		}
		_, second := module(t, curvetest.Serve(t, curve.Options{}).Addr)
		_, third := module(t, curvetest.Serve(t, curve.Options{}).Addr)
		if out := run(t, py, dir, "clusters.py", second, third); out != "GOOD" {
			t.Errorf("%s: %s", py, out)
		}
	}
}
