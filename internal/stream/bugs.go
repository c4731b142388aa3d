package stream

// Bugs are known mistakes in protocols like this one. Tests switch them on, one
// at a time, to show that they would be found; the switch exists in builds with
// the tag atollbugs only, and without it the checks compile to nothing.
type Bugs struct {
	// AckBeforeDurable acknowledges a batch as soon as one copy has it.
	AckBeforeDurable bool
	// NoFence makes recovery read the lengths without fencing first.
	NoFence bool
	// NoWriteBack makes recovery seal without completing shorter copies, and
	// list them as whole.
	NoWriteBack bool
	// Shortest makes recovery take the shortest answer instead of the longest.
	Shortest bool
	// DropSilent makes recovery leave silent copies out of the unverified list.
	DropSilent bool
	// TrustUnknown makes recovery take any answer as if it were Clean.
	TrustUnknown bool
	// AckBeforeSeal acknowledges in a new segment before the seal of the one
	// before it is recorded.
	AckBeforeSeal bool
}
