// Command bench measures Atoll beside the bare disk and beside other NBD servers
// on the same disk in the same run, with fio, and prints medians and ratios.
//
// Shared machines are noisy: rounds are interleaved (each target once per round)
// and only numbers of one run may be compared. Usage: make bench, or
//
//	go run ./bench -rounds 3 -seconds 5 -only randwrite
//
// Scenarios named "versions …" measure backup, clone, restore, export, import,
// reclaim and the module for Python in the same way; -only versions runs these.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// workload is one fio job.
type workload struct {
	name  string
	args  []string
	bytes bool // report bytes per second instead of operations
	write bool
}

var workloads = []workload{
	{"4K randwrite QD1", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1"}, false, true},
	{"4K randwrite QD32", []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}, false, true},
	{"4K randread QD1", []string{"--rw=randread", "--bs=4k", "--iodepth=1"}, false, false},
	{"4K randread QD32", []string{"--rw=randread", "--bs=4k", "--iodepth=32"}, false, false},
	{"1M seqwrite QD8", []string{"--rw=write", "--bs=1m", "--iodepth=8"}, true, true},
	{"1M seqread QD8", []string{"--rw=read", "--bs=1m", "--iodepth=8"}, true, false},
}

// target is a disk under test.
type target struct {
	name string
	args []string // for fio
	long []string // for fio's sequential jobs, if not args
	pid  int      // of the server, 0 without one
	skip func(w workload) bool
}

// sample is one measurement.
type sample struct {
	rate float64 // operations or bytes per second
	p50  float64 // microseconds
	p99  float64
	cpu  float64 // microseconds of the server's CPU per operation
}

type bench struct {
	dir     string
	size    string
	seconds int
	fio     string
	procs   []*exec.Cmd
	ports   []int // of the servers of Atoll
}

func main() {
	rounds := flag.Int("rounds", 3, "rounds; medians are reported")
	seconds := flag.Int("seconds", 5, "seconds for each measurement")
	size := flag.String("size", "4G", "volume size")
	dir := flag.String("dir", "", "directory on the disk to measure (default: a new one here)")
	only := flag.String("only", "", "regular expression: workloads to run")
	targets := flag.String("targets", "", "regular expression: targets to run")
	atoll := flag.String("atoll", "bin/atoll", "the binary to measure")
	scale := flag.Int64("scale", 1, "divide the sizes of the scenarios named versions")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	filter := regexp.MustCompile(*only)
	var err error
	if slices.ContainsFunc(workloads, func(w workload) bool { return filter.MatchString(w.name) }) {
		err = run(ctx, *rounds, *seconds, *size, *dir, *only, *targets, *atoll)
	}
	if err == nil {
		err = measureVersions(ctx, *atoll, *dir, *rounds, *seconds, *scale, filter)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds, seconds int, size, dir, only, pick, atoll string) (err error) {
	fio, err := exec.LookPath("fio")
	if err != nil {
		return fmt.Errorf("fio is not installed (make packages): %w", err)
	}
	if dir == "" {
		if dir, err = os.MkdirTemp(".", "bench-data-"); err != nil {
			return err
		}
		defer os.RemoveAll(dir)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	b := &bench{dir: dir, size: size, seconds: seconds, fio: fio}
	defer b.stop()
	all, err := b.start(ctx, atoll, regexp.MustCompile(pick))
	if err != nil {
		return err
	}
	filter := regexp.MustCompile(only)
	results := map[string]map[string][]sample{}
	defer func() { report(os.Stdout, all, results) }() // also of what was measured before an error
	for round := range rounds {
		for _, w := range workloads {
			if !filter.MatchString(w.name) {
				continue
			}
			for _, t := range all {
				if t.skip != nil && t.skip(w) {
					continue
				}
				fmt.Fprintf(os.Stderr, "round %d  %-18s %s\n", round+1, w.name, t.name)
				s, err := b.measure(ctx, w, t)
				if err != nil {
					return fmt.Errorf("%s on %s: %w", w.name, t.name, err)
				}
				if results[w.name] == nil {
					results[w.name] = map[string][]sample{}
				}
				results[w.name][t.name] = append(results[w.name][t.name], s)
			}
		}
	}
	return nil
}

// start prepares the files and servers.
func (b *bench) start(ctx context.Context, atoll string, pick *regexp.Regexp) ([]target, error) {
	raw := filepath.Join(b.dir, "raw")
	if out, err := exec.CommandContext(ctx, b.fio, "--name=fill", "--filename="+raw, "--size="+b.size, "--rw=write", "--bs=1m", "--direct=1", "--end_fsync=1").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("fill %s: %v\n%s", raw, err, out)
	}
	bare := []string{"--ioengine=libaio", "--direct=1", "--filename=" + raw, "--size=" + b.size}
	var all []target
	add := func(t target) {
		if pick.MatchString(t.name) {
			all = append(all, t)
		}
	}
	add(target{name: "bare disk", args: bare})
	add(target{name: "bare, fdatasync each", args: append([]string{"--fdatasync=1"}, bare...), skip: func(w workload) bool { return !w.write || w.bytes }})
	for _, t := range []struct {
		name, cache string
		skip        func(workload) bool
	}{
		{"qemu-nbd cache=none", "none", nil},
		{"qemu-nbd writethrough", "writethrough", func(w workload) bool { return !w.write }},
	} {
		if _, err := exec.LookPath("qemu-nbd"); err != nil || !pick.MatchString(t.name) {
			continue
		}
		sock := filepath.Join(b.dir, "qemu-"+t.cache+".sock")
		cmd, err := b.spawn(ctx, "qemu-nbd", "--cache="+t.cache, "-f", "raw", "-t", "-e", "8", "-k", sock, raw)
		if err != nil {
			return nil, err
		}
		add(target{name: t.name, args: []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + sock}, pid: cmd.Process.Pid, skip: t.skip})
	}
	for _, cache := range []string{"writethrough", "writeback"} {
		if !pick.MatchString("atoll " + cache) {
			continue
		}
		t, err := b.startAtoll(ctx, atoll, cache)
		if err != nil {
			return nil, err
		}
		add(t)
	}
	return all, b.settle(ctx)
}

// startAtoll starts a server with three nodes on this disk and a filled volume.
func (b *bench) startAtoll(ctx context.Context, atoll, cache string) (target, error) {
	data := filepath.Join(b.dir, cache)
	if err := os.MkdirAll(data, 0o700); err != nil {
		return target{}, err
	}
	port := 17400
	if cache == "writeback" {
		port = 17500
	}
	// A small cache, so that random reads reach the disk.
	cmd, err := b.spawn(ctx, atoll, "server", "--data", data, "--nbd", "none", "--memory", "128M",
		"--listen", "127.0.0.1:"+strconv.Itoa(port), "--log-level", "warn")
	if err != nil {
		return target{}, err
	}
	api := "unix:" + filepath.Join(data, "api.sock")
	if err := await(ctx, fmt.Sprintf("http://127.0.0.1:%d/healthz", port)); err != nil {
		return target{}, err
	}
	// A volume for sequential jobs, because random writes scatter a volume in the
	// log, and then reading it in order is not a sequential read any more.
	volumes := []string{"disk", "long"}
	for _, volume := range volumes {
		if out, err := exec.CommandContext(ctx, atoll, "--server", api, "volume", "create", volume, b.size, "--cache", cache).CombinedOutput(); err != nil {
			return target{}, fmt.Errorf("create volume %s: %v\n%s", volume, err, out)
		}
	}
	args := func(volume string) []string {
		return []string{"--ioengine=nbd", "--uri=nbd+unix:///" + volume + "?socket=" + filepath.Join(data, "nbd.sock")}
	}
	// The bare disk's file is written anew in place. What that is to a log, is to
	// write again what was written, into the files of segments that became free;
	// so there must be some, and the long volume is filled twice.
	for _, volume := range append(volumes, "long") {
		if out, err := exec.CommandContext(ctx, b.fio, append([]string{"--name=fill", "--size=" + b.size, "--rw=write", "--bs=1m", "--iodepth=8"}, args(volume)...)...).CombinedOutput(); err != nil {
			return target{}, fmt.Errorf("fill the volume: %v\n%s", err, out)
		}
	}
	b.ports = append(b.ports, port)
	return target{name: "atoll " + cache, args: args("disk"), long: args("long"), pid: cmd.Process.Pid}, nil
}

// recycled waits until the segments that became free are ready for use again,
// which is so after a grace time.
func (b *bench) recycled(ctx context.Context, port int) error {
	most, since := -1.0, time.Now()
	for start := time.Now(); time.Since(start) < time.Minute; {
		n, err := gauge(ctx, fmt.Sprintf("http://127.0.0.1:%d/metrics", port), "atoll_node_spare_slots")
		if err != nil {
			return err
		}
		if n > most {
			most, since = n, time.Now()
		}
		if time.Since(start) > 25*time.Second && time.Since(since) > 5*time.Second {
			break
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// gauge returns the value of a metric, 0 if there is none of that name.
func gauge(ctx context.Context, url, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(v), 64)
		}
	}
	return 0, nil
}

// spawn starts a server that stop ends.
func (b *bench) spawn(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	b.procs = append(b.procs, cmd)
	return cmd, nil
}

// settle waits until the servers' sockets answer and the disk is quiet.
func (b *bench) settle(ctx context.Context) error {
	for _, port := range b.ports {
		if err := b.recycled(ctx, port); err != nil {
			return err
		}
	}
	syscall.Sync()
	select {
	case <-time.After(3 * time.Second):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *bench) stop() {
	for _, c := range b.procs {
		_ = c.Process.Signal(syscall.SIGTERM)
	}
	for _, c := range b.procs {
		_ = c.Wait()
	}
}

// await waits for an HTTP 200.
func await(ctx context.Context, url string) error {
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) && ctx.Err() == nil {
		if resp, err := http.Get(url); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		<-time.After(20 * time.Millisecond)
	}
	return fmt.Errorf("%s does not answer", url)
}

// measure runs one workload on one target.
func (b *bench) measure(ctx context.Context, w workload, t target) (sample, error) {
	args := append([]string{"--name=j", "--output-format=json", "--time_based", "--runtime=" + strconv.Itoa(b.seconds),
		"--ramp_time=1", "--size=" + b.size, "--randrepeat=0", "--norandommap"}, w.args...)
	args = append(args, t.args...)
	if w.bytes && t.long != nil {
		args = append(args[:len(args)-len(t.args)], t.long...)
	}
	before := cpu(t.pid)
	out, err := exec.CommandContext(ctx, b.fio, args...).Output()
	if err != nil {
		return sample{}, err
	}
	used := cpu(t.pid) - before
	var res struct {
		Jobs []struct {
			Read, Write struct {
				IOPS     float64 `json:"iops"`
				BW       float64 `json:"bw_bytes"`
				TotalIOs float64 `json:"total_ios"`
				Clat     struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			}
		}
	}
	if i := strings.IndexByte(string(out), '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &res); err != nil || len(res.Jobs) == 0 {
		return sample{}, fmt.Errorf("fio's answer: %v", err)
	}
	r := res.Jobs[0].Read
	if w.write {
		r = res.Jobs[0].Write
	}
	s := sample{rate: r.IOPS, p50: r.Clat.Percentile["50.000000"] / 1e3, p99: r.Clat.Percentile["99.000000"] / 1e3}
	if w.bytes {
		s.rate = r.BW
	}
	if t.pid != 0 && r.IOPS > 0 {
		// The ramp second counts in the CPU but not in the operations.
		s.cpu = used.Seconds() * 1e6 / (r.IOPS * float64(b.seconds+1))
	}
	return s, nil
}

// cpu returns the CPU time that a process has used.
func cpu(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	sys, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+sys) * 10 * time.Millisecond
}

// report prints the medians as a table.
func report(w io.Writer, all []target, results map[string]map[string][]sample) {
	fmt.Fprintf(w, "\n%-18s  %-22s  %12s  %9s  %9s  %8s  %9s\n", "workload", "target", "median", "p50 µs", "p99 µs", "of bare", "CPU µs/op")
	for _, wl := range workloads {
		bare := median(results[wl.name]["bare disk"], func(s sample) float64 { return s.rate })
		for _, t := range all {
			samples := results[wl.name][t.name]
			if len(samples) == 0 {
				continue
			}
			rate := median(samples, func(s sample) float64 { return s.rate })
			text := fmt.Sprintf("%.1fk/s", rate/1e3)
			if wl.bytes {
				text = fmt.Sprintf("%.2f GB/s", rate/1e9)
			}
			ratio, used := "-", "-"
			if bare > 0 {
				ratio = fmt.Sprintf("%.2f", rate/bare)
			}
			if c := median(samples, func(s sample) float64 { return s.cpu }); c > 0 {
				used = fmt.Sprintf("%.1f", c)
			}
			fmt.Fprintf(w, "%-18s  %-22s  %12s  %9.0f  %9.0f  %8s  %9s\n", wl.name, t.name, text,
				median(samples, func(s sample) float64 { return s.p50 }), median(samples, func(s sample) float64 { return s.p99 }), ratio, used)
		}
	}
}

func median(samples []sample, f func(sample) float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	v := make([]float64, len(samples))
	for i, s := range samples {
		v[i] = f(s)
	}
	sort.Float64s(v)
	return v[len(v)/2]
}
