package wire

import (
	"context"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// Reserve is added to the size of a segment that Create is to make, when it may
// take the room that is kept for what frees space.
const Reserve atoll.BlockNo = 1 << 31

// Node is a storage node as writers, readers and the controller see it: the
// node itself when it lives in this process, or a connection to it. Both behave
// alike. All methods may be called concurrently; every wait ends with the
// context or after atoll.RequestTimeout.
//
// A node knows segments and epochs, nothing of media, names or paths.
type Node interface {
	// Append queues a batch and returns at once; the outcome comes on a.Done.
	// Batches of one segment must be started in the order of their offsets. The
	// node holds a reference on a.Vec until it needs the bytes no more, which
	// may be after the answer.
	Append(a *Append)

	// Create makes an empty segment of at most blocks blocks. Making one that
	// is there already and empty, under the same epoch, is no error. Durable on
	// return. With the bit Reserve in blocks it may fill the disk beyond the
	// high-water mark, up to atoll.ReservePercent. ErrFenced, ErrNoSpace
	// (high-water mark), ErrReadOnly, ErrExist.
	Create(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, blocks atoll.BlockNo) error

	// Fence makes the node refuse appends to seg under epochs below epoch, for
	// ever, also if it has never seen seg; and tells, in the same step, what it
	// holds. The fence is durable on return. ErrFenced if a higher one stands.
	Fence(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) (Tail, error)

	// Extend writes whole encoded batches at the end of a fenced segment, on
	// behalf of a recovering owner. raw is what Fetch returned elsewhere. An
	// offset below the length with equal bytes is no error. Durable on return.
	Extend(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, at atoll.BlockNo, raw []byte) error

	// Seal fixes the length for ever, drops what lies beyond it, and writes the
	// footer. Sealing again at the same length is no error; at another length
	// it is ErrSealed. A copy that is shorter than length answers ErrGap.
	Seal(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch, length atoll.BlockNo) error

	// Read fills dst (whole blocks) from block on, verified against the stored
	// checksums. ErrCorrupt names a damaged copy; ErrNotExist beyond its end.
	Read(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte) error

	// Fetch returns whole encoded batches (header and payload, verified) from
	// the batch that begins at block at, up to max bytes but at least one; empty
	// at the end. It is for repair and recovery. The caller releases the buffer.
	Fetch(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error)

	// Index returns the batch headers (one block each, verified, concatenated)
	// of the segment from the batch at block at, up to max headers; empty at
	// the end. Recovery replays them. The caller releases the buffer.
	Index(ctx context.Context, seg atoll.SegmentID, at atoll.BlockNo, max int) (*host.Buffer, error)

	// Repair overwrites blocks with the right bytes taken from another copy:
	// they must match the checksums this node holds for them, or, for a damaged
	// header or index, form whole valid batches. Durable on return.
	Repair(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, p []byte) error

	// Discard frees runs of dead blocks of a sealed segment.
	Discard(ctx context.Context, seg atoll.SegmentID, runs []Run) error

	// Delete removes a segment and leaves a fence at epoch, so that a late
	// append or create cannot bring it back. Absent is no error.
	Delete(ctx context.Context, seg atoll.SegmentID, epoch atoll.Epoch) error

	// List returns up to max segments in ascending order after the given id.
	List(ctx context.Context, after atoll.SegmentID, max int) ([]SegmentInfo, error)

	// Stat returns the node's identity, space and health.
	Stat(ctx context.Context) (Stat, error)

	// Verify reads the whole segment and checks every checksum.
	Verify(ctx context.Context, seg atoll.SegmentID) (VerifyResult, error)
}

// Summer is a Node that tells the checksums of what it read. Who needs them for
// checks of its own, in the same memory, need not compute them once more.
type Summer interface {
	Node
	// ReadSums is Read, and sets sums, one for each block, to the CRC32C of each.
	ReadSums(ctx context.Context, seg atoll.SegmentID, block atoll.BlockNo, dst []byte, sums []uint32) error
}

// Direct is a Node whose appends the sender can carry out itself. That spares the
// switches between goroutines when nothing else is to be done.
type Direct interface {
	Node
	// Direct takes list[i] for nodes[i], of which this node is one, as Append
	// would, if all can be carried out at once and nothing else is queued or at
	// work there; Done is not used. The caller must then call Run of the result
	// soon: until then others wait. Nil means that nothing was taken.
	Direct(nodes []Node, list []Append) Round
}

// Round is what Direct took.
type Round interface {
	// Run carries out the appends and sets their answers. It waits for disks as
	// long as they take.
	Run()
}

// Append is one batch on its way to one node. The sender fills the upper fields
// and keeps the struct until it comes back on Done; it may then reuse it.
type Append struct {
	Seg    atoll.SegmentID
	Epoch  atoll.Epoch
	Offset atoll.BlockNo  // of the batch's header
	Vec    *host.Vec      // header block and payload, identical on all copies
	Done   chan<- *Append // must have room for every append in flight

	// The answer. Err is nil when the batch is on stable storage.
	// ErrFenced, ErrSealed, ErrGap, ErrNoSpace, ErrIO, ErrUnreachable, ErrBusy…
	Err    error
	Queued time.Duration // waiting in the node for its commit
	Commit time.Duration // write and flush
	User   uint64        // for the sender
	Node   atoll.NodeID  // for the sender
}

// Grade says how far a node can vouch for what it holds of a segment.
type Grade uint8

// Grades, from worthless to best. Recovery uses the length of every grade from
// Torn on; a lone answer counts only when it is Clean.
const (
	// Unknown: another or an emptied disk, damage below data known to have been
	// acknowledged, or a read error. The length means nothing.
	Unknown Grade = iota
	// Absent: the right disk, intact, but no such segment; length 0.
	Absent
	// Torn: a bad batch with a valid later one behind it, as a power cut leaves
	// it, or as damage does. The length is where the bad batch begins.
	Torn
	// Intact: every batch is whole, but the node was restarted uncleanly since
	// the segment was made.
	Intact
	// Clean: every batch is whole and the node ran or stopped cleanly since.
	Clean
)

// String returns the grade's name in lower case.
func (g Grade) String() string {
	names := [...]string{"unknown", "absent", "torn", "intact", "clean"}
	if int(g) < len(names) {
		return names[g]
	}
	return "invalid"
}

// Tail is what a node holds of a segment.
type Tail struct {
	Grade  Grade
	Length atoll.BlockNo // end of the last whole batch
	Sealed bool          // Length is the sealed length
	Epoch  atoll.Epoch   // highest epoch fenced or written
	Sum    uint32        // checksum of the last batch header, 0 if none
	Seq    uint64        // sequence number after the last record
}

// Run is a range of blocks.
type Run struct {
	Block  atoll.BlockNo
	Blocks atoll.BlockNo
}

// SegmentInfo is one line of a node's inventory.
type SegmentInfo struct {
	Seg     atoll.SegmentID
	Length  atoll.BlockNo
	Size    atoll.BlockNo // blocks it occupies on disk
	Sealed  bool
	Damaged bool
	Epoch   atoll.Epoch
}

// Stat is a node's report of itself.
type Stat struct {
	Cluster     atoll.UUID
	Node        atoll.NodeID
	Disk        atoll.UUID // identity of the disk
	Incarnation atoll.UUID // changes when the disk is formatted anew
	Total, Free int64      // bytes
	Segments    int
	Open        int  // unsealed
	ReadOnly    bool // an I/O error turned it read-only
	Full        bool // above the high-water mark
	Errors      uint64
	AppendP99   time.Duration
}

// VerifyResult is what Verify found.
type VerifyResult struct {
	Blocks  atoll.BlockNo // read
	Damaged []Run
}
