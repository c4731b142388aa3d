// Package node is the storage node: one directory of segments on one disk. It
// implements wire.Node and knows segments, epochs and checksums, nothing of
// media or names.
//
// On disk:
//
//	super             identity of the disk (segment.Super)
//	states            what must outlive a crash of each segment id (states.go)
//	lock              held by the process that serves the disk
//	segments/ID.seg   one file for each segment
//	slots/N           files of zeros or old bytes, ready to become segments
//	slots/fill-N      being filled
//
// The life of an append: Append verifies the batch in the caller's goroutine
// and queues it; the commit loop, one for the disk, takes all that is queued,
// judges each batch against its segment's tail (tail.go, pure), writes one run
// for each segment, makes all durable, and then answers all in one pass. A sender
// with nothing else to do may take the loop's turn and do so itself (Direct).
//
// Crash rules, cited by number in the code:
//
//	S1  An append is answered only after its bytes are on stable storage.
//	S2  A fence, a creation and a deletion are on stable storage before they
//	    are answered.
//	S3  A file is in place before its state says so, and its state says that
//	    it is gone before the file goes. So a state without a file is damage,
//	    and a file without a state is kept and read, never deleted.
//	S4  Only a tombstone deletes a file at open.
//	S5  The mark of a clean stop is gone from the disk before the first request
//	    is served.
//	S6  After an error of a write or a sync nothing more is written to that
//	    segment by this process, and no sync is repeated. No room is no error
//	    in this sense: nothing was promised and the place is written again.
//	S7  Bytes are read by the rules of package segment and verified each time.
//
// Locks: Node.mu guards the map of segments; seg.mu one segment's fields; both
// are held for memory work only, and seg.mu is taken after Node.mu if both are.
// Operations that change a segment other than by appending take turns by its id
// (turns), and wait for the commit loop with a barrier. Everything waits on
// channels, so that a node lives in a testing/synctest bubble.
package node
