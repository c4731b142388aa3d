package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

func TestParseSchedule(t *testing.T) {
	for text, want := range map[string]string{
		"":                                   "",
		"hourly=24,daily=7":                  "hourly=24 daily=7",
		" weekly=4, monthly=12 ,yearly=1":    "weekly=4 monthly=12 yearly=1",
		"every=15m:8,every=1h30m:2,hourly=1": "every-15m=8 every-1h30m=2 hourly=1",
	} {
		rules, err := parseSchedule(text)
		var got []string
		for _, r := range rules {
			got = append(got, fmt.Sprintf("%s=%d", r.name, r.keep))
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %v %v", text, got, err)
		}
	}
	for _, bad := range []string{"hourly", "hourly=0", "hourly=x", "hourly=99999", "dayly=3", "every=15m", "every=15m:0", "every=10s:3", "every=1500ms:3", "hourly=1,hourly=2", "hourly=1,,daily=1"} {
		_, err := parseSchedule(bad)
		want(t, err, atoll.ErrInvalid)
		if api.Hint(err) == "" {
			t.Errorf("%q: no hint", bad)
		}
	}
}

// Periods begin where people expect them to.
func TestPeriods(t *testing.T) {
	now := time.Date(2026, 3, 12, 15, 47, 21, 9, time.FixedZone("x", 3600)) // a Thursday, 14:47 UTC
	for text, want := range map[string]string{
		"hourly=1": "2026-03-12 14:00:00", "daily=1": "2026-03-12 00:00:00", "weekly=1": "2026-03-09 00:00:00",
		"monthly=1": "2026-03-01 00:00:00", "yearly=1": "2026-01-01 00:00:00", "every=15m:1": "2026-03-12 14:45:00",
	} {
		rules, err := parseSchedule(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := rules[0].period(now).Format(time.DateTime); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	if r := (rule{name: "weekly"}); r.period(time.Date(2026, 3, 15, 23, 0, 0, 0, time.UTC)).Day() != 9 {
		t.Error("Sunday is not the last day of the week")
	}
}

// A schedule makes versions at the beginnings of periods and keeps as many as it
// says, whatever the volume does, and only its own.
func TestSchedule(t *testing.T) {
	t.Parallel()
	s := start(t, testConfig(t, testDir(t)), Options{})
	defer mustStop(t, s)
	b := &backend{s: s}
	ctx := t.Context()
	create(t, s, "disk1", "")
	mine := backup(t, client(t, s), "mine", "disk1")[0]
	eventually(t, "leading", s.leads)
	spec := "hourly=3,daily=2"
	if r, err := b.SetSchedule(ctx, &atollv1.SetScheduleRequest{Name: "disk1", Schedule: "hourly=3, daily=2"}); err != nil || r.Schedule != spec {
		t.Fatal(r, err)
	}
	if v, err := b.Volume(ctx, "disk1", false); err != nil || v.Schedule != spec {
		t.Errorf("volume %v %v", v, err)
	}
	// The leader's own loop makes the first within seconds; the clock is this
	// test's from then on, always ahead of the real one.
	count := func() []*atollv1.Version {
		l, err := b.ListVersions(ctx, &atollv1.ListVersionsRequest{Name: "disk1"})
		if err != nil {
			t.Fatal(err)
		}
		return slices.DeleteFunc(l.Versions, func(v *atollv1.Version) bool { return v.Properties[propMadeBy] == "" })
	}
	eventually(t, "the first scheduled version", func() bool { return len(count()) == 1 })
	if by := count()[0].Properties[propMadeBy]; by != "hourly,daily" {
		t.Errorf("made by %s", by)
	}
	day := time.Now().UTC().Truncate(24*time.Hour).AddDate(0, 0, 1)
	for hour := range 30 {
		for range 2 { // the second time nothing is due
			if err := b.runSchedules(ctx, day.Add(time.Duration(hour)*time.Hour+time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
	}
	var made []string
	for _, v := range count() {
		made = append(made, v.Properties[propMadeBy])
	}
	if !slices.Equal(made, []string{"hourly,daily", "hourly,daily", "hourly", "hourly", "hourly"}) {
		t.Errorf("kept %v", made)
	}
	if l, err := b.ListVersions(ctx, &atollv1.ListVersionsRequest{Name: "disk1"}); err != nil || l.Versions[0].Number != mine.Number {
		t.Errorf("the user's version went: %v %v", l, err)
	}
	if _, err := b.DeleteVolume(ctx, &atollv1.DeleteVolumeRequest{Name: "disk1", Now: true}); err != nil {
		t.Fatal(err)
	}
	if err := b.runSchedules(ctx, day.AddDate(0, 0, 3)); err != nil {
		t.Error(err)
	}
	if left, err := s.cat.Schedules(ctx); err != nil || len(left) != 0 {
		t.Errorf("schedules left: %v %v", left, err)
	}
	_, err := b.SetSchedule(ctx, &atollv1.SetScheduleRequest{Name: "disk1", Schedule: "now"})
	want(t, err, atoll.ErrInvalid)
}
