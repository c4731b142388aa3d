package server

import (
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/catalog"
)

// A node that hangs inside a server that lives is told of, and so is its return.
func TestSilentNode(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{Demo: true})
	defer mustStop(t, s)
	b := &backend{s: s}
	health := func() string {
		st, err := b.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.Health + " " + strings.Join(st.Reasons, "; ")
	}
	eventually(t, "healthy", func() bool { return strings.HasPrefix(health(), "healthy") })
	if _, err := b.Inject(t.Context(), 2, "pause", 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "told of", func() bool {
		text := health()
		return strings.HasPrefix(text, "degraded") && strings.Contains(text, "node 2") && strings.Contains(text, "does not answer")
	})
	if n := s.cat.State().Nodes[2]; condition(n) != "silent" || !n.Up || n.Report.Total == 0 || n.State != catalog.NodeActive {
		t.Errorf("node 2 is %+v", n)
	}
	if _, err := b.Inject(t.Context(), 2, "revive", 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "healthy again", func() bool { return strings.HasPrefix(health(), "healthy") })
}
