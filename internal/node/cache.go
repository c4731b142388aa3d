package node

import (
	"container/list"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// handle is an open file of a segment, shared by those who use it.
type handle struct {
	id   atoll.SegmentID
	file host.File
	refs int           // guarded by handles.mu
	gone chan struct{} // set by forget, closed when the last user is done
	el   *list.Element
}

// handles keeps files open, the least recently used closed first. Files in use
// are never closed, so the limit may be passed for as long as they are.
type handles struct {
	fs  host.FS
	max int
	mu  struct {
		sync.Mutex
		m   map[atoll.SegmentID]*handle
		lru list.List // of *handle, the next victim in front
	}
}

func newHandles(fs host.FS, max int) *handles {
	c := &handles{fs: fs, max: max}
	c.mu.m = make(map[atoll.SegmentID]*handle)
	return c
}

// acquire returns the open file of id; the caller releases it.
func (c *handles) acquire(id atoll.SegmentID) (*handle, error) {
	c.mu.Lock()
	if h := c.mu.m[id]; h != nil {
		h.refs++
		c.mu.lru.MoveToBack(h.el)
		c.mu.Unlock()
		return h, nil
	}
	c.mu.Unlock()
	f, err := c.fs.Open(segmentPath(id))
	if err != nil {
		return nil, err
	}
	return c.add(id, f), nil
}

// add puts an open file in, which is closed again if another was faster, and
// returns it with a reference.
func (c *handles) add(id atoll.SegmentID, f host.File) *handle {
	c.mu.Lock()
	h := c.mu.m[id]
	var victims []*handle
	if h == nil {
		h = &handle{id: id, file: f}
		h.el = c.mu.lru.PushBack(h)
		c.mu.m[id] = h
		f = nil
	}
	h.refs++ // before evict, which must not take it
	victims = c.evict()
	c.mu.Unlock()
	for _, v := range victims {
		v.file.Close() // nothing written is waiting for Close: see S1
	}
	if f != nil {
		f.Close()
	}
	return h
}

func (c *handles) evict() (victims []*handle) {
	over := len(c.mu.m) - c.max
	for el := c.mu.lru.Front(); el != nil && over > 0; {
		h, next := el.Value.(*handle), el.Next()
		if h.refs == 0 {
			c.remove(h)
			victims = append(victims, h)
			over--
		}
		el = next
	}
	return victims
}

func (c *handles) remove(h *handle) {
	delete(c.mu.m, h.id)
	c.mu.lru.Remove(h.el)
}

// release gives a reference back.
func (c *handles) release(h *handle) {
	c.mu.Lock()
	h.refs--
	atoll.Assert(h.refs >= 0, "handle released twice")
	last := h.refs == 0 && h.gone != nil
	c.mu.Unlock()
	if last {
		h.file.Close()
		close(h.gone)
	}
}

// forget takes the file of id out of the cache and returns a channel that is
// closed when nobody uses it any more.
func (c *handles) forget(id atoll.SegmentID) <-chan struct{} {
	done := make(chan struct{})
	c.mu.Lock()
	h := c.mu.m[id]
	if h != nil {
		c.remove(h)
		h.gone = done
	}
	idle := h != nil && h.refs == 0
	c.mu.Unlock()
	if idle {
		h.file.Close()
	}
	if h == nil || idle {
		close(done)
	}
	return done
}

// closeAll closes every file. Nobody uses any.
func (c *handles) closeAll() (err error) {
	c.mu.Lock()
	all := c.evictAll()
	c.mu.Unlock()
	for _, h := range all {
		if e := h.file.Close(); e != nil && err == nil {
			err = e
		}
	}
	return err
}

func (c *handles) evictAll() (all []*handle) {
	for el := c.mu.lru.Front(); el != nil; el = c.mu.lru.Front() {
		h := el.Value.(*handle)
		c.remove(h)
		all = append(all, h)
	}
	return all
}

// index is what is known of the bytes of a segment: the checksum of each block
// and where the batches begin. Slices of it are shared and never change.
type index struct {
	crcs    []uint32
	batches []atoll.BlockNo
	lost    []run // blocks whose checksum is not known
}

type run struct{ from, to atoll.BlockNo }

func (x *index) bytes() int { return 4*(len(x.crcs)+len(x.batches)) + 64 }

// indexes keeps the indexes of sealed segments in memory, whole or in pieces, up
// to a size.
type indexes struct {
	max int
	mu  struct {
		sync.Mutex
		m     map[indexKey]*list.Element
		lru   list.List // of *indexEntry
		bytes int
	}
}

// indexKey names what is known of a segment: all of it, or the checksums of
// piece number piece.
type indexKey struct {
	id    atoll.SegmentID
	piece int32
}

// whole is the piece that is everything.
const whole = -1

type indexEntry struct {
	key indexKey
	x   *index
}

func newIndexes(max int) *indexes {
	c := &indexes{max: max}
	c.mu.m = make(map[indexKey]*list.Element)
	return c
}

func (c *indexes) get(id atoll.SegmentID, piece int32) *index {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.mu.m[indexKey{id, piece}]
	if el == nil {
		return nil
	}
	c.mu.lru.MoveToBack(el)
	return el.Value.(*indexEntry).x
}

func (c *indexes) put(id atoll.SegmentID, piece int32, x *index) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := indexKey{id, piece}
	c.drop(c.mu.m[key])
	c.mu.m[key] = c.mu.lru.PushBack(&indexEntry{key, x})
	c.mu.bytes += x.bytes()
	for c.mu.bytes > c.max && c.mu.lru.Len() > 1 {
		c.drop(c.mu.lru.Front())
	}
}

// forget drops all that is known of a segment.
func (c *indexes) forget(id atoll.SegmentID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for piece := int32(whole); piece <= atoll.MaxSegmentBlocks/pieceBlocks; piece++ {
		c.drop(c.mu.m[indexKey{id, piece}])
	}
}

func (c *indexes) drop(el *list.Element) {
	if el == nil {
		return
	}
	e := el.Value.(*indexEntry)
	c.mu.lru.Remove(el)
	delete(c.mu.m, e.key)
	c.mu.bytes -= e.x.bytes()
}
