package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"
)

const (
	gib   = int64(1) << 30
	megab = 1e6
)

// versionsBench measures what has to do with versions, streams and reclaim, each
// beside the bare disk or beside a volume without versions, in one run.
type versionsBench struct {
	bin, dir string
	rounds   int
	second   time.Duration // of each measurement of speed
	scale    int64         // sizes are divided by it
	table    table
}

// scenario is one part of the benchmark.
type scenario struct {
	name string
	run  func(*versionsBench, context.Context) error
}

var scenarios = []scenario{
	{"versions backup", (*versionsBench).backup},
	{"versions thousand", (*versionsBench).thousand},
	{"versions export", (*versionsBench).export},
	{"versions import", (*versionsBench).imports},
	{"versions steady", (*versionsBench).steady},
	{"versions curvefs", (*versionsBench).curvefs},
}

// measureVersions runs the scenarios that only names and prints the table. Data
// lie in a new directory under dir, or here; at most 22 GiB at once.
func measureVersions(ctx context.Context, bin, dir string, rounds, seconds int, scale int64, only *regexp.Regexp) (err error) {
	if !slices.ContainsFunc(scenarios, func(s scenario) bool { return only.MatchString(s.name) }) {
		return nil
	}
	if dir == "" {
		dir = "."
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	if dir, err = os.MkdirTemp(dir, "bench-data-"); err != nil {
		return fmt.Errorf("make a directory for data: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	b := &versionsBench{bin: bin, dir: dir, rounds: rounds, second: time.Duration(seconds) * time.Second, scale: max(scale, 1)}
	defer func() { b.table.print(os.Stdout) }() // also of what was measured before an error
	for _, s := range scenarios {
		if !only.MatchString(s.name) {
			continue
		}
		start := time.Now()
		if e := s.run(b, ctx); e != nil { // the others can be measured all the same
			e = fmt.Errorf("%s: %w", s.name, e)
			b.tell("%v", e)
			err = errors.Join(err, e)
		}
		b.tell("%s took %s", s.name, time.Since(start).Round(time.Second))
		if ctx.Err() != nil {
			break
		}
	}
	return err
}

func (b *versionsBench) tell(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

// cluster starts a server with a directory of its own.
func (b *versionsBench) cluster(ctx context.Context, name string, args ...string) (*cluster, error) {
	b.tell("start cluster %s", name)
	return newCluster(ctx, b.bin, filepath.Join(b.dir, name), args...)
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }
