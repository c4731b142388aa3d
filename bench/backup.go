package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

const (
	loadDepth = 8                      // writers under which calls are measured
	calls     = 4                      // of a kind in a round
	around    = 150 * time.Millisecond // after a call, in which stalls count as its own
)

// backup measures backup, clone and restore of a small and a large volume under
// random writes: how long the call takes, and the longest write meanwhile. In
// writeback there is more to do, because what was acknowledged from memory has
// to become durable with the version.
func (b *versionsBench) backup(ctx context.Context) error {
	for _, v := range []struct {
		text, replicas string
		size, written  int64
	}{
		{"4 GiB", "3", 4 * gib, 4 * gib},
		{"1 TiB", "1", 1024 * gib, 10 * gib}, // one copy, because of the room
	} {
		c, err := b.cluster(ctx, "backup", "--replicas", v.replicas)
		if err != nil {
			return err
		}
		err = b.backupOf(ctx, c, v.text, spread(v.size, v.written/b.scale), v.size)
		if err := errors.Join(err, c.remove()); err != nil {
			return fmt.Errorf("%s: %w", v.text, err)
		}
	}
	return nil
}

// backupOf measures a volume in writethrough and a clone of it in writeback.
func (b *versionsBench) backupOf(ctx context.Context, c *cluster, text string, e extent, size int64) error {
	vol, err := c.create(ctx, "writethrough", size, "writethrough")
	if err != nil {
		return err
	}
	defer vol.Close()
	b.tell("%s: write %d MiB", text, e.count)
	if err := errors.Join(fill(ctx, vol, e, 8), backup(ctx, c, "writethrough")); err != nil {
		return err
	}
	_, err = c.client.Versions.CloneVersion(ctx, connect.NewRequest(&atollv1.CloneVersionRequest{Source: "writethrough@last", Name: "writeback", Cache: "writeback"}))
	if err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	clone, err := c.open(ctx, "writeback")
	if err != nil {
		return err
	}
	defer clone.Close()
	bare, err := openFile(filepath.Join(b.dir, "raw"), true)
	if err != nil {
		return err
	}
	defer bare.Close()
	small := extent{256, piece}
	if err := fill(ctx, bare, small, 8); err != nil {
		return err
	}
	for round := range b.rounds {
		b.tell("%s: round %d", text, round+1)
		stall, err := quiet(ctx, bare, small)
		if err != nil {
			return err
		}
		for i, vol := range []disk{vol, clone} {
			t := loaded{c, []string{"writethrough", "writeback"}[i], vol, e}
			if err := b.callsUnderLoad(ctx, t, text, round, stall); err != nil {
				return err
			}
		}
	}
	return nil
}

// quiet returns the longest write to the bare disk in as much time as a call
// is given.
func quiet(ctx context.Context, bare disk, e extent) (time.Duration, error) {
	l := startLoad(ctx, bare, e, loadDepth)
	var longest time.Duration
	var err error
	for range calls {
		from := time.Now()
		if err = sleep(ctx, around); err != nil {
			break
		}
		longest = max(longest, l.longest(from, time.Now()))
	}
	_, lerr := l.stop()
	return longest, errors.Join(err, lerr)
}

// loaded is a volume that calls are made for.
type loaded struct {
	c    *cluster
	name string
	disk disk
	e    extent
}

// call makes a call; i tells those of one kind apart.
func (t loaded) call(ctx context.Context, kind string, i int) (err error) {
	switch v := t.c.client.Versions; kind {
	case "backup":
		err = backup(ctx, t.c, t.name)
	case "clone":
		_, err = v.CloneVersion(ctx, connect.NewRequest(&atollv1.CloneVersionRequest{Source: t.name + "@last", Name: fmt.Sprintf("%s-%d", t.name, i)}))
	case "restore":
		_, err = v.RestoreVersion(ctx, connect.NewRequest(&atollv1.RestoreVersionRequest{Name: t.name + "@last"}))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", kind, err)
	}
	return nil
}

// callsUnderLoad makes one round of calls; bare is the longest write to the bare
// disk.
func (b *versionsBench) callsUnderLoad(ctx context.Context, t loaded, text string, round int, bare time.Duration) error {
	l := startLoad(ctx, t.disk, t.e, loadDepth)
	err := sleep(ctx, 500*time.Millisecond)
	text += " " + t.name
	for _, kind := range []string{"none", "backup", "clone", "restore"} {
		var took []float64
		var longest time.Duration
		for i := 0; i < calls && err == nil; i++ {
			start := time.Now()
			err = t.call(ctx, kind, round*calls+i)
			took = append(took, ms(time.Since(start)))
			err = errors.Join(err, sleep(ctx, around))
			longest = max(longest, l.longest(start, time.Now()))
			err = errors.Join(err, sleep(ctx, around)) // a moment between the calls
		}
		if err != nil {
			break
		}
		if kind == "none" {
			b.table.add(text+": longest write without a call", "ms", goal{}, ms(longest), ms(bare))
			continue
		}
		for _, t := range took {
			b.table.add(text+": "+kind, "ms", goal{most: 20}, t)
		}
		b.table.add(text+": longest write, "+kind, "ms", goal{most: 50}, ms(longest), ms(bare))
	}
	_, lerr := l.stop()
	return errors.Join(err, lerr)
}

// thousand measures a volume with a thousand versions beside one without.
func (b *versionsBench) thousand(ctx context.Context) error {
	c, err := b.cluster(ctx, "thousand")
	if err != nil {
		return err
	}
	return errors.Join(b.thousandIn(ctx, c), c.remove())
}

func (b *versionsBench) thousandIn(ctx context.Context, c *cluster) error {
	const versions = 1000
	e := spread(gib/b.scale, gib/b.scale)
	names := []string{"plain", "many"}
	for _, name := range names {
		vol, err := c.create(ctx, name, gib/b.scale, "")
		if err != nil {
			return err
		}
		err = fill(ctx, vol, e, 8)
		if err := errors.Join(err, vol.Close()); err != nil {
			return err
		}
	}
	many, err := c.open(ctx, "many")
	if err != nil {
		return err
	}
	defer many.Close()
	b.tell("make %d versions", versions)
	start := time.Now()
	for range versions / b.scale {
		err := randomWrites(ctx, many, e, 16, 4)
		if err == nil {
			_, err = c.client.Versions.CreateVersion(ctx, connect.NewRequest(&atollv1.CreateVersionRequest{Media: []string{"many"}}))
		}
		if err != nil {
			return err
		}
	}
	b.table.add("1,000 versions: each, with 16 writes before it", "ms", goal{}, ms(time.Since(start))/float64(versions/b.scale))
	if err := b.speeds(ctx, c, e); err != nil {
		return err
	}
	_ = many.Close()
	for range b.rounds {
		if err := errors.Join(c.stop(), c.start(ctx)); err != nil {
			return err
		}
		var took []float64
		for _, name := range names {
			start := time.Now()
			if _, err := c.client.Volumes.GetVolume(ctx, connect.NewRequest(&atollv1.GetVolumeRequest{Name: name, Open: true})); err != nil {
				return err
			}
			took = append(took, time.Since(start).Seconds())
		}
		b.table.add("1,000 versions: open (beside: without)", "s", goal{most: 1}, took[1], took[0])
	}
	return nil
}

// speeds measures random writes to both volumes in turn.
func (b *versionsBench) speeds(ctx context.Context, c *cluster, e extent) error {
	plain, err := c.open(ctx, "plain")
	if err != nil {
		return err
	}
	defer plain.Close()
	many, err := c.open(ctx, "many")
	if err != nil {
		return err
	}
	defer many.Close()
	for range b.rounds {
		// Plain, many, many, plain: what changes slowly does not count.
		var sum [2]float64
		for _, i := range []int{0, 1, 1, 0} {
			s, _, err := speed(ctx, []disk{plain, many}[i], e, 32, b.second/2)
			if err != nil {
				return err
			}
			sum[i] += s / 2
		}
		b.table.add("1,000 versions: 4K random writes (beside: without)", "1000/s", goal{}, sum[1]/1e3, sum[0]/1e3)
		b.table.add("1,000 versions: of the speed without", "×", goal{least: 0.9}, sum[1]/sum[0])
	}
	return nil
}
