// Package sim runs a whole cluster in one process and looks for histories in
// which it breaks a promise. It has tests only.
//
// A run is made from a seed. It lives in a testing/synctest bubble, where time
// is virtual: storage nodes on memory disks, gateways that own a volume, clients
// that read and write it, a catalog in memory, and a mesh that carries the
// requests between them. All code above and below the mesh is the product's own:
// node, stream, medium, volume, catalog. A second transport, for fewer seeds,
// is the product's wire protocol over the memory network.
//
// # Repeatability
//
// The Go scheduler does not promise an order among goroutines that are runnable
// at one moment, nor does select. So no two outside events may meet: every
// message, client step, catalog round trip and fault gets an instant whose
// position within its millisecond belongs to no other event of the run. The
// product's own timers run for whole milliseconds from the event that armed
// them, so they meet no other event either. Delays are a hash of what is sent,
// from where to where and when, and not the next number of a shared generator,
// so that the order within one instant cannot change them.
//
// Each seed runs twice and the traces are compared. About five of six are
// equal, to the last message. The others part where goroutines of one process
// wake each other at one moment and the scheduler decides who acts first, above
// all when ownership is lost. So a seed that fails nearly always fails again,
// and is worth a few tries. What must repeat exactly, and does, is the event
// loop in package stream (loop_test.go): the same cores without goroutines.
//
// With the wire protocol traces are not compared: its senders collect what is
// queued, and how much that is depends on the scheduler.
//
// # What is checked
//
//	I1  What was acknowledged as durable is read back, at last from each copy.
//	I2  No read returns a value older than one that was acknowledged, or that
//	    another read returned; a crash of an owner in writeback mode may take
//	    back only what was not flushed.
//	I3  No node takes an append under an older epoch than one it was fenced
//	    with, and no owner acknowledges durability after the next one serves.
//	I5  Every page read is, byte by byte, one that was written there.
//	I9  When all faults are healed, every request ends, within a bound.
//
// A run has a part with faults and a part without. The history of each page is
// checked exactly (check_test.go), and for small ones once more with porcupine.
package sim
