package stream

import (
	"github.com/atollstore/atoll/internal/wire"
)

// An append that waits for its outcome while nothing else is to be done would
// wake the writer's goroutine, that the nodes', these again the writer's, and
// that the appender. So, when appends have come one by one for a while, the
// appender takes the writer's turn and lets the core decide; when that sends a
// batch, and all its nodes are of this process and idle, it carries that out as
// well. It has no turn while disks work: timers go on, and others may submit.

// aloneRuns is how many batches must have been one lone entry.
const aloneRuns = 16

// staged is the batch that an appender carries out.
type staged struct {
	wanted bool // the next batch may be one
	flight *flight
	round  wire.Round
}

// noteAlone takes in whether a batch was one entry without company.
func (w *Writer) noteAlone(fx effect) {
	if fx.n > 1 || w.core.tail > fx.first+1 || len(w.submit) > 0 {
		w.alone.Store(0)
	} else if n := w.alone.Load(); n < aloneRuns {
		w.alone.Store(n + 1)
	}
}

// carry takes an admitted entry to its end, or as far as it goes, and reports
// whether it took it.
func (w *Writer) carry(e *Entry) bool {
	if w.alone.Load() < aloneRuns || !w.turn.TryLock() {
		return false
	}
	if len(w.submit) > 0 || !w.core.idle() {
		w.turn.Unlock()
		return false
	}
	w.staged.wanted = true
	w.apply(event{kind: evTick}, e)
	now := w.staged
	w.staged = staged{}
	w.leave()
	if now.round == nil {
		return true // it goes the usual way
	}
	now.round.Run()
	w.turn.Lock()
	w.land(now.flight)
	w.leave()
	return true
}

// leave ends the turn of an appender.
func (w *Writer) leave() {
	if w.core.stopped != nil {
		w.cancel() // the goroutine does what is to be done at the end
	} else {
		w.arm()
	}
	w.turn.Unlock()
}

// stage lets the appender carry out a flight, if it may and can.
func (w *Writer) stage(s *writerSeg, f *flight) bool {
	if !w.staged.wanted {
		return false
	}
	w.staged.wanted = false
	node, ok := s.nodes[0].(wire.Direct)
	if !ok {
		return false
	}
	w.staged.flight, w.staged.round = f, node.Direct(s.nodes, f.appends[:len(s.nodes)])
	return w.staged.round != nil
}

// land takes in the answers of a flight that was carried out.
func (w *Writer) land(f *flight) {
	if w.core.stopped != nil {
		return // it was given up, and ends with the writer
	}
	for i := range f.pending {
		w.burst = append(w.burst, &f.appends[i])
	}
	w.apply(event{kind: evTick}, nil)
}
