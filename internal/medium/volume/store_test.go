package volume

import (
	"context"
	"fmt"
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
// live counts and reclaim, that can lose what it has not acknowledged.
type memStore struct {
	mu      sync.Mutex
	info    catalog.Medium
	segs    map[atoll.Ordinal]*memSegment
	open    [2]atoll.Ordinal
	next    atoll.Ordinal
	log     []medium.Record // hot lane, acknowledged or not
	acked   int             // records of log that are durable
	seq     uint64
	pending []*memEntry
	segSize int
	rng     *rand.Rand
	live    map[atoll.Ordinal]int // running
	saved   memSaved
	dropped int
	lazy    bool // acknowledge only when asked to
	fail    func(op string) error
	noCrash bool // keeps no log
	invalid bool
}

// memSaved is what a checkpoint makes durable.
type memSaved struct {
	root []byte
	mark medium.Mark
	live map[atoll.Ordinal]int
}

type memSegment struct {
	lane   catalog.Lane
	data   []byte
	sealed bool
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
	return &memStore{
		info: catalog.Medium{ID: 0x1122334455667788, Size: size}, segs: make(map[atoll.Ordinal]*memSegment),
		next: 1, seq: 1, segSize: 256, rng: rand.New(rand.NewPCG(seed, 7)), live: make(map[atoll.Ordinal]int),
	}
}

// crash returns the store as the next owner finds it: what was acknowledged,
// and some of what was not.
func (s *memStore) crash() *memStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &memStore{
		info: s.info, segs: s.segs, next: s.next, seq: s.seq, segSize: s.segSize, rng: s.rng,
		saved: s.saved, live: make(map[atoll.Ordinal]int), dropped: s.dropped,
	}
	for o, n := range s.saved.live {
		c.live[o] = n
	}
	for _, g := range s.segs {
		g.sealed = true
	}
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
func (s *memStore) Root() []byte         { return s.saved.root }

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
	return medium.Mark{Seq: s.seq, Ordinal: s.next}
}

func (s *memStore) Checkpoint(_ context.Context, mark medium.Mark, root []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		if err := s.fail("checkpoint"); err != nil {
			return err
		}
	}
	live := make(map[atoll.Ordinal]int)
	for o, n := range s.live {
		if n < 0 {
			panic(fmt.Sprintf("segment %d has %d live blocks", o, n))
		}
		if n > 0 {
			live[o] = n
		}
	}
	s.saved = memSaved{slices.Clone(root), mark, live}
	for o, g := range s.segs {
		if g.sealed && o < mark.Ordinal && live[o] == 0 {
			delete(s.segs, o)
			s.dropped++
		}
	}
	return nil
}

func (s *memStore) Live(o atoll.Ordinal, delta int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live[o] += delta
}

func (s *memStore) LiveBlocks(o atoll.Ordinal) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live[o], s.segs[o] != nil
}

func (s *memStore) Read(_ context.Context, o atoll.Ordinal, b atoll.BlockNo, dst []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		if err := s.fail("read"); err != nil {
			return err
		}
	}
	g := s.segs[o]
	if g == nil || b.Bytes()+int64(len(dst)) > int64(len(g.data)) {
		return fmt.Errorf("read %d:%d: %w", o, b, atoll.ErrNotExist)
	}
	copy(dst, g.data[b.Bytes():])
	return nil
}

func (s *memStore) NewEntry() Entry { return &memEntry{s: s, done: make(chan error, 1)} }

func (s *memStore) Submit(_ context.Context, lane catalog.Lane, entry Entry) error {
	e := entry.(*memEntry)
	s.mu.Lock()
	defer s.mu.Unlock()
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
	e.finish(nil)
	return nil
}

// place copies an entry into the open segment and the log.
func (s *memStore) place(lane catalog.Lane, e *memEntry) {
	g := s.segs[s.open[lane]]
	if g == nil || g.sealed || len(g.data)/atoll.BlockSize+1+e.blocks > s.segSize {
		if g != nil {
			g.sealed = true
		}
		g = &memSegment{lane: lane, data: make([]byte, 0, max(s.segSize, 1+e.blocks)*atoll.BlockSize)}
		s.open[lane] = s.next
		s.segs[s.next] = g
		s.next++
	}
	e.seg, e.header = s.open[lane], atoll.BlockNo(len(g.data)/atoll.BlockSize)
	g.data = g.data[:len(g.data)+atoll.BlockSize]
	for _, p := range e.parts {
		g.data = append(g.data, p...)
	}
	if lane == catalog.Hot && !s.noCrash {
		n := 0
		for i, r := range e.recs {
			s.log = append(s.log, medium.Record{Record: r, Seq: s.seq, Seg: e.seg, Block: e.Block(i), CRCs: slices.Clone(e.crcs[n : n+int(r.Blocks)])})
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
