package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/wire"
)

// maxAnswer is the largest buffer that Fetch and Index return.
const maxAnswer = 8 << 20

var _ wire.Summer = (*Node)(nil)

// Read implements wire.Node.
func (n *Node) Read(ctx context.Context, id atoll.SegmentID, block atoll.BlockNo, dst []byte) error {
	return n.ReadSums(ctx, id, block, dst, nil)
}

// ReadSums implements wire.Summer; sums may be nil.
func (n *Node) ReadSums(ctx context.Context, id atoll.SegmentID, block atoll.BlockNo, dst []byte, sums []uint32) error {
	if len(dst) == 0 || len(dst)%atoll.BlockSize != 0 {
		return fmt.Errorf("read %d bytes of segment %v: %w", len(dst), id, atoll.ErrInvalid)
	}
	n.requests.Add(1)
	if err := n.begin(ctx); err != nil {
		return fmt.Errorf("read segment %v: %w", id, err)
	}
	defer n.calls.end()
	s, err := n.lookup(id)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if err := n.readBlocks(s, block, dst, sums); err != nil {
		return err
	}
	n.metrics.didRead(len(dst))
	return nil
}

// readBlocks fills dst and verifies it. It sets sums, unless nil, to the
// checksums of the blocks.
func (n *Node) readBlocks(s *seg, block atoll.BlockNo, dst []byte, sums []uint32) error {
	if done, err := n.readPieces(s, block, dst, sums); done {
		return err
	}
	x, err := n.index(s)
	if err != nil {
		return err
	}
	count := atoll.BlockNo(len(dst) / atoll.BlockSize)
	if int64(block)+int64(count) > int64(len(x.crcs)) {
		return fmt.Errorf("read blocks %d to %d of segment %v: it ends at %d: %w", block, block+count, s.id, len(x.crcs), atoll.ErrNotExist)
	}
	if err := n.readRaw(s, block, dst); err != nil {
		return err
	}
	for i := range count {
		crc := segment.CRC(dst[i.Bytes():][:atoll.BlockSize])
		if x.crcs[block+i] != crc || x.isLost(block+i) {
			return n.corrupt(s, x, block, dst)
		}
		if sums != nil {
			sums[i] = crc
		}
	}
	return nil
}

// pieceBlocks is how many blocks have their checksums in one block of a footer.
const pieceBlocks = atoll.BlockSize / 4

// readPieces is readBlocks for a sealed segment whose index is not in memory,
// with only those blocks of the footer that matter. They have no checksum of
// their own, but if what they say fits the data, both are right. It reports
// false when they do not help; then readBlocks finds out what is wrong.
func (n *Node) readPieces(s *seg, block atoll.BlockNo, dst []byte, sums []uint32) (done bool, err error) {
	s.mu.Lock()
	m := &s.mu
	length, ok := m.st.length, m.st.flags&sealed != 0 && !m.missing && !m.footerBad
	s.mu.Unlock()
	count := atoll.BlockNo(len(dst) / atoll.BlockSize)
	if !ok || int64(block)+int64(count) > int64(length) || n.indexes.get(s.id, whole) != nil {
		return false, nil
	}
	if err := n.readRaw(s, block, dst); err != nil {
		return true, err
	}
	for len(dst) > 0 {
		x := n.piece(s, length, int32(block/pieceBlocks))
		if x == nil {
			return false, nil
		}
		for _, crc := range x.crcs[block%pieceBlocks:] {
			if len(dst) == 0 {
				break
			}
			if crc != segment.CRC(dst[:atoll.BlockSize]) {
				return false, nil
			}
			if sums != nil {
				sums[0], sums = crc, sums[1:]
			}
			dst, block = dst[atoll.BlockSize:], block+1
		}
	}
	return true, nil
}

// piece returns the checksums of one piece of a sealed segment, nil if they
// cannot be read.
func (n *Node) piece(s *seg, length atoll.BlockNo, piece int32) *index {
	if x := n.indexes.get(s.id, piece); x != nil {
		return x
	}
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	from := atoll.BlockNo(piece) * pieceBlocks
	if n.readRaw(s, length+1+atoll.BlockNo(piece), buf.Bytes()) != nil {
		return nil
	}
	x := &index{crcs: make([]uint32, min(length-from, pieceBlocks))}
	for i := range x.crcs {
		x.crcs[i] = binary.LittleEndian.Uint32(buf.Bytes()[4*i:])
	}
	n.indexes.put(s.id, piece, x)
	return x
}

// isLost reports whether the checksum of block b is not known.
func (x index) isLost(b atoll.BlockNo) bool {
	for _, r := range x.lost {
		if b >= r.from && b < r.to {
			return true
		}
	}
	return false
}

// corrupt returns the error for blocks of which some are bad, naming the range
// from the first to the last of them.
func (n *Node) corrupt(s *seg, x index, block atoll.BlockNo, dst []byte) error {
	first, last := atoll.BlockNo(0), atoll.BlockNo(0)
	for i := range atoll.BlockNo(len(dst) / atoll.BlockSize) {
		if x.crcs[block+i] != segment.CRC(dst[i.Bytes():][:atoll.BlockSize]) || x.isLost(block+i) {
			if last == 0 {
				first = block + i
			}
			last = block + i + 1
		}
	}
	s.mu.Lock()
	s.mu.damaged = true
	s.mu.Unlock()
	n.metrics.sawCorrupt()
	return fmt.Errorf("read segment %v on node %v: blocks %d to %d: %w", s.id, n.id.Node, first, last, atoll.ErrCorrupt)
}

// readRaw fills dst from the file. A disk that cannot read is a disk error.
func (n *Node) readRaw(s *seg, block atoll.BlockNo, dst []byte) error {
	h, err := n.handles.acquire(s.id)
	if err == nil {
		_, err = h.file.ReadAt(dst, block.Bytes())
		n.handles.release(h)
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, atoll.ErrIO) {
		n.readErrors.Add(1)
		n.metrics.ioError()
	}
	// For the caller this copy is bad, whatever the reason: another will do.
	return fmt.Errorf("read segment %v on node %v at block %d: %w (%w)", s.id, n.id.Node, block, atoll.ErrCorrupt, err)
}

// index returns what is known of the blocks of s below its durable end.
func (n *Node) index(s *seg) (index, error) {
	s.mu.Lock()
	m := &s.mu
	if m.missing {
		s.mu.Unlock()
		return index{}, fmt.Errorf("segment %v on node %v: its file is missing: %w", s.id, n.id.Node, atoll.ErrCorrupt)
	}
	if m.st.flags&sealed == 0 {
		x := m.idx // what is below its lengths never changes
		s.mu.Unlock()
		return x, nil
	}
	st, bad := m.st, m.footerBad
	s.mu.Unlock()
	if x := n.indexes.get(s.id, whole); x != nil {
		return *x, nil
	}
	x, err := n.loadIndex(s, st, bad)
	if err != nil {
		return index{}, err
	}
	n.indexes.put(s.id, whole, x)
	return *x, nil
}

// loadIndex reads the footer of a sealed segment. If it is damaged the segment
// is read through instead, and if that gives everything back the footer is
// written anew.
func (n *Node) loadIndex(s *seg, st state, bad bool) (*index, error) {
	h, err := n.handles.acquire(s.id)
	if err != nil {
		return nil, fmt.Errorf("read footer of segment %v: %w", s.id, err)
	}
	defer n.handles.release(h)
	if !bad {
		foot, err := readFooter(h.file, st)
		if err == nil {
			return &index{crcs: foot.CRCs, batches: foot.Batches}, nil
		}
		n.log.Warn("footer is damaged; reading the segment through", "seg", s.id, "err", err)
	}
	return n.rebuildIndex(s, h.file, st)
}

// readFooter reads and checks a whole footer.
func readFooter(f host.File, st state) (segment.Footer, error) {
	foot, err := readFooterHead(f, st)
	if err != nil {
		return foot, err
	}
	buf := host.Alloc(int((foot.Blocks() - 1).Bytes()))
	defer buf.Release()
	if _, err := f.ReadAt(buf.Bytes(), (st.length + 1).Bytes()); err != nil {
		return foot, err
	}
	return foot, foot.ParseBody(buf.Bytes())
}

// rebuildIndex makes the index of a sealed segment from its data. Blocks that
// lie in no whole batch have no checksum any more; they must come from another
// copy (Repair).
func (n *Node) rebuildIndex(s *seg, f host.File, st state) (*index, error) {
	foot, lost := segment.Rebuild(f, s.id, st.length)
	x := &index{crcs: foot.CRCs, batches: foot.Batches}
	for _, r := range lost {
		x.lost = append(x.lost, run{r[0], r[1]})
	}
	s.mu.Lock()
	s.mu.footerBad = true
	s.mu.damaged = s.mu.damaged || len(lost) > 0
	s.mu.tail.sum, s.mu.tail.seq, s.mu.tail.epoch = foot.Sum, foot.Seq, foot.Epoch
	s.mu.Unlock()
	if len(lost) > 0 || st.flags&punched != 0 {
		return x, nil
	}
	if err := n.writeFooter(s, &foot); err != nil {
		return x, nil // the data are whole; the footer can wait
	}
	s.mu.Lock()
	s.mu.footerBad = false
	s.mu.Unlock()
	n.log.Info("footer written anew", "seg", s.id)
	return x, nil
}

// Fetch implements wire.Node.
func (n *Node) Fetch(ctx context.Context, id atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	if err := n.begin(ctx); err != nil {
		return nil, fmt.Errorf("fetch segment %v: %w", id, err)
	}
	defer n.calls.end()
	s, x, i, err := n.batchAt(id, at)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	end, limit := at, int64(at)+int64(min(max, maxAnswer))/atoll.BlockSize
	for ; i < len(x.batches); i++ {
		next := x.end(i)
		if end > at && int64(next) > limit {
			break
		}
		end = next
	}
	buf := host.Alloc(int((end - at).Bytes()))
	if end == at {
		return buf, nil
	}
	if err := n.readBlocks(s, at, buf.Bytes(), nil); err != nil {
		buf.Release()
		return nil, fmt.Errorf("fetch: %w", err)
	}
	n.metrics.didRead(len(buf.Bytes()))
	return buf, nil
}

// end returns the block after batch i.
func (x index) end(i int) atoll.BlockNo {
	if i+1 < len(x.batches) {
		return x.batches[i+1]
	}
	return atoll.BlockNo(len(x.crcs))
}

// batchAt finds the batch that begins at block at; at the end of the segment i
// is the number of batches.
func (n *Node) batchAt(id atoll.SegmentID, at atoll.BlockNo) (s *seg, x index, i int, err error) {
	if s, err = n.lookup(id); err != nil {
		return nil, x, 0, err
	}
	if x, err = n.index(s); err != nil {
		return nil, x, 0, err
	}
	i, ok := slices.BinarySearch(x.batches, at)
	switch {
	case int(at) > len(x.crcs):
		err = fmt.Errorf("segment %v ends at block %d, not at %d: %w", id, len(x.crcs), at, atoll.ErrNotExist)
	case !ok && int(at) < len(x.crcs) && x.isLost(at):
		err = fmt.Errorf("segment %v: block %d: %w", id, at, atoll.ErrCorrupt)
	case !ok && int(at) < len(x.crcs):
		err = fmt.Errorf("segment %v: no batch begins at block %d: %w", id, at, atoll.ErrInvalid)
	}
	return s, x, i, err
}

// indexSpan is how many blocks Index reads at once, and indexSparse how many
// blocks a batch may have for reading its payload with it to be cheaper than a
// read of its own.
const (
	indexSpan   = 256
	indexSparse = 16
)

// Index implements wire.Node.
func (n *Node) Index(ctx context.Context, id atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error) {
	if err := n.begin(ctx); err != nil {
		return nil, fmt.Errorf("index of segment %v: %w", id, err)
	}
	defer n.calls.end()
	s, x, i, err := n.batchAt(id, at)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	list := x.batches[i:min(len(x.batches), i+min(max, maxAnswer/atoll.BlockSize))]
	buf := host.Alloc(len(list) * atoll.BlockSize)
	span := host.Alloc(indexSpan * atoll.BlockSize)
	defer span.Release()
	for p := buf.Bytes(); len(list) > 0; {
		k := 1
		for k < len(list) && list[k]-list[k-1] <= indexSparse && list[k]-list[0] < indexSpan {
			k++
		}
		if err := n.readHeaders(s, x, list[:k], p, span.Bytes()); err != nil {
			buf.Release()
			return nil, fmt.Errorf("index: %w", err)
		}
		list, p = list[k:], p[k*atoll.BlockSize:]
	}
	return buf, nil
}

// readHeaders reads the header blocks in list, which lie close together, into
// p, by one read into span.
func (n *Node) readHeaders(s *seg, x index, list []atoll.BlockNo, p, span []byte) error {
	first, last := list[0], list[len(list)-1]
	span = span[:(last - first + 1).Bytes()]
	if err := n.readRaw(s, first, span); err != nil {
		return err
	}
	for i, b := range list {
		q := p[i*atoll.BlockSize:][:atoll.BlockSize]
		copy(q, span[(b-first).Bytes():])
		if segment.CRC(q) != x.crcs[b] {
			return n.corrupt(s, x, b, q)
		}
	}
	return nil
}

// List implements wire.Node.
func (n *Node) List(ctx context.Context, after atoll.SegmentID, max int) ([]wire.SegmentInfo, error) {
	if err := n.begin(ctx); err != nil {
		return nil, fmt.Errorf("list segments: %w", err)
	}
	defer n.calls.end()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.sorted == nil {
		n.mu.sorted = make([]atoll.SegmentID, 0, len(n.mu.segs))
		for id := range n.mu.segs {
			n.mu.sorted = append(n.mu.sorted, id)
		}
		slices.SortFunc(n.mu.sorted, compareIDs)
	}
	i, found := slices.BinarySearchFunc(n.mu.sorted, after, compareIDs)
	if found {
		i++
	}
	var out []wire.SegmentInfo
	for ; i < len(n.mu.sorted) && len(out) < max; i++ {
		out = append(out, n.mu.segs[n.mu.sorted[i]].info())
	}
	return out, nil
}

func (s *seg) info() wire.SegmentInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := &s.mu
	in := wire.SegmentInfo{
		Seg: s.id, Length: m.tail.next, Size: m.st.size, Sealed: m.st.flags&sealed != 0,
		Damaged: m.damaged || m.missing, Epoch: max(m.st.epoch, m.tail.epoch),
	}
	if in.Sealed {
		in.Length = m.st.length
	}
	return in
}

// Stat implements wire.Node.
func (n *Node) Stat(ctx context.Context) (wire.Stat, error) {
	if err := n.begin(ctx); err != nil {
		return wire.Stat{}, fmt.Errorf("stat node: %w", err)
	}
	defer n.calls.end()
	sp, err := n.space()
	if err != nil {
		return wire.Stat{}, fmt.Errorf("stat node %v: %w", n.id.Node, err)
	}
	ready := n.slots.bytes() // free slots are room for segments
	n.mu.Lock()
	all, open := len(n.mu.segs), n.openSegments()
	n.mu.Unlock()
	return wire.Stat{
		Cluster: n.id.Cluster, Node: n.id.Node, Disk: n.id.Disk, Incarnation: n.id.Incarnation,
		Total: sp.total, Free: max(0, sp.free+ready), Segments: all, Open: open,
		ReadOnly: n.diskErrors.Load() >= maxDiskErrors,
		Full:     n.full.Load() || !sp.fits(n.slots.usual.Bytes()-ready, atoll.HighWaterPercent),
		Errors:   n.diskErrors.Load() + n.readErrors.Load(), AppendP99: n.recent.p99(),
	}, nil
}
