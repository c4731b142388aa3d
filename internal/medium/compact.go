package medium

import (
	"cmp"
	"context"
	"fmt"
	"slices"

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
	seg    atoll.SegmentID          // coded segment that they went to, if coded is set
	coded  *entry
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

// Pressure returns how full the cluster is for this medium, 0 to 1: used over
// total bytes of the fullest node that its next segment needs if it gets those
// with the most room. At 0.95 (atoll.HighWaterPercent) no more segments are made;
// on a disk of few segments that is when there is no room for another one. 0 when
// no node has reported.
func (m *Medium) Pressure() float64 {
	var list []catalog.NodeReport
	seen := int64(0) // changes with every report
	for id, n := range m.opts.Catalog.State().Nodes {
		if n.State == catalog.NodeActive && n.Up && n.Report.Total > 0 {
			list = append(list, n.Report)
			seen += n.Report.At.UnixNano() + n.Report.Free*int64(id)
		}
	}
	if len(list) == 0 {
		return 0
	}
	policy := m.Info().Policy
	copies := min(len(list), max(policy.Replicas, policy.Data+policy.Parity, 1))
	grown := m.grown(seen) * int64(copies) / int64(len(list))
	full := make([]float64, len(list))
	for i, r := range list {
		r.Free -= grown
		full[i] = fullness(r)
	}
	slices.Sort(full)
	return full[copies-1]
}

// grown returns by how much more the medium's segments take, one copy, than when
// the reports of nodes were first seen that are in force: they come once a
// second, and much can be written in one.
func (m *Medium) grown(seen int64) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.taken.Load()
	if m.mu.reports != seen {
		m.mu.reports, m.mu.reported = seen, now
	}
	return now - m.mu.reported
}

// fullness returns how full a node is. It is full when another segment of the
// usual size would take it beyond the high-water mark.
func fullness(r catalog.NodeReport) float64 {
	const mark = atoll.HighWaterPercent / 100.
	used, last := float64(r.Total-r.Free), mark*float64(r.Total)-atoll.SegmentBlocks*atoll.BlockSize
	f := mark * used / max(last, 1)
	if r.Full {
		f = max(f, mark)
	}
	return min(max(f, 0), 1)
}

// victim returns where a segment is and its length if it can be compacted: sealed before
// the mark and not compacted yet.
func (m *Medium) victim(o atoll.Ordinal) (from body, length atoll.BlockNo, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.table.at(o)
	if s == nil {
		return from, 0, fmt.Errorf("compact segment %d of medium %v: %w", o, m.id, atoll.ErrNotExist)
	}
	st, lane, _ := s.get()
	switch {
	case st != stateLive:
		return from, 0, fmt.Errorf("compact segment %d of medium %v: it is in state %d: %w", o, m.id, st, atoll.ErrNotExist)
	case !m.before(&m.mu.man.Mark, lane, o):
		return from, 0, fmt.Errorf("compact segment %d of medium %v: it is newer than the mark: %w", o, m.id, atoll.ErrBusy)
	}
	return s.body(m.id, o), s.length, nil
}

// Placed calls fn for the records of kinds that lie in the bytes of segment o,
// which must be one that Victims may return, in the order of their places. A
// record of which pieces have different logical places is told in pieces. What
// was moved into o and has no place any more is told as if it were o's own, at a
// place that no index names. It reads batch headers only, or the index of a coded
// segment.
func (m *Medium) Placed(ctx context.Context, o atoll.Ordinal, fn func(Placed) error) error {
	if err := m.check(); err != nil {
		return err
	}
	from, length, err := m.victim(o)
	if err != nil {
		return err
	}
	back, seg := m.inverse(o), from.seg
	if from.shape.IsCoded() {
		return m.placedCoded(ctx, from, back, fn)
	}
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

// placedCoded is Placed for a coded segment.
func (m *Medium) placedCoded(ctx context.Context, from body, back []place, fn func(Placed) error) error {
	recs, at, err := m.readIndex(ctx, from)
	if err != nil {
		return fmt.Errorf("look at segment %v: %w", from.seg, err)
	}
	for _, rec := range recs {
		if err := eachPiece(from.seg.Ordinal, rec, at, back, fn); err != nil {
			return fmt.Errorf("look at segment %v: %w", from.seg, err)
		}
		at += atoll.BlockNo(rec.Blocks)
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
// return; after an error the blocks may or may not have moved. One Move at a
// time: others wait.
func (m *Medium) Move(ctx context.Context, o atoll.Ordinal, live []Run) error {
	if err := m.check(); err != nil {
		return err
	}
	if err := acquire(ctx, m.moves); err != nil {
		return fmt.Errorf("compact segment %d of medium %v: %w", o, m.id, err)
	}
	defer func() { <-m.moves }()
	c, err := m.copier(o, live)
	if err != nil {
		return err
	}
	m.setMoving(max(lowest(m.own.head(), catalog.Bulk), 1))
	defer m.setMoving(0)
	if err := c.copy(ctx); err != nil {
		return fmt.Errorf("compact segment %v: %w", c.from.seg, m.note(err))
	}
	from := []atoll.Ordinal{o}
	if err := m.writeManifest(ctx, &checkpoint{moved: &compaction{from: from, remaps: m.remapped(from, c.moves)}}); err != nil {
		return err
	}
	m.copied.Add(c.bytes)
	m.metrics.moved(c.bytes)
	m.log.Debug("segment compacted", "medium", m.id, "seg", c.from.seg, "len", c.length, "live", c.bytes/atoll.BlockSize)
	return nil
}

// copier plans the copying of what lives in a segment.
func (m *Medium) copier(o atoll.Ordinal, live []Run) (*copier, error) {
	from, length, err := m.victim(o)
	if err != nil {
		return nil, err
	}
	c := &copier{m: m, from: from, length: length, moves: map[atoll.Ordinal][]move{}}
	if err := c.plan(live); err != nil {
		return nil, fmt.Errorf("compact segment %v: %w", from.seg, err)
	}
	return c, nil
}

// setMoving says from which ordinal on bulk segments may hold copies that no
// manifest knows of yet.
func (m *Medium) setMoving(o atoll.Ordinal) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.moving = o
}

// copier copies what lives in one segment.
type copier struct {
	m      *Medium
	from   body
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
	if r.Ordinal == c.from.seg.Ordinal {
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
		if !ok || o != c.from.seg.Ordinal || at+n > c.length {
			return nil, fmt.Errorf("run %+v: block %d is not here: %w", r, b, atoll.ErrInvalid)
		}
		list, b, left = append(list, piece{at, n}), b+n, left-n
	}
	return list, nil
}

// maxCopies bounds the entries of a compaction that are being written at once.
const maxCopying = 4

// copy writes the runs to the bulk lane, and learns where they are.
func (c *copier) copy(ctx context.Context) error {
	type flight struct {
		e           *stream.Entry
		first, next int
	}
	var fly []flight
	land := func() error {
		f := fly[0]
		fly = fly[1:]
		if err := c.m.outcome(f.e.Wait(ctx)); err != nil {
			return err
		}
		for i, r := range c.runs[f.first:f.next] {
			c.moves[r.Ordinal] = append(c.moves[r.Ordinal], move{r.Block, r.Blocks, f.e.Seg().Ordinal, f.e.Block(i)})
			c.bytes += r.Blocks.Bytes()
		}
		return nil
	}
	for at := 0; at < len(c.runs); {
		e := new(stream.Entry)
		next, err := c.entry(ctx, e, at)
		if err == nil {
			err = c.m.submit(ctx, catalog.Bulk, e)
		}
		if err != nil {
			return err // what flies is left to the writer
		}
		fly = append(fly, flight{e, at, next})
		at = next
		if len(fly) == maxCopying {
			if err := land(); err != nil {
				return err
			}
		}
	}
	for len(fly) > 0 {
		if err := land(); err != nil {
			return err
		}
	}
	return nil
}

// entry fills an entry with the runs from number at on, as many as fit, and
// returns the number of the next.
func (c *copier) entry(ctx context.Context, e *stream.Entry, at int) (int, error) {
	next, blocks, most := at, 0, int(c.m.usual())/2 // what comes from a coded segment may be longer than a segment
	for next < len(c.runs) && segment.Fits(next-at+1, blocks+int(c.runs[next].Blocks)) &&
		(next == at || blocks+int(c.runs[next].Blocks) <= most) {
		blocks += int(c.runs[next].Blocks)
		next++
	}
	buf := host.Alloc(blocks * atoll.BlockSize)
	defer buf.Release()
	if err := c.read(ctx, slices.Concat(c.pieces[at:next]...), buf.Bytes()); err != nil {
		return 0, err
	}
	p := buf.Bytes()
	for _, r := range c.runs[at:next] {
		n := int(r.Blocks) * atoll.BlockSize
		e.Add(segment.Record{Kind: r.Kind, Blocks: uint16(r.Blocks), Key: r.Key, Aux: r.Aux}, buf, p[:n])
		p = p[n:]
	}
	return next, nil
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
			if err := c.from.read(ctx, c.m.opts.Nodes, first, dst[:used.Bytes()]); err != nil {
				return err
			}
			dst, i = dst[used.Bytes():], j
			continue
		}
		p := scratch.Bytes()[:(end - first).Bytes()]
		if err := c.from.read(ctx, c.m.opts.Nodes, first, p); err != nil {
			return err
		}
		for ; i < j; i++ {
			dst = dst[copy(dst, p[(pieces[i].at - first).Bytes():][:pieces[i].blocks.Bytes()]):]
		}
	}
	return nil
}

// remapped returns the new remaps of all segments that had blocks in those that
// were emptied. moves tells where the blocks went.
func (m *Medium) remapped(from []atoll.Ordinal, moves map[atoll.Ordinal][]move) map[atoll.Ordinal]*remap {
	m.mu.Lock()
	old := map[atoll.Ordinal]*remap{}
	for _, o := range from {
		old[o] = nil
		for q := range m.table.moved[o] {
			old[q] = m.table.at(q).remap.Load()
		}
	}
	m.mu.Unlock()
	list := map[atoll.Ordinal]*remap{}
	for q, r := range old {
		moves := moves[q]
		if r != nil {
			for _, v := range r.moves() {
				if !slices.Contains(from, v.Ordinal) {
					moves = append(moves, v)
				}
			}
		}
		list[q] = newRemap(m.id, q, moves)
	}
	return list
}
