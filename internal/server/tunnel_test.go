package server

import (
	"slices"
	"strings"
	"testing"
)

// Sockets follow the controllers: one that is gone gives its socket to one that
// came, and nobody loses a good one.
func TestRetarget(t *testing.T) {
	for _, w := range []struct{ alive, known, have, members, want string }{
		{"a", "a", "aaa", "a", "aaa"},
		{"a b c", "a", "aaa", "a b c", "abc"},
		{"b a", "a b c", "abc", "a b c", "abc"}, // c may be back soon
		{"a b d", "a b c", "abc", "a b d c", "abd"},
		{"a b", "a", "aaa", "a b", "aba"},
		{"h", "a b c d e f g", "abcdefg", "h a b c d e f", "hbcdefg"},
	} {
		members := remember(strings.Fields(w.alive), strings.Fields(w.known))
		if got := strings.Join(members, " "); got != w.members {
			t.Errorf("%v: remembers %s", w, got)
		}
		if got := strings.Join(retarget(strings.Split(w.have, ""), strings.Fields(w.alive)), ""); got != w.want {
			t.Errorf("%v: sockets lead to %s", w, got)
		}
	}
	if got := spread([]string{"a", "b"}, 3); !slices.Equal(got, []string{"a", "b", "a"}) {
		t.Errorf("spread %v", got)
	}
}

// A server without the catalog learns of controllers that join later, also for its
// next start.
func TestLearnControllers(t *testing.T) {
	t.Parallel()
	first := start(t, testConfig(t, testDir(t)), Options{})
	gateway := start(t, testConfig(t, testDir(t), "--roles", "gateway", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	second := start(t, testConfig(t, testDir(t), "--roles", "controller", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	want := second.members.addr()
	eventually(t, "the gateway has a tunnel to the second controller", func() bool {
		return slices.ContainsFunc(gateway.proxies, func(p *etcdProxy) bool { return *p.member.Load() == want })
	})
	stop(t, gateway, stopLimit)
	h, err := openHome(t.Context(), gateway.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(h.rec.Members, want) || !slices.Contains(h.rec.Members, first.members.addr()) {
		t.Errorf("noted %v", h.rec.Members)
	}
	if err := h.close(); err != nil {
		t.Error(err)
	}
	stop(t, second, stopLimit)
	stop(t, first, stopLimit)
}
