package stream

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/wire"
)

// loopOwner is a process that owns the medium, or did.
type loopOwner struct {
	l     *loop
	id    int
	epoch atoll.Epoch
	dead  bool
	ready bool
	core  *writerCore
	vals  map[uint64]int // by position
	segs  map[segNo]*loopSeg
	armed time.Duration
}

// takeOver starts another owner. The one before goes on if it can.
func (l *loop) takeOver() {
	o := &loopOwner{l: l, id: len(l.owners), vals: map[uint64]int{}, segs: map[segNo]*loopSeg{}}
	l.owners = append(l.owners, o)
	l.after(l.travel(), fmt.Sprint("acquire ", o.id), func() {
		l.head.epoch++
		o.epoch = l.head.epoch
		o.recover()
	})
}

// recover recovers all unsealed segments, and again after a failure, as long as
// nobody else has come.
func (o *loopOwner) recover() {
	left := slices.Clone(o.l.head.unsealed)
	if len(left) == 0 {
		o.serve()
		return
	}
	done, failed := make([]loopSeg, len(left)), false
	wait := len(left)
	for i, u := range left {
		r := &loopRecovery{o: o, seg: u}
		r.core = recoverCore{seg: atoll.SegmentID{Medium: 1, Ordinal: u.ord}, nodes: u.nodes, bugs: o.l.bugs.Bugs}
		r.end = func(s loopSeg, err error) {
			done[i] = s
			failed = failed || err != nil
			if wait--; wait > 0 {
				return
			}
			if failed {
				o.l.after(100*time.Millisecond, "recover again", func() {
					if !o.dead && o.l.head.epoch == o.epoch {
						o.recover()
					}
				})
				return
			}
			o.l.change(o, "recovered", func() error {
				for _, s := range done {
					o.l.head.seal(s)
				}
				return nil
			}, func(err error) {
				if err == nil {
					o.serve()
				}
			})
		}
		r.start()
	}
}

// loopRecovery is the shell around one recoverCore.
type loopRecovery struct {
	o     *loopOwner
	seg   loopSeg
	core  recoverCore
	end   func(loopSeg, error)
	ended bool
}

func (r *loopRecovery) finish(s loopSeg, err error) {
	if !r.ended {
		r.ended = true
		r.end(s, err)
	}
}

func (r *loopRecovery) start() {
	for i := range r.core.nodes {
		r.fence(i)
	}
	r.o.l.after(atoll.FenceWait, "waited", func() {
		r.core.waited = true
		r.decide()
	})
}

func (r *loopRecovery) fence(i int) {
	l := r.o.l
	var tail wire.Tail
	l.ask(r.o, int(r.core.nodes[i])-1, fmt.Sprintf("fence %d e%d", r.seg.ord, r.o.epoch), -1, func(n *loopNode, done func(error)) {
		c := n.seg(r.seg.ord)
		if !l.bugs.NoFence {
			if err := c.fenceAt(r.o.epoch, l.bugs.ForgetFence); err != nil {
				done(err)
				return
			}
		}
		c.said = max(c.said, c.fence)
		tail = c.tail()
		done(nil)
	}, func(err error) {
		switch {
		case r.ended || r.core.decided:
		case errors.Is(err, atoll.ErrFenced):
			r.finish(r.seg, err)
		case err != nil:
			r.core.failed(i, err)
			l.after(50*time.Millisecond, "fence again", func() { r.fence(i) })
			r.decide()
		default:
			r.core.answered(i, tail)
			r.decide()
		}
	})
}

func (r *loopRecovery) decide() {
	if r.ended || r.core.decided || r.o.dead {
		return
	}
	ok, err := r.core.decide()
	switch {
	case err != nil:
		r.finish(r.seg, err)
	case ok && r.core.length == 0:
		r.finish(loopSeg{ord: r.seg.ord}, nil)
	case ok:
		r.complete()
	}
}

// complete brings the copies to the length and seals them.
func (r *loopRecovery) complete() {
	l, targets := r.o.l, r.core.targets()
	source := l.nodes[r.core.nodes[r.core.source]-1].seg(r.seg.ord)
	tail := slices.Clone(source.batches)
	wait := len(targets)
	for _, i := range targets {
		length := r.core.length
		if l.bugs.NoWriteBack {
			length = min(length, r.core.lengthOf(i))
		}
		l.ask(r.o, int(r.core.nodes[i])-1, fmt.Sprintf("seal %d e%d", r.seg.ord, r.o.epoch), -1, func(n *loopNode, done func(error)) {
			c := n.seg(r.seg.ord)
			if err := c.fenceAt(r.o.epoch, false); err != nil {
				done(err)
				return
			}
			if c.sealed {
				done(nil)
				return
			}
			if r.core.short(i) {
				c.made = true
				for _, b := range tail {
					if b.at == c.end() && b.end <= length {
						c.batches = append(c.batches, b)
					}
				}
			}
			c.cut(length)
			if c.end() != length {
				done(atoll.ErrGap)
				return
			}
			c.sealed, c.durable, c.grade = true, len(c.batches), wire.Clean
			done(nil)
		}, func(err error) {
			if err == nil {
				r.core.copies[i].state = copySealed
			} else {
				r.core.failed(i, err)
			}
			if wait--; wait == 0 {
				unverified, err := r.core.conclude()
				r.finish(loopSeg{ord: r.seg.ord, length: r.core.length, unverified: unverified}, err)
			}
		})
	}
}

// serve starts the writer and gives it entries.
func (o *loopOwner) serve() {
	o.ready = true
	o.core = newWriterCore(coreConfig{
		timeout: 10 * time.Second, soft: 50 * time.Millisecond, hard: 250 * time.Millisecond, silent: time.Second,
		idle: time.Second, retry: 10 * time.Millisecond, retryMax: time.Second, copies: loopCopies, pipe: 4, bugs: o.l.bugs.Bugs,
	})
	o.feed()
}

func (o *loopOwner) feed() {
	if o.dead || o.l.calm || o.core.stopped != nil {
		return
	}
	for range 1 + o.l.rng.IntN(3) {
		o.l.vals++
		o.vals[o.core.tail] = o.l.vals
		o.step(event{kind: evEntry, recs: 1, block: o.l.rng.IntN(4)})
	}
	o.l.after(time.Duration(100+o.l.rng.IntN(8000))*time.Microsecond, "feed", o.feed)
}

// step tells the core of an event and does what it says.
func (o *loopOwner) step(ev event) {
	if o.dead {
		return
	}
	ev.now, ev.valid = o.l.now, true
	for _, fx := range slices.Clone(o.core.step(ev)) {
		o.do(fx)
	}
	if at, ok := o.core.wake(); ok && (o.armed <= o.l.now || at < o.armed) {
		o.armed = at
		o.l.after(at-o.l.now, "tick", func() {
			if o.armed <= o.l.now {
				o.step(event{kind: evTick, whole: true})
			}
		})
	}
}

func (o *loopOwner) do(fx effect) {
	l := o.l
	switch fx.kind {
	case fxAck:
		for p := fx.first; p < fx.first+uint64(fx.n); p++ {
			l.acked[o.vals[p]] = int(o.epoch)
		}
	case fxRegister:
		perm := l.rng.Perm(loopNodes)[:loopCopies]
		s := &loopSeg{}
		for _, i := range perm {
			s.nodes = append(s.nodes, atoll.NodeID(i+1))
		}
		slices.Sort(s.nodes)
		o.segs[fx.seg] = s
		l.change(o, "register", func() error {
			l.head.next++
			s.ord = l.head.next
			l.head.unsealed = append(slices.Clone(l.head.unsealed), *s)
			return nil
		}, func(err error) {
			o.step(event{kind: evRegistered, seg: fx.seg, id: atoll.SegmentID{Medium: 1, Ordinal: s.ord}, nodes: s.nodes, size: loopSize, err: err})
		})
	case fxCreate:
		s := o.segs[fx.seg]
		l.ask(o, int(s.nodes[fx.copy])-1, fmt.Sprintf("create %d e%d", s.ord, o.epoch), -1, func(n *loopNode, done func(error)) {
			c := n.seg(s.ord)
			err := c.fenceAt(o.epoch, false)
			if err == nil {
				c.made = true
			}
			done(err)
		}, func(err error) { o.step(event{kind: evCreated, seg: fx.seg, copy: fx.copy, err: err}) })
	case fxSend:
		o.send(fx)
	case fxSealNodes:
		o.sealNodes(fx)
	case fxRecord, fxAbandon:
		s := *o.segs[fx.seg]
		s.length = fx.at
		for i, id := range s.nodes {
			if fx.mask&(1<<i) != 0 {
				s.unverified = append(s.unverified, id)
			}
		}
		if fx.kind == fxAbandon {
			s.length = 0
		}
		l.change(o, "record", func() error { return l.head.seal(s) }, func(err error) {
			o.step(event{kind: evRecorded, seg: fx.seg, err: err})
		})
	}
}

func (o *loopOwner) send(fx effect) {
	s := o.segs[fx.seg]
	b := loopBatch{at: fx.at, end: fx.at + 1, epoch: o.epoch}
	for p := fx.first; p < fx.first+uint64(fx.n); p++ {
		b.end += atoll.BlockNo(o.core.entry(p).blocks)
		b.vals = append(b.vals, o.vals[p])
	}
	for i, id := range s.nodes {
		o.l.ask(o, int(id)-1, fmt.Sprintf("append %d@%d e%d", s.ord, b.at, o.epoch), int(s.ord), func(n *loopNode, done func(error)) {
			o.l.append(n, s.ord, o.epoch, b, done)
		}, func(err error) { o.step(event{kind: evAnswer, batch: fx.batch, copy: i, err: err}) })
	}
}

func (o *loopOwner) sealNodes(fx effect) {
	s := o.segs[fx.seg]
	wait, mask := 0, uint8(0)
	for i := range s.nodes {
		if fx.mask&(1<<i) == 0 {
			wait++
		}
	}
	for i, id := range s.nodes {
		if fx.mask&(1<<i) != 0 {
			continue
		}
		o.l.ask(o, int(id)-1, fmt.Sprintf("seal %d e%d", s.ord, o.epoch), -1, func(n *loopNode, done func(error)) {
			c := n.seg(s.ord)
			err := c.fenceAt(o.epoch, false)
			if err == nil && !c.sealed {
				if c.end() < fx.at {
					err = atoll.ErrGap
				} else {
					c.cut(fx.at)
					c.sealed, c.durable = true, len(c.batches)
				}
			}
			done(err)
		}, func(err error) {
			if err != nil {
				mask |= 1 << i
			}
			if wait--; wait == 0 && fx.wait {
				o.step(event{kind: evNodesSealed, seg: fx.seg, mask: mask})
			}
		})
	}
}
