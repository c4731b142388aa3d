package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/controller"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
	"github.com/atollstore/atoll/internal/pki"
)

// backend does what the control API asks for.
type backend struct{ s *Server }

var (
	_ api.Backend     = (*backend)(nil)
	_ api.DemoBackend = (*backend)(nil)
)

// Healthy implements api.Backend.
func (b *backend) Healthy() error {
	if !b.s.session().Valid() {
		return fmt.Errorf("this server's session with the catalog has run out: %w", atoll.ErrUnavailable)
	}
	return nil
}

// Status implements api.Backend.
func (b *backend) Status(ctx context.Context) (*atollv1.GetStatusResponse, error) {
	st := b.s.cat.State()
	health := controller.Health(st)
	out := &atollv1.GetStatusResponse{
		ClusterId: st.Cluster.ID.String(), Name: st.Cluster.Name, Health: string(health.Grade), Reasons: health.Reasons,
		Version: b.s.opts.Version, Demo: b.s.opts.Demo, Now: timestamppb.Now(),
	}
	for _, n := range st.Nodes {
		if n.State == catalog.NodeRemoved {
			continue
		}
		out.NodesTotal++
		if n.Up {
			out.NodesUp++
			out.RawTotalBytes += n.Report.Total
			out.RawFreeBytes += n.Report.Free
		}
	}
	copies := int64(b.s.defaultReplicas())
	out.UsableTotalBytes, out.UsableFreeBytes = out.RawTotalBytes/copies, out.RawFreeBytes/copies
	for _, p := range st.Processes {
		out.Processes = append(out.Processes, &atollv1.Process{
			Id: p.ID.String(), Host: p.Host, Pid: int32(p.PID), Roles: p.Roles, Api: p.API, Nbd: p.NBD, Wire: p.Wire,
			Version: p.Version, Started: timestamppb.New(p.Started), Answering: p.ID == b.s.session().ID(),
		})
	}
	sort.Slice(out.Processes, func(i, j int) bool {
		return out.Processes[i].Started.AsTime().Before(out.Processes[j].Started.AsTime())
	})
	vols, err := b.s.volumes.List(ctx)
	out.Volumes = int32(len(vols))
	return out, err
}

// Nodes implements api.Backend.
func (b *backend) Nodes(context.Context) ([]*atollv1.Node, error) {
	local := map[atoll.NodeID]*disk{}
	for _, k := range b.s.disks.list() {
		local[k.reg.ID] = k
	}
	var out []*atollv1.Node
	for _, n := range b.s.cat.State().Nodes {
		m := &atollv1.Node{
			Id: uint32(n.ID), State: string(n.State), Up: n.Up, Condition: condition(n), Host: n.Host, Rack: n.Rack, Address: n.Addr,
			Process: n.Process.String(), Disk: n.Disk.String(), TotalBytes: n.Report.Total, FreeBytes: n.Report.Free,
			Segments: int32(n.Report.Segments), OpenSegments: int32(n.Report.Open), Errors: n.Report.Errors,
			AppendP99: durationpb.New(n.Report.P99),
		}
		if k := local[n.ID]; k != nil {
			m.Path = k.path
			if k.fate != "" {
				m.Condition, m.Up = k.fate, k.node != nil
			}
		}
		out = append(out, m)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Id < out[j].Id })
	return out, nil
}

// condition is a node's state in one word.
func condition(n catalog.Node) string {
	switch {
	case n.State != catalog.NodeActive:
		return string(n.State)
	case !n.Up:
		return "down"
	case n.Report.ReadOnly:
		return "read-only"
	case n.Report.Full:
		return "full"
	}
	return "up"
}

// Config implements api.Backend.
func (b *backend) Config(context.Context) ([]*atollv1.Setting, error) {
	var out []*atollv1.Setting
	for _, s := range b.s.cfg.Settings() {
		out = append(out, &atollv1.Setting{Key: s.Key, Value: s.Value, Origin: s.Origin})
	}
	return out, nil
}

// Setting is a setting with its value and where that comes from.
type Setting struct{ Key, Value, Origin string }

// Settings lists all settings. Secrets are not shown.
func (c *Config) Settings() []Setting {
	var out []Setting
	for _, s := range settings() {
		value := s.get(c)
		if s.secret && value != "" {
			value = "***"
		}
		out = append(out, Setting{s.key, value, c.origins[s.key]})
	}
	return out
}

// Diagnose implements api.Backend.
func (b *backend) Diagnose(context.Context) ([]*atollv1.Finding, error) {
	st := b.s.cat.State()
	health := controller.Health(st)
	level := map[controller.Grade]string{controller.Healthy: "ok", controller.Degraded: "warn", controller.Critical: "fail"}[health.Grade]
	out := []*atollv1.Finding{{Level: level, What: "cluster is " + string(health.Grade), Fix: strings.Join(health.Reasons, "; ")}}
	for _, n := range st.Nodes {
		switch c := condition(n); c {
		case "down":
			out = append(out, &atollv1.Finding{Level: "warn", What: fmt.Sprintf("node %d on %s is down", n.ID, n.Host), Fix: "start its server; its data are served from other copies meanwhile"})
		case "read-only":
			out = append(out, &atollv1.Finding{Level: "fail", What: fmt.Sprintf("node %d on %s had disk errors and takes no more writes", n.ID, n.Host), Fix: "replace the disk"})
		case "full":
			out = append(out, &atollv1.Finding{Level: "warn", What: fmt.Sprintf("node %d on %s is full", n.ID, n.Host), Fix: "free space on its disk or add a node"})
		}
	}
	if n := b.s.home.identity.Member().Expires(); time.Until(n) < 30*24*time.Hour {
		out = append(out, &atollv1.Finding{Level: "warn", What: "this server's certificate ends on " + n.Format(time.DateOnly), Fix: "restart it: it renews at start"})
	}
	return out, nil
}

// defaultReplicas is what a volume gets that asks for nothing.
func (s *Server) defaultReplicas() int {
	return controller.DefaultCopies(s.cat.State(), s.cfg.Replicas)
}

// CreateVolume implements api.Backend.
func (b *backend) CreateVolume(ctx context.Context, r *atollv1.CreateVolumeRequest) (*atollv1.Volume, error) {
	if err := catalog.ValidateName(r.Name); err != nil {
		return nil, err
	}
	if err := volume.CheckSize(r.SizeBytes); err != nil {
		return nil, err
	}
	if r.Cache == "" {
		r.Cache = "writeback"
	}
	if r.Cache != "writeback" && r.Cache != "writethrough" {
		return nil, fmt.Errorf("cache mode %q: want writeback or writethrough: %w", r.Cache, atoll.ErrInvalid)
	}
	replicas := int(r.Replicas)
	if replicas == 0 {
		replicas = b.s.defaultReplicas()
	}
	if err := b.checkReplicas(replicas); err != nil {
		return nil, err
	}
	rec, err := medium.Create(ctx, b.s.volumes.options(), catalog.Medium{
		Name: r.Name, Kind: catalog.KindVolume, State: catalog.MediumLive, Owner: "root", Size: r.SizeBytes,
		Policy: catalog.Policy{Replicas: replicas}, Created: time.Now().UTC(),
		Props: props(r),
	})
	if err != nil {
		return nil, err
	}
	return b.describe(rec), nil
}

func props(r *atollv1.CreateVolumeRequest) map[string]string {
	p := map[string]string{propCache: r.Cache}
	if r.Description != "" {
		p["description"] = r.Description
	}
	return p
}

// checkReplicas refuses more copies than there are nodes to hold them.
func (b *backend) checkReplicas(n int) error {
	if n < 1 || n > atoll.MaxCopies {
		return fmt.Errorf("%d copies: want 1 to %d: %w", n, atoll.MaxCopies, atoll.ErrInvalid)
	}
	have := 0
	for _, node := range b.s.cat.State().Nodes {
		if node.State == catalog.NodeActive {
			have++
		}
	}
	if n > have {
		return api.WithHint(fmt.Errorf("%d copies need as many nodes, there are %d: %w", n, have, atoll.ErrInvalid),
			"ask for fewer copies or add nodes")
	}
	return nil
}

// Volumes implements api.Backend.
func (b *backend) Volumes(ctx context.Context, after string, limit int) ([]*atollv1.Volume, error) {
	var out []*atollv1.Volume
	for len(out) < limit {
		recs, err := b.s.cat.Media(ctx, after, limit)
		if err != nil {
			return nil, err
		}
		for _, r := range recs {
			if r.Kind == catalog.KindVolume && r.State == catalog.MediumLive && len(out) < limit {
				out = append(out, b.describe(r))
			}
		}
		if len(recs) < limit {
			break
		}
		after = recs[len(recs)-1].Name
	}
	return out, nil
}

// Volume implements api.Backend.
func (b *backend) Volume(ctx context.Context, name string, open bool) (*atollv1.Volume, error) {
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if open {
		o, err := b.s.volumes.acquire(ctx, rec)
		if err != nil {
			return nil, err
		}
		defer b.s.volumes.release(o)
	}
	v := b.describe(rec)
	if h, err := b.s.cat.Head(ctx, rec.ID); err == nil && !h.Process.IsZero() {
		v.ServedBy = h.Process.String()
	}
	return v, nil
}

// describe is all that is known of a volume without asking anyone.
func (b *backend) describe(r catalog.Medium) *atollv1.Volume {
	v := &atollv1.Volume{
		Id: r.ID.String(), Name: r.Name, SizeBytes: r.Size, Replicas: int32(r.Policy.Replicas), Cache: r.Props[propCache],
		Created: timestamppb.New(r.Created), Owner: r.Owner, Urls: b.urls(r.Name), Description: r.Props["description"],
	}
	if b.s.nbd != nil {
		for _, c := range b.s.nbd.Connections() {
			if c.Export == r.Name {
				v.Connections++
			}
		}
	}
	for _, o := range b.s.volumes.list() {
		if o.id != r.ID || !o.usable() {
			continue
		}
		ms, vs := o.medium.Stats(), o.vol.Stats()
		v.Open, v.Epoch = true, uint64(ms.Epoch)
		v.MappedBytes = vs.MappedBlocks * atoll.BlockSize
		v.LogBytes, v.LiveBytes, v.Segments = ms.Stored+ms.Log, ms.Live, int32(ms.Segments)
		v.ShortSegments = int32(ms.Unverified)
	}
	return v
}

// urls lists how to reach a volume over NBD, the quickest first.
func (b *backend) urls(name string) []string {
	if b.s.nbd == nil {
		return nil
	}
	out := []string{nbd.Address{Network: "unix", Addr: b.s.nbdSocket(), Export: name}.String()}
	if b.s.nbdAddr != "" {
		out = append(out, nbd.Address{Network: "tcp", Addr: b.s.nbdAddr, TLS: b.s.cfg.TLSCert != "", Export: name}.String())
	}
	return out
}

// ResizeVolume implements api.Backend.
func (b *backend) ResizeVolume(ctx context.Context, name string, size int64, shrink bool) (*atollv1.Volume, error) {
	if err := volume.CheckSize(size); err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if size < rec.Size && !shrink {
		return nil, api.WithHint(fmt.Errorf("resize volume %q from %s to %s would lose what lies beyond: %w", name, formatSize(rec.Size), formatSize(size), atoll.ErrInvalid),
			"say --shrink if you mean it")
	}
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	if err := o.vol.Resize(ctx, size); err != nil {
		return nil, err
	}
	if rec, err = b.s.cat.Medium(ctx, rec.ID); err != nil {
		return nil, err
	}
	return b.describe(rec), nil
}

// DeleteVolume implements api.Backend.
func (b *backend) DeleteVolume(ctx context.Context, name string, dryRun bool) (int64, error) {
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return 0, err
	}
	v := b.describe(rec)
	for range 50 { // a client that has just left may not be gone here yet
		if v.Connections == 0 {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
			v = b.describe(rec)
		case <-ctx.Done():
			return 0, fmt.Errorf("delete volume %q: %w", name, atoll.ErrTimeout)
		}
	}
	bytes := v.LogBytes
	if v.Connections > 0 {
		return 0, api.WithHint(fmt.Errorf("volume %q has %d NBD connections: %w", name, v.Connections, atoll.ErrBusy), "disconnect its clients first")
	}
	if dryRun {
		o, err := b.s.volumes.acquire(ctx, rec) // only an open one tells its size
		if err == nil {
			bytes = b.describe(rec).LogBytes
			b.s.volumes.release(o)
		}
		return bytes, nil
	}
	for _, o := range b.s.volumes.list() {
		if o.id == rec.ID && !b.s.volumes.closeIdle(o, 0) {
			return 0, fmt.Errorf("volume %q is in use: %w", name, atoll.ErrBusy)
		}
	}
	return bytes, b.s.volumes.elsewhere(ctx, rec, medium.Delete(ctx, b.s.volumes.options(), rec.ID))
}

// Inject implements api.DemoBackend.
func (b *backend) Inject(ctx context.Context, id atoll.NodeID, fault string, delay time.Duration) (string, error) {
	return b.s.disks.inject(ctx, id, fault, delay)
}

// AddNode implements api.DemoBackend.
func (b *backend) AddNode(ctx context.Context) (atoll.NodeID, string, error) {
	return b.s.disks.add(ctx)
}

// tokenPath is where the record of a join token is kept; its secret is not.
func (h *home) tokenPath(id string) string { return h.path("tokens", id+".json") }

// CreateToken implements api.Backend.
func (b *backend) CreateToken(_ context.Context, ttl time.Duration) (string, time.Time, error) {
	h := b.s.home
	if h.ca == nil {
		return "", time.Time{}, api.WithHint(fmt.Errorf("this server does not keep the cluster's authority: %w", atoll.ErrUnsupported), "ask the server that founded the cluster")
	}
	if ttl == 0 {
		ttl = time.Hour
	}
	if ttl > 24*time.Hour {
		return "", time.Time{}, fmt.Errorf("a token for %s: want at most 24h: %w", ttl, atoll.ErrInvalid)
	}
	tok, rec, err := pki.NewToken(h.ca.Hash(), []string{"controller", "node", "gateway"}, ttl, time.Now())
	if err != nil {
		return "", time.Time{}, err
	}
	text, err := json.Marshal(rec)
	if err == nil {
		err = os.MkdirAll(h.path("tokens"), 0o700)
	}
	if err == nil {
		err = writeFile(h.tokenPath(rec.ID), text)
	}
	return tok.Text(), rec.Expires, err
}

// Join implements api.Backend.
func (b *backend) Join(ctx context.Context, r *atollv1.JoinRequest) (*atollv1.JoinResponse, error) {
	h := b.s.home
	if h.ca == nil {
		return nil, fmt.Errorf("this server does not keep the cluster's authority; join through the one that founded it: %w", atoll.ErrUnsupported)
	}
	tok, err := pki.ParseToken(r.Token)
	if err != nil {
		return nil, err
	}
	var rec pki.TokenRecord
	text, err := os.ReadFile(h.tokenPath(tok.ID))
	if err != nil || json.Unmarshal(text, &rec) != nil {
		return nil, fmt.Errorf("join token %s is not known here: %w", tok.ID, atoll.ErrDenied)
	}
	if err := rec.Verify(tok.ID, tok.Secret, time.Now()); err != nil {
		return nil, err
	}
	id := newMemberID()
	cert, err := h.ca.IssueRequest(r.Csr, pki.Grant{Member: id, Roles: r.Roles, Hosts: localHosts()}, time.Now())
	if err != nil {
		return nil, err
	}
	resp := &atollv1.JoinResponse{Certificate: cert, Ca: h.ca.CertPEM(), ClusterId: b.s.cluster.ID.String(), MemberId: id}
	for _, p := range b.s.cat.State().Processes {
		for _, role := range p.Roles {
			if role == "controller" && p.Wire != "" {
				resp.Members = append(resp.Members, p.Wire)
			}
		}
	}
	if r.PeerUrl != "" {
		if b.s.etcd == nil {
			return nil, fmt.Errorf("the catalog is an external etcd; join without the controller role: %w", atoll.ErrUnsupported)
		}
		initial, err := b.addController(ctx, id, strings.TrimPrefix(r.PeerUrl, "https://"))
		if err != nil {
			return nil, err
		}
		parts := make([]string, 0, len(initial))
		for name, addr := range initial {
			parts = append(parts, name+"="+addr)
		}
		sort.Strings(parts)
		resp.InitialCluster = strings.Join(parts, ",")
	}
	// One token admits one server.
	if err := os.Remove(h.tokenPath(tok.ID)); err != nil {
		return nil, errors.Join(fmt.Errorf("use up join token %s", tok.ID), err)
	}
	b.s.log.Info("server admitted", "member", id, "roles", r.Roles)
	return resp, nil
}

// addController lets an etcd member join. Only one at a time may be catching up,
// so others wait.
func (b *backend) addController(ctx context.Context, id, peer string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		initial, err := b.s.etcd.AddMember(ctx, id, peer)
		if err == nil {
			return initial, nil
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// DemoConfig is the configuration of "atoll demo": nodes directories under dir,
// each with its limit.
func DemoConfig(dir string, nodes int, listen, nbdAddr, limit string) (*Config, error) {
	c := &Config{origins: map[string]string{}, nodes: nodes}
	set := map[string]string{"data": dir, "listen": listen, "nbd": nbdAddr, "disk-limit": limit, "spare": "1", "memory": "512M"}
	for _, s := range settings() {
		value, origin := s.def, "default"
		if v, ok := set[s.key]; ok {
			value, origin = v, "demo"
		}
		if err := s.set(c, value); err != nil {
			return nil, fmt.Errorf("demo: %s = %q: %w", s.key, value, err)
		}
		c.origins[s.key] = origin
	}
	// Later demos find the nodes that were added to earlier ones.
	for ; ; c.nodes++ {
		if _, err := os.Stat(filepath.Join(dir, "disks", strconv.Itoa(c.nodes+1))); err != nil {
			return c, c.check()
		}
	}
}
