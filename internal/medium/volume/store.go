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
	// Info returns the medium's record.
	Info() catalog.Medium
	// Update changes the medium's record.
	Update(ctx context.Context, change func(*catalog.Medium)) error
	// Valid reports whether this process may serve the medium now.
	Valid() bool

	// Root returns the root of the last checkpoint, nil if there was none.
	Root() []byte
	// Replay gives the hot lane's records since then, in order.
	Replay(ctx context.Context, fn func(medium.Record) error) error
	// Mark returns the present end of the log.
	Mark() medium.Mark
	// Checkpoint makes root the root and moves the start of Replay to mark.
	Checkpoint(ctx context.Context, mark medium.Mark, root []byte) error
	// Live tells that delta more blocks of a segment are referenced.
	Live(o atoll.Ordinal, delta int)

	// NewEntry returns an entry for Submit, to be used again and again.
	NewEntry() Entry
	// Submit queues an entry made by NewEntry; its Wait tells the outcome.
	Submit(ctx context.Context, lane catalog.Lane, e Entry) error
	// Read fills dst with whole blocks.
	Read(ctx context.Context, o atoll.Ordinal, block atoll.BlockNo, dst []byte) error
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
