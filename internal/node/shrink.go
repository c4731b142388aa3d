package node

import (
	"context"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// A segment has the room of its full size while it is open. One that is sealed
// much shorter, because its writer was idle or rolled after a failure, gives the
// rest back a little later, in the background: first the state says so, durably,
// and that the file is no slot any more; then the file is cut. A crash in
// between leaves a file that is longer than need be, and is cut at the next
// open.
type shrinking struct {
	mu    sync.Mutex
	short []atoll.SegmentID // sealed, perhaps worth cutting
}

func (q *shrinking) add(id atoll.SegmentID) {
	q.mu.Lock()
	q.short = append(q.short, id)
	q.mu.Unlock()
}

func (q *shrinking) take() []atoll.SegmentID {
	q.mu.Lock()
	defer q.mu.Unlock()
	ids := q.short
	q.short = nil
	return ids
}

// shrunk returns the size that a sealed segment needs, and whether cutting it to
// that is worth a write of the file system's journal: it gives back a quarter.
func (s *seg) shrunk() (size atoll.BlockNo, worth bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.mu
	if m.st.flags&sealed == 0 || m.missing || m.gone || m.footerBad || m.err != nil {
		return 0, false
	}
	// As many batches as there can be, so that a footer made anew has room.
	size = m.st.length + segment.FooterBlocks(int(m.st.length), int(m.st.length))
	return size, size < m.st.size-m.st.size/4
}

// shrinkAll cuts the segments that were sealed short since it was last called.
func (n *Node) shrinkAll() {
	for _, id := range n.shrinking.take() {
		if n.stopped() != nil {
			return
		}
		if err := n.shrink(id); err != nil {
			n.log.Warn("short segment keeps its room", "seg", id, "err", err)
		}
	}
}

func (n *Node) shrink(id atoll.SegmentID) error {
	ctx, cancel := context.WithTimeout(context.Background(), atoll.RequestTimeout)
	defer cancel()
	if err := n.control(ctx, id); err != nil {
		return err
	}
	defer n.done(id)
	s, err := n.lookup(id)
	if err != nil {
		return nil // deleted meanwhile
	}
	if size, worth := s.shrunk(); worth {
		if err := n.setSize(s, size); err != nil {
			return err
		}
	}
	if _, sealed := s.sealedAt(); !sealed {
		return nil
	}
	s.mu.Lock()
	size := s.mu.st.size
	s.mu.Unlock()
	return n.cutFile(id, size)
}

// setSize makes a sealed segment smaller, durably.
func (n *Node) setSize(s *seg, size atoll.BlockNo) error {
	s.mu.Lock()
	old := s.mu.st.size
	s.mu.st.size = size
	s.mu.st.flags &^= prewritten
	st := s.mu.st
	s.mu.Unlock()
	if err := n.putState(st); err != nil {
		return err
	}
	n.unreserve(old - size)
	n.full.Store(false)
	return nil
}

// cutFile cuts a segment's file to its size if it is longer.
func (n *Node) cutFile(id atoll.SegmentID, size atoll.BlockNo) error {
	h, err := n.handles.acquire(id)
	if err != nil {
		return err
	}
	defer n.handles.release(h)
	if have, err := h.file.Size(); err != nil || have <= size.Bytes() {
		return err
	}
	return h.file.Truncate(size.Bytes())
}
