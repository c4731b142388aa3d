package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"syscall"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/heal"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/node"
	"github.com/atollstore/atoll/internal/wire"
)

// disk is one storage node of this process.
type disk struct {
	path   string
	fs     host.FS
	fault  *host.Fault // only with Options.Faults
	shared bool        // one sync flushes the whole disk
	device uint64      // of the file system it is on
	id     node.Identity
	reg    catalog.Node

	// Guarded by diskSet.mu.
	node *node.Node // nil while it is "dead" in a demo
	fate string     // what a demo did to it: killed, paused, slow…
}

// diskSet holds the storage nodes of this process.
type diskSet struct {
	s     *Server
	reads *host.Reads // of all disks
	mu    struct {
		sync.RWMutex
		disks      map[atoll.NodeID]*disk
		committers map[uint64]*node.Committer // by file system
		healer     *heal.Healer               // nil before it is started
	}
}

func newDiskSet(s *Server) *diskSet {
	d := &diskSet{s: s}
	d.mu.disks = map[atoll.NodeID]*disk{}
	d.mu.committers = map[uint64]*node.Committer{}
	return d
}

// disks returns the directories of the storage nodes.
func (c *Config) disks() []string {
	if len(c.Disks) > 0 {
		return c.Disks
	}
	out := make([]string, c.nodes)
	for i := range out {
		out[i] = filepath.Join(c.Data, "disks", fmt.Sprint(i+1))
	}
	return out
}

// openAll opens every disk, in order.
func (d *diskSet) openAll(ctx context.Context, paths []string) error {
	seen := map[string]bool{}
	for _, p := range paths {
		if seen[p] {
			return fmt.Errorf("disk %s is named twice: %w", p, atoll.ErrInvalid)
		}
		seen[p] = true
	}
	d.reads = host.NewReads()
	for _, p := range paths {
		if _, err := d.open(ctx, p); err != nil {
			return fmt.Errorf("disk %s: %w", p, err)
		}
	}
	return nil
}

// open formats a new disk or checks a used one, registers it and starts its
// node.
func (d *diskSet) open(ctx context.Context, path string) (*disk, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("%v: %w", err, atoll.ErrInvalid)
	}
	dir, err := host.OpenDirWith(path, host.DirOptions{Reads: d.reads})
	if err != nil {
		return nil, err
	}
	k := &disk{path: path, fs: dir, shared: dir.WholeFlush(), device: deviceOf(path)}
	if d.s.opts.Faults {
		k.fault = host.NewFault(dir)
		k.fs = k.fault
	}
	k.id, err = node.ReadIdentity(k.fs)
	if errors.Is(err, atoll.ErrNotExist) {
		id := node.Identity{Cluster: d.s.cluster.ID}
		if err = node.Format(k.fs, id); err == nil {
			k.id, err = node.ReadIdentity(k.fs)
		}
	}
	if err != nil {
		return nil, err
	}
	if k.id.Cluster != d.s.cluster.ID {
		return nil, api.WithHint(fmt.Errorf("it belongs to cluster %v, this is cluster %v: %w", k.id.Cluster, d.s.cluster.ID, atoll.ErrIdentity),
			"name the right disk; an empty directory is taken as a new disk")
	}
	if err := d.registerOne(ctx, k); err != nil {
		return nil, err
	}
	if err := d.start(k); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.mu.disks[k.reg.ID] = k
	d.mu.Unlock()
	return k, d.reportOne(ctx, k)
}

// registerOne tells the catalog where the disk is served.
func (d *diskSet) registerOne(ctx context.Context, k *disk) (err error) {
	sess := d.s.session()
	k.reg, err = d.s.cat.RegisterNode(ctx, sess, catalog.Node{
		Disk: k.id.Disk, Incarnation: k.id.Incarnation, Addr: d.s.cfg.reach(d.s.members.addr()),
		Host: sess.Process().Host, Rack: d.s.cfg.Rack, State: catalog.NodeActive,
	})
	return err
}

// start opens the node of a registered disk and offers it to this process.
func (d *diskSet) start(k *disk) error {
	n, err := node.Open(node.Options{
		FS: k.fs, Cluster: d.s.cluster.ID, Node: k.reg.ID, Limit: d.s.cfg.DiskLimit, Spare: d.s.cfg.Spare,
		NoPrewrite: d.s.cfg.Spare == 0, SharedFlush: k.shared, Committer: d.committer(k),
		IndexBytes: int(min(d.s.cfg.Memory/8/int64(max(len(d.s.cfg.disks()), 1)), 64<<20)),
		Log:        d.s.log, Metrics: d.s.metrics.node,
	})
	if err != nil {
		return err
	}
	d.mu.Lock()
	k.node, k.fate = n, ""
	d.mu.Unlock()
	d.s.nodes.AddLocal(k.reg.ID, n)
	return nil
}

// committer returns what the disks on one file system share. A demo, which makes
// single disks slow, has one for each.
func (d *diskSet) committer(k *disk) *node.Committer {
	if !k.shared || k.device == 0 || k.fault != nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.committers[k.device] == nil {
		d.mu.committers[k.device] = new(node.Committer)
	}
	return d.mu.committers[k.device]
}

// register announces all disks again under a new session.
func (d *diskSet) register(ctx context.Context) error {
	for _, k := range d.list() {
		if k.node == nil {
			continue
		}
		if err := d.registerOne(ctx, k); err != nil {
			if errors.Is(err, atoll.ErrIdentity) && d.s.cat.State().Nodes[k.reg.ID].State == catalog.NodeRemoved {
				d.s.log.Warn("disk is not served any more: its node was removed; take it out of the configuration", "node", k.reg.ID, "path", k.path)
				continue
			}
			return err
		}
		if err := d.reportOne(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// list returns copies of the disks in order of their ids.
func (d *diskSet) list() []*disk {
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := make([]*disk, 0, len(d.mu.disks))
	for _, k := range d.mu.disks {
		c := *k
		out = append(out, &c)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].reg.ID < out[j].reg.ID })
	return out
}

// lookup finds a node for the wire server.
func (d *diskSet) lookup(id atoll.NodeID) (wire.Node, atoll.UUID, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	k := d.mu.disks[id]
	if k == nil || k.node == nil {
		return nil, atoll.UUID{}, false
	}
	return k.node, k.id.Incarnation, true
}

// reportTimeout is how long a node may take to say how it is. One that takes
// longer is reported as silent.
const reportTimeout = 2 * time.Second

// report sends each node's report every second. A node that hangs does not hold
// up those of others.
func (d *diskSet) report(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex
	busy := map[atoll.NodeID]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, k := range d.list() {
			id := k.reg.ID
			mu.Lock()
			skip := busy[id] || k.node == nil
			busy[id] = busy[id] || !skip
			mu.Unlock()
			if skip {
				continue
			}
			wg.Go(func() {
				if err := d.reportOne(ctx, k); err != nil && ctx.Err() == nil {
					d.s.log.Debug("report not taken", "node", id, "err", err)
				}
				mu.Lock()
				busy[id] = false
				mu.Unlock()
			})
		}
	}
}

func (d *diskSet) reportOne(ctx context.Context, k *disk) error {
	asked, cancel := context.WithTimeout(ctx, reportTimeout)
	st, err := k.node.Stat(asked)
	cancel()
	if err != nil && ctx.Err() == nil && asked.Err() != nil {
		return d.reportSilent(ctx, k)
	}
	if err != nil {
		return err
	}
	ctx, cancel = context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	n := d.sharers(k.device)
	r := catalog.NodeReport{
		Total: st.Total / n, Free: st.Free / n, Segments: st.Segments, Open: st.Open, ReadOnly: st.ReadOnly, Full: st.Full,
		Errors: st.Errors, P99: st.AppendP99, At: time.Now().UTC(),
	}
	if h := d.healer(); h != nil {
		h.Report(k.reg.ID, &r)
	}
	return d.s.cat.ReportNode(ctx, d.s.session(), k.reg.ID, r)
}

// reportSilent tells that a node of this process does not answer.
func (d *diskSet) reportSilent(ctx context.Context, k *disk) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	last := d.s.cat.State().Nodes[k.reg.ID].Report
	if !last.Silent {
		d.s.log.Warn("node does not answer", "node", k.reg.ID, "path", k.path)
	}
	last.Silent, last.At = true, time.Now().UTC()
	return d.s.cat.ReportNode(ctx, d.s.session(), k.reg.ID, last)
}

// sharers counts the nodes that use a file system up together: without a limit
// of its own each may use its share.
func (d *diskSet) sharers(device uint64) int64 {
	if d.s.cfg.DiskLimit > 0 {
		return 1
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	n := int64(0)
	for _, k := range d.mu.disks {
		if k.device == device {
			n++
		}
	}
	return max(1, n)
}

// deviceOf tells which file system a path is on.
func deviceOf(path string) uint64 {
	if st, err := os.Stat(path); err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			return sys.Dev
		}
	}
	return 0
}

// close stops every node cleanly.
func (d *diskSet) close() error {
	var errs []error
	for _, k := range d.list() {
		d.s.nodes.RemoveLocal(k.reg.ID)
		if k.node != nil {
			k.node.Resume()
			errs = append(errs, k.node.Close())
		}
	}
	d.reads.Close()
	return errors.Join(errs...)
}

// inject is what "atoll demo kill 3" and its like do.
func (d *diskSet) inject(ctx context.Context, id atoll.NodeID, fault string, delay time.Duration) (string, error) {
	d.mu.RLock()
	k := d.mu.disks[id]
	d.mu.RUnlock()
	if k == nil {
		return "", api.WithHint(fmt.Errorf("node %d: %w", id, atoll.ErrNotExist), `"atoll node ls" lists the nodes`)
	}
	d.mu.RLock()
	dead, fate := k.node == nil, k.fate
	d.mu.RUnlock()
	if dead && fault != "revive" {
		return "", api.WithHint(fmt.Errorf("node %d is down already: %w", id, atoll.ErrConflict), fmt.Sprintf("atoll demo revive %d", id))
	}
	switch fault {
	case "kill":
		return d.kill(ctx, k)
	case "pause":
		k.node.Pause()
		d.setFate(k, "paused")
		return fmt.Sprintf("node %d answers nothing any more", id), nil
	case "slow":
		if delay <= 0 || delay > time.Minute {
			return "", fmt.Errorf("delay %s: want more than 0 and at most 1m: %w", delay, atoll.ErrInvalid)
		}
		k.fault.Inject(host.Rule{Ops: host.OpWrite | host.OpSync | host.OpRead, Delay: delay})
		d.setFate(k, "slow")
		return fmt.Sprintf("node %d takes %s longer for every disk operation", id, delay), nil
	case "corrupt":
		return d.corrupt(k)
	case "fill":
		k.fault.Inject(host.Rule{Ops: host.OpWrite | host.OpCreate, Err: atoll.ErrNoSpace})
		d.setFate(k, "full")
		return fmt.Sprintf("the disk of node %d is full", id), nil
	case "fail":
		k.fault.Inject(host.Rule{Ops: host.OpWrite | host.OpSync | host.OpRead, Err: atoll.ErrIO})
		d.setFate(k, "failing")
		return fmt.Sprintf("every disk operation of node %d fails", id), nil
	case "revive":
		return d.revive(ctx, k, fate)
	}
	return "", fmt.Errorf("fault %q: want kill, pause, slow, fail, corrupt, fill or revive: %w", fault, atoll.ErrInvalid)
}

func (d *diskSet) setFate(k *disk, fate string) {
	d.mu.Lock()
	k.fate = fate
	d.mu.Unlock()
}

// kill ends a node as a crash of its process would.
func (d *diskSet) kill(ctx context.Context, k *disk) (string, error) {
	d.mu.Lock()
	n := k.node
	k.node, k.fate = nil, "killed"
	d.mu.Unlock()
	n.Abort()
	d.s.nodes.RemoveLocal(k.reg.ID)
	if err := d.s.cat.WithdrawNode(ctx, d.s.session(), k.reg.ID); err != nil {
		return "", err
	}
	return fmt.Sprintf("node %d is dead", k.reg.ID), nil
}

// revive undoes what was done to a node.
func (d *diskSet) revive(ctx context.Context, k *disk, fate string) (string, error) {
	k.fault.Heal()
	d.mu.RLock()
	n := k.node
	d.mu.RUnlock()
	if n != nil {
		n.Resume()
		st, err := n.Stat(ctx)
		if err == nil && !st.ReadOnly && !st.Full && fate != "failing" {
			d.setFate(k, "")
			if fate == "" {
				return fmt.Sprintf("node %d was well", k.reg.ID), nil
			}
			return fmt.Sprintf("node %d is well again", k.reg.ID), nil
		}
		// Errors stick to a node; a fresh start looks at the disk again.
		if _, err := d.kill(ctx, k); err != nil {
			return "", err
		}
	}
	if err := d.registerOne(ctx, k); err != nil {
		return "", err
	}
	if err := d.start(k); err != nil {
		return "", err
	}
	return fmt.Sprintf("node %d is back", k.reg.ID), d.reportOne(ctx, k)
}

// corrupt flips a bit in each of many blocks of a node's segments, on its disk.
func (d *diskSet) corrupt(k *disk) (string, error) {
	entries, err := k.fs.List("segments")
	if err != nil {
		return "", err
	}
	hits := 0
	for _, e := range entries {
		if e.Dir || e.Size < 64*atoll.BlockSize {
			continue
		}
		f, err := k.fs.Open("segments/" + e.Name)
		if err != nil {
			return "", err
		}
		for b := int64(3); b < min(e.Size/atoll.BlockSize, 4096) && hits < 1000; b += 97 {
			if err = flip(f, b*atoll.BlockSize); err != nil {
				break
			}
			hits++
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("flipped a bit in %d blocks of node %d; reads notice, take another copy and repair this one", hits, k.reg.ID), nil
}

// flip changes one bit at off.
func flip(f host.File, off int64) error {
	b := host.Alloc(atoll.BlockSize)
	defer b.Release()
	if _, err := f.ReadAt(b.Bytes(), off); err != nil {
		return err
	}
	var r [2]byte
	rand.Read(r[:])
	b.Bytes()[int(r[0])<<4|int(r[1])&15] ^= 1 << (r[1] & 7)
	_, err := f.WriteAt(b.Bytes(), off)
	return err
}

// add starts one more node in a directory beside the others.
func (d *diskSet) add(ctx context.Context) (atoll.NodeID, string, error) {
	for i := 1; i <= 64; i++ {
		path := filepath.Join(d.s.cfg.Data, "disks", fmt.Sprint(i))
		if _, err := os.Stat(path); err == nil {
			continue
		}
		k, err := d.open(ctx, path)
		if err != nil {
			return 0, "", err
		}
		return k.reg.ID, path, nil
	}
	return 0, "", fmt.Errorf("64 nodes are enough for a demo: %w", atoll.ErrTooLarge)
}
