// Package qos limits the rate of operations and bytes, as users of rbd and Curve
// know it: six limits (operations and bytes, of reads, of writes and of both),
// each with a rate, a higher rate for bursts, and for how long.
//
// A Throttle is asked before each operation. It lets the operation pass or makes
// it wait its turn: first among its own kind (reads or writes), then among all.
// So writes that wait for the limit of writes do not hold up reads. Within each
// line the order is that of arrival, and an operation of any size passes as soon
// as the one before it is paid for; it then owes what it costs.
//
// # How a rate is kept
//
// Each limit is a point in time, that up to which what passed has been paid for
// (the generic cell rate algorithm, a token bucket without a tick). Passing moves
// it on by cost/rate, in whole nanoseconds with the remainder kept, so that
// nothing is lost or gained in the long run. An operation passes while the point
// is no further ahead of the clock than the tolerance: Slack, and for a burst
// the time that it may run ahead. Slack also lets those who wake up late catch
// up. Nothing runs while nobody waits, and only the first of a line has a timer.
package qos
