package node

import (
	"context"
	"fmt"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// seg is one segment of the node.
type seg struct {
	id atoll.SegmentID

	mu struct {
		sync.Mutex // guards the fields below
		st         state
		tail       tail  // durable end
		idx        index // of an unsealed segment
		ending     segment.Ending
		missing    bool  // there is a state but no file
		sealing    bool  // a Seal is at work
		damaged    bool  // some block is known to be bad
		footerBad  bool  // the footer must be made anew
		err        error // sticky: no more writes in this process (S6)
		gone       bool  // deleted
	}

	// Of the committer.
	filled atoll.BlockNo // blocks below it were written since the segment was opened
	round  struct {
		active     bool
		tail       tail
		base       atoll.BlockNo // where the round's write begins
		prewritten bool
		shared     bool          // a flush of another file serves it too
		ahead      atoll.BlockNo // blocks of zeros to be written behind it
		size       atoll.BlockNo // of the segment
		vec        [][]byte
		crcs       []uint32
		starts     []atoll.BlockNo
		err        error
		handle     *handle
	}
}

// sealedAt returns the sealed length and whether it is sealed.
func (s *seg) sealedAt() (atoll.BlockNo, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.st.length, s.mu.st.flags&sealed != 0
}

// answer returns what the node vouches for.
func (s *seg) answer() wire.Tail {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.mu
	t := wire.Tail{
		Length: m.tail.next, Sealed: m.st.flags&sealed != 0, Epoch: max(m.st.epoch, m.tail.epoch),
		Sum: m.tail.sum, Seq: m.tail.seq,
	}
	switch {
	case m.missing || m.ending == segment.Damaged:
		t.Grade = wire.Unknown
	case t.Sealed:
		t.Length, t.Grade = m.st.length, wire.Clean
	case m.st.flags&doubtful != 0:
		t.Grade = wire.Unknown
	case m.ending == segment.Torn || m.err != nil:
		t.Grade = wire.Torn
	case m.st.flags&unclean != 0:
		t.Grade = wire.Intact
	default:
		t.Grade = wire.Clean
	}
	return t
}

// turns lets operations on one id happen one after another.
type turns struct {
	mu struct {
		sync.Mutex
		m map[atoll.SegmentID]*turn
	}
}

type turn struct {
	ch    chan struct{}
	users int
}

// take waits for the turn of id. After nil the caller must give it back.
func (t *turns) take(ctx context.Context, id atoll.SegmentID) error {
	t.mu.Lock()
	if t.mu.m == nil {
		t.mu.m = make(map[atoll.SegmentID]*turn)
	}
	u := t.mu.m[id]
	if u == nil {
		u = &turn{ch: make(chan struct{}, 1)}
		t.mu.m[id] = u
	}
	u.users++
	t.mu.Unlock()
	select {
	case u.ch <- struct{}{}:
		return nil
	case <-ctx.Done():
		t.leave(id, u)
		return fmt.Errorf("wait for segment %v: %w", id, atoll.ErrTimeout)
	}
}

// give ends a turn.
func (t *turns) give(id atoll.SegmentID) {
	t.mu.Lock()
	u := t.mu.m[id]
	t.mu.Unlock()
	<-u.ch
	t.leave(id, u)
}

func (t *turns) leave(id atoll.SegmentID, u *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if u.users--; u.users == 0 {
		delete(t.mu.m, id)
	}
}
