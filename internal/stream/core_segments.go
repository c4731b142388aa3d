package stream

import (
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// copyFailed gives up the current segment because of one of its copies.
func (c *writerCore) copyFailed(copy int, err error) {
	if isFenced(err) {
		c.stop(err)
		return
	}
	c.cur.unsure |= 1 << copy
	c.suspect(c.cur.nodes[copy], err)
	c.breakOff()
}

// suspect reports a node and gives up a next segment on it.
func (c *writerCore) suspect(node atoll.NodeID, err error) {
	c.failures++
	c.failed = append(c.failed, failure{node, c.failures})
	if len(c.failed) > 2*atoll.MaxCopies {
		c.failed = slices.Delete(c.failed, 0, 1)
	}
	c.emit(effect{kind: fxSuspect, node: node, err: err})
	if c.next != nil && slices.Contains(c.next.nodes, node) {
		c.abandonNext()
	}
}

// abandonNext gives up the next segment, which holds nothing.
func (c *writerCore) abandonNext() {
	s := c.next
	c.next = nil
	if s.state != segRegistering {
		c.abandon(s)
	}
}

// abandon has an unused segment taken out of the catalog.
func (c *writerCore) abandon(s *coreSeg) {
	s.state = segRecording
	c.sealing = append(c.sealing, s)
	c.emit(effect{kind: fxAbandon, seg: s.no, id: s.id})
}

// breakOff seals the current segment at the last batch that all copies have,
// and takes back what was not acknowledged (W2).
func (c *writerCore) breakOff() {
	s := c.cur
	c.cur, c.rolling = nil, nil
	c.strikes = [atoll.MaxCopies]int{}
	c.firstNo += uint64(c.inflight)
	c.inflight = 0
	c.sent = c.head
	c.recount()
	s.holds = true
	c.holds++
	if s.acked == 0 {
		c.abandon(s)
		return
	}
	s.state = segRecording
	c.sealing = append(c.sealing, s)
	c.emit(effect{kind: fxRecord, seg: s.no, id: s.id, at: s.acked, mask: s.unsure})
}

// recount adds up what waits.
func (c *writerCore) recount() {
	c.waitBlocks, c.waitRecs = 0, 0
	for p := c.sent; p < c.tail; p++ {
		c.waitBlocks += c.entry(p).blocks
		c.waitRecs += c.entry(p).recs
	}
}

// finishCur seals the current segment, all of which is acknowledged.
func (c *writerCore) finishCur() {
	s := c.cur
	atoll.Assert(c.inflight == 0 && s.acked == s.end, "seal of segment %v at %d of %d", s.id, s.acked, s.end)
	c.cur = nil
	c.strikes = [atoll.MaxCopies]int{}
	if s.acked == 0 {
		c.abandon(s)
		return
	}
	s.state = segSealing
	c.sealing = append(c.sealing, s)
	c.emit(effect{kind: fxSealNodes, seg: s.no, at: s.acked, wait: true})
}

func (c *writerCore) sealingSeg(no segNo) *coreSeg {
	for _, s := range c.sealing {
		if s.no == no {
			return s
		}
	}
	return nil
}

// nodesSealed has the seal recorded; copies that did not seal are unverified.
func (c *writerCore) nodesSealed(ev event) {
	s := c.sealingSeg(ev.seg)
	if s == nil || s.state != segSealing {
		return
	}
	s.state = segRecording
	s.unsure |= ev.mask
	c.emit(effect{kind: fxRecord, seg: s.no, id: s.id, at: s.acked, mask: s.unsure})
}

// recorded is done with a segment.
func (c *writerCore) recorded(ev event) {
	s := c.sealingSeg(ev.seg)
	if s == nil {
		return
	}
	if ev.err != nil {
		c.stop(ev.err)
		return
	}
	c.sealing = slices.DeleteFunc(c.sealing, func(t *coreSeg) bool { return t == s })
	if s.holds {
		c.holds--
		if s.acked > 0 {
			c.emit(effect{kind: fxSealNodes, seg: s.no, at: s.acked, mask: s.unsure})
		}
		c.commit()
	}
}

// registered begins to create the next segment on its nodes.
func (c *writerCore) registered(ev event) {
	s := c.next
	if s == nil || s.no != ev.seg {
		if ev.err == nil { // given up meanwhile
			c.abandon(&coreSeg{no: ev.seg, id: ev.id, nodes: ev.nodes})
		}
		return
	}
	if ev.err != nil {
		c.next = nil
		if isFenced(ev.err) {
			c.stop(ev.err)
			return
		}
		c.noSegment(ev.err)
		return
	}
	s.id, s.nodes, s.size = ev.id, ev.nodes, ev.size
	for _, f := range c.failed {
		if f.at > s.failures && slices.Contains(s.nodes, f.node) {
			c.abandonNext() // chosen before the node failed
			return
		}
	}
	s.state, s.since = segCreating, c.awake
	for i := range s.nodes {
		c.emit(effect{kind: fxCreate, seg: s.no, id: s.id, copy: i})
	}
}

// noSegment puts off the next try; without room the waiting entries fail now.
func (c *writerCore) noSegment(err error) {
	c.lastErr = err
	if c.cur == nil && isNoSpace(err) {
		c.failAll(err)
	}
	c.backOff()
}

// backOff sets the time of the next try: the first repeat is at once, as a
// single failed node is the usual cause.
func (c *writerCore) backOff() {
	pause := time.Duration(0)
	if c.tries > 0 || c.lastErr != nil {
		pause = min(c.cfg.retry<<min(c.tries, 10), c.cfg.retryMax)
	}
	c.tries++
	c.retryAt = c.now + pause
}

// created notes that a copy of the next segment exists, or that it cannot.
func (c *writerCore) created(ev event) {
	s := c.next
	if s == nil || s.no != ev.seg || s.state != segCreating {
		return
	}
	if ev.err == nil {
		s.created |= 1 << ev.copy
		if s.created == s.all() {
			s.state, s.since = segReady, c.awake
			c.tries, c.lastErr = 0, nil
		}
		return
	}
	c.createFailed(ev.copy, ev.err)
}

func (c *writerCore) createFailed(copy int, err error) {
	if isFenced(err) {
		c.stop(err)
		return
	}
	c.backOff()
	if isExist(err) { // a leftover under this name: not the node's fault
		c.abandonNext()
		return
	}
	c.suspect(c.next.nodes[copy], err)
}

// wantSegment takes the next segment into use or asks for one.
func (c *writerCore) wantSegment() {
	waiting := c.sent < c.tail
	if c.cur == nil && c.next != nil && c.next.state == segReady && waiting {
		c.cur, c.next = c.next, nil
		c.lastUse, c.cur.opened = c.now, c.now
	}
	if c.next != nil || c.now < c.retryAt || c.closing && !waiting {
		return
	}
	if c.cur == nil && !waiting || c.cur != nil && c.cur.end < c.cur.size/4 {
		return
	}
	if len(c.sealing) >= maxSegments {
		return
	}
	c.segs++
	c.next = &coreSeg{no: c.segs, state: segRegistering, failures: c.failures}
	c.emit(effect{kind: fxRegister, seg: c.segs})
}

// turnOver seals the current segment when it is full, unused or asked to be,
// and everything in it is acknowledged (W3). It reports whether it did.
func (c *writerCore) turnOver() bool {
	s := c.cur
	if s == nil || c.inflight > 0 {
		return false
	}
	idle := c.cfg.idle > 0 && c.head == c.tail && c.now-c.lastUse >= c.cfg.idle
	if (c.rolling == nil || c.rolling != s) && !idle && !(c.closing && c.head == c.tail) {
		return false
	}
	c.rolling = nil
	c.finishCur()
	return true
}

// finishRequests ends a request to roll or close when nothing is left to do,
// and lets an unused next segment go.
func (c *writerCore) finishRequests() {
	if c.stopped != nil {
		return
	}
	idle := c.cfg.idle > 0 && c.now-c.lastUse >= c.cfg.idle
	if c.next != nil && c.cur == nil && c.head == c.tail && (c.closing || idle) {
		if c.next.state == segRegistering {
			return // its name is not known yet
		}
		c.abandonNext()
	}
	if len(c.sealing) > 0 || c.rolling != nil {
		return
	}
	if c.rolled {
		c.rolled = false
		c.emit(effect{kind: fxRolled})
	}
	if c.closing && c.cur == nil && c.next == nil && c.head == c.tail {
		c.stop(fmt.Errorf("writer closed: %w", atoll.ErrClosed))
	}
}
