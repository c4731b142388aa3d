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

// Verify implements wire.Node. Blocks that were discarded do not count.
func (n *Node) Verify(ctx context.Context, id atoll.SegmentID) (wire.VerifyResult, error) {
	var res wire.VerifyResult
	if err := n.begin(ctx); err != nil {
		return res, fmt.Errorf("verify segment %v: %w", id, err)
	}
	defer n.calls.end()
	s, err := n.lookup(id)
	if err != nil {
		return res, fmt.Errorf("verify: %w", err)
	}
	n.indexes.forget(id) // so that the footer is read and verified too
	x, err := n.index(s)
	if err != nil {
		return res, fmt.Errorf("verify: %w", err)
	}
	buf := host.Alloc(1 << 20)
	defer buf.Release()
	for b := atoll.BlockNo(0); int(b) < len(x.crcs); {
		if ctx.Err() != nil {
			return res, fmt.Errorf("verify segment %v: %w", id, atoll.ErrTimeout)
		}
		if err := n.stopped(); err != nil {
			return res, fmt.Errorf("verify segment %v: %w", id, err)
		}
		p := buf.Bytes()[:min(len(buf.Bytes()), (len(x.crcs)-int(b))*atoll.BlockSize)]
		if err := n.verifyPiece(s, x, b, p, &res); err != nil {
			return res, fmt.Errorf("verify: %w", err)
		}
		b += atoll.BlockNo(len(p) / atoll.BlockSize)
	}
	s.mu.Lock()
	s.mu.damaged = len(res.Damaged) > 0
	s.mu.Unlock()
	return res, nil
}

// verifyPiece checks the blocks from b on that fit p, one by one if they cannot
// be read in one piece.
func (n *Node) verifyPiece(s *seg, x index, b atoll.BlockNo, p []byte, res *wire.VerifyResult) error {
	err := n.readRaw(s, b, p)
	if errors.Is(err, atoll.ErrCorrupt) && len(p) > atoll.BlockSize {
		for ; len(p) > 0; p = p[atoll.BlockSize:] {
			if err := n.verifyPiece(s, x, b, p[:atoll.BlockSize], res); err != nil {
				return err
			}
			b++
		}
		return nil
	}
	if err != nil && !errors.Is(err, atoll.ErrCorrupt) {
		return err
	}
	s.mu.Lock()
	holes := s.mu.st.flags&punched != 0
	s.mu.Unlock()
	for i := range atoll.BlockNo(len(p) / atoll.BlockSize) {
		q := p[i.Bytes():][:atoll.BlockSize]
		bad := err != nil || x.isLost(b+i) || segment.CRC(q) != x.crcs[b+i]
		if bad && !(holes && err == nil && allZero(q)) {
			n.metrics.sawCorrupt()
			addRun(&res.Damaged, b+i)
		}
		res.Blocks++
	}
	return nil
}

func addRun(runs *[]wire.Run, b atoll.BlockNo) {
	if k := len(*runs) - 1; k >= 0 && (*runs)[k].Block+(*runs)[k].Blocks == b {
		(*runs)[k].Blocks++
		return
	}
	*runs = append(*runs, wire.Run{Block: b, Blocks: 1})
}

func allZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// Repair implements wire.Node.
func (n *Node) Repair(ctx context.Context, id atoll.SegmentID, block atoll.BlockNo, p []byte) error {
	if len(p) == 0 || len(p)%atoll.BlockSize != 0 || len(p) > maxAnswer {
		return fmt.Errorf("repair %d bytes of segment %v: %w", len(p), id, atoll.ErrInvalid)
	}
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("repair segment %v: %w", id, err)
	}
	defer n.done(id)
	s, err := n.lookup(id)
	if err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	x, err := n.index(s)
	if err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	if int64(block)+int64(len(p)/atoll.BlockSize) > int64(len(x.crcs)) {
		return fmt.Errorf("repair segment %v at block %d: it ends at %d: %w", id, block, len(x.crcs), atoll.ErrInvalid)
	}
	if !x.matches(block, p) {
		return n.repairLost(s, x, block, p)
	}
	return n.writeRepair(s, block, p)
}

// matches reports whether p has the checksums known for the blocks from b on.
func (x index) matches(b atoll.BlockNo, p []byte) bool {
	for ; len(p) > 0; p = p[atoll.BlockSize:] {
		if x.isLost(b) || x.crcs[b] != segment.CRC(p[:atoll.BlockSize]) {
			return false
		}
		b++
	}
	return true
}

// writeRepair writes p durably over blocks of the segment. An error counts
// against the disk, and the segment stays damaged.
func (n *Node) writeRepair(s *seg, block atoll.BlockNo, p []byte) error {
	h, err := n.handles.acquire(s.id)
	if err != nil {
		return fmt.Errorf("repair segment %v: %w", s.id, err)
	}
	defer n.handles.release(h)
	buf := host.Alloc(len(p))
	defer buf.Release()
	copy(buf.Bytes(), p)
	if err := h.file.WriteVec([][]byte{buf.Bytes()}, block.Bytes(), true); err != nil {
		n.diskFailed(err)
		return fmt.Errorf("repair segment %v at block %d: %w (%w)", s.id, block, atoll.ErrIO, err)
	}
	if err := n.readBlocks(s, block, buf.Bytes(), nil); err != nil {
		return fmt.Errorf("repair: read back: %w", err)
	}
	n.log.Info("blocks repaired", "seg", s.id, "off", uint32(block), "len", len(p)/atoll.BlockSize)
	return nil
}

// repairLost puts whole batches where the checksums were lost with the headers.
// They must fit between what is known on both sides.
func (n *Node) repairLost(s *seg, x index, block atoll.BlockNo, p []byte) error {
	end := block + atoll.BlockNo(len(p)/atoll.BlockSize)
	fixed := index{crcs: append([]uint32(nil), x.crcs...)}
	err := segment.CheckBatches(p, s.id, block, func(h segment.Header, batch []byte) error {
		for i := range h.Blocks() + 1 {
			b := int(h.Offset()) + i
			crc := segment.CRC(batch[i*atoll.BlockSize:][:atoll.BlockSize])
			if !x.isLost(atoll.BlockNo(b)) && crc != x.crcs[b] {
				return fmt.Errorf("block %d is known to be another: %w", b, atoll.ErrCorrupt)
			}
			fixed.crcs[b] = crc
		}
		fixed.batches = append(fixed.batches, h.Offset())
		return nil
	})
	if err != nil {
		return fmt.Errorf("repair segment %v at block %d: %w", s.id, block, err)
	}
	fixed.batches = mergeBatches(x.batches, fixed.batches, block, end)
	for _, r := range x.lost {
		fixed.lost = append(fixed.lost, r.without(block, end)...)
	}
	n.indexes.put(s.id, whole, &fixed)
	if err := n.writeRepair(s, block, p); err != nil {
		n.indexes.put(s.id, whole, &x)
		return err
	}
	return n.restoreFooter(s, fixed)
}

// mergeBatches replaces the batches of old between from and to.
func mergeBatches(old, between []atoll.BlockNo, from, to atoll.BlockNo) (out []atoll.BlockNo) {
	for _, b := range old {
		if b < from {
			out = append(out, b)
		}
	}
	out = append(out, between...)
	for _, b := range old {
		if b >= to {
			out = append(out, b)
		}
	}
	return out
}

func (r run) without(from, to atoll.BlockNo) (out []run) {
	if a := (run{r.from, min(r.to, from)}); a.from < a.to {
		out = append(out, a)
	}
	if b := (run{max(r.from, to), r.to}); b.from < b.to {
		out = append(out, b)
	}
	return out
}

// restoreFooter writes the footer anew once all checksums are known again.
func (n *Node) restoreFooter(s *seg, x index) error {
	s.mu.Lock()
	st := s.mu.st
	s.mu.Unlock()
	if st.flags&sealed == 0 || len(x.lost) > 0 {
		return nil
	}
	n.indexes.forget(s.id)
	_, err := n.index(s) // footerBad stands: reads through and writes it
	return err
}

// Discard implements wire.Node. A file with holes never becomes a slot again.
func (n *Node) Discard(ctx context.Context, id atoll.SegmentID, runs []wire.Run) error {
	if err := n.control(ctx, id); err != nil {
		return fmt.Errorf("discard in segment %v: %w", id, err)
	}
	defer n.done(id)
	s, err := n.lookup(id)
	if err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	if err := s.checkRuns(runs); err != nil {
		return fmt.Errorf("discard in segment %v: %w", id, err)
	}
	if _, err := n.index(s); err != nil { // a footer in doubt is settled while the data are there
		return fmt.Errorf("discard: %w", err)
	}
	s.mu.Lock()
	known := s.mu.st.flags&punched != 0
	s.mu.st.flags |= punched
	st := s.mu.st
	s.mu.Unlock()
	if !known {
		if err := n.putState(st); err != nil {
			return fmt.Errorf("discard in segment %v: %w", id, err)
		}
	}
	h, err := n.handles.acquire(id)
	if err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	defer n.handles.release(h)
	for _, r := range runs {
		if err := h.file.Punch(r.Block.Bytes(), r.Blocks.Bytes()); err != nil {
			return fmt.Errorf("discard in segment %v: %w", id, err)
		}
	}
	return nil
}

func (s *seg) checkRuns(runs []wire.Run) error {
	length, ok := s.sealedAt()
	if !ok {
		return fmt.Errorf("it is not sealed: %w", atoll.ErrInvalid)
	}
	for _, r := range runs {
		if int64(r.Block)+int64(r.Blocks) > int64(length) {
			return fmt.Errorf("blocks %d to %d, it ends at %d: %w", r.Block, int64(r.Block)+int64(r.Blocks), length, atoll.ErrInvalid)
		}
	}
	return nil
}
