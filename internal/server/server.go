package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/controller"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/heal"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/stream"
	"github.com/atollstore/atoll/internal/wire"
)

// Options are what the program, not the user, decides.
type Options struct {
	Log     *slog.Logger
	Version string
	Demo    bool // a throw-away cluster; implies Faults
	Faults  bool // serve the calls that break nodes, for tests of clusters

	offline bool // serve nobody: for CheckOffline
}

// Took tells how long the stages of the start took.
type Took struct{ Catalog, Nodes, All time.Duration }

// Server is a running server. Its methods may be called concurrently.
type Server struct {
	cfg     *Config
	opts    Options
	log     *slog.Logger
	reg     *prometheus.Registry
	metrics metrics
	home    *home
	took    Took
	started time.Time

	etcd    *catalog.EtcdServer // nil without the controller role
	proxies []*etcdProxy        // none with it
	dialed  *catalog.Etcd       // nil with an embedded etcd
	cat     *catalog.Catalog
	cluster catalog.Cluster
	nodes   *stream.Nodes
	peers   *wire.Peers
	members *memberListener
	wire    *wire.Server
	disks   *diskSet
	volumes *volumeSet
	logins  *logins
	tasks   *taskSet
	nbd     *nbd.Server

	neighbours *neighbours

	nbdAddr string
	apiAddr string
	https   []*http.Server

	cancel   context.CancelFunc // ends the background work
	stopping chan struct{}      // closed when Stop begins
	wg       sync.WaitGroup
	failed   chan error
	closes   []func() error // in order of start; run backwards

	mu struct {
		sync.Mutex
		session *catalog.Session
		stopped bool
		// What the leader counted in the trash.
		trash, trashBytes int64
		trashKnown        bool
	}
}

// metrics are those of all parts.
type metrics struct {
	catalog *catalog.Metrics
	node    *node.Metrics
	wire    *wire.Metrics
	stream  *stream.Metrics
	medium  *medium.Metrics
	volume  *volume.Metrics
	nbd     *nbd.Metrics
	ops     *opTimes

	controller *controller.Metrics
	heal       *heal.Metrics
}

// Start starts a server and returns when it serves. ctx bounds the start. What
// was begun is undone when it fails.
func Start(ctx context.Context, cfg *Config, o Options) (s *Server, err error) {
	o.Faults = o.Faults || o.Demo
	s = &Server{cfg: cfg, opts: o, log: o.Log, reg: prometheus.NewRegistry(), started: time.Now(), failed: make(chan error, 8), stopping: make(chan struct{})}
	s.newMetrics()
	s.logins, s.tasks, s.neighbours = newLogins(), newTaskSet(), newNeighbours(s)
	debug.SetMemoryLimit(cfg.Memory*3/2 + 160<<20)
	bg, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
			s = nil
		}
	}()
	steps := []func(context.Context, context.Context) error{
		s.openHome, s.checkPorts, s.openCatalog, s.openMembers, s.openSession, s.openDisks, s.startController, s.openVolumes, s.startHealer, s.serveNBD, s.serveAPI,
	}
	if o.offline {
		steps = []func(context.Context, context.Context) error{s.openHome, s.openCatalog, s.openMembers, s.openSession, s.openDisks, s.openVolumes}
	}
	for _, step := range steps {
		if err := step(ctx, bg); err != nil {
			return s, err
		}
	}
	s.wg.Go(func() { s.watchSession(bg) })
	if len(s.proxies) > 0 {
		s.wg.Go(func() { s.learn(bg) })
	}
	if s.etcd != nil && !o.Demo && !o.offline {
		s.wg.Go(func() { s.promote(bg) })
	}
	s.took.All = time.Since(s.started)
	s.log.Info("server ready", "took", s.took.All, "cluster", s.cluster.ID, "api", s.apiAddr, "nbd", s.nbdAddr)
	return s, nil
}

func (s *Server) newMetrics() {
	s.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "atoll_build_info", Help: "Always 1; the version is the label."}, []string{"version"})
	info.WithLabelValues(s.opts.Version).Set(1)
	s.reg.MustRegister(info)
	s.metrics = metrics{
		catalog: catalog.NewMetrics(s.reg), node: node.NewMetrics(s.reg), wire: wire.NewMetrics(s.reg), stream: stream.NewMetrics(s.reg),
		medium: medium.NewMetrics(s.reg), volume: volume.NewMetrics(s.reg), nbd: nbd.NewMetrics(s.reg),
		controller: controller.NewMetrics(s.reg), heal: heal.NewMetrics(s.reg), ops: newOpTimes(s.reg),
	}
}

// onStop has fn run at Stop, before what was registered earlier.
func (s *Server) onStop(fn func() error) { s.closes = append(s.closes, fn) }

// Failed tells when the server cannot go on.
func (s *Server) Failed() <-chan error { return s.failed }

// Took returns how long the start took.
func (s *Server) Took() Took { return s.took }

// APIAddr and NBDAddr return the TCP addresses served, empty for none.
func (s *Server) APIAddr() string { return s.apiAddr }

// NBDAddr returns the TCP address of NBD, empty for none.
func (s *Server) NBDAddr() string { return s.nbdAddr }

// Socket returns the path of the API's Unix socket.
func (s *Server) Socket() string { return s.home.path("api.sock") }

// Stop ends everything in order; it returns when nothing runs any more. Volumes
// are checkpointed and released, so that the next start is quick.
func (s *Server) Stop() error {
	s.mu.Lock()
	again := s.mu.stopped
	s.mu.stopped = true
	s.mu.Unlock()
	if again {
		return nil
	}
	close(s.stopping)
	var errs []error
	for i := len(s.closes) - 1; i >= 0; i-- {
		if err := s.closes[i](); err != nil {
			errs = append(errs, err)
		}
	}
	s.cancel()
	s.wg.Wait()
	s.log.Info("server stopped", "err", errors.Join(errs...))
	return errors.Join(errs...)
}

func (s *Server) openHome(ctx, _ context.Context) error {
	h, err := openHome(ctx, s.cfg)
	if err != nil {
		return err
	}
	s.home = h
	s.onStop(h.close)
	return nil
}

// openCatalog starts or reaches etcd and loads the catalog.
func (s *Server) openCatalog(ctx, _ context.Context) (err error) {
	start := time.Now()
	var kv catalog.KV
	switch {
	case len(s.cfg.Etcd) > 0:
		if s.dialed, err = catalog.DialEtcd(s.cfg.Etcd, nil, s.log); err != nil {
			return err
		}
		kv = s.dialed
		s.onStop(s.dialed.Close)
	case s.cfg.has("controller"):
		if kv, err = s.startEtcd(ctx); err != nil {
			return err
		}
	default:
		if kv, err = s.proxyEtcd(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cat, err := s.loadCatalog(ctx, kv)
	if err != nil {
		return err
	}
	s.cat = cat
	s.onStop(cat.Close)
	s.cluster, err = cat.Init(ctx, catalog.Cluster{ID: s.home.rec.Cluster, Created: s.home.rec.Created})
	if err != nil {
		return err
	}
	if s.cluster.ID != s.home.rec.Cluster {
		return fmt.Errorf("the catalog is of cluster %v, the data directory %s of cluster %v: %w", s.cluster.ID, s.cfg.Data, s.home.rec.Cluster, atoll.ErrIdentity)
	}
	s.took.Catalog = time.Since(start)
	return nil
}

// loadCatalog opens the catalog. A controller that has just joined cannot read
// it before the others have made it a full member, so that is tried for a while.
func (s *Server) loadCatalog(ctx context.Context, kv catalog.KV) (*catalog.Catalog, error) {
	for {
		cat, err := catalog.OpenWith(ctx, kv, catalog.Options{Log: s.log, Metrics: s.metrics.catalog})
		if err == nil || s.home.rec.Etcd == "" {
			return cat, err
		}
		s.log.Info("catalog not readable yet", "err", err)
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// promote makes full members of those controllers that joined and have caught
// up.
func (s *Server) promote(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		members, err := s.etcd.Members(ctx)
		if err != nil {
			continue
		}
		for _, m := range members {
			if !m.Learner {
				continue
			}
			if err := s.etcd.PromoteMember(ctx, m.ID); err != nil {
				s.log.Debug("controller not promoted yet", "member", m.Name, "err", err)
				continue
			}
			s.log.Info("controller promoted", "member", m.Name)
		}
	}
}

// startEtcd starts the embedded etcd member.
func (s *Server) startEtcd(ctx context.Context) (catalog.KV, error) {
	o := catalog.EtcdOptions{
		Dir: s.home.path(etcdDir), Name: s.home.rec.Member, ClusterToken: s.home.rec.Cluster.String(),
		ClientSocket: s.home.socket("etcd.sock"), Log: s.log,
	}
	if !s.opts.Demo && !s.opts.offline {
		o.PeerAddr = s.cfg.reach(portAfter(s.cfg.Listen, 2))
		o.PeerTLS = catalog.EtcdTLS{
			Cert: s.home.path(keysDir, "member.crt"), Key: s.home.path(keysDir, "member.key"), CA: s.home.path(keysDir, "ca.crt"),
			ServerName: "localhost",
		}
	}
	if o.PeerAddr != "" {
		if err := writeFile(o.PeerTLS.CA, s.home.identity.Member().CAPEM()); err != nil {
			return nil, fmt.Errorf("keys of etcd: %w", err)
		}
	}
	if s.home.rec.Etcd != "" {
		o.InitialCluster, o.Join = parseInitial(s.home.rec.Etcd), true
	}
	srv, err := catalog.StartEtcd(ctx, o)
	if err != nil {
		return nil, err
	}
	s.etcd = srv
	s.onStop(srv.Close)
	s.wg.Go(func() {
		for err := range srv.Err() {
			s.fail(fmt.Errorf("etcd: %w", err))
		}
	})
	return srv.KV(), nil
}

// parseInitial reads "name=addr,name=addr".
func parseInitial(text string) map[string]string {
	out := map[string]string{}
	for _, part := range strings.Split(text, ",") {
		if name, addr, ok := strings.Cut(part, "="); ok {
			out[name] = addr
		}
	}
	return out
}

func (s *Server) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// openMembers serves other members and reaches them.
func (s *Server) openMembers(_, bg context.Context) error {
	socket := ""
	if s.etcd != nil {
		socket = s.home.socket("etcd.sock")
	}
	addr := portAfter(s.cfg.Listen, 1)
	if s.opts.offline {
		addr = "127.0.0.1:0"
	}
	m, err := listenMembers(addr, s.home.identity, socket, s.log)
	if err != nil {
		return err
	}
	s.members = m
	s.onStop(m.close)
	id := s.home.identity
	conf := id.ClientTLS("")
	conf.NextProtos = []string{protoWire}
	s.peers = wire.NewPeers(wire.PeersOptions{
		Net: host.TCP{}, TLS: conf, Cluster: s.cluster.ID, Conns: 2, Log: s.log, Metrics: s.metrics.wire,
	})
	s.onStop(s.peers.Close)
	s.nodes = stream.NewNodes(stream.NodesOptions{
		Catalog: s.cat, Log: s.log, Metrics: s.metrics.stream,
		Dial: func(n catalog.Node) wire.Node { return s.peers.Client(n.Addr, n.ID, n.Incarnation) },
	})
	s.onStop(s.nodes.Close)
	s.disks = newDiskSet(s)
	s.wire = wire.Serve(wire.ServerOptions{
		Listener: m.wire, Cluster: s.cluster.ID, Lookup: s.disks.lookup, Log: s.log, Metrics: s.metrics.wire,
	})
	s.onStop(s.wire.Close)
	return nil
}

// openSession announces this process.
func (s *Server) openSession(ctx, _ context.Context) error {
	name := s.cfg.Host
	if name == "" {
		name, _ = os.Hostname()
	}
	if err := s.endOldSession(ctx); err != nil {
		return err
	}
	self := catalog.Process{
		Host: name, PID: os.Getpid(), Roles: s.cfg.Roles, API: s.cfg.reach(s.cfg.Listen), NBD: s.cfg.reach(s.nbdTCP()),
		Wire: s.cfg.reach(s.members.addr()), Version: s.opts.Version, Started: s.started.UTC(),
	}
	if s.opts.offline {
		self.API, self.NBD = "", ""
	}
	sess, err := s.cat.OpenSession(ctx, self)
	if err != nil {
		return err
	}
	s.mu.Lock()
	first := s.mu.session == nil
	s.mu.session = sess
	s.mu.Unlock()
	if err := writeFile(s.home.path(sessionFile), []byte(sess.ID().String()+"\n")); err != nil {
		s.log.Warn("session not noted; after a crash the next start waits for its lease", "err", err)
	}
	if first {
		s.onStop(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			defer cancel()
			err := s.session().Close(ctx)
			for _, kind := range []error{atoll.ErrFenced, atoll.ErrUnreachable, atoll.ErrUnavailable, atoll.ErrTimeout} {
				if errors.Is(err, kind) {
					return nil // it had ended by itself, or will, with its lease
				}
			}
			return err
		})
	}
	return nil
}

// endOldSession ends what a crash of this server left: whoever holds the lock of
// the data directory is its successor, so nobody need wait for the old lease.
func (s *Server) endOldSession(ctx context.Context) error {
	text, err := os.ReadFile(s.home.path(sessionFile))
	if err != nil {
		return nil // the first start, or a clean stop
	}
	var id atoll.UUID
	if err := id.UnmarshalText([]byte(strings.TrimSpace(string(text)))); err != nil {
		return nil // cut short by the crash; its lease ends by itself
	}
	return s.cat.EndSession(ctx, id)
}

func (s *Server) nbdTCP() string {
	if !s.cfg.has("gateway") || s.cfg.NBD == "none" {
		return ""
	}
	return s.cfg.NBD
}

func (s *Server) session() *catalog.Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.session
}

// watchSession opens another session when one is lost: its lease ran out, so
// that others may own its media now, and its nodes count as down.
func (s *Server) watchSession(bg context.Context) {
	for {
		select {
		case <-s.stopping:
			return
		case <-s.session().Lost():
		}
		select {
		case <-s.stopping:
			return
		default:
		}
		s.log.Warn("session lost; announcing this server anew")
		s.volumes.dropAll()
		for try := time.Duration(1); ; try = min(2*try, 20) {
			err := s.openSession(bg, bg)
			if err == nil {
				if err = s.disks.register(bg); err == nil {
					s.volumes.setSession(s.session())
					break
				}
			}
			s.log.Warn("announcement refused; trying again", "err", err)
			select {
			case <-s.stopping:
				return
			case <-time.After(try * 100 * time.Millisecond):
			}
		}
	}
}

// startController runs the control loops when this process is elected.
func (s *Server) startController(_, bg context.Context) error {
	if !s.cfg.has("controller") {
		return nil
	}
	ctx, cancel := context.WithCancel(bg)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			sess := s.session()
			c := controller.Open(controller.Options{Catalog: s.cat, Nodes: s.nodes, Media: settling{s}, RepairAfter: s.cfg.RepairFrom, Session: sess, Copies: s.cfg.Replicas, Log: s.log, Metrics: s.metrics.controller})
			select {
			case <-ctx.Done():
			case <-sess.Lost():
				s.nextSession(ctx, sess)
			}
			if err := c.Close(); err != nil {
				s.log.Warn("controller not closed cleanly", "err", err)
			}
		}
	})
	s.onStop(func() error {
		cancel()
		wg.Wait()
		return nil
	})
	return nil
}

// nextSession waits until another session has taken the place of old.
func (s *Server) nextSession(ctx context.Context, old *catalog.Session) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for s.session() == old {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// openDisks starts the storage nodes.
func (s *Server) openDisks(ctx, bg context.Context) error {
	if !s.cfg.has("node") {
		return nil
	}
	start := time.Now()
	s.onStop(s.disks.close)
	if err := s.disks.openAll(ctx, s.cfg.disks()); err != nil {
		return err
	}
	s.wg.Go(func() { s.disks.report(bg) })
	s.took.Nodes = time.Since(start)
	return nil
}

func (s *Server) openVolumes(_, bg context.Context) error {
	s.volumes = newVolumeSet(s)
	volume.RegisterCache(s.reg, s.volumes.cache)
	s.reg.MustRegister(mediaCollector{s.volumes})
	s.onStop(s.volumes.close)
	s.wg.Go(func() { s.volumes.tidy(bg) })
	s.onStop(s.neighbours.close)
	s.onStop(s.tasks.close)
	if s.cfg.has("controller") && !s.opts.offline {
		s.wg.Go(func() { s.lead(bg, &backend{s: s}) })
		s.wg.Go(func() { s.tend(bg, &backend{s: s}) })
	}
	return nil
}
