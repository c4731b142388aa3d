package stream

import (
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// tick looks for what is late.
func (c *writerCore) tick(ev event) {
	if !c.valid && c.head < c.tail {
		c.stop(fmt.Errorf("lease ran out: %w", atoll.ErrFenced))
		return
	}
	if c.awake-c.forgiven > time.Second {
		c.forgiven = c.awake
		for i := range c.strikes {
			c.strikes[i] /= 2
		}
	}
	if c.cur != nil && c.inflight > 0 {
		c.lateAppends()
	}
	if c.short() && ev.whole && c.now-c.cur.opened > shortRoll {
		c.rolling = c.cur // nodes are back: have all copies again
	}
	if c.next != nil && c.next.state == segCreating {
		c.lateCreates()
	}
}

// short reports whether the current segment has too few copies.
func (c *writerCore) short() bool { return c.cur != nil && len(c.cur.nodes) < c.cfg.copies }

// lateAppends counts overdue batches and gives up on copies that are too late.
// A copy counts as late only while another has answered the same batch: when
// all are slow it is not the copy's fault, and only the longer limit holds.
func (c *writerCore) lateAppends() {
	soft := min(max(10*c.latency.p99(), c.cfg.soft), c.cfg.hard)
	for no := c.firstNo; no < c.firstNo+uint64(c.inflight); no++ {
		b := c.batch(no)
		age := c.awake - b.sent
		missing := c.cur.all() &^ b.durable
		if missing == 0 || age < soft {
			continue
		}
		limit := c.cfg.silent
		if b.durable != 0 {
			limit = c.cfg.hard
		}
		late := uint8(0)
		for i, node := range c.cur.nodes {
			bit := uint8(1) << i
			if missing&bit == 0 {
				continue
			}
			if b.durable != 0 && b.overdue&bit == 0 {
				b.overdue |= bit
				c.strikes[i]++
				if c.strikes[i] == 1 && c.next != nil && slices.Contains(c.next.nodes, node) {
					c.abandonNext() // have another ready when the worst comes
				}
			}
			if age >= limit || c.strikes[i] > 3 {
				late |= bit
			}
		}
		if late != 0 {
			c.copiesLate(late, age)
			return
		}
	}
}

// copiesLate gives up the current segment because copies are too slow.
func (c *writerCore) copiesLate(late uint8, age time.Duration) {
	s := c.cur
	s.unsure |= late
	for ; late != 0; late &= late - 1 {
		node := s.nodes[bits.TrailingZeros8(late)]
		c.suspect(node, fmt.Errorf("append on node %v unanswered for %v: %w", node, age, atoll.ErrTimeout))
	}
	c.breakOff()
}

// lateCreates gives up a next segment that takes too long to make. While there
// is another to write to, nobody waits for it and it may take its time.
func (c *writerCore) lateCreates() {
	s := c.next
	age := c.awake - s.since
	limit := c.cfg.silent
	if s.created != 0 && c.cur == nil {
		limit = c.cfg.hard
	}
	if age < limit {
		return
	}
	c.backOff()
	for i, node := range s.nodes {
		if s.created&(1<<i) == 0 {
			c.suspect(node, fmt.Errorf("create on node %v unanswered for %v: %w", node, age, atoll.ErrTimeout))
		}
	}
}
