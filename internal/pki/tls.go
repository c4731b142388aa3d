package pki

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Identity is the certificate that a process uses now. Replace puts a renewed
// one in its place, for connections made from then on. Methods may be called
// concurrently.
type Identity struct {
	member atomic.Pointer[Member]
	now    func() time.Time
}

// NewIdentity returns an Identity of m. now is the clock that certificates are
// checked by; nil means time.Now.
func NewIdentity(m *Member, now func() time.Time) *Identity {
	if now == nil {
		now = time.Now
	}
	i := &Identity{now: now}
	i.member.Store(m)
	return i
}

// Member returns the certificate in use.
func (i *Identity) Member() *Member { return i.member.Load() }

// Replace uses m from now on. ErrIdentity if it is of another cluster or member.
func (i *Identity) Replace(m *Member) error {
	old := i.member.Load()
	if m.cluster != old.cluster || m.id != old.id {
		return fmt.Errorf("replace certificate of member %s: new one is of %s in cluster %v: %w", old.id, m.id, m.cluster, atoll.ErrIdentity)
	}
	i.member.Store(m)
	return nil
}

// ServerTLS is for listeners that only members may use: TLS 1.3, and the client
// must show a certificate of this cluster.
func (i *Identity) ServerTLS() *tls.Config {
	c := i.base()
	c.ClientAuth = tls.RequireAndVerifyClientCert
	c.VerifyConnection = func(s tls.ConnectionState) error {
		return i.verify(s, "", x509.ExtKeyUsageClientAuth)
	}
	return c
}

// OpenTLS is for listeners that also serve those without a certificate, as
// joiners and users are: they must be asked for something else. Who shows a
// certificate must be a member.
func (i *Identity) OpenTLS() *tls.Config {
	c := i.base()
	c.ClientAuth = tls.VerifyClientCertIfGiven
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return nil
		}
		return i.verify(s, "", x509.ExtKeyUsageClientAuth)
	}
	return c
}

// ClientTLS is for connections to members: the server must show a certificate
// of this cluster and, if member is not empty, be that one. Host names do not
// count.
func (i *Identity) ClientTLS(member string) *tls.Config {
	c := i.base()
	c.InsecureSkipVerify = true // VerifyConnection verifies instead
	c.VerifyConnection = func(s tls.ConnectionState) error {
		return i.verify(s, member, x509.ExtKeyUsageServerAuth)
	}
	return c
}

func (i *Identity) base() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		Time:       i.now,
		ClientCAs:  poolOf(i.Member().ca),
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return i.Member().certificate(), nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return i.Member().certificate(), nil
		},
		SessionTicketsDisabled: true, // every connection verifies anew
	}
}

// verify checks chain, time, use, cluster and member.
func (i *Identity) verify(s tls.ConnectionState, member string, use x509.ExtKeyUsage) error {
	if len(s.PeerCertificates) == 0 {
		return fmt.Errorf("peer shows no certificate: %w", atoll.ErrIdentity)
	}
	m, leaf := i.Member(), s.PeerCertificates[0]
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots: poolOf(m.ca), CurrentTime: i.now(), KeyUsages: []x509.ExtKeyUsage{use},
	})
	if err != nil {
		return fmt.Errorf("peer %q: %w: %w", leaf.Subject.CommonName, atoll.ErrIdentity, err)
	}
	cluster, id, err := Identify(leaf)
	if err != nil {
		return err
	}
	if cluster != m.cluster {
		return fmt.Errorf("peer %q is of cluster %v, not %v: %w", id, cluster, m.cluster, atoll.ErrIdentity)
	}
	if member != "" && id != member {
		return fmt.Errorf("peer is member %q, not %q: %w", id, member, atoll.ErrIdentity)
	}
	return nil
}

// PinnedTLS is for a joiner, who has nothing but a token: the server's chain
// must end in the CA with the given hash. The server is asked for nothing and
// trusted for the join request only. now as in NewIdentity.
func PinnedTLS(caHash string, now func() time.Time) *tls.Config {
	if now == nil {
		now = time.Now
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		Time:               now,
		InsecureSkipVerify: true, // VerifyConnection verifies instead
		VerifyConnection: func(s tls.ConnectionState) error {
			return verifyPinned(s.PeerCertificates, caHash, now())
		},
	}
}

func verifyPinned(chain []*x509.Certificate, caHash string, now time.Time) error {
	for n, ca := range chain {
		if n == 0 || !ca.IsCA || certHash(ca) != caHash {
			continue
		}
		_, err := chain[0].Verify(x509.VerifyOptions{
			Roots: poolOf(ca), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		})
		if err != nil {
			return fmt.Errorf("server certificate: %w: %w", atoll.ErrIdentity, err)
		}
		_, _, err = Identify(chain[0])
		return err
	}
	return fmt.Errorf("server does not show the CA that the token names: %w", atoll.ErrIdentity)
}

func poolOf(c *x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c)
	return p
}
