package node

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

func wantErr(t *testing.T, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("error is %v, want %v", err, kind)
	}
}

// TestIdentity: a disk is served only as what it is, and by one process.
func TestIdentity(t *testing.T) {
	d := hosttest.NewDisk(1)
	_, err := Open(Options{FS: d})
	wantErr(t, err, atoll.ErrNotExist)
	wantErr(t, Format(d, Identity{}), atoll.ErrInvalid)
	must(t, Format(d, Identity{Cluster: testCluster}))
	wantErr(t, Format(d, Identity{Cluster: testCluster}), atoll.ErrExist)
	id, err := ReadIdentity(d)
	must(t, err)
	if id.Cluster != testCluster || id.Node != 0 || id.Disk.IsZero() || id.Incarnation.IsZero() {
		t.Errorf("identity %+v", id)
	}
	_, err = Open(Options{FS: d, Cluster: atoll.UUID{2}})
	wantErr(t, err, atoll.ErrIdentity)
	must(t, Assign(d, 4))
	wantErr(t, Assign(d, 5), atoll.ErrIdentity)
	_, err = Open(Options{FS: d, Node: 5})
	wantErr(t, err, atoll.ErrIdentity)
	n := openNode(t, d)
	if n.Identity().Node != 4 || n.Identity().Disk != id.Disk {
		t.Errorf("identity %+v", n.Identity())
	}
	_, err = Open(Options{FS: d})
	wantErr(t, err, atoll.ErrBusy)
	must(t, n.Close())
	must(t, n.Close())
	wantErr(t, n.Create(bg(), testSeg(1), 1, 64), atoll.ErrClosed)

	f, err := d.Open(superFile)
	must(t, err)
	p := segment.EncodeSuper(segment.Super{Cluster: testCluster})
	for _, q := range [][]byte{p[:atoll.BlockSize], p[atoll.BlockSize:]} {
		q[8] = 9
		copy(q[12:16], make([]byte, 4))
		le.PutUint32(q[12:], segment.CRC(q))
	}
	_, err = f.WriteAt(p, 0)
	must(t, errors.Join(err, f.Sync(), f.Close()))
	_, err = Open(Options{FS: d})
	wantErr(t, err, atoll.ErrVersion)
}

// TestSlots: segments take prewritten files, deleted ones give them back, and
// old bytes of other segments of the same medium mean nothing.
func TestSlots(t *testing.T) {
	d := memDisk(t, 1)
	n := openNode(t, d, func(o *Options) { o.NoPrewrite, o.Spare = false, 1 })
	waitSlots := func(want int) {
		t.Helper()
		for i := 0; n.slots.ready() < want; i++ {
			if i > 20000 {
				t.Fatalf("%d slots ready, want %d", n.slots.ready(), want)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	for round := 1; round <= 3; round++ {
		waitSlots(1)
		id := testSeg(round)
		must(t, n.Create(bg(), id, 1, atoll.SegmentBlocks))
		if s, _ := n.lookup(id); s.mu.st.flags&prewritten == 0 {
			t.Fatal("segment is not prewritten")
		}
		w := newWriter(id, 1)
		for range 10 - 2*round { // always shorter than the one before
			must(t, w.append(n, 2))
		}
		if round == 2 { // leave it to a crash
			d = d.Crash(nil, hosttest.LoseUnsynced)
			n.Abort()
			n = openNode(t, d, func(o *Options) { o.NoPrewrite, o.Spare = false, 1 })
		}
		tail, err := n.Fence(bg(), id, 2)
		must(t, err)
		if tail.Length != w.at || tail.Grade < wire.Intact {
			t.Fatalf("round %d: tail %+v, want length %d", round, tail, w.at)
		}
		must(t, n.Seal(bg(), id, 2, w.at))
		must(t, n.Delete(bg(), id, 2))
	}
	st, err := n.Stat(bg())
	must(t, err)
	if st.Segments != 0 {
		t.Errorf("%d segments", st.Segments)
	}
	for i := 0; ; i++ { // until the filler is done
		n.mu.Lock()
		used := n.mu.used
		n.mu.Unlock()
		if used == int64(n.slots.ready())*slotBytes {
			break
		}
		if i > 20000 {
			t.Fatalf("%d bytes in use with %d slots", used, n.slots.ready())
		}
		time.Sleep(5 * time.Millisecond)
	}
	must(t, n.Create(bg(), testSeg(9), 1, atoll.SegmentBlocks))
	w := newWriter(testSeg(9), 1)
	must(t, w.append(n, 1))
	must(t, n.Seal(bg(), testSeg(9), 1, 2))
	must(t, n.Discard(bg(), testSeg(9), []wire.Run{{Block: 1, Blocks: 1}}))
	res, err := n.Verify(bg(), testSeg(9))
	must(t, err)
	if len(res.Damaged) > 0 {
		t.Errorf("discarded blocks count as damage: %v", res.Damaged)
	}
	wantErr(t, n.Discard(bg(), testSeg(9), []wire.Run{{Block: 1, Blocks: 2}}), atoll.ErrInvalid)
	have := n.slots.ready()
	must(t, n.Delete(bg(), testSeg(9), 1))
	if n.slots.ready() > have+1 || n.openSegments() != 0 { // only the filler may add one
		t.Error("a file with holes became a slot")
	}
	must(t, n.Close())
}

// TestConcurrent runs writers, readers, lists and deletions at once, over a
// queue that is too short, and then compares everything.
func TestConcurrent(t *testing.T) {
	n := openNode(t, dirFS(t), func(o *Options) {
		o.QueueLen, o.MaxHandles, o.IndexBytes = 4, 3, 4096
		o.Metrics = NewMetrics(prometheus.NewRegistry())
	})
	var wg sync.WaitGroup
	const writers, rounds = 8, 40
	ends := make([]atoll.BlockNo, writers+1)
	for i := 1; i <= writers; i++ {
		wg.Go(func() {
			id, rng := testSeg(i), rand.New(rand.NewPCG(uint64(i), 0))
			if err := n.Create(bg(), id, 1, 512); err != nil {
				t.Error(err)
				return
			}
			w := newWriter(id, 1)
			buf := host.Alloc(atoll.BlockSize)
			defer buf.Release()
			for range rounds {
				a := w.batch(1)
				for n.Append(a); ; n.Append(a) {
					if a = <-w.done; !errors.Is(a.Err, atoll.ErrBusy) {
						break
					}
					time.Sleep(time.Millisecond)
				}
				a.Vec.Release()
				if a.Err != nil {
					t.Error(a.Err)
					return
				}
				b := atoll.BlockNo(2*rng.IntN(int(w.at)/2) + 1)
				if err := n.Read(bg(), id, b, buf.Bytes()); err != nil || !bytes.Equal(buf.Bytes(), block(id, int(b))) {
					t.Errorf("read block %d: %v", b, err)
					return
				}
			}
			ends[i] = w.at
			if i%2 == 0 {
				if err := n.Seal(bg(), id, 1, w.at); err != nil {
					t.Error(err)
				}
			}
			if i%4 == 0 {
				if err := n.Delete(bg(), id, 1); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			if _, err := n.List(bg(), atoll.SegmentID{}, 5); err != nil {
				t.Error(err)
			}
			if _, err := n.Stat(bg()); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	for i := 1; i <= writers; i++ {
		if i%4 == 0 {
			_, err := n.Verify(bg(), testSeg(i))
			wantErr(t, err, atoll.ErrNotExist)
			continue
		}
		checkBlocks(t, n, testSeg(i), ends[i])
		res, err := n.Verify(bg(), testSeg(i))
		must(t, err)
		if len(res.Damaged) > 0 || res.Blocks != ends[i] {
			t.Errorf("verify: %+v", res)
		}
	}
	must(t, n.Close())
}

// TestPipeline sends many batches of one segment without waiting.
func TestPipeline(t *testing.T) {
	n := openNode(t, dirFS(t))
	must(t, n.Create(bg(), testSeg(1), 1, 2048))
	w := newWriter(testSeg(1), 1)
	var list []*wire.Append
	for i := range 100 {
		list = append(list, w.batch(i%5))
	}
	must(t, n.appendAll(list))
	must(t, n.appendAll(list)) // all again
	tail, err := n.Fence(bg(), testSeg(1), 1)
	must(t, err)
	if tail.Length != w.at {
		t.Errorf("length %d, want %d", tail.Length, w.at)
	}
	// A batch whose payload does not match its header is not written.
	a := w.batch(1)
	a.Vec.Slices()[1][7] ^= 1
	wantErr(t, n.appendAll([]*wire.Append{a}), atoll.ErrCorrupt)
	// Another batch than the one that is there.
	v := newWriter(testSeg(1), 1)
	v.seq = 55
	wantErr(t, n.appendAll([]*wire.Append{v.batch(0)}), atoll.ErrConflict)
	// The footer's room is kept.
	must(t, n.Create(bg(), testSeg(2), 1, 8))
	u := newWriter(testSeg(2), 1)
	must(t, u.append(n, 5))
	wantErr(t, u.append(n, 0), atoll.ErrTooLarge)
	must(t, n.Seal(bg(), testSeg(2), 1, 6))
	must(t, n.Close())
}

// TestPauseAndAbort runs in a bubble: nothing waits on a real clock.
func TestPauseAndAbort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := memDisk(t, 3)
		n := openNode(t, d)
		id := testSeg(1)
		must(t, n.Create(bg(), id, 1, 64))
		w := newWriter(id, 1)
		must(t, w.append(n, 1))
		n.Pause()
		a := w.batch(1)
		n.Append(a)
		buf := make([]byte, atoll.BlockSize)
		start := time.Now()
		wantErr(t, n.Read(bg(), id, 1, buf), atoll.ErrTimeout)
		if took := time.Since(start); took != atoll.RequestTimeout {
			t.Errorf("waited %v", took)
		}
		if len(w.done) > 0 {
			t.Error("append was answered in a pause")
		}
		n.Resume()
		a = <-w.done
		must(t, a.Err)
		must(t, n.Read(bg(), id, 1, buf))

		n.Pause()
		n.Append(w.batch(1))
		read := make(chan error)
		go func() { read <- n.Read(bg(), id, 1, buf) }()
		synctest.Wait()
		n.Abort()
		wantErr(t, <-read, atoll.ErrUnreachable)
		a = <-w.done
		wantErr(t, a.Err, atoll.ErrUnreachable)
		n.Append(a)
		a = <-w.done
		wantErr(t, a.Err, atoll.ErrUnreachable)

		n = openNode(t, d)
		tail, err := n.Fence(bg(), id, 2)
		must(t, err)
		if tail.Grade != wire.Intact || tail.Length != 4 {
			t.Errorf("tail %+v", tail)
		}
		must(t, n.Close())
	})
}

// TestAllocations: an append and a read allocate nothing once warm.
func TestAllocations(t *testing.T) {
	if atoll.Invariants {
		t.Skip("pools are not kept in race builds")
	}
	n := openNode(t, dirFS(t))
	must(t, n.Create(bg(), testSeg(1), 1, atoll.SegmentBlocks))
	w := newWriter(testSeg(1), 1)
	must(t, w.append(n, 1))
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	s := &stripe{n: n, w: w}
	b := host.Alloc(2 * atoll.BlockSize)
	defer b.Release()
	copy(b.Bytes()[atoll.BlockSize:], block(w.seg, 1))
	crc := segment.CRC(b.Bytes()[atoll.BlockSize:])
	vec := host.NewVec()
	vec.Add(b, b.Bytes())
	a := &wire.Append{Vec: vec, Done: w.done}
	got := hosttest.Allocs(500, func() {
		s.send(a, b.Bytes()[:atoll.BlockSize], nil, crc)
		if a = <-w.done; a.Err != nil {
			t.Fatal(a.Err)
		}
		if err := n.Read(bg(), w.seg, 1, buf.Bytes()); err != nil {
			t.Fatal(err)
		}
	})
	if got >= 1 {
		t.Errorf("%v allocations for an append and a read", got)
	}
	must(t, n.Close())
}

// TestStates: the states file keeps the last state of each id over restarts and
// compactions.
func TestStates(t *testing.T) {
	d := hosttest.NewDisk(1)
	l, err := newStateLog(d, loadedStates{all: make(map[atoll.SegmentID]state)})
	must(t, err)
	rng := rand.New(rand.NewPCG(1, 1))
	want := make(map[atoll.SegmentID]state)
	for i := range 900 { // passes a compaction
		st := state{id: testSeg(rng.IntN(200)), flags: stateFlags(rng.IntN(128)), epoch: atoll.Epoch(i), size: 5, length: 3}
		want[st.id] = st
		must(t, l.put(st, true))
	}
	d = d.Crash(nil, hosttest.Random)
	got, err := readStates(d)
	must(t, err)
	if got.clean || got.doubt || len(got.all) != len(want) {
		t.Errorf("clean %v, doubt %v, %d states, want %d", got.clean, got.doubt, len(got.all), len(want))
	}
	for id, st := range want {
		if got.all[id] != st {
			t.Errorf("state %+v, want %+v", got.all[id], st)
		}
	}
	must(t, l.close(true))
}

// TestStatesGolden holds the states file to testdata/v1.states.
func TestStatesGolden(t *testing.T) {
	p := make([]byte, 2*atoll.BlockSize)
	list := []state{
		{id: testSeg(1), flags: exists | sealed, epoch: 7, size: 16384, length: 900},
		{id: testSeg(2), flags: deleted, epoch: 8},
	}
	(&stateBlock{gen: 5}).encode(p, list)
	(&stateBlock{gen: 5, number: 1, synced: 1, flags: blockClean}).encode(p[atoll.BlockSize:], list[:1])
	const path = "testdata/v1.states"
	if *rewrite {
		must(t, os.WriteFile(path, p, 0o644))
	}
	old, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(old, p) {
		t.Error("the format changed")
	}
	got, err := parseStates(old)
	must(t, err)
	if !got.clean || got.doubt || got.gen != 5 || got.all[testSeg(1)] != list[0] || got.all[testSeg(2)] != list[1] {
		t.Errorf("states %+v", got)
	}
	// The first block damaged, the second durable: doubt.
	old[90] ^= 1
	if got, err = parseStates(old); err != nil || !got.doubt || got.clean {
		t.Errorf("damaged states %+v, %v", got, err)
	}
}

func FuzzStates(f *testing.F) {
	p := make([]byte, 2*atoll.BlockSize)
	(&stateBlock{gen: 5}).encode(p, []state{{id: testSeg(1)}})
	(&stateBlock{gen: 5, number: 1}).encode(p[atoll.BlockSize:], nil)
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := parseStates(p)
		if err == nil && got.doubt && got.clean && got.gen == 0 && len(got.all) > len(p)/stateSize {
			t.Error("more states than bytes")
		}
	})
}

// TestReserve: what frees space may go beyond the high-water mark, but not fill
// the disk.
func TestReserve(t *testing.T) {
	d := hosttest.NewDisk(1)
	must(t, Format(d, Identity{Cluster: testCluster, Node: 1}))
	n := openNode(t, d, func(o *Options) { o.Limit = 1000 * atoll.BlockSize })
	must(t, n.Create(bg(), testSeg(1), 1, 940))
	full := func() bool {
		st, err := n.Stat(bg())
		must(t, err)
		return st.Full
	}
	wantErr(t, n.Create(bg(), testSeg(2), 1, 16), atoll.ErrNoSpace)
	must(t, n.Create(bg(), testSeg(2), 1, 16|wire.Reserve))
	if !full() {
		t.Error("a node above its high-water mark is not full")
	}
	wantErr(t, n.Create(bg(), testSeg(3), 1, 4), atoll.ErrNoSpace)
	wantErr(t, n.Create(bg(), testSeg(3), 1, 32|wire.Reserve), atoll.ErrNoSpace)
	must(t, n.Create(bg(), testSeg(3), 1, 16|wire.Reserve))
	must(t, n.Delete(bg(), testSeg(1), 1))
	must(t, n.Create(bg(), testSeg(4), 1, 64))
	must(t, n.Close())
}

// TestReserveDropsSlots: free slots do not keep files of another size from being
// made.
func TestReserveDropsSlots(t *testing.T) {
	d := hosttest.NewDisk(1)
	must(t, Format(d, Identity{Cluster: testCluster, Node: 1}))
	n := openNode(t, d, func(o *Options) { o.NoPrewrite, o.Spare, o.Limit = false, 1, 80<<20 })
	for limit := time.Now().Add(2 * time.Minute); n.slots.ready() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("no slot was filled")
		}
	}
	must(t, n.Create(bg(), testSeg(1), 1, 74<<20/atoll.BlockSize))
	if n.slots.ready() != 0 {
		t.Error("a slot that stood in the way is still there")
	}
	must(t, n.Close())
}
