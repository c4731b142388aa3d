package pki

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	cluster1 = atoll.UUID{1, 2, 3}
	cluster2 = atoll.UUID{9, 9, 9}
	epoch    = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
)

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func clock(at time.Time) func() time.Time { return func() time.Time { return at } }

// talk runs a TLS connection and sends a byte each way. Both errors are given,
// because in TLS 1.3 a client learns of its refusal only when it reads.
func talk(t *testing.T, server, client *tls.Config) (errServer, errClient error) {
	t.Helper()
	near, far := net.Pipe()
	deadline := time.Now().Add(time.Minute)
	near.SetDeadline(deadline)
	far.SetDeadline(deadline)
	done := make(chan error, 1)
	exchange := func(c *tls.Conn, raw net.Conn) error {
		defer raw.Close()
		if err := c.HandshakeContext(context.Background()); err != nil {
			return err
		}
		sent := make(chan error, 1)
		go func() {
			_, err := c.Write([]byte{1})
			sent <- err
		}()
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			return err
		}
		return <-sent
	}
	go func() { done <- exchange(tls.Server(far, server), far) }()
	errClient = exchange(tls.Client(near, client), near)
	return <-done, errClient
}

// TestListenerMatrix: of all combinations only members of the same cluster,
// within their time, with the expected id, may talk.
func TestListenerMatrix(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	impostor := must[*CA](t)(NewCA(cluster1, epoch)) // same cluster id, another key
	foreign := must[*CA](t)(NewCA(cluster2, epoch))
	issue := func(ca *CA, id string, life time.Duration) *Member {
		return must[*Member](t)(ca.IssueMember(Grant{Member: id, Roles: []string{"node"}, Hosts: []string{"127.0.0.1", "host-a"}, Life: life}, epoch))
	}
	now := epoch.Add(time.Hour)
	server := NewIdentity(issue(ca, "a", 0), clock(now))
	none := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	cases := []struct {
		name   string
		client *tls.Config
		server *tls.Config
		ok     bool
	}{
		{"right", NewIdentity(issue(ca, "b", 0), clock(now)).ClientTLS("a"), server.ServerTLS(), true},
		{"right, any member", NewIdentity(issue(ca, "b", 0), clock(now)).ClientTLS(""), server.ServerTLS(), true},
		{"other member expected", NewIdentity(issue(ca, "b", 0), clock(now)).ClientTLS("c"), server.ServerTLS(), false},
		{"no certificate", none, server.ServerTLS(), false},
		{"expired client", NewIdentity(issue(ca, "b", time.Minute), clock(epoch)).ClientTLS("a"), server.ServerTLS(), false},
		{"expired server", NewIdentity(issue(ca, "b", 0), clock(epoch.Add(2*time.Hour))).ClientTLS("a"),
			NewIdentity(issue(ca, "a", time.Minute), clock(epoch)).ServerTLS(), false},
		{"client before its time", NewIdentity(issue(ca, "b", 0), clock(epoch)).ClientTLS("a"),
			NewIdentity(issue(ca, "a", 0), clock(epoch.Add(-time.Hour))).ServerTLS(), false},
		{"client of an impostor CA", NewIdentity(issue(impostor, "b", 0), clock(now)).ClientTLS("a"), server.ServerTLS(), false},
		{"client of another cluster", NewIdentity(issue(foreign, "b", 0), clock(now)).ClientTLS("a"), server.ServerTLS(), false},
		{"server of another cluster", NewIdentity(issue(ca, "b", 0), clock(now)).ClientTLS("a"),
			NewIdentity(issue(foreign, "a", 0), clock(now)).OpenTLS(), false},
		{"server of an impostor CA", NewIdentity(issue(ca, "b", 0), clock(now)).ClientTLS("a"),
			NewIdentity(issue(impostor, "a", 0), clock(now)).OpenTLS(), false},
		{"old protocol", &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, server.OpenTLS(), false},
		{"open listener, no certificate", none, server.OpenTLS(), true},
		{"open listener, member", NewIdentity(issue(ca, "b", 0), clock(now)).ClientTLS("a"), server.OpenTLS(), true},
		{"open listener, client of another cluster", NewIdentity(issue(foreign, "b", 0), clock(now)).ClientTLS(""), server.OpenTLS(), false},
		{"pinned", PinnedTLS(ca.Hash(), clock(now)), server.OpenTLS(), true},
		{"pinned to another CA", PinnedTLS(impostor.Hash(), clock(now)), server.OpenTLS(), false},
		{"pinned, expired server", PinnedTLS(ca.Hash(), clock(now)),
			NewIdentity(issue(ca, "a", time.Minute), clock(now)).OpenTLS(), false},
		{"pinned, members only", PinnedTLS(ca.Hash(), clock(now)), server.ServerTLS(), false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			errServer, errClient := talk(t, c.server, c.client)
			if ok := errServer == nil && errClient == nil; ok != c.ok {
				t.Errorf("server: %v, client: %v; want success %v", errServer, errClient, c.ok)
			}
		})
	}
}

// TestSameCAOtherCluster: a certificate signed by the right key that names
// another cluster is refused, with a kind.
func TestSameCAOtherCluster(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	twin := &CA{cert: ca.cert, key: ca.key, cluster: cluster2}
	a := NewIdentity(must[*Member](t)(ca.IssueMember(Grant{Member: "a"}, epoch)), clock(epoch))
	b := NewIdentity(must[*Member](t)(twin.IssueMember(Grant{Member: "b"}, epoch)), clock(epoch))
	blind := b.ClientTLS("")
	blind.VerifyConnection = nil
	if errServer, _ := talk(t, a.ServerTLS(), blind); !errors.Is(errServer, atoll.ErrIdentity) {
		t.Errorf("server: %v", errServer)
	}
	if _, errClient := talk(t, b.OpenTLS(), a.ClientTLS("")); !errors.Is(errClient, atoll.ErrIdentity) {
		t.Errorf("client: %v", errClient)
	}
}

// TestLeafIsNoCA: a member cannot issue certificates.
func TestLeafIsNoCA(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	rogue := must[*Member](t)(ca.IssueMember(Grant{Member: "rogue"}, epoch))
	fake := &CA{cert: rogue.leaf, key: rogue.key, cluster: cluster1}
	der, err := fake.sign(Grant{Member: "victim"}, &rogue.key.PublicKey, epoch)
	if err != nil {
		t.Fatal(err)
	}
	server := NewIdentity(must[*Member](t)(ca.IssueMember(Grant{Member: "a"}, epoch)), clock(epoch))
	client := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{
		Certificate: [][]byte{der, rogue.leaf.Raw, ca.cert.Raw}, PrivateKey: rogue.key}}}
	if errServer, _ := talk(t, server.ServerTLS(), client); errServer == nil {
		t.Error("a certificate issued by a member was taken")
	}
	pinned := &tls.Config{Certificates: client.Certificates}
	if _, errClient := talk(t, pinned, PinnedTLS(ca.Hash(), clock(epoch))); errClient == nil {
		t.Error("a joiner took a certificate issued by a member")
	}
}

func TestJoin(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	tok, rec, err := NewToken(ca.Hash(), []string{"node"}, time.Hour, epoch)
	if err != nil {
		t.Fatal(err)
	}
	got := must[Token](t)(ParseToken(" " + tok.Text() + "\n"))
	if got != tok {
		t.Fatalf("parsed %+v", got)
	}
	if err := rec.Verify(got.ID, got.Secret, epoch.Add(59*time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := rec.Verify(got.ID, got.Secret, rec.Expires); !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("expired: %v", err)
	}
	for _, bad := range []Secret{"", "a", tok.Secret + "a", tok.Secret[1:], Secret(rec.Sum)} {
		if err := rec.Verify(tok.ID, bad, epoch); !errors.Is(err, atoll.ErrDenied) {
			t.Errorf("secret %q: %v", string(bad), err)
		}
	}
	if err := rec.Verify("0000000000000000", tok.Secret, epoch); !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("other id: %v", err)
	}
	req := must[*Request](t)(NewRequest())
	cert := must[[]byte](t)(ca.IssueRequest(req.PEM(), Grant{Member: "new", Roles: rec.Roles}, epoch))
	m := must[*Member](t)(req.Accept(cert, ca.CertPEM(), got.CAHash))
	if m.ID() != "new" || m.Cluster() != cluster1 || len(m.Roles()) != 1 || m.CAHash() != ca.Hash() {
		t.Errorf("member %q %v %q", m.ID(), m.Cluster(), m.Roles())
	}
	other := must[*CA](t)(NewCA(cluster1, epoch))
	if _, err := req.Accept(cert, other.CertPEM(), got.CAHash); !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("another CA: %v", err)
	}
	if _, err := req.Accept(cert, other.CertPEM(), other.Hash()); !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("certificate of another CA: %v", err)
	}
	if _, err := must[*Request](t)(NewRequest()).Accept(cert, ca.CertPEM(), got.CAHash); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("certificate for another key: %v", err)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	tok, rec, _ := NewToken(ca.Hash(), nil, time.Hour, epoch)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		for _, v := range []any{tok, &tok, rec} {
			if text := fmt.Sprintf(verb, v); strings.Contains(text, string(tok.Secret)) {
				t.Errorf("%s of %T shows the secret", verb, v)
			}
		}
	}
	if _, err := ParseToken(tok.Text() + "x"); err == nil || strings.Contains(err.Error(), string(tok.Secret)) {
		t.Errorf("error shows the secret: %v", err)
	}
}

func TestTokenLimits(t *testing.T) {
	for _, life := range []time.Duration{0, -1, MaxTokenLife + 1} {
		if _, _, err := NewToken(strings.Repeat("a", 64), nil, life, epoch); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("life %v: %v", life, err)
		}
	}
	if _, _, err := NewToken("short", nil, time.Hour, epoch); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("short hash: %v", err)
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add("A1" + strings.Repeat("ab", 32) + "::0011223344556677." + strings.Repeat("a", 32))
	f.Add("A1::.")
	f.Add("K10")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := ParseToken(text)
		if err != nil {
			if !errors.Is(err, atoll.ErrInvalid) {
				t.Fatalf("kind of %v", err)
			}
			return
		}
		if tok.Text() != strings.TrimSpace(text) {
			t.Fatalf("%q became %q", text, tok.Text())
		}
	})
}

func TestGrants(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	for _, g := range []Grant{
		{}, {Member: "a/b"}, {Member: ".."}, {Member: strings.Repeat("x", 65)}, {Member: "a", Roles: []string{"x y"}},
		{Member: "a", Hosts: []string{"*.evil"}}, {Member: "a", Life: MaxMemberLife + 1}, {Member: "a", Life: -1},
	} {
		if _, err := ca.IssueMember(g, epoch); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("grant %+v: %v", g, err)
		}
	}
	if _, err := NewCA(atoll.UUID{}, epoch); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("no cluster: %v", err)
	}
	late := epoch.Add(CALife - time.Hour)
	m := must[*Member](t)(ca.IssueMember(Grant{Member: "late"}, late))
	if m.Expires().After(ca.cert.NotAfter) {
		t.Error("member outlives its CA")
	}
}

func TestFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	if _, err := LoadCA(dir); !errors.Is(err, atoll.ErrNotExist) {
		t.Fatalf("empty: %v", err)
	}
	for range 2 {
		if err := ca.Save(dir); err != nil {
			t.Fatal(err)
		}
	}
	again := must[*CA](t)(LoadCA(dir))
	if again.Hash() != ca.Hash() || again.Cluster() != cluster1 {
		t.Fatal("another CA came back")
	}
	if err := must[*CA](t)(NewCA(cluster2, epoch)).Save(dir); !errors.Is(err, atoll.ErrExist) {
		t.Fatalf("overwrite: %v", err)
	}
	m := must[*Member](t)(again.IssueMember(Grant{Member: "m", Roles: []string{"node"}}, epoch))
	if err := m.Save(dir); err != nil {
		t.Fatal(err)
	}
	back := must[*Member](t)(LoadMember(dir))
	if back.ID() != "m" || back.CAHash() != ca.Hash() || !back.leaf.Equal(m.leaf) {
		t.Fatal("another member came back")
	}
	if mid := back.Renew(); !mid.After(epoch) || !mid.Before(back.Expires()) {
		t.Errorf("renew at %v", mid)
	}
	checkModes(t, dir)
	if err := os.Chmod(filepath.Join(dir, fileMemberKey), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadMember(dir); !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("open key: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, fileCA), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(dir); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("rubbish: %v", err)
	}
}

func checkModes(t *testing.T, dir string) {
	t.Helper()
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v %v", info.Mode(), err)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 4 {
		t.Fatalf("%d files, %v", len(names), err)
	}
	for _, n := range names {
		if info, err := n.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", n.Name(), info.Mode(), err)
		}
	}
}

func TestReplace(t *testing.T) {
	ca := must[*CA](t)(NewCA(cluster1, epoch))
	old := must[*Member](t)(ca.IssueMember(Grant{Member: "a", Life: time.Hour}, epoch))
	id := NewIdentity(old, clock(epoch.Add(2*time.Hour)))
	server := id.ServerTLS()
	client := NewIdentity(must[*Member](t)(ca.IssueMember(Grant{Member: "b"}, epoch)), clock(epoch.Add(2*time.Hour))).ClientTLS("a")
	if errServer, errClient := talk(t, server, client); errServer == nil && errClient == nil {
		t.Error("an expired server was taken")
	}
	if err := id.Replace(must[*Member](t)(ca.IssueMember(Grant{Member: "other"}, epoch))); !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("another member: %v", err)
	}
	if err := id.Replace(must[*Member](t)(ca.IssueMember(Grant{Member: "a"}, epoch))); err != nil {
		t.Fatal(err)
	}
	if errServer, errClient := talk(t, server, client); errServer != nil || errClient != nil {
		t.Errorf("after renewal: %v, %v", errServer, errClient)
	}
}

func TestUserFiles(t *testing.T) {
	dir := t.TempDir()
	ca := must[*CA](t)(NewCA(cluster1, time.Now()))
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	m := must[*Member](t)(ca.IssueMember(Grant{Member: "s", Hosts: []string{"127.0.0.1"}}, time.Now()))
	if err := m.Save(dir); err != nil {
		t.Fatal(err)
	}
	caFile, cert, key := write("my-ca.pem", ca.CertPEM()), filepath.Join(dir, fileMember), filepath.Join(dir, fileMemberKey)
	server := must[*tls.Config](t)(ServerFiles(cert, key, caFile))
	client := must[*tls.Config](t)(ClientFiles(caFile, cert, key, "127.0.0.1"))
	if errServer, errClient := talk(t, server, client); errServer != nil || errClient != nil {
		t.Errorf("%v, %v", errServer, errClient)
	}
	bare := must[*tls.Config](t)(ClientFiles(caFile, "", "", "127.0.0.1"))
	if errServer, _ := talk(t, server, bare); errServer == nil {
		t.Error("a client without a certificate was taken")
	}
	if _, err := ServerFiles(filepath.Join(dir, "none"), key, ""); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := ServerFiles(caFile, key, ""); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("certificate and key of two: %v", err)
	}
	if _, err := ClientFiles(key, "", "", ""); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("CA file without certificates: %v", err)
	}
}
