package volume

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

func BenchmarkWrite4K(b *testing.B) {
	s := newMemStore(64<<20, 1)
	s.noCrash, s.segSize = true, 65000
	v := mustOpen(b, s, Options{CheckpointBytes: 1 << 40})
	defer v.Abort()
	buf := page(1)
	rng := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for b.Loop() {
		no(b, v.Write(context.Background(), buf, buf.Bytes(), rng.Int64N(16384)*atoll.BlockSize, false))
	}
}

func BenchmarkRead4K(b *testing.B) {
	for name, cache := range map[string]int64{"uncached": 0, "cached": 128 << 20, "thrashing": 4 << 20} {
		b.Run(name, func(b *testing.B) {
			s := newMemStore(64<<20, 1)
			s.noCrash, s.segSize = true, 65000
			v := mustOpen(b, s, Options{CacheBytes: cache})
			defer v.Abort()
			all := make([]byte, 64<<20)
			no(b, v.Write(context.Background(), nil, all, 0, false))
			no(b, v.Read(context.Background(), all, 0))
			rng := rand.New(rand.NewPCG(1, 2))
			b.ReportAllocs()
			for b.Loop() {
				no(b, v.Read(context.Background(), all[:atoll.BlockSize], rng.Int64N(16384)*atoll.BlockSize))
			}
		})
	}
}
