package wire

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Client is a node behind an address. It implements Node. It connects when it
// is used, shares connections with the other clients of its Peers, and after a
// loss connects again with the next request.
//
// Errors that the node reports keep their kind and text. In addition:
// ErrUnreachable when there is no connection or it was lost (then the outcome is
// unknown), ErrIdentity when the address belongs to another cluster, node or
// disk, ErrTimeout when the context ended or atoll.RequestTimeout passed
// (outcome unknown), ErrBusy for an Append when too much is outstanding,
// ErrClosed after Close. All methods may be called concurrently.
type Client struct {
	links       []*link
	node        atoll.NodeID
	incarnation atoll.UUID
	release     func()
}

var _ Node = (*Client)(nil)

// ClientOptions names one node.
type ClientOptions struct {
	Net         host.Net
	Addr        string
	TLS         *tls.Config // nil for none; not used for "unix:" addresses
	Cluster     atoll.UUID
	Process     atoll.UUID // of the caller, for the other side's log
	Node        atoll.NodeID
	Incarnation atoll.UUID // of the disk that is expected
	Log         *slog.Logger
	Metrics     *Metrics
}

// NewClient returns a client with a connection of its own. It does not connect
// yet.
func NewClient(o ClientOptions) *Client {
	p := NewPeers(PeersOptions{
		Net: o.Net, TLS: o.TLS, Cluster: o.Cluster, Process: o.Process, Log: o.Log, Metrics: o.Metrics,
	})
	c := p.Client(o.Addr, o.Node, o.Incarnation)
	c.release = func() { p.Close() }
	return c
}

// Close ends the client. If it is the last one for its address, the connection
// is closed and what is outstanding ends with ErrClosed.
func (c *Client) Close() error {
	c.release()
	return nil
}

// Ping asks the process behind the address for a sign of life and returns the
// time it took. It says nothing about the node.
func (c *Client) Ping(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	_, _, err := c.call(ctx, mPing, c.links[0], &request{}, nil, 0, nil)
	return time.Since(start), err
}

// link returns the connection for a segment: always the same, so that appends
// keep their order.
func (c *Client) link(seg atoll.SegmentID) *link {
	if len(c.links) == 1 {
		return c.links[0]
	}
	h := uint64(seg.Medium)*0x9E3779B97F4A7C15 + uint64(seg.Ordinal)
	return c.links[h%uint64(len(c.links))]
}

// Append implements Node. It blocks for memory work only.
func (c *Client) Append(a *Append) {
	size := a.Vec.Size()
	if size < atoll.BlockSize || size > maxPayload || size%atoll.BlockSize != 0 {
		c.refuse(a, fmt.Errorf("batch of %d bytes: %w", size, atoll.ErrTooLarge))
		return
	}
	conn, err := c.link(a.Seg).current()
	if err != nil {
		c.refuse(a, err)
		return
	}
	r := request{
		node: c.node, incarnation: c.incarnation, timeout: atoll.RequestTimeout,
		seg: a.Seg, epoch: a.Epoch, block: a.Offset,
	}
	vec := a.Vec.Retain()
	// From here on a may come back at any time and is not looked at any more.
	_, id, _, err := conn.register(mAppend, size+minCost, a, nil)
	if err != nil {
		vec.Release()
		c.refuse(a, err)
		return
	}
	p := conn.out.begin(requestSize)
	if p == nil {
		vec.Release() // the connection's end has ended the request, or will
		return
	}
	r.encode(p[headerSize:])
	conn.out.commit(p, &header{method: mAppend, id: id, payload: size}, vec, nil, 0)
	conn.out.signal()
}

// refuse gives an append back at once.
func (c *Client) refuse(a *Append, err error) {
	a.Err = fmt.Errorf("append to segment %v on node %v: %w", a.Seg, c.node, err)
	a.Queued, a.Commit = 0, 0
	a.Done <- a
}

// call sends a request and waits for its answer. buf is a payload, of which it
// takes over a reference; room is what the answer may hold.
func (c *Client) call(ctx context.Context, m method, l *link, r *request, buf *host.Buffer, room int, dst []byte) (response, *host.Buffer, error) {
	h := header{method: m}
	if buf != nil {
		h.payload, h.sum, h.dataCRC = len(buf.Bytes()), true, checksum(buf.Bytes())
	}
	conn, k, err := c.reserve(ctx, m, l, h.payload+room+minCost, dst)
	if err != nil {
		buf.Release()
		return response{}, nil, err
	}
	h.id = k.id()
	r.node, r.incarnation, r.timeout = c.node, c.incarnation, atoll.RequestTimeout
	if deadline, ok := ctx.Deadline(); ok {
		r.timeout = min(r.timeout, time.Until(deadline))
	}
	size := r.size()
	if m == mPing {
		size = 0
	}
	if p := conn.out.begin(size); p == nil {
		buf.Release() // the connection's end ends the request too
	} else {
		if size > 0 {
			r.encode(p[headerSize:])
		}
		conn.out.commit(p, &h, nil, buf, 0)
		conn.out.signal()
	}
	return conn.await(ctx, k)
}

// reserve takes a slot for a request, waiting for room until ctx ends.
func (c *Client) reserve(ctx context.Context, m method, l *link, cost int, dst []byte) (*conn, *call, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, nil, fmt.Errorf("reach %s: %w: %w", l.o.addr, atoll.ErrTimeout, err)
		}
		conn, err := l.current()
		if err != nil {
			return nil, nil, err
		}
		k, _, room, err := conn.register(m, cost, nil, dst)
		if err == nil {
			return conn, k, nil
		}
		if room == nil {
			return nil, nil, err
		}
		select {
		case <-room:
		case <-ctx.Done():
		}
	}
}

// at wraps an error with what was asked of whom.
func (c *Client) at(m method, seg atoll.SegmentID, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%v segment %v on node %v: %w", m, seg, c.node, err)
}

// simple is a request without payloads.
func (c *Client) simple(ctx context.Context, m method, r request) (response, error) {
	res, buf, err := c.call(ctx, m, c.link(r.seg), &r, nil, 0, nil)
	buf.Release()
	return res, c.at(m, r.seg, err)
}

// Create implements Node.
func (c *Client) Create(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error {
	r := request{seg: seg, epoch: epoch, block: blocks &^ Reserve}
	if blocks&Reserve != 0 {
		r.count = createReserve
	}
	_, err := c.simple(ctx, mCreate, r)
	return err
}

// Fence implements Node.
func (c *Client) Fence(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (Tail, error) {
	res, err := c.simple(ctx, mFence, request{seg: seg, epoch: epoch})
	if err != nil {
		return Tail{}, err
	}
	return res.tail, nil
}

// Extend implements Node. raw is at most atoll.MaxFrame bytes; it is copied.
func (c *Client) Extend(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error {
	return c.put(ctx, mExtend, request{seg: seg, epoch: epoch, block: at}, raw)
}

// Repair implements Node. p is at most atoll.MaxFrame bytes; it is copied.
func (c *Client) Repair(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, p []byte) error {
	return c.put(ctx, mRepair, request{seg: seg, block: block}, p)
}

// put is a request with a payload. The payload is copied, because the request
// may stay queued after the caller's context ended (L4).
func (c *Client) put(ctx context.Context, m method, r request, p []byte) error {
	if len(p) > maxPayload || len(p)%atoll.BlockSize != 0 || len(p) == 0 {
		return c.at(m, r.seg, fmt.Errorf("payload of %d bytes: %w", len(p), atoll.ErrTooLarge))
	}
	buf := host.Alloc(len(p))
	copy(buf.Bytes(), p)
	_, got, err := c.call(ctx, m, c.link(r.seg), &r, buf, 0, nil)
	got.Release()
	return c.at(m, r.seg, err)
}

// Seal implements Node.
func (c *Client) Seal(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error {
	_, err := c.simple(ctx, mSeal, request{seg: seg, epoch: epoch, block: length})
	return err
}

// Read implements Node. dst is filled straight from the connection; after an
// error its contents are undefined.
func (c *Client) Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	if len(dst)%atoll.BlockSize != 0 {
		return c.at(mRead, seg, fmt.Errorf("%d bytes are no whole blocks: %w", len(dst), atoll.ErrInvalid))
	}
	for len(dst) > 0 {
		p := dst[:min(len(dst), maxPayload)]
		r := request{seg: seg, block: block, count: len(p) / atoll.BlockSize}
		if _, _, err := c.call(ctx, mRead, c.link(seg), &r, nil, len(p), p); err != nil {
			return c.at(mRead, seg, err)
		}
		dst = dst[len(p):]
		block += atoll.BlockNo(r.count)
	}
	return nil
}

// Fetch implements Node. max above atoll.MaxFrame counts as that.
func (c *Client) Fetch(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	return c.get(ctx, mFetch, request{seg: seg, block: at, count: min(max, maxPayload)}, maxPayload)
}

// Index implements Node. An answer holds at most atoll.MaxFrame bytes.
func (c *Client) Index(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	n := min(max, maxPayload/atoll.BlockSize)
	return c.get(ctx, mIndex, request{seg: seg, block: at, count: n}, n*atoll.BlockSize)
}

// get is a request whose answer has a payload of up to room bytes.
func (c *Client) get(ctx context.Context, m method, r request, room int) (*host.Buffer, error) {
	if r.count < 0 {
		return nil, c.at(m, r.seg, atoll.ErrInvalid)
	}
	_, buf, err := c.call(ctx, m, c.link(r.seg), &r, nil, room, nil)
	if err != nil {
		return nil, c.at(m, r.seg, err)
	}
	if buf == nil {
		buf = host.Alloc(0)
	}
	return buf, nil
}

// Discard implements Node.
func (c *Client) Discard(ctx context.Context, seg atoll.SegmentID, runs []Run) error {
	for len(runs) > 0 {
		n := min(len(runs), maxRuns)
		if _, err := c.simple(ctx, mDiscard, request{seg: seg, count: n, runs: runs[:n]}); err != nil {
			return err
		}
		runs = runs[n:]
	}
	return nil
}

// Delete implements Node.
func (c *Client) Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error {
	_, err := c.simple(ctx, mDelete, request{seg: seg, epoch: epoch})
	return err
}

// List implements Node. It asks as often as needed to give max entries.
func (c *Client) List(ctx context.Context, after atoll.SegmentID, max int) ([]SegmentInfo, error) {
	var all []SegmentInfo
	for len(all) < max {
		n := min(max-len(all), maxEntries)
		r := request{seg: after, count: n}
		res, _, err := c.call(ctx, mList, c.links[0], &r, nil, n*infoSize, nil)
		if err != nil {
			return nil, fmt.Errorf("list segments on node %v: %w", c.node, err)
		}
		all = append(all, res.list...)
		if len(res.list) < n {
			break
		}
		after = all[len(all)-1].Seg
	}
	return all, nil
}

// Stat implements Node.
func (c *Client) Stat(ctx context.Context) (Stat, error) {
	res, _, err := c.call(ctx, mStat, c.links[0], &request{}, nil, 0, nil)
	if err != nil {
		return Stat{}, fmt.Errorf("stat of node %v: %w", c.node, err)
	}
	if res.stat.Node != c.node || res.stat.Incarnation != c.incarnation {
		return Stat{}, fmt.Errorf("stat of node %v: answer of node %v: %w", c.node, res.stat.Node, atoll.ErrIdentity)
	}
	return res.stat, nil
}

// Verify implements Node. It takes as long as the node needs, but at most
// atoll.RequestTimeout.
func (c *Client) Verify(ctx context.Context, seg atoll.SegmentID) (VerifyResult, error) {
	res, err := c.simple(ctx, mVerify, request{seg: seg})
	if err != nil {
		return VerifyResult{}, err
	}
	return res.verify, nil
}
