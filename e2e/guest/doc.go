// Package guest holds the tests in which a real Linux kernel uses a volume: a
// Debian cloud kernel in qemu (emulated, no KVM) boots from an initramfs that
// the tests build from programs of the machine, with testdata/guestinit as its
// init. The kernel's file systems run on the volume as a virtio disk while the
// power of guest and server is cut, and the kernel's own NBD client uses it over
// the network.
//
// A power cut takes the guest, the server and, where the tests run as root with
// FUSE and loop devices, parts of what the server's own disk had in its cache.
//
// A test skips, with the reason, when qemu, the kernel or a program is missing.
// ATOLL_LONG=1 cuts the power more often; ATOLL_BINARY names a program to test
// instead of the one built from the source.
package guest
