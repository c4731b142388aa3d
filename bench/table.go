package main

import (
	"fmt"
	"io"
	"slices"
)

// goal is a bound of a figure: at least, or at most; 0 is none.
type goal struct{ least, most float64 }

// figure is one line of the report: what was measured, once in each round.
type figure struct {
	what, unit string
	goal       goal
	values     []float64
	beside     []float64 // the same on the bare disk, or without versions
}

// table collects figures in the order in which they first come.
type table struct{ figures []*figure }

// add gives a figure the value of one more round.
func (t *table) add(what, unit string, g goal, value float64, beside ...float64) {
	for _, f := range t.figures {
		if f.what == what {
			f.values, f.beside = append(f.values, value), append(f.beside, beside...)
			return
		}
	}
	t.figures = append(t.figures, &figure{what, unit, g, []float64{value}, beside})
}

// middle is the median, of an empty list 0.
func middle(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// print writes the medians, and what was worst.
func (t *table) print(w io.Writer) {
	if len(t.figures) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%-58s  %11s  %11s  %11s  %9s\n", "versions", "median", "worst", "beside", "goal")
	for _, f := range t.figures {
		worst, text := "", ""
		switch {
		case f.goal.least > 0:
			worst, text = number(slices.Min(f.values)), "≥ "+number(f.goal.least)
		case f.goal.most > 0:
			worst, text = number(slices.Max(f.values)), "≤ "+number(f.goal.most)
		}
		beside := ""
		if len(f.beside) > 0 {
			beside = number(middle(f.beside))
		}
		fmt.Fprintf(w, "%-58s  %11s  %11s  %11s  %9s  %s\n", f.what+", "+f.unit, number(middle(f.values)), worst, beside, text, f.verdict())
	}
}

// verdict tells whether the median is what it should be.
func (f *figure) verdict() string {
	m := middle(f.values)
	switch {
	case f.goal == goal{}:
		return ""
	case f.goal.least > 0 && m < f.goal.least, f.goal.most > 0 && m > f.goal.most:
		return "missed"
	}
	return "met"
}

// number writes three digits that matter.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
