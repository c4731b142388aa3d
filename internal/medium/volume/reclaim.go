package volume

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

// Reclaim waits as long as it can, since the longer a segment lies the more of it
// dies by itself, and then goes on without rest until there is enough again. What
// is enough, the stock, is a few segments for what is on its way and a part of
// the disk. Everything follows from how much of the stock is there:
//
//	above 1.05  segments of which half is dead are compacted now and then
//	below 1.05  the best segment is compacted, whatever it is, one after the other;
//	            checkpoints come sooner, since what was overwritten counts as dead
//	            only after one
//	below 1     writers are slowed: at three quarters of the stock to the speed at
//	            which reclaim frees space, above that to more, below it to less
const (
	stockSegments = 8
	stockShare    = 50 // 1/50 of the disk
	stockMost     = 6  // and in all no more than 1/6 of it
	stockClean    = 1.05
	stockPace     = 1
	stockHeld     = 0.75

	// easyDead is the part of a segment that must be dead to be compacted while
	// there is room, for which a fifth of the time is taken at most, and half of
	// it from hardUsed on.
	easyDead  = 0.5
	easyShare = 4
	hardUsed  = 0.75
	easyRest  = 10 * time.Second
	// lateShare is the part of the stock that may be on its way back, and lateRest
	// how long to wait for it.
	lateShare = 2
	lateRest  = 5 * time.Millisecond
	// hardRest is when to look again for something to compact.
	hardRest = 100 * time.Millisecond
	// leastDead and mostDead are the part of a segment that must be dead when
	// there is nothing left of the stock, and when all of it is there.
	leastDead = 0.1
	mostDead  = 0.2

	// urgentBytes of log start a checkpoint when space is getting short, or a
	// 1/urgentShare of the disk, and shortBytes when an append found none.
	urgentBytes = 64 << 20
	urgentShare = 16
	shortBytes  = 256 << 10
	// gaugeBytes of log, or gaugeTime, are a reason to look how much space there is.
	gaugeBytes = 1 << 20
	gaugeTime  = 20 * time.Millisecond
)

// reclaimer is the state of reaping and compaction.
type reclaimer struct {
	reap  chan struct{} // something for the reaper
	kick  chan struct{} // something for the compactor
	delay paceDelay
	// urgent: space is short, so that checkpoints are written after that many
	// bytes of log; 0 if not.
	urgent atomic.Int64
	short  atomic.Bool  // an append found no space
	now    atomic.Bool  // somebody asked not to rest
	late   int64        // what a newer mark would let encode, at the last look; the first compactor's
	logged atomic.Int64 // bytes since the space was looked at
	looked atomic.Int64 // nanoseconds of the clock, when it was
	mu     struct {
		sync.Mutex
		busy []atoll.Ordinal // segments that are being compacted
	}
}

func (r *reclaimer) init() {
	r.reap, r.kick = make(chan struct{}, 1), make(chan struct{}, compactors)
	r.delay.init()
}

// stock tells how much space there is, beside what there should be.
type stock struct {
	medium.Room
	part float64 // of what should be there: 1 or more is enough
	soon float64 // the same when all that is compacted already has come back
	late bool    // much of that has not come back, and copying more only takes room
}

// stockOf judges a room. Where nothing is known there is enough.
func stockOf(r medium.Room) stock {
	if r.Total == 0 {
		return stock{Room: r, part: 2 * stockClean, soon: 2 * stockClean}
	}
	want := min(stockSegments*r.Segment+r.Total/stockShare, r.Total/stockMost)
	s := stock{Room: r, late: r.Coming > want/lateShare}
	part := func(bytes int64) float64 { return float64(bytes) / float64(max(want, 1)) }
	s.part, s.soon = part(r.Free+r.Open+r.Coming/2), part(r.Free+r.Open+r.Coming)
	return s
}

// used returns how full it is, 0 to 1.
func (s stock) used() float64 {
	return atoll.HighWaterPercent/100. - float64(s.Free)/float64(max(s.Total, 1))
}

// clean reports whether something has to be compacted now.
func (s stock) clean() bool { return s.soon < stockClean }

// dead returns the part of a segment that must be dead to be compacted.
func (s stock) dead() float64 {
	if !s.clean() {
		return easyDead
	}
	return leastDead + (mostDead-leastDead)*min(max(s.soon, 0), 1)
}

// Reclaim has the volume look now for what to compact or encode, rested or not.
func (v *Volume) Reclaim() {
	v.reclaim.now.Store(true)
	v.kickReclaim()
}

func (v *Volume) kickReclaim() {
	for range compactors {
		select {
		case v.reclaim.kick <- struct{}{}:
		default:
		}
	}
}

// gauge looks how much space there is, and has what is needed done.
func (v *Volume) gauge() {
	if v.look().clean() {
		v.kickReclaim()
	}
}

// look looks how much space there is, for writers and checkpoints.
func (v *Volume) look() stock {
	s := stockOf(v.store.Room())
	v.reclaim.looked.Store(time.Now().UnixNano())
	v.reclaim.logged.Store(0)
	waits := s.part < stockPace && v.store.Reclaimable()+v.store.Waiting() > 0
	v.reclaim.delay.set(s, waits)
	switch {
	case s.clean():
		v.reclaim.urgent.Store(max(urgentBytes, s.Total/urgentShare))
		v.kickCheckpoint()
	case v.store.Waiting() > v.opts.CheckpointBytes:
		v.kickCheckpoint()
		fallthrough
	default:
		v.reclaim.urgent.Store(0)
	}
	if s.Free > s.Segment {
		v.reclaim.short.Store(false)
	}
	return s
}

// compactors is how many segments are compacted at once when space is short, so
// that one is copied while it is found out what lives in another.
const compactors = 2

// compactor compacts while it pays, and as much as has to be. All but the first
// only help when space is short.
func (v *Volume) compactor(first bool) {
	timer := time.NewTimer(easyRest)
	defer timer.Stop()
	var next time.Time
	for {
		select {
		case <-v.reclaim.kick:
		case <-timer.C:
		case <-v.ctx.Done():
			return
		}
		for v.ctx.Err() == nil {
			s := v.look()
			hurry := s.clean() || v.reclaim.short.Load()
			if first && v.reclaim.now.Swap(false) {
				next = time.Time{}
			}
			if rest := time.Until(next); rest > 0 && (!hurry || rest <= hardRest) || !hurry && !first {
				timer.Reset(max(rest, hardRest))
				break
			}
			rest := v.compactOne(v.ctx, s, hurry)
			if first && !hurry && rest == easyRest {
				rest = v.recode(v.ctx)
			}
			next = time.Now().Add(rest)
		}
	}
}

// compactOne compacts one segment, if one is worth it, and returns how long to
// rest.
func (v *Volume) compactOne(ctx context.Context, s stock, hurry bool) time.Duration {
	if s.late {
		return lateRest
	}
	begun := time.Now()
	victim, ok := v.reclaim.choose(v.store.Victims(8), s.dead())
	switch {
	case ok:
	case hurry:
		return hardRest
	default:
		return easyRest
	}
	defer v.reclaim.release(victim.Ordinal)
	moved, err := v.compact(ctx, victim.Ordinal)
	v.reclaim.delay.freed((victim.Blocks - min(moved, victim.Blocks)).Bytes(), begun)
	took := time.Since(begun)
	switch {
	case err != nil && ctx.Err() == nil:
		v.log.WarnContext(ctx, "segment not compacted; will be tried again", "seg", victim.Ordinal, "err", err)
		return hardRest
	case hurry:
		return 0
	case s.used() >= hardUsed:
		return took
	}
	return easyShare * took
}

// choose takes the first segment that is not being compacted and of which at
// least a part of dead is dead.
func (r *reclaimer) choose(list []medium.Victim, dead float64) (medium.Victim, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range list {
		if float64(v.Blocks-v.Live) >= dead*float64(v.Blocks) && !slices.Contains(r.mu.busy, v.Ordinal) {
			r.mu.busy = append(r.mu.busy, v.Ordinal)
			return v, true
		}
	}
	return medium.Victim{}, false
}

// claim takes those of a list that are not being compacted, and returns a function
// that gives them back.
func (r *reclaimer) claim(list []medium.Victim) (taken []atoll.Ordinal, done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range list {
		if !slices.Contains(r.mu.busy, v.Ordinal) {
			taken = append(taken, v.Ordinal)
		}
	}
	r.mu.busy = append(r.mu.busy, taken...)
	return taken, func() {
		for _, o := range taken {
			r.release(o)
		}
	}
}

func (r *reclaimer) release(o atoll.Ordinal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.busy = slices.DeleteFunc(r.mu.busy, func(b atoll.Ordinal) bool { return b == o })
}
