package cli

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/transfer"
)

// rbdBench is one run of "rbd bench". Its methods may be called concurrently.
type rbdBench struct {
	kind, pattern string // as the options name them
	ioSize, total int64  // bytes
	threads       int    // requests in flight
	mix           int    // reads of 100 requests, for readwrite

	places int64 // requests of ioSize that the image has room for

	mu struct {
		sync.Mutex
		at       []int64 // of each thread: the place of its next request
		begun    int64   // requests
		ops      [2]int64
		firstErr error
	}
}

// Indexes of counts.
const (
	benchRead = iota
	benchWrite
)

// benchMemory bounds the buffers of a run.
const benchMemory = 1 << 30

// bench measures an image: --io-total bytes in requests of --io-size, of which
// --io-threads are in flight.
func (r *rbdCall) bench() error {
	b, err := r.benchOptions()
	if err != nil {
		return err
	}
	return r.with(snapNone, func(ctx context.Context, _ *api.Client, _ spec, m *image, v *atollv1.Volume) error {
		size := exactSize(v.Properties, v.SizeBytes)
		if b.ioSize > size {
			return rbdInvalid("io-size %s larger than image size %s\nbench failed: (22) Invalid argument", rbdSize(b.ioSize), rbdSize(size))
		}
		d, err := openVolume(ctx, v, m.conns)
		if err != nil {
			return fail("bench failed", err)
		}
		defer d.Close()
		b.start(size)
		fmt.Fprintf(r.Out, "bench  type %s%s io_size %d io_threads %d bytes %d pattern %s\n  SEC       OPS   OPS/SEC   BYTES/SEC\n", b.kind,
			b.mixText(), b.ioSize, b.threads, b.total, map[string]string{"seq": "sequential", "rand": "random", "full-seq": "full sequential"}[b.pattern])
		begin := time.Now()
		if err := r.benchRun(ctx, b, d); err != nil {
			return err
		}
		r.benchResult(b, time.Since(begin))
		return nil
	})
}

// benchOptions reads the options, with rbd's defaults.
func (r *rbdCall) benchOptions() (*rbdBench, error) {
	b := &rbdBench{kind: r.option("io-type"), pattern: "seq", ioSize: 4096, total: 1 << 30, threads: 16, mix: 50}
	switch b.kind {
	case "":
		return nil, rbdInvalid("--io-type must be specified.")
	case "rw":
		b.kind = "readwrite"
	case "read", "write", "readwrite":
	default:
		return nil, &rbdFailure{1, "the argument for option '--io-type' is invalid"}
	}
	if r.has("io-pattern") {
		b.pattern = r.option("io-pattern")
	}
	if b.pattern != "seq" && b.pattern != "rand" && b.pattern != "full-seq" {
		return nil, &rbdFailure{1, "the argument for option '--io-pattern' is invalid"}
	}
	for name, to := range map[string]*int64{"io-size": &b.ioSize, "io-total": &b.total} {
		if r.has(name) {
			var err error
			if *to, err = r.size(name, 1); err != nil {
				return nil, err
			}
		}
	}
	for name, to := range map[string]*int{"io-threads": &b.threads, "rw-mix-read": &b.mix} {
		if r.has(name) {
			n, err := r.number(name)
			if err != nil {
				return nil, err
			}
			*to = int(n)
		}
	}
	return b, b.check()
}

func (b *rbdBench) check() error {
	switch {
	case b.ioSize <= 0:
		return rbdInvalid("--io-size should be greater than zero.")
	case b.threads <= 0:
		return rbdInvalid("--io-threads should be greater than zero.")
	case b.mix > 100:
		return rbdInvalid("--rw-mix-read should not be larger than 100.")
	case b.ioSize >= 4<<30:
		return rbdInvalid("io-size should be less than 4G")
	case int64(b.threads) > benchMemory/b.ioSize:
		return rbdInvalid("--io-size times --io-threads should not be larger than %s.", rbdSize(benchMemory))
	}
	return nil
}

func (b *rbdBench) mixText() string {
	if b.kind != "readwrite" {
		return ""
	}
	return fmt.Sprintf(" read:write=%d:%d", b.mix, 100-b.mix)
}

// start picks where each thread begins: "seq" is one stream for each at a place
// of its own, "full-seq" is one stream that they share.
func (b *rbdBench) start(size int64) {
	b.places = size / b.ioSize
	b.mu.at = make([]int64, b.threads)
	for i := range b.mu.at {
		if b.pattern != "full-seq" {
			b.mu.at[i] = rand.Int64N(b.places)
		}
	}
}

// next gives a thread its next request; ok is false when the total is reached or
// one has failed.
func (b *rbdBench) next(thread int) (off int64, op int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.begun*b.ioSize >= b.total || b.mu.firstErr != nil {
		return 0, 0, false
	}
	b.mu.begun++
	if b.pattern == "full-seq" {
		thread = 0
	}
	place := b.mu.at[thread] % b.places
	if b.mu.at[thread]++; b.pattern == "rand" {
		place = rand.Int64N(b.places)
	}
	if b.kind == "write" || b.kind == "readwrite" && rand.IntN(100) >= b.mix {
		op = benchWrite
	}
	return place * b.ioSize, op, true
}

// done counts a request that has ended.
func (b *rbdBench) done(op int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		b.mu.ops[op]++
	} else if b.mu.firstErr == nil {
		b.mu.firstErr = fail([]string{"read error", "write error"}[op], err)
	}
}

// count returns how many reads and writes have ended.
func (b *rbdBench) count() [2]int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.ops
}

// thread sends one request after the other.
func (b *rbdBench) thread(ctx context.Context, d *transfer.NBD, i int) {
	buf := bytes.Repeat([]byte{byte(rand.Uint32())}, int(b.ioSize))
	for {
		off, op, ok := b.next(i)
		if !ok {
			return
		}
		if op == benchWrite {
			b.done(op, d.WriteAt(ctx, buf, off))
		} else {
			b.done(op, d.ReadAt(ctx, buf, off))
		}
	}
}

// benchRun sends the requests, flushes, and prints a line each second.
func (r *rbdCall) benchRun(ctx context.Context, b *rbdBench, d *transfer.NBD) error {
	var wg sync.WaitGroup
	for i := range b.threads {
		wg.Go(func() { b.thread(ctx, d, i) })
	}
	ended := make(chan struct{})
	go func() {
		wg.Wait()
		close(ended)
	}()
	r.benchLines(b, ended)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case b.mu.firstErr != nil || b.kind == "read":
		return b.mu.firstErr
	}
	return fail("failed to flush at the end", d.Flush(ctx))
}

// benchLines prints what the last five seconds brought, each second.
func (r *rbdCall) benchLines(b *rbdBench, ended <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	type point struct {
		at  time.Time
		ops int64
	}
	begin := time.Now()
	window := []point{{begin, 0}}
	for {
		select {
		case <-ended:
			return
		case now := <-tick.C:
			ops := b.count()
			p := point{now, ops[benchRead] + ops[benchWrite]}
			if window = append(window, p); len(window) > 6 {
				window = window[1:]
			}
			perSec := float64(p.ops-window[0].ops) / p.at.Sub(window[0].at).Seconds()
			fmt.Fprintf(r.Out, "%5d%10d%10.6g%10s/s\n", int(now.Sub(begin).Round(time.Second).Seconds()), p.ops, perSec, rbdSize(int64(perSec*float64(b.ioSize))))
		}
	}
}

// benchResult prints what it came to.
func (r *rbdCall) benchResult(b *rbdBench, took time.Duration) {
	ops := b.count()
	rate := func(n int64) (perSec float64, speed string) {
		perSec = float64(n) / took.Seconds()
		return perSec, rbdSize(int64(perSec * float64(b.ioSize)))
	}
	perSec, speed := rate(ops[benchRead] + ops[benchWrite])
	fmt.Fprintf(r.Out, "elapsed: %d   ops: %d   ops/sec: %.6g   bytes/sec: %s/s\n", int(took.Seconds()), ops[benchRead]+ops[benchWrite], perSec, speed)
	if b.kind != "readwrite" {
		return
	}
	for op, name := range []string{"read", "write"} {
		perSec, speed := rate(ops[op])
		fmt.Fprintf(r.Out, "%s_ops: %d   %s_ops/sec: %.6g   %s_bytes/sec: %s/s\n", name, ops[op], name, perSec, name, speed)
	}
}
