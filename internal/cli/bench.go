package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// benchOptions are the flags of "volume bench".
type benchOptions struct {
	pattern  string
	depth    int
	conns    int
	duration time.Duration
	fua      bool
	blockStr string
	block    int64
}

// benchResult is what it prints.
type benchResult struct {
	Pattern   string  `json:"pattern"`
	Depth     int     `json:"depth"`
	Block     int64   `json:"blockBytes"`
	Ops       int     `json:"ops"`
	OpsPerSec float64 `json:"opsPerSecond"`
	Bytes     float64 `json:"bytesPerSecond"`
	P50       int64   `json:"p50Microseconds"`
	P99       int64   `json:"p99Microseconds"`
	Max       int64   `json:"maxMicroseconds"`
}

func (a *App) volumeBench() *cobra.Command {
	var o benchOptions
	cmd := &cobra.Command{
		Use:     "bench NAME",
		Short:   "Measure a volume; the write patterns overwrite its data",
		Example: "  atoll volume create scratch 4G\n  atoll volume bench scratch --pattern randwrite --depth 32 --yes",
		Args:    exactArgs(1, "a volume's name"),
	}
	var yes bool
	cmd.Flags().StringVar(&o.pattern, "pattern", "randread", "read, write, randread or randwrite")
	cmd.Flags().IntVar(&o.depth, "depth", 32, "requests in flight")
	cmd.Flags().IntVar(&o.conns, "connections", 1, "NBD connections")
	cmd.Flags().StringVar(&o.blockStr, "block", "4K", "bytes per request, at most 32M")
	cmd.Flags().DurationVar(&o.duration, "duration", 5*time.Second, "how long")
	cmd.Flags().BoolVar(&o.fua, "fua", false, "make each write durable before its reply")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before overwriting")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		size, err := parseSize(o.blockStr)
		if err != nil {
			return err
		}
		if size <= 0 || size > 32<<20 || o.depth < 1 || o.depth > 1024 || o.conns < 1 || o.conns > 64 {
			return usagef("want --block up to 32M, --depth up to 1024 and --connections up to 64")
		}
		o.block = size
		if !slices.Contains([]string{"read", "write", "randread", "randwrite"}, o.pattern) {
			return usagef("unknown pattern %q; want read, write, randread or randwrite", o.pattern)
		}
		if strings.Contains(o.pattern, "write") && !yes {
			if ok, err := a.confirm("overwrite the data of volume %s?", args[0]); err != nil || !ok {
				return err
			}
		}
		return a.runBench(cmd, args[0], o)
	}
	return cmd
}

func (a *App) runBench(cmd *cobra.Command, name string, o benchOptions) error {
	v, err := a.volume(cmd, name, false)
	if err != nil {
		return err
	}
	d, err := openVolume(cmd.Context(), v, o.conns)
	if err != nil {
		return err
	}
	defer d.Close()
	if d.Size() < o.block {
		return fmt.Errorf("bench with blocks of %d bytes on a volume of %d: %w", o.block, d.Size(), atoll.ErrTooLarge)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), o.duration)
	defer cancel()
	write := func(ctx context.Context, p []byte, off int64) error { return d.WriteAt(ctx, p, off) }
	if o.fua {
		write = d.WriteDurable
	}
	one := d.ReadAt
	if strings.Contains(o.pattern, "write") {
		one = write
	}
	start := time.Now()
	lat, err := benchWorkers(ctx, o, d.Size(), one)
	took := time.Since(start)
	if err != nil && ctx.Err() == nil {
		return err
	}
	if cmd.Context().Err() != nil {
		return cmd.Context().Err()
	}
	return a.printBench(o, lat, took)
}

// benchWorkers keeps depth requests in flight until the context ends.
func benchWorkers(ctx context.Context, o benchOptions, size int64, one func(context.Context, []byte, int64) error) ([]time.Duration, error) {
	var mu sync.Mutex
	var all []time.Duration
	var firstErr error
	var next int64
	places := size / o.block
	var wg sync.WaitGroup
	for w := range o.depth {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), uint64(time.Now().UnixNano())))
			buf := host.Alloc(int(o.block))
			defer buf.Release()
			for i := range buf.Bytes() {
				buf.Bytes()[i] = byte(rng.Uint32())
			}
			var mine []time.Duration
			for ctx.Err() == nil {
				at := rng.Int64N(places)
				if !strings.HasPrefix(o.pattern, "rand") {
					mu.Lock()
					at = next % places
					next++
					mu.Unlock()
				}
				t := time.Now()
				if err := one(ctx, buf.Bytes(), at*o.block); err != nil {
					mu.Lock()
					if firstErr == nil && ctx.Err() == nil {
						firstErr = err
					}
					mu.Unlock()
					break
				}
				mine = append(mine, time.Since(t))
			}
			mu.Lock()
			all = append(all, mine...)
			mu.Unlock()
		})
	}
	wg.Wait()
	return all, firstErr
}

func (a *App) printBench(o benchOptions, lat []time.Duration, took time.Duration) error {
	if len(lat) == 0 {
		return fmt.Errorf("bench: no request finished within %s: %w", o.duration, atoll.ErrTimeout)
	}
	slices.Sort(lat)
	pct := func(p float64) int64 { return lat[min(len(lat)-1, int(float64(len(lat))*p))].Microseconds() }
	r := benchResult{Pattern: o.pattern, Depth: o.depth, Block: o.block, Ops: len(lat),
		OpsPerSec: float64(len(lat)) / took.Seconds(), P50: pct(.5), P99: pct(.99), Max: lat[len(lat)-1].Microseconds()}
	r.Bytes = r.OpsPerSec * float64(o.block)
	if a.output != "table" {
		b, err := json.Marshal(r)
		if err == nil {
			fmt.Fprintln(a.Out, string(b))
		}
		return err
	}
	fmt.Fprintf(a.Out, "%s of %s at depth %d: %.0f/s, %s/s; latency p50 %d µs, p99 %d µs, longest %d µs\n",
		o.pattern, FormatSize(o.block), o.depth, r.OpsPerSec, FormatSize(int64(r.Bytes)), r.P50, r.P99, r.Max)
	return nil
}
