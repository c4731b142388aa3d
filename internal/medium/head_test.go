package medium

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// TestHeadSteps runs testdata/head.txt: commands, each followed by the head
// that it leads to. -rewrite writes the answers anew.
func TestHeadSteps(t *testing.T) {
	const path = "testdata/head.txt"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	h := catalog.Head{Medium: 1, Next: 1, Epoch: 1}
	lines := bufio.NewScanner(strings.NewReader(string(text)))
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "  ") {
			continue
		}
		fmt.Fprintln(&out, line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		before := showHead(h)
		next, err := runHead(h, strings.Fields(line))
		if now := showHead(h); now != before {
			t.Errorf("%s: changed the old head from %s to %s", line, before, now)
		}
		if err != nil {
			fmt.Fprintf(&out, "  error: %v\n", err)
			continue
		}
		h = next
		fmt.Fprintf(&out, "  %s\n", showHead(h))
	}
	if *rewrite {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if out.String() != string(text) {
		t.Errorf("got:\n%s", out.String())
	}
}

func runHead(h catalog.Head, words []string) (catalog.Head, error) {
	if words[0] == "new" {
		return catalog.Head{Medium: 1, Next: 1, Epoch: 1}, nil
	}
	var lane catalog.Lane
	if slices.Contains(words, "bulk") {
		lane = catalog.Bulk
	}
	num := func(key string) (n int) {
		for _, w := range words {
			_, _ = fmt.Sscanf(w, key+"=%d", &n)
		}
		return n
	}
	seg := atoll.SegmentID{Medium: 1, Ordinal: atoll.Ordinal(num("seg")), Copyset: 1}
	sealed := catalog.Sealed{Seg: seg, Length: atoll.BlockNo(num("len"))}
	switch words[0] {
	case "register":
		for range max(1, num("times")) {
			var err error
			if h, _, err = headRegister(h, lane, 1, 100); err != nil {
				return h, err
			}
		}
		return h, nil
	case "seal":
		return headSeal(h, sealed)
	case "abandon":
		return headAbandon(h, seg)
	case "recover":
		var all []catalog.Sealed
		for _, u := range h.Unsealed[:max(0, len(h.Unsealed)-num("without"))] {
			all = append(all, catalog.Sealed{Seg: u.Seg, Length: atoll.BlockNo(num("len"))})
		}
		return headRecovered(h, all)
	case "manifest":
		return headMoved(h, catalog.BlockRef{Seg: seg}, h.Sealed[:num("sealed")], h.Dropped[:num("dropped")]), nil
	case "verified":
		return headVerified(h, seg, []atoll.NodeID{9}), nil
	case "release":
		return headReleased(h), nil
	}
	return h, fmt.Errorf("unknown command %q", words[0])
}

func showHead(h catalog.Head) string {
	var b strings.Builder
	fmt.Fprintf(&b, "next=%d", h.Next)
	if h.Manifest != nil {
		fmt.Fprintf(&b, " manifest=%d", h.Manifest.Seg.Ordinal)
	}
	for _, u := range h.Unsealed {
		fmt.Fprintf(&b, " open:%d/%s", u.Seg.Ordinal, [...]string{"hot", "bulk"}[u.Lane])
	}
	for _, s := range h.Sealed {
		fmt.Fprintf(&b, " sealed:%d/%s@%d%v", s.Seg.Ordinal, [...]string{"hot", "bulk"}[s.Lane], s.Length, s.Unverified)
	}
	for _, d := range h.Dropped {
		fmt.Fprintf(&b, " dropped:%d", d.Ordinal)
	}
	return b.String()
}
