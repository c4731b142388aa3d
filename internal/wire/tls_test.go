package wire

import (
	"errors"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/pki"
)

// TestMembersOnly runs the wire over the cluster's own certificates: only a
// member of the same cluster gets through, and is told the kind.
func TestMembersOnly(t *testing.T) {
	now := time.Now()
	member := func(cluster atoll.UUID, ca *pki.CA, id string) (*pki.CA, *pki.Identity) {
		var err error
		if ca == nil {
			ca, err = pki.NewCA(cluster, now)
			must(t, err)
		}
		m, err := ca.IssueMember(pki.Grant{Member: id}, now)
		must(t, err)
		return ca, pki.NewIdentity(m, nil)
	}
	ca, a := member(cluster, nil, "a")
	_, b := member(cluster, ca, "b")
	_, stranger := member(uuid(9), nil, "b")
	r := newRig(t, "tcp", func(o *ServerOptions) { o.TLS = a.ServerTLS() })

	r.tls = b.ClientTLS("a")
	_, err := r.client(1).Ping(ctxFor(t))
	must(t, err)
	r.tls = b.ClientTLS("c")
	if _, err := r.client(1).Ping(ctxFor(t)); !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("another member than expected: %v", err)
	}
	r.tls = stranger.ClientTLS("")
	if _, err := r.client(1).Ping(ctxFor(t)); !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("server of another cluster: %v", err)
	}
	blind := stranger.ClientTLS("")
	blind.VerifyConnection = nil
	r.tls = blind
	if _, err := r.client(1).Ping(ctxFor(t)); !errors.Is(err, atoll.ErrUnreachable) {
		t.Errorf("client of another cluster: %v", err)
	}
	r.tls = nil
	if _, err := r.client(1).Ping(ctxFor(t)); !errors.Is(err, atoll.ErrUnreachable) {
		t.Errorf("client without TLS: %v", err)
	}
}
