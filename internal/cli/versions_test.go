package cli

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/rbdstream"
)

// fakeVersions is a fake server with versions, limits, a tree and a trash.
type fakeVersions struct {
	fakeServer
	created *atollv1.CreateVersionRequest
	limits  *atollv1.SetLimitsRequest
	deleted []string
}

func (f *fakeVersions) ListVersions(_ context.Context, r *atollv1.ListVersionsRequest) (*atollv1.ListVersionsResponse, error) {
	if _, err := f.Volume(context.Background(), r.Name, false); err != nil {
		return nil, err
	}
	at := timestamppb.New(time.Now().Add(-time.Hour))
	return &atollv1.ListVersionsResponse{CurParent: 1, Last: 12, Release: 1, Versions: []*atollv1.Version{
		{Number: 1, Name: "monday", Time: at, SizeBytes: 10 << 30, UsedBytes: 123 << 20, UniqueBytes: -1, Release: true, Children: []string{"a", "b"}, Medium: r.Name},
		{Number: 5, Name: "a-rather-long-name", Time: at, SizeBytes: 64 << 40, UsedBytes: 1023 << 20, UniqueBytes: 999 << 20, Parent: 1, Protected: true, Memo: "a remark that is much too long for a line of eighty columns"},
		{Number: 11, Time: at, Properties: map[string]string{temporaryProperty: "1"}},
		{Number: 12, Time: timestamppb.New(time.Now().AddDate(-3, 0, 0)), SizeBytes: 10 << 30, Parent: 1, Last: true},
	}}, nil
}

func (f *fakeVersions) CreateVersion(_ context.Context, r *atollv1.CreateVersionRequest) (*atollv1.CreateVersionResponse, error) {
	f.created = r
	out := &atollv1.CreateVersionResponse{}
	for _, m := range r.Media {
		out.Versions = append(out.Versions, &atollv1.Version{Number: 13, Name: r.Name, Medium: m})
	}
	return out, nil
}

func (f *fakeVersions) DeleteVersion(_ context.Context, r *atollv1.DeleteVersionRequest) (*atollv1.DeleteVersionResponse, error) {
	if strings.HasSuffix(r.Name, "@mondy") {
		return nil, fmt.Errorf("version %q: %w", r.Name, atoll.ErrNotExist)
	}
	f.deleted = append(f.deleted, r.Name)
	return &atollv1.DeleteVersionResponse{Versions: 1, Bytes: 1 << 20}, nil
}

func (f *fakeVersions) SetLimits(_ context.Context, r *atollv1.SetLimitsRequest) (*atollv1.Limits, error) {
	f.limits = r
	return r.Limits, nil
}

func (f *fakeVersions) DeleteVolume(ctx context.Context, r *atollv1.DeleteVolumeRequest) (*atollv1.DeleteVolumeResponse, error) {
	resp, err := f.fakeServer.DeleteVolume(ctx, r)
	if err == nil && !r.Now {
		resp.TrashId, resp.Expires = "0123456789abcdef", timestamppb.New(time.Now().Add(time.Hour))
	}
	return resp, err
}

func (f *fakeVersions) ListTrash(context.Context, *atollv1.ListTrashRequest) (*atollv1.ListTrashResponse, error) {
	at := timestamppb.Now()
	return &atollv1.ListTrashResponse{Entries: []*atollv1.TrashEntry{
		{Id: "0123456789abcdef", Path: "disk1", SizeBytes: 1 << 30, Removed: at, Expires: at},
		{Id: "0123456799999999", Path: "disk1", SizeBytes: 2 << 30, Removed: timestamppb.New(time.Now().Add(-time.Hour))},
		{Id: "fedcba9876543210", Path: "projects/x", SizeBytes: 1 << 30, Removed: at, Expires: at},
	}}, nil
}

func (f *fakeVersions) RestoreTrash(_ context.Context, r *atollv1.RestoreTrashRequest) (*atollv1.Entry, error) {
	return &atollv1.Entry{Path: r.Id}, nil
}

func (f *fakeVersions) ListDirectory(_ context.Context, r *atollv1.ListDirectoryRequest) (*atollv1.ListDirectoryResponse, error) {
	if r.Path != "" {
		return &atollv1.ListDirectoryResponse{Entries: []*atollv1.Entry{{Path: r.Path + "/mail", Kind: "volume", SizeBytes: 1 << 40, Owner: "alice", InUse: true}}}, nil
	}
	return &atollv1.ListDirectoryResponse{Entries: []*atollv1.Entry{{Path: "disk1", Kind: "volume", SizeBytes: 1 << 30}, {Path: "projects", Kind: kindDir}}}, nil
}

// What versions, the trash and directories look like on a terminal.
func TestVersionTables(t *testing.T) {
	f := &fakeVersions{fakeServer: fakeServer{volumes: twoVolumes()}}
	serveFake(t, f)
	for _, args := range [][]string{{"volume", "versions", "disk1"}, {"volume", "versions", "disk1", "--unique"}, {"snap", "ls", "disk1"}, {"volume", "ls", "-l"}, {"volume", "trash", "ls"}, {"ls", "-r"},
		{"rbd", "snap", "ls", "disk1"}, {"volume", "versions", "disk1", "--all"}} {
		code, out, err := run(t, args...)
		if code != 0 || err != "" {
			t.Errorf("%v: %d %s", args, code, err)
		}
		for _, l := range tooWide(out) {
			t.Errorf("%v: too wide: %s", args, l)
		}
	}
	_, out, _ := run(t, "volume", "versions", "disk1")
	for _, want := range []string{"release, cur is from", "protected; a", "…\n", "12  -  ", "last, from 1\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("versions lack %q:\n%s", want, out)
		}
	}
	if strings.Contains(out, "\n11 ") {
		t.Errorf("a version that a command made for itself is shown:\n%s", out)
	}
	if _, out, _ := run(t, "volume", "versions", "disk1", "-o", "jsonl"); strings.Count(out, "\n") != 3 || !strings.Contains(out, `"usedBytes":128974848`) {
		t.Errorf("jsonl:\n%s", out)
	}
	if _, out, _ := run(t, "volume", "trash", "ls"); !strings.Contains(out, "012345678 ") || !strings.Contains(out, "fedcba98 ") || !strings.Contains(out, "never") {
		t.Errorf("ids that tell entries apart, and no more:\n%s", out)
	}
	if _, out, _ := run(t, "ls", "-r"); !strings.Contains(out, "projects/mail\n") || !strings.Contains(out, "projects/\n") {
		t.Errorf("ls:\n%s", out)
	}
}

// Verbs say what they did, and what undoes it.
func TestVersionVerbs(t *testing.T) {
	f := &fakeVersions{fakeServer: fakeServer{volumes: twoVolumes()}}
	serveFake(t, f)
	for _, w := range []struct {
		args     string
		code     int
		out, err string
	}{
		{"volume backup disk1@new -m x", 0, "disk1@new  version 13, ", ""},
		{"volume backup disk1 projects/build-cache --name n", 0, "projects/build-cache@n  version 13", ""},
		{"volume backup disk1@a disk1@b", 2, "", "one name"},
		{"volume backup disk1@", 2, "", "names no version"},
		{"snap rm disk1@monday", 0, "deleted disk1@monday (1 MiB in each copy)", ""},
		{"snap rm disk1 --snap monday -n", 0, "would delete disk1@monday", ""},
		{"snap rm disk1", 2, "", "as in disk1@last"},
		{"snap rm disk1@mondy", 3, "", `did you mean "disk1@monday"?`},
		{"volume rm disk1@monday", 2, "", "atoll snap rm disk1@monday"},
		{"snap purge disk1", 2, "", "--yes"},
		{"volume rm disk1", 0, "disk1 is in the trash, kept until ", "undo with: atoll volume trash restore 0123456789abcdef"},
		{"volume rm disk1 --now --yes", 0, "deleted disk1 (5 MiB in each copy)", ""},
		{"volume trash restore disk1", 0, "0123456789abcdef is back", ""}, // the newest of that name
		{"volume trash restore fedc", 0, "fedcba9876543210 is back", ""},
		{"volume trash restore 0123", 2, "", "the beginning of 2 ids"},
		{"volume trash restore nope", 3, "", "trash ls"},
		{"volume limits disk1 --iops 100:200:10s --bytes 1M", 0, "iops     100    200       10", ""},
		{"volume limits disk1 --iops 100:50", 2, "", "the burst is less"},
		{"volume limits disk1 --bytes 100", 2, "", "no unit"},
		{"volume limits disk1 --iops x", 2, "", "not a number"},
		{"volume export disk1@monday -o xml f", 2, "", "unknown output"},
		{"volume export disk1@monday --export-format 2 f", 2, "", "name the volume alone"},
		{"volume import f x --stripe-unit 64K", 2, "", "go together"},
		{"volume create x 1G --object-size 3M --stripe-unit 3M --stripe-count 2", 2, "", "does not divide"},
		{"volume info disk1@monday", 0, "size         10 GiB", ""},
		{"volume url disk1@last", 0, "nbd+unix:///disk1@12?socket=/run/atoll/nbd.sock", ""},
		{"volume info disk1@7", 3, "", "does not exist"},
		{"volume ls --format json", 0, `"volumes": [`, ""},
		{"user add eve", 2, "", "nothing on standard input"},
	} {
		code, out, err := run(t, strings.Fields(w.args)...)
		if code != w.code || !strings.Contains(out, w.out) || !strings.Contains(err, w.err) || w.out == "" && out != "" {
			t.Errorf("%s: %d\n%s%s", w.args, code, out, err)
		}
	}
	run(t, strings.Fields("snap purge disk1 --yes")...)
	if got := strings.Join(f.deleted, " "); !strings.HasSuffix(got, " disk1@1 disk1@12") {
		t.Errorf("purge deleted %s", got)
	}
}

// Names of versions complete too.
func TestCompleteVersions(t *testing.T) {
	serveFake(t, &fakeVersions{fakeServer: fakeServer{volumes: twoVolumes()}})
	for _, w := range []struct{ line, want string }{
		{"volume export disk1@", "disk1@monday disk1@a-rather-long-name disk1@12"},
		{"volume export disk1@m", "disk1@monday"},
		{"snap rm dis", "disk1@"},
		{"volume backup dis", "disk1"},
		{"rbd snap ro", "rollback"},
		{"rbd export disk1@a", "disk1@a-rather-long-name"},
		{"ls p", "projects/"},
		{"ls projects/", "projects/mail"},
		{"volume trash restore f", "fedcba98"},
	} {
		args := strings.Fields(w.line)
		_, out, _ := run(t, append([]string{"__complete"}, args...)...)
		var words []string
		for _, l := range strings.Split(strings.TrimSpace(out), "\n") {
			if word, _, _ := strings.Cut(l, "\t"); !strings.HasPrefix(word, ":") {
				words = append(words, word)
			}
		}
		if got := strings.Join(words, " "); got != w.want {
			t.Errorf("%s completes to %q, want %q", w.line, got, w.want)
		}
	}
}

// An image's layout and exact size survive as properties of a volume.
func TestImageProperties(t *testing.T) {
	h := rbdstream.DefaultHeader()
	if p := headerProperties(h); len(p) != 0 {
		t.Errorf("the usual layout needs no properties, got %v", p)
	}
	l := layoutFlags{objectSize: "8M", stripeUnit: "64K", stripeCount: 4, features: []string{"layering,journaling"}}
	change, err := l.override()
	if err != nil {
		t.Fatal(err)
	}
	change(&h)
	h.Meta = []rbdstream.Meta{{Key: "a", Value: "1"}, {Key: "b", Value: "2"}}
	got := header(headerProperties(h))
	if got.Order != 23 || got.StripeUnit != 64<<10 || got.StripeCount != 4 || got.Features != 1|2|64 || fmt.Sprint(got.Meta) != "[{a 1} {b 2}]" {
		t.Errorf("%+v", got)
	}
	big := rbdstream.DefaultHeader()
	big.Order, big.StripeUnit = 23, 8<<20
	if got := header(headerProperties(big)); got.StripeUnit != 8<<20 || got.Order != 23 {
		t.Errorf("%+v", got)
	}
	for _, w := range []struct {
		kept       string
		size, want int64
	}{
		{"", 8192, 8192}, {"5000", 8192, 5000}, {"4096", 8192, 8192}, {"9000", 8192, 8192}, {"0", 4096, 0}, {"-1", 4096, 4096}, {"x", 4096, 4096},
	} {
		if got := exactSize(map[string]string{propSize: w.kept}, w.size); got != w.want {
			t.Errorf("size %q of a volume of %d: %d, want %d", w.kept, w.size, got, w.want)
		}
	}
}

// Names that rbd allows and that mean something else here come back as they were.
func TestKeptNames(t *testing.T) {
	for _, name := range []string{"monday", "20240101", "~20240101", "~~1", "last", "~cur", "release", "~", "~x", "1x"} {
		kept := keptName(name)
		if needsTilde(kept) || streamName(kept) != name {
			t.Errorf("%q is kept as %q and comes back as %q", name, kept, streamName(kept))
		}
	}
	r := &atollv1.ListVersionsResponse{Last: 3, Release: 1, Versions: []*atollv1.Version{{Number: 1, Name: "a"}, {Number: 2, Name: "~3"}, {Number: 3}}}
	for name, want := range map[string]uint64{"a": 1, "1": 1, "3": 2, "2": 2, "last": 3, "release": 1, "4": 0, "b": 0, "": 0} {
		if v := findSnap(r, name); v.GetNumber() != want {
			t.Errorf("%q is version %d, want %d", name, v.GetNumber(), want)
		}
	}
}

func TestParseExpiry(t *testing.T) {
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.Local)
	for text, want := range map[string]time.Time{
		"now": now, "36h": now.Add(36 * time.Hour), "7d": now.AddDate(0, 0, 7), "2w": now.AddDate(0, 0, 14), "3 days": now.AddDate(0, 0, 3),
		"1 hour": now.Add(time.Hour), "in 2 weeks": now.AddDate(0, 0, 14), "2026-12-01": time.Date(2026, 12, 1, 0, 0, 0, 0, time.Local),
		"2026-12-01 10:30": time.Date(2026, 12, 1, 10, 30, 0, 0, time.Local),
	} {
		if got, err := parseExpiry(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "soon", "-1h", "3 fortnights", "2026-13-01", "d"} {
		if got, err := parseExpiry(text, now); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}
