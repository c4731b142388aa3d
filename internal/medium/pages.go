package medium

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// The pages of versions; format.go draws them.
const (
	pageFixed    = 32
	versionFixed = 104
	maxName      = 255
)

// pageOf returns the number of the page that has a version.
func pageOf(number uint64) uint32 { return uint32(number / pageVersions) }

// encodePage returns page number of the versions in whole blocks, nil when none
// of them is in it.
func encodePage(id atoll.MediumID, page uint32, versions []Version) []byte {
	p := frame(magicVersions, pageVersion, pageFixed)
	n := uint32(0)
	for i := range versions {
		if pageOf(versions[i].Number) == page {
			p = appendVersion(p, &versions[i])
			n++
		}
	}
	if n == 0 {
		return nil
	}
	le.PutUint64(p[16:], uint64(id))
	le.PutUint32(p[24:], page)
	le.PutUint32(p[28:], n)
	return finish(p)
}

func appendVersion(p []byte, v *Version) []byte {
	var q [versionFixed]byte
	le.PutUint64(q[0:], v.Number)
	le.PutUint64(q[8:], uint64(v.Time.UnixNano()))
	le.PutUint64(q[16:], v.Parent)
	le.PutUint64(q[24:], uint64(v.At))
	le.PutUint64(q[32:], v.Seq)
	le.PutUint64(q[40:], uint64(v.Size))
	le.PutUint64(q[48:], uint64(v.Used))
	le.PutUint64(q[56:], uint64(v.Unique))
	le.PutUint32(q[64:], v.Epoch)
	le.PutUint32(q[68:], uint32(v.Flags))
	putRef(q[72:], v.Root)
	le.PutUint32(q[92:], uint32(v.RootLen))
	le.PutUint16(q[96:], uint16(len(v.Name)))
	le.PutUint16(q[98:], uint16(len(v.Memo)))
	le.PutUint16(q[100:], uint16(len(v.Props)))
	p = append(p, q[:]...)
	p = append(p, v.Name...)
	p = append(p, v.Memo...)
	for _, k := range slices.Sorted(maps.Keys(v.Props)) {
		for _, s := range []string{k, v.Props[k]} {
			p = le.AppendUint16(p, uint16(len(s)))
			p = append(p, s...)
		}
	}
	return p
}

// parsePage decodes a page of versions. The result does not share memory with p.
func parsePage(p []byte) (id atoll.MediumID, page uint32, versions []Version, err error) {
	p, err = unframe("page of versions", p, magicVersions, pageVersion, pageFixed)
	if err != nil {
		return 0, 0, nil, err
	}
	id, page = atoll.MediumID(le.Uint64(p[16:])), le.Uint32(p[24:])
	bad := fmt.Errorf("parse page %d of versions: counts do not agree with length: %w", page, atoll.ErrCorrupt)
	n, q := int(le.Uint32(p[28:])), p[pageFixed:]
	if n > pageVersions {
		return 0, 0, nil, bad
	}
	for i := range n {
		v, rest, ok := parseVersion(q)
		if !ok || pageOf(v.Number) != page || i > 0 && v.Number <= versions[i-1].Number {
			return 0, 0, nil, bad
		}
		versions, q = append(versions, v), rest
	}
	if len(q) != 0 {
		return 0, 0, nil, bad
	}
	return id, page, versions, nil
}

func parseVersion(q []byte) (v Version, rest []byte, ok bool) {
	if len(q) < versionFixed {
		return v, nil, false
	}
	v = Version{
		Number: le.Uint64(q[0:]), Time: time.Unix(0, int64(le.Uint64(q[8:]))), Parent: le.Uint64(q[16:]),
		At: atoll.Location(le.Uint64(q[24:])), Seq: le.Uint64(q[32:]), Size: int64(le.Uint64(q[40:])),
		Used: int64(le.Uint64(q[48:])), Unique: int64(le.Uint64(q[56:])), Epoch: le.Uint32(q[64:]),
		Flags: Flags(le.Uint32(q[68:])), Root: getRef(q[72:]), RootLen: int(le.Uint32(q[92:])),
	}
	name, memo, props := int(le.Uint16(q[96:])), int(le.Uint16(q[98:])), int(le.Uint16(q[100:]))
	q = q[versionFixed:]
	if len(q) < name+memo || v.RootLen > MaxRoot {
		return v, nil, false
	}
	v.Name, v.Memo, q = string(q[:name]), string(q[name:name+memo]), q[name+memo:]
	for range props {
		var s [2]string
		for i := range s {
			if len(q) < 2 || len(q) < 2+int(le.Uint16(q)) {
				return v, nil, false
			}
			n := int(le.Uint16(q))
			s[i], q = string(q[2:2+n]), q[2+n:]
		}
		if v.Props == nil {
			v.Props = map[string]string{}
		}
		if _, twice := v.Props[s[0]]; twice {
			return v, nil, false
		}
		v.Props[s[0]] = s[1]
	}
	return v, q, true
}

// storeVersions writes the roots of new versions, copies those that must leave
// their segments, and writes the pages that change.
func (m *Medium) storeVersions(ctx context.Context, lane catalog.Lane, d *draft) error {
	for number, root := range d.roots {
		v := d.version(number)
		if v == nil {
			continue // added and removed at once
		}
		var err error
		if root == nil { // it must leave its segment
			if root, err = m.readOwn(ctx, v.Root); err != nil {
				return fmt.Errorf("copy root of version %d: %w", number, err)
			}
		}
		if v.Root, err = m.appendOwn(ctx, lane, kindVerRoot, number, padded(root)); err != nil {
			return err
		}
	}
	if !d.relist && len(d.roots) == 0 {
		return nil
	}
	old := m.manifest() // only this goroutine replaces it
	var pages []pageRef
	for i := range d.man.Versions {
		n := pageOf(d.man.Versions[i].Number)
		if len(pages) > 0 && pages[len(pages)-1].Page == n {
			continue
		}
		p := encodePage(m.id, n, d.man.Versions)
		ref := old.page(n)
		if ref.IsZero() || d.leaves(ref) || !bytes.Equal(p, encodePage(m.id, n, old.Versions)) {
			var err error
			if ref, err = m.appendOwn(ctx, lane, kindVersions, uint64(n), p); err != nil {
				return err
			}
			m.metrics.wrote("versions", len(p))
		}
		pages = append(pages, pageRef{n, ref})
	}
	if len(pages) > maxPages {
		return fmt.Errorf("%d pages of versions: %w", len(pages), atoll.ErrTooLarge)
	}
	d.man.Pages = pages
	return nil
}

// page returns where page n is.
func (m *manifest) page(n uint32) Ref {
	for _, g := range m.Pages {
		if g.Page == n {
			return g.Ref
		}
	}
	return Ref{}
}

// loadPages reads the versions of a manifest.
func (m *manifest) loadPages(read func(Ref) ([]byte, error)) error {
	for _, g := range m.Pages {
		p, err := read(g.Ref)
		if err != nil {
			return fmt.Errorf("load page %d of versions: %w", g.Page, err)
		}
		id, page, versions, err := parsePage(p)
		if err != nil {
			return err
		}
		if id != m.Medium || page != g.Page {
			return fmt.Errorf("load page %d of versions: it is page %d of medium %v: %w", g.Page, page, id, atoll.ErrCorrupt)
		}
		m.Versions = append(m.Versions, versions...)
	}
	return nil
}

// padded returns p in whole blocks.
func padded(p []byte) []byte {
	return append(slices.Clip(p), make([]byte, -len(p)&(atoll.BlockSize-1))...)
}
