package nbd

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// BenchmarkFio drives a server over an in-memory device with fio's nbd engine
// on a Unix socket, and nbdkit's memory plugin in the same run. It reports
// requests and the server's CPU time for each. Run it with -benchtime=1x.
func BenchmarkFio(b *testing.B) {
	for _, program := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(program); err != nil {
			b.Skip(err)
		}
	}
	const size = 1 << 30
	sh, m := newShelf("disk", size)
	fill := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(fill)) {
		if err := m.Write(b.Context(), nil, fill, off, false); err != nil {
			b.Fatal(err)
		}
	}
	_, ours := serveUnix(b, sh, "disk", Options{Metrics: nil})
	theirs, pid := startNbdkit(b, "memory", strconv.Itoa(size))
	if out, err := exec.Command("fio", fioArgs(theirs, "write", "1M", 8, 0)...).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	jobs := []struct {
		rw, bs string
		depth  int
	}{
		{"randread", "4k", 1}, {"randwrite", "4k", 1}, {"randread", "4k", 32}, {"randwrite", "4k", 32},
		{"read", "1M", 8}, {"write", "1M", 8},
	}
	for _, j := range jobs {
		name := fmt.Sprintf("%s/%s/qd%d", j.rw, j.bs, j.depth)
		b.Run(name+"/atoll", func(b *testing.B) { runFio(b, ours, os.Getpid(), fioArgs(ours, j.rw, j.bs, j.depth, 2)) })
		b.Run(name+"/nbdkit", func(b *testing.B) { runFio(b, theirs, pid, fioArgs(theirs, j.rw, j.bs, j.depth, 2)) })
	}
}

// fioArgs returns fio's command line. With no seconds it goes once over all.
func fioArgs(uri, rw, bs string, depth, seconds int) []string {
	args := []string{"--name=j", "--ioengine=nbd", "--uri=" + uri, "--rw=" + rw, "--bs=" + bs,
		"--iodepth=" + strconv.Itoa(depth), "--output-format=json", "--thread", "--randrepeat=0"}
	if seconds > 0 {
		args = append(args, "--time_based", "--runtime="+strconv.Itoa(seconds))
	}
	return args
}

// runFio runs fio once for each iteration and reports the last.
func runFio(b *testing.B, uri string, pid int, args []string) {
	for range b.N {
		before := cpuTime(b, pid)
		out, err := exec.Command("fio", args...).Output()
		if err != nil {
			b.Fatalf("fio on %s: %v: %s", uri, err, out)
		}
		used := cpuTime(b, pid) - before
		text := string(out)
		var result struct {
			Jobs []struct {
				Read, Write struct {
					TotalIOs int64 `json:"total_ios"`
					IOPS     float64
					Clat     struct{ Percentile map[string]float64 } `json:"clat_ns"`
				}
			}
		}
		if err := json.Unmarshal([]byte(text[strings.Index(text, "{"):]), &result); err != nil {
			b.Fatal(err)
		}
		r := result.Jobs[0].Read
		if r.TotalIOs == 0 {
			r = result.Jobs[0].Write
		}
		b.ReportMetric(r.IOPS, "req/s")
		b.ReportMetric(float64(used.Microseconds())/float64(r.TotalIOs), "cpu-µs/req")
		b.ReportMetric(r.Clat.Percentile["99.000000"]/1000, "p99-µs")
		b.ReportMetric(0, "ns/op")
	}
}

// cpuTime returns the CPU time that a process has used.
func cpuTime(b *testing.B, pid int) time.Duration {
	if pid == os.Getpid() {
		var ru syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
			b.Fatal(err)
		}
		return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')'):]))
	user, _ := strconv.Atoi(f[12])
	sys, _ := strconv.Atoi(f[13])
	return time.Duration(user+sys) * 10 * time.Millisecond
}

// startNbdkit runs nbdkit on a Unix socket until the end of the test.
func startNbdkit(t testing.TB, args ...string) (uri string, pid int) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	cmd := exec.Command("nbdkit", append([]string{"-f", "-U", path, "-P", filepath.Join(dir, "pid")}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	for range 6000 {
		if _, err := os.Stat(filepath.Join(dir, "pid")); err == nil {
			return Address{Network: "unix", Addr: path}.String(), cmd.Process.Pid
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("nbdkit does not start")
	return "", 0
}
