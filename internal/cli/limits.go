package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// limitKinds are the limits that a volume can have.
var limitKinds = []struct {
	flag, text string
	bytes      bool
	of         func(*atollv1.Limits) **atollv1.Limit
}{
	{"iops", "operations", false, func(l *atollv1.Limits) **atollv1.Limit { return &l.Iops }},
	{"read-iops", "reads", false, func(l *atollv1.Limits) **atollv1.Limit { return &l.ReadIops }},
	{"write-iops", "writes", false, func(l *atollv1.Limits) **atollv1.Limit { return &l.WriteIops }},
	{"bytes", "bytes", true, func(l *atollv1.Limits) **atollv1.Limit { return &l.Bytes }},
	{"read-bytes", "bytes read", true, func(l *atollv1.Limits) **atollv1.Limit { return &l.ReadBytes }},
	{"write-bytes", "bytes written", true, func(l *atollv1.Limits) **atollv1.Limit { return &l.WriteBytes }},
}

func (a *App) volumeLimits() *cobra.Command {
	texts := make([]string, len(limitKinds))
	cmd := &cobra.Command{
		Use:     "limits NAME",
		Aliases: []string{"limit", "qos"},
		Short:   "Show or change a volume's limits of speed",
		Long: `Show or change a volume's limits of operations and bytes a second. They hold at
once, for all clients together. A limit is RATE[:BURST[:SECONDS]]: a volume that
was idle may do BURST a second, for at most SECONDS. "none" removes a limit.`,
		Example: "  atoll volume limits disk1 --iops 1000:5000:10 --write-bytes 50M\n  atoll volume limits disk1 --iops none",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			l, any := &atollv1.Limits{}, false
			for i, k := range limitKinds {
				if !cmd.Flags().Changed(k.flag) {
					continue
				}
				limit, err := parseLimit(texts[i], k.bytes)
				if err != nil {
					return fmt.Errorf("--%s: %w", k.flag, err)
				}
				*k.of(l), any = limit, true
			}
			if !any {
				return a.showLimits(cmd, args[0])
			}
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				r, err := c.Names.SetLimits(ctx, connect.NewRequest(&atollv1.SetLimitsRequest{Name: volumeName(args[0]), Limits: l}))
				if err != nil {
					return a.didYouMean(ctx, c, args[0], err)
				}
				return a.show(r.Msg, func() { a.printLimits(r.Msg) })
			})
		},
	}
	for i, k := range limitKinds {
		cmd.Flags().StringVar(&texts[i], k.flag, "", k.text+" a second: RATE[:BURST[:SECONDS]] or none")
	}
	return cmd
}

func (a *App) showLimits(cmd *cobra.Command, name string) error {
	v, err := a.volume(cmd, name, false)
	if err != nil {
		return err
	}
	if v.Limits == nil {
		v.Limits = &atollv1.Limits{}
	}
	return a.show(v.Limits, func() { a.printLimits(v.Limits) })
}

func (a *App) printLimits(l *atollv1.Limits) {
	var rows [][]string
	for _, k := range limitKinds {
		limit := *k.of(l)
		if limit == nil || limit.Rate == 0 {
			continue
		}
		number := func(n int64) string {
			switch {
			case n == 0:
				return "-"
			case k.bytes:
				return a.size(n)
			}
			return strconv.FormatInt(n, 10)
		}
		seconds := "-"
		if limit.BurstSeconds > 0 {
			seconds = strconv.FormatInt(limit.BurstSeconds, 10)
		}
		rows = append(rows, []string{k.flag, number(limit.Rate), number(limit.Burst), seconds})
	}
	if len(rows) == 0 {
		a.hint("no limits")
		return
	}
	a.table([]string{"LIMIT", ">RATE", ">BURST", ">SECONDS"}, rows)
}

// limitsLine is all limits in one line.
func (a *App) limitsLine(l *atollv1.Limits) string {
	var out []string
	for _, k := range limitKinds {
		if limit := *k.of(l); limit != nil && limit.Rate > 0 {
			rate := strconv.FormatInt(limit.Rate, 10)
			if k.bytes {
				rate = a.size(limit.Rate)
			}
			out = append(out, k.flag+" "+rate+"/s")
		}
	}
	return strings.Join(out, ", ")
}

// parseLimit reads RATE[:BURST[:SECONDS]] or none.
func parseLimit(text string, bytes bool) (*atollv1.Limit, error) {
	if text == "none" || text == "0" {
		return &atollv1.Limit{}, nil
	}
	parts := strings.Split(text, ":")
	if len(parts) > 3 {
		return nil, usagef("%q: want RATE[:BURST[:SECONDS]] or none", text)
	}
	l := &atollv1.Limit{}
	for i, to := range []*int64{&l.Rate, &l.Burst, &l.BurstSeconds}[:len(parts)] {
		var err error
		if bytes && i < 2 {
			*to, err = parseSize(parts[i])
		} else if *to, err = strconv.ParseInt(strings.TrimSuffix(parts[i], "s"), 10, 64); err != nil {
			err = usagef("%q is not a number", parts[i])
		}
		if err != nil {
			return nil, err
		}
		if *to < 0 || i < 2 && *to == 0 {
			return nil, usagef("%q: want more than 0", parts[i])
		}
	}
	if l.Burst != 0 && l.Burst < l.Rate {
		return nil, usagef("%q: the burst is less than the rate", text)
	}
	return l, nil
}

func (a *App) volumeSchedule() *cobra.Command {
	return &cobra.Command{
		Use:   "schedule NAME [SCHEDULE]",
		Short: "Let versions be made and thinned out by the clock",
		Long: `Show or change the schedule by which versions of a volume are made and deleted:
"hourly=24,daily=7" makes one every hour and one every day, and keeps 24 and 7
of them. There are hourly, daily, weekly, monthly, yearly, and others such as
every=15m:8. "none" ends the schedule; versions that were made stay.`,
		Example: "  atoll volume schedule disk1 hourly=24,daily=7\n  atoll volume schedule disk1 none",
		Args:    cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
				name, r := volumeName(args[0]), &atollv1.SetScheduleResponse{}
				if len(args) == 1 {
					v, err := (&image{c: c, name: name}).volume(ctx)
					if err != nil {
						return a.didYouMean(ctx, c, name, err)
					}
					r.Schedule = v.Schedule
				} else {
					text := args[1]
					if text == "none" {
						text = ""
					}
					resp, err := c.Versions.SetSchedule(ctx, connect.NewRequest(&atollv1.SetScheduleRequest{Name: name, Schedule: text}))
					if err != nil {
						return a.didYouMean(ctx, c, name, err)
					}
					r = resp.Msg
				}
				return a.show(r, func() {
					if r.Schedule == "" {
						r.Schedule = "none"
					}
					fmt.Fprintf(a.Out, "%s: %s\n", name, r.Schedule)
				})
			})
		},
	}
}

// volumeMeta is "atoll volume meta", rbd's image-meta.
func (a *App) volumeMeta() *cobra.Command {
	cmd := &cobra.Command{Use: "meta", Aliases: []string{"image-meta"}, Short: "Keep words beside a volume, as rbd's image-meta"}
	cmd.AddCommand(a.metaList(), a.metaGet(), a.metaSet(), a.metaRemove())
	for _, c := range cmd.Commands() {
		c.ValidArgsFunction = a.completeArgs
	}
	return cmd
}

func (a *App) metaList() *cobra.Command {
	return &cobra.Command{
		Use:     "ls NAME",
		Aliases: []string{"list"},
		Short:   "List keys and values",
		Args:    exactArgs(1, "a volume's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			h := header(v.Properties)
			if a.output != "table" {
				all := make(map[string]string, len(h.Meta))
				for _, m := range h.Meta {
					all[m.Key] = m.Value
				}
				return a.plain(all)
			}
			rows := make([][]string, 0, len(h.Meta))
			for _, m := range h.Meta {
				rows = append(rows, []string{m.Key, m.Value})
			}
			if len(rows) > 0 {
				a.table([]string{"KEY", "VALUE"}, rows)
			}
			return nil
		},
	}
}

func (a *App) metaGet() *cobra.Command {
	return &cobra.Command{
		Use:   "get NAME KEY",
		Short: "Print a value",
		Args:  exactArgs(2, "a volume's name and a key"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			value, ok := v.Properties[propMeta+args[1]]
			if !ok {
				return fmt.Errorf("key %q of volume %q: %w", args[1], v.Name, atoll.ErrNotExist)
			}
			if a.output != "table" {
				return a.plain(value)
			}
			fmt.Fprintln(a.Out, value)
			return nil
		},
	}
}

func (a *App) metaSet() *cobra.Command {
	return &cobra.Command{
		Use:     "set NAME KEY VALUE",
		Short:   "Set a value",
		Example: "  atoll volume meta set disk1 purpose \"mail server\"",
		Args:    exactArgs(3, "a volume's name, a key and a value"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[2] == "" {
				return usagef("an empty value is no value; use: atoll volume meta rm")
			}
			return a.setProperty(cmd, args[0], propMeta+args[1], args[2])
		},
	}
}

func (a *App) metaRemove() *cobra.Command {
	return &cobra.Command{
		Use:     "rm NAME KEY",
		Aliases: []string{"remove"},
		Short:   "Remove a key",
		Args:    exactArgs(2, "a volume's name and a key"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.volume(cmd, args[0], false)
			if err != nil {
				return err
			}
			if _, ok := v.Properties[propMeta+args[1]]; !ok {
				return fmt.Errorf("key %q of volume %q: %w", args[1], v.Name, atoll.ErrNotExist)
			}
			return a.setProperty(cmd, args[0], propMeta+args[1], "")
		},
	}
}

// setProperty sets or, with an empty value, removes a property of a volume.
func (a *App) setProperty(cmd *cobra.Command, name, key, value string) error {
	return a.Call(cmd, func(ctx context.Context, c *api.Client) error {
		_, err := c.Names.SetProperties(ctx, connect.NewRequest(&atollv1.SetPropertiesRequest{Path: volumeName(name), Properties: map[string]string{key: value}}))
		return a.didYouMean(ctx, c, name, err)
	})
}

// parseExpiry reads when something ends: a date, a time, or how long from now.
func parseExpiry(text string, now time.Time) (time.Time, error) {
	text = strings.TrimSpace(text)
	if text == "now" {
		return now, nil
	}
	relative := strings.TrimSuffix(strings.TrimPrefix(text, "in "), " from now")
	if d, err := time.ParseDuration(relative); err == nil && d >= 0 {
		return now.Add(d), nil
	}
	if n, unit, ok := strings.Cut(relative, " "); ok || strings.HasSuffix(relative, "d") || strings.HasSuffix(relative, "w") {
		if !ok {
			n, unit = relative[:len(relative)-1], relative[len(relative)-1:]
		}
		days := map[string]int{"d": 1, "day": 1, "w": 7, "week": 7, "month": 30, "year": 365}[singular(unit)]
		if count, err := strconv.Atoi(n); err == nil && count >= 0 && days > 0 {
			return now.AddDate(0, 0, count*days), nil
		}
		hours := map[string]time.Duration{"hour": time.Hour, "minute": time.Minute, "second": time.Second}[singular(unit)]
		if count, err := strconv.Atoi(n); err == nil && count >= 0 && hours > 0 {
			return now.Add(time.Duration(count) * hours), nil
		}
	}
	for _, layout := range []string{time.RFC3339, time.DateTime, "2006-01-02 15:04", "2006-01-02T15:04:05", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, usagef("%q is no time; want 2006-01-02, \"2006-01-02 15:04:05\", or how long from now, like 36h or 7d", text)
}

func singular(unit string) string {
	if len(unit) > 1 {
		return strings.TrimSuffix(unit, "s")
	}
	return unit
}

// sortedKeys lists the keys of a map in order.
func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
