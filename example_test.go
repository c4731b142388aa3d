package atoll_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"strings"

	"github.com/atollstore/atoll"
)

// A volume is made, written, flushed and read again.
func Example() {
	ctx := context.Background()
	c, err := atoll.Dial(ctx, atoll.Options{}) // the server that runs here
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(ctx, "first", 64<<20, nil); err != nil {
		log.Fatal(err)
	}
	v, err := c.Open(ctx, "first")
	if err != nil {
		log.Fatal(err)
	}
	defer v.Close()
	if _, err := v.WriteAt([]byte("hello"), 1<<20); err != nil {
		log.Fatal(err)
	}
	if err := v.Flush(ctx); err != nil { // now it is durable
		log.Fatal(err)
	}
	p := make([]byte, 5)
	if _, err := v.ReadAt(p, 1<<20); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s from a volume of %d bytes\n", p, v.Size())
	// Output: hello from a volume of 67108864 bytes
}

// A version keeps a state for good: it can be read beside the present one,
// compared with it, and taken back.
func ExampleClient_Backup() {
	ctx := context.Background()
	c, err := atoll.Dial(ctx, atoll.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(ctx, "disk1", 1<<30, nil); err != nil {
		log.Fatal(err)
	}
	write := func(text string) {
		v, err := c.Open(ctx, "disk1")
		if err == nil {
			_, err = v.WriteAt([]byte(text), 8192)
			err = errors.Join(err, v.Close()) // flushes
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	show := func(name string) {
		v, err := c.Open(ctx, name)
		if err != nil {
			log.Fatal(err)
		}
		defer v.Close()
		text := make([]byte, 6)
		if _, err := v.ReadAt(text, 8192); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %s\n", name, text)
	}

	write("monday")
	version, err := c.Backup(ctx, "disk1", "before", &atoll.BackupOptions{Memo: "before the upgrade"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(version, "is number", version.Number)
	write("sunday")
	show("disk1")
	show("disk1@before")

	for part, err := range c.Diff(ctx, "disk1", "before") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(part.Length, "bytes at", part.Offset, "differ")
	}
	if err := c.Restore(ctx, "disk1@before"); err != nil {
		log.Fatal(err)
	}
	show("disk1")
	// Output:
	// disk1@before is number 1
	// disk1: sunday
	// disk1@before: monday
	// 4096 bytes at 8192 differ
	// disk1: monday
}

// A clone begins as a version of another volume and goes its own way.
func ExampleClient_Clone() {
	ctx := context.Background()
	c, err := atoll.Dial(ctx, atoll.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(ctx, "golden", 64<<20, nil); err != nil {
		log.Fatal(err)
	}
	golden, err := c.Open(ctx, "golden")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := golden.WriteAt([]byte("an image"), 0); err != nil {
		log.Fatal(err)
	}
	if err := golden.Close(); err != nil {
		log.Fatal(err)
	}
	if _, err := c.Backup(ctx, "golden", "v1", nil); err != nil {
		log.Fatal(err)
	}
	for i := range 3 {
		name := fmt.Sprintf("vm%d", i)
		if _, err := c.Clone(ctx, "golden@v1", name); err != nil {
			log.Fatal(err)
		}
		v, err := c.Open(ctx, name)
		if err != nil {
			log.Fatal(err)
		}
		if _, err := v.WriteAt(fmt.Appendf(nil, "%d", i), 9); err != nil {
			log.Fatal(err)
		}
		text := make([]byte, 10)
		if _, err := v.ReadAt(text, 0); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %q\n", name, text)
		if err := v.Close(); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// vm0: "an image\x000"
	// vm1: "an image\x001"
	// vm2: "an image\x002"
}

// What is made for files works with volumes.
func ExampleVolume() {
	ctx := context.Background()
	c, err := atoll.Dial(ctx, atoll.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Create(ctx, "copy", 16<<20, nil); err != nil {
		log.Fatal(err)
	}
	v, err := c.Open(ctx, "copy")
	if err != nil {
		log.Fatal(err)
	}
	defer v.Close()
	if _, err := io.Copy(io.NewOffsetWriter(v, 4096), strings.NewReader("the quick brown fox")); err != nil {
		log.Fatal(err)
	}
	text, err := io.ReadAll(io.NewSectionReader(v, 4100, 5))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", text)
	for part, err := range v.Extents(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(part.Offset, part.Length, part.Zero)
	}
	// Output:
	// quick
	// 0 4096 true
	// 4096 4096 false
	// 8192 16769024 true
}

// The kind of an error says what to do next, and often the server has advice.
func ExampleClient_Open() {
	ctx := context.Background()
	c, err := atoll.Dial(ctx, atoll.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	_, err = c.Open(ctx, "nothing")
	fmt.Println(errors.Is(err, atoll.ErrNotExist))
	// Output: true
}
