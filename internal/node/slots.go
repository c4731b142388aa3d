package node

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

const (
	slotBytes  = atoll.SegmentBlocks * atoll.BlockSize
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
	patchBytes = slotBytes / 8    // what recycle writes at most
	trimPause  = 2 * time.Second  // between slots that are given back
)

// slots are files of SegmentBlocks blocks, every block of which has been
// written, so that writing them again changes nothing but contents. That is
// worth much: no journal, one flush for all, and on many disks, which find room
// for a block when it is written first, twice the speed. So under a load that
// frees as much as it takes, nearly every segment should come from a slot.
type slots struct {
	n    *Node
	wake chan struct{}
	mu   struct {
		sync.Mutex
		free   []string // paths
		next   int
		wanted float64   // slots asked for, the older the less they count
		as     time.Time // when wanted was right
	}
}

// openSlots lists the slots; what was not filled to the end is removed.
func openSlots(n *Node) (*slots, error) {
	s := &slots{n: n, wake: make(chan struct{}, 1)}
	files, err := n.fs.List(slotsDir)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		path := slotsDir + "/" + f.Name
		num, err := strconv.Atoi(f.Name)
		if err != nil || f.Size != slotBytes || n.opts.NoPrewrite {
			if strings.HasPrefix(f.Name, fillPrefix) || err == nil {
				if err := n.fs.Remove(path); err != nil {
					return nil, err
				}
			}
			continue
		}
		s.mu.next = max(s.mu.next, num+1)
		s.mu.free = append(s.mu.free, path)
	}
	n.mu.used += int64(len(s.mu.free)) * slotBytes
	return s, nil
}

// ready returns the number of free slots.
func (s *slots) ready() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.mu.free)
}

// demand returns how many slots were asked for lately. s.mu is held.
func (s *slots) demand(now time.Time) float64 {
	if s.mu.wanted > 0 {
		s.mu.wanted *= math.Exp2(-now.Sub(s.mu.as).Seconds() / keepHalf.Seconds())
	}
	s.mu.as = now
	return s.mu.wanted
}

// keep returns how many slots are worth keeping: a few, and as many as were
// asked for lately while the disk has room. When it has not, what is deleted
// must free space.
func (s *slots) keep() int {
	least := s.n.opts.Spare
	if least == 0 {
		return 0
	}
	s.mu.Lock()
	most := keepFactor*least + int(s.demand(time.Now()))
	s.mu.Unlock()
	sp, err := s.n.space()
	if err != nil {
		return least
	}
	return max(least, min(most, int(sp.free/keepShare/slotBytes)))
}

// take returns the path of a free slot, "" if there is none, and wakes the
// filler.
func (s *slots) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.wanted = s.demand(time.Now()) + 1
	select {
	case s.wake <- struct{}{}:
	default:
	}
	k := len(s.mu.free) - 1
	if k < 0 {
		return ""
	}
	path := s.mu.free[k]
	s.mu.free = s.mu.free[:k]
	s.n.metrics.count(0, 0, -1)
	return path
}

// name returns the path of a new slot.
func (s *slots) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := fmt.Sprintf("%s/%08d", slotsDir, s.mu.next)
	s.mu.next++
	return path
}

func (s *slots) add(path string) {
	s.mu.Lock()
	s.mu.free = append(s.mu.free, path)
	s.mu.Unlock()
	s.n.metrics.count(0, 0, 1)
}

// recycle makes the file of a deleted segment a slot again if that is cheap, and
// removes it otherwise.
func (s *slots) recycle(id atoll.SegmentID, st state) error {
	n := s.n
	if s.ready() >= s.keep() || !s.patch(id, st) {
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
	n.mu.used += slotBytes
	n.mu.Unlock()
	s.add(path)
	return nil
}

// patch sees to it that every block of a deleted segment's file has been
// written, and reports whether that is so. A segment that grew was written up to
// its end only.
func (s *slots) patch(id atoll.SegmentID, st state) bool {
	if st.flags&punched != 0 || st.size != atoll.SegmentBlocks {
		return false
	}
	if st.flags&prewritten != 0 {
		return true
	}
	from := st.length.Bytes()
	if st.flags&sealed == 0 || slotBytes-from > patchBytes {
		return false
	}
	f, err := s.n.fs.Open(segmentPath(id))
	if err == nil {
		err = errors.Join(writeZeros(f, from, nil), f.Close())
	}
	if err != nil {
		s.n.log.Debug("deleted segment not recycled", "seg", id, "err", err)
	}
	return err == nil
}

// trim gives back one slot if there are more than are worth keeping.
func (s *slots) trim() {
	if s.ready() <= s.keep() {
		return
	}
	s.mu.Lock()
	k := len(s.mu.free) - 1
	if k < 0 {
		s.mu.Unlock()
		return
	}
	path := s.mu.free[k]
	s.mu.free = s.mu.free[:k]
	s.mu.Unlock()
	s.n.metrics.count(0, 0, -1)
	if err := s.n.fs.Remove(path); err != nil {
		s.n.log.Warn("slot not removed", "name", path, "err", err)
		return
	}
	s.n.unreserveBytes(slotBytes)
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
	if err := n.reserveBytes(slotBytes, atoll.HighWaterPercent); err != nil {
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
		n.unreserveBytes(slotBytes)
		return errors.Join(err, n.fs.Remove(tmp))
	}
	s.add(path)
	return nil
}

func (s *slots) writeSlot(path string) (err error) {
	f, err := s.n.fs.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return writeZeros(f, 0, s.yield)
}

// writeZeros fills a file from an offset to the length of a slot, durably. It
// calls pause, if there is one, before each piece.
func writeZeros(f host.File, from int64, pause func() error) error {
	buf := host.Alloc(fillPiece)
	defer buf.Release()
	clear(buf.Bytes())
	for off := from; off < slotBytes; off += fillPiece {
		if pause != nil {
			if err := pause(); err != nil {
				return err
			}
		}
		if _, err := f.WriteAt(buf.Bytes()[:min(fillPiece, slotBytes-off)], off); err != nil {
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
