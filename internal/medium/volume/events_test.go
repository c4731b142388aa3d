package volume

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Backups and restores do not wait for the map of those before them to be
// written. After a crash all of them are there, and after another one while the
// first half was settled.
func TestManyPending(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		for _, settle := range []int{0, 1, 3, 100} { // events that are settled before the crash
			synctest.Test(t, func(t *testing.T) {
				d := &doubtTest{t: t, s: newMemStore(histSize, 1), o: Options{Mode: mode, FlushDelay: time.Hour}}
				d.v = mustOpen(t, d.s, d.o)
				first := d.prepare()
				left := settle
				d.s.setFail(func(op string) error {
					if op == "checkpoint" {
						if left--; left < 0 {
							return fmt.Errorf("stuck: %w", atoll.ErrUnavailable)
						}
					}
					return nil
				})
				var want []fourPages
				begun := time.Now()
				for i := range 6 {
					if i%3 == 2 {
						no(t, d.v.Restore(t.Context(), first))
					}
					no(t, d.write(t.Context(), 0, uint64(100+i)))
					no(t, d.write(t.Context(), pageNo(i%3)+1, uint64(200+i)))
					want = append(want, d.read())
					_, err := d.v.Backup(t.Context(), BackupOptions{Name: fmt.Sprintf("b%d", i)})
					no(t, err)
				}
				no(t, d.write(t.Context(), 3, 300))
				no(t, d.v.Flush(t.Context()))
				last := d.read()
				if took := time.Since(begun); took != 0 {
					t.Fatalf("six backups and two restores took %v", took)
				}
				if _, err := d.v.Backup(t.Context(), BackupOptions{Name: "b1"}); !errors.Is(err, atoll.ErrExist) {
					t.Fatalf("a second version of the name: %v", err)
				}
				d.crash()
				d.crash()
				if got := d.read(); got != last {
					t.Fatalf("after a crash it has %v, want %v", got, last)
				}
				no(t, d.v.Verify(t.Context()))
				for i := range want {
					st := d.v.State()
					p := st.Named(fmt.Sprintf("b%d", i))
					if p == nil {
						t.Fatalf("version b%d is gone", i)
					}
					no(t, d.v.Restore(t.Context(), p.Number))
					if got := d.read(); got != want[i] {
						t.Fatalf("version b%d has %v, want %v", i, got, want[i])
					}
				}
				no(t, d.v.Verify(t.Context()))
				no(t, d.v.Close(t.Context()))
			})
		}
	}
}

// More events than may be pending wait for the first to be settled.
func TestPendingLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &doubtTest{t: t, s: newMemStore(histSize, 1)}
		d.v = mustOpen(t, d.s, d.o)
		d.s.setFail(failures{"checkpoint": 1}.next) // for a second
		for i := range 3 * maxPending {
			no(t, d.write(t.Context(), 0, uint64(i)))
			_, err := d.v.Backup(t.Context(), BackupOptions{})
			no(t, err)
			d.v.hist.mu.Lock()
			n := len(d.v.hist.queue)
			d.v.hist.mu.Unlock()
			if n > maxPending {
				t.Fatalf("%d events are pending", n)
			}
		}
		no(t, d.v.Settled(t.Context()))
		if n := len(d.v.store.State().Versions); n != 3*maxPending {
			t.Fatalf("there are %d versions", n)
		}
		no(t, d.v.Close(t.Context()))
	})
}
