package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// steady measures random overwrites on nodes whose room is filled to 60 % with
// live data, when every new segment has to be won from old ones, beside a volume
// on nodes that have room; and how much is written for each byte.
func (b *versionsBench) steady(ctx context.Context) error {
	const copies = 3
	size := gib / b.scale
	full, err := b.cluster(ctx, "steady", "--disk-limit", strconv.FormatInt(size*10/6, 10)+"B", "--spare", "1", "--replicas", strconv.Itoa(copies))
	if err != nil {
		return err
	}
	defer full.remove()
	fresh, err := b.cluster(ctx, "fresh", "--replicas", strconv.Itoa(copies))
	if err != nil {
		return err
	}
	defer fresh.remove()
	e := spread(size, size)
	var vols [2]disk
	for i, c := range []*cluster{full, fresh} {
		vol, err := c.create(ctx, "disk", size, "")
		if err != nil {
			return err
		}
		defer vol.Close()
		if err := fill(ctx, vol, e, 8); err != nil {
			return err
		}
		vols[i] = vol
	}
	b.tell("write the volume twice over, for %v at most", warmUp)
	n, err := overwrite(ctx, vols[0], e, int(2*size/page))
	if err != nil {
		return err
	}
	b.tell("%d MiB overwritten", n*page/piece)
	for round := range b.rounds {
		b.tell("steady: round %d", round+1)
		if err := b.steadyRound(ctx, full, vols, e, copies); err != nil {
			return err
		}
		// A volume that stays as new: what was written in the round is given back.
		if err := renew(ctx, fresh, &vols[1], e, size); err != nil {
			return err
		}
	}
	return errors.Join(full.remove(), fresh.remove())
}

// warmUp bounds the time in which the steady state is reached.
const warmUp = 40 * time.Second

// overwrite writes count random pages, or what can be written in the time of
// warmUp, and returns how many.
func overwrite(ctx context.Context, d disk, e extent, count int) (int, error) {
	l := startLoad(ctx, d, e, 32)
	var err error
	for start := time.Now(); err == nil && l.count() < count && time.Since(start) < warmUp; {
		err = sleep(ctx, 200*time.Millisecond)
	}
	n, lerr := l.stop()
	return n, errors.Join(err, lerr)
}

// steadyRound measures both volumes once.
func (b *versionsBench) steadyRound(ctx context.Context, full *cluster, vols [2]disk, e extent, copies int) error {
	before, err := full.written()
	if err != nil {
		return err
	}
	slow, n, err := speed(ctx, vols[0], e, 32, 2*b.second)
	if err != nil {
		return err
	}
	after, err := full.written()
	if err != nil {
		return err
	}
	fast, _, err := speed(ctx, vols[1], e, 32, b.second)
	if err != nil {
		return err
	}
	amplified := float64(after-before) / float64(n*page) / float64(copies)
	b.table.add("overwrites at 60 % fill (beside: on a fresh volume)", "1000/s", goal{}, slow/1e3, fast/1e3)
	b.table.add("overwrites at 60 % fill: of a fresh volume's speed", "×", goal{least: 0.5}, slow/fast)
	b.table.add("overwrites at 60 % fill: bytes written for one, each copy", "×", goal{most: 2.5}, amplified)
	return nil
}

// renew replaces the volume by a new one.
func renew(ctx context.Context, c *cluster, vol *disk, e extent, size int64) error {
	if err := (*vol).(interface{ Close() error }).Close(); err != nil {
		return err
	}
	if err := c.drop(ctx, "disk"); err != nil {
		return err
	}
	v, err := c.create(ctx, "disk", size, "")
	if err != nil {
		return err
	}
	*vol = v
	return fill(ctx, v, e, 8)
}

// curvefs measures calls of the module for Python beside the same operation over
// NBD from C.
func (b *versionsBench) curvefs(ctx context.Context) error {
	c, err := b.cluster(ctx, "curvefs")
	if err != nil {
		return err
	}
	return errors.Join(b.curvefsIn(ctx, c), c.remove())
}

func (b *versionsBench) curvefsIn(ctx context.Context, c *cluster) error {
	const size = 10 * gib
	_, err := c.client.Volumes.CreateVolume(ctx, connect.NewRequest(&atollv1.CreateVolumeRequest{Name: "disk", SizeBytes: size, Owner: "bench"}))
	if err != nil {
		return err
	}
	vol, err := c.open(ctx, "disk")
	if err != nil {
		return err
	}
	err = fill(ctx, vol, extent{callArea / piece, piece}, 8)
	if err := errors.Join(err, vol.Close()); err != nil {
		return err
	}
	callers, err := b.callers(ctx, c)
	if err != nil {
		return err
	}
	count := max(500, int(8000/b.scale))
	for round := range b.rounds {
		b.tell("curvefs: round %d", round+1)
		for _, op := range []struct {
			name string
			most float64
		}{{"read", 40}, {"write", 350}} {
			base, err := callers.plain(ctx, op.name, count)
			if err != nil {
				return err
			}
			python, err := callers.python(ctx, op.name, count)
			if err != nil {
				return err
			}
			what := "curvefs 4K " + op.name + " a call"
			b.table.add(fmt.Sprintf("%s (beside: NBD from %s)", what, callers.language), "µs", goal{}, python, base)
			b.table.add(what+": beyond NBD from "+callers.language, "µs", goal{most: op.most}, python-base)
		}
	}
	return nil
}
