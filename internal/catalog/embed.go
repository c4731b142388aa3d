package catalog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/lease"

	"github.com/atollstore/atoll/internal/atoll"
)

// EtcdOptions says how to run the embedded etcd member.
type EtcdOptions struct {
	Dir  string // of the member's data; made with mode 0700
	Name string // of the member, unique in the cluster

	// PeerAddr is the "host:port" where other members reach this one; they
	// speak TLS with certificates on both sides, always. Empty: there is no
	// listener and there can be no other members.
	PeerAddr string
	PeerTLS  EtcdTLS

	// ClientSocket is the path of a Unix socket for clients on this machine, in
	// a directory of mode 0700; empty: none. Clients in this process need none.
	ClientSocket string
	// ClientAddr is a "host:port" for processes elsewhere that are no members.
	// They too need a certificate by the same authority. Empty: none.
	ClientAddr string

	// InitialCluster maps the names of the first members to their peer
	// addresses; nil for a cluster of one. When joining it names the members
	// that are there and this one, as AddMember returned it.
	InitialCluster map[string]string
	// Join says that the cluster exists already.
	Join bool
	// ClusterToken keeps members of different clusters apart.
	ClusterToken string

	Log *slog.Logger
}

// EtcdTLS names the files of a member's key, its certificate (for a server and a
// client) and the authority that signs those of all members.
type EtcdTLS struct {
	Cert, Key, CA string
	// ServerName is what the certificates of other members are valid for;
	// empty: the host part of their address.
	ServerName string
}

// EtcdServer is an embedded etcd member.
type EtcdServer struct {
	e      *embed.Etcd
	client *clientv3.Client
	dir    string
	socket string
	lock   *os.File
	quiet  atomic.Bool // closing: what etcd says no longer matters

	renewals sync.WaitGroup // joined by Close
}

// Member is a member of the etcd cluster.
type Member struct {
	ID      uint64
	Name    string // empty until it has started for the first time
	Peers   []string
	Learner bool
}

const (
	etcdQuota   = 2 << 30
	etcdStart   = 30 * time.Second // waiting for a leader
	soloTick    = 60               // ms; a shorter one costs CPU when idle
	clusterTick = 50
)

// StartEtcd starts the member and waits until it serves. The first start makes
// its data, later ones find it; InitialCluster and Join matter at the first only.
// ErrInvalid for options that make no sense, ErrBusy when another process runs
// on the directory, ErrUnavailable when no leader was elected in time.
func StartEtcd(ctx context.Context, opts EtcdOptions) (*EtcdServer, error) {
	s := &EtcdServer{dir: opts.Dir, socket: opts.ClientSocket}
	cfg, err := etcdConfig(opts, &s.quiet)
	if err != nil {
		return nil, fmt.Errorf("start etcd member %s: %w", opts.Name, err)
	}
	if s.lock, err = prepare(opts); err != nil {
		return nil, fmt.Errorf("start etcd member %s: %w", opts.Name, err)
	}
	if s.e, err = embed.StartEtcd(cfg); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("start etcd member %s in %s: %w: %w", opts.Name, opts.Dir, err, atoll.ErrIO)
	}
	ctx, done := context.WithTimeout(ctx, etcdStart)
	defer done()
	select {
	case <-s.e.Server.ReadyNotify():
	case err = <-s.e.Err():
		err = fmt.Errorf("%w: %w", err, atoll.ErrIO)
	case <-s.e.Server.StopNotify():
		err = atoll.ErrClosed
	case <-ctx.Done():
		err = fmt.Errorf("wait for the other members to elect a leader: %w: %w", ctx.Err(), atoll.ErrUnavailable)
	}
	if err != nil {
		s.e.Close()
		s.lock.Close()
		return nil, fmt.Errorf("start etcd member %s: %w", opts.Name, err)
	}
	s.client = v3client.New(s.e.Server)
	return s, nil
}

// KV returns the store as this process uses it, without a connection. It ends
// with the server.
func (s *EtcdServer) KV() *Etcd {
	e := newEtcd(s.client)
	e.renew = s.renew
	return e
}

// renew renews a lease without the stream that the client would open for it.
// The server's call may outlast ctx when the disk stalls; whoever counts on the
// lease must not wait for that. It asks the leader, and goes on asking that one
// for as long as it may take, also when it is dead: so others are begun beside
// it, which ask whoever leads by then.
func (s *EtcdServer) renew(ctx context.Context, id LeaseID) error {
	return hedge(ctx, renewAgain, 1, func(answer chan<- error) {
		s.renewals.Go(func() {
			_, err := s.e.Server.LeaseRenew(ctx, lease.LeaseID(id))
			if errors.Is(err, lease.ErrLeaseNotFound) {
				err = fmt.Errorf("%w: %w", err, atoll.ErrNotExist)
			}
			select {
			case answer <- err:
			case <-ctx.Done():
			}
		})
	})
}

// renewAgain is how long a renewal waits for an answer before another is begun.
const renewAgain = renewTimeout / 4

// hedge begins a call, another one each time that step has passed without an
// answer or one has failed, and returns nil after the first success. Otherwise it
// returns the last error when that many in a row have failed, ErrNotExist at
// once, or ctx's error. What is begun ends by itself.
func hedge(ctx context.Context, step time.Duration, failures int, begin func(answer chan<- error)) error {
	answer := make(chan error)
	again := time.NewTicker(step)
	defer again.Stop()
	for {
		begin(answer)
		select {
		case err := <-answer:
			if failures--; err == nil || failures <= 0 || errors.Is(kind(err), atoll.ErrNotExist) {
				return err
			}
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Err returns a channel on which an error arrives when the member stops by
// itself.
func (s *EtcdServer) Err() <-chan error { return s.e.Err() }

// Close stops the member and waits for it.
func (s *EtcdServer) Close() error {
	s.quiet.Store(true)
	err := s.client.Close()
	s.e.Close()
	s.renewals.Wait()
	if s.socket != "" {
		_ = os.Remove(s.socket) // etcd does so itself, normally
	}
	if cerr := s.lock.Close(); cerr != nil && err == nil {
		err = cerr
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("close etcd member in %s: %w", s.dir, err)
	}
	return nil
}

// Members lists the cluster's members.
func (s *EtcdServer) Members(ctx context.Context) ([]Member, error) {
	ctx, done := bound(ctx)
	defer done()
	resp, err := s.client.MemberList(ctx)
	if err != nil {
		return nil, fmt.Errorf("list etcd members: %w", kind(err))
	}
	out := make([]Member, len(resp.Members))
	for i, m := range resp.Members {
		out[i] = Member{ID: m.ID, Name: m.Name, Learner: m.IsLearner}
		for _, u := range m.PeerURLs {
			out[i].Peers = append(out[i].Peers, strings.TrimPrefix(u, "https://"))
		}
	}
	return out, nil
}

// AddMember lets a member at the address join, as a learner that follows
// without a vote until PromoteMember, and returns what the joiner needs as
// InitialCluster. Adding one that was added already is no error.
func (s *EtcdServer) AddMember(ctx context.Context, name, peerAddr string) (map[string]string, error) {
	ctx, done := bound(ctx)
	defer done()
	members, err := s.Members(ctx)
	if err != nil {
		return nil, err
	}
	initial, known := map[string]string{name: peerAddr}, false
	for _, m := range members {
		if len(m.Peers) == 0 {
			continue
		}
		known = known || m.Peers[0] == peerAddr
		if m.Name != "" && m.Peers[0] != peerAddr {
			initial[m.Name] = m.Peers[0]
		}
	}
	if !known {
		if err := os.WriteFile(filepath.Join(s.dir, manyFile), nil, 0o600); err != nil {
			return nil, fmt.Errorf("add etcd member %s: %w: %w", name, err, atoll.ErrIO)
		}
		if err := settled(ctx, func() error {
			_, err := s.client.MemberAddAsLearner(ctx, []string{"https://" + peerAddr})
			return err
		}); err != nil {
			return nil, fmt.Errorf("add etcd member %s at %s: %w", name, peerAddr, err)
		}
	}
	return initial, nil
}

// PromoteMember gives a learner its vote; ErrBusy while it has not caught up.
func (s *EtcdServer) PromoteMember(ctx context.Context, id uint64) error {
	ctx, done := bound(ctx)
	defer done()
	if _, err := s.client.MemberPromote(ctx, id); err != nil {
		if errors.Is(err, rpctypes.ErrMemberLearnerNotReady) {
			return fmt.Errorf("promote etcd member %x: %w: %w", id, err, atoll.ErrBusy)
		}
		return fmt.Errorf("promote etcd member %x: %w", id, kind(err))
	}
	return nil
}

// RemoveMember removes a member for good.
func (s *EtcdServer) RemoveMember(ctx context.Context, id uint64) error {
	ctx, done := bound(ctx)
	defer done()
	if err := settled(ctx, func() error {
		_, err := s.client.MemberRemove(ctx, id)
		return err
	}); err != nil {
		return fmt.Errorf("remove etcd member %x: %w", id, err)
	}
	return nil
}

// settled repeats a change of membership, which etcd refuses until all members
// have been in touch for some seconds; ErrUnavailable if ctx ends before.
func settled(ctx context.Context, change func() error) error {
	for {
		err := change()
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, rpctypes.ErrUnhealthy):
			return kind(err)
		case sleep(ctx, retryMax) != nil:
			return fmt.Errorf("%w: %w", err, atoll.ErrUnavailable)
		}
	}
}

// prepare makes the directories and locks the member's.
func prepare(opts EtcdOptions) (*os.File, error) {
	dirs := []string{opts.Dir}
	if opts.ClientSocket != "" {
		dirs = append(dirs, filepath.Dir(opts.ClientSocket))
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make directory: %w: %w", err, atoll.ErrIO)
		}
		info, err := os.Stat(dir)
		if err != nil {
			return nil, fmt.Errorf("look at directory: %w: %w", err, atoll.ErrIO)
		}
		if info.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("use directory %s of mode %v: others may enter it; chmod it to 0700: %w",
				dir, info.Mode().Perm(), atoll.ErrInvalid)
		}
	}
	lock, err := lockFile(filepath.Join(opts.Dir, "lock"))
	if err != nil {
		return nil, err
	}
	if opts.many() {
		if err := os.WriteFile(filepath.Join(opts.Dir, manyFile), nil, 0o600); err != nil {
			lock.Close()
			return nil, fmt.Errorf("note that there are other members: %w: %w", err, atoll.ErrIO)
		}
	}
	if opts.ClientSocket != "" {
		_ = os.Remove(opts.ClientSocket) // left behind by a crash; the lock is ours
	}
	return lock, nil
}

// etcdConfig translates the options.
func etcdConfig(opts EtcdOptions, quiet *atomic.Bool) (*embed.Config, error) {
	if opts.Dir == "" || opts.Name == "" || strings.ContainsAny(opts.Name, "=,") {
		return nil, fmt.Errorf("want a directory, and a name without \"=\" and \",\": %w", atoll.ErrInvalid)
	}
	network := opts.PeerAddr != "" || opts.ClientAddr != ""
	if t := opts.PeerTLS; network && (t.Cert == "" || t.Key == "" || t.CA == "") {
		return nil, fmt.Errorf("want key, certificate and authority for %s%s: %w", opts.PeerAddr, opts.ClientAddr, atoll.ErrInvalid)
	}
	if opts.PeerAddr == "" && (opts.Join || len(opts.InitialCluster) > 1) {
		return nil, fmt.Errorf("want an address for other members: %w", atoll.ErrInvalid)
	}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.Name = filepath.Join(opts.Dir, "member"), opts.Name
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(opts.Log, quiet))
	cfg.EnableGRPCGateway = false
	cfg.QuotaBackendBytes = etcdQuota
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "10m"
	cfg.WarningApplyDuration, cfg.WarningUnaryRequestDuration = time.Second, 2*time.Second
	cfg.InitialClusterToken = "atoll-" + opts.ClusterToken
	setTicks(cfg, opts)
	setPeers(cfg, opts)
	return cfg, setClients(cfg, opts)
}

// setTicks makes a member that is alone quick to elect itself. Where there is a
// network in between, elections are left more time.
func setTicks(cfg *embed.Config, opts EtcdOptions) {
	cfg.TickMs, cfg.ElectionMs = soloTick, 5*soloTick
	if opts.many() {
		cfg.TickMs, cfg.ElectionMs = clusterTick, 10*clusterTick
	}
}

// manyFile, in the member's directory, tells that the cluster has had more than
// one member.
const manyFile = "many"

func (opts EtcdOptions) many() bool {
	_, err := os.Stat(filepath.Join(opts.Dir, manyFile))
	return err == nil || opts.Join || len(opts.InitialCluster) > 1
}

// nowhere is the peer address of a member that has none: nothing listens and
// nobody dials.
const nowhere = "nowhere.invalid:1"

func setPeers(cfg *embed.Config, opts EtcdOptions) {
	addr := opts.PeerAddr
	cfg.ListenPeerUrls = nil
	if addr == "" {
		addr = nowhere
	} else {
		cfg.ListenPeerUrls = []url.URL{{Scheme: "https", Host: addr}}
		cfg.PeerTLSInfo.CertFile, cfg.PeerTLSInfo.KeyFile = opts.PeerTLS.Cert, opts.PeerTLS.Key
		cfg.PeerTLSInfo.TrustedCAFile, cfg.PeerTLSInfo.ClientCertAuth = opts.PeerTLS.CA, true
		cfg.PeerTLSInfo.ServerName = opts.PeerTLS.ServerName
		cfg.PeerTLSInfo.SkipClientSANVerify = true // members may come from any address
		cfg.TlsMinVersion = "TLS1.3"
	}
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "https", Host: addr}}
	if cfg.ClusterState = embed.ClusterStateFlagNew; opts.Join {
		cfg.ClusterState = embed.ClusterStateFlagExisting
	}
	parts := []string{opts.Name + "=https://" + addr}
	for name, peer := range opts.InitialCluster {
		if name != opts.Name {
			parts = append(parts, name+"=https://"+peer)
		}
	}
	cfg.InitialCluster = strings.Join(parts, ",")
}

func setClients(cfg *embed.Config, opts EtcdOptions) error {
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = nil, nil
	if p := opts.ClientSocket; p != "" {
		// A path that is not absolute, or too long, would become an abstract
		// socket, which any local process can open.
		if !filepath.IsAbs(p) || len(p) > 100 {
			return fmt.Errorf("listen on socket %q: want an absolute path of at most 100 bytes: %w", p, atoll.ErrInvalid)
		}
		u := url.URL{Scheme: "unix", Path: p}
		cfg.ListenClientUrls = append(cfg.ListenClientUrls, u)
		cfg.AdvertiseClientUrls = append(cfg.AdvertiseClientUrls, u)
	}
	if opts.ClientAddr != "" {
		u := url.URL{Scheme: "https", Host: opts.ClientAddr}
		cfg.ListenClientUrls = append(cfg.ListenClientUrls, u)
		cfg.AdvertiseClientUrls = append(cfg.AdvertiseClientUrls, u)
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = opts.PeerTLS.Cert, opts.PeerTLS.Key
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = opts.PeerTLS.CA, true
		cfg.TlsMinVersion = "TLS1.3"
	}
	return nil
}
