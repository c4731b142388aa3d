package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Member is a member's certificate with its key and the CA that it comes from.
// It is immutable.
type Member struct {
	leaf    *x509.Certificate
	key     *ecdsa.PrivateKey
	ca      *x509.Certificate
	cluster atoll.UUID
	id      string
}

func newMember(der []byte, key *ecdsa.PrivateKey, ca *x509.Certificate) (*Member, error) {
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse member certificate: %w: %w", atoll.ErrInvalid, err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("member certificate is for another key: %w", atoll.ErrInvalid)
	}
	if err := leaf.CheckSignatureFrom(ca); err != nil {
		return nil, fmt.Errorf("member certificate is not from this CA: %w: %w", atoll.ErrIdentity, err)
	}
	cluster, id, err := Identify(leaf)
	if err != nil {
		return nil, err
	}
	return &Member{leaf, key, ca, cluster, id}, nil
}

// ID returns the member's id.
func (m *Member) ID() string { return m.id }

// Cluster returns the member's cluster.
func (m *Member) Cluster() atoll.UUID { return m.cluster }

// Roles returns the roles in the certificate.
func (m *Member) Roles() []string { return m.leaf.Subject.OrganizationalUnit }

// Expires returns the end of the certificate's life.
func (m *Member) Expires() time.Time { return m.leaf.NotAfter }

// Renew returns when the certificate should be renewed: at two thirds of its
// life.
func (m *Member) Renew() time.Time {
	return m.leaf.NotBefore.Add(m.leaf.NotAfter.Sub(m.leaf.NotBefore) * 2 / 3)
}

// CAPEM returns the CA's certificate.
func (m *Member) CAPEM() []byte { return encodePEM(typeCert, m.ca.Raw) }

// CAHash returns the SHA-256 of the CA's certificate in hexadecimal.
func (m *Member) CAHash() string { return certHash(m.ca) }

// certificate is the chain that the member shows: with the CA, so that a joiner
// can compare its hash.
func (m *Member) certificate() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{m.leaf.Raw, m.ca.Raw}, PrivateKey: m.key, Leaf: m.leaf}
}

// Request is a certificate request with its key, on the side of a joiner.
type Request struct {
	key *ecdsa.PrivateKey
	pem []byte
}

// NewRequest makes a key and a request to certify it.
func NewRequest() (*Request, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make member key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "atoll member"}}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return &Request{key, encodePEM(typeRequest, der)}, nil
}

// PEM returns what is sent to the CA.
func (r *Request) PEM() []byte { return r.pem }

// Accept joins the request's key with the answer: the certificate and the CA's.
// caHash is that of the token. ErrIdentity if the CA is another.
func (r *Request) Accept(certPEM, caPEM []byte, caHash string) (*Member, error) {
	ca, err := parseCert(caPEM)
	if err != nil {
		return nil, err
	}
	if certHash(ca) != caHash {
		return nil, fmt.Errorf("CA has hash %s, not %s: %w", certHash(ca), caHash, atoll.ErrIdentity)
	}
	der, err := decodePEM(typeCert, certPEM)
	if err != nil {
		return nil, err
	}
	return newMember(der, r.key, ca)
}

// Identify returns the cluster and the member that a certificate names. It does
// not verify the certificate. ErrIdentity if it names none.
func Identify(c *x509.Certificate) (cluster atoll.UUID, member string, err error) {
	var found *url.URL
	for _, u := range c.URIs {
		if u.Scheme != "atoll" {
			continue
		}
		if found != nil {
			return cluster, "", fmt.Errorf("certificate of %q names more than one member: %w", c.Subject.CommonName, atoll.ErrIdentity)
		}
		found = u
	}
	if found == nil || found.RawQuery != "" || found.Fragment != "" || found.User != nil {
		return cluster, "", fmt.Errorf("certificate of %q names no member: %w", c.Subject.CommonName, atoll.ErrIdentity)
	}
	member, ok := strings.CutPrefix(found.Path, "/member/")
	if !ok || !plain(member) {
		return cluster, "", fmt.Errorf("certificate of %q names no member: %w", c.Subject.CommonName, atoll.ErrIdentity)
	}
	if cluster.UnmarshalText([]byte(found.Host)) != nil {
		return cluster, "", fmt.Errorf("certificate of %q names no cluster: %w", c.Subject.CommonName, atoll.ErrIdentity)
	}
	return cluster, member, nil
}
