// Package chaos breaks a cluster of real servers on several test hosts and
// proves that nothing acknowledged is lost.
//
// A test host is a network namespace with an address of its own; all hang on one
// bridge. Servers run as processes of the built program, join by token, and
// speak TLS to everyone, as on real machines. The recorder (history.go) reads
// and writes blocks over NBD from a host of its own and keeps what it was told;
// the judge (judge.go) then says whether any order of the operations explains
// it. The nemesis (nemesis.go) draws faults from a seed: it kills and stops
// processes, cuts links in one or both directions, fills disks, flips bits.
//
// Everything happens inside namespaces of processes, mounts and network that
// the tests enter first (world.go). When their first process ends, however it
// ends, the kernel ends all others in them and takes mounts, links and files on
// tmpfs along: nothing can be left behind, and two runs cannot meet. No address
// outside is reachable from there.
package chaos
