package medium_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

const (
	kindBackup  = medium.FirstKind + 1 // key: number
	kindRestore = medium.FirstKind + 2 // key: number of the event; aux: version
)

// spot is where a value is.
type spot struct {
	at  atoll.Location
	val uint64
}

// shelf is a state of a book: its root lists it.
type shelf map[uint64]spot

// encode returns a root of a medium: with the number of the last version that is
// settled, so that a replay knows its record.
func (s shelf) encode(id atoll.MediumID, settled uint64) []byte {
	p := binary.LittleEndian.AppendUint64(nil, uint64(id))
	p = binary.LittleEndian.AppendUint64(p, settled)
	for _, key := range slices.Sorted(maps.Keys(s)) {
		p = binary.LittleEndian.AppendUint64(p, key)
		p = binary.LittleEndian.AppendUint64(p, uint64(s[key].at))
		p = binary.LittleEndian.AppendUint64(p, s[key].val)
	}
	return p
}

func decodeShelf(p []byte) shelf {
	s := shelf{}
	for p = p[min(16, len(p)):]; len(p) > 0; p = p[24:] {
		s[binary.LittleEndian.Uint64(p)] = spot{atoll.Location(binary.LittleEndian.Uint64(p[8:])), binary.LittleEndian.Uint64(p[16:])}
	}
	return s
}

func (s shelf) values() map[uint64]uint64 {
	v := map[uint64]uint64{}
	for key, at := range s {
		v[key] = at.val
	}
	return v
}

// book is the simplest kind with versions: a map from keys to values. It tells
// deltas of liveness only for what a manifest is about to say (M4).
type book struct {
	o        *mediumtest.Owner
	m        *medium.Medium
	cur      shelf // now
	root     shelf // of the last checkpoint
	versions map[uint64]shelf
	walk     time.Duration // that finding out what only a version holds takes
	settled  uint64        // highest number of a version that was added
}

func openBook(o *mediumtest.Owner, id atoll.MediumID) (*book, error) {
	ctx := context.Background()
	m, err := o.TryOpen(id)
	if err != nil {
		return nil, err
	}
	b := &book{o: o, m: m, root: decodeShelf(m.Root()), versions: map[uint64]shelf{}}
	b.cur = maps.Clone(b.root)
	if p := m.Root(); len(p) > 0 && binary.LittleEndian.Uint64(p) == uint64(id) {
		b.settled = binary.LittleEndian.Uint64(p[8:])
	}
	for _, v := range m.State().Versions {
		p, err := m.ReadRoot(ctx, v.Number)
		if err != nil {
			return nil, err
		}
		b.versions[v.Number] = decodeShelf(p)
	}
	var late []medium.Record
	var frozen shelf
	err = m.Replay(ctx, func(r medium.Record) error {
		switch r.Kind {
		case kindPut:
			b.cur[r.Key] = spot{atoll.MakeLocation(r.Seg, r.Block, 0), r.Aux}
		case kindBackup:
			m.UseVersionNumber(r.Key)
			if r.Key > b.settled {
				late, frozen = append(late, r), maps.Clone(b.cur)
			}
		case kindRestore:
			m.UseVersionNumber(r.Key)
			if r.Key > b.settled {
				b.cur = maps.Clone(b.versions[r.Aux])
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(late) > 1 {
		return nil, fmt.Errorf("%d versions not settled", len(late))
	}
	if len(late) == 1 {
		if err := b.settle(m.MarkAt(late[0]), late[0].Key, frozen); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *book) append(kind segment.Kind, key, value uint64) (*stream.Entry, medium.Mark, error) {
	var e stream.Entry
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	copy(buf.Bytes(), block(key, value))
	e.Add(segment.Record{Kind: kind, Blocks: 1, Key: key, Aux: value}, buf, buf.Bytes())
	if kind != kindPut {
		mark, err := b.m.AppendMark(context.Background(), &e)
		return &e, mark, err
	}
	return &e, medium.Mark{}, b.m.Append(context.Background(), catalog.Hot, &e)
}

func (b *book) put(key, value uint64) error {
	e, _, err := b.append(kindPut, key, value)
	if err == nil {
		b.cur[key] = spot{atoll.MakeLocation(e.Seg().Ordinal, e.Block(0), 0), value}
	}
	return err
}

// counts returns how many blocks of each own segment some states refer to.
func (b *book) counts(states ...shelf) map[atoll.Ordinal]int {
	seen, n := map[atoll.Location]bool{}, map[atoll.Ordinal]int{}
	for _, s := range states {
		for _, at := range s {
			if o := at.at.Ordinal(); o >= b.m.Base() && !seen[at.at] {
				seen[at.at] = true
				n[o]++
			}
		}
	}
	return n
}

func (b *book) states(root shelf, more ...shelf) []shelf {
	return append(append(slices.Collect(maps.Values(b.versions)), root), more...)
}

// give tells the medium how the counts change.
func (b *book) give(before, after map[atoll.Ordinal]int) {
	for o, n := range after {
		if d := n - before[o]; d != 0 {
			b.m.Live(o, d)
		}
	}
	for o, n := range before {
		if _, still := after[o]; !still {
			b.m.Live(o, -n)
		}
	}
}

// commit makes root the root, and versions those that there are.
func (b *book) commit(c medium.Commit, root shelf, change func()) error {
	before := b.counts(b.states(b.root)...)
	change()
	b.give(before, b.counts(b.states(root)...))
	c.Root = root.encode(b.m.Info().ID, b.settled)
	err := b.m.Commit(context.Background(), c)
	b.root = root
	return err
}

func (b *book) checkpoint() error {
	mark := b.m.Mark()
	if mark.Seq == 0 {
		return atoll.ErrUnavailable
	}
	return b.commit(medium.Commit{Mark: mark}, maps.Clone(b.cur), func() {})
}

func (b *book) backup() (uint64, error) {
	n := b.m.NewVersionNumber()
	_, mark, err := b.append(kindBackup, n, 0)
	if err != nil {
		return n, err
	}
	return n, b.settle(mark, n, maps.Clone(b.cur))
}

func (b *book) settle(mark medium.Mark, n uint64, s shelf) error {
	v := medium.Version{
		Number: n, Name: fmt.Sprintf("v-%d", n), Parent: b.m.State().CurParent, At: atoll.MakeLocation(mark.Ordinal, mark.Block, 0),
		Seq: mark.Seq, Props: map[string]string{"n": fmt.Sprint(n)}, Unique: -1,
	}
	c := medium.Commit{
		Mark: mark, Add: []medium.NewVersion{{Version: v, RootBytes: s.encode(b.m.Info().ID, n)}},
		Change: func(st *medium.State) { st.CurParent = n },
	}
	return b.commit(c, s, func() { b.versions[n], b.settled = s, n })
}

func (b *book) restore(n uint64) error {
	event := b.m.NewVersionNumber()
	_, mark, err := b.append(kindRestore, event, n)
	if err != nil {
		return err
	}
	b.cur, b.settled = maps.Clone(b.versions[n]), event
	c := medium.Commit{Mark: mark, Change: func(st *medium.State) { st.CurParent = n }}
	return b.commit(c, maps.Clone(b.cur), func() {})
}

// remove deletes a version, or only marks it while it is pinned.
func (b *book) remove(n uint64) (gone bool, err error) {
	ctx := context.Background()
	err = b.m.Edit(ctx, func(s *medium.State) error {
		s.Find(n).Flags |= medium.FlagDeleting
		return nil
	})
	if err != nil {
		return false, err
	}
	pins, err := b.m.Pins(ctx)
	if err != nil || pins[n] > 0 {
		return false, err
	}
	time.Sleep(b.walk)
	mark := b.m.Mark()
	if mark.Seq == 0 {
		return false, atoll.ErrUnavailable
	}
	return true, b.commit(medium.Commit{Mark: mark, Remove: []uint64{n}}, maps.Clone(b.cur), func() { delete(b.versions, n) })
}

// compact empties the best victim, if there is one.
func (b *book) compact() (atoll.Ordinal, error) {
	vs := b.m.Victims(3)
	if len(vs) == 0 {
		return 0, nil
	}
	o, runs, err := b.pick(vs[0].Ordinal)
	if err != nil {
		return o, err
	}
	return o, b.m.Move(context.Background(), o, runs)
}

// pick finds what lives in a segment.
func (b *book) pick(o atoll.Ordinal) (atoll.Ordinal, []medium.Run, error) {
	live := map[atoll.Location]bool{}
	for _, s := range b.states(b.root, b.cur) {
		for _, at := range s {
			live[at.at] = true
		}
	}
	var runs []medium.Run
	err := b.m.Placed(context.Background(), o, func(p medium.Placed) error {
		for i := range p.Count {
			if live[atoll.MakeLocation(p.Ordinal, p.Block+i, 0)] {
				runs = append(runs, medium.Run{Kind: p.Kind, Key: p.Key, Aux: p.Aux, Ordinal: p.Ordinal, Block: p.Block + i, Blocks: 1})
			}
		}
		return nil
	})
	return o, runs, err
}

// reader reads blocks by their place.
type reader interface {
	Read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte) error
}

// readAll compares what is at the places of a shelf with its values.
func readAll(r reader, s shelf) error {
	p := make([]byte, atoll.BlockSize)
	for key, at := range s {
		if err := r.Read(context.Background(), at.at.Ordinal(), at.at.Block(), p); err != nil {
			return fmt.Errorf("key %d at %v: %w", key, at.at, err)
		}
		if !slices.Equal(p, block(key, at.val)) {
			return fmt.Errorf("key %d at %v: wrong bytes: %w", key, at.at, atoll.ErrCorrupt)
		}
	}
	return nil
}

// check reads everything and compares the counts.
func (b *book) check() error {
	for n, s := range b.versions {
		if err := readAll(b.m, s); err != nil {
			return fmt.Errorf("version %d: %w", n, err)
		}
	}
	if err := readAll(b.m, b.cur); err != nil {
		return fmt.Errorf("present state: %w", err)
	}
	total := 0
	for o, n := range b.counts(b.states(b.root)...) {
		total += n
		if have, ok := b.m.LiveBlocks(o); !ok || have != n {
			return fmt.Errorf("segment %d has %d live blocks (there: %v), want %d", o, have, ok, n)
		}
	}
	if s := b.m.Stats(); s.Live != int64(total)*atoll.BlockSize {
		return fmt.Errorf("%d live bytes, want %d blocks: %+v", s.Live, total, s)
	}
	return b.m.Check(context.Background())
}
