package catalog

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

// Head returns a medium's head; ErrNotExist.
func (c *Catalog) Head(ctx context.Context, id atoll.MediumID) (Head, error) {
	ctx, done := bound(ctx)
	defer done()
	got, err := c.read(ctx, headKey(id))
	if err != nil {
		return Head{}, fmt.Errorf("read head of medium %v: %w", id, err)
	}
	h, err := decodeHead(got[0])
	if err != nil {
		return Head{}, fmt.Errorf("read head of medium %v: %w", id, err)
	}
	return h, nil
}

func decodeHead(kv KeyValue) (Head, error) {
	var h Head
	if kv.Mod == 0 {
		return h, atoll.ErrNotExist
	}
	err := decode(kv, &h)
	h.Rev = kv.Mod
	return h, err
}

// Acquire makes the session's process the owner of a live or detached medium
// under the next epoch. ErrBusy, naming the owner, while another process with a live lease owns
// it; ErrFenced if the session has ended; ErrNotExist also for a medium that is
// being deleted. One may acquire what one owns: the epoch rises all the same.
//
// The caller then fences the unsealed segments before it trusts their length.
func (c *Catalog) Acquire(ctx context.Context, id atoll.MediumID, s *Session) (Head, error) {
	return c.acquire(ctx, id, s, false, MediumLive, MediumDetached)
}

// AcquireIdle is Acquire for whoever settles what a dead owner left: also of a
// medium in the trash, and ErrBusy too while the session's own process owns it.
func (c *Catalog) AcquireIdle(ctx context.Context, id atoll.MediumID, s *Session) (Head, error) {
	return c.acquire(ctx, id, s, true, MediumLive, MediumTrashed, MediumDetached)
}

// AcquireTrashed is Acquire for a medium in the trash, for whoever checks it.
func (c *Catalog) AcquireTrashed(ctx context.Context, id atoll.MediumID, s *Session) (Head, error) {
	return c.acquire(ctx, id, s, false, MediumTrashed)
}

// AcquireDeleting is Acquire for a medium in state MediumDeleting, for whoever
// finishes its deletion.
func (c *Catalog) AcquireDeleting(ctx context.Context, id atoll.MediumID, s *Session) (Head, error) {
	return c.acquire(ctx, id, s, false, MediumDeleting)
}

func (c *Catalog) acquire(ctx context.Context, id atoll.MediumID, s *Session, idle bool, states ...MediumState) (Head, error) {
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		h, ok, err := c.tryAcquire(ctx, id, s, idle, states)
		if err != nil {
			return Head{}, fmt.Errorf("acquire medium %v: %w", id, err)
		}
		if ok {
			return h, nil
		}
	}
	return Head{}, fmt.Errorf("acquire medium %v: %w", id, atoll.ErrConflict)
}

// tryAcquire takes ownership if nothing changes between looking and taking;
// false if something did.
func (c *Catalog) tryAcquire(ctx context.Context, id atoll.MediumID, s *Session, idle bool, states []MediumState) (Head, bool, error) {
	got, err := c.read(ctx, headKey(id), recordKey(id))
	if err != nil {
		return Head{}, false, err
	}
	h, err := decodeHead(got[0])
	if err != nil {
		return Head{}, false, err
	}
	m, err := decodeMedium(got[1])
	if err != nil {
		return Head{}, false, err
	}
	if !slices.Contains(states, m.State) {
		return Head{}, false, fmt.Errorf("medium %q is in state %q: %w", m.Name, m.State, atoll.ErrNotExist)
	}
	if !s.Valid() {
		return Head{}, false, s.gone()
	}
	owner := h.Process
	if idle && owner == s.ID() {
		return Head{}, false, fmt.Errorf("owned by this process: %w", atoll.ErrBusy)
	}
	h.Epoch++
	h.Process = s.ID()
	w := c.mark()
	t := Txn{
		If:   []Cmp{{Key: headKey(id), Rev: got[0].Mod}, {Key: recordKey(id), Rev: got[1].Mod}, s.alive()},
		Then: []Op{{Key: headKey(id), Value: encode(w, h)}},
		Read: []string{headKey(id), processKey(s.ID())},
	}
	if !owner.IsZero() && owner != s.ID() {
		t.If = append(t.If, Cmp{Key: processKey(owner)}) // its lease has ended
		t.Read = append(t.Read, processKey(owner))
	}
	res, ok, err := c.commit(ctx, w, t)
	switch {
	case err != nil:
		return Head{}, false, err
	case ok:
		h.Rev = res.Rev
		return h, true, nil
	case res.Got[1].Mod == 0:
		return Head{}, false, s.gone()
	case res.Got[0].Mod == got[0].Mod && len(res.Got) > 2 && res.Got[2].Mod != 0:
		return Head{}, false, busy(owner, res.Got[2])
	}
	return Head{}, false, nil
}

// busy names the process that owns a medium.
func busy(owner atoll.UUID, kv KeyValue) error {
	var p Process
	if err := decode(kv, &p); err != nil {
		return err
	}
	return fmt.Errorf("owned by process %v (pid %d on %s): %w", owner, p.PID, p.Host, atoll.ErrBusy)
}

// SwapHead replaces a head that was read, or acquired, at h.Rev, and returns it
// with its new Rev. It is done only while the owner's lease lives; a zero Process
// gives the medium up. into names the copysets of segments that h registers: it
// is done only while no member of these is being replaced, else ErrBusy.
// ErrFenced if another epoch stands or the lease has ended, ErrConflict if the
// head was changed under the same epoch.
func (c *Catalog) SwapHead(ctx context.Context, h Head, into ...atoll.CopysetID) (Head, error) {
	ctx, done := bound(ctx)
	defer done()
	w := c.mark()
	t := Txn{
		If:   []Cmp{{Key: headKey(h.Medium), Rev: h.Rev}},
		Then: []Op{{Key: headKey(h.Medium), Value: encode(w, h)}},
		Read: []string{headKey(h.Medium)},
	}
	if h.Rev == 0 {
		return Head{}, fmt.Errorf("change head of medium %v that was never read: %w", h.Medium, atoll.ErrInvalid)
	}
	if !h.Process.IsZero() {
		t.If = append(t.If, Cmp{Key: processKey(h.Process), Kind: IfExists})
	}
	if err := c.unmoved(&t, into); err != nil {
		return Head{}, fmt.Errorf("change head of medium %v: %w", h.Medium, err)
	}
	res, ok, err := c.commit(ctx, w, t)
	if err == nil && ok {
		h.Rev = res.Rev
		return h, nil
	}
	if err == nil {
		if err = refused(h, res.Got[0]); res.Got[0].Mod == h.Rev && t.closed(&res) {
			err = fmt.Errorf("the copyset has changed: %w", atoll.ErrBusy)
		}
	}
	return Head{}, fmt.Errorf("change head of medium %v under epoch %v: %w", h.Medium, h.Epoch, err)
}

// refused tells why a head was not replaced.
func refused(h Head, kv KeyValue) error {
	have, err := decodeHead(kv)
	switch {
	case err != nil:
		return err
	case have.Epoch != h.Epoch:
		return fmt.Errorf("epoch %v stands: %w", have.Epoch, atoll.ErrFenced)
	case have.Rev != h.Rev:
		return atoll.ErrConflict
	}
	return fmt.Errorf("the lease of process %v has ended: %w", h.Process, atoll.ErrFenced)
}

// unmoved makes a transaction depend on that the copysets are as they are known
// here, with no member being replaced (K1).
func (c *Catalog) unmoved(t *Txn, into []atoll.CopysetID) error {
	sets := c.State().Copysets
	for _, id := range into {
		set, is := sets[id]
		if !is || len(set.Moves) > 0 {
			return fmt.Errorf("a member of copyset %v is being replaced: %w", id, atoll.ErrBusy)
		}
		t.If = append(t.If, Cmp{Key: copysetKey(id), Rev: set.Rev})
		t.Read = append(t.Read, copysetKey(id))
	}
	return nil
}

// closed reports whether the condition of unmoved was what failed.
func (t *Txn) closed(res *TxnResult) bool {
	for i, key := range t.Read {
		for _, c := range t.If {
			if c.Key == key && c.Kind == IfRev && strings.HasPrefix(key, copysetPrefix) && res.Got[i].Mod != c.Rev {
				return true
			}
		}
	}
	return false
}

// Heads returns up to limit heads after the given medium, in order of the media.
func (c *Catalog) Heads(ctx context.Context, after atoll.MediumID, limit int) ([]Head, error) {
	ctx, done := bound(ctx)
	defer done()
	from := ""
	if after != 0 {
		from = headKey(after)
	}
	kvs, _, err := c.scan(ctx, headPrefix, from, limit)
	if err != nil {
		return nil, fmt.Errorf("list heads: %w", err)
	}
	out := make([]Head, len(kvs))
	for i, kv := range kvs {
		if out[i], err = decodeHead(kv); err != nil {
			return nil, fmt.Errorf("list heads: %w", err)
		}
	}
	return out, nil
}
