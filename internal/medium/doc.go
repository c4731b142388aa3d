// Package medium is what a user owns: an identity, a log and a manifest. A
// volume, a file system or a database is a kind that sits on it.
//
// # Words
//
// The log of a medium is its segments in the order of their ordinals. They are
// filled in two lanes: the hot lane takes what orders writes (user data, logs),
// the bulk lane takes tables and map pages. Only the hot lane is replayed.
// The head (in the catalog) says who owns the medium and which segments came
// after the manifest; the manifest (in the log) lists all segments before it,
// the root of the kind and where replay starts, the mark.
//
// # Life of an owner
//
// Open takes the epoch, fences and seals what the owner before left unsealed,
// records the seals in one change of the head, and loads the manifest. The kind
// then calls Replay and is ready. Append writes, Live counts what is referenced,
// Checkpoint writes a manifest, Close seals and lets go.
//
// # Invariants
//
//	M1  A segment is in the head before a byte is written to it, and leaves the
//	    head only when a durable manifest says the same of it.
//	M2  A seal recorded in the head or manifest stands over anything on nodes.
//	M3  Replay sees every ordinal from the mark on and every batch of each hot
//	    segment up to its sealed length, or fails with ErrCorrupt. A record that
//	    a writer sent again after a failure may be there twice under one
//	    sequence number; the first counts.
//	M4  The live counts in a manifest are those that its root references, no
//	    more and no less: Checkpoint stores the sums of all deltas given before
//	    it was called. A replay gives deltas for what it changes in that root.
//	    Therefore the kind gives deltas of changes that are not in the root only
//	    when Checkpoint has returned, and calls Mark only when each of its bulk
//	    appends is counted or held.
//	M5  A segment is dropped only when it was sealed before the mark, the
//	    manifest being written and the running counts both say that nothing in
//	    it is referenced, nobody holds it, and the manifest itself does not use
//	    it. Nodes are told only after that manifest is durable and a grace time
//	    longer than any read has passed.
//	M6  Bytes on nodes are deleted only for ordinals that a durable manifest
//	    says were dropped. Unknown ordinals are kept and logged.
//	M7  After the lease or the epoch is lost every call ends with ErrFenced.
//
// # Locks
//
// Medium.mu (table and seals, memory only) is never held across I/O. Head
// changes and manifests are serialised by two channel semaphores, taken in the
// order manifest, head.
//
// The package does not look into what kinds write and decides nothing about
// placement.
package medium
