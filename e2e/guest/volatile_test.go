package guest_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atollstore/atoll/internal/atoll"
)

// volatileDisk is a disk with a write cache, of which a power cut loses parts:
// each page written since the last flush is new, as before, or a mixture of both
// by sectors. One that lies answers flushes and does nothing.
type volatileDisk struct {
	file *os.File // what a reader sees
	size int64

	mu    sync.Mutex
	armed bool // the cache is on
	lies  bool
	power int
	old   map[int64][]byte // pages written since the last flush, as they were
	left  int              // changes until the power goes; 0 is never
	off   func()           // the power cut
}

const (
	pageBytes   = 4096
	sectorBytes = 512
)

// What a disk does with requests.
const (
	powerOn   = iota
	powerOff  // they fail
	powerIdle // they succeed without effect, so that the kernel lets go
)

// newVolatileDisk makes an empty disk in a sparse file that has no name.
func newVolatileDisk(t *testing.T, dir string, size int64) *volatileDisk {
	t.Helper()
	f, err := os.CreateTemp(dir, "disk-")
	if err == nil {
		err = errors.Join(os.Remove(f.Name()), f.Truncate(size))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &volatileDisk{file: f, size: size, old: map[int64][]byte{}}
}

func (d *volatileDisk) read(p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.power == powerOff {
		return fmt.Errorf("read disk without power: %w", atoll.ErrIO)
	}
	_, err := d.file.ReadAt(p, off)
	return err
}

func (d *volatileDisk) write(p []byte, off int64, fua bool) error {
	return d.change(off, int64(len(p)), fua, func() error {
		_, err := d.file.WriteAt(p, off)
		return err
	})
}

// zero makes a range a hole.
func (d *volatileDisk) zero(off, n int64, fua bool) error {
	return d.change(off, n, fua, func() error {
		return unix.Fallocate(int(d.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

// change notes what a range holds and changes it. With fua what it then holds
// is durable.
func (d *volatileDisk) change(off, n int64, fua bool, do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch d.power {
	case powerOff:
		return fmt.Errorf("write disk without power: %w", atoll.ErrIO)
	case powerIdle:
		return nil
	}
	for at := off &^ (pageBytes - 1); d.armed && at < off+n; at += pageBytes {
		if d.old[at] != nil {
			continue
		}
		p := make([]byte, min(pageBytes, d.size-at))
		if _, err := d.file.ReadAt(p, at); err != nil {
			return err
		}
		d.old[at] = p
	}
	err := do()
	if d.left > 0 {
		if d.left--; d.left == 0 {
			d.off()
			return fmt.Errorf("write disk without power: %w", atoll.ErrIO)
		}
	}
	if err != nil || !fua || d.lies {
		return err
	}
	for at := off &^ (pageBytes - 1); d.armed && at < off+n; at += pageBytes {
		from, to := max(off, at), min(off+n, at+int64(len(d.old[at])))
		if _, err := d.file.ReadAt(d.old[at][from-at:to-at], from); err != nil {
			return err
		}
	}
	return nil
}

func (d *volatileDisk) flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.power == powerOff {
		return fmt.Errorf("flush disk without power: %w", atoll.ErrIO)
	}
	if !d.lies {
		clear(d.old)
	}
	return nil
}

// arm turns the cache on.
func (d *volatileDisk) arm() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.armed = true
}

func (d *volatileDisk) set(power int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.power = power
}

// cut is a power cut in the middle of one of the next changes, or soon if there
// are none.
func (d *volatileDisk) cut(t *testing.T, rng *rand.Rand) {
	done := make(chan struct{})
	d.mu.Lock()
	d.left = 1 + rng.IntN(30)
	d.off = func() {
		d.left = 0
		d.lose(t, rng)
		close(done)
	}
	d.mu.Unlock()
	select {
	case <-done:
	case <-time.After(2 * time.Second):
		d.mu.Lock()
		if d.left > 0 {
			d.off()
		}
		d.mu.Unlock()
	}
}

// lose takes the power and parts of the cache. The disk is locked.
func (d *volatileDisk) lose(t *testing.T, rng *rand.Rand) {
	d.power = powerOff
	lost := 0
	for at, p := range d.old {
		torn := rng.IntN(5)
		if torn < 2 {
			continue // it made it
		}
		for s := 0; s < len(p); s += sectorBytes {
			if torn == 2 && rng.IntN(2) == 0 {
				continue
			}
			lost += sectorBytes
			if _, err := d.file.WriteAt(p[s:min(s+sectorBytes, len(p))], at+int64(s)); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("the disk's cache held %d KiB, of which the cut took %d", len(d.old)*pageBytes>>10, lost>>10)
	clear(d.old)
}
