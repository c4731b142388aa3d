// Package atoll holds the words that every other package uses: identifiers,
// epochs, addresses inside segments, limits and the kinds of error. It depends
// on the standard library only and has no behaviour but String and Parse.
//
// The words, smallest first:
//
//   - A block is 4 KiB, the unit of addressing and of checksums.
//   - A record is what a medium writes: a kind, a key and some blocks.
//   - A batch is a header block followed by the blocks of its records; it is
//     the unit of atomicity and is identical on every copy.
//   - A segment is an append-only run of batches, kept as one file per copy.
//   - A copyset is a set of nodes that together hold the copies of segments.
//   - A medium is what a user owns: a volume, a file system or a database. Its
//     log is a sequence of segments written by one owner at a time.
//   - An epoch numbers the owners of a medium; a higher one fences lower ones.
package atoll
