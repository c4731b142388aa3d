package stream

import (
	"flag"
	"fmt"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/wire"
)

var long = flag.Bool("long", false, "run the larger searches too")

// The explorer searches all histories of one segment with three copies: a writer
// that has sent all its entries down three links in order, two owners who
// recover the segment at any time and any number of steps apart, and one
// accident. What the owners conclude is decided by the real recoverCore. Every
// message may be delivered late or never, so a crash is a step never taken.
// Lengths count entries.

// variant is one set of rules.
type variant struct {
	name    string
	entries int8
	ack     int  // copies that must have an entry: 3, or 2 for the quorum that this design rejects
	need    int  // pieces of evidence asked for beyond what the core asks for
	apart   bool // the length is read first and the fence set later
	lose    bool // accident: a copy loses its last entry
	knows   bool // and knows it: it answers Unknown from then on
	forget  bool // accident: a copy forgets its fence
	noEpoch bool // the catalog takes the first seal, whatever its epoch
	bugs    Bugs
	unsafe  bool // an acknowledged entry can be lost
	large   bool
}

var variants = []variant{
	{name: "A1 ack all, any clean answer, longest", entries: 2, ack: 3},
	{name: "A2 ack all, any clean answer, shortest", entries: 2, ack: 3, bugs: Bugs{Shortest: true}},
	{name: "A3 as A1 with three entries", entries: 3, ack: 3, large: true},
	{name: "A4 one copy lost an entry and does not know", entries: 2, ack: 3, lose: true, unsafe: true},
	{name: "A5 it knows", entries: 2, ack: 3, lose: true, knows: true},
	{name: "A5 it knows, but is trusted", entries: 2, ack: 3, lose: true, knows: true, bugs: Bugs{TrustUnknown: true}, unsafe: true},
	{name: "A5b it knows, silent copies are dropped", entries: 2, ack: 3, lose: true, knows: true, bugs: Bugs{DropSilent: true}, unsafe: true},
	{name: "A6 it does not know, two answers", entries: 2, ack: 3, need: 2, lose: true},
	{name: "A6 the same, shortest", entries: 2, ack: 3, need: 2, lose: true, bugs: Bugs{Shortest: true}, unsafe: true},
	{name: "A7 one copy forgets its fence", entries: 2, ack: 3, forget: true, unsafe: true},
	{name: "A8 the same, two answers", entries: 2, ack: 3, need: 2, forget: true, large: true},
	{name: "A9 the catalog does not compare epochs", entries: 2, ack: 3, noEpoch: true},
	{name: "no fence", entries: 2, ack: 3, bugs: Bugs{NoFence: true}, unsafe: true},
	{name: "no write-back", entries: 2, ack: 3, bugs: Bugs{NoWriteBack: true}, unsafe: true},
	{name: "acknowledged before durable", entries: 2, ack: 3, bugs: Bugs{AckBeforeDurable: true}, unsafe: true},
	{name: "B1 ack two, one answer", entries: 2, ack: 2, unsafe: true},
	{name: "B2 ack two, two answers", entries: 2, ack: 2, need: 2},
	{name: "B3 the same, shortest", entries: 2, ack: 2, need: 2, bugs: Bugs{Shortest: true}, unsafe: true},
	{name: "B4 the length read apart from the fence", entries: 2, ack: 2, need: 2, apart: true, unsafe: true},
	{name: "B5 one copy lost an entry", entries: 2, ack: 2, need: 2, lose: true, unsafe: true},
	{name: "B6 one copy forgets its fence", entries: 2, ack: 2, need: 2, forget: true, unsafe: true},
	{name: "B7 one copy lost an entry, three answers", entries: 2, ack: 2, need: 3, lose: true},
	{name: "B7 one copy forgets its fence, three answers", entries: 2, ack: 2, need: 3, forget: true},
}

// mCopy is a copy of the segment.
type mCopy struct {
	length int8
	fence  int8
	sealed int8 // sealed length, -1 if not
	broken bool // lost an entry and knows it
	hurt   bool // lost an entry
}

// mOwner is a recovering owner; owner i has epoch i+1.
type mOwner struct {
	phase int8 // 0 not started, 1 asking, 2 completing, 3 gone
	views [3]mView
}

// mView is what an owner knows of a copy.
type mView struct {
	asked   int8
	length  int8
	sealed  bool
	unknown bool
	done    bool // sealed it
}

// world is a state of everything.
type world struct {
	copies [3]mCopy
	sent   [3]int8 // entries that the link has delivered
	heard  [3]int8 // acknowledgements that came back
	acked  int8
	quit   bool // the writer sealed and left
	owners [2]mOwner
	epoch  int8 // in the catalog
	sealed int8 // in the catalog, -1 if not
	listed [3]int8
	spent  bool // the accident has happened
}

// States of a copy in the catalog's record.
const (
	listedWhole int8 = iota + 1
	listedUnverified
	dropped
)

func start() world {
	w := world{sealed: -1}
	for i := range w.copies {
		w.copies[i].sealed = -1
	}
	return w
}

// lost tells what is wrong with a state, if anything.
func (v *variant) lost(w *world) string {
	if w.sealed < 0 {
		return ""
	}
	if w.acked > w.sealed {
		return fmt.Sprintf("%d entries acknowledged, sealed at %d", w.acked, w.sealed)
	}
	best := int8(0)
	for i, c := range w.copies {
		if w.listed[i] != dropped {
			best = max(best, c.length)
		}
		if w.listed[i] == listedWhole && !c.hurt && c.length < w.sealed {
			return fmt.Sprintf("copy %d is listed as whole with %d of %d", i, c.length, w.sealed)
		}
	}
	if best < w.acked {
		return fmt.Sprintf("%d entries acknowledged, the best copy listed has %d", w.acked, best)
	}
	return ""
}

var (
	answers = [...]string{"answers owner 0", "answers owner 1"}
	worked  = [...]string{"is worked on by owner 0", "is worked on by owner 1"}
)

var threeNodes = []atoll.NodeID{0, 1, 2}

// core builds the real core from an owner's state.
func (v *variant) core(o *mOwner) *recoverCore {
	r := &recoverCore{nodes: threeNodes, waited: true, bugs: v.bugs}
	for i, view := range o.views {
		if view.asked < v.steps() {
			continue
		}
		t := wire.Tail{Grade: wire.Clean, Length: atoll.BlockNo(view.length), Sealed: view.sealed, Sum: uint32(view.length) + 1}
		if view.unknown {
			t.Grade = wire.Unknown
		}
		r.answered(i, t)
	}
	return r
}

// steps is how many steps it takes to ask a copy.
func (v *variant) steps() int8 {
	if v.apart {
		return 2
	}
	return 1
}

// evident counts the evidence that a core has.
func (v *variant) evident(r *recoverCore) (count, clean int) {
	for i := range 3 {
		if r.evidence(i) {
			count++
			if r.vouches(i) {
				clean++
			}
		}
	}
	return count, clean
}

// column packs all that concerns one copy.
func (w *world) column(i int) uint32 {
	c := &w.copies[i]
	x := uint32(c.length) | uint32(c.fence)<<2 | uint32(c.sealed+1)<<4 | bit(c.broken)<<7 | bit(c.hurt)<<8 |
		uint32(w.sent[i])<<9 | uint32(w.heard[i])<<11 | uint32(w.listed[i])<<13
	for k := range w.owners {
		v := &w.owners[k].views[i]
		y := uint32(v.asked) | uint32(v.length)<<2 | bit(v.sealed)<<4 | bit(v.unknown)<<5 | bit(v.done)<<6
		x |= y << (15 + 7*k)
	}
	return x
}

func bit(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// key identifies a state; copies have no names, so their order does not count.
func (w *world) key() [4]uint32 {
	a, b, c := w.column(0), w.column(1), w.column(2)
	if a > b {
		a, b = b, a
	}
	if b > c {
		b, c = c, b
	}
	if a > b {
		a, b = b, a
	}
	rest := uint32(w.acked) | bit(w.quit)<<2 | uint32(w.owners[0].phase)<<3 | uint32(w.owners[1].phase)<<5 |
		uint32(w.epoch)<<7 | uint32(w.sealed+1)<<9 | bit(w.spent)<<12
	return [4]uint32{a, b, c, rest}
}

// next calls visit with every state that one step leads to.
func (v *variant) next(w world, visit func(string, int, world)) {
	for i := range 3 {
		v.writerSteps(w, i, visit)
	}
	if w.epoch == 0 && w.sealed < 0 && !w.quit { // the writer seals by itself
		n := w
		n.quit, n.sealed = true, w.acked
		for i := range 3 {
			n.listed[i] = listedUnverified
			if w.heard[i] >= w.acked {
				n.listed[i] = listedWhole
			}
		}
		visit("writer seals", 0, n)
	}
	for k := range w.owners {
		v.ownerSteps(w, k, visit)
	}
	if w.spent {
		return
	}
	for i := range 3 {
		if v.lose && w.copies[i].length > 0 {
			n := w
			n.spent = true
			n.copies[i].length--
			n.copies[i].hurt, n.copies[i].broken = true, v.knows
			visit("loses an entry", i, n)
		}
		if v.forget && w.copies[i].fence > 0 {
			n := w
			n.spent = true
			n.copies[i].fence = 0
			visit("forgets its fence", i, n)
		}
	}
}

// writerSteps delivers an entry or an acknowledgement on one link.
func (v *variant) writerSteps(w world, i int, visit func(string, int, world)) {
	c := w.copies[i]
	if w.sent[i] < v.entries && c.fence == 0 && c.sealed < 0 && c.length == w.sent[i] {
		n := w
		n.copies[i].length++
		n.sent[i]++
		visit("gets an entry", i, n)
	}
	if w.heard[i] < w.sent[i] && !w.quit {
		n := w
		n.heard[i]++
		n.acked = max(n.acked, v.acknowledged(n.heard))
		visit("is heard", i, n)
	}
}

func (v *variant) acknowledged(heard [3]int8) int8 {
	lo := min(heard[0], heard[1], heard[2])
	hi := max(heard[0], heard[1], heard[2])
	mid := heard[0] + heard[1] + heard[2] - lo - hi
	switch {
	case v.bugs.AckBeforeDurable:
		return hi
	case v.ack == 2:
		return mid
	}
	return lo
}

func (v *variant) ownerSteps(w world, k int, visit func(string, int, world)) {
	o, epoch := &w.owners[k], int8(k+1)
	switch o.phase {
	case 0:
		if w.sealed >= 0 {
			return // the catalog has the length, and that stands
		}
		n := w
		n.owners[k].phase = 1
		n.epoch = max(n.epoch, epoch)
		visit("owner starts", k, n)
	case 1:
		for i := range 3 {
			v.ask(w, k, i, visit)
		}
		v.decide(w, k, visit)
	case 2:
		v.completeSteps(w, k, visit)
	}
}

// gone ends an owner; what it knew no longer counts.
func (o *mOwner) gone() { *o = mOwner{phase: 3} }

// ask fences a copy and notes its answer, in one step or, if the variant says
// so, in two.
func (v *variant) ask(w world, k, i int, visit func(string, int, world)) {
	n, epoch := w, int8(k+1)
	o, c := &n.owners[k], &n.copies[i]
	view := &o.views[i]
	if view.asked >= v.steps() {
		return
	}
	if c.fence > epoch {
		o.gone()
		visit("refuses the owner", i, n)
		return
	}
	if view.asked == 0 {
		view.length, view.sealed, view.unknown = c.length, c.sealed >= 0, c.broken
		if c.sealed >= 0 {
			view.length = c.sealed // as the footer says, whatever became of the data
		}
	}
	view.asked++
	if view.asked == v.steps() && !v.bugs.NoFence {
		c.fence = epoch
	}
	visit(answers[k], i, n)
}

func (v *variant) decide(w world, k int, visit func(string, int, world)) {
	r := v.core(&w.owners[k])
	if count, clean := v.evident(r); count < v.need || !r.enough(count, clean) {
		return
	}
	if ok, err := r.decide(); ok && err == nil {
		n := w
		n.owners[k].phase = 2
		visit("owner decides", k, n)
	}
}

// completeSteps extends or seals one target, or concludes with what is done.
func (v *variant) completeSteps(w world, k int, visit func(string, int, world)) {
	r := v.core(&w.owners[k])
	if ok, _ := r.decide(); !ok {
		return
	}
	length := int8(r.length)
	for _, i := range r.targets() {
		n := w
		o, c := &n.owners[k], &n.copies[i]
		source := &w.copies[r.source]
		switch {
		case o.views[i].done:
			continue
		case c.fence > int8(k+1):
			o.gone()
		case c.broken && !v.bugs.TrustUnknown:
			continue
		case r.copies[i].tail.Sealed || c.sealed == length:
			o.views[i].done = true
		case c.sealed >= 0:
			continue
		case r.short(i) && c.length < length:
			if source.length < length || source.broken {
				continue // the source cannot give what it had
			}
			c.length = length
		case c.length >= length || v.bugs.NoWriteBack:
			c.length = min(c.length, length)
			c.sealed = c.length
			o.views[i].done = true
		default:
			continue
		}
		visit(worked[k], i, n)
	}
	v.conclude(w, k, r, visit)
}

func (v *variant) conclude(w world, k int, r *recoverCore, visit func(string, int, world)) {
	for _, i := range r.targets() {
		if w.owners[k].views[i].done {
			r.copies[i].state = copySealed
		} else {
			r.copies[i].state = copyFailed
		}
	}
	if !r.enough(v.evident(r)) {
		return
	}
	unverified, err := r.conclude()
	if err != nil {
		return
	}
	n := w
	if n.sealed < 0 && (n.epoch == int8(k+1) || v.noEpoch) {
		n.sealed = int8(r.length)
		for i := range 3 {
			n.listed[i] = dropped
			if r.copies[i].state == copySealed {
				n.listed[i] = listedWhole
			}
		}
		for _, id := range unverified {
			n.listed[id] = listedUnverified
		}
	}
	n.owners[k].gone()
	visit("owner records the seal", k, n)
}

// explore searches breadth first and returns the first thing found wrong, with
// the steps that lead there, and the number of states seen.
func (v *variant) explore(limit int) (wrong string, states int, complete bool) {
	type edge struct {
		from int32
		what string
		who  int
	}
	queue := []world{start()}
	seen := map[[4]uint32]struct{}{queue[0].key(): {}}
	trace := []edge{{from: -1}}
	for at := 0; at < len(queue); at++ {
		if at >= limit {
			return "", at, false
		}
		if what := v.lost(&queue[at]); what != "" {
			for i := int32(at); i > 0; i = trace[i].from {
				what = fmt.Sprintf("%d %s\n%s", trace[i].who, trace[i].what, what)
			}
			return what, at, true
		}
		v.next(queue[at], func(what string, who int, n world) {
			key := n.key()
			if _, ok := seen[key]; !ok {
				seen[key] = struct{}{}
				queue = append(queue, n)
				trace = append(trace, edge{int32(at), what, who})
			}
		})
	}
	return "", len(queue), true
}

func TestExplore(t *testing.T) {
	if atoll.Invariants && !*long {
		t.Skip("one goroutine, and ten times slower in race builds")
	}
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			if v.large && !*long {
				t.Skip("needs -long")
			}
			limit := 3_000_000
			if *long {
				limit = 50_000_000
			}
			wrong, states, complete := v.explore(limit)
			switch {
			case v.unsafe && wrong == "":
				t.Errorf("no loss found in %d states (complete: %v)", states, complete)
			case !v.unsafe && wrong != "":
				t.Errorf("loss after %d states:\n%s", states, wrong)
			case !v.unsafe && !complete:
				t.Errorf("search not complete after %d states", states)
			default:
				t.Logf("%d states", states)
			}
		})
	}
}
