package volume

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// failures tells how often operations of a memStore are to fail yet.
type failures map[string]int

func (f failures) next(op string) error {
	if f[op] == 0 {
		return nil
	}
	f[op]--
	return fmt.Errorf("injected at %s: %w", op, atoll.ErrUnavailable)
}

func (s *memStore) setFail(fail func(op string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = fail
}

// doubtTest is a volume of four pages of interest.
type doubtTest struct {
	t *testing.T
	s *memStore
	v *Volume
	o Options
}

type fourPages [4]uint64

func (d *doubtTest) write(ctx context.Context, page pageNo, n uint64) error {
	buf := make([]byte, atoll.BlockSize)
	stamp(buf, n)
	return d.v.Write(ctx, nil, buf, int64(page)*atoll.BlockSize, false)
}

func (d *doubtTest) read() (p fourPages) {
	d.t.Helper()
	buf := make([]byte, atoll.BlockSize)
	for i := range p {
		no(d.t, d.v.Read(d.t.Context(), buf, int64(i)*atoll.BlockSize))
		p[i] = le.Uint64(buf)
	}
	return p
}

func (d *doubtTest) crash() {
	d.t.Helper()
	s := d.s.crash()
	d.v.Abort()
	d.s, d.v = s, mustOpen(d.t, s, d.o)
}

// check crashes the volume twice and compares what it has each time; want holds
// the states that it may be in.
func (d *doubtTest) check(want ...fourPages) {
	d.t.Helper()
	for range 2 {
		d.crash()
		got := d.read()
		ok := false
		for _, w := range want {
			ok = ok || got == w
		}
		if !ok {
			d.t.Fatalf("after a crash it has %v, want one of %v", got, want)
		}
		want = []fourPages{got}
	}
	no(d.t, d.v.Settled(d.t.Context()))
	no(d.t, d.v.Verify(d.t.Context()))
	no(d.t, d.v.Check(d.t.Context()))
	no(d.t, d.v.Close(d.t.Context()))
}

// A restore fails at any of its steps, the record of it in the log or not, and
// so do the attempts to settle it or to leave it behind. Then the volume crashes.
// It is all of one state, with all that was flushed since, or all of the other.
func TestRestoreInDoubt(t *testing.T) {
	steps := []failures{
		{}, {"mark": 1}, {"marked": 1}, {"checkpoint": 1}, {"committed": 1},
		{"marked": 1, "checkpoint": 1}, {"marked": 1, "checkpoint": 3}, {"marked": 1, "committed": 1}, {"marked": 1, "committed": 3},
		{"marked": 1, "checkpoint": 1, "committed": 1}, {"checkpoint": 2, "committed": 2}, {"marked": 1, "checkpoint": 1e9}, {"checkpoint": 1e9},
	}
	const (
		atOnce      = iota // crash after the call
		written            // after a write and a flush
		checkpoints        // after a checkpoint as well
		again              // after another restore that fails as well
		ways
	)
	for _, mode := range []Mode{Writethrough, Writeback} {
		for i, fails := range steps {
			for _, patient := range []bool{true, false} {
				for way := range ways {
					if atoll.Invariants && (i+way)%3 > 0 { // it is slow
						continue
					}
					t.Run(fmt.Sprintf("%v/%d/patient=%t/%d", mode, i, patient, way), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							d := &doubtTest{t: t, s: newMemStore(histSize, 1), o: Options{Mode: mode, FlushDelay: time.Hour}}
							d.v = mustOpen(t, d.s, d.o)
							ver := d.prepare()
							d.s.setFail(maps.Clone(fails).next)
							err := d.restore(ver, patient)
							d.after(err, way == written || way == checkpoints, way == checkpoints, way == again, ver)
						})
					})
				}
			}
		}
	}
}

// prepare writes a version, and then a page that is flushed and, in writeback
// mode, one that is not.
func (d *doubtTest) prepare() uint64 {
	ctx := d.t.Context()
	for p := range pageNo(4) {
		no(d.t, d.write(ctx, p, 10*uint64(p+1)))
	}
	ver, err := d.v.Backup(ctx, BackupOptions{Name: "v"})
	no(d.t, err)
	no(d.t, d.v.Settled(ctx))
	no(d.t, d.write(ctx, 0, 11))
	no(d.t, d.v.Flush(ctx))
	no(d.t, d.write(ctx, 1, 21))
	return ver.Number
}

func (d *doubtTest) restore(ver uint64, patient bool) error {
	ctx := d.t.Context()
	if !patient {
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		ctx = short
	}
	err := d.v.Restore(ctx, ver)
	if err != nil && !errors.Is(err, atoll.ErrUnavailable) {
		d.t.Fatal(err)
	}
	return err
}

func (d *doubtTest) after(err error, write, checkpoint, again bool, ver uint64) {
	old, restored := fourPages{11, 21, 30, 40}, fourPages{10, 20, 30, 40}
	ctx := d.t.Context()
	may := err
	if again {
		d.s.setFail(failures{"marked": 1, "checkpoint": 1, "committed": 1}.next)
		err = d.restore(ver, true)
		if errors.Is(err, errMay) || err == nil {
			d.t.Fatalf("the second restore: %v", err)
		}
		if may == nil {
			old = restored
		}
		write = true
	}
	if errors.Is(err, errMay) {
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		if err := d.write(short, 2, 31); !errors.Is(err, atoll.ErrTimeout) {
			d.t.Fatalf("a write while a restore is in doubt: %v", err)
		}
		if write {
			d.s.setFail(nil)
		}
	}
	if !write {
		want := []fourPages{old}
		lost := old
		if lost[1] = 20; d.o.Mode == Writeback { // not flushed
			want = append(want, lost)
		}
		switch {
		case errors.Is(err, errMay):
			want = append(want, restored)
		case err == nil:
			want = []fourPages{restored}
		}
		d.check(want...)
		return
	}
	no(d.t, d.write(ctx, 2, 32))
	no(d.t, d.v.Flush(ctx))
	old[2], restored[2] = 32, 32
	if checkpoint {
		d.s.setFail(nil)
		no(d.t, d.v.Checkpoint(ctx))
		no(d.t, d.write(ctx, 3, 43))
		no(d.t, d.v.Flush(ctx))
		old[3], restored[3] = 43, 43
	}
	want := old
	if err == nil {
		want = restored
	}
	if got := d.read(); got != want {
		d.t.Fatalf("it has %v, want %v", got, want)
	}
	d.check(want)
}

// A smaller size whose record is in the log though its append failed takes
// nothing with it that is written beyond it later.
func TestResizeInDoubt(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		for _, fails := range []failures{{"resize": 1}, {"resize": 1, "checkpoint": 2}, {"resize": 1, "committed": 2}} {
			synctest.Test(t, func(t *testing.T) {
				d := &doubtTest{t: t, s: newMemStore(histSize, 1), o: Options{Mode: mode, FlushDelay: time.Hour}}
				d.v = mustOpen(t, d.s, d.o)
				ctx := t.Context()
				far := pageNo(histSize/atoll.BlockSize - 1)
				no(t, d.write(ctx, far, 7))
				no(t, d.v.Flush(ctx))
				d.s.setFail(maps.Clone(fails).next)
				if err := d.v.Resize(ctx, 1<<30); !errors.Is(err, atoll.ErrUnavailable) || errors.Is(err, errMay) {
					t.Fatalf("resize: %v", err)
				}
				no(t, d.write(ctx, far-1, 8))
				no(t, d.v.Flush(ctx))
				d.crash()
				buf := make([]byte, 2*atoll.BlockSize)
				no(t, d.v.Read(ctx, buf, int64(far-1)*atoll.BlockSize))
				if a, b := le.Uint64(buf), le.Uint64(buf[atoll.BlockSize:]); d.v.Size() != histSize || a != 8 || b != 7 {
					t.Fatalf("after a crash it has %d bytes and pages %d and %d", d.v.Size(), a, b)
				}
				no(t, d.v.Close(ctx))
			})
		}
	}
}

// What a checkpoint that failed wrote is not the root: compaction keeps what the
// root in force has, also right after it was opened.
func TestCompactAfterFailedCheckpoint(t *testing.T) {
	for _, op := range []string{"checkpoint", "committed"} {
		synctest.Test(t, func(t *testing.T) {
			s := newMemStore(histSize, 1)
			s.segSize = 16
			d := &doubtTest{t: t, s: s}
			d.v = mustOpen(t, d.s, d.o)
			ctx := t.Context()
			for p := range pageNo(40) {
				no(t, d.write(ctx, p*fan, uint64(p)+1))
			}
			no(t, d.v.Checkpoint(ctx))
			no(t, d.write(ctx, 39*fan, 40)) // now the first one's leaves are before the mark
			no(t, d.v.Checkpoint(ctx))
			d.crash()
			no(t, d.write(ctx, 1, 100))
			d.s.setFail(failures{op: 1}.next)
			if err := d.v.Checkpoint(ctx); !errors.Is(err, atoll.ErrUnavailable) {
				t.Fatal(err)
			}
			for _, o := range (memBacking{d.s}).victims() {
				_, err := d.v.compact(ctx, o)
				no(t, err)
			}
			d.crash()
			for p := range pageNo(40) {
				buf := make([]byte, atoll.BlockSize)
				no(t, d.v.Read(ctx, buf, int64(p)*fan*atoll.BlockSize))
				if got := le.Uint64(buf); got != uint64(p)+1 {
					t.Fatalf("page %d has %d, want %d", p*fan, got, p+1)
				}
			}
			no(t, d.v.Check(ctx))
			no(t, d.v.Close(ctx))
		})
	}
}
