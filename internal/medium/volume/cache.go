package volume

import (
	"sync"
	"sync/atomic"

	"github.com/atollstore/atoll/internal/atoll"
)

// Cache keeps blocks that were read, by their place in the log, so that what it
// holds can never be out of date. Several volumes may share one. When it is
// full, a block is taken in only when it was asked for twice within a while:
// one pass over a volume neither costs copies nor pushes out what is in use.
// Memory is taken as it fills, in slabs, and never more than the limit plus
// about one part in sixty for the index.
type Cache struct {
	shards []cacheShard
	hits   atomic.Uint64
	misses atomic.Uint64
}

const (
	cacheShards = 16
	slabBlocks  = 64
)

// cacheKey names a block of a medium.
type cacheKey struct {
	medium atoll.MediumID
	loc    atoll.Location
}

func (k cacheKey) hash() uint64 {
	h := (uint64(k.loc)>>16 ^ uint64(k.medium)) * 0x9e3779b97f4a7c15
	return h ^ h>>29
}

// cacheShard is a CLOCK over slots, found by a hash table with chains.
type cacheShard struct {
	mu    sync.Mutex
	limit int
	table []int32 // first slot of a chain, -1 = none
	slots []cacheSlot
	slabs [][]byte
	hand  int
	seen  []uint32 // fingerprints of blocks that were missed lately
	_     [64]byte
}

type cacheSlot struct {
	key  cacheKey
	next int32 // in the chain
	used bool
}

// NewCache returns a cache of about so many bytes; nil, which is a cache that
// holds nothing, when that is less than 1 MiB.
func NewCache(bytes int64) *Cache {
	blocks := int(bytes / atoll.BlockSize)
	if blocks < 256 {
		return nil
	}
	c := &Cache{shards: make([]cacheShard, cacheShards)}
	for i := range c.shards {
		c.shards[i].limit = blocks / cacheShards
	}
	return c
}

// Bytes returns how much memory the cache may use.
func (c *Cache) Bytes() int64 {
	if c == nil {
		return 0
	}
	return int64(c.shards[0].limit) * cacheShards * atoll.BlockSize
}

// get copies a block to dst if the cache has it.
func (c *Cache) get(k cacheKey, dst []byte) bool {
	if c == nil {
		return false
	}
	h := k.hash()
	s := &c.shards[h>>60]
	s.mu.Lock()
	i := s.find(k, h)
	if i >= 0 {
		s.slots[i].used = true
		copy(dst, s.block(i))
	}
	s.mu.Unlock()
	if i >= 0 {
		c.hits.Add(1)
	} else {
		c.misses.Add(1)
	}
	return i >= 0
}

// has reports whether the cache has a block, without counting it as used.
func (c *Cache) has(k cacheKey) bool {
	h := k.hash()
	s := &c.shards[h>>60]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.find(k, h) >= 0
}

// add offers a block. With must set it is taken in though it is new.
func (c *Cache) add(k cacheKey, p []byte, must bool) {
	if c == nil {
		return
	}
	h := k.hash()
	s := &c.shards[h>>60]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	if len(s.slots) >= s.limit && !must && !s.again(h) {
		return
	}
	if s.find(k, h) >= 0 {
		return
	}
	i := s.free()
	e := &s.slots[i]
	b := s.bucket(h)
	e.key, e.next, e.used = k, s.table[b], false
	s.table[b] = int32(i)
	copy(s.block(i), p)
}

func (s *cacheShard) init() {
	if s.table != nil {
		return
	}
	n := 1
	for n < s.limit {
		n <<= 1
	}
	s.table = make([]int32, n)
	for i := range s.table {
		s.table[i] = -1
	}
	s.seen = make([]uint32, 2*n)
}

func (s *cacheShard) bucket(h uint64) int { return int(h & uint64(len(s.table)-1)) }

func (s *cacheShard) block(i int) []byte {
	at := i % slabBlocks * atoll.BlockSize
	return s.slabs[i/slabBlocks][at : at+atoll.BlockSize : at+atoll.BlockSize]
}

func (s *cacheShard) find(k cacheKey, h uint64) int {
	if s.table == nil {
		return -1
	}
	i := s.table[s.bucket(h)]
	for i >= 0 && s.slots[i].key != k {
		i = s.slots[i].next
	}
	return int(i)
}

// again reports whether the block was missed before, and remembers it.
func (s *cacheShard) again(h uint64) bool {
	mark := uint32(h>>28) | 1
	p := &s.seen[h&uint64(len(s.seen)-1)]
	if *p == mark {
		*p = 0
		return true
	}
	*p = mark
	return false
}

// free returns a slot that is in no chain, evicting if need be.
func (s *cacheShard) free() int {
	if len(s.slots) < s.limit {
		if len(s.slots)%slabBlocks == 0 {
			s.slabs = append(s.slabs, make([]byte, min(slabBlocks, s.limit-len(s.slots))*atoll.BlockSize))
		}
		s.slots = append(s.slots, cacheSlot{})
		return len(s.slots) - 1
	}
	for s.slots[s.hand].used {
		s.slots[s.hand].used = false
		s.hand = (s.hand + 1) % len(s.slots)
	}
	i := s.hand
	s.hand = (s.hand + 1) % len(s.slots)
	p := &s.table[s.bucket(s.slots[i].key.hash())]
	for *p != int32(i) {
		p = &s.slots[*p].next
	}
	*p = s.slots[i].next
	return i
}
