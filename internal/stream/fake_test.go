package stream

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeSegment is a copy in memory.
type fakeSegment struct {
	data   []byte // batches, one after another
	size   atoll.BlockNo
	sealed bool
	fence  atoll.Epoch
	gone   bool // only the fence is left
	grade  wire.Grade
}

// fakeNode is a storage node in memory whose answers a test can delay, hold back
// and falsify. Appends are carried out in order by one goroutine.
type fakeNode struct {
	wire.Node // what is not needed panics
	id        atoll.NodeID
	queue     chan *wire.Append
	queued    atomic.Int32  // appends not done
	turn      chan struct{} // of whoever carries one out
	wg        sync.WaitGroup
	done      chan struct{}

	mu    sync.Mutex
	segs  map[atoll.SegmentID]*fakeSegment
	fault error // of every call
	held  chan struct{}
	delay func(op string) time.Duration
	reads int
}

func newFakeNode(id atoll.NodeID) *fakeNode {
	n := &fakeNode{id: id, queue: make(chan *wire.Append, 4096), turn: make(chan struct{}, 1), done: make(chan struct{}), segs: make(map[atoll.SegmentID]*fakeSegment)}
	n.wg.Go(n.run)
	return n
}

func (n *fakeNode) close() {
	n.resume()
	close(n.done)
	n.wg.Wait()
}

// fail makes every call answer with err; nil heals.
func (n *fakeNode) fail(err error) {
	n.mu.Lock()
	n.fault = err
	n.mu.Unlock()
}

// pause stops all answers, as SIGSTOP does.
func (n *fakeNode) pause() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held == nil {
		n.held = make(chan struct{})
	}
}

func (n *fakeNode) resume() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held != nil {
		close(n.held)
		n.held = nil
	}
}

// enter waits as long as the node is paused or slow, and returns its fault.
func (n *fakeNode) enter(ctx context.Context, op string) error {
	n.mu.Lock()
	held, delay := n.held, time.Duration(0)
	if n.delay != nil {
		delay = n.delay(op)
	}
	n.mu.Unlock()
	if held != nil {
		select {
		case <-held:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", op, atoll.ErrTimeout)
		}
	}
	if delay > 0 {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", op, atoll.ErrTimeout)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.fault
}

func (n *fakeNode) run() {
	for {
		select {
		case <-n.done:
			return
		case a := <-n.queue:
			vec := a.Vec
			n.turn <- struct{}{}
			n.carryOut(a)
			<-n.turn
			vec.Release()
			n.queued.Add(-1)
			a.Done <- a
		}
	}
}

// carryOut does one append. The caller has the turn.
func (n *fakeNode) carryOut(a *wire.Append) {
	vec := a.Vec
	a.Err = n.enter(context.Background(), "append")
	if a.Err == nil {
		a.Err = n.put(a.Seg, a.Epoch, a.Offset, bytes.Join(vec.Slices(), nil), false)
	}
}

func (n *fakeNode) Append(a *wire.Append) {
	a.Vec.Retain()
	a.Node = n.id
	n.queued.Add(1)
	n.queue <- a
}

// directNode is a fakeNode whose appends a sender may carry out itself, if it
// does so with all their nodes.
type directNode struct {
	*fakeNode
	rounds *atomic.Int32
}

// fakeRound is what a directNode took.
type fakeRound struct {
	nodes []*fakeNode
	list  []wire.Append
}

func (n directNode) Direct(nodes []wire.Node, list []wire.Append) wire.Round {
	r := &fakeRound{list: list}
	for _, w := range nodes {
		m := w.(directNode).fakeNode
		select {
		case m.turn <- struct{}{}:
			r.nodes = append(r.nodes, m)
		default:
		}
	}
	for _, m := range r.nodes {
		if len(r.nodes) < len(nodes) || m.queued.Load() > 0 {
			r.done()
			return nil
		}
	}
	for i := range list {
		list[i].Vec.Retain()
	}
	n.rounds.Add(1)
	return r
}

func (r *fakeRound) Run() {
	for i, m := range r.nodes {
		m.carryOut(&r.list[i])
		r.list[i].Vec.Release()
	}
	r.done()
}

func (r *fakeRound) done() {
	for _, m := range r.nodes {
		<-m.turn
	}
}

// direct lets appenders of the cluster carry out their appends, and counts what
// they do.
func (c *fakeCluster) direct() *atomic.Int32 {
	var rounds atomic.Int32
	for id, n := range c.nodes {
		c.view.AddLocal(id, directNode{n, &rounds})
	}
	return &rounds
}

// put writes checked batches at the end of a segment.
func (n *fakeNode) put(seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte, extend bool) error {
	if err := checkBatches(seg, at, raw); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.segs[seg]
	switch {
	case s == nil || s.gone:
		return fmt.Errorf("append to %v: %w", seg, atoll.ErrNotExist)
	case epoch < s.fence:
		return atoll.ErrFenced
	case s.sealed:
		return atoll.ErrSealed
	case at.Bytes() > int64(len(s.data)):
		return atoll.ErrGap
	case at.Bytes() < int64(len(s.data)) && !extend:
		return fmt.Errorf("append at %d of %d: %w", at, len(s.data)/atoll.BlockSize, atoll.ErrInvalid)
	}
	s.data = append(s.data[:at.Bytes()], raw...)
	return nil
}

// checkBatches verifies headers and payload as a node does.
func checkBatches(seg atoll.SegmentID, at atoll.BlockNo, raw []byte) error {
	for len(raw) > 0 {
		h, err := segment.ParseHeader(raw)
		if err != nil {
			return err
		}
		if h.Segment() != seg || h.Offset() != at {
			return fmt.Errorf("batch of %v at %d: %w", h.Segment(), h.Offset(), atoll.ErrInvalid)
		}
		for i := range h.Blocks() {
			if segment.CRC(raw[(1+i)*atoll.BlockSize:(2+i)*atoll.BlockSize]) != h.BlockCRC(i) {
				return fmt.Errorf("payload block %d of batch at %d: %w", i, at, atoll.ErrCorrupt)
			}
		}
		raw = raw[(1+h.Blocks())*atoll.BlockSize:]
		at = h.Next()
	}
	return nil
}

func (n *fakeNode) Create(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error {
	if err := n.enter(ctx, "create"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.segs[seg]
	if s != nil && epoch < s.fence {
		return atoll.ErrFenced
	}
	if s != nil && !s.gone {
		if len(s.data) > 0 {
			return atoll.ErrExist
		}
		return nil
	}
	n.segs[seg] = &fakeSegment{size: blocks &^ wire.Reserve, fence: epoch, grade: wire.Clean}
	return nil
}

func (n *fakeNode) Fence(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (wire.Tail, error) {
	if err := n.enter(ctx, "fence"); err != nil {
		return wire.Tail{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.segs[seg]
	if s == nil {
		s = &fakeSegment{gone: true}
		n.segs[seg] = s
	}
	if epoch < s.fence {
		return wire.Tail{}, atoll.ErrFenced
	}
	s.fence = epoch
	if s.gone {
		return wire.Tail{Grade: wire.Absent, Epoch: epoch}, nil
	}
	t := wire.Tail{Grade: s.grade, Length: atoll.BlockNo(len(s.data) / atoll.BlockSize), Sealed: s.sealed, Epoch: epoch}
	for p := s.data; len(p) > 0; {
		h, err := segment.ParseHeader(p)
		if err != nil {
			return wire.Tail{}, err
		}
		t.Sum, t.Seq = h.Sum(), h.Seq()+uint64(h.Records())
		p = p[(1+h.Blocks())*atoll.BlockSize:]
	}
	return t, nil
}

func (n *fakeNode) Extend(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error {
	if err := n.enter(ctx, "extend"); err != nil {
		return err
	}
	return n.put(seg, epoch, at, raw, true)
}

func (n *fakeNode) Seal(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error {
	if err := n.enter(ctx, "seal"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.segs[seg]
	switch {
	case s == nil || s.gone:
		return atoll.ErrNotExist
	case epoch < s.fence:
		return atoll.ErrFenced
	case s.sealed && int64(len(s.data)) != length.Bytes():
		return atoll.ErrSealed
	case int64(len(s.data)) < length.Bytes():
		return atoll.ErrGap
	}
	s.data, s.sealed = s.data[:length.Bytes()], true
	return nil
}

// get returns the bytes of a segment from a block on.
func (n *fakeNode) get(ctx context.Context, op string, seg atoll.SegmentID, at atoll.BlockNo) ([]byte, error) {
	if err := n.enter(ctx, op); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.segs[seg]
	if s == nil || s.gone || at.Bytes() > int64(len(s.data)) {
		return nil, fmt.Errorf("%s %v at %d: %w", op, seg, at, atoll.ErrNotExist)
	}
	return slices.Clone(s.data[at.Bytes():]), nil
}

func (n *fakeNode) Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	n.mu.Lock()
	n.reads++
	n.mu.Unlock()
	p, err := n.get(ctx, "read", seg, 0)
	if err != nil {
		return err
	}
	lo, hi := block.Bytes(), block.Bytes()+int64(len(dst))
	if hi > int64(len(p)) {
		return atoll.ErrNotExist
	}
	for at := int64(0); at < int64(len(p)); {
		h, err := segment.ParseHeader(p[at:])
		if err != nil {
			return err
		}
		for i := range h.Blocks() {
			b := at + int64(1+i)*atoll.BlockSize
			if b >= lo && b < hi && segment.CRC(p[b:b+atoll.BlockSize]) != h.BlockCRC(i) {
				return fmt.Errorf("block %d: %w", b/atoll.BlockSize, atoll.ErrCorrupt)
			}
		}
		at += int64(1+h.Blocks()) * atoll.BlockSize
	}
	copy(dst, p[lo:hi])
	return nil
}

func (n *fakeNode) Fetch(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	p, err := n.get(ctx, "fetch", seg, at)
	if err != nil {
		return nil, err
	}
	end := 0
	for end < len(p) && (end == 0 || end < max) {
		h, err := segment.ParseHeader(p[end:])
		if err != nil {
			return nil, err
		}
		end += (1 + h.Blocks()) * atoll.BlockSize
	}
	buf := host.Alloc(end)
	copy(buf.Bytes(), p[:end])
	return buf, nil
}

func (n *fakeNode) Index(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	p, err := n.get(ctx, "index", seg, at)
	if err != nil {
		return nil, err
	}
	var out []byte
	for len(p) > 0 && max > 0 {
		h, err := segment.ParseHeader(p)
		if err != nil {
			return nil, err
		}
		out = append(out, p[:atoll.BlockSize]...)
		p = p[(1+h.Blocks())*atoll.BlockSize:]
		max--
	}
	buf := host.Alloc(len(out))
	copy(buf.Bytes(), out)
	return buf, nil
}

func (n *fakeNode) Repair(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, p []byte) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	copy(n.segs[seg].data[block.Bytes():], p)
	return nil
}

func (n *fakeNode) Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error {
	if err := n.enter(ctx, "delete"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.segs[seg]; s != nil && epoch < s.fence {
		return atoll.ErrFenced
	}
	n.segs[seg] = &fakeSegment{gone: true, fence: epoch}
	return nil
}

func (n *fakeNode) List(ctx context.Context, after atoll.SegmentID, max int) ([]wire.SegmentInfo, error) {
	if err := n.enter(ctx, "list"); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var list []wire.SegmentInfo
	for id, s := range n.segs {
		if !s.gone && id.String() > after.String() {
			list = append(list, wire.SegmentInfo{Seg: id, Length: atoll.BlockNo(len(s.data) / atoll.BlockSize), Sealed: s.sealed, Epoch: s.fence})
		}
	}
	slices.SortFunc(list, func(a, b wire.SegmentInfo) int { return cmp.Compare(a.Seg.String(), b.Seg.String()) })
	return list[:min(max, len(list))], nil
}

func (n *fakeNode) Verify(ctx context.Context, seg atoll.SegmentID) (wire.VerifyResult, error) {
	p, err := n.get(ctx, "verify", seg, 0)
	if err != nil {
		return wire.VerifyResult{}, err
	}
	r := wire.VerifyResult{Blocks: atoll.BlockNo(len(p) / atoll.BlockSize)}
	if err := checkBatches(seg, 0, p); err != nil {
		r.Damaged = append(r.Damaged, wire.Run{Blocks: r.Blocks})
	}
	return r, nil
}

// data returns a copy's bytes.
func (n *fakeNode) data(seg atoll.SegmentID) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.segs[seg]; s != nil {
		return slices.Clone(s.data)
	}
	return nil
}

// fakeCluster is a catalog and a registry in memory, with nodes 1 to n.
type fakeCluster struct {
	t     testing.TB
	nodes map[atoll.NodeID]*fakeNode
	view  *Nodes

	mu       sync.Mutex
	state    *catalog.State
	next     atoll.Ordinal
	unsealed []catalog.Unsealed
	sealed   []catalog.Sealed
	dropped  []atoll.SegmentID
	refuse   error // of Register
	lag      func() time.Duration
}

func newFakeCluster(t testing.TB, count int) *fakeCluster {
	c := &fakeCluster{t: t, nodes: make(map[atoll.NodeID]*fakeNode), next: 1}
	c.state = &catalog.State{Nodes: map[atoll.NodeID]catalog.Node{}, Copysets: map[atoll.CopysetID]catalog.Copyset{}}
	c.view = NewNodes(NodesOptions{Catalog: c, Seed: 1})
	for i := range count {
		id := atoll.NodeID(i + 1)
		n := newFakeNode(id)
		c.nodes[id] = n
		c.state.Nodes[id] = catalog.Node{ID: id, State: catalog.NodeActive, Up: true, Host: fmt.Sprint("host", id), Report: catalog.NodeReport{Free: 1 << 40}}
		c.view.AddLocal(id, n)
	}
	t.Cleanup(func() {
		for _, n := range c.nodes {
			n.close()
		}
		if err := c.view.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *fakeCluster) State() *catalog.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

func (c *fakeCluster) Changed() <-chan struct{} { return nil }

// change replaces the state by an edited copy.
func (c *fakeCluster) change(fn func(*catalog.State)) {
	st := &catalog.State{Nodes: map[atoll.NodeID]catalog.Node{}, Copysets: map[atoll.CopysetID]catalog.Copyset{}}
	for k, v := range c.state.Nodes {
		st.Nodes[k] = v
	}
	for k, v := range c.state.Copysets {
		st.Copysets[k] = v
	}
	fn(st)
	c.state = st
}

func (c *fakeCluster) EnsureCopyset(_ context.Context, nodes []atoll.NodeID) (catalog.Copyset, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, set := range c.state.Copysets {
		if slices.Equal(set.Nodes, nodes) {
			return set, nil
		}
	}
	set := catalog.Copyset{ID: atoll.CopysetID(len(c.state.Copysets) + 1), Nodes: slices.Clone(nodes)}
	c.change(func(st *catalog.State) { st.Copysets[set.ID] = set })
	return set, nil
}

func (c *fakeCluster) pause() {
	c.mu.Lock()
	lag := time.Duration(0)
	if c.lag != nil {
		lag = c.lag()
	}
	c.mu.Unlock()
	time.Sleep(lag) // only inside a bubble, or zero
}

func (c *fakeCluster) Register(_ context.Context, lane catalog.Lane, set atoll.CopysetID, size atoll.BlockNo) (atoll.SegmentID, error) {
	c.pause()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		return atoll.SegmentID{}, c.refuse
	}
	seg := atoll.SegmentID{Medium: 7, Ordinal: c.next, Copyset: set}
	c.next++
	c.unsealed = append(c.unsealed, catalog.Unsealed{Seg: seg, Lane: lane, Size: size})
	return seg, nil
}

func (c *fakeCluster) remove(seg atoll.SegmentID) error {
	before := len(c.unsealed)
	c.unsealed = slices.DeleteFunc(c.unsealed, func(u catalog.Unsealed) bool { return u.Seg == seg })
	if len(c.unsealed) == before {
		c.t.Errorf("segment %v sealed or abandoned, but it is not open", seg)
	}
	return nil
}

func (c *fakeCluster) Seal(_ context.Context, s catalog.Sealed) error {
	c.pause()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		return c.refuse
	}
	c.sealed = append(c.sealed, s)
	return c.remove(s.Seg)
}

func (c *fakeCluster) Abandon(_ context.Context, seg atoll.SegmentID) error {
	c.pause()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil {
		return c.refuse
	}
	c.dropped = append(c.dropped, seg)
	return c.remove(seg)
}

// log returns what is in the catalog: sealed segments by ordinal.
func (c *fakeCluster) log() []catalog.Sealed {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := slices.Clone(c.sealed)
	slices.SortFunc(list, func(a, b catalog.Sealed) int { return cmp.Compare(a.Seg.Ordinal, b.Seg.Ordinal) })
	return list
}

func (c *fakeCluster) open() []catalog.Unsealed {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.unsealed)
}

// writer opens a writer with small segments.
func (c *fakeCluster) writer(edit func(*WriterOptions)) *Writer {
	o := WriterOptions{Nodes: c.view, Registry: c, Medium: 7, Epoch: 1, Seq: 1, Policy: catalog.Policy{Replicas: 3, Segment: 256}}
	if edit != nil {
		edit(&o)
	}
	w, err := OpenWriter(o)
	if err != nil {
		c.t.Fatal(err)
	}
	return w
}

// payload returns an entry with one record of some blocks that all carry key.
func payload(e *Entry, key uint64, blocks int) {
	e.Reset()
	buf := host.Alloc(blocks * atoll.BlockSize)
	fill(buf.Bytes(), key)
	e.Add(segment.Record{Kind: 20, Blocks: uint16(blocks), Key: key}, buf, buf.Bytes())
	buf.Release()
}

func fill(p []byte, key uint64) {
	for i := 0; i < len(p); i += 8 {
		for k := range 8 {
			p[i+k] = byte(key>>(8*k)) ^ byte(i>>12)
		}
	}
}
