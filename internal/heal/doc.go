// Package heal carries out what the controller decides about members of
// copysets: a node of this process that is to become a member copies what the
// others hold, and a node that is none any more lets go of its copies.
//
// A move (catalog.Move) stands in the record of a copyset. The process that
// serves its new node finds it there, lists what the members hold, copies, reads
// back, and at last makes the node a member, in one transaction. So there are as
// many sources and targets at work as there are nodes, nothing hangs on the
// controller's life, and after a crash the listing shows what is left to do.
//
// Rules, cited by number in the code:
//
//	H1  Only sealed copies are copied, and only when all sealed copies that can
//	    be seen have one length. Where they differ a recovery did not prevail,
//	    and only the owner knows which.
//	H2  A node becomes a member when, in a listing that began after the catalog
//	    said that no head lists an unsealed segment of the set (Settled), each
//	    staying member holds each segment that any of them or a living leaving
//	    member holds, sealed at one length, and the node does, too. So no copy is
//	    outstanding that an owner lists as unverified, but on the node that
//	    leaves; owners drop it from their lists when it is no member. Segments
//	    that their head lists as dropped, or whose medium is being deleted, do
//	    not count: nobody will read them.
//	H3  What a node does not list, or a node that does not answer, is evidence of
//	    nothing. A staying member that does not answer holds the move up.
//	H4  A copy counts when it was read back, by this process, since it started.
//	H5  A copy is evicted only from a node that the catalog does not list as a
//	    member, after a grace, when every member was just seen to hold the
//	    segment, sealed at one length. Others are kept: owners delete those that
//	    they dropped (medium M6), and the rest is reported.
//	H6  Nothing is copied before every process must have seen the move, or lost
//	    its lease: who deletes a segment fences it on the new node, too
//	    (stream.Nodes.Delete), so that no copy on its way brings it back.
//	H7  Of a coded segment a node has the shard of its place in the copyset, and a
//	    new member takes the place of the old one. A shard of another place, from
//	    an earlier or given up move, is evicted first: the member in that place was
//	    read back when it got it (H4).
//
// The package does not choose nodes, and is not in the data path.
package heal
