package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// minSegmentBlocks has room for one batch of one block and the footer.
const minSegmentBlocks = 4

// Create implements wire.Node.
func (n *Node) Create(ctx context.Context, id atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error {
	reserve := blocks&wire.Reserve != 0
	if blocks &^= wire.Reserve; blocks < minSegmentBlocks || blocks > atoll.MaxSegmentBlocks {
		return fmt.Errorf("create segment %v of %d blocks: %w", id, blocks, atoll.ErrInvalid)
	}
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("create segment %v: %w", id, err)
	}
	defer n.done(id)
	if err := n.refuseWrites(); err != nil {
		return fmt.Errorf("create segment %v: %w", id, err)
	}
	st, _ := n.states.get(id)
	if epoch < st.epoch || epoch == st.epoch && st.flags&deleted != 0 {
		return fmt.Errorf("create segment %v: epoch %v, fenced at %v: %w", id, epoch, st.epoch, atoll.ErrFenced)
	}
	if s, err := n.lookup(id); err == nil {
		return n.createAgain(s, epoch)
	}
	if err := n.create(state{id: id, flags: exists, size: blocks, epoch: epoch}, reserve); err != nil {
		return fmt.Errorf("create segment %v: %w", id, err)
	}
	return nil
}

// createAgain answers a Create of what is there.
func (n *Node) createAgain(s *seg, epoch atoll.Epoch) error {
	s.mu.Lock()
	st, missing := s.mu.st, s.mu.missing
	empty := s.mu.tail.next == 0 && st.flags&sealed == 0 && !s.mu.missing && s.mu.err == nil
	fits := st.epoch == epoch || st.epoch == 0
	if empty && fits {
		s.mu.st.epoch = epoch
		st.epoch = epoch
	}
	s.mu.Unlock()
	if missing {
		return n.createMissing(s, epoch)
	}
	if !empty || !fits {
		return fmt.Errorf("create segment %v: %w", s.id, atoll.ErrExist)
	}
	return n.states.put(st, true)
}

// createMissing makes the file of a segment anew that was lost, to be filled
// from other copies. Until it is sealed its grade stays Unknown.
func (n *Node) createMissing(s *seg, epoch atoll.Epoch) error {
	f, err := n.createFile(s.id, "")
	if err != nil {
		return fmt.Errorf("create segment %v anew: %w", s.id, err)
	}
	n.handles.release(n.handles.add(s.id, f))
	s.mu.Lock()
	m := &s.mu
	m.st.flags = exists | unclean | doubtful
	m.st.epoch, m.st.length = epoch, 0
	m.tail, m.idx, m.missing, m.footerBad = tail{}, index{}, false, false
	st := m.st
	s.mu.Unlock()
	n.indexes.forget(s.id)
	n.log.Info("lost segment made anew", "seg", s.id)
	return n.putState(st)
}

// create makes the file and then the state (S3). The file stays if the state
// cannot be written: the next open finds it. With reserve it may take the room
// beyond the high-water mark.
func (n *Node) create(st state, reserve bool) error {
	slot, err := n.reserve(st.size, reserve)
	if err != nil {
		return err
	}
	f, err := n.createFile(st.id, slot)
	if err != nil {
		n.unreserve(st.size)
		if errors.Is(err, atoll.ErrNoSpace) {
			n.full.Store(true)
		} else {
			n.diskError()
		}
		return err
	}
	if slot != "" {
		st.flags |= prewritten
	}
	n.handles.release(n.handles.add(st.id, f))
	if err := n.states.put(st, true); err != nil {
		n.unreserve(st.size)
		n.diskFailed(err)
		return err
	}
	s := &seg{id: st.id}
	s.mu.st = st
	n.insert(s)
	return nil
}

func (n *Node) createFile(id atoll.SegmentID, slot string) (host.File, error) {
	if slot == "" {
		f, err := n.fs.Create(segmentPath(id))
		if errors.Is(err, atoll.ErrExist) { // left by a Create that failed
			f, err = n.fs.Open(segmentPath(id))
		}
		if err == nil {
			if err = n.fs.SyncDir(segmentsDir); err != nil {
				f.Close()
			}
		}
		return f, err
	}
	if err := n.fs.Rename(slot, segmentPath(id)); err != nil {
		return nil, err
	}
	if err := errors.Join(n.fs.SyncDir(segmentsDir), n.fs.SyncDir(slotsDir)); err != nil {
		return nil, err
	}
	return n.fs.Open(segmentPath(id))
}

// insert puts a segment into the map.
func (n *Node) insert(s *seg) {
	n.mu.Lock()
	n.mu.segs[s.id] = s
	n.mu.sorted = nil
	n.mu.Unlock()
	n.metrics.count(1, 1, 0)
}

// Fence implements wire.Node.
func (n *Node) Fence(ctx context.Context, id atoll.SegmentID, epoch atoll.Epoch) (wire.Tail, error) {
	if err := n.control(ctx, id); err != nil {
		return wire.Tail{}, fmt.Errorf("fence segment %v: %w", id, err)
	}
	defer n.done(id)
	s, err := n.lookup(id)
	if err != nil {
		return n.fenceAbsent(id, epoch)
	}
	if err := n.fence(s, epoch); err != nil {
		return wire.Tail{}, fmt.Errorf("fence segment %v: %w", id, err)
	}
	return s.answer(), nil
}

// fence raises the fence, lets what was queued before pass or fail, and makes
// the fence durable (S2). On nil the tail does not move any more but for the
// owner of epoch.
func (n *Node) fence(s *seg, epoch atoll.Epoch) error {
	s.mu.Lock()
	old := max(s.mu.st.epoch, s.mu.tail.epoch)
	if epoch < old {
		s.mu.Unlock()
		return fmt.Errorf("epoch %v, fenced at %v: %w", epoch, old, atoll.ErrFenced)
	}
	s.mu.st.epoch = epoch
	s.mu.Unlock()
	if err := n.barrier(); err != nil {
		return err
	}
	return n.putState(s.noteLength())
}

// noteLength returns the state with the durable length of an unsealed segment:
// if less is found later, there is damage, however cleanly the rest ends.
func (s *seg) noteLength() state {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.st.flags&sealed == 0 {
		s.mu.st.length = max(s.mu.st.length, s.mu.tail.next)
	}
	return s.mu.st
}

// putState makes a state durable.
func (n *Node) putState(st state) error {
	if err := n.states.put(st, true); err != nil {
		n.diskFailed(err)
		return err
	}
	return nil
}

// fenceAbsent fences a segment that is not here.
func (n *Node) fenceAbsent(id atoll.SegmentID, epoch atoll.Epoch) (wire.Tail, error) {
	st, _ := n.states.get(id)
	if epoch < st.epoch {
		return wire.Tail{}, fmt.Errorf("fence segment %v: epoch %v, fenced at %v: %w", id, epoch, st.epoch, atoll.ErrFenced)
	}
	st.id, st.epoch = id, epoch
	if err := n.putState(st); err != nil {
		return wire.Tail{}, fmt.Errorf("fence segment %v: %w", id, err)
	}
	t := wire.Tail{Grade: wire.Absent, Epoch: epoch}
	if n.states.doubt {
		t.Grade = wire.Unknown
	}
	return t, nil
}

// Extend implements wire.Node. The batches take the same way as appends.
func (n *Node) Extend(ctx context.Context, id atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error {
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("extend segment %v: %w", id, err)
	}
	defer n.done(id)
	s, err := n.lookup(id)
	if err != nil {
		return fmt.Errorf("extend: %w", err)
	}
	if err := n.raise(s, epoch); err != nil {
		return fmt.Errorf("extend segment %v: %w", id, err)
	}
	if at, raw, err = n.skipPresent(s, at, raw); err != nil || len(raw) == 0 {
		return err
	}
	var list []*wire.Append
	err = segment.CheckBatches(raw, id, at, func(h segment.Header, batch []byte) error {
		buf := host.Alloc(len(batch))
		copy(buf.Bytes(), batch)
		vec := host.NewVec()
		vec.Add(buf, buf.Bytes())
		buf.Release()
		list = append(list, &wire.Append{Seg: id, Epoch: epoch, Offset: h.Offset(), Vec: vec})
		return nil
	})
	if err == nil {
		err = n.appendAll(list)
	}
	for _, a := range list {
		a.Vec.Release()
	}
	if err != nil {
		return fmt.Errorf("extend: %w", err)
	}
	return nil
}

// skipPresent drops from raw the blocks of a sealed segment that are there with
// equal bytes; a sealed segment takes no others.
func (n *Node) skipPresent(s *seg, at atoll.BlockNo, raw []byte) (atoll.BlockNo, []byte, error) {
	if _, ok := s.sealedAt(); !ok {
		return at, raw, nil
	}
	x, err := n.index(s)
	if err != nil {
		return at, raw, err
	}
	for ; len(raw) >= atoll.BlockSize; at++ {
		if int(at) >= len(x.crcs) || x.crcs[at] != segment.CRC(raw[:atoll.BlockSize]) {
			return at, raw, fmt.Errorf("extend segment %v at block %d: %w", s.id, at, atoll.ErrSealed)
		}
		raw = raw[atoll.BlockSize:]
	}
	return at, raw, nil
}

// appendAll queues the appends and waits for all.
func (n *Node) appendAll(list []*wire.Append) error {
	done := make(chan *wire.Append, len(list))
	for _, a := range list {
		a.Done = done
		n.append(a)
	}
	var first *wire.Append
	for range list {
		a := <-done
		if a.Err != nil && (first == nil || a.Offset < first.Offset) {
			first = a
		}
	}
	if first != nil {
		return first.Err
	}
	return nil
}

// raise makes epoch the fence of s if it is higher; ErrFenced if it is lower.
func (n *Node) raise(s *seg, epoch atoll.Epoch) error {
	s.mu.Lock()
	have := s.mu.st.epoch
	s.mu.Unlock()
	if epoch == have {
		return nil
	}
	return n.fence(s, epoch)
}

// Seal implements wire.Node.
func (n *Node) Seal(ctx context.Context, id atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error {
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("seal segment %v: %w", id, err)
	}
	defer n.done(id)
	s, err := n.lookup(id)
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	if at, ok := s.sealedAt(); ok {
		if at != length {
			return fmt.Errorf("seal segment %v at %d: it is sealed at %d: %w", id, length, at, atoll.ErrSealed)
		}
		return nil
	}
	if err := n.raise(s, epoch); err != nil {
		return fmt.Errorf("seal segment %v: %w", id, err)
	}
	s.setSealing(true)
	defer s.setSealing(false)
	if err := n.barrier(); err != nil {
		return fmt.Errorf("seal segment %v: %w", id, err)
	}
	foot, err := s.footerAt(length)
	if err != nil {
		return err
	}
	if err := n.writeFooter(s, foot); err != nil {
		return fmt.Errorf("seal segment %v: %w", id, err)
	}
	n.setSealed(s, foot)
	return nil
}

func (s *seg) setSealing(v bool) {
	s.mu.Lock()
	s.mu.sealing = v
	s.mu.Unlock()
}

// footerAt returns the footer of an unsealed segment cut at length.
func (s *seg) footerAt(length atoll.BlockNo) (*segment.Footer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.mu
	if m.err != nil {
		return nil, m.err
	}
	if m.missing || length > m.tail.next {
		return nil, fmt.Errorf("seal segment %v at %d: it ends at %d: %w", s.id, length, m.tail.next, atoll.ErrGap)
	}
	f := &segment.Footer{Segment: s.id, Length: length, CRCs: m.idx.crcs[:length], Batches: m.idx.batches}
	for len(f.Batches) > 0 && f.Batches[len(f.Batches)-1] >= length {
		f.Batches = f.Batches[:len(f.Batches)-1]
	}
	f.Sum, f.Epoch, f.Seq = m.tail.sum, m.tail.epoch, m.tail.seq
	return f, nil
}

// writeFooter writes a footer durably. When the segment is cut, the fields that
// come from the last batch are read from its header.
func (n *Node) writeFooter(s *seg, foot *segment.Footer) error {
	h, err := n.handles.acquire(s.id)
	if err != nil {
		return err
	}
	defer n.handles.release(h)
	if err := n.cutFooter(s, h.file, foot); err != nil {
		return err
	}
	buf := host.Alloc(int(foot.Blocks().Bytes()))
	defer buf.Release()
	foot.Encode(buf.Bytes())
	if err := h.file.WriteVec([][]byte{buf.Bytes()}, foot.Length.Bytes(), true); err != nil {
		return n.writeFailed(s, err)
	}
	return nil
}

// cutFooter sets a footer's Sum, Epoch and Seq from its last batch if that is
// not the segment's last. A length inside a batch is refused.
func (n *Node) cutFooter(s *seg, f host.File, foot *segment.Footer) error {
	s.mu.Lock()
	end := s.mu.tail.next
	s.mu.Unlock()
	if foot.Length == end {
		return nil
	}
	foot.Sum, foot.Epoch, foot.Seq = 0, 0, 0
	if foot.Length == 0 {
		return nil
	}
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	at := foot.Batches[len(foot.Batches)-1]
	if _, err := f.ReadAt(buf.Bytes(), at.Bytes()); err != nil {
		return fmt.Errorf("read block %d: %w", at, err)
	}
	h, err := segment.ParseHeader(buf.Bytes())
	if err != nil {
		return err
	}
	if h.Next() != foot.Length {
		return fmt.Errorf("length %d lies inside the batch at block %d: %w", foot.Length, at, atoll.ErrInvalid)
	}
	foot.Sum, foot.Epoch, foot.Seq = h.Sum(), h.Epoch(), h.Seq()+uint64(h.Records())
	return nil
}

// setSealed makes s sealed in memory and, without waiting for the disk, in the
// states: after a power cut the footer tells (segment rule S3).
func (n *Node) setSealed(s *seg, foot *segment.Footer) {
	x := &index{crcs: foot.CRCs, batches: foot.Batches}
	n.indexes.put(s.id, whole, x)
	s.mu.Lock()
	m := &s.mu
	m.st.flags |= sealed
	m.st.flags &^= unclean | doubtful
	m.st.length = foot.Length
	m.tail = tail{next: foot.Length, sum: foot.Sum, epoch: foot.Epoch, seq: foot.Seq}
	m.idx, m.ending, m.damaged, m.footerBad = index{}, segment.Whole, false, false
	st := m.st
	s.mu.Unlock()
	s.round.vec, s.round.crcs, s.round.starts = nil, nil, nil
	n.releaseRound(s)
	n.metrics.count(0, -1, 0)
	n.states.put(st, false)
	n.shrinking.add(s.id)
}

// Delete implements wire.Node.
func (n *Node) Delete(ctx context.Context, id atoll.SegmentID, epoch atoll.Epoch) error {
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("delete segment %v: %w", id, err)
	}
	defer n.done(id)
	st, _ := n.states.get(id)
	if epoch < st.epoch {
		return fmt.Errorf("delete segment %v: epoch %v, fenced at %v: %w", id, epoch, st.epoch, atoll.ErrFenced)
	}
	s, _ := n.lookup(id)
	if s != nil {
		if err := n.fence(s, epoch); err != nil {
			return fmt.Errorf("delete segment %v: %w", id, err)
		}
	}
	if err := n.putState(state{id: id, flags: deleted, epoch: epoch}); err != nil {
		return fmt.Errorf("delete segment %v: %w", id, err)
	}
	if s == nil {
		return nil
	}
	return n.remove(ctx, s)
}

// remove takes a segment with a tombstone out of the map and gives its file
// back once nobody reads it. What is not done now is done at the next open (S4).
func (n *Node) remove(ctx context.Context, s *seg) error {
	s.mu.Lock()
	s.mu.gone = true
	st, missing := s.mu.st, s.mu.missing
	s.mu.Unlock()
	if err := n.barrier(); err != nil {
		return err
	}
	n.releaseRound(s)
	n.mu.Lock()
	delete(n.mu.segs, s.id)
	n.mu.sorted = nil
	n.mu.Unlock()
	n.indexes.forget(s.id)
	open := 1
	if st.flags&sealed != 0 {
		open = 0
	}
	n.metrics.count(-1, -open, 0)
	ctx, cancel := context.WithTimeout(ctx, atoll.RequestTimeout)
	defer cancel()
	select {
	case <-n.handles.forget(s.id):
	case <-ctx.Done():
		return nil
	}
	n.unreserve(st.size)
	if missing {
		return nil
	}
	n.full.Store(false)
	if err := n.slots.recycle(s.id, st); err != nil {
		n.diskFailed(err)
		return fmt.Errorf("delete segment %v: %w", s.id, err)
	}
	return nil
}
