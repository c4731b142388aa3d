package volume

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Checks find nothing wrong while writes go on, in either mode, and writes get
// in between.
func TestVerifyUnderLoad(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		const size = 64 << 20
		s := newMemStore(size, 1)
		v := mustOpen(t, s, Options{Mode: mode, FlushDelay: time.Millisecond, CheckpointBytes: 2 << 20, MapBytes: 1})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var writes [4]int
		var begun sync.WaitGroup
		begun.Add(len(writes))
		for w := range writes {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 5))
				for ctx.Err() == nil {
					b := page(rng.Uint64())
					err := v.Write(context.Background(), b, b.Bytes(), rng.Int64N(size/atoll.BlockSize)*atoll.BlockSize, false)
					b.Release()
					if err != nil {
						t.Error(err)
						return
					}
					if writes[w]++; writes[w] == 100 {
						begun.Done()
					}
				}
			})
		}
		begun.Wait()
		for range 10 {
			no(t, v.Verify(t.Context()))
		}
		cancel()
		wg.Wait()
		for w, n := range writes {
			if n <= 100 {
				t.Errorf("writer %d got nothing done meanwhile", w)
			}
		}
		no(t, v.Close(t.Context()))
	}
}

// A wrong count of the medium's is found.
func TestCheckCompares(t *testing.T) {
	s := newMemStore(1<<20, 1)
	v := mustOpen(t, s, Options{Mode: Writethrough})
	b := page(1)
	no(t, v.Write(t.Context(), b, b.Bytes(), 0, true))
	b.Release()
	no(t, v.Check(t.Context()))
	s.Live(1, +1)
	if err := v.Check(t.Context()); !errors.Is(err, atoll.ErrCorrupt) {
		t.Errorf("a count that is off by one: %v", err)
	}
	s.Live(1, -1)
	no(t, v.Close(t.Context()))
}
