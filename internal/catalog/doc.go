// Package catalog keeps what all of a cluster must agree on: nodes, copysets,
// processes, names, media, and who owns each medium under which epoch. It is
// small, typed, and lives in etcd (embedded or external); a memory twin, held
// to the same contract tests, serves simulation.
//
// The layers: KV is an ordered store with transactions, watches and leases (Etcd,
// Memory); Catalog gives it types and keeps a State up to date; Session is the
// lease of a process. format.go draws the keys and values.
//
// Life of an ownership: a process opens a Session; Acquire raises the medium's
// epoch, on condition that the former owner's lease has ended; the owner changes
// the Head by SwapHead, on condition that its own lease lives and nobody changed
// it since; when Valid turns false it stops answering, and the lease's end lets
// the next owner in.
//
// Rules:
//
//   - K1: Every change is one transaction on the revisions of what it was decided
//     from. Nothing is decided from State alone.
//   - K2: A transaction without an answer is sent again unchanged; its conditions
//     let it happen once, and the mark of its writer tells whether it did.
//   - K3: A lease is no mutual exclusion. Epochs, checked by the nodes, are; the
//     lease only says when it is polite to take over.
//   - K4: A session is valid for atoll.LeaseUse from the start of its last renewal,
//     by the monotonic clock, and once lost never comes back.
//   - K5: The embedded etcd listens on nothing but what its options name: a Unix
//     socket in a directory of mode 0700, and TLS with certificates on both sides.
//   - K6: A copyset changes its members only by a move, begun, marked and finished
//     each from the record that it was decided from (moves.go). A set in a move
//     is in no index, takes no new segment, and is listed again afterwards.
//
// Locks (Memory.mu, Session.mu) are held for memory work only and never nest.
package catalog
