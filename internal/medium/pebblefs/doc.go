// Package pebblefs is a file system for Pebble, a vfs.FS, whose files are runs
// of blocks in the log of a medium. It is how the indexes of file systems and
// databases get onto the segments.
//
// # How it works
//
// Files have numbers, names point to them, and directories are names too. All of
// that is in memory, and what changes it is logged: operations on names and the
// places of blocks go into records of the hot lane. The blocks of write-ahead
// logs (names ending in .log) lie in the same records, so that a commit is one
// durable append; those of all other files lie in the bulk lane. Nothing is
// overwritten: the last, partial block of a file that grows is written again
// elsewhere. A checkpoint stores the whole table as the medium's root.
//
// # Invariants
//
//	P1  Operations take effect in the log in the order of the calls. A Sync of
//	    any file or directory makes all operations on names before it durable,
//	    and the data of that file.
//	P2  A record in the log names only files whose creation is logged before it
//	    or with it.
//	P3  What is in memory and not in the log is pending. Live counts follow the
//	    log: the deltas of an operation are given when it is durable, or held
//	    back until a checkpoint that does not contain it is done (medium M4).
//	P4  After an append failed, memory and log may differ: every later call that
//	    would write fails with the same error, and the medium is to be reopened.
//
// It sits beside the kinds of media, at level 6, because it imports package
// medium. Locks: FS.log (a channel) before FS.mu; FS.mu is for memory work only.
package pebblefs
