package catalog

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Catalog is typed access to what all of a cluster agree on. Open loads the
// cluster's state and one goroutine keeps it up to date. All methods may be
// called concurrently.
//
// Every change is a transaction on revisions or epochs. When its answer is
// lost, the same transaction is sent again: its conditions let it happen once at
// most, and the mark of its writer tells whether it happened. A change that
// returns ErrTimeout may or may not have been done; after any other error it was
// not, or (ErrConflict, ErrFenced) somebody else changed the same thing since.
type Catalog struct {
	kv      KV
	log     *slog.Logger
	metrics *Metrics
	random  *lockedReader
	numbers numberPool
	state   atomic.Pointer[view]
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// Options of OpenWith.
type Options struct {
	Log     *slog.Logger
	Metrics *Metrics
	// Rand gives the bytes of new identities and of writers' marks; nil for
	// crypto/rand. It is read under a lock.
	Rand io.Reader
}

const (
	// One request within a call may take so long, at first and at most: what a
	// follower passed on to a leader that died is lost without an error, so
	// waiting longer does not help, and asking again is harmless.
	tryFirst   = 500 * time.Millisecond
	tryTimeout = 2 * time.Second
	retryWait  = 20 * time.Millisecond // before a request is repeated, doubling
	retryMax   = 500 * time.Millisecond
	maxRaces   = 32 // decisions that may be taken anew because others were faster
)

// Open is OpenWith for callers with nothing to say but where to log.
func Open(ctx context.Context, kv KV, log *slog.Logger) (*Catalog, error) {
	return OpenWith(ctx, kv, Options{Log: log})
}

// OpenWith loads the cluster's state and starts to watch it. The caller closes
// kv after the Catalog. ErrVersion when the cluster is newer than this program.
func OpenWith(ctx context.Context, kv KV, opts Options) (*Catalog, error) {
	c := &Catalog{kv: kv, log: opts.Log, metrics: opts.Metrics, random: &lockedReader{r: opts.Rand}}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.random.r == nil {
		c.random.r = rand.Reader
	}
	ctx, done := bound(ctx)
	defer done()
	raw, err := c.load(ctx)
	if err != nil {
		return nil, fmt.Errorf("load the catalog: %w", err)
	}
	first, err := newView(raw)
	if err != nil {
		return nil, fmt.Errorf("load the catalog: %w", err)
	}
	c.state.Store(first)
	watching, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.wg.Go(func() { c.watch(watching, raw) })
	return c, nil
}

// Close stops watching. State keeps its last answer. Sessions are closed by
// whoever opened them, before.
func (c *Catalog) Close() error {
	c.cancel()
	c.wg.Wait()
	return nil
}

// Init records the cluster at its first start, or returns the record that is
// there. A zero ID is drawn. ErrIdentity when a given ID is not the cluster's.
func (c *Catalog) Init(ctx context.Context, want Cluster) (Cluster, error) {
	ctx, done := bound(ctx)
	defer done()
	given := !want.ID.IsZero()
	if !given {
		want.ID = c.newUUID()
	}
	if want.Created.IsZero() {
		want.Created = now()
	}
	w := c.mark()
	res, ok, err := c.commit(ctx, w, Txn{
		If:   []Cmp{{Key: keyCluster}},
		Then: []Op{{Key: keyCluster, Value: encode(w, want)}},
		Read: []string{keyCluster},
	})
	switch {
	case err != nil:
		return Cluster{}, fmt.Errorf("record cluster %v: %w", want.ID, err)
	case ok:
		c.await(ctx, res.Rev)
		return want, nil
	}
	var have Cluster
	if err := decode(res.Got[0], &have); err != nil {
		return Cluster{}, fmt.Errorf("read the cluster's record: %w", err)
	}
	if given && have.ID != want.ID {
		return Cluster{}, fmt.Errorf("join cluster %v: this catalog is of cluster %v: %w", want.ID, have.ID, atoll.ErrIdentity)
	}
	return have, nil
}

// commit does a transaction that reads a key which it writes with the mark w, or
// if w is empty, whose first Read is one that it deletes. Lost answers are made good by asking again.
// It reports whether the transaction was done; Got is as it was before it, or
// why it was not.
func (c *Catalog) commit(ctx context.Context, w string, t Txn) (TxnResult, bool, error) {
	start, unknown, wait := time.Now(), false, retryWait
	defer func() { c.metrics.took(time.Since(start).Seconds()) }()
	for limit := tryFirst; ; limit = min(2*limit, tryTimeout) {
		try, done := context.WithTimeout(ctx, limit)
		res, err := c.kv.Txn(try, t)
		done()
		switch {
		case err == nil && res.OK:
			return res, true, nil
		case err == nil && unknown && wrote(w, &res):
			return res, true, nil
		case err == nil:
			c.metrics.conflict()
			return res, false, nil
		case definite(err) && unknown:
			return res, false, fmt.Errorf("%w: %w", atoll.ErrTimeout, err)
		case definite(err):
			return res, false, err
		}
		unknown = true
		c.metrics.noAnswer()
		if sleep(ctx, wait) != nil {
			return res, false, fmt.Errorf("%w: %w", atoll.ErrTimeout, err)
		}
		wait = min(2*wait, retryMax)
	}
}

// wrote reports whether the keys show that the writer with mark w was there
// already, and corrects the revision.
func wrote(w string, res *TxnResult) bool {
	if w == "" {
		return res.Got[0].Mod == 0
	}
	for _, kv := range res.Got {
		if writer(kv) == w {
			res.Rev = kv.Mod
			return true
		}
	}
	return false
}

// definite reports whether the error says that nothing was done.
func definite(err error) bool {
	for _, kind := range []error{atoll.ErrInvalid, atoll.ErrTooLarge, atoll.ErrNoSpace,
		atoll.ErrNotExist, atoll.ErrClosed, atoll.ErrDenied, atoll.ErrVersion} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// read gets several keys at one revision, in order; Mod 0 where there is none.
func (c *Catalog) read(ctx context.Context, keys ...string) ([]KeyValue, error) {
	wait := retryWait
	for limit := tryFirst; ; limit = min(2*limit, tryTimeout) {
		try, done := context.WithTimeout(ctx, limit)
		res, err := c.kv.Txn(try, Txn{Read: keys})
		done()
		if err == nil {
			return res.Got, nil
		}
		if definite(err) || sleep(ctx, wait) != nil {
			return nil, err
		}
		wait = min(2*wait, retryMax)
	}
}

// scan is KV.Range, repeated while the store does not answer.
func (c *Catalog) scan(ctx context.Context, prefix, after string, limit int) ([]KeyValue, int64, error) {
	wait := retryWait
	for {
		try, done := context.WithTimeout(ctx, tryTimeout)
		kvs, rev, err := c.kv.Range(try, prefix, after, limit)
		done()
		if err == nil || definite(err) || sleep(ctx, wait) != nil {
			return kvs, rev, err
		}
		wait = min(2*wait, retryMax)
	}
}

// mark draws the mark of one write.
func (c *Catalog) mark() string {
	var b [8]byte
	c.random.fill(b[:])
	return hex.EncodeToString(b[:])
}

func (c *Catalog) newUUID() (id atoll.UUID) {
	c.random.fill(id[:])
	return id
}

// NextMediumID draws the identity of a new medium; never 0.
func (c *Catalog) NextMediumID() atoll.MediumID {
	for {
		var b [8]byte
		c.random.fill(b[:])
		if id := atoll.MediumID(binary.BigEndian.Uint64(b[:])); id != 0 {
			return id
		}
	}
}

// lockedReader is a source of random bytes for many goroutines.
type lockedReader struct {
	mu sync.Mutex
	r  io.Reader
}

// fill draws len(p) bytes. A machine without randomness cannot go on.
func (l *lockedReader) fill(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := io.ReadFull(l.r, p)
	atoll.Assert(err == nil, "read random bytes: %v", err)
}

func bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, atoll.RequestTimeout)
}

// sleep waits for d; an error if ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// now is the wall clock without its monotonic part, as records keep it.
func now() time.Time { return time.Now().UTC().Round(0) }
