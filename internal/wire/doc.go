// Package wire carries the methods of Node between processes: hand-framed
// requests and responses, many at a time over one stream connection. It also
// states the contract of a storage node (Node), which the node itself and the
// Client here implement alike.
//
// Words: a frame is a fixed header, a small body and, for some, a payload of
// raw blocks. A link is the client's end for one address: it dials when there
// is something to send, and again, with back-off, after a loss. A session is
// the server's end of one connection.
//
// The life of an append: Client.Append takes a slot for the request, encodes
// header and body into the link's send queue, keeps a reference on the Vec and
// returns. The link's one writing goroutine yields once, takes all that is
// queued and hands it to the socket in one vectored write, payload uncopied.
// The session reads the payload into aligned buffers and gives them to
// Node.Append in order of arrival; its writing goroutine collects what the node
// has finished and answers in one write. The link's receiving goroutine gives
// the Append back on its Done channel.
//
// Rules:
//
//	L1  A connection belongs to one cluster: both ends compare it first. Every
//	    request names node and disk incarnation, and a server that does not
//	    serve exactly these answers ErrIdentity. No cached binding can go stale.
//	L2  When a connection is lost, everything outstanding ends with
//	    ErrUnreachable and its outcome is unknown. Nothing is sent twice.
//	L3  Nothing is allocated for a length that was not checked against a limit.
//	L4  Bytes of a caller are not touched after its call returned or its Append
//	    came back, except through a reference on the Vec.
//	L5  Header, body and payload are under CRC32C; only the payload of an append
//	    is not, because the batch carries checksums that the node verifies.
//	L6  Every queue has a limit. A full one refuses appends with ErrBusy, makes
//	    other requests wait for room until their context ends, and makes a server
//	    stop reading from the connection.
//	L7  A peer that answers nothing for two seconds is given up, whatever TCP
//	    thinks.
//
// Locks: link.mu, conn.mu and sender.mu guard memory work only, and none is
// taken while another is held. Objects that hold channels belong to one link or
// session and are never shared through a process-wide pool, so that a bubble of
// testing/synctest keeps its own.
//
// The package does not retry, choose among copies, or know what is in a batch.
package wire
