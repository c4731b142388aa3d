package nbdtest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
)

const (
	blockBytes   = 4096
	depthContext = "qemu:allocation-depth"
	sincePrefix  = "qemu:dirty-bitmap:since-"
)

// Disk is a Memory with versions. It offers the contexts of one: the depth of
// allocation, and what changed since each version, by comparing the bytes.
type Disk struct {
	*Memory
	parent *View // what it is a clone of, or nil

	mu       sync.Mutex
	versions []*View // oldest first
}

// View is a version of a disk: a device that can be read.
type View struct {
	*Memory
	Name   string
	parent *View
	older  []*View
}

// NewDisk returns an empty disk.
func NewDisk(size int64) *Disk { return &Disk{Memory: NewMemory(size)} }

// Snapshot keeps the present contents as a version. Nothing may write meanwhile.
func (d *Disk) Snapshot(name string) *View {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := &View{Memory: d.Memory.clone(), Name: name, parent: d.parent, older: slices.Clone(d.versions)}
	v.Refuse = true
	d.versions = append(d.versions, v)
	return v
}

// Versions returns the versions, oldest first.
func (d *Disk) Versions() []*View {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.versions)
}

// Forget deletes a version.
func (d *Disk) Forget(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.versions = slices.DeleteFunc(d.versions, func(v *View) bool { return v.Name == name })
}

// Clone returns a disk with the contents of v, whose allocation depth is 2.
func (v *View) Clone() *Disk {
	d := &Disk{Memory: v.Memory.clone(), parent: v}
	d.Refuse = false
	return d
}

// Contexts lists the contexts besides base:allocation.
func (d *Disk) Contexts(context.Context) ([]string, error) { return contexts(d.Versions()), nil }

// Contexts lists the contexts besides base:allocation.
func (v *View) Contexts(context.Context) ([]string, error) { return contexts(v.older), nil }

func contexts(versions []*View) []string {
	all := []string{depthContext}
	for _, v := range versions {
		all = append(all, sincePrefix+v.Name)
	}
	return all
}

// Status tells what a context says of a range, block by block.
func (d *Disk) Status(ctx context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	if err := d.before(ctx, "status", off, n); err != nil {
		return err
	}
	return status(d.Memory, d.parent, d.Versions(), name, off, n, fn)
}

// Status tells what a context says of a range, block by block.
func (v *View) Status(_ context.Context, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	return status(v.Memory, v.parent, v.older, name, off, n, fn)
}

func status(m *Memory, parent *View, versions []*View, name string, off, n int64, fn func(n int64, flags uint32) bool) error {
	if name == depthContext {
		return each(off, n, func(at, n int64) bool {
			switch p := m.block(at); {
			case p == nil:
				return fn(n, 0)
			case parent != nil && bytes.Equal(p, parent.block(at)):
				return fn(n, 2)
			}
			return fn(n, 1)
		})
	}
	version, ok := strings.CutPrefix(name, sincePrefix)
	i := slices.IndexFunc(versions, func(v *View) bool { return v.Name == version })
	if !ok || i < 0 {
		return fmt.Errorf("context %s: %w", name, atoll.ErrNotExist)
	}
	zero := make([]byte, blockBytes)
	return each(off, n, func(at, n int64) bool {
		a, b := m.block(at), versions[i].block(at)
		if a == nil {
			a = zero
		}
		if b == nil {
			b = zero
		}
		if bytes.Equal(a, b) {
			return fn(n, 0)
		}
		return fn(n, 1)
	})
}

// each calls fn for the part of every block in a range.
func each(off, n int64, fn func(at, n int64) bool) error {
	for end := off + n; off < end; {
		m := min(blockBytes-off%blockBytes, end-off)
		if !fn(off, m) {
			return nil
		}
		off += m
	}
	return nil
}

// clone copies a device.
func (m *Memory) clone() *Memory {
	c := NewMemory(m.Size())
	for i := range m.leaves {
		l := m.leaves[i].Load()
		if l == nil {
			continue
		}
		to := new(leaf)
		for j := range l {
			l[j].mu.RLock()
			to[j].data = slices.Clone(l[j].data)
			l[j].mu.RUnlock()
		}
		c.leaves[i].Store(to)
	}
	return c
}

// block returns a copy of the block around an offset, or nil if it is a hole.
func (m *Memory) block(at int64) []byte {
	if at >= m.Size() {
		return nil
	}
	l := m.leaves[at/leafBytes].Load()
	if l == nil {
		return nil
	}
	p := &l[at%leafBytes/pageBytes]
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.data == nil {
		return nil
	}
	from := at % pageBytes / blockBytes * blockBytes
	return slices.Clone(p.data[from : from+blockBytes])
}
