// Package server puts a server together: it reads the configuration, opens the
// catalog (embedded etcd or another's), the storage nodes, the controller and
// the gateways in the right order, serves the control API over them, and stops
// them in the opposite order.
//
// Start: data directory and lock → keys and certificates → etcd → catalog and
// session → nodes and wire listener → controller → volumes → NBD → API.
// Stop: NBD → volumes (checkpoint, seal, release) → nodes → session → etcd.
package server
