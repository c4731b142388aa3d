package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// client uses the volume through one gateway, one operation after another.
type client struct {
	w    *world
	g    *gateway
	name string
	rng  *rand.Rand
	hot  int // pages it likes best
}

func (w *world) addClient(g *gateway, i int) *client {
	name := fmt.Sprintf("%s.c%d", g.name, i)
	return &client{w: w, g: g, name: name, rng: rand.New(rand.NewPCG(w.seed, w.hash("client", name))), hot: 4}
}

// run works until ctx ends.
func (c *client) run(ctx context.Context) {
	for ctx.Err() == nil {
		s, changed := c.g.serves()
		if s == nil {
			select {
			case <-changed:
				c.w.sleep(ctx, c.name, time.Duration(c.rng.IntN(2000))*time.Microsecond)
			case <-ctx.Done():
			}
			continue
		}
		c.step(s)
		s.calls.Done()
		pause := time.Duration(c.rng.IntN(2*c.w.cfg.pauseMs*1000)) * time.Microsecond
		if c.rng.IntN(50) == 0 {
			pause *= 20
		}
		c.w.sleep(ctx, c.name, pause)
	}
}

// step does one operation. Clients never give up before the product does: all
// that they call must end (I9).
func (c *client) step(s *serving) {
	o := &op{client: c.name, era: s.era, pages: 1 + c.rng.IntN(3)}
	o.page = c.rng.IntN(c.w.cfg.pages - o.pages + 1)
	if c.rng.IntN(4) > 0 {
		o.page = c.rng.IntN(min(c.hot, c.w.cfg.pages-o.pages+1))
	}
	switch x := c.rng.IntN(100); {
	case x < 50:
		o.kind, o.fua = opWrite, c.rng.IntN(8) == 0
	case x < 85:
		// A read of scattered pages asks for them side by side, at one moment,
		// and the scheduler would decide which node gets which.
		o.kind, o.pages = opRead, 1
	case x < 91:
		o.kind, o.fua = opZero, c.rng.IntN(8) == 0
	default:
		o.kind, o.page, o.pages = opFlush, 0, 0
	}
	c.do(s, o)
}

// do carries out an operation and notes it.
func (c *client) do(s *serving, o *op) {
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	c.w.history.begin(o)
	err := c.call(ctx, s, o)
	c.w.history.end(o, err)
	if o.ended-o.call > opTimeout+time.Second {
		c.w.broken("I9: %v took %v", o, o.ended-o.call)
	}
	c.judge(s, o, err)
}

// opTimeout is the longest that a client waits.
const opTimeout = 25 * time.Second

func (c *client) call(ctx context.Context, s *serving, o *op) error {
	off, n := int64(o.page)*atoll.BlockSize, int64(o.pages)*atoll.BlockSize
	switch o.kind {
	case opRead:
		p := make([]byte, n)
		if err := s.vol.Read(ctx, p, off); err != nil {
			return err
		}
		for i := range o.pages {
			val, ok := parse(p[i*atoll.BlockSize:][:atoll.BlockSize], o.page+i)
			if !ok {
				c.w.broken("I5: %s read bytes at page %d that nobody wrote there (they name value %d)", c.name, o.page+i, val)
			}
			o.got = append(o.got, val)
		}
		return nil
	case opWrite:
		b := host.Alloc(int(n))
		defer b.Release()
		for i := range o.pages {
			fill(b.Bytes()[i*atoll.BlockSize:][:atoll.BlockSize], o.page+i, o.val)
		}
		return s.vol.Write(ctx, b, b.Bytes(), off, o.fua)
	case opZero:
		if o.fua {
			return s.vol.Zero(ctx, off, n, true, true)
		}
		return s.vol.Discard(ctx, off, n, false)
	}
	return s.vol.Flush(ctx)
}

// judge has the volume opened again after an error that stays, as an operator
// or a gateway would.
func (c *client) judge(s *serving, o *op, err error) {
	switch {
	case err == nil || errors.Is(err, atoll.ErrClosed) || errors.Is(err, atoll.ErrFenced):
	case errors.Is(err, atoll.ErrCorrupt):
		c.w.broken("I1: %v", o)
	case o.kind == opFlush || o.fua || c.rng.IntN(4) == 0:
		c.w.note("reopen", c.g.name)
		s.fail()
	}
}
