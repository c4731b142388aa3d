package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// Evict removes a segment whose copyset does not have this node as a member any
// more, and of which the caller knows that every member holds it. Unlike after
// Delete, the node takes the segment back under the same epoch, should it become
// a member again; appends of older epochs stay fenced. Absent is no error.
func (n *Node) Evict(ctx context.Context, id atoll.SegmentID) error {
	s, err := n.lookup(id)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	epoch := max(s.mu.st.epoch, s.mu.tail.epoch)
	s.mu.Unlock()
	if err := n.Delete(ctx, id, epoch); err != nil {
		return err
	}
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("evict segment %v: %w", id, err)
	}
	defer n.done(id)
	f, err := n.fs.Open(segmentPath(id))
	if err == nil { // a reader has it still; the tombstone removes it at the next start (S4)
		return f.Close()
	}
	if st, is := n.states.get(id); !is || !errors.Is(err, atoll.ErrNotExist) || st.flags&deleted == 0 || st.epoch != epoch {
		return nil
	}
	return n.putState(state{id: id, epoch: epoch})
}

// Requests counts the appends of writers and the reads so far: what repair has
// to leave room for.
func (n *Node) Requests() uint64 { return n.requests.Load() }
