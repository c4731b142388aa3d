package stream

import (
	"cmp"
	"container/heap"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// The event loop runs the real cores of writers and recoveries against model
// nodes and a model catalog. One goroutine, one clock, one source of chance: a
// seed is one history, to the last event. Owners come at any time, also while
// the one before lives and believes in its lease, so only the protocol protects
// the data.
//
// Lengths and offsets are in blocks, as in the product; a batch has a header.

// loopBugs are the mistakes to make: those of the cores and two of nodes.
type loopBugs struct {
	Bugs
	AckBeforeSync bool // a node answers before its data are durable
	ForgetFence   bool // a node loses its fences when it crashes
}

const (
	loopNodes  = 4
	loopCopies = 3
	loopSize   = 40 // blocks of a segment
)

// loop is one history.
type loop struct {
	rng    *rand.Rand
	bugs   loopBugs
	now    time.Duration
	queue  loopQueue
	pushed int
	trace  uint64
	events int

	nodes  [loopNodes]*loopNode
	head   loopHead
	owners []*loopOwner
	vals   int         // values given out
	acked  map[int]int // value to epoch
	last   map[[2]int]time.Duration
	calm   bool
	broken []string
}

type loopEvent struct {
	at  time.Duration
	seq int
	tag string
	do  func()
}

type loopQueue []*loopEvent

func (q loopQueue) Len() int { return len(q) }
func (q loopQueue) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(q[i].at, q[j].at), cmp.Compare(q[i].seq, q[j].seq)) < 0
}
func (q loopQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *loopQueue) Push(x any)   { *q = append(*q, x.(*loopEvent)) }
func (q *loopQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

func (l *loop) after(d time.Duration, tag string, do func()) {
	l.pushed++
	heap.Push(&l.queue, &loopEvent{l.now + max(d, 1), l.pushed, tag, do})
}

// run does what is due until the queue is empty or the time is up.
func (l *loop) run(until time.Duration) {
	h := fnv.New64a()
	for len(l.queue) > 0 && l.queue[0].at <= until && len(l.broken) == 0 {
		e := heap.Pop(&l.queue).(*loopEvent)
		l.now = e.at
		l.events++
		fmt.Fprint(h, l.trace, e.at, e.tag)
		l.trace = h.Sum64()
		e.do()
	}
	l.now = max(l.now, until)
}

func (l *loop) fail(format string, args ...any) {
	l.broken = append(l.broken, fmt.Sprintf("at %v: ", l.now)+fmt.Sprintf(format, args...))
}

// travel is how long a message takes; some take very long.
func (l *loop) travel() time.Duration {
	switch {
	case l.calm || l.rng.IntN(30) > 0:
		return time.Duration(50+l.rng.IntN(400)) * time.Microsecond
	case l.rng.IntN(2) == 0:
		return time.Duration(l.rng.IntN(100)) * time.Millisecond
	}
	return time.Duration(l.rng.IntN(4000)) * time.Millisecond
}

// runLoop is one history: harm, then peace, a last owner, and the books.
func runLoop(seed uint64, bugs loopBugs) *loop {
	l := &loop{rng: rand.New(rand.NewPCG(seed, 0x6c6f6f70)), bugs: bugs, acked: map[int]int{}, last: map[[2]int]time.Duration{}}
	for i := range l.nodes {
		l.nodes[i] = &loopNode{up: true, segs: map[atoll.Ordinal]*loopCopy{}}
	}
	l.takeOver()
	l.after(time.Duration(l.rng.IntN(20))*time.Millisecond, "harm", l.harm)
	l.run(time.Duration(500+l.rng.IntN(1500)) * time.Millisecond)
	l.calm = true
	l.run(l.now + 15*time.Second)
	for _, o := range l.owners {
		o.dead = true
	}
	l.takeOver()
	l.run(l.now + 15*time.Second)
	if len(l.broken) == 0 {
		l.audit()
	}
	return l
}

// harm crashes nodes and owners and lets new ones come.
func (l *loop) harm() {
	if l.calm {
		return
	}
	down := func() time.Duration { return time.Duration(1+l.rng.IntN(400)) * time.Millisecond }
	switch l.rng.IntN(6) {
	case 0, 1:
		l.crash(l.rng.IntN(loopNodes), down())
	case 2:
		for i := range l.nodes {
			l.crash(i, down())
		}
	case 3:
		l.owners[len(l.owners)-1].dead = true
		l.takeOver()
	default:
		l.takeOver()
		if l.rng.IntN(2) == 0 {
			l.after(time.Duration(l.rng.IntN(2000))*time.Microsecond, "blackout", func() {
				for i := range l.nodes {
					l.crash(i, time.Duration(1+l.rng.IntN(5))*time.Millisecond)
				}
			})
		}
	}
	l.after(time.Duration(5+l.rng.IntN(150))*time.Millisecond, "harm", l.harm)
}

// audit looks for every acknowledged value on every verified copy. An owner may
// hear of it late that its entry is durable everywhere, when the next one serves
// already (in the product its lease forbids it to say so); but then the entry is
// in the log that the next one recovered.
func (l *loop) audit() {
	if o := l.owners[len(l.owners)-1]; !o.ready {
		l.fail("the last owner does not serve")
		return
	}
	found := make(map[int]bool)
	for _, s := range l.head.sealed {
		if len(s.unverified) == len(s.nodes) {
			// A writer that could seal no copy: all have it, and none is known to.
			s.unverified = nil
		}
		for _, id := range s.nodes {
			if slices.Contains(s.unverified, id) {
				continue
			}
			c := l.nodes[id-1].seg(s.ord)
			if c.end() < s.length && !c.rotten {
				l.fail("segment %d of length %d: copy on node %v ends at %d", s.ord, s.length, id, c.end())
				return
			}
			for _, b := range c.batches {
				for _, v := range b.vals {
					found[v] = found[v] || b.end <= s.length
				}
			}
		}
	}
	for v := 1; v <= l.vals; v++ {
		if epoch, ok := l.acked[v]; ok && !found[v] {
			l.fail("value %d, acknowledged under epoch %d, is lost", v, epoch)
		}
	}
}

// TestLoop runs many histories, each twice: they must be equal event by event.
func TestLoop(t *testing.T) {
	events, acked, count := 0, 0, uint64(1000)
	if *long {
		count = 50_000
	}
	if atoll.Invariants {
		count = 200
	}
	for seed := range count {
		l := runLoop(seed, loopBugs{})
		if len(l.broken) > 0 {
			t.Fatalf("seed %d: %v", seed, l.broken[0])
		}
		if again := runLoop(seed, loopBugs{}); again.trace != l.trace || again.events != l.events {
			t.Fatalf("seed %d: two runs differ", seed)
		}
		events, acked = events+l.events, acked+len(l.acked)
	}
	t.Logf("%d events, %d values acknowledged", events, acked)
}

// TestLoopBugs makes one known mistake after another: each must be found.
func TestLoopBugs(t *testing.T) {
	for _, b := range []struct {
		name string
		bugs loopBugs
	}{
		{"acknowledge before fsync", loopBugs{AckBeforeSync: true}},
		{"fence not durable", loopBugs{ForgetFence: true}},
		{"recovery does not fence", loopBugs{Bugs: Bugs{NoFence: true}}},
		{"no write-back after recovery", loopBugs{Bugs: Bugs{NoWriteBack: true}}},
		{"shortest prefix", loopBugs{Bugs: Bugs{Shortest: true}}},
		{"acknowledge before all copies", loopBugs{Bugs: Bugs{AckBeforeDurable: true}}},
		{"silent copies not listed", loopBugs{Bugs: Bugs{DropSilent: true}}},
	} {
		t.Run(b.name, func(t *testing.T) {
			for seed := range uint64(3000) {
				if l := runLoop(seed, b.bugs); len(l.broken) > 0 {
					t.Logf("found by seed %d: %s", seed, l.broken[0])
					return
				}
			}
			t.Error("not found by 3000 seeds")
		})
	}
}
