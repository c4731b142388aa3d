package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// Names of the files in a directory.
const (
	fileCA        = "ca.crt"
	fileCAKey     = "ca.key"
	fileMember    = "member.crt"
	fileMemberKey = "member.key"
)

// Types of PEM blocks.
const (
	typeCert    = "CERTIFICATE"
	typeRequest = "CERTIFICATE REQUEST"
	typeKey     = "PRIVATE KEY"
)

// maxFile is the largest file that is read.
const maxFile = 1 << 20

// Save writes the CA into dir, which is made with mode 0700 if absent. ErrExist
// if there is another CA. Durable on return.
func (ca *CA) Save(dir string) error {
	if old, err := LoadCA(dir); err == nil && old.cert.Equal(ca.cert) {
		return nil
	} else if !errors.Is(err, atoll.ErrNotExist) {
		return fmt.Errorf("save CA in %s: there is one: %w", dir, atoll.ErrExist)
	}
	return save(dir, ca.key, fileCAKey, fileCA, ca.CertPEM())
}

// LoadCA reads the CA that Save wrote. ErrDenied if others may read its key.
func LoadCA(dir string) (*CA, error) {
	key, err := loadKey(filepath.Join(dir, fileCAKey))
	if err != nil {
		return nil, err
	}
	cert, err := loadCert(filepath.Join(dir, fileCA))
	if err != nil {
		return nil, err
	}
	if !cert.IsCA || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("load CA from %s: key and certificate do not belong together: %w", dir, atoll.ErrInvalid)
	}
	for _, u := range cert.URIs {
		var cluster atoll.UUID
		if u.Scheme == "atoll" && u.Path == "/ca" && cluster.UnmarshalText([]byte(u.Host)) == nil {
			return &CA{cert, key, cluster}, nil
		}
	}
	return nil, fmt.Errorf("load CA from %s: it names no cluster: %w", dir, atoll.ErrInvalid)
}

// Save writes key, certificate and CA certificate into dir, which is made with
// mode 0700 if absent, replacing what was there. Durable on return.
func (m *Member) Save(dir string) error {
	both := append(encodePEM(typeCert, m.leaf.Raw), m.CAPEM()...)
	return save(dir, m.key, fileMemberKey, fileMember, both)
}

// LoadMember reads what Member.Save wrote. ErrDenied if others may read the key.
func LoadMember(dir string) (*Member, error) {
	key, err := loadKey(filepath.Join(dir, fileMemberKey))
	if err != nil {
		return nil, err
	}
	data, err := readFile(filepath.Join(dir, fileMember))
	if err != nil {
		return nil, err
	}
	leaf, rest := pem.Decode(data)
	if leaf == nil || leaf.Type != typeCert {
		return nil, fmt.Errorf("load member from %s: no certificate: %w", dir, atoll.ErrInvalid)
	}
	ca, err := parseCert(rest)
	if err != nil {
		return nil, fmt.Errorf("load member from %s: %w", dir, err)
	}
	return newMember(leaf.Bytes, key, ca)
}

// ServerFiles makes a configuration for a server from files that the user
// provides, in PEM. With clientCA, clients must show a certificate from it.
func ServerFiles(cert, key, clientCA string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fileError("load certificate "+cert+" with key "+key, err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
	if clientCA != "" {
		if c.ClientCAs, err = loadPool(clientCA); err != nil {
			return nil, err
		}
		c.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return c, nil
}

// ClientFiles makes a configuration for a client from files that the user
// provides, in PEM. ca empty means those of the machine; cert and key are empty
// for a client without a certificate.
func ClientFiles(ca, cert, key, serverName string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName}
	var err error
	if ca != "" {
		if c.RootCAs, err = loadPool(ca); err != nil {
			return nil, err
		}
	}
	if cert != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fileError("load certificate "+cert+" with key "+key, err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

func loadPool(name string) (*x509.CertPool, error) {
	data, err := readFile(name)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("load CA certificates from %s: there are none: %w", name, atoll.ErrInvalid)
	}
	return pool, nil
}

// save writes a key and then the certificate that goes with it.
func save(dir string, key *ecdsa.PrivateKey, keyName, certName string, certs []byte) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fileError("make directory "+dir, err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fileError("make directory "+dir+" private", err)
	}
	if err := writeFile(dir, keyName, encodePEM(typeKey, der)); err != nil {
		return err
	}
	return writeFile(dir, certName, certs)
}

// writeFile replaces a file, mode 0600, in one step and durably.
func writeFile(dir, name string, data []byte) error {
	path := filepath.Join(dir, name)
	f, err := os.CreateTemp(dir, "."+name+".*") // mode 0600
	if err != nil {
		return fileError("write "+path, err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fileError("write "+path, err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fileError("write "+path, err)
	}
	return errors.Join(d.Sync(), d.Close())
}

func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, fileError("read "+name, err)
	}
	if info.Size() > maxFile || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a small file: %w", name, atoll.ErrInvalid)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fileError("read "+name, err)
	}
	return data, nil
}

func loadKey(name string) (*ecdsa.PrivateKey, error) {
	data, err := readFile(name)
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read %s: others may read this key; run chmod 600 on it: %w", name, atoll.ErrDenied)
	}
	der, err := decodePEM(typeKey, data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w: %w", name, atoll.ErrInvalid, err)
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok || k.Curve != elliptic.P256() {
		return nil, fmt.Errorf("read %s: key is not ECDSA P-256: %w", name, atoll.ErrInvalid)
	}
	return k, nil
}

func loadCert(name string) (*x509.Certificate, error) {
	data, err := readFile(name)
	if err != nil {
		return nil, err
	}
	c, err := parseCert(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return c, nil
}

func parseCert(data []byte) (*x509.Certificate, error) {
	der, err := decodePEM(typeCert, data)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w: %w", atoll.ErrInvalid, err)
	}
	return c, nil
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// decodePEM returns the first block, which must be of the given type.
func decodePEM(kind string, data []byte) ([]byte, error) {
	b, _ := pem.Decode(data)
	if b == nil || b.Type != kind {
		return nil, fmt.Errorf("no %s in PEM text: %w", strings.ToLower(kind), atoll.ErrInvalid)
	}
	return b.Bytes, nil
}

// fileError gives an error of the operating system its kind.
func fileError(what string, err error) error {
	kind := atoll.ErrInvalid
	switch {
	case errors.Is(err, iofs.ErrNotExist):
		kind = atoll.ErrNotExist
	case errors.Is(err, iofs.ErrPermission):
		kind = atoll.ErrDenied
	case errors.As(err, new(*iofs.PathError)):
		kind = atoll.ErrIO
	}
	return fmt.Errorf("%s: %w: %w", what, kind, err)
}
