// Package hosttest is a machine for tests: a disk in memory that loses power, a
// network in memory that is cut, and the suites that every implementation of
// host.FS and host.Net must pass.
//
// A Disk keeps, for each file, what is durable and an ordered list of what is
// not yet. Crash gives the disk as it may be found after a power cut: each
// 512-byte sector of each pending write is there, missing, or garbage, each
// pending change of a size or a directory is there or not. What Sync, SyncDir
// or a durable WriteVec has confirmed is always there.
package hosttest
