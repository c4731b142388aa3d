package heal

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/stream"
)

const (
	// setsAtOnce is how many copysets one pass of a node looks at, copiesAtOnce
	// how many segments it copies side by side.
	setsAtOnce   = 4
	copiesAtOnce = 4
	again        = time.Second // until the next pass when there was nothing to copy
	settleAgain  = 10 * time.Second
	settlesMost  = 4 // media settled in one pass
	settleTime   = 30 * time.Second
	tellAgain    = 20 * time.Second
)

// worker makes one node of this process a member of the copysets that it is to
// join.
type worker struct {
	h     *Healer
	id    atoll.NodeID
	node  Node
	pacer *pacer

	// Of its goroutine.
	seen     map[atoll.CopysetID]time.Time // since when a move is known here
	verified map[atoll.SegmentID]atoll.BlockNo
	places   map[atoll.CopysetID]atoll.NodeID // the old members whose places verified is about
	tried    map[atoll.MediumID]time.Time
	told     time.Time

	mu struct {
		sync.Mutex
		catalog.Healing
		at    time.Time // of the last rate
		bytes int64     // done then
	}
}

func newWorker(h *Healer, id atoll.NodeID, node Node) *worker {
	w := &worker{h: h, id: id, node: node, seen: map[atoll.CopysetID]time.Time{},
		verified: map[atoll.SegmentID]atoll.BlockNo{}, places: map[atoll.CopysetID]atoll.NodeID{}, tried: map[atoll.MediumID]time.Time{}}
	w.told = time.Now()
	w.pacer = newPacer(node.Requests, h.opts.Rate)
	w.mu.at = time.Now()
	return w
}

// run works until the node has no copyset to join any more.
func (w *worker) run(ctx context.Context) {
	for ctx.Err() == nil {
		changed := w.h.opts.Catalog.Changed()
		st := w.h.opts.Catalog.State()
		sets := incoming(st, w.id)
		if len(sets) == 0 || w.h.opts.Local()[w.id] != w.node {
			return
		}
		w.note(func(p *catalog.Healing) { p.Sets = len(sets) })
		if w.pass(ctx, st, w.ripe(sets)) {
			continue
		}
		t := time.NewTimer(again)
		select {
		case <-ctx.Done():
		case <-changed:
			pause(ctx, again/2) // nodes report all the time
		case <-t.C:
		}
		t.Stop()
	}
}

// ripe returns the first sets whose moves have been known for long enough (H6).
func (w *worker) ripe(sets []catalog.Copyset) []catalog.Copyset {
	var out []catalog.Copyset
	for _, set := range sets {
		if w.seen[set.ID].IsZero() {
			w.seen[set.ID] = time.Now()
		}
		if time.Since(w.seen[set.ID]) >= w.h.opts.Delay && len(out) < setsAtOnce {
			out = append(out, set)
		}
	}
	for id := range w.seen {
		if !slices.ContainsFunc(sets, func(s catalog.Copyset) bool { return s.ID == id }) {
			delete(w.seen, id)
		}
	}
	return out
}

// pass lists, copies and finishes some sets; true if it got on.
func (w *worker) pass(ctx context.Context, st *catalog.State, sets []catalog.Copyset) (progress bool) {
	if len(sets) == 0 {
		return false
	}
	of, ask := map[atoll.CopysetID]bool{}, []atoll.NodeID{w.id}
	for _, set := range sets {
		w.place(set)
		of[set.ID] = true
		for _, id := range set.Nodes {
			if lives(st, id) && !slices.Contains(ask, id) {
				ask = append(ask, id)
			}
		}
	}
	lists := w.h.list(ctx, ask, of)
	verdicts := make([]verdict, len(sets))
	var jobs []job
	var waiting []atoll.SegmentID
	known := lookup{}
	for i, set := range sets {
		v := judge(set, w.id, lists, w.verified, func(id atoll.NodeID) bool { return lives(st, id) })
		v.waiting = slices.DeleteFunc(v.waiting, func(s atoll.SegmentID) bool { return w.ignore(ctx, known, s) })
		verdicts[i] = v
		jobs = append(jobs, v.jobs...)
		waiting = append(waiting, v.waiting...)
	}
	w.expect(jobs, len(waiting))
	w.tell(ctx, sets, verdicts)
	failed := w.copyAll(ctx, jobs)
	for i, set := range sets {
		v := &verdicts[i]
		v.jobs = slices.DeleteFunc(v.jobs, func(j job) bool { return !failed[j.seg] })
		progress = w.finish(ctx, set, v) || progress
	}
	if len(jobs) > len(failed) {
		progress = true
	}
	w.settle(ctx, waiting)
	return progress
}

// place forgets what was verified for another member's place in the set: of a coded
// segment that is another shard.
func (w *worker) place(set catalog.Copyset) {
	m, _ := set.Incoming(w.id)
	if old, is := w.places[set.ID]; !is || old != m.Old {
		w.forget(set.ID)
		w.places[set.ID] = m.Old
	}
}

func (w *worker) forget(set atoll.CopysetID) {
	for seg := range w.verified {
		if seg.Copyset == set {
			delete(w.verified, seg)
		}
	}
	delete(w.places, set)
}

// tell says now and then what holds moves up.
func (w *worker) tell(ctx context.Context, sets []catalog.Copyset, verdicts []verdict) {
	if time.Since(w.told) < tellAgain {
		return
	}
	for i, v := range verdicts {
		if len(v.waiting)+len(v.silent) == 0 || len(v.jobs) > 0 {
			continue
		}
		first := "none"
		if len(v.waiting) > 0 {
			first = v.waiting[0].String()
		}
		w.told = time.Now()
		w.h.log.InfoContext(ctx, "replacement waits", "copyset", sets[i].ID, "node", w.id, "unsettled", len(v.waiting), "first", first, "silent", v.silent)
	}
}

func (w *worker) failed(ctx context.Context, what string, set atoll.CopysetID, err error) {
	if ctx.Err() == nil && !errors.Is(err, atoll.ErrConflict) && !errors.Is(err, atoll.ErrNotExist) {
		w.h.log.WarnContext(ctx, what, "copyset", set, "node", w.id, "err", err)
	}
}

// lookup is what the catalog says of the media whose segments hold moves up.
type lookup map[atoll.MediumID]*catalog.Head // nil: it is being deleted, or gone

// ignore reports whether nobody will read a segment or complete its copies, by a
// positive record: its medium is being deleted, or gone, or its owner has
// dropped it.
func (w *worker) ignore(ctx context.Context, known lookup, seg atoll.SegmentID) bool {
	h, asked := known[seg.Medium]
	if !asked {
		h = &catalog.Head{}
		m, err := w.h.opts.Catalog.Medium(ctx, seg.Medium)
		if errors.Is(err, atoll.ErrNotExist) || err == nil && m.State == catalog.MediumDeleting {
			h = nil
		} else if now, err := w.h.opts.Catalog.Head(ctx, seg.Medium); err == nil {
			h = &now
		}
		known[seg.Medium] = h
	}
	return h == nil || slices.Contains(h.Dropped, seg)
}

// copyAll makes copies, some side by side. It returns those that are not whole.
func (w *worker) copyAll(ctx context.Context, jobs []job) map[atoll.SegmentID]bool {
	failed := map[atoll.SegmentID]bool{}
	var mu sync.Mutex
	var all sync.WaitGroup
	places := make(chan struct{}, copiesAtOnce)
	for i, j := range jobs {
		places <- struct{}{}
		if _, is := w.h.opts.Catalog.State().Copysets[j.seg.Copyset].Incoming(w.id); !is || ctx.Err() != nil {
			mu.Lock()
			failed[j.seg] = true
			mu.Unlock()
			<-places
			continue
		}
		all.Go(func() {
			defer func() { <-places }()
			err := w.copy(ctx, i, j)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed[j.seg] = true
				if ctx.Err() == nil {
					w.note(func(p *catalog.Healing) { p.Err = err.Error() })
					w.h.log.WarnContext(ctx, "copy not made; will be tried again", "seg", j.seg, "node", w.id, "err", err)
				}
				return
			}
			w.verified[j.seg] = j.length
		})
	}
	all.Wait()
	return failed
}

// copy makes one copy, from each source in turn until one gives all of it; the
// first source changes from copy to copy.
func (w *worker) copy(ctx context.Context, turn int, j job) error {
	at := turn % len(j.from)
	from := append(slices.Clone(j.from[at:]), j.from[:at]...)
	ctx = stream.WithPacer(ctx, w.pacer)
	start := time.Now()
	sealed := catalog.Sealed{Seg: j.seg, Length: j.length}
	err := w.h.opts.Nodes.Replicate(ctx, sealed, j.epoch, from, w.id)
	if errors.Is(err, atoll.ErrExist) {
		// The member that has this shard's place was read back when it got it.
		if err = w.node.Evict(ctx, j.seg); err == nil {
			err = w.h.opts.Nodes.Replicate(ctx, sealed, j.epoch, from, w.id)
		}
	}
	if err != nil {
		w.h.opts.Metrics.copied(0, time.Since(start))
		return err
	}
	w.h.opts.Metrics.copied(j.length.Bytes(), time.Since(start))
	w.note(func(p *catalog.Healing) {
		p.Copies, p.Bytes, p.Done, p.Err = p.Copies-1, p.Bytes-j.length.Bytes(), p.Done+j.length.Bytes(), ""
	})
	return nil
}

// finish makes the node a member when it holds everything (H2). The set is as it
// was before the listing began; any change of it since makes this void.
func (w *worker) finish(ctx context.Context, set catalog.Copyset, v *verdict) bool {
	m, is := set.Incoming(w.id)
	if !is || !m.Settled || !v.done() || ctx.Err() != nil {
		return false
	}
	next, err := w.h.opts.Catalog.FinishMove(ctx, set, w.id)
	if err != nil {
		w.failed(ctx, "replacement not finished", set.ID, err)
		return false
	}
	w.forget(set.ID)
	w.h.log.InfoContext(ctx, "member replaced", "copyset", set.ID, "old", m.Old, "node", w.id, "why", m.Why, "ver", next.Version)
	return true
}

// settle sees to media that hold moves up and have no owner.
func (w *worker) settle(ctx context.Context, waiting []atoll.SegmentID) {
	if w.h.opts.Media == nil {
		return
	}
	done := 0
	for _, seg := range waiting {
		if time.Since(w.tried[seg.Medium]) < settleAgain || done == settlesMost || ctx.Err() != nil {
			continue
		}
		w.tried[seg.Medium] = time.Now()
		done++
		settling, cancel := context.WithTimeout(ctx, settleTime)
		if err := w.h.opts.Media.Settle(settling, seg.Medium); err != nil && !errors.Is(err, atoll.ErrBusy) {
			w.failed(ctx, "medium not settled; its copyset waits for it", seg.Copyset, err)
		}
		cancel()
	}
	if len(waiting) == 0 {
		clear(w.tried)
	}
}

func (w *worker) note(fn func(*catalog.Healing)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fn(&w.mu.Healing)
}

// expect notes what a pass is to copy.
func (w *worker) expect(jobs []job, waiting int) {
	w.note(func(p *catalog.Healing) {
		p.Copies, p.Bytes, p.Waiting = len(jobs), 0, waiting
		for _, j := range jobs {
			p.Bytes += j.length.Bytes()
		}
	})
}

// progress returns how far the node is, with the rate since the last call.
func (w *worker) progress() *catalog.Healing {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d := time.Since(w.mu.at); d >= time.Second {
		w.mu.Rate = int64(float64(w.mu.Done-w.mu.bytes) / d.Seconds())
		w.mu.at, w.mu.bytes = time.Now(), w.mu.Done
	}
	p := w.mu.Healing
	return &p
}
