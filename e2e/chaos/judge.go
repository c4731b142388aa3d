package chaos

import (
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// register is a block as porcupine sees it.
var register = porcupine.Model{
	Init: func() any { return uint64(0) },
	Step: func(state, input, output any) (bool, any) {
		if o := input.(*op); o.write {
			return true, o.stamp
		}
		return output.(uint64) == state.(uint64), state
	},
}

const judgeTime = 2 * time.Minute // for one block

// Verdict is what the judge found.
type Verdict struct {
	Blocks, Ops int
	Unknown     int     // writes that nobody knows the outcome of
	Seen        int     // of them, that were read later
	Undecided   int     // blocks that took too long to judge
	Wrong       []error // one for each block that no order of operations explains
}

// Judge says whether each block's history is linearizable, where an operation
// of unknown outcome may take effect at any later time, or never. It is called
// while no client works.
func (r *Recorder) Judge() (v Verdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v.Wrong = append(v.Wrong, r.wrong...)
	for block, all := range r.history {
		if len(all) == 0 {
			continue
		}
		v.Blocks, v.Ops = v.Blocks+1, v.Ops+len(all)
		read := map[uint64]bool{}
		for i := range all {
			if !all[i].write {
				read[all[i].stamp] = true
			}
		}
		for i := range all {
			if all[i].unknown() {
				v.Unknown++
				if read[all[i].stamp] {
					v.Seen++
				}
			}
		}
		switch porcupine.CheckOperationsTimeout(register, operations(all, read), judgeTime) {
		case porcupine.Illegal:
			v.Wrong = append(v.Wrong, fmt.Errorf("block %d is not linearizable:\n%s", block, story(all)))
		case porcupine.Unknown:
			v.Undecided++
		}
	}
	return v
}

// operations translates a block's history. A write of unknown outcome that was
// never seen is left out: that it never took effect explains as much as
// anything else.
func operations(all []op, read map[uint64]bool) []porcupine.Operation {
	out := make([]porcupine.Operation, 0, len(all))
	for i := range all {
		o := &all[i]
		if o.unknown() && !read[o.stamp] {
			continue
		}
		out = append(out, porcupine.Operation{ClientId: o.client, Input: o, Call: o.call, Output: o.stamp, Return: o.ret})
	}
	return out
}

// story tells the end of a block's history for people.
func story(all []op) string {
	list := append([]op(nil), all...)
	sort.Slice(list, func(i, j int) bool { return list[i].call < list[j].call })
	var b strings.Builder
	for _, o := range list[max(0, len(list)-40):] {
		what, end := "read ", time.Duration(o.ret).String()
		if o.write {
			what = "write"
		}
		if o.unknown() {
			end = "unknown"
		}
		fmt.Fprintf(&b, "  client %d %s %d  %v … %s\n", o.client, what, o.stamp, time.Duration(o.call), end)
	}
	return b.String()
}
