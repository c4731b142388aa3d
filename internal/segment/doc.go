// Package segment is the format of one append-only file: batches of records
// with their checksums, the footer that closes a sealed segment, the superblock
// that names a disk, and the rules by which a segment is read after a crash
// (Scan). It does no I/O but through the io.ReaderAt it is given, keeps no
// state and starts no goroutine; whoever writes and owns the files is package
// node.
//
// A segment is a run of batches from block 0. Each names its segment, its own
// offset and the checksum of the batch before it, so that bytes left over from
// an earlier use of the file, or written to the wrong place, never pass as part
// of it. When the segment is sealed a footer follows the last batch.
package segment
