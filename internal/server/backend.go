package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
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
	"github.com/atollstore/atoll/internal/qos"
)

// backend does what the control API asks for.
type backend struct{ s *Server }

var (
	_ api.Backend     = (*backend)(nil)
	_ api.DemoBackend = (*backend)(nil)
	_ api.Rights      = (*backend)(nil)
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
		Version: b.s.opts.Version, Demo: b.s.opts.Demo, Now: timestamppb.Now(), Repair: b.repair(st),
	}
	for _, n := range st.Nodes {
		if n.State == catalog.NodeRemoved {
			continue
		}
		out.NodesTotal++
		if n.Up && !n.Report.Silent {
			out.NodesUp++
		}
		if n.Up {
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
	vols, err := b.s.volumes.count(ctx)
	if err != nil {
		return nil, err
	}
	out.Volumes = int32(vols)
	trash, err := b.s.cat.TrashNotes(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range trash {
		out.Trashed++
		out.TrashBytes += t.Bytes
	}
	out.Kept, err = b.kept(ctx)
	return out, err
}

// Nodes implements api.Backend.
func (b *backend) Nodes(context.Context) ([]*atollv1.Node, error) {
	local := map[atoll.NodeID]*disk{}
	for _, k := range b.s.disks.list() {
		local[k.reg.ID] = k
	}
	var out []*atollv1.Node
	st := b.s.cat.State()
	for _, n := range st.Nodes {
		m := &atollv1.Node{
			Id: uint32(n.ID), State: string(n.State), Up: n.Up && !n.Report.Silent, Condition: condition(n), Host: n.Host, Rack: n.Rack, Address: n.Addr,
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
	moves(st, out)
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
	case n.Report.Silent:
		return "silent"
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
func (b *backend) Diagnose(ctx context.Context) ([]*atollv1.Finding, error) {
	st := b.s.cat.State()
	health := controller.Health(st)
	level := map[controller.Grade]string{controller.Healthy: "ok", controller.Degraded: "warn", controller.Critical: "fail"}[health.Grade]
	out := []*atollv1.Finding{{Level: level, What: "cluster is " + string(health.Grade), Fix: strings.Join(health.Reasons, "; ")}}
	for _, n := range st.Nodes {
		switch c := condition(n); c {
		case "down":
			out = append(out, &atollv1.Finding{Level: "warn", What: fmt.Sprintf("node %d on %s is down", n.ID, n.Host), Fix: "start its server; its data are served from other copies meanwhile"})
		case "silent":
			out = append(out, &atollv1.Finding{Level: "fail", What: fmt.Sprintf("node %d on %s hangs: its server runs, but it does not answer", n.ID, n.Host), Fix: "look at its disk and the kernel's log; restart its server if the disk is well"})
		case "read-only":
			out = append(out, &atollv1.Finding{Level: "fail", What: fmt.Sprintf("node %d on %s had disk errors and takes no more writes", n.ID, n.Host), Fix: "replace the disk"})
		case "full":
			out = append(out, &atollv1.Finding{Level: "warn", What: fmt.Sprintf("node %d on %s is full", n.ID, n.Host), Fix: "free space on its disk or add a node"})
		}
	}
	if n := b.s.home.identity.Member().Expires(); time.Until(n) < 30*24*time.Hour {
		out = append(out, &atollv1.Finding{Level: "warn", What: "this server's certificate ends on " + n.Format(time.DateOnly), Fix: "restart it: it renews at start"})
	}
	if users, err := b.s.cat.Users(ctx); err != nil {
		return nil, err
	} else if b.s.curveTrusts() && slices.ContainsFunc(users, func(u catalog.User) bool { return u.Hash != "" }) {
		out = append(out, &atollv1.Finding{Level: "warn", What: "users have passwords, but clients of Curve are believed who they say they are",
			Fix: "--curve-auth strict, unless all who reach " + b.s.cfg.Listen + " may act as any user"})
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
	if err := errors.Join(checkCache(r.Cache), checkProps(nil, r.Properties)); err != nil {
		return nil, err
	}
	if r.Owner != "" {
		if err := catalog.CheckUserName(r.Owner); err != nil {
			return nil, err
		}
	}
	limits, err := changeLimits(qos.Limits{}, r.Limits)
	if err != nil {
		return nil, err
	}
	policy, err := b.redundancy(r.Redundancy, int(r.Replicas))
	if err != nil {
		return nil, err
	}
	if err := b.checkParent(ctx, r.Name, r.NoParents); err != nil {
		return nil, err
	}
	m := catalog.Medium{
		Name: r.Name, Kind: catalog.KindVolume, State: catalog.MediumLive, Owner: cmp.Or(r.Owner, catalog.Root), Size: r.SizeBytes,
		Policy: policy, Created: time.Now().UTC(), Props: newProps(r),
	}
	if err := storeLimits(&m, limits); err != nil {
		return nil, err
	}
	defer b.s.metrics.timed("create")()
	rec, err := medium.Create(ctx, b.s.volumes.options(), m)
	if err != nil {
		return nil, named(taken("create volume", r.Name, err), m)
	}
	return b.describe(rec), nil
}

// cacheDefault is the cache mode of volumes that ask for none.
const cacheDefault = "writeback"

func checkCache(mode string) error {
	if mode != "" && mode != cacheDefault && mode != "writethrough" {
		return fmt.Errorf("cache mode %q: want writeback or writethrough: %w", mode, atoll.ErrInvalid)
	}
	return nil
}

// newProps are the properties of a new volume's record.
func newProps(r *atollv1.CreateVolumeRequest) map[string]string {
	p := map[string]string{propCache: cmp.Or(r.Cache, cacheDefault)}
	if r.Description != "" {
		p[propDescription] = r.Description
	}
	for k, v := range r.Properties {
		if v != "" {
			p[k] = v
		}
	}
	return p
}

// checkReplicas refuses more copies than there are nodes to hold them.
func (b *backend) checkReplicas(n int) error {
	if n < 1 || n > atoll.MaxCopies {
		return fmt.Errorf("%d copies: want 1 to %d: %w", n, atoll.MaxCopies, atoll.ErrInvalid)
	}
	if have := b.activeNodes(); n > have {
		return api.WithHint(fmt.Errorf("%d copies need as many nodes, there are %d: %w", n, have, atoll.ErrInvalid),
			"ask for fewer copies or add nodes")
	}
	return nil
}

// Volumes implements api.Backend.
func (b *backend) Volumes(ctx context.Context, after string, limit int) ([]*atollv1.Volume, error) {
	var out []*atollv1.Volume
	g := b.glance()
	for len(out) < limit {
		recs, err := b.s.cat.Media(ctx, after, limit)
		if err != nil {
			return nil, err
		}
		for _, r := range recs {
			if r.Kind == catalog.KindVolume && r.State == catalog.MediumLive && len(out) < limit {
				out = append(out, b.describeAt(g, r))
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
	name, spec, err := splitSpec(name)
	if err == nil && !spec.IsZero() {
		err = api.WithHint(fmt.Errorf("volume %q: a version was named: %w", name, atoll.ErrInvalid), "\"atoll volume versions "+name+"\" shows its versions")
	}
	if err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, &atollv1.GetVolumeRequest{Name: name, Open: open}, volumesGet); done {
		if err == nil || open || !unreached(err) {
			return out, err
		}
		b.s.log.Debug("owner of a volume not asked", "medium", rec.ID, "err", err)
	}
	if open {
		o, err := b.s.volumes.acquire(ctx, rec)
		if err != nil {
			return nil, err
		}
		defer b.s.volumes.release(o)
	}
	v := b.describe(rec)
	if rec.Parent != nil {
		v.Parent, v.KeptBytes = b.parentName(ctx, *rec.Parent), b.keptFor(ctx, rec)
	}
	if h, err := b.s.cat.Head(ctx, rec.ID); err == nil && !h.Process.IsZero() {
		v.ServedBy = h.Process.String()
	}
	return v, nil
}

// unreached reports whether an error says nothing but that a server did not
// answer.
func unreached(err error) bool {
	return errors.Is(err, atoll.ErrUnreachable) || errors.Is(err, atoll.ErrTimeout)
}

// parentName is NAME@VERSION of what a clone began as, with the parent's id if
// it has no name any more.
func (b *backend) parentName(ctx context.Context, p catalog.Parent) string {
	m, err := b.s.cat.Medium(ctx, p.Medium)
	if err != nil || m.State != catalog.MediumLive {
		return fmt.Sprintf("%v@%d", p.Medium, p.Version)
	}
	for _, o := range b.s.volumes.list() {
		if o.id != p.Medium || !o.usable() {
			continue
		}
		st := o.state()
		if v := st.Find(p.Version); v != nil && !v.Hidden() {
			return m.Name + "@" + versionLabel(*v)
		}
	}
	return fmt.Sprintf("%s@%d", m.Name, p.Version)
}

// glance is what this server has open, looked at once for many volumes.
type glance struct {
	connections map[string]int32 // by export
	open        map[atoll.MediumID]*openVolume
}

func (b *backend) glance() glance {
	g := glance{map[string]int32{}, map[atoll.MediumID]*openVolume{}}
	if b.s.nbd != nil {
		for _, c := range b.s.nbd.Connections() {
			g.connections[c.Export]++
		}
	}
	for _, o := range b.s.volumes.list() {
		g.open[o.id] = o
	}
	return g
}

// describe is all that is known of a volume without asking anyone.
func (b *backend) describe(r catalog.Medium) *atollv1.Volume { return b.describeAt(b.glance(), r) }

func (b *backend) describeAt(g glance, r catalog.Medium) *atollv1.Volume {
	v := &atollv1.Volume{
		Id: r.ID.String(), Name: r.Name, SizeBytes: r.Size, Replicas: int32(r.Policy.Replicas), Redundancy: r.Policy.Redundancy(), Cache: r.Props[propCache],
		Created: timestamppb.New(r.Created), Owner: r.Owner, Urls: b.urls(r.Name), Description: r.Props[propDescription],
		Connections: g.connections[r.Name], Properties: freeProps(r), Limits: limitsMessage(limitsOf(r)), Schedule: r.Props[propSchedule],
	}
	if r.Parent != nil {
		v.Parent = fmt.Sprintf("%v@%d", r.Parent.Medium, r.Parent.Version)
	}
	if r.Trash != nil {
		v.Expires = timestamppb.New(r.Trash.Expires)
	}
	if o := g.open[r.ID]; o != nil && o.usable() {
		describeOpen(v, o)
	}
	return v
}

// describeOpen adds what only an open volume tells.
func describeOpen(v *atollv1.Volume, o *openVolume) {
	ms, vs, st := o.medium.Stats(), o.vol.Stats(), o.state()
	v.Open, v.Epoch, v.SizeBytes = true, uint64(ms.Epoch), o.vol.Size()
	v.MappedBytes = proto.Int64(vs.MappedBlocks * atoll.BlockSize)
	// What open segments hold since before the mark is in neither of the two, but all
	// that lives is in some segment.
	v.LogBytes, v.LiveBytes, v.Segments = proto.Int64(max(ms.Stored+ms.Log, ms.Live)), proto.Int64(ms.Live), proto.Int32(int32(ms.Segments))
	v.CodedBytes, v.RawBytes = proto.Int64(ms.Coded), proto.Int64(ms.Raw)
	v.ReclaimableBytes, v.ShortSegments = proto.Int64(ms.Reclaimable), proto.Int32(int32(ms.Unverified))
	seen := visible(st)
	v.Release, v.Versions, v.Last = proto.Uint64(st.Release), proto.Int32(int32(len(seen))), proto.Uint64(0)
	if n := len(seen); n > 0 {
		v.Last = proto.Uint64(seen[n-1].Number)
	}
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

// ResizeVolume implements api.Backend. An import that is under way resizes its
// volume under the name of its export.
func (b *backend) ResizeVolume(ctx context.Context, name string, size int64, shrink bool) (*atollv1.Volume, error) {
	if err := volume.CheckSize(size); err != nil {
		return nil, err
	}
	vol, version, staging := splitName(name)
	if version != "" {
		return nil, fmt.Errorf("resize %q: a version keeps its size: %w", name, atoll.ErrReadOnly)
	}
	rec, err := b.s.volumes.find(ctx, vol)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, &atollv1.ResizeVolumeRequest{Name: name, SizeBytes: size, Shrink: shrink}, volumesResize); done {
		return out, err
	}
	if size < rec.Size && !shrink {
		return nil, api.WithHint(fmt.Errorf("resize volume %q from %s to %s would lose what lies beyond: %w", vol, atoll.FormatSize(rec.Size), atoll.FormatSize(size), atoll.ErrInvalid),
			"say --shrink if you mean it")
	}
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	if err := b.s.volumes.admit(o, staging); err != nil {
		return nil, err
	}
	defer b.s.metrics.timed("resize")()
	if err := o.vol.Resize(ctx, size); err != nil {
		return nil, named(err, rec)
	}
	if rec, err = b.s.cat.Medium(ctx, rec.ID); err != nil {
		return nil, err
	}
	return b.describe(rec), nil
}

// Inject implements api.DemoBackend.
func (b *backend) Inject(ctx context.Context, id atoll.NodeID, fault string, delay time.Duration) (string, error) {
	return b.s.disks.inject(ctx, id, fault, delay)
}

// AddNode implements api.DemoBackend.
func (b *backend) AddNode(ctx context.Context) (atoll.NodeID, string, error) {
	return b.s.disks.add(ctx)
}
