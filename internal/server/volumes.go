package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
)

const (
	// idleClose is how long a volume stays open without users.
	idleClose = 30 * time.Second
	// openTimeout bounds opening a volume: another owner's lease, recovery and
	// replay.
	openTimeout = 30 * time.Second
	// closeTimeout bounds the checkpoint of a volume at its end, and stopTimeout
	// that of all when the server stops. What is not done by then is left to the
	// recovery of the next open.
	closeTimeout = 30 * time.Second
	stopTimeout  = 6 * time.Second
)

// propCache is the medium's property that names a volume's cache mode.
const propCache = "cache"

// openVolume is a volume that this process owns. ready is closed when opening
// has ended, in err or with medium and vol set.
type openVolume struct {
	id     atoll.MediumID
	name   string
	ready  chan struct{}
	err    error
	medium *medium.Medium
	vol    *volume.Volume

	// Guarded by volumeSet.mu.
	refs int
	idle time.Time // since when refs is 0
}

// volumeSet opens volumes on demand, shares them among users, and closes idle
// ones. It is the exports of the NBD gateway.
type volumeSet struct {
	s     *Server
	cache *volume.Cache
	sweep time.Duration // between tries to complete short copies
	wg    sync.WaitGroup

	opening context.Context // ends when the set closes
	closing context.Context // ends stopTimeout later
	noOpen  context.CancelFunc
	noClose context.CancelFunc

	mu struct {
		sync.Mutex
		session *catalog.Session
		open    map[atoll.MediumID]*openVolume
		devices map[nbd.Device]*openVolume
		closed  bool
	}
}

var _ nbd.Exports = (*volumeSet)(nil)

func newVolumeSet(s *Server) *volumeSet {
	v := &volumeSet{s: s, cache: volume.NewCache(s.cfg.Memory / 2), sweep: 10 * time.Second}
	if s.opts.Demo {
		v.sweep = time.Second
	}
	v.opening, v.noOpen = context.WithCancel(context.Background())
	v.closing, v.noClose = context.WithCancel(context.Background())
	v.mu.session = s.session()
	v.mu.open = map[atoll.MediumID]*openVolume{}
	v.mu.devices = map[nbd.Device]*openVolume{}
	return v
}

// options are the medium's options under the current session.
func (v *volumeSet) options() medium.Options {
	v.mu.Lock()
	defer v.mu.Unlock()
	return medium.Options{Catalog: v.s.cat, Nodes: v.s.nodes, Session: v.mu.session, Log: v.s.log,
		Metrics: v.s.metrics.medium, Streams: v.s.metrics.stream, Sweep: v.sweep}
}

func (v *volumeSet) setSession(sess *catalog.Session) {
	v.mu.Lock()
	v.mu.session = sess
	v.mu.Unlock()
}

// find returns the record of a volume by name.
func (v *volumeSet) find(ctx context.Context, name string) (catalog.Medium, error) {
	rec, err := v.s.cat.MediumByName(ctx, name)
	if err != nil {
		return rec, fmt.Errorf("volume %q: %w", name, err)
	}
	if rec.Kind != catalog.KindVolume {
		return rec, fmt.Errorf("%q is not a volume but a %s: %w", name, rec.Kind, atoll.ErrInvalid)
	}
	return rec, nil
}

// acquire opens a volume, or shares the open one. release gives it back.
func (v *volumeSet) acquire(ctx context.Context, rec catalog.Medium) (*openVolume, error) {
	for {
		v.mu.Lock()
		if v.mu.closed {
			v.mu.Unlock()
			return nil, fmt.Errorf("open volume %q: the server is stopping: %w", rec.Name, atoll.ErrClosed)
		}
		o := v.mu.open[rec.ID]
		if o == nil {
			o = &openVolume{id: rec.ID, name: rec.Name, ready: make(chan struct{})}
			v.mu.open[rec.ID] = o
			v.wg.Go(func() { v.load(o, rec) })
		}
		o.refs++
		v.mu.Unlock()
		select {
		case <-o.ready:
		case <-ctx.Done():
			v.release(o)
			return nil, fmt.Errorf("open volume %q: %w", rec.Name, atoll.ErrTimeout)
		}
		if o.err != nil {
			v.release(o)
			return nil, v.elsewhere(ctx, rec, fmt.Errorf("open volume %q: %w", rec.Name, o.err))
		}
		if o.medium.Valid() {
			return o, nil
		}
		v.drop(o)
		v.release(o)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("open volume %q: %w", rec.Name, atoll.ErrTimeout)
		}
	}
}

// load opens a volume on behalf of all who wait for it.
func (v *volumeSet) load(o *openVolume, rec catalog.Medium) {
	ctx, cancel := context.WithTimeout(v.opening, openTimeout)
	defer cancel()
	defer close(o.ready)
	m, err := medium.Open(ctx, v.options(), rec.ID)
	if err == nil {
		mode := volume.Writeback
		if rec.Props[propCache] == "writethrough" {
			mode = volume.Writethrough
		}
		o.vol, err = volume.Open(ctx, volume.OnMedium(m), volume.Options{
			Mode: mode, Cache: v.cache, MapBytes: v.share(4, 1<<20), DirtyBytes: v.share(8, 8<<20),
			Log: v.s.log.With("medium", rec.ID), Metrics: v.s.metrics.volume,
		})
		if err != nil {
			err = errors.Join(err, m.Close(ctx))
		}
	}
	o.medium, o.err = m, err
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		if v.mu.open[o.id] == o {
			delete(v.mu.open, o.id)
		}
		return
	}
	v.mu.devices[o.vol] = o
	v.wg.Go(func() { v.watch(o) })
}

// share is what a volume may use of the memory set aside for all of them: the
// part-th part of --memory, divided among the open volumes (two at least).
func (v *volumeSet) share(part, least int64) int64 {
	v.mu.Lock()
	n := int64(max(2, len(v.mu.open)))
	v.mu.Unlock()
	return max(least, v.s.cfg.Memory/part/n)
}

// watch drops a volume whose ownership is lost.
func (v *volumeSet) watch(o *openVolume) {
	<-o.medium.Lost()
	v.drop(o)
}

// drop forgets a volume, so that the next user opens it anew. Its present users
// get errors until they come again.
func (v *volumeSet) drop(o *openVolume) {
	v.mu.Lock()
	mine := v.mu.open[o.id] == o
	if mine {
		delete(v.mu.open, o.id)
	}
	v.mu.Unlock()
	if mine {
		v.disconnect(o.name)
		v.wg.Go(func() { v.end(o) })
	}
}

// disconnect ends the NBD connections to a volume, so that clients come again.
func (v *volumeSet) disconnect(name string) {
	if v.s.nbd == nil {
		return
	}
	for _, c := range v.s.nbd.Connections() {
		if c.Export == name {
			v.s.nbd.Disconnect(c.ID)
		}
	}
}

// dropAll forgets every volume: the session is lost.
func (v *volumeSet) dropAll() {
	for _, o := range v.list() {
		v.drop(o)
	}
}

// list returns the open volumes.
func (v *volumeSet) list() []*openVolume {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make([]*openVolume, 0, len(v.mu.open))
	for _, o := range v.mu.open {
		out = append(out, o)
	}
	return out
}

// release gives a volume back.
func (v *volumeSet) release(o *openVolume) {
	v.mu.Lock()
	defer v.mu.Unlock()
	o.refs--
	if o.refs == 0 {
		o.idle = time.Now()
	}
}

// end closes a volume that is not in the set any more.
func (v *volumeSet) end(o *openVolume) error {
	<-o.ready
	if o.err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(v.closing, closeTimeout)
	defer cancel()
	var err error
	if o.medium.Valid() {
		err = o.vol.Close(ctx)
	} else {
		o.vol.Abort()
	}
	err = errors.Join(err, o.medium.Close(ctx))
	v.mu.Lock()
	delete(v.mu.devices, o.vol)
	v.mu.Unlock()
	if err != nil && !errors.Is(err, atoll.ErrFenced) {
		v.s.log.Warn("volume not closed cleanly; the next open recovers it", "medium", o.id, "err", err)
	}
	return err
}

// tidy closes idle volumes.
func (v *volumeSet) tidy(ctx context.Context) {
	t := time.NewTicker(idleClose / 6)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, o := range v.list() {
			v.closeIdle(o, idleClose)
		}
	}
}

// closeIdle closes a volume that had no user for a while.
func (v *volumeSet) closeIdle(o *openVolume, idle time.Duration) bool {
	v.mu.Lock()
	gone := o.refs == 0 && time.Since(o.idle) >= idle && v.mu.open[o.id] == o
	if gone {
		delete(v.mu.open, o.id)
	}
	v.mu.Unlock()
	if gone {
		_ = v.end(o) // logged there
	}
	return gone
}

// close closes everything; later opens fail.
func (v *volumeSet) close() error {
	v.mu.Lock()
	v.mu.closed = true
	all := v.mu.open
	v.mu.open = map[atoll.MediumID]*openVolume{}
	v.mu.Unlock()
	v.noOpen()
	defer time.AfterFunc(stopTimeout, v.noClose).Stop()
	defer v.noClose()
	var wg sync.WaitGroup
	for _, o := range all {
		wg.Go(func() { _ = v.end(o) })
	}
	wg.Wait()
	v.wg.Wait()
	return nil
}

// List implements nbd.Exports.
func (v *volumeSet) List(ctx context.Context) ([]nbd.ExportInfo, error) {
	var out []nbd.ExportInfo
	for after := ""; ; {
		recs, err := v.s.cat.Media(ctx, after, 1000)
		if err != nil {
			return nil, err
		}
		for _, r := range recs {
			if r.Kind == catalog.KindVolume && r.State == catalog.MediumLive {
				out = append(out, nbd.ExportInfo{Name: r.Name, Description: describe(r)})
			}
		}
		if len(recs) < 1000 {
			return out, nil
		}
		after = recs[len(recs)-1].Name
	}
}

// describe is a line about a volume for people.
func describe(r catalog.Medium) string {
	text := formatSize(r.Size) + fmt.Sprintf(", %d copies", r.Policy.Replicas)
	if d := r.Props["description"]; d != "" {
		text += ", " + d
	}
	return text
}

func exportInfo(r catalog.Medium) nbd.Info {
	return nbd.Info{Name: r.Name, Description: describe(r), Size: r.Size}
}

// Stat implements nbd.Exports.
func (v *volumeSet) Stat(ctx context.Context, name string) (nbd.Info, error) {
	r, err := v.exported(ctx, name)
	return exportInfo(r), err
}

// exported finds the volume that a client names; the empty name means the only
// one there is.
func (v *volumeSet) exported(ctx context.Context, name string) (catalog.Medium, error) {
	if name != "" {
		return v.find(ctx, name)
	}
	all, err := v.List(ctx)
	if err != nil {
		return catalog.Medium{}, err
	}
	if len(all) != 1 {
		return catalog.Medium{}, fmt.Errorf("there are %d volumes; name one: %w", len(all), atoll.ErrNotExist)
	}
	return v.find(ctx, all[0].Name)
}

// Open implements nbd.Exports.
func (v *volumeSet) Open(ctx context.Context, name string) (nbd.Device, nbd.Info, error) {
	r, err := v.exported(ctx, name)
	if err != nil {
		return nil, nbd.Info{}, err
	}
	o, err := v.acquire(ctx, r)
	if err != nil {
		return nil, nbd.Info{}, err
	}
	info := exportInfo(r)
	info.Size = o.vol.Size()
	return o.vol, info, nil
}

// Release implements nbd.Exports.
func (v *volumeSet) Release(dev nbd.Device) {
	v.mu.Lock()
	o := v.mu.devices[dev]
	v.mu.Unlock()
	if o != nil {
		v.release(o)
	}
}
