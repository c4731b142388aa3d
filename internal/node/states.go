package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

// The states file is a log of what must outlive a crash of each segment id:
// its fence, whether it exists, was deleted or sealed. The last entry of an id
// stands. It is written anew at each open and when it has grown, to a new file
// that replaces it. It is made of blocks, all numbers little-endian:
//
//	off  size
//	  0     4  magic "ATST"
//	  4     1  version (1)
//	  5     1  flags: 1 clean stop, 2 doubt (an earlier states file was damaged)
//	  6     2  number of entries, at most 63
//	  8     4  CRC32C of the block, this field taken as zero
//	 12     4  blocks of the file known to be durable when this was written
//	 16     8  generation: one more than that of the file it replaced
//	 24     8  block number
//	 32    32  0
//	 64  64*n  entries
//
// An entry:
//
//	 0     2  flags, below
//	 2     2  0
//	 4     4  size of the segment in blocks
//	 8    16  segment: medium (8), ordinal (4), copyset (4)
//	24     8  fence: lower epochs are refused
//	32     4  sealed length in blocks
//	36    28  0
//
// Reading stops at the first block that is not valid, of another generation or
// at another place. If a later one of the same generation says that it was
// durable, the file is damaged: fences may be lost, so the node doubts all that
// it does not find sealed.
const (
	statesMagic   = 0x54535441 // "ATST"
	statesVersion = 1
	statesHead    = 64
	stateSize     = 64
	statesPer     = (atoll.BlockSize - statesHead) / stateSize

	blockClean = 1
	blockDoubt = 2
)

// stateFlags say what is known of a segment id.
type stateFlags uint16

const (
	exists     stateFlags = 1 << iota // there is a file
	deleted                           // it was deleted: the file goes at open
	sealed                            // length is fixed
	unclean                           // the node stopped uncleanly since it was made
	prewritten                        // its file came from a slot
	punched                           // blocks were discarded
	doubtful                          // its fence may have been lost
)

// state is what must outlive a crash of one segment id.
type state struct {
	id     atoll.SegmentID
	flags  stateFlags
	size   atoll.BlockNo
	epoch  atoll.Epoch
	length atoll.BlockNo
}

var le = binary.LittleEndian

func (s *state) encode(p []byte) {
	clear(p[:stateSize])
	le.PutUint16(p, uint16(s.flags))
	le.PutUint32(p[4:], uint32(s.size))
	le.PutUint64(p[8:], uint64(s.id.Medium))
	le.PutUint32(p[16:], uint32(s.id.Ordinal))
	le.PutUint32(p[20:], uint32(s.id.Copyset))
	le.PutUint64(p[24:], uint64(s.epoch))
	le.PutUint32(p[32:], uint32(s.length))
}

func decodeState(p []byte) state {
	return state{
		id: atoll.SegmentID{
			Medium: atoll.MediumID(le.Uint64(p[8:])), Ordinal: atoll.Ordinal(le.Uint32(p[16:])), Copyset: atoll.CopysetID(le.Uint32(p[20:])),
		},
		flags: stateFlags(le.Uint16(p)), size: atoll.BlockNo(le.Uint32(p[4:])),
		epoch: atoll.Epoch(le.Uint64(p[24:])), length: atoll.BlockNo(le.Uint32(p[32:])),
	}
}

// stateBlock is the head of a block of the states file.
type stateBlock struct {
	flags  uint8
	synced uint32
	gen    uint64
	number uint64
}

func (b *stateBlock) encode(p []byte, list []state) {
	clear(p[:statesHead])
	for i := range list {
		list[i].encode(p[statesHead+i*stateSize:])
	}
	clear(p[statesHead+len(list)*stateSize : atoll.BlockSize])
	le.PutUint32(p, statesMagic)
	p[4], p[5] = statesVersion, b.flags
	le.PutUint16(p[6:], uint16(len(list)))
	le.PutUint32(p[12:], b.synced)
	le.PutUint64(p[16:], b.gen)
	le.PutUint64(p[24:], b.number)
	le.PutUint32(p[8:], segment.CRC(p[:atoll.BlockSize]))
}

// parseStateBlock checks the block p and returns its head and entries.
func parseStateBlock(p []byte) (b stateBlock, entries []byte, err error) {
	if len(p) < atoll.BlockSize || le.Uint32(p) != statesMagic {
		return b, nil, fmt.Errorf("parse states: no magic: %w", atoll.ErrCorrupt)
	}
	var tmp [atoll.BlockSize]byte
	copy(tmp[:], p)
	le.PutUint32(tmp[8:], 0)
	n := int(le.Uint16(p[6:]))
	if segment.CRC(tmp[:]) != le.Uint32(p[8:]) || n > statesPer {
		return b, nil, fmt.Errorf("parse states: checksum: %w", atoll.ErrCorrupt)
	}
	if p[4] != statesVersion {
		return b, nil, fmt.Errorf("parse states: version %d, this program knows %d: %w", p[4], statesVersion, atoll.ErrVersion)
	}
	b = stateBlock{flags: p[5], synced: le.Uint32(p[12:]), gen: le.Uint64(p[16:]), number: le.Uint64(p[24:])}
	return b, p[statesHead : statesHead+n*stateSize], nil
}

// loadedStates is what a states file says.
type loadedStates struct {
	all   map[atoll.SegmentID]state
	gen   uint64
	clean bool // the last thing in it is the mark of a clean stop
	doubt bool // entries may be missing
}

// parseStates reads the whole file p.
func parseStates(p []byte) (loadedStates, error) {
	out := loadedStates{all: make(map[atoll.SegmentID]state)}
	i := 0
	for ; len(p) >= (i+1)*atoll.BlockSize; i++ {
		b, entries, err := parseStateBlock(p[i*atoll.BlockSize:])
		if errors.Is(err, atoll.ErrVersion) {
			return out, err
		}
		if err != nil || b.number != uint64(i) || i > 0 && b.gen != out.gen {
			break
		}
		out.gen, out.clean = b.gen, b.flags&blockClean != 0
		out.doubt = out.doubt || b.flags&blockDoubt != 0
		for ; len(entries) > 0; entries = entries[stateSize:] {
			st := decodeState(entries)
			out.all[st.id] = st
		}
	}
	if i == 0 {
		out.doubt = true
	}
	for j := i; len(p) >= (j+1)*atoll.BlockSize; j++ {
		b, _, err := parseStateBlock(p[j*atoll.BlockSize:])
		if err == nil && b.number == uint64(j) && b.gen == out.gen {
			out.clean = false
			out.doubt = out.doubt || int(b.synced) > i
		}
	}
	return out, nil
}

// statesFile and statesNew are the log and its replacement while being written.
const (
	statesFile = "states"
	statesNew  = "states.new"

	statesTail = 64 // blocks written before the log is compacted
)

// stateLog is the open states file and, in memory, the last state of each id.
type stateLog struct {
	fs   host.FS
	turn chan struct{} // held by the one who writes the file

	mu struct {
		sync.Mutex
		all     map[atoll.SegmentID]state
		pending []state
		queued  uint64 // states ever queued
	}

	// Of the holder of turn.
	file    host.File
	gen     uint64
	doubt   bool
	next    int    // block
	limit   int    // blocks before compaction
	synced  int    // blocks that are durable
	durable uint64 // states ever made durable, in order
	err     error  // sticky (S6)
}

// newStateLog writes loaded anew and returns the log. On return the mark of a
// clean stop is gone from the disk (S5).
func newStateLog(fs host.FS, loaded loadedStates) (*stateLog, error) {
	l := &stateLog{fs: fs, turn: make(chan struct{}, 1), gen: loaded.gen, doubt: loaded.doubt}
	l.mu.all = loaded.all
	if err := l.compact(); err != nil {
		if l.file != nil {
			err = errors.Join(err, l.file.Close())
		}
		return nil, err
	}
	return l, nil
}

// get returns the state of id and whether there is one.
func (l *stateLog) get(id atoll.SegmentID) (state, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	st, ok := l.mu.all[id]
	return st, ok
}

// put records st. With durable set it is on stable storage on return, and so is
// all that was recorded before; else it waits in memory for the next that is.
// Many callers share one write.
func (l *stateLog) put(st state, durable bool) error {
	l.mu.Lock()
	l.mu.all[st.id] = st
	l.mu.pending = append(l.mu.pending, st)
	l.mu.queued++
	mine := l.mu.queued
	l.mu.Unlock()
	if !durable {
		return nil
	}
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	if l.durable >= mine {
		return nil
	}
	return l.flush(0)
}

// flush writes what is pending, durably. The caller holds the turn.
func (l *stateLog) flush(flags uint8) error {
	if l.err != nil {
		return l.err
	}
	if l.next >= l.limit {
		return l.compact()
	}
	l.mu.Lock()
	list, upto := l.mu.pending, l.mu.queued
	l.mu.pending = nil
	l.mu.Unlock()
	buf := host.Alloc(max(1, (len(list)+statesPer-1)/statesPer) * atoll.BlockSize)
	defer buf.Release()
	l.encode(buf.Bytes(), list, flags)
	blocks := len(buf.Bytes()) / atoll.BlockSize
	err := l.file.WriteVec([][]byte{buf.Bytes()}, int64(l.next)*atoll.BlockSize, true)
	if err != nil {
		return l.failed(fmt.Errorf("write states: %w", err), list)
	}
	l.next += blocks
	l.durable, l.synced = upto, l.next
	return nil
}

// failed takes note of an error; list was to be written. Want of space passes:
// list waits for the next flush, which writes the same blocks again. Anything
// else is for ever (S6).
func (l *stateLog) failed(err error, list []state) error {
	if !errors.Is(err, atoll.ErrNoSpace) {
		l.err = err
		return err
	}
	l.mu.Lock()
	l.mu.pending = append(list, l.mu.pending...)
	l.mu.Unlock()
	return err
}

// encode fills p with blocks that follow the file's end.
func (l *stateLog) encode(p []byte, list []state, flags uint8) {
	if l.doubt {
		flags |= blockDoubt
	}
	for i := 0; len(p) > 0; i++ {
		n := min(len(list), statesPer)
		b := stateBlock{flags: flags, synced: uint32(l.synced), gen: l.gen, number: uint64(l.next + i)}
		b.encode(p, list[:n])
		p, list = p[atoll.BlockSize:], list[n:]
	}
}

// compact replaces the file by a new one with the last state of each id, and
// room for more that is already written. The caller holds the turn.
func (l *stateLog) compact() error {
	l.mu.Lock()
	list := make([]state, 0, len(l.mu.all))
	for _, st := range l.mu.all {
		list = append(list, st)
	}
	upto, pending := l.mu.queued, l.mu.pending
	l.mu.pending = nil
	l.mu.Unlock()
	slices.SortFunc(list, func(a, b state) int { return compareIDs(a.id, b.id) })
	gen, next, synced, limit, file := l.gen, l.next, l.synced, l.limit, l.file
	if err := l.replace(list); err != nil {
		err = fmt.Errorf("write states anew: %w", err)
		if l.file != file { // half replaced
			l.err = err
			return err
		}
		l.gen, l.next, l.synced, l.limit = gen, next, synced, limit
		return l.failed(err, pending)
	}
	l.durable = upto
	return nil
}

func (l *stateLog) replace(list []state) error {
	if err := l.fs.Remove(statesNew); err != nil && !errors.Is(err, atoll.ErrNotExist) {
		return err
	}
	f, err := l.fs.Create(statesNew)
	if err != nil {
		return err
	}
	blocks := max(1, (len(list)+statesPer-1)/statesPer)
	l.gen, l.next, l.synced = l.gen+1, 0, blocks
	if err := l.fill(f, list, blocks); err != nil {
		f.Close()
		return err
	}
	old := l.file
	l.file = f
	if old != nil {
		if err := old.Close(); err != nil {
			return err
		}
	}
	if err := l.fs.Rename(statesNew, statesFile); err != nil {
		return err
	}
	return l.fs.SyncDir(".")
}

// fill writes list and then zeros, and syncs.
func (l *stateLog) fill(f host.File, list []state, blocks int) error {
	l.limit = blocks + max(statesTail, blocks)
	buf := host.Alloc(64 * atoll.BlockSize)
	defer buf.Release()
	for at := 0; at < l.limit; at += 64 {
		p := buf.Bytes()[:min(64, l.limit-at)*atoll.BlockSize]
		clear(p)
		if n := min(64, blocks-at); n > 0 {
			take := min(len(list), n*statesPer)
			l.encode(p[:n*atoll.BlockSize], list[:take], 0)
			list = list[take:]
			l.next += n
		}
		if err := f.WriteVec([][]byte{p}, int64(at)*atoll.BlockSize, false); err != nil {
			return err
		}
	}
	return f.Sync()
}

// close marks a clean stop if asked to and closes the file.
func (l *stateLog) close(clean bool) error {
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	var err error
	if clean {
		if l.next >= l.limit && l.err == nil {
			err = l.compact()
		}
		if err == nil {
			err = l.flush(blockClean)
		}
	}
	return errors.Join(err, l.file.Close())
}

// readStates loads the states file; a missing one is reported as doubt.
func readStates(fs host.FS) (loadedStates, error) {
	p, err := readFile(fs, statesFile)
	if errors.Is(err, atoll.ErrNotExist) {
		return loadedStates{all: make(map[atoll.SegmentID]state), doubt: true}, nil
	}
	if err != nil {
		return loadedStates{}, err
	}
	return parseStates(p)
}
