package sim

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// history is what clients did and saw.
type history struct {
	w      *world
	healed atomic.Bool // faults have ended
	mu     sync.Mutex
	eras   []*era
	ops    []*op
	writes int
}

// era is the time in which one owner served the volume. Owners have ascending
// epochs, and none serves before the one before it can do nothing more.
type era struct {
	n       int // index in history.eras
	gateway string
	epoch   atoll.Epoch
	opened  time.Duration
}

// opKind is what a client did.
type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opZero // discard or write zeroes; reads give zeros afterwards
	opFlush
)

func (k opKind) String() string { return [...]string{"read", "write", "zero", "flush"}[k] }

// never is when an operation returns whose outcome is unknown.
const never = time.Duration(math.MaxInt64)

// op is one operation. Its outcome is known or not; there is no failure that
// promises to have done nothing.
type op struct {
	id     int
	client string
	era    *era
	kind   opKind
	page   int
	pages  int
	val    uint32   // of a write; unique
	fua    bool     // durable on return
	got    []uint32 // of a read, by page
	call   time.Duration
	ret    time.Duration // never while it is at work or when it failed
	ended  time.Duration // also after an error
	err    error
}

func (o *op) String() string {
	ret := "-"
	if o.ret != never {
		ret = fmt.Sprint(int64(o.ret))
	}
	return fmt.Sprintf("%s era %d %v page %d+%d val %d fua %v got %v [%d, %s] %v", o.client, o.era.n, o.kind, o.page, o.pages, o.val, o.fua, o.got, o.call, ret, o.err)
}

func (h *history) calm() bool { return h.healed.Load() }

// open begins an era.
func (h *history) open(gateway string, epoch atoll.Epoch) *era {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := &era{n: len(h.eras), gateway: gateway, epoch: epoch, opened: h.w.now()}
	if n := len(h.eras); n > 0 && h.eras[n-1].epoch >= epoch && !h.w.cfg.brokenLease {
		h.w.broken("I3: %s serves under epoch %v after epoch %v", gateway, epoch, h.eras[n-1].epoch)
	}
	// One whose lease is not worth anything may have begun before the others
	// and be late. It sees its own time, and can acknowledge nothing.
	h.eras = append(h.eras, e)
	slices.SortStableFunc(h.eras, func(a, b *era) int { return cmp.Compare(a.epoch, b.epoch) })
	for i, e := range h.eras {
		e.n = i
	}
	h.w.note("era", gateway, e.n, epoch)
	return e
}

// begin notes that an operation starts.
func (h *history) begin(o *op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o.id, o.call, o.ret = len(h.ops), h.w.now(), never
	if o.kind == opWrite {
		h.writes++
		o.val = uint32(h.writes)
	}
	h.ops = append(h.ops, o)
}

// end notes how an operation ended.
func (h *history) end(o *op, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o.err, o.ended = err, h.w.now()
	if err == nil {
		o.ret = o.ended
	}
	h.w.note("op", o.client, o.kind, o.page, o.pages, o.got, kindOf(err))
}

// flushed notes that all that was acknowledged before began is durable.
func (h *history) flushed(e *era, began time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, &op{id: len(h.ops), client: "close", era: e, kind: opFlush, call: began, ret: h.w.now(), ended: h.w.now()})
}

// fill makes a page's contents: its number and the value, and bytes that follow
// from both.
func fill(p []byte, page int, val uint32) {
	binary.LittleEndian.PutUint32(p, uint32(page))
	binary.LittleEndian.PutUint32(p[4:], val)
	x := uint64(page)<<32 | uint64(val)
	for i := 8; i < len(p); i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

// parse returns the value of a page, 0 for zeros; false if nobody wrote it (I5).
func parse(p []byte, page int) (uint32, bool) {
	val := binary.LittleEndian.Uint32(p[4:])
	if val == 0 {
		for _, b := range p {
			if b != 0 {
				return 0, false
			}
		}
		return 0, true
	}
	want := make([]byte, len(p))
	fill(want, page, val)
	return val, string(want) == string(p)
}
