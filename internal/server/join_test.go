package server

import (
	"context"
	"crypto/tls"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/pki"
)

func request[T any](m *T) *connect.Request[T] { return connect.NewRequest(m) }

func dialAPI(t *testing.T, addr, credential string) *api.Client {
	t.Helper()
	var conf *tls.Config
	if len(credential) > 71 {
		conf = pki.PinnedTLS(credential[7:71], nil)
	}
	c, err := api.NewClient(addr, api.Credential{Token: credential}, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// refusesStrangers fails if someone without a certificate of the cluster can
// speak at addr.
func refusesStrangers(t *testing.T, addr, proto string) {
	t.Helper()
	c, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{proto}})
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	// In TLS 1.3 the refusal comes with the first read.
	if _, err = c.Read(make([]byte, 1)); err == nil {
		t.Errorf("%s at %s spoke to a stranger", proto, addr)
	} else if ne := (interface{ Timeout() bool })(nil); errors.As(err, &ne) && ne.Timeout() {
		t.Errorf("%s at %s listens to a stranger", proto, addr)
	}
}

func token(t *testing.T, s *Server, ttl time.Duration) string {
	t.Helper()
	text, _, err := (&backend{s: s}).CreateToken(t.Context(), ttl)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// A second server joins with its disks; the cluster keeps copies on both, and
// the second finds its way back without a token.
func TestJoinNode(t *testing.T) {
	first := start(t, testConfig(t, testDir(t), "--disk", testDir(t)), Options{})
	dir, disk := testDir(t), testDir(t)
	join := []string{"--roles", "node,gateway", "--join", first.cfg.Listen, "--disk", disk}
	second := start(t, testConfig(t, dir, append(join, "--token", token(t, first, 0))...), Options{})
	if second.cluster.ID != first.cluster.ID {
		t.Fatalf("clusters %v and %v", first.cluster.ID, second.cluster.ID)
	}
	eventually(t, "both nodes up", func() bool {
		up := 0
		for _, n := range first.cat.State().Nodes {
			if n.Up {
				up++
			}
		}
		return up == 2
	})
	create(t, second, "disk1", "writethrough")
	dev := open(t, second, "disk1")
	fill(t, dev, 20, false)
	second.volumes.Release(dev)
	c, err := (&backend{s: second}).CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "disk1", ReadAll: true})
	if err != nil || c.CheckedBytes < 2*20<<16 || len(c.Problems)+len(c.Unchecked) > 0 {
		t.Errorf("check: %v %v", c, err)
	}
	mustStop(t, second)
	dev = open(t, first, "disk1")
	verify(t, dev, 20)
	first.volumes.Release(dev)

	second = start(t, testConfig(t, dir, join...), Options{})
	eventually(t, "open at the second", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		for _, o := range first.volumes.list() {
			first.volumes.closeIdle(o, 0)
		}
		dev, _, err := second.volumes.Open(ctx, "disk1")
		if err == nil {
			verify(t, dev, 20)
			second.volumes.Release(dev)
		}
		return err == nil
	})
	mustStop(t, second)
	mustStop(t, first)
}

// A controller joins and becomes a full member.
func TestJoinController(t *testing.T) {
	t.Parallel()
	first := start(t, testConfig(t, testDir(t)), Options{})
	second := start(t, testConfig(t, testDir(t), "--roles", "controller", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	eventually(t, "two full members", func() bool {
		ms, err := second.etcd.Members(t.Context())
		return err == nil && len(ms) == 2 && !ms[0].Learner && !ms[1].Learner
	})
	if len(second.cat.State().Nodes) != 3 {
		t.Errorf("the second sees %d nodes", len(second.cat.State().Nodes))
	}
	// The last of two takes long to stop: it has lost its majority.
	stop(t, first, stopLimit)
	stop(t, second, stopLimit)
}

// A token admits one server, within its time, to its own cluster.
func TestTokens(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	other := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, other)
	join := func(tok string) error {
		cfg := testConfig(t, testDir(t), "--roles", "node", "--join", s.cfg.Listen, "--token", tok, "--disk", testDir(t))
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		joined, err := Start(ctx, cfg, Options{Log: testLog(t)})
		if err == nil {
			mustStop(t, joined)
		}
		return err
	}
	tok := token(t, s, 0)
	if err := join(tok); err != nil {
		t.Fatalf("first use: %v", err)
	}
	if err := join(tok); !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("second use: %v", err)
	}
	short := token(t, s, time.Millisecond)
	eventually(t, "expired", func() bool { return errors.Is(join(short), atoll.ErrDenied) })
	if err := join(token(t, other, 0)); err == nil {
		t.Error("a token of another cluster was taken")
	}
	if err := join("A1nonsense"); !errors.Is(err, atoll.ErrInvalid) && !errors.Is(err, atoll.ErrDenied) {
		t.Errorf("nonsense: %v", err)
	}
	if _, _, err := (&backend{s: s}).CreateToken(t.Context(), 48*time.Hour); !errors.Is(err, atoll.ErrInvalid) {
		t.Errorf("two days: %v", err)
	}
}
