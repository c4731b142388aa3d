package volume

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

// memStore is a medium in memory: a log of two lanes in small segments, with
// live counts, versions, reclaim and compaction, that can lose what it has not
// acknowledged.
type memStore struct {
	mu      sync.Mutex
	info    catalog.Medium
	disk    *memDisk
	open    [2]atoll.Ordinal
	next    atoll.Ordinal
	log     []medium.Record // hot lane, acknowledged or not
	acked   int             // records of log that are durable
	seq     uint64
	pending []*memEntry
	segSize int
	rng     *rand.Rand
	live    map[atoll.Ordinal]int // running
	saved   memSaved              // durable
	man     memSaved              // what this owner knows to be so
	last    uint64                // number given out
	pins    map[uint64]int
	dropped int
	moves   int
	lazy    bool // acknowledge only when asked to
	fail    func(op string) error
	noCrash bool // keeps no log
	invalid bool
	greedy  bool // every segment is a victim
	used    float64
}

// memDisk is the bytes, which clones read too.
type memDisk struct {
	mu    sync.Mutex
	id    atoll.MediumID
	segs  map[atoll.Ordinal]*memSegment
	moved map[atoll.Location]atoll.Location // logical place to where the block is
	above []*memDisk                        // of the ancestors
	bases []atoll.Ordinal
}

// memSaved is what a manifest says.
type memSaved struct {
	root  []byte
	mark  medium.Mark
	live  map[atoll.Ordinal]int
	state medium.State
	roots map[uint64][]byte
}

type memSegment struct {
	lane   catalog.Lane
	data   []byte
	recs   []memPlaced
	sealed bool
	gone   bool // compacted: only a name
}

// memPlaced is a record in a segment; of are the logical places of its blocks.
type memPlaced struct {
	rec segment.Record
	at  atoll.BlockNo
	of  []atoll.Location
}

type memEntry struct {
	s      *memStore
	recs   []segment.Record
	crcs   []uint32
	parts  [][]byte
	bufs   []*host.Buffer
	blocks int
	done   chan error
	seg    atoll.Ordinal
	header atoll.BlockNo
	logEnd int
}

func newMemStore(size int64, seed uint64) *memStore {
	id := atoll.MediumID(0x1122334455667788)
	return &memStore{
		info: catalog.Medium{ID: id, Size: size}, disk: &memDisk{id: id, segs: make(map[atoll.Ordinal]*memSegment), moved: make(map[atoll.Location]atoll.Location)},
		next: 1, seq: 1, segSize: 256, rng: rand.New(rand.NewPCG(seed, 7)), live: make(map[atoll.Ordinal]int), pins: make(map[uint64]int),
	}
}

// clone returns the store of a new medium that begins as a version.
func (s *memStore) clone(number uint64, id atoll.MediumID) *memStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.man.state.Find(number)
	c := newMemStore(p.Size, uint64(id))
	c.info.ID, c.disk.id = id, id
	c.info.Parent = &catalog.Parent{Medium: s.info.ID, Version: number, Base: s.next}
	c.info.Ancestors = append(slices.Clone(s.info.Ancestors), catalog.Ancestor{Medium: s.info.ID, Version: number, Base: s.next})
	c.disk.above = append(slices.Clone(s.disk.above), s.disk)
	c.disk.bases = append(slices.Clone(s.disk.bases), s.next)
	c.next, c.segSize, c.greedy = s.next, s.segSize, s.greedy
	c.saved.root = s.man.roots[number]
	c.man = c.saved
	s.pins[number]++
	return c
}

// crash returns the store as the next owner finds it: what was acknowledged,
// and some of what was not.
func (s *memStore) crash() *memStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &memStore{
		info: s.info, disk: s.disk, next: s.next, seq: s.seq, segSize: s.segSize, rng: s.rng, greedy: s.greedy,
		saved: s.saved, man: s.saved, live: make(map[atoll.Ordinal]int), dropped: s.dropped, moves: s.moves, pins: s.pins, last: s.saved.state.LastNumber,
	}
	for o, n := range s.saved.live {
		c.live[o] = n
	}
	s.disk.mu.Lock()
	for _, g := range s.disk.segs {
		g.sealed = true
	}
	s.disk.mu.Unlock()
	keep := s.acked
	if n := len(s.log) - s.acked; n > 0 {
		keep += s.rng.IntN(n + 1)
		for keep < len(s.log) && keep > s.acked && s.log[keep].Seq == s.log[keep-1].Seq { // a batch is atomic
			keep++
		}
	}
	c.log = slices.Clone(s.log[:keep])
	c.acked = keep
	s.fail = func(string) error { return atoll.ErrFenced }
	for _, e := range s.pending {
		e.finish(atoll.ErrFenced)
	}
	s.pending = nil
	return c
}

func (s *memStore) Info() catalog.Medium { s.mu.Lock(); defer s.mu.Unlock(); return s.info }
func (s *memStore) Valid() bool          { s.mu.Lock(); defer s.mu.Unlock(); return !s.invalid }
func (s *memStore) Root() []byte         { return s.man.root }

func (s *memStore) Update(_ context.Context, change func(*catalog.Medium)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.info)
	return nil
}

func (s *memStore) Replay(_ context.Context, fn func(medium.Record) error) error {
	for _, r := range s.log {
		if r.Seq < s.saved.mark.Seq {
			continue
		}
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) Mark() medium.Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mark()
}

func (s *memStore) mark() medium.Mark {
	m := medium.Mark{Seq: s.seq, Ordinal: s.next, Bulk: s.next}
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	if g := s.disk.segs[s.open[catalog.Hot]]; g != nil && !g.sealed {
		m.Ordinal, m.Block = s.open[catalog.Hot], atoll.BlockNo(len(g.data)/atoll.BlockSize)
	}
	if g := s.disk.segs[s.open[catalog.Bulk]]; g != nil && !g.sealed {
		m.Bulk = s.open[catalog.Bulk]
	}
	return m
}

func (s *memStore) MarkAt(r medium.Record) medium.Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return medium.Mark{Ordinal: r.Seg, Block: r.Batch, Seq: r.Seq, Bulk: s.mark().Bulk}
}

func (s *memStore) AppendMark(ctx context.Context, e Entry) (medium.Mark, error) {
	bulk := s.Mark().Bulk
	if err := s.failure("mark"); err != nil {
		return medium.Mark{}, err
	}
	if err := s.submit(catalog.Hot, e, true); err != nil {
		return medium.Mark{}, err
	}
	if err := e.Wait(ctx); err != nil {
		return medium.Mark{}, err
	}
	me := e.(*memEntry)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noCrash {
		return medium.Mark{Ordinal: me.seg, Block: me.header, Seq: s.seq, Bulk: bulk}, nil
	}
	m := medium.Mark{Ordinal: me.seg, Block: me.header, Seq: s.log[me.logEnd-1].Seq, Bulk: bulk}
	if s.fail != nil {
		return m, s.fail("marked")
	}
	return m, nil
}

func (s *memStore) failure(op string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		return nil
	}
	return s.fail(op)
}

// Commit fails with "checkpoint" or "commit" before anything happened, or with
// "committed" when it is durable and this owner does not get to know.
func (s *memStore) Commit(_ context.Context, c medium.Commit) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	op := "checkpoint"
	if c.Mark.Seq == 0 {
		op = "commit"
	}
	if s.fail != nil {
		if err := s.fail(op); err != nil {
			return err
		}
	}
	m := s.man.copy()
	if c.Mark.Seq != 0 {
		if c.Mark.Seq < m.mark.Seq {
			panic("the mark goes back")
		}
		m.mark, m.root = c.Mark, slices.Clone(c.Root)
	}
	for _, v := range c.Add {
		if m.state.Find(v.Number) != nil {
			return atoll.ErrExist
		}
		m.state.Versions = append(m.state.Versions, v.Version)
		slices.SortFunc(m.state.Versions, func(a, b medium.Version) int { return int(a.Number) - int(b.Number) })
		m.state.LastNumber = max(m.state.LastNumber, v.Number)
		m.roots[v.Number] = slices.Clone(v.RootBytes)
	}
	for _, n := range c.Remove {
		if m.state.Find(n) == nil {
			return atoll.ErrNotExist
		}
		if s.pins[n] > 0 {
			panic("a pinned version is removed")
		}
		dropVersion(&m.state, n)
		delete(m.roots, n)
	}
	if c.Change != nil {
		c.Change(&m.state)
	}
	return s.manifest(m, c.Mark.Seq != 0 || len(c.Add)+len(c.Remove) > 0)
}

func (m *memSaved) copy() memSaved {
	c := *m
	c.state.Versions, c.roots = slices.Clone(m.state.Versions), maps.Clone(m.roots)
	if c.roots == nil {
		c.roots = make(map[uint64][]byte)
	}
	return c
}

// manifest makes m what is so.
func (s *memStore) manifest(m memSaved, count bool) error {
	m.state.LastNumber = max(m.state.LastNumber, s.last)
	if count {
		m.live = make(map[atoll.Ordinal]int)
		for o, n := range s.live {
			if n > 0 {
				m.live[o] = n
			}
		}
	}
	s.saved = m
	if s.fail != nil {
		if err := s.fail("committed"); err != nil {
			return err
		}
	}
	s.man = m
	s.drop()
	return nil
}

// drop removes the segments that nothing uses.
func (s *memStore) drop() {
	d := s.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	dead := func(o atoll.Ordinal) bool { return s.man.live[o] == 0 && s.live[o] == 0 }
	holds := make(map[atoll.Ordinal]bool)
	for from, to := range d.moved {
		if dead(from.Ordinal()) {
			delete(d.moved, from)
		} else {
			holds[to.Ordinal()] = true
		}
	}
	for o, g := range d.segs {
		limit := s.man.mark.Ordinal
		if g.lane == catalog.Bulk {
			limit = s.man.mark.Bulk
		}
		if g.sealed && o < limit && dead(o) && !holds[o] {
			delete(d.segs, o)
			s.dropped++
		}
	}
}

func (s *memStore) Edit(_ context.Context, change func(*medium.State) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		if err := s.fail("edit"); err != nil {
			return err
		}
	}
	m := s.man.copy()
	if err := change(&m.state); err != nil {
		return err
	}
	return s.manifest(m, false)
}

func (s *memStore) State() medium.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.man.state
	st.Versions, st.Ancestors = slices.Clone(st.Versions), slices.Clone(s.info.Ancestors)
	return st
}

func (s *memStore) ReadRoot(_ context.Context, n uint64) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.man.roots[n]; r != nil {
		return r, nil
	}
	return nil, fmt.Errorf("root of version %d: %w", n, atoll.ErrNotExist)
}

func (s *memStore) NewVersionNumber() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, s.man.state.LastNumber) + 1
	return s.last
}

func (s *memStore) UseVersionNumber(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, n)
}

func (s *memStore) Pins(context.Context) (map[uint64]int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.pins), nil
}

func (s *memStore) Detach(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.info.Ancestors = nil
	s.disk.above, s.disk.bases = nil, nil
	return nil
}

func (s *memStore) Live(o atoll.Ordinal, delta int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o < s.info.Base() {
		panic("an ancestor's segment is counted")
	}
	if s.live[o] += delta; s.live[o] < 0 {
		panic(fmt.Sprintf("segment %d has %d live blocks", o, s.live[o]))
	}
}

func (s *memStore) LiveBlocks(o atoll.Ordinal) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	return s.live[o], s.disk.segs[o] != nil
}

func (s *memStore) LiveBytes() (sum int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.live {
		sum += int64(n) * atoll.BlockSize
	}
	return sum
}

func (s *memStore) Ancestor(o atoll.Ordinal) (atoll.MediumID, bool) {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	for i, base := range s.disk.bases {
		if o < base {
			return s.disk.above[i].id, true
		}
	}
	return s.disk.id, true
}

func (s *memStore) ReadSums(ctx context.Context, o atoll.Ordinal, b atoll.BlockNo, dst []byte, sums []uint32) error {
	err := s.Read(ctx, o, b, dst)
	for i := range sums {
		sums[i] = segment.CRC(dst[i*atoll.BlockSize:][:atoll.BlockSize])
	}
	return err
}

func (s *memStore) Read(_ context.Context, o atoll.Ordinal, b atoll.BlockNo, dst []byte) error {
	if err := s.failure("read"); err != nil {
		return err
	}
	return s.disk.read(o, b, dst)
}

func (d *memDisk) read(o atoll.Ordinal, b atoll.BlockNo, dst []byte) error {
	d.mu.Lock()
	for i, base := range d.bases {
		if o < base {
			up := d.above[i]
			d.mu.Unlock()
			return up.read(o, b, dst)
		}
	}
	defer d.mu.Unlock()
	for len(dst) > 0 {
		at := atoll.MakeLocation(o, b, 0)
		if to, ok := d.moved[at]; ok {
			at = to
		}
		g := d.segs[at.Ordinal()]
		if g == nil || g.gone || at.Block().Bytes()+atoll.BlockSize > int64(len(g.data)) {
			return fmt.Errorf("read %d:%d: %w", o, b, atoll.ErrNotExist)
		}
		copy(dst[:atoll.BlockSize], g.data[at.Block().Bytes():])
		dst, b = dst[atoll.BlockSize:], b+1
	}
	return nil
}

// Victims lists sealed segments with something dead in them, in random order.
func (s *memStore) Victims(most int) (list []medium.Victim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.greedy {
		return nil
	}
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	for o, g := range s.disk.segs {
		limit := s.man.mark.Ordinal
		if g.lane == catalog.Bulk {
			limit = s.man.mark.Bulk
		}
		if g.sealed && !g.gone && o < limit {
			list = append(list, medium.Victim{Ordinal: o, Lane: g.lane, Blocks: atoll.BlockNo(len(g.data) / atoll.BlockSize), Live: atoll.BlockNo(s.live[o])})
		}
	}
	return list[:min(most, len(list))]
}

func (s *memStore) Placed(_ context.Context, o atoll.Ordinal, fn func(medium.Placed) error) error {
	s.disk.mu.Lock()
	g := s.disk.segs[o]
	var list []medium.Placed
	none := g == nil || g.gone
	if !none {
		for _, r := range g.recs {
			for i := range r.of {
				p := medium.Placed{Record: r.rec, Skip: atoll.BlockNo(i), Count: 1, Ordinal: r.of[i].Ordinal(), Block: r.of[i].Block()}
				here := atoll.MakeLocation(o, r.at+atoll.BlockNo(i), 0)
				if r.of[i] != here && s.disk.moved[r.of[i]] != here {
					p.Ordinal, p.Block = o, here.Block()
				}
				if n := len(list); n > 0 && i > 0 && list[n-1].Ordinal == p.Ordinal && list[n-1].Block+list[n-1].Count == p.Block {
					list[n-1].Count++
				} else {
					list = append(list, p)
				}
			}
		}
	}
	s.disk.mu.Unlock()
	if none {
		return fmt.Errorf("segment %d: %w", o, atoll.ErrNotExist)
	}
	for _, p := range list {
		if err := fn(p); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) Move(_ context.Context, o atoll.Ordinal, live []medium.Run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		if err := s.fail("move"); err != nil {
			return err
		}
	}
	s.disk.mu.Lock()
	g := s.disk.segs[o]
	s.disk.mu.Unlock()
	if g == nil || g.gone {
		return fmt.Errorf("segment %d: %w", o, atoll.ErrNotExist)
	}
	moved := make(map[atoll.Location]atoll.Location)
	for _, r := range live {
		e := s.NewEntry().(*memEntry)
		buf := host.Alloc(int(r.Blocks) * atoll.BlockSize)
		if err := s.disk.read(r.Ordinal, r.Block, buf.Bytes()); err != nil && s.live[r.Ordinal] == 0 {
			buf.Release()
			return fmt.Errorf("move %+v: died meanwhile: %w", r, atoll.ErrInvalid)
		} else if err != nil {
			panic(fmt.Sprintf("move %+v of segment %d: %v", r, o, err))
		}
		e.Add(segment.Record{Kind: r.Kind, Blocks: uint16(r.Blocks), Key: r.Key, Aux: r.Aux}, buf, buf.Bytes())
		s.place(catalog.Bulk, e)
		e.drop()
		buf.Release()
		s.disk.mu.Lock()
		to := s.disk.segs[e.seg]
		rec := &to.recs[len(to.recs)-1]
		for i := range rec.of {
			rec.of[i] = atoll.MakeLocation(r.Ordinal, r.Block+atoll.BlockNo(i), 0)
			moved[rec.of[i]] = atoll.MakeLocation(e.seg, e.header+1+atoll.BlockNo(i), 0)
		}
		s.disk.mu.Unlock()
	}
	s.disk.mu.Lock()
	for from, to := range s.disk.moved {
		if to.Ordinal() == o {
			delete(s.disk.moved, from) // it stays only if it is among the runs
		}
	}
	maps.Copy(s.disk.moved, moved)
	g.gone, g.data, g.recs = true, nil, nil
	s.disk.mu.Unlock()
	s.moves++
	return s.manifest(s.man.copy(), false)
}

func (s *memStore) Room() medium.Room {
	s.mu.Lock()
	defer s.mu.Unlock()
	const total = 1 << 40
	return medium.Room{Total: total, Free: int64((0.95 - s.used) * total), Segment: int64(s.segSize) * atoll.BlockSize}
}

func (s *memStore) Reclaimable() int64 { return 0 }
func (s *memStore) Waiting() int64     { return 0 }

func (s *memStore) NewEntry() Entry { return &memEntry{s: s, done: make(chan error, 1)} }

func (s *memStore) Submit(_ context.Context, lane catalog.Lane, e Entry) error {
	return s.submit(lane, e, false)
}

// submit queues an entry, with reserve even when it is "full".
func (s *memStore) submit(lane catalog.Lane, entry Entry, reserve bool) error {
	e := entry.(*memEntry)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil && !reserve && lane == catalog.Hot {
		if err := s.fail("full"); err != nil {
			return err
		}
	}
	if s.fail != nil {
		if err := s.fail("submit"); err != nil {
			return err
		}
	}
	s.place(lane, e)
	if s.lazy {
		s.pending = append(s.pending, e)
		return nil
	}
	s.acked = e.logEnd
	var err error
	if s.fail != nil && len(e.recs) == 1 && e.recs[0].Kind == kindResize {
		err = s.fail("resize") // it is in the log all the same
	}
	e.finish(err)
	return nil
}

func (s *memStore) Append(ctx context.Context, lane catalog.Lane, e Entry) error {
	if err := s.Submit(ctx, lane, e); err != nil {
		return err
	}
	return e.Wait(ctx)
}

// place copies an entry into the open segment and the log.
func (s *memStore) place(lane catalog.Lane, e *memEntry) {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	g := s.disk.segs[s.open[lane]]
	if g == nil || g.sealed || len(g.data)/atoll.BlockSize+1+e.blocks > s.segSize {
		if g != nil {
			g.sealed = true
		}
		g = &memSegment{lane: lane, data: make([]byte, 0, max(s.segSize, 1+e.blocks)*atoll.BlockSize)}
		s.open[lane] = s.next
		s.disk.segs[s.next] = g
		s.next++
	}
	e.seg, e.header = s.open[lane], atoll.BlockNo(len(g.data)/atoll.BlockSize)
	g.data = g.data[:len(g.data)+atoll.BlockSize]
	for _, p := range e.parts {
		g.data = append(g.data, p...)
	}
	for i, r := range e.recs {
		if r.Blocks == 0 || s.noCrash {
			continue
		}
		p := memPlaced{rec: r, at: e.Block(i)}
		for b := range atoll.BlockNo(r.Blocks) {
			p.of = append(p.of, atoll.MakeLocation(e.seg, p.at+b, 0))
		}
		g.recs = append(g.recs, p)
	}
	if lane == catalog.Hot && !s.noCrash {
		n := 0
		for i, r := range e.recs {
			s.log = append(s.log, medium.Record{Record: r, Seq: s.seq, Seg: e.seg, Block: e.Block(i), Batch: e.header, CRCs: slices.Clone(e.crcs[n : n+int(r.Blocks)])})
			n += int(r.Blocks)
		}
		s.seq++
	}
	e.logEnd = len(s.log)
}

// ack acknowledges the oldest n entries that wait.
func (s *memStore) ack(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; n > 0 && len(s.pending) > 0; n-- {
		e := s.pending[0]
		s.pending = s.pending[1:]
		s.acked = max(s.acked, e.logEnd)
		e.finish(nil)
	}
}

func (s *memStore) waiting() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.pending) }

func (e *memEntry) Reset() {
	e.drop()
	e.recs, e.crcs, e.blocks = e.recs[:0], e.crcs[:0], 0
}

func (e *memEntry) drop() {
	for _, b := range e.bufs {
		b.Release()
	}
	e.bufs, e.parts = e.bufs[:0], e.parts[:0]
}

func (e *memEntry) Room(records, blocks int) bool {
	return segment.Fits(len(e.recs)+records, e.blocks+blocks)
}

func (e *memEntry) Add(rec segment.Record, buf *host.Buffer, data []byte) {
	if len(data) != int(rec.Blocks)*atoll.BlockSize {
		panic("payload and record do not agree")
	}
	e.recs = append(e.recs, rec)
	for i := 0; i < len(data); i += atoll.BlockSize {
		e.crcs = append(e.crcs, segment.CRC(data[i:i+atoll.BlockSize]))
	}
	if len(data) > 0 {
		e.bufs, e.parts = append(e.bufs, buf.Retain()), append(e.parts, data)
	}
	e.blocks += int(rec.Blocks)
	if !segment.Fits(len(e.recs), e.blocks) {
		panic("the entry is too large")
	}
}

func (e *memEntry) Records() int     { return len(e.recs) }
func (e *memEntry) Blocks() int      { return e.blocks }
func (e *memEntry) CRC(i int) uint32 { return e.crcs[i] }
func (e *memEntry) finish(err error) { e.drop(); e.done <- err }
func (e *memEntry) Wait(ctx context.Context) error {
	select {
	case err := <-e.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
func (e *memEntry) Seg() atoll.SegmentID { return atoll.SegmentID{Medium: e.s.info.ID, Ordinal: e.seg} }
func (e *memEntry) Block(i int) atoll.BlockNo {
	if e.recs[i].Blocks == 0 {
		return e.header
	}
	b := e.header + 1
	for _, r := range e.recs[:i] {
		b += atoll.BlockNo(r.Blocks)
	}
	return b
}

var _ Store = (*memStore)(nil)

func mustOpen(t testing.TB, s Store, o Options) *Volume {
	t.Helper()
	v, err := Open(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func no(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refuse ends the oldest entry that waits with an error.
func (s *memStore) refuse(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.pending[0]
	s.pending = s.pending[1:]
	e.finish(err)
}

// memView is a version of a memStore.
type memView struct {
	*memStore
	version medium.Version
}

func (s *memStore) view(number uint64) *memView {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pins[number]++
	return &memView{s, *s.man.state.Find(number)}
}

func (v *memView) Version() medium.Version { return v.version }
func (v *memView) Root() []byte            { return v.man.roots[v.version.Number] }
func (v *memView) close()                  { v.mu.Lock(); v.pins[v.version.Number]--; v.mu.Unlock() }
