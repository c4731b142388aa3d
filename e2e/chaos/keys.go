package chaos

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// keys are certificates of an authority of the tests' own, by which NBD servers
// and their clients know each other. The names of the files are those that
// libnbd looks for.
type keys struct {
	dir    string
	client *tls.Config
}

const (
	caFile         = "ca-cert.pem"
	serverCertFile = "server-cert.pem"
	serverKeyFile  = "server-key.pem"
	clientCertFile = "client-cert.pem"
	clientKeyFile  = "client-key.pem"
)

// newKeys makes the authority, a certificate that all servers share, and one for
// clients.
func newKeys(dir string) (*keys, error) {
	k := &keys{dir: dir}
	if err := k.make(); err != nil {
		return nil, fmt.Errorf("make keys: %w", err)
	}
	return k, nil
}

func (k *keys) make() error {
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := template(1, "chaos authority")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		return err
	}
	if ca, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	if err := k.write(caFile, "CERTIFICATE", der); err != nil {
		return err
	}
	server := template(2, "chaos server")
	for i := range 32 {
		server.IPAddresses = append(server.IPAddresses, net.IPv4(10, 77, 0, byte(i)))
	}
	if _, err := k.issue(server, ca, key, serverCertFile, serverKeyFile); err != nil {
		return err
	}
	pair, err := k.issue(template(3, "chaos client"), ca, key, clientCertFile, clientKeyFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	k.client = &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{pair}}
	return nil
}

func template(serial int64, name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

// issue makes a key with a certificate, and writes both.
func (k *keys) issue(t, ca *x509.Certificate, signer *ecdsa.PrivateKey, certFile, keyFile string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca, &key.PublicKey, signer)
	if err != nil {
		return tls.Certificate{}, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return tls.Certificate{}, err
	}
	if err := k.write(certFile, "CERTIFICATE", der); err != nil {
		return tls.Certificate{}, err
	}
	if err := k.write(keyFile, "PRIVATE KEY", secret); err != nil {
		return tls.Certificate{}, err
	}
	return tls.LoadX509KeyPair(filepath.Join(k.dir, certFile), filepath.Join(k.dir, keyFile))
}

func (k *keys) write(name, kind string, der []byte) error {
	return os.WriteFile(filepath.Join(k.dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// serverFlags makes a server's gateway use the keys.
func (k *keys) serverFlags() []string {
	return []string{"--nbd-tls-cert", filepath.Join(k.dir, serverCertFile), "--nbd-tls-key", filepath.Join(k.dir, serverKeyFile),
		"--nbd-tls-ca", filepath.Join(k.dir, caFile)}
}
