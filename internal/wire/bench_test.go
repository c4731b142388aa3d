package wire

import (
	"context"
	"fmt"
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// echoNode acknowledges appends and answers reads from one piece of memory, as
// fast as it can: what remains is the cost of the wire.
type echoNode struct {
	*memNode
	data []byte
}

func (n *echoNode) Append(a *Append) { a.Done <- a }

func (n *echoNode) Read(_ context.Context, _ atoll.SegmentID, _ atoll.BlockNo, dst []byte) error {
	copy(dst, n.data)
	return nil
}

func benchRig(b *testing.B, kind string) *Client {
	r := newRig(b, kind, nil)
	echo := &echoNode{r.nodes[1], make([]byte, 1<<20)}
	r.server.o.Lookup = func(atoll.NodeID) (Node, atoll.UUID, bool) { return echo, echo.inc, true }
	c := r.client(1)
	if _, err := c.Ping(ctxFor(b)); err != nil {
		b.Fatal(err)
	}
	return c
}

// BenchmarkAppend sends batches of a header block and a payload and waits for
// the acknowledgements. A collapse at depth 32 to little more than at depth 1
// means that frames are no longer gathered (see pause).
func BenchmarkAppend(b *testing.B) {
	for _, kind := range []string{"tcp", "unix", "tls"} {
		for _, c := range []struct{ blocks, depth int }{{1, 1}, {1, 32}, {16, 8}, {256, 4}} {
			b.Run(fmt.Sprintf("%s/%dKiB/depth=%d", kind, 4*c.blocks, c.depth), func(b *testing.B) {
				benchAppend(b, benchRig(b, kind), c.blocks, c.depth)
			})
		}
	}
}

func benchAppend(b *testing.B, c *Client, blocks, depth int) {
	head, body := host.Alloc(atoll.BlockSize), host.Alloc(blocks*atoll.BlockSize)
	vec := host.NewVec()
	vec.Add(head, head.Bytes())
	vec.Add(body, body.Bytes())
	done := make(chan *Append, depth)
	for range depth {
		done <- &Append{}
	}
	b.SetBytes(int64(blocks * atoll.BlockSize))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		a := <-done
		*a = Append{Seg: seg1, Vec: vec, Done: done}
		c.Append(a)
	}
	for range depth {
		if a := <-done; a.Err != nil {
			b.Fatal(a.Err)
		}
	}
}

// BenchmarkRead reads blocks with some goroutines.
func BenchmarkRead(b *testing.B) {
	for _, kind := range []string{"tcp", "unix", "tls"} {
		for _, c := range []struct{ blocks, depth int }{{1, 1}, {1, 32}, {16, 8}, {256, 4}} {
			b.Run(fmt.Sprintf("%s/%dKiB/depth=%d", kind, 4*c.blocks, c.depth), func(b *testing.B) {
				benchRead(b, benchRig(b, kind), c.blocks, c.depth)
			})
		}
	}
}

func benchRead(b *testing.B, c *Client, blocks, depth int) {
	b.SetBytes(int64(blocks * atoll.BlockSize))
	b.ReportAllocs()
	ctx, errs, work := context.Background(), make(chan error, depth), make(chan struct{}, depth)
	for range depth {
		go func() {
			dst := make([]byte, blocks*atoll.BlockSize)
			var err error
			for range work {
				if e := c.Read(ctx, seg1, 0, dst); e != nil {
					err = e
				}
			}
			errs <- err
		}()
	}
	b.ResetTimer()
	for range b.N {
		work <- struct{}{}
	}
	close(work)
	for range depth {
		if err := <-errs; err != nil {
			b.Fatal(err)
		}
	}
}
