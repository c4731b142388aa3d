package medium_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
)

type values = map[uint64]uint64

// model is what a book must hold.
type model struct {
	name     string
	rec      catalog.Medium
	cur      values
	versions map[uint64]values
	parent   *model
	clones   map[uint64]int // by version
	b        *book

	// What was tried last and has no outcome: one of these at most.
	key, val uint64
	put      bool
	backup   uint64
	restore  uint64
	remove   uint64
}

func (m *model) calm() { m.put, m.backup, m.restore, m.remove = false, 0, 0, 0 }

// history runs random operations on a tree of books and their models.
type history struct {
	t     *testing.T
	c     *mediumtest.Cluster
	rng   *rand.Rand
	o     *mediumtest.Owner
	books []*model
	next  uint64
	life  int
	clone string // name of one whose making has no outcome
	from  *model
	begin uint64
	note  []string
	coded bool
}

func (h *history) log(format string, args ...any) {
	h.note = append(h.note, fmt.Sprintf(format, args...))
}

// step does one operation. An error ends this life: it must be one of a crash.
func (h *history) step() error {
	m := h.books[h.rng.IntN(len(h.books))]
	switch n := h.rng.IntN(100); {
	case n < 50:
		return h.puts(m)
	case n < 58:
		h.log("%s checkpoint", m.name)
		return m.b.checkpoint()
	case n < 66:
		return h.backup(m)
	case n < 69:
		return h.restore(m)
	case n < 76:
		return h.remove(m)
	case n < 90:
		return h.compact(m)
	case n < 92 && len(h.books) < 4:
		return h.fork(m)
	case n < 95:
		return h.view(m)
	case n < 97:
		h.log("%s reopen", m.name)
		if err := m.b.m.Close(context.Background()); err != nil {
			return err
		}
		return h.open(m)
	default:
		time.Sleep(150 * time.Millisecond)
		return m.b.check()
	}
}

func (h *history) puts(m *model) error {
	for range 1 + h.rng.IntN(12) {
		h.next++
		m.put, m.key, m.val = true, h.rng.Uint64N(25), h.next
		if err := m.b.put(m.key, m.val); err != nil {
			return err
		}
		m.cur[m.key] = m.val
		m.calm()
	}
	return nil
}

func (h *history) backup(m *model) error {
	n, err := m.b.backup()
	m.backup = n
	h.log("%s backup %d: %v", m.name, n, err)
	if err != nil {
		return err
	}
	m.versions[n] = maps.Clone(m.cur)
	m.calm()
	return nil
}

// some returns a random version, 0 if there is none.
func (h *history) some(m *model) uint64 {
	all := slices.Sorted(maps.Keys(m.versions))
	if len(all) == 0 {
		return 0
	}
	return all[h.rng.IntN(len(all))]
}

func (h *history) restore(m *model) error {
	n := h.some(m)
	if n == 0 {
		return nil
	}
	m.restore = n
	err := m.b.restore(n)
	h.log("%s restore %d: %v", m.name, n, err)
	if err != nil {
		return err
	}
	m.cur = maps.Clone(m.versions[n])
	m.calm()
	return nil
}

func (h *history) remove(m *model) error {
	n := h.some(m)
	if n == 0 || len(m.versions) < 3 {
		return nil
	}
	m.remove = n
	gone, err := m.b.remove(n)
	h.log("%s remove %d: %v, %v", m.name, n, gone, err)
	if err != nil {
		return err
	}
	if gone != (m.clones[n] == 0) {
		return fmt.Errorf("version %d with %d clones, removed: %v", n, m.clones[n], gone)
	}
	delete(m.versions, n)
	m.calm()
	return nil
}

func (h *history) compact(m *model) error {
	if h.coded && h.rng.IntN(8) == 0 {
		if err := h.change(m); err != nil {
			return err
		}
	}
	for range 1 + h.rng.IntN(3) {
		if m.b.m.Info().Policy.IsCoded() && h.rng.IntN(3) > 0 {
			if err := h.encode(m); err != nil {
				return err
			}
			continue
		}
		o, err := m.b.compact()
		h.log("%s compact %d: %v", m.name, o, err)
		if err != nil || o == 0 {
			return err
		}
	}
	return nil
}

// change changes how a book is kept.
func (h *history) change(m *model) error {
	code := []catalog.Code{{}, {Data: 2, Parity: 1}, {Data: 2, Parity: 2}, {Data: 3, Parity: 1}}[h.rng.IntN(4)]
	h.log("%s code %v", m.name, code)
	return m.b.m.Update(context.Background(), func(rec *catalog.Medium) { rec.Policy.Data, rec.Policy.Parity = code.Data, code.Parity })
}

// encode encodes what is to be, or a victim of compaction; with a node down that
// fails, and nothing happened. Then it reads without a node.
func (h *history) encode(m *model) error {
	away := h.c.IDs()[h.rng.IntN(len(h.c.IDs()))]
	down := h.rng.IntN(4) == 0
	if down {
		h.c.Kill(away)
	}
	var n int
	var err error
	if h.rng.IntN(2) == 0 {
		n, err = m.b.encode()
	} else {
		var o atoll.Ordinal
		o, err = m.b.compactCoded()
		n = int(o)
	}
	h.log("%s encode %d, without node %v: %t: %v", m.name, n, away, down, err)
	if !down {
		if errors.Is(err, atoll.ErrUnavailable) {
			return nil // a node that was away is not trusted yet
		}
		return err
	}
	err = readAll(m.b.m, m.b.cur)
	h.c.Restart(away)
	return err
}

func (h *history) fork(m *model) error {
	n := h.some(m)
	if n == 0 || m.b.m.State().Versions == nil {
		return nil
	}
	s := m.b.m.State()
	if s.Find(n).Hidden() {
		return nil
	}
	h.clone, h.from, h.begin = fmt.Sprintf("book%d", h.rng.Uint32()), m, n
	rec, err := medium.Clone(context.Background(), h.o.Options(), m.b.m, n, catalog.Medium{Name: h.clone, Owner: "root"})
	h.log("%s clone of %d: %v", m.name, n, err)
	if err != nil {
		return err
	}
	return h.born(rec)
}

// born enters a clone.
func (h *history) born(rec catalog.Medium) error {
	k := &model{name: rec.Name, rec: rec, cur: maps.Clone(h.from.versions[h.begin]), versions: map[uint64]values{},
		parent: h.from, clones: map[uint64]int{}}
	h.from.clones[h.begin]++
	h.books = append(h.books, k)
	h.clone, h.from = "", nil
	return h.open(k)
}

func (h *history) view(m *model) error {
	n := h.some(m)
	s := m.b.m.State()
	if n == 0 || s.Find(n).Hidden() {
		return nil
	}
	ctx := context.Background()
	v, err := medium.OpenView(ctx, h.o.Options(), m.rec.ID, medium.VersionSpec{Number: n})
	if err != nil {
		return err
	}
	got := decodeShelf(v.Root())
	if !maps.Equal(got.values(), m.versions[n]) {
		return fmt.Errorf("view of version %d: %v, want %v", n, got.values(), m.versions[n])
	}
	if err := h.compact(m); err != nil {
		return err
	}
	time.Sleep(120 * time.Millisecond)
	if err := readAll(v, got); err != nil {
		return fmt.Errorf("view of version %d: %w", n, err)
	}
	return v.Close(ctx)
}

// open opens a book and settles what had no outcome.
func (h *history) open(m *model) error {
	var err error
	if m.b, err = openBook(h.o, m.rec.ID); err != nil {
		return fmt.Errorf("open %s: %w", m.name, err)
	}
	got := m.b.cur.values()
	switch {
	case m.put && got[m.key] == m.val:
		m.cur[m.key] = m.val
	case m.restore != 0 && !maps.Equal(got, m.cur):
		m.cur = maps.Clone(m.versions[m.restore])
	}
	if !maps.Equal(got, m.cur) {
		return fmt.Errorf("open %s: %v, want %v", m.name, got, m.cur)
	}
	s := m.b.m.State()
	if m.backup != 0 && s.Find(m.backup) != nil {
		m.versions[m.backup] = maps.Clone(m.cur)
	}
	if v := s.Find(m.remove); m.remove != 0 && (v == nil || v.Hidden()) {
		delete(m.versions, m.remove)
	}
	for n, want := range m.versions {
		if !maps.Equal(m.b.versions[n].values(), want) {
			return fmt.Errorf("open %s: version %d is %v, want %v", m.name, n, m.b.versions[n].values(), want)
		}
	}
	for i := range s.Versions {
		v := &s.Versions[i]
		if _, ok := m.versions[v.Number]; !ok && !v.Hidden() {
			return fmt.Errorf("open %s: version %d was never made, or removed", m.name, v.Number)
		}
	}
	m.calm()
	return m.b.check()
}

// crash cuts the power of everything at the next syncs, or at once.
func (h *history) lives(points int) {
	for range points {
		h.life++
		at := 1 + h.rng.IntN(6000)
		mode := []hosttest.CrashMode{hosttest.LoseUnsynced, hosttest.KeepAll, hosttest.Random}[h.rng.IntN(3)]
		seed := h.rng.Uint64()
		var mu sync.Mutex
		var disks []*hosttest.Disk
		count := 0
		cut := func() {
			mu.Lock()
			defer mu.Unlock()
			if count++; count >= at && disks == nil {
				disks = h.c.Blackout(rand.New(rand.NewPCG(seed, 1)), mode)
			}
		}
		for _, id := range h.c.IDs() {
			h.c.Disk(id).OnSync(func(hosttest.SyncPoint) { cut() })
		}
		dark := func() bool {
			mu.Lock()
			defer mu.Unlock()
			return disks != nil
		}
		var err error
		for err == nil && !dark() {
			err = h.step()
		}
		if !dark() {
			h.t.Fatalf("life %d: %v\n%v", h.life, err, h.note)
		}
		if errors.Is(err, atoll.ErrCorrupt) {
			h.t.Fatalf("life %d ended with %v\n%v", h.life, err, h.note)
		}
		h.log("crash %d at sync %d (%v): %v", h.life, at, mode, err)
		for _, m := range h.books {
			_ = m.b.m.Close(context.Background())
		}
		h.c.StartAll(disks)
		h.o = h.c.Owner(fmt.Sprintf("life%d", h.life))
		h.resume()
	}
}

// resume opens everything after a crash.
func (h *history) resume() {
	if h.clone != "" {
		rec, err := h.o.Catalog.MediumByName(context.Background(), h.clone)
		if err == nil {
			err = h.born(rec)
		} else if errors.Is(err, atoll.ErrNotExist) {
			h.clone, err = "", nil
		}
		if err != nil {
			h.t.Fatalf("life %d: clone: %v\n%v", h.life, err, h.note)
		}
	}
	for _, m := range h.books {
		if m.b != nil && m.b.o == h.o {
			continue
		}
		if err := h.open(m); err != nil {
			h.t.Fatalf("life %d: %v\n%v", h.life, err, h.note)
		}
	}
}

// TestHistory: random histories of puts, versions, clones, views, compactions and
// power cuts, against a plain model.
func TestHistory(t *testing.T) { histories(t, 16, 3, catalog.Code{}) }

// TestHistoryCoded: the same with segments kept as shards, a code that changes, and
// nodes that are away.
func TestHistoryCoded(t *testing.T) { histories(t, 8, 5, catalog.Code{Data: 2, Parity: 1}) }

func histories(t *testing.T, seeds, nodes int, code catalog.Code) {
	points := 6
	if testing.Short() {
		seeds, points = 2, 3
	}
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			inBubble(t, nodes, func(t *testing.T, c *mediumtest.Cluster) {
				h := &history{t: t, c: c, rng: rand.New(rand.NewPCG(seed, 11)), o: c.Owner("life0"), coded: code.Data > 0}
				rec, err := medium.Create(context.Background(), h.o.Options(), catalog.Medium{
					Name: "book", Kind: catalog.KindDB, Owner: "root",
					Policy: catalog.Policy{Replicas: 3, Segment: 24 + 60*code.Parity + int(seed%3)*20, Data: code.Data, Parity: code.Parity},
				})
				must(t, err)
				h.books = []*model{{name: "book", rec: rec, cur: values{}, versions: map[uint64]values{}, clones: map[uint64]int{}}}
				if err := h.open(h.books[0]); err != nil {
					t.Fatal(err)
				}
				h.lives(points)
				for _, m := range h.books {
					must(t, m.b.check())
					must(t, m.b.m.Close(context.Background()))
				}
				t.Logf("%d books, %d steps", len(h.books), len(h.note))
			})
		})
	}
}
