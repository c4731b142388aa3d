// Package volume is the block device: a medium whose pages of 4 KiB are found
// through a map.
//
// # Words
//
// A page is a 4 KiB piece of the volume, a block is one of the log. The map is a
// page table: a leaf of 512 locations covers 2 MiB, a node of 512 leaves 1 GiB,
// and the top has an entry per node. Leaves are loaded on demand and kept under
// a limit; nodes stay (10 KiB per GiB in use).
//
// # Life of a write
//
// The range is locked against other writers, unaligned edges are read, the
// pages go to the log in one entry per 2 MiB, and when that is durable the map
// gets the new locations, without needing to know the old ones. In writeback
// mode the pages wait in memory; one flusher sends them in order.
//
// # Life of a read
//
// Pages not yet flushed come from memory, then the map says where the others
// are: holes are zeros, cached blocks are copied, and runs of neighbouring
// blocks are read at once into the caller's memory. Every block is checked
// against the 16 check bits of its location (its checksum folded with medium
// and page), which catches a right-looking block from the wrong place.
//
// # Checkpoint
//
// The map is frozen as a version, what changed is written to the bulk lane, and
// the root goes to the medium, while writes go on: what they change is copied
// first. A version shares all else, so a snapshot can be one later.
//
// # Invariants
//
//	V1  For one page, the order of changes of the map is the order of the log.
//	V2  A root holds the effect of every record before its mark. (It may hold
//	    later ones: replaying those again changes nothing.)
//	V3  The medium's live counts are those of the last root: the changes since
//	    are held back in ledgers and given out just before the next one.
//	V4  Nothing is acknowledged, and no read answered, without a valid lease.
//	V5  A flush returns nil only when every write acknowledged before it is in
//	    the log. A flush that failed never turns into one that did not, unless
//	    the pages are kept and were written after all (no space, busy).
//
// A leaf whose pages are one run could collapse into its node's entry. It does
// not: the run would lose the pages' check bits, and since batch headers
// interrupt runs it could happen only to 2 MiB writes. The format has the bit.
//
// # Locks
//
// Range lock, then flush state (writeback.mu), then map (pageMap.mu), then a
// cache shard; the last three are held for memory work only.
package volume
