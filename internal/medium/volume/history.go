package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

// maxPending bounds how many events may wait to be settled.
const maxPending = 16

// history is what a volume knows of its versions beyond the manifest. An event
// is a backup or a restore: one record in the log. It is pending until it is
// settled, that is, until its version is in the manifest. Events are settled in
// order, and the checkpoint token is held as long as there are any.
type history struct {
	sem     chan struct{} // holds a token while an event happens
	wake    chan struct{} // tells the settler of pending events
	doubts  chan *dubious // to the settler
	waiting atomic.Int32  // events that wait for a checkpoint to end
	// doubt: the record of an event may be in the log, though it was answered
	// with an error. A checkpoint leaves it behind; no event may come before.
	doubt atomic.Bool

	mu     sync.Mutex
	parent uint64 // version that the present state grew from
	event  uint64 // number of the last event
	count  uint64 // events since Open, those in doubt too
	queue  []*pending
	keeps  int            // pending events, and one that happens: they share the checkpoint token
	holds  map[uint64]int // versions that are being read here
}

// pending is an event that is not settled.
type pending struct {
	ver    *version
	v      medium.Version
	mark   medium.Mark
	target *rooted // restore: what the volume became
	number uint64  // restore: number of that
	logged int64   // bytes of log since the event before
	done   chan struct{}
	lost   chan struct{} // closed when the next owner has to do it
}

// dubious is a change of all that users see, a restore or a smaller size, whose
// record may be in the log though its append failed. Nothing that is written to
// the state before may come behind that record: after a crash it would be in the
// other state. So writers are kept out until a checkpoint has left it behind.
type dubious struct {
	clear func() // lets them in
	known chan struct{}
	not   bool // it did not happen; set before known is closed
}

func (h *history) init() {
	h.sem, h.wake, h.doubts = make(chan struct{}, 1), make(chan struct{}, 1), make(chan *dubious, 1)
	h.holds = make(map[uint64]int)
}

func (h *history) lastEvent() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.event
}

func (h *history) lock(ctx context.Context) error {
	select {
	case h.sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another backup: %w: %w", atoll.ErrTimeout, ctx.Err())
	}
}

func (h *history) unlock() { <-h.sem }

// pass waits for the event that happens.
func (h *history) pass(ctx context.Context) error {
	if err := h.lock(ctx); err != nil {
		return err
	}
	h.unlock()
	return nil
}

// hold keeps a version from being removed while it is read.
func (h *history) hold(number uint64, d int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.holds[number] += d; h.holds[number] == 0 {
		delete(h.holds, number)
	}
}

// lockEvent lets one event happen at a time. When none is pending it ends a
// checkpoint that is running. unlockEvent gives back what it takes; the token of
// checkpoints goes to the settler if the event happens.
func (v *Volume) lockEvent(ctx context.Context, what string) error {
	if err := v.check(what, 0, 0, true); err != nil {
		return err
	}
	v.hist.waiting.Add(1)
	defer v.hist.waiting.Add(-1)
	if err := v.hist.lock(ctx); err != nil {
		return err
	}
	if err := v.keep(ctx); err != nil {
		v.hist.unlock()
		return err
	}
	err := v.check(what, 0, 0, true)
	if err == nil && v.hist.doubt.Load() {
		if err = v.Settled(ctx); err == nil {
			err = v.checkpointLocked(ctx, nil)
		}
	}
	if err != nil {
		v.unlockEvent()
	}
	return err
}

// keep takes a part in the checkpoint token, or the token, for an event.
func (v *Volume) keep(ctx context.Context) error {
	h := &v.hist
	for {
		h.mu.Lock()
		if h.keeps == 0 {
			h.mu.Unlock()
			break
		}
		if len(h.queue) < maxPending {
			h.keeps++
			h.mu.Unlock()
			return nil
		}
		p := h.queue[0]
		h.mu.Unlock()
		if err := v.await(ctx, p); err != nil {
			return err
		}
	}
	if err := v.lockCheckpoint(ctx); err != nil {
		return err
	}
	h.mu.Lock()
	h.keeps++
	h.mu.Unlock()
	return nil
}

// release gives back the part of one event in the checkpoint token.
func (v *Volume) release() {
	v.hist.mu.Lock()
	v.hist.keeps--
	last := v.hist.keeps == 0
	v.hist.mu.Unlock()
	if last {
		<-v.ckpt
	}
}

func (v *Volume) unlockEvent() {
	v.release()
	v.hist.unlock()
}

// quiet reports whether every event is settled.
func (h *history) quiet() bool { return h.first() == nil }

// first returns the event to settle next, nil when there is none.
func (h *history) first() *pending {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queue) == 0 {
		return nil
	}
	return h.queue[0]
}

// horizon tells which blocks come from a version of st, 0 for none.
func (v *Volume) horizon(st *medium.State, number uint64) horizon {
	if p := st.Find(number); p != nil {
		return horizon{p.At, p.Epoch}
	}
	return horizon{at: atoll.MakeLocation(v.base, 0, 0)}
}

// Versions lists the versions, hidden ones too, by number; also one that is not
// in the manifest yet.
func (v *Volume) Versions() []medium.Version {
	st := v.state()
	return st.Versions
}

// State returns the versions and how they hang together, with what is not in the
// manifest yet. The caller must not change the properties in it.
func (v *Volume) State() medium.State { return v.state() }

// state is the medium's with what is pending.
func (v *Volume) state() medium.State {
	v.hist.mu.Lock()
	made := make([]medium.Version, len(v.hist.queue))
	for i, p := range v.hist.queue {
		made[i] = p.v
	}
	parent := v.hist.parent
	v.hist.mu.Unlock()
	st := v.store.State()
	for _, m := range made {
		if st.Find(m.Number) == nil {
			i, _ := slices.BinarySearchFunc(st.Versions, m.Number, func(a medium.Version, n uint64) int { return cmp.Compare(a.Number, n) })
			st.Versions = slices.Insert(st.Versions, i, m)
			st.CurParent = parent
		}
	}
	return st
}

// Settled waits until every version made before the call is in the manifest:
// it can be cloned and read by others then.
func (v *Volume) Settled(ctx context.Context) error {
	var last *pending
	v.hist.mu.Lock()
	if n := len(v.hist.queue); n > 0 {
		last = v.hist.queue[n-1]
	}
	v.hist.mu.Unlock()
	if last == nil {
		return nil
	}
	return v.await(ctx, last)
}

// settledVersion waits until a version is in the manifest, if it is pending.
func (v *Volume) settledVersion(ctx context.Context, number uint64) error {
	v.hist.mu.Lock()
	i := slices.IndexFunc(v.hist.queue, func(p *pending) bool { return p.v.Number == number })
	var p *pending
	if i >= 0 {
		p = v.hist.queue[i]
	}
	v.hist.mu.Unlock()
	if p == nil {
		return nil
	}
	return v.await(ctx, p)
}

// await waits until an event is settled, and so all before it.
func (v *Volume) await(ctx context.Context, p *pending) error {
	select {
	case <-p.done:
		return nil
	case <-p.lost:
		return fmt.Errorf("wait for version %d of volume %v: %w", p.v.Number, v.id, atoll.ErrFenced)
	case <-ctx.Done():
		return fmt.Errorf("wait for version %d of volume %v: %w: %w", p.v.Number, v.id, atoll.ErrTimeout, ctx.Err())
	case <-v.ctx.Done():
		return fmt.Errorf("wait for version %d of volume %v: %w", p.v.Number, v.id, atoll.ErrClosed)
	}
}

// happen makes an event, whose record is durable at mark, be so in memory. No
// change is between log and map. target is the map that a restore goes to.
func (v *Volume) happen(e *event, mark medium.Mark, target *rooted) medium.Version {
	at := atoll.MakeLocation(mark.Ordinal, mark.Block, 0)
	h, m := &v.hist, v.pages
	st := v.store.State()
	h.mu.Lock()
	defer h.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	used := m.t.total()
	ver := m.t.freeze(v.size.Load())
	logged := v.logBytes.Load()
	for _, q := range h.queue {
		logged -= q.logged
	}
	p := &pending{ver: ver, mark: mark, target: target, number: e.Target, logged: logged, done: make(chan struct{}), lost: make(chan struct{})}
	p.v = medium.Version{
		Number: e.Number, Name: e.Name, Memo: e.Memo, Time: e.Time, Parent: h.parent, At: at, Seq: mark.Seq, Epoch: ver.epoch,
		Size: ver.size, Used: used * atoll.BlockSize, Unique: -1, Flags: e.Flags, Props: e.Props,
	}
	h.queue, h.event = append(h.queue, p), e.Number
	h.count++
	if target == nil {
		m.t.led.held = horizon{at, ver.epoch}
		h.parent = e.Number
		return p.v
	}
	t := newTree(0)
	t.adopt(target.info, slices.Clone(target.tops))
	t.epoch = m.t.epoch
	for ni, nd := range target.ready {
		t.installNode(ni, t.top[ni].loc, nd)
	}
	t.led.own, t.led.held = v.base, v.horizon(&st, e.Target)
	m.t = t
	h.parent = e.Target
	v.size.Store(target.info.Size)
	v.era.Add(1)
	return p.v
}

// replayEvent does what the record of an event says, unless the root has it
// already. It is settled when the volume is open.
func (v *Volume) replayEvent(ctx context.Context, r medium.Record) error {
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	if r.Blocks != 1 || len(r.CRCs) != 1 {
		return fmt.Errorf("version record of %d blocks at %d:%d: %w", r.Blocks, r.Seg, r.Block, atoll.ErrCorrupt)
	}
	err := v.store.Read(ctx, r.Seg, r.Block, buf.Bytes())
	if err == nil && segment.CRC(buf.Bytes()) != r.CRCs[0] {
		err = atoll.ErrCorrupt
	}
	var e *event
	if err == nil {
		e, err = parseEvent(buf.Bytes())
	}
	if err == nil && (e.Medium != v.id || e.Number != r.Key || e.kind() != r.Kind) {
		err = fmt.Errorf("it is version %d of medium %v: %w", e.Number, e.Medium, atoll.ErrCorrupt)
	}
	if err != nil {
		return fmt.Errorf("version record %d at %d:%d: %w", r.Key, r.Seg, r.Block, err)
	}
	v.store.UseVersionNumber(e.Number)
	if e.Number <= v.hist.event {
		return nil
	}
	var target *rooted
	if e.Target != 0 {
		if target, err = v.source(ctx, e.Target); err != nil {
			return err
		}
	}
	v.happen(e, v.store.MarkAt(r), target)
	return nil
}

// settler brings events into the manifest, one after the other, and then clears
// up doubts.
func (v *Volume) settler() {
	for {
		if p := v.hist.first(); p != nil {
			if !v.settle(p) {
				return
			}
			continue
		}
		select {
		case <-v.hist.wake:
		case d := <-v.hist.doubts:
			if !v.hist.quiet() { // events that came before it
				v.hist.doubts <- d
				continue
			}
			v.dispel(d)
		case <-v.ctx.Done():
			return
		}
	}
}

// settle tries until it is done, or the lease or the volume ends.
func (v *Volume) settle(p *pending) bool {
	begun := time.Now()
	ok := v.persist("version not settled; will be tried again", func() error {
		begun = time.Now()
		return v.trySettle(v.ctx, p)
	}, "ver", p.v.Number)
	switch {
	case ok:
		v.settled(p, begun)
	case !v.store.Valid():
		v.hist.mu.Lock()
		for _, q := range v.hist.queue {
			close(q.lost)
		}
		v.hist.mu.Unlock()
	}
	return ok
}

// dispel makes sure that what is in doubt did not happen. The checkpoint token
// is held.
func (v *Volume) dispel(d *dubious) {
	ok := v.persist("writes wait until it is known that a restore or resize did not happen; will be tried again", func() error {
		return v.checkpointLocked(v.ctx, nil)
	})
	if ok {
		d.clear()
	}
	d.not = ok
	close(d.known)
}

// persist tries until it succeeds; false when the lease is lost or the volume
// ended before.
func (v *Volume) persist(what string, try func() error, attrs ...any) bool {
	for rest := ckptRetryMin; ; rest = min(2*rest, ckptRetryMax) {
		err := try()
		if err == nil {
			return true
		}
		if !v.store.Valid() {
			return false
		}
		if v.ctx.Err() == nil {
			v.log.WarnContext(v.ctx, what, append(attrs, "err", err, "dur", rest)...)
		}
		if !v.pause(rest) {
			return false
		}
	}
}

// errMay is added to errors that leave open what happened.
var errMay = errors.New("it may have happened when the volume is opened again")

// doubt leaves a change whose record failed with err to the settler, until all is
// clear or the caller does not want to wait. It returns what to tell the caller.
func (v *Volume) doubt(ctx context.Context, err error, clear func()) error {
	ctx, cancel := context.WithTimeout(ctx, 2*atoll.RequestTimeout)
	defer cancel()
	d := &dubious{clear: clear, known: make(chan struct{})}
	v.hist.doubts <- d // there is room: only who holds the checkpoint token sends
	select {
	case <-d.known:
		if d.not {
			return err
		}
	case <-ctx.Done():
	case <-v.ctx.Done():
	}
	return fmt.Errorf("%w; %w", err, errMay)
}

// pause waits; false when the volume ended.
func (v *Volume) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-v.ctx.Done():
		return false
	}
}

// trySettle writes the map as it was at the event and enters the version.
func (v *Volume) trySettle(ctx context.Context, p *pending) error {
	if err := v.writeVersion(ctx, p.ver, nil); err != nil {
		return err
	}
	v.hist.mu.Lock()
	p.v.Used = (p.ver.mapped + p.ver.led.mapped) * atoll.BlockSize
	nv := medium.NewVersion{Version: p.v, RootBytes: v.rootOf(p.ver, p.v.Number)}
	v.hist.mu.Unlock()
	c := medium.Commit{Mark: p.mark, Root: nv.RootBytes, Add: []medium.NewVersion{nv}}
	parent := p.v.Number
	if p.target != nil {
		parent = p.number
		info := p.target.info
		info.Medium, info.Epoch, info.Event = v.id, p.ver.epoch, p.v.Number
		c.Root = encodeRoot(info, p.target.tops)
	}
	c.Change = func(s *medium.State) { s.CurParent = parent }
	return v.commit(ctx, c, p.ver.led, nil)
}

func (v *Volume) settled(p *pending, begun time.Time) {
	v.finish(p.ver, true)
	v.hist.mu.Lock()
	v.checkpointed(begun, p.logged)
	v.hist.queue = slices.Delete(v.hist.queue, 0, 1)
	v.hist.mu.Unlock()
	close(p.done)
	v.release()
	if p.target != nil {
		v.recordSize()
	}
	v.kickReaper()
}

// recordSize brings the size in the catalog in line; Open does so too.
func (v *Volume) recordSize() {
	if size := v.size.Load(); v.store.Info().Size != size {
		if err := v.store.Update(v.ctx, func(m *catalogMedium) { m.Size = size }); err != nil {
			v.log.WarnContext(v.ctx, "size not recorded", "len", size, "err", err)
		}
	}
}
