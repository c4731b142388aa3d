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
// first. A version shares all else.
//
// # Versions
//
// A backup lets nothing be between log and map for a moment, appends one record,
// freezes the map and goes on; the map is written and the version entered into
// the manifest in the background (it settles). A restore is the same with
// another map afterwards; the state before stays as a hidden version until it is
// reaped. Replay meets the record of what was not settled and does it again.
//
// Versions and the present state form a tree. A block is born at its place in
// the log (a page of the map: at its epoch) and is in a connected part of that
// tree, which is all that is needed to tell what lives: what the present state
// overwrites stays live if it is older than the version that this grew from;
// what a version has alone is found by walking its map beside those of its
// children; and a compacted segment's blocks are looked up in the few versions
// that are young enough for them and grew from one that is too old. There are no
// reference counts and no lists of the dead.
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
//	V6  Events (backups, restores) enter manifests in the order of the log; a few
//	    may be in the log only. None comes after one of which it is not known
//	    whether it is there: a checkpoint comes first. When that is a restore, or
//	    a resize, nothing at all comes before that checkpoint.
//	V7  A version goes only when it is marked in a durable manifest, nothing pins
//	    or reads it, and at most one line goes on from it: two could share what
//	    no common version has.
//	V8  While the version that the present state grew from is removed, what the
//	    present state lets go of counts as freed only if the removal succeeds.
//	V9  Outside of a commit the medium's counts are those of its manifest.
//
// A leaf whose pages are one run could collapse into its node's entry. It does
// not: the run would lose the pages' check bits, and since batch headers
// interrupt runs it could happen only to 2 MiB writes. The format has the bit.
//
// # Locks
//
// Event token (history.sem), checkpoint token (which pending events share), range
// lock, gates, the line for room (writeback.line), commit token;
// then, for memory work only: history.mu, flush state (writeback.mu), map
// (pageMap.mu), a cache shard. Events of several volumes take them in the order
// of the media's ids.
package volume
