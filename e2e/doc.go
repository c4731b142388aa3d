// Package e2e holds the tests of the whole program from outside: they build the
// atoll binary, run it as processes, and use it with the clients that people
// use. Each test has a directory and ports of its own and leaves nothing behind.
//
// A test skips, with the reason, when a program or a right (root, /dev/fuse) is
// missing. ATOLL_LONG=1 runs more rounds of the tests that crash things.
package e2e
