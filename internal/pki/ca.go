package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Lifetimes of certificates.
const (
	// CALife is how long a cluster's CA is valid.
	CALife = 10 * 365 * 24 * time.Hour
	// MemberLife is the usual life of a member's certificate.
	MemberLife = 365 * 24 * time.Hour
	// MaxMemberLife is the longest that IssueMember and IssueRequest give.
	MaxMemberLife = 2 * MemberLife
	// clockSkew is how far in the past certificates begin.
	clockSkew = 5 * time.Minute
)

// Bounds of what a certificate may name.
const (
	maxHosts = 32
	maxRoles = 8
)

// CA is a cluster's certificate authority. It is immutable; its methods may be
// called concurrently.
type CA struct {
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
	cluster atoll.UUID
}

// NewCA makes the authority of a new cluster, valid from now for CALife. It is
// in memory only; see Save.
func NewCA(cluster atoll.UUID, now time.Time) (*CA, error) {
	if cluster.IsZero() {
		return nil, fmt.Errorf("make CA: no cluster id: %w", atoll.ErrInvalid)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA key: %w", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "Atoll cluster " + cluster.String()[:8], Organization: []string{"Atoll"}},
		URIs:                  []*url.URL{{Scheme: "atoll", Host: cluster.String(), Path: "/ca"}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(CALife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	return &CA{cert, key, cluster}, nil
}

// Cluster returns the cluster that the CA belongs to.
func (ca *CA) Cluster() atoll.UUID { return ca.cluster }

// Hash returns the SHA-256 of the CA's certificate in hexadecimal, as in tokens.
func (ca *CA) Hash() string { return certHash(ca.cert) }

// CertPEM returns the CA's certificate.
func (ca *CA) CertPEM() []byte { return encodePEM(typeCert, ca.cert.Raw) }

// Grant is what a certificate says of a member.
type Grant struct {
	Member string        // id, unique in the cluster
	Roles  []string      // what it may do, e.g. "node", "controller", "gateway"
	Hosts  []string      // IP addresses and DNS names it is reached by
	Life   time.Duration // 0 = MemberLife
}

// IssueMember makes a key and a certificate for a member, valid from now.
// ErrInvalid if the grant makes no sense.
func (ca *CA) IssueMember(g Grant, now time.Time) (*Member, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of member %q: %w", g.Member, err)
	}
	der, err := ca.sign(g, &key.PublicKey, now)
	if err != nil {
		return nil, err
	}
	return newMember(der, key, ca.cert)
}

// IssueRequest makes a certificate for the key of a certificate request made by
// NewRequest. What the certificate says comes from the grant alone: the names in
// the request count for nothing.
func (ca *CA) IssueRequest(requestPEM []byte, g Grant, now time.Time) (certPEM []byte, err error) {
	der, err := decodePEM(typeRequest, requestPEM)
	if err != nil {
		return nil, err
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w: %w", atoll.ErrInvalid, err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check certificate request: %w: %w", atoll.ErrInvalid, err)
	}
	pub, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("check certificate request: key is not ECDSA P-256: %w", atoll.ErrInvalid)
	}
	if der, err = ca.sign(g, pub, now); err != nil {
		return nil, err
	}
	return encodePEM(typeCert, der), nil
}

func (ca *CA) sign(g Grant, pub *ecdsa.PublicKey, now time.Time) ([]byte, error) {
	if err := g.check(); err != nil {
		return nil, err
	}
	life := g.Life
	if life == 0 {
		life = MemberLife
	}
	end := now.Add(life)
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: g.Member, Organization: []string{"Atoll"}, OrganizationalUnit: g.Roles},
		URIs:         []*url.URL{memberURI(ca.cluster, g.Member)},
		NotBefore:    now.Add(-clockSkew),
		NotAfter:     end,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, h := range g.Hosts {
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of member %q: %w", g.Member, err)
	}
	return der, nil
}

func (g *Grant) check() error {
	switch {
	case !plain(g.Member):
		return fmt.Errorf("member id %q: want 1 to 64 letters, digits, '-', '_' or '.': %w", g.Member, atoll.ErrInvalid)
	case len(g.Roles) > maxRoles || slices.ContainsFunc(g.Roles, func(r string) bool { return !plain(r) }):
		return fmt.Errorf("roles %q of member %q: %w", g.Roles, g.Member, atoll.ErrInvalid)
	case len(g.Hosts) > maxHosts || slices.ContainsFunc(g.Hosts, badHost):
		return fmt.Errorf("hosts %q of member %q: %w", g.Hosts, g.Member, atoll.ErrInvalid)
	case g.Life < 0 || g.Life > MaxMemberLife:
		return fmt.Errorf("certificate of member %q for %v: want at most %v: %w", g.Member, g.Life, MaxMemberLife, atoll.ErrInvalid)
	}
	return nil
}

func badHost(h string) bool { return net.ParseIP(h) == nil && !plain(h) || len(h) > 253 }

// plain reports whether s is a simple name.
func plain(s string) bool {
	if s == "" || len(s) > 64 || strings.Trim(s, ".") == "" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

func memberURI(cluster atoll.UUID, member string) *url.URL {
	return &url.URL{Scheme: "atoll", Host: cluster.String(), Path: "/member/" + member}
}

// serial returns a random certificate number.
func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[0] &= 0x7f
	b[0] |= 0x40
	return new(big.Int).SetBytes(b[:])
}

func certHash(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}
