package volume

import (
	"context"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
)

// Store is the medium under a volume: its log, its root and its counts. The
// real one is OnMedium; tests have one in memory. All methods may be called
// concurrently, and mean what the methods of medium.Medium of the same name do.
type Store interface {
	Reader
	// Update changes the medium's record.
	Update(ctx context.Context, change func(*catalog.Medium)) error
	// Replay gives the hot lane's records since then, in order.
	Replay(ctx context.Context, fn func(medium.Record) error) error
	// Mark returns the present end of the log.
	Mark() medium.Mark
	// AppendMark appends an entry of one record, durably, and returns the mark
	// at it.
	AppendMark(ctx context.Context, e Entry) (medium.Mark, error)
	// MarkAt returns the mark at a record that Replay gave.
	MarkAt(r medium.Record) medium.Mark
	// Commit changes root, mark and versions at once.
	Commit(ctx context.Context, c medium.Commit) error
	// Edit changes what is said of versions.
	Edit(ctx context.Context, change func(*medium.State) error) error
	// NewVersionNumber gives out the next number; UseVersionNumber tells of one
	// that the log has.
	NewVersionNumber() uint64
	UseVersionNumber(n uint64)
	// Pins tells which versions are held by clones and readers.
	Pins(ctx context.Context) (map[uint64]int, error)
	// Detach gives up the ancestors.
	Detach(ctx context.Context) error
	// Live tells that delta more blocks of a segment are referenced.
	Live(o atoll.Ordinal, delta int)

	// NewEntry returns an entry for Submit, to be used again and again.
	NewEntry() Entry
	// Submit queues an entry made by NewEntry; its Wait tells the outcome.
	Submit(ctx context.Context, lane catalog.Lane, e Entry) error
	// Append is Submit and Wait; alone it is quicker than these.
	Append(ctx context.Context, lane catalog.Lane, e Entry) error

	// Victims lists segments worth compacting, best first; Placed tells what
	// lies in one, and Move copies what is live of that elsewhere.
	Victims(max int) []medium.Victim
	Placed(ctx context.Context, o atoll.Ordinal, fn func(medium.Placed) error) error
	Move(ctx context.Context, o atoll.Ordinal, live []medium.Run) error
	// Room tells what space there is, and Reclaimable how many bytes compaction
	// and the end of grace times may still give back.
	Room() medium.Room
	Reclaimable() int64
	// Waiting tells how many bytes only a checkpoint makes reclaimable.
	Waiting() int64
}

// Reader is the part of a medium that reading takes.
type Reader interface {
	// Info returns the medium's record.
	Info() catalog.Medium
	// Valid reports whether this process may serve the medium now.
	Valid() bool
	// Root returns the root of the last checkpoint before it was opened, or of
	// the version that is read, nil if there was none.
	Root() []byte
	// State returns the versions as of the last manifest.
	State() medium.State
	// ReadRoot returns the root of a version.
	ReadRoot(ctx context.Context, number uint64) ([]byte, error)
	// Read fills dst with whole blocks, of ancestors' segments as well.
	Read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte) error
	// ReadSums is Read, and sets sums, one for each block, to the checksum of each.
	ReadSums(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte, sums []uint32) error
	// Ancestor tells whose segment an ordinal is.
	Ancestor(o atoll.Ordinal) (atoll.MediumID, bool)
}

// ViewStore is a version of a medium that is read without owning it; the real
// one is medium.View.
type ViewStore interface {
	Reader
	Version() medium.Version
}

// Entry is one atomic append, as stream.Entry describes it.
type Entry interface {
	Reset()
	Room(records, blocks int) bool
	Add(rec segment.Record, buf *host.Buffer, data []byte)
	Records() int
	Blocks() int
	CRC(block int) uint32
	Wait(ctx context.Context) error
	Seg() atoll.SegmentID
	Block(record int) atoll.BlockNo
}
