// Package rbdstream reads and writes the streams in which Ceph's rbd moves
// images: diffs between two versions, and whole images with all their versions.
//
// # Words
//
// A diff turns one version of an image (from) into another (to). It has two
// formats: V1 stands alone in a file or a pipe, V2 only inside an image stream.
// An image stream is a header and one diff per version, oldest first, and a last
// one for the head.
//
// # Life of a diff
//
// A Writer is told From, To, Protected and Size, in this order and as far as
// there is something to tell, then data and zeros by ascending offsets, then
// End. It makes the same bytes of the same contents, however the calls were cut:
// pages of 4 KiB that hold only zeros become zero records, neighbours become one
// record, and a record of data ends at each multiple of 4 MiB.
//
// A Reader hands out records one by one; the data of a Write record are read
// through the Reader and never held as a whole.
//
// # What a reader bears
//
// Metadata may come in any order. An unknown tag is skipped: in V1 the next byte
// is taken as a tag, in V2 the length says how much to skip. The lengths of
// known V2 records say nothing that the payload does not, and rbd itself writes
// a wrong one (8 for the single byte of a protection record), so they are not
// looked at. Strings longer than MaxName, sizes beyond 63 bits and ranges that
// run over are refused before anything is allocated.
//
// # Invariants
//
//	R1  No call allocates by a length that the stream claims beyond the limits.
//	R2  A stream that ends too soon is an error, never a shorter diff.
//	R3  A Writer's output does not depend on how the caller cut the data, as
//	    long as the cuts lie between pages.
//	R4  Every error wraps a kind of package atoll; Errno gives the number that
//	    rbd would exit with.
//
// Nothing here starts goroutines. A Reader or Writer serves one goroutine.
package rbdstream
