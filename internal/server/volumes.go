package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
	"github.com/atollstore/atoll/internal/qos"
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

// openVolume is a volume that this process owns. ready is closed when opening
// has ended, in err or with medium, vol and dev set.
type openVolume struct {
	id     atoll.MediumID
	name   string
	ready  chan struct{}
	ended  chan struct{} // closed when it is closed for good
	err    error
	medium *medium.Medium
	vol    *volume.Volume
	dev    nbd.Device    // vol with its limits, as gateways see it
	limits *qos.Throttle // of dev

	// Guarded by volumeSet.mu.
	refs    int
	users   int       // of refs, those of gateways
	idle    time.Time // since when refs is 0
	staging *staging  // an import is under way: only it may use the volume
	leave   func()    // has the tender end its visit, nil when it has none
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
		ending  map[atoll.MediumID]*openVolume // not open any more, and not closed yet
		devices map[nbd.Device]*openVolume
		views   map[viewKey]*openView
		viewed  map[nbd.Device]*openView
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
	v.mu.ending = map[atoll.MediumID]*openVolume{}
	v.mu.devices = map[nbd.Device]*openVolume{}
	v.mu.views = map[viewKey]*openView{}
	v.mu.viewed = map[nbd.Device]*openView{}
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
	if errors.Is(err, atoll.ErrNotExist) {
		if e, derr := v.s.cat.Entry(ctx, name); derr == nil && e.Dir != nil {
			return rec, fmt.Errorf("%q is not a volume but a directory: %w", name, atoll.ErrInvalid)
		}
	}
	if errors.Is(err, atoll.ErrNotExist) {
		return rec, api.WithHint(fmt.Errorf("volume %q: %w", name, atoll.ErrNotExist), `"atoll volume ls" lists the volumes, "atoll volume trash ls" the removed ones`)
	}
	if err != nil {
		return rec, fmt.Errorf("volume %q: %w", name, err)
	}
	if rec.Kind != catalog.KindVolume {
		return rec, fmt.Errorf("%q is not a volume but a %s: %w", name, rec.Kind, atoll.ErrInvalid)
	}
	return rec, nil
}

// has reports whether a volume is open here, or being opened.
func (v *volumeSet) has(id atoll.MediumID) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.mu.open[id] != nil
}

// owns reports whether a volume is open here. One that only waits for another
// owner's end is not.
func (v *volumeSet) owns(id atoll.MediumID) bool {
	v.mu.Lock()
	o := v.mu.open[id]
	v.mu.Unlock()
	if o == nil {
		return false
	}
	select {
	case <-o.ready:
		return o.err == nil
	default:
		return false
	}
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
			o = &openVolume{id: rec.ID, name: rec.Name, ready: make(chan struct{}), ended: make(chan struct{})}
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
			return nil, v.elsewhere(ctx, rec, named(fmt.Errorf("open volume %q: %w", rec.Name, o.err), rec))
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
	begun := time.Now()
	var m *medium.Medium
	err := v.ended(ctx, o)
	if err == nil {
		opts := v.options()
		opts.Trashed = rec.State == catalog.MediumTrashed // its checker says so; nobody else finds one
		m, err = medium.Open(ctx, opts, rec.ID)
	}
	if err == nil {
		mode := volume.Writeback
		if rec.Props[propCache] == "writethrough" {
			mode = volume.Writethrough
		}
		o.vol, err = volume.Open(ctx, volume.OnMedium(m), volume.Options{
			Mode: mode, Cache: v.cache, MapBytes: v.share(4, 1<<20), DirtyBytes: v.share(8, 8<<20),
			Log: v.s.log.With("medium", rec.ID), Metrics: v.s.metrics.volume,
		})
		if err == nil {
			o.medium = m
			if err = tidyImports(ctx, o); err != nil {
				o.vol.Abort()
			}
		}
		if err != nil {
			err = errors.Join(err, m.Close(ctx))
		}
	}
	o.medium, o.err = m, err
	if err == nil {
		o.limits = qos.New()
		v.applyLimits(o, m.Info())
		o.dev = nbd.Limited(&device{Volume: o.vol, ops: v.s.metrics.ops, state: o.state}, o.limits)
		v.s.metrics.ops.open.Observe(time.Since(begun).Seconds())
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		if v.mu.open[o.id] == o {
			delete(v.mu.open, o.id)
		}
		return
	}
	v.mu.devices[o.dev] = o
	v.wg.Go(func() { v.watch(o) })
}

// ended waits until what had the volume open here before o is closed: opening it
// meanwhile would fence that one off, and what it holds in memory would be lost.
func (v *volumeSet) ended(ctx context.Context, o *openVolume) error {
	for {
		v.mu.Lock()
		old := v.mu.ending[o.id]
		v.mu.Unlock()
		if old == nil || old == o {
			return nil
		}
		select {
		case <-old.ended:
		case <-ctx.Done():
			return fmt.Errorf("wait until it is closed: %w", atoll.ErrTimeout)
		}
	}
}

// remove takes a volume out of the set, to be ended by the caller. v.mu is held.
func (v *volumeSet) remove(o *openVolume) {
	delete(v.mu.open, o.id)
	v.mu.ending[o.id] = o
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
		v.remove(o)
	}
	v.mu.Unlock()
	if mine {
		v.disconnect(o.name)
		v.wg.Go(func() { v.end(o) })
	}
}

// disconnect ends the NBD connections to a volume's working state, so that clients
// come again.
func (v *volumeSet) disconnect(name string) {
	if v.s.nbd == nil {
		return
	}
	for _, c := range v.s.nbd.Connections() {
		if vol, version, _ := splitName(c.Export); vol == name && version == "" {
			v.s.nbd.Disconnect(c.ID)
		}
	}
}

// dropAll forgets every volume and view: the session is lost.
func (v *volumeSet) dropAll() {
	for _, o := range v.list() {
		v.drop(o)
	}
	v.dropViews()
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

// end closes a volume that was removed from the set.
func (v *volumeSet) end(o *openVolume) error {
	defer func() {
		v.mu.Lock()
		if v.mu.ending[o.id] == o {
			delete(v.mu.ending, o.id)
		}
		v.mu.Unlock()
		close(o.ended)
	}()
	<-o.ready
	if o.err != nil {
		return nil
	}
	err := v.shut(o)
	v.mu.Lock()
	delete(v.mu.devices, o.dev)
	v.mu.Unlock()
	if err != nil && !errors.Is(err, atoll.ErrFenced) {
		v.s.log.Warn("volume not closed cleanly; the next open recovers it", "medium", o.id, "err", err)
	}
	return err
}

// shut closes volume and medium. When the medium is lost meanwhile, there is
// nothing to wait for any more.
func (v *volumeSet) shut(o *openVolume) error {
	ctx, cancel := context.WithTimeout(v.closing, closeTimeout)
	defer cancel()
	if !o.medium.Valid() {
		o.vol.Abort()
		return o.medium.Close(ctx)
	}
	held, release := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-o.medium.Lost():
			release()
		case <-held.Done():
		}
	})
	err := o.vol.Close(held)
	release()
	wg.Wait()
	return errors.Join(err, o.medium.Close(ctx))
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
		v.expireImports(ctx, silence)
		for _, o := range v.list() {
			v.closeIdle(o, idleClose)
		}
	}
}

// closeIdle closes a volume that had no user for a while.
func (v *volumeSet) closeIdle(o *openVolume, idle time.Duration) bool {
	v.mu.Lock()
	gone := o.refs == 0 && o.staging == nil && time.Since(o.idle) >= idle && v.mu.open[o.id] == o
	if gone {
		v.remove(o)
	}
	v.mu.Unlock()
	if gone {
		_ = v.end(o) // logged there
	}
	return gone
}

// closeID closes a volume if it is open and has no user; false if it has. When it
// returns true the volume is closed.
func (v *volumeSet) closeID(ctx context.Context, id atoll.MediumID) bool {
	v.mu.Lock()
	o, old := v.mu.open[id], v.mu.ending[id]
	if o != nil && o.leave != nil {
		o.leave()
	}
	v.mu.Unlock()
	if o != nil {
		return v.closeIdle(o, 0)
	}
	if old == nil {
		return true
	}
	select {
	case <-old.ended:
		return v.closeID(ctx, id)
	case <-ctx.Done():
		return false
	}
}

// close closes everything; later opens fail.
func (v *volumeSet) close() error {
	v.mu.Lock()
	v.mu.closed = true
	var all []*openVolume
	for _, o := range v.mu.open {
		v.remove(o)
		all = append(all, o)
	}
	v.mu.Unlock()
	v.noOpen()
	defer time.AfterFunc(stopTimeout, v.noClose).Stop()
	defer v.noClose()
	var wg sync.WaitGroup
	for _, o := range all {
		wg.Go(func() { _ = v.end(o) })
	}
	wg.Go(v.closeViews)
	wg.Wait()
	v.wg.Wait()
	return nil
}
