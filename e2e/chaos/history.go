package chaos

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/gateway/nbd"
)

const (
	blockBytes = atoll.BlockSize
	opTimeout  = 3 * time.Second  // a client gives up; what it had asked for is unknown
	patience   = 15 * time.Second // the same of those who wait longer
	openEnd    = math.MaxInt64    // when an operation of unknown outcome ends
)

// op is one operation on a block, as its client saw it.
type op struct {
	client    int
	write     bool
	stamp     uint64 // written, or read; 0: never written
	call, ret int64  // since the recorder's base
}

// unknown tells that the client never heard how the operation ended.
func (o *op) unknown() bool { return o.ret == openEnd }

// Recorder is clients of one volume that write stamps to its blocks, each write
// another one, read them, and keep what they did and saw. They come again, to
// any gateway, after an error, as clients of a disk must.
//
// The volume is in mode writethrough: what was acknowledged is durable and what
// was read stays.
type Recorder struct {
	c      *Cluster
	volume string
	blocks int
	seed   uint64
	base   time.Time
	stamps atomic.Uint64
	wg     sync.WaitGroup
	cancel context.CancelFunc

	mu      sync.Mutex // guards the fields below
	history [][]op     // by block
	wrong   []error    // bytes that nobody wrote
	starts  uint64

	ops     atomic.Int64
	errs    atomic.Int64 // operations, or connections, that failed
	served  atomic.Int64 // when an operation that began after since succeeded first
	since   atomic.Int64
	mark    atomic.Int64
	last    atomic.Int64
	stall   atomic.Int64 // longest time without any success since mark
	lastErr atomic.Value // string
}

const (
	workers   = 8
	hotBlocks = 32                   // blocks that all clients fight for
	think     = 4 * time.Millisecond // between operations of a client
)

// NewRecorder makes a recorder of a volume of that many blocks, nothing of
// which was written yet.
func NewRecorder(c *Cluster, volume string, blocks int, seed uint64) *Recorder {
	r := &Recorder{c: c, volume: volume, blocks: blocks, seed: seed, base: time.Now()}
	r.history = make([][]op, blocks)
	return r
}

func (r *Recorder) now() int64 { return int64(time.Since(r.base)) }

// Start lets the clients work until Stop.
func (r *Recorder) Start() {
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.mu.Lock()
	r.starts++
	run := r.starts
	r.mu.Unlock()
	r.last.Store(r.now())
	for i := range workers {
		w := &client{r: r, id: i, at: i, rng: rand.New(rand.NewPCG(r.seed, run<<8|uint64(i))), buf: make([]byte, blockBytes)}
		r.wg.Go(func() { w.work(ctx) })
	}
}

// Stop ends the clients' work. What they had begun they wait for.
func (r *Recorder) Stop() {
	r.cancel()
	r.wg.Wait()
}

// Mark begins a new measurement of stalls.
func (r *Recorder) Mark() {
	r.stall.Store(0)
	r.mark.Store(r.now())
}

// Await begins to look for an operation that begins from now on and succeeds.
func (r *Recorder) Await() {
	r.since.Store(math.MaxInt64)
	r.served.Store(0)
	r.since.Store(r.now())
}

// Served returns how long after Await such an operation succeeded, false if none
// has yet.
func (r *Recorder) Served() (time.Duration, bool) {
	at := r.served.Load()
	return time.Duration(at - r.since.Load()), at != 0
}

// Stall returns the longest time since Mark in which no operation succeeded.
func (r *Recorder) Stall() time.Duration {
	return time.Duration(max(r.stall.Load(), r.now()-max(r.last.Load(), r.mark.Load())))
}

// Counts returns how many operations succeeded, and how often a client had to
// connect again.
func (r *Recorder) Counts() (ops, errs int64) { return r.ops.Load(), r.errs.Load() }

// LastError returns what a client was told last when it failed.
func (r *Recorder) LastError() string {
	s, _ := r.lastErr.Load().(string)
	return s
}

// success notes an operation that succeeded.
func (r *Recorder) success(call int64) {
	now := r.now()
	mark := r.mark.Load()
	gap := now - max(r.last.Swap(now), mark)
	for {
		old := r.stall.Load()
		if gap <= old || r.stall.CompareAndSwap(old, gap) {
			break
		}
	}
	if call > r.since.Load() {
		r.served.CompareAndSwap(0, now)
	}
	r.ops.Add(1)
}

func (r *Recorder) note(block int, o op) {
	r.mu.Lock()
	r.history[block] = append(r.history[block], o)
	r.mu.Unlock()
}

func (r *Recorder) corrupt(err error) {
	r.mu.Lock()
	r.wrong = append(r.wrong, err)
	r.mu.Unlock()
}

// client is one of a recorder's. It works through one connection.
type client struct {
	r    *Recorder
	id   int
	at   int // the gateway to try
	rng  *rand.Rand
	buf  []byte
	conn *nbd.Client
}

func (w *client) work(ctx context.Context) {
	defer w.leave()
	for ctx.Err() == nil {
		if err := w.step(ctx); err != nil {
			w.r.errs.Add(1)
			w.r.lastErr.Store(fmt.Sprintf("%s client %d: %v", time.Now().UTC().Format("15:04:05.000"), w.id, err))
			w.leave()
			w.at++
			_ = pause(ctx, 50*time.Millisecond)
			continue
		}
		_ = pause(ctx, time.Duration(w.rng.Int64N(int64(2*think))))
	}
}

func (w *client) leave() {
	if w.conn != nil {
		w.conn.Close()
		w.conn = nil
	}
}

// step does one operation, and connects before if need be.
func (w *client) step(ctx context.Context) error {
	if w.conn == nil {
		dctx, cancel := context.WithTimeout(ctx, 8*time.Second) // it may have to take the volume over
		defer cancel()
		conn, err := w.r.dial(dctx, w.r.c.Servers[w.at%len(w.r.c.Servers)])
		if err != nil {
			return err
		}
		w.conn = conn
	}
	block := w.rng.IntN(w.r.blocks)
	if w.rng.IntN(2) == 0 {
		block = w.rng.IntN(hotBlocks)
	}
	// What was begun is finished, so that the history knows what must be there.
	limit := opTimeout
	if w.id%2 == 0 {
		limit = patience
	}
	octx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	if w.rng.IntN(3) == 0 {
		return w.read(octx, block)
	}
	return w.write(octx, block)
}

// dial connects to the volume at a gateway.
func (r *Recorder) dial(ctx context.Context, s *Server) (*nbd.Client, error) {
	return nbd.Dial(ctx, r.c.URI(s, r.volume), nbd.DialOptions{TLS: r.c.keys.client, DialContext: r.c.Clients.Dial})
}

func (w *client) write(ctx context.Context, block int) error {
	o := op{client: w.id, write: true, stamp: w.r.stamps.Add(1), call: w.r.now()}
	fillStamp(w.buf, w.r.seed, block, o.stamp)
	err := w.conn.WriteAt(ctx, w.buf, int64(block)*blockBytes, false)
	o.ret = w.r.now()
	if err != nil {
		o.ret = openEnd
	} else {
		w.r.success(o.call)
	}
	w.r.note(block, o)
	return err
}

func (w *client) read(ctx context.Context, block int) error {
	o := op{client: w.id, call: w.r.now()}
	if err := w.conn.ReadAt(ctx, w.buf, int64(block)*blockBytes); err != nil {
		return err
	}
	var err error
	o.ret = w.r.now()
	if o.stamp, err = readStamp(w.buf, w.r.seed, block); err != nil {
		w.r.corrupt(fmt.Errorf("client %d, %v after the start: %w", w.id, time.Duration(o.ret), err))
		return nil
	}
	w.r.success(o.call)
	w.r.note(block, o)
	return nil
}

// ReadAll reads every block once more through a server, as another client, and
// returns how many had been written.
func (r *Recorder) ReadAll(ctx context.Context, s *Server) (written int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	conn, err := r.dial(ctx, s)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	const chunk = 256
	buf := make([]byte, chunk*blockBytes)
	for at := 0; at < r.blocks; at += chunk {
		n := min(chunk, r.blocks-at)
		call := r.now()
		if err := conn.ReadAt(ctx, buf[:n*blockBytes], int64(at)*blockBytes); err != nil {
			return written, fmt.Errorf("read back block %d: %w", at, err)
		}
		ret := r.now()
		for i := range n {
			stamp, err := readStamp(buf[i*blockBytes:(i+1)*blockBytes], r.seed, at+i)
			if err != nil {
				r.corrupt(fmt.Errorf("read back through %s: %w", s.Name, err))
				continue
			}
			if stamp != 0 {
				written++
			}
			r.note(at+i, op{client: workers, stamp: stamp, call: call, ret: ret})
		}
	}
	return written, nil
}

// Settle forgets what was judged: what stays of each block is what it holds, as
// ReadAll has just found it, and the writes that may still come.
func (r *Recorder) Settle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for block, all := range r.history {
		r.history[block] = settled(all)
	}
}

// settled is what matters of a history whose last entry is a read.
func settled(all []op) (keep []op) {
	var holds op
	read := map[uint64]bool{}
	for _, o := range all {
		if !o.write {
			holds = o
			read[o.stamp] = true
		}
	}
	for _, o := range all {
		switch {
		case o.write && o.stamp == holds.stamp:
			o.ret = min(o.ret, holds.ret)
			keep = append(keep, o)
		case o.write && o.unknown() && !read[o.stamp]:
			keep = append(keep, o)
		}
	}
	return keep
}

// fillStamp makes a block that says where it belongs and which write made it.
func fillStamp(p []byte, seed uint64, block int, stamp uint64) {
	x := seed ^ uint64(block)*0x9e3779b97f4a7c15 ^ stamp | 1
	for i := 32; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint64(p, uint64(block)+1)
	binary.LittleEndian.PutUint64(p[8:], stamp)
	binary.LittleEndian.PutUint64(p[16:], seed)
	binary.LittleEndian.PutUint64(p[24:], uint64(crc32.ChecksumIEEE(p[32:]))<<32|uint64(crc32.ChecksumIEEE(p[:24])))
}

var errForeign = errors.New("holds what nobody wrote there")

// readStamp returns the stamp of a block, 0 for one of zeros.
func readStamp(p []byte, seed uint64, block int) (uint64, error) {
	sum := uint64(crc32.ChecksumIEEE(p[32:]))<<32 | uint64(crc32.ChecksumIEEE(p[:24]))
	switch {
	case allZero(p):
		return 0, nil
	case binary.LittleEndian.Uint64(p[24:]) != sum, binary.LittleEndian.Uint64(p) != uint64(block)+1, binary.LittleEndian.Uint64(p[16:]) != seed:
		return 0, fmt.Errorf("block %d %w: %x", block, errForeign, p[:32])
	}
	return binary.LittleEndian.Uint64(p[8:]), nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
