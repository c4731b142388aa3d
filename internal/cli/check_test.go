package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// checkServer has a volume in each state that a check may find.
type checkServer struct {
	fakeServer
	trash []*atollv1.TrashEntry
	kept  []*atollv1.KeptMedium
}

func (f *checkServer) CheckVolume(_ context.Context, r *atollv1.CheckVolumeRequest) (*atollv1.CheckVolumeResponse, error) {
	switch r.Name + r.Id {
	case "hurt":
		return &atollv1.CheckVolumeResponse{Blocks: 7, Problems: []string{"block 3 is gone"}}, nil
	case "away":
		return &atollv1.CheckVolumeResponse{Blocks: 7, Unchecked: []string{"node 2 is down"}}, nil
	case "t2":
		return &atollv1.CheckVolumeResponse{Blocks: 9}, nil
	case "gone", "t1":
		return nil, fmt.Errorf("volume %q: %w", r.Name+r.Id, atoll.ErrNotExist)
	}
	out := &atollv1.CheckVolumeResponse{Blocks: 5}
	if r.ReadAll {
		out.CheckedBytes = 3 << 20
	}
	return out, nil
}

func (f *checkServer) ListTrash(context.Context, *atollv1.ListTrashRequest) (*atollv1.ListTrashResponse, error) {
	return &atollv1.ListTrashResponse{Entries: f.trash}, nil
}

func (f *checkServer) Status(context.Context) (*atollv1.GetStatusResponse, error) {
	return &atollv1.GetStatusResponse{Kept: f.kept}, nil
}

// runCheck runs "atoll check" with what checks a stopped server.
func runCheck(t *testing.T, offline OfflineCheck, args ...string) (code int, out, err string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	app := &App{In: strings.NewReader(""), Out: &stdout, Err: &stderr}
	root := New(app, "test")
	root.AddCommand(app.CheckCommand(offline))
	code = Run(t.Context(), app, root, append([]string{"check"}, args...))
	for _, l := range tooWide(stdout.String()) {
		if !strings.HasPrefix(l, "{") {
			t.Errorf("too wide: %s", l)
		}
	}
	return code, stdout.String(), stderr.String()
}

// A check tells the state of every volume, and the worst of them by its code.
func TestCheckAll(t *testing.T) {
	f := &checkServer{}
	serveFake(t, f)
	for _, w := range []struct {
		volumes string
		args    []string
		code    int
		want    []string
	}{
		{"a b", nil, 0, []string{"consistent  a: 5 blocks mapped\n", "consistent  b: ", "\n2 volumes consistent\n"}},
		{"a b", []string{"b", "--read"}, 0, []string{"consistent  b: 5 blocks mapped; 3 MiB of copies read", "\n1 volume consistent\n"}},
		{"a hurt away", nil, ExitDamaged, []string{"damaged     hurt: ", "block 3 is gone\n", "unchecked   away: ", "node 2 is down\n"}},
		{"a away", nil, ExitUnavailable, []string{"consistent  a", "unchecked   away"}},
		{"a gone", nil, 0, []string{"\n1 volume consistent\n"}}, // removed meanwhile
		{"a", []string{"gone"}, ExitNotFound, []string{"failed      gone: "}},
		{"", nil, 0, []string{"0 volumes consistent"}},
	} {
		f.volumes = nil
		for _, name := range strings.Fields(w.volumes) {
			f.volumes = append(f.volumes, &atollv1.Volume{Name: name})
		}
		code, out, err := runCheck(t, nil, w.args...)
		if code != w.code {
			t.Errorf("%s %v: %d\n%s%s", w.volumes, w.args, code, out, err)
		}
		for _, s := range w.want {
			if !strings.Contains(out, s) {
				t.Errorf("%s %v: no %q in\n%s%s", w.volumes, w.args, s, out, err)
			}
		}
	}
	// With all, what is in the trash, and deleted ones that clones need.
	f.volumes = []*atollv1.Volume{{Name: "a"}}
	f.trash = []*atollv1.TrashEntry{{Id: "t1", Path: "purged"}, {Id: "t2", Path: "old"}}
	f.kept = []*atollv1.KeptMedium{{Id: "hurt", Name: "parent"}}
	code, out, _ := runCheck(t, nil)
	for _, s := range []string{"consistent  a: 5", "consistent  old (in the trash, t2): 9 ", "damaged     parent (deleted, hurt): "} {
		if !strings.Contains(out, s) || code != ExitDamaged {
			t.Errorf("%d, no %q in\n%s", code, s, out)
		}
	}
	f.trash, f.kept = nil, nil
	f.volumes = []*atollv1.Volume{{Name: "a"}, {Name: "hurt"}}
	code, out, _ = runCheck(t, nil, "-o", "json")
	var got []struct {
		Name, State string
		Check       struct{ Blocks int }
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != ExitDamaged || len(got) != 2 || got[0].State != "consistent" || got[1].State != "damaged" || got[1].Check.Blocks != 7 {
		t.Errorf("%d %v %v\n%s", code, got, err, out)
	}
	if _, out, _ := runCheck(t, nil, "-o", "jsonl"); strings.Count(out, "\n") != 2 {
		t.Errorf("lines:\n%s", out)
	}
}

// With --data nothing is asked of a server that runs.
func TestCheckStopped(t *testing.T) {
	t.Setenv("ATOLL_SERVER", "unix:/nowhere/api.sock")
	offline := func(_ context.Context, data string, disks, names []string, read bool, each func(string, *atollv1.CheckVolumeResponse, error)) error {
		if data != "/d" || !slices.Equal(disks, []string{"/x", "/y"}) || !slices.Equal(names, []string{"a", "b"}) || !read {
			return fmt.Errorf("got %q %q %q %v: %w", data, disks, names, read, atoll.ErrInvalid)
		}
		each("a", &atollv1.CheckVolumeResponse{}, nil)
		each("b", nil, fmt.Errorf("open it: %w", atoll.ErrTimeout))
		return nil
	}
	code, out, err := runCheck(t, offline, "--data", "/d", "--disk", "/x", "--disk", "/y", "--read", "a", "vol/b")
	if code != ExitUnavailable || !strings.Contains(out, "failed      b: open it") || !strings.Contains(err, "1 of 2 volumes could not be checked") {
		t.Errorf("%d\n%s%s", code, out, err)
	}
	busy := func(context.Context, string, []string, []string, bool, func(string, *atollv1.CheckVolumeResponse, error)) error {
		return fmt.Errorf("a server runs: %w", atoll.ErrBusy)
	}
	if code, _, _ := runCheck(t, busy, "--data", "/d"); code != ExitBusy {
		t.Errorf("in use: %d", code)
	}
	if code, _, _ := runCheck(t, busy, "--disk", "/d"); code != ExitUsage {
		t.Errorf("disks only: %d", code)
	}
}
