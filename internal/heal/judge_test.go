package heal

import (
	"fmt"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/wire"
)

func segID(o int) atoll.SegmentID {
	return atoll.SegmentID{Medium: 7, Ordinal: atoll.Ordinal(o), Copyset: 1}
}

// parse reads what a node holds: "1=20 2=8u 3=9d": ordinal and length, u for
// unsealed, d for damaged. "-" is nothing, "?" no answer.
func parse(t *testing.T, text string) held {
	t.Helper()
	if text == "?" {
		return nil
	}
	h := held{}
	for _, f := range strings.Fields(strings.TrimPrefix(text, "-")) {
		var o, length int
		var flag string
		if n, _ := fmt.Sscanf(f, "%d=%d%s", &o, &length, &flag); n < 2 {
			t.Fatalf("bad copy %q", f)
		}
		h[segID(o)] = wire.SegmentInfo{Seg: segID(o), Length: atoll.BlockNo(length), Sealed: flag != "u", Damaged: flag == "d", Epoch: 3}
	}
	return h
}

func TestJudge(t *testing.T) {
	lost := catalog.Copyset{ID: 1, Nodes: []atoll.NodeID{1, 2, 3}, Moves: []catalog.Move{{Old: 3, New: 4}}}
	grow := catalog.Copyset{ID: 1, Nodes: []atoll.NodeID{1, 2}, Moves: []catalog.Move{{New: 4}}}
	last := catalog.Copyset{ID: 1, Nodes: []atoll.NodeID{3}, Moves: []catalog.Move{{Old: 3, New: 4}}}
	for _, c := range []struct {
		name     string
		set      catalog.Copyset
		held     [5]string // by node; "" is no answer
		verified string
		lives    bool // the old member
		want     string
	}{
		{"nothing to copy", lost, [5]string{1: "-", 2: "-", 4: "-"}, "", false, "done"},
		{"one is missing", lost, [5]string{1: "1=20", 2: "1=20", 4: "-"}, "", false, "copy 1=20 from [1 2]"},
		{"it is there and was not read back", lost, [5]string{1: "1=20", 2: "1=20", 4: "1=20"}, "", false, "copy 1=20 from [1 2]"},
		{"it was", lost, [5]string{1: "1=20", 2: "1=20", 4: "1=20"}, "1=20", false, "done"},
		{"it was, and is damaged since", lost, [5]string{1: "1=20", 2: "1=20", 4: "1=20d"}, "1=20", false, "copy 1=20 from [1 2]"},
		{"half of it is there", lost, [5]string{1: "1=20", 2: "1=20", 4: "1=8u"}, "", false, "copy 1=20 from [1 2]"},
		{"a member does not answer", lost, [5]string{1: "1=20", 4: "-"}, "", false, "copy 1=20 from [1]; silent [2]"},
		{"the new one does not answer", lost, [5]string{1: "1=20", 2: "1=20"}, "", false, "copy 1=20 from [1 2]; silent [4]"},
		{"the old one lives and does not answer", lost, [5]string{1: "-", 2: "-", 4: "-"}, "", true, "silent [3]"},
		{"only the old one has it", lost, [5]string{1: "-", 2: "-", 3: "1=20", 4: "-"}, "", true, "copy 1=20 from [3]; waits [1]"},
		{"a member lacks it", lost, [5]string{1: "1=20", 2: "-", 4: "1=20"}, "1=20", false, "waits [1]"},
		{"it is unsealed on a member", lost, [5]string{1: "1=20", 2: "1=20u", 4: "1=20"}, "1=20", false, "waits [1]"},
		{"it is sealed nowhere", lost, [5]string{1: "1=20u", 2: "1=20u", 4: "-"}, "", false, "waits [1]"},
		{"members differ", lost, [5]string{1: "1=20", 2: "1=24", 4: "-"}, "", false, "waits [1]"},
		{"the old one differs", lost, [5]string{1: "1=20", 2: "1=20", 3: "1=24", 4: "-"}, "", true, "waits [1]"},
		{"a damaged one is asked last", lost, [5]string{1: "1=20d", 2: "1=20", 4: "-"}, "", false, "copy 1=20 from [2 1]"},
		{"a member more", grow, [5]string{1: "1=20", 2: "1=20", 4: "-"}, "", false, "copy 1=20 from [1 2]"},
		{"the only member is replaced", last, [5]string{3: "1=20", 4: "1=20"}, "1=20", true, "done"},
		{"and does not answer", last, [5]string{4: "1=20"}, "1=20", false, "silent [3]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			lists := map[atoll.NodeID]held{}
			for i, text := range c.held {
				if text != "" {
					lists[atoll.NodeID(i)] = parse(t, text)
				}
			}
			other := segID(9) // of another copyset with some of the members
			other.Copyset = 2
			if lists[1] != nil {
				lists[1][other] = wire.SegmentInfo{Seg: other, Length: 5, Sealed: true}
			}
			verified := map[atoll.SegmentID]atoll.BlockNo{}
			for seg, i := range parse(t, c.verified) {
				verified[seg] = i.Length
			}
			v := judge(c.set, 4, lists, verified, func(atoll.NodeID) bool { return c.lives })
			var out []string
			for _, j := range v.jobs {
				out = append(out, fmt.Sprintf("copy %d=%d from %v", j.seg.Ordinal, j.length, j.from))
			}
			if len(v.waiting) > 0 {
				var list []int
				for _, s := range v.waiting {
					list = append(list, int(s.Ordinal))
				}
				out = append(out, fmt.Sprintf("waits %v", list))
			}
			if len(v.silent) > 0 {
				out = append(out, fmt.Sprintf("silent %v", v.silent))
			}
			if v.done() {
				out = append(out, "done")
			}
			if got := strings.Join(out, "; "); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestEvictable(t *testing.T) {
	set := catalog.Copyset{ID: 1, Nodes: []atoll.NodeID{1, 2}}
	for _, c := range []struct {
		one, two string
		want     bool
	}{
		{"1=20", "1=20", true},
		{"1=20", "-", false},
		{"1=20", "?", false},
		{"1=20", "1=20u", false},
		{"1=20", "1=20d", false},
		{"1=20", "1=24", false},
	} {
		answers := map[atoll.NodeID]held{1: parse(t, c.one), 2: parse(t, c.two)}
		if got := evictable(set, segID(1), answers); got != c.want {
			t.Errorf("members hold %q and %q: %v", c.one, c.two, got)
		}
	}
	if evictable(catalog.Copyset{}, segID(1), nil) {
		t.Error("evictable from a copyset without members")
	}
}
