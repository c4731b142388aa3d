package catalog

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Trash says that a medium was removed, by whom or what, and how long it can be
// brought back. Its record keeps the name that it had.
type Trash struct {
	Removed time.Time `json:"removed"`
	Expires time.Time `json:"expires"`
	Source  string    `json:"source,omitempty"`
	Bytes   int64     `json:"bytes,omitempty"` // in its segments, one copy; 0: not known
}

// TrashMedium takes a live medium, as it was read at m.Rev, out of the tree: its
// name is free, nobody can acquire it, and it can be restored until it is purged.
// ErrBusy while a live process owns it, ErrConflict when it was changed since.
func (c *Catalog) TrashMedium(ctx context.Context, m Medium, note Trash) (Medium, error) {
	ctx, done := bound(ctx)
	defer done()
	w := c.mark()
	name := nameKey(m.Name)
	cmps, ops, out, err := c.discard(ctx, w, m, note)
	if err == nil {
		var res TxnResult
		var ok bool
		res, ok, err = c.commit(ctx, w, Txn{If: cmps, Then: append(ops, Op{Key: name, Delete: true}), Read: []string{recordKey(m.ID)}})
		if err == nil && !ok {
			err = atoll.ErrConflict
		}
		out.Rev = res.Rev
	}
	if err != nil {
		return Medium{}, fmt.Errorf("move %q to the trash: %w", m.Name, err)
	}
	return out, nil
}

// discard returns what puts a medium into the trash, but for its name: conditions,
// writes, and the record. Nobody may own it at that moment.
func (c *Catalog) discard(ctx context.Context, w string, m Medium, note Trash) ([]Cmp, []Op, Medium, error) {
	if note.Removed.IsZero() {
		note.Removed = now()
	}
	got, err := c.read(ctx, headKey(m.ID))
	if err != nil {
		return nil, nil, m, err
	}
	h, err := decodeHead(got[0])
	if err == nil && m.State != MediumLive {
		err = fmt.Errorf("its state is %q: %w", m.State, atoll.ErrConflict)
	}
	if err != nil {
		return nil, nil, m, err
	}
	cmps := []Cmp{{Key: recordKey(m.ID), Rev: m.Rev}, {Key: headKey(m.ID), Rev: h.Rev}}
	if !h.Process.IsZero() {
		owner, err := c.read(ctx, processKey(h.Process))
		if err == nil && owner[0].Mod != 0 {
			err = busy(h.Process, owner[0])
		}
		if err != nil {
			return nil, nil, m, err
		}
		cmps = append(cmps, Cmp{Key: processKey(h.Process)})
	}
	m.State, m.Trash = MediumTrashed, &note
	return cmps, []Op{{Key: recordKey(m.ID), Value: encode(w, m)}, {Key: trashKey(m.ID), Value: encode(w, note)}}, m, nil
}

// Trashed returns up to limit (0: all) media in the trash, in the order of their
// ids after the given one.
func (c *Catalog) Trashed(ctx context.Context, after atoll.MediumID, limit int) ([]Medium, error) {
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, trashPrefix, trashKey(after), limit)
	if err != nil {
		return nil, fmt.Errorf("list the trash: %w", err)
	}
	var out []Medium
	for part := range slices.Chunk(kvs, maxTxnOps) {
		keys := make([]string, len(part))
		for i, kv := range part {
			keys[i] = recordPrefix + kv.Key[len(trashPrefix):]
		}
		got, err := c.read(ctx, keys...)
		if err != nil {
			return nil, fmt.Errorf("list the trash: %w", err)
		}
		for _, kv := range got {
			m, err := decodeMedium(kv)
			if err != nil && kv.Mod != 0 {
				return nil, fmt.Errorf("list the trash: %w", err)
			}
			if err == nil && m.State == MediumTrashed && m.Trash != nil { // not restored or purged meanwhile
				out = append(out, m)
			}
		}
	}
	return out, nil
}

// TrashNotes returns the notes on all media in the trash, in one request.
func (c *Catalog) TrashNotes(ctx context.Context) (map[atoll.MediumID]Trash, error) {
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, trashPrefix, "", 0)
	if err != nil {
		return nil, fmt.Errorf("look into the trash: %w", err)
	}
	out := make(map[atoll.MediumID]Trash, len(kvs))
	for _, kv := range kvs {
		id, err := atoll.ParseMediumID(kv.Key[len(trashPrefix):])
		if err != nil {
			return nil, fmt.Errorf("look into the trash: %w", err)
		}
		var t Trash
		if err := decode(kv, &t); err != nil {
			return nil, fmt.Errorf("look into the trash: %w", err)
		}
		out[id] = t
	}
	return out, nil
}

// RestoreMedium brings a medium in the trash back under a name. ErrNotExist when
// it is not there, or, without parents, when the name's directory is not;
// ErrExist when the name is taken.
func (c *Catalog) RestoreMedium(ctx context.Context, id atoll.MediumID, name string, parents bool) (Medium, error) {
	if err := ValidateName(name); err != nil {
		return Medium{}, err
	}
	return c.leaveTrash(ctx, id, "restore", func(m *Medium, w string, t *Txn) error {
		cmps, err := c.site(ctx, name, m.Owner, parents)
		m.State, m.Name, m.Trash = MediumLive, name, nil
		t.If = append(t.If, cmps...)
		t.Then = append(t.Then, Op{Key: nameKey(name), Value: encode(w, id)})
		return err
	})
}

// PurgeMedium has a medium in the trash deleted for good; the controller does
// the rest. ErrNotExist when it is not there.
func (c *Catalog) PurgeMedium(ctx context.Context, id atoll.MediumID) (Medium, error) {
	return c.leaveTrash(ctx, id, "purge", func(m *Medium, w string, t *Txn) error {
		m.State = MediumDetached
		t.Then = append(t.Then, Op{Key: deleteKey(id), Value: encode(w, nil)})
		return nil
	})
}

// leaveTrash changes the record of a medium in the trash and takes it out.
func (c *Catalog) leaveTrash(ctx context.Context, id atoll.MediumID, verb string, change func(*Medium, string, *Txn) error) (Medium, error) {
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		m, kv, err := c.medium(ctx, id)
		if err == nil && m.State != MediumTrashed {
			err = fmt.Errorf("it is not in the trash: %w", atoll.ErrNotExist)
		}
		w := c.mark()
		t := Txn{If: []Cmp{{Key: kv.Key, Rev: kv.Mod}}, Then: []Op{{Key: trashKey(id), Delete: true}}, Read: []string{recordKey(id)}}
		if err == nil {
			err = change(&m, w, &t)
		}
		if err != nil {
			return Medium{}, fmt.Errorf("%s medium %v: %w", verb, id, err)
		}
		t.Then = append(t.Then, Op{Key: kv.Key, Value: encode(w, m)})
		res, ok, err := c.commit(ctx, w, t)
		if err != nil {
			return Medium{}, fmt.Errorf("%s medium %v: %w", verb, id, err)
		}
		if ok {
			m.Rev = res.Rev
			return m, nil
		}
	}
	return Medium{}, fmt.Errorf("%s medium %v: %w", verb, id, atoll.ErrConflict)
}
