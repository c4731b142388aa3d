package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

const (
	// servedGoal is what the project promises for a medium whose owner died, and
	// servedLimit what fails the test: machines that run tests are busy, and some
	// are slow.
	servedGoal  = 4 * time.Second
	servedLimit = 2 * time.Minute
	healLimit   = 5 * time.Minute

	volume       = "disk1"
	volumeBlocks = 4096
)

// drill is a cluster with a volume and clients, to which one thing after the
// other happens.
type drill struct {
	*Cluster
	n *Nemesis
	r *Recorder
}

// newDrill makes five servers, three of them controllers.
func newDrill(t *testing.T, seed uint64) *drill {
	t.Helper()
	if s := os.Getenv("CHAOS_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("CHAOS_SEED: %v", err)
		}
	}
	t.Logf("CHAOS_SEED=%d", seed)
	c := newCluster(t, 5, 3)
	if _, err := c.Servers[4].Atoll(t.Context(), "volume", "create", volume, "16M", "--cache", "writethrough", "--replicas", "3"); err != nil {
		t.Fatal(err)
	}
	return &drill{c, NewNemesis(c, volume, seed), NewRecorder(c, volume, volumeBlocks, seed)}
}

// must ends the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var errNotYet = errors.New("not yet")

// served waits until an operation that began after the last Await has succeeded.
func (d *drill) served(t *testing.T, limit time.Duration, what string) time.Duration {
	t.Helper()
	_, err := Eventually(t.Context(), limit, "clients are served", func(context.Context) error {
		if _, ok := d.r.Served(); !ok {
			return errNotYet
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v; the last error of a client: %s", what, err, d.r.LastError())
	}
	after, _ := d.r.Served()
	return after
}

// run lets clients work, breaks something for a while and mends it, and looks
// whether all is well. With serve, clients must be served while it is broken.
func (d *drill) run(t *testing.T, serve bool, broken time.Duration, names ...string) {
	t.Helper()
	ctx := t.Context()
	ops, errs := d.r.Counts()
	d.r.Start()
	defer d.r.Stop()
	must(t, pause(ctx, time.Second))
	d.r.Mark()
	begun := time.Now()
	var all []Fault
	what := ""
	for _, name := range names {
		f, err := d.n.Begin(ctx, name)
		if err != nil && !serve { // such as the leader of etcd, while there is none
			t.Logf("not done: %v", err)
			must(t, errors.Join(d.World.Heal(), d.StartAll(ctx)))
			continue
		}
		must(t, err)
		what += name + " (" + f.What + ") "
		all = append(all, f)
	}
	d.r.Await()
	var served time.Duration
	if serve {
		served = d.served(t, servedLimit, what)
	}
	must(t, pause(ctx, broken-time.Since(begun)))
	stall := d.r.Stall()
	for _, f := range slices.Backward(all) { // the last may hide what the first hit
		if err := f.Mend(ctx); err != nil {
			t.Fatalf("%s: mend %s: %v", what, f.Name, err)
		}
	}
	if !serve {
		d.r.Await()
		served = d.served(t, healLimit, what+"mended")
	}
	green, err := d.Healthy(ctx, healLimit)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for _, f := range all {
		d.n.Note(f, served, stall, green)
	}
	must(t, pause(ctx, 300*time.Millisecond))
	d.r.Stop()
	ops2, errs2 := d.r.Counts()
	t.Logf("%s: served again after %v (goal %v), longest stall %v; green %v after it was mended; %d operations, clients came again %d times",
		what, served.Round(time.Millisecond), servedGoal, stall.Round(time.Millisecond), green.Round(time.Millisecond), ops2-ops, errs2-errs)
	d.verify(t)
}

// verify reads everything back and judges the histories.
func (d *drill) verify(t *testing.T) {
	t.Helper()
	begun := time.Now()
	var written int
	_, err := Eventually(t.Context(), healLimit, "everything can be read", func(ctx context.Context) (err error) {
		s, err := d.Owner(ctx, volume)
		if err != nil {
			s = d.n.any(d.Servers)
		}
		written, err = d.r.ReadAll(ctx, s)
		return err
	})
	must(t, err)
	v := d.r.Judge()
	d.r.Settle()
	for i, err := range v.Wrong {
		if i < 5 {
			t.Error(err)
		}
	}
	if len(v.Wrong)+v.Undecided > 0 {
		t.Fatalf("%d blocks are wrong, %d could not be judged", len(v.Wrong), v.Undecided)
	}
	t.Logf("%d written blocks read back, %d operations explained; of %d writes without an answer %d took effect (%v)",
		written, v.Ops, v.Unknown, v.Seen, time.Since(begun).Round(time.Millisecond))
}

// finish proves the cluster whole and stops it.
func (d *drill) finish(t *testing.T) {
	t.Helper()
	t.Logf("the worst of each fault:\n%s", d.n.Table())
	_, err := d.Whole(t.Context(), healLimit, volume)
	must(t, err)
	if err := d.Check(t.Context(), d.n.any(d.Servers)); err != nil {
		t.Errorf("check: %v", err)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
	copies, err := d.CompareCopies()
	must(t, err)
	for _, err := range copies.Wrong {
		t.Error(err)
	}
	t.Logf("the copies of %d segments are equal (%d MiB)", copies.Segments, copies.Bytes>>20)
}

// A cluster of five servers goes once through what it must survive.
func TestChaos(t *testing.T) {
	d := newDrill(t, 1)
	for _, s := range []struct {
		fault  string
		broken time.Duration
	}{
		{"kill a server", time.Second},
		{"kill the owner", 2 * time.Second},
		{"pause the owner", 5 * time.Second},
		{"cut off a minority", 6 * time.Second},
		{"cut one way", 5 * time.Second},
		{"flip bits", time.Second},
		{"kill all", time.Second},
	} {
		if s.fault == "flip bits" && !t.Run("fio", d.fio) {
			return
		}
		if !t.Run(s.fault, func(t *testing.T) { d.run(t, true, s.broken, s.fault) }) {
			return
		}
	}
	d.finish(t)
}

// fio writes to a volume of its own while a server is killed that is not its
// gateway, sees no error, and finds every byte again.
func (d *drill) fio(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("fio is not installed")
	}
	gateway := d.n.any(d.Servers)
	_, err := gateway.Atoll(t.Context(), "volume", "create", "disk2", "64M", "--replicas", "3")
	must(t, err)
	uri := "nbd+unix:///disk2?socket=" + filepath.Join(gateway.dir, "d", "nbd.sock") // fio knows no certificates
	args := []string{"--name=verify", "--ioengine=nbd", "--uri=" + uri, "--size=64M", "--bs=16k", "--rw=randwrite",
		"--iodepth=8", "--rate_iops=700", "--fsync=64", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"}
	done := make(chan error, 1)
	go func() { done <- gateway.run("", "fio", args...) }()
	must(t, pause(t.Context(), 2*time.Second))
	victim := d.n.any(d.Others(gateway))
	victim.Kill()
	must(t, pause(t.Context(), time.Second))
	must(t, d.StartAll(t.Context()))
	if err := <-done; err != nil {
		t.Fatalf("fio through %s while %s was killed: %v", gateway.Name, victim.Name, err)
	}
	t.Logf("fio wrote 64 MiB through %s while %s was killed, and found all again", gateway.Name, victim.Name)
	_, err = d.Healthy(t.Context(), healLimit)
	must(t, err)
}

// CHAOS_TIME=2h, as "make chaos" sets it, has a cluster suffer for that long
// whatever the seed draws, often two things at once.
func TestLong(t *testing.T) {
	if os.Getenv("CHAOS_TIME") == "" {
		t.Skip("CHAOS_TIME does not say for how long")
	}
	limit, err := time.ParseDuration(os.Getenv("CHAOS_TIME"))
	must(t, err)
	d := newDrill(t, rand.Uint64())
	end := time.Now().Add(limit)
	for round := 1; time.Now().Before(end); round++ {
		names := []string{d.n.Draw()}
		if only := os.Getenv("CHAOS_FAULT"); only != "" {
			names[0] = only
		}
		if second := d.n.Draw(); d.n.rng.IntN(3) == 0 && together(names[0], second) {
			names = append(names, second)
		}
		t.Logf("round %d, %v left", round, time.Until(end).Round(time.Second))
		d.run(t, false, time.Duration(500+d.n.rng.IntN(8000))*time.Millisecond, names...)
		if t.Failed() {
			break
		}
	}
	d.finish(t)
}

// together says whether two faults may be at work at once: what the first does
// must not keep the second from being done.
func together(a, b string) bool {
	stops := map[string]bool{"kill all": true, "restart a server": true, "flip bits": true}
	return a != b && !stops[a] && !stops[b]
}
