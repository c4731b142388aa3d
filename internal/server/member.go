package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/pki"
)

const (
	memberFile     = "member.json"
	credentialFile = "credential"
	keysDir        = "keys"
	caDir          = "ca"
	sessionFile    = "session"
	etcdDir        = "etcd"
	memberVersion  = 1
)

// memberRecord is what a data directory says of itself: member.json.
type memberRecord struct {
	Version int        `json:"version"`
	Cluster atoll.UUID `json:"cluster"`
	Member  string     `json:"member"`
	// Members are addresses where the catalog can be reached, for a server
	// without the controller role.
	Members []string `json:"members,omitempty"`
	// Etcd is the initial cluster of etcd members, for a controller that joined.
	Etcd    string    `json:"etcd,omitempty"`
	Created time.Time `json:"created"`
}

// home is an opened data directory.
type home struct {
	dir      string
	lock     io.Closer
	rec      memberRecord
	identity *pki.Identity
	ca       *pki.CA // nil unless this server keeps the cluster's authority
	token    string  // the API's credential: "atoll1:<CA hash>:<secret>"
	run      string  // directory of sockets that nobody else may enter
}

// openHome opens the data directory: a used one, a new one for a new cluster, or
// one that joins the cluster that the configuration names. It holds the
// directory's lock until close.
func openHome(ctx context.Context, cfg *Config) (h *home, err error) {
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return nil, fmt.Errorf("data directory %s: %v: %w", cfg.Data, err, atoll.ErrInvalid)
	}
	fs, err := host.OpenDir(cfg.Data)
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.Data, err)
	}
	lock, err := fs.Lock("lock")
	if err != nil {
		return nil, api.WithHint(fmt.Errorf("data directory %s: %w", cfg.Data, err),
			"another server uses it; stop that one, or choose another directory with --data")
	}
	h = &home{dir: cfg.Data, lock: lock}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	text, err := os.ReadFile(h.path(memberFile))
	switch {
	case err == nil:
		if err = h.load(text); err == nil {
			err = h.sameCluster(cfg)
		}
	case os.IsNotExist(err) && cfg.Join != "":
		err = h.join(ctx, cfg)
	case os.IsNotExist(err):
		err = h.found(cfg)
	}
	if err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.Data, err)
	}
	if err := h.makeRun(); err != nil {
		return nil, err
	}
	return h, h.loadCredential()
}

// makeRun makes the directory of private sockets: in the data directory, or,
// since the paths of sockets are short, in the system's temporary one.
func (h *home) makeRun() (err error) {
	h.run = h.path("run")
	if len(h.run) <= 80 {
		return os.MkdirAll(h.run, 0o700)
	}
	h.run, err = os.MkdirTemp("", "atoll-run-")
	return err
}

// socket returns the path of a private socket.
func (h *home) socket(name string) string { return filepath.Join(h.run, name) }

func (h *home) path(parts ...string) string {
	return filepath.Join(append([]string{h.dir}, parts...)...)
}

func (h *home) close() error {
	var err error
	if h.run != "" && h.run != h.path("run") {
		err = os.RemoveAll(h.run)
	}
	return errors.Join(err, h.lock.Close())
}

// load opens a directory that was used before.
func (h *home) load(text []byte) error {
	if err := json.Unmarshal(text, &h.rec); err != nil {
		return fmt.Errorf("read %s: %v: %w", memberFile, err, atoll.ErrCorrupt)
	}
	if h.rec.Version != memberVersion {
		return fmt.Errorf("%s has format %d, this program knows %d; use a newer atoll: %w", memberFile, h.rec.Version, memberVersion, atoll.ErrVersion)
	}
	m, err := pki.LoadMember(h.path(keysDir))
	if err != nil {
		return err
	}
	if m.Cluster() != h.rec.Cluster {
		return fmt.Errorf("its keys belong to cluster %v, its record to %v: %w", m.Cluster(), h.rec.Cluster, atoll.ErrIdentity)
	}
	h.identity = pki.NewIdentity(m, nil)
	if _, err := os.Stat(h.path(caDir)); err == nil {
		if h.ca, err = pki.LoadCA(h.path(caDir)); err != nil {
			return err
		}
	}
	return h.renew(m)
}

// renew makes a new certificate when the old one has little time left and the
// authority is here.
func (h *home) renew(m *pki.Member) error {
	if h.ca == nil || time.Now().Before(m.Renew()) {
		return nil
	}
	fresh, err := h.ca.IssueMember(pki.Grant{Member: m.ID(), Roles: m.Roles(), Hosts: localHosts()}, time.Now())
	if err != nil {
		return err
	}
	if err := fresh.Save(h.path(keysDir)); err != nil {
		return err
	}
	return h.identity.Replace(fresh)
}

// found makes a new cluster.
func (h *home) found(cfg *Config) error {
	if !cfg.has("controller") {
		return api.WithHint(fmt.Errorf("it is new, and a server without the controller role cannot found a cluster: %w", atoll.ErrInvalid),
			"name a cluster with --join and --token, or add the role")
	}
	var cluster atoll.UUID
	rand.Read(cluster[:])
	now := time.Now()
	ca, err := pki.NewCA(cluster, now)
	if err != nil {
		return err
	}
	id := newMemberID()
	m, err := ca.IssueMember(pki.Grant{Member: id, Roles: cfg.Roles, Hosts: localHosts()}, now)
	if err != nil {
		return err
	}
	// The record is written last, so that a start that was cut short is repeated
	// from the beginning.
	if err := os.RemoveAll(h.path(caDir)); err != nil {
		return err
	}
	if err := ca.Save(h.path(caDir)); err != nil {
		return err
	}
	if err := m.Save(h.path(keysDir)); err != nil {
		return err
	}
	h.ca, h.identity = ca, pki.NewIdentity(m, nil)
	h.rec = memberRecord{Version: memberVersion, Cluster: cluster, Member: id, Created: now.UTC()}
	return h.save()
}

// join asks a member of a cluster for admission with the token.
func (h *home) join(ctx context.Context, cfg *Config) error {
	tok, err := pki.ParseToken(cfg.Token)
	if err != nil {
		return err
	}
	req, err := pki.NewRequest()
	if err != nil {
		return err
	}
	c, err := api.NewClient("https://"+cfg.Join, api.Credential{}, pki.PinnedTLS(tok.CAHash, nil))
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	peer := ""
	if cfg.has("controller") {
		peer = peerURL(cfg)
	}
	resp, err := c.Cluster.Join(ctx, connect.NewRequest(&atollv1.JoinRequest{
		Token: cfg.Token, Csr: req.PEM(), Roles: cfg.Roles, PeerUrl: peer, Name: cfg.Host,
	}))
	if err != nil {
		return fmt.Errorf("join the cluster at %s: %w", cfg.Join, err)
	}
	m, err := req.Accept(resp.Msg.Certificate, resp.Msg.Ca, tok.CAHash)
	if err != nil {
		return err
	}
	if err := m.Save(h.path(keysDir)); err != nil {
		return err
	}
	h.identity = pki.NewIdentity(m, nil)
	h.rec = memberRecord{Version: memberVersion, Cluster: m.Cluster(), Member: m.ID(),
		Members: resp.Msg.Members, Etcd: resp.Msg.InitialCluster, Created: time.Now().UTC()}
	return h.save()
}

// save writes member.json, durably.
func (h *home) save() error {
	b, err := json.MarshalIndent(h.rec, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(h.path(memberFile), append(b, '\n'))
}

// loadCredential reads the API's credential, or makes one.
func (h *home) loadCredential() error {
	text, err := os.ReadFile(h.path(credentialFile))
	if os.IsNotExist(err) {
		var secret [24]byte
		rand.Read(secret[:])
		text = []byte("atoll1:" + h.identity.Member().CAHash() + ":" + hex.EncodeToString(secret[:]) + "\n")
		err = writeFile(h.path(credentialFile), text)
	}
	if err != nil {
		return fmt.Errorf("credential: %w", err)
	}
	h.token = strings.TrimSpace(string(text))
	return nil
}

// writeFile replaces a file durably, readable by its owner only.
func writeFile(path string, text []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func newMemberID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// localHosts are the names in a member's certificate. Members check each other
// by identity, so these matter to people's tools only.
func localHosts() []string {
	hosts := []string{"127.0.0.1", "::1", "localhost"}
	if name, err := os.Hostname(); err == nil && name != "localhost" {
		hosts = append(hosts, name)
	}
	return hosts
}

// portAfter returns addr with its port raised by n.
func portAfter(addr string, n int) string {
	hostPart, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	p, err := net.LookupPort("tcp", port)
	if err != nil || p == 0 {
		return net.JoinHostPort(hostPart, "0")
	}
	return net.JoinHostPort(hostPart, fmt.Sprint(p+n))
}

// peerURL is where this server's etcd member listens for its peers.
func peerURL(cfg *Config) string { return "https://" + cfg.reach(portAfter(cfg.Listen, 2)) }
