package pebblefs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/mediumtest"
	"github.com/atollstore/atoll/internal/medium/pebblefs"
)

func inBubble(t *testing.T, fn func(t *testing.T, c *mediumtest.Cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := mediumtest.NewCluster(t, 3)
		defer c.Close()
		fn(t, c)
	})
}

// open opens medium and file system, with checkpoints after so many bytes.
func open(o *mediumtest.Owner, id atoll.MediumID, checkpoint int64) (*medium.Medium, *pebblefs.FS, error) {
	ctx := context.Background()
	m, err := o.TryOpen(id)
	if err != nil {
		return nil, nil, err
	}
	fs, err := pebblefs.Open(ctx, m, pebblefs.Options{CheckpointBytes: checkpoint})
	if err != nil {
		_ = m.Close(ctx)
		return nil, nil, err
	}
	o.Defer(func() { _ = fs.Close(ctx) })
	return m, fs, nil
}

func mustOpen(t *testing.T, o *mediumtest.Owner, id atoll.MediumID, checkpoint int64) (*medium.Medium, *pebblefs.FS) {
	t.Helper()
	m, fs, err := open(o, id, checkpoint)
	if err != nil {
		t.Fatal(err)
	}
	return m, fs
}

func closeBoth(t *testing.T, m *medium.Medium, fs *pebblefs.FS) {
	t.Helper()
	ctx := context.Background()
	if err := fs.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := fs.Check(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// twin does the same to two file systems and compares.
type twin struct {
	t    *testing.T
	rng  *rand.Rand
	a, b vfs.FS
	fa   map[string]vfs.File
	fb   map[string]vfs.File
}

func (w *twin) same(what string, ea, eb error) bool {
	w.t.Helper()
	kind := func(err error) string {
		switch {
		case err == nil:
			return "ok"
		case errors.Is(err, os.ErrNotExist):
			return "not exist"
		case errors.Is(err, os.ErrExist):
			return "exist"
		}
		return "other"
	}
	if ka, kb := kind(ea), kind(eb); ka != kb && !(ka != "ok" && kb != "ok") {
		w.t.Fatalf("%s: %v, want %v", what, ea, eb)
	}
	return ea == nil
}

func (w *twin) name() string {
	dirs := []string{"", "d", "d/e", "nowhere"}
	return dirs[w.rng.IntN(len(dirs))] + fmt.Sprintf("/f%d", w.rng.IntN(6))
}

func (w *twin) closeFile(n string) {
	if f := w.fa[n]; f != nil {
		w.same("close", f.Close(), w.fb[n].Close())
		delete(w.fa, n)
		delete(w.fb, n)
	}
}

func (w *twin) step() {
	n, to := w.name(), w.name()
	var ea, eb error
	switch op := w.rng.IntN(12); op {
	case 0, 1:
		w.closeFile(n)
		w.fa[n], ea = w.a.Create(n, "x")
		w.fb[n], eb = w.b.Create(n, "x")
		if !w.same("create "+n, ea, eb) {
			delete(w.fa, n)
			delete(w.fb, n)
		}
	case 2, 3, 4:
		if w.fa[n] == nil {
			return
		}
		p := make([]byte, w.rng.IntN([]int{10, 5000, 300000}[w.rng.IntN(3)]))
		for i := range p {
			p[i] = byte(w.rng.Uint32())
		}
		q := bytes.Clone(p)
		_, ea = w.fa[n].Write(p)
		_, eb = w.fb[n].Write(q)
		w.same("write "+n, ea, eb)
	case 5:
		if w.fa[n] != nil {
			w.same("sync "+n, w.fa[n].Sync(), w.fb[n].Sync())
		}
	case 6:
		w.same("link "+n+" "+to, w.a.Link(n, to), w.b.Link(n, to))
	case 7:
		if strings.HasPrefix(to, "nowhere") {
			return // Pebble's memory system loses the file then
		}
		w.same("rename "+n+" "+to, w.a.Rename(n, to), w.b.Rename(n, to))
	case 8:
		w.same("remove "+n, w.a.Remove(n), w.b.Remove(n))
	case 9:
		w.closeFile(n)
	case 10:
		w.overwrite(n)
	case 11:
		la, ea := w.a.List("d")
		lb, eb := w.b.List("d")
		w.same("list", ea, eb)
		sort.Strings(la)
		sort.Strings(lb)
		if !slices.Equal(la, lb) {
			w.t.Fatalf("list: %v, want %v", la, lb)
		}
	}
}

// overwrite writes somewhere into a file.
func (w *twin) overwrite(n string) {
	if w.fa[n] != nil {
		return
	}
	a, ea := w.a.OpenReadWrite(n, "x")
	b, eb := w.b.OpenReadWrite(n, "x")
	if !w.same("open "+n, ea, eb) {
		return
	}
	for range 4 {
		off := w.rng.Int64N(20000)
		if size, err := b.Stat(); err == nil {
			off = min(off, size.Size()) // holes differ between systems
		}
		p := make([]byte, 1+w.rng.IntN(9000))
		for i := range p {
			p[i] = byte(w.rng.Uint32())
		}
		_, ea = a.WriteAt(bytes.Clone(p), off)
		_, eb = b.WriteAt(bytes.Clone(p), off)
		w.same("write at", ea, eb)
	}
	if w.rng.IntN(2) == 0 {
		w.same("sync", a.Sync(), b.Sync())
	}
	w.same("close", a.Close(), b.Close())
}

// compare reads every file of both.
func (w *twin) compare(dir string) {
	w.t.Helper()
	la, _ := w.a.List(dir)
	lb, _ := w.b.List(dir)
	sort.Strings(la)
	sort.Strings(lb)
	if !slices.Equal(la, lb) {
		w.t.Fatalf("list %s: %v, want %v", dir, la, lb)
	}
	for _, n := range la {
		p := w.a.PathJoin(dir, n)
		if i, err := w.b.Stat(p); err == nil && i.IsDir() {
			w.compare(p)
			continue
		}
		if got, want := readAll(w.t, w.a, p), readAll(w.t, w.b, p); !bytes.Equal(got, want) {
			w.t.Fatalf("file %s: %d bytes differ from %d", p, len(got), len(want))
		}
	}
}

func readAll(t *testing.T, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := io.ReadAll(f)
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return p
}

// TestAgainstMem does random operations on this file system and Pebble's own
// memory file system, with clean closes in between.
func TestAgainstMem(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *mediumtest.Cluster) {
				o := c.Owner("a")
				rec := o.Create("fs", 512)
				mem := vfs.NewMem()
				for round := range 5 {
					m, fs := mustOpen(t, o, rec.ID, 1<<20)
					w := &twin{t: t, rng: rand.New(rand.NewPCG(seed, uint64(round))), a: fs, b: mem, fa: map[string]vfs.File{}, fb: map[string]vfs.File{}}
					w.compare("/")
					w.same("mkdir", fs.MkdirAll("d/e", 0o755), mem.MkdirAll("d/e", 0o755))
					for range 300 {
						w.step()
					}
					w.compare("/")
					for n := range w.fa {
						w.fa[n].Close()
						w.fb[n].Close()
					}
					closeBoth(t, m, fs)
				}
			})
		})
	}
}

func pebbleOptions(fs vfs.FS) *pebble.Options {
	return &pebble.Options{FS: fs, MemTableSize: 128 << 10, Logger: quiet{}, DisableAutomaticCompactions: false,
		L0CompactionThreshold: 2, BytesPerSync: 0}
}

type quiet struct{}

func (quiet) Infof(string, ...any)                   {}
func (quiet) Errorf(string, ...any)                  {}
func (quiet) Fatalf(f string, a ...any)              { panic(fmt.Sprintf(f, a...)) }
func (quiet) Eventf(context.Context, string, ...any) {}
func (quiet) IsTracingEnabled(context.Context) bool  { return false }

func key(i uint64) []byte { return fmt.Appendf(nil, "key%06d", i) }

func checkDB(t *testing.T, db *pebble.DB, want map[uint64][]byte) {
	t.Helper()
	it, err := db.NewIter(nil)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for it.First(); it.Valid(); it.Next() {
		var k uint64
		fmt.Sscanf(string(it.Key()), "key%d", &k)
		if !bytes.Equal(it.Value(), want[k]) {
			t.Fatalf("%s: %d bytes, want %d", it.Key(), len(it.Value()), len(want[k]))
		}
		n++
	}
	if err := it.Close(); err != nil || n != len(want) {
		t.Fatalf("%d keys, want %d: %v", n, len(want), err)
	}
}

// TestPebble runs Pebble: batches, flushes, compactions, a checkpoint, reopens.
// Pebble starts goroutines that outlive a bubble, so this one is outside.
func TestPebble(t *testing.T) {
	c := mediumtest.NewCluster(t, 3)
	o := c.Owner("a")
	rec := o.Create("db", 2048)
	want := map[uint64][]byte{}
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 3 {
		m, fs := mustOpen(t, o, rec.ID, 4<<20)
		db, err := pebble.Open("db", pebbleOptions(fs))
		if err != nil {
			t.Fatal(err)
		}
		checkDB(t, db, want)
		for i := range 400 {
			b := db.NewBatch()
			for range 10 {
				k, v := rng.Uint64N(3000), make([]byte, rng.IntN(400))
				for j := range v {
					v[j] = byte(rng.Uint32())
				}
				_ = b.Set(key(k), v, nil)
				want[k] = v
			}
			if err := b.Commit(&pebble.WriteOptions{Sync: i%4 == 0}); err != nil {
				t.Fatal(err)
			}
		}
		if round == 1 {
			if err := db.Compact(context.Background(), []byte("a"), []byte("z"), true); err != nil {
				t.Fatal(err)
			}
			if err := db.Checkpoint("backup", pebble.WithFlushedWAL()); err != nil {
				t.Fatal(err)
			}
			bk, err := pebble.Open("backup", pebbleOptions(fs))
			if err != nil {
				t.Fatal(err)
			}
			checkDB(t, bk, want)
			if err := bk.Close(); err != nil {
				t.Fatal(err)
			}
		}
		checkDB(t, db, want)
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		s := m.Stats()
		t.Logf("round %d: %+v", round, s)
		closeBoth(t, m, fs)
	}
}

// TestPowerCut cuts the power of everything at one sync after the other while
// files are appended to and synced, renamed and removed: what was synced is
// there, renames happened wholly or not at all, and counts are right.
func TestPowerCut(t *testing.T) {
	points := 40
	if testing.Short() {
		points = 8
	}
	for n := range points {
		at, seed := 5+n*9, uint64(n)
		t.Run(fmt.Sprintf("sync%d", at), func(t *testing.T) {
			inBubble(t, func(t *testing.T, c *mediumtest.Cluster) { powerCut(t, c, at, seed) })
		})
	}
}

// history is what a test knows of a file system's durable state.
type history struct {
	synced map[string][]byte // contents at the last sync that was answered
	all    map[string][]byte // contents now
}

func powerCut(t *testing.T, c *mediumtest.Cluster, at int, seed uint64) {
	a := c.Owner("a")
	rec := a.Create("fs", 256)
	rng := rand.New(rand.NewPCG(seed, 11))
	mode := []hosttest.CrashMode{hosttest.LoseUnsynced, hosttest.KeepAll, hosttest.Random}[seed%3]
	var disks []*hosttest.Disk
	var once sync.Once
	var mu sync.Mutex
	count := 0
	for _, id := range c.IDs() {
		c.Disk(id).OnSync(func(hosttest.SyncPoint) {
			mu.Lock()
			count++
			now := count >= at
			mu.Unlock()
			if now {
				once.Do(func() { disks = c.Blackout(rng, mode) })
			}
		})
	}
	h := history{map[string][]byte{}, map[string][]byte{}}
	m, fs, err := open(a, rec.ID, 1<<20)
	for i := 0; err == nil && i < 200; i++ {
		err = h.step(fs, rng, i)
	}
	if disks == nil {
		t.Fatalf("sync %d never came (%d): %v", at, count, err)
	}
	if m != nil {
		_ = fs.Close(context.Background())
		_ = m.Close(context.Background())
	}
	c.StartAll(disks)
	b := c.Owner("b")
	m, fs = mustOpen(t, b, rec.ID, 1<<20)
	h.check(t, fs, seed)
	if err := fs.Check(context.Background()); err != nil {
		t.Fatal(err)
	}
	closeBoth(t, m, fs)
	m, fs = mustOpen(t, b, rec.ID, 1<<20)
	h.check(t, fs, seed)
	closeBoth(t, m, fs)
}

// step grows a log or writes a table, syncs it, and now and then moves one.
func (h *history) step(fs *pebblefs.FS, rng *rand.Rand, i int) error {
	name := fmt.Sprintf("/%d.%s", i, []string{"log", "sst"}[rng.IntN(2)])
	f, err := fs.Create(name, "x")
	if err != nil {
		return err
	}
	defer f.Close()
	h.all[name] = nil
	for range 1 + rng.IntN(3) {
		p := bytes.Repeat([]byte(name), 1+rng.IntN(3000))
		h.all[name] = append(h.all[name], p...)
		if _, err := f.Write(p); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		h.synced[name] = bytes.Clone(h.all[name])
	}
	for old := range h.synced {
		if rng.IntN(8) == 0 {
			// From here on both fates are right until a sync is answered.
			delete(h.synced, old)
			if err := fs.Remove(old); err != nil {
				return err
			}
			break
		}
	}
	return nil
}

func (h *history) check(t *testing.T, fs *pebblefs.FS, seed uint64) {
	t.Helper()
	names, err := fs.List("/")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		got, all := readAll(t, fs, "/"+n), h.all["/"+n]
		if !bytes.HasPrefix(all, got) {
			t.Fatalf("seed %d: file %s has %d bytes that were not written so (%d)", seed, n, len(got), len(all))
		}
	}
	for n, want := range h.synced {
		if got := readAll(t, fs, n); len(got) < len(want) {
			t.Fatalf("seed %d: file %s has %d bytes, %d were synced", seed, n, len(got), len(want))
		}
	}
}

// TestPebbleCrash cuts the power of everything between two commits: Pebble
// finds every commit up to the last synced one, and of the rest a beginning.
func TestPebbleCrash(t *testing.T) {
	seeds := uint64(4)
	if testing.Short() {
		seeds = 1
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { pebbleCrash(t, seed) })
	}
}

func pebbleCrash(t *testing.T, seed uint64) {
	c := mediumtest.NewCluster(t, 3)
	a := c.Owner("a")
	rec := a.Create("db", 1024)
	rng := rand.New(rand.NewPCG(seed, 5))
	_, fs := mustOpen(t, a, rec.ID, 1<<20)
	opts := pebbleOptions(fs)
	// Pebble ends the process when it cannot write in the background, so there
	// is nothing in the background when the power is cut.
	opts.MemTableSize, opts.DisableAutomaticCompactions = 16<<20, true
	db, err := pebble.Open("db", opts)
	if err != nil {
		t.Fatal(err)
	}
	a.Defer(func() { _ = db.Close() })
	// Commit i sets the counter and some other key to i.
	synced, last := uint64(0), 100+rng.Uint64N(300)
	for i := uint64(1); i <= last; i++ {
		b := db.NewBatch()
		_ = b.Set([]byte("counter"), fmt.Append(nil, i), nil)
		_ = b.Set(key(i%50), bytes.Repeat(fmt.Append(nil, i, " "), 200), nil)
		sync := rng.IntN(5) == 0
		if err := b.Commit(&pebble.WriteOptions{Sync: sync}); err != nil {
			t.Fatal(err)
		}
		if sync {
			synced = i
		}
		if i%120 == 0 {
			if err := db.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if i%200 == 0 {
			if err := db.Compact(context.Background(), []byte("a"), []byte("z"), false); err != nil {
				t.Fatal(err)
			}
		}
	}
	disks := c.Blackout(rng, hosttest.Random)
	c.StartAll(disks)
	c.Memory.Expire("")
	c.NewSession()
	b := c.Owner("b")
	m, fs := mustOpen(t, b, rec.ID, 1<<20)
	db2, err := pebble.Open("db", pebbleOptions(fs))
	if err != nil {
		t.Fatal(err)
	}
	found := checkCommits(t, db2)
	if found < synced || found > last {
		t.Errorf("seed %d: found commit %d, last synced %d, last %d", seed, found, synced, last)
	}
	if err := db2.Close(); err != nil {
		t.Fatal(err)
	}
	closeBoth(t, m, fs)
}

// checkCommits returns the last commit that a database holds, and checks that
// it holds all before.
func checkCommits(t *testing.T, db *pebble.DB) (last uint64) {
	t.Helper()
	get := func(k []byte) []byte {
		v, closer, err := db.Get(k)
		if errors.Is(err, pebble.ErrNotFound) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		defer closer.Close()
		return bytes.Clone(v)
	}
	fmt.Sscan(string(get([]byte("counter"))), &last)
	for i := last; i > 0 && i+50 > last; i-- {
		if want := bytes.Repeat(fmt.Append(nil, i, " "), 200); !bytes.Equal(get(key(i%50)), want) {
			t.Fatalf("commit %d of %d is not there", i, last)
		}
	}
	return last
}
