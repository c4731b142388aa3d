package e2e_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The first five minutes of a user, in one process with the defaults.
func TestFirstSteps(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	t.Logf("ready after %v", s.took.Round(time.Millisecond))
	if out := s.atoll("status"); !strings.HasPrefix(out, "HEALTHY") || !strings.Contains(out, "3 nodes") {
		t.Errorf("status:\n%s", out)
	}
	if nodes := s.nodes(); len(nodes) != 3 || !nodes[0].Up || nodes[2].ID != 3 {
		t.Errorf("nodes: %+v", nodes)
	}
	out := s.atoll("volume", "create", "disk1", "1G")
	if !strings.Contains(out, "disk1: 1 GiB, thin, 3 copies") || !strings.Contains(out, "nbd+unix:///disk1?socket=") {
		t.Errorf("create says %q", out)
	}
	need(t, "nbdinfo")
	for _, uri := range strings.Fields(s.atoll("volume", "url", "disk1", "--all")) {
		if size := strings.TrimSpace(run(t, "nbdinfo", "--size", uri)); size != "1073741824" {
			t.Errorf("%s has size %s", uri, size)
		}
	}
	var list struct{ Volumes []volumeJSON }
	s.ask(&list, "volume", "ls")
	if len(list.Volumes) != 1 || list.Volumes[0].SizeBytes != 1<<30 || list.Volumes[0].Replicas != 3 {
		t.Errorf("volumes: %+v", list)
	}
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 8M", s.uri("disk1"))
	if out := s.atoll("volume", "info", "disk1"); !strings.Contains(out, "size         1 GiB") || !strings.Contains(out, "mapped       8 MiB") {
		t.Errorf("info:\n%s", out)
	}
	if out := s.atoll("volume", "ls"); !strings.Contains(out, "disk1  1 GiB") {
		t.Errorf("ls:\n%s", out)
	}
	if out := s.atoll("volume", "resize", "disk1", "2G"); out != "disk1: 2 GiB\n" {
		t.Errorf("resize says %q", out)
	}
	if r := s.try("volume", "resize", "disk1", "1G"); r.code == 0 {
		t.Error("shrinking needs no --shrink")
	}
	s.atoll("volume", "resize", "disk1", "512M", "--shrink")
	if size := strings.TrimSpace(run(t, "nbdinfo", "--size", s.uri("disk1"))); size != "536870912" {
		t.Errorf("after shrinking, clients see size %s", size)
	}
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 8M", "-c", "read -P 0 8M 8M", s.uri("disk1"))
	if out := s.atoll("volume", "check", "disk1", "--read"); !strings.Contains(out, "disk1 is consistent") {
		t.Errorf("check says %q", out)
	}
	s.atoll("doctor")
	if r := s.try("volume", "bench", "disk1", "--pattern", "randwrite"); r.code != 2 {
		t.Errorf("bench overwrites without --yes: %+v", r)
	}
	if out := s.atoll("volume", "bench", "disk1", "--pattern", "randwrite", "--yes", "--fua", "--duration", "500ms"); !strings.Contains(out, "/s") {
		t.Errorf("bench says %q", out)
	}
	if out := s.atoll("volume", "rm", "disk1", "-n"); !strings.Contains(out, "would delete disk1") {
		t.Errorf("rm -n says %q", out)
	}
	s.atoll("volume", "rm", "disk1", "--now", "--yes")
	if out := s.atoll("volume", "ls", "-q"); strings.Contains(out, "disk1") {
		t.Errorf("ls after rm:\n%s", out)
	}
}

// A stopped server finds everything again.
func TestRestart(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	s := startServer(t)
	uri := s.create("disk1", "256M")
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 3 0 20M", "-c", "write -P 4 100M 4k", "-c", "write -z 1M 1M", uri)
	s.stop()
	s.start()
	run(t, "qemu-io", "-f", "raw", "-c", "read -P 3 0 1M", "-c", "read -P 0 1M 1M", "-c", "read -P 3 2M 18M",
		"-c", "read -P 4 100M 4k", "-c", "read -P 0 101M 1M", s.uri("disk1"))
	s.atoll("volume", "check", "disk1", "--read")
}

// Wrong input is answered with an exit code and a text that helps.
func TestBadCommands(t *testing.T) {
	t.Parallel()
	s := startServer(t, "--log-level", "warn")
	s.atoll("volume", "create", "disk1", "64M")
	empty := filepath.Join(s.dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		code int
		text string
	}{
		{"volume create x 0", 2, "no unit"},
		{"volume create x 10", 2, `10G for GiB`},
		{"volume create x 10Q", 2, `unknown unit "Q"`},
		{"volume create x G", 2, "want a number"},
		{"volume create x -- -5G", 2, "want a number"},
		{"volume create x 0B", 2, "smallest volume"},
		{"volume create x 0G", 2, "smallest volume"},
		{"volume create x 4097B", 2, "multiple of 4096, for example 8192"},
		{"volume create x 10KB", 2, "multiple of 4096"},
		{"volume create x 65T", 2, "64 TiB"},
		{"volume create x 99999999999T", 2, "too large"},
		{"volume create disk1 1G", 4, `"disk1"`},
		{"volume create x 1G --replicas 4", 2, "there are 3"},
		{"volume create x 1G --replicas -1", 2, "want 1 to"},
		{"volume create x 1G --cache fast", 2, "writeback or writethrough"},
		{"volume create a//b 1G", 2, "a//b"},
		{"volume create a@b 1G", 2, "a@b"},
		{"volume create x", 2, "atoll volume create disk1 10G"},
		{"volume info disl1", 3, `did you mean "disk1"?`},
		{"volume url dissk1", 3, `did you mean "disk1"?`},
		{"volume check disk2", 3, `did you mean "disk1"?`},
		{"volume resize disc1 1G", 3, `did you mean "disk1"?`},
		{"volume resize disk1 4097B", 2, "multiple of 4096"},
		{"volume resize disk1 32M", 2, "--shrink"},
		{"volume rm dosk1 --yes", 3, `did you mean "disk1"?`},
		{"volume rm disk1 --now", 2, "--yes"},
		{"volume rm", 2, "at least one volume"},
		{"volume export nothing out.img", 3, "nothing"},
		{"volume import /nowhere/x.img y", 3, "/nowhere/x.img"},
		{"volume import " + empty + " y", 2, "is empty"},
		{"volume import " + s.dir + " y", 2, "is a directory"},
		{"volume import " + atollPath + " disk1", 4, "--overwrite"},
		{"volume detach disk1", 3, "not attached"},
		{"volume ls --bogus", 2, "unknown flag: --bogus"},
		{"volume lss", 2, `did you mean "ls"?`},
		{"node frobnicate", 2, "unknown command"},
		{"volum ls", 2, "volume"},
		{"bogus", 2, `unknown command "bogus"`},
		{"status -o yaml", 2, "yaml"},
		{"node ls extra", 2, ""},
		{"demo kill 1", 1, ""},
		{"demo kill x", 2, "want a number"},
	} {
		args := strings.Fields(c.args)
		r := command(t, append(s.env, "ATOLL_SERVER="+s.socket()), "", atollPath, args...)
		if r.code != c.code || !strings.Contains(r.err, c.text) {
			t.Errorf("atoll %s: exit code %d, want %d, and %q in:\n%s", c.args, r.code, c.code, c.text, r.err)
		}
		if r.out != "" {
			t.Errorf("atoll %s: an error on standard output: %q", c.args, r.out)
		}
		if lines := strings.Count(r.err, "\n"); lines > 4 || strings.Contains(r.err, "Usage:") {
			t.Errorf("atoll %s: an error of %d lines:\n%s", c.args, lines, r.err)
		}
	}
	r := s.try("volume", "info", "nothing", "-o", "json")
	var e struct {
		Error struct {
			Code, Message string
			Exit          int
		}
	}
	if err := json.Unmarshal([]byte(r.err), &e); err != nil || e.Error.Code != "NOT_EXIST" || e.Error.Exit != 3 || r.code != 3 {
		t.Errorf("an error as JSON: %v %+v: %s", err, e, r.err)
	}
	r = command(t, s.env, "", atollPath, "status", "--server", "unix:"+s.dir+"/nowhere.sock")
	if r.code != 7 || !strings.Contains(r.err, "nowhere.sock") {
		t.Errorf("no server: exit code %d: %s", r.code, r.err)
	}
	// Over TCP the credential is needed.
	r = command(t, s.env, "", atollPath, "volume", "ls", "--server", s.api())
	if r.code != 5 {
		t.Errorf("TCP without a token: exit code %d: %s%s", r.code, r.out, r.err)
	}
	r = command(t, s.env, "", atollPath, "volume", "ls", "--server", s.api(), "--token-file", filepath.Join(s.data, "credential"))
	if r.code != 0 || !strings.Contains(r.out, "disk1") {
		t.Errorf("TCP with the credential: exit code %d: %s%s", r.code, r.out, r.err)
	}
}

// Completion knows the volumes.
func TestCompletion(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.atoll("volume", "create", "disk1", "64M")
	r := command(t, append(s.env, "ATOLL_SERVER="+s.socket()), "", atollPath, "__complete", "volume", "info", "di")
	if r.code != 0 || !strings.HasPrefix(r.out, "disk1") {
		t.Errorf("exit code %d: %s%s", r.code, r.out, r.err)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := command(t, s.env, "", atollPath, "completion", shell); r.code != 0 || len(r.out) < 100 {
			t.Errorf("completion for %s: %+v", shell, r)
		}
	}
	if r := command(t, s.env, "", atollPath, "help", "exit-codes"); !strings.Contains(r.out, "130") {
		t.Errorf("help exit-codes: %s%s", r.out, r.err)
	}
}

// Settings come from flags, the environment and a file, and their origin is told.
func TestSettings(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	file := filepath.Join(s.dir, "atoll.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# a comment\nmemory = \"512M\"\nlog-level = \"warn\"\nreplicas = 2\n")
	s.args = append(s.args, "--config", file)
	s.env = append(s.env, "ATOLL_DISK_LIMIT=5G", "ATOLL_LOG_LEVEL=debug", "ATOLL_TOKEN=secret")
	want := []string{
		`memory\s+"?512M"?\s.*` + regexp.QuoteMeta(file) + `:2`,
		`replicas\s+"?2"?\s.*` + regexp.QuoteMeta(file) + `:4`,
		`disk-limit\s+"?5G"?\s.*env ATOLL_DISK_LIMIT`,
		`log-level\s+"?debug"?\s.*env ATOLL_LOG_LEVEL`,
		`listen\s+"?` + s.api() + `"?\s.*flag --listen`,
		`roles\s+"?controller,node,gateway"?\s.*default`,
	}
	check := func(what, text string) {
		t.Helper()
		for _, w := range want {
			if !regexp.MustCompile(w).MatchString(text) {
				t.Errorf("%s lacks %s:\n%s", what, w, text)
			}
		}
		if strings.Contains(text, "secret") {
			t.Errorf("%s shows the token", what)
		}
	}
	r := command(t, s.env, "", atollPath, append(s.args, "--show-config")...)
	if r.code != 0 {
		t.Fatalf("--show-config: %+v", r)
	}
	check("--show-config", strings.ReplaceAll(r.out, " = ", "   "))
	if _, err := os.Stat(s.data); err == nil {
		t.Error("--show-config makes the data directory")
	}
	s.start()
	check("config show --origin", s.atoll("config", "show", "--origin"))
	s.stop()

	for _, c := range []struct {
		text string
		want []string
	}{
		{"memory = \"1G\"\n\nmemroy = \"2G\"\n", []string{file + ":3", `"memroy"`, `did you mean "memory"?`}},
		{"data_dir = \"x\"\n", []string{file + ":1", `"data_dir"`, `did you mean "data"?`}},
		{"xyzzy = 1\n", []string{`"xyzzy"`}},
		{"memory = \"lots\"\n", []string{"memory", file + ":1", "512M or 10G"}},
		{"memory = \"1M\"\n", []string{"at least 64M"}},
		{"replicas = 99\n", []string{"replicas", file + ":1", "number from 0 to"}},
		{"memory = [broken\n", []string{file}},
	} {
		write(c.text)
		r := command(t, s.env, "", atollPath, append(s.args, "--show-config")...)
		if r.code != 2 {
			t.Errorf("file %q: exit code %d", c.text, r.code)
		}
		for _, w := range c.want {
			if !strings.Contains(r.err, w) {
				t.Errorf("file %q: no %q in: %s", c.text, w, r.err)
			}
		}
	}
}

// A server that cannot start says why and what to do, and leaves no process.
func TestBadServers(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	other := startServer(t)
	other.stop()
	// refused starts a server that must fail at once.
	refused := func(what string, code int, texts []string, args ...string) {
		t.Helper()
		r := command(t, s.env, "", atollPath, append([]string{"server"}, args...)...)
		if r.code != code {
			t.Errorf("%s: exit code %d, want %d:\n%s", what, r.code, code, r.err)
		}
		for _, text := range texts {
			if !strings.Contains(r.err, text) {
				t.Errorf("%s: no %q in:\n%s", what, text, r.err)
			}
		}
	}
	dirs := 0
	fresh := func() string {
		dirs++
		return filepath.Join(s.dir, fmt.Sprintf("fresh%d", dirs))
	}
	port := freePorts(t, 4)
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	refused("locked data directory", 6, []string{s.data, "another server uses it", "--data"}, "--data", s.data, "--listen", addr, "--nbd", "none")
	refused("port after the API's in use", 6, []string{"--listen"}, "--data", fresh(), "--listen", fmt.Sprintf("127.0.0.1:%d", s.port-1), "--nbd", "none")
	refused("API port in use", 6, []string{s.api(), "--listen"}, "--data", fresh(), "--listen", s.api(), "--nbd", "none")
	refused("NBD port in use", 6, []string{s.nbd, "--nbd"}, "--data", fresh(), "--listen", addr, "--nbd", s.nbd)
	refused("NBD for all without TLS", 5, []string{"0.0.0.0:1", "--nbd-tls-cert"}, "--data", fresh(), "--listen", addr, "--nbd", "0.0.0.0:1")
	refused("API for all", 2, []string{"0.0.0.0:7400", "--advertise"}, "--data", fresh(), "--listen", "0.0.0.0:7400")
	refused("half a key pair", 2, []string{"--nbd-tls-key"}, "--data", fresh(), "--nbd-tls-cert", "x.pem")
	refused("no port", 2, []string{"host:port"}, "--data", fresh(), "--listen", "localhost")
	refused("unknown role", 2, []string{`"nod"`, "controller, node or gateway"}, "--data", fresh(), "--roles", "nod")
	refused("unknown flag", 2, []string{"--dta"}, "--dta", fresh())
	refused("unknown log level", 2, []string{"loud", "debug, info, warn or error"}, "--data", fresh(), "--log-level", "loud")
	refused("missing file of settings", 2, []string{"/nowhere.toml"}, "--data", fresh(), "--config", "/nowhere.toml")
	refused("join without a token", 2, []string{"--token", "atoll token create"}, "--data", fresh(), "--join", s.api())
	refused("join with a bad token", 2, []string{"token"}, "--data", fresh(), "--join", s.api(), "--token", "nonsense")
	refused("not a controller and new", 2, []string{"--join"}, "--data", fresh(), "--listen", addr, "--roles", "node")
	refused("data is a file", 2, []string{atollPath}, "--data", atollPath, "--listen", addr, "--nbd", "none")
	refused("negative size", 2, []string{"memory"}, "--data", fresh(), "--memory", "-1G")

	token := strings.Fields(s.atoll("token", "create", "-q"))
	refused("joined twice", 5, []string{other.data, "--join"}, "--data", other.data, "--listen", addr, "--nbd", "none",
		"--join", s.api(), "--token", token[len(token)-1])
	// A disk of another cluster.
	refused("disk of another cluster", 5, []string{other.data, "cluster"},
		"--data", fresh(), "--listen", addr, "--nbd", "none", "--disk", filepath.Join(other.data, "disks", "1"))
	// A record of a newer format.
	record := filepath.Join(other.data, "member.json")
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(text), `"version": 1`, `"version": 9`, 1)
	if err := os.WriteFile(record, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("newer data directory", 1, []string{other.data, "format 9", "newer atoll"}, "--data", other.data, "--listen", addr, "--nbd", "none")
	if now, _ := os.ReadFile(record); string(now) != newer {
		t.Error("a newer record was changed")
	}
	// Keys of another cluster beside the record of this one.
	if err := os.WriteFile(record, regexp.MustCompile(`[0-9a-f]{32}`).ReplaceAll(text, []byte(strings.Repeat("ab", 16))), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("record of another cluster", 5, []string{other.data, "cluster"}, "--data", other.data, "--listen", addr, "--nbd", "none")
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused("damaged record", 8, []string{"member.json"}, "--data", other.data, "--listen", addr, "--nbd", "none")
	if err := os.WriteFile(record, text, 0o600); err != nil {
		t.Fatal(err)
	}
	other.start() // all of that did no harm
	if n := other.nodes(); len(n) != 3 {
		t.Errorf("nodes: %+v", n)
	}
}

// SIGTERM and SIGINT end the server cleanly, also while clients are connected.
func TestStopWithClients(t *testing.T) {
	t.Parallel()
	need(t, "fio")
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		s := startServer(t)
		h := newHistory(t, 32<<20)
		l := startLoad(h, false, dialer(s.create("disk1", "32M")))
		time.Sleep(500 * time.Millisecond)
		begin := time.Now()
		s.signal(sig)
		<-s.done
		if s.wait != nil {
			t.Errorf("%v: %v\n%s", sig, s.wait, s.log.tail(10))
		}
		t.Logf("%v: stopped in %v", sig, time.Since(begin).Round(time.Millisecond))
		if took := time.Since(begin); took > time.Minute {
			t.Errorf("%v: stopping took %v", sig, took)
		}
		l.wait(t)
		s.start()
		c := dial(t, s.uri("disk1"))
		t.Logf("%d blocks read back", h.verify(t, c))
		c.Close()
	}
}
