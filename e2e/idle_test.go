package e2e_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// metrics fetches the metrics whose name has the prefix.
func metrics(t *testing.T, s *server, prefix string) string {
	t.Helper()
	resp := get(t, s, "/metrics")
	var out []string
	for _, line := range strings.Split(resp, "\n") {
		if strings.HasPrefix(line, prefix) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

// get fetches a page of the API's server, with the credential.
func get(t *testing.T, s *server, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+s.api()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(filepath.Join(s.data, "credential"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("GET %s: %s, %v\n%.200s", path, resp.Status, err, body)
	}
	return string(body)
}

// cpuAndMemory reads what the process has used so far.
func cpuAndMemory(t *testing.T, pid int) (cpu time.Duration, rss int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	user, _ := strconv.ParseInt(f[11], 10, 64)
	sys, _ := strconv.ParseInt(f[12], 10, 64)
	pages, _ := strconv.ParseInt(f[21], 10, 64)
	return time.Duration(user+sys) * 10 * time.Millisecond, pages * int64(os.Getpagesize())
}

// A server with nothing to do uses little memory and next to no processor time,
// and serves only what it says.
func TestIdle(t *testing.T) {
	t.Parallel()
	need(t, "ss", "curl")
	s := newServer(t)
	s.args = append(s.args, "--spare", "3") // as by default
	s.start()
	s.atoll("volume", "create", "disk1", "1G")
	time.Sleep(5 * time.Second) // files are prewritten meanwhile
	before, _ := cpuAndMemory(t, s.cmd.Process.Pid)
	begin := time.Now()
	time.Sleep(10 * time.Second)
	after, rss := cpuAndMemory(t, s.cmd.Process.Pid)
	percent := 100 * float64(after-before) / float64(time.Since(begin))
	t.Logf("idle: %d MiB resident (goal 150), %.2f %% of a core (goal 1)", rss>>20, percent)
	if rss > 200<<20 {
		t.Errorf("an idle server has %d MiB resident", rss>>20)
	}
	if percent > 25 { // something turns round and round
		t.Errorf("an idle server uses %.2f %% of a core", percent)
	}
	allowed := map[string]bool{}
	for _, a := range []string{s.api(), s.nbd, fmt.Sprintf("127.0.0.1:%d", s.port+1), fmt.Sprintf("127.0.0.1:%d", s.port+2)} {
		allowed[a] = true
	}
	seen := 0
	for _, line := range strings.Split(run(t, "ss", "-lntuxpH"), "\n") {
		if !strings.Contains(line, fmt.Sprintf("pid=%d,", s.cmd.Process.Pid)) {
			continue
		}
		addr := strings.Fields(line)[4]
		switch {
		case allowed[addr]:
			seen++
		case strings.HasPrefix(addr, s.data+"/"), addr == "/run/atoll/api.sock", strings.HasPrefix(addr, s.dir+"/"):
		default:
			t.Errorf("the server listens on %s:\n%s", addr, line)
		}
	}
	if seen != 4 {
		t.Errorf("%d of 4 ports are seen", seen)
	}
	for _, secret := range []string{"credential", "keys/member.key", "ca"} {
		st, err := os.Stat(filepath.Join(s.data, secret))
		if err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v %v", secret, st.Mode(), err)
		}
	}
	// What members and etcd's peers listen on answers nobody without the
	// cluster's certificates.
	for p := s.port + 1; p <= s.port+2; p++ {
		for _, scheme := range []string{"http", "https"} {
			r := command(t, os.Environ(), "", "curl", "-sk", "-m", "5", fmt.Sprintf("%s://127.0.0.1:%d/version", scheme, p))
			if r.code == 0 && !strings.Contains(r.out, "HTTP request to an HTTPS server") {
				t.Errorf("port %d answers a stranger over %s: %q", p, scheme, r.out)
			}
		}
	}
	text := get(t, s, "/metrics")
	for _, name := range []string{"atoll_build_info", "atoll_nbd_request_duration_seconds", "atoll_append_duration_seconds", "atoll_node_queue_duration_seconds",
		"atoll_node_commit_duration_seconds", "atoll_nbd_connections", "process_resident_memory_bytes"} {
		if !strings.Contains(text, name) {
			t.Errorf("no %s in the metrics", name)
		}
	}
	if got := strings.TrimSpace(get(t, s, "/healthz")); !strings.HasPrefix(got, "ok") {
		t.Errorf("/healthz says %q", got)
	}
}

// Under load the server keeps within the memory that it was given, and a little
// for itself.
func TestMemory(t *testing.T) {
	t.Parallel()
	s := startServer(t, "--memory", "128M", "--log-level", "warn")
	uri := s.create("disk1", "1G", "--replicas", "1")
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			c, err := dialer(uri)(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			p := make([]byte, 1<<20)
			for i := range 96 {
				off := int64(w*96+i) << 20
				fillStamp(p, off, uint64(i))
				err := c.WriteAt(t.Context(), p, off, false)
				for k := 0; k < 16 && err == nil; k++ { // odd pieces make the map and the cache work
					at := rng.Int64N(768<<20) &^ 511
					err = c.WriteAt(t.Context(), p[:512*(1+rng.IntN(40))], at, false)
					if err == nil {
						err = c.ReadAt(t.Context(), p[:64<<10], rng.Int64N(700<<20))
					}
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var peak int64
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "VmHWM:" {
			peak, _ = strconv.ParseInt(f[1], 10, 64)
		}
	}
	t.Logf("with --memory 128M at most %d MiB were resident", peak>>10)
	if peak>>10 > 128*3/2+160 {
		t.Errorf("with --memory 128M %d MiB were resident", peak>>10)
	}
}
