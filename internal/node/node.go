package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// Options say how a node runs. Only FS is needed.
type Options struct {
	FS      host.FS
	Cluster atoll.UUID   // expected; zero takes any
	Node    atoll.NodeID // expected, and given to a disk that has none; zero takes any

	Limit      int64 // capacity in bytes; 0 = the disk's size
	NoPrewrite bool  // let files grow instead of filling slots with zeros
	Spare      int   // slots kept ready; 0 = 2
	QueueLen   int   // appends queued at most; 0 = 4096
	MaxHandles int   // open files kept; 0 = 512
	IndexBytes int   // memory for the indexes of sealed segments; 0 = 16 MiB

	// SharedFlush says that on this file system a sync of one file also makes
	// durable what direct writes put into written blocks of others, so that one
	// flush serves all segments of a round. True of ext4 and xfs on one device;
	// not of btrfs, zfs, network or stacked file systems, where setting it loses
	// acknowledged data at a power cut.
	SharedFlush bool

	// Committer is shared by the nodes on one file system; nil for one's own.
	Committer *Committer

	Log     *slog.Logger
	Metrics *Metrics
}

// maxDiskErrors is how many errors turn a node read-only.
const maxDiskErrors = 2

// Node is a storage node. It implements wire.Node; see there for what each
// method promises.
type Node struct {
	opts    Options
	fs      host.FS
	id      segment.Super
	lock    io.Closer
	log     *slog.Logger
	metrics *Metrics
	states  *stateLog
	handles *handles
	indexes *indexes
	slots   *slots
	turns   turns
	queue   queue

	shrinking shrinking

	stop  chan struct{} // closed by Close and Abort
	wg    sync.WaitGroup
	calls calls

	mu struct {
		sync.Mutex
		segs   map[atoll.SegmentID]*seg
		sorted []atoll.SegmentID // of segs; nil when it must be made anew
		used   int64             // bytes that segments take or may take
		paused chan struct{}     // closed by Resume; nil while running
	}
	full       atomic.Bool   // a write met a full disk
	diskErrors atomic.Uint64 // of writes and syncs; they turn the node read-only
	readErrors atomic.Uint64
	lastAppend atomic.Int64 // nanoseconds
	appended   atomic.Int64 // bytes
	recent     latencies
	requests   atomic.Uint64 // appends of writers, and reads

	// Of the committer.
	items       []item
	dirty       []*seg
	roundBytes  int64
	sharedFlush bool

	turn chan struct{} // the committer's; set by Open
}

var _ wire.Node = (*Node)(nil)

// Open serves the disk FS. It takes the disk's lock, checks its identity,
// removes the mark of a clean stop, reads how every unsealed segment ends, and
// finishes deletions. ErrBusy if another process serves it, ErrIdentity if it
// is of another cluster or node, ErrVersion if its format is newer, ErrNotExist
// if it was never formatted. Close or Abort ends it.
func Open(opts Options) (*Node, error) {
	opts.setDefaults()
	lock, err := opts.FS.Lock(lockFile)
	if err != nil {
		return nil, fmt.Errorf("open disk: it is served by a running process: %w", err)
	}
	n := &Node{
		opts: opts, fs: opts.FS, lock: lock, log: opts.Log, metrics: opts.Metrics, stop: make(chan struct{}),
		handles: newHandles(opts.FS, opts.MaxHandles), indexes: newIndexes(opts.IndexBytes), sharedFlush: opts.SharedFlush,
	}
	n.queue = queue{max: opts.QueueLen}
	n.calls.idle = make(chan struct{}, 1)
	n.mu.segs = make(map[atoll.SegmentID]*seg)
	if err := n.open(); err != nil {
		n.handles.closeAll()
		if n.states != nil {
			n.states.close(false)
		}
		lock.Close()
		return nil, err
	}
	n.countSegments(1)
	n.queue.wake, n.turn = n.opts.Committer.join(n)
	n.wg.Go(n.slots.loop)
	return n, nil
}

func (o *Options) setDefaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.Spare, 2)
	def(&o.QueueLen, 4096)
	def(&o.MaxHandles, 512)
	def(&o.IndexBytes, 16<<20)
	if o.Committer == nil {
		o.Committer = new(Committer)
	}
	if o.NoPrewrite {
		o.Spare = 0
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// open loads what is on the disk.
func (n *Node) open() (err error) {
	if n.id, err = readSuper(n.fs); err != nil {
		return fmt.Errorf("open disk: %w", err)
	}
	if c := n.opts.Cluster; !c.IsZero() && n.id.Cluster != c {
		return fmt.Errorf("open disk %v: it belongs to cluster %v, this is cluster %v: %w", n.id.Disk, n.id.Cluster, c, atoll.ErrIdentity)
	}
	if n.opts.Node != 0 {
		if err := assign(n.fs, &n.id, n.opts.Node); err != nil {
			return fmt.Errorf("open disk %v: %w", n.id.Disk, err)
		}
	}
	n.log = n.log.With("node", uint32(n.id.Node))
	loaded, err := readStates(n.fs)
	if err != nil {
		return fmt.Errorf("open disk %v: %w", n.id.Disk, err)
	}
	if err := n.load(&loaded); err != nil {
		return fmt.Errorf("open disk %v: %w", n.id.Disk, err)
	}
	n.states, err = newStateLog(n.fs, loaded)
	if errors.Is(err, atoll.ErrNoSpace) && dropSlots(n.fs) {
		// A full disk must not keep what it holds from being read.
		n.states, err = newStateLog(n.fs, loaded)
	}
	if err != nil {
		return fmt.Errorf("open disk %v: %w", n.id.Disk, err)
	}
	n.slots, err = openSlots(n)
	if err != nil {
		return fmt.Errorf("open disk %v: %w", n.id.Disk, err)
	}
	n.log.Info("disk opened", "disk", n.id.Disk, "segments", len(n.mu.segs), "clean", loaded.clean, "doubt", loaded.doubt)
	return nil
}

// dropSlots removes the files kept for later segments and reports whether there
// were any.
func dropSlots(fs host.FS) bool {
	entries, err := fs.List(slotsDir)
	if err != nil {
		return false
	}
	any := false
	for _, e := range entries {
		any = fs.Remove(slotsDir+"/"+e.Name) == nil || any
	}
	return any && fs.SyncDir(slotsDir) == nil
}

// Identity returns the disk's identity.
func (n *Node) Identity() Identity {
	return Identity{Cluster: n.id.Cluster, Node: n.id.Node, Disk: n.id.Disk, Incarnation: n.id.Incarnation}
}

// Close stops the node cleanly: what is queued is committed, calls at work end,
// later ones get ErrClosed, and the disk is marked as stopped cleanly. Durable
// on return.
func (n *Node) Close() error {
	return n.end(fmt.Errorf("node %v: %w", n.id.Node, atoll.ErrClosed), true)
}

// Abort stops the node as a crash would, but for the process going on: what is
// queued ends with ErrUnreachable, nothing more is written or marked clean. On
// return nothing of the node runs and the disk can be opened again.
func (n *Node) Abort() {
	n.end(fmt.Errorf("node %v stopped: %w", n.id.Node, atoll.ErrUnreachable), false)
}

func (n *Node) end(why error, clean bool) error {
	if !n.calls.close(why) {
		return nil
	}
	n.queue.close(why)
	close(n.stop)
	n.queue.poke() // a paused node's queue
	n.calls.wait()
	n.opts.Committer.leave(n)
	n.wg.Wait()
	n.countSegments(-1)
	n.releaseRounds()
	err := n.handles.closeAll()
	if clean {
		n.noteLengths()
	}
	err = errors.Join(err, n.states.close(clean && n.diskErrors.Load() == 0))
	return errors.Join(err, n.lock.Close())
}

// noteLengths records the lengths of unsealed segments at a clean stop.
func (n *Node) noteLengths() {
	for _, s := range n.mu.segs {
		if _, ok := s.sealedAt(); !ok && !s.mu.missing && s.mu.err == nil && s.mu.ending == segment.Whole {
			n.states.put(s.noteLength(), false)
		}
	}
}

// releaseRounds gives back the files that the committer kept open.
func (n *Node) releaseRounds() {
	for _, s := range n.mu.segs {
		n.releaseRound(s)
	}
}

func (n *Node) releaseRound(s *seg) {
	if h := s.round.handle; h != nil {
		s.round.handle = nil
		n.handles.release(h)
	}
}

// stopped returns why the node takes no more calls, nil while it does.
func (n *Node) stopped() error {
	if why := n.calls.closed.Load(); why != nil {
		return *why
	}
	return nil
}

// Pause makes the node stand still, as a disk that does not answer: nothing is
// committed or read until Resume, Close or Abort. For drills.
func (n *Node) Pause() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.paused == nil {
		n.mu.paused = make(chan struct{})
	}
}

// Resume ends Pause.
func (n *Node) Resume() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.paused != nil {
		close(n.mu.paused)
		n.mu.paused = nil
		n.queue.poke()
	}
}

func (n *Node) pausedUntil() chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mu.paused
}

// waitResumed holds the caller while the node is paused. It returns an
// error when the node was stopped.
func (n *Node) waitResumed() error {
	for ch := n.pausedUntil(); ch != nil; ch = n.pausedUntil() {
		select {
		case <-ch:
		case <-n.stop:
			return n.stopped()
		}
	}
	return nil
}

// begin starts a call; after nil the caller ends it with n.calls.end.
func (n *Node) begin(ctx context.Context) error {
	if err := n.calls.begin(); err != nil {
		return err
	}
	ch := n.pausedUntil()
	if ch == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	var err error
	select {
	case <-ch:
		return nil
	case <-n.stop:
		err = n.stopped()
	case <-ctx.Done():
		err = fmt.Errorf("node %v does not answer: %w", n.id.Node, atoll.ErrTimeout)
	}
	n.calls.end()
	return err
}

// control starts a call that changes segment id: it has the id's turn.
func (n *Node) control(ctx context.Context, id atoll.SegmentID) error {
	if id.Medium == 0 || id.Ordinal == 0 {
		return fmt.Errorf("segment %v: %w", id, atoll.ErrInvalid)
	}
	if err := n.begin(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	if err := n.turns.take(ctx, id); err != nil {
		n.calls.end()
		return err
	}
	return nil
}

// done ends what control started.
func (n *Node) done(id atoll.SegmentID) {
	n.turns.give(id)
	n.calls.end()
}

// calls counts the calls at work.
type calls struct {
	running atomic.Int64
	closed  atomic.Pointer[error]
	idle    chan struct{}
}

func (c *calls) begin() error {
	c.running.Add(1)
	if why := c.closed.Load(); why != nil {
		c.end()
		return *why
	}
	return nil
}

func (c *calls) end() {
	if c.running.Add(-1) == 0 && c.closed.Load() != nil {
		select {
		case c.idle <- struct{}{}:
		default:
		}
	}
}

// close refuses further calls; false if it was closed already.
func (c *calls) close(why error) bool { return c.closed.CompareAndSwap(nil, &why) }

func (c *calls) wait() {
	for c.running.Load() > 0 {
		<-c.idle
	}
}

// lookup returns the segment id.
func (n *Node) lookup(id atoll.SegmentID) (*seg, error) {
	n.mu.Lock()
	s := n.mu.segs[id]
	n.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("segment %v on node %v: %w", id, n.id.Node, atoll.ErrNotExist)
	}
	return s, nil
}

// refuseWrites says why the node takes no writes, nil if it does.
func (n *Node) refuseWrites() error {
	if err := n.stopped(); err != nil {
		return err
	}
	if n.diskErrors.Load() >= maxDiskErrors {
		return fmt.Errorf("disk of node %v failed: %w", n.id.Node, atoll.ErrReadOnly)
	}
	return nil
}

// diskFailed counts an error of the disk, or notes that it is full.
func (n *Node) diskFailed(err error) {
	if errors.Is(err, atoll.ErrNoSpace) {
		n.full.Store(true)
		return
	}
	n.diskError()
}

// diskError counts an error of the disk.
func (n *Node) diskError() {
	n.metrics.ioError()
	if n.diskErrors.Add(1) == maxDiskErrors {
		n.log.Error("node turned read-only after disk errors; replace the disk", "errors", maxDiskErrors)
	}
}

func (n *Node) countSegments(sign int) {
	n.mu.Lock()
	all, open := len(n.mu.segs), n.openSegments()
	n.mu.Unlock()
	n.metrics.count(sign*all, sign*open, sign*n.slots.count())
}

// openSegments counts the unsealed segments. The caller holds n.mu.
func (n *Node) openSegments() (open int) {
	for _, s := range n.mu.segs {
		if _, ok := s.sealedAt(); !ok {
			open++
		}
	}
	return open
}

// latencies remembers the last appends. Only the committer adds.
type latencies struct {
	ring [512]atomic.Int64
	n    atomic.Int64
}

func (l *latencies) add(d time.Duration) {
	l.ring[l.n.Load()%int64(len(l.ring))].Store(int64(d))
	l.n.Add(1)
}

func (l *latencies) p99() time.Duration {
	n := min(int(l.n.Load()), len(l.ring))
	if n == 0 {
		return 0
	}
	all := make([]int64, n)
	for i := range all {
		all[i] = l.ring[i].Load()
	}
	slices.Sort(all)
	return time.Duration(all[n*99/100])
}
