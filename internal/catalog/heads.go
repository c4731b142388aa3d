package catalog

import (
	"context"
	"fmt"
	"slices"

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
	return c.acquire(ctx, id, s, MediumLive, MediumDetached)
}

// AcquireTrashed is Acquire for a medium in the trash, for whoever checks it.
func (c *Catalog) AcquireTrashed(ctx context.Context, id atoll.MediumID, s *Session) (Head, error) {
	return c.acquire(ctx, id, s, MediumTrashed)
}

// AcquireDeleting is Acquire for a medium in state MediumDeleting, for whoever
// finishes its deletion.
func (c *Catalog) AcquireDeleting(ctx context.Context, id atoll.MediumID, s *Session) (Head, error) {
	return c.acquire(ctx, id, s, MediumDeleting)
}

func (c *Catalog) acquire(ctx context.Context, id atoll.MediumID, s *Session, states ...MediumState) (Head, error) {
	ctx, done := bound(ctx)
	defer done()
	for range maxRaces {
		h, ok, err := c.tryAcquire(ctx, id, s, states)
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
func (c *Catalog) tryAcquire(ctx context.Context, id atoll.MediumID, s *Session, states []MediumState) (Head, bool, error) {
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
// gives the medium up. ErrFenced if another epoch stands or the lease has ended,
// ErrConflict if the head was changed under the same epoch.
func (c *Catalog) SwapHead(ctx context.Context, h Head) (Head, error) {
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
	res, ok, err := c.commit(ctx, w, t)
	if err == nil && ok {
		h.Rev = res.Rev
		return h, nil
	}
	if err == nil {
		err = refused(h, res.Got[0])
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
