package stream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

// Read fills dst, whole blocks, from a segment at the given block, verified by
// the node. Any copy will do: one of this process first, then the one that is
// likely to answer soonest; a slow answer is overtaken by asking another copy as
// well, and a copy that fails is replaced by the next. A damaged copy is
// repaired in the background. Read fails only when no copy can give the bytes:
// ErrCorrupt when all that answered are damaged, ErrNotExist when none has the
// blocks, else ErrUnavailable.
func (n *Nodes) Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	return n.ReadSums(ctx, seg, block, dst, nil)
}

// ReadSums is Read, and sets sums, unless nil one for each block, to the CRC32C
// of each. It costs less than to compute them afterwards, as the node has to do
// so anyway.
func (n *Nodes) ReadSums(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte, sums []uint32) error {
	members, err := n.Members(seg)
	if err != nil {
		return err
	}
	var order [atoll.MaxCopies]*peer
	count := n.order(seg, members, &order)
	var first error
	skip := 0
	if count > 0 && order[0].local && !order[0].load.slow(n.epoch) {
		// The usual case: no goroutine, no timer, no copy, nothing allocated.
		if first = n.readFrom(ctx, order[0], seg, block, dst, sums); first == nil {
			return nil
		}
		skip = 1
	}
	if err := n.readAny(ctx, order[skip:count], seg, block, dst, first, len(members)-count); err != nil {
		return err
	}
	addSums(dst, sums)
	return nil
}

// addSums computes the checksums of blocks.
func addSums(p []byte, sums []uint32) {
	for i := range sums {
		sums[i] = segment.CRC(p[i*atoll.BlockSize:][:atoll.BlockSize])
	}
}

// order fills list with the reachable members of a segment: sound ones before
// suspected ones, local before remote, fast before slow. Of equals it takes the
// segment's favourite, so that each node needs to keep in memory what it knows
// of some segments only.
func (n *Nodes) order(seg atoll.SegmentID, members []atoll.NodeID, list *[atoll.MaxCopies]*peer) int {
	favourite := int(seg.Ordinal) % max(len(members), 1)
	var keys [atoll.MaxCopies]int64
	count := 0
	var now time.Time
	for i, id := range members {
		p, err := n.peer(id)
		if err != nil || count == len(list) {
			continue
		}
		key := p.load.cost()
		if i == favourite {
			key /= 2
		}
		if !p.local {
			key += int64(time.Millisecond)
		}
		if n.anySuspects() {
			if now.IsZero() {
				now = time.Now()
			}
			if suspect, _ := n.doubt(id, now, false); suspect {
				key += int64(time.Hour)
			}
		}
		at := count
		for ; at > 0 && keys[at-1] > key; at-- {
			keys[at], list[at] = keys[at-1], list[at-1]
		}
		keys[at], list[at] = key, p
		count++
	}
	return count
}

func (n *Nodes) anySuspects() bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return len(n.mu.suspects) > 0
}

// readFrom reads from one copy and has it repaired when it is damaged.
func (n *Nodes) readFrom(ctx context.Context, p *peer, seg atoll.SegmentID, block atoll.BlockNo, dst []byte, sums []uint32) error {
	began := p.load.begin(n.epoch)
	var err error
	if sums != nil && p.sums != nil {
		err = p.sums.ReadSums(ctx, seg, block, dst, sums)
	} else if err = p.node.Read(ctx, seg, block, dst); err == nil {
		addSums(dst, sums)
	}
	p.load.end(n.epoch, began, len(dst))
	if err != nil {
		if errors.Is(err, atoll.ErrCorrupt) {
			n.repairSoon(repairJob{p.id, seg, block, atoll.BlockNo(len(dst) / atoll.BlockSize)})
		}
		return fmt.Errorf("node %v: %w", p.id, err)
	}
	return nil
}

// answer is what one copy said to a watched read.
type answer struct {
	buf *host.Buffer // nil after an error
	err error
}

// readAny asks the copies in order, the next one when the last has failed or is
// late. Each reads into memory of its own, since a late one goes on writing
// after the read has returned; reads that lost are waited for by Close only.
func (n *Nodes) readAny(ctx context.Context, peers []*peer, seg atoll.SegmentID, block atoll.BlockNo, dst []byte, first error, unknown int) error {
	var tally readTally
	tally.unreachable = unknown
	if first != nil {
		tally.note(first)
	}
	answers := make(chan answer, atoll.MaxCopies)
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	asked, waiting := 0, 0
	ask := func() {
		p := peers[asked]
		asked++
		waiting++
		timer.Reset(p.load.hedge(len(dst)))
		n.wg.Go(func() { answers <- n.readOwn(ctx, p, seg, block, len(dst)) })
	}
	for {
		if waiting == 0 {
			if asked == len(peers) {
				return tally.err(seg, block)
			}
			ask()
		}
		select {
		case a := <-answers:
			waiting--
			if a.err == nil {
				copy(dst, a.buf.Bytes())
				a.buf.Release()
				if tally.last != nil && n.metrics != nil {
					n.metrics.failovers.Inc()
				}
				return nil
			}
			tally.note(a.err)
		case <-timer.C:
			if asked < len(peers) {
				ask()
				if n.metrics != nil {
					n.metrics.hedges.Inc()
				}
			}
		case <-ctx.Done():
			return fmt.Errorf("read segment %v block %d: %w: %w", seg, block, atoll.ErrTimeout, ctx.Err())
		}
	}
}

// readOwn reads into a buffer of its own.
func (n *Nodes) readOwn(ctx context.Context, p *peer, seg atoll.SegmentID, block atoll.BlockNo, size int) answer {
	buf := host.Alloc(size)
	if err := n.readFrom(ctx, p, seg, block, buf.Bytes(), nil); err != nil {
		buf.Release()
		return answer{err: err}
	}
	return answer{buf: buf}
}

// readTally sums up why copies did not give the bytes.
type readTally struct {
	corrupt, missing, unreachable int
	last                          error
}

func (t *readTally) note(err error) {
	t.last = err
	switch {
	case errors.Is(err, atoll.ErrCorrupt):
		t.corrupt++
	case errors.Is(err, atoll.ErrNotExist):
		t.missing++
	default:
		t.unreachable++
	}
}

func (t *readTally) err(seg atoll.SegmentID, block atoll.BlockNo) error {
	kind := atoll.ErrUnavailable
	if t.unreachable == 0 && t.corrupt > 0 {
		kind = atoll.ErrCorrupt
	} else if t.unreachable == 0 && t.missing > 0 {
		kind = atoll.ErrNotExist
	}
	return fmt.Errorf("read segment %v block %d: no copy of it (%d damaged, %d without it, %d silent), last: %v: %w",
		seg, block, t.corrupt, t.missing, t.unreachable, t.last, kind)
}

// Headers calls fn with every batch header of a segment from the batch at from
// up to block to, in order, each once, from any copy. The header is valid during
// the call only. An error of fn ends it and is returned as it is.
func (n *Nodes) Headers(ctx context.Context, seg atoll.SegmentID, from, to atoll.BlockNo, fn func(segment.Header) error) error {
	members, err := n.Members(seg)
	if err != nil {
		return err
	}
	var order [atoll.MaxCopies]*peer
	count := n.order(seg, members, &order)
	tally := readTally{unreachable: len(members) - count}
	for _, p := range order[:count] {
		var stop error
		from, stop, err = n.headersOf(ctx, p, seg, from, to, fn)
		if stop != nil {
			return stop
		}
		if err == nil {
			return nil
		}
		tally.note(err)
	}
	if from >= to {
		return nil
	}
	return tally.err(seg, from)
}

// headersOf does Headers on one copy as far as it goes; stop is an error of fn.
func (n *Nodes) headersOf(ctx context.Context, p *peer, seg atoll.SegmentID, from, to atoll.BlockNo, fn func(segment.Header) error) (at atoll.BlockNo, stop, err error) {
	const most = 256
	for at = from; at < to; {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		buf, err := p.node.Index(ctx, seg, at, most)
		cancel()
		if err != nil {
			return at, nil, fmt.Errorf("node %v: %w", p.id, err)
		}
		if len(buf.Bytes()) == 0 {
			buf.Release()
			return at, nil, fmt.Errorf("node %v: ends at block %d: %w", p.id, at, atoll.ErrNotExist)
		}
		at, stop, err = eachHeader(buf.Bytes(), seg, at, to, fn)
		buf.Release()
		if stop != nil || err != nil {
			return at, stop, err
		}
	}
	return at, nil, nil
}

func eachHeader(p []byte, seg atoll.SegmentID, at, to atoll.BlockNo, fn func(segment.Header) error) (next atoll.BlockNo, stop, err error) {
	for ; len(p) > 0 && at < to; p = p[atoll.BlockSize:] {
		h, err := segment.ParseHeader(p)
		if err != nil {
			return at, nil, err
		}
		if h.Segment() != seg || h.Offset() != at {
			return at, nil, fmt.Errorf("header of segment %v at %d instead of %v at %d: %w", h.Segment(), h.Offset(), seg, at, atoll.ErrCorrupt)
		}
		if err := fn(h); err != nil {
			return at, err, nil
		}
		at = h.Next()
	}
	return at, nil, nil
}
