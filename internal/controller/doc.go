// Package controller decides: where copies may live (copysets), which members of
// these are to be replaced, which media's deletion to finish, and how healthy the
// cluster is. It runs in every server
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
//
//   - D2: A medium's record goes only after every node that is part of the
//     cluster has said, after the deletes, that it holds nothing of it. A node
//     that does not answer holds the deletion up until it is back or removed.
//
//   - D3: A medium that its user deleted is "detached" while clones or readers
//     pin versions of it. Only live media get pins, so when the last one is gone
//     none comes back, and the medium goes on to "deleting". A clone's pin goes
//     with its record: of a chain of clones the youngest goes first.
//
//   - D4: A member of a copyset is replaced when its node is down for longer than
//     RepairAfter, not counting time in which no server ran; at once when it is
//     removed, drained or reports errors; after ten seconds when only one other
//     copy of the set can be read. A set with fewer members than
//     any medium wants gets one more. The most endangered set comes first. Never
//     are all members on their way out: the last goes when the others are in.
//     The new member is as far from the others as can be (rack, host), then the
//     one with least to do, most room and least in common with them.
//
//   - D5: A move (catalog.Move) stands in the set's record. While it stands no
//     segment is registered on the set: that is a condition of the transaction
//     that registers it (catalog.SwapHead). It is settled when a look at all
//     heads shows no unsealed segment of the set; owners roll by themselves, and
//     for media without an owner the controller has it done. Until then recovery
//     asks the old members, by the rules R1 to R3 of package stream.
//
//   - D6: The new member's process does the rest, by the rules H1 to H7 of package
//     heal, and makes it a member. So repair goes on while no controller is
//     elected. A move is cancelled when the old member is back, or not to be
//     drained any more, or when the new one fails; what was copied by then is
//     used when the move begins again, or evicted by rule H5.
//
//   - D7: Nodes are balanced when nothing else is to be done: a copyset of the
//     fullest goes to the emptiest while their use differs by more than 5 %.
//
// Copysets of K+M members, for the codes that media want, are made and repaired
// like any others.
package controller
