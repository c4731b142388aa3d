package catalog

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/atollstore/atoll/internal/atoll"
)

func pinsKey(id atoll.MediumID) string { return pinPrefix + id.String() + "/" }

func versionPinsKey(id atoll.MediumID, version uint64) string {
	return fmt.Sprintf("%s%016x/", pinsKey(id), version)
}

func clonePinKey(p Parent, clone atoll.MediumID) string {
	return versionPinsKey(p.Medium, p.Version) + "m" + clone.String()
}

// CreateClone records a clone of version of the medium parent: its record with
// parent and ancestors, its name, its first Head, whose ordinals go on where the
// parent's are now, and its pin of the version, all in one transaction. epoch is
// that under which the caller owns the parent: ErrFenced if another one stands.
// The caller knows that the version is there and sees to it that it stays until
// CreateClone returns. Else as CreateMedium.
func (c *Catalog) CreateClone(ctx context.Context, m Medium, parent atoll.MediumID, version uint64, epoch atoll.Epoch) (Medium, error) {
	m = c.fresh(m)
	m.Parent = &Parent{Medium: parent, Version: version}
	if err := checkMedium(m); err != nil {
		return Medium{}, fmt.Errorf("create clone: %w", err)
	}
	ctx, done := bound(ctx)
	defer done()
	var err error
	if m.Number, err = c.number(ctx); err != nil {
		return Medium{}, fmt.Errorf("create clone %q of medium %v: %w", m.Name, parent, err)
	}
	for range maxRaces {
		out, ok, err := c.tryClone(ctx, m, epoch)
		if err != nil {
			return Medium{}, fmt.Errorf("create clone %q of medium %v: %w", m.Name, parent, err)
		}
		if ok {
			return out, nil
		}
	}
	return Medium{}, fmt.Errorf("create clone %q of medium %v: %w", m.Name, parent, atoll.ErrConflict)
}

// tryClone makes the clone if nothing changes between looking and making; false
// if something did.
func (c *Catalog) tryClone(ctx context.Context, m Medium, epoch atoll.Epoch) (Medium, bool, error) {
	from := *m.Parent
	got, err := c.read(ctx, recordKey(from.Medium), headKey(from.Medium))
	if err != nil {
		return m, false, err
	}
	rec, err := decodeMedium(got[0])
	if err == nil && rec.State != MediumLive {
		err = fmt.Errorf("it is in state %q: %w", rec.State, atoll.ErrNotExist)
	}
	if err != nil {
		return m, false, err
	}
	head, err := decodeHead(got[1])
	if err == nil && head.Epoch != epoch {
		err = fmt.Errorf("epoch %v stands: %w", head.Epoch, atoll.ErrFenced)
	}
	if err == nil && rec.Kind != m.Kind {
		err = fmt.Errorf("a clone of a %s cannot be a %s: %w", rec.Kind, m.Kind, atoll.ErrInvalid)
	}
	if err != nil {
		return m, false, err
	}
	from.Base = head.Next
	m.Parent = &from
	m.Ancestors = append(slices.Clone(rec.Ancestors), Ancestor(from))
	w := c.mark()
	t, err := c.create(ctx, w, m)
	if err != nil {
		return m, false, err
	}
	t.If = append(t.If, Cmp{Key: recordKey(from.Medium), Rev: got[0].Mod}, Cmp{Key: headKey(from.Medium), Rev: got[1].Mod})
	t.Then = append(t.Then, Op{Key: clonePinKey(from, m.ID), Value: encode(w, nil)})
	res, ok, err := c.commit(ctx, w, t)
	switch {
	case err != nil:
		return m, false, err
	case ok:
		m.Rev = res.Rev
		return m, true, nil
	}
	return m, false, nil
}

// PinVersion keeps a version of a live medium, and the medium, from being
// removed for as long as the session lives, or until Unpin. ErrNotExist when the
// medium is not live. Whether the version is there is to be looked at after
// that, not before.
func (c *Catalog) PinVersion(ctx context.Context, s *Session, id atoll.MediumID, version uint64) (Pin, error) {
	ctx, done := bound(ctx)
	defer done()
	p := Pin{Medium: id, Version: version, Process: s.ID()}
	p.key = versionPinsKey(id, version) + "p" + s.ID().String() + "-" + c.mark()
	for range maxRaces {
		m, kv, err := c.medium(ctx, id)
		if err == nil && m.State != MediumLive {
			err = fmt.Errorf("it is in state %q: %w", m.State, atoll.ErrNotExist)
		}
		if err != nil {
			return Pin{}, fmt.Errorf("pin version %d of medium %v: %w", version, id, err)
		}
		w := c.mark()
		res, ok, err := c.commit(ctx, w, Txn{
			If:   []Cmp{{Key: kv.Key, Rev: kv.Mod}, s.alive()},
			Then: []Op{{Key: p.key, Value: encode(w, nil), Lease: s.lease}},
			Read: []string{p.key, processKey(s.ID())},
		})
		if definiteLease(err) || err == nil && !ok && res.Got[1].Mod == 0 {
			err = s.gone()
		}
		if err != nil {
			return Pin{}, fmt.Errorf("pin version %d of medium %v: %w", version, id, err)
		}
		if ok {
			return p, nil
		}
	}
	return Pin{}, fmt.Errorf("pin version %d of medium %v: %w", version, id, atoll.ErrConflict)
}

// definiteLease reports whether a put failed for want of its lease.
func definiteLease(err error) bool { return errors.Is(err, atoll.ErrNotExist) }

// Unpin removes what PinVersion made. One that has ended is no error.
func (c *Catalog) Unpin(ctx context.Context, p Pin) error {
	if p.key == "" {
		return fmt.Errorf("remove a pin of medium %v that PinVersion did not make: %w", p.Medium, atoll.ErrInvalid)
	}
	ctx, done := bound(ctx)
	defer done()
	_, _, err := c.commit(ctx, "", Txn{Then: []Op{{Key: p.key, Delete: true}}, Read: []string{p.key}})
	if err != nil {
		return fmt.Errorf("remove pin of version %d of medium %v: %w", p.Version, p.Medium, err)
	}
	return nil
}

// Pins returns who holds versions of a medium, in the order of versions.
func (c *Catalog) Pins(ctx context.Context, id atoll.MediumID) ([]Pin, error) {
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, pinsKey(id), "", 0)
	if err != nil {
		return nil, fmt.Errorf("list pins of medium %v: %w", id, err)
	}
	var pins []Pin
	for _, kv := range kvs {
		p, err := parsePin(kv.Key)
		if err != nil {
			return nil, fmt.Errorf("list pins of medium %v: %w", id, err)
		}
		pins = append(pins, p)
	}
	return pins, nil
}

// parsePin is the inverse of the keys above.
func parsePin(key string) (Pin, error) {
	bad := fmt.Errorf("parse key %q: %w", key, atoll.ErrCorrupt)
	part := strings.Split(strings.TrimPrefix(key, pinPrefix), "/")
	if len(part) != 3 || len(part[1]) != 16 || len(part[2]) < 2 {
		return Pin{}, bad
	}
	p := Pin{key: key}
	var err error
	if p.Medium, err = atoll.ParseMediumID(part[0]); err != nil {
		return Pin{}, bad
	}
	if p.Version, err = strconv.ParseUint(part[1], 16, 64); err != nil {
		return Pin{}, bad
	}
	switch holder := part[2][1:]; part[2][0] {
	case 'm':
		p.Clone, err = atoll.ParseMediumID(holder)
	case 'p':
		who, mark, _ := strings.Cut(holder, "-")
		if err = p.Process.UnmarshalText([]byte(who)); err == nil {
			_, err = hex.DecodeString(mark)
		}
	default:
		return Pin{}, bad
	}
	if err != nil {
		return Pin{}, bad
	}
	return p, nil
}

// unpinned is ErrBusy while something pins a medium. Since only live media get
// pins, one that is detached and has none never has one again.
func (c *Catalog) unpinned(ctx context.Context, id atoll.MediumID) error {
	kvs, _, err := c.scan(ctx, pinsKey(id), "", 1)
	if err == nil && len(kvs) > 0 {
		err = fmt.Errorf("it is pinned by %s: %w", kvs[0].Key[len(pinsKey(id)):], atoll.ErrBusy)
	}
	return err
}
