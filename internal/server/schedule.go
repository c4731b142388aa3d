package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// A schedule is a list of rules, such as
//
//	hourly=24,daily=7,weekly=4,monthly=12,yearly=10,every=15m:8
//
// each of which wants a version at the beginning of every period (UTC; weeks
// begin on Monday) and keeps the given number of those it asked for. A version
// that several rules want is made once, and goes when no rule keeps it. Versions
// that are protected, and those that users made, are never touched.

// rule is one rule of a schedule.
type rule struct {
	name  string        // hourly … yearly, or every-15m
	every time.Duration // of an "every" rule, else 0
	keep  int
}

// Bounds of schedules.
const (
	maxKeep    = 10000
	maxRules   = 16
	minEvery   = time.Minute
	maxEvery   = 366 * 24 * time.Hour
	propMadeBy = "schedule" // of versions: the rules that wanted it
)

// parseSchedule reads a schedule; "" is none.
func parseSchedule(text string) ([]rule, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	bad := func(part, why string) ([]rule, error) {
		return nil, api.WithHint(fmt.Errorf("schedule %q: %q %s: %w", text, part, why, atoll.ErrInvalid), "an example is hourly=24,daily=7,every=15m:8")
	}
	var rules []rule
	seen := map[string]bool{}
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		name, value, ok := strings.Cut(part, "=")
		if !ok {
			return bad(part, "is no rule")
		}
		r := rule{name: name}
		switch name {
		case "hourly", "daily", "weekly", "monthly", "yearly":
		case "every":
			period, count, ok := strings.Cut(value, ":")
			d, err := time.ParseDuration(period)
			if !ok || err != nil || d < minEvery || d > maxEvery || d%time.Second != 0 {
				return bad(part, fmt.Sprintf("wants a time of %s or more and a number, as 15m:8", minEvery))
			}
			r.every, value, r.name = d, count, "every-"+period
		default:
			return bad(part, "is no period that is known")
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 || n > maxKeep {
			return bad(part, fmt.Sprintf("wants a number from 1 to %d", maxKeep))
		}
		if r.keep = n; seen[r.name] {
			return bad(part, "stands twice")
		}
		seen[r.name] = true
		rules = append(rules, r)
	}
	if len(rules) > maxRules {
		return bad(text, fmt.Sprintf("has more than %d rules", maxRules))
	}
	return rules, nil
}

// period returns the beginning of the period that t lies in.
func (r rule) period(t time.Time) time.Time {
	t = t.UTC()
	day := time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, time.UTC)
	switch r.name {
	case "hourly":
		return t.Truncate(time.Hour)
	case "daily":
		return day
	case "weekly":
		return day.AddDate(0, 0, -(int(day.Weekday())+6)%7)
	case "monthly":
		return time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
	case "yearly":
		return time.Date(t.Year(), 1, 1, 0, 0, 0, 0, time.UTC)
	}
	return time.Unix(t.Unix()-t.Unix()%int64(r.every/time.Second), 0).UTC()
}

// due lists the rules whose last version is of an earlier period.
func due(rules []rule, last map[string]time.Time, now time.Time) []rule {
	return slices.DeleteFunc(slices.Clone(rules), func(r rule) bool {
		return !last[r.name].Before(r.period(now))
	})
}

// surplus lists the numbers of the versions that no rule keeps any more. They
// are given in any order.
func surplus(rules []rule, versions []*atollv1.Version) []uint64 {
	versions = slices.Clone(versions)
	slices.SortFunc(versions, func(a, b *atollv1.Version) int { return cmp.Compare(b.Number, a.Number) })
	left := map[string]int{}
	for _, r := range rules {
		left[r.name] = r.keep
	}
	var out []uint64
	for _, v := range versions {
		by := v.Properties[propMadeBy]
		if by == "" {
			continue
		}
		kept := false
		for name := range strings.SplitSeq(by, ",") {
			if left[name] > 0 {
				left[name]--
				kept = true
			}
		}
		if !kept && !v.Protected {
			out = append(out, v.Number)
		}
	}
	return out
}

// SetSchedule implements api.Versions.
func (b *backend) SetSchedule(ctx context.Context, r *atollv1.SetScheduleRequest) (*atollv1.SetScheduleResponse, error) {
	if _, err := parseSchedule(r.Schedule); err != nil {
		return nil, err
	}
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	text := strings.ReplaceAll(r.Schedule, " ", "")
	if err := b.s.cat.SetSchedule(ctx, rec.ID, text); err != nil {
		return nil, err
	}
	_, err = b.update(ctx, rec.ID, func(m *catalog.Medium) error {
		setProp(m, propSchedule, text)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &atollv1.SetScheduleResponse{Schedule: text}, nil
}

// runSchedules makes and removes the versions that schedules want at a time.
func (b *backend) runSchedules(ctx context.Context, now time.Time) error {
	all, err := b.s.cat.Schedules(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range all {
		if ctx.Err() != nil {
			break
		}
		if err := b.runSchedule(ctx, s, now); err != nil {
			errs = append(errs, fmt.Errorf("schedule of medium %v: %w", s.Medium, err))
		}
	}
	return errors.Join(errs...)
}

// runSchedule does what one schedule wants. What was due is noted before it is
// done, so that a volume that cannot be reached is not tried every moment; it is
// tried again in the next period, or after retrySchedule.
func (b *backend) runSchedule(ctx context.Context, s catalog.Schedule, now time.Time) error {
	rules, err := parseSchedule(s.Spec)
	if err != nil {
		return err
	}
	want := due(rules, s.Last, now)
	if len(want) == 0 || now.Before(s.NotBefore) {
		return nil
	}
	m, err := b.s.cat.Medium(ctx, s.Medium)
	if errors.Is(err, atoll.ErrNotExist) || err == nil && m.State != catalog.MediumLive && m.State != catalog.MediumTrashed {
		return b.s.cat.SetSchedule(ctx, s.Medium, "")
	}
	if err != nil || m.State == catalog.MediumTrashed {
		return err
	}
	if s, err = b.s.cat.NoteSchedule(ctx, s, nil, now.Add(retrySchedule)); err != nil {
		return err // another leader does it
	}
	names := make([]string, len(want))
	done := map[string]time.Time{}
	for i, r := range want {
		names[i], done[r.name] = r.name, now
	}
	_, err = b.CreateVersion(ctx, &atollv1.CreateVersionRequest{
		Media: []string{m.Name}, Memo: "by schedule", Properties: map[string]string{propMadeBy: strings.Join(names, ",")},
	})
	if err != nil {
		return err
	}
	if _, err := b.s.cat.NoteSchedule(ctx, s, done, time.Time{}); err != nil {
		return err
	}
	return b.thin(ctx, m, rules)
}

// retrySchedule is how long a version that could not be made is not tried again.
const retrySchedule = time.Minute

// thin deletes the versions that a schedule does not keep any more.
func (b *backend) thin(ctx context.Context, m catalog.Medium, rules []rule) error {
	list, err := b.ListVersions(ctx, &atollv1.ListVersionsRequest{Name: m.Name})
	if err != nil {
		return err
	}
	for _, n := range surplus(rules, list.Versions) {
		_, err := b.DeleteVersion(ctx, &atollv1.DeleteVersionRequest{Name: m.Name + "@" + strconv.FormatUint(n, 10)})
		if err != nil && !errors.Is(err, atoll.ErrNotExist) {
			return err
		}
	}
	return nil
}
