package catalog

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
)

func catUsers(t *testing.T, p pair) {
	hash := must(p.a.HashPassword("secret"))(t)
	if other := must(p.a.HashPassword("secret"))(t); other == hash {
		t.Error("two hashes of one password are the same")
	}
	u := must(p.a.CreateUser(p.ctx, User{Name: "bob", Hash: hash, Strict: true}))(t)
	_, err := p.b.CreateUser(p.ctx, User{Name: "bob"})
	wantErr(t, err, atoll.ErrExist)
	got := must(p.b.User(p.ctx, "bob"))(t)
	if got.Rev != u.Rev || !got.Strict || got.Admin {
		t.Errorf("bob is %+v", got)
	}
	if err := got.Verify("secret"); err != nil {
		t.Error(err)
	}
	wantErr(t, got.Verify("Secret"), atoll.ErrDenied)
	wantErr(t, got.Verify(""), atoll.ErrDenied)
	wantErr(t, got.Verify(strings.Repeat("x", 2000)), atoll.ErrDenied)
	wantErr(t, (&User{Name: "x"}).Verify(""), atoll.ErrDenied)
	wantErr(t, (&User{Name: "x", Hash: "$argon2id$v=19$m=9999999,t=2,p=1$AAAA$AAAA"}).Verify("x"), atoll.ErrCorrupt)
	_, err = p.a.HashPassword("")
	wantErr(t, err, atoll.ErrInvalid)

	got.Strict = false
	must(p.b.UpdateUser(p.ctx, got))(t)
	_, err = p.a.UpdateUser(p.ctx, u)
	wantErr(t, err, atoll.ErrConflict)
	root := must(p.a.User(p.ctx, "root"))(t)
	if !root.Admin || root.Hash != "" || root.Rev != 0 {
		t.Errorf("root is %+v", root)
	}
	must(p.a.CreateUser(p.ctx, User{Name: "zoe"}))(t)
	list := func() string {
		var out []string
		for _, u := range must(p.b.Users(p.ctx))(t) {
			out = append(out, fmt.Sprintf("%s:%v", u.Name, u.Admin))
		}
		return strings.Join(out, " ")
	}
	if l := list(); l != "bob:false root:true zoe:false" {
		t.Errorf("users: %s", l)
	}
	root.Hash = hash
	must(p.a.UpdateUser(p.ctx, root))(t)
	root = must(p.b.User(p.ctx, "root"))(t)
	if root.Rev == 0 || root.Verify("secret") != nil {
		t.Errorf("root is now %+v", root)
	}
	root.Admin = false
	_, err = p.a.UpdateUser(p.ctx, root)
	wantErr(t, err, atoll.ErrInvalid)
	wantErr(t, p.a.RemoveUser(p.ctx, "root"), atoll.ErrInvalid)
	if err := p.a.RemoveUser(p.ctx, "bob"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, p.a.RemoveUser(p.ctx, "bob"), atoll.ErrNotExist)
	if l := list(); l != "root:true zoe:false" {
		t.Errorf("users: %s", l)
	}
	for _, bad := range []string{"", "a/b", "a@b", "a\n", "cur"} {
		_, err := p.a.CreateUser(p.ctx, User{Name: bad})
		wantErr(t, err, atoll.ErrInvalid)
	}
}

// shown lists a directory, page by page, as "name" or "name/".
func shown(t *testing.T, p pair, path string, page int) string {
	t.Helper()
	var out []string
	for after := ""; ; {
		list, next, err := p.b.List(p.ctx, path, after, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			text := strings.TrimPrefix(e.Path, path+"/")
			if e.Dir != nil {
				text += "/"
			}
			if (e.Dir == nil) == (e.Medium == nil) || e.Medium != nil && e.Medium.Name != e.Path {
				t.Errorf("entry %+v", e)
			}
			out = append(out, text)
		}
		if next == "" {
			return strings.Join(out, " ")
		}
		after = next
	}
}

func catTree(t *testing.T, p pair) {
	v := volume("x/y/v")
	v.Owner = "bob"
	m := must(p.a.CreateMedium(p.ctx, v))(t)
	e := must(p.b.Entry(p.ctx, "x/y"))(t)
	if e.Dir == nil || e.Dir.Owner != "bob" || e.Dir.Number == 0 || m.Number == 0 || e.Dir.Number == m.Number {
		t.Errorf("x/y is %+v, the volume has number %d", e.Dir, m.Number)
	}
	d := must(p.b.MakeDirectory(p.ctx, "d", "eve", false))(t)
	if d.Owner != "eve" || d.Number == 0 || d.Number == m.Number {
		t.Errorf("made %+v", d)
	}
	if again := must(p.a.MakeDirectory(p.ctx, "d", "bob", true))(t); again.Owner != "eve" {
		t.Errorf("made again: %+v", again)
	}
	must(p.a.MakeDirectory(p.ctx, "d/e/f", "eve", true))(t)
	for _, w := range []struct {
		path    string
		parents bool
		kind    error
	}{
		{"d", false, atoll.ErrExist}, {"x/y/v", false, atoll.ErrExist}, {"x/y/v", true, atoll.ErrExist}, {"q/r", false, atoll.ErrNotExist},
		{"x/y/v/w", true, atoll.ErrInvalid}, {"a//b", true, atoll.ErrInvalid}, {"", true, atoll.ErrInvalid},
	} {
		_, err := p.a.MakeDirectory(p.ctx, w.path, "eve", w.parents)
		if !errors.Is(err, w.kind) {
			t.Errorf("make %q: %v", w.path, err)
		}
	}
	_, err := p.a.CreateMedium(p.ctx, volume("d"))
	wantErr(t, err, atoll.ErrExist)
	_, err = p.a.CreateMedium(p.ctx, volume("x/y/v/w"))
	wantErr(t, err, atoll.ErrInvalid)
	for _, name := range []string{"d/b", "d/b-1", "d/z", "d/e/1", "d/e/f/2", "top"} {
		must(p.a.CreateMedium(p.ctx, volume(name)))(t)
	}
	for page := 1; page < 8; page++ {
		if got := shown(t, p, "d", page); got != "b b-1 e/ z" {
			t.Errorf("pages of %d: %s", page, got)
		}
		if got := shown(t, p, "", page); got != "d/ top x/" {
			t.Errorf("root in pages of %d: %s", page, got)
		}
	}
	_, _, err = p.a.List(p.ctx, "top", "", 0)
	wantErr(t, err, atoll.ErrInvalid)
	_, _, err = p.a.List(p.ctx, "nowhere", "", 0)
	wantErr(t, err, atoll.ErrNotExist)

	wantErr(t, p.a.RemoveDirectory(p.ctx, "d/e"), atoll.ErrBusy)
	wantErr(t, p.a.RemoveDirectory(p.ctx, "top"), atoll.ErrInvalid)
	wantErr(t, p.a.RemoveDirectory(p.ctx, "nowhere"), atoll.ErrNotExist)
	wantErr(t, p.a.RemoveDirectory(p.ctx, ""), atoll.ErrInvalid)
	must(p.a.MakeDirectory(p.ctx, "empty/er", "eve", true))(t)
	for _, path := range []string{"empty/er", "empty"} {
		if err := p.b.RemoveDirectory(p.ctx, path); err != nil {
			t.Error(err)
		}
	}
	_, err = p.a.Entry(p.ctx, "empty")
	wantErr(t, err, atoll.ErrNotExist)
	if d := must(p.a.SetDirectoryOwner(p.ctx, "d", "bob"))(t); d.Owner != "bob" || must(p.b.Entry(p.ctx, "d"))(t).Dir.Owner != "bob" {
		t.Errorf("owner: %+v", d)
	}
	_, err = p.a.SetDirectoryOwner(p.ctx, "top", "bob")
	wantErr(t, err, atoll.ErrInvalid)
	_, err = p.a.SetDirectoryOwner(p.ctx, "nowhere", "bob")
	wantErr(t, err, atoll.ErrNotExist)
	renames(t, p, m)
}

func renames(t *testing.T, p pair, m Medium) {
	_, _, err := p.a.RenameMedium(p.ctx, m, "x/q/v", RenameOptions{NoParents: true})
	wantErr(t, err, atoll.ErrNotExist)
	_, _, err = p.a.RenameMedium(p.ctx, m, "top", RenameOptions{})
	wantErr(t, err, atoll.ErrExist)
	_, _, err = p.a.RenameMedium(p.ctx, m, m.Name, RenameOptions{})
	wantErr(t, err, atoll.ErrExist)
	_, _, err = p.a.RenameMedium(p.ctx, m, "d", RenameOptions{Replace: &Trash{}})
	wantErr(t, err, atoll.ErrExist)
	moved, old, err := p.a.RenameMedium(p.ctx, m, "x/q/v", RenameOptions{})
	if err != nil || old != nil || moved.Name != "x/q/v" {
		t.Fatalf("moved %+v %+v %v", moved, old, err)
	}
	_, _, err = p.b.RenameMedium(p.ctx, m, "other", RenameOptions{})
	wantErr(t, err, atoll.ErrConflict)
	_, err = p.b.MediumByName(p.ctx, "x/y/v")
	wantErr(t, err, atoll.ErrNotExist)
	moved, old, err = p.a.RenameMedium(p.ctx, moved, "top", RenameOptions{Replace: &Trash{Source: "test"}})
	if err != nil || old == nil || old.Name != "top" || old.State != MediumTrashed {
		t.Fatalf("replaced %+v %+v %v", moved, old, err)
	}
	if got := must(p.b.MediumByName(p.ctx, "top"))(t); got.ID != m.ID {
		t.Errorf("top is %+v", got)
	}
	if got := must(p.b.Trashed(p.ctx, 0, 0))(t); len(got) != 1 || got[0].ID != old.ID || got[0].Trash.Source != "test" {
		t.Errorf("trash: %+v", got)
	}
}

// catTreeRaces has two processes make, fill, rename and remove the same few
// directories. Afterwards everything lies in a directory that is there.
func catTreeRaces(t *testing.T, p pair) {
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			c := []*Catalog{p.a, p.b}[i%2]
			rng := rand.New(rand.NewPCG(7, uint64(i)))
			for range 12 {
				dir := []string{"a", "a/b", "c"}[rng.IntN(3)]
				name := fmt.Sprintf("%s/%d", dir, rng.IntN(3))
				var err error
				switch rng.IntN(5) {
				case 0:
					_, err = c.MakeDirectory(p.ctx, name, "x", rng.IntN(2) == 0)
				case 1:
					_, err = c.CreateMedium(p.ctx, volume(name))
				case 2:
					err = c.RemoveDirectory(p.ctx, []string{dir, name}[rng.IntN(2)])
				default:
					var m Medium
					if m, err = c.MediumByName(p.ctx, name); err != nil {
						break
					}
					if rng.IntN(2) == 0 {
						_, err = c.TrashMedium(p.ctx, m, Trash{})
					} else {
						_, _, err = c.RenameMedium(p.ctx, m, dir+"/new", RenameOptions{NoParents: true, Replace: &Trash{}})
					}
				}
				for _, kind := range []error{nil, atoll.ErrExist, atoll.ErrNotExist, atoll.ErrInvalid, atoll.ErrBusy, atoll.ErrConflict} {
					if errors.Is(err, kind) {
						err = nil
					}
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	names, _, err := p.a.scan(p.ctx, namePrefix, "", 0)
	dirs, _, err2 := p.a.scan(p.ctx, dirPrefix, "", 0)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{"": true}
	numbers := map[uint64]string{}
	once := func(n uint64, path string) {
		if other := numbers[n]; n == 0 || other != "" {
			t.Errorf("%q and %q have number %d", path, other, n)
		}
		numbers[n] = path
	}
	for _, kv := range dirs {
		d := must(decodeDir(kv))(t)
		all[d.Path] = true
		once(d.Number, d.Path)
	}
	for _, kv := range dirs {
		if d := must(decodeDir(kv))(t); !all[ParentPath(d.Path)] {
			t.Errorf("directory %q lies nowhere", d.Path)
		}
	}
	for _, kv := range names {
		name := strings.TrimPrefix(kv.Key, namePrefix)
		m := must(p.a.MediumByName(p.ctx, name))(t)
		once(m.Number, name)
		if all[name] || !all[ParentPath(name)] {
			t.Errorf("volume %q lies nowhere, or is a directory too", name)
		}
	}
}

// catImplied has media from before there were directories.
func catImplied(t *testing.T, p pair) {
	var ids []atoll.MediumID
	for i, name := range []string{"old/deep/v", "old/w", "both", "both/in"} {
		m := volume(name)
		m.ID, m.State, m.Owner, m.Policy.Replicas = atoll.MediumID(i+1), MediumLive, "root", 3
		ids = append(ids, m.ID)
		mustTxn(t, p.a.kv, Txn{Then: []Op{
			{Key: recordKey(m.ID), Value: encode("w", m)}, {Key: nameKey(name), Value: encode("w", m.ID)},
			{Key: headKey(m.ID), Value: encode("w", Head{Medium: m.ID, Next: 1})},
		}})
	}
	if got := shown(t, p, "", 1); got != "both both/ old/" {
		t.Errorf("root: %s", got)
	}
	if got := shown(t, p, "old", 1); got != "deep/ w" {
		t.Errorf("old: %s", got)
	}
	e := must(p.a.Entry(p.ctx, "old/deep"))(t)
	if e.Dir == nil || e.Dir.Rev != 0 || e.Dir.Owner != "root" || e.Dir.Number < impliedBit {
		t.Errorf("old/deep is %+v", e.Dir)
	}
	_, err := p.a.CreateMedium(p.ctx, volume("old"))
	wantErr(t, err, atoll.ErrExist)
	_, err = p.a.MakeDirectory(p.ctx, "old/deep", "eve", false)
	wantErr(t, err, atoll.ErrExist)
	wantErr(t, p.a.RemoveDirectory(p.ctx, "old/deep"), atoll.ErrBusy)
	m := volume("old/deep/new")
	m.Owner = "eve"
	must(p.a.CreateMedium(p.ctx, m))(t)
	if d := must(p.b.Entry(p.ctx, "old/deep"))(t).Dir; d.Rev == 0 || d.Owner != "root" || d.Number != e.Dir.Number {
		t.Errorf("old/deep became %+v", d)
	}
	if d := must(p.a.SetDirectoryOwner(p.ctx, "old", "bob"))(t); d.Owner != "bob" {
		t.Errorf("old became %+v", d)
	}
	if got := shown(t, p, "old", 1); got != "deep/ w" {
		t.Errorf("old: %s", got)
	}
	for _, id := range ids[:1] {
		must(p.a.TrashMedium(p.ctx, must(p.a.Medium(p.ctx, id))(t), Trash{}))(t)
	}
	if got := shown(t, p, "old/deep", 1); got != "new" {
		t.Errorf("old/deep: %s", got)
	}
}

func catTrash(t *testing.T, p pair) {
	s := openSession(t, p.a, "alpha")
	defer s.Close(p.ctx)
	m := must(p.a.CreateMedium(p.ctx, volume("d/v")))(t)
	h := must(p.a.Acquire(p.ctx, m.ID, s))(t)
	_, err := p.b.TrashMedium(p.ctx, m, Trash{})
	wantErr(t, err, atoll.ErrBusy)
	h.Process = atoll.UUID{}
	must(p.a.SwapHead(p.ctx, h))(t)
	note := Trash{Expires: now(), Source: "test"}
	gone := must(p.b.TrashMedium(p.ctx, m, note))(t)
	if gone.State != MediumTrashed || gone.Trash.Source != "test" || gone.Trash.Removed.IsZero() || gone.Name != "d/v" {
		t.Errorf("trashed %+v", gone)
	}
	_, err = p.b.TrashMedium(p.ctx, gone, note)
	wantErr(t, err, atoll.ErrConflict)
	_, err = p.a.Acquire(p.ctx, m.ID, s)
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.a.MediumByName(p.ctx, "d/v")
	wantErr(t, err, atoll.ErrNotExist)
	live := gone
	live.State = MediumLive
	_, err = p.a.UpdateMedium(p.ctx, live)
	wantErr(t, err, atoll.ErrInvalid)
	other := must(p.a.CreateMedium(p.ctx, volume("d/v")))(t) // the name is free
	_, err = p.b.RestoreMedium(p.ctx, m.ID, "d/v", true)
	wantErr(t, err, atoll.ErrExist)
	_, err = p.b.RestoreMedium(p.ctx, m.ID, "e/v", false)
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.b.RestoreMedium(p.ctx, other.ID, "e/v", true)
	wantErr(t, err, atoll.ErrNotExist)
	_, err = p.b.PurgeMedium(p.ctx, other.ID)
	wantErr(t, err, atoll.ErrNotExist)
	back := must(p.b.RestoreMedium(p.ctx, m.ID, "e/v", true))(t)
	if back.State != MediumLive || back.Trash != nil || must(p.a.MediumByName(p.ctx, "e/v"))(t).ID != m.ID {
		t.Errorf("restored %+v", back)
	}
	must(p.a.Acquire(p.ctx, m.ID, s))(t)
	if got := must(p.a.Trashed(p.ctx, 0, 0))(t); len(got) != 0 {
		t.Errorf("trash: %+v", got)
	}
	gone = must(p.a.TrashMedium(p.ctx, other, note))(t)
	if got := must(p.a.Trashed(p.ctx, 0, 10))(t); len(got) != 1 || got[0].ID != other.ID {
		t.Errorf("trash: %+v", got)
	}
	if got := must(p.b.TrashNotes(p.ctx))(t); len(got) != 1 || got[other.ID] != *gone.Trash {
		t.Errorf("notes: %+v, want %+v", got, *gone.Trash)
	}
	if m := must(p.b.PurgeMedium(p.ctx, gone.ID))(t); m.State != MediumDetached {
		t.Errorf("purged %+v", m)
	}
	if got := must(p.a.Deleting(p.ctx, 0, 0))(t); len(got) != 1 || got[0].ID != other.ID {
		t.Errorf("deleting: %+v", got)
	}
	if got := must(p.a.Trashed(p.ctx, 0, 0))(t); len(got) != 0 {
		t.Errorf("trash: %+v", got)
	}
}
