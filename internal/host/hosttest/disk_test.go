package hosttest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

func TestDiskFS(t *testing.T) {
	TestFS(t, func() host.FS { return NewDisk(1) })
}

func TestDiskFSWithHistory(t *testing.T) {
	TestFS(t, func() host.FS { d := NewDisk(1); d.KeepHistory(); return d })
}

// read returns the contents of a file, nil if it is absent.
func read(t *testing.T, d *Disk, name string) []byte {
	t.Helper()
	f, err := d.Open(name)
	if errors.Is(err, atoll.ErrNotExist) {
		return nil
	}
	fatal(t, err)
	size, err := f.Size()
	fatal(t, err)
	p := make([]byte, size)
	if size > 0 {
		_, err = f.ReadAt(p, 0)
		fatal(t, err)
	}
	return p
}

func TestCrashLosesOnlyUnsynced(t *testing.T) {
	d := NewDisk(1)
	f := create(t, d, "a")
	a, b := block(t, 8192, 1), block(t, 8192, 2)
	fatal(t, f.WriteVec([][]byte{a}, 0, true))
	if read(t, d.Crash(nil, LoseUnsynced), "a") != nil {
		t.Error("a name is there without SyncDir")
	}
	if !bytes.Equal(read(t, d.Crash(nil, KeepAll), "a"), a) {
		t.Error("KeepAll lost something")
	}
	fatal(t, d.SyncDir("."))
	_, err := f.WriteAt(b, 4096)
	fatal(t, err)
	if !bytes.Equal(read(t, d.Crash(nil, LoseUnsynced), "a"), a) {
		t.Error("not what was synced")
	}
	if !bytes.Equal(read(t, d, "a")[4096:], b) {
		t.Error("a crash copy changed the disk")
	}
	fatal(t, f.Sync())
	if !bytes.Equal(read(t, d.Crash(nil, LoseUnsynced), "a")[4096:], b) {
		t.Error("lost what was synced")
	}
	if d.Pending() != 0 {
		t.Errorf("%d pending", d.Pending())
	}
}

func TestSharedFlush(t *testing.T) {
	d := NewDisk(1)
	d.ShareFlush()
	a, b := create(t, d, "a"), create(t, d, "b")
	old, now := block(t, 8192, 1), block(t, 8192, 2)
	fatal(t, a.WriteVec([][]byte{old}, 0, true))
	fatal(t, b.WriteVec([][]byte{old}, 0, true))
	fatal(t, d.SyncDir("."))
	_, err := a.WriteAt(now[:4096], 0) // over durable pages
	fatal(t, err)
	_, err = a.WriteAt(now, 8192) // beyond the durable size
	fatal(t, err)
	_, err = b.WriteAt(now[4096:], 4096)
	fatal(t, err)
	fatal(t, b.Sync())
	after := d.Crash(nil, LoseUnsynced)
	if !bytes.Equal(read(t, after, "b"), append(bytes.Clone(old[:4096]), now[4096:]...)) {
		t.Error("what was synced is not there")
	}
	if !bytes.Equal(read(t, after, "a"), append(bytes.Clone(now[:4096]), old[4096:]...)) {
		t.Error("a flush of the disk makes durable what lies in place, and nothing that grew")
	}
}

func TestDurableWriteStandsOverEarlierPending(t *testing.T) {
	a, b := block(t, 16384, 1), block(t, 4096, 2)
	rng := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		d := NewDisk(1)
		f := create(t, d, "a")
		fatal(t, d.SyncDir("."))
		_, err := f.WriteAt(a, 0)
		fatal(t, err)
		fatal(t, f.WriteVec([][]byte{b}, 4096, true))
		got := read(t, d.Crash(rng, Random), "a")
		if len(got) < 8192 || !bytes.Equal(got[4096:8192], b) {
			t.Fatal("a durable write was lost")
		}
	}
}

// TestCrashModel checks, for random histories of one file, that a crash gives
// in each sector a version that was written since it was last made durable, or
// garbage, or what was durable.
func TestCrashModel(t *testing.T) {
	kinds := make(map[string]int)
	for seed := range uint64(150) {
		h := newHistory(t, seed)
		copies := make(map[*Disk]string)
		for range 40 {
			h.step()
			after := h.d.Crash(h.rng, Random)
			got := read(t, after, "f")
			h.check(seed, got, kinds)
			copies[after] = string(got)
			if string(read(t, h.d.Crash(nil, KeepAll), "f")) != string(read(t, h.d, "f")) {
				t.Fatalf("seed %d: KeepAll differs", seed)
			}
		}
		for c, was := range copies { // neither sees later changes of the other
			if string(read(t, c, "f")) != was {
				t.Fatalf("seed %d: a crash copy changed", seed)
			}
		}
	}
	for _, kind := range []string{"durable", "pending", "garbage"} {
		if kinds[kind] == 0 {
			t.Errorf("no sector was ever %s: %v", kind, kinds)
		}
	}
}

// history is a file of 16 sectors whose bytes are the numbers of their writes.
type history struct {
	t       *testing.T
	d       *Disk
	f       host.File
	rng     *rand.Rand
	next    byte
	durable [16]byte
	pending [16][]byte
}

func newHistory(t *testing.T, seed uint64) *history {
	h := &history{t: t, d: NewDisk(seed), rng: rand.New(rand.NewPCG(seed, 3))}
	h.f = create(t, h.d, "f")
	_, err := h.f.WriteAt(make([]byte, 8192), 0)
	fatal(t, err)
	fatal(t, h.f.Sync())
	fatal(t, h.d.SyncDir("."))
	return h
}

func (h *history) step() {
	if h.rng.IntN(5) == 0 {
		fatal(h.t, h.f.Sync())
		for i, p := range h.pending {
			if len(p) > 0 {
				h.durable[i], h.pending[i] = p[len(p)-1], nil
			}
		}
		return
	}
	h.next++
	at := h.rng.IntN(16)
	n := 1 + h.rng.IntN(16-at)
	durable := h.rng.IntN(3) == 0
	v := [][]byte{bytes.Repeat([]byte{h.next}, n*512)}
	fatal(h.t, h.f.WriteVec(v, int64(at*512), durable))
	for i := at; i < at+n; i++ {
		if durable {
			h.durable[i], h.pending[i] = h.next, nil
		} else {
			h.pending[i] = append(h.pending[i], h.next)
		}
	}
}

func (h *history) check(seed uint64, got []byte, kinds map[string]int) {
	h.t.Helper()
	if len(got) != 8192 {
		h.t.Fatalf("seed %d: %d bytes", seed, len(got))
	}
	for i := range 16 {
		s := got[i*512:][:512]
		uniform := bytes.Count(s, s[:1]) == 512
		switch {
		case uniform && s[0] == h.durable[i]:
			kinds["durable"]++
		case uniform && bytes.IndexByte(h.pending[i], s[0]) >= 0:
			kinds["pending"]++
		case !uniform && len(h.pending[i]) > 0:
			kinds["garbage"]++
		default:
			h.t.Fatalf("seed %d: sector %d holds %d, durable %d, pending %v", seed, i, s[0], h.durable[i], h.pending[i])
		}
	}
}

func TestCrashSizes(t *testing.T) {
	sizes := make(map[int]bool)
	d := NewDisk(1)
	f := create(t, d, "a")
	fatal(t, d.SyncDir("."))
	fatal(t, f.WriteVec([][]byte{block(t, 4096, 1)}, 0, true))
	_, err := f.WriteAt(block(t, 4096, 2), 4096)
	fatal(t, err)
	fatal(t, f.Truncate(100))
	for range 100 {
		sizes[len(read(t, d.Crash(nil, Random), "a"))] = true
	}
	for _, n := range []int{4096, 8192, 100} {
		if !sizes[n] {
			t.Errorf("never %d bytes: %v", n, sizes)
		}
	}
	fatal(t, f.WriteVec([][]byte{block(t, 4096, 3)}, 8192, true))
	if got := read(t, d.Crash(nil, LoseUnsynced), "a"); len(got) != 12288 || !allZero(got[100:8192]) {
		t.Errorf("a durable write beyond the end left %d bytes", len(got))
	}
}

func TestCrashNames(t *testing.T) {
	seen := make(map[string]int)
	for seed := range uint64(200) {
		d := NewDisk(seed)
		fatal(t, d.Mkdir("d"))
		f := create(t, d, "old")
		fatal(t, f.WriteVec([][]byte{[]byte("old")}, 0, true))
		fatal(t, d.SyncDir("."))
		g := create(t, d, "new")
		fatal(t, g.WriteVec([][]byte{[]byte("new")}, 0, true))
		fatal(t, d.Rename("new", "old"))
		after := d.Crash(nil, Random)
		seen[fmt.Sprintf("%s %s", read(t, after, "old"), read(t, after, "new"))]++
	}
	// Renamed, not renamed, not even created; never neither of the two.
	if len(seen) != 3 || seen["old "] == 0 || seen["old new"] == 0 || seen["new "] == 0 {
		t.Errorf("after crashes: %v", seen)
	}
}

func TestRenameNeedsBothDirectories(t *testing.T) {
	d := NewDisk(1)
	fatal(t, d.Mkdir("a"))
	fatal(t, d.Mkdir("b"))
	f := create(t, d, "a/f")
	fatal(t, f.WriteVec([][]byte{[]byte("x")}, 0, true))
	fatal(t, d.SyncDir("."))
	fatal(t, d.SyncDir("a"))
	fatal(t, d.Rename("a/f", "b/f"))
	fatal(t, d.SyncDir("b"))
	c := d.Crash(nil, LoseUnsynced)
	if read(t, c, "a/f") == nil || read(t, c, "b/f") != nil {
		t.Error("a rename is durable after one SyncDir")
	}
	fatal(t, d.SyncDir("a"))
	c = d.Crash(nil, LoseUnsynced)
	if read(t, c, "a/f") != nil || read(t, c, "b/f") == nil {
		t.Error("a rename is not durable after SyncDir of both")
	}
}

func TestCrashKeep(t *testing.T) {
	d := NewDisk(1)
	f := create(t, d, "a")
	fatal(t, d.SyncDir("."))
	fatal(t, f.WriteVec([][]byte{make([]byte, 3)}, 0, true))
	for i := range 3 {
		_, err := f.WriteAt([]byte{byte('a' + i)}, int64(i))
		fatal(t, err)
	}
	if d.Pending() != 3 {
		t.Fatalf("%d pending", d.Pending())
	}
	seen := make(map[string]bool)
	for mask := range 8 {
		seen[string(read(t, d.CrashKeep(func(i int) bool { return mask>>i&1 == 1 }), "a"))] = true
	}
	if len(seen) != 8 {
		t.Errorf("%d different disks", len(seen))
	}
}

func TestSyncErrorDropsPages(t *testing.T) {
	d := NewDisk(1)
	f := create(t, d, "a.seg")
	fatal(t, d.SyncDir("."))
	fatal(t, f.WriteVec([][]byte{[]byte("old")}, 0, true))
	_, err := f.WriteAt([]byte("new"), 0)
	fatal(t, err)
	rule := d.Inject(host.Rule{Ops: host.OpSync, Path: "*.seg", Nth: 1, Err: atoll.ErrIO})
	want(t, f.Sync(), atoll.ErrIO)
	fatal(t, f.Sync())
	if rule.Hits() != 1 {
		t.Errorf("%d hits", rule.Hits())
	}
	if got := read(t, d, "a.seg"); string(got) != "new" {
		t.Errorf("reads %q", got)
	}
	if got := read(t, d.Crash(nil, KeepAll), "a.seg"); string(got) != "old" {
		t.Errorf("after the crash %q", got)
	}
}

func TestOnSync(t *testing.T) {
	d := NewDisk(1)
	f := create(t, d, "a")
	fatal(t, d.SyncDir("."))
	var seen []string
	d.OnSync(func(p SyncPoint) {
		after := p.Disk.Crash(nil, LoseUnsynced)
		seen = append(seen, fmt.Sprintf("%d %s %s %v %q", p.N, p.Op, p.Path, p.After, read(t, after, "a")))
	})
	fatal(t, f.WriteVec([][]byte{[]byte("x")}, 0, true))
	_, err := f.WriteAt([]byte("y"), 1)
	fatal(t, err)
	fatal(t, f.Sync())
	wanted := []string{`2 write a false ""`, `2 write a true "x"`, `3 sync a false "x"`, `3 sync a true "xy"`}
	if fmt.Sprint(seen) != fmt.Sprint(wanted) {
		t.Errorf("got %v", seen)
	}
}

func TestDiskFaults(t *testing.T) {
	d := NewDisk(1)
	d.KeepHistory()
	f := create(t, d, "dir.seg")
	fatal(t, d.SyncDir("."))
	a, b := block(t, 4*4096, 1), block(t, 4*4096, 2)
	for _, p := range [][]byte{a, b} {
		fatal(t, f.WriteVec([][]byte{p}, 0, true))
	}
	got := make([]byte, 4096)
	check := func(what string, rule host.Rule, ok func() bool) {
		t.Helper()
		r := d.Inject(rule)
		_, err := f.ReadAt(got, 4096)
		fatal(t, err)
		if !ok() {
			t.Errorf("%s did nothing", what)
		}
		r.Remove()
		_, err = f.ReadAt(got, 4096)
		fatal(t, err)
		if !bytes.Equal(got, b[4096:8192]) {
			t.Errorf("%s stays", what)
		}
	}
	check("stale", host.Rule{Ops: host.OpRead, Stale: true}, func() bool { return bytes.Equal(got, a[4096:8192]) })
	check("misdirect", host.Rule{Ops: host.OpRead, Misdirect: true}, func() bool {
		return !bytes.Equal(got, b[4096:8192]) && bytes.Contains(b, got)
	})
	check("flip", host.Rule{Ops: host.OpRead, Flip: true, Off: 5000, Len: 1}, func() bool { return !bytes.Equal(got, b[4096:8192]) })
	fatal(t, d.Corrupt("dir.seg", 4100, 2))
	for _, c := range []*Disk{d, d.Crash(nil, LoseUnsynced), d.Clone()} {
		p := read(t, c, "dir.seg")
		if p[4100] != ^b[4100] || p[4101] != ^b[4101] || p[4102] != b[4102] {
			t.Error("rot is not there")
		}
	}
	d.Inject(host.Rule{Ops: host.OpSync, Drop: true}) // a disk that lies
	fatal(t, f.WriteVec([][]byte{a[:4096]}, 0, true))
	fatal(t, f.Sync())
	fatal(t, d.SyncDir("."))
	if p := read(t, d.Crash(nil, LoseUnsynced), "dir.seg"); !bytes.Equal(p[:4096], b[:4096]) {
		t.Error("the lie was true")
	}
	d.Heal()
	d.Inject(host.Rule{Ops: host.OpRead, Err: atoll.ErrIO, Off: 8192, Len: 1, Times: 2})
	for i := range 3 {
		_, err := f.ReadAt(make([]byte, 16384), 0)
		if bad := errors.Is(err, atoll.ErrIO); bad != (i < 2) {
			t.Errorf("read %d: %v", i, err)
		}
	}
}

func TestDiskFull(t *testing.T) {
	d := NewDisk(1)
	d.SetSize(10 * 4096)
	f := create(t, d, "a")
	_, err := f.WriteAt(make([]byte, 10*4096), 0)
	fatal(t, err)
	_, err = f.WriteAt(make([]byte, 1), 10*4096)
	want(t, err, atoll.ErrNoSpace)
	_, err = f.WriteAt(make([]byte, 4096), 4096) // room that it has
	fatal(t, err)
	_, err = d.Create("b")
	want(t, err, atoll.ErrNoSpace)
	fatal(t, f.Punch(0, 2*4096))
	if _, free, _ := d.Space(); free != 2*4096 {
		t.Errorf("%d free", free)
	}
	fatal(t, d.Remove("a"))
	if _, free, _ := d.Space(); free != 10*4096 {
		t.Errorf("%d free", free)
	}
	d.Inject(host.Rule{Ops: host.OpSpace, Err: atoll.ErrNoSpace})
	if _, free, err := d.Space(); free != 0 || err != nil {
		t.Errorf("%d free, %v", free, err)
	}
}

func TestDelayIsVirtual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewDisk(1)
		f := create(t, d, "a")
		d.Inject(host.Rule{Ops: host.OpSync, Delay: time.Hour})
		start := time.Now()
		fatal(t, f.WriteVec([][]byte{[]byte("x")}, 0, true))
		if took := time.Since(start); took != time.Hour {
			t.Errorf("took %v", took)
		}
	})
}

func TestDeterministic(t *testing.T) {
	run := func() string {
		h := newHistory(t, 7)
		var out []byte
		for range 30 {
			h.step()
			out = append(out, read(t, h.d.Crash(nil, Random), "f")...)
		}
		return string(out)
	}
	if first, second := run(), run(); first != second {
		t.Error("one seed, two histories")
	}
}

func TestClone(t *testing.T) {
	d := NewDisk(1)
	f := create(t, d, "a")
	_, err := f.WriteAt([]byte("abc"), 0)
	fatal(t, err)
	_, err = d.Lock("LOCK")
	fatal(t, err)
	c := d.Clone()
	_, err = c.Lock("LOCK")
	fatal(t, err)
	_, err = f.WriteAt([]byte("x"), 0)
	fatal(t, err)
	if got := read(t, c, "a"); string(got) != "abc" {
		t.Errorf("%q", got)
	}
	if c.Pending() == 0 || len(read(t, c.Crash(nil, LoseUnsynced), "a")) != 0 {
		t.Error("the copy forgot what is pending")
	}
}

// TestCrashWhileWriting takes copies at syncs of several writers at once.
func TestCrashWhileWriting(t *testing.T) {
	d := NewDisk(1)
	var wg sync.WaitGroup
	files := make([]host.File, 4)
	for i := range files {
		files[i] = create(t, d, fmt.Sprint("f", i))
	}
	fatal(t, d.SyncDir("."))
	d.OnSync(func(p SyncPoint) {
		c := p.Disk.Crash(nil, Random)
		f, err := c.Open(p.Path)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		f.ReadAt(make([]byte, 16384), 0)
		f.WriteAt([]byte("x"), 5000)
	})
	for i, f := range files {
		wg.Go(func() {
			p := make([]byte, 6000)
			for k := range 60 {
				fill(p, uint64(i*100+k))
				f.WriteAt(p, int64(k*50))
				if err := f.WriteVec([][]byte{p[:4096]}, int64(k%3*4096), true); err != nil {
					t.Error(err)
				}
				f.Sync()
			}
		})
	}
	wg.Wait()
}

// BenchmarkCrash copies a disk of 16 prewritten slots with a little data.
func BenchmarkCrash(b *testing.B) {
	d := NewDisk(1)
	zero := make([]byte, 1<<20)
	data := make([]byte, 8192)
	fill(data, 1)
	for i := range 16 {
		f, _ := d.Create(fmt.Sprint("slot", i))
		for off := 0; off < 64<<20; off += len(zero) {
			f.WriteAt(zero, int64(off))
		}
		f.Sync()
		f.WriteVec([][]byte{data}, 4096, true)
	}
	d.SyncDir(".")
	f, _ := d.Open("slot0")
	b.ReportAllocs()
	for b.Loop() {
		f.WriteVec([][]byte{data}, 4096, true)
		d.Crash(nil, Random)
	}
}
