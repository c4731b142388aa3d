// Package controller decides: where copies may live (copysets), which media's
// deletion to finish, and how healthy the cluster is. It runs in every server
// with the controller role; the one that is elected acts. It is never in the
// data path: what it decides goes into the catalog, and others see it there.
//
// Every decision is a pure function of the catalog's State (placement, Health);
// the loop around it does the effects. Two controllers that both believe to be
// elected do no harm: making the same copyset twice makes it once, and a
// deletion happens under an epoch of the medium that only one of them gets.
//
// Rules:
//
//   - D1: A segment is deleted only on a positive record: its medium's state is
//     "deleting", which no one takes back. That something is missing, or that a
//     node lists what nobody knows, is never a reason to delete.
//   - D2: A medium's record goes only after every node that is part of the
//     cluster has said, after the deletes, that it holds nothing of it. A node
//     that does not answer holds the deletion up until it is back or removed.
//   - D3: A medium that its user deleted is "detached" while clones or readers
//     pin versions of it. Only live media get pins, so when the last one is gone
//     none comes back, and the medium goes on to "deleting". A clone's pin goes
//     with its record: of a chain of clones the youngest goes first.
//
// Not here yet, with the place where it will be: repair and drain replace a
// member of a copyset, which is a change of Copyset.Nodes and Version in a pass
// beside Controller.place, fed by nodes in state "draining" or "removed"; until
// then a draining node takes no new segments and keeps the ones it has. Copysets
// of K+M members, for the codes that media want, are made like any others.
package controller
