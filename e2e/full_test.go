package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// A cluster whose room is used up tells writers so, loses nothing, serves reads,
// starts again, and takes writes once a volume is deleted.
func TestFull(t *testing.T) {
	t.Run("limit", func(t *testing.T) {
		t.Parallel()
		full(t, startServer(t, "--disk-limit", "512M", "--log-level", "warn"))
	})
	t.Run("disk", func(t *testing.T) {
		t.Parallel()
		needRoot(t)
		need(t, "mount", "umount", "losetup", "mkfs.ext4")
		s := newServer(t, "--log-level", "warn")
		for i := range 3 {
			s.args = append(s.args, "--disk", smallDisk(t, filepath.Join(s.dir, fmt.Sprint("disk", i))))
		}
		s.start()
		full(t, s)
	})
}

// smallDisk mounts an ext4 file system of 512 MiB.
func smallDisk(t *testing.T, dir string) string {
	t.Helper()
	run(t, "truncate", "-s", "512M", dir+".img")
	run(t, "mkfs.ext4", "-q", "-m", "0", dir+".img")
	run(t, "mkdir", dir)
	run(t, "mount", "-o", "loop", dir+".img", dir)
	t.Cleanup(func() { command(t, nil, "", "umount", "-l", dir) })
	return dir + "/node"
}

func full(t *testing.T, s *server) {
	s.create("first", "64M")
	s.create("second", "2G")
	h := newHistory(t, 64<<20)
	l := startLoad(h, false, dialer(s.uri("first")))
	time.Sleep(500 * time.Millisecond)
	if err := l.stop(); err != nil {
		t.Fatal(err)
	}
	conn := dial(t, s.uri("second"))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	p := make([]byte, 1<<20)
	written, err := int64(0), error(nil)
	for ; written < 2<<30; written += int64(len(p)) {
		for off := 0; off < len(p); off += blockSize {
			fillStamp(p[off:off+blockSize], written+int64(off), 1)
		}
		if err = conn.WriteAt(ctx, p, written, true); err != nil {
			break
		}
	}
	t.Logf("full after %d MiB: %v", written>>20, err)
	if !errors.Is(err, atoll.ErrNoSpace) {
		t.Errorf("the error is not ENOSPC: %v", err)
	}
	if written < 200<<20 {
		t.Errorf("of 512 MiB a disk, only %d MiB could be used", written>>20)
	}
	check := func(when string) {
		t.Helper()
		conn := dial(t, s.uri("second"))
		defer conn.Close()
		got, want := make([]byte, blockSize), make([]byte, blockSize)
		for off := int64(0); off < written; off += 64 * blockSize {
			if err := conn.ReadAt(ctx, got, off); err != nil {
				t.Fatalf("%s: read at %d: %v", when, off, err)
			}
			fillStamp(want, off, 1)
			if string(got) != string(want) {
				t.Fatalf("%s: wrong data at %d", when, off)
			}
		}
		first := dial(t, s.uri("first"))
		defer first.Close()
		t.Logf("%s: %d durable blocks are right", when, h.verify(t, first))
	}
	check("full")
	conn.Close()
	s.kill()
	s.start()
	check("full, after kill -9")
	s.stop()
	s.start()
	check("full, after a restart")
	eventually(t, "rm on a full cluster", func() bool {
		r := s.try("volume", "rm", "second", "--now", "--yes")
		if r.code != 0 {
			t.Logf("rm: %s", strings.TrimSpace(r.err))
		}
		return r.code == 0
	})
	uri := s.uri("first")
	took := eventually(t, "there is room again", func() bool {
		c, err := dialer(uri)(ctx)
		if err != nil {
			return false
		}
		defer c.Close()
		return c.WriteAt(ctx, make([]byte, 8<<20), 0, true) == nil
	})
	t.Logf("writing went on %v after a volume was deleted", took.Round(time.Millisecond))
	for b := range (8 << 20) / blockSize {
		h.blocks[b] = block{}
	}
	l = startLoad(h, false, dialer(uri))
	time.Sleep(500 * time.Millisecond)
	if err := l.stop(); err != nil {
		t.Errorf("load: %v", err)
	}
	c := dial(t, uri)
	t.Logf("%d durable blocks are right at last", h.verify(t, c))
	c.Close()
}
