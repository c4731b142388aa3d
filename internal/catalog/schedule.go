package catalog

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Schedule says which versions of a medium are to be made by the clock. Its
// text means something to those who carry it out only.
type Schedule struct {
	Medium atoll.MediumID       `json:"medium"`
	Spec   string               `json:"spec"`
	Last   map[string]time.Time `json:"last,omitempty"` // when each rule was followed last
	// NotBefore is when it may be tried again.
	NotBefore time.Time `json:"notBefore,omitzero"`
	Rev       int64     `json:"-"`
}

// SetSchedule records the schedule of a medium, or removes it if spec is empty.
func (c *Catalog) SetSchedule(ctx context.Context, id atoll.MediumID, spec string) error {
	ctx, done := bound(ctx)
	defer done()
	key := scheduleKey(id)
	for range maxRaces {
		got, err := c.read(ctx, key)
		if err != nil {
			return fmt.Errorf("set schedule of medium %v: %w", id, err)
		}
		s := Schedule{Medium: id}
		if got[0].Mod != 0 {
			if err := decode(got[0], &s); err != nil {
				return fmt.Errorf("set schedule of medium %v: %w", id, err)
			}
		}
		s.Spec, s.NotBefore = spec, time.Time{}
		w := c.mark()
		t := Txn{If: []Cmp{{Key: key, Rev: got[0].Mod}}, Then: []Op{{Key: key, Value: encode(w, s)}}, Read: []string{key}}
		if spec == "" {
			if got[0].Mod == 0 {
				return nil
			}
			w, t.Then = "", []Op{{Key: key, Delete: true}}
		}
		_, ok, err := c.commit(ctx, w, t)
		if err != nil {
			return fmt.Errorf("set schedule of medium %v: %w", id, err)
		}
		if ok {
			return nil
		}
	}
	return fmt.Errorf("set schedule of medium %v: %w", id, atoll.ErrConflict)
}

// Schedules returns all schedules, in the order of their media's ids.
func (c *Catalog) Schedules(ctx context.Context) ([]Schedule, error) {
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, schedulePrefix, "", 0)
	if err != nil {
		return nil, fmt.Errorf("list schedules: %w", err)
	}
	out := make([]Schedule, len(kvs))
	for i, kv := range kvs {
		if err := decode(kv, &out[i]); err != nil {
			return nil, fmt.Errorf("list schedules: %w", err)
		}
		out[i].Rev = kv.Mod
	}
	return out, nil
}

// NoteSchedule records when rules of a schedule, as it was read at s.Rev, were
// followed, and when to try again. ErrConflict when it was changed since.
func (c *Catalog) NoteSchedule(ctx context.Context, s Schedule, followed map[string]time.Time, notBefore time.Time) (Schedule, error) {
	ctx, done := bound(ctx)
	defer done()
	last := maps.Clone(s.Last)
	if last == nil {
		last = map[string]time.Time{}
	}
	maps.Copy(last, followed)
	s.Last, s.NotBefore = last, notBefore
	key, w := scheduleKey(s.Medium), c.mark()
	res, ok, err := c.commit(ctx, w, Txn{If: []Cmp{{Key: key, Rev: s.Rev}}, Then: []Op{{Key: key, Value: encode(w, s)}}, Read: []string{key}})
	if err == nil && !ok {
		err = atoll.ErrConflict
	}
	if err != nil {
		return Schedule{}, fmt.Errorf("note schedule of medium %v: %w", s.Medium, err)
	}
	s.Rev = res.Rev
	return s, nil
}
