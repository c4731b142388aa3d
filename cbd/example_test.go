package cbd_test

import (
	"bytes"
	"fmt"
	"log"

	"github.com/atollstore/atoll/cbd"
)

// A volume as programs for Curve use it.
func Example() {
	var c cbd.CBDClient
	if ret := c.Init(clientConf); ret != 0 { // as /etc/curve/client.conf
		log.Fatal(c.LastError())
	}
	defer c.UnInit()
	user := cbd.UserInfo{Owner: "alice"}
	fmt.Println("create:", c.Create("/disk", user, 10<<30))
	fmt.Println("create again:", cbd.Strerror(c.Create("/disk", user, 10<<30)))

	fd := c.Open("/disk", user)
	fmt.Println("open:", fd)
	page := bytes.Repeat([]byte("atoll..."), 512)
	fmt.Println("write:", c.Write(fd, page, 8192, 4096))
	buf := make([]byte, 4096)
	fmt.Println("read:", c.Read(fd, buf, 8192, 4096), bytes.Equal(buf, page))
	fmt.Println("odd length:", cbd.Strerror(c.Read(fd, buf, 0, 1000)))
	fmt.Println("extend:", c.Extend("/disk", user, 11<<30))
	var info cbd.FileInfo
	fmt.Println("stat:", c.StatFile("/disk", user, &info), info.Filename, info.Length>>30, info.Owner)
	fmt.Println("close:", c.Close(fd))
	fmt.Println("unlink:", c.Unlink("/disk", user))
	fmt.Println("stat:", cbd.Strerror(c.StatFile("/disk", user, &info)))
	fmt.Println("recover:", c.Recover("/disk", user, info.ID))
	// Output:
	// create: 0
	// create again: EXISTS
	// open: 0
	// write: 4096
	// read: 4096 true
	// odd length: NOT_ALIGNED
	// extend: 0
	// stat: 0 disk 11 alice
	// close: 0
	// unlink: 0
	// stat: NOTEXIST
	// recover: 0
}
