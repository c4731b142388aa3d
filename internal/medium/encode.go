package medium

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// A coded segment begins with an index of what lies in it, since its shards have
// no headers that tell. The records of the index fill the blocks behind it one
// after the other, in order; the rest is zeros:
//
//	 0  4  magic "ATMX"   4  1  version (1)   5  3  0
//	 8  4  checksum      12  4  length
//	16  8  medium        24  4  ordinal of the coded segment
//	28  4  number of records
//	32     records, 20 bytes each:
//
//	 0  1  kind   1  1  0   2  2  blocks   4  8  key   12  8  auxiliary value
const (
	magicIndex   = 0x584d5441 // "ATMX"
	indexVersion = 1
	indexFixed   = 32
	indexRecord  = 20
)

// encodeIndex returns the index of a coded segment in whole blocks.
func encodeIndex(m atoll.MediumID, o atoll.Ordinal, runs []Run) []byte {
	p := frame(magicIndex, indexVersion, indexFixed+indexRecord*len(runs))
	le.PutUint64(p[16:], uint64(m))
	le.PutUint32(p[24:], uint32(o))
	le.PutUint32(p[28:], uint32(len(runs)))
	q := p[indexFixed:]
	for _, r := range runs {
		q[0] = byte(r.Kind)
		le.PutUint16(q[2:], uint16(r.Blocks))
		le.PutUint64(q[4:], r.Key)
		le.PutUint64(q[12:], r.Aux)
		q = q[indexRecord:]
	}
	return finish(p)
}

// indexBlocks returns the size of an index of n records.
func indexBlocks(n int) atoll.BlockNo {
	return atoll.BlockNo((indexFixed + indexRecord*n + atoll.BlockSize - 1) / atoll.BlockSize)
}

// parseIndex decodes an index.
func parseIndex(p []byte) (m atoll.MediumID, o atoll.Ordinal, recs []segment.Record, err error) {
	if p, err = unframe("index of a coded segment", p, magicIndex, indexVersion, indexFixed); err != nil {
		return 0, 0, nil, err
	}
	m, o = atoll.MediumID(le.Uint64(p[16:])), atoll.Ordinal(le.Uint32(p[24:]))
	n := int(le.Uint32(p[28:]))
	if n > atoll.MaxSegmentBlocks || len(p) != indexFixed+indexRecord*n {
		return 0, 0, nil, fmt.Errorf("parse index of coded segment %d: %d records in %d bytes: %w", o, n, len(p), atoll.ErrCorrupt)
	}
	recs = make([]segment.Record, n)
	for i := range recs {
		q := p[indexFixed+indexRecord*i:]
		recs[i] = segment.Record{Kind: segment.Kind(q[0]), Blocks: le.Uint16(q[2:]), Key: le.Uint64(q[4:]), Aux: le.Uint64(q[12:])}
		if recs[i].Kind < FirstKind || recs[i].Blocks == 0 || recs[i].Blocks > atoll.MaxBatchBlocks {
			return 0, 0, nil, fmt.Errorf("parse index of coded segment %d: record %d makes no sense: %w", o, i, atoll.ErrCorrupt)
		}
	}
	return m, o, recs, nil
}

// readIndex reads what lies in a coded segment and where it begins.
func (m *Medium) readIndex(ctx context.Context, b body) (recs []segment.Record, at atoll.BlockNo, err error) {
	p := make([]byte, atoll.BlockSize)
	if err := b.read(ctx, m.opts.Nodes, 0, p); err != nil {
		return nil, 0, err
	}
	n := (int64(le.Uint32(p[12:])) + atoll.BlockSize - 1) / atoll.BlockSize
	if n < 1 || n > int64(b.shape.Blocks()) {
		return nil, 0, fmt.Errorf("index of segment %v of %d blocks: %w", b.seg, n, atoll.ErrCorrupt)
	}
	p = append(p, make([]byte, (n-1)*atoll.BlockSize)...)
	if n > 1 {
		if err := b.read(ctx, m.opts.Nodes, 1, p[atoll.BlockSize:]); err != nil {
			return nil, 0, err
		}
	}
	id, o, recs, err := parseIndex(p)
	if err != nil {
		return nil, 0, err
	}
	total := atoll.BlockNo(n)
	for i := range recs {
		total += atoll.BlockNo(recs[i].Blocks)
	}
	if id != m.id || o != b.seg.Ordinal || total > b.shape.Blocks() {
		return nil, 0, fmt.Errorf("index of segment %v: it is of %v-%d, with %d blocks: %w", b.seg, id, o, total, atoll.ErrCorrupt)
	}
	return recs, atoll.BlockNo(n), nil
}

// Cargo is what lives in a segment that is to be encoded, as for Move.
type Cargo struct {
	Ordinal atoll.Ordinal
	Live    []Run
}

// codeRoom returns how many blocks a coded segment of the policy's code is to
// hold: shards of the usual size of a segment.
func (m *Medium) codeRoom() atoll.BlockNo {
	p := m.policy()
	size := atoll.BlockNo(p.Segment)
	shard := size - segment.FooterBlocks(int(size/segment.ShardBatch)+1, int(size))
	shard -= shard/(segment.ShardBatch+1) + 1
	return min(atoll.BlockNo(p.Data)*shard, atoll.MaxSegmentBlocks)
}

// Encode empties segments as Move does, but copies what lives in them into one
// new segment that is coded as the policy says. It takes as many of them as fit,
// the first at least, and returns how many. The coded segment counts from the
// moment on in which a manifest has it and the places of its blocks, and that is
// written when every shard is on stable storage and was read back; before, a
// crash leaves only an unsealed segment that the next owner drops. The bytes of
// the segments leave the nodes after the grace time. ErrUnavailable when there
// are too few healthy nodes, ErrInvalid when the policy has no code.
func (m *Medium) Encode(ctx context.Context, cargo []Cargo) (int, error) {
	if err := m.check(); err != nil {
		return 0, err
	}
	if !m.Info().Policy.IsCoded() || len(cargo) == 0 {
		return 0, fmt.Errorf("encode %d segments of medium %v: %w", len(cargo), m.id, atoll.ErrInvalid)
	}
	if err := acquire(ctx, m.encodes); err != nil {
		return 0, fmt.Errorf("encode segments of medium %v: %w", m.id, err)
	}
	defer func() { <-m.encodes }()
	e := encoder{m: m, code: m.Info().Policy.Code()}
	if err := e.load(cargo); err != nil {
		return 0, err
	}
	if err := e.run(ctx); err != nil {
		return 0, fmt.Errorf("encode segments %v of medium %v: %w", e.from(), m.id, m.note(err))
	}
	m.copied.Add(e.bytes())
	m.metrics.moved(e.bytes())
	m.log.Info("segments encoded", "medium", m.id, "seg", e.seg, "from", e.from(), "code", e.code, "len", e.bytes())
	return len(e.cargo), nil
}

// encoder makes one coded segment.
type encoder struct {
	m      *Medium
	code   catalog.Code
	cargo  []*copier
	runs   []Run // of all cargo, in the order of the coded segment
	pieces []cargoPiece
	index  []byte
	total  atoll.BlockNo // blocks of the index and the runs
	seg    atoll.SegmentID
	shape  segment.Shape
}

// cargoPiece is where some blocks of the coded segment come from.
type cargoPiece struct {
	start atoll.BlockNo // in the coded segment, without the index
	cargo int
	piece
}

func (e *encoder) from() (list []atoll.Ordinal) {
	for _, c := range e.cargo {
		list = append(list, c.from.seg.Ordinal)
	}
	return list
}

func (e *encoder) bytes() int64 { return e.total.Bytes() }

// load plans as much cargo as fits.
func (e *encoder) load(cargo []Cargo) error {
	room := e.m.codeRoom()
	blocks := atoll.BlockNo(0)
	for i, one := range cargo {
		c, err := e.m.copier(one.Ordinal, one.Live)
		if err != nil {
			if i > 0 && errors.Is(err, atoll.ErrNotExist) {
				continue // dropped meanwhile
			}
			return err
		}
		sum := atoll.BlockNo(0)
		for _, r := range c.runs {
			sum += r.Blocks
		}
		if i > 0 && blocks+sum+indexBlocks(len(e.runs)+len(c.runs)) > room {
			break
		}
		at := blocks
		for _, list := range c.pieces {
			for _, p := range list {
				e.pieces = append(e.pieces, cargoPiece{at, len(e.cargo), p})
				at += p.blocks
			}
		}
		blocks, e.cargo, e.runs = blocks+sum, append(e.cargo, c), append(e.runs, c.runs...)
	}
	e.total = blocks + indexBlocks(len(e.runs))
	e.shape = segment.ShapeFor(e.code.Data, e.code.Parity, e.total)
	return e.shape.Check()
}

func (e *encoder) run(ctx context.Context) error {
	m := e.m
	if len(e.runs) == 0 { // nothing lives: they only become names
		return e.commit(ctx)
	}
	set, err := m.opts.Nodes.PickCoded(ctx, e.code.Data, e.code.Parity)
	if err != nil {
		return err
	}
	if e.seg, err = m.registerShards(ctx, set.ID, e.shape.Blocks()); err != nil {
		return err
	}
	e.index = encodeIndex(m.id, e.seg.Ordinal, e.runs)
	err = m.opts.Nodes.Encode(ctx, stream.Encoding{Seg: e.seg, Epoch: m.epoch, Shape: e.shape, Read: e.read})
	if err == nil {
		err = e.commit(ctx)
	}
	if err != nil {
		m.abandonShards(context.WithoutCancel(ctx), e.seg, e.code, e.shape)
	}
	return err
}

// commit writes the manifest after which everything is read in the coded segment,
// unless another compaction has moved some of the cargo meanwhile.
func (e *encoder) commit(ctx context.Context) error {
	m := e.m
	if err := acquire(ctx, m.moves); err != nil {
		return err
	}
	defer func() { <-m.moves }()
	for _, o := range e.from() {
		if _, _, err := m.victim(o); err != nil {
			return err
		}
	}
	moved := &compaction{from: e.from(), remaps: e.remaps()}
	if !e.seg.IsZero() {
		moved.seg = e.seg
		moved.coded = &entry{State: stateLive, Lane: catalog.Shards, Code: e.code, Copyset: e.seg.Copyset, Length: e.shape.Blocks(), Size: e.shape.Blocks()}
	}
	return m.writeManifest(ctx, &checkpoint{moved: moved})
}

// remaps returns the new remaps of all segments that had blocks in the cargo.
func (e *encoder) remaps() map[atoll.Ordinal]*remap {
	moves := map[atoll.Ordinal][]move{}
	at := indexBlocks(len(e.runs))
	for _, r := range e.runs {
		moves[r.Ordinal] = append(moves[r.Ordinal], move{r.Block, r.Blocks, e.seg.Ordinal, at})
		at += r.Blocks
	}
	return e.m.remapped(e.from(), moves)
}

// read fills dst with blocks of the coded segment.
func (e *encoder) read(ctx context.Context, b atoll.BlockNo, dst []byte) error {
	if head := atoll.BlockNo(len(e.index) / atoll.BlockSize); b < head {
		n := copy(dst, e.index[b.Bytes():])
		dst, b = dst[n:], head
	}
	if len(dst) == 0 {
		return nil
	}
	b -= atoll.BlockNo(len(e.index) / atoll.BlockSize)
	end := b + atoll.BlockNo(len(dst)/atoll.BlockSize)
	i := sort.Search(len(e.pieces), func(i int) bool { return e.pieces[i].start+e.pieces[i].blocks > b })
	for i < len(e.pieces) && b < end {
		var list []piece
		from, at := e.pieces[i].cargo, b
		for ; i < len(e.pieces) && e.pieces[i].cargo == from && at < end; i++ {
			p := e.pieces[i]
			skip := at - p.start
			n := min(p.blocks-skip, end-at)
			list = append(list, piece{p.at + skip, n})
			at += n
		}
		n := (at - b).Bytes()
		if err := e.cargo[from].read(ctx, list, dst[:n]); err != nil {
			return err
		}
		dst, b = dst[n:], at
	}
	clear(dst)
	return nil
}

// registerShards gives a coded segment its name (M1). One that an earlier call
// registered without hearing of it is given up: there is one at a time.
func (m *Medium) registerShards(ctx context.Context, copyset atoll.CopysetID, size atoll.BlockNo) (seg atoll.SegmentID, err error) {
	err = m.own.change(ctx, func(h catalog.Head) (_ catalog.Head, err error) {
		for _, u := range h.Unsealed {
			if u.Lane == catalog.Shards {
				if h, err = headAbandon(h, u.Seg); err != nil {
					return h, err
				}
			}
		}
		h, seg, err = headRegister(h, catalog.Shards, copyset, size)
		return h, err
	})
	if err != nil {
		return atoll.SegmentID{}, err
	}
	m.taken.Add(size.Bytes())
	m.settle(seg, entry{State: stateOpen, Lane: catalog.Shards, Copyset: copyset, Size: size})
	return seg, nil
}

// abandonShards gives up a coded segment of which no manifest in force tells. If
// the head does not list it any more, a manifest whose answer was lost may have
// told of it: the next one drops it then.
func (m *Medium) abandonShards(ctx context.Context, seg atoll.SegmentID, code catalog.Code, shape segment.Shape) {
	err := m.own.change(ctx, func(h catalog.Head) (catalog.Head, error) {
		if unsealedAt(h, seg) < 0 {
			return h, nil
		}
		return headAbandon(h, seg)
	})
	if err != nil {
		m.log.Warn("coded segment not given up yet", "medium", m.id, "seg", seg, "err", err)
		return // whoever registers the next one does it, or the next owner
	}
	if slices.Contains(m.own.head().Dropped, seg) {
		m.settle(seg, entry{State: stateDropped, Lane: catalog.Shards, Copyset: seg.Copyset})
	} else {
		m.settle(seg, entry{State: stateLive, Lane: catalog.Shards, Code: code, Copyset: seg.Copyset, Length: shape.Blocks()})
	}
	m.kick(m.keeps)
}

// headEncoded takes a coded segment that a manifest tells of from the unsealed.
// ErrNotExist when it is not there: it was given up.
func headEncoded(h catalog.Head, seg atoll.SegmentID) (catalog.Head, error) {
	i := unsealedAt(h, seg)
	if i < 0 {
		return h, fmt.Errorf("record coded segment %v: not among the unsealed of the head: %w", seg, atoll.ErrNotExist)
	}
	h.Unsealed = slices.Delete(slices.Clone(h.Unsealed), i, i+1)
	return h, nil
}

// recoverUnsealed is stream.Recover for what a head lists, of which coded
// segments hold nothing.
func recoverUnsealed(ctx context.Context, nodes *stream.Nodes, h catalog.Head) ([]catalog.Sealed, error) {
	var logs []catalog.Unsealed
	var coded []catalog.Sealed
	for _, u := range h.Unsealed {
		if u.Lane == catalog.Shards {
			coded = append(coded, catalog.Sealed{Seg: u.Seg, Lane: u.Lane})
		} else {
			logs = append(logs, u)
		}
	}
	sealed, err := stream.Recover(ctx, nodes, logs, h.Epoch)
	return append(sealed, coded...), err
}

// Uncoded returns segments that are best encoded next, together, the oldest
// first, as many as fill one coded segment: those that are not kept as the policy
// says, were sealed before the mark and are not held by the kind. Some part of
// everything may stay as it is, so that not every little one becomes a coded
// segment of its own; it returns nothing then, and nothing when the policy has no
// code. late is how many bytes are in segments that only a newer mark lets encode,
// if that is worth a checkpoint.
func (m *Medium) Uncoded() (list []Victim, late int64) {
	u := m.uncoded()
	if !u.full && u.sum < u.least {
		u.list = nil
	}
	if u.sum+u.late <= u.least {
		u.late = 0
	}
	return u.list, u.late.Bytes()
}

// Recoding reports whether there are segments, or will be as soon as they are
// sealed, that are to be brought into the form that the policy asks for.
func (m *Medium) Recoding() bool {
	if bad := len(m.Miscoded(1)) > 0; bad || !m.Info().Policy.IsCoded() {
		return bad
	}
	u := m.uncoded()
	for i := range m.lanes {
		if w := m.lanes[i].w.Load(); w != nil {
			if t, ok := w.Tail(); ok && unsealedOrdinal(m.own.head(), t.Ordinal) {
				u.late += t.Block
			}
		}
	}
	return u.full || u.sum+u.late > u.least
}

func unsealedOrdinal(h catalog.Head, o atoll.Ordinal) bool {
	return slices.ContainsFunc(h.Unsealed, func(u catalog.Unsealed) bool { return u.Seg.Ordinal == o })
}

// uncoded is what there is to encode.
type uncoded struct {
	list  []Victim
	sum   atoll.BlockNo // that live in these
	full  bool          // there are more than fit in one coded segment
	late  atoll.BlockNo // in segments that were sealed after the mark
	least atoll.BlockNo // from which on it is worth it
}

func (m *Medium) uncoded() (u uncoded) {
	code := m.Info().Policy.Code()
	if code.Data == 0 {
		return u
	}
	room := m.codeRoom()
	m.mu.Lock()
	defer m.mu.Unlock()
	all := atoll.BlockNo(0)
	total, usual := m.table.spread(), m.usual()
	m.table.each(func(o atoll.Ordinal, s *slot) {
		st, lane, _ := s.get()
		if st != stateLive {
			return
		}
		live := min(m.table.likely(o, s, total), s.length)
		all += live
		switch {
		case s.code() == code:
		case !m.before(&m.mu.man.Mark, lane, o):
			u.late += s.length
		case live == 0 || u.full:
		default:
			if v, ok := m.judge(o, s, usual, total); !ok {
			} else if u.full = len(u.list) > 0 && u.sum+live > room; !u.full {
				u.sum, u.list = u.sum+live, append(u.list, v)
			}
		}
	})
	u.least = min(max(all/uncodedShare, usual/uncodedShare), room/2)
	return u
}

// uncodedShare is the part of a medium that may stay uncoded.
const uncodedShare = 64

// Miscoded returns segments that are coded although the policy has no code, or
// another one, the oldest first: they are to be moved.
func (m *Medium) Miscoded(most int) (list []Victim) {
	policy := m.Info().Policy
	m.mu.Lock()
	defer m.mu.Unlock()
	total, usual := m.table.spread(), m.usual()
	m.table.each(func(o atoll.Ordinal, s *slot) {
		if code := s.code(); code.Data == 0 || code == policy.Code() {
			return
		}
		if v, ok := m.judge(o, s, usual, total); ok && len(list) < most {
			list = append(list, v)
		}
	})
	slices.SortFunc(list, func(a, b Victim) int { return cmp.Compare(a.Ordinal, b.Ordinal) })
	return list
}
