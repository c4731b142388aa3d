package server

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/qos"
)

// storedLimit is a limit in a medium's record, under its kind's name.
type storedLimit struct {
	Rate   int64 `json:"rate"`
	Burst  int64 `json:"burst,omitempty"`
	Length int64 `json:"length,omitempty"` // seconds
}

// limitsOf reads the limits in a record. What cannot be read limits nothing.
func limitsOf(m catalog.Medium) qos.Limits {
	var stored map[string]storedLimit
	var out qos.Limits
	text := m.Props[propLimits]
	if text == "" || json.Unmarshal([]byte(text), &stored) != nil {
		return out
	}
	for name, l := range stored {
		if k, err := qos.ParseKind(name); err == nil {
			out[k] = qos.Limit{Rate: l.Rate, Burst: l.Burst, Length: time.Duration(l.Length) * time.Second}
		}
	}
	return out
}

// storeLimits puts limits into a record.
func storeLimits(m *catalog.Medium, l qos.Limits) error {
	stored := map[string]storedLimit{}
	for k, x := range l {
		if x != (qos.Limit{}) {
			stored[qos.Kind(k).String()] = storedLimit{x.Rate, x.Burst, int64(x.Length / time.Second)}
		}
	}
	if len(stored) == 0 {
		setProp(m, propLimits, "")
		return nil
	}
	text, err := json.Marshal(stored)
	setProp(m, propLimits, string(text))
	return err
}

// limitFields ties the kinds of limit to the API's message.
func limitFields(m *atollv1.Limits) [qos.Kinds]**atollv1.Limit {
	return [qos.Kinds]**atollv1.Limit{
		qos.IOPSTotal: &m.Iops, qos.IOPSRead: &m.ReadIops, qos.IOPSWrite: &m.WriteIops,
		qos.BPSTotal: &m.Bytes, qos.BPSRead: &m.ReadBytes, qos.BPSWrite: &m.WriteBytes,
	}
}

// limitsMessage shows limits; nil for none.
func limitsMessage(l qos.Limits) *atollv1.Limits {
	if l == (qos.Limits{}) {
		return nil
	}
	out := &atollv1.Limits{}
	for k, f := range limitFields(out) {
		if x := l[k]; x != (qos.Limit{}) {
			*f = &atollv1.Limit{Rate: x.Rate, Burst: x.Burst, BurstSeconds: int64(x.Length / time.Second)}
		}
	}
	return out
}

// changeLimits applies a request to limits: what is absent stays, a rate of 0
// takes a limit away.
func changeLimits(l qos.Limits, r *atollv1.Limits) (qos.Limits, error) {
	if r == nil {
		return l, nil
	}
	const most = int64(24 * time.Hour / time.Second)
	for k, f := range limitFields(r) {
		if x := *f; x != nil {
			l[k] = qos.Limit{}
			if x.Rate != 0 || x.Burst != 0 {
				l[k] = qos.Limit{Rate: x.Rate, Burst: x.Burst, Length: time.Duration(min(x.BurstSeconds, most)) * time.Second}
			}
		}
	}
	return l, l.Check()
}

// applyLimits makes an open volume keep to the limits in its record.
func (v *volumeSet) applyLimits(o *openVolume, rec catalog.Medium) {
	if err := o.limits.Set(limitsOf(rec)); err != nil {
		v.s.log.Warn("limits of a volume not understood", "medium", rec.ID, "err", err)
	}
}

// SetLimits implements api.Names. They hold from now on, for those connected,
// too.
func (b *backend) SetLimits(ctx context.Context, r *atollv1.SetLimitsRequest) (*atollv1.Limits, error) {
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, namesLimits); done {
		return out, err
	}
	rec, err = b.update(ctx, rec.ID, func(m *catalog.Medium) error {
		l, err := changeLimits(limitsOf(*m), r.Limits)
		if err == nil {
			err = storeLimits(m, l)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("limit volume %q: %w", r.Name, err)
	}
	for _, o := range b.s.volumes.list() {
		if o.id == rec.ID && o.usable() {
			b.s.volumes.applyLimits(o, rec)
		}
	}
	if m := limitsMessage(limitsOf(rec)); m != nil {
		return m, nil
	}
	return &atollv1.Limits{}, nil
}
