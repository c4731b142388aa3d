package guest_test

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"
)

// diskBytes is the size of the guest's disk. XFS wants at least 300 MiB.
func diskBytes(fs string) int64 {
	if fs == "xfs" {
		return 320 << 20
	}
	return 128 << 20
}

// site is a disk whose power can be cut.
type site interface {
	start()      // serve the disk, with what was durable
	uri() string // where
	arm()        // the file system is made: cuts begin to hurt
	cut()        // lose what is not durable, at once
	restarted() time.Duration
}

// atollSite is a volume of the program under test. A cut takes its process and,
// where this machine lets us, what its file system had not yet written.
type atollSite struct {
	*server
	size int64
	disk *powerDisk // nil: the machine's page cache survives the cut
}

func newAtollSite(t *testing.T, l *lab, fs string) *atollSite {
	s := &atollSite{server: newServer(t, l), size: diskBytes(fs)}
	if why := noPowerDisk(); why != "" {
		t.Logf("only processes are killed, the page cache survives: %s", why)
		return s
	}
	s.disk = newPowerDisk(t, s.server)
	return s
}

func (s *atollSite) start() {
	first := s.started == 0
	s.kill()
	if s.disk != nil {
		s.disk.mount()
	}
	s.server.start()
	if first {
		s.create("disk", s.size)
	}
}

func (s *atollSite) cut() {
	if s.disk != nil {
		s.disk.cut()
	}
	s.server.cut()
}

func (s *atollSite) uri() string              { return s.server.uri("disk") }
func (s *atollSite) arm()                     {}
func (s *atollSite) restarted() time.Duration { return s.started }

// TestGuestPowerCut cuts the power of guest and server at random moments. Every
// file that the guest has synced must be there and the file system sound.
func TestGuestPowerCut(t *testing.T) {
	l := needLab(t)
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			s := newAtollSite(t, l, fs)
			cutRounds(t, l, s, fs, rounds(2, 20), func(round int, err error) {
				if err != nil {
					t.Fatalf("after cut %d: %v", round, err)
				}
			})
		})
	}
}

// cutRounds makes a file system on the site's disk and cuts the power as often
// as told; verdict gets the result of every check.
func cutRounds(t *testing.T, l *lab, s site, fs string, cuts int, verdict func(round int, err error)) {
	t.Helper()
	seed := rand.Uint64() >> 16
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	last := 0
	for round := range cuts + 1 {
		begin := time.Now()
		s.start()
		args := map[string]string{"task": "powercut", "fs": fs, "seed": strconv.FormatUint(seed, 10), "last": strconv.Itoa(last)}
		if round == 0 {
			args["mkfs"] = "1"
		}
		if round < cuts {
			args["write"] = "1"
		}
		v := l.boot(t, guestOptions{disk: s.uri(), modules: append(diskModules, fs), args: args})
		if up, err := v.until("ready"); err == nil {
			t.Logf("server started in %.2f s, guest up after %.2f s (kernel says %s)", s.restarted().Seconds(), time.Since(v.begin).Seconds(), up[1])
		} else {
			t.Fatal(err)
		}
		if round > 0 {
			_, err := v.until("checked")
			verdict(round, err)
			if err != nil {
				v.kill()
				return
			}
		}
		if round < cuts {
			last = writeAndCut(t, v, s, rng)
		} else if err := v.finish(); err != nil {
			t.Fatal(err)
		}
		v.kill()
		t.Logf("round %d: %d files synced, %.1f s", round, last, time.Since(begin).Seconds())
	}
}

// diskModules are what a guest with a virtio disk loads.
var diskModules = []string{"virtio_pci", "virtio_blk", "crc32c_generic"}

// leastSynced is how many files a guest has reported synced before the power is
// cut, however slow the machine is.
const leastSynced = 5

// writeAndCut lets the guest write for a random time, cuts the power and
// returns the last file that was reported synced.
func writeAndCut(t *testing.T, v *vm, s site, rng *rand.Rand) (last int) {
	t.Helper()
	words, err := v.until("synced")
	if err != nil {
		t.Fatal(err)
	}
	if last, err = synced(strings.Join(words, " "), 0); err != nil {
		t.Fatal(err)
	}
	s.arm()
	timer := time.NewTimer(time.Duration(1500+rng.IntN(2500)) * time.Millisecond)
	defer timer.Stop()
	limit := time.NewTimer(bootTimeout)
	defer limit.Stop()
	for reports, elapsed, cut := 1, false, false; ; {
		if elapsed && !cut && reports >= leastSynced {
			// The disk goes with the guest still running and writing, so that
			// the guest cannot report what the disk has not answered.
			s.cut()
			v.cut()
			cut = true
		}
		select {
		case line, ok := <-v.lines:
			if !ok && cut {
				return last
			}
			// A guest whose disk is gone may complain, but never say "synced".
			if last, err = synced(line, last); !cut && (err != nil || !ok) {
				t.Fatalf("the guest ended on its own: %v", err)
			}
			reports++
		case <-timer.C:
			elapsed = true
		case <-limit.C:
			t.Fatalf("the guest synced %d files in %v", reports, bootTimeout)
		}
	}
}

// synced takes the number out of a report.
func synced(line string, last int) (int, error) {
	var n int
	if _, err := fmt.Sscanf(line, "synced %d", &n); err != nil {
		return last, fmt.Errorf("guest: %q", line)
	}
	return max(n, last), nil
}
