// Package host is the machine as Atoll sees it: files, network connections and
// aligned buffers. Everything that touches a disk or a socket goes through FS
// and Net, which have real implementations here and simulated ones (memory,
// power cuts, torn writes, bit flips, errors, slowness, partitions) in hosttest.
package host
