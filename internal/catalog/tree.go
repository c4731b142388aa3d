package catalog

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Directory is a directory of the tree of names. The names of media may imply
// directories that have no record, from before there were any: these belong to
// root and have a number that follows from their path.
type Directory struct {
	Number  uint64    `json:"number"` // never given out twice; 0 is the root of the tree
	Path    string    `json:"path"`   // "" is the root of the tree
	Owner   string    `json:"owner"`
	Created time.Time `json:"created"`
	// Leaving is set while someone looks whether the directory is empty, to
	// remove it. Whoever puts something into it takes the mark away.
	Leaving bool  `json:"leaving,omitempty"`
	Rev     int64 `json:"-"` // 0: implied
}

// Entry is what a path stands for: a medium or a directory.
type Entry struct {
	Path   string
	Medium *Medium
	Dir    *Directory
}

const rootOwner = "root"

// impliedBit sets the numbers of implied directories apart from those given out.
const impliedBit = 1 << 52

func impliedDir(path string) *Directory {
	if path == "" {
		return &Directory{Owner: rootOwner}
	}
	h := fnv.New64a()
	h.Write([]byte(path))
	return &Directory{Path: path, Owner: rootOwner, Number: impliedBit | h.Sum64()&(impliedBit-1)}
}

// ParentPath returns the path of the directory that a path lies in, "" for the
// root of the tree.
func ParentPath(path string) string {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i]
	}
	return ""
}

func decodeDir(kv KeyValue) (*Directory, error) {
	d := &Directory{}
	if kv.Mod == 0 {
		return d, atoll.ErrNotExist
	}
	err := decode(kv, d)
	d.Rev = kv.Mod
	return d, err
}

// ValidateDirectory checks the path of a directory by the rules of names.
func ValidateDirectory(path string) error { return ValidateName(path + "/x") }

// site returns the conditions under which a new thing may get a name: nothing
// has it, and its directory stands. With parents, directories that are missing
// are made first, for owner. ErrExist when the name is taken, ErrNotExist when
// the directory is missing, ErrInvalid when it is none.
func (c *Catalog) site(ctx context.Context, name, owner string, parents bool) ([]Cmp, error) {
	free := []Cmp{{Key: nameKey(name)}, {Key: dirKey(name)}}
	parent := ParentPath(name)
	for range maxRaces {
		got, err := c.read(ctx, nameKey(name), dirKey(name), nameKey(parent), dirKey(parent))
		if err != nil {
			return nil, err
		}
		if got[0].Mod != 0 || got[1].Mod != 0 {
			return nil, fmt.Errorf("%q: %w", name, atoll.ErrExist)
		}
		if implied, err := c.occupied(ctx, name); err != nil || implied {
			return nil, errors.Join(err, fmt.Errorf("%q is a directory: %w", name, atoll.ErrExist))
		}
		if parent == "" {
			return free, nil
		}
		switch {
		case got[3].Mod != 0:
			if got[3], err = c.stay(ctx, got[3]); err != nil {
				return nil, err
			}
			if got[3].Mod != 0 {
				return append(free, Cmp{Key: got[3].Key, Rev: got[3].Mod}), nil
			}
		case got[2].Mod != 0:
			return nil, fmt.Errorf("%q is no directory: %w", parent, atoll.ErrInvalid)
		default:
			if err := c.makeParent(ctx, parent, owner, parents); err != nil {
				return nil, err
			}
		}
	}
	return nil, atoll.ErrConflict
}

// makeParent makes a directory that has no record, if it is implied or wanted.
func (c *Catalog) makeParent(ctx context.Context, path, owner string, wanted bool) error {
	implied, err := c.occupied(ctx, path)
	if err != nil {
		return err
	}
	switch {
	case implied:
		owner = rootOwner
	case !wanted:
		return fmt.Errorf("directory %q: %w", path, atoll.ErrNotExist)
	}
	_, err = c.makeDirectory(ctx, path, owner, true, implied)
	if errors.Is(err, atoll.ErrExist) {
		return nil // someone else made it, or something else: look again
	}
	return err
}

// stay takes the mark of a removal from a directory. It returns its key as it is
// then, with Mod 0 when somebody was faster.
func (c *Catalog) stay(ctx context.Context, kv KeyValue) (KeyValue, error) {
	d, err := decodeDir(kv)
	if err != nil || !d.Leaving {
		return kv, err
	}
	d.Leaving = false
	w := c.mark()
	res, ok, err := c.commit(ctx, w, Txn{
		If: []Cmp{{Key: kv.Key, Rev: kv.Mod}}, Then: []Op{{Key: kv.Key, Value: encode(w, d)}}, Read: []string{kv.Key},
	})
	if err != nil || !ok {
		return KeyValue{}, err
	}
	return KeyValue{Key: kv.Key, Mod: res.Rev}, nil
}

// occupied reports whether anything lies in the directory path.
func (c *Catalog) occupied(ctx context.Context, path string) (bool, error) {
	for _, prefix := range []string{namePrefix, dirPrefix} {
		base := prefix + path + "/"
		kvs, _, err := c.scan(ctx, base, base, 1)
		if err != nil || len(kvs) > 0 {
			return len(kvs) > 0, err
		}
	}
	return false, nil
}

// MakeDirectory makes a directory. With parents it makes what is missing above
// it too, and one that is there is no error. Else ErrExist when something has
// the path, ErrNotExist when the directory above is missing, ErrInvalid for a
// bad path.
func (c *Catalog) MakeDirectory(ctx context.Context, path, owner string, parents bool) (Directory, error) {
	if err := ValidateDirectory(path); err != nil {
		return Directory{}, err
	}
	ctx, done := bound(ctx)
	defer done()
	d, err := c.makeDirectory(ctx, path, owner, parents, false)
	if errors.Is(err, atoll.ErrExist) && parents {
		e, lerr := c.entry(ctx, path)
		if lerr == nil && e.Dir != nil {
			return *e.Dir, nil
		}
	}
	if err != nil {
		return Directory{}, fmt.Errorf("make directory %q: %w", path, err)
	}
	return d, nil
}

// makeDirectory makes a directory of which it is known whether it is implied.
func (c *Catalog) makeDirectory(ctx context.Context, path, owner string, parents, implied bool) (Directory, error) {
	number, err := c.number(ctx)
	if err != nil {
		return Directory{}, err
	}
	d := Directory{Number: number, Path: path, Owner: owner, Created: now()}
	if d.Owner == "" {
		d.Owner = rootOwner
	}
	for range maxRaces {
		var cmps []Cmp
		if implied {
			d.Number = impliedDir(path).Number
			cmps, err = c.above(ctx, path)
		} else {
			cmps, err = c.site(ctx, path, owner, parents)
		}
		if err != nil {
			return Directory{}, err
		}
		w := c.mark()
		res, ok, err := c.commit(ctx, w, Txn{
			If: cmps, Then: []Op{{Key: dirKey(path), Value: encode(w, d)}}, Read: []string{dirKey(path)},
		})
		if err != nil {
			return Directory{}, err
		}
		if ok {
			d.Rev = res.Rev
			return d, nil
		}
	}
	return Directory{}, atoll.ErrConflict
}

// above is site for a directory that is implied: those above it are, too, or
// have a record.
func (c *Catalog) above(ctx context.Context, path string) ([]Cmp, error) {
	cmps := []Cmp{{Key: nameKey(path)}, {Key: dirKey(path)}}
	got, err := c.read(ctx, nameKey(path), dirKey(path))
	if err == nil && (got[0].Mod != 0 || got[1].Mod != 0) {
		err = fmt.Errorf("%q: %w", path, atoll.ErrExist)
	}
	return cmps, err
}

// RemoveDirectory removes an empty directory. ErrBusy when something lies in it,
// ErrNotExist, ErrInvalid for what is no directory.
func (c *Catalog) RemoveDirectory(ctx context.Context, path string) error {
	if err := ValidateDirectory(path); err != nil {
		return err
	}
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		ok, err := c.tryRemove(ctx, path)
		if err != nil {
			return fmt.Errorf("remove directory %q: %w", path, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("remove directory %q: %w", path, atoll.ErrConflict)
}

// tryRemove marks the directory, looks whether it is empty, and removes it if
// nobody touched it since the mark: whoever puts something in has the directory's
// revision as a condition.
func (c *Catalog) tryRemove(ctx context.Context, path string) (bool, error) {
	e, err := c.entry(ctx, path)
	if err != nil {
		return false, err
	}
	if e.Dir == nil {
		return false, fmt.Errorf("it is a %s: %w", e.Medium.Kind, atoll.ErrInvalid)
	}
	full := fmt.Errorf("it is not empty: %w", atoll.ErrBusy)
	if e.Dir.Rev == 0 {
		return false, full // something lies in it, or it would not be there
	}
	if busy, err := c.occupied(ctx, path); err != nil || busy {
		return false, errors.Join(err, full)
	}
	d := *e.Dir
	d.Leaving = true
	w := c.mark()
	key := dirKey(path)
	res, ok, err := c.commit(ctx, w, Txn{If: []Cmp{{Key: key, Rev: d.Rev}}, Then: []Op{{Key: key, Value: encode(w, d)}}, Read: []string{key}})
	if err != nil || !ok {
		return false, err
	}
	if busy, err := c.occupied(ctx, path); err != nil || busy {
		_, serr := c.stay(ctx, KeyValue{Key: key, Value: encode(w, d), Mod: res.Rev})
		return false, errors.Join(err, serr, full)
	}
	_, ok, err = c.commit(ctx, "", Txn{If: []Cmp{{Key: key, Rev: res.Rev}}, Then: []Op{{Key: key, Delete: true}}, Read: []string{key}})
	return ok, err
}

// Entry returns what a path stands for; "" is the root of the tree. ErrNotExist.
func (c *Catalog) Entry(ctx context.Context, path string) (Entry, error) {
	if path != "" {
		if err := ValidateDirectory(path); err != nil {
			return Entry{}, err
		}
	}
	ctx, done := bound(ctx)
	defer done()
	e, err := c.entry(ctx, path)
	if err != nil {
		return Entry{}, fmt.Errorf("find %q: %w", path, err)
	}
	return e, nil
}

func (c *Catalog) entry(ctx context.Context, path string) (Entry, error) {
	if path == "" {
		return Entry{Dir: impliedDir("")}, nil
	}
	for range maxRaces {
		got, err := c.read(ctx, nameKey(path), dirKey(path))
		if err != nil {
			return Entry{}, err
		}
		switch {
		case got[1].Mod != 0:
			d, err := decodeDir(got[1])
			return Entry{Path: path, Dir: d}, err
		case got[0].Mod != 0:
			media, err := c.records(ctx, got[:1])
			if err != nil || len(media) == 1 {
				return Entry{Path: path, Medium: &media[0]}, err
			}
			continue // renamed or removed between the two reads
		}
		implied, err := c.occupied(ctx, path)
		switch {
		case err != nil:
			return Entry{}, err
		case implied:
			return Entry{Path: path, Dir: impliedDir(path)}, nil
		}
		return Entry{}, atoll.ErrNotExist
	}
	return Entry{}, atoll.ErrConflict
}

// SetDirectoryOwner gives a directory to another user. ErrNotExist.
func (c *Catalog) SetDirectoryOwner(ctx context.Context, path, owner string) (Directory, error) {
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		e, err := c.entry(ctx, path)
		switch {
		case err != nil:
		case path == "" || e.Dir == nil:
			err = fmt.Errorf("it is no directory that can have another owner: %w", atoll.ErrInvalid)
		case e.Dir.Rev == 0:
			err = c.makeParent(ctx, path, rootOwner, false)
			if err == nil {
				continue
			}
		}
		if err != nil {
			return Directory{}, fmt.Errorf("change owner of %q: %w", path, err)
		}
		d := *e.Dir
		d.Owner = owner
		w := c.mark()
		res, ok, err := c.commit(ctx, w, Txn{If: []Cmp{{Key: dirKey(path), Rev: d.Rev}}, Then: []Op{{Key: dirKey(path), Value: encode(w, d)}}, Read: []string{dirKey(path)}})
		if err != nil {
			return Directory{}, fmt.Errorf("change owner of %q: %w", path, err)
		}
		if ok {
			d.Rev = res.Rev
			return d, nil
		}
	}
	return Directory{}, fmt.Errorf("change owner of %q: %w", path, atoll.ErrConflict)
}

// RenameOptions say how RenameMedium moves a medium.
type RenameOptions struct {
	NoParents bool   // the new directory must be there
	Replace   *Trash // a medium of the new name goes to the trash; nil: ErrExist
}

// RenameMedium gives a live medium, as it was read at m.Rev, another name, and
// returns its record and that of the medium which was replaced, if any. ErrBusy
// when that one is in use, ErrConflict when m was changed since, else as
// CreateMedium and MakeDirectory.
func (c *Catalog) RenameMedium(ctx context.Context, m Medium, to string, o RenameOptions) (Medium, *Medium, error) {
	if err := ValidateName(to); err != nil {
		return Medium{}, nil, err
	}
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		out, old, ok, err := c.tryRename(ctx, m, to, o)
		if err != nil {
			return Medium{}, nil, fmt.Errorf("rename %q to %q: %w", m.Name, to, err)
		}
		if ok {
			return out, old, nil
		}
	}
	return Medium{}, nil, fmt.Errorf("rename %q to %q: %w", m.Name, to, atoll.ErrConflict)
}

func (c *Catalog) tryRename(ctx context.Context, m Medium, to string, o RenameOptions) (Medium, *Medium, bool, error) {
	have, kv, err := c.medium(ctx, m.ID)
	switch {
	case err != nil:
		return m, nil, false, err
	case have.Rev != m.Rev || have.State != MediumLive:
		return m, nil, false, atoll.ErrConflict
	case have.Name == to:
		return m, nil, false, fmt.Errorf("it has that name: %w", atoll.ErrExist)
	}
	w := c.mark()
	from := m.Name
	m.Name = to
	t := Txn{
		If:   []Cmp{{Key: kv.Key, Rev: kv.Mod}},
		Then: []Op{{Key: kv.Key, Value: encode(w, m)}, {Key: nameKey(to), Value: encode(w, m.ID)}, {Key: nameKey(from), Delete: true}},
		Read: []string{kv.Key},
	}
	var old *Medium
	cmps, err := c.site(ctx, to, m.Owner, !o.NoParents)
	if errors.Is(err, atoll.ErrExist) && o.Replace != nil {
		cmps, old, err = c.replaced(ctx, w, to, *o.Replace, &t)
	}
	if err != nil {
		return m, nil, false, err
	}
	t.If = append(t.If, cmps...)
	res, ok, err := c.commit(ctx, w, t)
	m.Rev = res.Rev
	return m, old, ok, err
}

// replaced adds to a transaction what puts the medium of a name into the trash.
func (c *Catalog) replaced(ctx context.Context, w, name string, note Trash, t *Txn) ([]Cmp, *Medium, error) {
	e, err := c.entry(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if e.Medium == nil {
		return nil, nil, fmt.Errorf("%q is a directory: %w", name, atoll.ErrExist)
	}
	cmps, ops, old, err := c.discard(ctx, w, *e.Medium, note)
	t.Then = append(t.Then, ops...)
	return cmps, &old, err
}

// numberBlock is how many numbers a process reserves at a time.
const numberBlock = 16

// number draws a small number that no entry of the tree had before.
func (c *Catalog) number(ctx context.Context) (uint64, error) {
	if n, ok := c.numbers.take(); ok {
		return n, nil
	}
	for range maxRaces {
		got, err := c.read(ctx, keyLastEntry)
		if err != nil {
			return 0, err
		}
		var last uint64
		if got[0].Mod != 0 {
			if err := decode(got[0], &last); err != nil {
				return 0, err
			}
		}
		w := c.mark()
		_, ok, err := c.commit(ctx, w, Txn{
			If: []Cmp{{Key: keyLastEntry, Rev: got[0].Mod}}, Then: []Op{{Key: keyLastEntry, Value: encode(w, last+numberBlock)}}, Read: []string{keyLastEntry},
		})
		if err != nil {
			return 0, err
		}
		if ok {
			c.numbers.put(last+2, last+numberBlock)
			return last + 1, nil
		}
	}
	return 0, fmt.Errorf("draw a number: %w", atoll.ErrConflict)
}
