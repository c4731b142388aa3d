package curve_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/curve"
)

// refused checks the code and HTTP status of an action that fails.
func (w *world) refused(status int, code, action string, params ...string) {
	w.t.Helper()
	got, out := w.rest(query(action, params...))
	if got != status || out["Code"] != code {
		w.t.Errorf("%s %v: got %d %v, want %d %s", action, params, got, out, status, code)
	}
	if _, ok := out["UUID"]; !ok || out["RequestId"] == "" || out["Message"] == "" {
		w.t.Errorf("%s: incomplete error %v", action, out)
	}
}

func (w *world) make(owner string, paths ...string) {
	w.t.Helper()
	for _, p := range paths {
		if out := w.call("create", map[string]any{"owner": owner, "path": p, "length": 10 << 30}); out["code"].(float64) != 0 {
			w.t.Fatalf("create %s: %v", p, out)
		}
	}
}

func list(out map[string]any, key string) (all []map[string]any) {
	part, _ := out[key].([]any)
	for _, x := range part {
		all = append(all, x.(map[string]any))
	}
	return all
}

func TestSnapshots(t *testing.T) {
	w := newWorld(t, curve.Options{})
	w.make("zjm", "/v")
	w.make("other", "/o")
	uuid := w.mustRest("CreateSnapshot", "User", "zjm", "File", "/v", "Name", "snap1")["UUID"].(string)
	w.mustRest("CreateSnapshot", "User", "zjm", "File", "/v", "Name", "snap1") // names need not be unique
	w.mustRest("CreateSnapshot", "User", "zjm", "File", "/v", "Name", "a/b@c")
	if !regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(uuid) {
		t.Errorf("UUID %s", uuid)
	}
	out := w.mustRest("GetFileSnapshotInfo", "User", "zjm", "File", "/v")
	all := list(out, "Snapshots")
	if out["TotalCount"].(float64) != 3 || len(all) != 3 || all[2]["Name"] != "a/b@c" {
		t.Fatalf("listed %v", out)
	}
	s := all[0]
	if s["UUID"] != uuid || s["User"] != "zjm" || s["File"] != "/v" || s["Name"] != "snap1" || s["SeqNum"].(float64) != 1 ||
		s["FileLength"].(float64) != 10<<30 || s["Status"].(float64) != 0 || s["Progress"].(float64) != 100 || s["Time"].(float64) < 1.6e15 {
		t.Errorf("snapshot %v", s)
	}
	out = w.mustRest("GetFileSnapshotInfo", "User", "zjm", "File", "/v", "Limit", "1", "Offset", "2")
	if all = list(out, "Snapshots"); out["TotalCount"].(float64) != 3 || len(all) != 1 || all[0]["SeqNum"].(float64) != 3 {
		t.Errorf("page %v", out)
	}
	out = w.mustRest("GetFileSnapshotInfo", "User", "zjm", "File", "/v", "Offset", "9")
	if v, ok := out["Snapshots"]; v != nil || !ok {
		t.Errorf("an empty page is %v, want null", v)
	}
	for _, q := range [][]string{{"User", "other", "File", "/v"}, {"User", "zjm", "File", "/none"}, {"User", "other"}} {
		if out := w.mustRest("GetFileSnapshotInfo", q...); out["TotalCount"].(float64) != 0 {
			t.Errorf("%v: %v", q, out)
		}
	}
	if out := w.mustRest("GetFileSnapshotInfo", "User", "zjm"); out["TotalCount"].(float64) != 3 {
		t.Errorf("all of a user: %v", out)
	}
	if out := w.mustRest("GetFileSnapshotList", "Status", "0", "UUID", uuid); out["TotalCount"].(float64) != 1 {
		t.Errorf("filtered: %v", out)
	}

	w.refused(500, "-8", "CreateSnapshot", "User", "zjm", "File", "/none", "Name", "x")
	w.refused(500, "-7", "CreateSnapshot", "User", "zjm", "File", "/o", "Name", "x")
	w.refused(500, "-8", "GetFileSnapshotInfo", "User", "zjm", "UUID", "de06df66-b9e4-44df-ba3d-ac94ddee0b28")
	w.refused(500, "-7", "GetFileSnapshotInfo", "User", "other", "UUID", uuid)
	w.refused(500, "-11", "GetFileSnapshotInfo", "User", "zjm", "File", "/o", "UUID", uuid)
	w.refused(500, "-7", "DeleteSnapshot", "User", "other", "File", "/v", "UUID", uuid)
	w.refused(500, "-11", "DeleteSnapshot", "User", "zjm", "File", "/o", "UUID", uuid)
	w.refused(500, "-14", "CancelSnapshot", "User", "zjm", "File", "/v", "UUID", uuid)
	w.mustRest("DeleteSnapshot", "User", "zjm", "File", "/v", "UUID", uuid)
	w.mustRest("DeleteSnapshot", "User", "zjm", "File", "/v", "UUID", uuid) // twice is once
	w.mustRest("DeleteSnapshot", "User", "zjm", "UUID", "nonsense")
	if out := w.mustRest("GetFileSnapshotInfo", "User", "zjm", "File", "/v"); out["TotalCount"].(float64) != 2 {
		t.Errorf("after deletion: %v", out)
	}
}

func TestClones(t *testing.T) {
	w := newWorld(t, curve.Options{})
	w.make("zjm", "/v")
	snap := w.mustRest("CreateSnapshot", "User", "zjm", "File", "/v", "Name", "s")["UUID"].(string)
	lazy := w.mustRest("Clone", "User", "zjm", "Source", snap, "Destination", "/c1", "Lazy", "true")["UUID"].(string)
	whole := w.mustRest("Clone", "User", "zjm", "Source", "/v", "Destination", "/c2", "Lazy", "False")["UUID"].(string)
	if again := w.mustRest("Clone", "User", "zjm", "Source", snap, "Destination", "/c1", "Lazy", "true")["UUID"]; again != lazy {
		t.Errorf("asked twice: %v, then %v", lazy, again)
	}
	status := func(uuid string) map[string]any {
		t.Helper()
		all := list(w.mustRest("GetCloneTasks", "User", "zjm", "UUID", uuid), "TaskInfos")
		if len(all) != 1 {
			t.Fatalf("task %s: %v", uuid, all)
		}
		return all[0]
	}
	if s := status(lazy); s["TaskStatus"].(float64) != 7 || s["File"] != "/c1" || s["TaskType"].(float64) != 0 || s["Src"] != snap || s["IsLazy"] != true || s["FileType"].(float64) != 1 {
		t.Errorf("lazy: %v", s)
	}
	if s := status(whole); s["TaskStatus"].(float64) != 1 || s["Progress"].(float64) > 95 || s["FileType"].(float64) != 0 {
		t.Errorf("whole: %v", s)
	}
	w.refused(500, "-16", "DeleteSnapshot", "User", "zjm", "File", "/v", "UUID", snap)
	w.refused(500, "-17", "CleanCloneTask", "User", "zjm", "UUID", lazy)
	w.refused(500, "-17", "CleanCloneTask", "User", "zjm", "UUID", whole)
	w.refused(500, "-7", "CleanCloneTask", "User", "other", "UUID", whole)
	w.refused(500, "-7", "GetCloneTasks", "User", "other", "UUID", whole)
	if out := w.mustRest("GetCloneRefStatus", "User", "zjm", "Source", "/v"); out["RefStatus"].(float64) != 1 {
		t.Errorf("being cloned: %v", out)
	}
	if out := w.mustRest("GetCloneRefStatus", "User", "zjm", "Source", snap); out["RefStatus"].(float64) != 2 || len(list(out, "CloneFileInfo")) != 1 {
		t.Errorf("lazily cloned: %v", out)
	}
	w.b.Forget() // a restart: what was cut off goes on
	status(whole)
	w.mustRest("Flatten", "User", "zjm", "UUID", lazy)
	w.mustRest("Flatten", "User", "zjm", "UUID", lazy)
	if s := status(lazy); s["TaskStatus"].(float64) != 1 {
		t.Errorf("flattening: %v", s)
	}
	w.b.Finish()
	w.b.Forget() // a restart after the end
	for _, u := range []string{lazy, whole} {
		if s := status(u); s["TaskStatus"].(float64) != 0 || s["Progress"].(float64) != 100 {
			t.Errorf("done: %v", s)
		}
	}
	if out := w.mustRest("GetCloneRefStatus", "User", "zjm", "Source", "/v"); out["RefStatus"].(float64) != 0 {
		t.Errorf("independent: %v", out)
	}
	if out := w.mustRest("GetCloneTasks", "User", "zjm"); out["TotalCount"].(float64) != 2 {
		t.Errorf("all: %v", out)
	}
	if out := w.mustRest("GetCloneTasks", "User", "zjm", "File", "/c1"); out["TotalCount"].(float64) != 1 {
		t.Errorf("of a file: %v", out)
	}
	if out := w.mustRest("GetCloneTaskList", "Destination", "/c2", "Type", "0", "Status", "0"); out["TotalCount"].(float64) != 1 {
		t.Errorf("filtered: %v", out)
	}
	w.mustRest("DeleteSnapshot", "User", "zjm", "File", "/v", "UUID", snap)
	w.mustRest("CleanCloneTask", "User", "zjm", "UUID", lazy)
	w.mustRest("CleanCloneTask", "User", "zjm", "UUID", lazy)
	w.refused(500, "-8", "GetCloneTasks", "User", "zjm", "UUID", lazy)
	w.refused(500, "-8", "GetCloneTasks", "User", "zjm", "File", "/v")
	w.refused(500, "-8", "Flatten", "User", "zjm", "UUID", lazy)
	w.refused(500, "-19", "Clone", "User", "zjm", "Source", "/v", "Destination", "/c1", "Lazy", "1")
	w.refused(500, "-19", "Clone", "User", "zjm", "Source", "/v", "Destination", "/v", "Lazy", "1")
	w.refused(500, "-8", "Clone", "User", "zjm", "Source", "/none", "Destination", "/c3", "Lazy", "1")
	w.refused(500, "-8", "Clone", "User", "zjm", "Source", snap, "Destination", "/c3", "Lazy", "1")
	w.refused(500, "-1", "Clone", "User", "zjm", "Source", "/v", "Destination", "/none/c3", "Lazy", "1")
	if out := w.mustRest("GetFileSnapshotList"); out["TotalCount"].(float64) != 0 {
		t.Errorf("clones left snapshots: %v", out)
	}
}

func TestRecover(t *testing.T) {
	w := newWorld(t, curve.Options{})
	w.make("zjm", "/v", "/w")
	snap := w.mustRest("CreateSnapshot", "User", "zjm", "File", "/v", "Name", "s")["UUID"].(string)
	w.call("extend", map[string]any{"owner": "zjm", "path": "/v", "length": 11 << 30})
	w.refused(500, "-8", "Recover", "User", "zjm", "Source", snap, "Destination", "/none", "Lazy", "true")
	w.refused(500, "-15", "Recover", "User", "zjm", "Source", snap, "Destination", "/w", "Lazy", "true")
	w.refused(500, "-7", "Recover", "User", "other", "Source", snap, "Destination", "/v", "Lazy", "true")
	w.refused(500, "-8", "Recover", "User", "zjm", "Source", "/w", "Destination", "/v", "Lazy", "true")
	w.call("open", map[string]any{"owner": "zjm", "path": "/v"})
	w.refused(500, "-9", "Recover", "User", "zjm", "Source", snap, "Destination", "/v", "Lazy", "true")
	w.g.ForgetMounts()
	task := w.mustRest("Recover", "User", "zjm", "Source", snap, "Destination", "/v", "Lazy", "true")["UUID"].(string)
	all := list(w.mustRest("GetCloneTasks", "User", "zjm", "UUID", task), "TaskInfos")
	if len(all) != 1 || all[0]["TaskType"].(float64) != 1 || all[0]["TaskStatus"].(float64) != 0 {
		t.Errorf("task %v", all)
	}
	if n := w.call("stat", map[string]any{"owner": "zjm", "path": "/v"})["file"].(map[string]any)["length"].(float64); n != 10<<30 {
		t.Errorf("recovered to %v bytes", n)
	}
	w.mustRest("CleanCloneTask", "User", "zjm", "UUID", task)
}

// A request with a parameter missing, empty or malformed is a bad one.
func TestBadActions(t *testing.T) {
	w := newWorld(t, curve.Options{})
	w.make("u", "/v")
	for _, q := range []string{
		"", "Action=None&Version=1", "Action=CreateSnapshot&User=u&File=/v&Name=n", "Action=CreateSnapshot&Version=1&User=u&File=/v",
		"Action=CreateSnapshot&Version=1&User=&File=/v&Name=n", "Action=DeleteSnapshot&Version=1&User=u", "Action=CancelSnapshot&Version=1&User=u&UUID=x",
		"Action=GetFileSnapshotInfo&Version=1", "Action=GetFileSnapshotInfo&Version=1&User=u&Limit=x", "Action=GetFileSnapshotInfo&Version=1&User=u&Offset=-1",
		"Action=Clone&Version=1&User=u&Source=/v&Destination=/w", "Action=Clone&Version=1&User=u&Source=/v&Destination=/w&Lazy=maybe",
		"Action=Recover&Version=1&User=u&Source=x&Lazy=1", "Action=Flatten&Version=1&User=u", "Action=CleanCloneTask&Version=1&UUID=x",
		"Action=GetCloneRefStatus&Version=1&User=u",
	} {
		status, out := w.rest(q)
		if status != 400 || out["Code"] != "-5" || out["Message"] != `BadRequest:"Invalid request."` {
			t.Errorf("%s: %d %v", q, status, out)
		}
	}
	w.b.SetUser("u", "secret", true)
	w.g.ForgetUsers()
	w.refused(500, "-7", "GetFileSnapshotInfo", "User", "u")
	r := httptest.NewRequest(http.MethodGet, "/SnapshotCloneService?"+query("GetFileSnapshotInfo", "User", "u"), nil)
	r.SetBasicAuth("u", "secret")
	rec := httptest.NewRecorder()
	if w.g.ServeHTTP(rec, r); rec.Code != 200 || !strings.Contains(rec.Body.String(), `"Code": "0"`) {
		t.Errorf("with the password: %d %s", rec.Code, rec.Body)
	}
}

func TestUUID(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		m, n, kind := atoll.MediumID(rng.Uint64()|1), rng.Uint64()>>8, byte(rng.IntN(2))
		u := curve.PackUUID(m.String(), kind, n)
		gm, gn, ok := curve.UnpackUUID(u, kind)
		if !ok || gm != m.String() || gn != n {
			t.Fatalf("%v %d %d: %s gives %s %d %t", m, n, kind, u, gm, gn, ok)
		}
		if _, _, ok := curve.UnpackUUID(u, 1-kind); ok {
			t.Fatalf("%s is of both kinds", u)
		}
	}
	if u := curve.PackUUID("0123456789abcdef", 1, 42); u != "01234567-89ab-8cde-bd00-00000000002a" {
		t.Errorf("the form of UUIDs changed: %s", u)
	}
	for _, bad := range []string{"", "x", "de06df66-b9e4-44df-ba3d-ac94ddee0b28", strings.Repeat("0", 36), fmt.Sprintf("%032d", 8)} {
		if _, _, ok := curve.UnpackUUID(bad, 0); ok {
			t.Errorf("%q was taken", bad)
		}
	}
}
