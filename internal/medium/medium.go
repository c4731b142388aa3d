package medium

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
)

// Options is what a medium needs of its process. Catalog, Nodes and Session are
// required.
type Options struct {
	Catalog *catalog.Catalog
	Nodes   *stream.Nodes
	Session *catalog.Session
	Log     *slog.Logger
	Metrics *Metrics
	Streams *stream.Metrics

	// Trashed opens a medium in the trash, and no other, to check it.
	Trashed bool
	// Wait is how long Open waits for another owner's lease to end; 0 means a
	// little more than atoll.LeaseTTL.
	Wait time.Duration
	// Idle is how long a lane stays open without appends; 0 means 30 s.
	Idle time.Duration
	// Grace is how long dropped and compacted segments are kept on nodes, so that
	// readers who know them need not look again; 0 means 1 s.
	Grace time.Duration
	// Sweep is the time between searches for leftovers and tries to complete
	// unverified copies; 0 means 3 minutes.
	Sweep time.Duration
}

func (o Options) withDefaults() Options {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.Wait, atoll.LeaseTTL+3*time.Second/2)
	set(&o.Idle, 30*time.Second)
	set(&o.Grace, time.Second)
	set(&o.Sweep, 3*time.Minute)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Medium is a medium that this process owns. All methods may be called
// concurrently unless they say otherwise.
type Medium struct {
	opts    Options
	log     *slog.Logger
	metrics *Metrics
	id      atoll.MediumID
	epoch   atoll.Epoch
	info    atomic.Pointer[catalog.Medium]
	own     *owner
	table   *table
	lanes   [2]lane
	root    []byte               // kind's root as loaded; never changed
	line    atomic.Pointer[line] // ancestors; nil if it has none

	appended    atomic.Int64 // blocks in the hot lane from the mark at Open on
	reserve     atomic.Int32 // calls for which the hot lane may use the nodes' reserve
	written     atomic.Int64 // blocks of own records since Open
	cost        atomic.Int64 // blocks of the last manifest
	copied      atomic.Int64 // bytes that compaction copied since Open
	filled      atomic.Int64 // bytes of segments sealed since Open
	born        time.Time
	weighed     atomic.Int64 // nanoseconds after born when the next two were counted; 0 never
	reclaimable atomic.Int64
	waiting     atomic.Int64
	taken       atomic.Int64  // bytes by which the room of its segments grew since Open, one copy
	copies      chan struct{} // room for those who compact at once
	moves       chan struct{} // room for one: whoever has copied and changes the manifest
	manifests   chan struct{} // room for one: whoever writes a manifest
	updates     chan struct{} // room for one: whoever changes the record

	dead   atomic.Bool // the epoch or lease is lost, or the medium is closed
	lost   chan struct{}
	closed atomic.Bool

	stop   context.CancelFunc // ends the background work
	keeps  chan struct{}      // something for keep to do
	sweeps chan struct{}      // something for sweep to do
	wg     sync.WaitGroup

	mu struct {
		sync.Mutex // guards the table too; memory work only
		man        *manifest
		ref        Ref // where man is; zero before the first
		doomed     []doomed
		lastNumber uint64          // highest version number given out
		moving     []atoll.Ordinal // from where on the compactions that run write to bulk segments
		copied     []*copied       // compactions that wait for a manifest
		isLost     bool
		shown      shown // in the gauges
		reports    int64 // tells the reports of nodes that Pressure saw last
		reported   int64 // taken, when they were new
	}
}

// doomed is a segment that a durable manifest says was dropped or compacted.
type doomed struct {
	ordinal atoll.Ordinal
	due     time.Time // when nodes are to remove it
	failed  bool      // one of them did not, last time
}

// Info returns the medium's record as this process knows it.
func (m *Medium) Info() catalog.Medium { return *m.info.Load() }

// Epoch returns the epoch under which this process owns the medium.
func (m *Medium) Epoch() atoll.Epoch { return m.epoch }

// Root returns the kind's root of the last checkpoint before Open, nil if there
// was none. The caller must not change it.
func (m *Medium) Root() []byte { return m.root }

// Valid reports whether the process may still act as the owner. It is cheap.
func (m *Medium) Valid() bool { return !m.dead.Load() && m.opts.Session.Valid() }

// Lost returns a channel that closes when ownership is lost or the medium is
// closed.
func (m *Medium) Lost() <-chan struct{} { return m.lost }

// check returns why nothing may be done any more, or nil.
func (m *Medium) check() error {
	if m.closed.Load() {
		return fmt.Errorf("medium %v: %w", m.id, atoll.ErrClosed)
	}
	if !m.Valid() {
		return fmt.Errorf("medium %v, epoch %v: %w", m.id, m.epoch, atoll.ErrFenced)
	}
	return nil
}

// lose notes that ownership is lost.
func (m *Medium) lose(err error) {
	m.mu.Lock()
	first := !m.mu.isLost
	m.mu.isLost = true
	m.mu.Unlock()
	m.dead.Store(true)
	if first {
		close(m.lost)
		if err != nil {
			m.log.Warn("medium lost", "medium", m.id, "epoch", m.epoch, "err", err)
		}
	}
}

// note looks whether an error tells that ownership is lost, and returns it.
func (m *Medium) note(err error) error {
	if errors.Is(err, atoll.ErrFenced) {
		m.lose(err)
	}
	return err
}

// Submit queues an entry for a lane and returns; e.Wait tells the outcome. It
// blocks only while the lane's queue is full or its writer is being opened.
func (m *Medium) Submit(ctx context.Context, l catalog.Lane, e *stream.Entry) error {
	if err := m.submit(ctx, l, e); err != nil {
		return err
	}
	if l == catalog.Hot {
		m.appended.Add(int64(e.Blocks()) + 1)
	}
	return nil
}

// Append writes an entry to a lane. When it returns nil the entry is on stable
// storage on all copies of its segment. After any other error it may or may not
// be in the log.
func (m *Medium) Append(ctx context.Context, l catalog.Lane, e *stream.Entry) error {
	blocks := int64(e.Blocks()) + 1
	err := m.appendEntry(ctx, l, e)
	if l == catalog.Hot {
		m.appended.Add(blocks) // before anybody hears of it
	}
	return err
}

// outcome is ErrFenced for whatever failed when ownership was lost.
func (m *Medium) outcome(err error) error {
	if err != nil && !m.closed.Load() && !m.Valid() && !errors.Is(err, atoll.ErrFenced) {
		return fmt.Errorf("append to medium %v, epoch %v: %w: %w", m.id, m.epoch, atoll.ErrFenced, err)
	}
	return m.note(err)
}

// appendEntry is Append for records of this package, which are not replayed.
func (m *Medium) appendEntry(ctx context.Context, l catalog.Lane, e *stream.Entry) error {
	w, err := m.writer(ctx, l)
	if err != nil {
		return err
	}
	return m.outcome(w.Append(ctx, e))
}

func (m *Medium) submit(ctx context.Context, l catalog.Lane, e *stream.Entry) error {
	w, err := m.writer(ctx, l)
	if err != nil {
		return err
	}
	if err := w.Submit(ctx, e); err != nil {
		return m.outcome(err)
	}
	return nil
}

// writer returns the writer of a lane and opens it if need be.
func (m *Medium) writer(ctx context.Context, l catalog.Lane) (*stream.Writer, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	if w := m.lanes[l].w.Load(); w != nil {
		return w, nil
	}
	w, err := m.openLane(ctx, l)
	if err != nil {
		return nil, m.note(err)
	}
	return w, nil
}

// Read fills dst, whole blocks, from a block of a segment of this medium, or of
// an ancestor's. It follows remaps. ErrNotExist when there is no such segment,
// also when it was dropped since the caller looked where its data are: it then
// looks again. ErrFenced when ownership was lost before the read was complete.
func (m *Medium) Read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte) error {
	return m.ReadSums(ctx, o, block, dst, nil)
}

// ReadSums is Read, and sets sums, unless nil one for each block, to the CRC32C
// of each, which has to be computed on the way.
func (m *Medium) ReadSums(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte, sums []uint32) error {
	if err := m.check(); err != nil {
		return err
	}
	if l := m.line.Load(); l != nil && o < l.base {
		if err := l.read(ctx, o, block, dst, sums); err != nil {
			return err
		}
		return m.check()
	}
	for {
		s := m.table.at(o)
		if s == nil {
			return fmt.Errorf("read segment %d of medium %v: %w", o, m.id, atoll.ErrNotExist)
		}
		info, r := s.info.Load(), s.remap.Load()
		err := m.read(ctx, o, info, r, block, dst, sums)
		if err == nil {
			return m.check()
		}
		if lost := m.check(); lost != nil {
			return lost // another owner may have removed it
		}
		if !moved(err) || info == s.info.Load() && r == s.remap.Load() {
			return err
		}
		// Compaction moved it meanwhile.
	}
}

// read reads from a segment as the table has it at the moment.
func (m *Medium) read(ctx context.Context, o atoll.Ordinal, info uint64, r *remap, block atoll.BlockNo, dst []byte, sums []uint32) error {
	st, copyset := state(info), atoll.CopysetID(info>>32)
	if st == stateNone || st == stateGone {
		return fmt.Errorf("read segment %d of medium %v: %w", o, m.id, atoll.ErrNotExist)
	}
	if r == nil {
		return m.opts.Nodes.ReadSums(ctx, atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}, block, dst, sums)
	}
	for len(dst) > 0 {
		to, at, run, ok := r.find(block)
		n := min(len(dst), int(run)*atoll.BlockSize)
		seg := atoll.SegmentID{Medium: m.id, Ordinal: to}
		if s := m.table.at(to); ok && s != nil {
			_, _, seg.Copyset = s.get()
		} else if ok || st == stateVirtual {
			return fmt.Errorf("read block %d of compacted segment %d of medium %v: %w", block, o, m.id, atoll.ErrNotExist)
		} else {
			seg, at = atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}, block
		}
		if err := m.opts.Nodes.ReadSums(ctx, seg, at, dst[:n], firstSums(&sums, n)); err != nil {
			return err
		}
		dst, block = dst[n:], block+atoll.BlockNo(n/atoll.BlockSize)
	}
	return nil
}

// base returns the first ordinal that is the medium's own.
func (m *Medium) base() atoll.Ordinal {
	if l := m.line.Load(); l != nil {
		return l.base
	}
	return 1
}

// Base returns the first ordinal that is the medium's own: those below, in a
// clone, are its ancestors'. They are not counted by Live.
func (m *Medium) Base() atoll.Ordinal { return m.base() }

// Ancestor returns whose segment an ordinal is: the medium's own, or an
// ancestor's. False for one that nobody has.
func (m *Medium) Ancestor(o atoll.Ordinal) (atoll.MediumID, bool) {
	if o >= m.base() {
		return m.id, true
	}
	return m.line.Load().owner(o)
}

// Detach makes a clone a medium of its own: it gives up the ancestors, the pin
// and what the record says of them. The kind has seen to it that no root refers
// to their segments: neither that of the last checkpoint, nor that of a version,
// nor those of versions that clones of this medium began as. Durable on return;
// it may be repeated.
func (m *Medium) Detach(ctx context.Context) error {
	if m.Info().Parent == nil {
		return nil
	}
	m.mu.Lock()
	own := !m.mu.ref.IsZero()
	m.mu.Unlock()
	if !own {
		return fmt.Errorf("detach medium %v: it has no root of its own yet: %w", m.id, atoll.ErrInvalid)
	}
	err := m.Update(ctx, func(rec *catalog.Medium) { rec.Parent, rec.Ancestors = nil, nil })
	if err != nil {
		return err
	}
	m.line.Store(&line{base: m.base()})
	return nil
}

// Live adds delta to the number of blocks of a segment that the kind
// references. Deltas must never take a count below zero (M4).
func (m *Medium) Live(o atoll.Ordinal, delta int) { m.table.count(o, delta) }

// Hold adds delta to the number of reasons to keep a segment although nothing
// in it may be referenced: blocks appended and not yet counted by Live, or a
// file that was removed and is still being read. Holds are not stored.
func (m *Medium) Hold(o atoll.Ordinal, delta int) {
	s := m.table.at(o)
	atoll.Assert(s != nil, "hold of unknown segment %d", o)
	n := s.hold.Add(int32(delta))
	atoll.Assert(n >= 0, "holds of segment %d are %d", o, n)
}

// Length returns the sealed length of a segment, or false while it is open or
// when it is not known.
func (m *Medium) Length(o atoll.Ordinal) (atoll.BlockNo, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.table.at(o)
	if s == nil {
		return 0, false
	}
	st, _, _ := s.get()
	return s.length, st == stateLive
}

// LiveBlocks returns how many blocks of a segment the kind references, and
// false if there is no such segment.
func (m *Medium) LiveBlocks(o atoll.Ordinal) (int, bool) {
	s := m.table.at(o)
	if s == nil {
		return 0, false
	}
	st, _, _ := s.get()
	return int(s.live.Load()), st == stateOpen || st == stateLive || st == stateVirtual
}

// Update changes the medium's record: change is called with the current record,
// again if someone else changed it in between. Durable on return.
func (m *Medium) Update(ctx context.Context, change func(*catalog.Medium)) error {
	if err := m.check(); err != nil {
		return err
	}
	if err := acquire(ctx, m.updates); err != nil {
		return fmt.Errorf("update medium %v: %w", m.id, err)
	}
	defer func() { <-m.updates }()
	for try := 0; ; try++ {
		rec, err := m.opts.Catalog.Medium(ctx, m.id)
		if err != nil {
			return fmt.Errorf("update medium %v: %w", m.id, err)
		}
		change(&rec)
		rec, err = m.opts.Catalog.UpdateMedium(ctx, rec)
		if err == nil {
			m.info.Store(&rec)
			return nil
		}
		if !errors.Is(err, atoll.ErrConflict) || try == 10 {
			return fmt.Errorf("update medium %v: %w", m.id, err)
		}
	}
}

// Close makes what was appended durable, seals the open segments and gives the
// medium up. After an error the lease keeps others out until it ends, and
// nothing that was acknowledged is lost. The medium is unusable afterwards in
// either case. The kind has stopped using it before.
func (m *Medium) Close(ctx context.Context) error {
	if m.closed.Swap(true) {
		return nil
	}
	m.stop()
	m.wg.Wait()
	ctx, cancel := context.WithTimeout(ctx, 2*atoll.RequestTimeout)
	defer m.wg.Wait()
	defer cancel()
	m.wg.Go(func() { // what cannot be written any more is not waited for
		select {
		case <-m.lost:
		case <-m.opts.Session.Lost():
		case <-ctx.Done():
		}
		cancel()
	})
	var errs []error
	for i := range m.lanes {
		errs = append(errs, m.closeLane(ctx, &m.lanes[i]))
	}
	err := errors.Join(errs...)
	if !m.dead.Load() && err == nil {
		err = m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) { return headReleased(h), nil })
	}
	m.lose(nil)
	m.observe()
	if err != nil {
		return fmt.Errorf("close medium %v: %w", m.id, err)
	}
	m.log.Info("medium closed", "medium", m.id, "epoch", m.epoch)
	return nil
}

// kick wakes a background loop; one pending wake-up is enough.
func (m *Medium) kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
