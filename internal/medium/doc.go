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
//	M4  The live counts in a manifest are the blocks that its root and the roots
//	    of its versions reference, all together, no more and no less: Checkpoint
//	    and Commit store the sums of all deltas given before the call. A replay
//	    gives deltas for what it changes in that root. Therefore the kind gives
//	    deltas of changes that are not in the root only when Checkpoint has
//	    returned, and calls Mark only when each of its bulk appends is counted or
//	    held. Blocks of ancestors are not counted.
//	M5  A segment is dropped only when it was sealed before the mark, the
//	    manifest being written and the running counts both say that nothing in
//	    it is referenced, nobody holds it, no block that moved there is in use,
//	    no running compaction writes there, and the manifest itself does not use
//	    it. It is compacted only when it was sealed before the mark. Nodes are
//	    told of either only after that manifest is durable, and a grace time.
//	M6  Bytes on nodes are deleted only for ordinals that a durable manifest
//	    says were dropped or compacted. Unknown ordinals are kept and logged.
//	M7  After the lease or the epoch is lost every call ends with ErrFenced.
//
//	M8  A block's place in an index never changes: compaction copies blocks and
//	    leaves a remap for each segment whose blocks it moved. A block moves any
//	    number of times, its remap always names where it is now. Own records in a
//	    compacted segment are written anew in the same manifest.
//	M9  A version is removed only when a durable manifest had marked it, and
//	    after that no pin was found. Who reads a version pins it first, looks at
//	    the manifest then, and takes none that is marked.
//	M10 A segment's name is never given out twice, and nodes check what they read
//	    against the checksums of that segment. So who reads a place that is gone
//	    gets ErrNotExist or ErrCorrupt, never other bytes, and looks again where
//	    the block is now: in the remap (Read does), in a newer manifest (views and
//	    clones do), in the index (kinds do). The grace time is there to make that
//	    rare, not to make it safe, and is short.
//
// # Versions, clones, views
//
// A version is a root of the kind with its place in the hot lane, listed in the
// manifest. A clone is a medium of its own whose first root is a version of its
// parent and whose ordinals begin at Base, above the parent's, so that a place in
// the log names one block in the whole line of ancestors. It reads theirs without
// owning them. A View does the same for a version alone.
//
// # Locks
//
// Medium.mu (table and seals, memory only) is never held across I/O. Copies of
// compaction, moves, manifests and changes of the head are bounded by channel
// semaphores, taken in that order; all but the first have room for one.
//
// The package does not look into what kinds write and decides nothing about
// placement.
package medium
