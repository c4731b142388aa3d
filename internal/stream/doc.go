// Package stream is the replicated log as its writer sees it.
//
// A Writer owns one lane of one medium's log. It puts queued entries into
// batches, sends each batch to every copy of the open segment in parallel, and
// acknowledges it, in order, when all copies have it on stable storage. When a
// copy fails or stays silent, the writer seals the segment at the last batch
// that all copies acknowledged, goes on in the next segment on healthy nodes,
// and sends again what was not acknowledged.
//
// A goroutine of the writer's does the work, or the appender's own while appends
// come one by one (direct.go).
//
// Recover is what a new owner runs over the segments that the old one left
// unsealed: it fences all copies, finds the length that holds every
// acknowledged byte, completes the copies that answered, and seals them.
//
// Nodes is the storage nodes as this process sees them: which are healthy,
// where a new segment may go, and how any copy is read.
//
// The decisions are pure step functions (core_writer.go, core_recover.go)
// without clock, I/O or goroutine; the rest is the shell that carries them out.
//
// Invariants, cited by number in the code:
//
//	W1 A batch is acknowledged only when every copy of its segment has it on
//	   stable storage, every batch before it is acknowledged, and the owner's
//	   lease holds after the last answer came in.
//	W2 A segment sealed before it was full is sealed at the end of its last
//	   acknowledged batch, and nothing in a later segment is acknowledged before
//	   that seal is recorded in the catalog.
//	W3 A segment takes batches only when every batch of the one before it is
//	   acknowledged or will be sent again in it.
//	W4 A record's sequence number is given out once. After a crash the log may
//	   hold a record twice, in adjoining segments, under the same number; the
//	   reader keeps the first. Numbers may be missing where an entry failed.
//	W5 After any error other than ErrFenced an entry may or may not be in the
//	   log. After ErrFenced the writer acknowledges nothing more.
//	R1 A length counts as evidence only with grade Torn or better, or Absent
//	   (length 0). A lone answer counts only when it is Clean.
//	R2 The sealed length is the longest among the evidence, unless a copy is
//	   sealed already: that length stands.
//	R3 A copy that is not known to hold the whole sealed length is listed as
//	   unverified until Complete has seen to it.
//
// The package does not know what records mean and keeps no list of segments.
package stream
