//go:build atollbugs

package stream

import "sync/atomic"

// bugsOn is a package variable because a whole simulated cluster makes the same
// mistake. It exists in builds with the tag atollbugs only.
var bugsOn atomic.Pointer[Bugs]

// SetBugs makes every writer and recovery started from now on commit the given
// mistakes. For tests of the tests.
func SetBugs(b Bugs) { bugsOn.Store(&b) }

// activeBugs returns the protocol mistakes to make.
func activeBugs() Bugs {
	if b := bugsOn.Load(); b != nil {
		return *b
	}
	return Bugs{}
}
