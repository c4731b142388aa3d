// Package transfertest has an image in memory, with versions, for tests of
// package transfer and of what is built on it.
package transfertest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
	"github.com/atollstore/atoll/internal/transfer"
)

const pageSize = atoll.BlockSize

// page is never changed: a write makes a new one.
type page [pageSize]byte

// contents is what an image holds at one moment. It is copied before changes if
// anyone else has it.
type contents struct {
	size  int64
	pages map[int64]*page
}

func (c *contents) clone() *contents { return &contents{c.size, maps.Clone(c.pages)} }

// write changes the bytes of a range to p, or to zeros if p is nil.
func (c *contents) write(off, n int64, p []byte) error {
	if off < 0 || n < 0 || off+n > c.size {
		return fmt.Errorf("access %d+%d of %d bytes: %w", off, n, c.size, atoll.ErrInvalid)
	}
	for n > 0 {
		no, at := off/pageSize, off%pageSize
		m := min(pageSize-at, n)
		old := c.pages[no]
		whole := at == 0 && (m == pageSize || off+m == c.size)
		switch {
		case p == nil && old == nil:
		case p == nil && whole:
			delete(c.pages, no)
		default:
			next := new(page)
			if old != nil {
				*next = *old
			}
			if p == nil {
				clear(next[at : at+m])
			} else {
				copy(next[at:], p[:m])
			}
			c.pages[no] = next
		}
		if p != nil {
			p = p[m:]
		}
		off, n = off+m, n-m
	}
	return nil
}

func (c *contents) resize(size int64) {
	if size < c.size {
		maps.DeleteFunc(c.pages, func(no int64, _ *page) bool { return no*pageSize >= size })
		if old := c.pages[size/pageSize]; old != nil {
			next := *old
			clear(next[size%pageSize:])
			c.pages[size/pageSize] = &next
		}
	}
	c.size = size
}

func (c *contents) read(p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > c.size {
		return fmt.Errorf("access %d+%d of %d bytes: %w", off, len(p), c.size, atoll.ErrInvalid)
	}
	for len(p) > 0 {
		m := min(pageSize-off%pageSize, int64(len(p)))
		if pg := c.pages[off/pageSize]; pg != nil {
			copy(p[:m], pg[off%pageSize:])
		} else {
			clear(p[:m])
		}
		p, off = p[m:], off+m
	}
	return nil
}

// equal reports whether both hold the same bytes.
func (c *contents) equal(d *contents) bool {
	if c.size != d.size {
		return false
	}
	same := func(a, b map[int64]*page) bool {
		for no, pg := range a {
			other := b[no]
			if other == nil {
				other = new(page)
			}
			if !bytes.Equal(pg[:], other[:]) {
				return false
			}
		}
		return true
	}
	return same(c.pages, d.pages) && same(d.pages, c.pages)
}

// list tells of each page in a range whether it is so.
func (c *contents) list(off, n int64, is func(no int64) bool, fn func(n int64, yes bool) bool) error {
	if off < 0 || off+n > c.size {
		return fmt.Errorf("list %d+%d of %d bytes: %w", off, n, c.size, atoll.ErrInvalid)
	}
	for n > 0 {
		m := min(pageSize-off%pageSize, n)
		if !fn(m, is(off/pageSize)) {
			return nil
		}
		off, n = off+m, n-m
	}
	return nil
}

// version is a named version.
type version struct {
	transfer.Version
	c  *contents
	id int
}

// Image is an image in memory. It is a transfer.Image and a transfer.Target. All
// methods may be called concurrently.
type Image struct {
	// Fail runs before every access with its name and offset; an error is the
	// access's result. Set it before use.
	Fail func(op string, off int64) error

	mu       sync.Mutex
	header   rbdstream.Header
	head     *contents
	versions []version
	serial   int // of the head's contents: grows with each change
}

var (
	_ transfer.Image  = (*Image)(nil)
	_ transfer.Target = (*Image)(nil)
	_ transfer.Maker  = (*Pool)(nil)
)

// New returns an image of zeros with rbd's default layout.
func New(size int64) *Image {
	return &Image{header: rbdstream.DefaultHeader(), head: &contents{size, map[int64]*page{}}}
}

func (m *Image) fail(op string, off int64) error {
	if m.Fail == nil {
		return nil
	}
	return m.Fail(op, off)
}

// change changes the head.
func (m *Image) change(fn func(c *contents) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.head.clone()
	m.serial++
	m.head = next
	return fn(next)
}

// Write writes p at off of the head.
func (m *Image) Write(p []byte, off int64) error {
	return m.change(func(c *contents) error { return c.write(off, int64(len(p)), p) })
}

// Discard makes a range of the head read as zeros.
func (m *Image) Discard(off, n int64) error {
	return m.change(func(c *contents) error { return c.write(off, n, nil) })
}

// Resize changes the size of the head.
func (m *Image) Resize(size int64) error {
	return m.change(func(c *contents) error { c.resize(size); return nil })
}

// SetHeader changes what Header returns.
func (m *Image) SetHeader(h rbdstream.Header) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.header = h
}

// Snapshot makes a version of the head.
func (m *Image) Snapshot(name string, protected bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.snapshot(transfer.Version{Name: name, Size: m.head.size, Protected: protected}, m.head)
}

func (m *Image) snapshot(v transfer.Version, c *contents) error {
	if slices.ContainsFunc(m.versions, func(old version) bool { return old.Name == v.Name }) {
		return fmt.Errorf("make version %s: %w", v.Name, atoll.ErrExist)
	}
	v.Size = c.size
	m.versions = append(m.versions, version{v, c, m.serial})
	return nil
}

// Rollback makes the head what a version holds.
func (m *Image) Rollback(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, _, err := m.find(name)
	if err == nil {
		m.serial++
		m.head = c
	}
	return err
}

// Remove removes a version.
func (m *Image) Remove(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.versions = slices.DeleteFunc(m.versions, func(v version) bool { return v.Name == name })
}

// Bytes returns all that a version ("" = the head) holds.
func (m *Image) Bytes(name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, _, err := m.find(name)
	if err != nil {
		return nil, err
	}
	p := make([]byte, c.size)
	return p, c.read(p, 0)
}

// find returns a version's contents and their number.
func (m *Image) find(name string) (*contents, int, error) {
	if name == "" {
		return m.head, m.serial, nil
	}
	for _, v := range m.versions {
		if v.Name == name {
			return v.c, v.id, nil
		}
	}
	return nil, 0, fmt.Errorf("open version %s: %w", name, atoll.ErrNotExist)
}

// Header implements transfer.Image.
func (m *Image) Header(context.Context) (rbdstream.Header, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.header, m.fail("header", 0)
}

// Versions implements transfer.Image.
func (m *Image) Versions(context.Context) ([]transfer.Version, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []transfer.Version
	for _, v := range m.versions {
		all = append(all, v.Version)
	}
	return all, m.fail("versions", 0)
}

// Open implements transfer.Image.
func (m *Image) Open(_ context.Context, name string) (transfer.State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c, id, err := m.find(name)
	if err == nil {
		err = m.fail("open", 0)
	}
	if err != nil {
		return nil, err
	}
	return &state{m, c, id}, nil
}

// Begin implements transfer.Target.
func (m *Image) Begin(_ context.Context, from string, force bool) (transfer.Stage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail("begin", 0); err != nil {
		return nil, err
	}
	base := &contents{size: m.head.size}
	if from != "" {
		var err error
		if base, _, err = m.find(from); err != nil {
			return nil, err
		}
	}
	if !force && !base.equal(m.head) {
		return nil, fmt.Errorf("head is not version %q: %w", from, atoll.ErrConflict)
	}
	return &stage{m: m, c: m.head.clone(), serial: m.serial, count: len(m.versions)}, nil
}

// state is the contents at one moment.
type state struct {
	m  *Image
	c  *contents
	id int
}

func (s *state) Size() int64  { return s.c.size }
func (s *state) ID() string   { return fmt.Sprintf("%p/%d", s.m, s.id) }
func (s *state) Close() error { return nil }

func (s *state) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.m.fail("read", off); err != nil {
		return err
	}
	return s.c.read(p, off)
}

func (s *state) Holes(_ context.Context, off, n int64, fn func(n int64, hole bool) bool) error {
	if err := s.m.fail("holes", off); err != nil {
		return err
	}
	return s.c.list(off, n, func(no int64) bool { return s.c.pages[no] == nil }, fn)
}

func (s *state) Changes(_ context.Context, since string, off, n int64, fn func(n int64, changed bool) bool) error {
	if err := s.m.fail("changes", off); err != nil {
		return err
	}
	s.m.mu.Lock()
	old, _, err := s.m.find(since)
	s.m.mu.Unlock()
	if err != nil {
		return err
	}
	return s.c.list(off, n, func(no int64) bool { return s.c.pages[no] != old.pages[no] }, fn)
}

// stage is contents in the making.
type stage struct {
	m      *Image
	p      *Pool // of a new image
	name   string
	serial int // of the head that it began at
	count  int // of versions then

	mu sync.Mutex
	c  *contents
}

func (s *stage) Size() int64 { return s.c.size }

func (s *stage) Resize(_ context.Context, size int64) error {
	if err := s.m.fail("resize", size); err != nil {
		return err
	}
	s.c.resize(size)
	return nil
}

func (s *stage) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := s.m.fail("write", off); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.c.write(off, int64(len(p)), p)
}

func (s *stage) Zero(_ context.Context, off, n int64) error {
	if err := s.m.fail("zero", off); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.c.write(off, n, nil)
}

func (s *stage) Snapshot(_ context.Context, v transfer.Version) error {
	if err := s.m.fail("snapshot", 0); err != nil {
		return err
	}
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.serial++
	return s.m.snapshot(v, s.c.clone())
}

func (s *stage) Commit(_ context.Context, v *transfer.Version) error {
	if err := s.m.fail("commit", 0); err != nil {
		return err
	}
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.p == nil && (s.m.serial != s.serial || len(s.m.versions) != s.count) {
		return fmt.Errorf("commit: %w", atoll.ErrConflict)
	}
	s.m.serial++
	if v != nil {
		if err := s.m.snapshot(*v, s.c); err != nil {
			return err
		}
	}
	s.m.head = s.c
	if s.p != nil {
		return s.p.publish(s.name, s.m)
	}
	return nil
}

func (s *stage) Abort(context.Context) error {
	err := s.m.fail("abort", 0)
	s.c = nil
	return err
}

// Pool makes images.
type Pool struct {
	// Name of the image that Create makes next.
	Name string
	// Fail becomes that of new images.
	Fail func(op string, off int64) error

	mu     sync.Mutex
	images map[string]*Image
}

// Get returns an image that was committed, or nil.
func (p *Pool) Get(name string) *Image {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.images[name]
}

func (p *Pool) publish(name string, m *Image) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.images[name] != nil {
		return fmt.Errorf("make image %s: %w", name, atoll.ErrExist)
	}
	if p.images == nil {
		p.images = map[string]*Image{}
	}
	p.images[name] = m
	return nil
}

// Create implements transfer.Maker.
func (p *Pool) Create(_ context.Context, h rbdstream.Header, size int64) (transfer.Stage, error) {
	m := New(size)
	m.header, m.Fail = h, p.Fail
	if err := m.fail("create", size); err != nil {
		return nil, err
	}
	return &stage{m: m, p: p, name: p.Name, c: m.head.clone()}, nil
}
