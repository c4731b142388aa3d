package node

import (
	"errors"
	"fmt"
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
	keepFactor = 4                      // recycled slots are kept up to this many times Spare
)

// slots are files of SegmentBlocks blocks, every block of which has been
// written, so that writing them again changes nothing but contents.
type slots struct {
	n    *Node
	wake chan struct{}
	mu   struct {
		sync.Mutex
		free []string // paths
		next int
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

// take returns the path of a free slot, "" if there is none, and wakes the
// filler.
func (s *slots) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
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

// recycle makes the file of a deleted segment a slot again if every block of it
// was written, and removes it otherwise.
func (s *slots) recycle(id atoll.SegmentID, st state) error {
	n := s.n
	whole := st.flags&(prewritten|punched) == prewritten && st.size == atoll.SegmentBlocks
	if !whole || s.ready() >= keepFactor*n.opts.Spare {
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

// loop keeps Spare slots ready. It writes in small pieces, and slowly while
// appends arrive.
func (s *slots) loop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.n.stop:
			return
		case <-s.wake:
		case <-timer.C:
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
	if _, err := n.reserveBytes(slotBytes); err != nil {
		return err
	}
	path := s.name()
	tmp := slotsDir + "/" + fillPrefix + path[len(slotsDir)+1:]
	err := s.writeZeros(tmp)
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

func (s *slots) writeZeros(path string) (err error) {
	f, err := s.n.fs.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := host.Alloc(fillPiece)
	defer buf.Release()
	clear(buf.Bytes())
	for off := int64(0); off < slotBytes; off += fillPiece {
		if err := s.yield(); err != nil {
			return err
		}
		if _, err := f.WriteAt(buf.Bytes(), off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// yield waits a little while appends arrive, and as long as the node is paused.
func (s *slots) yield() error {
	if err := s.n.waitResumed(); err != nil {
		return err
	}
	if time.Now().UnixNano()-s.n.lastAppend.Load() < int64(fillBusy) {
		timer := time.NewTimer(fillPause)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-s.n.stop:
		}
	}
	return s.n.stopped()
}
