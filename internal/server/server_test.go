package server

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// A server keeps everything through a clean stop and a new start.
func TestServerRestart(t *testing.T) {
	dir := testDir(t)
	s := start(t, testConfig(t, dir), Options{})
	create(t, s, "disk1", "writeback")
	dev := open(t, s, "disk1")
	fill(t, dev, 40, false)
	s.volumes.Release(dev)
	cluster := s.cluster.ID
	if text := get(t, s, "/healthz"); !strings.Contains(text, "ok") {
		t.Errorf("healthz says %q", text)
	}
	mustStop(t, s)
	if err := s.Stop(); err != nil {
		t.Errorf("second stop: %v", err)
	}

	s = start(t, testConfig(t, dir), Options{})
	if s.cluster.ID != cluster {
		t.Errorf("cluster is %v, was %v", s.cluster.ID, cluster)
	}
	dev = open(t, s, "disk1")
	verify(t, dev, 40)
	s.volumes.Release(dev)
	if n := len(s.cat.State().Nodes); n != 3 {
		t.Errorf("%d nodes", n)
	}
	mustStop(t, s)
}

// What a start refuses, with a message that names the remedy, and leaves
// nothing running.
func TestServerRefusals(t *testing.T) {
	dir := testDir(t)
	cfg := testConfig(t, dir)
	s := start(t, cfg, Options{})
	try := func(cfg *Config) error {
		other, err := Start(t.Context(), cfg, Options{Log: testLog(t)})
		if err == nil {
			mustStop(t, other)
		}
		return err
	}
	if err := try(testConfig(t, dir)); !errors.Is(err, atoll.ErrBusy) || !strings.Contains(api.Hint(err), "--data") {
		t.Errorf("locked directory: %v (%s)", err, api.Hint(err))
	}
	if err := try(testConfig(t, testDir(t), "--listen", cfg.Listen)); err == nil || !strings.Contains(api.Hint(err), "--listen") {
		t.Errorf("port in use: %v (%s)", err, api.Hint(err))
	}
	if err := try(testConfig(t, testDir(t), "--disk", filepath.Join(dir, "disks", "1"))); !errors.Is(err, atoll.ErrIdentity) && !errors.Is(err, atoll.ErrBusy) {
		t.Errorf("disk of a running server: %v", err)
	}
	if err := try(testConfig(t, testDir(t), "--roles", "node")); !errors.Is(err, atoll.ErrInvalid) || !strings.Contains(api.Hint(err), "--join") {
		t.Errorf("nothing to join: %v (%s)", err, api.Hint(err))
	}
	mustStop(t, s)
	if err := try(testConfig(t, testDir(t), "--disk", filepath.Join(dir, "disks", "1"))); !errors.Is(err, atoll.ErrIdentity) {
		t.Errorf("disk of another cluster: %v", err)
	}
	path := filepath.Join(dir, memberFile)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(text), `"version": 1`, `"version": 2`, 1)
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := try(testConfig(t, dir)); !errors.Is(err, atoll.ErrVersion) || !strings.Contains(err.Error(), "newer") {
		t.Errorf("newer format: %v", err)
	}
}

// Volumes are shared by their users, closed when idle, and opened anew after
// the session was lost.
func TestVolumesShareCloseReopen(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	create(t, s, "disk1", "writethrough")
	one, two := open(t, s, "disk1"), open(t, s, "disk1")
	if one != two {
		t.Error("two users have two devices")
	}
	if dev := open(t, s, ""); dev != one {
		t.Error("the empty name is not the only volume")
	} else {
		s.volumes.Release(dev)
	}
	fill(t, one, 4, false)
	o := s.volumes.list()[0]
	s.volumes.Release(one)
	if s.volumes.closeIdle(o, 0) {
		t.Error("closed while in use")
	}
	s.volumes.Release(two)
	if s.volumes.closeIdle(o, time.Hour) || !s.volumes.closeIdle(o, 0) || len(s.volumes.list()) != 0 {
		t.Error("not closed when idle")
	}

	dev := open(t, s, "disk1")
	verify(t, dev, 4)
	old := s.session()
	if err := s.cat.EndSession(t.Context(), old.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another session", func() bool { return s.session() != old && s.session().Valid() })
	s.volumes.Release(dev)
	eventually(t, "serving again", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		again, _, err := s.volumes.Open(ctx, "disk1")
		if err != nil {
			return false
		}
		defer s.volumes.Release(again)
		p := make([]byte, 4096)
		return again != dev && again.Read(ctx, p, 0) == nil && p[0] == 1
	})
	eventually(t, "nodes up again", func() bool {
		up := 0
		for _, n := range s.cat.State().Nodes {
			if n.Up {
				up++
			}
		}
		return up == 3
	})
}

// A volume that is opened again while it is being closed is not taken from under
// the one that closes: what that holds in memory would be lost.
func TestVolumesReopenWhileClosing(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	create(t, s, "disk1", "writeback")
	for round := range 10 {
		dev := open(t, s, "disk1")
		put(t, dev, int64(round)<<12, 4096, byte(round+1))
		o := s.volumes.list()[0]
		s.volumes.Release(dev)
		var wg sync.WaitGroup
		wg.Go(func() {
			if !s.volumes.closeIdle(o, 0) {
				t.Log("opened before it was closed")
			}
		})
		if round%2 == 0 {
			eventually(t, "closing", func() bool { return !s.volumes.has(o.id) })
		}
		dev = open(t, s, "disk1")
		for n := range round + 1 {
			if got := at(t, dev, int64(n)<<12); got != byte(n+1) {
				t.Errorf("round %d: block %d is %d", round, n, got)
			}
		}
		wg.Wait()
		s.volumes.Release(dev)
	}
}

// What the API refuses about volumes.
func TestVolumeRefusals(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	b := &backend{s: s}
	create(t, s, "disk1", "")
	for _, w := range []struct {
		r    *atollv1.CreateVolumeRequest
		kind error
	}{
		{&atollv1.CreateVolumeRequest{Name: "disk1", SizeBytes: 1 << 20}, atoll.ErrExist},
		{&atollv1.CreateVolumeRequest{Name: "a@b", SizeBytes: 1 << 20}, atoll.ErrInvalid},
		{&atollv1.CreateVolumeRequest{Name: "", SizeBytes: 1 << 20}, atoll.ErrInvalid},
		{&atollv1.CreateVolumeRequest{Name: "x", SizeBytes: 0}, atoll.ErrInvalid},
		{&atollv1.CreateVolumeRequest{Name: "x", SizeBytes: 5000}, atoll.ErrInvalid},
		{&atollv1.CreateVolumeRequest{Name: "x", SizeBytes: 65 << 40}, nil},
		{&atollv1.CreateVolumeRequest{Name: "x", SizeBytes: 1 << 20, Replicas: 4}, atoll.ErrInvalid},
		{&atollv1.CreateVolumeRequest{Name: "x", SizeBytes: 1 << 20, Cache: "fast"}, atoll.ErrInvalid},
	} {
		_, err := b.CreateVolume(t.Context(), w.r)
		if err == nil || w.kind != nil && !errors.Is(err, w.kind) {
			t.Errorf("create %v: %v", w.r, err)
		}
	}
	if _, err := b.ResizeVolume(t.Context(), "disk1", 4096, false); !errors.Is(err, atoll.ErrInvalid) || !strings.Contains(api.Hint(err), "--shrink") {
		t.Errorf("shrink: %v", err)
	}
	if v, err := b.ResizeVolume(t.Context(), "disk1", 128<<20, false); err != nil || v.SizeBytes != 128<<20 {
		t.Errorf("grow: %v %v", v, err)
	}
	if _, err := b.DeleteVolume(t.Context(), &atollv1.DeleteVolumeRequest{Name: "disk2", DryRun: false}); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("delete another: %v", err)
	}
	dev := open(t, s, "disk1")
	if _, err := b.DeleteVolume(t.Context(), &atollv1.DeleteVolumeRequest{Name: "disk1", DryRun: false}); !errors.Is(err, atoll.ErrBusy) {
		t.Errorf("delete while in use: %v", err)
	}
	s.volumes.Release(dev)
	if _, err := b.DeleteVolume(t.Context(), &atollv1.DeleteVolumeRequest{Name: "disk1", DryRun: true}); err != nil {
		t.Errorf("dry run: %v", err)
	}
	if _, err := b.DeleteVolume(t.Context(), &atollv1.DeleteVolumeRequest{Name: "disk1", DryRun: false}); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := b.Volume(t.Context(), "disk1", false); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("after delete: %v", err)
	}
}

// The addresses of a volume are quoted as URLs must be.
func TestVolumeURLs(t *testing.T) {
	dir := filepath.Join(testDir(t), "a b&c")
	s := start(t, testConfig(t, dir, "--nbd", "127.0.0.1:0"), Options{})
	defer mustStop(t, s)
	create(t, s, "disk1", "")
	v, err := (&backend{s: s}).Volume(t.Context(), "disk1", true)
	if err != nil {
		t.Fatal(err)
	}
	if len(v.Urls) != 2 || strings.ContainsAny(v.Urls[0], " ") || strings.Count(v.Urls[0], "&") != 0 || !strings.HasPrefix(v.Urls[1], "nbd://127.0.0.1:") {
		t.Errorf("urls are %q", v.Urls)
	}
	if v.ServedBy == "" || !v.Open {
		t.Errorf("not open: %v", v)
	}
}

// Damage is repaired by a check that reads, told by one that does not, and
// found by neither afterwards.
func TestCheckRepairs(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{Demo: true})
	defer mustStop(t, s)
	b := &backend{s: s}
	create(t, s, "disk1", "writethrough")
	dev := open(t, s, "disk1")
	fill(t, dev, 200, false)
	s.volumes.Release(dev)
	if _, err := b.Inject(t.Context(), 2, "corrupt", 0); err != nil {
		t.Fatal(err)
	}
	first, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "disk1", ReadAll: true})
	if err != nil || first.DamagedBytes == 0 || first.RepairedBytes != first.DamagedBytes || len(first.Problems)+len(first.Unchecked) > 0 {
		t.Fatalf("first: %v %v", first, err)
	}
	if first.CheckedBytes < 3*200<<16 || first.BytesRead < 200<<16 || first.Blocks != 200*16 {
		t.Errorf("not all was read: %v", first)
	}
	for _, read := range []bool{false, true} {
		again, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "disk1", ReadAll: read})
		if err != nil || again.DamagedBytes != 0 || len(again.Problems)+len(again.Unchecked) > 0 {
			t.Errorf("again: %v %v", again, err)
		}
	}
	for id := range 3 {
		if _, err := b.Inject(t.Context(), atoll.NodeID(id+1), "corrupt", 0); err != nil {
			t.Fatal(err)
		}
	}
	lost, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "disk1", ReadAll: true}) // the same blocks of all copies
	if err != nil || len(lost.Problems) == 0 || lost.RepairedBytes >= lost.DamagedBytes {
		t.Errorf("with all copies damaged: %v %v", lost, err)
	}
	if _, err := b.Inject(t.Context(), 3, "kill", 0); err != nil {
		t.Fatal(err)
	}
	down, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "disk1", ReadAll: true})
	if err != nil || len(down.Unchecked) == 0 {
		t.Errorf("with a node down: %v %v", down, err)
	}
}

// A listener of the API's port tells TLS and plain connections apart; the
// members' port takes neither from strangers.
func TestListeners(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	plain := dialAPI(t, "http://"+s.APIAddr(), s.home.token)
	if _, err := plain.Volumes.ListVolumes(t.Context(), request(&atollv1.ListVolumesRequest{})); err != nil {
		t.Errorf("plain: %v", err)
	}
	secure := dialAPI(t, "https://"+s.APIAddr(), s.home.token)
	if _, err := secure.Volumes.ListVolumes(t.Context(), request(&atollv1.ListVolumesRequest{})); err != nil {
		t.Errorf("TLS: %v", err)
	}
	for _, credential := range []string{"", "atoll1:" + s.home.identity.Member().CAHash() + ":00"} {
		c := dialAPI(t, "http://"+s.APIAddr(), credential)
		if _, err := c.Volumes.ListVolumes(t.Context(), request(&atollv1.ListVolumesRequest{})); !errors.Is(err, atoll.ErrDenied) {
			t.Errorf("with credential %q: %v", credential, err)
		}
	}
	wrong := dialAPI(t, "https://"+s.APIAddr(), "atoll1:"+strings.Repeat("0", 64)+":00")
	if _, err := wrong.Volumes.ListVolumes(t.Context(), request(&atollv1.ListVolumesRequest{})); err == nil {
		t.Error("a server of another authority was believed")
	}
	// A silent connection must not keep others out.
	silent, err := net.Dial("tcp", s.APIAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := plain.Volumes.ListVolumes(t.Context(), request(&atollv1.ListVolumesRequest{})); err != nil {
		t.Errorf("beside a silent connection: %v", err)
	}
	refusesStrangers(t, s.members.addr(), protoWire)
	refusesStrangers(t, s.members.addr(), protoEtcd)
}

// Beyond loopback the API takes no plain connection.
func TestMixedListenerTLSOnly(t *testing.T) {
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := newMixedListener(l, s.home.identity.OpenTLS(), false)
	defer m.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if n, err := c.Read(make([]byte, 1)); err == nil || n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a plain connection got %d bytes, %v", n, err)
	}
}

// The record of a data directory reads back, and damage to it is told.
func TestHomeDamage(t *testing.T) {
	dir := testDir(t)
	s := start(t, testConfig(t, dir), Options{})
	mustStop(t, s)
	path := filepath.Join(dir, memberFile)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var rec memberRecord
	if err := json.Unmarshal(text, &rec); err != nil || rec.Version != memberVersion || rec.Cluster.IsZero() {
		t.Errorf("record %s: %v", text, err)
	}
	if err := os.WriteFile(path, text[:len(text)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), testConfig(t, dir), Options{Log: testLog(t)}); !errors.Is(err, atoll.ErrCorrupt) {
		t.Errorf("damaged record: %v", err)
	}
}
