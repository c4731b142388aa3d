package node

import (
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

// load builds the map of segments from the states and the files (S3, S4). It
// brings the states up to date for the states file that is written next.
func (n *Node) load(loaded *loadedStates) error {
	files, err := n.fs.List(segmentsDir)
	if err != nil {
		return err
	}
	there := make(map[atoll.SegmentID]int64, len(files))
	for _, f := range files {
		id, ok := parseSegmentName(f.Name)
		if !ok || f.Dir {
			n.log.Warn("unknown file left alone", "name", segmentsDir+"/"+f.Name)
			continue
		}
		there[id] = f.Size
		st, known := loaded.all[id]
		if known && st.flags&deleted != 0 {
			if err := n.fs.Remove(segmentPath(id)); err != nil {
				return err
			}
			continue
		}
		if !known || st.flags&exists == 0 {
			st.id, st.flags = id, st.flags|exists|unclean
			st.size = atoll.BlockNo(min(max(f.Size/atoll.BlockSize, atoll.SegmentBlocks), atoll.MaxSegmentBlocks))
		}
		loaded.all[id] = st
	}
	for id, st := range loaded.all {
		if st.flags&exists == 0 {
			continue
		}
		if st.flags&sealed == 0 && !loaded.clean {
			st.flags |= unclean
		}
		if st.flags&sealed == 0 && loaded.doubt {
			st.flags |= doubtful
		}
		_, ok := there[id]
		loaded.all[id] = n.loadSegment(st, ok)
	}
	return nil
}

// loadSegment reads how a segment ends and puts it into the map. It returns its
// state, which says that it is sealed if its footer says so.
func (n *Node) loadSegment(st state, there bool) state {
	s := &seg{id: st.id}
	m := &s.mu
	m.st = st
	n.mu.segs[st.id] = s
	n.mu.used += st.size.Bytes()
	if !there {
		n.log.Error("segment file is missing; it will be repaired from other copies", "seg", st.id)
		m.missing, m.damaged = true, true
		return st
	}
	f, err := n.fs.Open(segmentPath(st.id))
	if err != nil {
		n.log.Error("segment cannot be opened", "seg", st.id, "err", err)
		m.missing, m.damaged = true, true
		return st
	}
	defer f.Close()
	if st.flags&sealed != 0 {
		foot, err := readFooterHead(f, st)
		m.tail = tail{next: st.length, sum: foot.Sum, epoch: foot.Epoch, seq: foot.Seq}
		m.footerBad = err != nil
		if err != nil {
			n.log.Warn("footer is damaged; the segment will be read through", "seg", st.id, "err", err)
		}
		if size, err := f.Size(); err == nil {
			if _, worth := s.shrunk(); worth || size > st.size.Bytes() {
				n.shrinking.add(st.id)
			}
		}
		return st
	}
	n.scan(s, f)
	return m.st
}

// scan reads an unsealed segment through.
func (n *Node) scan(s *seg, f host.File) {
	m := &s.mu
	got := segment.Scan(f, s.id, m.st.size)
	m.tail = tail{next: got.Length, sum: got.Sum, epoch: got.Epoch, seq: got.Seq, acked: got.Acked, batches: len(got.Batches)}
	m.ending = got.Ending
	if got.Sealed {
		m.st.flags |= sealed
		m.st.length = got.Length
		n.shrinking.add(s.id)
		return
	}
	if got.Length < m.st.length { // see noteLength
		got.Ending = segment.Damaged
		m.ending = got.Ending
	}
	m.idx = index{crcs: got.CRCs, batches: got.Batches}
	if got.Ending != segment.Whole {
		m.damaged = got.Ending == segment.Damaged
		n.log.Warn("segment does not end cleanly", "seg", s.id, "ending", got.Ending.String(), "len", uint32(got.Length), "later", uint32(got.Later), "err", got.Err)
	}
}

// readFooterHead reads and checks the first block of a footer.
func readFooterHead(f host.File, st state) (segment.Footer, error) {
	buf := host.Alloc(atoll.BlockSize)
	defer buf.Release()
	if _, err := f.ReadAt(buf.Bytes(), st.length.Bytes()); err != nil {
		return segment.Footer{}, err
	}
	foot, err := segment.ParseFooterHead(buf.Bytes())
	if err == nil && (foot.Segment != st.id || foot.Length != st.length) {
		err = fmt.Errorf("footer is of segment %v, length %d: %w", foot.Segment, foot.Length, atoll.ErrCorrupt)
	}
	return foot, err
}
