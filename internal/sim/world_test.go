package sim

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

// clusterID names the simulated cluster.
var clusterID = atoll.UUID{0xc1}

// world is one run: the clock, the trace and all that takes part.
type world struct {
	t     testing.TB
	cfg   config
	seed  uint64
	rng   *rand.Rand // of the goroutine that makes the world and its faults
	start time.Time

	memory   *catalog.Memory
	net      *hosttest.Net // nil without the wire protocol
	mesh     *mesh
	machines []*machine
	gateways []*gateway
	warden   *warden // nil where nothing is repaired
	history  *history
	volume   atoll.MediumID
	wg       sync.WaitGroup
	ctx      context.Context // ends when the run is to stop
	cancel   context.CancelFunc

	mu struct {
		sync.Mutex
		taken  map[int64]struct{} // positions within a millisecond that are in use
		sum    uint64             // of the trace
		events int
		last   map[string]int // events by kind
		errs   []error        // broken promises
		log    []string       // the trace, when asked for
	}
}

func newWorld(t testing.TB, cfg config) *world {
	w := &world{t: t, cfg: cfg, seed: cfg.seed, rng: rand.New(rand.NewPCG(cfg.seed, 0x73696d)), start: time.Now(), history: &history{}}
	w.mu.taken = make(map[int64]struct{})
	w.mu.last = make(map[string]int)
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.history.w = w
	w.mesh = newMesh(w)
	w.memory = catalog.NewMemory(catalog.MemoryOptions{
		Delay:    func(client string) time.Duration { return w.latency("catalog", client) },
		WatchLag: func(client string) time.Duration { return w.latency("watch", client) },
		Fault:    w.catalogFault,
	})
	return w
}

// now returns the time since the start of the run.
func (w *world) now() time.Duration { return time.Since(w.start) }

// hash mixes the seed with what is given.
func (w *world) hash(parts ...any) uint64 {
	h := fnv.New64a()
	fmt.Fprint(h, w.seed, "|")
	fmt.Fprintln(h, parts...)
	x := h.Sum64()
	x ^= x >> 31
	x *= 0x9e3779b97f4a7c15
	return x ^ x>>29
}

// after returns a duration of about d, not less, that ends at an instant of its
// own. who is what waits, so that two that begin at one moment do not compete.
func (w *world) after(d time.Duration, who ...any) time.Duration {
	at := w.now() + max(d, 1)
	if len(who) > 0 {
		at += time.Duration(w.hash(append(who, w.now(), d)...) % uint64(time.Millisecond))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		r := int64(at % time.Millisecond)
		if _, taken := w.mu.taken[r]; !taken && r != 0 {
			w.mu.taken[r] = struct{}{}
			return at - w.now()
		}
		at++
	}
}

// latency returns how long something of this kind takes now.
func (w *world) latency(parts ...any) time.Duration {
	h := w.hash(append(parts, w.now())...)
	return w.after(50*time.Microsecond + time.Duration(h%350_000))
}

// sleep waits for about d, or until the run stops.
func (w *world) sleep(ctx context.Context, who string, d time.Duration) bool {
	timer := time.NewTimer(w.after(d, who))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// catalogFault loses a few requests and answers.
func (w *world) catalogFault(client, op string) catalog.Fault {
	if w.cfg.catalogLoss == 0 || w.history.calm() || op == "grant" {
		return catalog.Healthy
	}
	switch h := w.hash("fault", client, op, w.now()); {
	case h%1000 < uint64(w.cfg.catalogLoss):
		return catalog.LoseReply
	case h%1000 < 2*uint64(w.cfg.catalogLoss):
		return catalog.LoseAsk
	}
	return catalog.Healthy
}

// note adds an event to the trace. The sum does not depend on the order of
// events at one instant.
func (w *world) note(kind string, parts ...any) {
	line := fmt.Sprintf("%12d %s %s", w.now(), kind, strings.TrimSuffix(fmt.Sprintln(parts...), "\n"))
	h := w.hash(line)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.sum += h
	w.mu.events++
	w.mu.last[kind]++
	if w.cfg.trace {
		w.mu.log = append(w.mu.log, line)
	}
}

// broken notes a broken promise.
func (w *world) broken(format string, args ...any) {
	err := fmt.Errorf(format, args...)
	w.note("BROKEN", err)
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.mu.errs) < 20 {
		w.mu.errs = append(w.mu.errs, fmt.Errorf("at %v: %w", w.now(), err))
	}
}

func (w *world) err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Join(w.mu.errs...)
}

// logger returns the logger of one process; silent unless the trace is wanted.
func (w *world) logger(name string) *slog.Logger {
	if !w.cfg.trace {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(traceWriter{w, name}, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// traceWriter puts log lines among the trace, without counting them.
type traceWriter struct {
	w    *world
	name string
}

func (t traceWriter) Write(p []byte) (int, error) {
	t.w.mu.Lock()
	defer t.w.mu.Unlock()
	t.w.mu.log = append(t.w.mu.log, fmt.Sprintf("%12d log %s: %s", t.w.now(), t.name, strings.TrimSpace(string(p))))
	return len(p), nil
}

// random is a reader of bytes that follow from the seed.
type random struct{ rng *rand.Rand }

func (w *world) random(name string) *random {
	return &random{rand.New(rand.NewPCG(w.seed, w.hash("random", name)))}
}

func (r *random) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(r.rng.Uint32())
	}
	return len(p), nil
}
