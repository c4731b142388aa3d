package catalog

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
)

// numberPool holds the numbers that a process has reserved and not given out.
type numberPool struct {
	mu         sync.Mutex
	next, last uint64
}

func (p *numberPool) take() (uint64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next == 0 || p.next > p.last {
		return 0, false
	}
	p.next++
	return p.next - 1, true
}

func (p *numberPool) put(next, last uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next, p.last = next, last
}

// children walks over the direct children that the keys under base show: a key
// "elem" is a medium, "elem/" a directory, and "elem/…" implies one. What lies
// deeper is passed over with one request for each directory.
type children struct {
	c    *Catalog
	base string
	pos  string // keys up to here are done
	buf  []KeyValue
	end  bool
}

const childPage = 256 // keys of one request

// peek returns the next child: its element, with a slash at the end if it is a
// directory, and the key's value.
func (s *children) peek(ctx context.Context) (elem string, kv KeyValue, ok bool, err error) {
	for {
		for len(s.buf) > 0 && s.buf[0].Key[len(s.base):] <= s.pos {
			s.buf = s.buf[1:]
		}
		if len(s.buf) > 0 {
			rest := s.buf[0].Key[len(s.base):]
			if i := strings.IndexByte(rest, '/'); i >= 0 {
				return rest[:i+1], s.buf[0], true, nil
			}
			return rest, s.buf[0], true, nil
		}
		if s.end {
			return "", KeyValue{}, false, nil
		}
		if s.buf, _, err = s.c.scan(ctx, s.base, s.base+s.pos, childPage); err != nil {
			return "", KeyValue{}, false, err
		}
		s.end = len(s.buf) < childPage
	}
}

// skip goes past a child. No name contains the byte 0xff.
func (s *children) skip(elem string) {
	s.pos = elem
	if strings.HasSuffix(elem, "/") {
		s.pos += "\xff"
	}
}

// List returns up to limit (0 or beyond 1000: 1000) direct children of a
// directory, in the order of their names as far as possible, and where to go on,
// "" at the end. after is "" or what an earlier call returned. ErrNotExist, or
// ErrInvalid if the path is a medium's.
func (c *Catalog) List(ctx context.Context, path, after string, limit int) ([]Entry, string, error) {
	if limit <= 0 || limit > maxPage {
		limit = maxPage
	}
	ctx, done := bound(ctx)
	defer done()
	out, next, err := c.list(ctx, path, after, limit)
	if err != nil {
		return nil, "", fmt.Errorf("list directory %q: %w", path, err)
	}
	return out, next, nil
}

func (c *Catalog) list(ctx context.Context, path, after string, limit int) ([]Entry, string, error) {
	prefix := ""
	if path != "" {
		if err := ValidateDirectory(path); err != nil {
			return nil, "", err
		}
		e, err := c.entry(ctx, path)
		if err == nil && e.Dir == nil {
			err = fmt.Errorf("it is a %s: %w", e.Medium.Kind, atoll.ErrInvalid)
		}
		if err != nil {
			return nil, "", err
		}
		prefix = path + "/"
	}
	names := &children{c: c, base: namePrefix + prefix}
	dirs := &children{c: c, base: dirPrefix + prefix}
	names.skip(after)
	dirs.skip(after)
	var out []Entry
	var media []KeyValue
	for len(out) < limit {
		elem, kv, ok, err := nextChild(ctx, names, dirs)
		if err != nil {
			return nil, "", err
		}
		if !ok {
			out, err = c.fillMedia(ctx, out, media)
			return out, "", err
		}
		after = elem
		e := Entry{Path: prefix + strings.TrimSuffix(elem, "/")}
		switch {
		case kv.Key == dirKey(e.Path):
			if e.Dir, err = decodeDir(kv); err != nil {
				return nil, "", err
			}
		case strings.HasSuffix(elem, "/"):
			e.Dir = impliedDir(e.Path)
		default:
			media = append(media, kv)
		}
		out = append(out, e)
	}
	out, err := c.fillMedia(ctx, out, media)
	return out, after, err
}

// nextChild takes the first child of two walks. Where both show a directory, the
// value is that of its record.
func nextChild(ctx context.Context, names, dirs *children) (string, KeyValue, bool, error) {
	n, nkv, nok, err := names.peek(ctx)
	if err != nil {
		return "", nkv, false, err
	}
	d, dkv, dok, err := dirs.peek(ctx)
	if err != nil {
		return "", dkv, false, err
	}
	switch {
	case !nok && !dok:
		return "", nkv, false, nil
	case !dok || nok && n < d:
		names.skip(n)
		return n, nkv, true, nil
	case nok && n == d:
		names.skip(n)
	}
	dirs.skip(d)
	return d, dkv, true, nil
}

// fillMedia reads the records of the media in a list, and leaves out those that
// are gone by now.
func (c *Catalog) fillMedia(ctx context.Context, list []Entry, keys []KeyValue) ([]Entry, error) {
	media, err := c.records(ctx, keys)
	if err != nil {
		return nil, err
	}
	byName := make(map[string]*Medium, len(media))
	for i := range media {
		byName[media[i].Name] = &media[i]
	}
	out := list[:0]
	for _, e := range list {
		if e.Dir == nil {
			e.Medium = byName[e.Path]
		}
		if e.Dir != nil || e.Medium != nil {
			out = append(out, e)
		}
	}
	return out, nil
}

// DirectoryByNumber finds a directory by its number, 0 being the root of the
// tree. It reads all directories. ErrNotExist; implied ones are not found.
func (c *Catalog) DirectoryByNumber(ctx context.Context, number uint64) (Entry, error) {
	if number == 0 {
		return Entry{Dir: impliedDir("")}, nil
	}
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, dirPrefix, "", 0)
	if err != nil {
		return Entry{}, fmt.Errorf("find directory %d: %w", number, err)
	}
	for _, kv := range kvs {
		if d, err := decodeDir(kv); err != nil || d.Number == number {
			return Entry{Path: d.Path, Dir: d}, err
		}
	}
	return Entry{}, fmt.Errorf("find directory %d: %w", number, atoll.ErrNotExist)
}
