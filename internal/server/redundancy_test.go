package server

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium/volume"
)

// codedServer is a server with so many small nodes.
func codedServer(t *testing.T, nodes int) *Server {
	dir := testDir(t)
	var args []string
	for i := range nodes {
		args = append(args, "--disk", fmt.Sprintf("%s/disk%d", dir, i+1))
	}
	return start(t, testConfig(t, dir, args...), Options{Demo: true})
}

// noise writes n MiB of noise from seed.
func noise(t *testing.T, dev nbd.Device, n int, seed uint64) {
	t.Helper()
	for i := range n {
		b := host.Alloc(1 << 20)
		piece(b.Bytes(), i, seed)
		err := dev.Write(t.Context(), b, b.Bytes(), int64(i)<<20, false)
		b.Release()
		if err != nil {
			t.Fatal(err)
		}
	}
}

func piece(p []byte, i int, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, uint64(i)))
	for j := 0; j < len(p); j += 8 {
		v := rng.Uint64()
		for k := range 8 {
			p[j+k] = byte(v >> (8 * k))
		}
	}
}

// same reads what noise wrote.
func same(t *testing.T, dev nbd.Device, n int, seed uint64) {
	t.Helper()
	p, want := make([]byte, 1<<20), make([]byte, 1<<20)
	for i := range n {
		if err := dev.Read(t.Context(), p, int64(i)<<20); err != nil {
			t.Fatal(err)
		}
		if piece(want, i, seed); !bytes.Equal(p, want) {
			t.Fatalf("MiB %d is wrong", i)
		}
	}
}

// recode has everything of a volume brought into the form of its policy now.
func recode(t *testing.T, s *Server, name string) {
	t.Helper()
	rec, err := s.volumes.find(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.volumes.acquire(t.Context(), rec)
	if err != nil {
		t.Fatal(err)
	}
	defer s.volumes.release(o)
	if err := errors.Join(o.vol.Flush(t.Context()), o.medium.Roll(t.Context(), catalog.Hot), o.vol.Checkpoint(t.Context()), o.medium.Roll(t.Context(), catalog.Bulk)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "brought into form", func() bool {
		o.vol.Reclaim()
		return !o.recoding()
	})
}

// raw is what a medium's segments have on all nodes together.
func (s *Server) raw(t *testing.T, id atoll.MediumID) (sum int64) {
	t.Helper()
	list, err := s.nodes.List(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list {
		sum += c.Length.Bytes()
	}
	return sum
}

// A coded volume takes little more than one and a half times what it holds, and
// reads right without two of its six nodes; the policy changes while it is in use.
func TestCodedVolume(t *testing.T) {
	s := codedServer(t, 6)
	defer mustStop(t, s)
	b := &backend{s: s}
	eventually(t, "nodes up", func() bool { return b.activeNodes() == 6 })
	const size = 96
	v, err := b.CreateVolume(t.Context(), &atollv1.CreateVolumeRequest{Name: "cold", SizeBytes: size << 20, Redundancy: "ec=4+2"})
	if err != nil || v.Redundancy != "ec=4+2" || v.Replicas != 3 {
		t.Fatalf("%v, %v", v, err)
	}
	dev := open(t, s, "cold")
	defer s.volumes.Release(dev)
	noise(t, dev, size, 1)
	recode(t, s, "cold")
	rec, err := s.volumes.find(t.Context(), "cold")
	if err != nil {
		t.Fatal(err)
	}
	want := 1.5 * float64(size<<20)
	eventually(t, "room given back", func() bool { return float64(s.raw(t, rec.ID)) < 1.03*want })
	t.Logf("%.4f of 1.5 times the data", float64(s.raw(t, rec.ID))/want)
	eventually(t, "told of", func() bool {
		v, err := b.Volume(t.Context(), "cold", false)
		return err == nil && float64(v.GetCodedBytes()) > 0.96*(size<<20) && float64(v.GetRawBytes()) < 1.03*want
	})
	same(t, dev, size, 1)
	if r, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "cold", ReadAll: true}); err != nil || len(r.Problems)+len(r.Unchecked) > 0 || r.CheckedBytes < 3*size<<19 {
		t.Errorf("check: %v, %v", r, err)
	}
	for _, n := range []atoll.NodeID{2, 5} {
		if _, err := b.Inject(t.Context(), n, "kill", 0); err != nil {
			t.Fatal(err)
		}
	}
	same(t, dev, size, 1)
	for _, n := range []atoll.NodeID{2, 5} {
		if _, err := b.Inject(t.Context(), n, "revive", 0); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "nodes up", func() bool {
		st, err := b.Status(t.Context())
		return err == nil && st.NodesUp == 6
	})
	for _, to := range []string{"ec=2+1", "replicas=3"} {
		if v, err = b.SetRedundancy(t.Context(), &atollv1.SetRedundancyRequest{Name: "cold", Redundancy: to}); err != nil || v.Redundancy != to {
			t.Fatalf("%v, %v", v, err)
		}
		recode(t, s, "cold")
		same(t, dev, size, 1)
		if r, err := b.CheckVolume(t.Context(), &atollv1.CheckVolumeRequest{Name: "cold", ReadAll: true}); err != nil || len(r.Problems)+len(r.Unchecked) > 0 {
			t.Errorf("check: %v, %v", r, err)
		}
	}
	if v, err = b.Volume(t.Context(), "cold", false); err != nil || v.GetCodedBytes() != 0 {
		t.Errorf("%v, %v", v, err)
	}
}

// What cannot be is refused.
func TestRedundancyRefusals(t *testing.T) {
	s := codedServer(t, 3)
	defer mustStop(t, s)
	b := &backend{s: s}
	for text, say := range map[string]string{
		"ec=4+2": "needs 6 nodes", "ec=2": "as in 4+2", "ec=0+1": "as in 4+2", "replicas=9": "want replicas=N", "raid5": "want replicas=N", "ec=2+1 ": "as in 4+2",
	} {
		_, err := b.CreateVolume(t.Context(), &atollv1.CreateVolumeRequest{Name: "x", SizeBytes: 1 << 20, Redundancy: text})
		if !errors.Is(err, atoll.ErrInvalid) || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := b.SetRedundancy(t.Context(), &atollv1.SetRedundancyRequest{Name: "none", Redundancy: "ec=2+1"}); !errors.Is(err, atoll.ErrNotExist) {
		t.Errorf("no such volume: %v", err)
	}
}

var speed = flag.Int("coded", 0, "MiB of the measurement of coded volumes")

// TestCodedSpeed measures encoding, and reads of a replicated, a coded and a
// degraded volume. It asserts nothing; -coded 512 runs it.
func TestCodedSpeed(t *testing.T) {
	if *speed == 0 {
		t.Skip("no -coded")
	}
	n := *speed
	s := codedServer(t, 6)
	defer mustStop(t, s)
	b := &backend{s: s}
	eventually(t, "nodes up", func() bool { return b.activeNodes() == 6 })
	if _, err := b.CreateVolume(t.Context(), &atollv1.CreateVolumeRequest{Name: "v", SizeBytes: int64(n) << 20, Replicas: 3}); err != nil {
		t.Fatal(err)
	}
	dev := open(t, s, "v")
	noise(t, dev, n, 1)
	if err := dev.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	reads := func(what string) {
		s.volumes.Release(dev) // with what it has in memory
		rec, err := s.volumes.find(t.Context(), "v")
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "closed", func() bool { return s.volumes.closeID(t.Context(), rec.ID) })
		s.volumes.cache = volume.NewCache(16 << 20)
		dev = open(t, s, "v")
		p := make([]byte, 1<<20)
		begun := time.Now()
		for i := range n {
			if err := dev.Read(t.Context(), p, int64(i)<<20); err != nil {
				t.Fatal(err)
			}
		}
		took := time.Since(begun)
		rng, small := rand.New(rand.NewPCG(1, 2)), time.Now()
		var all sync.WaitGroup
		for range 8 {
			seed := rng.Uint64()
			all.Go(func() {
				rng, q := rand.New(rand.NewPCG(seed, 2)), make([]byte, 4096)
				for range 1000 {
					if err := dev.Read(t.Context(), q, rng.Int64N(int64(n)<<8)<<12); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		t.Logf("%s: 1 MiB reads %.0f MB/s, 4 KiB reads, 8 at once %.0f/s", what, float64(n<<20)/1e6/took.Seconds(), 8000/time.Since(small).Seconds())
	}
	reads("replicated")
	reads("replicated, again")
	if _, err := b.SetRedundancy(t.Context(), &atollv1.SetRedundancyRequest{Name: "v", Redundancy: "ec=4+2"}); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	recode(t, s, "v")
	t.Logf("encoded: %.0f MB/s", float64(n<<20)/1e6/time.Since(begun).Seconds())
	reads("coded")
	reads("coded, again")
	for _, id := range []atoll.NodeID{2, 5} {
		if _, err := b.Inject(t.Context(), id, "kill", 0); err != nil {
			t.Fatal(err)
		}
	}
	reads("without two nodes")
	reads("without two nodes, again")
	s.volumes.Release(dev)
}
