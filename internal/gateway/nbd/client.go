package nbd

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Client is one connection to an export. All methods may be called concurrently
// and are pipelined. After a broken connection every call fails with
// ErrUnreachable; there is no reconnection.
//
// When a context ends, the call returns at once and whether the request was
// carried out is unknown. If its bytes were on the wire at that moment, the
// connection is given up, so that the caller's memory is free on return.
type Client struct {
	addr Address
	p    proposal
	nc   net.Conn
	raw  net.Conn
	in   input
	wg   sync.WaitGroup
	ops  sync.Pool     // free ops; of this client, because its sender may still look at one
	dead chan struct{} // closed when the connection has failed or was closed
	once sync.Once
	// writing holds a value while the sender reads the owners' memory, and for
	// ever once the connection is dead.
	writing chan struct{}

	mu struct {
		sync.Mutex // held for memory work only
		pending    map[uint64]*op
		cookie     uint64
		err        error // why dead
		queue      []*op // to be sent
		sending    bool
	}

	// Owned by whoever sends.
	batch  []*op
	slices [][]byte
	vec    net.Buffers
	flat   []byte // for connections that cannot gather
	gather bool
}

// The states of an op. Only opQueued and opSent can be abandoned.
const (
	opQueued  = iota // its owner's memory is not in use
	opSending        // the sender is reading the owner's memory
	opSent
	opFilling // the receiver is writing the owner's memory
	opDone
	opAbandoned // the owner is gone; the memory must not be touched
)

// op is one request of a client. It is pooled and owned by its caller; an
// abandoned one is left to the garbage collector.
type op struct {
	h      header
	data   []byte // to be sent (WRITE) or filled (READ)
	state  atomic.Int32
	done   chan struct{} // takes one value when finished
	err    error
	head   [requestBytes]byte
	got    int    // bytes of data received
	wanted uint32 // the id of the context that the owner asks for
	runs   []run  // what that tells
}

// Dial connects to an export by its URI.
func Dial(ctx context.Context, uri string, o DialOptions) (*Client, error) {
	addr, p, nc, err := negotiate(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	return newClient(addr, p, nc), nil
}

// Negotiated is a connection behind the negotiation, before the first request.
type Negotiated struct {
	// Conn carries requests and replies; nothing of them has been read.
	Conn   net.Conn
	Size   int64
	Flags  uint16 // the protocol's transmission flags
	Blocks Blocks
}

// Negotiate connects to an export as Dial does and leaves the transmission to
// another client, such as the kernel's. Replies are simple. The caller closes
// the connection.
func Negotiate(ctx context.Context, uri string, o DialOptions) (Negotiated, error) {
	o.NoStructured = true
	_, p, nc, err := negotiate(ctx, uri, o)
	if err != nil {
		return Negotiated{}, err
	}
	return Negotiated{Conn: nc, Size: p.size, Flags: p.flags, Blocks: p.blocks}, nil
}

// negotiate connects and enters the transmission phase.
func negotiate(ctx context.Context, uri string, o DialOptions) (addr Address, p proposal, nc net.Conn, err error) {
	if addr, err = ParseURI(uri); err != nil {
		return addr, p, nil, err
	}
	d, err := connect(ctx, addr, o)
	if err != nil {
		return addr, p, nil, err
	}
	raw := d.nc
	release := d.guard(ctx)
	p, err = d.choose()
	release()
	if err == nil {
		raw.SetDeadline(time.Time{})
		err = ctx.Err()
	}
	if err != nil {
		raw.Close()
		return addr, p, nil, d.wrap(ctx, err)
	}
	return addr, p, d.nc, nil
}

// newClient starts a client on a connection in the transmission phase.
func newClient(addr Address, p proposal, nc net.Conn) *Client {
	c := &Client{addr: addr, p: p, nc: nc, raw: nc, dead: make(chan struct{}), writing: make(chan struct{}, 1)}
	c.ops.New = func() any { return &op{done: make(chan struct{}, 1)} }
	switch nc.(type) {
	case *net.TCPConn, *net.UnixConn:
		c.gather = true
	}
	c.mu.pending = make(map[uint64]*op)
	c.in.init(nc)
	c.wg.Go(c.receiveLoop)
	return c
}

// Size returns the export's size in bytes.
func (c *Client) Size() int64 { return c.p.size }

// Blocks returns the sizes that the server asks requests to keep to.
func (c *Client) Blocks() Blocks { return c.p.blocks }

// Description returns the server's words about the export.
func (c *Client) Description() string { return c.p.text }

// Features tells what an export can do.
type Features struct {
	ReadOnly, Flush, FUA, Trim, Zero, FastZero, MultiConn, Cache, BlockStatus, Structured bool
}

// Features returns what the export can do.
func (c *Client) Features() Features {
	f := c.p.flags
	return Features{
		ReadOnly: f&flagReadOnly != 0, Flush: f&flagFlush != 0, FUA: f&flagFUA != 0,
		Trim: f&flagTrim != 0, Zero: f&flagZeroes != 0, FastZero: f&flagFastZero != 0,
		MultiConn: f&flagMultiConn != 0, Cache: f&flagCache != 0,
		BlockStatus: c.hasAllocation(), Structured: c.p.structured,
	}
}

// ReadAt fills p from offset off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	return c.pieces(int64(len(p)), off, int64(c.p.blocks.Max), func(at, n int64) error {
		return c.call(ctx, header{typ: cmdRead, off: uint64(off + at), n: uint32(n)}, p[at:at+n], nil)
	})
}

// WriteAt writes p at offset off; with fua it is durable on return. p is not
// kept.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	return c.pieces(int64(len(p)), off, int64(c.p.blocks.Max), func(at, n int64) error {
		return c.call(ctx, header{typ: cmdWrite, flags: c.fua(fua), off: uint64(off + at), n: uint32(n)}, p[at:at+n], nil)
	})
}

// Flush makes durable every write that returned before.
func (c *Client) Flush(ctx context.Context) error {
	if c.p.flags&flagFlush == 0 {
		return nil
	}
	return c.call(ctx, header{typ: cmdFlush}, nil, nil)
}

// Trim gives up the contents of a range; ErrUnsupported if the server cannot.
func (c *Client) Trim(ctx context.Context, off, n int64, fua bool) error {
	return c.ranged(ctx, cmdTrim, flagTrim, c.fua(fua), off, n)
}

// Zero makes a range read as zeros; its room may be freed if punch is set.
// ErrUnsupported if the server cannot.
func (c *Client) Zero(ctx context.Context, off, n int64, punch, fua bool) error {
	flags := c.fua(fua)
	if !punch {
		flags |= cmdNoHole
	}
	return c.ranged(ctx, cmdZeroes, flagZeroes, flags, off, n)
}

// Cache tells the server that a range will be read soon.
func (c *Client) Cache(ctx context.Context, off, n int64) error {
	return c.ranged(ctx, cmdCache, flagCache, 0, off, n)
}

// Close ends the connection. Requests in flight fail; flush before if their
// durability matters.
func (c *Client) Close() error {
	closed := fmt.Errorf("use connection to %v: %w", c.addr, atoll.ErrClosed)
	c.mu.Lock()
	idle := !c.mu.sending && c.mu.err == nil
	c.mu.sending = true  // nobody sends any more
	if c.mu.err == nil { // now already: the server may be quick to hang up
		c.mu.err = closed
	}
	c.mu.Unlock()
	if idle {
		c.raw.SetWriteDeadline(time.Now().Add(time.Second))
		c.nc.Write(appendHeader(nil, header{typ: cmdDisconnect}))
	}
	c.fail(closed)
	c.wg.Wait()
	return nil
}

// fua returns the flag if it is wanted and the server knows it.
func (c *Client) fua(want bool) uint16 {
	if want && c.p.flags&flagFUA != 0 {
		return cmdFUA
	}
	return 0
}

// pieces splits a range into requests of at most limit bytes.
func (c *Client) pieces(n, off, limit int64, each func(at, n int64) error) error {
	if off < 0 || n < 0 {
		return fmt.Errorf("range %d+%d: %w", off, n, atoll.ErrInvalid)
	}
	for at := int64(0); at < n; at += limit {
		if err := each(at, min(limit, n-at)); err != nil {
			return err
		}
	}
	return nil
}

// ranged sends a request without data for a range of any length.
func (c *Client) ranged(ctx context.Context, typ, need, flags uint16, off, n int64) error {
	if c.p.flags&need == 0 {
		return fmt.Errorf("%s on %v: %w", commandNames[typ], c.addr, atoll.ErrUnsupported)
	}
	return c.pieces(n, off, 1<<31, func(at, n int64) error {
		return c.call(ctx, header{typ: typ, flags: flags, off: uint64(off + at), n: uint32(n)}, nil, nil)
	})
}

// statusWish says which context's answer to a BLOCK_STATUS is wanted, and takes
// it.
type statusWish struct {
	id   uint32
	runs []run
}

// call sends one request and waits for its answer.
func (c *Client) call(ctx context.Context, h header, data []byte, wish *statusWish) error {
	if err := ctx.Err(); err != nil {
		return ctxError(err)
	}
	o := c.ops.Get().(*op)
	o.h, o.data, o.err, o.got, o.runs = h, data, nil, 0, nil
	if wish != nil {
		o.wanted = wish.id
	}
	o.state.Store(opQueued)
	if err := c.submit(o); err != nil {
		return err
	}
	select {
	case <-o.done:
	case <-ctx.Done():
		if c.abandon(o) {
			return fmt.Errorf("%s %d+%d on %v: %w", commandNames[h.typ], h.off, h.n, c.addr, ctxError(ctx.Err()))
		}
		<-o.done
	}
	err := o.err
	if wish != nil {
		wish.runs = o.runs
	}
	o.data, o.runs = nil, nil
	c.ops.Put(o)
	if se, ok := err.(*ServerError); ok {
		return fmt.Errorf("%v: %w", c.addr, se)
	}
	return err
}

// abandon takes an op from its owner's memory and reports whether the owner may
// go. If the memory is in use this very moment, the connection is given up and
// the op is about to be done.
func (c *Client) abandon(o *op) bool {
	for {
		s := o.state.Load()
		switch s {
		case opQueued, opSent:
			if o.state.CompareAndSwap(s, opAbandoned) {
				return true
			}
		case opDone:
			return false
		default:
			c.fail(fmt.Errorf("use connection to %v: given up in the middle of a transfer: %w", c.addr, atoll.ErrUnreachable))
			return false
		}
	}
}

// fail ends the connection with a reason. The receiver then ends all ops.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.mu.err == nil {
		c.mu.err = err
	}
	c.mu.Unlock()
	c.once.Do(func() {
		close(c.dead)
		c.raw.Close()
	})
}

// put encodes the header of o.
func (o *op) put(cookie uint64) {
	o.h.cookie = cookie
	appendHeader(o.head[:0], o.h)
}
