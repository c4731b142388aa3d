//go:build !atollbugs

package stream

// activeBugs returns the protocol mistakes to make: none.
func activeBugs() Bugs { return Bugs{} }
