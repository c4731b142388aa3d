package qos

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// throttle returns a Throttle with limits.
func throttle(t testing.TB, l Limits) *Throttle {
	t.Helper()
	q := New()
	if err := q.Set(l); err != nil {
		t.Fatal(err)
	}
	return q
}

// load keeps callers busy for a while and returns what passed in each
// millisecond, in operations and bytes.
type load struct {
	op      Op
	callers int
	size    func(rng *rand.Rand) int64
	rest    func(rng *rand.Rand) time.Duration // how long an operation takes itself
}

func (l load) run(t *testing.T, q *Throttle, d time.Duration) (ops, bytes []int64) {
	begin := time.Now()
	ops, bytes = make([]int64, d/time.Millisecond+1), make([]int64, d/time.Millisecond+1)
	var mu sync.Mutex
	var wg sync.WaitGroup
	ctx, cancel := context.WithDeadline(t.Context(), begin.Add(d))
	defer cancel()
	for c := range l.callers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(7, uint64(c)))
			for {
				n := l.size(rng)
				if err := q.Wait(ctx, l.op, n); err != nil {
					return
				}
				at := time.Since(begin) / time.Millisecond
				if int(at) >= len(ops) {
					return
				}
				mu.Lock()
				ops[at]++
				bytes[at] += n
				mu.Unlock()
				if l.rest != nil {
					time.Sleep(l.rest(rng))
				}
			}
		})
	}
	wg.Wait()
	return ops, bytes
}

func sum(x []int64) (n int64) {
	for _, v := range x {
		n += v
	}
	return n
}

func fixed(n int64) func(*rand.Rand) int64 { return func(*rand.Rand) int64 { return n } }

// In the long run exactly the rate passes, however the callers behave, and in no
// window more than the rate and the slack.
func TestRate(t *testing.T) {
	for name, c := range map[string]struct {
		rate  int64
		kind  Kind
		limit int64 // what one operation may overshoot
		load  load
	}{
		"one caller":     {1000, IOPSTotal, 1, load{Read, 1, fixed(4096), func(rng *rand.Rand) time.Duration { return time.Duration(rng.Int64N(1_900_000)) }}},
		"many callers":   {26000, IOPSWrite, 1, load{Write, 64, fixed(4096), func(*rand.Rand) time.Duration { return 100 * time.Microsecond }}},
		"slow":           {3, IOPSRead, 1, load{Read, 4, fixed(0), nil}},
		"odd":            {7, IOPSTotal, 1, load{Write, 2, fixed(1 << 20), func(rng *rand.Rand) time.Duration { return time.Duration(rng.Int64N(40_000_000)) }}},
		"bytes":          {120 << 20, BPSTotal, 1 << 20, load{Read, 16, func(rng *rand.Rand) int64 { return 1 + rng.Int64N(1<<20) }, nil}},
		"large in small": {64 << 10, BPSWrite, 1 << 20, load{Write, 3, fixed(1 << 20), nil}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l Limits
				l[c.kind].Rate = c.rate
				seconds := min(200, max(10, 400_000/c.rate))
				if c.kind >= BPSTotal {
					seconds = 200
				}
				q := throttle(t, l)
				got, bytes := c.load.run(t, q, time.Duration(seconds)*time.Second)
				if c.kind >= BPSTotal {
					got = bytes
				}
				slack := c.rate/20 + c.rate/1000 + c.limit // and the last millisecond
				if n := sum(got); n < c.rate*seconds-c.limit || n > c.rate*seconds+slack {
					t.Errorf("%d passed in %d s, want %d…%d", n, seconds, c.rate*seconds, c.rate*seconds+slack)
				}
				for _, window := range []int{20, 100, 1000, 7777} {
					var in int64
					for i := range got {
						in += got[i]
						if i >= window {
							in -= got[i-window]
						}
						if most := c.rate*int64(window)/1000 + slack + 1; in > most {
							t.Fatalf("%d passed in the %d ms before %d ms, want at most %d", in, window, i, most)
						}
					}
				}
			})
		})
	}
}

// A burst goes at its rate for its length, then at the limit; after a time
// without use it is there again.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := throttle(t, Limits{IOPSTotal: {Rate: 100, Burst: 500, Length: 10 * time.Second}})
		for round := range 2 {
			ops, _ := load{Write, 8, fixed(4096), nil}.run(t, q, 40*time.Second)
			burst, after := sum(ops[:10_000]), sum(ops[10_000:])
			if burst < 4990 || burst > 5030 || after < 2990 || after > 3030 {
				t.Errorf("round %d: %d in the burst and %d after it, want 5000 and 3000", round, burst, after)
			}
			if first := sum(ops[:1000]); first > 530 {
				t.Errorf("round %d: %d in the first second", round, first)
			}
			time.Sleep(41 * time.Second) // 4000 too many were let pass, at 100 a second
		}
	})
}

// Those who wait pass in the order of their arrival, and who gives up does not
// hold up the others.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := throttle(t, Limits{BPSTotal: {Rate: 1000}})
		if err := q.Wait(t.Context(), Read, 1000); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var order []int
		var gone atomic.Int32
		for i := range 50 {
			go func() {
				my := t.Context()
				if i%3 == 0 { // the first of all is one of them
					my = ctx
				}
				if err := q.Wait(my, Op(i%2), int64(1+i)); errors.Is(err, context.Canceled) {
					gone.Add(1)
					return
				} else if err != nil {
					t.Error(err)
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
			}()
			synctest.Wait()
		}
		cancel()
		time.Sleep(time.Minute)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		var want []int
		for i := range 50 {
			if i%3 != 0 {
				want = append(want, i)
			}
		}
		if !slices.Equal(order, want) || gone.Load() != 17 {
			t.Errorf("order %v, %d gave up", order, gone.Load())
		}
		if waits, waited := q.Stats(); waits != 50 || waited <= 0 {
			t.Errorf("%d waits of %v", waits, waited)
		}
	})
}

// Writes that wait for their own limit do not hold up reads.
func TestDirections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := throttle(t, Limits{IOPSTotal: {Rate: 500}, IOPSWrite: {Rate: 10}, BPSRead: {Rate: 400 * 4096}})
		var wg sync.WaitGroup
		var reads, writes, bytes int64
		wg.Go(func() {
			ops, b := load{Read, 32, fixed(4096), nil}.run(t, q, 100*time.Second)
			reads, bytes = sum(ops), sum(b)
		})
		wg.Go(func() {
			ops, _ := load{Write, 256, fixed(4096), nil}.run(t, q, 100*time.Second)
			writes = sum(ops)
		})
		wg.Wait()
		if reads < 39990 || reads > 40030 || writes < 999 || writes > 1003 || bytes != reads*4096 {
			t.Errorf("%d reads and %d writes in 100 s", reads, writes)
		}
	})
}

// New limits hold at once, also for those who wait. Every operation here waits,
// so that Stats counts them.
func TestLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := throttle(t, Limits{IOPSTotal: {Rate: 1}, BPSTotal: {Rate: 1, Burst: 1 << 40, Length: time.Hour}})
		done := make(chan struct{})
		go func() {
			defer close(done)
			load{Write, 10, fixed(4096), nil}.run(t, q, 100*time.Second)
		}()
		rate := func(l Limits, want int64) {
			t.Helper()
			if err := q.Set(l); err != nil {
				t.Fatal(err)
			}
			time.Sleep(Slack)
			synctest.Wait()
			before, _ := q.Stats()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			after, _ := q.Stats()
			if n := int64(after - before); n < want-want/100-1 || n > want+want/100+1 {
				t.Errorf("%v: %d in 10 s, want %d", l, n, want)
			}
		}
		rate(Limits{IOPSTotal: {Rate: 200}}, 2000)
		rate(Limits{IOPSTotal: {Rate: 1000}}, 10000)
		rate(Limits{BPSWrite: {Rate: 4096}}, 10)
		rate(Limits{IOPSWrite: {Rate: 5}, BPSRead: {Rate: 1}}, 50)
		<-done
		if err := q.Set(Limits{}); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		for range 1000 {
			if err := q.Wait(t.Context(), Read, 1<<40); err != nil {
				t.Fatal(err)
			}
		}
		if time.Since(begin) != 0 {
			t.Error("without limits something waits")
		}
	})
}

func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := throttle(t, Limits{IOPSRead: {Rate: 1}})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		n := 0
		for q.Wait(ctx, Read, 0) == nil {
			n++
		}
		if err := q.Wait(ctx, Read, 0); !errors.Is(err, atoll.ErrTimeout) || n != 11 {
			t.Errorf("%d passed, then %v", n, err)
		}
	})
}

func TestCheck(t *testing.T) {
	for i, l := range []Limits{
		{IOPSRead: {Rate: -1}}, {IOPSRead: {Burst: 5}}, {BPSTotal: {Rate: 10, Burst: 9}},
		{BPSTotal: {Rate: 10, Length: 1}}, {BPSWrite: {Rate: 1, Burst: 2, Length: -1}},
	} {
		q := New()
		if err := q.Set(l); !errors.Is(err, atoll.ErrInvalid) || q.Limits() != (Limits{}) {
			t.Errorf("%d: %v", i, err)
		}
	}
	for k := range Kind(Kinds) {
		if got, err := ParseKind(k.String()); err != nil || got != k {
			t.Errorf("%v parses as %v: %v", k, got, err)
		}
	}
	if _, err := ParseKind("kind-9"); !errors.Is(err, atoll.ErrInvalid) {
		t.Error(err)
	}
	var nobody *Throttle
	if err := nobody.Wait(t.Context(), Write, 1); err != nil || nobody.Limits() != (Limits{}) {
		t.Error(err)
	}
	for _, c := range []struct{ gib, iops, mib int64 }{{0, 2000, 120}, {10, 2000, 120}, {100, 3000, 120}, {500, 15000, 150}, {1000, 26000, 260}, {1 << 30, 26000, 260}} {
		l := Default(c.gib << 30)
		if l[IOPSTotal].Rate != c.iops || l[BPSTotal].Rate != c.mib<<20 || l.Check() != nil {
			t.Errorf("%d GiB: %v", c.gib, l)
		}
	}
}

// Extreme values neither overflow nor let anything pass that should not.
func TestExtremes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most = 1<<63 - 1
		q := throttle(t, Limits{BPSTotal: {Rate: 1, Burst: most, Length: most}, IOPSTotal: {Rate: most}})
		for range 6 { // 36 years each, from the third on
			if err := q.Wait(t.Context(), Write, most); err != nil {
				t.Fatal(err)
			}
			if q.lines[total].mu.bytes.long.paid < 0 {
				t.Fatal("overflow", q.lines[total].mu.bytes.long)
			}
			time.Sleep(100 * time.Hour)
		}
		q = throttle(t, Limits{BPSTotal: {Rate: 1}})
		if err := q.Wait(t.Context(), Write, most); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 1000*time.Hour)
		defer cancel()
		if err := q.Wait(ctx, Write, 1); !errors.Is(err, atoll.ErrTimeout) {
			t.Error(err)
		}
	})
}

// What does not wait allocates nothing.
func TestNoAllocation(t *testing.T) {
	for name, l := range map[string]Limits{"none": {}, "high": {IOPSTotal: {Rate: 1 << 40}, BPSRead: {Rate: 1 << 50, Burst: 1 << 51}}} {
		q := throttle(t, l)
		ctx := t.Context()
		if n := hosttest.Allocs(1000, func() { q.Wait(ctx, Read, 4096) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkWait(b *testing.B) {
	for name, l := range map[string]Limits{
		"none": {}, "iops": {IOPSTotal: {Rate: 1 << 40}},
		"all": {{Rate: 1 << 40}, {Rate: 1 << 40}, {Rate: 1 << 40}, {Rate: 1 << 50}, {Rate: 1 << 50}, {Rate: 1 << 50, Burst: 1 << 51}},
	} {
		q := throttle(b, l)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					q.Wait(b.Context(), Write, 4096)
				}
			})
		})
	}
	q := throttle(b, Limits{IOPSTotal: {Rate: 200_000}})
	b.Run("waiting", func(b *testing.B) {
		b.ReportAllocs()
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				q.Wait(b.Context(), Write, 4096)
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
	})
}

// Parts of a nanosecond are not lost.
func TestRemainder(t *testing.T) {
	m := meter{}
	m.set(0, 700_000_000, int64(time.Hour))
	for range 700_000 {
		m.charge(0, 1)
	}
	if m.paid != int64(time.Millisecond) {
		t.Errorf("700000 at 700000000/s are paid for until %d ns", m.paid)
	}
}
