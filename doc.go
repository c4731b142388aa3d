// Package atoll is the Go client of Atoll: block volumes that remember.
//
// Dial connects to a cluster. A volume is created, listed and removed through
// the Client; Open gives its bytes as an io.ReaderAt and io.WriterAt. Every
// volume has a working state and versions 1, 2, 3…: Backup records one, in an
// instant whatever the size, and NAME@VERSION names it wherever a name is asked
// for. VERSION is a number, the version's own name, "last" or "release".
//
//	c, err := atoll.Dial(ctx, atoll.Options{})
//	_, err = c.Create(ctx, "disk1", 10<<30, nil)
//	v, err := c.Open(ctx, "disk1")
//	_, err = v.WriteAt(page, 0)
//	err = v.Flush(ctx)                             // now it is durable
//	_, err = c.Backup(ctx, "disk1", "before", nil)
//	for part, err := range c.Diff(ctx, "disk1", "before") { … }
//
// # Errors
//
// errors.Is tells the kind of every error: ErrNotExist, ErrBusy and so on. Hint
// gives the server's advice on what to do, if it has one.
//
// # Durability
//
// A write is durable when a Flush that began after it has returned. A volume
// created with Cache "writethrough" makes every write durable before it
// returns. Control calls are durable when they return. A volume stays open while
// it moves from server to server; if writes that were not flushed may have been
// lost on the way, the next Flush fails.
//
// # Concurrency
//
// All methods may be called concurrently. Calls take a context and return soon
// after it has ended; whether the call was carried out is then unknown.
package atoll
