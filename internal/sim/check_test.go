package sim

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The checker looks at each page alone and follows all states that the page can
// be in. A state is the list of versions that it may fall back to when the
// owner crashes, the oldest first; the last is what a read sees.
//
// An operation takes effect at one moment between its call and its return. One
// whose outcome is unknown may take effect at any later moment of its era, or
// never, but not in a later era: by then its owner is fenced. A write that was
// acknowledged as durable, and a flush, shorten the list. At the end of an era
// the page keeps any version on its list.

// version is a value of a page and when its write returned.
type version struct {
	val uint32
	ret time.Duration // before all for the first one
}

// pageState is one way in which the page's history may have gone so far.
type pageState struct {
	versions []version
	done     []int // ids of operations at work that have taken effect, ascending
}

func (s *pageState) key() string {
	var b strings.Builder
	for _, v := range s.versions {
		fmt.Fprintf(&b, "%d.%d,", v.val, v.ret)
	}
	fmt.Fprint(&b, s.done)
	return b.String()
}

func (s *pageState) now() uint32 { return s.versions[len(s.versions)-1].val }

func (s *pageState) has(id int) bool { _, ok := slices.BinarySearch(s.done, id); return ok }

// maxStates bounds the search; beyond it the history counts as unknown, which is
// a failure.
const maxStates = 1 << 14

// pageEvent is a call or return of an operation that concerns the page.
type pageEvent struct {
	at   time.Duration
	ret  bool
	op   *op
	want uint32 // of a read
}

// checkPage returns an error if no history explains what was seen of a page.
func checkPage(h *history, page int, writethrough bool) error {
	states := []*pageState{{versions: []version{{0, -1}}}}
	seen := lastSeen(h, page)
	for _, e := range h.eras {
		events := pageEvents(h, e, page, seen)
		open := map[int]*pageEvent{}
		for i := range events {
			ev := &events[i]
			if !ev.ret {
				if ev.op.kind != opFlush {
					open[ev.op.id] = ev
				}
				continue
			}
			keep := func(val uint32) bool { last, ok := seen[val]; return ok && last > e.n }
			next, err := pageReturn(states, open, ev, writethrough, keep)
			if err != nil {
				return fmt.Errorf("page %d: %w", page, err)
			}
			if len(next) == 0 {
				return fmt.Errorf("I1/I2: page %d: no history explains %v; before it the page could be %s\n%s", page, ev.op, values(states), story(h, page))
			}
			states = next
			delete(open, ev.op.id)
		}
		var err error
		if states, err = closure(states, open, func(val uint32) bool { last, ok := seen[val]; return ok && last > e.n }); err != nil {
			return fmt.Errorf("page %d: %w", page, err)
		}
		states = eraEnd(states)
	}
	return nil
}

// lastSeen returns for each value of a page the last era in which it was read.
func lastSeen(h *history, page int) map[uint32]int {
	seen := make(map[uint32]int)
	for _, o := range h.ops {
		if o.kind == opRead && o.ret != never && page >= o.page && page < o.page+o.pages {
			val := o.got[page-o.page]
			seen[val] = max(seen[val], o.era.n)
		}
	}
	return seen
}

// pageEvents returns the calls and returns of an era, in order. At one moment
// calls come before returns, so that such operations count as concurrent. A write
// of unknown outcome that nobody has seen then or later is left out: if there is
// an explanation, there is one in which it did not happen.
func pageEvents(h *history, e *era, page int, seen map[uint32]int) []pageEvent {
	var list []pageEvent
	for _, o := range h.ops {
		if o.era != e || o.kind != opFlush && (page < o.page || page >= o.page+o.pages) {
			continue
		}
		if o.ret == never && (o.kind == opFlush || o.kind == opRead) {
			continue
		}
		if last, ok := seen[o.val]; o.ret == never && (!ok || last < e.n) {
			continue
		}
		ev := pageEvent{at: o.call, op: o}
		if o.kind == opRead {
			ev.want = o.got[page-o.page]
		}
		list = append(list, ev)
		if o.ret != never {
			ev.at, ev.ret = o.ret, true
			list = append(list, ev)
		}
	}
	slices.SortStableFunc(list, func(a, b pageEvent) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(b2i(a.ret), b2i(b.ret)))
	})
	return list
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// closure adds the states in which more of the operations at work have taken
// effect. keep tells which values are seen in later eras; to fall back to any
// other makes no difference to what is seen, so those are forgotten.
func closure(states []*pageState, open map[int]*pageEvent, keep func(uint32) bool) ([]*pageState, error) {
	ids := make([]int, 0, len(open))
	for id := range open {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	seen := make(map[string]bool)
	var out []*pageState
	for _, s := range states {
		if k := s.key(); !seen[k] {
			seen[k] = true
			out = append(out, s)
		}
	}
	for i := 0; i < len(out); i++ {
		for _, id := range ids {
			s := out[i]
			if s.has(id) {
				continue
			}
			t := s.apply(open[id], keep)
			if t == nil {
				continue
			}
			if k := t.key(); !seen[k] {
				seen[k] = true
				out = append(out, t)
			}
		}
		if len(out) > maxStates {
			return nil, fmt.Errorf("unknown: more than %d ways to explain it", maxStates)
		}
	}
	return out, nil
}

// apply returns the state after an operation took effect, nil if it cannot.
func (s *pageState) apply(ev *pageEvent, keep func(uint32) bool) *pageState {
	if ev.op.kind == opRead && s.now() != ev.want {
		return nil
	}
	i, _ := slices.BinarySearch(s.done, ev.op.id)
	t := &pageState{versions: s.versions, done: slices.Insert(slices.Clone(s.done), i, ev.op.id)}
	if ev.op.kind != opRead {
		t.versions = slices.DeleteFunc(slices.Clone(s.versions), func(v version) bool { return !keep(v.val) })
		t.versions = append(t.versions, version{ev.op.val, ev.op.ret})
	}
	return t
}

// pageReturn keeps the states in which an operation that returned has taken
// effect.
func pageReturn(states []*pageState, open map[int]*pageEvent, ev *pageEvent, writethrough bool, keep func(uint32) bool) ([]*pageState, error) {
	if ev.op.kind == opFlush {
		out := make([]*pageState, 0, len(states))
		for _, s := range states {
			out = append(out, s.flush(ev.op.call))
		}
		return out, nil
	}
	all, err := closure(states, open, keep)
	if err != nil {
		return nil, err
	}
	var out []*pageState
	for _, s := range all {
		i, ok := slices.BinarySearch(s.done, ev.op.id)
		if !ok {
			continue
		}
		t := &pageState{versions: s.versions, done: slices.Delete(slices.Clone(s.done), i, i+1)}
		if ev.op.kind != opRead && (writethrough || ev.op.fua) {
			t.versions = t.versions[t.last(func(v version) bool { return v.ret == ev.op.ret && v.val == ev.op.val }):]
		}
		out = append(out, t)
	}
	return out, nil
}

// flush drops the versions that were overwritten by ones acknowledged before.
func (s *pageState) flush(before time.Duration) *pageState {
	return &pageState{versions: s.versions[s.last(func(v version) bool { return v.ret < before }):], done: s.done}
}

// last returns the index of the last version for which is holds, or 0.
func (s *pageState) last(is func(version) bool) int {
	for i := len(s.versions) - 1; i >= 0; i-- {
		if is(s.versions[i]) {
			return i
		}
	}
	return 0
}

// eraEnd returns the states with which the next era begins: any version that the
// page may have fallen back to.
func eraEnd(states []*pageState) []*pageState {
	seen := make(map[uint32]bool)
	var out []*pageState
	for _, s := range states {
		for _, v := range s.versions {
			if !seen[v.val] {
				seen[v.val] = true
				out = append(out, &pageState{versions: []version{{v.val, -1}}})
			}
		}
	}
	return out
}

// values names the states for an error.
func values(states []*pageState) string {
	var list []string
	for _, s := range states[:min(len(states), 12)] {
		list = append(list, s.key())
	}
	return strings.Join(list, " or ")
}

// story lists what concerns a page.
func story(h *history, page int) string {
	var b strings.Builder
	for _, o := range h.ops {
		if o.kind == opFlush || page >= o.page && page < o.page+o.pages {
			fmt.Fprintf(&b, "\t%v\n", o)
		}
	}
	return b.String()
}

// check returns an error for a page whose history cannot be, and for an owner
// that answered after the next one served. Where leases are broken on purpose,
// one may hear late that its write is durable everywhere, or say that there is
// nothing to flush, when the next one serves already: then only the pages tell
// whether that was true.
func (h *history) check(writethrough bool) error {
	for _, o := range h.ops {
		if h.w.cfg.brokenLease || o.ret == never || o.era.n+1 >= len(h.eras) {
			continue
		}
		if next := h.eras[o.era.n+1]; o.ret > next.opened {
			return fmt.Errorf("I3: %v was acknowledged by %s, epoch %v, after %s served under epoch %v at %d", o, o.era.gateway, o.era.epoch, next.gateway, next.epoch, next.opened)
		}
	}
	for page := range h.w.cfg.pages {
		if err := checkPage(h, page, writethrough); err != nil {
			return err
		}
	}
	return nil
}
