package curve_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/curve"
	"github.com/atollstore/atoll/internal/gateway/curve/curvetest"
)

// world is a gateway over a backend in memory.
type world struct {
	t        *testing.T
	b        *curvetest.Backend
	g        *curve.Gateway
	sessions []string
	binned   string // its name there
	snap     string // UUID of the last snapshot
}

func newWorld(t *testing.T, o curve.Options) *world {
	b := curvetest.New()
	b.URL = func(path string) string { return "nbd://127.0.0.1:10809/" + path }
	o.Backend, o.Cluster = b, "0123456789abcdef0123456789abcdef"
	return &world{t: t, b: b, g: curve.New(o)}
}

// call makes one call and returns the answer.
func (w *world) call(name string, args map[string]any) map[string]any {
	w.t.Helper()
	body, err := json.Marshal(args)
	if err != nil {
		w.t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/curve/v1/"+name, bytes.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.RemoteAddr = "127.0.0.1:5"
	rec := httptest.NewRecorder()
	w.g.ServeHTTP(rec, r)
	out := map[string]any{}
	if rec.Code != http.StatusOK || json.Unmarshal(rec.Body.Bytes(), &out) != nil {
		w.t.Fatalf("%s: %d %s", name, rec.Code, rec.Body)
	}
	return out
}

// rest makes one call of the snapshot server.
func (w *world) rest(query string) (int, map[string]any) {
	w.t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/SnapshotCloneService?"+query, nil)
	rec := httptest.NewRecorder()
	w.g.ServeHTTP(rec, r)
	out := map[string]any{}
	if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
		w.t.Fatalf("%s: %d %s", query, rec.Code, rec.Body)
	}
	return rec.Code, out
}

// mustRest is rest for calls that succeed.
func (w *world) mustRest(action string, params ...string) map[string]any {
	w.t.Helper()
	code, out := w.rest(query(action, params...))
	if code != 200 || out["Code"] != "0" {
		w.t.Fatalf("%s %v: %d %v", action, params, code, out)
	}
	return out
}

func query(action string, params ...string) string {
	q := url.Values{"Action": {action}, "Version": {"0.0.6"}}
	for i := 0; i < len(params); i += 2 {
		q.Set(params[i], params[i+1])
	}
	return q.Encode()
}

// bin lists the recycle bin.
func (w *world) bin() []map[string]any {
	out := w.call("listdir", map[string]any{"owner": "root", "password": "root_password", "path": "/RecycleBin"})
	var list []map[string]any
	files, _ := out["files"].([]any)
	for _, f := range files {
		list = append(list, f.(map[string]any))
	}
	return list
}

var idTime = regexp.MustCompile(`-\d+-\d{10}$`)

// special carries out the lines that are no calls.
func (w *world) special(f []string) bool {
	w.t.Helper()
	switch f[0] {
	case "closeall":
		for _, s := range w.sessions {
			w.call("close", map[string]any{"owner": "alice", "session": s})
		}
		w.sessions = nil
	case "mount":
		w.call("open", map[string]any{"owner": f[1], "path": f[2]})
		w.b.SetInUse(f[2][1:], true)
	case "umount":
		w.b.SetInUse(f[2][1:], false)
		w.g.ForgetMounts()
	case "purge":
		for _, e := range w.bin() {
			w.call("deleteforce", map[string]any{"owner": "root", "password": "root_password", "path": "/RecycleBin/" + e["filename"].(string)})
		}
	case "bin":
		name := w.bin()[0]["filename"].(string)
		shown := idTime.ReplaceAllString(name, "-ID-TIME")
		shown = regexp.MustCompile(`-\d+$`).ReplaceAllString(shown, "-ID")
		if shown != f[2] {
			w.t.Errorf("the bin has %s, want %s", name, f[2])
		}
	case "snapshot":
		w.snap = w.mustRest("CreateSnapshot", "User", f[1], "File", f[2], "Name", f[3])["UUID"].(string)
	case "unsnapshot":
		w.mustRest("DeleteSnapshot", "User", f[1], "File", f[2], "UUID", w.snap)
	case "clone":
		w.snap = w.mustRest("Clone", "User", f[1], "Source", f[2], "Destination", f[3], "Lazy", "true")["UUID"].(string)
	case "flatten":
		w.mustRest("Flatten", "User", "alice", "UUID", w.snap)
		w.b.Finish()
	case "user":
		w.b.SetUser(f[1], f[2], f[3] == "strict")
		w.g.ForgetUsers()
	default:
		return false
	}
	return true
}

// line carries out one line of a script.
func (w *world) line(text string) {
	w.t.Helper()
	f := strings.Fields(text)
	if w.special(f) {
		return
	}
	left, want, ok := strings.Cut(text, " -> ")
	if !ok {
		w.t.Fatalf("%s: no result", text)
	}
	f = strings.Fields(left)
	owner, password, _ := strings.Cut(strings.TrimPrefix(f[1], "-"), ":")
	path := strings.Trim(f[2], `"`)
	if strings.Contains(path, "BINNED") {
		for _, e := range w.bin() {
			w.binned = e["filename"].(string)
		}
		path = strings.ReplaceAll(path, "BINNED", w.binned)
	}
	args := map[string]any{"owner": owner, "password": password, "path": path}
	for _, a := range f[3:] {
		w.arg(args, a)
	}
	out := w.call(f[0], args)
	if s, ok := out["session"].(string); ok {
		w.sessions = append(w.sessions, s)
	}
	wants := strings.Fields(want)
	if got := strconv.Itoa(int(out["code"].(float64))); got != wants[0] {
		w.t.Errorf("%s: got %s (%v)", text, got, out["message"])
		return
	}
	for _, x := range wants[1:] {
		k, v, _ := strings.Cut(x, "=")
		if got := w.field(out, k); got != strings.ReplaceAll(v, "BINNED", w.binned) {
			w.t.Errorf("%s: %s is %s", text, k, got)
		}
	}
}

// arg adds one argument of a script.
func (w *world) arg(args map[string]any, a string) {
	names := map[string]string{"to": "new_path", "newowner": "new_owner", "bytes": "length", "unit": "stripe_unit", "count": "stripe_count", "id": "file_id", "type": "throttle"}
	k, v, _ := strings.Cut(a, "=")
	key := k
	if n := names[k]; n != "" {
		key = n
	}
	n, err := strconv.ParseInt(v, 10, 64)
	switch {
	case k == "precise":
		args["precise"] = true
	case k == "size":
		args["length"] = n << 30
	case v == "last":
		args[key] = uint64(w.bin()[0]["id"].(float64))
	case k == "length":
		args["burst_length"] = n
	case err == nil && k != "to":
		args[key] = n
	default:
		args[key] = v
	}
}

// field shows one field of an answer.
func (w *world) field(out map[string]any, k string) string {
	if k == "names" {
		var names []string
		for _, f := range out["files"].([]any) {
			names = append(names, f.(map[string]any)["filename"].(string))
		}
		return strings.Join(names, ",")
	}
	v := out["file"].(map[string]any)[k]
	if n, ok := v.(float64); ok {
		return strconv.FormatInt(int64(n), 10)
	}
	return fmt.Sprint(v)
}

func TestCalls(t *testing.T) {
	f, err := os.Open("testdata/calls.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := newWorld(t, curve.Options{})
	for s := bufio.NewScanner(f); s.Scan(); {
		if text := strings.TrimSpace(s.Text()); text != "" && !strings.HasPrefix(text, "#") {
			w.line(text)
		}
	}
}

// Every kind of error has a code, and what goes wrong below comes out as it.
func TestCodesOfKinds(t *testing.T) {
	want := map[error]int{atoll.ErrCorrupt: -18, atoll.ErrIO: -20, atoll.ErrNoSpace: -21, atoll.ErrTimeout: -2, atoll.ErrUnavailable: -2,
		atoll.ErrConflict: -17, atoll.ErrBusy: -15, atoll.ErrExist: -1, atoll.ErrNotExist: -6}
	for _, kind := range atoll.Kinds() {
		w := newWorld(t, curve.Options{})
		w.call("create", map[string]any{"owner": "a", "path": "/v", "length": 10 << 30})
		w.b.Before = func(_ context.Context, call string) error {
			if call == "ResizeVolume" {
				return fmt.Errorf("resize: %w", kind)
			}
			return nil
		}
		got := int(w.call("extend", map[string]any{"owner": "a", "path": "/v", "length": 11 << 30})["code"].(float64))
		if got == 0 || want[kind] != 0 && got != want[kind] {
			t.Errorf("%v: code %d, want %d", kind, got, want[kind])
		}
		if c := curve.CodeOf(kind); c == curve.InternalError != (kind == atoll.ErrConflict || kind == atoll.ErrGap || kind == atoll.ErrSealed || kind == atoll.ErrVersion || kind == atoll.ErrIdentity) {
			t.Errorf("%v has code %d", kind, c)
		}
	}
}

// A backend that hangs is answered for at the deadline.
func TestDeadline(t *testing.T) {
	w := newWorld(t, curve.Options{Deadline: 50 * time.Millisecond})
	w.b.Before = func(ctx context.Context, _ string) error {
		<-ctx.Done()
		return ctx.Err()
	}
	start := time.Now()
	for _, name := range []string{"open", "create", "stat", "unlink", "rename", "listdir", "extend"} {
		out := w.call(name, map[string]any{"owner": "a", "path": "/v", "new_path": "/w", "length": 10 << 30})
		if out["code"].(float64) != -2 {
			t.Errorf("%s: %v", name, out)
		}
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("took %v", d)
	}
}

// Bad requests are refused in HTTP's terms or with -16; none stops the gateway.
func TestBadRequests(t *testing.T) {
	w := newWorld(t, curve.Options{})
	for _, c := range []struct {
		method, path, ctype, body string
		status                    int
	}{
		{"GET", "/curve/v1/stat", "application/json", "{}", 405},
		{"POST", "/curve/v1/none", "application/json", "{}", 404},
		{"POST", "/curve/v1/", "application/json", "{}", 404},
		{"POST", "/curve/v1/stat", "text/plain", "{}", 415},
		{"POST", "/curve/v1/stat", "application/json", "{", 200},
		{"POST", "/curve/v1/stat", "application/json", "[]", 200},
		{"POST", "/curve/v1/stat", "application/json", `{"owner":1}`, 200},
		{"POST", "/curve/v1/create", "application/json", `{"length":-1}`, 200},
		{"POST", "/curve/v1/create", "application/json", `{"owner":"` + strings.Repeat("x", 70<<10) + `"}`, 200},
		{"PUT", "/SnapshotCloneService", "", "", 405},
	} {
		r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
		r.Header.Set("Content-Type", c.ctype)
		rec := httptest.NewRecorder()
		w.g.ServeHTTP(rec, r)
		if rec.Code != c.status || rec.Code == 200 && !strings.Contains(rec.Body.String(), `"code": -16`) {
			t.Errorf("%s %s %.20s: %d %s", c.method, c.path, c.body, rec.Code, rec.Body)
		}
	}
}

// Addresses for data are those that the client can use.
func TestAddresses(t *testing.T) {
	for _, c := range []struct{ url, host, from, want string }{
		{"nbd+unix:///v?socket=/run/s", "h:1", "127.0.0.1:9", "nbd+unix:///v?socket=/run/s"},
		{"nbd+unix:///v?socket=/run/s", "h:1", "@", "nbd+unix:///v?socket=/run/s"},
		{"nbd+unix:///v?socket=/run/s", "h:1", "10.0.0.9:9", ""},
		{"nbd://0.0.0.0:10809/v", "h:7400", "10.0.0.9:9", "nbd://h:10809/v"},
		{"nbd://[::]/v", "[fe80::1]:7400", "10.0.0.9:9", "nbd://[fe80::1]:10809/v"},
		{"nbd://127.0.0.1/v", "h:7400", "10.0.0.9:9", ""},
		{"nbd://127.0.0.1/v", "h:7400", "127.0.0.1:9", "nbd://127.0.0.1/v"},
		{"nbds://10.0.0.1/v", "h:7400", "10.0.0.9:9", "nbds://10.0.0.1/v"},
	} {
		w := newWorld(t, curve.Options{})
		w.b.URL = func(string) string { return c.url }
		w.call("create", map[string]any{"owner": "a", "path": "/v", "length": 10 << 30})
		r := httptest.NewRequest(http.MethodPost, "http://"+c.host+"/curve/v1/open", strings.NewReader(`{"owner":"a","path":"/v"}`))
		r.Header.Set("Content-Type", "application/json")
		r.RemoteAddr = c.from
		rec := httptest.NewRecorder()
		w.g.ServeHTTP(rec, r)
		var out struct {
			Code int
			URLs []string
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &out); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(out.URLs, " "); got != c.want || (c.want == "") != (out.Code == -2) {
			t.Errorf("%+v: got %q, code %d", c, got, out.Code)
		}
	}
}

// A strict address believes nobody, not even root's usual password.
func TestStrict(t *testing.T) {
	w := newWorld(t, curve.Options{Strict: true})
	w.b.SetUser("alice", "secret", false)
	for _, c := range []struct {
		owner, password string
		code            float64
	}{{"alice", "secret", 0}, {"alice", "wrong", -4}, {"alice", "", -4}, {"bob", "", -4}, {"root", "root_password", -4}} {
		if out := w.call("mkdir", map[string]any{"owner": c.owner, "password": c.password, "path": "/d"}); out["code"] != c.code {
			t.Errorf("%+v: %v", c, out)
		}
	}
	w.refused(500, "-7", "GetFileSnapshotInfo", "User", "alice")
	w.refused(500, "-7", "GetFileSnapshotList")
}

// A root password of the settings stands in for one of the cluster's user root,
// for both interfaces.
func TestRootPassword(t *testing.T) {
	w := newWorld(t, curve.Options{RootPassword: "ours"})
	mkdir := func(password string) any {
		return w.call("mkdir", map[string]any{"owner": "root", "password": password, "path": "/d"})["code"]
	}
	list := func(password string) (any, int) {
		r := httptest.NewRequest(http.MethodGet, "/SnapshotCloneService?Action=GetFileSnapshotInfo&Version=0.0.6&User=root&File=/v", nil)
		if password != "" {
			r.SetBasicAuth("root", password)
		}
		rec := httptest.NewRecorder()
		w.g.ServeHTTP(rec, r)
		out := map[string]any{}
		_ = json.Unmarshal(rec.Body.Bytes(), &out)
		return out["Code"], rec.Code
	}
	w.make("a", "/v")
	if code := mkdir("root_password"); code != -4.0 {
		t.Errorf("the password that everyone knows: %v", code)
	}
	for _, password := range []string{"", "root_password"} {
		if code, status := list(password); status == http.StatusOK {
			t.Errorf("snapshots with password %q: %v", password, code)
		}
	}
	if code := mkdir("ours"); code != 0.0 {
		t.Errorf("the password of the settings: %v", code)
	}
	if code, status := list("ours"); status != http.StatusOK {
		t.Errorf("snapshots: %v %d", code, status)
	}
	w.b.SetUser("root", "own", false)
	time.Sleep(1100 * time.Millisecond) // the list of users is kept for a second
	if code := mkdir("ours"); code != -4.0 {
		t.Errorf("beside one of the user root: %v", code)
	}
}

// Any sizes are whole blocks; what is precise tells why.
func TestSettings(t *testing.T) {
	w := newWorld(t, curve.Options{Sizes: curve.AnySizes(), PreciseOpen: true})
	for _, c := range []struct {
		name   string
		length int
		code   float64
	}{{"create", 4096, 0}, {"extend", 12288, 0}, {"create", 5000, -24}, {"create", 0, -24}} {
		if out := w.call(c.name, map[string]any{"owner": "a", "path": "/v", "length": c.length}); out["code"] != c.code {
			t.Errorf("%+v: %v", c, out)
		}
	}
	if out := w.call("open", map[string]any{"owner": "a", "path": "/nope"}); out["code"] != -6.0 {
		t.Errorf("open: %v", out)
	}
}

// Each of the six throttles sets its own limit, and default limits are Curve's.
func TestThrottle(t *testing.T) {
	for kind, want := range map[string]string{
		"IOPS_TOTAL": "iops:{rate:100 burst:200 burst_seconds:5}", "IOPS_READ": "read_iops:{rate:100 burst:200 burst_seconds:5}",
		"IOPS_WRITE": "write_iops:{rate:100 burst:200 burst_seconds:5}", "BPS_TOTAL": "bytes:{rate:100 burst:200 burst_seconds:5}",
		"BPS_READ": "read_bytes:{rate:100 burst:200 burst_seconds:5}", "BPS_WRITE": "write_bytes:{rate:100 burst:200 burst_seconds:5}",
	} {
		w := newWorld(t, curve.Options{})
		w.make("a", "/v")
		w.call("throttle", map[string]any{"owner": "a", "path": "/v", "throttle": kind, "limit": 100, "burst": 200, "burst_length": 5})
		if got := w.b.Limits("v"); got != want {
			t.Errorf("%s: %s", kind, got)
		}
	}
	for gib, want := range map[int]string{
		10: "iops:{rate:2000} bytes:{rate:125829120}", 100: "iops:{rate:3000} bytes:{rate:125829120}",
		500: "iops:{rate:15000} bytes:{rate:157286400}", 2000: "iops:{rate:26000} bytes:{rate:272629760}",
	} {
		w := newWorld(t, curve.Options{DefaultLimits: true})
		w.call("create", map[string]any{"owner": "a", "path": "/v", "length": gib << 30})
		if got := w.b.Limits("v"); got != want {
			t.Errorf("%d GiB: %s", gib, got)
		}
	}
}

// FuzzUUID: what is taken for a UUID of ours is the one that we would make.
func FuzzUUID(f *testing.F) {
	f.Add("01234567-89ab-8cde-bd00-00000000002a")
	f.Add("de06df66-b9e4-44df-ba3d-ac94ddee0b28")
	f.Fuzz(func(t *testing.T, s string) {
		for kind := range byte(2) {
			m, n, ok := curve.UnpackUUID(s, kind)
			if ok && curve.PackUUID(m, kind, n) != strings.ToLower(s) {
				t.Errorf("%q is taken for %s %d", s, m, n)
			}
		}
	})
}
