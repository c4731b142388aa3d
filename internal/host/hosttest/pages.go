package hosttest

import "math/bits"

const (
	pageSize  = 4096
	chunkLen  = 64
	chunkSize = chunkLen * pageSize
)

// owner marks who may change a page or chunk in place.
type owner struct{ _ byte }

// page is one page of bytes.
type page struct {
	own  *owner
	prev *page // what was here before, kept if the disk keeps history
	data [pageSize]byte
}

// chunk is a run of pages; a nil page is zeros.
type chunk struct {
	own   *owner
	alloc uint64 // bit i: page i takes room on the disk
	pages [chunkLen]*page
}

// zeroChunk is the shared chunk of written zeros.
func zeroChunk() *chunk { return &chunk{alloc: ^uint64(0)} }

// pages is the contents of a file: sparse, and copied only where changed.
// The zero value is empty.
type pages struct {
	own    *owner
	shared bool // the list of chunks is another's too
	chunks []*chunk
	zeros  *chunk // the shared chunk of written zeros, of the disk
	keep   bool   // keep what was in a page before
}

// snapshot returns a copy; neither sees later changes of the other.
func (p *pages) snapshot() pages {
	p.own, p.shared = new(owner), true
	return pages{own: new(owner), shared: true, chunks: p.chunks, zeros: p.zeros, keep: p.keep}
}

// list makes the list of chunks private and at least n long.
func (p *pages) list(n int) {
	if p.own == nil {
		p.own = new(owner)
	}
	if p.shared {
		chunks := make([]*chunk, len(p.chunks), max(n, len(p.chunks)))
		copy(chunks, p.chunks)
		p.chunks, p.shared = chunks, false
	}
	for len(p.chunks) < n {
		p.chunks = append(p.chunks, nil)
	}
}

// chunkFor returns a chunk that may be changed.
func (p *pages) chunkFor(i int) *chunk {
	p.list(i + 1)
	c := p.chunks[i]
	switch {
	case c == nil:
		c = &chunk{own: p.own}
	case c.own != p.own:
		d := *c
		d.own = p.own
		c = &d
	}
	p.chunks[i] = c
	return c
}

// get returns page number n, nil if it is zeros.
func (p *pages) get(n int64) *page {
	if i := n / chunkLen; i < int64(len(p.chunks)) && p.chunks[i] != nil {
		return p.chunks[i].pages[n%chunkLen]
	}
	return nil
}

// set makes pg the page number n; both of two files may hold it.
func (p *pages) set(n int64, pg *page) {
	c := p.chunkFor(int(n / chunkLen))
	c.alloc |= 1 << (n % chunkLen)
	c.pages[n%chunkLen] = pg
}

// writable returns page number n for changing it in place.
func (p *pages) writable(n int64) *page {
	c := p.chunkFor(int(n / chunkLen))
	c.alloc |= 1 << (n % chunkLen)
	old := c.pages[n%chunkLen]
	if old != nil && old.own == p.own && !p.keep {
		return old
	}
	pg := &page{own: p.own}
	if old != nil {
		pg.data = old.data
		pg.prev = p.history(old)
	}
	c.pages[n%chunkLen] = pg
	return pg
}

// history returns old as the past of a page that replaces it.
func (p *pages) history(old *page) *page {
	if !p.keep || old == nil {
		return nil
	}
	return &page{data: old.data}
}

// readAt fills b with what is at off; all beyond the written is zeros. With
// stale set, pages are as they were before their last change.
func (p *pages) readAt(b []byte, off int64, stale bool) {
	for len(b) > 0 {
		at := int(off % pageSize)
		n := min(len(b), pageSize-at)
		pg := p.get(off / pageSize)
		if pg != nil && stale {
			pg = pg.prev
		}
		if pg != nil {
			copy(b[:n], pg.data[at:])
		} else {
			clear(b[:n])
		}
		b, off = b[n:], off+int64(n)
	}
}

// writeAt writes b at off.
func (p *pages) writeAt(b []byte, off int64) {
	for len(b) > 0 {
		at := int(off % pageSize)
		n := min(len(b), pageSize-at)
		copy(p.writable(off / pageSize).data[at:], b[:n])
		b, off = b[n:], off+int64(n)
	}
}

// zero makes n bytes at off zeros: written ones that take room, or holes.
func (p *pages) zero(off, n int64, hole bool) {
	for n > 0 {
		step := p.zeroStep(off, n, hole)
		off, n = off+step, n-step
	}
}

// zeroStep does the first part of zero and returns its length.
func (p *pages) zeroStep(off, n int64, hole bool) int64 {
	ci := int(off / chunkSize)
	if hole && ci >= len(p.chunks) {
		return n
	}
	if off%chunkSize == 0 && n >= chunkSize {
		p.list(ci + 1)
		if p.chunks[ci] = p.zeros; hole {
			p.chunks[ci] = nil
		}
		return chunkSize
	}
	at := off % pageSize
	if at == 0 && n >= pageSize {
		c, bit := p.chunkFor(ci), off/pageSize%chunkLen
		c.pages[bit] = nil
		if c.alloc |= 1 << bit; hole {
			c.alloc &^= 1 << bit
		}
		return pageSize
	}
	step := min(n, pageSize-at)
	if p.get(off/pageSize) != nil {
		clear(p.writable(off / pageSize).data[at : at+step])
	} else if !hole {
		p.set(off/pageSize, nil)
	}
	return step
}

// cut frees everything from size on.
func (p *pages) cut(size int64) {
	end := int64(len(p.chunks)) * chunkSize
	if size < end {
		p.zero(size, end-size, true)
	}
}

// room returns how many bytes the pages take on the disk.
func (p *pages) room() int64 {
	n := 0
	for _, c := range p.chunks {
		if c != nil {
			n += bits.OnesCount64(c.alloc)
		}
	}
	return int64(n) * pageSize
}

// newRoom returns how many bytes a write of n bytes at off would add.
func (p *pages) newRoom(off, n int64) int64 {
	var add int64
	for i := off / pageSize; i*pageSize < off+n; i++ {
		ci := i / chunkLen
		if ci >= int64(len(p.chunks)) || p.chunks[ci] == nil || p.chunks[ci].alloc&(1<<(i%chunkLen)) == 0 {
			add += pageSize
		}
	}
	return add
}
