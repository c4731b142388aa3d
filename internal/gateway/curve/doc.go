// Package curve lets clients of Curve's block storage work unchanged: it turns
// their calls into calls on Atoll's control API and answers with Curve's codes.
//
// Two doors are served by one http.Handler. Under /curve/v1/ every call of
// Curve's client library is one POST with a JSON object, answered by a JSON
// object with a "code"; the curvefs module for Python and "atoll curve" use it.
// /SnapshotCloneService is the REST interface of Curve's snapshot server.
// Data never pass through here: open answers with NBD addresses.
//
// # Rules kept
//
//   - R1: the order of checks is Curve's: path, caller, owners of the
//     directories, owner of the file, then what the call itself asks for.
//   - R2: whoever is not root is believed, unless the user is marked strict;
//     root, and strict users, prove their password with every call.
//   - R3: sizes, stripes and paths obey Curve's limits here and only here.
//   - R4: every call ends within its deadline, in a code.
//   - R5: /RecycleBin is a view of the trash; nothing is stored for it.
//
// The gateway keeps in memory which volumes were opened a moment ago and are not
// connected yet, and for a second who is strict and what is in the trash. All
// else it asks from the Backend, so any number of gateways may serve one cluster.
package curve
