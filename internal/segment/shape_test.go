package segment

import (
	"testing"
	"testing/quick"

	"github.com/atollstore/atoll/internal/atoll"
)

// TestShape: every block of a coded segment has one place, in a batch and never
// on a header, and runs lie together.
func TestShape(t *testing.T) {
	check := func(data, parity uint8, blocks uint16, o uint32) bool {
		s := ShapeFor(int(data%11)+1, int(parity%5)+1, max(atoll.BlockNo(blocks)/4, 1))
		if err := s.Check(); err != nil {
			t.Log(s, err)
			return false
		}
		seen := map[[2]uint32]bool{}
		for b := atoll.BlockNo(0); b < s.Blocks(); {
			shard, at, run := s.Find(b)
			if run == 0 || shard >= s.Data {
				return false
			}
			for i := range run {
				key := [2]uint32{uint32(shard), uint32(at + i)}
				if seen[key] || s.IsHeader(at+i) || at+i >= s.Length() {
					return false
				}
				seen[key] = true
			}
			b += run
		}
		end := atoll.BlockNo(0)
		for i := range s.Batches() {
			at, n := s.Batch(i)
			if at != end || !s.IsHeader(at) || n == 0 || !Fits(1, int(n)) {
				return false
			}
			end = at + 1 + n
		}
		for m := range s.Shards() {
			if s.MemberOf(atoll.Ordinal(o), s.ShardOf(atoll.Ordinal(o), m)) != m {
				return false
			}
		}
		return end == s.Length() && len(seen) == int(s.Blocks())
	}
	if err := quick.Check(check, &quick.Config{MaxCount: 60}); err != nil {
		t.Error(err)
	}
}

// TestShardHeader: a header of a shard says what it is of, also at the limits.
func TestShardHeader(t *testing.T) {
	s := Shape{Data: 11, Parity: 5, Payload: 700}
	p := make([]byte, atoll.BlockSize)
	for i := range s.Batches() {
		_, n := s.Batch(i)
		s.EncodeShardHeader(p, testID, 7, 15, i, 9, make([]uint32, n))
		h, err := ParseHeader(p)
		if err != nil {
			t.Fatal(err)
		}
		if got, shard, ok, err := ParseShard(h); got != s || shard != 15 || !ok || err != nil {
			t.Errorf("shard %d of %+v, %t, %v", shard, got, ok, err)
		}
	}
	golden(t, "v1.shard", p, func(p []byte) error {
		h, err := ParseHeader(p)
		if err == nil {
			_, _, _, err = ParseShard(h)
		}
		return err
	})
}

// FuzzShard: no record makes ParseShard return a shape that cannot be.
func FuzzShard(f *testing.F) {
	f.Add(uint64(3), uint64(4|2<<8|100<<32))
	f.Fuzz(func(t *testing.T, key, aux uint64) {
		p := make([]byte, atoll.BlockSize)
		EncodeHeader(p, &Head{}, []Record{{Kind: KindShard, Key: key, Aux: aux}}, nil)
		h, err := ParseHeader(p)
		if err != nil {
			t.Fatal(err)
		}
		s, shard, ok, err := ParseShard(h)
		if !ok || err == nil && (s.Check() != nil || shard >= s.Shards()) {
			t.Errorf("%+v, %d, %t, %v", s, shard, ok, err)
		}
	})
}
