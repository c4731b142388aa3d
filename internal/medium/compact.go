package medium

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// Victim is a segment that it pays to compact.
type Victim struct {
	Ordinal atoll.Ordinal
	Lane    catalog.Lane
	Blocks  atoll.BlockNo // length
	Live    atoll.BlockNo // about so many are to be copied
	Score   float64       // space gained, weighed by age, over the cost; higher is better
}

// Placed is a piece of a record as it lies in a segment's bytes. Its logical
// place is that by which indexes name it: another segment's, if it moved here.
type Placed struct {
	segment.Record               // as the kind wrote it; Blocks and Key of all of it
	Skip           atoll.BlockNo // blocks of the record that come before this piece
	Count          atoll.BlockNo // blocks of this piece
	Ordinal        atoll.Ordinal // logical place of its first block
	Block          atoll.BlockNo
}

// Run is some neighbouring blocks, at most atoll.MaxBatchBlocks, to be moved,
// by their logical place. Kind, Key and Aux go into the header of their new
// batch, for the next compaction: those of Placed, but Key (and Aux) made right
// by the kind if the run is only a part of the record.
type Run struct {
	Kind     segment.Kind
	Key, Aux uint64
	Ordinal  atoll.Ordinal
	Block    atoll.BlockNo
	Blocks   atoll.BlockNo
}

// compaction is what Move adds to a manifest.
type compaction struct {
	from   []atoll.Ordinal
	remaps map[atoll.Ordinal]*remap // of every segment that has or had blocks there
}

// Pays returns the part of a segment that must be dead for compaction to pay, at
// a pressure: half when there is room, less as it gets scarce.
func pays(pressure float64) float64 {
	const low, high = 0.5, 0.9
	switch {
	case pressure <= low:
		return 0.5
	case pressure >= high:
		return 0.05
	}
	return 0.5 - 0.45*(pressure-low)/(high-low)
}

// mergeShort is how many short segments there must be for it to pay to bring them
// together: they take little room, but each is a file on every node, an entry in
// the table, and a place to look at in replays.
const mergeShort = 32

// Victims returns the segments that are best compacted next, the best first:
// sealed before the mark, with enough dead in them, and more than the manifest
// costs that has to be written for it; and segments that were sealed long before
// they were full, when there are some to be brought together. What the kind holds
// is left out. Counts are those of the last manifest or the present ones,
// whichever is higher; of blocks that were moved they are estimates. The kind may
// find that less or more is live.
func (m *Medium) Victims(most int) []Victim {
	least, usual := pays(m.Pressure()), m.usual()
	m.mu.Lock()
	defer m.mu.Unlock()
	var list, short []Victim
	total := m.table.spread()
	m.table.each(func(o atoll.Ordinal, s *slot) {
		v, ok := m.judge(o, s, usual, total)
		switch {
		case !ok:
		case float64(v.Blocks-v.Live) >= least*float64(v.Blocks) && int64(v.Blocks-v.Live) > m.cost.Load():
			list = append(list, v)
		case v.Blocks <= usual/mergeShort:
			short = append(short, v)
		}
	})
	if len(short) >= mergeShort {
		list = append(list, short...)
	}
	slices.SortFunc(list, func(a, b Victim) int {
		return cmp.Or(cmp.Compare(b.Score, a.Score), cmp.Compare(a.Ordinal, b.Ordinal))
	})
	return list[:min(most, len(list))]
}

// judge returns a segment as a victim, and whether it can be one at all.
func (m *Medium) judge(o atoll.Ordinal, s *slot, usual atoll.BlockNo, total map[atoll.Ordinal]int32) (Victim, bool) {
	st, lane, _ := s.get()
	if st != stateLive || !m.before(&m.mu.man.Mark, lane, o) || s.hold.Load() != 0 || s.length == 0 {
		return Victim{}, false
	}
	live := min(m.table.likely(o, s, total), s.length)
	if live == 0 && s.own == 0 && len(m.table.moved[o]) == 0 {
		return Victim{}, false // the next manifest drops it as it is
	}
	free := 1 - float64(live)/float64(s.taken(usual))
	age := float64(m.mu.man.Next-min(o, m.mu.man.Next)) + 1
	return Victim{Ordinal: o, Lane: lane, Blocks: s.length, Live: live, Score: free * age / (2 - free)}, true
}

// usual returns the size of a segment of which it is not known.
func (m *Medium) usual() atoll.BlockNo { return atoll.BlockNo(m.policy().Segment) }

// victim returns a segment's id and length if it can be compacted: sealed before
// the mark and not compacted yet.
func (m *Medium) victim(o atoll.Ordinal) (seg atoll.SegmentID, length atoll.BlockNo, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.table.at(o)
	if s == nil {
		return seg, 0, fmt.Errorf("compact segment %d of medium %v: %w", o, m.id, atoll.ErrNotExist)
	}
	st, lane, copyset := s.get()
	switch {
	case st != stateLive:
		return seg, 0, fmt.Errorf("compact segment %d of medium %v: it is in state %d: %w", o, m.id, st, atoll.ErrNotExist)
	case !m.before(&m.mu.man.Mark, lane, o):
		return seg, 0, fmt.Errorf("compact segment %d of medium %v: it is newer than the mark: %w", o, m.id, atoll.ErrBusy)
	}
	return atoll.SegmentID{Medium: m.id, Ordinal: o, Copyset: copyset}, s.length, nil
}

// Placed calls fn for the records of kinds that lie in the bytes of segment o,
// which must be one that Victims may return, in the order of their places. A
// record of which pieces have different logical places is told in pieces. What
// was moved into o and has no place any more is told as if it were o's own, at a
// place that no index names. It reads batch headers only.
func (m *Medium) Placed(ctx context.Context, o atoll.Ordinal, fn func(Placed) error) error {
	if err := m.check(); err != nil {
		return err
	}
	seg, length, err := m.victim(o)
	if err != nil {
		return err
	}
	back := m.inverse(o)
	err = m.opts.Nodes.Headers(ctx, seg, 0, length, func(h segment.Header) error {
		if h.Next() > length {
			return fmt.Errorf("batch of segment %v ends at %d of %d: %w", seg, h.Next(), length, atoll.ErrCorrupt)
		}
		at := h.Offset() + 1
		for i := range h.Records() {
			rec := h.Record(i)
			if rec.Kind >= FirstKind && rec.Blocks > 0 {
				if err := eachPiece(o, rec, at, back, fn); err != nil {
					return err
				}
			}
			at += atoll.BlockNo(rec.Blocks)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("look at segment %v: %w", seg, err)
	}
	return nil
}

// eachPiece tells the pieces of a record at block at of segment o.
func eachPiece(o atoll.Ordinal, rec segment.Record, at atoll.BlockNo, back []place, fn func(Placed) error) error {
	for skip := atoll.BlockNo(0); skip < atoll.BlockNo(rec.Blocks); {
		p := Placed{Record: rec, Skip: skip, Count: atoll.BlockNo(rec.Blocks) - skip, Ordinal: o, Block: at + skip}
		i, _ := slices.BinarySearchFunc(back, p.Block, func(b place, at atoll.BlockNo) int {
			if b.at+b.blocks <= at {
				return -1
			}
			return 1
		})
		if i < len(back) && back[i].at <= p.Block {
			off := p.Block - back[i].at
			p.Ordinal, p.Block, p.Count = back[i].of, back[i].block+off, min(p.Count, back[i].blocks-off)
		} else if i < len(back) {
			p.Count = min(p.Count, back[i].at-p.Block)
		}
		skip += p.Count
		if err := fn(p); err != nil {
			return err
		}
	}
	return nil
}

// place tells which logical blocks some moved ones are.
type place struct {
	at, blocks atoll.BlockNo // in the segment that holds them
	of         atoll.Ordinal
	block      atoll.BlockNo
}

// inverse lists what was moved into a segment, in the order of its blocks.
func (m *Medium) inverse(o atoll.Ordinal) []place {
	m.mu.Lock()
	var from []*remap
	for q := range m.table.moved[o] {
		from = append(from, m.table.at(q).remap.Load())
	}
	m.mu.Unlock()
	var list []place
	for _, r := range from {
		for _, v := range r.moves() {
			if v.Ordinal == o {
				list = append(list, place{v.New, v.Blocks, r.Ordinal, v.Old})
			}
		}
	}
	slices.SortFunc(list, func(a, b place) int { return cmp.Compare(a.at, b.at) })
	return list
}

// Move empties segment o: it copies the given runs, which lie in its bytes, to
// the bulk lane, and writes a manifest after which they are read from there and
// o is only a name for them. What is not among the runs can be read no more: they
// must hold every block in o that the present state, the root of the last
// checkpoint or a version refers to. Checkpoints may run meanwhile: since o was
// sealed before the mark their roots name nothing in it that the root before did
// not name. The bytes of o leave the nodes after the grace time. Durable on
// return; after an error the blocks may or may not have moved. A few Moves copy
// at once, others wait; their manifests are written one after the other.
func (m *Medium) Move(ctx context.Context, o atoll.Ordinal, live []Run) error {
	if err := m.check(); err != nil {
		return err
	}
	if err := acquire(ctx, m.copies); err != nil {
		return fmt.Errorf("compact segment %d of medium %v: %w", o, m.id, err)
	}
	defer func() { <-m.copies }()
	seg, length, err := m.victim(o)
	if err != nil {
		return err
	}
	defer m.beginMove()()
	c := copier{m: m, from: seg, length: length, moves: map[atoll.Ordinal][]move{}}
	if err := c.plan(live); err != nil {
		return fmt.Errorf("compact segment %v: %w", seg, err)
	}
	if err := c.copy(ctx); err != nil {
		return fmt.Errorf("compact segment %v: %w", seg, m.note(err))
	}
	if err := m.commitMove(ctx, &c); err != nil {
		return err
	}
	m.copied.Add(c.bytes)
	m.metrics.moved(c.bytes)
	m.log.Debug("segment compacted", "medium", m.id, "seg", seg, "len", length, "live", c.bytes/atoll.BlockSize)
	return nil
}

// copied is a compaction that has copied and waits for a manifest.
type copied struct {
	c    *copier
	done chan struct{} // closed when err tells the outcome
	err  error
}

func (p *copied) end(err error) {
	p.err = err
	close(p.done)
}

// commitMove writes the manifest after which what was copied is read where it is
// now, and takes all that wait for one with it.
func (m *Medium) commitMove(ctx context.Context, c *copier) error {
	p := &copied{c: c, done: make(chan struct{})}
	m.mu.Lock()
	m.mu.copied = append(m.mu.copied, p)
	m.mu.Unlock()
	select {
	case m.moves <- struct{}{}:
		defer func() { <-m.moves }()
	case <-p.done:
		return p.err
	case <-ctx.Done():
		m.mu.Lock()
		m.mu.copied = slices.DeleteFunc(m.mu.copied, func(q *copied) bool { return q == p })
		m.mu.Unlock()
		return fmt.Errorf("compact segment %v: %w: %w", c.from, atoll.ErrTimeout, ctx.Err())
	}
	m.mu.Lock()
	list := m.mu.copied
	m.mu.copied = nil
	m.mu.Unlock()
	if !slices.Contains(list, p) { // whoever had the turn before took it along
		<-p.done
		return p.err
	}
	var from []atoll.Ordinal
	list = slices.DeleteFunc(list, func(q *copied) bool {
		o := q.c.from.Ordinal
		_, _, err := m.victim(o)
		if err == nil && slices.Contains(from, o) {
			err = fmt.Errorf("compact segment %v twice: %w", q.c.from, atoll.ErrNotExist)
		}
		if err != nil { // someone else moved it meanwhile
			q.end(err)
			return true
		}
		from = append(from, o)
		return false
	})
	if len(list) == 0 {
		return p.err
	}
	err := m.writeManifest(ctx, &checkpoint{moved: &compaction{from, m.remaps(list)}})
	for _, q := range list {
		q.end(err)
	}
	return p.err
}

// beginMove notes from which ordinal on bulk segments may hold copies that no
// manifest knows of yet, until the function is called that it returns.
func (m *Medium) beginMove() (end func()) {
	from := max(lowest(m.own.head(), catalog.Bulk), 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.moving = append(m.mu.moving, from)
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		i := slices.Index(m.mu.moving, from)
		m.mu.moving = slices.Delete(m.mu.moving, i, i+1)
	}
}

// copier copies what lives in one segment.
type copier struct {
	m      *Medium
	from   atoll.SegmentID
	length atoll.BlockNo
	runs   []Run
	pieces [][]piece // of each run
	moves  map[atoll.Ordinal][]move
	bytes  int64
}

// piece is where some blocks of a run lie in the segment.
type piece struct{ at, blocks atoll.BlockNo }

// plan finds the runs in the segment.
func (c *copier) plan(live []Run) error {
	c.runs = slices.Clone(live)
	slices.SortFunc(c.runs, func(a, b Run) int {
		return cmp.Or(cmp.Compare(a.Ordinal, b.Ordinal), cmp.Compare(a.Block, b.Block))
	})
	for i, r := range c.runs {
		if r.Blocks == 0 || r.Blocks > atoll.MaxBatchBlocks || r.Kind < FirstKind {
			return fmt.Errorf("run %+v: %w", r, atoll.ErrInvalid)
		}
		if i > 0 && c.runs[i-1].Ordinal == r.Ordinal && c.runs[i-1].Block+c.runs[i-1].Blocks > r.Block {
			return fmt.Errorf("runs %+v and %+v overlap: %w", c.runs[i-1], r, atoll.ErrInvalid)
		}
		pieces, err := c.find(r)
		if err != nil {
			return err
		}
		c.pieces = append(c.pieces, pieces)
	}
	return nil
}

// find returns where in the segment a run lies.
func (c *copier) find(r Run) (list []piece, err error) {
	if r.Ordinal == c.from.Ordinal {
		if r.Block+r.Blocks > c.length {
			return nil, fmt.Errorf("run %+v in a segment of %d blocks: %w", r, c.length, atoll.ErrInvalid)
		}
		return []piece{{r.Block, r.Blocks}}, nil
	}
	s := c.m.table.at(r.Ordinal)
	if s == nil || s.remap.Load() == nil {
		return nil, fmt.Errorf("run %+v did not move here: %w", r, atoll.ErrInvalid)
	}
	for b, left := r.Block, r.Blocks; left > 0; {
		o, at, n, ok := s.remap.Load().find(b)
		n = min(n, left)
		if !ok || o != c.from.Ordinal || at+n > c.length {
			return nil, fmt.Errorf("run %+v: block %d is not here: %w", r, b, atoll.ErrInvalid)
		}
		list, b, left = append(list, piece{at, n}), b+n, left-n
	}
	return list, nil
}

// maxMoves bounds the compactions that run at once.
const maxMoves = 2

// maxCopying bounds the entries of a compaction that are read and written at
// once: some more than a lane has on its way, so that it need not wait for reads.
const maxCopying = 8

// copy writes the runs to the bulk lane, and learns where they are.
func (c *copier) copy(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxCopying)
	var mu sync.Mutex // guards moves and bytes
	for at := 0; at < len(c.runs); {
		first, next := at, c.fit(at)
		at = next
		g.Go(func() error {
			e := new(stream.Entry)
			if err := c.entry(ctx, e, first, next); err != nil {
				return err
			}
			if err := c.m.submit(ctx, catalog.Bulk, e); err != nil {
				return err
			}
			if err := c.m.outcome(e.Wait(ctx)); err != nil {
				return err // what flies is left to the writer
			}
			mu.Lock()
			defer mu.Unlock()
			for i, r := range c.runs[first:next] {
				c.moves[r.Ordinal] = append(c.moves[r.Ordinal], move{r.Block, r.Blocks, e.Seg().Ordinal, e.Block(i)})
				c.bytes += r.Blocks.Bytes()
			}
			return nil
		})
	}
	return g.Wait()
}

// fit returns the number of the run behind those from number at on that go into
// one entry.
func (c *copier) fit(at int) int {
	next, blocks := at, 0
	for next < len(c.runs) && segment.Fits(next-at+1, blocks+int(c.runs[next].Blocks)) {
		blocks += int(c.runs[next].Blocks)
		next++
	}
	return next
}

// entry fills an entry with the runs from number at to the one before next.
func (c *copier) entry(ctx context.Context, e *stream.Entry, at, next int) error {
	blocks := 0
	for _, r := range c.runs[at:next] {
		blocks += int(r.Blocks)
	}
	buf := host.Alloc(blocks * atoll.BlockSize)
	defer buf.Release()
	if err := c.read(ctx, slices.Concat(c.pieces[at:next]...), buf.Bytes()); err != nil {
		return err
	}
	p := buf.Bytes()
	for _, r := range c.runs[at:next] {
		n := int(r.Blocks) * atoll.BlockSize
		e.Add(segment.Record{Kind: r.Kind, Blocks: uint16(r.Blocks), Key: r.Key, Aux: r.Aux}, buf, p[:n])
		p = p[n:]
	}
	return nil
}

// read fills dst with pieces of the segment. Those that lie close together are
// read at once, with what is between them.
func (c *copier) read(ctx context.Context, pieces []piece, dst []byte) error {
	const span = 256
	scratch := host.Alloc(span * atoll.BlockSize)
	defer scratch.Release()
	for i := 0; i < len(pieces); {
		first, j, used := pieces[i].at, i+1, pieces[i].blocks
		end := first + used
		for j < len(pieces) && pieces[j].at >= end && pieces[j].at+pieces[j].blocks-first <= span &&
			pieces[j].at-end <= 2*used {
			end, used, j = pieces[j].at+pieces[j].blocks, used+pieces[j].blocks, j+1
		}
		if used == end-first {
			if err := c.m.opts.Nodes.Read(ctx, c.from, first, dst[:used.Bytes()]); err != nil {
				return err
			}
			dst, i = dst[used.Bytes():], j
			continue
		}
		p := scratch.Bytes()[:(end - first).Bytes()]
		if err := c.m.opts.Nodes.Read(ctx, c.from, first, p); err != nil {
			return err
		}
		for ; i < j; i++ {
			dst = dst[copy(dst, p[(pieces[i].at - first).Bytes():][:pieces[i].blocks.Bytes()]):]
		}
	}
	return nil
}

// remaps returns the new remaps of all segments that had blocks in those that
// were emptied.
func (m *Medium) remaps(list []*copied) map[atoll.Ordinal]*remap {
	old := map[atoll.Ordinal]*remap{}
	emptied := map[atoll.Ordinal]bool{}
	m.mu.Lock()
	for _, p := range list {
		o := p.c.from.Ordinal
		old[o], emptied[o] = nil, true
		for q := range m.table.moved[o] {
			old[q] = m.table.at(q).remap.Load()
		}
	}
	m.mu.Unlock()
	made := map[atoll.Ordinal]*remap{}
	for q, r := range old {
		var moves []move
		for _, p := range list {
			moves = append(moves, p.c.moves[q]...)
		}
		if r != nil {
			for _, v := range r.moves() {
				if !emptied[v.Ordinal] {
					moves = append(moves, v)
				}
			}
		}
		made[q] = newRemap(m.id, q, moves)
	}
	return made
}
