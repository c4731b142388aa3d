package node

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

const (
	fillPiece  = 1 << 20
	fillPrefix = "fill-"
	fillPause  = 20 * time.Millisecond  // between pieces while appends arrive
	fillBusy   = 100 * time.Millisecond // an append so recent means busy
	fillRetry  = 5 * time.Second        // after an error or on a full disk
	fillHeavy  = 2 << 20                // bytes appended in a pause from which filling waits
	fillWait   = 50                     // pauses that it waits for at most

	keepFactor = 4                // recycled slots are kept up to this many times Spare,
	keepHalf   = 10 * time.Minute // and as many as were wanted lately, with this half-life
	keepShare  = 2                // but no more than this part of the free space
	patchShare = 8                // recycle writes at most this part of a file
	trimPause  = 2 * time.Second  // between slots that are given back

	// fillBelow is how full a disk may be, in percent, for slots to be made in
	// advance. Beyond it they come from what is deleted: what is written twice
	// there would have to be won twice.
	fillBelow = 75
)

// slots are files of the sizes of segments, every block of which has been
// written, so that writing them again changes nothing but contents. That is
// worth much: no journal, one flush for all, and on many disks, which find room
// for a block when it is written first, twice the speed. So under a load that
// frees as much as it takes, nearly every segment should come from a slot.
type slots struct {
	n     *Node
	usual atoll.BlockNo // size that is made in advance
	wake  chan struct{}
	mu    struct {
		sync.Mutex
		free   []slot
		bytes  int64 // of them
		next   int
		wanted float64   // bytes asked for, the older the less they count
		as     time.Time // when wanted was right
	}
}

type slot struct {
	path string
	size atoll.BlockNo
}

// slotSize reports whether files of a size become slots.
func slotSize(n atoll.BlockNo) bool {
	for i := range atoll.SegmentSizes {
		if n == atoll.SegmentSize(i) {
			return true
		}
	}
	return false
}

// openSlots lists the slots; what was not filled to the end is removed.
func openSlots(n *Node) (*slots, error) {
	sp, err := n.space()
	if err != nil {
		return nil, err
	}
	s := &slots{n: n, usual: atoll.SegmentFor(sp.total), wake: make(chan struct{}, 1)}
	files, err := n.fs.List(slotsDir)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		path := slotsDir + "/" + f.Name
		num, err := strconv.Atoi(f.Name)
		size := atoll.BlockNo(f.Size / atoll.BlockSize)
		if err != nil || size.Bytes() != f.Size || !slotSize(size) || n.opts.NoPrewrite {
			if strings.HasPrefix(f.Name, fillPrefix) || err == nil {
				if err := n.fs.Remove(path); err != nil {
					return nil, err
				}
			}
			continue
		}
		s.mu.next = max(s.mu.next, num+1)
		s.mu.free = append(s.mu.free, slot{path, size})
		s.mu.bytes += f.Size
	}
	n.mu.used += s.mu.bytes
	return s, nil
}

// ready returns the number of free slots of the usual size.
func (s *slots) ready() (count int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.mu.free {
		if s.mu.free[i].size == s.usual {
			count++
		}
	}
	return count
}

// count returns the number of free slots.
func (s *slots) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.mu.free)
}

// bytes returns what all free slots take.
func (s *slots) bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.bytes
}

// demand returns how many bytes of slots were asked for lately. s.mu is held.
func (s *slots) demand(now time.Time) float64 {
	if s.mu.wanted > 0 {
		s.mu.wanted *= math.Exp2(-now.Sub(s.mu.as).Seconds() / keepHalf.Seconds())
	}
	s.mu.as = now
	return s.mu.wanted
}

// keep returns how many bytes of slots are worth keeping: a few, and as many as
// were asked for lately while the disk has room. When it has not, what is
// deleted must free space.
func (s *slots) keep() int64 {
	least := int64(s.n.opts.Spare) * s.usual.Bytes()
	if least == 0 {
		return 0
	}
	s.mu.Lock()
	most := keepFactor*least + int64(s.demand(time.Now()))
	s.mu.Unlock()
	sp, err := s.n.space()
	if err != nil {
		return least
	}
	return max(least, min(most, sp.free/keepShare))
}

// take returns the path of a free slot of a size, "" if there is none, and wakes
// the filler.
func (s *slots) take(size atoll.BlockNo) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.wanted = s.demand(time.Now()) + float64(size.Bytes())
	select {
	case s.wake <- struct{}{}:
	default:
	}
	for k := len(s.mu.free) - 1; k >= 0; k-- {
		if s.mu.free[k].size == size {
			return s.pick(k).path
		}
	}
	return ""
}

// pick takes a free slot out. s.mu is held.
func (s *slots) pick(k int) slot {
	one := s.mu.free[k]
	s.mu.free = slices.Delete(s.mu.free, k, k+1)
	s.mu.bytes -= one.size.Bytes()
	s.n.metrics.count(0, 0, -1)
	return one
}

// name returns the path of a new slot.
func (s *slots) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := fmt.Sprintf("%s/%08d", slotsDir, s.mu.next)
	s.mu.next++
	return path
}

func (s *slots) add(path string, size atoll.BlockNo) {
	s.mu.Lock()
	s.mu.free = append(s.mu.free, slot{path, size})
	s.mu.bytes += size.Bytes()
	s.mu.Unlock()
	s.n.metrics.count(0, 0, 1)
}

// recycle makes the file of a deleted segment a slot again if that is cheap, and
// removes it otherwise.
func (s *slots) recycle(id atoll.SegmentID, st state) error {
	n := s.n
	if s.bytes()+st.size.Bytes() > s.keep() || !s.patch(id, st) {
		if err := n.fs.Remove(segmentPath(id)); err != nil {
			return err
		}
		return n.fs.SyncDir(segmentsDir)
	}
	path := s.name()
	if err := n.fs.Rename(segmentPath(id), path); err != nil {
		return err
	}
	if err := errors.Join(n.fs.SyncDir(slotsDir), n.fs.SyncDir(segmentsDir)); err != nil {
		return err
	}
	n.mu.Lock()
	n.mu.used += st.size.Bytes()
	n.mu.Unlock()
	s.add(path, st.size)
	return nil
}

// patch sees to it that every block of a deleted segment's file has been
// written, and reports whether that is so. A segment that grew was written up to
// its end only.
func (s *slots) patch(id atoll.SegmentID, st state) bool {
	if st.flags&punched != 0 || !slotSize(st.size) {
		return false
	}
	if st.flags&prewritten != 0 {
		return true
	}
	from, end := st.length.Bytes(), st.size.Bytes()
	if st.flags&sealed == 0 || end-from > end/patchShare {
		return false
	}
	f, err := s.n.fs.Open(segmentPath(id))
	if err == nil {
		err = errors.Join(writeZeros(f, from, end, nil), f.Close())
	}
	if err != nil {
		s.n.log.Debug("deleted segment not recycled", "seg", id, "err", err)
	}
	return err == nil
}

// trim gives back one slot if there are more than are worth keeping.
func (s *slots) trim() {
	if s.bytes() > s.keep() {
		s.drop()
	}
}

// drop gives a free slot's room back; false if there is none.
func (s *slots) drop() bool {
	s.mu.Lock()
	if len(s.mu.free) == 0 {
		s.mu.Unlock()
		return false
	}
	one := s.pick(len(s.mu.free) - 1)
	s.mu.Unlock()
	if err := s.n.fs.Remove(one.path); err != nil {
		s.n.log.Warn("slot not removed", "name", one.path, "err", err)
		return false
	}
	s.n.unreserve(one.size)
	return true
}

// loop keeps Spare slots ready. It writes in small pieces, and slowly while
// appends arrive.
func (s *slots) loop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	tick := time.NewTicker(trimPause)
	defer tick.Stop()
	for {
		select {
		case <-s.n.stop:
			return
		case <-s.wake:
		case <-timer.C:
		case <-tick.C:
			s.n.shrinkAll()
			s.n.lookForRoom()
			s.trim()
			continue
		}
		for s.ready() < s.n.opts.Spare && s.n.stopped() == nil {
			if err := s.fill(); err != nil {
				if s.n.stopped() == nil {
					s.n.log.Debug("no slot filled", "err", err)
				}
				timer.Reset(fillRetry)
				break
			}
		}
	}
}

// fill makes one slot.
func (s *slots) fill() error {
	n := s.n
	if err := n.refuseWrites(); err != nil {
		return err
	}
	size := s.usual.Bytes()
	if err := n.reserveBytes(size, fillBelow); err != nil {
		return err
	}
	path := s.name()
	tmp := slotsDir + "/" + fillPrefix + path[len(slotsDir)+1:]
	err := s.writeSlot(tmp)
	if err == nil {
		err = n.fs.Rename(tmp, path)
	}
	if err == nil {
		err = n.fs.SyncDir(slotsDir)
	}
	if err != nil {
		n.unreserveBytes(size)
		return errors.Join(err, n.fs.Remove(tmp))
	}
	s.add(path, s.usual)
	return nil
}

func (s *slots) writeSlot(path string) (err error) {
	f, err := s.n.fs.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return writeZeros(f, 0, s.usual.Bytes(), s.yield)
}

// writeZeros fills a file from an offset to another, durably. It calls pause, if
// there is one, before each piece.
func writeZeros(f host.File, from, end int64, pause func() error) error {
	buf := host.Alloc(fillPiece)
	defer buf.Release()
	clear(buf.Bytes())
	for off := from; off < end; off += fillPiece {
		if pause != nil {
			if err := pause(); err != nil {
				return err
			}
		}
		if _, err := f.WriteAt(buf.Bytes()[:min(fillPiece, end-off)], off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// yield waits a little while appends arrive, longer while they are large, and as
// long as the node is paused.
func (s *slots) yield() error {
	if err := s.n.waitResumed(); err != nil {
		return err
	}
	timer := time.NewTimer(fillPause)
	defer timer.Stop()
	for range fillWait {
		if time.Now().UnixNano()-s.n.lastAppend.Load() >= int64(fillBusy) {
			break
		}
		before := s.n.appended.Load()
		timer.Reset(fillPause)
		select {
		case <-timer.C:
		case <-s.n.stop:
		}
		if s.n.stopped() != nil || s.n.appended.Load()-before < fillHeavy {
			break
		}
	}
	return s.n.stopped()
}
