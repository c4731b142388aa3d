package e2e_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atollstore/atoll/internal/gateway/nbd"
)

const blockSize = 4096

// block is what is known of one block of a volume: a read must return a stamp
// from durable to issued. One worker at a time writes a block.
type block struct{ durable, issued uint64 }

// history is what was written to a volume over all loads on it, which follow
// each other.
type history struct {
	blocks []block
	seed   uint64
	loads  uint64
	// through says that the volume acknowledges nothing that is not durable.
	through bool

	mu    sync.Mutex
	wrong []error // what reads of the load found
}

func newHistory(t *testing.T, size int64) *history {
	t.Helper()
	h := &history{blocks: make([]block, size/blockSize), seed: rand.Uint64()}
	t.Logf("seed of the load: %d", h.seed)
	return h
}

// load writes to a volume at random, durably, until it is stopped or meets an
// error that retry does not want tried again.
type load struct {
	h      *history
	dial   func(ctx context.Context) (*nbd.Client, error)
	retry  bool // connect again after an error, for ever
	cancel context.CancelFunc
	wg     sync.WaitGroup
	base   time.Time
	errs   []error

	ops     atomic.Int64
	broken  atomic.Int64 // operations that ended in errors
	last    atomic.Int64 // when an operation completed last, since base
	stall   atomic.Int64 // longest time without any completion
	slowest atomic.Int64 // longest operation
}

const loadWorkers = 16

// startLoad begins. Workers with even numbers write with FUA; the others write
// a few blocks on one connection and flush on another.
func startLoad(h *history, retry bool, dial func(context.Context) (*nbd.Client, error)) *load {
	ctx, cancel := context.WithCancel(context.Background())
	h.loads++
	l := &load{h: h, dial: dial, retry: retry, cancel: cancel, base: time.Now(), errs: make([]error, loadWorkers)}
	for i := range loadWorkers {
		l.wg.Go(func() {
			w := &worker{l: l, id: i, rng: rand.New(rand.NewPCG(h.seed, h.loads<<8|uint64(i))), buf: make([]byte, blockSize)}
			defer w.close()
			for ctx.Err() == nil {
				if err := w.step(ctx); err != nil {
					l.broken.Add(1)
					w.close()
					l.errs[i] = err
					if !retry {
						return
					}
					select {
					case <-ctx.Done():
					case <-time.After(20 * time.Millisecond):
					}
				}
			}
		})
	}
	return l
}

// dialer connects to one address.
func dialer(uri string) func(context.Context) (*nbd.Client, error) {
	return func(ctx context.Context) (*nbd.Client, error) { return nbd.Dial(ctx, uri, nbd.DialOptions{}) }
}

// worker owns the blocks whose number is its own modulo loadWorkers.
type worker struct {
	l    *load
	id   int
	rng  *rand.Rand
	buf  []byte
	conn [2]*nbd.Client
}

func (w *worker) close() {
	for i, c := range w.conn {
		if c != nil {
			c.Close()
		}
		w.conn[i] = nil
	}
}

// step connects if need be and does one durable write, or one checked read.
func (w *worker) step(ctx context.Context) error {
	// What was begun is finished, so that the load knows what must be there.
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	conns := 1 + w.id%2
	for i := range conns {
		if w.conn[i] == nil {
			c, err := w.l.dial(rctx)
			if err != nil {
				return err
			}
			w.conn[i] = c
		}
	}
	begin := time.Now()
	var err error
	switch {
	case w.rng.IntN(5) == 0:
		err = w.read(rctx, w.pick())
	case w.id%2 == 0:
		err = w.write(rctx, w.pick(), true)
	default:
		err = w.batch(rctx)
	}
	if err == nil {
		w.l.completed(time.Since(begin))
	}
	return err
}

func (w *worker) pick() int {
	return w.rng.IntN(len(w.l.h.blocks)/loadWorkers)*loadWorkers + w.id
}

// batch writes a few blocks and flushes on the other connection.
func (w *worker) batch(ctx context.Context) error {
	var done []int
	for range 1 + w.rng.IntN(8) {
		b := w.pick()
		if err := w.write(ctx, b, false); err != nil {
			return err
		}
		done = append(done, b)
	}
	if err := w.conn[1].Flush(ctx); err != nil {
		return err
	}
	for _, b := range done {
		w.l.h.blocks[b].durable = w.l.h.blocks[b].issued
	}
	return nil
}

func (w *worker) write(ctx context.Context, b int, durable bool) error {
	state := &w.l.h.blocks[b]
	state.issued++
	fillStamp(w.buf, int64(b)*blockSize, state.issued)
	err := w.conn[0].WriteAt(ctx, w.buf, int64(b)*blockSize, durable)
	if err == nil && (durable || w.l.h.through) {
		state.durable = state.issued
	}
	return err
}

// read checks a block. A running server must return the last write unless that
// ended in an error.
func (w *worker) read(ctx context.Context, b int) error {
	if err := w.conn[0].ReadAt(ctx, w.buf, int64(b)*blockSize); err != nil {
		return err
	}
	err := w.l.h.check(b, w.buf, false)
	if err != nil {
		w.l.h.mu.Lock()
		w.l.h.wrong = append(w.l.h.wrong, err)
		w.l.h.mu.Unlock()
		w.l.cancel()
	}
	return err
}

// completed notes an operation's end.
func (l *load) completed(took time.Duration) {
	now := int64(time.Since(l.base))
	raise(&l.stall, now-l.last.Swap(now))
	raise(&l.slowest, int64(took))
	l.ops.Add(1)
}

func raise(v *atomic.Int64, to int64) {
	for {
		old := v.Load()
		if to <= old || v.CompareAndSwap(old, to) {
			return
		}
	}
}

// idle is how long ago an operation completed last.
func (l *load) idle() time.Duration { return time.Since(l.base) - time.Duration(l.last.Load()) }

// note counts the present time without completions as a stall.
func (l *load) note() { raise(&l.stall, int64(l.idle())) }

// reset begins a new measurement of stalls.
func (l *load) reset() {
	l.stall.Store(0)
	l.slowest.Store(0)
}

// wait returns when every worker has met an error, as each must when its server
// is gone and it may not try again.
func (l *load) wait(t *testing.T) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("the load did not notice: %d of %d workers saw an error", l.broken.Load(), loadWorkers)
	}
}

// stop ends the load. It returns the last error of a worker.
func (l *load) stop() error {
	l.cancel()
	l.wg.Wait()
	for _, err := range l.errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// check compares a block that was read with what may be there. settle makes what
// was found the only thing that may be there from now on.
func (h *history) check(b int, p []byte, settle bool) error {
	s := &h.blocks[b]
	off := int64(b) * blockSize
	stamp := binary.LittleEndian.Uint64(p[8:])
	zero := stamp == 0 && binary.LittleEndian.Uint64(p) == 0
	sum := binary.LittleEndian.Uint64(p[16:])
	switch {
	case zero && s.durable == 0:
	case zero:
		return fmt.Errorf("block at %d: zeros, but write %d was acknowledged as durable (%d issued)", off, s.durable, s.issued)
	case sum != uint64(crc32.ChecksumIEEE(p[24:])) || int64(binary.LittleEndian.Uint64(p))-1 != off:
		return fmt.Errorf("block at %d: holds what nobody wrote there: %x", off, p[:32])
	case stamp < s.durable || stamp > s.issued:
		return fmt.Errorf("block at %d: holds write %d, but %d was acknowledged as durable (%d issued)", off, stamp, s.durable, s.issued)
	}
	if settle {
		s.durable, s.issued = stamp, stamp
	}
	return nil
}

// verify reads every block of the volume.
func (h *history) verify(t *testing.T, c *nbd.Client) (written int) {
	t.Helper()
	const chunk = 256
	buf := make([]byte, chunk*blockSize)
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	for _, err := range h.wrong {
		t.Errorf("while the load ran: %v", err)
	}
	wrong := len(h.wrong)
	for at := 0; at < len(h.blocks); at += chunk {
		n := min(chunk, len(h.blocks)-at)
		if err := c.ReadAt(ctx, buf[:n*blockSize], int64(at)*blockSize); err != nil {
			t.Fatalf("read back at block %d: %v", at, err)
		}
		for i := range n {
			if h.blocks[at+i].durable > 0 {
				written++
			}
			if err := h.check(at+i, buf[i*blockSize:(i+1)*blockSize], true); err != nil {
				if wrong++; wrong <= 5 {
					t.Error(err)
				}
			}
		}
	}
	if wrong > 0 {
		t.Fatalf("%d blocks are wrong", wrong)
	}
	return written
}

// fillStamp makes a block that says where it belongs and which write made it.
func fillStamp(p []byte, off int64, stamp uint64) {
	x := uint64(off)*0x9e3779b97f4a7c15 ^ stamp
	for i := 24; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint64(p, uint64(off)+1)
	binary.LittleEndian.PutUint64(p[8:], stamp)
	binary.LittleEndian.PutUint64(p[16:], uint64(crc32.ChecksumIEEE(p[24:])))
}

// dial connects to a volume.
func dial(t *testing.T, uri string) *nbd.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	c, err := nbd.Dial(ctx, uri, nbd.DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The harness notices lost, old, torn and misplaced writes.
func TestHarness(t *testing.T) {
	h := &history{blocks: make([]block, 4)}
	h.blocks[1] = block{durable: 3, issued: 5}
	p := make([]byte, blockSize)
	for _, c := range []struct {
		what  string
		fill  func()
		right bool
	}{
		{"the durable write", func() { fillStamp(p, blockSize, 3) }, true},
		{"a later one", func() { fillStamp(p, blockSize, 5) }, true},
		{"an older one", func() { fillStamp(p, blockSize, 2) }, false},
		{"one that nobody made", func() { fillStamp(p, blockSize, 6) }, false},
		{"another block's", func() { fillStamp(p, 2*blockSize, 4) }, false},
		{"zeros", func() { clear(p) }, false},
		{"half a write", func() { fillStamp(p, blockSize, 4); clear(p[blockSize/2:]) }, false},
		{"one wrong bit", func() { fillStamp(p, blockSize, 4); p[4000] ^= 1 }, false},
	} {
		c.fill()
		if err := h.check(1, p, false); (err == nil) != c.right {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	clear(p)
	if err := h.check(0, p, false); err != nil {
		t.Errorf("zeros of a block that was never written: %v", err)
	}
}
