package catalog

import (
	"context"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
)

// CreateMedium records a new medium, its name and its first Head in one
// transaction. ID, State, Created, Replicas and Owner are filled in where they
// are empty. ErrExist if the name is taken; ErrInvalid for a bad name, kind,
// size or policy, and for a clone, which CreateClone makes.
func (c *Catalog) CreateMedium(ctx context.Context, m Medium) (Medium, error) {
	m = c.fresh(m)
	err := checkMedium(m)
	if err == nil && (m.Parent != nil || m.Ancestors != nil) {
		err = fmt.Errorf("medium %q has a parent: %w", m.Name, atoll.ErrInvalid)
	}
	if err != nil {
		return Medium{}, fmt.Errorf("create medium: %w", err)
	}
	ctx, done := bound(ctx)
	defer done()
	if m.Number, err = c.number(ctx); err != nil {
		return Medium{}, fmt.Errorf("create medium %q: %w", m.Name, err)
	}
	for range maxRaces {
		w := c.mark()
		t, err := c.create(ctx, w, m)
		if err != nil {
			return Medium{}, fmt.Errorf("create medium %q: %w", m.Name, err)
		}
		res, ok, err := c.commit(ctx, w, t)
		if err != nil {
			return Medium{}, fmt.Errorf("create medium %q: %w", m.Name, err)
		}
		if ok {
			m.Rev = res.Rev
			return m, nil
		}
	}
	return Medium{}, fmt.Errorf("create medium %q: %w", m.Name, atoll.ErrConflict)
}

// fresh fills in what a new medium's record lacks.
func (c *Catalog) fresh(m Medium) Medium {
	m.State, m.Rev = MediumLive, 0
	if m.ID == 0 {
		m.ID = c.NextMediumID()
	}
	if m.Created.IsZero() {
		m.Created = now()
	}
	if m.Policy.Replicas == 0 {
		m.Policy.Replicas = 3
	}
	return m
}

// create is the transaction that makes a medium. Directories that are missing
// above it are made before. When the transaction is not done, the medium's id was
// taken, or something changed that its name needs.
func (c *Catalog) create(ctx context.Context, w string, m Medium) (Txn, error) {
	cmps, err := c.site(ctx, m.Name, m.Owner, true)
	return Txn{
		If: append(cmps, Cmp{Key: recordKey(m.ID)}, Cmp{Key: headKey(m.ID)}),
		Then: append(c.wantCopies(w, m),
			Op{Key: recordKey(m.ID), Value: encode(w, m)},
			Op{Key: nameKey(m.Name), Value: encode(w, m.ID)},
			Op{Key: headKey(m.ID), Value: encode(w, Head{Medium: m.ID, Next: m.Base()})}),
		Read: []string{recordKey(m.ID), nameKey(m.Name)},
	}, err
}

// wantCopies lists the writes that tell the controller of a number of copies, or
// a code, that no medium wanted so far.
func (c *Catalog) wantCopies(w string, m Medium) []Op {
	var ops []Op
	if !c.State().Copies[m.Policy.Replicas] {
		ops = append(ops, Op{Key: copiesKey(m.Policy.Replicas), Value: encode(w, nil)})
	}
	if code := m.Policy.Code(); m.Policy.IsCoded() && !c.State().Codes[code] {
		ops = append(ops, Op{Key: codeKey(code), Value: encode(w, nil)})
	}
	return ops
}

func checkMedium(m Medium) error {
	if err := ValidateName(m.Name); err != nil {
		return err
	}
	if !slices.Contains([]MediumKind{KindVolume, KindFS, KindDB}, m.Kind) {
		return fmt.Errorf("medium %q of kind %q: %w", m.Name, m.Kind, atoll.ErrInvalid)
	}
	if m.Kind == KindVolume && (m.Size < atoll.MinVolumeSize || m.Size > atoll.MaxVolumeSize || m.Size%atoll.BlockSize != 0) {
		return fmt.Errorf("volume %q of %d bytes: want a multiple of %d from %d to %d: %w", m.Name, m.Size,
			atoll.BlockSize, int64(atoll.MinVolumeSize), int64(atoll.MaxVolumeSize), atoll.ErrInvalid)
	}
	p := m.Policy
	if p.Replicas < 1 || p.Replicas > atoll.MaxCopies || p.MinReplicas < 0 || p.MinReplicas > p.Replicas {
		return fmt.Errorf("medium %q with %d copies (at least %d): want 1 to %d: %w",
			m.Name, p.Replicas, p.MinReplicas, atoll.MaxCopies, atoll.ErrInvalid)
	}
	if p.Data != 0 || p.Parity != 0 {
		if err := p.Code().check(); err != nil {
			return fmt.Errorf("medium %q: %w", m.Name, err)
		}
	}
	if p.Segment < 0 || p.Segment > atoll.MaxSegmentBlocks {
		return fmt.Errorf("medium %q with segments of %d blocks: want at most %d: %w",
			m.Name, p.Segment, atoll.MaxSegmentBlocks, atoll.ErrInvalid)
	}
	return nil
}

// Medium returns a medium's record; ErrNotExist.
func (c *Catalog) Medium(ctx context.Context, id atoll.MediumID) (Medium, error) {
	ctx, done := bound(ctx)
	defer done()
	m, _, err := c.medium(ctx, id)
	if err != nil {
		return Medium{}, fmt.Errorf("read medium %v: %w", id, err)
	}
	return m, nil
}

func (c *Catalog) medium(ctx context.Context, id atoll.MediumID) (Medium, KeyValue, error) {
	got, err := c.read(ctx, recordKey(id))
	if err != nil {
		return Medium{}, KeyValue{}, err
	}
	m, err := decodeMedium(got[0])
	return m, got[0], err
}

func decodeMedium(kv KeyValue) (Medium, error) {
	var m Medium
	if kv.Mod == 0 {
		return m, atoll.ErrNotExist
	}
	err := decode(kv, &m)
	m.Rev = kv.Mod
	return m, err
}

// MediumByName returns the record of the medium of this name; ErrNotExist.
func (c *Catalog) MediumByName(ctx context.Context, name string) (Medium, error) {
	if err := ValidateName(name); err != nil {
		return Medium{}, err
	}
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		got, err := c.read(ctx, nameKey(name))
		if err != nil {
			return Medium{}, fmt.Errorf("find medium %q: %w", name, err)
		}
		if got[0].Mod == 0 {
			return Medium{}, fmt.Errorf("find medium %q: %w", name, atoll.ErrNotExist)
		}
		var id atoll.MediumID
		if err := decode(got[0], &id); err != nil {
			return Medium{}, fmt.Errorf("find medium %q: %w", name, err)
		}
		if got, err = c.read(ctx, recordKey(id)); err != nil {
			return Medium{}, fmt.Errorf("find medium %q: %w", name, err)
		}
		// Renamed or removed between the two reads: look again.
		if m, err := decodeMedium(got[0]); got[0].Mod != 0 && (err != nil || m.Name == name) {
			return m, err
		}
	}
	return Medium{}, fmt.Errorf("find medium %q: %w", name, atoll.ErrConflict)
}

const maxPage = 1000 // media of one call of Media

// Media returns up to limit media with names after the given one, in the order
// of names. Fewer than limit (0 or beyond 1000: 1000) means there are no more.
func (c *Catalog) Media(ctx context.Context, after string, limit int) ([]Medium, error) {
	if limit <= 0 || limit > maxPage {
		limit = maxPage
	}
	ctx, done := bound(ctx)
	defer done()
	var out []Medium
	for len(out) < limit {
		want := limit - len(out)
		kvs, _, err := c.scan(ctx, namePrefix, nameKey(after), want)
		if err != nil {
			return nil, fmt.Errorf("list media after %q: %w", after, err)
		}
		found, err := c.records(ctx, kvs)
		if err != nil {
			return nil, fmt.Errorf("list media after %q: %w", after, err)
		}
		out = append(out, found...)
		if len(kvs) < want { // those renamed or removed meanwhile are missing
			break
		}
		after = kvs[len(kvs)-1].Key[len(namePrefix):]
	}
	return out, nil
}

// records reads the media that some name keys point at, without those that have
// another name by now.
func (c *Catalog) records(ctx context.Context, names []KeyValue) ([]Medium, error) {
	var out []Medium
	for part := range slices.Chunk(names, maxTxnOps) {
		keys := make([]string, len(part))
		for i, kv := range part {
			var id atoll.MediumID
			if err := decode(kv, &id); err != nil {
				return nil, err
			}
			keys[i] = recordKey(id)
		}
		got, err := c.read(ctx, keys...)
		if err != nil {
			return nil, err
		}
		for i, kv := range got {
			if kv.Mod == 0 {
				continue
			}
			m, err := decodeMedium(kv)
			if err != nil {
				return nil, err
			}
			if nameKey(m.Name) == part[i].Key {
				out = append(out, m)
			}
		}
	}
	return out, nil
}

// Deleting returns up to limit media in state MediumDetached or MediumDeleting,
// in the order of their ids after the given one.
func (c *Catalog) Deleting(ctx context.Context, after atoll.MediumID, limit int) ([]Medium, error) {
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, deletePrefix, deleteKey(after), limit)
	if err != nil {
		return nil, fmt.Errorf("list media to delete: %w", err)
	}
	var out []Medium
	for _, kv := range kvs {
		id, err := atoll.ParseMediumID(kv.Key[len(deletePrefix):])
		if err != nil {
			return nil, fmt.Errorf("list media to delete: %w", err)
		}
		got, err := c.read(ctx, recordKey(id))
		if err != nil {
			return nil, fmt.Errorf("list media to delete: %w", err)
		}
		if got[0].Mod == 0 {
			continue // removed meanwhile
		}
		m, err := decodeMedium(got[0])
		if err != nil {
			return nil, fmt.Errorf("list media to delete: %w", err)
		}
		if m.State != MediumLive {
			out = append(out, m)
		}
	}
	return out, nil
}

// UpdateMedium replaces a record that was read at m.Rev and returns it with its
// new Rev. A changed Name moves the name. A medium may go from live to detached,
// which frees its name, and from there to deleting, when nothing pins it any
// more; never back. A clone may lose its parent and ancestors, when it needs
// nothing of them, which removes its pin. ErrConflict if the record was changed
// since, ErrExist if the new name is taken, ErrBusy while a medium that is to be
// deleted is pinned, ErrInvalid for a changed kind or a bad value.
func (c *Catalog) UpdateMedium(ctx context.Context, m Medium) (Medium, error) {
	if err := checkMedium(m); err != nil {
		return Medium{}, fmt.Errorf("update medium: %w", err)
	}
	ctx, done := bound(ctx)
	defer done()
	old, kv, err := c.medium(ctx, m.ID)
	if err == nil && old.Rev != m.Rev {
		err = atoll.ErrConflict
	}
	if err == nil {
		err = checkChange(old, m)
	}
	if err == nil && m.State == MediumDeleting && old.State == MediumDetached {
		err = c.unpinned(ctx, m.ID)
	}
	if err != nil {
		return Medium{}, fmt.Errorf("update medium %q: %w", m.Name, err)
	}
	w := c.mark()
	t := Txn{
		If:   []Cmp{{Key: kv.Key, Rev: kv.Mod}},
		Then: append(c.wantCopies(w, m), Op{Key: kv.Key, Value: encode(w, m)}),
		Read: []string{kv.Key},
	}
	if old.Parent != nil && m.Parent == nil {
		t.Then = append(t.Then, Op{Key: clonePinKey(*old.Parent, m.ID), Delete: true})
	}
	switch {
	case m.State == MediumDetached && old.State == MediumLive:
		t.Then = append(t.Then, Op{Key: nameKey(old.Name), Delete: true}, Op{Key: deleteKey(m.ID), Value: encode(w, nil)})
	case m.Name != old.Name:
		cmps, err := c.site(ctx, m.Name, m.Owner, true)
		if err != nil {
			return Medium{}, fmt.Errorf("rename medium %q to %q: %w", old.Name, m.Name, err)
		}
		t.If = append(t.If, cmps...)
		t.Then = append(t.Then, Op{Key: nameKey(m.Name), Value: encode(w, m.ID)}, Op{Key: nameKey(old.Name), Delete: true})
	}
	res, ok, err := c.commit(ctx, w, t)
	switch {
	case err != nil:
		return Medium{}, fmt.Errorf("update medium %q: %w", m.Name, err)
	case !ok && res.Got[0].Mod == kv.Mod:
		return Medium{}, fmt.Errorf("rename medium %q to %q: %w", old.Name, m.Name, atoll.ErrExist)
	case !ok:
		return Medium{}, fmt.Errorf("update medium %q: %w", m.Name, atoll.ErrConflict)
	}
	m.Rev = res.Rev
	return m, nil
}

func checkChange(old, m Medium) error {
	if m.Kind != old.Kind {
		return fmt.Errorf("kind %q cannot become %q: %w", old.Kind, m.Kind, atoll.ErrInvalid)
	}
	if (m.State == MediumTrashed) != (old.State == MediumTrashed) {
		return fmt.Errorf("state %q cannot become %q like that: %w", old.State, m.State, atoll.ErrInvalid)
	}
	order := []MediumState{MediumLive, MediumDetached, MediumDeleting}
	from, to := slices.Index(order, old.State), slices.Index(order, m.State)
	if to < from || to > from+1 {
		return fmt.Errorf("state %q cannot become %q: %w", old.State, m.State, atoll.ErrInvalid)
	}
	if m.State != MediumLive && m.Name != old.Name {
		return fmt.Errorf("a medium that is deleted cannot be renamed: %w", atoll.ErrInvalid)
	}
	same := (m.Parent == nil) == (old.Parent == nil) && slices.Equal(m.Ancestors, old.Ancestors) &&
		(m.Parent == nil || *m.Parent == *old.Parent)
	if !same && (m.Parent != nil || len(m.Ancestors) > 0) {
		return fmt.Errorf("a medium cannot change its parent: %w", atoll.ErrInvalid)
	}
	return nil
}

// RemoveMedium is the last step of a deletion: it removes record and head, and
// a clone's pin of its parent.
// Its segments are gone from every node by then. One that is not there is no
// error; ErrInvalid unless the medium is in state MediumDeleting.
func (c *Catalog) RemoveMedium(ctx context.Context, id atoll.MediumID) error {
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		got, err := c.read(ctx, recordKey(id))
		if err != nil {
			return fmt.Errorf("remove medium %v: %w", id, err)
		}
		if got[0].Mod == 0 {
			return nil
		}
		m, err := decodeMedium(got[0])
		if err == nil && m.State != MediumDeleting {
			err = fmt.Errorf("its state is %q: %w", m.State, atoll.ErrInvalid)
		}
		if err != nil {
			return fmt.Errorf("remove medium %v: %w", id, err)
		}
		t := Txn{
			If: []Cmp{{Key: recordKey(id), Rev: got[0].Mod}},
			Then: []Op{{Key: recordKey(id), Delete: true}, {Key: headKey(id), Delete: true},
				{Key: deleteKey(id), Delete: true}},
			Read: []string{recordKey(id)},
		}
		if m.Parent != nil {
			t.Then = append(t.Then, Op{Key: clonePinKey(*m.Parent, id), Delete: true})
		}
		_, ok, err := c.commit(ctx, "", t)
		if err != nil {
			return fmt.Errorf("remove medium %v: %w", id, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("remove medium %v: %w", id, atoll.ErrConflict)
}
