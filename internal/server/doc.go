// Package server puts a server together: it reads the configuration, opens the
// catalog (embedded etcd or another's), the storage nodes, the controller and
// the gateways in the right order, serves the control API over them, and stops
// them in the opposite order.
//
// Start: data directory and lock → keys and certificates → etcd → catalog and
// session → nodes and wire listener → controller → volumes → NBD → API.
// Stop: NBD → volumes (checkpoint, seal, release) → nodes → session → etcd.
//
// The life of a call about a volume: its name is looked up in the catalog; if
// another process owns the volume the call is passed on to that one's API, once
// (forward.go); else the volume is opened here, or shared (volumes.go), and asked.
// A version (NAME@VERSION) is read from any server without owning the volume
// (views.go).
//
// Rules:
//
//   - A volume in use (an NBD client, an import) is not renamed, removed or
//     replaced: ErrBusy. A removed one is in the trash, where only its check can
//     acquire it, until it is restored, or purged by its user, by time, or for want of room
//     (trash.go, lead.go).
//   - An import is the only user of its volume and ends whole or not at all, also
//     by silence, a crash, or the loss of the lease (imports.go).
//   - What one server of a cluster does for all (expiry, schedules) is done by the
//     one whose process leads the controllers. Two that believe to lead do no harm:
//     every step is a transaction on what it was decided from.
//   - Who calls is found out in one place (api's caller.go), and whether they may is
//     decided in one place (rights.go), before the call. A call that is passed on
//     was authorized where it came in.
//   - Every refusal has its kind, and where there is something to do about it a
//     hint that says what.
//
// Locks (volumeSet.mu, neighbours.mu, taskSet.mu, task.mu, logins.mu, Server.mu)
// are held for memory work only; taskSet.mu before task.mu, else they never nest.
package server
