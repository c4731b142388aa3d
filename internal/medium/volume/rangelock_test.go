package volume

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

func TestRangeLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l rangeLock
		ctx := t.Context()
		order := make(chan string, 10)
		take := func(name string, r pageRange) {
			go func() {
				if err := l.lock(ctx, r); err != nil {
					t.Error(err)
				}
				order <- name
			}()
			synctest.Wait()
		}
		expect := func(names ...string) {
			t.Helper()
			synctest.Wait()
			for _, want := range names {
				select {
				case got := <-order:
					if got != want {
						t.Errorf("%s was let in, want %s", got, want)
					}
				default:
					t.Errorf("%s was not let in", want)
				}
			}
			select {
			case got := <-order:
				t.Errorf("%s was let in too early", got)
			default:
			}
		}
		take("a", pageRange{0, 10})
		take("b", pageRange{10, 20})
		expect("a", "b")
		take("c", pageRange{5, 15})
		take("d", pageRange{12, 13}) // behind c, which came first
		take("e", pageRange{30, 31})
		expect("e")
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := l.lock(short, pageRange{0, 1}); !errors.Is(err, atoll.ErrTimeout) {
			t.Errorf("lock of a held range: %v, want ErrTimeout", err)
		}
		l.unlock(pageRange{10, 20})
		expect()
		l.unlock(pageRange{0, 10})
		expect("c")
		l.unlock(pageRange{5, 15})
		expect("d")
		l.unlock(pageRange{12, 13})
		l.unlock(pageRange{30, 31})
		if len(l.held)+len(l.waiting) != 0 {
			t.Errorf("%d held, %d waiting at the end", len(l.held), len(l.waiting))
		}
	})
}

func TestZerosAreNotStored(t *testing.T) {
	v := mustOpen(t, newMemStore(1<<20, 1), Options{DetectZeros: true, CacheBytes: 1 << 20})
	ctx := t.Context()
	p := make([]byte, 16*atoll.BlockSize)
	p[5] = 1
	no(t, v.Write(ctx, nil, p, 0, false))
	no(t, v.Prefetch(ctx, 0, 1<<20))
	p[5] = 0
	no(t, v.Write(ctx, nil, p, 0, false))
	no(t, v.Extents(ctx, 0, 1<<20, func(n int64, hole bool) bool {
		if n != 1<<20 || !hole {
			t.Errorf("extent of %d bytes, hole: %t", n, hole)
		}
		return true
	}))
	no(t, v.Close(ctx))
}
