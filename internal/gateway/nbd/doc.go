// Package nbd serves block devices over the Network Block Device protocol and
// is a client of it.
//
// Serve accepts connections, negotiates (fixed newstyle only) and turns each
// request into a call on a Device. Dial and Open are the other side, for
// import, export, benchmarks and tests.
//
// # The life of a request
//
// The goroutines of a connection take turns as its reader (leader and
// followers): the one that holds the token parses a request, with a write's
// payload going straight into an aligned buffer, passes the token on and
// carries the request out itself. Finished replies are queued; whoever finds no
// writer at work becomes the writer and sends all that is queued in one system
// call. So a lone request never changes goroutines, and many at once share
// system calls. While the device answers at the speed of memory (inline.go), or
// the client has one request in flight at a time (lone.go), the reader does not
// even pass the token on; with a lone client it waits for the next request in its
// own thread, the socket off the runtime's poller (socket.go). Request structs and
// buffers are pooled.
//
// # Versions
//
// Besides base:allocation an export has the metadata contexts that its device
// offers (Versioned): qemu:allocation-depth, and qemu:dirty-bitmap:since-NAME
// for what changed since a version. So the backup tools of others read our
// differences. Versions are exports of their own, read-only.
//
// # Invariants
//
//   - N1: only WRITE carries a payload, and exactly the announced number of
//     bytes is consumed whatever is wrong with the request; a bad request never
//     shifts the stream.
//   - N2: a connection holds at most its byte budget and its request limit; a
//     full connection is simply not read from.
//   - N3: FLUSH is passed on only after the device call of every write that was
//     answered before it, on any connection, returned (they share one Device,
//     hence CAN_MULTI_CONN).
//   - N4: an export is not opened for a new connection while requests of a
//     connection that is already gone still run on it; they are cancelled, and
//     the new client is refused if they do not end.
//   - N5: state that was negotiated in plain text does not survive STARTTLS.
//
// The package does not know what a device is made of, resolves no names and
// checks no rights but TLS; Exports does.
package nbd
