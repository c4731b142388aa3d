package node

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/wire"
)

// memDisk returns a formatted disk in memory.
func memDisk(t testing.TB, seed uint64) *hosttest.Disk {
	t.Helper()
	d := hosttest.NewDisk(seed)
	must(t, Format(d, Identity{Cluster: testCluster, Node: 1}))
	return d
}

// known is what the outside may rely on about one segment.
type known struct {
	acked   atoll.BlockNo // at least so much is there
	sent    atoll.BlockNo // at most so much
	fence   atoll.Epoch   // answered
	created bool
	sealed  atoll.BlockNo // answered; 0 = not
	sealing atoll.BlockNo // asked for
	deleted bool          // answered
	dying   bool          // asked for
}

// crashPoint is a disk as after a power cut and what was known then.
type crashPoint struct {
	disk  *hosttest.Disk
	want  map[atoll.SegmentID]known
	title string
}

// history runs a random workload and collects crash points.
type history struct {
	t       *testing.T
	rng     *rand.Rand
	n       *Node
	w       map[atoll.SegmentID]*writer
	known   map[atoll.SegmentID]known
	points  []crashPoint
	nextOrd int

	committer *Committer // set where the disk's flush is shared
	together  int        // rounds with several segments
}

// open opens the node, with the disk's own kind of flush.
func (h *history) open(d *hosttest.Disk) {
	h.n = openNode(h.t, d, func(o *Options) {
		if h.committer != nil {
			o.SharedFlush, o.Committer = true, h.committer
		}
	})
}

// appendTogether sends small batches to every segment that takes some, for one
// round of the committer.
func (h *history) appendTogether() {
	var list []*wire.Append
	var ids []atoll.SegmentID
	for i := range h.nextOrd {
		id := testSeg(i + 1)
		if k, w := h.known[id], h.w[id]; k.created && !k.dying && k.sealed == 0 && k.sealing == 0 && w.at <= 200 {
			list, ids = append(list, w.batch(h.rng.IntN(3))), append(ids, id)
			h.set(id, func(k *known) { k.sent = w.at })
		}
	}
	h.committer.mu.turn <- struct{}{}
	done := make(chan *wire.Append, len(list))
	for _, a := range list {
		a.Done = done
		h.n.Append(a)
	}
	<-h.committer.mu.turn
	for range list { // what is known of each counts from its own answer on
		a := <-done
		must(h.t, a.Err)
		h.set(a.Seg, func(k *known) { k.acked = h.w[a.Seg].at })
		h.w[a.Seg].acked = h.w[a.Seg].at
	}
	if len(ids) > 1 {
		h.together++
	}
}

func (h *history) set(id atoll.SegmentID, f func(*known)) {
	k := h.known[id]
	f(&k)
	h.known[id] = k
}

// pick returns a random segment that is not deleted.
func (h *history) pick() (atoll.SegmentID, bool) {
	if h.nextOrd == 0 {
		return atoll.SegmentID{}, false
	}
	id := testSeg(1 + h.rng.IntN(h.nextOrd))
	return id, !h.known[id].dying
}

// step does one random thing and checks its outcome.
func (h *history) step() {
	t := h.t
	id, ok := h.pick()
	op := h.rng.IntN(100)
	if !ok || op < 10 && h.nextOrd < 6 {
		h.nextOrd++
		id = testSeg(h.nextOrd)
		h.w[id] = newWriter(id, 1)
		h.set(id, func(k *known) {})
		must(t, h.n.Create(bg(), id, 1, 256))
		h.set(id, func(k *known) { k.created, k.fence = true, 1 })
		return
	}
	k, w := h.known[id], h.w[id]
	switch {
	case op < 50 && h.committer != nil:
		h.appendTogether()
	case op < 80:
		if k.sealed > 0 || w.at > 200 {
			return
		}
		var list []*wire.Append
		for range 1 + h.rng.IntN(3) {
			list = append(list, w.batch(h.rng.IntN(4)))
		}
		h.set(id, func(k *known) { k.sent = w.at })
		must(t, h.n.appendAll(list))
		h.set(id, func(k *known) { k.acked = w.at })
		w.acked = w.at
	case op < 88:
		_, err := h.n.Fence(bg(), id, w.epoch+1)
		must(t, err)
		w.epoch++
		h.set(id, func(k *known) { k.fence = w.epoch })
	case op < 95:
		if k.sealed > 0 || k.acked == 0 {
			return
		}
		h.set(id, func(k *known) { k.sealing = k.acked })
		must(t, h.n.Seal(bg(), id, w.epoch, k.acked))
		h.set(id, func(k *known) { k.sealed = k.acked })
	case op < 98:
		h.set(id, func(k *known) { k.dying = true })
		must(t, h.n.Delete(bg(), id, w.epoch))
		h.set(id, func(k *known) { k.deleted = true })
	default:
		must(t, h.n.Close())
		h.n = nil
	}
}

// TestCrash cuts the power at every sync of a random workload and opens what is
// left: what was acknowledged is there, what was never sent is not, fences and
// deletions stand. Half of the disks flush as a whole, so that the nodes' shared
// flush has to be in time.
func TestCrash(t *testing.T) {
	seeds, steps := 20, 60
	if testing.Short() || atoll.Invariants {
		seeds, steps = 2, 40
	}
	total := 0
	for seed := range uint64(seeds) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			total += crashRun(t, seed, steps)
		})
	}
	t.Logf("%d crash points", total)
}

func crashRun(t *testing.T, seed uint64, steps int) int {
	d := memDisk(t, seed)
	h := &history{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)),
		w: make(map[atoll.SegmentID]*writer), known: make(map[atoll.SegmentID]known),
	}
	if seed%2 == 1 {
		h.committer = new(Committer)
		d.ShareFlush()
	}
	cut := rand.New(rand.NewPCG(seed, 2))
	d.OnSync(func(p hosttest.SyncPoint) {
		mode := []hosttest.CrashMode{hosttest.LoseUnsynced, hosttest.KeepAll, hosttest.Random}[cut.IntN(3)]
		h.points = append(h.points, crashPoint{
			disk: d.Crash(cut, mode), want: maps.Clone(h.known),
			title: fmt.Sprintf("sync %d (%v %s after=%v mode=%d)", p.N, p.Op, p.Path, p.After, mode),
		})
	})
	for range steps {
		if h.n == nil {
			h.open(d)
		}
		h.step()
	}
	d.OnSync(nil)
	if h.committer != nil && steps >= 60 && h.together == 0 {
		t.Error("no round had several segments")
	}
	if h.n != nil {
		h.n.Abort()
	}
	for _, p := range h.points {
		p.check(t)
		if t.Failed() {
			t.Fatalf("at %s", p.title)
		}
	}
	return len(h.points)
}

// check opens the disk and compares.
func (p *crashPoint) check(t *testing.T) {
	n, err := Open(Options{FS: p.disk, Cluster: testCluster, NoPrewrite: true})
	if err != nil {
		t.Errorf("open: %v", err)
		return
	}
	defer n.Abort()
	for id, k := range p.want {
		p.checkSegment(t, n, id, k)
	}
}

func (p *crashPoint) checkSegment(t *testing.T, n *Node, id atoll.SegmentID, k known) {
	if k.fence > 1 {
		if _, err := n.Fence(bg(), id, k.fence-1); !errors.Is(err, atoll.ErrFenced) {
			t.Errorf("segment %v: fence %d did not survive: %v", id, k.fence, err)
		}
	}
	s, err := n.lookup(id)
	if k.deleted {
		if err == nil {
			t.Errorf("segment %v: deleted and back", id)
		}
		if err := n.Create(bg(), id, k.fence, 256); !errors.Is(err, atoll.ErrFenced) {
			t.Errorf("segment %v: created after its deletion: %v", id, err)
		}
		return
	}
	if err != nil {
		if k.created && !k.dying {
			t.Errorf("segment %v: %v", id, err)
		}
		return
	}
	tail := s.answer()
	switch {
	case tail.Grade == wire.Unknown || tail.Grade == wire.Absent:
		t.Errorf("segment %v: grade %v", id, tail.Grade)
	case tail.Length < k.acked || tail.Length > k.sent:
		t.Errorf("segment %v: length %d, acknowledged %d, sent %d", id, tail.Length, k.acked, k.sent)
	case k.sealed > 0 && (!tail.Sealed || tail.Length != k.sealed):
		t.Errorf("segment %v: sealed at %d, found %+v", id, k.sealed, tail)
	case tail.Sealed && k.sealing != tail.Length:
		t.Errorf("segment %v: sealed at %d, asked for %d", id, tail.Length, k.sealing)
	}
	if x, err := n.index(s); err != nil || len(x.crcs) != int(tail.Length) {
		t.Errorf("segment %v: index of %d blocks, length %d: %v", id, len(x.crcs), tail.Length, err)
		return
	}
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	x, _ := n.index(s)
	for b := atoll.BlockNo(0); b < tail.Length; b++ {
		if err := n.Read(bg(), id, b, buf.Bytes()); err != nil {
			t.Errorf("segment %v: %v", id, err)
			return
		}
		if i := searchBatch(x, b); !i && string(buf.Bytes()) != string(block(id, int(b))) {
			t.Errorf("segment %v block %d: other bytes", id, b)
			return
		}
	}
	if _, err := n.Verify(bg(), id); err != nil {
		t.Errorf("segment %v: %v", id, err)
	}
}

// searchBatch reports whether a batch header lies at block b.
func searchBatch(x index, b atoll.BlockNo) bool {
	for _, at := range x.batches {
		if at == b {
			return true
		}
	}
	return false
}
