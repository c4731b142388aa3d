// Package cbd has the calls of Curve's block client, in Go, for Atoll.
//
// Names, arguments, their order and what is returned are those of Curve's
// CBDClient: 0 or a count, or a code of this package, negated. So programs and
// scripts for Curve can be carried over line by line; new programs are better
// off with package atoll.
//
//	var c cbd.CBDClient
//	if ret := c.Init("/etc/curve/client.conf"); ret != 0 { … }
//	user := cbd.UserInfo{Owner: "me"}
//	ret := c.Create("/disk1", user, 10<<30)
//	fd := c.Open("/disk1", user)
//	n := c.Write(fd, page, 0, 4096)
//	c.Close(fd)
//
// Calls about files go to a server's API, data go over NBD to the address that
// Open is told. Every call ends within its deadline, in a code; while a volume
// moves from one server to another, reads and writes go on after it. A write that
// returned is durable, unless atoll.writeback is set.
//
// Keys of client.conf that are read (all others are ignored):
//
//	mds.listen.addr        HOST:PORT[,HOST:PORT...], unix:/PATH or https://HOST:PORT
//	atoll.timeoutMS        deadline of a call about files (20000)
//	atoll.ioTimeoutMS      deadline of a read or write (45000)
//	atoll.preciseOpen      true: a refused Open returns its true code, not -2
//	atoll.token            bearer token, if the address asks for one ($ATOLL_TOKEN)
//	atoll.caFile           authorities (PEM) for calls and data; makes HOST:PORT mean https
//	atoll.certFile         certificate (PEM) to show where data go
//	atoll.keyFile          its key (PEM), if that is in a file of its own
//	atoll.writeback        true: a write may return before it is on disk
package cbd
