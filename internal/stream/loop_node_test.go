package stream

import (
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/wire"
)

// loopBatch is a batch as a node has it.
type loopBatch struct {
	at, end atoll.BlockNo
	epoch   atoll.Epoch
	vals    []int
}

// loopCopy is a segment on a node.
type loopCopy struct {
	made    bool
	batches []loopBatch
	durable int // batches on stable storage
	fence   atoll.Epoch
	kept    atoll.Epoch // fence on stable storage
	said    atoll.Epoch // highest fence that was ever answered
	sealed  bool
	grade   wire.Grade
	rotten  bool // damaged while it lay there; for scrub to find
}

func (c *loopCopy) end() atoll.BlockNo {
	if len(c.batches) == 0 {
		return 0
	}
	return c.batches[len(c.batches)-1].end
}

// cut drops what lies beyond a length.
func (c *loopCopy) cut(length atoll.BlockNo) {
	for len(c.batches) > 0 && c.batches[len(c.batches)-1].end > length {
		c.batches = c.batches[:len(c.batches)-1]
	}
	c.durable = min(c.durable, len(c.batches))
}

// loopNode is a storage node.
type loopNode struct {
	up   bool
	gen  int
	segs map[atoll.Ordinal]*loopCopy
	ids  []atoll.Ordinal // of segs, as they came
}

func (n *loopNode) seg(o atoll.Ordinal) *loopCopy {
	c := n.segs[o]
	if c == nil {
		c = &loopCopy{grade: wire.Clean}
		n.segs[o] = c
		n.ids = append(n.ids, o)
	}
	return c
}

// crash takes the power of a node for a while. Node 0 may come back with a
// damaged end of a segment.
func (l *loop) crash(i int, down time.Duration) {
	n := l.nodes[i]
	if !n.up {
		return
	}
	n.up = false
	n.gen++
	for _, o := range n.ids {
		c := n.segs[o]
		c.batches = c.batches[:min(len(c.batches), c.durable+l.rng.IntN(len(c.batches)-c.durable+1))]
		c.durable = len(c.batches)
		if l.bugs.ForgetFence {
			c.fence = c.kept
		}
		if !c.sealed && c.grade > wire.Intact {
			c.grade = wire.Intact
		}
		if i == 0 && !c.sealed && len(c.batches) > 1 && l.rng.IntN(4) == 0 {
			c.batches, c.grade, c.rotten = c.batches[:len(c.batches)-1], wire.Torn, true
			c.durable = len(c.batches)
		}
	}
	l.after(down, fmt.Sprint("up ", i), func() { n.up = true })
}

// ask sends a request to a node and calls back with the error. A request that is
// lost, or whose node crashes meanwhile, ends with ErrUnreachable some day.
func (l *loop) ask(o *loopOwner, i int, tag string, order int, work func(*loopNode, func(error)), back func(error)) {
	if o.dead {
		return
	}
	d := l.travel()
	if order >= 0 { // appends keep their order
		key := [2]int{o.id<<8 | i, order}
		d = max(d, l.last[key]-l.now+1)
		l.last[key] = l.now + d
	}
	answer := func(err error) {
		l.after(l.travel(), "re "+tag, func() {
			if !o.dead {
				back(err)
			}
		})
	}
	l.after(d, tag, func() {
		n := l.nodes[i]
		if !n.up || !l.calm && l.rng.IntN(60) == 0 {
			answer(atoll.ErrUnreachable)
			return
		}
		gen := n.gen
		work(n, func(err error) {
			if n.gen != gen {
				err = atoll.ErrUnreachable
			}
			answer(err)
		})
	})
}

// append is what a node does with a batch.
func (l *loop) append(n *loopNode, ord atoll.Ordinal, epoch atoll.Epoch, b loopBatch, done func(error)) {
	c := n.seg(ord)
	switch {
	case epoch < c.fence:
		done(atoll.ErrFenced)
		return
	case !c.made:
		done(atoll.ErrNotExist)
		return
	case b.at < c.end():
	case c.sealed:
		done(atoll.ErrSealed)
		return
	case b.at > c.end():
		done(atoll.ErrGap)
		return
	default:
		c.batches = append(c.batches, b)
		if epoch < c.said {
			l.fail("segment %d: append under epoch %v taken after a fence at epoch %v was answered", ord, epoch, c.said)
		}
	}
	want, gen := len(c.batches), n.gen
	if l.bugs.AckBeforeSync {
		done(nil)
	}
	l.after(time.Duration(50+l.rng.IntN(3000))*time.Microsecond, "sync", func() {
		if n.gen != gen {
			if !l.bugs.AckBeforeSync {
				done(atoll.ErrUnreachable)
			}
			return
		}
		c.durable = max(c.durable, min(want, len(c.batches)))
		if !l.bugs.AckBeforeSync {
			done(nil)
		}
	})
}

// fenceAt is what a node does with a fence; seal and create raise it too.
func (c *loopCopy) fenceAt(epoch atoll.Epoch, forget bool) error {
	if epoch < c.fence {
		return atoll.ErrFenced
	}
	c.fence = epoch
	if !forget {
		c.kept = epoch
	}
	return nil
}

func (c *loopCopy) tail() wire.Tail {
	t := wire.Tail{Grade: c.grade, Length: c.end(), Sealed: c.sealed, Epoch: c.fence}
	if !c.made {
		t.Grade = wire.Absent
	}
	if n := len(c.batches); n > 0 {
		for _, v := range c.batches[n-1].vals {
			t.Sum = t.Sum*31 + uint32(v)
		}
	}
	return t
}

// loopHead is the medium's head in the catalog.
type loopHead struct {
	epoch    atoll.Epoch
	next     atoll.Ordinal
	unsealed []loopSeg
	sealed   []loopSeg
}

type loopSeg struct {
	ord        atoll.Ordinal
	nodes      []atoll.NodeID // from 1
	length     atoll.BlockNo
	unverified []atoll.NodeID
}

// change does a transaction under an epoch, some time from now.
func (l *loop) change(o *loopOwner, tag string, step func() error, back func(error)) {
	if o.dead {
		return
	}
	l.after(l.travel(), tag, func() {
		err := error(atoll.ErrFenced)
		if l.head.epoch == o.epoch {
			err = step()
		}
		l.after(l.travel(), "re "+tag, func() {
			if !o.dead {
				back(err)
			}
		})
	})
}

// seal moves a segment to the sealed ones, or drops it if it is empty.
func (h *loopHead) seal(s loopSeg) error {
	i := slices.IndexFunc(h.unsealed, func(u loopSeg) bool { return u.ord == s.ord })
	if i < 0 {
		return nil
	}
	s.nodes = h.unsealed[i].nodes
	h.unsealed = slices.Delete(slices.Clone(h.unsealed), i, i+1)
	if s.length > 0 {
		h.sealed = append(h.sealed, s)
	}
	return nil
}
