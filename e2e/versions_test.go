package e2e_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd"
)

// versionJSON is a version as the command line shows it.
type versionJSON struct {
	Number                       uint64
	Name                         string
	SizeBytes, UsedBytes, Unique int64
	Last, Release, Protected     bool
	Children                     []string
	Medium, MediumID, Memo, Time string
	Parent                       uint64
	Deleting, Internal           bool
	Properties                   map[string]string
	Group                        string
	UniqueBytes                  int64
}

func (s *server) versions(name string) []versionJSON {
	s.t.Helper()
	var out struct{ Versions []versionJSON }
	s.ask(&out, "volume", "versions", name)
	return out.Versions
}

// contents is the checksum of a volume or version, as an export gives it.
func (s *server) contents(spec string) [32]byte {
	s.t.Helper()
	path := filepath.Join(s.dir, "contents")
	defer os.Remove(path)
	s.atoll("volume", "export", spec, path)
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// same fails unless volumes or versions hold the same.
func (s *server) same(what string, specs ...string) {
	s.t.Helper()
	want := s.contents(specs[0])
	for _, spec := range specs[1:] {
		if got := s.contents(spec); got != want {
			s.t.Errorf("%s: %s and %s differ", what, specs[0], spec)
		}
	}
}

// checkAll proves all volumes consistent.
func (s *server) checkAll() {
	s.t.Helper()
	var out struct{ Volumes []volumeJSON }
	s.ask(&out, "volume", "ls")
	for _, v := range out.Volumes {
		s.atoll("volume", "check", v.Name, "--read")
	}
}

// pattern fills a range of a volume with a byte.
func (s *server) pattern(name string, fill byte, off, n int64) {
	s.t.Helper()
	c := dial(s.t, s.uri(name))
	defer c.Close()
	if err := c.WriteAt(s.t.Context(), bytes.Repeat([]byte{fill}, int(n)), off, true); err != nil {
		s.t.Fatal(err)
	}
}

// reads fails unless a range of a volume holds a byte throughout.
func (s *server) reads(name string, fill byte, off, n int64) {
	s.t.Helper()
	uri, err := nbd.ParseURI(s.uri(strings.Split(name, "@")[0]))
	if err != nil {
		s.t.Fatal(err)
	}
	uri.Export = name
	c := dial(s.t, uri.String())
	defer c.Close()
	got := make([]byte, n)
	if err := c.ReadAt(s.t.Context(), got, off); err != nil {
		s.t.Fatalf("read %s: %v", name, err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte{fill}, int(n))) {
		s.t.Errorf("%s at %d holds %#x…, want %#x", name, off, got[0], fill)
	}
}

// A user's life with versions: make, list, go back, undo, clone, delete, recover.
func TestVersions(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.create("disk1", "64M")
	s.pattern("disk1", 1, 0, 1<<20)
	if out := s.atoll("volume", "backup", "disk1@monday", "-m", "first"); !strings.HasPrefix(out, "disk1@monday  version ") {
		t.Errorf("backup says %q", out)
	}
	s.pattern("disk1", 2, 512<<10, 1<<20)
	s.atoll("snap", "create", "disk1@tuesday")
	s.pattern("disk1", 3, 1<<20, 1<<20)
	v := s.versions("disk1")
	if len(v) != 2 || v[0].Name != "monday" || v[0].Memo != "first" || v[0].UsedBytes != 1<<20 || !v[1].Last || v[1].SizeBytes != 64<<20 {
		t.Errorf("versions: %+v", v)
	}
	if out := s.atoll("volume", "versions", "disk1"); !strings.Contains(out, "monday ") || !strings.Contains(out, "last") || !strings.Contains(out, "first") {
		t.Errorf("versions:\n%s", out)
	}
	s.reads("disk1@monday", 1, 0, 1<<20)
	s.reads("disk1@monday", 0, 1<<20, 1<<20)
	s.reads("disk1@last", 2, 512<<10, 1<<20)
	// The diff is exact.
	if out := s.atoll("volume", "diff", "disk1@tuesday", "--from-snap", "monday", "-o", "jsonl"); out != "{\"length\":1048576,\"offset\":524288,\"zero\":false}\n" {
		t.Errorf("diff: %s", out)
	}
	// Back, and back again.
	r := s.try("volume", "restore", "disk1@monday")
	if r.code != 0 || !strings.Contains(r.out, "disk1 is as it was in version monday") || !strings.Contains(r.err, "undo with: atoll volume restore disk1@") {
		t.Fatalf("restore: %+v", r)
	}
	s.same("after the restore", "disk1", "disk1@monday")
	undo := strings.Fields(r.err[strings.LastIndex(r.err, "atoll volume"):])
	s.atoll(undo[1:]...)
	s.reads("disk1", 3, 1<<20, 1<<20)
	s.reads("disk1", 2, 512<<10, 512<<10)
	s.atoll("snap", "rollback", "disk1@tuesday")
	s.same("after the rollback", "disk1", "disk1@tuesday")

	s.atoll("volume", "release", "disk1@monday")
	s.same("released", "disk1@release", "disk1@monday")
	s.atoll("snap", "protect", "disk1@monday")
	if r := s.try("snap", "rm", "disk1@monday"); r.code != 6 {
		t.Errorf("a protected version was deleted: %+v", r)
	}
	s.atoll("snap", "unprotect", "disk1@monday")
	if r := s.try("volume", "backup", "disk1@monday"); r.code != 4 {
		t.Errorf("two versions of one name: %+v", r)
	}
	s.atoll("snap", "rename", "disk1@tuesday", "wednesday")
	if r := s.try("volume", "export", "disk1@wendesday", "-"); r.code != 3 || !strings.Contains(r.err, `did you mean "disk1@wednesday"?`) {
		t.Errorf("a version that is not there: %+v", r)
	}
	s.clones()
	s.trash()
	s.checkAll()
}

// clones makes clones of clones and takes their parents away.
func (s *server) clones() {
	t := s.t
	t.Helper()
	s.atoll("volume", "clone", "disk1@monday", "c1")
	s.pattern("c1", 9, 2<<20, 64<<10)
	s.atoll("volume", "clone", "c1", "c2")
	s.pattern("c2", 10, 0, 4096)
	s.atoll("volume", "backup", "c2@leaf")
	s.atoll("volume", "clone", "c2@leaf", "sub/c3")
	if out := s.atoll("volume", "children", "disk1", "--descendants"); !strings.Contains(out, "c1 ") || !strings.Contains(out, "sub/c3") {
		t.Errorf("children:\n%s", out)
	}
	before := s.contents("sub/c3")
	s.atoll("snap", "rm", "disk1@monday", "c2@leaf")
	s.atoll("volume", "rm", "c1", "--now", "--yes")
	s.atoll("volume", "rm", "c2", "--now", "--yes")
	if s.contents("sub/c3") != before {
		t.Error("a clone changed when its parents went")
	}
	s.reads("sub/c3", 10, 0, 4096)
	s.reads("sub/c3", 1, 4096, 4096)
	s.reads("sub/c3", 9, 2<<20, 64<<10)
	if out := s.atoll("volume", "ls"); strings.Contains(out, "c1 ") || strings.Contains(out, "c2 ") {
		t.Errorf("ls shows removed parents:\n%s", out)
	}
	s.atoll("volume", "flatten", "sub/c3")
	if s.contents("sub/c3") != before {
		t.Error("a clone changed when it was flattened")
	}
	s.atoll("volume", "cp", "sub/c3", "copy", "--history")
	s.same("a copy", "sub/c3", "copy")
}

// trash removes a volume and gets it back.
func (s *server) trash() {
	t := s.t
	t.Helper()
	before := s.contents("disk1")
	versions := len(s.versions("disk1"))
	r := s.try("volume", "rm", "disk1")
	if r.code != 0 || !strings.Contains(r.out, "disk1 is in the trash") || !strings.Contains(r.err, "undo with: atoll volume trash restore ") {
		t.Fatalf("rm: %+v", r)
	}
	if r := s.try("volume", "info", "disk1"); r.code != 3 {
		t.Errorf("info of a volume in the trash: %+v", r)
	}
	s.create("disk1", "4M") // the name is free
	if r := s.try("volume", "trash", "restore", "disk1"); r.code != 4 {
		t.Errorf("restore onto a name that is taken: %+v", r)
	}
	s.atoll("volume", "trash", "restore", "disk1", "--image", "disk1-back")
	if s.contents("disk1-back") != before || len(s.versions("disk1-back")) != versions {
		t.Error("what came back from the trash differs")
	}
	s.atoll("volume", "rm", "disk1")
	if out := s.atoll("volume", "trash", "ls"); !strings.Contains(out, "4 MiB") || !strings.Contains(out, "disk1\n") {
		t.Errorf("trash:\n%s", out)
	}
	s.atoll("volume", "trash", "rm", "disk1", "--yes")
	if r := s.try("volume", "trash", "restore", "disk1"); r.code != 3 {
		t.Errorf("restore of what was removed for good: %+v", r)
	}
}

// Versions taken while a volume is written hold every write that was answered
// before, none that was begun after, and nothing out of order.
func TestBackupUnderLoad(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	const blocks = 2048
	uri := s.create("disk1", "8M")
	s.create("disk2", "8M")
	s.noHoles("disk1")
	var issued, answered atomic.Uint64
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- writeStamps(ctx, s, uri, blocks, &issued, &answered) }()
	type cut struct{ from, to uint64 }
	var cuts []cut
	for i := range 12 {
		from := answered.Load()
		s.atoll("volume", "backup", "disk1", "disk2", "--name", fmt.Sprintf("v%d", i))
		cuts = append(cuts, cut{from, issued.Load()})
		time.Sleep(20 * time.Millisecond)
	}
	// An export of the head is of one moment, too.
	from := answered.Load()
	s.atoll("volume", "export", "disk1", filepath.Join(s.dir, "head"), "--concurrency", "1", "--connections", "1")
	head := cut{from, issued.Load()}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pairs of writes under %d backups of the group", issued.Load(), len(cuts))
	for i, c := range cuts {
		one := readStamps(t, uri, fmt.Sprintf("disk1@v%d", i), blocks)
		two := readStamps(t, uri, fmt.Sprintf("disk2@v%d", i), blocks)
		if one < c.from || one > c.to {
			t.Errorf("v%d holds writes up to %d; %d had been answered before it and %d were begun before its end", i, one, c.from, c.to)
		}
		// A pair is written to disk1 first.
		if one != two && one != two+1 {
			t.Errorf("v%d: disk1 is at write %d and disk2 at %d", i, one, two)
		}
	}
	all, err := os.ReadFile(filepath.Join(s.dir, "head"))
	if err != nil {
		t.Fatal(err)
	}
	if n := lastStamp(t, "the export", all); n < head.from || n > head.to {
		t.Errorf("the export holds writes up to %d, want %d to %d", n, head.from, head.to)
	} else {
		t.Logf("the export holds writes up to %d; %d were answered before it, %d begun before its end", n, head.from, head.to)
	}
	if r := s.atoll("volume", "versions", "disk1", "-o", "json"); strings.Count(r, `"group": "`) != len(cuts) {
		t.Errorf("versions of a group:\n%s", r)
	}
	s.checkAll()
}

// noHoles fills a volume with blocks that hold data but no stamp.
func (s *server) noHoles(name string) {
	s.t.Helper()
	c := dial(s.t, s.uri(name))
	defer c.Close()
	p := bytes.Repeat([]byte{1}, int(c.Size()))
	for off := 0; off < len(p); off += blockSize {
		clear(p[off : off+8])
	}
	if err := c.WriteAt(s.t.Context(), p, 0, false); err != nil {
		s.t.Fatal(err)
	}
}

// stampBlock is where the write with a number goes: all over the volume, so that
// what is read bit by bit shows. blocks is a power of two.
func stampBlock(n, blocks uint64) uint64 { return n * 769 % blocks }

// writeStamps writes rising numbers to one block after the other, each to disk1 and then
// to disk2.
func writeStamps(ctx context.Context, s *server, uri string, blocks uint64, issued, answered *atomic.Uint64) error {
	var conns [2]*nbd.Client
	addr, err := nbd.ParseURI(uri)
	if err != nil {
		return err
	}
	for i, name := range []string{"disk1", "disk2"} {
		addr.Export = name
		if conns[i], err = nbd.Dial(ctx, addr.String(), nbd.DialOptions{}); err != nil {
			return err
		}
		defer conns[i].Close()
	}
	p := make([]byte, blockSize)
	for n := uint64(1); ctx.Err() == nil; n++ {
		binary.LittleEndian.PutUint64(p, n)
		issued.Store(n)
		for _, c := range conns {
			if err := c.WriteAt(context.WithoutCancel(ctx), p, int64(stampBlock(n, blocks))*blockSize, false); err != nil {
				return err
			}
		}
		answered.Store(n)
	}
	return nil
}

// readStamps returns the last write that a version holds.
func readStamps(t *testing.T, uri, export string, blocks uint64) uint64 {
	t.Helper()
	addr, err := nbd.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	addr.Export = export
	c := dial(t, addr.String())
	defer c.Close()
	all := make([]byte, blocks*blockSize)
	if err := c.ReadAt(t.Context(), all, 0); err != nil {
		t.Fatal(err)
	}
	return lastStamp(t, export, all)
}

// lastStamp returns the last write that the bytes hold; they must hold all before
// it.
func lastStamp(t *testing.T, what string, all []byte) uint64 {
	t.Helper()
	blocks := uint64(len(all)) / blockSize
	stamp := func(b uint64) uint64 { return binary.LittleEndian.Uint64(all[b*blockSize:]) }
	last := uint64(0)
	for b := range blocks {
		last = max(last, stamp(b))
	}
	for n := range blocks {
		b := stampBlock(n, blocks)
		want := last - (last+blocks-n)%blocks // the last number up to last that goes to block b
		if want > last {
			want = 0 // before the first
		}
		if got := stamp(b); got != want {
			t.Errorf("%s: block %d holds write %d, want %d (last is %d)", what, b, got, want, last)
			break
		}
	}
	return last
}

// Diffs carry one volume's history over to another, step by step, through writes,
// discards and resizes; a diff that is cut off or does not fit changes nothing.
func TestDiffChain(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	s.create("a", "16M")
	s.create("b", "16M")
	file := filepath.Join(s.dir, "diff")
	from := ""
	for i := range 5 {
		s.scribble("a", rng)
		if i == 2 {
			s.atoll("volume", "resize", "a", "24M")
		}
		if i == 3 {
			s.atoll("volume", "resize", "a", "12M", "--shrink")
		}
		name := fmt.Sprintf("s%d", i)
		s.atoll("snap", "create", "a@"+name)
		args := []string{"volume", "export-diff", "a@" + name, file}
		if from != "" {
			args = append(args, "--from-snap", from)
		}
		s.atoll(args...)
		before := s.contents("b")
		s.cutDiff(file, "b", rng)
		if s.contents("b") != before {
			t.Errorf("%s: a diff that was cut off changed the volume", name)
		}
		s.atoll("volume", "import-diff", file, "b")
		s.same(name, "a@"+name, "b", "b@"+name)
		if r := s.try("volume", "import-diff", file, "b"); r.code == 0 {
			t.Errorf("%s: a diff was applied twice", name)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		from = name
	}
	// A head that was written since does not take a diff.
	s.scribble("a", rng)
	s.atoll("volume", "export-diff", "a", file, "--from-snap", from)
	s.pattern("b", 77, 0, 4096)
	if r := s.try("volume", "import-diff", file, "b"); r.code == 0 || !strings.Contains(r.err, "roll") {
		t.Errorf("a diff was applied to another state: %+v", r)
	}
	s.atoll("snap", "rollback", "b@"+from)
	s.atoll("volume", "import-diff", file, "b")
	s.same("the head", "a", "b")
	// All at once: format 2.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	s.atoll("volume", "export", "a", file, "--export-format", "2")
	s.atoll("volume", "import", file, "c", "--export-format", "2")
	for i := range 5 {
		s.same("format 2", fmt.Sprintf("a@s%d", i), fmt.Sprintf("c@s%d", i))
	}
	s.same("format 2", "a", "c")
	s.checkAll()
}

// scribble writes, zeroes and discards at random.
func (s *server) scribble(name string, rng *rand.Rand) {
	s.t.Helper()
	c := dial(s.t, s.uri(name))
	defer c.Close()
	ctx := s.t.Context()
	for range 30 {
		off, n := rng.Int64N(c.Size()-1), 1+rng.Int64N(100<<10)
		n = min(n, c.Size()-off)
		var err error
		switch rng.IntN(4) {
		case 0:
			err = c.Zero(ctx, off, n, true, false)
		case 1:
			err = c.Trim(ctx, off, n, false)
		default:
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			err = c.WriteAt(ctx, p, off, false)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if err := c.Flush(ctx); err != nil {
		s.t.Fatal(err)
	}
}

// cutDiff tries to apply a diff that ends too soon.
func (s *server) cutDiff(file, volume string, rng *rand.Rand) {
	s.t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	n := len(b) - 1
	if rng.IntN(2) == 0 {
		n = rng.IntN(len(b))
	}
	if err := os.WriteFile(file+".cut", b[:n], 0o644); err != nil {
		s.t.Fatal(err)
	}
	if r := s.try("volume", "import-diff", file+".cut", volume); r.code == 0 {
		s.t.Errorf("a diff of %d of %d bytes was applied", n, len(b))
	}
}

// Limits hold, at once and for all clients together, and go again.
func TestLimits(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.create("disk1", "64M")
	ops := func() float64 {
		var r struct{ OpsPerSecond float64 }
		s.ask(&r, "volume", "bench", "disk1", "--pattern", "randwrite", "--depth", "8", "--connections", "2", "--yes", "--duration", "2s")
		return r.OpsPerSecond
	}
	s.atoll("volume", "limits", "disk1", "--iops", "200")
	slow := ops()
	if slow > 320 || slow < 120 {
		t.Errorf("%.0f operations a second, with a limit of 200", slow)
	}
	if out := s.atoll("volume", "info", "disk1"); !strings.Contains(out, "limits       iops 200/s") {
		t.Errorf("info:\n%s", out)
	}
	s.atoll("volume", "limits", "disk1", "--iops", "none")
	if fast := ops(); fast < 2*slow {
		t.Errorf("%.0f operations a second without limits, %.0f with", fast, slow)
	}
	s.atoll("volume", "schedule", "disk1", "hourly=24,every=1m:2")
	eventually(t, "a version by the schedule", func() bool { return len(s.versions("disk1")) > 0 })
	s.atoll("volume", "schedule", "disk1", "none")
}

// Versions are made, read and used through a gateway that is not the volume's
// owner, while the owner's clients write on.
func TestVersionsElsewhere(t *testing.T) {
	t.Parallel()
	c := &cluster{t: t}
	c.join("controller,node")
	g1, g2 := c.join("gateway"), c.join("gateway")
	uri := g1.create("disk1", "32M")
	conn := dial(t, uri)
	defer conn.Close()
	write := func(fill byte, off int64) {
		t.Helper()
		if err := conn.WriteAt(t.Context(), bytes.Repeat([]byte{fill}, 1<<20), off, false); err != nil {
			t.Fatal(err)
		}
	}
	write(1, 0)
	g2.atoll("volume", "backup", "disk1@one")
	write(2, 1<<20)
	g2.same("read by another gateway", "disk1@one", "disk1@1")
	if g1.contents("disk1@one") != g2.contents("disk1@one") {
		t.Error("two gateways read one version differently")
	}
	if g1.contents("disk1") != g2.contents("disk1") || g2.contents("disk1") == g2.contents("disk1@one") {
		t.Error("the head through another gateway")
	}
	if out := g2.atoll("volume", "diff", "disk1", "--from-snap", "one", "-o", "jsonl"); !strings.Contains(out, `"offset":1048576`) {
		t.Errorf("diff through another gateway: %s", out)
	}
	file := filepath.Join(g2.dir, "diff")
	g2.atoll("volume", "export-diff", "disk1@one", file)
	g2.create("copy", "32M")
	g1.atoll("volume", "import-diff", file, "copy")
	g2.same("a diff", "disk1@one", "copy@one", "copy")
	g2.atoll("volume", "clone", "disk1@one", "clone")
	g1.same("a clone", "disk1@one", "clone")
	g2.atoll("volume", "cp", "disk1", "all", "--history")
	g1.same("a copy", "disk1@one", "all@one")
	write(3, 2<<20) // the owner is still the owner
	conn.Close()
	g2.atoll("volume", "restore", "disk1@one")
	g1.same("restored", "disk1", "disk1@one")
	g1.checkAll()
}

// Directories, owners and users.
func TestTree(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	with := func(stdin string, args ...string) result {
		t.Helper()
		return command(t, s.env, stdin, atollPath, append(args, "--server", s.socket())...)
	}
	if r := with("secret\n", "user", "add", "alice", "--strict"); r.code != 0 || r.out != "user alice added\n" {
		t.Errorf("user add: %+v", r)
	}
	if r := with("", "user", "add", "bob"); r.code != 2 {
		t.Errorf("a user without a word about the password: %+v", r)
	}
	if r := with("new\n", "user", "passwd", "alice", "--strict=false"); r.code != 0 {
		t.Errorf("passwd: %+v", r)
	}
	if out := s.atoll("user", "ls"); !regexp.MustCompile(`(?m)^alice +yes +no +no `).MatchString(out) || strings.Contains(out, "bob") {
		t.Errorf("users:\n%s", out)
	}
	s.atoll("mkdir", "-P", "projects/2026")
	if r := s.try("mkdir", "projects"); r.code != 4 {
		t.Errorf("mkdir of what is there: %+v", r)
	}
	s.create("projects/2026/mail", "4M", "--owner", "alice")
	s.create("web", "8M")
	if r := s.try("volume", "create", "nowhere/x/y", "4M"); r.code != 0 && r.code != 3 {
		t.Errorf("create below a directory that is not there: %+v", r)
	}
	if r := s.try("rmdir", "projects"); r.code != 6 {
		t.Errorf("rmdir of what is not empty: %+v", r)
	}
	if out := s.atoll("ls", "-r", "projects"); !strings.Contains(out, "alice") || !strings.Contains(out, "projects/2026/mail\n") {
		t.Errorf("ls:\n%s", out)
	}
	s.atoll("chown", "root", "projects/2026/mail")
	s.atoll("mv", "projects/2026/mail", "mail")
	if r := s.try("mv", "mail", "web"); r.code != 4 {
		t.Errorf("mv onto what is there: %+v", r)
	}
	s.atoll("mv", "mail", "web", "--replace")
	if v := s.volume("web"); v.SizeBytes != 4<<20 {
		t.Errorf("after mv --replace: %+v", v)
	}
	s.atoll("volume", "trash", "restore", "web", "--image", "web-old")
	if v := s.volume("web-old"); v.SizeBytes != 8<<20 {
		t.Errorf("what was replaced is not in the trash: %+v", v)
	}
	s.atoll("rmdir", "projects/2026", "projects")
	s.atoll("user", "rm", "alice")
	s.atoll("volume", "meta", "set", "web", "purpose", "mail server")
	if out := s.atoll("volume", "meta", "ls", "web"); !strings.Contains(out, "purpose  mail server\n") {
		t.Errorf("meta:\n%s", out)
	}
	// Names with characters that addresses do not like.
	s.pattern("web", 3, 0, 4096)
	s.atoll("volume", "backup", "web@a b?%41#")
	s.same("a strange name", "web", "web@a b?%41#")
}

// Versions outlive a crash of the server, and an import that was under way leaves
// no trace.
func TestVersionsCrash(t *testing.T) {
	t.Parallel()
	s := startServer(t)
	s.create("a", "16M")
	s.create("b", "16M")
	s.pattern("a", 1, 0, 8<<20)
	s.atoll("volume", "backup", "a@one")
	s.pattern("a", 2, 1<<20, 8<<20)
	file := filepath.Join(s.dir, "diff")
	s.atoll("volume", "export-diff", "a", file)
	s.pattern("b", 9, 0, 4096)
	s.atoll("volume", "export-diff", "b", file+".b")
	s.atoll("volume", "backup", "b@base")
	one, a, b := s.contents("a@one"), s.contents("a"), s.contents("b")

	// The stream ends amid the data, but not yet: its writer hangs.
	diff, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(atollPath, "volume", "import-diff", "-", "b", "--force", "--server", s.socket())
	cmd.Env = s.env
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = in.Write(diff[:len(diff)*2/3])
	}
	if err != nil {
		t.Fatal(err)
	}
	if r := s.try("volume", "import-diff", file+".b", "b", "--force"); r.code != 6 {
		t.Errorf("two imports at once: %+v", r)
	}
	time.Sleep(300 * time.Millisecond)
	s.kill()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	s.start()
	if s.contents("a@one") != one || s.contents("a") != a {
		t.Error("a volume or its version changed in the crash")
	}
	if s.contents("b") != b || s.contents("b@base") != b {
		t.Error("an import that was cut off by the crash changed the volume")
	}
	s.atoll("volume", "import-diff", file, "b", "--force")
	if s.contents("b") == b {
		t.Error("the import changed nothing")
	}
	s.checkAll()
}
