package curve_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/atollstore/atoll/cbd"
	"github.com/atollstore/atoll/internal/cli"
	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/server"
)

// asProgram in the environment makes the test's program behave like atoll.
const asProgram = "ATOLL_CURVE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		app := &cli.App{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}
		os.Exit(cli.Run(ctx, app, cli.New(app, "test"), os.Args[1:]))
	}
	flag.Parse()
	if testing.Short() {
		fmt.Println("the tests of the whole program are left out with -short")
		return
	}
	os.Exit(m.Run())
}

func freePort(t *testing.T) string {
	t.Helper()
	port, err := hosttest.Ports(3)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// real starts a server with three nodes in this process.
func real(t *testing.T, args ...string) *server.Server {
	t.Helper()
	return boot(t, machine(t, args...))
}

// machine makes the settings of a server.
func machine(t *testing.T, args ...string) []string {
	t.Helper()
	dir, err := os.MkdirTemp("", "atoll-curve-") // sockets want short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("ATOLL_RUNTIME_DIR", filepath.Join(dir, "run"))
	return append([]string{"--data", filepath.Join(dir, "data"), "--listen", freePort(t), "--nbd", freePort(t), "--spare", "0", "--disk-limit", "4G", "--memory", "128M"}, args...)
}

// boot starts a server that ends with the test, or before.
func boot(t *testing.T, args []string) *server.Server {
	t.Helper()
	fs := pflag.NewFlagSet("server", pflag.ContinueOnError)
	server.AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	cfg, err := server.LoadConfig(fs, nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.Start(t.Context(), cfg, server.Options{Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})), Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return s
}

// A client goes on through a restart of the server.
func TestRestart(t *testing.T) {
	args := machine(t)
	s := boot(t, args)
	dir, conf := module(t, s.APIAddr())
	pys := pythons(t)
	cmd := exec.Command("timeout", "300", pys[len(pys)-1], "-B", "testdata/survive.py", conf)
	cmd.Env = append(os.Environ(), "PYTHONPATH="+dir, "ATOLL_TOKEN=")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "running" {
		t.Fatalf("%s %v\n%s", lines.Text(), cmd.Wait(), &errs)
	}
	for range 2 {
		<-time.After(200 * time.Millisecond)
		if err := s.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
		s = boot(t, args)
	}
	<-time.After(200 * time.Millisecond)
	in.Close()
	for lines.Scan() {
		t.Log(lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, &errs)
	}
}

// The whole table and the scripts against a real server, on the oldest and the
// newest Python there are.
func TestRealServer(t *testing.T) {
	s := real(t)
	pys := pythons(t)
	for i, addr := range []string{s.APIAddr(), "unix:" + s.Socket()} {
		dir, conf := module(t, addr)
		py := pys[i*(len(pys)-1)]
		t.Logf("%s over %s: %s", py, addr, run(t, py, dir, "table.py", conf, fmt.Sprint(i)))
	}
}

// rest calls the snapshot service; want is the code that it must answer.
func rest(t *testing.T, s *server.Server, want, action string, params ...string) map[string]any {
	t.Helper()
	q := url.Values{"Action": {action}, "Version": {"0.0.6"}}
	for i := 0; i < len(params); i += 2 {
		q.Set(params[i], params[i+1])
	}
	// Curve's clients leave slashes as they are.
	resp, err := http.Get("http://" + s.APIAddr() + "/SnapshotCloneService?" + strings.ReplaceAll(q.Encode(), "%2F", "/"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	out := map[string]any{}
	if err != nil || json.Unmarshal(text, &out) != nil || out["Code"] != want {
		t.Fatalf("%s %v: %d %s (%v), want code %s", action, params, resp.StatusCode, text, err, want)
	}
	return out
}

// disk is a volume seen through Curve's calls.
type disk struct {
	t *testing.T
	c *cbd.CBDClient
	u cbd.UserInfo
}

func (d *disk) ok(what string, ret int) {
	d.t.Helper()
	if ret != 0 {
		d.t.Fatalf("%s: %d %s (%s)", what, ret, cbd.Strerror(ret), d.c.LastError())
	}
}

// put writes a block of one letter at a few places.
func (d *disk) put(path string, letter byte) {
	d.t.Helper()
	fd := d.c.Open(path, d.u)
	for _, at := range []uint64{0, 5 << 30, 10<<30 - 4096} {
		if n := d.c.Write(fd, bytes.Repeat([]byte{letter}, 4096), at, 4096); n != 4096 {
			d.t.Fatalf("write %s: %d (%s)", path, n, d.c.LastError())
		}
	}
	d.ok("close", d.c.Close(fd))
}

// has checks what put wrote.
func (d *disk) has(path string, letter byte) {
	d.t.Helper()
	fd := d.c.Open(path, d.u)
	b := make([]byte, 4096)
	for _, at := range []uint64{0, 5 << 30, 10<<30 - 4096} {
		if n := d.c.Read(fd, b, at, 4096); n != 4096 || b[0] != letter || b[4095] != letter {
			d.t.Errorf("%s at %d: %d, %q (%s), want %q", path, at, n, b[0], d.c.LastError(), letter)
		}
	}
	d.ok("close", d.c.Close(fd))
}

// Snapshots, clones and recovery keep and give back the data they should.
func TestSnapshotService(t *testing.T) {
	s := real(t)
	_, conf := module(t, s.APIAddr())
	d := &disk{t: t, c: &cbd.CBDClient{}, u: cbd.UserInfo{Owner: "zjm"}}
	d.ok("init", d.c.Init(conf))
	defer d.c.UnInit()
	d.ok("mkdir", d.c.Mkdir("/zjm", d.u))
	d.ok("create", d.c.Create("/zjm/v", d.u, 10<<30))
	d.put("/zjm/v", 'a')
	s1 := rest(t, s, "0", "CreateSnapshot", "User", "zjm", "File", "/zjm/v", "Name", "s1")["UUID"].(string)
	d.put("/zjm/v", 'b')
	rest(t, s, "0", "CreateSnapshot", "User", "zjm", "File", "/zjm/v", "Name", "s2")
	d.put("/zjm/v", 'c')
	list := rest(t, s, "0", "GetFileSnapshotInfo", "User", "zjm", "File", "/zjm/v")
	if list["TotalCount"].(float64) != 2 {
		t.Fatalf("snapshots: %v", list)
	}
	first := list["Snapshots"].([]any)[0].(map[string]any)
	if first["UUID"] != s1 || first["Name"] != "s1" || first["Status"].(float64) != 0 || first["Progress"].(float64) != 100 || first["FileLength"].(float64) != 10<<30 {
		t.Errorf("snapshot: %v", first)
	}

	lazy := rest(t, s, "0", "Clone", "User", "zjm", "Source", s1, "Destination", "/zjm/lazy", "Lazy", "true")["UUID"].(string)
	whole := rest(t, s, "0", "Clone", "User", "zjm", "Source", "/zjm/v", "Destination", "/zjm/whole", "Lazy", "false")["UUID"].(string)
	d.has("/zjm/lazy", 'a')
	d.has("/zjm/whole", 'c')
	if ret := d.c.Unlink("/zjm/v", d.u); ret != -cbd.UnderSnapshot {
		t.Errorf("unlink of a volume with snapshots: %d", ret)
	}
	rest(t, s, "-16", "DeleteSnapshot", "User", "zjm", "File", "/zjm/v", "UUID", s1)
	rest(t, s, "-17", "CleanCloneTask", "User", "zjm", "UUID", lazy)
	rest(t, s, "0", "Flatten", "User", "zjm", "UUID", lazy)
	await(t, s, lazy)
	await(t, s, whole)
	rest(t, s, "0", "CleanCloneTask", "User", "zjm", "UUID", lazy)

	rest(t, s, "0", "Recover", "User", "zjm", "Source", s1, "Destination", "/zjm/v", "Lazy", "true")
	d.has("/zjm/v", 'a')
	d.has("/zjm/lazy", 'a')
	d.has("/zjm/whole", 'c')
	for _, x := range rest(t, s, "0", "GetFileSnapshotInfo", "User", "zjm", "File", "/zjm/v")["Snapshots"].([]any) {
		rest(t, s, "0", "DeleteSnapshot", "User", "zjm", "File", "/zjm/v", "UUID", x.(map[string]any)["UUID"].(string))
	}
	d.ok("unlink", d.c.Unlink("/zjm/v", d.u))
	d.has("/zjm/lazy", 'a')
	d.has("/zjm/whole", 'c')
}

// await waits until a task is done.
func await(t *testing.T, s *server.Server, uuid string) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; {
		x := rest(t, s, "0", "GetCloneTasks", "User", "zjm", "UUID", uuid)["TaskInfos"].([]any)[0].(map[string]any)
		if x["TaskStatus"].(float64) == 0 {
			return
		}
		if time.Now().After(end) || x["TaskStatus"].(float64) == 5 {
			t.Fatalf("task %v", x)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// command runs a command line of the program and returns what it printed.
func command(t *testing.T, args ...string) (out, errs string, status int) {
	t.Helper()
	var o, e bytes.Buffer
	app := &cli.App{In: strings.NewReader(""), Out: &o, Err: &e}
	status = cli.Run(t.Context(), app, cli.New(app, "test"), args)
	return o.String(), e.String(), status
}

// The command lines print what Curve's print, which other programs read.
func TestCommands(t *testing.T) {
	s := real(t)
	_, conf := module(t, s.APIAddr())
	for _, c := range []struct {
		args   string
		status int
		out    string // a regular expression
	}{
		{"mkdir --user k8s --dirname /k8s", 0, ``},
		{"create --user k8s --filename /k8s/v1 --length 10", 0, ``},
		{"create --user k8s --filename /k8s/v1 --length 10", 1, `create fail, ret = -1, EXISTS\n`},
		{"create --user k8s --filename /k8s/v2 --length 9", 1, `create fail, ret = -24, LENGTH_NOT_SUPPORT\n`},
		{"create --user k8s --filename /k8s/v2 --length 10 --stripeUnit 1048576 --stripeCount 4", 0, ``},
		{"extend --user k8s --filename /k8s/v1 --length 11", 0, ``},
		{"rename --user k8s --filename /k8s/v1 --newname /k8s/v3", 0, ``},
		{"list --user k8s --dirname /k8s", 0, `v2\nv3\n`},
		{"list --user k8s --dirname /", 1, `list fail, ret = -4, AUTHFAIL\n`},
		{"list --user root --dirname /", 1, `list fail, ret = -4, AUTHFAIL\n`},
		{"list --user root --dirname / --password root_password", 0, `RecycleBin\nk8s\n`},
		{"stat --user k8s --filename /k8s/v3", 0, `id: \d+\nparentid: \d+\nfiletype: INODE_PAGEFILE\nlength\(GB\): 11\n` +
			`createtime: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\nuser: k8s\nfilename: v3\nfileStatus: Created\nstripeUnit: 0\nstripeCount: 0\n`},
		{"stat --user k8s --filename /k8s/v2", 0, `(?s).*stripeUnit: 1048576\nstripeCount: 4\n`},
		{"stat --user k8s --filename /k8s/none", 1, `stat fail, ret = -6, NOTEXIST\n`},
		{"delete --user k8s --filename /k8s/v2", 0, ``},
		{"recover --user k8s --filename /k8s/v2", 0, ``},
		{"recover --user k8s --filename /k8s/v2 --id 99999", 1, `recover fail, ret = -6, NOTEXIST\n`},
		{"delete --user k8s --filename /k8s/v2", 0, ``},
		{"delete --user k8s --filename /k8s/v3", 0, ``},
		{"rmdir --user k8s --dirname /k8s", 0, ``},
		{"create --user k8s", 2, ``},
		{"create --user k8s --filename /x --length ten", 2, ``},
		{"none", 2, ``},
		{"--confpath /none/client.conf list --user k8s --dirname /k8s", 1, `init fail\n`},
	} {
		for _, with := range [][]string{nil, {"--confpath", conf}} {
			if len(with) > 0 && c.status == 0 && !strings.HasPrefix(c.args, "list") && !strings.HasPrefix(c.args, "stat") {
				continue // done already
			}
			args := append(append([]string{"curve"}, with...), strings.Fields(c.args)...)
			if strings.Contains(c.args, "--confpath") {
				args = append([]string{"curve"}, strings.Fields(c.args)...)
			}
			if strings.Contains(c.args, "recover") && len(with) > 0 {
				continue
			}
			out, errs, status := command(t, args...)
			if status != c.status || !regexp.MustCompile("^"+c.out+"$").MatchString(out) || status == 2 != (errs != "") {
				t.Errorf("%v: %d\n%s%s", args, status, out, errs)
			}
			if strings.HasPrefix(c.args, "list --user k8s --dirname /k8s") || c.status != 0 {
				continue
			}
			break
		}
	}
	text, _, status := command(t, "python")
	if status != 0 || !strings.Contains(text, "class CBDClient") {
		t.Errorf("python: %d", status)
	}
}

// curve-nbd maps, lists and unmaps.
func TestCurveNBD(t *testing.T) {
	for _, c := range []struct{ args, errs string }{
		{"", "curve-nbd: must specify command\n"},
		{"foo", "curve-nbd: unknown command: foo\n"},
		{"map", "curve-nbd: must specify image spec\n"},
		{"unmap", "curve-nbd: must specify nbd device or image spec\n"},
		{"map a b", "curve-nbd: unknown args: b\n"},
		{"list-mapped b", "curve-nbd: unknown args: b\n"},
		{"map nonsense", "curve-nbd: image nonsense: want cbd:POOL//PATH_USER_\n"},
		{"map cbd:pool//a_b_ --timeout x", "curve-nbd: Invalid argument for timeout!\n"},
		{"unmap /dev/nbd99", "curve-nbd: /dev/nbd99 is not mapped\n"},
	} {
		t.Setenv("ATOLL_RUNTIME_DIR", t.TempDir())
		if _, errs, status := command(t, append([]string{"curve-nbd"}, strings.Fields(c.args)...)...); status != 1 || errs != c.errs {
			t.Errorf("%s: %d %q", c.args, status, errs)
		}
	}
	if _, err := os.Stat("/dev/fuse"); os.Getuid() != 0 || err != nil {
		t.Skip("making block devices needs root and /dev/fuse")
	}
	s := real(t)
	_, conf := module(t, s.APIAddr())
	d := &disk{t: t, c: &cbd.CBDClient{}, u: cbd.UserInfo{Owner: "k8s"}}
	d.ok("init", d.c.Init(conf))
	defer d.c.UnInit()
	d.ok("create", d.c.Create("/k8s_vol", d.u, 10<<30))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(asProgram, "1") // the helper is this program again
	nbd := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("timeout", append([]string{"300", self, "curve-nbd"}, args...)...).CombinedOutput()
		if err != nil {
			t.Errorf("curve-nbd %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	const image = "cbd:pool//k8s_vol_k8s_"
	dev := strings.TrimSpace(nbd("map", image, "--timeout", "3600"))
	defer func() {
		nbd("unmap", image)
		if out := nbd("list-mapped"); out != "" {
			t.Errorf("still mapped: %s", out)
		}
	}()
	if want := regexp.MustCompile(`^pid +image +device +options +\n\d+ ` + image + ` ` + dev + ` +--timeout 3600 \n\n$`); !want.MatchString(nbd("list-mapped")) {
		t.Errorf("list-mapped: %q", nbd("list-mapped"))
	}
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte("q"), 4096), 1<<20)
	if err = fmt.Errorf("%w, %w, %w", orNil(err), orNil(f.Sync()), orNil(f.Close())); err.Error() != "ok, ok, ok" {
		t.Fatal(err)
	}
	if ret := d.c.Unlink("/k8s_vol", d.u); ret != -cbd.FileOccupied {
		t.Errorf("unlink of a mapped volume: %d", ret)
	}
	fd, b := d.c.Open("/k8s_vol", d.u), make([]byte, 4096)
	if n := d.c.Read(fd, b, 1<<20, 4096); n != 4096 || b[0] != 'q' {
		t.Errorf("read back %d %q", n, b[0])
	}
	d.ok("close", d.c.Close(fd))
}

func orNil(err error) error {
	if err == nil {
		return errOK
	}
	return err
}

var errOK = fmt.Errorf("ok")

// A strict server asks everyone for a password over TCP; its own socket is only
// its user's and believes.
func TestStrictServer(t *testing.T) {
	s := real(t, "--curve-auth", "strict")
	var out bytes.Buffer
	for _, name := range []string{"alice", "root"} {
		verb := map[string]string{"alice": "add", "root": "passwd"}[name]
		app := &cli.App{In: strings.NewReader("secret\n"), Out: &out, Err: &out}
		if status := cli.Run(t.Context(), app, cli.New(app, "test"), []string{"user", verb, name}); status != 0 {
			t.Fatalf("user %s: %d %s", name, status, &out)
		}
	}
	for _, c := range []struct {
		addr, owner, password string
		code                  int
	}{
		{s.APIAddr(), "root", "root_password", -cbd.AuthFail},
		{s.APIAddr(), "alice", "", -cbd.AuthFail},
		{s.APIAddr(), "alice", "wrong", -cbd.AuthFail},
		{s.APIAddr(), "bob", "", -cbd.AuthFail},
		{s.APIAddr(), "alice", "secret", 0},
		{s.APIAddr(), "root", "secret", 0},
		{"unix:" + s.Socket(), "alice", "", 0},
		{"unix:" + s.Socket(), "root", "root_password", -cbd.AuthFail}, // it has one of its own now
	} {
		_, conf := module(t, c.addr)
		u := cbd.UserInfo{Owner: c.owner, Password: c.password}
		var client cbd.CBDClient
		if client.Init(conf) != 0 {
			t.Fatal(client.LastError())
		}
		ret := client.Mkdir("/d", u)
		if ret == 0 {
			ret = client.Rmdir("/d", u)
		}
		if client.UnInit(); ret != c.code {
			t.Errorf("%+v: %d", c, ret)
		}
	}
}
