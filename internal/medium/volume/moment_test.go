package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

func put(t testing.TB, v *Volume, p pageNo, n uint64) {
	b := page(n)
	defer b.Release()
	if err := v.Write(context.Background(), b, b.Bytes(), int64(p)*atoll.BlockSize, false); err != nil {
		t.Error(err)
	}
}

func pageOf(t testing.TB, v *Volume, p pageNo) uint64 {
	t.Helper()
	var b [atoll.BlockSize]byte
	no(t, v.Read(context.Background(), b[:], int64(p)*atoll.BlockSize))
	if !bytes.Equal(b[8:], b[:atoll.BlockSize-8]) {
		t.Fatalf("page %d is of more than one write", p)
	}
	return binary.LittleEndian.Uint64(b[:])
}

func openVersion(t *testing.T, s *memStore, number uint64) *Volume {
	t.Helper()
	view := s.view(number)
	v, err := OpenVersion(t.Context(), view, Options{})
	no(t, err)
	t.Cleanup(func() { no(t, v.Close(context.Background())); view.close() })
	return v
}

// Writers count up in one volume, then in another; whatever was acknowledged
// before a backup is in it, and no later number without the earlier.
func TestGroupIsOneMoment(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		t.Run(mode.String(), func(t *testing.T) {
			stores := []*memStore{newMemStore(64<<20, 1), newMemStore(64<<20, 2)}
			stores[1].info.ID, stores[1].disk.id = 7, 7
			var vols []*Volume
			for _, s := range stores {
				vols = append(vols, mustOpen(t, s, Options{Mode: mode, DirtyBytes: 1 << 20, FlushDelay: time.Millisecond, CheckpointBytes: 4 << 20, CacheBytes: 1 << 20}))
			}
			const writers = 4
			var acked [writers]struct {
				sync.Mutex
				n uint64
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for n := uint64(1); ctx.Err() == nil; n++ {
						put(t, vols[0], pageNo(w*1000)+pageNo(n%3), n)
						put(t, vols[1], pageNo(w*1000), n)
						acked[w].Lock()
						acked[w].n = n
						acked[w].Unlock()
					}
				})
			}
			for i := range rounds(24) {
				var before [writers]uint64
				for w := range acked {
					acked[w].Lock()
					before[w] = acked[w].n
					acked[w].Unlock()
				}
				name := fmt.Sprintf("g%d", i)
				got, err := Group(t.Context(), vols, []BackupOptions{{Name: name}, {Name: name, Protected: true}})
				no(t, err)
				for _, v := range vols {
					no(t, v.Settled(t.Context()))
				}
				a, b := openVersion(t, stores[0], got[0].Number), openVersion(t, stores[1], got[1].Number)
				for w := range writers {
					first := uint64(0)
					for k := range pageNo(3) {
						first = max(first, pageOf(t, a, pageNo(w*1000)+k))
					}
					second := pageOf(t, b, pageNo(w*1000))
					if second > first || first > second+1 || second < before[w] {
						t.Fatalf("writer %d: %d in one volume, %d in the other, %d was acknowledged before", w, first, second, before[w])
					}
				}
			}
			cancel()
			wg.Wait()
			for _, v := range vols {
				no(t, v.Verify(t.Context()))
				no(t, v.Close(t.Context()))
			}
		})
	}
}

// A read during restores is of one state, and part-page writes never mix two.
func TestRestoreUnderLoad(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		t.Run(mode.String(), func(t *testing.T) {
			const n = 600
			s := newMemStore(8<<20, 1)
			v := mustOpen(t, s, Options{Mode: mode, CacheBytes: 1 << 20, FlushDelay: time.Millisecond})
			var made [2]uint64
			for k := range made {
				for p := range pageNo(n) {
					put(t, v, p, uint64(k+1))
				}
				got, err := v.Backup(t.Context(), BackupOptions{})
				no(t, err)
				made[k] = got.Number
			}
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					buf := make([]byte, n*atoll.BlockSize)
					for ctx.Err() == nil {
						if err := v.Read(context.Background(), buf, 0); err != nil {
							t.Error(err)
							return
						}
						first := binary.LittleEndian.Uint64(buf)
						for i := 0; i < len(buf); i += atoll.BlockSize {
							if got := binary.LittleEndian.Uint64(buf[i:]); got != first {
								t.Errorf("a read has %d and %d", first, got)
								return
							}
						}
					}
				})
			}
			// The writer changes the last bytes of pages behind those that are
			// read, and only those bytes.
			wg.Go(func() {
				for ctx.Err() == nil {
					if err := v.Write(context.Background(), nil, []byte{9}, (n-1)*atoll.BlockSize+4095, false); err != nil {
						t.Error(err)
						return
					}
				}
			})
			for i := range rounds(40) {
				no(t, v.Restore(t.Context(), made[i%2]))
				var b [atoll.BlockSize]byte
				no(t, v.Read(t.Context(), b[:], (n-1)*atoll.BlockSize))
				if got := binary.LittleEndian.Uint64(b[:]); got != uint64(i%2+1) {
					t.Fatalf("after restore %d the page has %d", i, got)
				}
			}
			cancel()
			wg.Wait()
			no(t, v.Verify(t.Context()))
			no(t, v.Close(t.Context()))
		})
	}
}

// A restore in the middle of a read or of a part-page write: neither mixes two
// states.
func TestRestoreInTheMiddle(t *testing.T) {
	for _, mode := range []Mode{Writethrough, Writeback} {
		const n = 600
		s := newMemStore(8<<20, 1)
		v := mustOpen(t, s, Options{Mode: mode, FlushDelay: time.Millisecond})
		defer v.Abort()
		var made [2]uint64
		for k := range made {
			for p := range pageNo(n) {
				put(t, v, p, uint64(k+1))
			}
			got, err := v.Backup(t.Context(), BackupOptions{})
			no(t, err)
			made[k] = got.Number
		}
		no(t, v.Settled(t.Context()))
		// during runs fn while a read of the log is going on.
		during := func(reads int, fn func()) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.fail = func(op string) error {
				if op != "read" {
					return nil
				}
				if reads--; reads == 0 {
					s.mu.Unlock()
					fn()
					s.mu.Lock()
				}
				return nil
			}
		}
		buf := make([]byte, n*atoll.BlockSize)
		during(2, func() { no(t, v.Restore(t.Context(), made[0])) })
		no(t, v.Read(t.Context(), buf, 0))
		for i := 0; i < len(buf); i += atoll.BlockSize {
			if got := binary.LittleEndian.Uint64(buf[i:]); got != 1 {
				t.Fatalf("%v: a read across a restore has %d on page %d", mode, got, i/atoll.BlockSize)
			}
		}
		during(1, func() { no(t, v.Restore(t.Context(), made[1])) })
		no(t, v.Write(t.Context(), nil, []byte{9}, 7*atoll.BlockSize+4095, false))
		no(t, v.Read(t.Context(), buf[:atoll.BlockSize], 7*atoll.BlockSize))
		if got := binary.LittleEndian.Uint64(buf); got != 2 || buf[4095] != 9 {
			t.Fatalf("%v: after a write across a restore the page has %d, and %d in its last byte", mode, got, buf[4095])
		}
		no(t, v.Close(t.Context()))
	}
}

// While the version that the present state grew from is removed, what is
// overwritten counts as freed only if the removal succeeds.
func TestRemovalOfParent(t *testing.T) {
	for _, fails := range []string{"", "checkpoint", "committed"} {
		t.Run("fails="+fails, func(t *testing.T) {
			s := newMemStore(8<<20, 1)
			v := mustOpen(t, s, Options{})
			defer v.Abort()
			for p := range pageNo(100) {
				put(t, v, p, 1)
			}
			got, err := v.Backup(t.Context(), BackupOptions{Name: "a"})
			no(t, err)
			for p := range pageNo(30) {
				put(t, v, p, 2)
			}
			no(t, v.Settled(t.Context()))
			// The volume overwrites what only the version would hold at the
			// moment when the manifest is to be written.
			tries := 0
			s.mu.Lock()
			s.fail = func(op string) error {
				if op != "checkpoint" && op != "committed" {
					return nil
				}
				if op == "checkpoint" {
					tries++
					s.mu.Unlock()
					for p := range pageNo(10) {
						put(t, v, 30+10*pageNo(tries)+p, 3)
					}
					s.mu.Lock()
				}
				if tries == 1 && op == fails {
					return fmt.Errorf("injected: %w", atoll.ErrUnavailable)
				}
				return nil
			}
			s.mu.Unlock()
			no(t, v.store.Edit(t.Context(), func(st *medium.State) error {
				st.Versions[0].Flags |= medium.FlagDeleting
				return nil
			}))
			for len(s.State().Versions) > 0 {
				if _, _, err := v.reap(t.Context()); err != nil && !errors.Is(err, atoll.ErrUnavailable) {
					t.Fatal(err)
				}
			}
			s.mu.Lock()
			s.fail = nil
			s.mu.Unlock()
			no(t, v.Verify(t.Context()))
			if live := s.LiveBytes(); live != (100+1+nodeBlocks)*atoll.BlockSize {
				t.Errorf("%d blocks are live, want 100 pages, a leaf and a node (version %d is gone)", live/atoll.BlockSize, got.Number)
			}
			for p, want := range map[pageNo]uint64{0: 2, 29: 2, 45: 3, 99: 1} {
				if n := pageOf(t, v, p); n != want {
					t.Errorf("page %d has %d, want %d", p, n, want)
				}
			}
		})
	}
}

// What cannot be is refused, and says why.
func TestVersionErrors(t *testing.T) {
	s := newMemStore(1<<20, 1)
	v := mustOpen(t, s, Options{})
	defer v.Abort()
	ctx := t.Context()
	a, err := v.Backup(ctx, BackupOptions{Name: "a", Protected: true})
	no(t, err)
	no(t, v.Settled(ctx))
	_, taken := v.Backup(ctx, BackupOptions{Name: "a"})
	_, digits := v.Backup(ctx, BackupOptions{Name: "12"})
	_, long := v.Backup(ctx, BackupOptions{Memo: string(make([]byte, 5000))})
	_, twice := Group(ctx, []*Volume{v, v}, make([]BackupOptions, 2))
	_, _, usage := v.Usage(ctx, 99)
	for _, c := range []struct {
		what string
		err  error
		want error
	}{
		{"a name that is taken", taken, atoll.ErrExist},
		{"a name of digits", digits, atoll.ErrInvalid},
		{"a memo too long", long, atoll.ErrTooLarge},
		{"a volume twice", twice, atoll.ErrInvalid},
		{"delete of a protected version", v.DeleteVersion(ctx, a.Number), atoll.ErrBusy},
		{"delete of no version", v.DeleteVersion(ctx, 99), atoll.ErrNotExist},
		{"restore to no version", v.Restore(ctx, 99), atoll.ErrNotExist},
		{"restore to 0", v.Restore(ctx, 0), atoll.ErrInvalid},
		{"diff from no version", v.Diff(ctx, 99, 0, 0, 4096, nil), atoll.ErrNotExist},
		{"diff beyond the end", v.Diff(ctx, 0, 0, 4096, 1<<20, nil), atoll.ErrInvalid},
		{"usage of no version", usage, atoll.ErrNotExist},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, c.err, c.want)
		}
	}
	if b, err := v.Backup(ctx, BackupOptions{Name: "b"}); err != nil || b.Parent != a.Number {
		t.Errorf("after refusals: %+v, %v", b, err)
	}
}

func goldenEvent() *event {
	return &event{
		Medium: 0x0123456789abcdef, Number: 77, Parent: 12, Target: 9, Time: time.Unix(1700000000, 123456789).UTC(), Size: 11 << 30,
		Flags: medium.FlagInternal | medium.FlagDeleting, Name: "before", Memo: "a memo", Props: map[string]string{"group": "g1", "a": ""},
	}
}

func TestGoldenEvent(t *testing.T) {
	p := make([]byte, atoll.BlockSize)
	e := goldenEvent()
	no(t, e.encode(p))
	golden(t, "v1.event", p)
	got, err := parseEvent(p)
	no(t, err)
	if fmt.Sprint(got) != fmt.Sprint(e) {
		t.Errorf("read as %+v, written as %+v", got, e)
	}
	for i := range 70 {
		q := bytes.Clone(p)
		q[i] ^= 0x10
		if _, err := parseEvent(q); err == nil {
			t.Errorf("byte %d changed and nobody noticed", i)
		}
	}
	e.Props["k"] = string(make([]byte, 4096))
	if err := e.encode(p); !errors.Is(err, atoll.ErrTooLarge) {
		t.Errorf("properties too long: %v", err)
	}
}

func FuzzEvent(f *testing.F) {
	p := make([]byte, atoll.BlockSize)
	_ = goldenEvent().encode(p)
	f.Add(p)
	f.Add(bytes.TrimRight(p, "\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		_, _ = parseEvent(p)
		if len(p) > atoll.BlockSize {
			return
		}
		p = append(bytes.Clone(p), make([]byte, atoll.BlockSize-len(p))...)
		sumEvent(p) // let it get past the checksum
		e, err := parseEvent(p)
		if err != nil {
			return
		}
		q := make([]byte, atoll.BlockSize)
		no(t, e.encode(q))
		if again, err := parseEvent(q); err != nil || fmt.Sprint(again) != fmt.Sprint(e) {
			t.Fatalf("%+v reads as %+v, %v", e, again, err)
		}
	})
}
