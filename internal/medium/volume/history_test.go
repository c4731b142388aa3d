package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// contents is what a volume has: page → number of the write. Pages that are not
// there are holes.
type pages map[pageNo]uint64

// image is a state of a volume.
type image struct {
	pages pages
	size  int64
}

func (i image) clone() image { return image{maps.Clone(i.pages), i.size} }

// histModel holds a family of volumes, with versions and clones, against plain
// maps.
type histModel struct {
	t     *testing.T
	rng   *rand.Rand
	disks []*histDisk
	count uint64
	seed  uint64
	fails bool // inject failures
	steps int
	trace []string
	mode  Mode
}

// backing is the medium under a volume of the model: one in memory, or a real
// one.
type backing interface {
	store() Store
	// reopen ends the owner, as a crash would or not, and returns the next; end
	// is called when the old volume may stop.
	reopen(crash bool, end func()) backing
	clone(number uint64, n int) backing
	view(number uint64) (view ViewStore, done func())
	victims() []atoll.Ordinal
	// inject lets some changes of manifests and records of events fail.
	inject(rng *rand.Rand)
	heal()
	// unpin takes away the pins of clones, which are closed; false if it cannot.
	unpin() bool
}

type histDisk struct {
	m        *histModel
	b        backing
	v        *Volume
	cur      image
	alt      *image // what cur is if a restore that failed happened after all, and nothing since
	versions map[uint64]image
	maybe    map[string]image // versions whose backup failed
	fading   map[uint64]bool  // versions whose deletion failed
	flat     bool             // some data was copied: places tell nothing of age
	opts     Options
}

const histSize = 2<<30 + 64<<20

func newHistModel(t *testing.T, seed uint64, mode Mode, fails bool, b backing) *histModel {
	m := &histModel{t: t, rng: rand.New(rand.NewPCG(seed, 11)), seed: seed, mode: mode, fails: fails}
	m.add(b, image{pages{}, histSize})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d, step %d: %s", seed, m.steps, m.trace[max(0, len(m.trace)-60):])
		}
		for _, d := range m.disks {
			d.v.Abort()
		}
	})
	return m
}

func (m *histModel) add(b backing, im image) {
	d := &histDisk{m: m, b: b, cur: im, versions: map[uint64]image{}, maybe: map[string]image{}, fading: map[uint64]bool{}}
	d.opts = Options{Mode: m.mode, CacheBytes: int64(m.seed%3) << 20, MapBytes: 1 + int64(m.seed%2)<<20, DirtyBytes: 256 << 10, FlushDelay: time.Millisecond, CheckpointBytes: 1 << 20}
	d.v = mustOpen(m.t, b.store(), d.opts)
	m.disks = append(m.disks, d)
	d.inject()
}

func (d *histDisk) inject() {
	if d.m.fails {
		d.b.inject(rand.New(rand.NewPCG(d.m.rng.Uint64(), 1)))
	}
}

// ok takes an error that may come from injected failures; it reports success.
func (d *histDisk) ok(err error) bool {
	d.m.t.Helper()
	if err == nil {
		return true
	}
	d.note("failed: %v", err)
	if !d.m.fails || !errors.Is(err, atoll.ErrUnavailable) {
		d.m.t.Fatal(err)
	}
	return false
}

// spot returns a place in one of a few leaves.
func (d *histDisk) spot() (pageNo, uint64) {
	rng, size := d.m.rng, uint64(d.cur.size/atoll.BlockSize)
	p := uint64(rng.IntN(3))<<nodeBits + uint64([]int{0, 1, 7, 511}[rng.IntN(4)])<<leafBits + uint64(rng.IntN(fan))
	if rng.IntN(3) == 0 {
		p = p &^ (fan - 1)
	}
	p %= size
	n := 1 + rng.Uint64N(6)
	if rng.IntN(10) == 0 {
		n = 1 + rng.Uint64N(700)
	}
	return pageNo(p), min(n, size-p)
}

// note keeps what was done, for when something is wrong.
func (d *histDisk) note(format string, args ...any) {
	d.m.trace = append(d.m.trace, fmt.Sprintf("%x ", uint64(d.v.id)&0xfff)+fmt.Sprintf(format, args...))
}

func (d *histDisk) write() {
	p, n := d.spot()
	n = min(n, 40)
	buf := make([]byte, n*atoll.BlockSize)
	for i := range n {
		d.m.count++
		stamp(buf[i*atoll.BlockSize:][:atoll.BlockSize], d.m.count)
		d.cur.pages[p+pageNo(i)] = d.m.count
	}
	no(d.m.t, d.v.Write(d.m.t.Context(), nil, buf, int64(p)*atoll.BlockSize, false))
	d.alt = nil
}

func stamp(b []byte, n uint64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
}

func (d *histDisk) discard() {
	p, n := d.spot()
	if d.m.rng.IntN(8) == 0 {
		n = min(uint64(1)<<nodeBits+100, uint64(d.cur.size/atoll.BlockSize)-uint64(p))
	}
	no(d.m.t, d.v.Discard(d.m.t.Context(), int64(p)*atoll.BlockSize, int64(n)*atoll.BlockSize, false))
	d.alt = nil
	maps.DeleteFunc(d.cur.pages, func(q pageNo, _ uint64) bool { return q >= p && q < p+pageNo(n) })
}

func (d *histDisk) resize() {
	size := (1 + d.m.rng.Int64N(3<<18)) * atoll.BlockSize
	d.note("resize %d", size)
	if !d.ok(d.v.Resize(d.m.t.Context(), size)) {
		return
	}
	d.alt = nil
	d.cur.size = size
	maps.DeleteFunc(d.cur.pages, func(q pageNo, _ uint64) bool { return q >= pageNo(size/atoll.BlockSize) })
}

func (d *histDisk) backup() {
	d.m.count++
	name := fmt.Sprintf("v%d", d.m.count)
	was := d.cur.clone()
	got, err := d.v.Backup(d.m.t.Context(), BackupOptions{Name: name, Memo: "m", Props: map[string]string{"k": name}})
	if !d.ok(err) {
		d.maybe[name] = was
		return
	}
	d.alt = nil
	d.note("backup %d", got.Number)
	if got.Size != was.size || got.Name != name {
		d.m.t.Fatalf("version %+v of a volume of %d bytes", got, was.size)
	}
	d.versions[got.Number] = was
}

func (d *histDisk) some() (uint64, bool) {
	list := slices.Sorted(maps.Keys(d.versions))
	list = slices.DeleteFunc(list, func(n uint64) bool { return d.fading[n] })
	if len(list) == 0 {
		return 0, false
	}
	return list[d.m.rng.IntN(len(list))], true
}

func (d *histDisk) restore() {
	n, ok := d.some()
	if !ok {
		return
	}
	d.note("restore %d", n)
	ctx, cancel := context.WithTimeout(d.m.t.Context(), time.Duration(1+d.m.rng.IntN(2000))*time.Millisecond)
	defer cancel()
	err := d.v.Restore(ctx, n)
	if errors.Is(err, atoll.ErrTimeout) && !errors.Is(err, errMay) { // it waited for what came before
		return
	}
	if !d.ok(err) {
		if d.alt = nil; errors.Is(err, errMay) {
			im := d.versions[n].clone()
			d.alt = &im
		}
		return
	}
	d.alt = nil
	d.cur = d.versions[n].clone()
	if d.v.Size() != d.cur.size {
		d.m.t.Fatalf("size is %d after a restore, want %d", d.v.Size(), d.cur.size)
	}
}

func (d *histDisk) remove() {
	n, ok := d.some()
	if !ok {
		return
	}
	d.note("delete %d", n)
	if d.ok(d.v.DeleteVersion(d.m.t.Context(), n)) {
		delete(d.versions, n)
	} else {
		d.fading[n] = true
	}
}

func (d *histDisk) clone() {
	n, ok := d.some()
	if !ok || len(d.m.disks) == 4 {
		return
	}
	no(d.m.t, d.v.Settled(d.m.t.Context()))
	st := d.v.store.State()
	if p := st.Find(n); p == nil || deleting(*p) {
		return
	}
	d.note("clone of %d", n)
	d.m.add(d.b.clone(n, len(d.m.disks)), d.versions[n].clone())
}

// check reads a state: every page that is there and some that are not.
func (d *histDisk) check(v *Volume, im image, what string) {
	d.m.t.Helper()
	if v.Size() != im.size {
		d.m.t.Fatalf("%s has %d bytes, want %d", what, v.Size(), im.size)
	}
	buf := make([]byte, atoll.BlockSize)
	look := func(p pageNo) {
		if err := v.Read(d.m.t.Context(), buf, int64(p)*atoll.BlockSize); err != nil {
			d.m.dump()
			d.m.t.Fatalf("%s, page %d: %v", what, p, err)
		}
		if got := binary.LittleEndian.Uint64(buf); got != im.pages[p] {
			d.m.t.Fatalf("%s, page %d has %d, want %d", what, p, got, im.pages[p])
		}
	}
	for p := range im.pages {
		look(p)
	}
	for range 20 {
		look(pageNo(d.m.rng.Int64N(im.size / atoll.BlockSize)))
	}
}

// views reads a version as others do.
func (d *histDisk) views(n uint64) {
	t := d.m.t
	no(t, d.v.Settled(t.Context()))
	view, done := d.b.view(n)
	defer done()
	v, err := OpenVersion(t.Context(), view, Options{MapBytes: 1})
	no(t, err)
	d.check(v, d.versions[n], fmt.Sprintf("version %d", n))
	if err := v.Check(t.Context()); err != nil {
		d.m.dump()
		t.Fatal(n, err)
	}
	if err := v.Write(t.Context(), nil, make([]byte, 4096), 0, false); !errors.Is(err, atoll.ErrReadOnly) {
		t.Fatalf("write to a version: %v", err)
	}
	no(t, v.Close(t.Context()))
}

// diff compares what Diff tells with what differs.
func (d *histDisk) diff() {
	from, _ := d.some()
	to, _ := d.some()
	if d.m.rng.IntN(3) == 0 {
		to = 0
	}
	if d.m.rng.IntN(3) == 0 {
		from = 0
	}
	a, b := d.versions[from], d.versions[to]
	if from == 0 {
		a = image{}
	}
	if to == 0 {
		b = d.cur
	}
	off := d.m.rng.Int64N(b.size)
	n := 1 + d.m.rng.Int64N(b.size-off)
	if d.m.rng.IntN(2) == 0 {
		off, n = 0, b.size
	}
	got := map[pageNo]bool{}
	at := off
	err := d.v.Diff(d.m.t.Context(), from, to, off, n, func(o, size int64, zero bool) bool {
		if o < at || size <= 0 || o+size > off+n {
			d.m.t.Fatalf("extent [%d, %d) after %d in [%d, %d)", o, o+size, at, off, off+n)
		}
		at = o + size
		for p := o / atoll.BlockSize; p*atoll.BlockSize < o+size; p++ {
			got[pageNo(p)] = zero
		}
		return true
	})
	no(d.m.t, err)
	r := span(off, n)
	for p := range merge(a.pages, b.pages) {
		zero, told := got[p]
		want := p >= r.from && p < r.to && a.pages[p] != b.pages[p]
		if want != told && (want || !d.flat) || want && zero != (b.pages[p] == 0) {
			d.m.t.Fatalf("diff %d to %d of [%d, %d), page %d: told %t, zero %t; it had %d, has %d", from, to, off, off+n, p, told, zero, a.pages[p], b.pages[p])
		}
	}
	for p := range got {
		if a.pages[p] == b.pages[p] && !d.flat {
			d.m.t.Fatalf("diff %d to %d: page %d did not change", from, to, p)
		}
	}
}

func merge(a, b pages) pages {
	c := maps.Clone(b)
	if c == nil {
		c = pages{}
	}
	maps.Copy(c, a)
	return c
}

// usage must add up: what versions have alone is given back by deleting them.
func (d *histDisk) usage() {
	n, _ := d.some()
	shared, unique, err := d.v.Usage(d.m.t.Context(), n)
	no(d.m.t, err)
	if shared < 0 || unique < 0 {
		d.m.t.Fatalf("version %d: %d bytes shared, %d unique", n, shared, unique)
	}
}

func (d *histDisk) compact() {
	for _, c := range d.b.victims() {
		_, err := d.v.compact(d.m.t.Context(), c)
		d.note("compact %d: %v", c, err)
		if !errors.Is(err, atoll.ErrNotExist) {
			d.ok(err)
		}
		if d.m.rng.IntN(2) == 0 {
			return
		}
	}
}

func (d *histDisk) flatten() {
	d.note("flatten")
	d.flat = d.flat || d.v.store.Info().Parent != nil
	d.ok(d.v.Flatten(d.m.t.Context(), nil))
}

// reopen ends the volume, with a crash or without, and opens it again.
func (d *histDisk) reopen(crash bool) {
	t := d.m.t
	no(t, d.v.Flush(t.Context()))
	d.note("reopen, crash %t", crash)
	crash = crash || !d.ok(d.v.Close(t.Context()))
	d.b = d.b.reopen(crash, d.v.Abort)
	d.v = mustOpen(t, d.b.store(), d.opts)
	d.inject()
	d.found()
}

// found takes over what may have happened though it was answered with an error.
func (d *histDisk) found() {
	there := map[uint64]bool{}
	for _, v := range d.v.Versions() {
		if v.Hidden() {
			continue
		}
		there[v.Number] = true
		if _, known := d.versions[v.Number]; known {
			continue
		}
		im, ok := d.maybe[v.Name]
		if !ok {
			d.m.t.Fatalf("version %d %q turned up", v.Number, v.Name)
		}
		d.versions[v.Number] = im
		d.alt = nil
	}
	clear(d.maybe)
	for n := range d.versions {
		switch {
		case there[n]:
			delete(d.fading, n)
		case d.fading[n]:
			delete(d.fading, n)
			delete(d.versions, n)
		default:
			d.m.t.Fatalf("version %d is gone", n)
		}
	}
	if d.alt != nil && !d.is(d.cur) {
		d.cur = *d.alt
	}
	d.alt = nil
	d.check(d.v, d.cur, "the volume after a crash")
}

// is reports whether the volume has these contents.
func (d *histDisk) is(im image) bool {
	if d.v.Size() != im.size {
		d.note("size is %d, not %d", d.v.Size(), im.size)
		return false
	}
	buf := make([]byte, atoll.BlockSize)
	for p := range merge(im.pages, d.alt.pages) {
		if int64(p) >= im.size/atoll.BlockSize {
			continue
		}
		no(d.m.t, d.v.Read(d.m.t.Context(), buf, int64(p)*atoll.BlockSize))
		if got := binary.LittleEndian.Uint64(buf); got != im.pages[p] {
			d.note("page %d is %d, not %d", p, got, im.pages[p])
			return false
		}
	}
	return true
}

func (d *histDisk) verify() {
	d.m.t.Helper()
	no(d.m.t, d.v.Flush(d.m.t.Context()))
	d.ok(d.v.Verify(d.m.t.Context()))
}

func (m *histModel) step() {
	m.steps++
	d := m.disks[m.rng.IntN(len(m.disks))]
	switch m.rng.IntN(60) {
	default:
		d.write()
	case 0, 1, 2, 3:
		d.discard()
	case 4:
		d.resize()
	case 5, 6, 7, 8, 9:
		if len(d.versions) < 10 {
			d.backup()
		}
	case 10, 11:
		d.restore()
	case 12, 13, 14, 15:
		d.remove()
	case 16:
		d.clone()
	case 17, 18:
		if n, ok := d.some(); ok {
			d.views(n)
		}
	case 19, 20, 21:
		d.diff()
	case 22:
		d.usage()
	case 23, 24, 25:
		d.compact()
	case 26:
		if m.rng.IntN(3) == 0 {
			d.flatten()
		}
	case 27, 28:
		d.reopen(m.rng.IntN(3) > 0)
	case 29:
		d.verify()
	case 30, 31:
		d.ok(d.v.Checkpoint(m.t.Context()))
	case 32:
		d.check(d.v, d.cur, "the volume")
	}
}

// end reads everything, then deletes all versions and waits until only the
// present states are counted.
func (m *histModel) end() {
	for _, d := range m.disks {
		d.b.heal()
		if m.fails { // what failed last may be in doubt still
			d.reopen(true)
			d.b.heal()
		}
		d.check(d.v, d.cur, "the volume")
		for n := range d.versions {
			d.views(n)
		}
		d.verify()
	}
	for _, d := range slices.Backward(m.disks) {
		for n := range d.versions {
			no(m.t, d.v.DeleteVersion(m.t.Context(), n))
		}
		if d.b.unpin() {
			d.gone()
		}
		d.verify()
		d.check(d.v, d.cur, "the volume")
		no(m.t, d.v.Close(m.t.Context()))
	}
}

// gone waits until no version is left.
func (d *histDisk) gone() {
	limit := time.Now().Add(20 * time.Second)
	for len(d.v.store.State().Versions) > 0 {
		if time.Now().After(limit) {
			d.m.t.Fatalf("versions are left: %+v", d.v.State())
		}
		d.v.kickReaper()
		time.Sleep(time.Millisecond)
	}
}

var historiesFlag = flag.Int("histories", 12, "histories of each kind")

func TestHistories(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		for _, fails := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v,fails=%t", mode, fails), func(t *testing.T) {
				seeds(t, uint64(rounds(*historiesFlag)), func(t *testing.T, seed uint64) {
					synctest.Test(t, func(t *testing.T) {
						m := newHistModel(t, seed, mode, fails, newMemBacking(seed))
						for range 400 {
							m.step()
						}
						m.end()
					})
				})
			})
		}
	}
}

// dump tells what versions there are.
func (m *histModel) dump() {
	for _, d := range m.disks {
		st := d.v.State()
		m.t.Logf("medium %v: from version %d, ancestors %+v", d.v.id, st.CurParent, st.Ancestors)
		for _, v := range st.Versions {
			m.t.Logf("  version %d of %d at %v, epoch %d, flags %d", v.Number, v.Parent, v.At, v.Epoch, v.Flags)
		}
	}
}

// memBacking is a memStore.
type memBacking struct{ *memStore }

func newMemBacking(seed uint64) memBacking {
	s := newMemStore(histSize, seed)
	s.segSize, s.greedy = 64, seed%2 == 0
	return memBacking{s}
}

func (b memBacking) store() Store { return b.memStore }

func (b memBacking) reopen(_ bool, end func()) backing {
	s := b.memStore.crash()
	end()
	return memBacking{s}
}

func (b memBacking) clone(number uint64, n int) backing {
	return memBacking{b.memStore.clone(number, atoll.MediumID(0x100+n))}
}

func (b memBacking) view(number uint64) (ViewStore, func()) {
	view := b.memStore.view(number)
	return view, view.close
}

func (b memBacking) victims() (list []atoll.Ordinal) {
	b.mu.Lock()
	was := b.greedy
	b.greedy = true
	b.mu.Unlock()
	for _, v := range b.Victims(1000) {
		list = append(list, v.Ordinal)
	}
	b.mu.Lock()
	b.greedy = was
	b.mu.Unlock()
	slices.Sort(list)
	return list
}

func (b memBacking) inject(rng *rand.Rand) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = func(op string) error {
		switch op {
		case "checkpoint", "commit", "committed", "edit", "mark", "marked", "move":
			if rng.IntN(6) == 0 {
				return fmt.Errorf("injected at %s: %w", op, atoll.ErrUnavailable)
			}
		}
		return nil
	}
}

func (b memBacking) heal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = nil
}

func (b memBacking) unpin() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.pins)
	return true
}
