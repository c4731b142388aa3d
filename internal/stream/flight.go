package stream

import (
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// flight is a batch on its way. It is reused when all copies have answered,
// which for a stuck one may be long after the batch stopped to count.
type flight struct {
	slot    int
	batch   uint64
	vec     *host.Vec
	pending int           // copies that have not answered
	queued  time.Duration // of its oldest entry
	sent    time.Duration
	appends [atoll.MaxCopies]wire.Append
}

// flight returns an unused flight.
func (w *Writer) flight() *flight {
	if n := len(w.idle); n > 0 {
		f := w.idle[n-1]
		w.idle = w.idle[:n-1]
		return f
	}
	f := &flight{slot: len(w.flights)}
	w.flights = append(w.flights, f)
	atoll.Assert(len(w.flights)*atoll.MaxCopies <= cap(w.answers), "%d batches on their way", len(w.flights))
	return f
}

// send builds a batch and starts it on all copies. The payload is shared, not
// copied; each copy takes its own reference.
func (w *Writer) send(fx effect) {
	s := w.seg(fx.seg)
	f := w.flight()
	f.batch, f.sent = fx.batch, w.now()
	f.vec = w.encode(s, fx)
	f.queued = w.ring[fx.first%maxEntries].queued
	f.pending = len(s.nodes)
	if m := w.opts.Metrics; m != nil {
		observe(m.queue, f.sent-f.queued)
	}
	for i := range s.nodes {
		f.appends[i] = wire.Append{
			Seg: s.id, Epoch: w.opts.Epoch, Offset: fx.at, Vec: f.vec, Done: w.answers,
			User: uint64(f.slot)<<8 | uint64(i), Node: s.ids[i],
		}
	}
	if w.stage(s, f) {
		return
	}
	for i, node := range s.nodes {
		node.Append(&f.appends[i])
	}
}

// encode puts the entries of a batch behind a header and notes where they go.
func (w *Writer) encode(s *writerSeg, fx effect) *host.Vec {
	w.recs, w.crcs = w.recs[:0], w.crcs[:0]
	vec := host.NewVec()
	buf := host.Alloc(atoll.BlockSize)
	vec.Add(buf, buf.Bytes())
	at := fx.at + 1
	for p := fx.first; p < fx.first+uint64(fx.n); p++ {
		e := w.ring[p%maxEntries]
		e.seg, e.header, e.first = s.id, fx.at, at
		at += atoll.BlockNo(e.blocks)
		w.recs = append(w.recs, e.recs...)
		w.crcs = append(w.crcs, e.crcs...)
		for _, part := range e.parts {
			vec.Add(part.buf, part.data)
		}
	}
	w.header = segment.Head{
		Segment: s.id, Offset: fx.at, Prev: s.sum, Epoch: w.opts.Epoch,
		Seq: w.ring[fx.first%maxEntries].seq, Acked: fx.acked, Clock: time.Now(),
	}
	s.sum = segment.EncodeHeader(buf.Bytes(), &w.header, w.recs, w.crcs)
	buf.Release()
	return vec
}

// answer tells the core what a copy said, and reuses the flight after the last.
func (w *Writer) answer(a *wire.Append, ev event) {
	f, copy := w.flights[a.User>>8], int(a.User&0xff)
	if m := w.opts.Metrics; m != nil && a.Err == nil {
		observe(m.node, a.Queued)
		observe(m.commit, a.Commit)
		observe(m.wire, max(ev.now-f.sent-a.Queued-a.Commit, 0))
	}
	w.core.apply(event{kind: evAnswer, now: ev.now, valid: ev.valid, batch: f.batch, copy: copy, err: a.Err})
	f.pending--
	a.Vec = nil
	if f.pending == 0 {
		f.vec.Release()
		f.vec = nil
		w.idle = append(w.idle, f)
	}
}

// ack hands the entries of a batch back, all in one pass.
func (w *Writer) ack(fx effect) {
	w.advance(fx)
	w.noteAlone(fx)
	blocks := 0
	oldest := w.ring[fx.first%maxEntries].queued
	for p := fx.first; p < fx.first+uint64(fx.n); p++ {
		e := w.entryAt(p)
		blocks += e.blocks
		w.finish(e, nil)
	}
	if m := w.opts.Metrics; m != nil {
		m.batches.Inc()
		m.entries.Add(float64(fx.n))
		m.bytes.Add(float64(blocks * atoll.BlockSize))
		observe(m.total, w.now()-oldest)
	}
}

// Tail is a place in the log up to which everything is on stable storage.
type Tail struct {
	Ordinal atoll.Ordinal
	Block   atoll.BlockNo // just past the last batch
	Seq     uint64        // of the next record
}

// Tail returns the end of what was acknowledged, false if nothing was yet. An
// entry whose Wait has returned nil lies before it.
func (w *Writer) Tail() (Tail, bool) {
	w.done.Lock()
	defer w.done.Unlock()
	return w.done.tail, w.done.tail.Ordinal != 0
}

// advance moves the tail behind a batch, before anybody hears of that.
func (w *Writer) advance(fx effect) {
	last := w.ring[(fx.first+uint64(fx.n)-1)%maxEntries]
	end := last.first + atoll.BlockNo(last.blocks) // entries follow one another
	w.done.Lock()
	w.done.tail = Tail{last.seg.Ordinal, end, last.seq + uint64(len(last.recs))}
	w.done.Unlock()
}
