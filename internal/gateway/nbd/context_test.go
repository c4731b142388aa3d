package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd/nbdtest"
)

// sibling returns the URI of another export of the same server.
func sibling(t testing.TB, uri, name string) string {
	t.Helper()
	a, err := ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	a.Export = name
	return a.String()
}

// history returns exports of a disk with two versions and of a clone: "disk" has
// data at 0…1 MiB; since "one" 8 KiB at 64 KiB and since "two" a byte at 512 KiB
// have changed. "clone" is of "one" and has 4 KiB of its own at 128 KiB.
func history(t testing.TB) (*shelf, *nbdtest.Disk) {
	t.Helper()
	d := nbdtest.NewDisk(4 << 20)
	write := func(d *nbdtest.Disk, off int64, n int, b byte) {
		if err := d.Write(t.Context(), nil, []byte(strings.Repeat(string(b), n)), off, false); err != nil {
			t.Fatal(err)
		}
	}
	write(d, 0, 1<<20, 'a')
	one := d.Snapshot("one")
	write(d, 64<<10, 8<<10, 'b')
	two := d.Snapshot("two")
	write(d, 512<<10, 1, 'c')
	c := one.Clone()
	write(c, 128<<10, 4096, 'd')
	sh := &shelf{disks: map[string]Device{}, infos: map[string]Info{}}
	sh.add("disk", d, Info{Description: "4 MiB, 2 snapshots"})
	sh.add("disk@one", one, Info{})
	sh.add("disk@two", two, Info{})
	sh.add("clone", c, Info{})
	return sh, d
}

// runsOf asks for one context of the whole export.
func runsOf(t testing.TB, c *Client, name string) []run {
	t.Helper()
	var all []run
	err := c.Status(t.Context(), name, 0, c.Size(), func(n int64, flags uint32) bool {
		all = append(all, run{n, flags})
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestVersionContexts(t *testing.T) {
	sh, _ := history(t)
	_, uri := serveUnix(t, sh, "disk", Options{})
	const kib = 1 << 10
	for _, c := range []struct {
		export, context string
		want            []run
	}{
		{"disk", SinceContext("one"), []run{{64 * kib, 0}, {8 * kib, 1}, {440 * kib, 0}, {4 * kib, 1}, {3580 * kib, 0}}},
		{"disk", SinceContext("two"), []run{{512 * kib, 0}, {4 * kib, 1}, {3580 * kib, 0}}},
		{"disk", ContextDepth, []run{{1024 * kib, 1}, {3072 * kib, 0}}},
		{"disk", ContextAllocation, []run{{1024 * kib, 0}, {3072 * kib, 3}}},
		{"disk@two", SinceContext("one"), []run{{64 * kib, 0}, {8 * kib, 1}, {4024 * kib, 0}}},
		{"clone", ContextDepth, []run{{128 * kib, 2}, {4 * kib, 1}, {892 * kib, 2}, {3072 * kib, 0}}},
	} {
		cl := dial(t, sibling(t, uri, c.export), DialOptions{Contexts: []string{SinceContext("none"), c.context, ContextDepth, "x:y"}})
		if got := runsOf(t, cl, c.context); !slices.Equal(got, c.want) {
			t.Errorf("%s of %s: %v, want %v", c.context, c.export, got, c.want)
		}
		names, _ := cl.Contexts(t.Context())
		want := []string{ContextDepth}
		if c.context != ContextDepth && c.context != ContextAllocation {
			want = append(want, c.context)
		}
		if !slices.Equal(names, want) {
			t.Errorf("negotiated %q, want %q", names, want)
		}
		if ro := strings.Contains(c.export, "@"); cl.Features().ReadOnly != ro {
			t.Errorf("%s read-only: %v", c.export, !ro)
		}
		if err := cl.Status(t.Context(), SinceContext("none"), 0, 4096, nil); !errors.Is(err, atoll.ErrNotExist) {
			t.Error(err)
		}
	}
}

// A version that is deleted while a client looks at it is an error of that
// request, and the connection goes on.
func TestContextVanishes(t *testing.T) {
	sh, d := history(t)
	_, uri := serveUnix(t, sh, "disk", Options{})
	c := dial(t, uri, DialOptions{Contexts: []string{SinceContext("one"), ContextDepth}})
	d.Forget("one")
	if err := c.Status(t.Context(), SinceContext("one"), 0, 4096, nil); !errors.Is(err, atoll.ErrNotExist) {
		t.Error(err)
	}
	if err := c.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

func TestContextQueries(t *testing.T) {
	sh, _ := history(t)
	_, uri := serveUnix(t, sh, "disk", Options{})
	one, two := SinceContext("one"), SinceContext("two")
	for _, c := range []struct{ queries, want []string }{
		{nil, []string{ContextAllocation, ContextDepth, one, two}},
		{[]string{"qemu:"}, []string{ContextDepth, one, two}},
		{[]string{"qemu:dirty-bitmap:"}, []string{one, two}},
		{[]string{"qemu:dirty-bitmap"}, nil}, {[]string{"qemu:dirty-bitmap:since-"}, nil}, {[]string{"qemu:allocation"}, nil},
		{[]string{"base:"}, []string{ContextAllocation}}, {[]string{"b:", ":", ""}, nil},
		{[]string{two, ContextAllocation, two, "base:"}, []string{ContextAllocation, two}},
	} {
		got, err := ListContexts(t.Context(), uri, DialOptions{}, c.queries...)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q lists %q, want %q: %v", c.queries, got, c.want, err)
		}
	}
	if got, err := ListContexts(t.Context(), sibling(t, uri, "disk@one"), DialOptions{}); err != nil || !slices.Equal(got, []string{ContextAllocation, ContextDepth}) {
		t.Errorf("the oldest version has %q: %v", got, err)
	}
	if _, err := ListContexts(t.Context(), sibling(t, uri, "none"), DialOptions{}); !errors.Is(err, atoll.ErrNotExist) {
		t.Error(err)
	}
	c := dial(t, uri, DialOptions{Contexts: []string{"qemu:", "qemu:dirty-bitmap:", "base:"}})
	if names, _ := c.Contexts(t.Context()); len(names) != 0 {
		t.Errorf("SET takes wildcards: %q", names)
	}
}

// busyShelf counts opens and refuses them.
type busyShelf struct {
	*shelf
	refused atomic.Int32
}

func (s *busyShelf) Open(context.Context, string) (Device, Info, error) {
	s.refused.Add(1)
	return nil, Info{}, fmt.Errorf("open volume: it is on another server: %w", atoll.ErrBusy)
}

// Only who asks for more than base:allocation has the export opened, and a list
// leaves out what cannot be told now.
func TestContextsOpenLate(t *testing.T) {
	sh, _ := history(t)
	busy := &busyShelf{shelf: sh}
	_, uri := serveUnix(t, sh, "disk", Options{Exports: busy})
	for i, c := range []struct {
		queries []string
		opens   int32
	}{{[]string{ContextAllocation, "base:", "x:"}, 0}, {nil, 1}, {[]string{"qemu:", ContextAllocation}, 1}} {
		busy.refused.Store(0)
		got, err := ListContexts(t.Context(), uri, DialOptions{}, c.queries...)
		if err != nil || !slices.Equal(got, []string{ContextAllocation}) || busy.refused.Load() != c.opens {
			t.Errorf("list %d: %q after %d opens: %v", i, got, busy.refused.Load(), err)
		}
	}
	for _, contexts := range [][]string{nil, {ContextDepth}} {
		_, err := Dial(t.Context(), uri, DialOptions{Contexts: contexts})
		if !errors.Is(err, atoll.ErrBusy) || errors.Is(err, atoll.ErrDenied) || strings.Contains(err.Error(), "[BUSY]") {
			t.Errorf("the refusal arrives as %v", err)
		}
	}
}

// listing is a shelf that knows the contexts without opening.
type listing struct{ *busyShelf }

func (listing) Contexts(_ context.Context, name string) ([]string, error) {
	return []string{SinceContext(name)}, nil
}

func TestContextLister(t *testing.T) {
	sh, _ := history(t)
	busy := &busyShelf{shelf: sh}
	_, uri := serveUnix(t, sh, "disk", Options{Exports: listing{busy}})
	got, err := ListContexts(t.Context(), uri, DialOptions{}, "qemu:")
	if err != nil || !slices.Equal(got, []string{SinceContext("disk")}) || busy.refused.Load() != 0 {
		t.Errorf("%q after %d opens: %v", got, busy.refused.Load(), err)
	}
}

// Every kind of error comes back as itself, from a refused export and from a
// failed request.
func TestKindsTravel(t *testing.T) {
	for i, kind := range atoll.Kinds() {
		for _, code := range []uint32{errno(kind), optionError(kind)} {
			text := tagged(fmt.Errorf("open %q [IO]: %w", "x", kind), code)
			err := newServerError("open", code, text)
			for j, other := range atoll.Kinds() {
				if errors.Is(err, other) != (i == j) {
					t.Errorf("%v with code %#x and text %q: is %v", kind, code, text, other)
				}
			}
			if want := fmt.Sprintf("open %q [IO]: %v", "x", kind); err.Text != want {
				t.Errorf("text %q, want %q", err.Text, want)
			}
		}
	}
	long := tagged(fmt.Errorf("%s: %w", strings.Repeat("x", 2*maxString), atoll.ErrBusy), repPolicy)
	if len(long) != maxString || !strings.HasSuffix(long, "xx [BUSY]") {
		t.Errorf("a long text has %d bytes", len(long))
	}
	if e := newServerError("open", repPolicy, "go away"); !errors.Is(e, atoll.ErrDenied) || e.Text != "go away" {
		t.Error(e)
	}
}

func TestDirtyRuns(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 500 {
		dirty := make([]bool, 64)
		var list []run // of pairs offset, length
		for at := rng.Int64N(8); at < 64; {
			n := min(1+rng.Int64N(8), 64-at)
			list = append(list, run{at, uint32(n)})
			for i := range n {
				dirty[at+i] = true
			}
			at += n + rng.Int64N(8)
		}
		off := rng.Int64N(64)
		n := rng.Int64N(64 - off)
		stop := rng.IntN(20)
		walk := func(fn func(off, n int64) bool) error {
			for _, r := range list {
				if !fn(r.n, int64(r.status)) {
					break
				}
			}
			return nil
		}
		at, calls := off, 0
		if err := DirtyRuns(off, n, walk, func(m int64, flags uint32) bool {
			if m <= 0 || at+m > off+n {
				t.Fatalf("round %d: run of %d at %d beyond %d", round, m, at, off+n)
			}
			for i := range m {
				if dirty[at+i] != (flags == StatusDirty) {
					t.Fatalf("round %d: wrong at %d", round, at+i)
				}
			}
			at, calls = at+m, calls+1
			return calls != stop
		}); err != nil {
			t.Fatal(err)
		}
		if at != off+n && calls != stop {
			t.Fatalf("round %d: ends at %d of %d", round, at, off+n)
		}
		if stop > 0 && calls > stop {
			t.Fatalf("round %d: %d calls after stop at %d", round, calls, stop)
		}
	}
	if err := DirtyRuns(0, 9, func(func(off, n int64) bool) error { return atoll.ErrIO }, nil); !errors.Is(err, atoll.ErrIO) {
		t.Error(err)
	}
}
