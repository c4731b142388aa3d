package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// Users of two servers make, write, back up, clone, restore, rename, remove and
// bring back the same few volumes. Each call ends with its result or one of the
// kinds that such races have, and what is left is sound and can be read anywhere.
func TestStorm(t *testing.T) {
	first := start(t, testConfig(t, testDir(t), "--disk", testDir(t)), Options{})
	second := start(t, testConfig(t, testDir(t), "--roles", "gateway", "--join", first.cfg.Listen, "--token", token(t, first, 0)), Options{})
	defer mustStop(t, first)
	defer mustStop(t, second)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	end := time.Now().Add(time.Second)
	var wg sync.WaitGroup
	for i := range 4 {
		w := &stormer{t: t, s: []*Server{first, second}[i%2], rng: rand.New(rand.NewPCG(3, uint64(i)))}
		wg.Go(func() {
			for time.Now().Before(end) {
				begun := time.Now()
				what, err := w.step(ctx)
				if took := time.Since(begun); took > stormLimit {
					t.Errorf("worker %d: %s took %v: %v", i, what, took, err)
				}
				if !allowed(err) {
					t.Errorf("worker %d: %s: %v", i, what, err)
				}
			}
		})
	}
	wg.Wait()
	b := &backend{s: first}
	list, err := b.Volumes(ctx, "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range list {
		r, err := b.CheckVolume(ctx, &atollv1.CheckVolumeRequest{Name: v.Name})
		if err != nil || len(r.Problems)+len(r.Unchecked) > 0 {
			t.Errorf("check %s: %v %v", v.Name, r, err)
		}
	}
	t.Logf("%d volumes are left", len(list))
}

// stormLimit is the longest that a call may take: waiting for another owner's
// lease to end, and what a slow machine under load adds.
const stormLimit = time.Minute

// allowed are the ends that calls may have while others do the same. Every open
// takes new segments of a small disk.
func allowed(err error) bool {
	if err == nil {
		return true
	}
	for _, kind := range []error{atoll.ErrExist, atoll.ErrNotExist, atoll.ErrBusy, atoll.ErrConflict, atoll.ErrNoSpace} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// stormer is one user.
type stormer struct {
	t   *testing.T
	s   *Server
	rng *rand.Rand
}

func (w *stormer) name() string {
	return fmt.Sprintf("%s/%d", []string{"a", "b"}[w.rng.IntN(2)], w.rng.IntN(3))
}

func (w *stormer) step(ctx context.Context) (string, error) {
	b := &backend{s: w.s}
	name, other := w.name(), w.name()
	switch op := w.rng.IntN(12); op {
	case 0, 1:
		_, err := b.CreateVolume(ctx, &atollv1.CreateVolumeRequest{Name: name, SizeBytes: 8 << 20})
		return "create " + name, err
	case 2, 3:
		return "write " + name, w.write(ctx, name)
	case 4:
		_, err := b.CreateVersion(ctx, &atollv1.CreateVersionRequest{Media: []string{name}})
		return "backup " + name, err
	case 5:
		_, err := b.CloneVersion(ctx, &atollv1.CloneVersionRequest{Source: name, Name: other})
		return "clone " + name + " to " + other, err
	case 6:
		_, err := b.RestoreVersion(ctx, &atollv1.RestoreVersionRequest{Name: name + "@last"})
		return "restore " + name, err
	case 7:
		_, err := b.DeleteVersion(ctx, &atollv1.DeleteVersionRequest{Name: name, All: true})
		return "delete versions of " + name, err
	case 8:
		_, err := b.Rename(ctx, &atollv1.RenameRequest{From: name, To: other, Replace: w.rng.IntN(2) == 0})
		return "rename " + name + " to " + other, err
	case 9:
		_, err := b.DeleteVolume(ctx, &atollv1.DeleteVolumeRequest{Name: name, Now: w.rng.IntN(2) == 0})
		return "delete " + name, err
	case 10:
		_, err := b.RestoreTrash(ctx, &atollv1.RestoreTrashRequest{Path: name, NewPath: other})
		return "bring back " + name, err
	default:
		_, err := b.ListVersions(ctx, &atollv1.ListVersionsRequest{Name: name, All: true})
		return "list " + name, err
	}
}

// write uses a volume as a gateway's client does.
func (w *stormer) write(ctx context.Context, name string) error {
	if w.rng.IntN(3) == 0 {
		name += "@last"
	}
	dev, _, err := w.s.volumes.Open(ctx, name)
	if err != nil {
		return err
	}
	defer w.s.volumes.Release(dev)
	p := make([]byte, atoll.BlockSize)
	if err := dev.Read(ctx, p, 0); err != nil || dev.ReadOnly() {
		return err
	}
	for range 4 {
		put(w.t, dev, int64(w.rng.IntN(512))<<12, 16<<10, byte(w.rng.IntN(255)+1))
	}
	return dev.Flush(ctx)
}
