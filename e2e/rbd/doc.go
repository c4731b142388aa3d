// Package rbd tests image streams against Ceph's own rbd: a cluster of one
// monitor and one OSD in memory is started for it, from Debian's packages. Ours
// go into theirs and theirs into ours, through chains of versions with resizes,
// discards and clones of odd sizes, and are compared byte by byte.
package rbd
